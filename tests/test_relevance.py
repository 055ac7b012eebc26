"""Relevance of tokens: what it must add up to, and autograd's own answer where there is one."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from interp import Transformer
from interp.errors import MetricError, OptionError, RulesError, UnsupportedModel
from interp.metrics import METRICS
from interp.model.config import Rotary
from interp.model.run import record
from interp.model.transformer import Places
from interp.relevance import norm_x_logit, token_relevance
from interp.rules import GRADIENT, RULES, Rules, get_rules
from interp.tasks.corrupt import corrupt
from tests.small_pairs import refused, small_pairs

PAIRS = small_pairs(n=3, lengths=[6, 4, 5], seed=1)
RUNS = pytest.mark.parametrize("run", ["clean", "corrupt"])
# learned positions; GQA; q/k norms, post-norms and windows; parallel, partly rotated; adjacent rotation; post-norm only
FAMILIES = ("gpt2", "llama3", "gemma3", "pythia", "gptj", "olmo2")
LOGIT_DIFF = METRICS["logit_diff"]


def other(run: str) -> str:
    return "corrupt" if run == "clean" else "clean"


def metric_of(model, run: str, pairs=PAIRS, metric: str = "logit_diff") -> np.ndarray:
    clean = model(pairs.clean, read_at=pairs.read_at)
    return METRICS[metric](model(pairs.tokens(run), read_at=pairs.read_at), pairs, clean).numpy()


def without_biases(model) -> Transformer:
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("b"):
            weight.data.zero_()
    return model


def seen(values: torch.Tensor) -> np.ndarray:
    return np.where(PAIRS.is_token, values.detach().numpy(), np.nan)


# ------------------------------------------------------------------------------------------------------- conservation


@RUNS
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "qwen3", "llama-relu2", "olmo"])
def test_frozen_attention_conserves_relevance_without_biases(tiny, family, run):
    """P2: norms, activations, gates and learned positions keep everything; of token and position together."""
    model = without_biases(tiny(family, torch.float64))
    rules = "relp-frozen-attention,cap_slope=ratio"
    found = token_relevance(model, PAIRS, rules=rules, run=run)
    np.testing.assert_array_equal(found.metric, metric_of(model, run))
    np.testing.assert_allclose(found.residual, 0, atol=1e-12)
    np.testing.assert_allclose(found.sum("position"), found.metric, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "rules", "biases"),
    [
        ("llama3", "relp", False),  # the softmax keeps some
        ("llama3", "relp-frozen-attention,gate_product=exact", False),
        ("gpt2", "ln-only,pattern=frozen", False),
        ("gpt2", "relp-frozen-attention", True),
        ("gemma2", "relp-frozen-attention", False),  # so does a soft-cap of the logits
    ],
)
def test_it_does_not_where_it_should_not(tiny, family, rules, biases):
    """P3, and the residual says how much is missing."""
    model = tiny(family, torch.float64)
    found = token_relevance(model if biases else without_biases(model), PAIRS, rules=rules)
    assert (abs(found.residual) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_is_what_is_missing(tiny, family):
    model = tiny(family, torch.float64)
    for rules in (*RULES, "relp,pattern=secant"):
        found = token_relevance(model, PAIRS, rules=rules, run="corrupt")
        explained = found.metric - (found.metric_other if "metric_other" in found.coords else 0)
        np.testing.assert_allclose(found.sum("position") + found.residual, explained, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.metric, metric_of(model, "corrupt"))
        assert ("metric_other" in found.coords) == ("secant" in rules)


@RUNS
@pytest.mark.parametrize("metric", ["logit_diff", "log_probability", "probability", "kl_divergence"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "qwen3"])
def test_secants_share_out_the_difference_of_the_runs(tiny, family, metric, run):
    model = tiny(family, torch.float64)
    found, back = (token_relevance(model, PAIRS, rules="secant", metric=metric, run=r) for r in (run, other(run)))
    np.testing.assert_allclose(found.metric_other, metric_of(model, other(run), metric=metric), atol=1e-12)
    np.testing.assert_allclose(found.residual, 0, atol=1e-12)
    np.testing.assert_allclose(found.sum("position"), found.metric - found.metric_other, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.values, -back.values, rtol=0, atol=1e-12)
    assert (found.sel(position=[0, 1]) == 0).all()  # the tokens are the same there
    assert found.attrs["sign"].startswith(f"share of metric({run}) - metric({other(run)})")


# ------------------------------------------------------------------------------------------------------ by autograd


@RUNS
@pytest.mark.parametrize("metric", ["logit_diff", "log_probability"])
@pytest.mark.parametrize("rules", ["gradient", "attnlrp", "cp-lrp", "gim"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_input_times_what_arrives_there(tiny, family, rules, metric, run):
    model = tiny(family, torch.float64)
    leaves = []

    def leaf(value, hook):
        leaves.append(value.detach().requires_grad_())
        return leaves[0]

    logits = model.run_with_hooks(
        PAIRS.tokens(run), rules=get_rules(rules), read_at=PAIRS.read_at, fwd_hooks=[("blocks.0.hook_resid_pre", leaf)]
    )
    METRICS[metric](logits, PAIRS).sum().backward()
    expected = (leaves[0] * leaves[0].grad).sum(-1)
    found = token_relevance(model, PAIRS, rules=rules, metric=metric, run=run)
    np.testing.assert_allclose(found.values, seen(expected), rtol=0, atol=1e-12)


def test_token_and_learned_position_share_it(tiny):
    """What a token alone accounts for is another number: the rest belongs to its position."""
    model = without_biases(tiny("gpt2", torch.float64))
    hooks = ("hook_embed", "hook_pos_embed")
    parts, kept = record(model, PAIRS.clean, hooks), {}

    def leaf(value, hook):
        kept[hook.name] = value.detach().requires_grad_()
        return kept[hook.name]

    logits = model.run_with_hooks(
        PAIRS.clean, rules=RULES["relp-frozen-attention"], read_at=PAIRS.read_at, fwd_hooks=[(h, leaf) for h in hooks]
    )
    LOGIT_DIFF(logits, PAIRS).sum().backward()
    token, position = ((parts[h] * kept[h].grad).sum(-1) for h in hooks)
    found = token_relevance(model, PAIRS, rules="relp-frozen-attention")
    np.testing.assert_allclose(found.values, seen(token + position), rtol=0, atol=1e-12)
    assert (abs(token.sum(1).detach().numpy() - found.metric) > 1e-3).all()


# ------------------------------------------------------------------------------------------------------------- PA-LRP


def stretched(model) -> Transformer:
    """The same weights with rotations that also lengthen, as yarn's do."""
    longer = tuple(None if r is None else dataclasses.replace(r, scale=1.3) for r in model.cfg.rotary)
    weights = {name: weight.data for name, weight in model.named_parameters()}
    return Transformer(dataclasses.replace(model.cfg, rotary=longer), weights, model.tokenizer)


def with_tables_as_leaves(model, tokens, read_at: int, pairs) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Relevance [position] of one prompt's input, and of every layer's own cos and sin tables, by autograd: each half of a
    rotation's factors is a half because both are handed half of what arrives at their product."""
    x = model.embed_tokens(tokens).detach().requires_grad_()
    places, tables, resid, rules = model.places(tokens.shape[1]), [], x, RULES["pa-lrp"]
    for block in model.blocks:
        rotary: Rotary = block.attn.rotary
        tables.append([table.clone().requires_grad_() for table in places.rotations[rotary]])
        resid = block(resid, Places(places.masks, {rotary: tuple(tables[-1])}), rules)
    LOGIT_DIFF(model.unembed_resid(resid[:, read_at], rules), pairs).sum().backward()
    of = lambda leaf: (leaf * leaf.grad).sum(-1).detach()  # noqa: E731
    return of(x)[0], [[of(table) for table in layer] for layer in tables]


@pytest.mark.parametrize("family", ["llama3", "pythia", "gptj", "qwen3", "gemma3", "gemma2", "stretched"])
def test_positions_keep_half_of_every_rotation(tiny, family):
    model = stretched(tiny("llama3", torch.float64)) if family == "stretched" else tiny(family, torch.float64)
    signed, sizes = (token_relevance(model, PAIRS, rules="pa-lrp", absolute_positions=a) for a in (False, True))
    plain = token_relevance(model, PAIRS)
    for row, length in enumerate((6, 4, 5)):
        pairs = PAIRS.take([row])
        x, tables = with_tables_as_leaves(model, pairs.clean[:, :length], length - 1, pairs)
        by_table = [table for layer in tables for table in layer]
        expected, unsigned = (x + sum(f(t) for t in by_table) for f in (lambda t: t, abs))
        np.testing.assert_allclose(signed[row, :length], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(sizes[row, :length], unsigned, rtol=0, atol=1e-12)
        assert abs(signed[row] - sizes[row]).max() > 1e-4
        assert abs(signed[row] - plain[row]).max() > 1e-4
    assert sizes.attrs["absolute_positions"] == 1


def test_positions_hold_what_tokens_lose_to_them(tiny):
    """In a single layer without biases the tables keep at each position just what its token then lacks."""
    model = without_biases(tiny("llama3", torch.float64))
    weights = {n: w.data for n, w in model.named_parameters() if not n.startswith(("blocks.1", "blocks.2"))}
    first = {name: getattr(model.cfg, name)[:1] for name in ("attn_scale", "windows", "rotary")}
    model = Transformer(dataclasses.replace(model.cfg, n_layers=1, **first), weights, model.tokenizer)
    plain, aware = (token_relevance(model, PAIRS, rules=rules) for rules in ("attnlrp", "pa-lrp"))
    np.testing.assert_allclose(aware.values, plain.values, rtol=0, atol=1e-12)
    difference = token_relevance(model, PAIRS, rules="secant,rotation=half")
    np.testing.assert_allclose(difference.residual, 0, atol=1e-12)  # as much between two runs


def test_without_rotations_there_are_no_positions_to_add(tiny):
    for absolute in (False, True):
        aware = token_relevance(tiny("gpt2"), PAIRS, rules="pa-lrp", absolute_positions=absolute)
        np.testing.assert_array_equal(aware.values, token_relevance(tiny("gpt2"), PAIRS).values)
    frozen = token_relevance(tiny("llama3"), PAIRS, rules="pa-lrp,pattern=frozen")  # where nothing reaches a rotation
    np.testing.assert_array_equal(
        frozen.values, token_relevance(tiny("llama3"), PAIRS, rules="attnlrp,pattern=frozen").values
    )


# --------------------------------------------------------------------------------------------------------- NormXLogit


@RUNS
@pytest.mark.parametrize("family", FAMILIES)
def test_norm_times_logit(tiny, family, run):
    model = tiny(family, torch.float64)
    found = norm_x_logit(model, PAIRS, run=run)
    logits = model(PAIRS.tokens(run))
    size = (model.W_E[PAIRS.tokens(run)] * model.cfg.embed_scale).square().sum(-1).sqrt()
    expected = torch.stack([size[:, p] * METRICS["answer_logit"](logits[:, p], PAIRS) for p in range(6)], 1)
    np.testing.assert_allclose(found.values, seen(expected), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.metric, metric_of(model, run, metric="answer_logit"))
    assert (found.attrs["method"], found.attrs["metric"]) == ("norm_x_logit", "answer_logit")


# ------------------------------------------------------------------------------------------------ layout and company


def test_every_prompt_has_its_own_tokens(tiny):
    model = tiny("gpt2")
    clean, changed = token_relevance(model, PAIRS), token_relevance(model, PAIRS, run="corrupt")
    assert clean.dims == clean.token.dims == ("prompt", "position")
    assert clean.token.values.tolist()[1] == [*PAIRS.token_strings[1], "", ""]
    assert changed.token.values[0].tolist() == model.to_str_tokens(PAIRS.corrupt[0])
    np.testing.assert_array_equal(clean.isnull(), ~PAIRS.is_token)
    a = clean.attrs
    assert (a["rules"], a["run"], a["unit"], a["metric"]) == ("attnlrp", "clean", "logits", "logit_diff")
    assert "norm_scale" in a["switches"]
    assert all(isinstance(value, str | int | float) for value in a.values())
    assert all(c.dtype != object for c in clean.coords.values())


@pytest.mark.parametrize("rules", ["attnlrp", "pa-lrp", "secant"])
@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_batches_padding_and_company_change_nothing(tiny, family, rules):
    model = tiny(family, torch.float64)
    together = token_relevance(model, PAIRS, rules=rules)
    xr.testing.assert_allclose(token_relevance(model, PAIRS, rules=rules, batch_size=2), together, atol=1e-12)
    xr.testing.assert_allclose(norm_x_logit(model, PAIRS, batch_size=2), norm_x_logit(model, PAIRS), atol=1e-12)
    for row, length in enumerate((6, 4, 5)):
        one = PAIRS.take([row])
        one = dataclasses.replace(one, clean=one.clean[:, :length], corrupt=one.corrupt[:, :length])
        np.testing.assert_allclose(together[row, :length], token_relevance(model, one, rules=rules)[0], atol=1e-12)


@pytest.mark.parametrize("rules", ["relp-frozen-attention", "secant"])
def test_a_run_of_noised_embeddings(tiny, rules):
    model = without_biases(tiny("gpt2", torch.float64))
    pairs = corrupt(model, PAIRS, "gaussian", seed=1)
    found = token_relevance(model, pairs, rules=rules, run="corrupt")
    logits = model.run_with_hooks(pairs.corrupt, read_at=pairs.read_at, fwd_hooks=pairs.hooks("corrupt"))
    np.testing.assert_array_equal(found.metric, LOGIT_DIFF(logits, pairs))
    np.testing.assert_allclose(found.residual, 0, atol=1e-12)


@pytest.mark.parametrize("rules", [name for name in RULES if name != "gradient"])
def test_narrow_models_stay_finite(tiny, rules):
    model = tiny("llama3", torch.bfloat16)
    found = token_relevance(model, PAIRS, rules=rules)
    assert found.dtype == np.float32
    assert np.isfinite(found.values[PAIRS.is_token]).all()


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_explained_is_said(tiny):
    model = tiny("llama3")
    for what in (token_relevance, norm_x_logit):
        with refused(UnsupportedModel, "needs a model's own layers, and a Linear has others"):
            what(torch.nn.Linear(2, 2), PAIRS)
        with refused(OptionError, "'both' is not a run"):
            what(model, PAIRS, run="both")
    with pytest.raises(RulesError, match="'lrp' is not a rule set"):
        token_relevance(model, PAIRS, rules="lrp")
    with pytest.raises(OptionError, match=r"rules 'attnlrp' leave nothing to positions"):
        token_relevance(model, PAIRS, absolute_positions=True)
    with pytest.raises(MetricError, match="gradient of kl_divergence is zero in the clean run"):
        token_relevance(model, PAIRS, metric="kl_divergence")
    with pytest.raises(MetricError, match="has no secant between two runs"):
        token_relevance(model, PAIRS, rules="secant", metric=lambda logits: logits[:, 3] ** 2)
    with pytest.raises(MetricError, match="needs wrong answers"):
        token_relevance(model, dataclasses.replace(PAIRS, wrong_answers=None))
    with pytest.raises(MetricError, match="linear in the logits, such as logit_diff, which probability is not"):
        norm_x_logit(model, PAIRS, metric="probability")


def test_a_rule_that_the_model_cannot_follow_is_refused(tiny):
    model = copy.deepcopy(tiny("gpt2"))
    model.ln_final.hook_normalized.add_hook(lambda value, hook: None)
    with pytest.raises(RulesError, match=r"treat norms, and ln_final\.hook_normalized has a hook"):
        token_relevance(model, PAIRS)
    assert np.isfinite(token_relevance(model, PAIRS, rules=GRADIENT).metric).all()
    assert token_relevance(model, PAIRS, rules=Rules("mine")).attrs["rules"] == "mine"
