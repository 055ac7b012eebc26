"""A step of Adam on unit rows: what torch.optim.Adam does, and what the formulas say step by step in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import adam_rows
from tests.small_pairs import refused

NAMES = ["weight", "gradient", "first", "second"]
# On Triton's side, float64 weights still get their learning rate in float32.
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-9}


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def begin(n: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Unit rows before the first step."""
    weight = F.normalize(draw(n, d, device=device, dtype=dtype, seed=1))
    return {"weight": weight, "first": torch.zeros_like(weight), "second": torch.zeros_like(weight)}


def oracle(weight, gradient, first, second, *, step, lr, betas=(0.9, 0.999), eps=1e-8, unit_rows) -> dict:
    """The formulas, row by row, in float64."""
    new = {name: [] for name in ("weight", "first", "second")}
    for w, g, m, v in zip(weight.double(), gradient.double(), first.double(), second.double(), strict=True):
        if unit_rows and w.any():
            g = g - g.dot(w) / w.dot(w) * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        if unit_rows and w.any():
            w = w / math.sqrt(w.dot(w))
        for name, x in zip(new, (w, m, v), strict=True):
            new[name].append(x)
    return {name: torch.stack(rows) if rows else weight.double() for name, rows in new.items()}


def check(n: int, d: int, backend: str, device: torch.device, dtype=torch.float32, n_steps: int = 3, **options) -> dict:
    """A few steps beside the oracle's, which go their own way; the state they end in."""
    state = begin(n, d, device, dtype)
    truth = {name: x.double() for name, x in state.items()}
    tolerance = DTYPES[dtype]
    for step in range(1, n_steps + 1):
        gradient = draw(n, d, device=device, dtype=dtype, seed=1 + step)
        truth = oracle(**truth, gradient=gradient, step=step, **options)
        adam_rows(**state, gradient=gradient, step=step, **options, backend=backend)
    for name, x in state.items():
        torch.testing.assert_close(x.double(), truth[name], rtol=tolerance, atol=tolerance)
    return state


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("d", [1, 20, 64, 768, 2100])
def test_sizes(d, unit_rows, backend, device):
    check(3, d, backend, device, lr=1e-2, unit_rows=unit_rows)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, unit_rows, backend, device):
    check(4, 12, backend, device, dtype, lr=3e-3, betas=(0.8, 0.99), eps=1e-4, unit_rows=unit_rows)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=["no_rows", "no_columns"])
def test_nothing_to_do(shape, backend, device):
    check(*shape, backend, device, lr=1e-2, unit_rows=False)


def test_five_steps_are_those_of_torchs_adam(backend, device):
    state = begin(6, 40, device)
    parameter = torch.nn.Parameter(state["weight"].clone())
    optimizer = torch.optim.Adam([parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-7)
    for step in range(1, 6):
        gradient = draw(6, 40, device=device, seed=1 + step)
        parameter.grad = gradient.clone()
        optimizer.step()
        options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7}
        adam_rows(**state, gradient=gradient, step=step, **options, unit_rows=False, backend=backend)
    moments = optimizer.state[parameter]
    for found, truth in zip(state.values(), (parameter, moments["exp_avg"], moments["exp_avg_sq"]), strict=True):
        torch.testing.assert_close(found, truth.detach(), rtol=1e-6, atol=1e-7)


def test_rows_are_unit_after_every_step(backend, device):
    state = begin(5, 33, device)
    for step in range(1, 6):
        before = state["weight"].clone()
        gradient = draw(5, 33, device=device, seed=step)
        adam_rows(**state, gradient=gradient, step=step, lr=0.1, unit_rows=True, backend=backend)
        torch.testing.assert_close(state["weight"].norm(dim=1), torch.ones(5, device=device))
        assert (state["weight"] - before).abs().max() > 1e-3


def test_a_gradient_along_the_row_moves_nothing(backend, device):
    """On the axes, where nothing is rounded: what is left of the gradient is zero to the bit."""
    state = {name: torch.zeros(4, 4, device=device) for name in ("weight", "first", "second")}
    state["weight"] += torch.eye(4, device=device)
    adam_rows(**state, gradient=3 * state["weight"], step=1, lr=0.1, unit_rows=True, backend=backend)
    assert torch.equal(state["weight"], torch.eye(4, device=device))
    assert not state["first"].any()
    assert not state["second"].any()


def test_the_length_of_a_row_does_not_matter_to_what_is_projected(backend, device):
    one, two = begin(3, 16, device), begin(3, 16, device)
    two["weight"] *= 2
    for state in (one, two):
        gradient = draw(3, 16, device=device, seed=2)
        adam_rows(**state, gradient=gradient, step=1, lr=0.0, unit_rows=True, backend=backend)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_zero_row_is_never_nan(unit_rows, backend, device):
    """Zero rows stay zero without a gradient, and become unit with one; a step onto zero stays there."""
    weight = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0]], device=device)
    gradient = torch.tensor([[0.0, 0, 0], [0, 2, 0], [0, 0, 0]], device=device)
    state = {"first": torch.zeros_like(weight), "second": torch.zeros_like(weight)}
    adam_rows(weight, gradient, **state, step=1, lr=0.5, unit_rows=unit_rows, backend=backend)
    truth = torch.tensor([[0.0, 0, 0], [0, -1 if unit_rows else -0.5, 0], [1, 0, 0]], device=device)
    torch.testing.assert_close(weight, truth)
    assert not state["first"].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_the_copy_is_the_new_weight(unit_rows, dtype, backend, device):
    state = begin(5, 24, device)
    copy = torch.full((5, 24), torch.nan, dtype=dtype, device=device)
    gradient = draw(5, 24, device=device, seed=2)
    adam_rows(**state, gradient=gradient, step=1, lr=1e-2, unit_rows=unit_rows, copy=copy, backend=backend)
    # To the bit on a GPU and in torch; Triton's interpreter rounds to bfloat16 its own way.
    exact = backend == "torch" or torch.cuda.is_available()
    tolerance = 0.0 if exact else torch.finfo(dtype).eps
    torch.testing.assert_close(copy, state["weight"].to(dtype), rtol=tolerance, atol=0.0)


def test_blocks_of_rows_do_not_show(device):
    """The torch path takes four of these rows at a time, and then three."""
    check(7, 2**16, "torch", device, n_steps=1, lr=1e-2, unit_rows=True)
    state, copy = begin(7, 2**16, device), torch.zeros(7, 2**16, dtype=torch.bfloat16, device=device)
    gradient = draw(7, 2**16, device=device, seed=2)
    adam_rows(**state, gradient=gradient, step=1, lr=1e-2, unit_rows=True, copy=copy, backend="torch")
    assert torch.equal(copy, state["weight"].bfloat16())


def test_a_parameter_may_be_the_weight(backend, device):
    state = begin(3, 8, device)
    parameter = torch.nn.Parameter(state.pop("weight"))
    before = parameter.detach().clone()
    adam_rows(parameter, draw(3, 8, device=device), **state, step=1, lr=0.1, unit_rows=True, backend=backend)
    assert not torch.equal(parameter, before)
    assert parameter.is_leaf


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 4), st.integers(2, 40), st.booleans(), st.integers(1, 1000), st.floats(1e-5, 0.5))
def test_any_step(n, d, unit_rows, step, lr):
    """From moments on their way, on both backends."""
    device = torch.device("cpu")
    drawn = {name: draw(n, d, device=device, dtype=torch.float64, seed=i) for i, name in enumerate(NAMES)}
    drawn["second"] = drawn["second"].square() + 0.1
    truth = oracle(**drawn, step=step, lr=lr, unit_rows=unit_rows)
    for backend in ("torch", "triton"):
        if backend == "triton":
            pytest.importorskip("triton")
            if torch.cuda.is_available():
                continue  # tensors are on the CPU here, which only the interpreter reads
        state = {name: x.clone() for name, x in drawn.items()}
        adam_rows(**state, step=step, lr=lr, unit_rows=unit_rows, backend=backend)
        for name, x in truth.items():
            torch.testing.assert_close(state[name], x, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused(device):
    given = {**begin(4, 8, device), "gradient": draw(4, 8, device=device), "step": 1, "lr": 0.1, "unit_rows": True}
    wide = torch.zeros(4, 16, device=device)
    for name, wrong, says in (
        ("step", 0, "step counts from 1, and is 0"),
        ("weight", given["weight"].bfloat16(), r"weight must be float32 or float64 \[row, d\], not torch.bfloat16"),
        ("gradient", given["gradient"][:3], r"gradient must have the weight's shape \[4, 8\], not \[3, 8\]"),
        ("first", given["first"].double(), "first must be torch.float32 as the weight is, not torch.float64"),
        ("second", wide[:, ::2], "second must be contiguous"),
        ("copy", wide, r"copy must have the weight's shape \[4, 8\], not \[4, 16\]"),
        ("copy", given["weight"].to("meta"), "but copy on meta"),
    ):
        with refused(ValueError, says):
            adam_rows(**{**given, name: wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("unit_rows", [False, True])
def test_on_a_gpu_at_the_size_of_gpt2(unit_rows, gpu):
    size = 24_576, 768
    states = [{**begin(*size, gpu), "gradient": draw(*size, device=gpu, seed=2)} for _ in range(2)]
    for state, backend in zip(states, ("triton", "torch"), strict=True):
        adam_rows(**state, step=3, lr=1e-3, unit_rows=unit_rows, backend=backend)
    for name in ("weight", "first", "second"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)
