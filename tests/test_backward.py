"""Backward steps of our own: the forward is the plain operation bit for bit, the backward carries a difference exactly."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import backward
from interp.blocks import BLOCK
from interp.model import ops
from interp.model.activations import ACTIVATIONS

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["float64", "float32", "bfloat16", "float16"],
)
seeds = st.integers(0, 10_000)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scale(x: torch.Tensor) -> torch.Tensor:
    return ops.norm_scale(x, 1e-5)


def secant_norm(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return backward.secant_norm(x, scale(x), other, scale(other))


def sent_back(function: Callable, g: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """What flows into each value if g arrives at the output."""
    values = [value.detach().requires_grad_() for value in values]
    return list(torch.autograd.grad(function(*values), values, g))


# name: (operation with the other run's values behind, the plain operation, shapes of its inputs)
TWO_RUNS = {
    "norm": (secant_norm, lambda x: x / scale(x), [(3, 8)]),
    "activation": (
        lambda x, other: backward.elementwise(x, ACTIVATIONS["silu"], ACTIVATIONS["silu"].slope, other),
        ACTIVATIONS["silu"],
        [(3, 8)],
    ),
    "product": (backward.secant_product, torch.mul, [(3, 8), (3, 8)]),
    # as grouped queries and keys: [batch, group, query head of the group, query, d_head] @ [batch, group, 1, d_head, key]
    "scores": (backward.secant_matmul, torch.matmul, [(2, 3, 2, 5, 4), (2, 3, 1, 4, 6)]),
    "mix": (backward.secant_matmul, torch.matmul, [(2, 3, 2, 5, 6), (2, 3, 1, 6, 4)]),
    "softmax": (backward.secant_softmax, lambda x: x.softmax(-1), [(2, 4, 6)]),
}
OPERATIONS = pytest.mark.parametrize("name", TWO_RUNS)


def two_runs(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, sizes: tuple[float, float] = (1.0, 1.0)):
    """(values of a run, values of another) for one of the operations."""
    shapes = TWO_RUNS[name][2]
    return tuple(
        [size * draw(*shape, seed=seed + 10 * i + j, dtype=dtype) for j, shape in enumerate(shapes)]
        for i, size in enumerate(sizes)
    )


def multipliers(name: str, g: torch.Tensor, values: list, others: list) -> list[torch.Tensor]:
    return sent_back(lambda *v: TWO_RUNS[name][0](*v, *others), g, *values)


# --------------------------------------------------------------------------------------------- all that compare two runs


@DTYPES
@OPERATIONS
def test_the_forward_is_the_plain_operation_and_gradients_keep_their_dtype(name, dtype):
    values, others = two_runs(name, dtype=dtype)
    operation, plain, _ = TWO_RUNS[name]
    with torch.no_grad():
        expected = plain(*values)
        assert torch.equal(operation(*values, *others), expected)
    with_graph = operation(*[value.clone().requires_grad_() for value in values], *others)
    assert torch.equal(with_graph, expected)
    assert with_graph.dtype == expected.dtype == dtype
    for value, found in zip(values, multipliers(name, torch.ones_like(expected), values, others), strict=True):
        assert found.dtype == dtype
        assert found.shape == value.shape
        assert torch.isfinite(found).all()


@OPERATIONS
@given(seed=seeds, sizes=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)))
@settings(max_examples=30, deadline=None)
def test_multipliers_times_differences_are_the_outputs_difference(name, seed, sizes):
    values, others = two_runs(name, seed, sizes=sizes)
    plain = TWO_RUNS[name][1]
    here, there = plain(*values), plain(*others)
    g = draw(*here.shape, seed=seed + 99)
    terms = [m * (v - o) for m, v, o in zip(multipliers(name, g, values, others), values, others, strict=True)]
    total = g.abs() * (here.abs() + there.abs())  # what rounding is relative to
    assert abs(sum(t.sum() for t in terms) - (g * (here - there)).sum()) <= 1e-13 * total.sum()


@OPERATIONS
def test_every_single_output_is_carried_exactly(name):
    """The same, one output at a time: J dx == dy, not only its sum with one g."""
    values, others = two_runs(name)
    plain = TWO_RUNS[name][1]
    change = plain(*values) - plain(*others)
    for index in torch.randint(change.numel(), (12,), generator=torch.Generator().manual_seed(0)).tolist():
        g = torch.zeros(change.numel(), dtype=change.dtype)
        g[index] = 1
        found = multipliers(name, g.reshape(change.shape), values, others)
        carried = sum((m * (v - o)).sum() for m, v, o in zip(found, values, others, strict=True))
        torch.testing.assert_close(carried, change.flatten()[index], rtol=1e-12, atol=1e-14)


@OPERATIONS
def test_the_two_runs_may_change_places(name):
    values, others = two_runs(name, sizes=(1.0, 3.0))
    g = draw(*TWO_RUNS[name][1](*values).shape, seed=5)
    for here, there in zip(multipliers(name, g, values, others), multipliers(name, g, others, values), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-14)


@OPERATIONS
@pytest.mark.parametrize(("step", "tolerance"), [(0.0, 1e-13), (1e-9, 1e-7)], ids=["equal", "nearly equal"])
def test_between_runs_that_hardly_differ_it_is_the_gradient(name, step, tolerance):
    values, directions = two_runs(name)
    others = [v + step * d for v, d in zip(values, directions, strict=True)]
    g = draw(*TWO_RUNS[name][1](*values).shape, seed=5)
    expected = sent_back(TWO_RUNS[name][1], g, *values)
    for found, gradient in zip(multipliers(name, g, values, others), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["product", "scores"])
def test_only_what_asks_for_a_gradient_gets_one(name):
    (a, b), others = two_runs(name)
    g = draw(*TWO_RUNS[name][1](a, b).shape)
    both = multipliers(name, g, [a, b], others)
    assert torch.equal(sent_back(lambda a: TWO_RUNS[name][0](a, b, *others), g, a)[0], both[0])
    assert torch.equal(sent_back(lambda b: TWO_RUNS[name][0](a, b, *others), g, b)[0], both[1])


# ------------------------------------------------------------------------------------------------------------- formulas


def test_a_product_gives_each_factor_the_others_midpoint():
    (a, b), (a2, b2) = two_runs("product")
    g = draw(3, 8, seed=5)
    to_a, to_b = multipliers("product", g, [a, b], [a2, b2])
    torch.testing.assert_close(to_a, g * (b + b2) / 2)
    torch.testing.assert_close(to_b, g * (a + a2) / 2)


def test_shared_keys_collect_from_all_their_query_heads():
    (q, k), (q2, k2) = two_runs("scores")
    g = draw(2, 3, 2, 5, 6, seed=5)
    to_q, to_k = multipliers("scores", g, [q, k], [q2, k2])
    torch.testing.assert_close(to_q, torch.einsum("bgrqk,bgek->bgrqe", g, (k + k2)[:, :, 0] / 2))
    torch.testing.assert_close(to_k, torch.einsum("bgrqk,bgrqe->bgek", g, (q + q2) / 2)[:, :, None])


def test_an_elementwise_rule_multiplies_by_its_slope():
    x, other, g = draw(5, seed=1), draw(5, seed=2), draw(5, seed=3)
    silu = ACTIVATIONS["silu"]
    (ratio,) = sent_back(lambda x: backward.elementwise(x, silu, silu.ratio), g, x)
    torch.testing.assert_close(ratio, g * x.sigmoid())
    (secant,) = sent_back(lambda x: backward.elementwise(x, silu, silu.slope, other), g, x)
    torch.testing.assert_close(secant, g * (silu(x) - silu(other)) / (x - other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_large_tensors_in_pieces_and_other_layouts_are_the_same(dtype):
    silu, n = ACTIVATIONS["silu"], BLOCK // 40 + 7  # more than one piece, and no whole number of them
    x, other, g = (draw(n, 50, seed=i, dtype=dtype) for i in range(3))

    def rule(x):
        return backward.elementwise(x, silu, silu.slope, other)

    (whole,) = sent_back(rule, g, x)
    rows = [
        sent_back(lambda x, o=o: backward.elementwise(x, silu, silu.slope, o), b, a)[0]
        for a, o, b in zip(x.split(500), other.split(500), g.split(500), strict=True)
    ]
    assert torch.equal(whole, torch.cat(rows))
    (transposed,) = sent_back(lambda x: rule(x.T), g, x.T.contiguous())
    assert torch.equal(transposed.T, whole)
    (expanded,) = sent_back(rule, g[:1, :1].expand(n, 50), x)
    assert torch.equal(expanded, sent_back(rule, g[:1, :1].expand(n, 50).contiguous(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_formed_in_float32_where_half_precision_has_no_numbers(name, dtype):
    x = torch.tensor([0.0, 1e-10, -1e-10, 5e-7, -3.0, 60.0, -60.0], dtype=torch.float64).to(dtype)
    x, other = torch.cartesian_prod(x, x).T
    f, g = ACTIVATIONS[name], torch.ones_like(x)
    for rule, slope, others in (("relp", f.ratio, ()), ("secant", f.slope, (other,))):
        (found,) = sent_back(lambda x, s=slope, o=others: backward.elementwise(x, f, s, *o), g, x)
        exact = slope(x.double(), *(o.double() for o in others))
        assert found.dtype == dtype, rule
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- norms


def test_a_norms_multipliers_are_its_formula():
    x, other, g = draw(3, 8, seed=1), 4 * draw(3, 8, seed=2), draw(3, 8, seed=3)
    s, t = scale(x), scale(other)
    along = (g * (x / s + other / t) / 2).sum(-1, keepdim=True) / 8  # mean over channels of g times y's midpoint
    expected = (g - (x + other) / 2 * along / ((s + t) / 2)) / ((s + t) / 2)
    torch.testing.assert_close(sent_back(lambda x: secant_norm(x, other), g, x)[0], expected)


def test_nothing_flows_into_the_scale_beside_the_input():
    x, other = draw(3, 8).requires_grad_(), draw(3, 8, seed=1)
    s = scale(x)
    s.retain_grad()
    backward.secant_norm(x, s, other, scale(other)).sum().backward()
    assert s.grad is None


@given(seed=seeds, exponent=st.floats(-6, 6))
@settings(max_examples=60, deadline=None)
def test_a_norms_multipliers_are_bounded_however_much_the_runs_differ(seed, exponent):
    """Splitting x / scale into x times 1 / scale is as exact, but its two terms then are a million times the result."""
    x, other, g = draw(4, 8, seed=seed), 10**exponent * draw(4, 8, seed=seed + 1), draw(4, 8, seed=seed + 2)
    (m,) = sent_back(lambda x: secant_norm(x, other), g, x)
    middle = (scale(x) + scale(other))[:, 0] / 2
    assert (m.norm(dim=-1) <= 2 * g.norm(dim=-1) / middle * (1 + 1e-9)).all()
    change = x / scale(x) - other / scale(other)
    torch.testing.assert_close((m * (x - other)).sum(-1), (g * change).sum(-1), rtol=1e-9, atol=1e-9)


def test_in_float32_a_norm_of_very_different_runs_keeps_its_digits():
    x, other, g = draw(4, 8, seed=0), 1e6 * draw(4, 8, seed=1), draw(4, 8, seed=2)
    (wide,) = sent_back(lambda x: secant_norm(x, other), g, x)
    (narrow,) = sent_back(lambda x: secant_norm(x, other.float()), g.float(), x.float())
    assert (narrow - wide).norm() < 1e-5 * wide.norm()


# -------------------------------------------------------------------------------------------------------------- softmax


def causal(*shape: int, seed: int, window: int | None = None) -> torch.Tensor:
    """Scores [..., query, key] with forbidden keys: in the first row all but one."""
    index = torch.arange(shape[-1])
    return (3 * draw(*shape, seed=seed)).masked_fill(ops.causal_mask(index, index, window), -torch.inf)


def softmax_multipliers(x: torch.Tensor, other: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return sent_back(lambda x: backward.secant_softmax(x, other), g, x)[0]


def test_softmax_multipliers_are_its_jacobian_with_the_logarithmic_mean_of_both_patterns():
    x, other, g = draw(4, 6, seed=0), 3 * draw(4, 6, seed=1), draw(4, 6, seed=2)
    p, q = x.softmax(-1), other.softmax(-1)
    mean = (p - q) / (p.log() - q.log())
    expected = mean * (g - (mean * g).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True))
    torch.testing.assert_close(softmax_multipliers(x, other, g), expected)


@pytest.mark.parametrize("window", [None, 2])
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_masked_scores_get_nothing_and_the_others_carry_the_patterns_difference(window, seed):
    x, other = causal(2, 6, 6, seed=seed, window=window), causal(2, 6, 6, seed=seed + 1, window=window)
    g = draw(2, 6, 6, seed=seed + 2)
    m = softmax_multipliers(x, other, g)
    allowed = x.isfinite()
    assert (m[~allowed] == 0).all()
    assert (m[:, 0] == 0).all()  # one key only: its share is 1 in both runs
    assert (m.sum(-1).abs() <= 1e-13 * g.abs().max()).all()  # a constant added to a row changes no pattern
    carried = (m * (x - other).masked_fill(~allowed, 0)).sum(-1)
    change = x.softmax(-1) - other.softmax(-1)
    torch.testing.assert_close(carried, (g * change).sum(-1), rtol=1e-11, atol=1e-13)


@given(seed=seeds, shift=st.floats(-1000, 1000))
@settings(max_examples=40, deadline=None)
def test_a_constant_added_to_one_runs_row_changes_no_multiplier(seed, shift):
    x, other, g = causal(6, 6, seed=seed), causal(6, 6, seed=seed + 1), draw(6, 6, seed=seed + 2)
    torch.testing.assert_close(
        softmax_multipliers(x, other + shift, g), softmax_multipliers(x, other, g), rtol=1e-9, atol=1e-11
    )


@DTYPES
@given(seed=seeds, size=st.floats(0.1, 100))
@settings(max_examples=25, deadline=None)
def test_softmax_multipliers_are_bounded_by_both_patterns(dtype, seed, size):
    x, other = (size * draw(4, 6, seed=seed + i, dtype=dtype) for i in range(2))
    g = draw(4, 6, seed=seed + 2, dtype=dtype)
    m = softmax_multipliers(x, other, g)
    mean = (x.double().softmax(-1) + other.double().softmax(-1)) / 2
    rounding = 20 * torch.finfo(dtype).eps * (1 + size)
    assert (m.double().abs() <= 2 * g.abs().max() * (mean * (1 + rounding) + rounding)).all()


def test_patterns_that_attend_to_different_keys_alone_have_multipliers():
    """Where both softmaxes are saturated the gradient is 0 in either run and sees nothing between them."""
    x, other = torch.tensor([[80.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 80.0, -torch.inf]])
    g = torch.tensor([[1.0, 0.0, 0.0]])
    m = softmax_multipliers(x, other, g)
    torch.testing.assert_close(m, torch.tensor([[1 / 160, -1 / 160, 0.0]]))
    assert sent_back(lambda x: x.softmax(-1), g, x)[0].abs().max() < 1e-30


# -------------------------------------------------------------------------------------------------- one run: half, warm


@DTYPES
def test_half_is_exactly_half(dtype):
    x, g = draw(50, dtype=dtype), draw(50, seed=1, dtype=dtype)
    assert torch.equal(backward.half(x.requires_grad_()), x)
    (found,) = sent_back(backward.half, g, x)
    assert found.dtype == dtype
    assert torch.equal(2 * found, g)
    (twice,) = sent_back(lambda x: backward.half(backward.half(x)), g, x)
    assert torch.equal(4 * twice, g)


@DTYPES
def test_a_warm_softmax_is_a_softmax(dtype):
    x = causal(5, 5, seed=0).to(dtype)
    assert torch.equal(backward.warm_softmax(x.clone().requires_grad_(), 2.0), x.softmax(-1))
    (found,) = sent_back(lambda x: backward.warm_softmax(x, 2.0), draw(5, 5, seed=1, dtype=dtype), x)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()


def test_at_temperature_one_it_is_autograd():
    x, g = causal(5, 5, seed=0), draw(5, 5, seed=1)
    expected = sent_back(lambda x: x.softmax(-1), g, x)[0]
    torch.testing.assert_close(sent_back(lambda x: backward.warm_softmax(x, 1.0), g, x)[0], expected)


@given(seed=seeds, temperature=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_a_warm_softmax_goes_back_through_a_warmer_pattern_without_a_factor(seed, temperature):
    x, g = causal(5, 5, seed=seed), draw(5, 5, seed=seed + 1)
    expected = temperature * sent_back(lambda x: (x / temperature).softmax(-1), g, x)[0]
    found = sent_back(lambda x: backward.warm_softmax(x, temperature), g, x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
