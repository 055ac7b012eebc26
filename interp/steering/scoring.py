"""Did steering do what it was for, and is the text still language? Scores that need no judge but the model.

With P_s the steered model's next-token distribution, P_0 that of the model left alone, C the concept's tokens, x a continuation:

    concept     mean over its positions of  sum_{c in C} P_s(c)
    perplexity  exp(-mean_t log P_0(x_t | x_<t))
    fluency     min(1, perplexity of unsteered continuations / perplexity)      unsteered: geometric mean over samples
    final       2 concept fluency / (concept + fluency);  0 if either is 0

All lie between 0 and 1 but perplexity, which is at least 1. A concept of few tokens rarely has much probability: compare variants
by `final`, do not read it alone. Steering that only repeats likely words is fluent here, as it is for P_0. Spreads between texts
are larger than differences between methods, so `compare_steering` pairs what was drawn with one seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.errors import OptionError, one_of
from interp.statistics import bootstrap_mean
from interp.steering.generation import UNSTEERED


def steering_scores(generations: pd.DataFrame, *, judge: Callable[[str], float | None] | None = None) -> pd.DataFrame:
    """Concept, fluency and their harmonic mean for every continuation of `side_by_side(..., concept_tokens=...)`.

    judge: a score of your own for a text, in whatever unit; None or NaN is a missing answer and stays NaN, never 0.
    Columns: name, sample, text, concept (probability), perplexity (1 or more), fluency, final, distinct (share of the tokens that
    differ: repetition is likely, so fluency does not see it), and judge where one is given.
    Raises `OptionError` if the table has no concept or no unsteered continuation.
    """
    if "concept" not in generations:
        raise OptionError("these continuations have no concept: give side_by_side the concept_tokens")
    alone = generations.loc[generations["name"] == UNSTEERED, "logprob_unsteered"]
    if alone.empty:
        raise OptionError(f"there is no {UNSTEERED!r} continuation to compare with")
    logprob = generations["logprob_unsteered"].to_numpy(np.float64)
    with np.errstate(over="ignore"):  # a token that the model gives no probability: infinite perplexity, no fluency
        perplexity = np.exp(-logprob)
    fluency = np.exp(np.minimum(0.0, logprob - float(alone.mean())))
    concept = generations["concept"].to_numpy(np.float64)
    scores = generations[["name", "sample", "text"]].copy()
    scores["concept"], scores["perplexity"], scores["fluency"] = concept, perplexity, fluency
    scores["final"] = [harmonic_mean(c, f) for c, f in zip(concept, fluency, strict=True)]
    if "ids" in generations:
        scores["distinct"] = [len(set(ids)) / len(ids) for ids in generations["ids"]]
    if judge is not None:
        answers = [judge(text) for text in generations["text"]]
        scores["judge"] = np.array([math.nan if answer is None else float(answer) for answer in answers])
    return scores


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b) of two numbers that are not negative; 0 if either is 0."""
    return 0.0 if a == 0 or b == 0 else 2 * a * (b / (a + b))  # a b itself may be too small a number


@dataclass(frozen=True)
class Comparison:
    """Mean of score(a) - score(b) over pairs, with its interval (bootstrap over pairs, BCa), and how many pairs there were."""

    difference: float
    low: float
    high: float
    n_pairs: int


def compare_steering(
    scores: pd.DataFrame, a: str, b: str, *, score: str = "final", by: Sequence[str] = ("sample",),
    confidence: float = 0.95, seed: int = 0,
) -> Comparison:  # fmt: skip
    """The mean paired difference between two variants of `steering_scores`: positive means that `a` scores higher.

    by: columns whose values make a pair; add those that tell prompts or features apart, where tables were put together. Pairs
    of which either score is missing are left out, and not counted.
    Raises `OptionError` for a variant or score that is not there, for pairs that are not unique, and where no pair is left.
    """
    names = list(dict.fromkeys(scores["name"]))
    for name in (a, b):
        one_of(name, names, "variant of these scores")
    for column in (score, *by):
        one_of(column, list(scores.columns), "column of these scores")
    sides = [scores[scores["name"] == name].set_index(list(by))[score] for name in (a, b)]
    if not all(side.index.is_unique for side in sides):
        raise OptionError(f"{', '.join(by)} does not tell these scores apart: name more columns in by")
    pairs = pd.concat(sides, axis=1, join="inner", keys=["a", "b"]).dropna()
    if pairs.empty:
        raise OptionError(f"no pair of {a!r} and {b!r} has both scores")
    differences = (pairs["a"] - pairs["b"]).to_numpy(np.float64)
    mean, low, high = bootstrap_mean(differences, confidence=confidence, seed=seed)
    return Comparison(float(mean), float(low), float(high), len(differences))
