"""The model as a graph: who writes to the residual stream, who reads from it, and which edges there are.

Ids are EAP-IG's and MIB's. Writers are `input`, `a3.h2` and `m5`; readers are the three inputs of each head `a3.h2<q>`,
`<k>`, `<v>`, each MLP `m5`, and `logits`; an edge is `a3.h2->a5.h1<q>`. A reader sees everything written before it. Keys
and values have a reader per *query* head, also where heads share them, as is the custom.

    edges = sum over layers l of 3H (1 + l(H+1)) + (1 + l(H+1)) + (0 if parallel else H), plus 1 + L(H+1) into the logits
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from interp.errors import SiteError, name_some
from interp.model.config import ModelConfig
from interp.sites import component_nodes


@dataclass(frozen=True)
class Graph:
    """What the graph of a model depends on; enough to read and write circuits without the model."""

    n_layers: int
    n_heads: int
    parallel: bool = False
    d_model: int = 0
    name: str = "model"

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Graph":
        """The graph of a model."""
        return cls(cfg.n_layers, cfg.n_heads, cfg.parallel, cfg.d_model, cfg.name)

    def like(self, other: "Graph") -> bool:
        """Whether the two have the same edges, under whatever names."""
        return (self.n_layers, self.n_heads, self.parallel) == (other.n_layers, other.n_heads, other.parallel)

    def attrs(self) -> dict[str, int]:
        """As attributes of scores, from which `from_attrs` makes it again."""
        return {name: int(value) for name, value in asdict(self).items() if name != "name"}

    @classmethod
    def from_attrs(cls, attrs: Mapping) -> "Graph":
        """The graph that scores belong to; `SiteError` if they are not scores of edges or nodes."""
        if lacking := [name for name in ("n_layers", "n_heads", "parallel", "d_model") if name not in attrs]:
            raise SiteError(f"these are not scores of edges or nodes: their attributes lack {', '.join(lacking)}")
        sizes = {name: int(attrs[name]) for name in ("n_layers", "n_heads", "d_model")}
        return cls(**sizes, parallel=bool(attrs["parallel"]), name=str(attrs.get("model", "model")))


def writers(cfg: ModelConfig | Graph) -> list[str]:
    """Sources of edges in the order of the forward pass: the input, then each layer's heads and its MLP."""
    return ["input", *map(str, component_nodes(cfg))]


def readers(cfg: ModelConfig | Graph) -> list[str]:
    """Targets of edges: per layer all queries, all keys, all values, the MLP; then the logits."""
    return [
        *(
            target
            for layer in range(cfg.n_layers)
            for target in (*(f"a{layer}.h{h}<{x}>" for x in "qkv" for h in range(cfg.n_heads)), f"m{layer}")
        ),
        "logits",
    ]


def edge_mask(cfg: ModelConfig | Graph) -> np.ndarray:
    """[source, target]: whether the model has that edge."""
    heads, per_layer = cfg.n_heads, cfg.n_heads + 1
    n_writers, n_readers = 1 + cfg.n_layers * per_layer, cfg.n_layers * (3 * heads + 1) + 1
    mask = np.zeros((n_writers, n_readers), dtype=bool)
    for layer in range(cfg.n_layers):
        seen, first = 1 + layer * per_layer, layer * (3 * heads + 1)
        mask[:seen, first : first + 3 * heads] = True
        mask[: seen + (0 if cfg.parallel else heads), first + 3 * heads] = True
    mask[:, -1] = True
    return mask


def select_edges(cfg: ModelConfig | Graph, edges: Sequence[str]) -> np.ndarray:
    """[source, target]: the named edges; `SiteError` naming those that the model does not have."""
    sources, targets = ({name: i for i, name in enumerate(names)} for names in (writers(cfg), readers(cfg)))
    there, chosen = edge_mask(cfg), np.zeros((len(sources), len(targets)), dtype=bool)
    strange = []
    for edge in edges:
        source, _, target = edge.partition("->")
        place = sources.get(source, -1), targets.get(target, -1)
        if min(place) < 0 or not there[place]:
            strange.append(edge)
        else:
            chosen[place] = True
    if strange:
        raise SiteError(
            f"{cfg.name} has no edge {name_some(strange)}: write a0.h1->m2, m0->a1.h2<q>, input->a0.h0<v> or m3->logits, "
            "from an earlier component to a later one"
        )
    return chosen


@lru_cache(maxsize=32)
def owners(graph: Graph) -> np.ndarray:
    """[target]: the writer that each reader belongs to, by its index; -1 of the logits."""
    index = {name: i for i, name in enumerate(writers(graph))}
    return np.array([index[target.partition("<")[0]] if target != "logits" else -1 for target in readers(graph)])
