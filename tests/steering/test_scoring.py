"""Scores of steered texts.

Held against: the formulas on tables written by hand; properties of harmonic means; texts of a model.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.statistics import bootstrap_mean
from interp.steering.changes import Change
from interp.steering.generation import side_by_side
from interp.steering.scoring import Comparison, compare_steering, harmonic_mean, steering_scores
from tests.small_pairs import refused


def table(**variants: list[tuple[float, float]]) -> pd.DataFrame:
    """Continuations by variant, of (concept, logprob_unsteered)."""
    rows = [
        {"name": name, "sample": i, "text": f"{name} {i}", "concept": concept, "logprob_unsteered": logprob}
        for name, samples in variants.items()
        for i, (concept, logprob) in enumerate(samples)
    ]
    return pd.DataFrame(rows)


def test_by_hand():
    scores = steering_scores(table(unsteered=[(0.1, -1.0), (0.1, -3.0)], a=[(0.5, -2.0), (0.8, -2 - math.log(4))]))
    assert scores.columns.tolist() == ["name", "sample", "text", "concept", "perplexity", "fluency", "final"]
    # the unsteered perplexity is exp(2), as a geometric mean
    assert scores["perplexity"].tolist() == pytest.approx([math.e, math.e**3, math.e**2, 4 * math.e**2])
    assert scores["fluency"].tolist() == pytest.approx([1, 1 / math.e, 1, 0.25])
    assert scores["final"].tolist()[2:] == pytest.approx([2 * 0.5 / 1.5, 2 * 0.8 * 0.25 / 1.05])


def test_nothing_of_one_is_nothing():
    scores = steering_scores(table(unsteered=[(0.0, -1.0)], a=[(1.0, -math.inf), (0.5, -2e3)]))
    assert scores["final"].tolist() == [0, 0, 0]
    assert scores["perplexity"].tolist()[1:] == [math.inf, math.inf]


@given(st.floats(0, 1), st.floats(0, 1))
def test_harmonic_means(a, b):
    mean = harmonic_mean(a, b)
    assert (mean == 0) == (min(a, b) == 0) or min(a, b) < 1e-300
    if min(a, b) > 1e-300:
        assert mean == pytest.approx(harmonic_mean(b, a))
        assert mean == pytest.approx(2 / (1 / a + 1 / b))
        assert min(a, b) * (1 - 1e-12) <= mean <= max(a, b) * (1 + 1e-12)


def test_a_judge_that_does_not_answer_is_missing():
    """None and NaN are no score, and 0 is one."""
    answers = {"unsteered 0": 2.0, "a 0": None, "a 1": math.nan, "a 2": 0.0}
    scores = steering_scores(table(unsteered=[(0.1, -1)], a=[(0.1, -1)] * 3), judge=answers.get)
    np.testing.assert_array_equal(scores["judge"].to_numpy(), [2.0, math.nan, math.nan, 0.0])
    missing = steering_scores(table(unsteered=[(0.1, -1)], a=[(0.1, -1)] * 3), judge=lambda text: None)
    assert missing["judge"].isna().all()
    assert missing["judge"].dtype == np.float64


def test_pairs_are_compared():
    rng = np.random.default_rng(0)
    common = rng.normal(size=40)  # what a sample has whichever the variant
    a, b = common + 0.3 + 0.01 * rng.normal(size=40), common
    frames = [pd.DataFrame({"name": n, "sample": range(40), "final": v}) for n, v in (("a", a), ("b", b))]
    scores = pd.concat(frames).sample(frac=1, random_state=1)  # in no order
    found = compare_steering(scores, "a", "b", seed=3)
    mean, low, high = bootstrap_mean(a - b, seed=3)
    assert (found.difference, found.n_pairs) == (pytest.approx(float(mean)), 40)
    assert (found.low, found.high) == pytest.approx((float(low), float(high)), abs=0.01)
    assert found.high - found.low < 0.02  # unpaired it would be 50 times wider
    back = compare_steering(scores, "b", "a", seed=3)
    assert back.difference == pytest.approx(-found.difference)
    assert compare_steering(scores, "a", "a") == Comparison(0.0, 0.0, 0.0, 40)


def test_pairs_with_a_missing_score_are_left_out():
    scores = pd.DataFrame(
        {"name": ["a"] * 3 + ["b"] * 3, "sample": [0, 1, 2, 0, 1, 3], "judge": [1.0, math.nan, 5.0, 0.5, 2.0, 7.0]}
    )
    found = compare_steering(scores, "a", "b", score="judge")
    assert found == Comparison(0.5, 0.5, 0.5, 1)


def test_several_prompts_need_a_column_of_their_own():
    one = pd.DataFrame({"name": ["a", "b"], "sample": 0, "final": [0.5, 0.2]})
    both = pd.concat([one.assign(prompt=0), one.assign(prompt=1)])
    with refused(OptionError, "sample does not tell these scores apart"):
        compare_steering(both, "a", "b")
    assert compare_steering(both, "a", "b", by=("prompt", "sample")).n_pairs == 2


def test_steering_towards_a_token_raises_its_mass(tiny):
    """And the model alone finds such a text less likely."""
    model, token = tiny("gpt2", torch.float64), 20
    hook = "blocks.2.hook_resid_post"
    d = model.W_U[:, token]
    changes = {"towards": [Change(hook, d, "add", 20.0)], "away": [Change(hook, -d, "add", 20.0)]}
    generations = side_by_side(
        model, torch.tensor([1, 5, 7]), changes, n=6, max_new_tokens=8, top_k=None, top_p=None, concept_tokens=[token]
    )
    scores = steering_scores(generations)
    assert scores[["concept", "fluency", "final"]].stack().between(0, 1).all()
    assert (scores["perplexity"] >= 1).all()
    assert compare_steering(scores, "towards", "unsteered", score="concept").low > 0
    assert compare_steering(scores, "away", "unsteered", score="concept").high < 0


def test_refusals():
    with refused(OptionError, "give side_by_side the concept_tokens"):
        steering_scores(table(unsteered=[(0.1, -1)]).drop(columns="concept"))
    with refused(OptionError, "no 'unsteered' continuation"):
        steering_scores(table(a=[(0.1, -1)]))
    scores = steering_scores(table(unsteered=[(0.1, -1)], a=[(0.1, -1)]))
    with refused(OptionError, "'b' is not a variant of these scores"):
        compare_steering(scores, "a", "b")
    with refused(OptionError, "'judge' is not a column of these scores"):
        compare_steering(scores, "a", "unsteered", score="judge")
    with refused(OptionError, "no pair of 'a' and 'unsteered' has both scores"):
        compare_steering(scores.assign(final=math.nan), "a", "unsteered")
