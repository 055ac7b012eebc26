"""What a rule set says it does in a model is what the forward pass then asks of it; what it cannot do it refuses."""

import copy
import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from interp import Rules, attribution, get_rules
from interp.errors import RulesError
from interp.model.activations import ACTIVATIONS, Activation
from interp.model.nonlinearities import Nonlinearity
from interp.rules import GRADIENT, RULES
from tests.families import boot_family
from tests.small_pairs import small_pairs

FAMILIES = ("gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "gemma3", "olmo2", "stablelm")
ALL = pytest.mark.parametrize("family", FAMILIES)
SWITCHES = {
    "norm": "norm_scale", "qk_norm": "qk_norm_scale", "activation": "activation_slope", "product": "gate_product",
    "rotate": "rotation", "scores": "query_key", "softmax": "pattern", "mix": "pattern_value", "soft_cap": "cap_slope",
}  # fmt: skip


@dataclass(frozen=True)
class Spy(Rules):
    """The plain gradient, writing down which switch was asked for; hooks write into the same list."""

    seen: list[str] = field(default_factory=list, compare=False)


def _spied(method: str):
    def ask(self, *args):
        self.seen.append(SWITCHES[method])
        return getattr(Rules, method)(self, *args)

    return ask


for _method in SWITCHES:
    setattr(Spy, _method, _spied(_method))


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


def switches_asked(model) -> list[str]:
    spy = Spy()
    model(some_tokens(2, 7), rules=spy)
    return spy.seen


# ------------------------------------------------------------------------------------------------------------ coverage


@ALL
def test_the_places_listed_are_those_the_forward_pass_asks_at_in_order(tiny, family):
    model = tiny(family)
    table = GRADIENT.coverage(model)
    assert table[table.status != "not applicable"].switch.tolist() == switches_asked(model)


@ALL
def test_a_path_is_the_module_or_hook_point_that_the_question_is_about(tiny, family):
    """Around the question the hook points of that path fire: a norm's two, an activation's input, or what comes out."""
    model, spy = tiny(family), Spy()
    note = lambda value, hook: spy.seen.append(f"hook {hook.name}")  # noqa: E731
    model.run_with_hooks(some_tokens(2, 7), rules=spy, fwd_hooks=[(name, note) for name in model.hook_dict])
    table = GRADIENT.coverage(model)
    places, modules = iter(table[table.status != "not applicable"].path), dict(model.named_modules())
    for i, event in enumerate(spy.seen):
        if event.startswith("hook "):
            continue
        path, before, soon = next(places), spy.seen[i - 1], spy.seen[i + 1 : i + 6]
        assert path in modules
        if event in ("norm_scale", "qk_norm_scale"):
            assert (before, soon[0]) == (f"hook {path}.hook_scale", f"hook {path}.hook_normalized")
        elif event == "activation_slope":
            assert before == f"hook {path}"
        elif path != "unembed":  # queries and keys are both rotated before either hook fires
            assert f"hook {path}" in (soon if event == "rotation" else soon[:2])
    assert next(places, None) is None


@ALL
@pytest.mark.parametrize("name", RULES)
def test_a_place_is_on_exact_or_not_there(tiny, family, name):
    model, rules = tiny(family), get_rules(name)
    rules.check(model)
    for row in rules.coverage(model).itertuples():
        setting = f"temperature {rules.temperature:g}" if (name, row.switch) == ("gim", "pattern") else None
        assert row.setting == (setting or getattr(rules, row.switch))
        if row.status != "not applicable":
            assert row.status == ("exact" if row.setting == "exact" else "on")
    absent = set(GRADIENT.coverage(model).query("status == 'not applicable'").switch)
    cfg = model.cfg
    assert ("gate_product" in absent) == (not cfg.gated)
    assert ("qk_norm_scale" in absent) == (cfg.qk_norm is None)
    assert ("rotation" in absent) == (family == "gpt2")
    assert ("cap_slope" in absent) == (family != "gemma2")
    assert not absent & {"query_key", "pattern", "pattern_value", "activation_slope"}


def test_every_family_has_some_of_each_switch_somewhere(tiny):
    """So that the tests above have seen every kind of place."""
    assert {switch for family in FAMILIES for switch in switches_asked(tiny(family))} == set(SWITCHES.values())


# -------------------------------------------------------------------------------------------------------- unsupported


def bare(model, **without):
    """The model with an activation about which nothing is known but how to compute it."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp.activation = dataclasses.replace(block.mlp.activation, **without)
    places = [p._replace(activation=p.activation and dataclasses.replace(p.activation, **without))
              for p in model.nonlinearities()]  # fmt: skip
    model.nonlinearities = lambda: places
    return model


@pytest.mark.parametrize(
    ("name", "without", "setting"),
    [("relp", "ratio", "ratio"), ("secant", "slope", "secant"), ("attnlrp", "ratio", "ratio")],
)
def test_an_activation_without_what_a_rule_needs_is_unsupported(tiny, name, without, setting):
    model, rules = bare(tiny("gpt2"), **{without: None}), get_rules(name)
    table = rules.coverage(model)
    wrong = table[table.status == "unsupported"]
    assert wrong.path.tolist() == [f"blocks.{layer}.mlp.hook_pre" for layer in range(3)]
    says = rf"rules '{name}' cannot set activation_slope='{setting}' at blocks\.0\.mlp\.hook_pre$"
    with pytest.raises(RulesError, match=says):
        rules.check(model)
    with pytest.raises(RulesError, match=says):
        attribution(model, small_pairs(), "resid_pre", rules=name)
    for other in ("gradient", "ln-only", "gim"):
        get_rules(other).check(model)
        assert "unsupported" not in set(get_rules(other).coverage(model).status)


def test_a_place_that_is_not_there_is_not_unsupported():
    places = [Nonlinearity("mlp", "activation_slope", False, Activation(torch.sin)), Nonlinearity("norm", "norm_scale")]
    model = SimpleNamespace(nonlinearities=lambda: places)
    assert get_rules("relp").coverage(model).status.tolist() == ["not applicable", "on"]
    get_rules("relp").check(model)


def test_other_peoples_modules_ask_no_rules():
    other = SimpleNamespace(hook_dict={})
    assert GRADIENT.coverage(other).status.tolist() == ["exact"]
    GRADIENT.check(other)
    for name in RULES:
        rules = get_rules(name)
        if rules is GRADIENT:
            continue
        table = rules.coverage(other)
        assert dict(zip(table.switch, table.setting, strict=True)) == rules.settings()
        assert set(table.status) == {"unsupported"}
        with pytest.raises(
            RulesError, match=rf"rules '{name}' cannot set .* at SimpleNamespace; load the model with load_model"
        ):
            rules.check(other)


def test_a_bridge_takes_the_plain_gradient_and_says_what_would_take_more(tmp_path):
    bridge = boot_family("gpt2", tmp_path / "gpt2")
    GRADIENT.check(bridge)
    with pytest.raises(RulesError, match=r"norm_scale='frozen' at TransformerBridge; load the model with load_model"):
        attribution(bridge, small_pairs(), "resid_pre", rules="relp")


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize(
    "point", ["blocks.1.ln2.hook_scale", "ln_final.hook_normalized", "blocks.0.attn.q_norm.hook_scale"]
)
def test_norm_rules_refuse_a_hook_that_may_change_a_norm(tiny, point):
    model, pairs = tiny("qwen3"), small_pairs()
    with model.hooks(fwd_hooks=[(point, lambda value, hook: value)]):
        for name in RULES:
            if name == "gradient":
                get_rules(name).check(model)
                continue
            with pytest.raises(RulesError, match=rf"'{name}' treat norms, and {point.replace('.', '[.]')} has a hook"):
                get_rules(name).check(model)
        with pytest.raises(RulesError, match="has a hook"):
            attribution(model, pairs, "resid_pre", rules="relp")
        get_rules("gradient,activation_slope=ratio").check(model)
    get_rules("relp").check(model)


def test_other_hooks_are_the_users_own_business(tiny):
    model = tiny("gpt2")
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 1.5)]):
        get_rules("relp").check(model)
        get_rules("secant").check(model)


def test_what_is_known_of_the_activations_is_what_the_rules_need():
    assert all(f.ratio is not None and f.slope is not None for f in ACTIVATIONS.values())
