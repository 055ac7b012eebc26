"""Activations with a known dictionary.

Held against: binomial bounds at five standard deviations; the bivariate normal's orthant; Welch's bound; codes @ atoms; means
and deviations of many draws; trees counted by hand.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from interp.errors import OptionError
from interp.features.synthetic import TrueDictionary, coherence, near_orthogonal, toy_dictionary, zipf_dictionary
from tests.small_pairs import refused

N = 40_000
SEEDS = st.integers(0, 10_000)
FAMILY = torch.tensor([-1, 0, 0, 1, -1, 7, 5, -1])  # 0 > {1 > 3, 2}, 4, 7 > 5 > 6


def plain(n_features: int = 8, d: int = 5, **fields) -> TrueDictionary:
    """Random atoms and frequencies from .1 to .6, unless told otherwise."""
    atoms = near_orthogonal(d, n_features, seed=0, steps=0)
    return TrueDictionary(atoms, **{"frequency": torch.linspace(0.1, 0.6, n_features)} | fields)


def within_binomial(found: torch.Tensor, expected: torch.Tensor, n: int) -> bool:
    """Are shares of n tokens within five standard deviations of what they should be?"""
    found, expected = found.double(), expected.double()
    return bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all())


def shares(codes: torch.Tensor) -> torch.Tensor:
    return (codes != 0).double().mean(0)


# ------------------------------------------------------------------------------------------------------------ firing


def test_features_fire_as_often_as_they_should():
    truth = plain(frequency=torch.tensor([0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 0.999, 1.0]))
    _, codes = truth.sample(N, seed=0)
    assert within_binomial(shares(codes), truth.frequency, N)
    assert torch.equal(truth.marginal(), truth.frequency)


@settings(max_examples=10, deadline=None, derandomize=True)  # bounds of chance: the same chances each time
@given(st.integers(1, 4), st.floats(0, 1), SEEDS)
def test_correlation_leaves_frequencies_alone(rank, norm, seed):
    factors = torch.randn(8, rank, generator=torch.Generator().manual_seed(seed))
    truth = plain(correlation=norm * torch.nn.functional.normalize(factors))
    _, codes = truth.sample(N, seed=seed)
    assert within_binomial(shares(codes), truth.frequency, N)


def test_correlated_features_fire_together_as_the_normal_has_it():
    """Rows with inner products .64 and -.64, and one of its own."""
    factors = torch.tensor([[0.8, 0.0], [0.8, 0.0], [-0.8, 0.0], [0.0, 0.6]])
    frequency = torch.tensor([0.2, 0.3, 0.2, 0.1])
    fired = plain(4, frequency=frequency, correlation=factors).sample(N, seed=1)[1] != 0
    for i, j, correlation in ((0, 1, 0.64), (0, 2, -0.64), (0, 3, 0.0)):
        p, q = float(frequency[i]), float(frequency[j])
        together = stats.multivariate_normal(cov=[[1, correlation], [correlation, 1]]).cdf(stats.norm.ppf([p, q]))
        found = (fired[:, i] & fired[:, j]).double().mean()
        assert within_binomial(found, torch.tensor(together), N)
        assert np.sign(together - p * q) == np.sign(correlation) or abs(together - p * q) < 1e-6


def test_features_of_one_factor_always_fire_together():
    same = torch.ones(3, 1)
    fired = plain(3, frequency=torch.full((3,), 0.3), correlation=same).sample(1000, seed=0)[1] != 0
    assert (fired == fired[:, :1]).all()
    assert fired.any()


def test_a_child_fires_only_where_its_parent_does():
    truth = plain(parent=FAMILY)
    _, codes = truth.sample(N, seed=2)
    fired = codes != 0
    for child, parent in enumerate(FAMILY.tolist()):
        if parent >= 0:
            assert not (fired[:, child] & ~fired[:, parent]).any()
            where = fired[fired[:, parent], child]
            assert within_binomial(where.double().mean(), truth.frequency[child], len(where))
    p = truth.frequency
    by_hand = torch.stack(
        [p[0], p[0] * p[1], p[0] * p[2], p[0] * p[1] * p[3], p[4], p[7] * p[5], p[7] * p[5] * p[6], p[7]]
    )
    torch.testing.assert_close(truth.marginal(), by_hand)
    assert within_binomial(shares(codes), by_hand, N)
    assert truth.l0 == pytest.approx(float(by_hand.sum()), rel=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True)  # bounds of chance: the same chances each time
@given(SEEDS, st.integers(0, 4))
def test_marginals_with_both_correlation_and_hierarchy(seed, rank):
    truth = zipf_dictionary(6, 40, 5, seed=seed, exponent=0.8, hierarchy=(3, 2, 2), correlation_rank=rank, shared=0.9)
    _, codes = truth.sample(N, seed=seed)
    assert within_binomial(shares(codes), truth.marginal(), N)


# ------------------------------------------------------------------------------------------------------- activations


def test_activations_are_codes_times_atoms():
    truth = plain(bias=torch.arange(5.0))
    activations, codes = truth.sample(200, seed=3)
    assert (codes >= 0).all()
    torch.testing.assert_close(activations, codes @ truth.atoms + torch.arange(5.0))


def test_noise_is_white_and_changes_no_code():
    quiet = plain()
    loud = replace(quiet, noise=0.5)
    (x, codes), (y, same) = (t.sample(N, seed=4) for t in (quiet, loud))
    assert torch.equal(codes, same)
    covariance = torch.cov((y - x).T)
    torch.testing.assert_close(covariance, 0.25 * torch.eye(5), atol=0.01, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 0.15, 1.0])
def test_magnitudes_have_their_mean_and_spread(spread):
    means = torch.tensor([1.0, 3.0, 0.2])
    _, codes = plain(3, frequency=torch.ones(3), magnitude=means, spread=spread).sample(N, seed=5)
    assert (codes > 0).all()
    torch.testing.assert_close(codes.mean(0) / means, torch.ones(3), atol=0.03 * spread + 1e-5, rtol=0)
    torch.testing.assert_close(codes.std(0) / means, torch.full((3,), spread), atol=0.1 * spread + 1e-5, rtol=0)


@pytest.mark.parametrize("extra", ["plain", "correlated", "noisy"])
def test_a_seed_is_a_seed(extra):
    fields = {"plain": {}, "correlated": {"correlation": torch.full((8, 1), 0.5)}, "noisy": {"noise": 0.1}}[extra]
    first, again, other = (plain(**fields).sample(50, seed=s) for s in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_seeds_of_dictionaries_reproduce():
    for make in (toy_dictionary, _benchmark_like):
        first, again, other = (make(seed=s) for s in (0, 0, 1))
        fields = {name: x for name, x in vars(first).items() if isinstance(x, torch.Tensor)}
        assert all(torch.equal(x, getattr(again, name)) for name, x in fields.items())
        assert not torch.equal(first.atoms, other.atoms)


def _benchmark_like(*, seed: int) -> TrueDictionary:
    return zipf_dictionary(8, 60, 4, seed=seed, hierarchy=(4, 2, 2), correlation_rank=3)


def test_a_start_from_the_same_seed_is_not_the_truth():
    """What an autoencoder started with the seed of the data might begin with."""
    drawn = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    start = torch.nn.functional.normalize(drawn)
    assert (start * near_orthogonal(8, 32, seed=0, steps=0)).sum(1).abs().mean() < 0.5


def test_no_global_random_numbers_are_used():
    state = torch.get_rng_state()
    _benchmark_like(seed=0).sample(10, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_none_and_many_blocks():
    truth = plain(noise=0.1)
    activations, codes = truth.sample(0, seed=0)
    assert (activations.shape, codes.shape) == ((0, 5), (0, 8))
    blocks = torch.cat([truth.sample(N // 8, seed=s)[1] for s in range(8)])
    assert within_binomial(shares(blocks), truth.frequency, N)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_atoms(dtype):
    truth = plain(bias=torch.zeros(5), noise=0.1)
    activations, codes = truth.to(dtype=dtype).sample(100, seed=0)
    assert activations.dtype == codes.dtype == dtype
    torch.testing.assert_close(codes.float(), truth.sample(100, seed=0)[1], rtol=0.01, atol=0)


# ------------------------------------------------------------------------------------------------------------- makers


def test_the_atoms_of_the_toy_are_as_far_apart_as_the_reference():
    truth = toy_dictionary(seed=0)
    assert truth.atoms.shape == (64, 32)
    torch.testing.assert_close(truth.atoms.norm(dim=1), torch.ones(64))
    assert coherence(truth.atoms) == pytest.approx(0.437, abs=1e-3)
    assert truth.l0 == pytest.approx(3)
    _, codes = truth.sample(N, seed=0)
    assert within_binomial(shares(codes).mean(), torch.tensor(3 / 64), N * 64)


@pytest.mark.parametrize(("d", "n"), [(32, 64), (8, 20), (3, 4), (1, 3)])
def test_descent_comes_near_welchs_bound(d, n):
    bound = math.sqrt((n - d) / (d * (n - 1)))
    found = [coherence(near_orthogonal(d, n, seed=1, steps=steps)) for steps in (0, 300)]
    assert bound - 1e-6 <= found[1] <= max(1.25 * bound, 1e-6 + bound)
    assert d == 1 or found[1] < found[0]


@pytest.mark.parametrize(("d", "n"), [(6, 6), (9, 4), (1, 1)])
def test_atoms_that_can_be_orthogonal_are(d, n):
    atoms = near_orthogonal(d, n, seed=0)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(n))


@given(st.integers(2, 6), st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=20)
def test_coherence_is_the_largest_overlap(n, d, seed):
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    pairs = [abs(float(atoms[i] @ atoms[j])) for i in range(n) for j in range(i)]
    assert coherence(atoms) == pytest.approx(max(pairs), rel=1e-5)


def test_coherence_in_blocks(monkeypatch):
    atoms = near_orthogonal(4, 10, seed=0, steps=5)
    whole = coherence(atoms)
    monkeypatch.setattr("interp.features.synthetic._BLOCK", 30)
    assert coherence(atoms) == pytest.approx(whole)
    torch.testing.assert_close(near_orthogonal(4, 10, seed=0, steps=5), atoms, rtol=1e-4, atol=1e-5)


@given(st.floats(0.5, 9), st.floats(0, 2))
@settings(deadline=None, max_examples=30)
def test_zipfs_law_at_the_l0_asked_for(l0, exponent):
    truth = zipf_dictionary(4, 60, l0, seed=0, exponent=exponent)
    frequency = truth.marginal().double()
    assert truth.l0 == pytest.approx(l0, rel=1e-4)
    assert (frequency.diff() <= 0).all()
    assert frequency.min() >= 5e-4 - 1e-9
    assert frequency.max() <= 0.4 + 1e-7
    free = (frequency > 5.1e-4) & (frequency < 0.399)
    product = frequency * torch.arange(1, 61) ** exponent
    assert free.sum() < 2 or product[free].std() < 1e-4 * product[free].mean()


def test_trees_are_as_asked_and_marginals_still_zipf():
    truth = zipf_dictionary(6, 100, 6, seed=3, hierarchy=(4, 3, 2), correlation_rank=5)
    parent = truth.parent
    depth = [0] * 100
    for child, up in enumerate(parent.tolist()):
        assert up < child
        depth[child] = 0 if up < 0 else depth[up] + 1
    assert [depth.count(level) for level in (1, 2)] == [12, 36]
    assert set(parent[parent >= 0].bincount().tolist()) == {0, 3}
    torch.testing.assert_close(truth.marginal(), zipf_dictionary(6, 100, 6, seed=3).marginal())
    assert (truth.frequency[parent >= 0] < 1).all()
    rows = truth.correlation.double()
    torch.testing.assert_close(rows.square().sum(1), torch.full((100,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(truth.magnitude[[0, -1]], torch.tensor([5.0, 4.0]))


def test_a_rank_too_small_for_a_family_leaves_its_children_alone():
    truth = zipf_dictionary(6, 100, 6, seed=3, hierarchy=(4, 3, 2), correlation_rank=1)
    assert ((truth.correlation != 0).flatten() == (truth.parent < 0)).all()


# ------------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "norm": ({"atoms": 2 * torch.eye(8)}, "row 0 has norm 2"),
    "zero row": ({"atoms": torch.diag(torch.tensor([1.0] * 7 + [0.0]))}, "row 7 has norm 0"),
    "nan row": ({"atoms": torch.full((8, 5), torch.nan)}, "row 0 has norm nan"),
    "frequencies": ({"frequency": torch.full((7,), 0.1)}, r"frequency has shape \[7\]"),
    "probability": ({"frequency": torch.full((8,), 1.5)}, "from 0 to 1"),
    "magnitudes": ({"magnitude": torch.ones(3)}, r"magnitude has shape \[3\]"),
    "negative": ({"magnitude": -1.0}, "magnitudes are positive"),
    "spread": ({"spread": -0.1}, "at least 0"),
    "noise": ({"noise": -0.1}, "at least 0"),
    "bias": ({"bias": torch.zeros(8)}, r"bias has shape \[8\]"),
    "parents": ({"parent": torch.full((2,), -1)}, r"parent has shape \[2\]"),
    "no such parent": ({"parent": torch.full((8,), 8)}, "one of 8 features"),
    "own parent": ({"parent": torch.tensor([-1, 1] + [-1] * 6)}, "feature 1 has no root"),
    "circle": ({"parent": torch.tensor([-1, 2, 3, 1] + [-1] * 4)}, "feature 1 has no root"),
    "factors": ({"correlation": torch.zeros(3, 2)}, r"with 8 rows, not \[3, 2\]"),
    "too much": ({"correlation": torch.ones(8, 2)}, "norm of at most 1"),
    "tied": ({"correlation": torch.full((8, 1), 0.5), "parent": FAMILY}, "ties feature 1 to its ancestor 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_dictionary_is_refused(case):
    fields, says = WRONG[case]
    with refused(OptionError, says):
        replace(plain(), **fields)


ASKED = {
    "l0 of a toy": (toy_dictionary, {"n_features": 4, "l0": 5}, "at most all"),
    "no features": (near_orthogonal, {"d": 3, "n_features": 0}, "at least 1 dimension"),
    "l0 out of reach": (zipf_dictionary, {"d": 4, "n_features": 10, "l0": 5}, "cannot have an l0 of 5"),
    "l0 too small": (zipf_dictionary, {"d": 4, "n_features": 10, "l0": 1e-3}, "cannot have an l0"),
    "a wood": (zipf_dictionary, {"d": 4, "n_features": 10, "l0": 1, "hierarchy": (4, 2, 1)}, "has 12 features"),
    "no roots": (zipf_dictionary, {"d": 4, "n_features": 10, "l0": 1, "hierarchy": (0, 2, 1)}, "roots"),
    "twins": (
        zipf_dictionary, {"d": 4, "n_features": 10, "l0": 1, "exponent": 0.0, "hierarchy": (2, 2, 1)}, "would fire wherever",
    ),
    "share": (zipf_dictionary, {"d": 4, "n_features": 10, "l0": 1, "correlation_rank": 2, "shared": 2.0}, "share from 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_made_is_refused(case):
    make, options, says = ASKED[case]
    with refused(OptionError, says):
        make(seed=0, **options)


def test_a_sample_of_less_than_nothing():
    with refused(OptionError, "at least 0 tokens, not -1"):
        plain().sample(-1, seed=0)
