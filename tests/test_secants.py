"""Slopes between two points against the quotient itself, formed with a hundred digits from the very numbers torch was given."""

import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from interp import secants
from interp.model.activations import ACTIVATIONS

mp = mpmath.mp.clone()  # a context of its own: nobody else's precision changes
mp.dps = 100
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def positive_part(x):
    return max(x, mp.mpf(0))


# function, derivative, and how many units of rounding its slope may be off, relative to itself
ELEMENTWISE = {
    "exp": (mp.exp, mp.exp, 3),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x), 4),
    "tanh": (mp.tanh, lambda x: mp.sech(x) ** 2, 4),
    "normal_cdf": (mp.ncdf, mp.npdf, None),  # relative to the density's largest value: torch's ndtr has no small values
    "relu": (positive_part, lambda x: mp.mpf(x > 0), 2),
    "relu_squared": (lambda x: positive_part(x) ** 2, lambda x: 2 * positive_part(x), 3),
}
NO_OVERFLOW = [name for name in ELEMENTWISE if name != "exp"]


def exact_slope(name: str, a: float, b: float) -> mp.mpf:
    function, derivative, _ = ELEMENTWISE[name]
    a, b = mp.mpf(a), mp.mpf(b)
    return derivative(a) if a == b else (function(a) - function(b)) / (a - b)


def slope(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return getattr(secants, f"{name}_slope")(a, b)


# numbers of every size, at distances of every size
numbers = (
    st.floats(-30, 30)
    | st.floats(-1, 1)
    | st.builds(lambda s, e: s * 10.0**e, st.sampled_from([1, -1]), st.floats(-12, 0))
)
distances = st.just(0.0) | st.builds(lambda s, e: s * 10.0**e, st.sampled_from([1, -1]), st.floats(-12, math.log10(30)))


def two_points(a: float, distance: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(a, dtype=dtype), torch.tensor(a + distance, dtype=dtype)


def test_every_slope_is_checked_here():
    public = {name for name, value in vars(secants).items() if callable(value) and name[0].islower()}
    others = {"decay", "probability_mean", "product_slope", "swish_slope"}
    assert public == {f"{name}_slope" for name in ELEMENTWISE} | others


@DTYPES
@pytest.mark.parametrize("name", ELEMENTWISE)
@given(a=numbers, distance=distances)
@example(a=0.0, distance=0.0)
@example(a=0.0, distance=-1.0)
@example(a=-0.05, distance=0.1)  # where the normal density's series ends
@example(a=3.0, distance=0.0999)
@settings(max_examples=150, deadline=None)
def test_a_slope_is_the_exact_quotient(name, dtype, a, distance):
    a, b = two_points(a, distance, dtype)
    found, exact = slope(name, a, b), exact_slope(name, a.item(), b.item())
    info, units = torch.finfo(dtype), ELEMENTWISE[name][2]
    assert found.dtype == dtype
    allowed = 24 * info.eps if units is None else units * info.eps * abs(exact) + info.tiny
    assert abs(found.item() - exact) <= allowed


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(a=numbers, distance=distances)
@settings(max_examples=50, deadline=None)
def test_a_slope_does_not_know_which_point_came_first(name, a, distance):
    a, b = two_points(a, distance, torch.float64)
    assert torch.equal(slope(name, a, b), slope(name, b, a))


@DTYPES
@pytest.mark.parametrize("name", NO_OVERFLOW)
def test_slopes_of_huge_numbers_are_finite_and_right(name, dtype):
    points = torch.tensor([-1e4, -1e3, -90.0, 0.0, 90.0, 1e3, 1e4], dtype=dtype)
    a, b = torch.cartesian_prod(points, points).T
    found = slope(name, a, b)
    exact = [exact_slope(name, x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor([float(e) for e in exact], dtype=dtype))


def test_the_slope_of_exp_is_finite_as_long_as_exp_is():
    a, b = torch.tensor([88.0, 88.0, -1e4]), torch.tensor([-1e4, 88.0, -1e4])
    assert torch.isfinite(secants.exp_slope(a, b)).all()


@DTYPES
@given(exponent=st.floats(-12, 3))
@settings(max_examples=100, deadline=None)
def test_decay_is_the_mean_of_exp(dtype, exponent):
    d = torch.tensor(10.0**exponent, dtype=dtype)
    exact = -mp.expm1(-mp.mpf(d.item())) / mp.mpf(d.item())
    assert abs(secants.decay(d).item() - exact) <= 2 * torch.finfo(dtype).eps * exact
    assert secants.decay(torch.zeros((), dtype=dtype)) == 1


@given(a=numbers, distance=distances)
@settings(max_examples=100, deadline=None)
def test_a_product_with_the_point_itself_follows_from_the_factors_slope(a, distance):
    """x tanh(x), as an example: x_mid slope + tanh_mid is exact."""
    a, b = two_points(a, distance, torch.float64)
    found = secants.product_slope(secants.tanh_slope(a, b), a.tanh(), b.tanh(), a, b)
    x, y = mp.mpf(a.item()), mp.mpf(b.item())
    exact = mp.tanh(x) + x * mp.sech(x) ** 2 if x == y else (x * mp.tanh(x) - y * mp.tanh(y)) / (x - y)
    assert found.item() == pytest.approx(float(exact), rel=1e-14, abs=1e-14)
    torch.testing.assert_close(found, secants.product_slope(secants.tanh_slope(b, a), b.tanh(), a.tanh(), b, a))


@DTYPES
@given(a=numbers, distance=distances)
@example(a=17.0, distance=0.0)
@settings(max_examples=150, deadline=None)
def test_the_slope_of_x_sigmoid_of_h_is_the_exact_quotient(dtype, a, distance):
    """With h(x) = 3x. Of sigmoids near 1 the distance to 1 has few digits, and at most x of those errors count."""
    a, b = two_points(a, distance, dtype)
    found = secants.swish_slope(a, b, 3 * a, 3 * b, 3.0)
    x, y = mp.mpf(a.item()), mp.mpf(b.item())
    if x == y:
        exact = sigmoid(3 * x) * (1 + 3 * x * sigmoid(-3 * x))
    else:
        exact = (x * sigmoid(3 * x) - y * sigmoid(3 * y)) / (x - y)
    assert abs(found.item() - exact) <= 24 * torch.finfo(dtype).eps
    eps = torch.finfo(dtype).eps  # the values are added in another order
    torch.testing.assert_close(found, secants.swish_slope(b, a, 3 * b, 3 * a, 3.0), rtol=2 * eps, atol=2 * eps)


# what float32 owes: the plain quotient is off by up to 1.9 on the same numbers
@pytest.mark.parametrize(
    ("name", "budget"),
    [("silu", 1e-6), ("gelu", 2e-6), ("gelu_new", 3e-6), ("quick_gelu", 1.5e-6), ("tanh", 5e-7)],
)
def test_float32_slopes_keep_their_digits_where_the_plain_quotient_loses_them(name, budget):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(20_000, generator=generator)
    difference = (
        10 ** (torch.rand(20_000, generator=generator) * 8.7 - 8) * torch.randn(20_000, generator=generator).sign()
    )
    other, activation = z + difference, ACTIVATIONS[name]
    wide = activation.slope(z.double(), other.double())
    assert (activation.slope(z, other) - wide).abs().max() < budget
    apart = z != other
    quotient = (activation(z) - activation(other))[apart] / (z - other)[apart]
    assert (quotient - wide[apart]).abs().max() > 0.1
