"""Figures: the right numbers in the right cells, and nothing a reader could mistake."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp import activation_patching, plots
from interp.errors import OptionError
from tests.small_pairs import small_pairs

ATTRS = {"metric": "logit_diff", "unit": "logits", "direction": "denoise"}


def effects(values, dims=("layer", "position"), tokens=None, **attrs) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    array = xr.DataArray(values, dims=dims, coords={d: range(n) for d, n in zip(dims, values.shape, strict=True)})
    if tokens is not None:
        array = array.assign_coords(token=("position", tokens))
    return array.assign_attrs({**ATTRS, **attrs})


def drawn(figure):
    trace = figure.data[0]
    return np.asarray(trace.z, dtype=float), list(figure.layout.xaxis.ticktext), list(figure.layout.yaxis.ticktext)


def test_a_heatmap_shows_the_mean_over_prompts(tiny):
    found = activation_patching(tiny("gpt2"), small_pairs(lengths=[6, 4]), "resid_pre")
    z, x, y = drawn(plots.heatmap(found))
    np.testing.assert_allclose(z, found.mean("prompt").values, rtol=1e-6)
    assert x == found.token.values.tolist()
    assert y == ["0", "1", "2"]
    assert plots.heatmap(found).layout.yaxis.autorange in (None, True)  # layer 0 is at the bottom


@pytest.mark.parametrize(
    ("site", "options", "axes"),
    [
        ("head", {"positions": "all"}, ("layer", "head")),
        ("v", {"positions": "all"}, ("layer", "key/value head")),
        ("attn_out", {}, ("layer", "position and token")),
        ("neuron", {"neurons": ["m0.n1", "m2.n3"]}, ("neuron", "position and token")),
    ],
)
def test_every_two_axes_have_a_heatmap(tiny, site, options, axes):
    figure = plots.heatmap(activation_patching(tiny("llama3"), small_pairs(), site, **options))
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == axes


def test_one_head_by_position_and_one_layers_cells(tiny):
    heads = activation_patching(tiny("gpt2"), small_pairs(), "head")
    z, _, y = drawn(plots.heatmap(heads.sel(layer=1)))
    assert z.shape == (4, 6)
    assert y == ["0", "1", "2", "3"]
    cells = activation_patching(tiny("gpt2"), small_pairs(), "pattern", positions="cells").sel(layer=0, head=1)
    z, x, y = drawn(plots.heatmap(cells))
    assert x == y == cells.token.values.tolist()
    assert np.isnan(z[np.triu_indices(6, 1)]).all()


@pytest.mark.parametrize(("shape", "n"), [((3,), 1), ((2, 3, 4), 3)])
def test_other_than_two_axes_are_refused(shape, n):
    with pytest.raises(OptionError, match=rf"needs two axes, these effects have {n} \(layer"):
        plots.heatmap(effects(np.ones(shape), ("layer", "head", "position")[: len(shape)]))


def test_what_does_not_exist_is_grey_and_not_zero():
    figure = plots.heatmap(effects([[1.0, np.nan], [0.0, -2.0]]))
    z, _, _ = drawn(figure)
    assert np.isnan(z[0, 1])
    assert z[1, 0] == 0
    assert figure.layout.plot_bgcolor == plots.GREY != "white"
    assert figure.data[0].hoverongaps is False
    stored = json.loads(figure.to_json())["data"][0]["z"]
    assert stored[0][1] is None if isinstance(stored, list) else "bdata" in stored


@pytest.mark.parametrize(
    ("values", "limit"), [([[1.0, -3.0]], 3), ([[0.5, 2.0]], 2), ([[0.0, 0.0]], 1), ([[np.nan, np.nan]], 1)]
)
def test_zero_is_in_the_middle_of_the_colours(values, limit):
    trace = plots.heatmap(effects(values)).data[0]
    assert (trace.zmin, trace.zmax) == (-limit, limit)
    assert trace.colorscale[len(trace.colorscale) // 2] == (0.5, "#f7f7f7")
    fixed = plots.heatmap(effects(values), limit=7.5).data[0]
    assert (fixed.zmin, fixed.zmax) == (-7.5, 7.5)


@pytest.mark.parametrize(("direction", "base"), [("denoise", "corrupt"), ("noise", "clean")])
def test_the_colour_bar_says_unit_and_direction(direction, base):
    title = plots.heatmap(effects([[1.0, 2.0]], direction=direction)).data[0].colorbar.title.text
    for word in ("logit_diff", f"patched − {base}", "(logits)", "blue = raised"):
        assert word in title
    scale = plots.SCALE
    assert scale[0][1] == "#67001f"  # red: lowered
    assert scale[-1][1] == "#053061"  # blue: raised


def test_equal_labels_keep_their_own_rows_and_columns():
    z, x, _ = drawn(plots.heatmap(effects([[1.0, 2.0, 3.0]], tokens=["the", "the", "the"])))
    assert z.tolist() == [[1, 2, 3]]
    assert x == ["the"] * 3
    figure = plots.heatmap(effects([[1.0, 2.0, 3.0]], tokens=["the", "the", "the"]))
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]
    assert figure.data[0].x is None


def test_tokens_are_text_and_not_markup():
    figure = plots.heatmap(effects([[1.0, 2.0]], tokens=["<b>bold</b>", "a&b"]))
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;bold&lt;/b&gt;", "a&amp;b"]
    hover = np.asarray(figure.data[0].customdata)
    assert "&lt;b&gt;" in hover[0, 0]
    assert "<b>" not in hover[0, 0]
    assert "+1" in hover[0, 0]
    assert "logits" in hover[0, 0]


def test_axes_without_coordinates_are_numbered():
    array = xr.DataArray(np.ones((2, 3)), dims=("layer", "position"))
    assert plots.axis_labels(array, "position") == ["0", "1", "2"]
    assert plots.colour_title(array.attrs) == "value, blue = positive"


def ranking(n=5) -> pd.DataFrame:
    effect = np.array([3.0, -2.0, 1.0, 0.5, 0.0])[:n]
    return pd.DataFrame({
        "node": [f"a0.h{i}" for i in range(n)], "effect": effect, "low": effect - 0.5, "high": effect + 0.25,
        "share": effect / 4, "detected": [True, True, False, False, False][:n],
    })  # fmt: skip


def test_bars_have_intervals_and_the_strongest_on_top():
    figure = plots.ranking_bars(ranking(), ATTRS, n=3)
    bar = figure.data[0]
    assert list(bar.y) == ["a0.h2", "a0.h1", "a0.h0"]  # plotly draws the first at the bottom
    assert list(bar.x) == [1.0, -2.0, 3.0]
    np.testing.assert_allclose(bar.error_x.array, 0.25)
    np.testing.assert_allclose(bar.error_x.arrayminus, 0.5)
    assert list(bar.marker.color) == [plots.RAISES, plots.LOWERS, plots.RAISES]
    assert list(bar.marker.opacity) == [0.4, 1.0, 1.0]
    assert figure.layout.xaxis.title.text.startswith("logit_diff (logits), patched − corrupt")


def curve(recovered) -> xr.Dataset:
    n = len(recovered)
    recovered = np.asarray(recovered, dtype=float)
    return xr.Dataset(
        {"recovered": ("n", recovered), "low": ("n", recovered - 0.1), "high": ("n", recovered + 0.2),
         "node": ("n", ["", *(f"m{i}" for i in range(n - 1))])},
        coords={"n": range(n)}, attrs={"n_nodes": 9, "ablation": "mean", "metric": "logit_diff"},
    )  # fmt: skip


def test_the_curve_has_its_band_and_its_baseline():
    figure = plots.faithfulness_curve(curve([0.0, 0.5, 1.0]), curve([0.0, 0.1, 1.0]), title="t")
    assert [t.name for t in figure.data] == ["95 % interval", "ranked", "random order"]
    np.testing.assert_allclose(figure.data[0].y, [0.2, 0.7, 1.2, 0.9, 0.4, -0.1])
    assert list(figure.data[1].y) == [0, 0.5, 1]
    assert "of 9" in figure.layout.xaxis.title.text
    assert "mean ablation" in figure.layout.xaxis.title.text
    assert len(plots.faithfulness_curve(curve([0.0, 1.0])).data) == 2
