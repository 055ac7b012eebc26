"""Comparisons of methods: closed forms, what must not change an answer, and how often an interval is right."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.jobs.comparison import adjusted, compare_methods, sign_flip_p
from tests.small_pairs import refused

QUICK = {"n_resamples": 999}


def grid(values, methods=("a", "b"), models=("m",), tasks=("t",)) -> pd.DataFrame:
    """values: [cell, method], cells being models x tasks x seeds."""
    values = np.asarray(values, float)
    n_seeds = len(values) // (len(models) * len(tasks))
    cells = list(product(models, tasks, range(n_seeds)))
    return pd.DataFrame(
        [(*cell, method, v) for cell, row in zip(cells, values, strict=True) for method, v in zip(methods, row, strict=True)],
        columns=["model", "task", "seed", "method", "value"],
    )  # fmt: skip


def noise(n: int, k: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, k))


# -------------------------------------------------------------------------------------------------------- closed forms


def test_means_difference_and_share_won():
    table = grid([[3, 1], [5, 5], [1, 2], [4, 0]])
    [row] = compare_methods(table, **QUICK).itertuples(index=False)
    assert (row.first, row.second, row.n, row.units) == ("a", "b", 4, 4)
    assert (row.mean_first, row.mean_second, row.difference) == (3.25, 2.0, 1.25)
    assert row.won == (2 + 0.5) / 4
    assert compare_methods(table, better="lower", **QUICK).won[0] == 1.5 / 4


def test_p_is_the_share_of_flips_that_are_as_extreme():
    d = np.array([1.0, 2.0, 3.0, -0.5])
    flips = np.array(list(product((1, -1), repeat=4))) @ d
    assert sign_flip_p(d) == pytest.approx((np.abs(flips) >= d.sum() - 1e-12).mean())
    assert sign_flip_p(np.ones(6)) == pytest.approx(2 / 2**6)
    assert sign_flip_p(np.ones(1)) == sign_flip_p(np.zeros(7)) == 1.0


def test_a_drawn_test_counts_itself_and_is_near_the_exact_one():
    d = noise(12, 1, seed=3)[:, 0] + 0.4
    exact, drawn = sign_flip_p(d, n_resamples=2**12), sign_flip_p(d, n_resamples=2**12 - 1)
    assert exact != drawn
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / 2**12))
    assert sign_flip_p(np.ones(40), n_resamples=99) == pytest.approx(2 / 100)  # two-sided: twice (0 + 1) / (99 + 1)


def test_equal_methods_are_told_apart_by_nothing():
    [row] = compare_methods(grid(np.repeat(noise(8, 1), 2, 1)), **QUICK).itertuples(index=False)
    assert (row.difference, row.low, row.high, row.p, row.p_adjusted, row.won) == (0, 0, 0, 1, 1, 0.5)


def test_one_cell_has_no_interval():
    [row] = compare_methods(grid([[2, 1]]), **QUICK).itertuples(index=False)
    assert row.difference == 1
    assert np.isnan(row.low)
    assert np.isnan(row.high)
    assert row.p == 1


@pytest.mark.parametrize(
    ("p", "holm", "bh"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02], [0.02, 0.04, 0.04, 0.02]),
        ([0.5, 0.5, 0.9], [1.0, 1.0, 1.0], [0.75, 0.75, 0.9]),
        ([0.2], [0.2], [0.2]),
        ([], [], []),
    ],
    ids=["four", "capped", "one", "none"],
)
def test_corrections_by_hand(p, holm, bh):
    p = np.array(p)
    assert adjusted(p, "holm") == pytest.approx(np.array(holm))
    assert adjusted(p, "bh") == pytest.approx(np.array(bh))
    assert np.array_equal(adjusted(p, "none"), p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_holm_is_the_closed_procedure_of_bonferroni(p):
    """Adjusted p of a test: the largest Bonferroni p of all sets of tests that hold it (Marcus, Peritz & Gabriel 1976)."""
    p = np.array(p)
    sets = [np.flatnonzero([i >> k & 1 for k in range(len(p))]) for i in range(1, 2 ** len(p))]
    closed = [max(min(1.0, len(s) * p[s].min()) for s in sets if k in s) for k in range(len(p))]
    assert adjusted(p, "holm") == pytest.approx(np.array(closed))


# ---------------------------------------------------------------------------------------------------------- identities


def test_swapping_two_methods_changes_the_sign_alone():
    values = noise(9) + [0.5, 0]
    a = compare_methods(grid(values), **QUICK).iloc[0]
    b = compare_methods(grid(values[:, ::-1]), **QUICK).iloc[0]
    assert (a.difference, a.low, a.high) == pytest.approx((-b.difference, -b.high, -b.low))
    assert a.p == b.p
    assert a.won == pytest.approx(1 - b.won)
    assert (a.mean_first, a.mean_second) == (b.mean_second, b.mean_first)


@pytest.mark.parametrize("cluster", [None, ("model", "task")], ids=["cells", "clusters"])
def test_the_order_of_rows_is_nothing(cluster):
    table = grid(noise(24, 3), "abc", models=("m", "k"), tasks=("t", "s", "u"))
    mixed = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(compare_methods(table, cluster=cluster, **QUICK),
                                  compare_methods(mixed, cluster=cluster, **QUICK))  # fmt: skip


def test_a_constant_of_a_cell_is_nothing_and_a_factor_is_a_factor():
    values, cells = noise(10), 100 * noise(10, 1, seed=1)
    a, b = (compare_methods(grid(v), **QUICK).iloc[0] for v in (values, 3 * (values + cells)))
    for name in ("difference", "low", "high"):
        assert b[name] == pytest.approx(3 * a[name], abs=1e-9)
    assert a.p == b.p
    assert a.won == b.won


def test_a_cluster_of_one_cell_each_is_the_cell():
    table = grid(noise(6), models=("m", "k"), tasks=("t", "s", "u"))
    a, b = compare_methods(table, **QUICK), compare_methods(table, cluster=["model", "task"], **QUICK)
    pd.testing.assert_frame_equal(a, b)


def test_repeating_seeds_says_nothing_new_about_clusters():
    """Ten copies of each cell look like ten times the evidence, unless whole clusters are resampled."""
    few = noise(6, seed=2) + [0.6, 0]
    shape = {"models": ("m", "k"), "tasks": ("t", "s", "u")}
    once, often = grid(few, **shape), grid(np.repeat(few, 10, 0), **shape)
    asked = {"cluster": ("model", "task"), **QUICK}
    a, b = compare_methods(once, **asked).iloc[0], compare_methods(often, **asked).iloc[0]
    assert (b.n, b.units) == (60, 6)
    assert (a.difference, a.low, a.high, a.p) == pytest.approx((b.difference, b.low, b.high, b.p))
    naive = compare_methods(often, **QUICK).iloc[0]
    assert naive.p < a.p
    assert naive.high - naive.low < 0.6 * (a.high - a.low)


def test_every_cluster_counts_once():
    table = grid([[1, 0], [1, 0], [1, 0], [0, 5]], models=("m",), tasks=("t",))
    table.loc[table.seed == 3, "task"] = "other"
    [row] = compare_methods(table, cluster=["task"], **QUICK).itertuples(index=False)
    assert (row.n, row.units, row.difference, row.won) == (4, 2, -2.0, 0.75)


def test_against_a_reference():
    table = grid(noise(8, 4), "dcba")
    found = compare_methods(table, reference="b", **QUICK)
    assert found["first"].tolist() == ["a", "c", "d"]
    assert set(found.second) == {"b"}
    every = compare_methods(table, **QUICK)
    assert len(every) == 6
    assert found.p_adjusted.max() <= every.p_adjusted.max()  # fewer tests


def test_the_answer_says_how_it_was_made():
    found = compare_methods(grid(noise(4)), better="lower", cluster=["task"], correction="bh", **QUICK)
    assert found.attrs["better"] == "lower"
    assert found.attrs["correction"] == "bh"
    assert found.attrs["cluster"] == ["task"]


# ---------------------------------------------------------------------------------------------------------- statistics


def test_p_is_uniform_when_there_is_no_difference():
    rng = np.random.default_rng(5)
    p = np.array([sign_flip_p(rng.standard_t(4, size=9), n_resamples=512) for _ in range(600)])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / len(p)) + 2 / 512)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held, n = np.random.default_rng(6), 0, 150
    for _ in range(n):
        skewed = rng.exponential(size=25)  # mean 1
        row = compare_methods(grid(np.stack([skewed, np.zeros(25)], 1)), n_resamples=499).iloc[0]
        held += row.low <= 1 <= row.high
    assert 0.86 < held / n < 0.99  # BCa is a little short with 25 skewed cells


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda t: t.drop(index=1), {}, "the cell model m, task t, seed 0 has no value of method b, and others have"),
        (lambda t: pd.concat([t, t.iloc[[2]]]), {}, "the cell model m, task t, seed 1 has more than one value of method a"),
        (lambda t: t.assign(value=t.value.where(t.index != 3)), {}, "the cell model m, task t, seed 1 has no value of method b"),
        (lambda t: t.assign(task=None), {}, "row 0 of this table has no task"),
        (lambda t: t[t.method == "a"], {}, "a comparison takes at least two values of method, and this table has 1"),
        (lambda t: t, {"value": "valeu"}, "'valeu' is not a column of this table .* did you mean 'value'?"),
        (lambda t: t, {"by": "seed"}, "seed tells the methods apart"),
        (lambda t: t, {"match": ()}, "a comparison needs columns to match by"),
        (lambda t: t, {"cluster": ["modle"]}, "'modle' is not a column of a cell to cluster by .* did you mean 'model'?"),
        (lambda t: t, {"reference": "c"}, "'c' is not a method"),
        (lambda t: t, {"better": "up"}, "'up' is not a way to be better"),
        (lambda t: t, {"correction": "fdr"}, "'fdr' is not a correction"),
        (lambda t: t, {"confidence": 95}, "confidence lies between 0 and 1, not at 95"),
        (lambda t: t, {"n_resamples": 0}, "n_resamples must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_what_is_refused(change, options, says):
    with refused(OptionError, says):
        compare_methods(change(grid(noise(4))), **options)
