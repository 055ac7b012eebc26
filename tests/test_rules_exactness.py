"""For which model, metric or comparison each backward rule is exact, and that it is not where theory says it is not.

The numbers P2..P18 are those of the list of properties that the rules were designed by.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from interp import Transformer, activation_patching, attribution, get_rules
from interp.metrics import METRICS
from interp.model.activations import ACTIVATIONS
from interp.sites import SITES
from tests.backward_passes import RIGHT, WRONG, backward_pass, logit_difference, some_tokens, stream, without_biases
from tests.small_pairs import small_pairs

# learned positions; grouped queries and gated; parallel; q/k norms; windows; LayerNorm, gated and partly rotated; 1 + w and
# scaled embeddings; post-norms only
FAMILIES = ("gpt2", "llama3", "pythia", "qwen3", "mistral", "stablelm", "gemma", "olmo2")
ALL = pytest.mark.parametrize("family", FAMILIES)
FROZEN = "relp-frozen-attention"


def shares(model, rules: str, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Relevance of every cut of the residual stream as a share of the metric, which conservation says is 1."""
    found = backward_pass(model, some_tokens(3, 7) if tokens is None else tokens, get_rules(rules))
    return {name: found.relevance(name) / found.metric for name in stream(model)}


def off(found: dict[str, torch.Tensor], names=None) -> float:
    """How far from 1 at the worst of some cuts."""
    return max((share - 1).abs().max().item() for name, share in found.items() if names is None or name in names)


# --------------------------------------------------------------------------------------------------------- conservation


@ALL
def test_with_everything_frozen_relevance_is_conserved(tiny, family):
    """P2: no biases, a logit difference, and norms, activations, gates and patterns as constants: nothing gets lost."""
    assert off(shares(without_biases(tiny(family, torch.float64)), FROZEN)) < 1e-11


def test_a_bias_less_model_conserves_under_cp_lrp_too(tiny):
    assert off(shares(without_biases(tiny("llama3", torch.float64)), "cp-lrp")) < 1e-11


@pytest.mark.parametrize("rules", ["relp", "ln-only", "attnlrp", "gradient"])
def test_without_the_frozen_pattern_it_is_not(tiny, rules):
    """P3: the ladder has to fail, or the test above could not."""
    for family in ("gpt2", "llama3"):
        found = shares(without_biases(tiny(family, torch.float64)), rules)
        assert off(found, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]) > 0.05


def test_a_bias_takes_its_share(tiny):
    """P3: with biases even the last cut is off, by what the biases behind it and the final norm's add to the metric."""
    model = tiny("gpt2", torch.float64)
    found = backward_pass(model, some_tokens(3, 7), get_rules(FROZEN))
    missing = found.metric - found.relevance("blocks.2.hook_resid_post")
    final = model.ln_final.b @ (model.W_U[:, RIGHT] - model.W_U[:, WRONG])
    torch.testing.assert_close(missing, final.expand(3), rtol=1e-11, atol=1e-12)
    assert off(shares(model, FROZEN)) > 0.05


def test_a_soft_cap_needs_a_ratio(tiny):
    """P3: caps of 5 on scores and 3 on logits. The published code leaves them to autograd and loses relevance silently."""
    model = without_biases(tiny("gemma2", torch.float64))
    assert off(shares(model, FROZEN)) > 0.05
    assert off(shares(model, f"{FROZEN},cap_slope=ratio")) < 1e-11


@ALL
def test_the_final_norm_takes_back_what_the_metric_gives(tiny, family):
    """P4, Euler: a norm hardly changes with its input's length. What little it does is eps's share of its square."""
    model = without_biases(tiny(family, torch.float64))
    found, last = backward_pass(model, some_tokens(3, 7)), stream(model)[-1]
    eps_share = model.cfg.eps / found.values["ln_final.hook_scale"][:, -1, 0].square()
    torch.testing.assert_close(found.relevance(last), found.metric * eps_share, rtol=1e-8, atol=1e-14)
    assert off(shares(model, "ln-only"), [last]) < 1e-11


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_relevance_of_the_final_stream_is_direct_logit_attribution(tiny, family):
    """P8: each writer's output through the final norm's weights and own scale onto the unembedding."""
    model = tiny(family, torch.float64)
    found = backward_pass(model, some_tokens(3, 7), get_rules("ln-only"))
    direction = (model.W_U[:, RIGHT] - model.W_U[:, WRONG]) * model.ln_final.w
    if model.cfg.norm == "layer":
        direction = direction - direction.mean()
    gradient = found.gradients[stream(model)[-1]]
    for name in ("hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out"):
        direct = found.values[name][:, -1] @ direction / found.values["ln_final.hook_scale"][:, -1, 0]
        torch.testing.assert_close((gradient * found.values[name]).sum(-1)[:, -1], direct, rtol=1e-12, atol=1e-13)
        assert (gradient[:, :-1] == 0).all()


# ------------------------------------------------------------------------------------- exact patching in a frozen model


class FrozenModel:
    """A run whose norm scales, attention patterns and activation factors f(x)/x are held, by hooks, at those of `tokens`."""

    def __init__(self, model, tokens: torch.Tensor):
        self.model, self.tokens = model, tokens
        _, self.cache = model.run_with_cache(tokens, return_cache_object=False)
        self.metric = self.run()

    def run(self, *patches: tuple) -> torch.Tensor:
        """Logit differences with more hooks in place behind those that freeze."""
        pre, ratio = {}, ACTIVATIONS[self.model.cfg.activation].ratio

        def held(value, hook):
            return self.cache[hook.name]

        def keep(value, hook):
            pre[hook.name] = value

        def factor(value, hook):
            name = hook.name.replace("hook_post", "hook_pre")
            return pre[name] * ratio(self.cache[name])

        ends = (("hook_scale", held), ("hook_pattern", held), ("mlp.hook_pre", keep), ("mlp.hook_post", factor))
        freeze = [(name, function) for name in self.model.hook_dict for end, function in ends if name.endswith(end)]
        return logit_difference(self.model.run_with_hooks(self.tokens, fwd_hooks=[*freeze, *patches]))


def put(name: str, where: tuple, new: torch.Tensor) -> tuple:
    def patch(value, hook):
        value = value.clone()
        value[where] = new[where]
        return value

    return name, patch


# without gates, where Half is not a frozen factor: learned positions, parallel, one key/value head, relu
PLAIN = pytest.mark.parametrize("family", ["gpt2", "pythia", "starcoder2", "opt"])


@PLAIN
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_frozen_rules_are_exact_patching_in_the_frozen_model(tiny, family, direction):
    """P5, with biases and windows; P6: positions patched together are the sum of them one by one."""
    model, pairs = tiny(family, torch.float64), small_pairs(length=5, differ=(1, 3))
    base, source = (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)
    pairs = dataclasses.replace(pairs, answers=torch.tensor([[RIGHT]] * 2), wrong_answers=torch.tensor([[WRONG]] * 2))
    frozen = FrozenModel(model, base)
    torch.testing.assert_close(frozen.metric, logit_difference(model(base)), rtol=1e-12, atol=1e-12)
    _, there = model.run_with_cache(source, return_cache_object=False)
    neurons = [f"m{layer}.n{n}" for layer in range(model.cfg.n_layers) for n in range(0, 80, 16)]
    sites = ["resid_pre", "attn_out", "mlp_out", "head", "v", "neuron"]
    scores = attribution(model, pairs, sites, rules=FROZEN, direction=direction, neurons=neurons)
    together = attribution(model, pairs, sites, rules=FROZEN, direction=direction, neurons=neurons, positions="all")

    def check(found, name, where):
        exact = frozen.run(put(name, where, there[name])) - frozen.metric
        np.testing.assert_allclose(found.values, exact.numpy(), rtol=1e-10, atol=1e-11)

    for site in ("resid_pre", "attn_out", "mlp_out"):
        for layer in range(model.cfg.n_layers):
            name = SITES[site].hook(layer)
            check(together[site].sel(layer=layer), name, (slice(None),))
            for position in range(5):
                check(scores[site].sel(layer=layer, position=position), name, (slice(None), position))
    for site, unit in (("head", "head"), ("v", "kv_head")):
        found = scores[SITES[site].variable]
        for layer, position in ((0, 1), (1, 3), (2, 4)):
            for i in range(found.sizes[unit]):
                mine = found.sel({"layer": layer, unit: i, "position": position})
                check(mine, SITES[site].hook(layer), (slice(None), position, i))
    for neuron, position in ((neurons[1], 3), (neurons[-1], 4)):
        layer, index = (int(part) for part in neuron[1:].split(".n"))
        mine = scores.neuron_out.sel(neuron=neuron, position=position)
        check(mine, SITES["neuron"].hook(layer), (slice(None), position, index))


@pytest.mark.parametrize("rules", ["gradient", "ln-only", "relp"])
def test_other_rules_are_not(tiny, rules):
    model, pairs = tiny("gpt2", torch.float64), small_pairs(length=5, differ=(1, 3))
    pairs = dataclasses.replace(pairs, answers=torch.tensor([[RIGHT]] * 2), wrong_answers=torch.tensor([[WRONG]] * 2))
    _, there = model.run_with_cache(pairs.clean, return_cache_object=False)
    frozen, name = FrozenModel(model, pairs.corrupt), "blocks.0.hook_resid_pre"
    scores = attribution(model, pairs, "resid_pre", rules=rules, positions="all").sel(layer=0)
    exact = (frozen.run(put(name, (slice(None),), there[name])) - frozen.metric).numpy()
    assert (abs(scores.values - exact) > 1e-3 * abs(exact)).all()


@PLAIN
def test_relevance_is_what_zeroing_takes_away_in_the_frozen_model(tiny, family):
    """P18: without biases, of every writer at every position."""
    model, tokens = without_biases(tiny(family, torch.float64)), some_tokens(2, 5)
    frozen, found = FrozenModel(model, tokens), backward_pass(model, tokens, get_rules(FROZEN))
    for name in (
        "blocks.0.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_attn_out",
        "blocks.2.hook_resid_pre",
    ):
        relevance = (found.values[name] * found.gradients[name]).sum(-1)
        nothing = torch.zeros_like(found.values[name])
        for position in range(5):
            drop = frozen.metric - frozen.run(put(name, (slice(None), position), nothing))
            torch.testing.assert_close(relevance[:, position], drop, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- linear models


def linear(model):
    """A model that is linear on the prompts at hand: norms that divide by 1, uniform attention, neurons all above 0.

    A norm divides by sqrt(mean square + eps): with an enormous eps and a weight of its root that is 1 to the last bit.
    What the neurons' large bias alone would write cancels, since the weights of each channel add up to 0.
    """
    eps = 1e20
    cfg = dataclasses.replace(model.cfg, eps=eps, activation="relu")
    weights = {name: p.data.clone() for name, p in model.named_parameters()}
    for name, value in weights.items():
        if ".ln" in name or name.startswith("ln_final"):
            value.fill_(eps**0.5 if name.endswith(".w") else 0)
        elif name.endswith(("W_Q", "W_K", "b_Q", "b_K")):
            value.zero_()
        elif name.endswith("b_in"):
            value.fill_(1000)
        elif name.endswith("W_out"):
            value.sub_(value.mean(0))
        elif name.endswith("W_U"):
            value.mul_(0.01)  # probabilities that are not all 0 or 1
    return Transformer(cfg, weights)


@pytest.mark.parametrize("family", ["gpt2", "starcoder2"])
def test_in_a_linear_model_every_rule_is_exact(tiny, family):
    """P7: gradient, RelP, secant and exact patching are one."""
    model, pairs = linear(tiny(family, torch.float64)), small_pairs(lengths=[6, 5])
    sites = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "head", "v"]
    for direction in ("denoise", "noise"):
        exact = activation_patching(model, pairs, sites, direction=direction)
        for rules in ("gradient", "ln-only", "relp", FROZEN, "cp-lrp", "secant"):
            found = attribution(model, pairs, sites, rules=rules, direction=direction)
            for name, array in exact.data_vars.items():
                np.testing.assert_allclose(
                    found[name].values, array.values, rtol=1e-9, atol=1e-9, err_msg=f"{rules} {name}"
                )


def test_metrics_that_are_not_linear_end_that(tiny):
    model, pairs = linear(tiny("gpt2", torch.float64)), small_pairs()
    exact = activation_patching(model, pairs, "resid_pre", metric="probability", positions="all")
    gap = exact.metric_clean - exact.metric_corrupt
    np.testing.assert_allclose(exact.sel(layer=0), gap, rtol=1e-9)
    secant = attribution(model, pairs, "resid_pre", metric="probability", positions="all", rules="secant")
    np.testing.assert_allclose(secant.sel(layer=0), gap, rtol=1e-9)
    gradient = attribution(model, pairs, "resid_pre", metric="probability", positions="all")
    assert (abs(gradient.sel(layer=0) - gap) > 0.01 * abs(gap)).all()


# ---------------------------------------------------------------------------------------------- secants against nothing


def test_against_a_source_of_zeros_a_gated_mlps_secant_is_lrps_identity_and_half(tiny):
    """f(0) = 0, so the slope is f(x)/x; and the midpoint of a factor and 0 is half of it."""
    mlp = copy.deepcopy(tiny("llama3", torch.float64).blocks[0].mlp)
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    recording = get_rules("secant").recording()
    with torch.no_grad():
        assert (mlp(torch.zeros_like(x), recording) == 0).all()
    g = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (secant,) = torch.autograd.grad(mlp(x, recording.against()), x, g)
    (relp,) = torch.autograd.grad(mlp(x, get_rules("relp")), x, g)
    torch.testing.assert_close(secant, relp, rtol=1e-11, atol=1e-13)


def test_the_metric_here_is_the_librarys(tiny):
    logits = tiny("gpt2", torch.float64)(some_tokens(2, 6))
    pairs = dataclasses.replace(
        small_pairs(), answers=torch.tensor([[RIGHT]] * 2), wrong_answers=torch.tensor([[WRONG]] * 2)
    )
    assert torch.equal(METRICS["logit_diff"](logits[:, -1], pairs), logit_difference(logits))
