"""What backward rules do to a whole model: against a forward pass written by hand, and what they must leave alone.

The numbers P1..P22 are those of the list of properties that the rules were designed by.
"""

import contextlib
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from interp import attribution, get_rules
from interp.errors import MetricError
from interp.metrics import Metric
from interp.model import ops
from interp.rules import GRADIENT, RULES, Rules
from tests.backward_passes import backward_pass, logit_difference, some_tokens
from tests.small_pairs import small_pairs

ONE_RUN = [name for name, rules in RULES.items() if not rules.needs_source]
# learned positions; grouped queries; parallel; q/k norms; post-norms, soft-caps and windows; post-norms only; a gated MLP
# after a LayerNorm, with partial rotation
FAMILIES = ("gpt2", "llama3", "pythia", "qwen3", "gemma2", "olmo2", "stablelm")
ALL = pytest.mark.parametrize("family", FAMILIES)


# ------------------------------------------------------------------------------------------- by hand, in detached factors


def same_value(value: torch.Tensor, slope_of: torch.Tensor) -> torch.Tensor:
    """`value` forwards, the gradient of `slope_of` backwards."""
    return value.detach() + slope_of - slope_of.detach()


def half(x: torch.Tensor) -> torch.Tensor:
    return (x + x.detach()) / 2


def by_hand(model, tokens: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logit differences, residual stream before each layer) of a GPT-2 or a Llama, with a graph; rules by `detach` alone."""
    cfg, w = model.cfg, dict(model.named_parameters())
    llama, n = cfg.norm == "rms", tokens.shape[1]

    def norm(x, name):
        x = x if llama else x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        y = x / (scale.detach() if rules.norm_scale == "frozen" else scale) * w[f"{name}.w"]
        return y if llama else y + w[f"{name}.b"]

    def rotated(x, inv_freq):  # as complex numbers: channel i with i + d/2
        angle = torch.outer(torch.arange(n, dtype=x.dtype), torch.tensor(inv_freq, dtype=x.dtype))
        real, imaginary = x.chunk(2, -1)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.cat([turned.real, turned.imag], -1)
        return half(turned) if rules.rotation == "half" else turned

    def activation(x):
        y = F.silu(x) if llama else F.gelu(x, approximate="tanh")
        return same_value(y, x * (y / x).detach()) if rules.activation_slope == "ratio" else y

    def mlp(x, p):
        if not llama:
            return activation(x @ w[p + "W_in"] + w[p + "b_in"]) @ w[p + "W_out"] + w[p + "b_out"]
        gate, up = activation(x @ w[p + "W_gate"]), x @ w[p + "W_in"]
        if rules.gate_product == "frozen-gate":
            gate = gate.detach()
        product = gate * up
        return (half(product) if rules.gate_product == "half" else product) @ w[p + "W_out"]

    def attention(x, layer):
        p = f"blocks.{layer}.attn."
        q, k, v = (torch.einsum("btd,hde->bthe", x, w[f"{p}W_{m}"]) + (0 if llama else w[f"{p}b_{m}"]) for m in "QKV")
        if llama:
            q, k = (rotated(y, cfg.rotary[layer].inv_freq) for y in (q, k))
        k, v = (y.repeat_interleave(cfg.group_size, 2) for y in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k)
        scores = (half(scores) if rules.query_key == "half" else scores) * cfg.attn_scale[layer]
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        pattern = scores.softmax(-1)
        if rules.pattern == "frozen":
            pattern = pattern.detach()
        if rules.temperature != 1:
            pattern = same_value(pattern, (scores / rules.temperature).softmax(-1) * rules.temperature)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        z = half(z) if rules.pattern_value == "half" else z
        return torch.einsum("bqhe,hed->bqd", z, w[p + "W_O"]) + (0 if llama else w[p + "b_O"])

    resid = w["embed.W_E"][tokens] + (0 if llama else w["pos_embed.W_pos"][:n])
    before = []
    for layer in range(cfg.n_layers):
        before.append(resid.detach().requires_grad_() if layer == 0 else resid)
        resid = before[-1] + attention(norm(before[-1], f"blocks.{layer}.ln1"), layer)
        resid = resid + mlp(norm(resid, f"blocks.{layer}.ln2"), f"blocks.{layer}.mlp.")
    return logit_difference(norm(resid, "ln_final") @ w["unembed.W_U"]), before


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
@pytest.mark.parametrize("name", ONE_RUN)
def test_every_rule_set_is_what_detached_factors_give_by_hand(tiny, family, name):
    """P1, and of every published rule set as well as of none."""
    model, tokens, rules = tiny(family, torch.float64), some_tokens(2, 7), get_rules(name)
    metric, before = by_hand(model, tokens, rules)
    expected = torch.autograd.grad(metric.sum(), before)
    found = backward_pass(model, tokens, rules)
    torch.testing.assert_close(found.metric, metric.detach(), rtol=1e-11, atol=1e-11)
    for layer, gradient in enumerate(expected):
        mine = found.gradients[f"blocks.{layer}.hook_resid_pre"]
        assert (mine - gradient).abs().max() <= 1e-11 * gradient.abs().max()


@ALL
def test_a_rule_set_without_rules_is_the_gradient_bit_for_bit(tiny, family):
    model, tokens = tiny(family), some_tokens(2, 6)
    plain, named = backward_pass(model, tokens), backward_pass(model, tokens, Rules("nothing switched"))
    bare = backward_pass(model, tokens, get_rules("gim,norm_scale=exact,qk_norm_scale=exact,gate_product=exact,"
                                                  "query_key=exact,pattern_value=exact,temperature=1"))  # fmt: skip
    for name, gradient in plain.gradients.items():
        assert torch.equal(named.gradients[name], gradient)
        assert torch.equal(bare.gradients[name], gradient)


# ------------------------------------------------------------------------------------------------------- P22: the forward


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_no_rule_changes_a_logit(tiny, family, dtype):
    model, here, there = tiny(family, dtype), some_tokens(2, 7), some_tokens(2, 7, seed=1)
    with torch.no_grad():
        plain = model(here)
    for rules in (*RULES.values(), get_rules("secant,rotation=half"), Rules("cap", cap_slope="ratio")):
        bound, start = rules, []
        if rules.needs_source:
            recording = rules.recording()
            with torch.no_grad():
                assert torch.equal(model(there, rules=recording), model(there))
            bound = recording.against()

        def cut(value, hook, start=start):  # with a graph, where some activations are computed in other ways
            start.append(value.detach().requires_grad_())
            return start[0]

        logits = model.run_with_hooks(here, rules=bound, fwd_hooks=[("hook_embed", cut)])
        assert torch.equal(logits, plain), rules.name
        (gradient,) = torch.autograd.grad(logits.float().sum(), start)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all(), rules.name


# ----------------------------------------------------------------------------------------------- single places of a model


def test_a_frozen_norm_is_a_constant_scale(tiny):
    """P11: (g - mean g) / scale for a LayerNorm, g / scale for an RMSNorm, g times the weight first."""
    frozen = get_rules("ln-only")
    for family, centred in (("gpt2", True), ("llama3", False), ("gemma2", False)):
        norm = tiny(family, torch.float64).blocks[0].ln1
        x, g = (torch.randn(3, 32, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
        x.requires_grad_()
        (found,) = torch.autograd.grad(norm(x, frozen), x, g)
        h = g * (1 + norm.w if norm.offset else norm.w)
        wide = x - x.mean(-1, keepdim=True) if centred else x
        expected = (h - h.mean(-1, keepdim=True) if centred else h) / (
            wide.square().mean(-1, keepdim=True) + norm.eps
        ).sqrt()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-13, atol=1e-14)


def test_half_makes_a_bilinear_map_homogeneous():
    """P9: of y = (W x) * (V x), x times gradient is 2y, and y with the rule; each branch gets exactly half."""
    generator = torch.Generator().manual_seed(0)
    w, v, x = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((6, 5), (6, 5), (5,)))
    x.requires_grad_()
    for name, factor in (("gradient", 2), ("relp", 1), ("cp-lrp", 1)):
        y = get_rules(name).product(w @ x, v @ x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient @ x.detach(), factor * y.detach().sum())


def test_attnlrp_leaves_a_quarter_to_queries_and_keys_and_half_to_values():
    """P17; with keys and values that several query heads share, and a causal mask."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.arange(5)

    def sent_back(rules: Rules) -> list[torch.Tensor | None]:
        scores = ops.attention_scores(q, k, scale=0.7, softcap=None, rules=rules)
        scores = scores.masked_fill(ops.causal_mask(index, index, None), -torch.inf)
        z = ops.attention_mix(ops.attention_pattern(scores, rules), v, rules)
        g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
        return list(torch.autograd.grad(z, (q, k, v), g, allow_unused=True))

    exact = sent_back(GRADIENT)
    for name in ("attnlrp", "pa-lrp", "gim,temperature=1"):
        for share, found, gradient in zip((4, 4, 2), sent_back(get_rules(name)), exact, strict=True):
            torch.testing.assert_close(share * found, gradient, rtol=1e-14, atol=1e-15)
    for name in ("cp-lrp", "relp-frozen-attention"):
        to_q, to_k, to_v = sent_back(get_rules(name))
        assert to_q is None
        assert to_k is None
        assert torch.equal(to_v, exact[2])


@ALL
def test_gim_without_its_temperature_and_with_ratios_is_attnlrp(tiny, family):
    model, tokens = tiny(family, torch.float64), some_tokens(2, 6)
    gim = backward_pass(model, tokens, get_rules("gim,temperature=1,activation_slope=ratio"))
    attnlrp = backward_pass(model, tokens, get_rules("attnlrp"))
    for name, gradient in attnlrp.gradients.items():
        assert torch.equal(gim.gradients[name], gradient), name


def test_rules_withhold_gradients_from_exactly_what_they_freeze(tiny):
    """P13."""
    model, tokens = tiny("qwen3"), some_tokens(1, 5)
    reached = {
        name: set(backward_pass(model, tokens, rules).gradients) for name, rules in RULES.items() if name in ONE_RUN
    }
    everything, scales = set(model.hook_dict), {n for n in model.hook_dict if n.endswith("hook_scale")}
    of_queries_and_keys = {n for n in scales if "_norm." in n}
    attention = {n for n in everything if ".attn." in n and not n.endswith(("hook_v", "hook_z"))}
    assert reached["gradient"] == everything
    assert everything - reached["ln-only"] == scales - of_queries_and_keys
    assert len(scales - of_queries_and_keys) == 2 * model.cfg.n_layers + 1
    for name in ("attnlrp", "pa-lrp", "gim"):
        assert everything - reached[name] == scales
    assert everything - reached["relp-frozen-attention"] == (scales - of_queries_and_keys) | attention
    # under "frozen-gate" the gate's own path is cut as well
    assert everything - reached["cp-lrp"] == scales | attention | {n for n in everything if n.endswith("mlp.hook_pre")}


# ------------------------------------------------------------------------------------- P15: isolation, P16: companions


def test_rules_leave_nothing_behind(tiny):
    """Published implementations patch classes and registries for the whole process; here there is nothing to undo."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, bystander, pairs, tokens = tiny("gpt2"), tiny("llama3"), small_pairs(), some_tokens(1, 6)
    registry = lambda: {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}  # noqa: E731
    functions = lambda: [torch.nn.LayerNorm.forward, torch.nn.Dropout.forward, torch.softmax, F.softmax, F.gelu,  # noqa: E731
                         torch.Tensor.softmax, torch.autograd.grad]  # fmt: skip
    attention, torchs = registry(), functions()
    gradients = {m.cfg.name: backward_pass(m, tokens).gradients for m in (model, bystander)}
    scores = {name: attribution(model, pairs, "attn_out", rules=name) for name in RULES}

    def breaks(*logits_and_pairs):
        raise MetricError("from the metric")

    for name in reversed(RULES):
        with pytest.raises(MetricError, match="from the metric"):
            attribution(model, pairs, "attn_out", rules=name, metric=Metric("breaks", "", breaks, slope=breaks))
        with contextlib.suppress(ZeroDivisionError):
            model.run_with_hooks(
                tokens, rules=get_rules(name).recording(), fwd_hooks=[("hook_embed", lambda v, hook: 1 / 0)]
            )
        assert attribution(model, pairs, "attn_out", rules=name).equals(scores[name])
    for m in (model, bystander):
        assert not any(point.fwd_hooks or point.bwd_hooks for point in m.hook_dict.values())
        assert all(p.grad is None and not p.requires_grad for p in m.parameters())
        after = backward_pass(m, tokens).gradients
        assert all(torch.equal(after[name], gradient) for name, gradient in gradients[m.cfg.name].items())
    assert registry() == attention
    assert functions() == torchs
    assert torch.is_grad_enabled()


def test_changing_the_rule_set_changes_the_result(tiny):
    """P14: there is no flag that comes too late; the order of calls does not matter either (above)."""
    model, tokens = tiny("llama3", torch.float64), some_tokens(2, 6)
    at_start = {name: backward_pass(model, tokens, get_rules(name)).gradients["hook_embed"] for name in ONE_RUN}
    for i, name in enumerate(ONE_RUN):
        for other in ONE_RUN[:i]:
            distance = (at_start[name] - at_start[other]).norm() / at_start[other].norm()
            assert distance > 0.01, (name, other)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("name", RULES)
def test_a_batch_is_its_prompts_one_by_one(tiny, family, name):
    """P16, with padding and without: what stands in the padding reaches nothing."""
    model = tiny(family, torch.float64)
    for lengths in (None, [4, 6, 5]):
        pairs = small_pairs(n=3, lengths=lengths, differ=(1, 3), seed=2)
        together = attribution(model, pairs, "resid_pre", rules=name)
        for row, length in enumerate(lengths or [6, 6, 6]):
            one = pairs.take([row])
            alone = attribution(model, _shortened(one, length), "resid_pre", rules=name)[0]
            mine = together[row].sel(position=slice(0, length - 1)).values
            assert math.isclose(abs(mine - alone.values).max(), 0, abs_tol=1e-11 * abs(alone.values).max())
            assert together[row].sel(position=slice(length, None)).isnull().all()


def _shortened(pairs, length: int):
    return dataclasses.replace(pairs, clean=pairs.clean[:, :length], corrupt=pairs.corrupt[:, :length])
