"""Circuits beside one another: two of them, one and the known truth, and one found again on other prompts.

    compare_circuits(a, b)                     # shared edges and nodes, and how their scores agree
    auroc(scores, known)                       # does the ranking put the known circuit's edges first?
    stability(scores, n_edges=50)              # the same search on resampled prompts: mean pairwise Jaccard

A circuit says something about a behaviour only as far as it is found again: Meloux et al. (2510.00845) ask for a mean pairwise
Jaccard of at least 0.8 over at least 100 bootstrap samples of the prompts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool
from scipy import stats

from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import MIB_FRACTIONS, nominal_size
from interp.circuits.graph import edge_mask, readers, writers
from interp.errors import OptionError, SiteError, one_of


def jaccard(a: Bool[np.ndarray, "..."], b: Bool[np.ndarray, "..."]) -> float:
    """|a and b| / |a or b|; 1 if both are empty."""
    union = int((a | b).sum())
    return 1.0 if union == 0 else int((a & b).sum()) / union


@dataclass(frozen=True)
class CircuitComparison:
    """Two circuits of one model. Shares are of 1; correlations are over edges that both have scored, NaN if none has."""

    n_edges: tuple[int, int]
    n_shared: int
    edge_jaccard: float
    node_jaccard: float
    overlap: float  # shared edges over those of the smaller circuit
    expected_jaccard: float  # of two random circuits of these sizes, about
    pearson: float
    spearman: float
    only_first: list[str]
    only_second: list[str]

    def __str__(self) -> str:
        scores = "" if np.isnan(self.pearson) else f"; scores: Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}"
        return (
            f"{self.n_shared} edges shared of {self.n_edges[0]} and {self.n_edges[1]}: Jaccard {self.edge_jaccard:.3f} "
            f"(by chance {self.expected_jaccard:.3f}), of the smaller {self.overlap:.1%}; nodes Jaccard "
            f"{self.node_jaccard:.3f}{scores}"
        )


def compare_circuits(first: Circuit, second: Circuit) -> CircuitComparison:
    """How much two circuits of one model have in common."""
    if not first.graph.like(second.graph):
        raise SiteError(f"circuits of different models: {first!r} and {second!r}")
    a, b, total = first.kept, second.kept, int(edge_mask(first.graph).sum())
    n_shared, expected = int((a & b).sum()), a.sum() * b.sum() / total
    pearson = spearman = np.nan
    if first.scores is not None and second.scores is not None:
        both = np.isfinite(first.scores) & np.isfinite(second.scores)
        x, y = first.scores[both], second.scores[both]
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            pearson, spearman = float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic)
    return CircuitComparison(
        (first.n_edges, second.n_edges), n_shared, jaccard(a, b), jaccard(first.has_node, second.has_node),
        n_shared / max(1, min(first.n_edges, second.n_edges)), float(expected / max(1, a.sum() + b.sum() - expected)),
        pearson, spearman, first.with_edges(a & ~b).edges, first.with_edges(b & ~a).edges,
    )  # fmt: skip


def auroc(
    scores: xr.DataArray | Circuit, known: Circuit, *, method: Literal["rank", "mib"] = "rank", by: str = "size"
) -> float:
    """Area under the ROC curve of a ranking of edges, with a known circuit's edges as the truth.

    method: "rank": the chance that an edge of the circuit is ranked above one outside it, ties counting half. "mib": as
    InterpBench scores in MIB are made: rates at the ten sizes, chosen greedily, trapezoids over the false positive rate divided
    by its last value, and nothing before the first of them.
    """
    one_of(method, ("rank", "mib"), "method")
    ranked = scores if isinstance(scores, Circuit) else Circuit.ranked(scores)
    if not ranked.graph.like(known.graph):
        raise SiteError(f"scores of another model than the known circuit's: {ranked!r} and {known!r}")
    there = edge_mask(known.graph)
    positive, negative = int((known.kept & there).sum()), int((~known.kept & there).sum())
    if not positive or not negative:
        raise OptionError("a known circuit of no edges, or of all, ranks nothing")
    if method == "rank":
        importance = np.nan_to_num(ranked.importance(by), nan=-np.inf)
        ranks = stats.rankdata(importance[there])
        return float((ranks[known.kept[there]].sum() - positive * (positive + 1) / 2) / (positive * negative))
    total, scored = int(there.sum()), len(ranked.order(by))
    found = [
        ranked.top(min(nominal_size(k, total), scored), by=by, search="greedy", prune=False).kept for k in MIB_FRACTIONS
    ]
    tpr = np.array([(kept & known.kept).sum() / positive for kept in found])
    fpr = np.array([(kept & ~known.kept).sum() / negative for kept in found])
    return float(np.trapezoid(tpr, fpr) / fpr[-1])


def stability(
    scores: xr.DataArray, *, n_edges: int | None = None, threshold: float | None = None, n_resamples: int = 100,
    seed: int = 0, **options,
) -> xr.Dataset:  # fmt: skip
    """The circuit of these scores, cut again from bootstrap resamples of the prompts.

    scores: [prompt, source, target]. n_edges or threshold, and the other options: as `Circuit.from_scores` takes them.
    Returns jaccard (mean over all pairs of resampled circuits), jaccard_low and jaccard_high (2.5 % and 97.5 % of the pairs),
    to_whole (mean Jaccard with the circuit of all prompts), frequency [source, target]: the share of resamples with the edge, and
    empty: the share of resamples whose circuit has no edge at all, dead ends being pruned; two empty circuits count as equal, so
    a high Jaccard of empty circuits says nothing.
    """
    if "prompt" not in scores.dims:
        raise OptionError("stability needs scores of every prompt, and these have been averaged")
    if n_resamples < 2:
        raise OptionError(f"stability takes at least 2 resamples, not {n_resamples}")
    ranked = Circuit.ranked(scores)
    asked = {"n_edges": n_edges, "threshold": threshold, **options}
    whole = Circuit.from_scores(scores, **asked)
    values = scores.transpose("prompt", "source", "target").values
    picks = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values), size=n_resamples)
    template = scores.isel(prompt=0, drop=True)
    found = []
    for weights in picks:
        mean = template.copy(data=np.tensordot(weights / len(values), values, 1))
        found.append(Circuit.from_scores(mean, **asked).kept.ravel())
    kept = np.array(found)
    there = edge_mask(ranked.graph).ravel()
    counts = kept[:, there].astype(np.float32)
    shared = counts @ counts.T
    union = counts.sum(1)[:, None] + counts.sum(1) - shared
    pairs = np.where(union > 0, shared / np.maximum(union, 1), 1.0)[np.triu_indices(n_resamples, 1)]
    low, high = np.quantile(pairs, [0.025, 0.975])
    frequency = np.where(there, kept.mean(0), np.nan).reshape(ranked.kept.shape)
    to_whole = np.mean([jaccard(one, whole.kept.ravel()) for one in kept])
    names = {"source": writers(ranked.graph), "target": readers(ranked.graph)}
    return xr.Dataset(
        {"jaccard": pairs.mean(), "jaccard_low": low, "jaccard_high": high,
         "to_whole": to_whole, "empty": float((union.diagonal() == 0).mean()), "frequency": (("source", "target"), frequency)},
        coords=names,
        attrs={"method": "stability", "n_resamples": n_resamples, "resampling_seed": seed, "n_prompts": len(values),
               "n_edges": whole.n_edges, **{k: v for k, v in asked.items() if v is not None}},
    )  # fmt: skip


def stability_text(stability: xr.Dataset) -> str:
    """One line: how much circuits from resampled prompts have in common."""
    a, empty = stability.attrs, float(stability.empty)
    nothing = f"; {empty:.0%} of the resamples' circuits are empty, and those count as equal" if empty else ""
    return (
        f"{a['n_resamples']} bootstrap resamples of {a['n_prompts']} prompts: mean pairwise Jaccard "
        f"{float(stability.jaccard):.2f} (95 % of pairs {float(stability.jaccard_low):.2f} to "
        f"{float(stability.jaccard_high):.2f}); 0.8 and more is called stable{nothing}"
    )
