"""Maps as ECharts options: every number of the array is in the option under its place, and nothing else is."""

import json
from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app import circuits
from app.charts import (
    _SHARES,
    LABELLED,
    MARKS,
    MAX_SMALL,
    attention,
    attention_grid,
    cell_order,
    heatmap,
    height_of,
    token_strip,
    visible,
)
from interp.errors import OptionError
from interp.plots import LOWERS, RAISES, SCALE
from tests.small_pairs import refused

HOSTILE = ["<script>alert(1)</script>", "\"'&", "a\nb", "\u200b", "\u202eabc", "{b}", ""]

arrays = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
    elements=st.one_of(st.just(np.nan), st.floats(-1e6, 1e6, allow_nan=False)),
)


def layers_by_position(values, tokens=None) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    tokens = [f"{i}:t" for i in range(values.shape[1])] if tokens is None else tokens
    coords = {"layer": range(len(values)), "position": range(values.shape[1]), "token": ("position", tokens)}
    attrs = {"metric": "logit_diff", "unit": "logits", "direction": "noise", "site": "resid_pre"}
    return xr.DataArray(values, coords, ("layer", "position"), attrs=attrs)


@given(values=arrays)
def test_a_map_holds_each_number_at_its_place_and_leaves_out_what_is_not_there(values):
    option = heatmap(layers_by_position(values))
    found = np.full(values.shape, np.nan)
    for cell in option["series"][0]["data"]:
        x, y, value = cell["value"]
        found[y, x] = value
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-12)
    json.dumps(option, allow_nan=False)  # plain Python numbers, none of them NaN


@given(values=arrays)
def test_the_order_of_cells_is_that_of_the_map(values):
    option = heatmap(layers_by_position(values))
    assert [(c["value"][1], c["value"][0]) for c in option["series"][0]["data"]] == cell_order(
        layers_by_position(values)
    )


@given(values=arrays)
def test_names_are_unique_so_that_a_click_selects_one_cell(values):
    names = [c["name"] for c in heatmap(layers_by_position(values, ["same"] * values.shape[1]))["series"][0]["data"]]
    assert len(set(names)) == len(names)


@given(values=arrays)
def test_colours_are_symmetric_about_zero(values):
    bar = heatmap(layers_by_position(values))["visualMap"]
    assert bar["min"] == -bar["max"] < 0
    finite = np.abs(values[np.isfinite(values)])
    assert bar["max"] >= finite.max(initial=0.0)


def test_layer_0_is_at_the_bottom_and_the_unit_at_the_bar():
    option = heatmap(layers_by_position(np.eye(2)), title="Exact")
    assert option["yAxis"]["data"] == ["0", "1"]
    assert "inverse" not in option["yAxis"]
    assert option["visualMap"]["text"][0] == "logits"
    assert option["title"]["text"] == "Exact"
    assert "patched − clean" in option["title"]["subtext"]


def test_a_difference_of_two_maps_says_whose_and_not_which_way_was_patched():
    option = heatmap(layers_by_position(np.eye(2)).assign_attrs(difference="ours − theirs"))
    assert option["title"]["subtext"] == "logit_diff (logits), ours − theirs, blue = above 0"


def test_a_given_limit_and_subtitle_are_taken():
    option = heatmap(layers_by_position(np.eye(2)), limit=5.0, subtitle="of all")
    assert (option["visualMap"]["max"], option["title"]["subtext"]) == (5.0, "of all")


def test_marks_are_frames_of_cells_that_are_there_and_catch_no_click():
    values = np.array([[1.0, np.nan], [2.0, 3.0]])
    option = heatmap(layers_by_position(values), marks={(1, 0): "selected", (0, 1): "pinned", (7, 7): "pinned"})
    frames = option["series"][1]
    assert [f["value"][:2] for f in frames["data"]] == [[0, 1]]
    assert frames["data"][0]["itemStyle"]["borderColor"] == MARKS["selected"]
    assert frames["silent"]
    assert option["visualMap"]["seriesIndex"] == 0


def test_no_marks_no_second_layer():
    assert len(heatmap(layers_by_position(np.eye(2)))["series"]) == 1


def test_labels_are_short_in_the_cell_whole_in_the_name_and_never_templates():
    labels = np.array([[" considerably", "{b}"]], dtype=object)
    cells = heatmap(layers_by_position([[1.0, -1.0]]), labels=labels)["series"][0]["data"]
    assert cells[0]["name"].endswith(", ␣considerably")
    assert cells[0]["label"]["formatter"] == "␣cons…"
    assert "{" not in cells[1]["label"]["formatter"]


def test_narrow_cells_have_no_labels_but_keep_their_names():
    values = np.ones((1, LABELLED + 1))
    cells = heatmap(layers_by_position(values), labels=np.full(values.shape, "word", object))["series"][0]["data"]
    assert all("label" not in c and c["name"].endswith(", word") for c in cells)


def test_dark_cells_have_light_labels():
    cells = heatmap(layers_by_position([[1.0, 0.1]]), labels=np.array([["a", "b"]]))["series"][0]["data"]
    assert cells[0]["label"]["color"] == "#ffffff" != cells[1]["label"]["color"]


def test_a_map_has_two_axes():
    with refused(OptionError, "two axes"):
        heatmap(layers_by_position(np.eye(2)).isel(layer=0))


def test_more_rows_are_higher():
    assert (
        height_of(layers_by_position(np.zeros((2, 2))))
        <= height_of(layers_by_position(np.zeros((8, 2))))
        < height_of(layers_by_position(np.zeros((40, 2))))
    )


# ------------------------------------------------------------------------------------------------------ attention


def causal(heads: int, width: int) -> np.ndarray:
    values = np.tril(np.random.default_rng(0).random((heads, width, width)))
    return values / values.sum(-1, keepdims=True)


def test_a_pattern_shows_keys_up_to_the_query():
    pattern = causal(1, 4)[0]
    option = attention(pattern, ["a"] * 4)
    cells = [c["value"] for c in option["series"][0]["data"]]
    assert [(q, k) for k, q, _ in cells] == [(q, k) for q in range(4) for k in range(q + 1)]
    np.testing.assert_allclose([v for *_, v in cells], [pattern[q, k] for k, q, _ in cells], rtol=1e-3)
    assert option["yAxis"]["inverse"]  # the first query on top, as one reads
    json.dumps(option, allow_nan=False)


def test_small_maps_are_one_for_each_head_with_one_colour_range():
    option = attention_grid(causal(5, 3), ["a", "b", "c"])
    assert len(option["grid"]) == len(option["series"]) == len(option["title"]) == 5
    assert option["visualMap"]["seriesIndex"] == [0, 1, 2, 3, 4]
    assert [s["xAxisIndex"] for s in option["series"]] == [0, 1, 2, 3, 4]
    json.dumps(option, allow_nan=False)


def test_too_many_small_cells_are_refused_in_numbers():
    with refused(OptionError, f"more than {MAX_SMALL:,}"):
        attention_grid(np.zeros((40, 40, 40)), ["a"] * 40)


def test_small_maps_have_axes_with_names():
    option = attention_grid(causal(5, 3), ["a", "b", "c"])
    assert [axis.get("name") for axis in option["yAxis"]] == ["query position →", None, None, None, "query position →"]
    assert [bool(axis.get("name")) for axis in option["xAxis"]] == [False, True, True, True, True]


# --------------------------------------------------------------------------------------------------------- colours

# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1,
# on linear RGB
EYES = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as these eyes see it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.array(TO_XYZ) @ np.clip(np.array(EYES[eyes]) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = (np.cbrt(v) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(first, second, eyes: str) -> float:
    """The smallest CIE76 distance of a colour here to another one there."""
    return min(np.linalg.norm(lab(a, eyes) - lab(b, eyes)) for a in first for b in second if a != b)


STOPS = [colour for _, colour in SCALE]


@pytest.mark.parametrize("eyes", EYES)
def test_the_diverging_scale_is_told_apart_by_any_eyes(eyes):
    """2.3 is a difference that is just noticed; equal sizes of either sign are ten times as far from each other, at least."""
    assert all(nearest([a], [b], eyes) > 30 for a, b in zip(STOPS[:2], STOPS[:2:-1], strict=True))
    lightness = [lab(colour, eyes)[0] for colour in STOPS]
    assert np.all(np.diff(lightness[:3]) > 15), "size is lightness"
    assert np.all(np.diff(lightness[2:]) < -15)
    assert np.all(np.diff([lab(colour, eyes)[0] for colour in _SHARES]) < -5), "so is a share"


@pytest.mark.parametrize("eyes", EYES)
def test_colours_of_kinds_are_told_apart_by_any_eyes(eyes):
    pairs = [(RAISES, LOWERS), circuits.LIGHT, circuits.DARK]
    assert all(nearest([a], [b], eyes) > 50 for a, b in pairs)
    assert nearest([MARKS["pinned"]], [*STOPS, MARKS["selected"], "#ffffff"], eyes) > 30
    assert nearest([MARKS["selected"]], STOPS, eyes) > 15
    groups = [*circuits.GROUP_COLOURS, circuits.SELECTED]
    assert min(nearest([a], [b], eyes) for a, b in combinations(groups, 2)) > 15
    fills = dict.fromkeys(circuits._FILLS.values())
    assert min(nearest([a], [b], eyes) for a, b in combinations(fills, 2)) > 11, (
        "of large areas, whose names stand on them"
    )


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_tokens_are_escaped_in_the_strip(text):
    strip = token_strip([text, "b"], ["a", "b"], relevance=[1.0, -0.5])
    assert "<script" not in strip
    assert "\"'&<" not in strip
    assert strip.count("<div") == strip.count("</div>") == 3


def test_differing_tokens_are_framed_and_equal_ones_are_a_dot():
    strip = token_strip(["a", " b"], ["a", " c"])
    assert strip.count(MARKS["selected"]) == 2  # both rows of position 1
    assert strip.count("·") == 1
    assert "␣b" in strip
    assert "␣c" in strip


def test_relevance_colours_by_sign():
    strip = token_strip(["a", "b", "c"], ["a", "b", "c"], relevance=[1.0, -1.0, 0.0])
    assert "rgb(5,48,97)" in strip  # the blue end of the scale
    assert "rgb(103,0,31)" in strip  # the red one
    assert "rgb(247,247,247)" in strip


def test_relevance_of_nothing_divides_by_nothing():
    assert "rgb(247,247,247)" in token_strip(["a"], ["a"], relevance=[0.0])


def test_visible_draws_white_space():
    assert visible(" a\n\t") == "␣a⏎⇥"
