"""Searching by intervention: circuits whose edges were tried in the company of those that stay.

A score of one edge at a time, exact or not, says what happens when that edge alone goes. A circuit is what is left when many
go. Both searches here start from the whole model and take edges away, and every decision is a measurement:

    acdc(model, pairs, threshold=0.01)         each edge in turn, from the logits to the input (Conmy et al. 2304.14997)
    eliminate(model, pairs)                    ours: the least important third goes, the rest is measured again, and so on

ACDC decides one edge after another. Here many candidates are measured in one batch by guessing that they will all be decided
alike, and the guesses after the first wrong one are thrown away: the decisions are those of the sequential algorithm.
"""

from collections.abc import Callable

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import Evaluation
from interp.circuits.graph import Graph, edge_mask, owners, readers, writers
from interp.errors import OptionError
from interp.metrics import Metric
from interp.model.transformer import Transformer
from interp.tasks.pairs import PromptPairs

_SMALLEST, _LARGEST = 4, 256  # candidates in one batch


def acdc(
    model: Transformer, pairs: PromptPairs, *, threshold: float, metric: str | Callable | Metric = "kl_divergence",
    ablation: str = "corrupt", progress: bool = False, **options,
) -> Circuit:  # fmt: skip
    """Leave out every edge whose absence moves the model's behaviour by no more than the threshold; edges from last to first.

        loss(C) = mean over prompts of KL(model || C), or of |metric(C) - metric(model)| for any other metric
        an edge e goes for good if loss(C without e) - loss(C) <= threshold

    Components are visited from the logits to the input; of each, first what it reads from the latest writer. A component that
    nothing reads any more loses its inputs without being tried. threshold: in the metric's unit; 0 keeps exactly the edges that
    make a difference, -inf all, inf none. options: `max_memory`, `batch_size`, `reference`, `seed`; see `Evaluation`.

    The circuit's scores are the changes of loss that decided (NaN: not tried); attrs["n_measured"] counts circuits run,
    attrs["n_decided"] decisions made by measuring.
    """
    if np.isnan(threshold):
        raise OptionError("the threshold is not a number")
    evaluation = Evaluation(model, pairs, ablation=ablation, metric=metric, **options)
    graph, loss = evaluation.graph, _loss(evaluation)
    there, owner = edge_mask(graph), owners(graph)
    kept, scores = there.copy(), np.full(there.shape, np.nan)
    batch, guess, measured, decided = _SMALLEST, True, 0, 0
    with tqdm(total=int(there.sum()), desc="acdc", unit="edge", disable=not progress, leave=False) as bar:
        for stage in _stages(graph):
            alive = [target for target in stage if owner[target] < 0 or kept[owner[target]].any()]
            for target in set(stage) - set(alive):
                bar.update(int(kept[:, target].sum()))
                kept[:, target] = False
            todo = [(source, target) for target in alive for source in np.flatnonzero(kept[:, target])[::-1].tolist()]
            while todo:
                tried = todo[:batch]
                changes = _changes(loss, kept, tried, together=guess)
                gone = changes <= threshold
                n = next((i + 1 for i, went in enumerate(gone) if went != guess), len(tried))
                for place, change, went in zip(tried[:n], changes[:n], gone[:n], strict=True):
                    scores[place], kept[place] = change, not went
                measured, decided = measured + len(tried) + 1, decided + n
                # a wrong guess cost the rest of its batch; a right one earns a larger batch
                batch = min(2 * batch, _LARGEST) if n == len(tried) else max(_SMALLEST, min(2 * n, _LARGEST))
                guess, todo = bool(gone[n - 1]), todo[n:]
                bar.update(n)
    attrs = {
        **evaluation.attrs("acdc"), "threshold": threshold, "order": "logits to input, latest writer first", "helpful_sign": 1,
        "sign": "positive means that leaving the edge out moves the model away from itself", "n_measured": measured,
        "n_decided": decided,
    }  # fmt: skip
    return Circuit(graph, kept, scores, attrs)


def eliminate(
    model: Transformer, pairs: PromptPairs, *, keep: float = 0.7, metric: str | Callable | Metric = "logit_diff",
    ablation: str = "corrupt", progress: bool = False, **options,
) -> xr.DataArray:  # fmt: skip
    """Rank edges by how long they stay while the least important ones are taken away: [source, target].

    In every round each edge of the circuit that is left is taken out by itself, exactly, and the share 1 - keep that changes
    the mean metric least goes for good; dead ends change nothing and go first. The score is the edge's place in that order over
    the number of edges, last to go 1, with the sign that its absence had: as in noising, helpful edges are negative.
    Measures about 1 / (1 - keep) circuits per edge. options: see `Evaluation`.
    """
    if not 0 < keep < 1:
        raise OptionError(f"the share of edges kept in each round lies between 0 and 1, not {keep:g}")
    evaluation = Evaluation(model, pairs, ablation=ablation, metric=metric, **options)
    graph = evaluation.graph
    there = edge_mask(graph)
    kept, scores, total = there.copy(), np.full(there.shape, np.nan), int(there.sum())
    n_gone = 0
    with tqdm(total=total, desc="eliminate", unit="edge", disable=not progress, leave=False) as bar:
        while n_gone < total:
            places = [
                (source, target) for target, source in np.argwhere(kept.T).tolist()
            ]  # by target: beginnings are shared
            changes = _changes(lambda masks: evaluation(masks).circuits.mean(0), kept, places, together=False)
            n = len(places) - int(keep * len(places))
            for i in np.argsort(np.abs(changes), kind="stable")[:n]:
                n_gone += 1
                scores[places[i]] = n_gone / total * (1 if changes[i] > 0 else -1)
                kept[places[i]] = False
            bar.update(n)
    attrs = {**evaluation.attrs("eliminate"), "site": "edges", "direction": "noise", "keep": keep, "unit": "rank"}
    return xr.DataArray(scores, {"source": writers(graph), "target": readers(graph)}, ("source", "target"), attrs=attrs)


def _loss(evaluation: Evaluation) -> Callable[[Bool[np.ndarray, "circuit source target"]], np.ndarray]:
    divergence = evaluation.metric.name == "kl_divergence"

    def loss(masks: Bool[np.ndarray, "circuit source target"]) -> Float[np.ndarray, " circuit"]:
        found = evaluation(masks)
        return (found.circuits if divergence else np.abs(found.circuits - found.clean[:, None])).mean(0)

    return loss


def _changes(
    value: Callable, kept: Bool[np.ndarray, "source target"], places: list[tuple[int, int]], *, together: bool
) -> Float[np.ndarray, " place"]:
    """What leaving out each edge changes: after those before it in the list have gone, or else by itself."""
    masks = np.repeat(kept[None], len(places) + 1, 0)
    for i, place in enumerate(places, 1):
        if together:
            masks[i:, *place] = False
        else:
            masks[i, *place] = False
    values = value(masks)
    return np.diff(values) if together else values[1:] - values[0]


def _stages(graph: Graph) -> list[range]:
    """Readers that do not read one another, from the logits to the input."""
    per_layer, n_heads = 3 * graph.n_heads + 1, 3 * graph.n_heads
    stages = [range(graph.n_layers * per_layer, graph.n_layers * per_layer + 1)]
    for layer in reversed(range(graph.n_layers)):
        first = layer * per_layer
        stages += [range(first + n_heads, first + per_layer), range(first, first + n_heads)]
    return stages
