"""Is it a circuit? Faithfulness, curves over size, completeness and minimality, by intervention.

    f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing))

m is the mean metric of the clean run in which only C's edges carry it; everything else reads ablated values (see
`interp.circuits.ablations` for which). f of the whole model is 1, of no edges 0, and more than 1 or less than 0 is possible:
what is left out may work against the behaviour. Any set of edges is one forward pass (`interp.circuits.masked`).

CPR and CMD are MIB's (2504.13151): the areas under f and under |1 - f| over the share of edges kept, at ten sizes, by the
trapezoid rule on a linear axis; the first ranks edges by how much they help, the second by size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from interp.circuits.ablations import ABLATIONS, ablated_outputs
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph, edge_mask
from interp.circuits.masked import MaskedRuns
from interp.circuits.optimal import optimal_outputs
from interp.directions import metric_attrs
from interp.errors import OptionError, SiteError, one_of
from interp.exact import Reader
from interp.metrics import Metric, get_metric
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.provenance import provenance
from interp.statistics import bootstrap_ratio
from interp.tasks.pairs import PromptPairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_BATCH = 64  # circuits between two steps of a progress bar


@dataclass(frozen=True)
class Measured:
    """The metric of circuits, of the whole model and of no edges at all: per prompt."""

    circuits: Float[np.ndarray, "prompt circuit"]
    clean: Float[np.ndarray, " prompt"]
    empty: Float[np.ndarray, " prompt"]

    def faithfulness(self, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[circuit]: f, and the ends of its 95 % bootstrap interval over prompts."""
        return bootstrap_ratio(self.circuits - self.empty[:, None], self.clean - self.empty, seed=seed)


class Evaluation:
    """Measures any number of circuits of one model on some pairs; what is asked of all of them is said once.

    ablation: what everything outside a circuit puts out, see `interp.circuits.ablations`. reference: the pairs that means and
    optimal constants come from (default: the same). metric, max_memory, batch_size: as everywhere.
    """

    def __init__(
        self, model: Transformer, pairs: PromptPairs, *, ablation: str = "corrupt", reference: PromptPairs | None = None,
        metric: str | Callable | Metric = "logit_diff", max_memory: int | None = None, batch_size: int | None = None,
        seed: int = 0, progress: bool = False,
    ):  # fmt: skip
        canonical(model, "measuring a circuit")
        self.ablation = one_of(ablation, ABLATIONS, "ablation")
        self.model, self.pairs, self.metric, self.graph = model, pairs, get_metric(metric), Graph.of(model.cfg)
        self.seed, self.progress, self.reference = seed, progress, pairs if reference is None else reference
        self.max_memory, self.batches = max_memory, pairs.chunks(batch_size)
        self._runs: list[MaskedRuns] = []
        self._readers: list[Reader] = []
        self._ends: dict[str, np.ndarray] = {}

    def attrs(self, method: str) -> dict:
        """How it was measured."""
        return {
            "method": method, "ablation": self.ablation, **metric_attrs([self.metric], "noise"), **self.graph.attrs(),
            **provenance(self.model, self.pairs),
        }  # fmt: skip

    def __call__(self, masks: Bool[np.ndarray, "circuit source target"]) -> Measured:
        """The metric of every mask's edges."""
        masks = np.asarray(masks, bool)
        there = edge_mask(self.graph)
        if masks.shape[1:] != there.shape:
            raise SiteError(f"masks of {masks.shape[1:]} do not fit {self.graph.name}'s graph of {there.shape}")
        if not self._runs or self.ablation == "optimal":
            self._begin(masks)
        values = np.concatenate([self._metric(i, masks & there) for i in range(len(self.batches))])
        return Measured(values, self._ends["clean"], self._ends["empty"])

    def f(self, masks: Bool[np.ndarray, "circuit source target"]) -> Float[np.ndarray, " circuit"]:
        """Faithfulness of every mask, without intervals."""
        measured = self(masks)
        return (measured.circuits - measured.empty[:, None]).mean(0) / (measured.clean - measured.empty).mean()

    def _begin(self, masks: np.ndarray) -> None:
        """Both ends of the scale."""
        model = self.model
        if self.ablation == "optimal":
            constants = optimal_outputs(model, self.reference, masks, seed=self.seed, progress=self.progress)
            ablated = [constants] * len(self.batches)
        else:
            ablated = [ablated_outputs(model, b, self.ablation, reference=self.reference) for b in self.batches]
        if self._runs:
            self._runs = [runs.with_ablated(values) for runs, values in zip(self._runs, ablated, strict=True)]
        else:
            both = zip(self.batches, ablated, strict=True)
            self._runs = [MaskedRuns(model, batch, values, max_memory=self.max_memory) for batch, values in both]
        first, self._readers, ends = 0, [], {"clean": [], "empty": []}
        for runs in self._runs:
            reader = Reader(runs.pairs, [self.metric], model, first=first)
            empty = runs.run(torch.zeros(1, *masks.shape[1:], dtype=torch.bool, device=runs.clean_final.device))[0]
            both = reader.unpatched({"clean": runs.clean_final, "corrupt": empty})
            ends["clean"].append(both["clean"][0].numpy())
            ends["empty"].append(both["corrupt"][0].numpy())
            self._readers.append(reader)
            first += len(runs.pairs)
        self._ends = {name: np.concatenate(parts).astype(np.float64) for name, parts in ends.items()}

    def _metric(self, batch: int, masks: np.ndarray) -> Float[np.ndarray, "prompt circuit"]:
        runs, reader = self._runs[batch], self._readers[batch]
        device = runs.clean_final.device
        prompts, columns = torch.arange(len(runs.pairs), device=device), []
        with tqdm(total=len(masks), desc="circuits", unit="circuit", disable=not self.progress, leave=False) as bar:
            for part in np.array_split(masks, max(1, -(-len(masks) // _BATCH))):
                final = runs.run(torch.from_numpy(part).to(device))
                found = reader.rows(final.flatten(0, 1), prompts.repeat(len(part)))[0]
                columns.append(found.unflatten(0, (len(part), -1)).T.double().numpy())
                bar.update(len(part))
        return np.concatenate(columns, 1)


def faithfulness(
    model: Transformer, pairs: PromptPairs, circuits: Circuit | Sequence[Circuit], *, ablation: str = "corrupt",
    seed: int = 0, **options,
) -> xr.Dataset:  # fmt: skip
    """f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing)) of one or several circuits, with everything outside ablated.

    Returns a Dataset over `circuit`: faithfulness, low, high (95 % bootstrap over prompts), value [prompt, circuit] in the
    metric's unit, n_edges; metric_clean and metric_empty [prompt]. options: see `Evaluation`.
    """
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not circuits:
        raise OptionError("no circuits to measure")
    evaluation = Evaluation(model, pairs, ablation=ablation, seed=seed, **options)
    for circuit in circuits:
        _fits(circuit, evaluation.graph)
    measured = evaluation(np.stack([circuit.kept for circuit in circuits]))
    f, low, high = measured.faithfulness(seed=seed)
    return xr.Dataset(
        {"faithfulness": ("circuit", f), "low": ("circuit", low), "high": ("circuit", high),
         "value": (("prompt", "circuit"), measured.circuits), "n_edges": ("circuit", [c.n_edges for c in circuits]),
         "metric_clean": ("prompt", measured.clean), "metric_empty": ("prompt", measured.empty)},
        coords={"prompt": range(len(pairs))}, attrs=evaluation.attrs("faithfulness"),
    )  # fmt: skip


def faithfulness_curve(
    model: Transformer, pairs: PromptPairs, scores: xr.DataArray | Circuit, *,
    fractions: Sequence[float] = MIB_FRACTIONS, search: str = "top", prune: bool = True, ablation: str = "corrupt",
    seed: int = 0, **options,
) -> xr.Dataset:  # fmt: skip
    """Faithfulness at growing sizes, CPR and CMD.

    scores: of edges, as `edge_scores` gives them, or a Circuit with scores (a loaded file). Edges are ranked by how much they
    help ("value", for CPR) and by size ("size", for CMD); a size is floor(fraction * edges of the model) before pruning.
    Returns a Dataset over `by` and `fraction`: faithfulness, low, high, n_edges (asked for), n_kept (after pruning); and cpr,
    cmd, with cpr_log and cmd_log beside them: the same areas, with the logarithm of the fraction as axis, over its range.
    """
    evaluation = Evaluation(model, pairs, ablation=ablation, seed=seed, **options)
    ranked = scores if isinstance(scores, Circuit) else Circuit.ranked(scores)
    _fits(ranked, evaluation.graph)
    total, sizes = int(edge_mask(ranked.graph).sum()), sorted(set(fractions))
    if not sizes:
        raise OptionError("no sizes to measure")
    if bad := [k for k in sizes if not 0 <= k <= 1]:
        raise OptionError(f"a share of the edges lies between 0 and 1, not {bad[0]}")
    scored = len(ranked.order("size"))
    counts = [nominal_size(k, total) for k in sizes]
    circuits = [
        ranked.top(min(n, scored), by=by, search=search, prune=prune) for by in ("value", "size") for n in counts
    ]
    measured = evaluation(np.stack([c.kept for c in circuits]))
    shape = (2, len(sizes))
    f, low, high = (x.reshape(shape) for x in measured.faithfulness(seed=seed))
    k = np.array(sizes)
    areas = {"cpr": np.trapezoid(f[0], k), "cmd": np.trapezoid(np.abs(1 - f[1]), k)}
    if len(sizes) > 1 and k[0] > 0:
        span = np.log(k[-1] / k[0])
        areas |= {"cpr_log": np.trapezoid(f[0], np.log(k)) / span,
                  "cmd_log": np.trapezoid(np.abs(1 - f[1]), np.log(k)) / span}  # fmt: skip
    axes = ("by", "fraction")
    return xr.Dataset(
        {"faithfulness": (axes, f), "low": (axes, low), "high": (axes, high),
         "n_edges": ("fraction", counts), "n_kept": (axes, np.reshape([c.n_edges for c in circuits], shape)), **areas},
        coords={"by": ["value", "size"], "fraction": sizes},
        attrs={**evaluation.attrs("faithfulness_curve"), "scored_by": str(ranked.attrs.get("method", "a file")),
               "rules": str(ranked.attrs.get("rules", "")), "search": search, "pruned": int(prune)},
    )  # fmt: skip


def nominal_size(fraction: float, total: int) -> int:
    """floor(fraction * total), as MIB counts the edges of a size before pruning."""
    return int(np.floor(fraction * total + 1e-9))  # 0.29 * 100 is a little less than 29


def smallest_circuit(
    model: Transformer, pairs: PromptPairs, scores: xr.DataArray | Circuit, *, target: float = 0.9, by: str = "size",
    search: str = "top", prune: bool = True, ablation: str = "corrupt", **options,
) -> tuple[Circuit, float]:  # fmt: skip
    """The first circuit of a ranking whose faithfulness reaches the target, and that faithfulness.

    Sizes grow by a fifth until one reaches it; the gap below is then searched, several sizes at once. A curve is not always
    monotonic: a smaller size between two that were tried may reach the target as well. `OptionError` if none does.
    """
    evaluation = Evaluation(model, pairs, ablation=ablation, **options)
    ranked = scores if isinstance(scores, Circuit) else Circuit.ranked(scores)
    _fits(ranked, evaluation.graph)
    scored = len(ranked.order("size"))
    if not scored:
        raise OptionError("these scores rank no edge")
    if not target > 0:
        raise OptionError(f"the faithfulness to reach lies above 0, not at {target:g}: no edges at all have 0")

    def measure(sizes: list[int]) -> list[tuple[Circuit, float]]:
        circuits = [ranked.top(n, by=by, search=search, prune=prune) for n in sizes]
        return list(zip(circuits, evaluation.f(np.stack([c.kept for c in circuits])).tolist(), strict=True))

    low, found = 0, None
    grid = np.unique(np.append(np.ceil(1.2 ** np.arange(np.log(scored) / np.log(1.2))).astype(int), scored)).tolist()
    for start in range(0, len(grid), 8):
        sizes = grid[start : start + 8]
        for n, (circuit, f) in zip(sizes, measure(sizes), strict=True):
            if f >= target:
                found, high = (circuit, f), n
                break
            low = n
        if found:
            break
    if found is None:
        raise OptionError(f"no circuit of this ranking reaches a faithfulness of {target:g}, not even all its edges")
    while high - low > 1:
        sizes = np.unique(np.linspace(low, high, 10).round().astype(int))[1:-1].tolist()
        reached = [(n, *m) for n, m in zip(sizes, measure(sizes), strict=True) if m[1] >= target]
        if reached:
            high, found = reached[0][0], reached[0][1:]
        low = max([n for n in sizes if n < high], default=low)
    return found


def completeness(
    model: Transformer, pairs: PromptPairs, circuit: Circuit, *, n_subsets: int = 20, ablation: str = "corrupt",
    seed: int = 0, **options,
) -> xr.Dataset:  # fmt: skip
    """Has the circuit everything? Two answers, each 0 at best.

    complement: f of the model without the circuit's edges (Marks et al. 2403.19647): what still works without it.
    incompleteness: |f(C without K) - f(model without K)| for random sets K of the circuit's components (Wang et al.
        2211.00593), their outgoing edges removed from both: [subset], with both faithfulnesses beside it.
    """
    evaluation = Evaluation(model, pairs, ablation=ablation, seed=seed, **options)
    _fits(circuit, evaluation.graph)
    there, draw = edge_mask(circuit.graph), np.random.default_rng(seed)
    members = np.flatnonzero(circuit.has_node[:-1])
    knocked = draw.random((n_subsets, len(members))) < draw.random((n_subsets, 1))
    without = np.ones((n_subsets, len(there), 1), bool)
    for subset, chosen in zip(without, knocked, strict=True):
        subset[members[chosen]] = False
    f = evaluation.f(np.concatenate([(there & ~circuit.kept)[None], circuit.kept & without, there & without]))
    ours, whole = f[1 : 1 + n_subsets], f[1 + n_subsets :]
    return xr.Dataset(
        {"complement": f[0], "circuit": ("subset", ours), "model": ("subset", whole),
         "incompleteness": ("subset", np.abs(ours - whole)), "n_knocked": ("subset", knocked.sum(1))},
        attrs=evaluation.attrs("completeness"),
    )  # fmt: skip


def minimality(
    model: Transformer, pairs: PromptPairs, circuit: Circuit, *, ablation: str = "corrupt", **options
) -> xr.DataArray:
    """Does every edge count? f(C) - f(C without that edge): [edge]; near 0 means that C does as well without it."""
    evaluation = Evaluation(model, pairs, ablation=ablation, **options)
    _fits(circuit, evaluation.graph)
    targets, sources = circuit.kept.T.nonzero()
    masks = np.repeat(circuit.kept[None], len(sources) + 1, 0)
    masks[np.arange(len(sources)), sources, targets] = False
    f = evaluation.f(masks)
    return xr.DataArray(
        f[-1] - f[:-1],
        {"edge": circuit.edges},
        ("edge",),
        attrs={**evaluation.attrs("minimality"), "whole": float(f[-1])},
    )


def check_sign(
    model: Transformer, pairs: PromptPairs, circuit: Circuit, *, fraction: float = 0.02, **options
) -> Circuit:
    """The same circuit, knowing which sign of its scores helps: the one whose largest edges are the more faithful circuit.

    fraction: of the scored edges; doubled until the two circuits differ in faithfulness by more than 0.001. `OptionError` if
    they never do.
    """
    evaluation = Evaluation(model, pairs, **options)
    _fits(circuit, evaluation.graph)
    scored = len(circuit.order("size"))
    either = [circuit.with_attrs(helpful_sign=sign) for sign in (1, -1)]
    n = max(1, int(fraction * scored))
    while n < scored:
        positive, negative = evaluation.f(np.stack([one.top(n, by="value").kept for one in either]))
        if abs(positive - negative) > 1e-3:
            return either[int(negative > positive)]
        n = 2 * n
    raise OptionError("neither sign of these scores gives the more faithful circuits: they do not tell what helps")


def _fits(circuit: Circuit, graph: Graph) -> None:
    if not circuit.graph.like(graph):
        raise SiteError(
            f"a circuit of {circuit.graph.n_layers} layers of {circuit.graph.n_heads} heads"
            f"{', in parallel' if circuit.graph.parallel else ''} is none of {graph.name}'s"
        )
