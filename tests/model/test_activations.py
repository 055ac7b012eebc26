"""What backward rules need to know of each activation: its ratio f(x)/x and its slope between two points."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.model.activations import ACTIVATIONS

NAMES = pytest.mark.parametrize("name", ACTIVATIONS)
GATED = [name for name in ACTIVATIONS if name not in ("relu", "relu2", "tanh")]  # x times a gate between 0 and 1
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
numbers = st.floats(-30, 30, allow_subnormal=False) | st.floats(-1e-3, 1e-3, allow_subnormal=False)


def derivative(name: str, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)[0]


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@NAMES
@given(x=numbers)
@settings(max_examples=100, deadline=None)
def test_the_ratio_times_x_is_the_function(name, x):
    f, x = ACTIVATIONS[name], one(x)
    torch.testing.assert_close(f.ratio(x) * x, f(x), rtol=1e-12, atol=1e-15)


@NAMES
def test_the_ratio_at_zero_is_its_limit(name):
    zero = one(0.0)
    assert ACTIVATIONS[name].ratio(zero) == derivative(name, zero)
    expected = 0.5 if name in GATED else {"relu": 0.0, "relu2": 0.0, "tanh": 1.0}[name]
    assert ACTIVATIONS[name].ratio(zero) == expected


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])  # which has a kink there
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ratio_is_continuous_at_zero(name, sign):
    near = ACTIVATIONS[name].ratio(one(sign * 1e-12))
    torch.testing.assert_close(near, ACTIVATIONS[name].ratio(one(0.0)), rtol=1e-9, atol=1e-9)


@given(x=numbers)
@settings(max_examples=100, deadline=None)
def test_of_relu_the_ratio_is_the_gradient_and_of_its_square_half(x):
    x = one(x)
    assert torch.equal(ACTIVATIONS["relu"].ratio(x), derivative("relu", x))
    assert torch.equal(2 * ACTIVATIONS["relu2"].ratio(x), derivative("relu2", x))


@NAMES
@given(a=numbers, b=numbers)
@settings(max_examples=100, deadline=None)
def test_the_slope_times_the_difference_is_the_functions_difference(name, a, b):
    f, a, b = ACTIVATIONS[name], one(a), one(b)
    # gelu_new itself is computed to 1e-15 of x, and its values are differences here
    torch.testing.assert_close(f.slope(a, b) * (a - b), f(a) - f(b), rtol=1e-12, atol=2e-14)
    torch.testing.assert_close(f.slope(a, b), f.slope(b, a), rtol=1e-13, atol=1e-15)


@NAMES
@given(x=numbers)
@settings(max_examples=100, deadline=None)
def test_the_slope_of_a_point_with_itself_is_the_derivative(name, x):
    x = one(x)
    torch.testing.assert_close(ACTIVATIONS[name].slope(x, x), derivative(name, x), rtol=1e-11, atol=1e-14)


@NAMES
@given(x=numbers)
@settings(max_examples=50, deadline=None)
def test_the_slope_towards_zero_is_the_ratio(name, x):
    """So that against an empty source run, secant rules are LRP's: f(0) = 0 for every function here."""
    f, x = ACTIVATIONS[name], one(x)
    assert f(one(0.0)) == 0
    if x != 0:
        torch.testing.assert_close(f.slope(x, torch.zeros_like(x)), f.ratio(x), rtol=1e-12, atol=1e-14)


# where dividing by x + 1e-6, as published code does, gives 0 at 0 instead of the limit, a quarter at 1e-6, and in half
# precision NaN or infinity
DANGEROUS = torch.tensor([0.0, 1e-10, -1e-10, 5e-7, -3.0, 60.0, -60.0], dtype=torch.float64)


@NAMES
@DTYPES
def test_ratios_are_finite_and_right_in_every_precision(name, dtype):
    x, f = DANGEROUS.to(dtype), ACTIVATIONS[name]
    ratio, exact = f.ratio(x), f.ratio(x.double())
    assert ratio.dtype == dtype
    assert torch.isfinite(ratio).all()
    assert (ratio.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@NAMES
@DTYPES
def test_slopes_are_finite_in_every_precision(name, dtype):
    a, b = torch.cartesian_prod(DANGEROUS.to(dtype), DANGEROUS.to(dtype)).T
    assert torch.isfinite(ACTIVATIONS[name].slope(a, b)).all()


def test_our_own_gelu_has_the_gradients_of_torchs():
    """To 1e-15 of x: sigmoid(2u) and (1 + tanh u) / 2 round differently. Also of a tensor taken in pieces."""
    f, x = ACTIVATIONS["gelu_new"], 4 * torch.randn(70_000, generator=torch.Generator().manual_seed(0)).double()
    theirs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(theirs, approximate="tanh").sum(), theirs)
    torch.testing.assert_close(derivative("gelu_new", x), expected, rtol=1e-12, atol=1e-13)
    few = x[:20].clone().requires_grad_()
    assert torch.autograd.gradcheck(f, few)
    assert torch.autograd.gradgradcheck(f, few)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_activation_has_the_same_value_with_and_without_a_graph(name, dtype):
    x = (3 * torch.randn(500, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = x.clone()
    with_graph = ACTIVATIONS[name](x.clone().requires_grad_()).detach()
    assert torch.equal(ACTIVATIONS[name](x), with_graph)
    with torch.no_grad():
        assert torch.equal(ACTIVATIONS[name](x), with_graph)
        assert torch.equal(ACTIVATIONS[name](x.clone().requires_grad_()), with_graph)
    assert torch.equal(x, before)  # and nothing is written into what it was given
    assert with_graph.dtype == dtype
