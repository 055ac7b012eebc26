"""Denoise, noise, and both: the mean of the first and minus the second, in every analysis that has a direction."""

import numpy as np
import pytest
import torch
import xarray as xr

from interp import activation_patching, edge_patching
from interp.directions import BASES, SIDES, metric_attrs, other_side, warn_small_gap
from interp.errors import OptionError
from interp.interventions import Patch, PatchedRuns
from interp.metrics import METRICS
from interp.patching import patch_nodes
from tests.small_pairs import refused, sites_of, small_pairs

DOUBLE = torch.float64
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2"])
BOTH_SIGN = "mean of metric(patched) - metric(corrupt) and metric(clean) - metric(patched): positive means the clean value helps"


def assert_mean_of(both: xr.DataArray, there: xr.DataArray, back: xr.DataArray) -> None:
    """both == (there - back) / 2, with the coordinates of either."""
    assert both.dims == there.dims
    np.testing.assert_allclose(both, (there - back) / 2, rtol=1e-10, atol=1e-13)
    assert not np.allclose(there, -back, equal_nan=True)  # or nothing was averaged
    for name, coord in there.coords.items():
        if name.startswith("metric_"):
            np.testing.assert_allclose(both[name], coord, rtol=1e-12)
        else:
            assert both[name].equals(coord), name


def test_the_two_sides_are_each_others_other():
    assert set(SIDES) == {"clean", "corrupt"}
    assert all(other_side(other_side(side)) == side != other_side(side) for side in SIDES)
    assert {name: list(bases) for name, bases in BASES.items()} == {
        "denoise": ["corrupt"], "noise": ["clean"], "both": ["corrupt", "clean"],
    }  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("engine", ["sweep", "hooks"])
def test_both_directions_of_activation_patching(tiny, family, engine):
    model, pairs = tiny(family, DOUBLE), small_pairs(length=5, lengths=[5, 4], differ=(1, 2))
    sites = ["resid_pre", "head", "k"] if engine == "hooks" else sites_of(model)
    options = {"engine": engine, "neurons": ["m0.n3", "m1.n7"]}
    there, back, both = (activation_patching(model, pairs, sites, direction=d, **options) for d in BASES)
    for name in there:
        assert_mean_of(both[name], there[name], back[name])
    assert both.attrs["direction"] == "both"
    assert both.attrs["sign"] == BOTH_SIGN
    assert {k: v for k, v in both.attrs.items() if k not in ("direction", "sign")} == {
        k: v for k, v in there.attrs.items() if k not in ("direction", "sign")
    }


def test_both_directions_of_windows_metrics_and_shares(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs()
    options = {"window": 2, "metric": ["logit_diff", "probability"], "normalize": True, "positions": "all"}
    there, back, both = (activation_patching(model, pairs, "mlp_out", direction=d, **options) for d in BASES)
    assert set(both) == {"mlp_out", "mlp_out_summed"}
    for name in both:
        assert both[name].dims == ("metric", "prompt", "layer")
        assert_mean_of(both[name], there[name], back[name])
    assert both.attrs["unit"] == "share of clean - corrupt"


def test_both_directions_are_the_shapley_value_of_the_clean_place(tiny):
    """Of a place and all the rest, in either order: what the clean value of the place adds."""
    model, pairs = tiny("llama3", DOUBLE), small_pairs()
    both = activation_patching(model, pairs, "attn_out", direction="both").sel(layer=1, position=3)
    logit_diff, values = METRICS["logit_diff"], {}
    for base in SIDES:
        runs = PatchedRuns(model, pairs, base=base, sites=["attn_out"])
        values[base] = logit_diff(runs.plain(base), pairs)
        values[f"{base}, patched"] = logit_diff(runs.patched((Patch("attn_out", 1, None, 3),)), pairs)
    first, last = values["corrupt, patched"] - values["corrupt"], values["clean"] - values["clean, patched"]
    np.testing.assert_allclose(both, (first + last) / 2, rtol=1e-9)


@FAMILIES
def test_the_whole_stream_adds_the_gap_in_both_directions(tiny, family):
    both = activation_patching(tiny(family, DOUBLE), small_pairs(), "resid_pre", positions="all", direction="both")
    np.testing.assert_allclose(both / (both.metric_clean - both.metric_corrupt), 1, rtol=1e-12)


def test_both_directions_of_single_nodes(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(lengths=[4, 6], differ=(1, 2))
    there, back, both = (patch_nodes(model, pairs, ["a1.h2", "m0", "m2.n5"], direction=d) for d in BASES)
    assert_mean_of(both, there, back)
    assert (both.attrs["direction"], both.attrs["sign"]) == ("both", BOTH_SIGN)


@FAMILIES
def test_both_directions_of_edge_patching(tiny, family):
    model, pairs = tiny(family, DOUBLE), small_pairs(length=5, lengths=[5, 4], differ=(1, 2))
    for options in ({}, {"edges": ["a0.h1->m1", "m0->logits"], "normalize": True, "metric": "probability"}):
        there, back, both = (edge_patching(model, pairs, direction=d, **options) for d in BASES)
        assert_mean_of(both, there, back)
        assert (both.attrs["direction"], both.attrs["sign"]) == ("both", BOTH_SIGN)
        assert {k: v for k, v in both.attrs.items() if k not in ("direction", "sign")} == {
            k: v for k, v in there.attrs.items() if k not in ("direction", "sign")
        }


def test_an_unknown_direction_is_said(tiny):
    for analysis in (lambda m, p, **o: activation_patching(m, p, "head", **o), edge_patching):
        with refused(OptionError, "'boht' is not a direction .*did you mean 'both'"):
            analysis(tiny("gpt2"), small_pairs(), direction="boht")


def test_how_to_read_a_score():
    metrics = [METRICS["logit_diff"], METRICS["probability"], METRICS["answer_logit"]]
    about = {direction: metric_attrs(metrics, direction) for direction in BASES}
    assert about["denoise"]["sign"] == "metric(patched) - metric(corrupt): positive means the patch raises the metric"
    assert about["noise"]["sign"] == "metric(patched) - metric(clean): positive means the patch raises the metric"
    assert about["both"]["sign"] == BOTH_SIGN
    assert about["both"]["metric"] == "logit_diff, probability, answer_logit"
    assert about["both"]["unit"] == "logits, probability"
    assert metric_attrs(metrics, "both", normalize=True)["unit"] == "share of clean - corrupt"


def test_a_small_gap_is_warned_of_by_prompt():
    with pytest.warns(
        UserWarning, match=r"\|logit_diff\(clean\) - logit_diff\(corrupt\)\| is near zero on prompts 1, 3:"
    ):
        warn_small_gap(torch.tensor([1.0, 0.01, -2.0, 0.0, 1.5]), "logit_diff")
    warn_small_gap(torch.tensor([1.0, 0.1, -2.0]), "logit_diff")
