"""Integration along lines and secants of single sites: completeness, and what they must agree with."""

import numpy as np
import pytest
import torch

from interp import activation_patching, attribution, integrated_gradients, site_secants
from interp.errors import OptionError, RulesError
from interp.exact import exact_effects
from interp.interventions import Patch
from interp.metrics import get_metric
from interp.paths import quadrature_points
from interp.site_rows import position_groups
from tests.families import FAMILIES
from tests.small_pairs import refused, sites_of, small_pairs

FEW = ["gpt2", "gptj", "llama3", "gemma2", "olmo2"]
DOUBLE = torch.float64


def whole_site(model, pairs, site: str, direction: str = "denoise") -> np.ndarray:
    """Exact effect of a whole site of one layer, all units and positions: [prompt, layer]."""
    interventions = [(Patch(site, layer),) for layer in range(model.cfg.n_layers)]
    return (
        exact_effects(model, pairs, interventions, metrics=[get_metric("logit_diff")], direction=direction)
        .effects[0]
        .numpy()
    )


def summed(scores) -> np.ndarray:
    """[prompt, layer]: over units and positions."""
    return scores.sum([d for d in scores.dims if d not in ("prompt", "layer")]).values


# --------------------------------------------------------------------------------------------------------- quadrature


@pytest.mark.parametrize("kind", ["gauss", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadrature_weighs_to_one_and_integrates_lines_exactly(kind, steps):
    points, weights = quadrature_points(steps, kind)
    assert sum(weights) == pytest.approx(1)
    assert sum(w * p for w, p in zip(weights, points, strict=True)) == pytest.approx(0.5)
    assert all(0 < p < 1 for p in points)


def test_gauss_is_exact_to_degree_2n_minus_1():
    points, weights = quadrature_points(3, "gauss")
    assert sum(w * p**5 for w, p in zip(weights, points, strict=True)) == pytest.approx(1 / 6)


def test_every_token_is_in_one_group_counted_from_the_end():
    pairs = small_pairs(2, 6, lengths=[6, 4], differ=(2,))
    groups = position_groups(pairs, 3)
    assert torch.equal(groups.sum(0), pairs.is_token.long())
    assert groups[0].nonzero().tolist() == [[0, 2], [0, 5], [1, 0], [1, 3]]


# -------------------------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("family", FEW)
def test_integrated_embeddings_sum_to_the_metrics_difference(tiny, family):
    model, pairs = tiny(family, DOUBLE), small_pairs(2, 5)
    found = integrated_gradients(model, pairs, "resid_pre", steps=64)
    gap = (found.metric_clean - found.metric_corrupt).values
    # learned positions are the same in both runs, so the stream before layer 0 changes as the embeddings do
    np.testing.assert_allclose(found.sum("position").values[:, 0], gap, rtol=1e-6, atol=1e-8)
    assert found.attrs["completeness_gap"] < 1e-6


def test_more_steps_close_the_gap(tiny):
    model, pairs = tiny("llama3", DOUBLE), small_pairs(3, 6)
    for path in ("embedding", "activation"):
        gaps = [
            integrated_gradients(model, pairs, "mlp_out", path=path, steps=steps, quadrature="midpoint").attrs[
                "completeness_gap"
            ]
            for steps in (2, 8, 32)
        ]
        assert gaps[0] > gaps[1] > gaps[2] > 0
        assert gaps[2] < gaps[1] / 8, "midpoint sums have an error of second order"


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "head", "q", "pattern", "neuron"])
def test_a_sites_own_line_sums_to_the_effect_of_the_whole_site(tiny, site):
    model, pairs = tiny("qwen3", DOUBLE), small_pairs(2, 5)
    found = integrated_gradients(model, pairs, site, path="activation", steps=48)
    exact = whole_site(model, pairs, site)
    if site == "neuron":
        per_layer = found.sum("position").values.reshape(2, model.cfg.n_layers, -1).sum(-1)
    else:
        per_layer = summed(found)
    np.testing.assert_allclose(per_layer, exact, rtol=1e-5, atol=1e-7 * np.abs(exact).max())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon"])
def test_site_secants_sum_to_the_effect_of_the_whole_site_exactly(tiny, family):
    model, pairs = tiny(family, DOUBLE), small_pairs(2, 6)
    sites = [site for site in sites_of(model) if site != "neuron"]
    for direction in ("denoise", "noise"):
        found = site_secants(model, pairs, sites, direction=direction)
        for site in sites:
            exact = whole_site(model, pairs, site, direction)
            scores = found["head_out" if site == "head" else site]
            np.testing.assert_allclose(summed(scores), exact, rtol=1e-9, atol=1e-9 * np.abs(exact).max())


def test_with_one_position_per_group_every_secant_is_exact(tiny):
    model, pairs = tiny("gemma3", DOUBLE), small_pairs(2, 6)
    for direction in ("denoise", "noise", "both"):
        asked = {"direction": direction, "metric": "log_probability"}
        found = site_secants(model, pairs, ["resid_pre", "mlp_out"], groups=6, **asked)
        exact = activation_patching(model, pairs, ["resid_pre", "mlp_out"], **asked)
        for site in found:
            np.testing.assert_allclose(found[site], exact[site], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("site", ["head", "k", "pattern", "neuron"])
def test_unit_by_unit_and_position_by_position_nothing_is_left_to_share(tiny, site):
    model, pairs = tiny("llama3", DOUBLE), small_pairs(2, 4)
    neurons = [f"m{layer}.n{n}" for layer in range(3) for n in (0, 5)] if site == "neuron" else None
    found = site_secants(model, pairs, site, groups=4, each_unit=True, neurons=neurons)
    exact = activation_patching(model, pairs, site, neurons=neurons)
    np.testing.assert_allclose(found, exact, rtol=1e-8, atol=1e-9 * float(np.abs(exact).max()))


def test_of_the_whole_stream_the_sites_secant_is_the_runs(tiny):
    """Patching the whole stream gives the other run, so the two kinds of secant lie between the same runs."""
    model, pairs = tiny("llama", DOUBLE), small_pairs(2, 6)
    one, other = site_secants(model, pairs, "resid_pre"), attribution(model, pairs, "resid_pre", rules="secant")
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.filterwarnings("ignore:.*near zero on prompts")
def test_a_short_line_is_the_gradient(tiny):
    """Where the runs hardly differ, one step of either path is the gradient at the base run."""
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(2, 6, differ=())
    near = torch.Generator().manual_seed(1)
    noise = 1e-6 * torch.randn(2, 6, model.cfg.d_model, generator=near, dtype=DOUBLE)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 2] = True
    pairs = small_pairs(2, 6, differ=(), embedding_noise=model.W_E[pairs.clean] + noise, noise_mask=mask)
    gradient = attribution(model, pairs, ["attn_out", "mlp_out"])
    for path in ("embedding", "activation"):
        found = integrated_gradients(model, pairs, ["attn_out", "mlp_out"], path=path, steps=1)
        for site in found:
            np.testing.assert_allclose(
                found[site], gradient[site], rtol=1e-3, atol=1e-4 * float(np.abs(gradient[site]).max())
            )


def test_equal_runs_score_nothing(tiny):
    model, pairs = tiny("mistral"), small_pairs(2, 5, differ=())
    with pytest.warns(UserWarning, match="near zero"):
        assert not site_secants(model, pairs, "resid_pre").any()
    with pytest.warns(UserWarning, match="near zero"):
        assert not integrated_gradients(model, pairs, "mlp_out", steps=2).any()


def test_captum_integrates_the_embeddings_alike(tiny):
    captum = pytest.importorskip("captum.attr")
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(2, 5)

    def metric(embeddings, read_at, answers, wrong):
        tokens = torch.zeros(embeddings.shape[:2], dtype=torch.long)
        logits = model.run_with_hooks(
            tokens, read_at=read_at, fwd_hooks=[("hook_embed", lambda value, hook: embeddings)]
        )
        return (logits.gather(1, answers) - logits.gather(1, wrong))[:, 0]

    clean, corrupt = model.W_E[pairs.clean], model.W_E[pairs.corrupt]
    theirs = captum.IntegratedGradients(metric).attribute(
        clean, corrupt, n_steps=12, method="gausslegendre",
        additional_forward_args=(pairs.read_at, pairs.answers, pairs.wrong_answers),
    )  # fmt: skip
    ours = integrated_gradients(model, pairs, "resid_pre", steps=12)
    np.testing.assert_allclose(ours.values[:, 0], theirs.sum(-1), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- batches, options


def test_batches_and_prompts_of_other_lengths_change_nothing(tiny):
    model, pairs = tiny("llama3", DOUBLE), small_pairs(3, 6, lengths=[6, 4, 5], differ=(1, 2))
    for run in (site_secants, integrated_gradients):
        options = {"groups": 2} if run is site_secants else {"steps": 3}
        whole = run(model, pairs, ["resid_pre", "head"], **options)
        parts = run(model, pairs, ["resid_pre", "head"], max_memory=1, **options)
        for site in whole:
            np.testing.assert_allclose(whole[site], parts[site], rtol=1e-9, atol=1e-11)
        alone = run(model, pairs.take([1]), ["resid_pre"], **options)
        np.testing.assert_allclose(whole.resid_pre[1], alone[0], rtol=1e-9, atol=1e-11)
        assert np.isnan(whole.resid_pre[1, :, 4:]).all()


def test_both_directions_are_the_mean_of_each(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(2, 5)
    for run, options in ((site_secants, {}), (integrated_gradients, {"steps": 2, "path": "activation"})):
        there, back, both = (
            run(model, pairs, "attn_out", direction=d, **options) for d in ("denoise", "noise", "both")
        )
        np.testing.assert_allclose(both, (there - back) / 2, rtol=1e-9, atol=1e-12)


def test_several_metrics_and_attributes(tiny):
    model, pairs = tiny("gpt2"), small_pairs(2, 5)
    both = integrated_gradients(model, pairs, "mlp_out", steps=2, metric=["logit_diff", "probability"])
    assert both.dims == ("metric", "prompt", "layer", "position")
    alone = integrated_gradients(model, pairs, "mlp_out", steps=2, metric="probability")
    np.testing.assert_allclose(both.sel(metric="probability"), alone, rtol=1e-5, atol=1e-7)
    assert alone.attrs["method"] == "integrated_gradients"
    assert (alone.attrs["path"], alone.attrs["steps"], alone.attrs["quadrature"]) == ("embedding", 2, "gauss")
    secants = site_secants(model, pairs, "mlp_out", groups=2)
    assert (secants.attrs["method"], secants.attrs["groups"], secants.attrs["rules"]) == ("site_secants", 2, "secant")


@pytest.mark.parametrize(
    ("run", "options", "error", "says"),
    [
        (integrated_gradients, {"steps": 0}, OptionError, "at least 1 step, not 0"),
        (integrated_gradients, {"quadrature": "simpson"}, OptionError, "'simpson' is not a quadrature"),
        (integrated_gradients, {"path": "straight"}, OptionError, "'straight' is not a path"),
        (integrated_gradients, {"groups": 2}, OptionError, 'for path="activation"'),
        (integrated_gradients, {"each_unit": True}, OptionError, 'for path="activation"'),
        (site_secants, {"groups": 0}, OptionError, "at least 1 group, not 0"),
        (site_secants, {"rules": "relp"}, RulesError, "follows secant rules, not 'relp'"),
        (site_secants, {"direction": "up"}, OptionError, "'up' is not a direction"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused(tiny, run, options, error, says):
    with refused(error, says):
        run(tiny("gpt2"), small_pairs(), "mlp_out", **options)
