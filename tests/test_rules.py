"""The plain gradient: each rule's forward is its formula and its backward is autograd's."""

import dataclasses
import inspect

import pytest
import torch
from torch.autograd import gradcheck

from interp.rules import GRADIENT, Rules

METHODS = {
    "norm": (lambda x, s: x / s, lambda r: (r(2, 5), r(2, 1).abs() + 1)),
    "activation": (torch.tanh, lambda r: (r(2, 5),)),
    "product": (lambda a, b: a * b, lambda r: (r(2, 5), r(2, 5))),
    "scores": (lambda q, k: torch.einsum("hqe,hke->hqk", q, k), lambda r: (r(2, 3, 4), r(2, 5, 4))),
    "softmax": (lambda s: s.exp() / s.exp().sum(-1, keepdim=True), lambda r: (r(2, 3, 4),)),
    "mix": (lambda p, v: torch.einsum("hqk,hke->hqe", p, v), lambda r: (r(2, 3, 4), r(2, 4, 5))),
    "soft_cap": (lambda x: 1.5 * torch.tanh(x / 1.5), lambda r: (r(2, 5),)),
}
EXTRA = {"activation": (torch.tanh,), "soft_cap": (1.5,)}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_every_rule_is_checked_here():
    assert set(METHODS) == {
        name for name, _ in inspect.getmembers(Rules, inspect.isfunction) if not name.startswith("_")
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_rules_forward_is_its_formula(name):
    formula, inputs = METHODS[name]
    values = inputs(draw)
    torch.testing.assert_close(getattr(GRADIENT, name)(*values, *EXTRA.get(name, ())), formula(*values))


@pytest.mark.parametrize("name", METHODS)
def test_a_rules_backward_is_the_gradient(name):
    values = [value.requires_grad_() for value in METHODS[name][1](draw)]
    assert gradcheck(lambda *v: getattr(GRADIENT, name)(*v, *EXTRA.get(name, ())), values)


def test_a_masked_score_gets_neither_attention_nor_gradient():
    scores = torch.tensor([[0.3, 1.2, -torch.inf]], dtype=torch.float64, requires_grad=True)
    pattern = GRADIENT.softmax(scores)
    pattern[0, 0].backward()
    assert pattern[0, 2] == 0
    assert scores.grad[0, 2] == 0
    assert torch.isfinite(scores.grad).all()


def test_rules_are_values():
    assert Rules() == GRADIENT
    assert Rules("other") != GRADIENT
    assert len({Rules(), GRADIENT}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRADIENT.name = "changed"
