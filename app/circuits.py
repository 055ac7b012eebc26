"""The circuit page's numbers and its graph: edges by the share of influence that they hold, and what an ablation of some does.

Of the scored edges, sorted by |score|, the page shows the fewest whose sizes add up to a share of all,

    n(share) = min n:  |s_1| + ... + |s_n| >= share * sum_i |s_i|

without those that lie on no path from the input to the logits. Components stand at fixed places, a row for each layer and a
column for each head, MLPs at the right, so that the eye finds them again at another share. A browser draws at most `MAX_NODES`
and `MAX_EDGES`.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from app import jobs
from app.behaviour import Behaviour
from app.charts import heatmap
from app.compute import cached
from app.locked import locked_model
from app.selection import clicked
from interp import Circuit, direct_logit_attribution, direction_effects, edge_scores, faithfulness, faithfulness_curve
from interp.circuits.ablations import ABLATIONS
from interp.circuits.graph import Graph, edge_mask, owners, readers, select_edges, writers
from interp.errors import OptionError, SiteError
from interp.jobs.spec import Job
from interp.model.run import record
from interp.model.transformer import Transformer
from interp.plots import GREY, INK, LOWERS, RAISES, SCALE
from interp.sites import SITES, parse_node

METHODS = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact")  # the last may take minutes: a job's work
QUICK_ABLATIONS = tuple(name for name in ABLATIONS if name != "optimal")  # optimal constants are found by training
MAX_NODES, MAX_EDGES = 1_000, 10_000
GROUP_COLOURS = (
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
    "#d55e00",
)  # Okabe and Ito's, without what is near SELECTED
SELECTED = "#ff9500"
LIGHT, DARK = (RAISES, LOWERS), (SCALE[3][1], SCALE[1][1])  # raises, lowers
_FILLS = {"head": "#dce8f5", "mlp": "#f6d5cf", "input": "#fff1c2", "logits": "#fff1c2"}
_COLUMN, _TALL = 52.0, 1.05  # units from head to head; height over width, near that of the panel
_CURVES = {"q": 0.12, "k": 0.04, "v": -0.12}  # a head's three readers are one node here: their edges part sideways
_BUSY = 1_500  # edges from which arrows and fading at the pointer are left out


# ------------------------------------------------------------------------------------------------------ what is asked


@cached
def mean_scores(behaviour: Behaviour, method: str, rules: str, metric: str) -> xr.DataArray:
    """Scores of all edges, the mean over the pairs: [source, target]. Exact ones are `exact_job`'s, which has to be done."""
    if method == "exact":
        return jobs.result(exact_job(behaviour, metric).id).mean("prompt", keep_attrs=True)
    with locked_model(behaviour.model).use() as model:
        scores = edge_scores(model, behaviour.pairs(model), method=method, rules=rules, metric=metric)
        return scores.mean("prompt", keep_attrs=True)


def exact_job(behaviour: Behaviour, metric: str) -> Job:
    """The job that patches every edge."""
    return jobs.job_of(behaviour, "edges", metric=metric)


def circuit_of(behaviour: Behaviour, method: str, rules: str, metric: str, share: float) -> Circuit:
    """The circuit that holds a share of the influence."""
    return by_influence(Circuit.ranked(mean_scores(behaviour, method, rules, metric)), share)


@cached
def measured(
    behaviour: Behaviour, method: str, rules: str, metric: str, share: float, chosen: tuple[str, ...], ablation: str
) -> xr.Dataset:
    """`interp.faithfulness` of three circuits: the shown one; the model and the shown one without the chosen nodes and edges."""
    circuit = circuit_of(behaviour, method, rules, metric, share)
    three = [circuit, without(Circuit.full(circuit.graph), chosen), without(circuit, chosen)]
    with locked_model(behaviour.model).use() as model:
        found = faithfulness(model, behaviour.pairs(model), three, ablation=ablation, metric=metric)
        return found.assign_coords(circuit=["circuit", "model without", "circuit without"])


@cached
def curve(behaviour: Behaviour, method: str, rules: str, metric: str, ablation: str) -> xr.Dataset:
    """`interp.faithfulness_curve` of the scores, at MIB's ten sizes."""
    scores = mean_scores(behaviour, method, rules, metric)
    with locked_model(behaviour.model).use() as model:
        return faithfulness_curve(model, behaviour.pairs(model), scores, metric=metric, ablation=ablation)


@cached
def logit_shares(behaviour: Behaviour, metric: str) -> pd.Series:
    """Direct logit attribution of every node in the clean run, the mean over the pairs. `MetricError` for metrics not linear."""
    with locked_model(behaviour.model).use() as model:
        return direct_logit_attribution(model, behaviour.pairs(model), metric=metric).mean("prompt").to_series()


@cached
def node_tokens(behaviour: Behaviour, node: str, k: int = 8) -> pd.DataFrame:
    """The tokens that a node's mean output, clean less corrupt at the position that is read, raises and lowers most.

    Read straight through the final norm and the unembedding (`interp.direction_effects`): what later layers make of it is not
    seen.
    """
    with locked_model(behaviour.model).use() as model:
        pairs = behaviour.pairs(model)
        hook, index = _output(node, model)
        rows = torch.arange(len(pairs), device=pairs.clean.device)
        clean, corrupt = (record(model, pairs.tokens(s), [hook], pairs.hooks(s))[hook] for s in ("clean", "corrupt"))
        difference = (clean - corrupt)[rows, pairs.read_at].float().mean(0)
        if index is not None:
            only = torch.zeros_like(difference)
            only[index] = difference[index]
            difference = only
        return direction_effects(model, hook, difference.reshape(1, -1), k=min(k, model.cfg.d_vocab))


def _output(node: str, model: Transformer) -> tuple[str, int | None]:
    """(the hook where a component's output is seen, its head there)."""
    found = parse_node(node, model.cfg)
    if found.kind == "head":
        return SITES["head"].hook(found.layer), found.index
    if found.kind == "mlp":
        return SITES["mlp_out"].hook(found.layer), None
    raise SiteError(f"{node} is no head or MLP: its output at the position that is read says nothing of tokens")


# ------------------------------------------------------------------------------------------------------ which edges


def by_influence(ranked: Circuit, share: float) -> Circuit:
    """The fewest scored edges whose |score| adds up to that share of all, without dead ends. `OptionError` beyond 0 to 1."""
    if not 0 < share <= 1:
        raise OptionError(f"the share of influence to keep lies above 0 and is at most 1, not {share:g}")
    sizes = ranked.importance("size").ravel()[ranked.order("size")]
    total = np.cumsum(sizes)
    n = min(int(np.searchsorted(total, share * total[-1] * (1 - 1e-12))) + 1, len(sizes)) if sizes.any() else 0
    return ranked.top(n).with_attrs(share_of_influence=share)


def drawable(circuit: Circuit, *, max_nodes: int = MAX_NODES, max_edges: int = MAX_EDGES) -> Circuit:
    """Its strongest edges, as many as a browser draws: before there are more than `max_edges`, or `max_nodes` at their ends."""
    targets = np.append(owners(circuit.graph)[:-1], len(circuit.kept))  # the logits come behind all writers
    order = circuit.order("size")
    rows, columns = np.unravel_index(order[circuit.kept.ravel()[order]], circuit.kept.shape)
    ends = np.stack([rows, targets[columns]], 1)
    _, first = np.unique(ends, return_index=True)
    n_nodes = np.cumsum(np.bincount(first // 2, minlength=len(ends)))
    n = min(max_edges, int((n_nodes <= max_nodes).sum()))
    kept = np.zeros_like(circuit.kept)
    kept[rows[:n], columns[:n]] = True
    return circuit.with_edges(kept)


def without(circuit: Circuit, chosen: Sequence[str]) -> Circuit:
    """The circuit without everything that the chosen nodes write, and without the chosen edges; `SiteError` for strangers."""
    index = {name: i for i, name in enumerate(writers(circuit.graph))}
    kept = circuit.kept.copy()
    for name in chosen:
        if name in index:
            kept[index[name]] = False
    edges = [name for name in chosen if "->" in name]
    if strange := [name for name in chosen if name not in index and name not in edges]:
        raise SiteError(f"nothing can be taken from {strange[0]}: choose heads, MLPs, the input or edges")
    return circuit.with_edges(kept & ~select_edges(circuit.graph, edges))


def edges_of(circuit: Circuit, node: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(kept edges into a node, kept edges out of it), strongest first: edge, score."""
    table = circuit.table()
    sides = table.target.map(lambda target: target.partition("<")[0]) == node, table.source == node
    into, out = (table.loc[side, ["edge", "score"]].reset_index(drop=True) for side in sides)
    return into, out


def attention_spec(pattern: np.ndarray, tokens: Sequence[str]) -> dict[str, Any]:
    """A head's attention [query, key] on one prompt as a map: the first query on top, keys behind a query absent."""
    labels = [f"{i} {token}" for i, token in enumerate(tokens)]
    seen = np.where(np.tri(len(labels), dtype=bool), pattern, np.nan)
    array = xr.DataArray(seen, {"query": labels, "source": labels}, ("query", "source"), attrs={"metric": "attention"})
    spec = heatmap(array, limit=1.0, selectable=False, subtitle="")
    spec["yAxis"] |= {"inverse": True, "name": "query position and token", "nameGap": 75}
    spec["grid"] |= {"left": 95, "top": 10}
    spec["visualMap"] |= {"min": 0, "text": ["attention", ""], "inRange": {"color": ["#f7f7f7", "#4393c3", "#053061"]}}
    return spec


# --------------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class GraphView:
    """An ECharts graph and what its indices mean: `nodes` of data, `edges` of links. Indices beyond them are labels."""

    spec: dict[str, Any]
    nodes: list[str]
    edges: list[str]

    @property
    def digest(self) -> str:
        """Changes with whatever is drawn: a chart of another key forgets clicks on what was drawn before."""
        return hashlib.sha256(json.dumps(self.spec).encode()).hexdigest()[:16]

    def selecting(self, chosen: Sequence[str]) -> "GraphView":
        """The same with these nodes selected when it is first drawn."""
        series = self.spec["series"][0]
        data = [part | {"selected": part["name"] in chosen} for part in series["data"]]
        return GraphView(self.spec | {"series": [series | {"data": data}]}, self.nodes, self.edges)


def nodes_clicked(event: Any, view: GraphView) -> list[str]:
    """Ids of the selected nodes; clicks on labels, or on a graph that is gone, give none."""
    return [view.nodes[i] for i in clicked(event, "node") if i < len(view.nodes)]


def edges_clicked(event: Any, view: GraphView) -> list[str]:
    """Ids of the selected edges."""
    return [view.edges[i] for i in clicked(event, "edge") if i < len(view.edges)]


def places(graph: Graph) -> dict[str, tuple[float, float]]:
    """{node: (x, y)}, y downwards: layers by rows from the input below to the logits above, heads by columns, MLPs at the right.

    An MLP stands half a row above its layer's heads, which it reads.
    """
    width = _COLUMN * (graph.n_heads + 0.5)
    row = _TALL * width / (graph.n_layers + 1)
    middle = _COLUMN * (graph.n_heads - 1) / 2
    ends = {"input": (middle, row), "logits": (middle, -row * graph.n_layers)}
    heads = {f"a{la}.h{h}": (_COLUMN * h, -row * la) for la in range(graph.n_layers) for h in range(graph.n_heads)}
    mlps = {f"m{la}": (width, -row * (la + 0.4)) for la in range(graph.n_layers)}
    return {name: ends.get(name) or heads.get(name) or mlps[name] for name in (*writers(graph), "logits")}


def graph_spec(
    circuit: Circuit, *, pins: Sequence[str] = (), groups: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, str] | None = None, dark: bool = False,
) -> GraphView:  # fmt: skip
    """The kept edges: blue raises the metric, red lowers it, the wider, the larger |score|; components outside are faint.

    pins: dashed borders. groups: {name: nodes}, with a border of one colour. notes: a * behind the name of a node that has one.
    dark: paler colours of the same hues, for a dark page.
    """
    graph, at, inside = circuit.graph, places(circuit.graph), set(circuit.nodes)
    names = [name for name in at if name in inside or len(at) <= MAX_NODES]
    border = {n: GROUP_COLOURS[i % len(GROUP_COLOURS)] for i, ns in enumerate((groups or {}).values()) for n in ns}
    wide = min(38, int(0.84 * 440 / (graph.n_heads + 1.5)))
    data = []
    for name in names:
        kind, here = parse_node(name).kind, name in inside
        style = {"color": _FILLS[kind], "borderColor": border.get(name, _edge_of(name in pins, here, dark)),
                 "borderWidth": 3 if name in border else 2 if name in pins else 1,
                 "opacity": 1 if here else 0.2 if dark else 0.35,
                 "borderType": "dashed" if name in pins else "solid"}  # fmt: skip
        text = (
            (name if wide >= 32 else name.partition(".")[2] or name)
            if wide >= 16 or kind in ("input", "logits")
            else ""
        )
        text += "*" if name in (notes or {}) else ""
        size = wide if kind in ("head", "mlp") else 44
        data.append(
            {"name": name, "x": at[name][0], "y": at[name][1], "itemStyle": style, "symbolSize": [size, max(6, min(17, size))],
             "label": {"show": bool(text), "formatter": text, "color": INK if here else "#8c959f"}}
        )  # fmt: skip
    every = max(1, graph.n_layers // 16)
    for layer in range(0, graph.n_layers, every):
        label = {"show": True, "formatter": f"layer {layer}", "position": "left", "color": "#737a82", "fontSize": 10}
        beside = {"x": -0.75 * _COLUMN, "y": at[f"a{layer}.h0"][1]}
        data.append({"name": f"layer {layer}", **beside, "symbolSize": 0, "label": label})
    links, edges = _links(circuit, at, {name: i for i, name in enumerate(names)}, DARK if dark else LIGHT)
    busy = len(edges) > _BUSY
    series = {
        "type": "graph", "layout": "none", "roam": True, "symbol": "roundRect", "data": data, "links": links,
        "left": 50, "right": 30, "top": 15, "bottom": 15, "selectedMode": "multiple", "scaleLimit": {"min": 0.4, "max": 20},
        "label": {"show": True, "position": "inside", "fontSize": 9, "color": INK}, "labelLayout": {"hideOverlap": True},
        "edgeSymbol": ["none", "none" if busy else "arrow"], "edgeSymbolSize": 5,
        "select": {"itemStyle": {"borderColor": SELECTED, "borderWidth": 4, "opacity": 1}, "lineStyle": {"color": SELECTED}},
        "emphasis": {"disabled": True} if busy else {"focus": "adjacency", "label": {"show": True}},
        "blur": {"itemStyle": {"opacity": 0.35}, "lineStyle": {"opacity": 0.1}},
    }  # fmt: skip
    spec = {"animation": False, "tooltip": {"formatter": "{b} {c}"}, "series": [series]}
    return GraphView(spec, names, edges)


Places = Mapping[str, tuple[float, float]]


def _edge_of(pinned: bool, here: bool, dark: bool) -> str:
    """The colour of a node's border without a group: a pin's has to be seen on the page's ground."""
    return ("#ffffff" if dark else INK) if pinned else INK if here else GREY


def _links(
    circuit: Circuit, at: Places, index: Mapping[str, int], colours: tuple[str, str]
) -> tuple[list[dict], list[str]]:
    """(links, ids of their edges), the strongest last and so on top."""
    table = circuit.table().iloc[::-1]
    scores = np.nan_to_num(table.score.to_numpy(float))
    limit = np.abs(scores).max(initial=0.0) or 1.0
    alpha = 0.75 if len(table) <= _BUSY else 0.4
    links = []
    for edge, source, target, score in zip(table.edge, table.source, table.target, scores.tolist(), strict=True):
        owner, _, slot = target.partition("<")
        bow = _CURVES.get(slot[:1], 0.0) + (0.25 if at[source][0] == at[owner][0] else 0.0)
        style = {"color": colours[score < 0] if score else GREY, "curveness": bow, "opacity": alpha,
                 "width": round(0.6 + 5.4 * abs(score) / limit, 2)}  # fmt: skip
        ends = {"id": edge, "source": index[source], "target": index[owner]}
        links.append({**ends, "value": float(f"{score:.4g}"), "lineStyle": style})
    return links, table.edge.tolist()


def shown_text(shown: Circuit, circuit: Circuit) -> str:
    """How much of the model is drawn, in numbers."""
    graph = circuit.graph
    n_edges, n_nodes = int(edge_mask(graph).sum()), len(writers(graph)) + 1
    text = f"Showing {shown.n_edges:,} of {n_edges:,} edges and {len(shown.nodes):,} of {n_nodes:,} components"
    if shown.n_edges < circuit.n_edges:
        text += f"; {circuit.n_edges - shown.n_edges:,} weaker edges of the circuit are measured with it, but not drawn"
    return text + "."


def curve_spec(found: xr.Dataset) -> dict[str, Any]:
    """Faithfulness over the share of edges kept, for both rankings; 1 is the whole model."""
    names = {"value": "most helpful first", "size": "largest first"}
    x = found.fraction.values.tolist()
    series = [
        {"type": "line", "name": names[by], "symbolSize": 6, "lineStyle": {"type": kind}, "color": colour,
         "data": [list(point) for point in zip(x, found.faithfulness.sel(by=by).values.round(5).tolist(), strict=True)]}
        for by, colour, kind in (("value", RAISES, "solid"), ("size", SELECTED, "dashed"))
    ]  # fmt: skip
    series[0]["markLine"] = {"silent": True, "symbol": "none", "data": [{"yAxis": 1}], "label": {"formatter": "whole model"},
                             "lineStyle": {"color": GREY}}  # fmt: skip
    return {
        "legend": {"top": 0}, "tooltip": {"trigger": "axis", "valueFormatter": "%.3f"},
        "grid": {"left": 60, "right": 70, "top": 40, "bottom": 50},
        "xAxis": {"type": "log", "name": "share of the model's edges kept", "nameLocation": "middle", "nameGap": 30},
        "yAxis": {"type": "value", "name": "faithfulness", "nameLocation": "middle", "nameGap": 40, "scale": True},
        "series": series, "aria": {"enabled": True},
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- to take home


def circuit_json(circuit: Circuit) -> bytes:
    """The file that `Circuit.load`, EAP-IG and MIB read."""
    with tempfile.TemporaryDirectory() as folder:
        return circuit.save(Path(folder) / "circuit.json").read_bytes()


def code_of(circuit: Circuit, method: str, rules: str, metric: str, ablation: str, chosen: Sequence[str]) -> str:
    """The lines of Python that make the circuit and measure it; `model` and `pairs` are there."""
    lines = [
        f"scores = interp.edge_scores(model, pairs, method={method!r}, rules={rules!r}, metric={metric!r})",
        f"circuit = interp.Circuit.from_scores(scores, n_edges={circuit.attrs['n_edges']})"
        f"  # {circuit.attrs['share_of_influence']:.0%} of the influence",
        f"interp.faithfulness(model, pairs, circuit, ablation={ablation!r}, metric={metric!r})",
    ]
    if chosen:
        everything = "interp.Circuit.full(circuit.graph)"
        lines += [
            f"chosen = {list(chosen)!r}",
            f"rest = [e for e in {everything}.edges if e not in chosen and e.partition('->')[0] not in chosen]",
            "ablated = interp.Circuit.from_edges(circuit.graph, rest)",
            f"interp.faithfulness(model, pairs, ablated, ablation={ablation!r}, metric={metric!r})",
        ]
    return "\n".join([*lines, "circuit.draw()"])


def known(chosen: Sequence[str], graph: Graph) -> list[str]:
    """Those ids that the graph has, in their order: a selection may be another model's."""
    nodes, sources, targets = {*writers(graph), "logits"}, writers(graph), readers(graph)
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (sources, targets))
    there = edge_mask(graph)

    def has(name: str) -> bool:
        source, arrow, target = name.partition("->")
        if not arrow:
            return name in nodes
        return source in rows and target in columns and bool(there[rows[source], columns[target]])

    return [name for name in chosen if has(name)]
