"""Maps as ECharts options: every number of the array is in the option under its place, and nothing else is."""

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.charts import (
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
