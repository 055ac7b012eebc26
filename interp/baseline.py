"""How a model does a task before anything is patched: what every discovery says first."""

import numpy as np
import xarray as xr

from interp.errors import name_some
from interp.metrics import METRICS, Metric
from interp.model.run import logits_at
from interp.model.tokens import token_strings
from interp.tasks.pairs import PromptPairs


def first_pair(model, pairs: PromptPairs) -> dict[str, tuple[str, ...] | None]:
    """Token texts of the first pair, for display."""

    def strings(ids) -> tuple[str, ...]:
        return () if ids is None else tuple(token_strings(model.tokenizer, [i for i in ids[0].tolist() if i >= 0]))

    return {
        "corrupt_strings": strings(pairs.corrupt) if pairs.noise_mask is None else None,
        "answer_strings": strings(pairs.answers),
        "wrong_strings": strings(pairs.wrong_answers),
    }


def describe(model, pairs: PromptPairs, scores: xr.DataArray, metric: Metric) -> tuple[dict[str, float], list[str]]:
    """Both unpatched runs in numbers, and what a careful reader should know before believing scores between them."""
    clean, corrupt = scores.metric_clean.values, scores.metric_corrupt.values
    logits = {
        side: logits_at(model, pairs.tokens(side), pairs.read_at, pairs.hooks(side)) for side in ("clean", "corrupt")
    }
    accuracy, probability = METRICS["accuracy"], METRICS["probability"]
    summary = {
        "metric_clean": float(clean.mean()),
        "metric_corrupt": float(corrupt.mean()),
        "accuracy_clean": float(accuracy(logits["clean"], pairs).mean()),
        "probability_clean": float(probability(logits["clean"], pairs).mean()),
        "probability_corrupt": float(probability(logits["corrupt"], pairs).mean()),
    }
    notes = []
    if summary["accuracy_clean"] < 0.5:
        notes.append(f"The model's first choice is an answer on only {summary['accuracy_clean']:.0%} of the clean prompts: "
                     "there may be little behaviour to explain.")  # fmt: skip
    if metric.name == "logit_diff" and (wrong := np.flatnonzero(clean <= 0)).size:
        notes.append(f"The wrong answer wins on the clean prompts {name_some(wrong.tolist())}.")
    gap = np.abs(clean - corrupt)
    if (small := np.flatnonzero(gap < 0.02 * np.median(gap))).size:
        notes.append(f"Clean and corrupt hardly differ on prompts {name_some(small.tolist())}.")
    if metric.name.startswith("probab") and summary["probability_corrupt"] < 0.01:
        notes.append("The answer's probability is near zero on the corrupt prompts: components that lower it further "
                     "cannot show (floor effect); look at logit_diff too.")  # fmt: skip
    if pairs.corruption.startswith("gaussian"):
        notes.append("Gaussian noise takes the model off its distribution; prefer swapped tokens where possible.")
    return summary, notes
