"""Rule sets at single places, their names, and what they refuse. In models: test_rules_coverage, test_rules_properties."""

import dataclasses
import inspect

import pytest
import torch
from torch.autograd import gradcheck

from interp import Rules, get_rules
from interp.errors import RulesError
from interp.model.activations import ACTIVATIONS
from interp.rules import GRADIENT, RULES, SETTINGS, Against
from tests.small_pairs import refused

TANH = ACTIVATIONS["tanh"]
# each place of a forward pass: its formula, values to try it on, and the switch that decides
PLACES = {
    "norm": (lambda x, s: x / s, lambda r: (r(2, 5), r(2, 1).abs() + 1), "norm_scale"),
    "qk_norm": (lambda x, s: x / s, lambda r: (r(2, 5), r(2, 1).abs() + 1), "qk_norm_scale"),
    "activation": (torch.tanh, lambda r: (r(2, 5),), "activation_slope"),
    "product": (lambda a, b: a * b, lambda r: (r(2, 5), r(2, 5)), "gate_product"),
    "rotate": (lambda x: x, lambda r: (r(2, 5),), "rotation"),
    "scores": (lambda q, k: torch.einsum("hqe,hke->hqk", q, k), lambda r: (r(2, 3, 4), r(2, 5, 4)), "query_key"),
    "softmax": (lambda s: s.exp() / s.exp().sum(-1, keepdim=True), lambda r: (r(2, 3, 4),), "pattern"),
    "mix": (lambda p, v: torch.einsum("hqk,hke->hqe", p, v), lambda r: (r(2, 3, 4), r(2, 4, 5)), "pattern_value"),
    "soft_cap": (lambda x: 1.5 * torch.tanh(x / 1.5), lambda r: (r(2, 5),), "cap_slope"),
}
EXTRA = {"activation": (TANH,), "soft_cap": (1.5,)}
# what a rule set can be asked otherwise
ABOUT = {"recording", "reaches", "settings", "coverage", "check"}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ the gradient


def test_every_place_and_every_switch_is_checked_here():
    methods = {name for name, _ in inspect.getmembers(Rules, inspect.isfunction) if not name.startswith("_")}
    assert methods - ABOUT == set(PLACES)
    assert [switch for _, _, switch in PLACES.values()] == list(SETTINGS)
    assert {f.name for f in dataclasses.fields(Rules)} == {"name", "temperature", *SETTINGS}


@pytest.mark.parametrize("place", PLACES)
def test_the_gradients_forward_is_the_formula(place):
    formula, inputs, _ = PLACES[place]
    values = inputs(draw)
    torch.testing.assert_close(getattr(GRADIENT, place)(*values, *EXTRA.get(place, ())), formula(*values))


@pytest.mark.parametrize("place", PLACES)
def test_the_gradients_backward_is_the_gradient(place):
    values = [value.requires_grad_() for value in PLACES[place][1](draw)]
    assert gradcheck(lambda *v: getattr(GRADIENT, place)(*v, *EXTRA.get(place, ())), values)


def test_a_masked_score_gets_neither_attention_nor_gradient():
    scores = torch.tensor([[0.3, 1.2, -torch.inf]], dtype=torch.float64, requires_grad=True)
    pattern = GRADIENT.softmax(scores)
    pattern[0, 0].backward()
    assert pattern[0, 2] == 0
    assert scores.grad[0, 2] == 0
    assert torch.isfinite(scores.grad).all()


# -------------------------------------------------------------------------------------------- each setting of a switch


def one_switch(switch: str, setting: str) -> Rules:
    return Rules("one switch", **{switch: setting})


@pytest.mark.parametrize(
    ("place", "setting"), [(place, s) for place, (_, _, switch) in PLACES.items() for s in SETTINGS[switch]]
)
def test_a_switch_acts_at_its_own_place_only_and_never_forwards(place, setting):
    rules, expected = one_switch(PLACES[place][2], setting), {}
    for other, (_, inputs, _) in PLACES.items():
        bound, extra = rules, EXTRA.get(other, ())
        values = [value.requires_grad_() for value in inputs(draw)]
        if rules.needs_source:
            recording = rules.recording()
            getattr(recording, other)(*[1.5 * value.detach() + 1 for value in inputs(draw)], *extra)
            bound = recording.against()
        out, plain = (getattr(r, other)(*values, *extra) for r in (bound, GRADIENT))
        assert torch.equal(out, plain), other
        g = torch.ones_like(out)
        if out.requires_grad:
            found = torch.autograd.grad(out, values, g, allow_unused=True)
            expected[other] = all(
                f is not None and torch.equal(f, e)
                for f, e in zip(found, torch.autograd.grad(plain, values, g), strict=True)
            )
        else:
            expected[other] = False
    assert [name for name, same in expected.items() if not same] == ([] if setting == "exact" else [place])


# what reaches each input, as a share of autograd's; None: nothing
@pytest.mark.parametrize(
    ("place", "setting", "shares"),
    [
        ("norm", "frozen", (1, None)),
        ("qk_norm", "frozen", (1, None)),
        ("product", "half", (0.5, 0.5)),
        ("product", "frozen-gate", (None, 1)),
        ("rotate", "half", (0.5,)),
        ("scores", "half", (0.5, 0.5)),
        ("softmax", "frozen", (None,)),
        ("mix", "half", (0.5, 0.5)),
    ],
)
def test_halves_are_exactly_half_and_frozen_is_a_constant(place, setting, shares):
    values = [value.requires_grad_() for value in PLACES[place][1](draw)]
    rules = one_switch(PLACES[place][2], setting)
    (out, plain), g = (getattr(r, place)(*values) for r in (rules, GRADIENT)), None
    g = draw(*plain.shape)
    exact = torch.autograd.grad(plain, values, g)
    if not out.requires_grad:
        assert shares == (None,)
        return
    for share, found, gradient in zip(
        shares, torch.autograd.grad(out, values, g, allow_unused=True), exact, strict=True
    ):
        assert (found is None) == (share is None)
        if share is not None:
            assert torch.equal(found, share * gradient)


def test_a_ratio_is_the_value_over_the_input():
    x, g = draw(40).requires_grad_(), draw(41)[:40]
    for place, switch in (("activation", "activation_slope"), ("soft_cap", "cap_slope")):
        out = getattr(one_switch(switch, "ratio"), place)(x, *EXTRA[place])
        (found,) = torch.autograd.grad(out, x, g)
        torch.testing.assert_close(found * x, g * out)


def test_a_soft_caps_secant_is_its_quotient():
    x, other = (3 * draw(40)).requires_grad_(), 3 * draw(41)[:40]
    recording = one_switch("cap_slope", "secant").recording()
    there = recording.soft_cap(other, 1.5)
    here = recording.against().soft_cap(x, 1.5)
    (slope,) = torch.autograd.grad(here.sum(), x)
    torch.testing.assert_close(slope, ((here - there) / (x - other)).detach())


# ------------------------------------------------------------------------------------------------------------- presets

# norm, q/k norm, activation, gate, rotation, q.k, pattern, pattern x value, soft-cap; rules.md's table, written out
TABLE = {
    "gradient": ("exact", "exact", "exact", "exact", "exact", "exact", "exact", "exact", "exact"),
    "ln-only": ("frozen", "exact", "exact", "exact", "exact", "exact", "exact", "exact", "exact"),
    "relp": ("frozen", "exact", "ratio", "half", "exact", "exact", "exact", "exact", "exact"),
    "relp-frozen-attention": ("frozen", "exact", "ratio", "half", "exact", "exact", "frozen", "exact", "exact"),
    "attnlrp": ("frozen", "frozen", "ratio", "half", "exact", "half", "exact", "half", "exact"),
    "cp-lrp": ("frozen", "frozen", "ratio", "frozen-gate", "exact", "exact", "frozen", "exact", "exact"),
    "pa-lrp": ("frozen", "frozen", "ratio", "half", "half", "half", "exact", "half", "exact"),
    "gim": ("frozen", "frozen", "exact", "half", "exact", "half", "exact", "half", "exact"),
    "secant": ("secant", "secant", "secant", "secant", "exact", "secant", "secant", "secant", "secant"),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_what_its_source_does(name):
    assert set(TABLE) == set(RULES)
    rules = get_rules(name)
    assert rules.name == name
    assert tuple(getattr(rules, switch) for switch in SETTINGS) == TABLE[name]
    assert rules.temperature == (2.0 if name == "gim" else 1.0)
    assert rules.settings() == {
        **{s: v for s, v in zip(SETTINGS, TABLE[name], strict=True) if v != "exact"},
        **({"temperature": 2.0} if name == "gim" else {}),
    }
    assert rules.needs_source == rules.symmetric == (name == "secant")
    unreached = {"q", "k", "pattern"} if rules.pattern == "frozen" else set()
    assert {site for site in ("q", "k", "v", "pattern", "head", "resid_pre") if not rules.reaches(site)} == unreached


def test_rules_are_immutable_values():
    assert Rules() == GRADIENT == get_rules("gradient")
    assert Rules("other") != GRADIENT
    assert len({Rules(), GRADIENT, get_rules("gradient"), Rules(norm_scale="frozen")}) == 2
    assert len(set(RULES.values())) == len(RULES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRADIENT.name = "changed"
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_rules("relp").pattern = "frozen"


def test_a_name_may_be_followed_by_switches():
    mine = get_rules("relp, pattern=frozen ,qk_norm_scale = frozen")
    assert mine.settings() == {**get_rules("relp-frozen-attention").settings(), "qk_norm_scale": "frozen"}
    assert mine.name == "relp, pattern=frozen ,qk_norm_scale = frozen"
    assert get_rules("relp").pattern == "exact"  # the preset is as it was
    assert get_rules("gim,temperature=3.5").temperature == 3.5
    assert get_rules(mine) is mine
    assert get_rules("relp,activation_slope=exact,gate_product=exact").settings() == get_rules("ln-only").settings()


def test_what_compares_two_runs_is_known_of_mixtures_too():
    mixed = get_rules("relp,query_key=secant")
    assert (mixed.needs_source, mixed.symmetric) == (True, False)
    assert get_rules("secant,rotation=half").symmetric
    assert not get_rules("secant,cap_slope=exact").symmetric


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("repl", r"'repl' is not a rule set .*did you mean 'relp'"),
        ("", r"'' is not a rule set \(choose from gradient, ln-only, relp"),
        ("relp,patern=frozen", r"'patern' is not a switch of a rule set .*did you mean 'pattern'"),
        ("relp,pattern=frosen", r"'frosen' is not a setting of pattern .*did you mean 'frozen'"),
        ("relp,pattern=half", r"'half' is not a setting of pattern \(choose from exact, frozen, secant\)"),
        ("relp,name=mine", r"'name' is not a switch"),
        ("relp,pattern", r"'pattern' is not a switch of a rule set: write it as pattern=frozen"),
        ("relp,", r"'' is not a switch"),
        ("gim,temperature=warm", r"temperature must be a number, not 'warm'"),
        ("gim,temperature=0", r"temperature must be a positive number, not 0"),
        ("gim,temperature=nan", r"temperature must be a positive number, not nan"),
        ("gim,pattern=frozen", r'a temperature goes with pattern="exact", not with pattern=\'frozen\''),
    ],
)
def test_what_is_no_rule_set_is_said(spelling, says):
    with pytest.raises(RulesError, match=says):
        get_rules(spelling)


def test_a_rule_set_checks_its_settings_itself():
    with pytest.raises(RulesError, match="'freeze' is not a setting of norm_scale"):
        Rules("mine", norm_scale="freeze")


# ------------------------------------------------------------------------------------------------------------ two runs


def test_rules_between_two_runs_refuse_a_single_one(tiny):
    model, rules = tiny("gpt2"), get_rules("secant")
    with pytest.raises(RulesError, match=r"'secant' compare two runs.*recording\(\) for one run and .against\(\)"):
        model(some_tokens(1, 5), rules=rules)


def test_a_recording_serves_runs_of_its_own_shape_once_each(tiny):
    model, rules, tokens = tiny("gpt2"), get_rules("secant"), some_tokens(2, 5)
    recording = rules.recording()
    logits = model(tokens, rules=recording)
    assert torch.equal(logits, model(tokens))
    assert torch.equal(model(some_tokens(2, 5, seed=1), rules=recording.against()), model(some_tokens(2, 5, seed=1)))
    for other in (some_tokens(2, 6), some_tokens(1, 5)):
        with refused(RulesError, "runs of equal shape, one forward pass each; these two do not match"):
            model(other, rules=recording.against())
    bound = recording.against()
    model(tokens, rules=bound)
    with pytest.raises(RulesError, match="these two do not match"):
        model(tokens, rules=bound)  # a second pass with the same object
    with pytest.raises(RulesError, match="these two do not match"):
        model(tokens, rules=Against(**{f.name: getattr(rules, f.name) for f in dataclasses.fields(Rules)}))


def test_a_recording_can_be_repeated_for_a_larger_batch(tiny):
    model, rules, tokens = tiny("llama3"), get_rules("secant"), some_tokens(2, 5)
    recording = rules.recording()
    model(tokens, rules=recording)
    with pytest.raises(RulesError, match="do not match"):
        model(some_tokens(6, 5, seed=1), rules=recording.against(copies=2))
    model(some_tokens(6, 5, seed=1), rules=recording.against(copies=3))


def test_a_recording_keeps_only_what_is_compared_and_no_graph():
    recording = get_rules("relp,query_key=secant").recording()
    x = draw(2, 3, 4).requires_grad_()
    recording.activation(x, TANH)
    recording.softmax(x)
    assert recording.tape == []
    recording.scores(x, x)
    assert [value.shape for value in recording.tape[0]] == [(2, 3, 4), (2, 4, 3)]
    assert not any(value.requires_grad for value in recording.tape[0])
