"""Circuits as pictures: components by layer and head, or edges by layer and token position.

    draw_circuit(circuit).show()
    draw_by_position(edge_scores(model, pairs, positions="each"), circuit).show()

Both read from the bottom up: the input below, then each layer's heads and above them its MLP, the logits on top; layers
without a component are left out. Lines are edges: the wider, the larger |score|; blue where the clean value helps and red
where it harms, or, where nobody knows which sign helps, blue for positive scores and red for negative ones. An edge into a
head ends at the left for its query, in the middle for its key, at the right for its value.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float

from interp.circuits.export import known_sign
from interp.circuits.graph import readers, writers
from interp.errors import OptionError, SiteError, name_some
from interp.grids import visible
from interp.plots import INK, LOWERS, RAISES, axis_labels, drawn_text, finish
from interp.sites import parse_node

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit

WIDTHS = np.linspace(0.75, 6.0, 6)  # pixels; so few widths, because a line's width is the same along a trace
_COLUMN, _ROW = 52, 50  # pixels from head to head and from row to row
_HEAD = 26  # pixels between heads in one row at one position
_POINTS, _POINTED = (
    13,
    5,
)  # of a line, and the one to point at: not the middle, which is also that of a line crossing it
_SLOTS = {"q": -1, "k": 0, "v": 1}
_BAND = "#f6f8fa"
_UNSIGNED = "#8c959f"  # edges without a score: darker than what does not exist
_FILLS = {"head": "#dce8f5", "mlp": "#e3edd8", "input": "#fff1c2", "logits": "#fff1c2"}

Point = tuple[float, float]
Cells = Float[np.ndarray, "source target position"]


def draw_circuit(circuit: "Circuit", *, title: str | None = None, max_edges: int = 200) -> go.Figure:
    """The kept edges between their components: a row for each layer's heads and one for its MLP, a column for each head.

    MLPs, input and logits stand in the middle column. Of more than `max_edges` edges the strongest are drawn, with the
    components at their ends, and a line under the title says so. Point just below the middle of an edge for its id and score.
    """
    edges = _strongest(circuit.kept, circuit.scores, circuit, max_edges)
    rows = Rows(circuit, edges.ends())
    columns = _columns(rows.y)
    x = {name: columns[parse_node(name).index] for name in rows.y}
    paths = []
    for source, target, slot in edges.parts():
        bow = 2.2 * rows.bow(source, target) if x[source] == x[target] else 0.0
        start, end = (x[source], rows.y[source] + 0.2), (x[target] + 0.22 * slot, rows.y[target] - 0.2)
        paths.append(_curve(start, end, across=bow))
    figure = go.Figure(_lines(edges, paths, edges.hover()))
    _add_boxes(figure, {name: (x[name], y) for name, y in rows.y.items()})
    reach = max((float(abs(path[:, 0]).max()) for path in paths), default=0.0)  # an arc may bow past the last column
    half = max(4.0, max(columns.values()) + 1.0, 1.0 - min(columns.values()), reach + 0.3)
    figure.update_xaxes(
        title="head", tickvals=list(columns.values()), showgrid=False, range=[-half, half],
        ticktext=["MLP" if head is None else str(head) for head in columns],
    )  # fmt: skip
    note = f"the {len(paths):,} strongest of {circuit.n_edges:,} edges" if len(paths) < circuit.n_edges else ""
    return _finish(figure, rows, edges, title or _title(circuit), note, width=_COLUMN * 2 * half)


def draw_by_position(
    scores_by_position: xr.DataArray, circuit: "Circuit", *, tokens: Sequence[str] | None = None,
    title: str | None = None, max_edges: int = 300,
) -> go.Figure:  # fmt: skip
    """The kept edges at every token: a column for each position, rows as in `draw_circuit`.

    scores_by_position: [source, target, position], or [prompt, source, target, position], of which the mean is drawn. An edge
        stands at the position where its source writes and its target reads.
    tokens: labels of the positions; if None, the coordinate `token`, else their numbers.

    Drawn are the `max_edges` strongest pairs of an edge and a position. A dotted arc shows what a head moves: from the
    position where the edges into its keys and values are strongest to that where the edges out of it are.
    """
    values, mean = _by_position(scores_by_position, circuit)
    labels = axis_labels(mean, "position") if tokens is None else [str(token) for token in tokens]
    if len(labels) != mean.sizes["position"]:
        raise OptionError(f"{len(labels)} tokens cannot label {mean.sizes['position']} positions")
    labels = [drawn_text(visible(label)) for label in labels]
    signed = replace(circuit, attrs=mean.attrs)
    cells = np.isfinite(values) & (values != 0)  # a position that no path leads to has no edge to draw
    edges = _strongest(cells, values, circuit if known_sign(signed) is None else signed, max_edges)
    moves = {head: move for head in edges.ends() if (move := _movement(head, values, circuit)) is not None}
    stops = {(name, t) for (*ends, _), t in zip(edges.parts(), edges.positions, strict=True) for name in ends}
    stops |= {(head, t) for head, move in moves.items() for t in move}
    rows = Rows(circuit, [name for name, _ in stops])
    place, columns = _side_by_side(sorted(stops), rows, len(labels))
    paths = []
    for (source, target, slot), t in zip(edges.parts(), edges.positions, strict=True):
        (x0, y0), (x1, y1) = place[source, t], place[target, t]
        bow = 0.8 * _HEAD * rows.bow(source, target) if x0 == x1 else 0.0
        paths.append(_curve((x0, y0 + 0.1), (x1 + 4 * slot, y1 - 0.1), across=bow))
    hover = [f"{text}<br>position {labels[t]}" for text, t in zip(edges.hover(), edges.positions, strict=True)]
    figure = go.Figure([*_lines(edges, paths, hover), *_arcs(moves, place, labels)])
    _add_dots(figure, place, labels)
    figure.update_xaxes(
        title="position and token", tickvals=(columns[:-1] + columns[1:]) / 2, ticktext=labels, tickangle=-50,
        gridcolor="#e1e6eb", range=[0, columns[-1]],
    )  # fmt: skip
    n_cells = int(cells.sum())
    pairs = f"{n_cells:,} pairs of an edge and a position"
    note = f"the {len(paths):,} strongest of {pairs}" if len(paths) < n_cells else ""
    return _finish(figure, rows, edges, title or _title(circuit), note, width=float(columns[-1]))


# --------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Edges:
    """The edges of a figure, weakest first: what is drawn last lies on top."""

    names: list[tuple[str, str]]  # source and target, as the graph names them
    scores: Float[np.ndarray, " edge"]
    positions: list[int]  # empty where all positions are one
    sign: int | None
    attrs: Mapping[str, object]

    def parts(self) -> list[tuple[str, str, int]]:
        """(source, target component, where on it the edge ends: -1 query, 0 key or anything else, 1 value)."""
        split = [(source, *target.rstrip(">").partition("<")) for source, target in self.names]
        return [(source, node, _SLOTS.get(slot, 0)) for source, node, _, slot in split]

    def ends(self) -> list[str]:
        """Every component at an end, once."""
        return list(dict.fromkeys(name for source, target, _ in self.parts() for name in (source, target)))

    def hover(self) -> list[str]:
        """Id, score and unit of each edge."""
        texts = [f"{score:+.4g} {self.unit}" if np.isfinite(score) else "not scored" for score in self.scores]
        ids = [drawn_text(f"{source}->{target}") for source, target in self.names]
        return [f"{name}<br>{text.strip()}" for name, text in zip(ids, texts, strict=True)]

    @property
    def unit(self) -> str:
        """The unit of the scores, if it is known."""
        return drawn_text(str(self.attrs.get("unit", "")))

    @property
    def limit(self) -> float:
        """The largest |score| drawn; 0 if there is none."""
        return float(np.nan_to_num(np.abs(self.scores)).max(initial=0.0))


def _strongest(kept: np.ndarray, scores: np.ndarray | None, circuit: "Circuit", most: int) -> Edges:
    """The `most` strongest of the kept [source, target] or [source, target, position]; what has no score comes last."""
    if most < 0:
        raise OptionError(f"max_edges is {most}: a number of edges is at least 0")
    places = np.argwhere(kept)
    found = np.full(len(places), np.nan) if scores is None else scores[tuple(places.T)].astype(float)
    order = np.argsort(-np.nan_to_num(np.abs(found), nan=-1.0), kind="stable")[:most][::-1]
    sources, targets = writers(circuit.graph), readers(circuit.graph)
    names = [(sources[u], targets[v]) for u, v, *_ in places[order]]
    positions = [int(t) for *_, t in places[order]] if kept.ndim == 3 else []
    return Edges(names, found[order], positions, known_sign(circuit), circuit.attrs)


def _by_position(scores: xr.DataArray, circuit: "Circuit") -> tuple[Cells, xr.DataArray]:
    """The scores of the kept edges, NaN elsewhere, in the order of the graph; and the mean over prompts they came from."""
    axes = [str(axis) for axis in scores.dims if axis != "prompt"]
    if sorted(axes) != ["position", "source", "target"]:
        raise OptionError(f"scores by position have axes source, target and position, not {', '.join(axes) or 'none'}")
    mean = scores.mean("prompt", keep_attrs=True) if "prompt" in scores.dims else scores
    indices = []
    for axis, names in (("source", writers(circuit.graph)), ("target", readers(circuit.graph))):
        index = {name: i for i, name in enumerate(names)}
        found = [str(name) for name in mean[axis].values]
        if strange := [name for name in found if name not in index]:
            raise SiteError(f"scores name a {axis} that {circuit.graph.name} does not have: {name_some(strange)}")
        indices.append([index[name] for name in found])
    values = np.full((*circuit.kept.shape, mean.sizes["position"]), np.nan)
    values[np.ix_(*indices)] = mean.transpose("source", "target", "position").values
    values[~circuit.kept] = np.nan
    return values, mean


def _movement(node: str, values: Cells, circuit: "Circuit") -> tuple[int, int] | None:
    """(position a head reads most at through its keys and values, position it writes most at), if they differ."""
    if parse_node(node).kind != "head":
        return None
    sources, targets = writers(circuit.graph), readers(circuit.graph)
    into = values[:, [targets.index(f"{node}<{slot}>") for slot in "kv"]].reshape(-1, values.shape[2])
    best = []
    for found in (into, values[sources.index(node)]):
        size = np.nan_to_num(np.abs(found)).max(0)
        if not size.any():
            return None
        best.append(int(size.argmax()))
    return None if best[0] == best[1] else (best[0], best[1])


# ---------------------------------------------------------------------------------------------------------- layout


class Rows:
    """How high each component stands, counted from the input up, without the rows that nothing stands in."""

    def __init__(self, circuit: "Circuit", drawn: Iterable[str]):
        drawn = {"input", "logits", *drawn}
        nodes = {name: parse_node(name) for name in (*writers(circuit.graph), "logits") if name in drawn}
        ends = {"input": -1, "logits": np.inf}
        places = {name: (ends.get(name, node.layer), node.kind == "mlp") for name, node in nodes.items()}
        used = sorted(set(places.values()))
        self.y = {name: float(used.index(place)) for name, place in places.items()}
        middle = [f"layer {layer} {'MLP' if mlp else 'heads'}" for layer, mlp in used[1:-1]]
        self.labels = ["input", *middle, "logits"]
        self.layers = [layer for layer, _ in used]

    def bow(self, source: str, target: str) -> float:
        """How far a line between two of the same column bends sideways, -1 to 1: the farther, the longer it is.

        Lines from every other row bend to the same side, so that those of neighbours do not lie on each other. Between
        neighbouring rows nothing is in the way.
        """
        low, high = self.y[source], self.y[target]
        side = 1 if low % 2 == 0 else -1
        return side * (0.25 + 0.75 * (high - low) / (len(self.labels) - 1)) if high - low > 1 else 0.0


def _columns(nodes: Iterable[str]) -> dict[int | None, float]:
    """{head: column} of the heads that occur, half of them on each side of the middle, which is for all else (None)."""
    heads = sorted({node.index for node in map(parse_node, nodes) if node.index is not None})
    half = len(heads) // 2
    return {None: 0.0, **{head: float(i - half if i < half else i - half + 1) for i, head in enumerate(heads)}}


def _side_by_side(
    stops: Iterable[tuple[str, int]], rows: Rows, n_positions: int
) -> tuple[dict[tuple[str, int], Point], Float[np.ndarray, " border"]]:
    """({(component, position): point}, borders of the columns), across in pixels.

    Components of one row and position stand side by side, and a column is as wide as its fullest row.
    """
    cells = defaultdict(list)
    for name, t in stops:
        cells[rows.y[name], t].append(name)
    most = [max((len(names) for (_, at), names in cells.items() if at == t), default=0) for t in range(n_positions)]
    borders = np.cumsum([0.0, *(max(40, _HEAD * n + 16) for n in most)])
    place = {}
    for (y, t), names in cells.items():
        names.sort(key=lambda name: parse_node(name).index or 0)
        for i, name in enumerate(names):
            place[name, t] = ((borders[t] + borders[t + 1]) / 2 + _HEAD * (i - (len(names) - 1) / 2), y)
    return place, borders


def _curve(start: Point, end: Point, *, across: float = 0.0) -> Float[np.ndarray, "point 2"]:
    """A cubic Bezier curve that leaves and arrives upright, its middle moved across."""
    (x0, y0), (x1, y1) = start, end
    arm = 0.4 * (y1 - y0)
    return _bezier(start, (x0 + across, y0 + arm), (x1 + across, y1 - arm), end)


def _bezier(*corners: Point) -> Float[np.ndarray, "point 2"]:
    t = np.linspace(0, 1, _POINTS)[:, None]
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    return sum(weight * np.array(corner) for weight, corner in zip(weights, corners, strict=True))


# --------------------------------------------------------------------------------------------------------- drawing


def _lines(edges: Edges, paths: Sequence[np.ndarray], hover: Sequence[str]) -> list[go.Scatter]:
    """A trace for each colour and width that occurs, thin ones first; the legend; and one trace to point at."""
    sign = edges.sign or 1
    names = {kind: "score > 0" if kind == sign else "score < 0" for kind in (1, -1)}
    if edges.sign is not None:
        names = {1: f"helps ({names[1]})", -1: f"harms ({names[-1]})"}
    kinds = {1: (RAISES, drawn_text(names[1])), -1: (LOWERS, drawn_text(names[-1])), 0: (_UNSIGNED, "no score, or 0")}
    side = np.nan_to_num(np.sign(edges.scores * sign)).astype(int)
    size = np.nan_to_num(np.abs(edges.scores)) / (edges.limit or 1.0)
    bucket = np.clip(np.ceil(size * len(WIDTHS)).astype(int) - 1, 0, len(WIDTHS) - 1)
    bucket[np.isnan(edges.scores)] = 1
    traces = []
    for width in range(len(WIDTHS)):
        for kind, (colour, _) in kinds.items():
            if chosen := [path for path, s, b in zip(paths, side, bucket, strict=True) if (s, b) == (kind, width)]:
                broken = np.concatenate([np.vstack([path, [np.nan, np.nan]]) for path in chosen])
                traces.append(
                    go.Scatter(
                        x=broken[:, 0], y=broken[:, 1], mode="lines", hoverinfo="skip", legendgroup=kind, showlegend=False,
                        line={"color": colour, "width": WIDTHS[width]}, opacity=0.6 + 0.06 * width,
                    )
                )  # fmt: skip
    for kind, (colour, text) in kinds.items():
        if (side == kind).any():
            traces.append(_legend_only(text, {"color": colour, "width": 4}, legendgroup=kind))
    if edges.limit:
        for width in (0, len(WIDTHS) // 2 - 1, len(WIDTHS) - 1):
            most = edges.limit * (width + 1) / len(WIDTHS)
            line, heading = {"color": INK, "width": WIDTHS[width]}, {"text": "|score| up to", "font": {"size": 12}}
            name = f"{most:.2g} {edges.unit}"
            traces.append(_legend_only(name, line, legendgroup="width", legendgrouptitle=heading))
    pointed = np.array([path[_POINTED] for path in paths]).reshape(-1, 2)
    traces.append(
        go.Scatter(
            x=pointed[:, 0], y=pointed[:, 1], mode="markers", marker={"size": 12, "opacity": 0}, customdata=list(hover),
            hovertemplate="%{customdata}<extra></extra>", name="edges", showlegend=False,
        )
    )  # fmt: skip
    return traces


def _legend_only(text: str, line: dict, **group) -> go.Scatter:
    return go.Scatter(x=[None], y=[None], mode="lines", name=text, line=line, hoverinfo="skip", **group)


def _arcs(
    moves: Mapping[str, tuple[int, int]], place: Mapping[tuple[str, int], Point], labels: Sequence[str]
) -> list[go.Scatter]:
    """What heads move from one position to another, as dotted arcs above their row, with an arrow at the end."""
    if not moves:
        return []
    moves, paths = dict(sorted(moves.items())), []
    for i, (head, (a, b)) in enumerate(moves.items()):
        (x0, y), (x1, _) = place[head, a], place[head, b]
        side, top = 0.15 * (x1 - x0), y + 0.4 + 0.16 * (i % 4)  # not all of a row at one height
        paths.append(_bezier((x0, y + 0.1), (x0 + side, top), (x1 - side, top), (x1, y + 0.1)))
    broken = np.concatenate([np.vstack([path, [np.nan, np.nan]]) for path in paths])
    middle = np.array([path[_POINTS // 2] for path in paths])
    text = [f"{head} reads at {labels[a]}<br>and writes at {labels[b]}" for head, (a, b) in moves.items()]
    arrows = ["triangle-right" if a < b else "triangle-left" for a, b in moves.values()]
    return [
        go.Scatter(
            x=broken[:, 0], y=broken[:, 1], mode="lines", line={"color": INK, "width": 1.3, "dash": "dot"},
            name="a head moves this way:<br>reads → writes", hoverinfo="skip", legendgroup="moves",
        ),
        go.Scatter(
            x=middle[:, 0], y=middle[:, 1], mode="markers", customdata=text, hovertemplate="%{customdata}<extra></extra>",
            marker={"symbol": arrows, "size": 8, "color": INK}, showlegend=False, legendgroup="moves", name="moves",
        ),
    ]  # fmt: skip


def _add_boxes(figure: go.Figure, place: Mapping[str, Point]) -> None:
    """Components as boxes with their ids. A box is a short thick line: that is one trace for all of a kind."""
    for kind, fill in _FILLS.items():
        of_kind = [point for name, point in place.items() if parse_node(name).kind == kind]
        for colour, half, width in ((INK, 0.45 + 1 / _COLUMN, 20), (fill, 0.45, 18)):
            xs = [value for x, _ in of_kind for value in (x - half, x + half, None)]
            ys = [value for _, y in of_kind for value in (y, y, None)]
            figure.add_scatter(
                x=xs, y=ys, mode="lines", line={"color": colour, "width": width}, hoverinfo="skip", showlegend=False
            )
    figure.add_scatter(
        x=[x for x, _ in place.values()], y=[y for _, y in place.values()], mode="text", text=list(place),
        textfont={"size": 10, "color": INK}, hoverinfo="skip", showlegend=False, name="components",
    )  # fmt: skip


def _add_dots(figure: go.Figure, place: Mapping[tuple[str, int], Point], labels: Sequence[str]) -> None:
    """Components as dots where an edge ends, with the number of the head beside them; the row says the layer."""
    nodes = [parse_node(name) for name, _ in place]
    figure.add_scatter(
        x=[x for x, _ in place.values()], y=[y for _, y in place.values()], mode="markers+text", showlegend=False,
        marker={"size": 9, "color": [_FILLS[node.kind] for node in nodes], "line": {"color": INK, "width": 1}},
        text=["" if node.index is None else f"h{node.index}" for node in nodes], textposition="bottom right",
        textfont={"size": 9, "color": INK}, customdata=[f"{name}<br>position {labels[t]}" for name, t in place],
        hovertemplate="%{customdata}<extra></extra>", name="components",
    )  # fmt: skip


def _finish(figure: go.Figure, rows: Rows, edges: Edges, title: str, note: str, *, width: float) -> go.Figure:
    """Rows named at the left, every other layer on a band, the legend at the right, what was left out under the title."""
    layers = sorted(set(rows.layers) - {-1, np.inf})
    for layer in layers[::2]:
        of_layer = [y for y, other in enumerate(rows.layers) if other == layer]
        figure.add_hrect(y0=of_layer[0] - 0.5, y1=of_layer[-1] + 0.5, fillcolor=_BAND, line_width=0, layer="below")
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(rows.labels))), ticktext=rows.labels, showgrid=False, zeroline=False,
        range=[-0.7, len(rows.labels) - 0.3],
    )  # fmt: skip
    metric = drawn_text(str(edges.attrs.get("metric", "")))
    below = [f"scores: {metric}" if metric else "", note, "" if edges.names else "there is no edge to draw"]
    figure = finish(figure, title, height=170 + _ROW * len(rows.labels))
    left, right = 110, 200  # row names, legend
    return figure.update_layout(
        width=left + width + right, margin={"t": 80, "l": left, "r": right, "b": 70},
        title={"text": title, "subtitle": {"text": "; ".join(filter(None, below))}, "y": 0.98, "yref": "container",
               "yanchor": "top"},
        legend={"orientation": "v", "x": 1.02, "y": 1.0, "yanchor": "top"},
    )  # fmt: skip


def _title(circuit: "Circuit") -> str:
    return f"{drawn_text(circuit.graph.name)}: circuit of {circuit.n_edges:,} edge{'' if circuit.n_edges == 1 else 's'}"
