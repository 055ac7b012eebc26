"""The right token with the right number in the right cell, and nothing a reader could mistake."""

import json

import numpy as np
import pytest
import xarray as xr

from interp import plots
from interp.errors import OptionError
from interp.relevance import norm_x_logit, token_relevance
from interp.token_plots import token_heatmap
from tests.small_pairs import small_pairs


def scores(values, tokens, **coords) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    axes = {"prompt": range(len(values)), "position": range(values.shape[1])}
    axes["token"] = (("prompt", "position"), tokens)
    attrs = {"metric": "logit_diff", "unit": "logits"}
    return xr.DataArray(values, axes | coords, ("prompt", "position"), attrs=attrs)


TWO = scores([[1.0, -3.0, 0.5], [0.0, 2.0, np.nan]], [[" When", "\n", "<b>&"], ["a", " b", ""]])


def test_cells_hold_each_prompts_own_tokens():
    (trace,) = token_heatmap(TWO).data
    np.testing.assert_array_equal(np.asarray(trace.z, float), TWO.values)
    assert np.asarray(trace.text).tolist() == [["␣When", "⏎", "&lt;b&gt;&amp;"], ["a", "␣b", ""]]
    assert trace.texttemplate == "%{text}"
    assert trace.customdata[0][1] == "prompt 0, position 1 ⏎<br>-3 logits"
    assert trace.customdata[1][1] == "prompt 1, position 1 ␣b<br>+2 logits"


def test_a_column_is_as_wide_as_its_longest_token():
    figure = token_heatmap(TWO)
    edges = np.asarray(figure.data[0].x)
    assert np.diff(edges).tolist() == [6.5, 3.5, 5.5]  # as it is drawn: ␣When, ␣b, <b>&
    np.testing.assert_array_equal(figure.layout.xaxis.tickvals, (edges[1:] + edges[:-1]) / 2)
    assert list(figure.layout.xaxis.ticktext) == [0, 1, 2]
    assert token_heatmap(scores([[1.0] * 60], [["token"] * 60])).layout.width > figure.layout.width


def test_the_scale_is_that_of_the_other_figures_and_centred():
    figure = token_heatmap(TWO, title="t")
    (trace,) = figure.data
    assert (trace.zmin, trace.zmax) == (-3, 3)
    assert [list(step) for step in trace.colorscale] == plots.SCALE
    assert trace.colorbar.title.text == "logit_diff (logits)<br>blue = positive"
    assert figure.layout.title.text == "t"
    assert figure.layout.yaxis.autorange == "reversed"  # the first prompt is read first


def test_padding_is_no_zero():
    figure = token_heatmap(TWO)
    assert figure.data[0].hoverongaps is False
    assert figure.layout.plot_bgcolor == plots.GREY
    assert np.isnan(np.asarray(figure.data[0].z, float)[1, 2])
    json.loads(figure.to_json())
    assert token_heatmap(scores([[0.0, 0.0]], [["a", "b"]])).data[0].zmax == 1


def test_rows_say_what_is_explained_and_what_is_not():
    told = TWO.assign_coords(metric=("prompt", [1.234, -2.0]), residual=("prompt", [0.001, -0.5]))
    assert list(token_heatmap(told).layout.yaxis.ticktext) == ["0: 1.23, rest +0.001", "1: -2, rest -0.5"]
    assert list(token_heatmap(TWO).layout.yaxis.ticktext) == ["0", "1"]


def test_only_the_first_prompts_are_drawn(tiny):
    pairs = small_pairs(n=4, lengths=[6, 4, 5, 6])
    found = token_relevance(tiny("gpt2"), pairs)
    figure = token_heatmap(found, n=3)
    assert np.asarray(figure.data[0].z).shape == (3, 6)
    np.testing.assert_allclose(np.asarray(figure.data[0].z, float), found[:3].values)
    assert np.asarray(token_heatmap(found).data[0].z).shape == (4, 6)
    one = token_heatmap(norm_x_logit(tiny("gpt2"), pairs)[[2]])
    assert one.layout.yaxis.ticktext[0].startswith("2: ")
    assert figure.layout.height >= one.layout.height


@pytest.mark.parametrize(
    "wrong",
    [TWO.T, TWO[0], TWO.drop_vars("token"), TWO.drop_vars("token").assign_coords(token=("position", list("abc")))],
)
def test_other_shapes_are_refused(wrong):
    with pytest.raises(OptionError, match=r"needs scores \[prompt, position\] and each prompt's own tokens"):
        token_heatmap(wrong)


def test_no_prompts_are_refused():
    with pytest.raises(OptionError, match="at least 1 prompt, not 0"):
        token_heatmap(TWO, n=0)
