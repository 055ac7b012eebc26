"""Approximate scores lie where exact ones do: the same axes, labels and gaps, whatever was asked for."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from interp import activation_patching, attribution
from interp.errors import OptionError
from interp.rules import RULES, get_rules
from interp.sites import SITES
from tests.small_pairs import sites_of, small_pairs, with_other_padding

DOUBLE = torch.float64
NEURONS = ["m2.n5", "m0.n3", "m2.n1", "m1.n7"]  # in no order
ANY = ("gradient", "relp", "secant")


def assert_laid_out_alike(mine: xr.DataArray, exact: xr.DataArray) -> None:
    assert mine.dims == exact.dims
    assert set(mine.coords) == set(exact.coords)
    for name, coord in exact.coords.items():
        if name.startswith("metric_"):
            np.testing.assert_allclose(mine[name], coord, rtol=1e-9)
        else:
            assert mine[name].equals(coord), name
    assert mine.isnull().equals(exact.isnull())
    assert mine.dtype == exact.dtype


@pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia"])
@pytest.mark.parametrize("positions", ["each", "all", [0, -1, -2]], ids=["each", "all", "some"])
@pytest.mark.parametrize("rules", ["gradient", "secant"])
def test_scores_are_laid_out_as_exact_ones(tiny, family, positions, rules):
    model, pairs = tiny(family, DOUBLE), small_pairs(length=5, lengths=[5, 3], differ=(1, 2))
    options = {"positions": positions, "neurons": NEURONS}
    exact = activation_patching(model, pairs, sites_of(model), **options)
    found = attribution(model, pairs, sites_of(model), rules=rules, **options)
    assert list(found) == list(exact)
    for name in exact:
        assert_laid_out_alike(found[name], exact[name])
    for site in ("resid_pre", "head", "k", "pattern", "neuron"):
        single = attribution(model, pairs, site, rules=rules, **options)
        assert single.attrs["site"] == site
        np.testing.assert_array_equal(single, found[SITES[site].variable])


@pytest.mark.parametrize("rules", ANY)
def test_single_cells_of_a_pattern_add_up_to_its_rows(tiny, rules):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(length=5, lengths=[5, 3], differ=(1, 2))
    cells = attribution(model, pairs, "pattern", positions="cells", rules=rules)
    exact = activation_patching(model, pairs, "pattern", positions="cells", neurons=None)
    assert_laid_out_alike(cells, exact)
    assert cells.dims == ("prompt", "layer", "head", "position", "source")
    rows = attribution(model, pairs, "pattern", rules=rules)
    np.testing.assert_allclose(cells.sum("source"), rows.fillna(0), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rules", ANY)
def test_all_positions_are_the_sum_over_each_prompts_tokens(tiny, rules):
    model, pairs = tiny("llama3", DOUBLE), small_pairs(lengths=[6, 4], differ=(1, 2))
    options = {"rules": rules, "neurons": NEURONS}
    together, each = (attribution(model, pairs, sites_of(model), positions=p, **options) for p in ("all", "each"))
    for name, array in together.data_vars.items():
        assert "position" not in array.dims
        np.testing.assert_allclose(array, each[name].sum("position"), rtol=1e-11, atol=1e-13, err_msg=name)


def test_negative_positions_count_from_each_prompts_end(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(lengths=[4, 6], differ=(1, 2), seed=4)
    sites = ["resid_mid", "pattern", "head", "neuron"]
    ends, each = (attribution(model, pairs, sites, neurons=NEURONS, positions=p) for p in ([-1, 1, -3], "each"))
    for name, array in ends.data_vars.items():
        assert array.position.values.tolist() == [-1, 1, -3]
        for row, length in enumerate((4, 6)):
            for p, at in ((-1, length - 1), (1, 1), (-3, length - 3)):
                np.testing.assert_array_equal(array[row].sel(position=p), each[name][row].sel(position=at), name)


def test_without_a_list_every_neuron_is_scored(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs()
    every = attribution(model, pairs, "neuron")
    assert every.neuron.values.tolist() == [f"m{layer}.n{n}" for layer in range(3) for n in range(80)]
    some = attribution(model, pairs, "neuron", neurons=NEURONS)
    assert some.equals(every.sel(neuron=NEURONS))
    # an MLP writes what its neurons write: scores of all of them are the score of its output
    whole = attribution(model, pairs, "mlp_out")
    by_layer = every.values.reshape(2, 3, 80, 6).sum(2)
    np.testing.assert_allclose(by_layer, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", ANY)
def test_heads_add_up_to_what_attention_writes(tiny, rules):
    """The output of a layer is linear in its heads: their scores add up to that of attn_out. So are values and patterns."""
    model, pairs = tiny("llama3", DOUBLE), small_pairs(lengths=[6, 5])
    found = attribution(model, pairs, ["attn_out", "head"], rules=rules)
    heads = found.head_out.sum("head", skipna=False)
    np.testing.assert_allclose(heads, found.attn_out, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", ANY)
def test_batches_and_order_change_nothing(tiny, rules):
    model, pairs = tiny("gemma2", DOUBLE), small_pairs(n=3, length=5, lengths=[5, 4, 5], seed=3)
    sites = ["resid_pre", "head", "k", "pattern", "neuron"]
    together = attribution(model, pairs, sites, rules=rules)
    for size in (1, 2):
        apart = attribution(model, pairs, sites, rules=rules, batch_size=size)
        for name, array in apart.data_vars.items():
            np.testing.assert_allclose(array, together[name], rtol=1e-9, atol=1e-12, err_msg=name)
    moved = attribution(model, pairs.take([2, 0, 1]), "head", rules=rules)
    np.testing.assert_allclose(moved, together.head_out.values[[2, 0, 1]], rtol=1e-9, atol=1e-12)


def test_what_the_padding_holds_changes_nothing(tiny):
    pairs = small_pairs(n=2, lengths=[4, 6], seed=4)
    other = with_other_padding(pairs)
    for rules in ANY:
        mine, theirs = (attribution(tiny("llama3"), p, ["resid_pre", "pattern"], rules=rules) for p in (pairs, other))
        assert mine.equals(theirs)


@pytest.mark.parametrize("rules", ANY)
def test_several_metrics_in_one_call_are_each_alone(tiny, rules):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(lengths=[6, 5])
    metrics = ["logit_diff", "answer_logit", "log_probability", "probability", "kl_divergence"]
    together = attribution(model, pairs, "attn_out", metric=metrics, rules=rules)
    assert together.dims == ("metric", "prompt", "layer", "position")
    assert together.metric.values.tolist() == metrics
    assert together.metric_clean.dims == ("metric", "prompt")
    assert together.attrs["metric"] == ", ".join(metrics)
    for i, metric in enumerate(metrics):
        alone = attribution(model, pairs, "attn_out", metric=metric, rules=rules)
        np.testing.assert_allclose(together[i], alone, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(together.metric_clean[i], alone.metric_clean)
    assert attribution(model, pairs, "attn_out", metric=["logit_diff"], rules=rules).dims[0] == "metric"


def test_a_callable_is_a_metric(tiny):
    def doubled(logits):
        """Twice the logit of token 9."""
        return 2 * logits[:, 9]

    model, pairs = tiny("gpt2", DOUBLE), small_pairs()
    other = dataclasses.replace(pairs, answers=torch.tensor([[9], [9]]))
    mine = attribution(model, pairs, "attn_out", metric=doubled, rules="relp")
    named = attribution(model, other, "attn_out", metric="answer_logit", rules="relp")
    np.testing.assert_allclose(mine, 2 * named, rtol=1e-10, atol=1e-13)
    assert mine.attrs["metric"] == "doubled"


def test_normalising_divides_by_each_prompts_own_gap(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(n=3)
    plain, shares = (attribution(model, pairs, "mlp_out", normalize=n, rules="secant") for n in (False, True))
    np.testing.assert_allclose(shares, plain / (plain.metric_clean - plain.metric_corrupt), rtol=1e-12)
    assert shares.attrs["unit"] == "share of clean - corrupt"
    assert (plain.attrs["normalized"], shares.attrs["normalized"]) == (0, 1)


# ------------------------------------------------------------------------------------------------------------ attributes


def test_scores_say_how_they_were_made(tiny):
    model, pairs = tiny("llama3"), dataclasses.replace(small_pairs(), seed=7)
    found = attribution(
        model, pairs, ["resid_pre", "head"], rules="relp,pattern=frozen", direction="noise", positions=[0, 2]
    )
    a = found.attrs
    assert (a["method"], a["rules"], a["gradient_at"]) == ("attribution", "relp,pattern=frozen", "base")
    assert a["switches"] == str(get_rules("relp,pattern=frozen").settings())
    assert (a["direction"], a["metric"], a["unit"], a["positions"]) == ("noise", "logit_diff", "logits", "[0, 2]")
    assert a["sign"].startswith("metric(patched) - metric(clean)")
    assert (a["model"], a["task"], a["n_prompts"], a["seed"], a["dtype"]) == ("llama3", "random", 2, 7, "float32")
    assert found.resid_pre.attrs["site"] == "resid_pre"
    assert found.head_out.node.sel(layer=1, head=2).item() == "a1.h2"
    assert all(isinstance(value, str | int | float) for value in a.values())  # NetCDF, Zarr and JSON can all hold them
    assert all(coord.dtype != object for coord in found.coords.values())
    for rules, where in (("gradient", "base"), ("secant", "between base and source")):
        plain = attribution(model, pairs, "head", rules=rules)
        assert (plain.attrs["rules"], plain.attrs["gradient_at"]) == (rules, where)
        assert plain.attrs["switches"] == str(get_rules(rules).settings())
    assert attribution(model, pairs, "head", rules="relp", at="source").attrs["gradient_at"] == "source"


# ---------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2"])
def test_scores_in_half_precision_are_those_in_float32_roughly(tiny, family, dtype):
    """Other libraries report NaN and relevance that underflows to 0 there."""
    pairs, sites = small_pairs(lengths=[6, 5]), ["resid_pre", "attn_out", "neuron"]
    for rules in RULES:
        narrow, wide = (attribution(tiny(family, d), pairs, sites, rules=rules) for d in (dtype, torch.float32))
        for name, array in wide.data_vars.items():
            mine, theirs = narrow[name].values, array.values
            assert mine.dtype == np.float32
            assert np.array_equal(np.isnan(mine), np.isnan(theirs))
            known = ~np.isnan(theirs)
            error = np.linalg.norm(mine[known] - theirs[known]) / np.linalg.norm(theirs[known])
            assert error < (0.1 if dtype == torch.bfloat16 else 0.015), (rules, name, error)


def test_windows_are_for_exact_patching(tiny):
    with pytest.raises(TypeError, match="window"):
        attribution(tiny("gpt2"), small_pairs(), "resid_pre", window=2)
    with pytest.raises(OptionError, match="position"):
        attribution(tiny("gpt2"), small_pairs(), "resid_pre", positions=[])
