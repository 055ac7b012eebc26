"""Intervals over prompts, and which components stand out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interp.statistics import bootstrap_mean, detected


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    """300 synthetic sets of 50 draws from a skewed distribution of mean 1 (one column each)."""
    draws = np.random.default_rng(0).gamma(4.0, 0.25, (50, 300))
    mean, low, high = bootstrap_mean(draws, n_resamples=500)
    np.testing.assert_allclose(mean, draws.mean(0))
    covered = ((low <= 1) & (high >= 1)).mean()
    assert 0.91 <= covered <= 0.98
    assert ((low < mean) & (mean < high)).all()


def test_a_wider_confidence_gives_a_wider_interval():
    values = np.random.default_rng(1).normal(size=(20, 3))
    (_, low, high), (_, wide_low, wide_high) = (bootstrap_mean(values, confidence=c) for c in (0.5, 0.99))
    assert (wide_low < low).all()
    assert (wide_high > high).all()


def test_the_interval_is_that_of_the_textbook_for_many_normal_draws():
    values = np.random.default_rng(2).normal(3, 2, 2000)
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_a_seed_is_a_seed():
    values = np.random.default_rng(3).normal(size=(10, 4))
    first, again, other = (bootstrap_mean(values, seed=s) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("values", [np.ones((1, 3)), np.full((5, 2), 0.1), np.zeros((4, 2, 3)), np.array([[7.0]])])
def test_where_prompts_agree_the_interval_is_the_mean(values):
    mean, low, high = bootstrap_mean(values)
    assert mean.shape == values.shape[1:]
    np.testing.assert_array_equal(low, mean)
    np.testing.assert_array_equal(high, mean)


def test_columns_do_not_disturb_each_other():
    values = np.random.default_rng(4).normal(size=(8, 3))
    values[:, 1] = 2.0
    mean, low, high = bootstrap_mean(values)
    assert low[1] == mean[1] == high[1] == 2.0
    assert (low[[0, 2]] < high[[0, 2]]).all()


def test_an_undefined_column_stays_undefined():
    values = np.random.default_rng(4).normal(size=(8, 2))
    values[3, 0] = np.nan
    mean, low, high = bootstrap_mean(values)
    assert np.isnan([mean[0], low[0], high[0]]).all()
    assert np.isfinite([mean[1], low[1], high[1]]).all()


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 6), st.integers(1, 3)),
        elements=st.sampled_from([0.0, 0.0, 1.0, -2.0, 1e-9, 3.5, 1e6]),
    )
)
def test_the_interval_lies_within_the_data(values):
    """Also where most prompts agree, where a careless BCa divides by zero."""
    mean, low, high = bootstrap_mean(values, n_resamples=200)
    assert np.isfinite([mean, low, high]).all()
    assert (low <= high).all()
    slack = 1e-9 * (1 + np.abs(values).max(0))
    assert (low >= values.min(0) - slack).all()
    assert (high <= values.max(0) + slack).all()


def test_what_stands_out_is_two_deviations_from_the_mean():
    effects = np.zeros(20)
    effects[4], effects[9] = 5.0, -5.0
    assert np.flatnonzero(detected(effects)).tolist() == [4, 9]
    assert not detected(effects, n_sigma=4.0).any()


def test_nothing_stands_out_among_equals():
    assert not detected(np.full(7, 0.1)).any()
    assert not detected(np.zeros(3)).any()
    assert not detected(np.array([1.0])).any()


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.integers(-99, 99)), st.floats(0.5, 8), st.floats(-50, 50))
def test_detection_has_no_unit_and_no_zero(effects, scale, shift):
    deviations = np.abs(effects - effects.mean()) / (effects.std() or 1)
    if effects.std() > 1e-3 and np.abs(deviations - 2).min() > 1e-6:
        assert np.array_equal(detected(effects), detected(scale * effects + shift))
        assert np.array_equal(detected(effects), deviations > 2)
    assert detected(effects).sum() <= len(effects) / 4  # Chebyshev
