"""Scores from one backward pass: what they add up to, what they equal, and what they refuse.

Layout against exact patching: tests/test_node_attribution_layout.py. Rules by themselves: tests/test_rules*.py.
"""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

from interp import activation_patching, attribution, corrupt, get_rules
from interp.errors import MetricError, OptionError, RulesError, SiteError
from interp.rules import RULES
from interp.sites import SITES
from tests.families import FAMILIES, boot_family, true_float64
from tests.small_pairs import refused, sites_of, small_pairs

CANONICAL = [name for name in FAMILIES if name != "falcon"]
# learned positions; grouped queries and scaled rotary; post-norms, soft-caps, windows; post-norms only; parallel
FEW = ("gpt2", "llama3", "gemma2", "olmo2", "pythia")
SOME = pytest.mark.parametrize("family", FEW)
DIRECTIONS = pytest.mark.parametrize("direction", ["denoise", "noise"])
DOUBLE = torch.float64


def gap(array, direction: str = "denoise") -> xr.DataArray:
    """metric(source) - metric(base)."""
    return (array.metric_clean - array.metric_corrupt) * (1 if direction == "denoise" else -1)


def cuts_of(model) -> list[str]:
    return [site for site in sites_of(model) if site.startswith("resid")]


def arrays(result) -> list[xr.DataArray]:
    return [result] if isinstance(result, xr.DataArray) else list(result.data_vars.values())


def several_answers(n: int = 2, **options):
    """One to three answers and wrong answers to each prompt, -1 where there are fewer."""
    pairs = small_pairs(n, **options)
    right, wrong = torch.tensor([[7, 9, 21], [30, -1, -1]]), torch.tensor([[40, -1], [41, 42]])
    return dataclasses.replace(pairs, answers=right[:n], wrong_answers=wrong[:n])


# --------------------------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("family", CANONICAL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_secants_add_up_to_the_gap_at_every_cut_and_change_sign_with_the_direction(tiny, family, dtype, tolerance):
    """P19, P21: sum over positions = metric(source) - metric(base), whatever the model is made of."""
    model, pairs = tiny(family, dtype), small_pairs(lengths=[6, 5])
    scores = {d: attribution(model, pairs, cuts_of(model), rules="secant", direction=d) for d in ("denoise", "noise")}
    for direction, found in scores.items():
        for cut in arrays(found):
            np.testing.assert_allclose(cut.sum("position") / gap(found, direction), 1, rtol=0, atol=tolerance)
    for there, back in zip(*map(arrays, scores.values()), strict=True):
        np.testing.assert_allclose(there, -back, rtol=0, atol=tolerance * np.nanmax(abs(there.values)))


@SOME
@pytest.mark.parametrize(
    "metric", ["answer_logit", "log_probability", "probability", "probability_diff", "kl_divergence"]
)
def test_secants_are_complete_for_metrics_that_are_not_linear(tiny, family, metric):
    model, pairs = tiny(family, DOUBLE), several_answers(lengths=[5, 6])
    for direction in ("denoise", "noise"):
        found = attribution(model, pairs, "resid_pre", rules="secant", metric=metric, direction=direction)
        target = np.broadcast_to(gap(found, direction).values[:, None], (2, model.cfg.n_layers))
        np.testing.assert_allclose(found.sum("position"), target, rtol=1e-9, atol=1e-12)
        assert (abs(target) > 1e-5).all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["gaussian", "zero", "mean"])
def test_secants_are_complete_with_corrupted_embeddings(tiny, family, kind):
    model = tiny(family, DOUBLE)
    pairs = corrupt(model, small_pairs(n=3, differ=(2, 4), seed=5), kind, seed=1)
    found = attribution(model, pairs, "resid_pre", rules="secant", positions="all")
    np.testing.assert_allclose(found / gap(found), 1, rtol=0, atol=1e-9)
    gradient = attribution(model, pairs, "resid_pre")
    assert (gradient.sel(layer=0, position=[0, 1, 3, 5]) == 0).all()
    assert (gradient.sel(layer=0, position=[2, 4]) != 0).all()


def test_other_rules_do_not_add_up_to_the_gap(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs()
    for name in (set(RULES) - {"secant"}) | {"secant,norm_scale=frozen", "secant,query_key=exact"}:
        found = attribution(model, pairs, "resid_pre", rules=name, positions="all").sel(layer=0)
        assert (abs(found / gap(found) - 1) > 1e-3).all(), name


# ------------------------------------------------------------------------------------------------ one pass, and patching


@SOME
@DIRECTIONS
def test_a_single_position_that_changes_is_patched_exactly(tiny, family, direction):
    """Where at some cut one position differs alone, its secant score is no estimate."""
    model, pairs = tiny(family, DOUBLE), small_pairs(differ=(2,), lengths=[6, 5])
    found = attribution(model, pairs, ["resid_pre", "resid_post"], rules="secant", direction=direction)
    exact = activation_patching(model, pairs, ["resid_pre", "resid_post"], direction=direction)
    first = {"layer": 0, "position": 2}
    np.testing.assert_allclose(found.resid_pre.sel(first), exact.resid_pre.sel(first), rtol=1e-9)
    # and behind the last layer only the position that is read
    last = {"layer": -1}
    np.testing.assert_allclose(found.resid_post.isel(last), exact.resid_post.isel(last), rtol=1e-9, atol=1e-12)


@SOME
@pytest.mark.parametrize("rules", ["gradient", "relp", "attnlrp", "secant"])
def test_nothing_scores_before_the_first_difference(tiny, family, rules):
    """Exactly 0 where nothing differs yet: sites whose rank would otherwise be rounding."""
    model, pairs = tiny(family), small_pairs(length=5, differ=(2,))
    for array in arrays(attribution(model, pairs, sites_of(model), rules=rules)):
        assert (array.sel(position=[0, 1]) == 0).all(), array.attrs["site"]
    stream = attribution(model, pairs, "resid_pre", rules=rules)
    assert (stream.sel(layer=0, position=[0, 1, 3, 4]) == 0).all()
    assert (stream.sel(layer=0, position=2) != 0).all()


@pytest.mark.parametrize("rules", RULES)
def test_equal_prompts_score_nothing(tiny, rules):
    pairs = small_pairs()
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    with pytest.warns(UserWarning, match="near zero on prompts 0, 1"):
        found = attribution(tiny("llama3"), pairs, ["resid_pre", "head", "neuron"], rules=rules)
    assert all((array == 0).all() for array in arrays(found))


def nearly_equal(model, step: float):
    """Pairs whose corrupt embeddings are the clean ones but for `step` times noise."""
    pairs = corrupt(model, small_pairs(n=2, differ=(1, 2, 4)), "gaussian", seed=1)
    resid = model.embed.W_E[pairs.clean] * model.cfg.embed_scale
    return dataclasses.replace(pairs, embedding_noise=resid + step * (pairs.embedding_noise - resid))


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2"])
def test_for_a_small_difference_gradient_and_secant_become_exact_and_relp_does_not(tiny, family):
    """P12: first order. RelP's slopes f(x)/x are no derivatives, however small the step."""
    model, step = tiny(family, DOUBLE), 1e-4
    pairs = nearly_equal(model, step)
    sites = ["resid_pre", "attn_out", "mlp_out", "head"]
    exact = activation_patching(model, pairs, sites)
    for rules, consistent in (
        ("gradient", True),
        ("secant", True),
        ("ln-only", False),
        ("relp", False),
        ("attnlrp", False),
    ):
        found = attribution(model, pairs, sites, rules=rules)
        for name, array in exact.data_vars.items():
            error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
            assert (error < 10 * step) if consistent else (error > 0.05), (rules, name, error)


@SOME
def test_between_runs_that_hardly_differ_the_secant_is_the_gradient_at_every_site(tiny, family):
    model = tiny(family, DOUBLE)
    pairs, sites = nearly_equal(model, 1e-4), sites_of(model)
    gradient, secant = (arrays(attribution(model, pairs, sites, rules=r)) for r in ("gradient", "secant"))
    for a, b in zip(gradient, secant, strict=True):
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(a), a.attrs["site"]


# --------------------------------------------------------------------------------------------------------- the gradient


def by_hand(model, pairs, site: str, layer: int, base: str) -> torch.Tensor:
    """gradient * (source - base) at a hook point, in a few lines of torch: logit difference, one run each."""
    held, name, source = {}, SITES[site].hook(layer), "clean" if base == "corrupt" else "corrupt"

    def keep(value, hook):
        held[hook.name] = value if base_run else value.detach()
        if base_run:
            value.retain_grad()

    def leaf(value, hook):
        return value.detach().requires_grad_()

    base_run, rows = False, torch.arange(len(pairs))
    model.run_with_hooks(pairs.tokens(source), fwd_hooks=[(name, keep)])
    there, base_run = held[name], True
    logits = model.run_with_hooks(pairs.tokens(base), fwd_hooks=[("hook_embed", leaf), (name, keep)])
    logits = logits[rows, pairs.read_at]
    (logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.wrong_answers[:, 0]]).sum().backward()
    return held[name].grad * (there - held[name].detach())


@SOME
@DIRECTIONS
def test_the_gradient_rule_is_attribution_patching(tiny, family, direction):
    model, pairs, layer = tiny(family, DOUBLE), small_pairs(lengths=[6, 4], differ=(1, 3)), 1
    base = "corrupt" if direction == "denoise" else "clean"
    found = attribution(model, pairs, sites_of(model), direction=direction)
    for site in sites_of(model):
        array, product = found[SITES[site].variable], by_hand(model, pairs, site, layer, base)
        if site == "neuron":
            mine = array.sel(neuron=[f"m{layer}.n{n}" for n in range(80)]).transpose("prompt", "position", "neuron")
        elif site == "pattern":  # [prompt, head, query, key]
            mine, product = array.sel(layer=layer), product.sum(-1)
        elif SITES[site].unit is not None:
            mine, product = array.sel(layer=layer).transpose("prompt", "position", ...), product.sum(-1)
        else:
            mine, product = array.sel(layer=layer), product.sum(-1)
        padding = np.isnan(mine.values)
        np.testing.assert_allclose(mine.fillna(0), product.masked_fill(torch.tensor(padding), 0), rtol=1e-9, atol=1e-12)
        assert padding.sum() == padding.size * 2 / 12  # two of six positions of one prompt of two


def test_the_gradient_rule_is_transformer_lens_attribution_patching(tiny, tmp_path):
    """TransformerLens scores one run's nodes at its own gradients on its own model, and averages over prompts."""
    from transformer_lens.tools.analysis import attribution_patch

    bridge, model, pairs = boot_family("gpt2", tmp_path / "gpt2", DOUBLE), tiny("gpt2", DOUBLE), small_pairs()
    pairs = dataclasses.replace(pairs, answers=torch.tensor([[7], [7]]), wrong_answers=torch.tensor([[11], [11]]))

    def logit_diff(logits):
        return logits[0, -1, 7] - logits[0, -1, 11]

    with true_float64():
        theirs = attribution_patch(bridge, pairs.clean, pairs.corrupt, logit_diff).node_scores
    ours = attribution(model, pairs, ["head", "mlp_out"]).mean("prompt")
    compared = 0
    for node, score in theirs.items():
        if node.kind == "embed":
            continue
        at = {"layer": node.layer, "position": node.position}
        mine = ours.head_out.sel({**at, "head": node.head}) if node.kind == "attn_head_out" else ours.mlp_out.sel(at)
        assert mine == pytest.approx(score, rel=1e-6, abs=1e-9)
        compared += 1
    assert compared == 3 * 6 * (4 + 1)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "qwen3"])
def test_a_bridge_has_the_same_gradients(tiny, tmp_path, family):
    bridge, model, pairs = boot_family(family, tmp_path / family), tiny(family), small_pairs(lengths=[6, 5])
    sites = sites_of(model)
    for options in ({}, {"direction": "noise", "metric": "probability", "at": "source"}):
        ours, theirs = (attribution(m, pairs, sites, **options) for m in (model, bridge))
        for mine, other in zip(arrays(ours), arrays(theirs), strict=True):
            scale = np.nanmax(abs(mine.values))
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4 * scale, err_msg=mine.attrs["site"])
            assert mine.dims == other.dims
    for name in set(RULES) - {"gradient"}:
        with pytest.raises(RulesError, match=r"at TransformerBridge; load the model with load_model instead"):
            attribution(bridge, pairs, "resid_pre", rules=name)


# ------------------------------------------------------------------------------------------- where the gradient is taken


@pytest.mark.parametrize("rules", ["gradient", "relp"])
def test_both_directions_are_the_mean_of_one_and_minus_the_other(tiny, rules):
    model, pairs, sites = tiny("llama3", DOUBLE), small_pairs(lengths=[6, 5]), ["resid_pre", "k"]
    score = lambda **options: arrays(attribution(model, pairs, sites, rules=rules, **options))  # noqa: E731
    there, back, both = (score(direction=d) for d in ("denoise", "noise", "both"))
    at_both, at_source = score(at="both"), score(at="source")
    for i, array in enumerate(both):
        np.testing.assert_allclose(array, (there[i] - back[i]) / 2, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(array, at_both[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(at_source[i], -back[i], rtol=1e-12, atol=1e-14)
        assert not np.allclose(there[i], -back[i], equal_nan=True, rtol=0.01)  # P21: only secants do not care
    assert [a[0].attrs["gradient_at"] for a in (there, at_source, at_both, both)] == ["base", "source", "both", "both"]


def test_secants_lie_between_the_runs_wherever_they_are_asked_for(tiny):
    model, pairs = tiny("gemma2", DOUBLE), small_pairs()
    base = attribution(model, pairs, "head", rules="secant")
    for options in ({"at": "source"}, {"at": "both"}, {"direction": "both"}):
        found = attribution(model, pairs, "head", rules="secant", **options)
        np.testing.assert_allclose(found, base, rtol=1e-9, atol=1e-12)
        assert found.attrs["gradient_at"] == "between base and source"


def test_mixed_rules_are_taken_where_they_are_asked_for(tiny):
    """Secants in some places and local slopes in others do depend on the run."""
    model, pairs, rules = tiny("gpt2", DOUBLE), small_pairs(), "gradient,activation_slope=secant"
    base, source, both = (attribution(model, pairs, "head", rules=rules, at=at) for at in ("base", "source", "both"))
    np.testing.assert_allclose(both, (base + source) / 2, rtol=1e-11, atol=1e-14)
    assert not np.allclose(base, source, rtol=0.01)
    assert (base.attrs["gradient_at"], both.attrs["gradient_at"]) == ("base", "both")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("rules", ["relp-frozen-attention", "cp-lrp", "gradient,pattern=frozen"])
def test_what_a_frozen_pattern_cuts_off_is_said(tiny, rules):
    model, pairs = tiny("gpt2"), small_pairs()
    for sites in ("q", ["k", "pattern"]):
        with pytest.raises(RulesError, match=r"freeze the attention pattern, so no score reaches (q|k, pattern)$"):
            attribution(model, pairs, sites, rules=rules)
    with pytest.warns(UserWarning, match="scores of q, pattern are 0 by construction"):
        found = attribution(
            model, pairs, ["q", "resid_pre", "pattern"], rules=rules, metric=["logit_diff", "answer_logit"]
        )
    assert (found.q == 0).all()
    assert (found.pattern == 0).all()
    assert (found.resid_pre != 0).any()
    assert found.attrs["zero_by_construction"] == "q, pattern"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "zero_by_construction" not in attribution(model, pairs, ["v", "head"], rules=rules).attrs


@pytest.mark.parametrize("direction", ["noise", "both"])
def test_kl_has_no_gradient_in_the_clean_run(tiny, direction):
    model, pairs = tiny("gpt2"), small_pairs()
    with pytest.raises(MetricError, match="gradient of kl_divergence is zero in the clean run"):
        attribution(model, pairs, "resid_pre", metric="kl_divergence", direction=direction)
    assert (attribution(model, pairs, "resid_pre", metric="kl_divergence", rules="relp") != 0).any()
    assert (
        attribution(model, pairs, "resid_pre", metric="kl_divergence", direction=direction, rules="secant") != 0
    ).any()


@pytest.mark.parametrize(
    ("sites", "options", "error", "says"),
    [
        ("resid_pre", {"metric": "accuracy"}, MetricError, "accuracy has no gradient"),
        (
            "resid_pre",
            {"metric": "accuracy", "rules": "secant"},
            MetricError,
            "accuracy has no secant between two runs",
        ),
        ("resid_pre", {"metric": lambda x: x[:, 0] ** 2, "rules": "secant"}, MetricError, "<lambda> has no secant"),
        ("resid_pre", {"metric": lambda x: x}, MetricError, "returned shape"),
        ("resid_pre", {"metric": lambda x: x[:, 0] * torch.nan}, MetricError, "not finite on prompts 0, 1"),
        ("resid_pre", {"rules": "replp"}, RulesError, "'replp' is not a rule set .*did you mean 'relp'"),
        ("resid_pre", {"positions": "cells"}, OptionError, 'is for site "pattern"'),
        ("resid_pre", {"positions": [6]}, OptionError, "position 6 is outside the prompts"),
        ("resid_pre", {"batch_size": 0}, OptionError, "at least 1"),
        ("resid", {}, SiteError, "'resid' is not a site"),
        ([], {}, SiteError, "no sites"),
        ("neuron", {"neurons": ["m9.n1"]}, SiteError, "has no node m9.n1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_scored_is_said(tiny, sites, options, error, says):
    with pytest.raises(error, match=says):
        attribution(tiny("gpt2"), small_pairs(), sites, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"at": "corrupt"}, "'corrupt' is not a gradient point"), ({"direction": "denoising"}, "did you mean 'denoise'")],
)
def test_unknown_choices_are_said(tiny, options, says):
    with refused(OptionError, says):
        attribution(tiny("gpt2"), small_pairs(), "resid_pre", **options)


def test_a_parallel_model_has_no_resid_mid(tiny):
    with pytest.raises(SiteError, match="pythia has no resid_mid"):
        attribution(tiny("pythia"), small_pairs(), "resid_mid", rules=get_rules("relp"))
