"""Adam on named parameters.

Held against: torch.optim.Adam with the gradient projected before its step and the rows renormalised after it, in float64.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.features.optimizer import Adam

BETAS, EPS = (0.8, 0.95), 1e-6


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W": (5, 3), "V": (4, 6), "b": (7,)}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    drawn["W"] /= drawn["W"].norm(dim=1, keepdim=True)
    return {name: value.requires_grad_() for name, value in drawn.items()}


def gradients(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    """A run of gradients of very different sizes."""
    return [{name: (3.0**i) * p.detach().flip(0) for name, p in parameters(seed + i, dtype).items()} for i in range(n)]


def peer(start: dict[str, torch.Tensor], grads: list[dict], lr: float, unit: set[str], late: set[str]) -> dict:
    copies = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    adam = torch.optim.Adam(copies.values(), lr=lr, betas=BETAS, eps=EPS)
    for step in grads:
        for name, p in copies.items():
            with torch.no_grad():
                if name in late:
                    p /= p.norm(dim=1, keepdim=True)
                g = step[name].clone()
                if name in unit | late:
                    g -= (g * p).sum(1, keepdim=True) * p
                p.grad = g
        adam.step()
        with torch.no_grad():
            for name in unit:
                copies[name] /= copies[name].norm(dim=1, keepdim=True)
    return copies


def run(adam: Adam, grads: list[dict], lr: float, **options) -> None:
    for step in grads:
        for name, p in adam.parameters.items():
            p.grad = step[name].clone()
        adam.step(lr, **options)


@given(st.integers(0, 999), st.integers(1, 6), st.floats(1e-5, 0.5), st.sampled_from(["none", "unit", "late"]))
@settings(deadline=None, max_examples=30)
def test_steps_are_those_of_torch(seed, n, lr, kind):
    start, grads = parameters(seed), gradients(n, seed + 1)
    unit, late = ({"W"} if kind == name else set() for name in ("unit", "late"))
    expected = peer(start, grads, lr, unit, late)
    adam = Adam(start, betas=BETAS, eps=EPS, unit=frozenset(unit), late=frozenset(late))
    run(adam, grads, lr)
    for name, p in start.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-12)
        assert p.grad is None


def test_unit_rows_stay_unit_and_late_ones_do_not():
    for kind in ("unit", "late"):
        start = parameters()
        run(Adam(start, betas=BETAS, eps=EPS, **{kind: frozenset({"W"})}), gradients(4), 0.1)
        off = (start["W"].norm(dim=1) - 1).abs().max()
        assert off < 1e-12 if kind == "unit" else off > 1e-3


def test_a_parameter_without_a_gradient_stays():
    start = parameters()
    before = start["V"].detach().clone()
    adam = Adam(start, betas=BETAS, eps=EPS)
    start["b"].grad = torch.ones(7, dtype=torch.float64)
    adam.step(0.1)
    assert torch.equal(start["V"], before)
    torch.testing.assert_close(start["b"].detach(), parameters()["b"].detach() - 0.1, rtol=0, atol=1e-6)


def test_a_copy_receives_the_new_weights():
    start = parameters(dtype=torch.float32)
    copy = torch.zeros(5, 3, dtype=torch.bfloat16)
    adam = Adam(start, betas=BETAS, eps=EPS, unit=frozenset({"W"}))
    run(adam, gradients(3, dtype=torch.float32), 0.1, copies={"W": copy})
    assert torch.equal(copy, start["W"].detach().bfloat16())


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_loaded_state_goes_on_bit_for_bit(at):
    grads = gradients(5, dtype=torch.float32)
    whole = parameters(dtype=torch.float32)
    run(Adam(whole, betas=BETAS, eps=EPS, unit=frozenset({"W"})), grads, 0.1)
    halves = parameters(dtype=torch.float32)
    first, second = (Adam(halves, betas=BETAS, eps=EPS, unit=frozenset({"W"})) for _ in range(2))
    run(first, grads[:at], 0.1)
    assert set(first.state()) == {f"{kind}.{name}" for kind in ("first", "second") for name in halves}
    second.load({name: value.clone() for name, value in first.state().items()}, at)
    run(second, grads[at:], 0.1)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
