"""How agreement is measured: each statistic against its definition, and what it must not be moved by."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from interp import activation_patching, attribution, compare
from interp.agreement import STATISTICS, agreement_text
from interp.errors import OptionError
from tests.small_pairs import refused, small_pairs


def scores(values: np.ndarray, **attrs) -> xr.DataArray:
    about = {"site": "resid_pre", "direction": "denoise", "metric": "logit_diff", "normalized": 0, **attrs}
    coords = {name: ("prompt", np.ones(len(values))) for name in ("metric_clean", "metric_corrupt")}
    return xr.DataArray(values, coords, ("prompt", "layer", "position"), attrs=about)


def draw(n: int = 6, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((n, 3, 5))
    return exact + 0.5 * rng.standard_normal(exact.shape), exact


def test_every_statistic_is_its_definition():
    a, e = draw()
    row = compare(scores(a), scores(e), k=4).loc["resid_pre"]
    assert row.pearson == pytest.approx(stats.pearsonr(a.ravel(), e.ravel()).statistic)
    assert row.spearman == pytest.approx(stats.spearmanr(a.ravel(), e.ravel()).statistic)
    assert row.slope == pytest.approx(stats.linregress(e.ravel(), a.ravel()).slope)
    assert row.relative_error == pytest.approx(np.linalg.norm(a - e) / np.linalg.norm(e))
    assert row.sign == pytest.approx((np.sign(a) == np.sign(e)).mean())
    top = [set(np.argsort(-np.abs(x.mean(0)).ravel())[:4]) for x in (a, e)]
    assert row.top_k == pytest.approx(len(top[0] & top[1]) / 4)
    assert row.n == a.size


def test_what_equals_the_truth_agrees_perfectly():
    _, e = draw()
    row = compare(scores(e), scores(e)).loc["resid_pre"]
    for name in STATISTICS:
        wanted = 0.0 if name == "relative_error" else 1.0
        assert row[name] == pytest.approx(wanted, abs=1e-12)
        assert row[f"{name}_low"] == pytest.approx(wanted, abs=1e-12)


def test_correlation_is_blind_to_scale_and_the_others_are_not():
    _, e = draw()
    row = compare(scores(2 * e), scores(e)).loc["resid_pre"]
    assert row.pearson == pytest.approx(1)
    assert row.spearman == pytest.approx(1)
    assert row.slope == pytest.approx(2)
    assert row.relative_error == pytest.approx(1)


def test_places_that_cannot_change_do_not_count_for_ranks():
    a, e = draw()
    plain = compare(scores(a), scores(e)).loc["resid_pre"]
    frozen = np.zeros((len(e), 3, 40))
    row = compare(scores(np.concatenate([a, frozen], -1)), scores(np.concatenate([e, frozen], -1))).loc["resid_pre"]
    for name in ("spearman", "sign", "top_k", "n"):
        assert row[name] == pytest.approx(plain[name])
    assert row.relative_error == pytest.approx(plain.relative_error)


def test_rounding_noise_is_no_effect():
    a, e = (x.astype(np.float32) for x in draw())
    e[:, 0] = 1e-7
    a[:, 0] = 0
    assert compare(scores(a), scores(e)).loc["resid_pre"].n == e[:, 1:].size


def test_padding_is_left_out():
    a, e = draw()
    a[0, :, 3:] = e[0, :, 3:] = np.nan
    row = compare(scores(a), scores(e)).loc["resid_pre"]
    kept = np.isfinite(a)
    assert row.pearson == pytest.approx(stats.pearsonr(a[kept], e[kept]).statistic)
    assert row.n == kept.sum()


def test_intervals_are_over_prompts():
    """Prompts that are copies of each other say nothing new: the interval shrinks with different prompts only."""
    a, e = draw(8)
    row = compare(scores(a), scores(e), n_resamples=2000).loc["resid_pre"]
    assert row.pearson_low < row.pearson < row.pearson_high
    rng = np.random.default_rng(1)
    drawn = [rng.integers(8, size=8) for _ in range(2000)]
    by_hand = np.quantile([np.corrcoef(a[i].ravel(), e[i].ravel())[0, 1] for i in drawn], [0.025, 0.975])
    assert [row.pearson_low, row.pearson_high] == pytest.approx(by_hand, abs=0.01)
    same = compare(scores(np.repeat(a[:1], 8, 0)), scores(np.repeat(e[:1], 8, 0))).loc["resid_pre"]
    assert same.pearson_low == pytest.approx(same.pearson_high)


def test_the_seed_decides_the_intervals():
    a, e = (scores(x) for x in draw())
    assert compare(a, e, seed=3).equals(compare(a, e, seed=3))
    assert not compare(a, e, seed=3).equals(compare(a, e, seed=4))


def test_one_row_per_site_and_a_table_to_read(tiny):
    model, pairs = tiny("llama3"), small_pairs(3, 6)
    sites = ["resid_pre", "head"]
    table = compare(attribution(model, pairs, sites), activation_patching(model, pairs, sites))
    assert list(table.index) == ["resid_pre", "head_out"]
    text = agreement_text(table)
    assert all(name in text for name in ("pearson", "relative_error", "head_out"))


def test_one_prompt_has_an_estimate_and_no_spread():
    a, e = draw(1)
    row = compare(scores(a), scores(e)).loc["resid_pre"]
    assert row.pearson_low == row.pearson == row.pearson_high


def test_answers_to_other_questions_are_not_compared():
    a, e = draw()
    with refused(OptionError, "scores of direction denoise with scores of direction noise"):
        compare(scores(a), scores(e, direction="noise"))
    with refused(OptionError, "laid out otherwise"):
        compare(scores(a), scores(e[:, :2]))
    with refused(OptionError, "has no mlp_out"):
        compare(scores(a, site="mlp_out"), scores(e))
