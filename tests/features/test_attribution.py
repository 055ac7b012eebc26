"""Scores and exact effects of latents and error terms: what they add up to, what they equal, and what they refuse.

Held against: attribution of the whole activation; gradients and patches by hand; splicing; exact patching where a score is exact.
"""

import dataclasses

import numpy as np
import pytest
import torch

import interp.features.attribution as module
from interp import activation_patching, attribution, corrupt, integrated_gradients
from interp.errors import OptionError, RulesError, SiteError
from interp.features.attribution import feature_attribution, feature_patching, parse_feature, split_activation
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.splice import Edit, spliced
from interp.rules import RULES
from tests.features.small_saes import (
    DOUBLE,
    LAST,
    LATENTS,
    POST,
    READS,
    D,
    Z,
    case,
    gap,
    metric_of,
    sae_at,
    saes_of,
    small,
    split_by_hand,
    values_at,
)
from tests.small_pairs import refused, small_pairs

DIRECTIONS = ("denoise", "noise", "both")
SOME = pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia"])  # grouped queries; parallel
TWO = pytest.mark.parametrize("family", ["gpt2", "llama3"])

# hook of the SAE -> the site of `attribution` that it takes apart, and its layer
SITE = {POST: ("resid_post", 0), Z: ("head", 1), READS: ("mlp_out", 1), LAST: ("resid_post", 1)}


def nodes_at(scores, hook: str):
    """The scores of one hook's nodes."""
    return scores.sel(node=[name for name in scores.node.values if name.rpartition(".")[0] == hook])


def whole(found, hook: str):
    """The score of the activation itself, heads added up."""
    site, layer = SITE[hook]
    array = (found.head_out if site == "head" else found[site]).sel(layer=layer)
    return array.sum("head", skipna=False) if site == "head" else array


# ---------------------------------------------------------------------------------------------------------- codes, names


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_codes_in_the_scale_of_the_data_make_up_the_reconstruction(normalize):
    """xhat moves as sum c_i w_i does, b_dec aside: the code of each token times its own scale."""
    sae, generator = sae_at(normalize=normalize), torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 5, D, generator=generator, dtype=DOUBLE) + 1
    split = split_activation(sae, x, x)
    _, (factor, shift) = sae.normalize(x.flatten(0, 1))
    expected = sae(x) - (sae.b_dec * factor + shift).expand(10, D).unflatten(0, (2, 5))
    torch.testing.assert_close(split.codes @ sae.W_dec, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(split.codes != 0, sae.encode(x) != 0)
    assert torch.equal(split.value, x)


def test_nodes_are_named_by_hook_and_latent(tiny):
    model, pairs, saes = case(tiny, "gpt2")
    scores = feature_attribution(model, pairs, saes)
    parsed = [parse_feature(name, saes) for name in scores.node.values]
    assert parsed == [(hook, i) for hook in saes for i in (*range(LATENTS), module.ERROR)]
    assert scores.dims == ("prompt", "node")
    assert scores.dtype == np.float32
    each = feature_attribution(model, pairs, saes, positions="each")
    assert each.dims == ("prompt", "position", "node")
    exact = feature_patching(model, pairs, saes, scores.node.values[:2].tolist())
    assert exact.dims == scores.dims
    for name in ("metric_clean", "metric_corrupt"):
        np.testing.assert_array_equal(exact[name], scores[name])
    about = {"rules": "gradient", "steps": 0, "direction": "denoise", "metric": "logit_diff", "gradient_at": "base"}
    assert scores.attrs.items() >= about.items()


# ---------------------------------------------------------------------------------------------- what scores add up to


@SOME
@pytest.mark.parametrize("rules", ["gradient", "relp", "secant"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_latents_and_error_of_a_hook_add_up_to_the_score_of_the_activation(tiny, family, rules, direction):
    model, pairs, saes = case(tiny, family, DOUBLE)
    scores = feature_attribution(model, pairs, saes, rules=rules, direction=direction, positions="each")
    found = attribution(model, pairs, ["resid_post", "mlp_out", "head"], rules=rules, direction=direction)
    for hook in saes:
        total, expected = nodes_at(scores, hook).sum("node", skipna=False), whole(found, hook)
        assert float(abs(expected).max()) > 1e-3
        np.testing.assert_allclose(total, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(np.isnan(scores.sel(node=f"{hook}.error")), ~pairs.is_token)
    everywhere = feature_attribution(model, pairs, saes, rules=rules, direction=direction)
    np.testing.assert_allclose(scores.sum("position"), everywhere, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("at", ["source", "both"])
def test_they_do_so_with_every_rule_set_and_gradient_point(tiny, rules, at):
    model, pairs, hook = tiny("gpt2", DOUBLE), small(), POST
    scores = feature_attribution(model, pairs, {hook: sae_at()}, rules=rules, at=at, metric="log_probability")
    found = attribution(model, pairs, "resid_post", rules=rules, at=at, metric="log_probability", positions="all")
    np.testing.assert_allclose(scores.sum("node"), found.sel(layer=0), rtol=1e-9, atol=1e-12)


@TWO
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_integrated_gradients_add_up_to_the_exact_effect_of_patching_the_activation(tiny, family, direction):
    model, pairs, saes = case(tiny, family, DOUBLE)
    scores = feature_attribution(model, pairs, saes, steps=24, direction=direction)
    sites, options = ["resid_post", "mlp_out", "head"], {"direction": direction, "positions": "all"}
    exact = activation_patching(model, pairs, ["resid_post", "mlp_out"], **options)
    line = integrated_gradients(model, pairs, sites, path="activation", steps=24, **options)
    for hook in saes:
        total = nodes_at(scores, hook).sum("node")
        np.testing.assert_allclose(total, whole(line, hook), rtol=1e-9, atol=1e-12)
        if hook != Z:  # activation_patching moves heads one by one
            np.testing.assert_allclose(total, whole(exact, hook), rtol=1e-5, atol=1e-7)


@TWO
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_behind_the_last_layer_secants_add_up_to_the_exact_effect(tiny, family, direction):
    """Only the position that is read matters there."""
    model, pairs = tiny(family, DOUBLE), small()
    scores = feature_attribution(model, pairs, {LAST: sae_at(model.cfg.d_model)}, rules="secant", direction=direction)
    np.testing.assert_allclose(scores.sum("node"), gap(scores, direction), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what scores equal


def by_hand(model, pairs, place: str, base: str) -> torch.Tensor:
    """The gradient of the logit difference at a hook point of one run."""
    held = {}
    leaf = lambda value, hook: held.setdefault("it", value.detach().requires_grad_())  # noqa: E731
    with torch.enable_grad():
        metric_of(model, pairs, base, [(place, leaf)]).sum().backward()
    return held["it"].grad.flatten(2)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("hook", SITE)
def test_a_latents_score_is_the_change_of_its_code_times_the_gradient_along_its_direction(tiny, hook, direction):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    sae = saes[hook]
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    place = sae.config.target_hook or hook
    (code, a), (code_source, a_source) = (split_by_hand(model, pairs, hook, sae, side) for side in (base, source))
    moved = code_source - code
    g = by_hand(model, pairs, place, base)
    latents = moved * (g @ sae.W_dec.T)
    error = (g * (a_source - a - moved @ sae.W_dec)).sum(-1, keepdim=True)
    expected = torch.cat([latents, error], -1).masked_fill(~pairs.is_token[..., None], torch.nan)
    found = feature_attribution(model, pairs, {hook: sae}, direction=direction, positions="each")
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def nearly_equal(model, step: float):
    """Pairs whose corrupt embeddings are the clean ones but for `step` times noise."""
    pairs = corrupt(model, small_pairs(n=2, differ=(1, 2, 4)), "gaussian", seed=1)
    resid = model.embed.W_E[pairs.clean] * model.cfg.embed_scale
    return dataclasses.replace(pairs, embedding_noise=resid + step * (pairs.embedding_noise - resid))


@SOME
@pytest.mark.parametrize("options", [{}, {"rules": "secant"}, {"steps": 2}], ids=["gradient", "secant", "integrated"])
def test_for_a_small_difference_scores_become_exact_effects(tiny, family, options):
    model, step = tiny(family, DOUBLE), 1e-5
    pairs, saes = nearly_equal(model, step), saes_of(model)
    for positions in ("all", "each"):
        scores = feature_attribution(model, pairs, saes, positions=positions, **options)
        moved = scores.node.values[(scores != 0).any([d for d in scores.dims if d != "node"]).values].tolist()
        exact = feature_patching(model, pairs, saes, moved, positions=positions)
        error = np.linalg.norm(scores.sel(node=moved) - exact) / np.linalg.norm(exact)
        assert len(moved) > 20
        assert error < 10 * step


def differing_in_one_latent(model, latent: int, step: float, at: int = 2):
    """An SAE whose directions are orthonormal, before the first layer, and pairs that differ in one of its codes."""
    d = model.cfg.d_model
    sae = SAE(SAEConfig(architecture="standard", d_in=d, d_sae=d, hook="blocks.0.hook_resid_pre"), dtype=DOUBLE)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)).Q
    sae.encoder.copy_(rotation)
    sae.W_dec.copy_(rotation)
    sae.b_enc.fill_(3.0)  # everything fires
    pairs = small_pairs()
    noise = (model.embed.W_E[pairs.clean] * model.cfg.embed_scale).clone()
    noise[:, at] += step * rotation[latent]
    mask = (torch.arange(6) == at).expand(2, 6)
    return sae, dataclasses.replace(pairs, corrupt=pairs.clean, embedding_noise=noise, noise_mask=mask)


@TWO
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_only_latent_that_differs_has_the_whole_effect(tiny, family, direction):
    model = tiny(family, DOUBLE)
    sae, pairs = differing_in_one_latent(model, 5, 0.7)
    scores = feature_attribution(model, pairs, sae, rules="secant", direction=direction)
    exact = feature_patching(model, pairs, sae, scores.node.values.tolist(), direction=direction)
    assert (abs(gap(scores)) > 1e-3).all()
    for found in (scores, exact):
        np.testing.assert_allclose(found.sel(node="blocks.0.hook_resid_pre.f5"), gap(scores, direction), rtol=1e-9)
        np.testing.assert_allclose(found.drop_sel(node="blocks.0.hook_resid_pre.f5"), 0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"rules": "secant"}, {"steps": 3}], ids=["gradient", "secant", "integrated"])
def test_both_directions_are_the_mean_of_one_and_minus_the_other(tiny, options):
    model, pairs, saes = case(tiny, "llama3", DOUBLE)
    score = lambda d: feature_attribution(model, pairs, saes, direction=d, **options)  # noqa: E731
    there, back, both = map(score, DIRECTIONS)
    np.testing.assert_allclose(both, (there - back) / 2, rtol=1e-9, atol=1e-12)
    nodes = [f"{POST}.error", *there.node.values[np.argsort(-abs(there.mean("prompt").values))[:5]].tolist()]
    there, back, both = (feature_patching(model, pairs, saes, nodes, direction=d) for d in DIRECTIONS)
    np.testing.assert_allclose(both, (there - back) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"rules": "relp"}, {"steps": 3}], ids=["relp", "integrated"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_the_size_of_a_batch_does_not_matter(tiny, options, positions):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    one, other = (
        feature_attribution(model, pairs, saes, positions=positions, batch_size=n, metric="probability_diff", **options)
        for n in (None, 2)
    )
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(one.metric_clean, other.metric_clean, rtol=1e-12)


def test_equal_prompts_score_nothing(tiny):
    model, pairs, saes = case(tiny, "gpt2")
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    for options in ({}, {"rules": "secant"}, {"steps": 2}):
        assert (feature_attribution(model, pairs, saes, **options) == 0).all()
    assert (feature_patching(model, pairs, saes, [f"{POST}.f3", f"{POST}.error", f"{Z}.error"]) == 0).all()


# -------------------------------------------------------------------------------------------------------- exact effects


def patched_by_hand(model, pairs, hook: str, sae: SAE, latent: int, base: str, at: int | None) -> torch.Tensor:
    """Effect of one code (or the error) taking its value of the other run, with a plain hook."""
    source, place = "clean" if base == "corrupt" else "corrupt", sae.config.target_hook or hook
    (code, a), (code_source, a_source) = (split_by_hand(model, pairs, hook, sae, side) for side in (base, source))
    moved = code_source - code
    change = moved[..., latent, None] * sae.W_dec[latent]
    if latent == module.ERROR:
        change = a_source - a - moved @ sae.W_dec
    if at is not None:
        change = change * (torch.arange(6) == at)[:, None]
    hooks = [(place, lambda value, hook: value + change.reshape(value.shape))]
    return metric_of(model, pairs, base, hooks) - metric_of(model, pairs, base)


@TWO
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("hook", SITE)
def test_patching_a_node_is_a_hook_that_adds_the_change_of_its_code(tiny, family, hook, direction):
    model, pairs, saes = case(tiny, family, DOUBLE)
    sae = saes[hook]
    base = "corrupt" if direction == "denoise" else "clean"
    scores = abs(feature_attribution(model, pairs, {hook: sae})).mean("prompt").values
    latents = [*np.argsort(-scores[:-1])[:2].tolist(), module.ERROR]
    names = [module.node_name(hook, i) for i in latents]
    everywhere = feature_patching(model, pairs, {hook: sae}, names, direction=direction)
    each = feature_patching(model, pairs, {hook: sae}, names, direction=direction, positions="each")
    assert float(abs(everywhere).max()) > 1e-4
    np.testing.assert_array_equal(np.isnan(each), np.broadcast_to(~pairs.is_token[..., None], each.shape))
    for name, latent in zip(names, latents, strict=True):
        expected = patched_by_hand(model, pairs, hook, sae, latent, base, None)
        np.testing.assert_allclose(everywhere.sel(node=name), expected, rtol=1e-8, atol=1e-12)
        for at in (3, 5):
            inside = pairs.is_token[:, at]
            expected = patched_by_hand(model, pairs, hook, sae, latent, base, at).where(inside, torch.nan)
            np.testing.assert_allclose(each.sel(node=name, position=at), expected, rtol=1e-8, atol=1e-12)


def test_patching_one_token_is_splicing_a_clamped_latent_there(tiny):
    model, sae = tiny("gpt2", DOUBLE), sae_at()
    pairs = small_pairs(1, differ=(1, 3))
    (x,), (x_source,) = (values_at(model, pairs.tokens(side), POST) for side in ("corrupt", "clean"))
    f, f_source = sae.encode(x)[0], sae.encode(x_source)[0]
    at, latent = ((f != f_source) & (f != 0)).nonzero()[-1].tolist()
    where = (torch.arange(6) == at)[None]
    with spliced(model, {POST: sae}, edits=[Edit(latent, float(f_source[at, latent]))], where=where):
        expected = metric_of(model, pairs, "corrupt")
    expected = expected - metric_of(model, pairs, "corrupt")
    found = feature_patching(model, pairs, {POST: sae}, [f"{POST}.f{latent}"], positions="each")
    assert abs(float(expected)) > 1e-4
    np.testing.assert_allclose(found.sel(position=at)[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("positions", ["all", "each"])
def test_how_many_nodes_share_a_forward_pass_does_not_matter(tiny, monkeypatch, positions):
    model, pairs, saes = case(tiny, "llama3", DOUBLE)
    nodes = [f"{hook}.{last}" for last in ("error", "f3", "f9", "f17", "f3") for hook in saes]
    found = []
    for rows in (1024, 50, 7, 1):
        monkeypatch.setattr(module, "ROWS", rows)
        found.append(feature_patching(model, pairs, saes, nodes, positions=positions))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9, atol=1e-13)
    assert found[0].node.values.tolist() == nodes


def test_where_a_code_is_the_same_in_both_runs_the_effect_is_exactly_nothing(tiny):
    """In float32, too: nodes and positions whose rank would otherwise be rounding."""
    model, _, saes = case(tiny, "llama3")
    pairs = small_pairs(2, differ=(2,))
    for positions in ("all", "each"):
        nodes = feature_attribution(model, pairs, saes, positions=positions).node.values.tolist()
        exact = feature_patching(model, pairs, saes, nodes, positions=positions)
        (x,), (x_source,) = (values_at(model, pairs.tokens(side), Z) for side in ("corrupt", "clean"))
        same = saes[Z].encode(x) == saes[Z].encode(x_source)
        same = torch.cat([same, (x == x_source).all(-1, keepdim=True)], -1)
        same = same.all(1) if positions == "all" else same
        assert (nodes_at(exact, Z).values[same] == 0).all()
        assert 0 < same.double().mean() < 1
    assert (exact.sel(position=[0, 1]) == 0).all()
    assert (exact.sel(position=2) != 0).any()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("saes", "options", "error", "says"),
    [
        ({"blocks.7.hook_resid_post": {}}, {}, SiteError, "has no hook point"),
        ({"hook_embed": {}}, {}, SiteError, "hook_embed is in no layer"),
        ({"ln_final.hook_normalized": {}}, {}, SiteError, "is in no layer"),
        ({POST: {"d_in": 24}}, {}, OptionError, "reads 24 channels"),
        ({POST: {}}, {"rules": "relp", "steps": 4}, RulesError, "with rules 'relp' leave steps out"),
        ({POST: {}}, {"steps": 0}, OptionError, "at least 1 step"),
        ({"blocks.0.attn.hook_q": {}}, {"rules": "cp-lrp"}, RulesError, "no score reaches blocks.0.attn.hook_q"),
        ({POST: {}}, {"rules": "replp"}, RulesError, "did you mean 'relp'"),
    ],
    ids=["hook", "embed", "final", "width", "steps", "no-steps", "frozen", "rules"],
)
def test_what_cannot_be_scored_is_said(tiny, saes, options, error, says):
    saes = {hook: sae_at(dtype=torch.float32, **about) for hook, about in saes.items()}
    with pytest.raises(error, match=says):
        feature_attribution(tiny("gpt2"), small(), saes, **options)


@pytest.mark.parametrize("options", [{"at": "corrupt"}, {"positions": "some"}, {"direction": "denoising"}], ids=str)
def test_unknown_choices_are_said(tiny, options):
    with refused(OptionError, "is not a"):
        feature_attribution(tiny("gpt2"), small(), {POST: sae_at(dtype=torch.float32)}, **options)


@pytest.mark.parametrize(
    ("nodes", "error", "says"),
    [
        ([], OptionError, "no nodes to patch"),
        ([f"{Z}.f3"], SiteError, f"'{Z}.f3' is not a latent of the SAEs at {POST}"),
        ([f"{POST}.17"], SiteError, f"does not name a latent: write {POST}.f17, or {POST}.error"),
        ([f"{POST}.f{LATENTS}"], SiteError, f"has latents 0 to {LATENTS - 1}, not {LATENTS}"),
    ],
    ids=["none", "hook", "form", "range"],
)
def test_nodes_that_do_not_exist_are_said(tiny, nodes, error, says):
    with pytest.raises(error, match=says):
        feature_patching(tiny("gpt2"), small(), {POST: sae_at(dtype=torch.float32)}, nodes)
