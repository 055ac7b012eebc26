"""A circuit: some edges of a model's graph, the scores they were chosen by, and where those came from.

    scores = edge_patching(model, pairs)                    # or edge_scores(...)
    circuit = Circuit.from_scores(scores, n_edges=50)       # the 50 largest by size, then without dead ends
    circuit.edges, circuit.nodes                            # MIB's ids
    circuit.save("ioi.json"); Circuit.load("ioi.json")      # EAP-IG's and MIB's file format

A circuit is a value: every method that changes it returns another one. Pruning repeats until nothing changes: a component
without a kept edge into it or out of it goes, and with it its edges. The input needs nothing into it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from interp.circuits.graph import Graph, edge_mask, owners, readers, select_edges, writers
from interp.errors import OptionError, SiteError, name_some, one_of

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import plotly.graph_objects as go

BY = ("size", "value")
SEARCHES = ("top", "greedy")


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept edges [source, target] of a graph, with scores (NaN: not scored) and the attributes of those scores."""

    graph: Graph
    kept: Bool[np.ndarray, "source target"]
    scores: Float[np.ndarray, "source target"] | None = None
    attrs: Mapping[str, object] = field(default_factory=dict)
    about_nodes: Mapping[str, Mapping] = field(default_factory=dict)  # what a file says of nodes beside membership

    def __post_init__(self) -> None:
        there = edge_mask(self.graph)
        for name in ("kept", "scores"):
            value = getattr(self, name)
            if value is not None and value.shape != there.shape:
                raise SiteError(
                    f"{name} of shape {value.shape} do not fit a graph of {there.shape[0]} writers x {there.shape[1]} readers"
                )
        if (self.kept & ~there).any():
            raise SiteError(f"{self.graph.name} has no edge {_names(self.graph, self.kept & ~there)[0]}")

    # -------------------------------------------------------------------------------------------------- making one

    @classmethod
    def full(cls, graph: Graph) -> "Circuit":
        """The whole model."""
        return cls(graph, edge_mask(graph))

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[str]) -> "Circuit":
        """The named edges; `SiteError` naming those the graph does not have."""
        return cls(graph, select_edges(graph, list(edges)))

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Iterable[str]) -> "Circuit":
        """Everything that the named heads, MLPs and input write is read by all: MIB's node circuits."""
        index, kept = {name: i for i, name in enumerate(writers(graph))}, np.zeros_like(edge_mask(graph))
        nodes = list(nodes)
        if strange := [node for node in nodes if node not in index]:
            raise SiteError(f"{graph.name} has no component {name_some(strange)}: write a3.h2, m5 or input")
        rows = [index[node] for node in nodes]
        kept[rows] = edge_mask(graph)[rows]
        return cls(graph, kept)

    @classmethod
    def from_scores(
        cls, scores: xr.DataArray, *, n_edges: int | None = None, threshold: float | None = None,
        by: Literal["size", "value"] = "size", search: Literal["top", "greedy"] = "top", prune: bool = True,
    ) -> "Circuit":  # fmt: skip
        """The n largest edges, or all above a threshold, of scores [source, target] or [prompt, source, target] (their mean).

        by: "size" ranks by |score|; "value" by how much an edge helps (the score, or minus the score of noising).
        search: "greedy" starts at the logits and always takes the best edge into a component that is in already, so that
            every component reaches the logits; n_edges are then those taken.
        prune: take dead ends away afterwards. The number of edges asked for is the number before that.
        """
        return cls.ranked(scores).top(n_edges, threshold=threshold, by=by, search=search, prune=prune)

    @classmethod
    def ranked(cls, scores: xr.DataArray) -> "Circuit":
        """All scored edges, with the mean of their scores over prompts: what circuits of any size are cut from."""
        if {*scores.dims} - {"prompt"} != {"source", "target"}:
            raise SiteError(
                f"scores of edges have axes source and target, perhaps prompt, not {', '.join(map(str, scores.dims))}"
            )
        graph = Graph.from_attrs(scores.attrs)
        mean = scores.mean("prompt") if "prompt" in scores.dims else scores
        values = np.full(edge_mask(graph).shape, np.nan)
        rows, columns = (
            _places(names(graph), mean[axis].values, axis) for names, axis in ((writers, "source"), (readers, "target"))
        )
        values[np.ix_(rows, columns)] = mean.transpose("source", "target").values
        values[~edge_mask(graph)] = np.nan
        if np.isinf(values).any():
            raise SiteError(f"the score of {_names(graph, np.isinf(values))[0]} is infinite")
        return cls(graph, np.isfinite(values), values, dict(scores.attrs))

    # ------------------------------------------------------------------------------------------------ what is in it

    @property
    def edges(self) -> list[str]:
        """Ids of the kept edges, by target, then source, in forward order."""
        return _names(self.graph, self.kept)

    @property
    def nodes(self) -> list[str]:
        """Components at either end of a kept edge, in forward order, the logits last."""
        return [name for name, there in zip([*writers(self.graph), "logits"], self.has_node, strict=True) if there]

    @property
    def n_edges(self) -> int:
        """How many edges are kept."""
        return int(self.kept.sum())

    @property
    def has_node(self) -> Bool[np.ndarray, " node"]:
        """[node]: whether each writer, and last the logits, has a kept edge. The logits are always there."""
        there = np.append(self.kept.any(1), True)
        there[owners(self.graph)[self.kept.any(0)]] = True
        return there

    @property
    def helpful_sign(self) -> int:
        """+1 where a positive score means that the clean value of an edge helps, -1 where a negative one does.

        Scores of noising are effects of corrupting, so helpful edges are negative. `OptionError` if nobody knows: files say
        nothing about it; `interp.circuits.evaluate.check_sign` finds out with a model.
        """
        if "helpful_sign" in self.attrs:
            return int(self.attrs["helpful_sign"])
        if "direction" in self.attrs:
            return -1 if self.attrs["direction"] == "noise" else 1
        raise OptionError("it is not known which sign of these scores helps: run check_sign, or rank by size")

    def importance(self, by: Literal["size", "value"] = "size") -> Float[np.ndarray, "source target"]:
        """What edges are ranked by: |score|, or the score with helpful edges positive."""
        if self.scores is None:
            raise OptionError("this circuit has no scores")
        return np.abs(self.scores) if by == "size" else self.scores * self.helpful_sign

    def order(self, by: Literal["size", "value"] = "size") -> np.ndarray:
        """Flat indices of the scored edges, most important first; of equals, the earlier in forward order."""
        importance = self.importance(by).ravel()
        scored = np.flatnonzero(np.isfinite(importance))
        return scored[np.argsort(-importance[scored], kind="stable")]

    def table(self) -> "pd.DataFrame":
        """One row per kept edge, largest score first: edge, source, target, score."""
        import pandas as pd

        rows, columns = np.nonzero(self.kept)
        names = np.array(writers(self.graph))[rows], np.array(readers(self.graph))[columns]
        scores = np.full(len(rows), np.nan) if self.scores is None else self.scores[rows, columns]
        table = pd.DataFrame({"edge": [f"{u}->{v}" for u, v in zip(*names, strict=True)],
                              "source": names[0], "target": names[1], "score": scores})  # fmt: skip
        return table.sort_values("score", key=lambda c: -c.abs(), kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        return (
            f"Circuit({self.graph.name}: {self.n_edges:,} of {int(edge_mask(self.graph).sum()):,} edges, "
            f"{len(self.nodes)} nodes)"
        )

    def __eq__(self, other: object) -> bool:
        """The same edges of the same graph, whatever the scores."""
        return isinstance(other, Circuit) and self.graph.like(other.graph) and bool((self.kept == other.kept).all())

    __hash__ = None

    # ---------------------------------------------------------------------------------------------------- changing it

    def with_edges(self, kept: Bool[np.ndarray, "source target"]) -> "Circuit":
        """The same scores with other edges kept."""
        return replace(self, kept=np.asarray(kept, bool))

    def with_attrs(self, **attrs: object) -> "Circuit":
        """The same edges and scores with more said about them."""
        return replace(self, attrs={**self.attrs, **attrs})

    def top(
        self, n_edges: int | None = None, *, threshold: float | None = None, by: Literal["size", "value"] = "size",
        search: Literal["top", "greedy"] = "top", prune: bool = True,
    ) -> "Circuit":  # fmt: skip
        """The best of all scored edges, whichever are kept here: see `from_scores`."""
        one_of(by, BY, "ranking")
        one_of(search, SEARCHES, "search")
        if (n_edges is None) == (threshold is None):
            raise OptionError("say how many edges to keep, or above which threshold: n_edges or threshold")
        if threshold is not None and np.isnan(threshold):
            raise OptionError("the threshold is not a number")
        importance = self.importance(by)
        scored = int(np.isfinite(importance).sum())
        if n_edges is not None and not (isinstance(n_edges, int | np.integer) and 0 <= n_edges <= scored):
            raise OptionError(f"cannot keep {n_edges} of {scored} scored edges")
        if search == "greedy":
            kept = _greedy(self.graph, importance, scored if n_edges is None else n_edges, threshold)
        elif n_edges is not None:
            kept = np.zeros_like(self.kept)
            kept.flat[self.order(by)[:n_edges]] = True
        else:
            kept = np.nan_to_num(importance, nan=-np.inf) > threshold
        asked = {"n_edges": n_edges} if n_edges is not None else {"threshold": threshold}
        chosen = self.with_edges(kept).with_attrs(**asked, ranked_by=by, search=search)
        return chosen.pruned() if prune else chosen

    def pruned(self) -> "Circuit":
        """Without dead ends: components that nothing reaches, or that reach nothing, and their edges."""
        return replace(self, kept=prune(self.graph, self.kept))

    # -------------------------------------------------------------------------------------------------- leaving here

    def save(self, path: str | Path) -> Path:
        """Write EAP-IG's and MIB's JSON, or GraphML by its ending; see `interp.circuits.export`."""
        from interp.circuits.export import save_circuit

        return save_circuit(self, path)

    @staticmethod
    def load(path: str | Path) -> "Circuit":
        """Read EAP-IG's and MIB's JSON."""
        from interp.circuits.export import read_circuit

        return Circuit(**read_circuit(path))

    def to_networkx(self) -> "nx.MultiDiGraph":
        """The kept edges as a networkx graph; see `interp.circuits.export`."""
        from interp.circuits.export import to_networkx

        return to_networkx(self)

    def draw(self, **options) -> "go.Figure":
        """Components by layer, edges as wide as their scores; see `interp.circuits.drawing`."""
        from interp.circuits.drawing import draw_circuit

        return draw_circuit(self, **options)


def prune(graph: Graph, kept: Bool[np.ndarray, "source target"]) -> Bool[np.ndarray, "source target"]:
    """The edges that lie on a path from the input to the logits, found by dropping dead ends until there are none."""
    owner, kept = owners(graph), kept.copy()
    while True:
        fed = np.zeros(len(kept), bool)
        fed[owner[:-1][kept[:, :-1].any(0)]] = True
        fed[0] = True
        alive = fed & kept.any(1)
        into = np.append(alive[owner[:-1]], True)
        smaller = kept & alive[:, None] & into
        if (smaller == kept).all():
            return kept
        kept = smaller


def _greedy(
    graph: Graph, importance: Float[np.ndarray, "source target"], n: int, threshold: float | None
) -> Bool[np.ndarray, "source target"]:
    """From the logits upstream: the best edge into a component that is in already, again and again."""
    owner = owners(graph)
    readers_of = [np.flatnonzero(owner == writer).tolist() for writer in range(len(importance))]
    kept, seen = np.zeros(importance.shape, bool), np.zeros(len(importance), bool)
    heap: list[tuple[float, int, int]] = []

    def open_up(targets: list[int]) -> None:
        for target in targets:
            for source in np.flatnonzero(np.isfinite(importance[:, target])):
                heappush(heap, (-importance[source, target], int(source), int(target)))

    open_up([importance.shape[1] - 1])
    while heap and n > 0:
        worth, source, target = heappop(heap)
        if threshold is not None and -worth <= threshold:
            break
        kept[source, target] = True
        n -= 1
        if not seen[source]:
            seen[source] = True
            open_up(readers_of[source])
    return kept


def _names(graph: Graph, kept: Bool[np.ndarray, "source target"]) -> list[str]:
    sources, targets = writers(graph), readers(graph)
    return [f"{sources[u]}->{targets[v]}" for v, u in zip(*kept.T.nonzero(), strict=True)]


def _places(names: list[str], wanted: np.ndarray, axis: str) -> list[int]:
    index = {name: i for i, name in enumerate(names)}
    if strange := [str(name) for name in wanted if str(name) not in index]:
        raise SiteError(f"scores name a {axis} that the graph does not have: {name_some(strange)}")
    if len(set(wanted)) < len(wanted):
        raise SiteError(f"scores name a {axis} twice")
    return [index[str(name)] for name in wanted]
