"""The steps of sparse semi-NMF: least squares on a support, coordinate descent, the published multiplicative step.

Held against: the formulas in loops, numpy's least squares neuron by neuron, scipy's NNLS token by token, dense products, and what
cannot happen: a loss that rises, a weight below 0.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls
from torch import Tensor

from interp.errors import OptionError
from interp.factorize import semi_nmf as steps
from interp.factorize.semi_nmf import Support
from tests.small_pairs import refused

DOUBLE = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
# seed, neurons, tokens, features
SHAPES = st.tuples(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(1, 6))


def problem(seed: int, d: int, n: int, k: int, *, zeros: float = 0.3, dtype=DOUBLE) -> tuple[Tensor, Tensor]:
    """A [neuron, token] and weights G [feature, token] with rows of length 1 (or 0), a share of them 0."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(d, n, generator=generator, dtype=DOUBLE)
    G = torch.rand(k, n, generator=generator, dtype=DOUBLE)
    G = torch.nn.functional.normalize(G * (torch.rand(k, n, generator=generator) >= zeros), dim=1)
    return A.to(dtype), G.to(dtype)


def random_support(seed: int, d: int, k: int, m: int) -> Support:
    generator = torch.Generator().manual_seed(seed)
    return Support(torch.stack([torch.randperm(d, generator=generator)[:m].sort().values for _ in range(k)]), d)


def of(A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """P^T and Q of dense components F^T [feature, neuron]."""
    return F @ A, F @ F.T


def error(A: Tensor, F: Tensor, G: Tensor) -> float:
    """|A - F G^T|^2, by what is left of A."""
    return float((A.double() - F.double().T @ G.double()).square().sum())


# ---------------------------------------------------------------------------------------------------------- supports


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 9), st.data())
def test_every_entry_is_in_one_system_with_the_others_of_its_neuron(seed, d, k, data):
    m = data.draw(st.integers(1, d))
    support = random_support(seed, d, k, m)
    seen = []
    for entry, there in support.systems:
        assert entry.shape == there.shape
        for row, is_there in zip(entry, there, strict=True):
            mine = row[is_there]
            neuron = support.neurons.flatten()[mine].unique()
            assert len(neuron) == 1
            assert len(mine) == (support.neurons == neuron).sum()
            seen += mine.tolist()
    assert sorted(seen) == list(range(k * m))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_the_strongest_are_as_many_as_asked_for_and_ties_go_to_the_lowest(rows, m):
    support = steps.strongest(torch.tensor(rows, dtype=DOUBLE), m)
    for row, found in zip(rows, support.neurons.tolist(), strict=True):
        assert found == sorted(sorted(range(7), key=lambda i: (-abs(row[i]), i))[:m])


def test_a_feature_of_zeros_has_the_first_neurons():
    support = steps.strongest(torch.zeros(2, 9), 3)
    assert support.neurons.tolist() == [[0, 1, 2]] * 2


def test_dense_by_hand():
    support = Support(torch.tensor([[0, 3], [1, 3]]), 5)
    values = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert support.dense(values).tolist() == [[1, 0, 0, -2, 0], [0, 3, 0, 4, 0]]
    assert support.offsets.tolist() == [0, 2, 4]


# ---------------------------------------------------------------------------------------------------------- products


@DTYPES
@pytest.mark.parametrize("m", [1, 5, 12, 13, 96])
def test_sparse_products_are_the_dense_ones(m, dtype):
    A, G = problem(0, 96, 50, 7, dtype=dtype)
    support = random_support(1, 96, 7, m)
    assert support.sparse == (m < 12)
    values = torch.randn(7, m, generator=torch.Generator().manual_seed(2), dtype=DOUBLE).to(dtype)
    F = torch.zeros(7, 96, dtype=dtype)
    for row, neurons, value in zip(F, support.neurons, values, strict=True):
        row[neurons] = value
    torch.testing.assert_close(steps.project(A, support, values), F @ A)
    torch.testing.assert_close(steps.correlate(A, G, support), (G @ A.T).gather(1, support.neurons))
    torch.testing.assert_close(support.dense(values), F)
    torch.testing.assert_close(steps.gram(G), G @ G.T)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([1.0, 3e-5, 7e4]))
def test_the_loss_is_what_is_left(shape, scale):
    seed, d, n, k = shape
    A, G = problem(seed, d, n, k)
    F = scale * torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    A = scale * A
    found = steps.loss(float(A.square().sum()), *of(A, F), G, G @ G.T)
    assert found == pytest.approx(error(A, F, G), rel=1e-12, abs=1e-12 * float(A.square().sum()))


@DTYPES
def test_the_loss_of_an_exact_factorisation_is_not_negative(dtype):
    for seed in range(20):
        _, G = problem(seed, 9, 30, 4, dtype=dtype)
        F = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
        A = F.T @ G
        norm2 = float(A.square().sum(dtype=DOUBLE))
        assert 0 <= steps.loss(norm2, *of(A, F), G, G @ G.T) <= 1e-5 * norm2


# -------------------------------------------------------------------------------------------------------- F, given G


def refitted(A: Tensor, G: Tensor, support: Support) -> Tensor:
    return steps.refit((G @ A.T).gather(1, support.neurons), steps.gram(G), support)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 7), st.data())
def test_refit_is_least_squares_neuron_by_neuron(seed, d, k, data):
    support = random_support(seed, d, k, data.draw(st.integers(1, d)))
    A, G = problem(seed, d, 40, k)
    expected = np.zeros((k, d))
    for i in range(d):
        features = (support.neurons == i).any(1).nonzero()[:, 0].tolist()
        if features:
            expected[features, i] = np.linalg.lstsq(G[features].T.numpy(), A[i].numpy(), rcond=None)[0]
    torch.testing.assert_close(support.dense(refitted(A, G, support)), torch.tensor(expected), rtol=1e-6, atol=1e-8)


def test_a_neuron_of_every_feature_and_one_of_none():
    """Neuron 0 is shared by five features, a system rounded up to eight; neuron 5 by one; neuron 6 by none."""
    support = Support(torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]), 7)
    A, G = problem(3, 7, 30, 5)
    assert [entry.shape[1] for entry, _ in support.systems] == [1, 5]
    found = support.dense(refitted(A, G, support))
    alone = (G @ A.T) / G.square().sum(1, keepdim=True)
    torch.testing.assert_close(found[:, 0], torch.linalg.lstsq(G.T, A[0]).solution, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[4, 5], alone[4, 5], rtol=1e-8, atol=0)
    assert found[:, 6].count_nonzero() == 0


@DTYPES
def test_with_every_neuron_in_the_support_it_is_the_unrestricted_one(dtype):
    A, G = problem(4, 8, 40, 5, dtype=dtype)
    support = random_support(0, 8, 5, 8)
    found = refitted(A, G, support)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(found, steps.unrestricted(A, G, G @ G.T), **tolerance)
    torch.testing.assert_close(found, torch.linalg.lstsq(G.T, A.T).solution, **tolerance)


@DTYPES
def test_features_alike_share_what_one_would_have_and_a_dead_one_has_nothing(dtype):
    A, G = problem(5, 6, 40, 2, dtype=dtype)
    G = torch.cat([G, G[:1], torch.zeros_like(G[:1])])
    support = random_support(0, 6, 4, 6)
    found = support.dense(refitted(A, G, support))
    once = torch.linalg.lstsq(G[:2].T, A.T).solution
    torch.testing.assert_close(found[0] + found[2], once[0], rtol=1e-3, atol=1e-3)
    assert found[3].count_nonzero() == 0
    assert error(A, found, G) == pytest.approx(error(A, once, G[:2]), rel=1e-6)


@DTYPES
def test_solve_takes_as_much_of_a_ridge_as_it_needs(dtype):
    ones = torch.ones(3, 3, dtype=dtype)
    ones[0, 1] = ones[1, 0] = 1 + 1e-4  # indefinite: the default ridge is not enough
    found = steps.solve(ones, torch.ones(3, 1, dtype=dtype))
    assert found.isfinite().all()
    assert float(found.sum()) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_no_ridge_helps_is_refused_and_does_not_go_on_for_ever(bad):
    with refused(OptionError, "not finite"):
        steps.solve(torch.full((2, 2), bad), torch.ones(2, 1))


# -------------------------------------------------------------------------------------------------------- G, given F


def hals_by_hand(P: Tensor, Q: Tensor, G: Tensor, sweeps: int) -> Tensor:
    """Feature by feature, token by token."""
    G = G.clone()
    k, n = G.shape
    for _ in range(sweeps):
        for j in range(k):
            if Q[j, j] == 0:
                continue
            for t in range(n):
                left = P[j, t] - sum(G[i, t] * Q[i, j] for i in range(k))
                G[j, t] = max(0.0, float(G[j, t] + left / Q[j, j]))
    return G


@pytest.mark.parametrize("block", [1, 3, 16], ids=lambda b: f"block{b}")
@pytest.mark.parametrize("sweeps", [1, 2])
def test_hals_is_its_formula(monkeypatch, sweeps, block):
    monkeypatch.setattr(steps, "_BLOCK", block)
    A, G = problem(6, 9, 5, 7)
    F = torch.randn(7, 9, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    F[2] = 0
    P, Q = of(A, F)
    expected = hals_by_hand(P, Q, G, sweeps)
    found = steps.hals(P, Q, G.clone(), sweeps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[2], G[2])
    assert (found == 0).any()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([DOUBLE, torch.float32]), st.integers(1, 3))
def test_hals_never_raises_the_loss_nor_leaves_the_cone(shape, dtype, sweeps):
    seed, d, n, k = shape
    A, G = problem(seed, d, n, k, dtype=dtype)
    F = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
    before = error(A, F, G)
    after = steps.hals(*of(A, F), G.clone(), sweeps)
    assert (after >= 0).all()
    assert error(A, F, after) <= before + 1e2 * torch.finfo(dtype).eps * (before + float(A.square().sum()))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_multiply_is_its_formula_and_never_raises_the_loss(shape):
    seed, d, n, k = shape
    A, G = problem(seed, d, n, k)
    F = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    P, Q = of(A, F)
    before, eps = error(A, F, G), 1e-12
    after = steps.multiply(P, Q, G, eps)
    for j in range(k):
        for t in range(n):
            up = max(float(P[j, t]), 0) + sum(float(G[i, t] * max(-Q[i, j], 0)) for i in range(k))
            down = max(-float(P[j, t]), 0) + sum(float(G[i, t] * max(Q[i, j], 0)) for i in range(k))
            assert float(after[j, t]) == pytest.approx(float(G[j, t]) * math.sqrt(up / (down + eps)), rel=1e-10)
    assert error(A, F, after) <= before + 1e-12 * float(A.square().sum())


def test_plain_multiplicative_updates_never_raise_the_loss():
    """T1: without supports, least squares and Ding's step in turns, eps 0."""
    for k in (3, 8, 15):
        A, G = problem(k, 40, 60, k, zeros=0)
        losses = []
        for _ in range(300):
            F = torch.linalg.lstsq(G.T, A.T).solution
            G = steps.multiply(*of(A, F), G, 0.0)
            losses.append(error(A, F, G))
        assert all(later <= sooner * (1 + 1e-12) for sooner, later in pairwise(losses))
        assert losses[-1] < 0.99 * losses[0]


def test_a_zero_is_for_ever_under_multiply_and_can_be_left_under_hals():
    G = torch.tensor([[0.0, 0.5]], dtype=DOUBLE)
    P, Q = torch.tensor([[2.0, 2.0]], dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    locked = G
    for _ in range(100):
        locked = steps.multiply(P, Q, locked, 1e-12)
    assert locked[0, 0] == 0
    assert float(locked[0, 1]) == pytest.approx(2)
    assert steps.hals(P, Q, G.clone(), 1).tolist() == [[2, 2]]


# ------------------------------------------------------------------------------------------------------------- NNLS


@pytest.mark.parametrize(("d", "n", "k"), [(30, 25, 1), (30, 25, 8), (60, 20, 20), (12, 10, 12)])
def test_nnls_is_scipys_token_by_token(d, n, k):
    A, _ = problem(k, d, n, k)
    F = torch.randn(k, d, generator=torch.Generator().manual_seed(k), dtype=DOUBLE)
    found = steps.nnls(*of(A, F))
    for t in range(n):
        expected = scipy_nnls(F.T.numpy(), A[:, t].numpy())[0]
        np.testing.assert_allclose(found[:, t].numpy(), expected, rtol=0, atol=1e-8)
    assert (found == 0).any()


def test_nnls_meets_its_conditions_and_leaves_a_dead_feature_at_0():
    A, _ = problem(7, 40, 30, 6)
    F = torch.randn(6, 40, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)
    F[4] = 0
    P, Q = of(A, F)
    G = steps.nnls(P, Q)
    slope = Q @ G - P
    scale = float(P.abs().max())
    assert (G >= 0).all()
    assert (slope >= -1e-9 * scale).all()
    assert (slope * G).abs().max() <= 1e-9 * scale
    assert G[4].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_nnls_of_features_that_are_nearly_alike_ends_soon(dtype, monkeypatch):
    """Sweeps alone creep there for thousands of rounds, in float32 for ever; least squares on what is active does not."""
    generator = torch.Generator().manual_seed(0)
    F = (torch.rand(30, 80, generator=generator, dtype=DOUBLE) + 3).to(dtype)
    A = (F.T @ torch.rand(30, 200, generator=generator, dtype=DOUBLE).to(dtype)) + 0.1
    swept = []
    monkeypatch.setattr(steps, "hals", lambda P, *rest, whole=steps.hals: swept.append(P.shape[1]) or whole(P, *rest))
    G = steps.nnls(*of(A, F))
    assert (G >= 0).all()
    assert len(swept) < steps._NNLS_ROUNDS
    assert swept == sorted(swept, reverse=True)
    if dtype == DOUBLE:
        expected = np.stack([scipy_nnls(F.T.numpy(), column)[0] for column in A.T.numpy()], 1)
        np.testing.assert_allclose(error(A, F, G), error(A, F, torch.from_numpy(expected)), rtol=1e-8)


# ---------------------------------------------------------------------------------------------------------- together


@DTYPES
@pytest.mark.parametrize("m", [2, 12, 40])
def test_least_squares_and_hals_never_raise_the_loss_on_a_fixed_support(m, dtype):
    """T9: monotone to round-off; float32 has a ridge of 1e-6 in its least squares, which may cost its square."""
    A, G = problem(9, 40, 60, 6, dtype=dtype)
    support, losses = random_support(9, 40, 6, m), []
    for _ in range(80):
        steps.unit_rows(G)
        values = steps.refit(steps.correlate(A, G, support), steps.gram(G), support)
        F = support.dense(values)
        losses.append(error(A, F, G))
        steps.hals(steps.project(A, support, values), steps.gram(F), G, 2)
        losses.append(error(A, F, G))
    slack = 1e-13 if dtype == DOUBLE else 1e-6
    assert all(later <= sooner * (1 + slack) for sooner, later in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


@DTYPES
def test_unit_rows_keep_the_product_and_drop_what_is_subnormal(dtype):
    G = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1e-33, 2e-38]], dtype=dtype)
    before = G.clone()
    lengths = steps.unit_rows(G)
    assert lengths.tolist() == [[5], [0], [1]]
    torch.testing.assert_close(lengths * G, before, rtol=1e-6, atol=1e-30)
    assert G[2].tolist() == [1, 0, 0]
    assert not G.isnan().any()
