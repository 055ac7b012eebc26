"""Circuits as files: the JSON of EAP-IG and MIB both ways, and GraphML for programs that draw and measure graphs.

    save_circuit(circuit, "ioi.json")            # every edge and node; helpful edges positive, as MIB ranks them
    save_circuit(circuit, "ioi.graphml")         # the kept edges, for Gephi, yEd, Cytoscape, networkx
    circuit = Circuit.load("ioi.json")

The JSON:

    {"cfg":   {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {id: {"in_graph": bool, "score"?, "neurons"?: [bool], "neurons_scores"?: [float]}},
     "edges": {id: {"score": float, "in_graph": bool}},
     "interp"?: {"model", "attrs", "unscored", "unscored_nodes"}}

"interp" is ours; EAP-IG reads over it, and files of others have none. It holds what the format has no place for:

- the model's name, and the attributes of the scores;
- `unscored`: ids of the edges that were not scored (or "all"). EAP-IG wants a number on every edge and strict readers refuse
  NaN, so such an edge carries 0.0 and only this list tells it from an edge whose score is 0;
- `unscored_nodes`: fields of nodes in which some number is NaN, with null for it. The node itself then goes without the field,
  which EAP-IG takes for "not scored".

A file does not say which sign helps, unless we wrote it: see `Circuit.helpful_sign`. Pickled files (.pt) are not read.
"""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.errors import OptionError, SiteError, name_some, one_of
from interp.files import check_writable, write_atomically
from interp.sites import parse_node

if TYPE_CHECKING:
    import networkx as nx

    from interp.circuits.circuit import Circuit

ENDINGS = (".json", ".graphml")
SIGNS = ("mib", "as-is")
_CFG = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")
_FLIPPED = "turned round for MIB: positive means that the clean value of the edge helps"


# ------------------------------------------------------------------------------------------------------------- reading


def read_circuit(path: str | Path) -> dict[str, Any]:
    """The fields of the circuit in a JSON file of EAP-IG, MIB or ours: kept edges, scores, and what it says of nodes.

    Kept are the edges that are `in_graph`. Edges that the file does not name are not kept, and those without a score have the
    score NaN; without any score, `scores` is None. Every node has to be named: their number shows that `cfg` is the model's.
    Whatever nodes say beside `in_graph` is kept in `about_nodes`. `OptionError` names what cannot be used, `SiteError` the
    nodes and edges that such a model does not have.
    """
    path = Path(path)
    content = _read(path)
    ours = _ours(content, path)
    graph = _graph(content["cfg"], ours.get("model", "model"), path)
    about_nodes = _nodes(content["nodes"], ours, graph, path)
    kept, scores = _edges(content["edges"], ours, graph, path)
    attrs = ours.get("attrs", {})
    return {"graph": graph, "kept": kept, "scores": scores, "attrs": attrs, "about_nodes": about_nodes}


def _read(path: Path) -> dict[str, Any]:
    """The file's content, with everything that the format asks for."""
    if path.suffix.lower() in (".pt", ".pth", ".pkl"):
        raise OptionError(f"{path} is pickled, and pickled files are not read: export JSON (to_json in EAP-IG)")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"{path} line {error.lineno}: not valid JSON ({error.msg}; cut short?)") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list a thousand deep
        raise OptionError(f"{path} is not a circuit ({error})") from error
    _check_mapping(content, "the file", path)
    if lacking := [key for key in ("cfg", "nodes", "edges") if key not in content]:
        raise OptionError(f"{path} is not a circuit: it lacks {', '.join(lacking)}")
    for key in ("cfg", "nodes", "edges"):
        _check_mapping(content[key], key, path)
    return content


def _ours(content: dict, path: Path) -> dict[str, Any]:
    """What we wrote beside the format; empty for files of others."""
    ours = content.get("interp", {})
    _check_mapping(ours, "interp", path)
    for key in ("attrs", "unscored_nodes"):
        _check_mapping(ours.get(key, {}), f"interp.{key}", path)
    if not isinstance(ours.get("model", ""), str):
        raise OptionError(f"{path}: interp.model is {ours['model']!r}, not a name")
    unscored = ours.get("unscored", [])
    if unscored != "all" and not isinstance(unscored, list):
        raise OptionError(f'{path}: interp.unscored is {unscored!r}, not a list of edges or "all"')
    if (sign := ours.get("attrs", {}).get("helpful_sign", 1)) not in (1, -1):
        raise OptionError(f"{path}: interp.attrs.helpful_sign is {sign!r}, not 1 or -1")
    return ours


def _graph(cfg: Mapping, name: str, path: Path) -> Graph:
    if lacking := [key for key in _CFG if key not in cfg]:
        raise OptionError(f"{path} is not a circuit: its cfg lacks {', '.join(lacking)}")
    for key, least in (("n_layers", 1), ("n_heads", 1), ("d_model", 0)):
        if type(cfg[key]) is not int or cfg[key] < least:
            raise OptionError(f"{path}: {key} is {cfg[key]!r}, not a whole number of at least {least}")
    if not isinstance(cfg["parallel_attn_mlp"], bool):
        raise OptionError(f"{path}: parallel_attn_mlp is {cfg['parallel_attn_mlp']!r}, not true or false")
    return Graph(cfg["n_layers"], cfg["n_heads"], cfg["parallel_attn_mlp"], cfg["d_model"], name)


def _nodes(nodes: Mapping, ours: Mapping, graph: Graph, path: Path) -> dict[str, dict]:
    """{id: fields other than in_graph} of the nodes that have any, in the file's order."""
    n_nodes = graph.n_layers * (graph.n_heads + 1) + 2
    if len(nodes) < n_nodes:  # asked first: a cfg of a billion layers must not be built
        raise OptionError(f"{path} names {len(nodes)} nodes, but {_shape(graph)} has {n_nodes} (with input and logits)")
    known = {*writers(graph), "logits"}
    for names, what in ((nodes, "nodes"), (ours.get("unscored_nodes", {}), "interp.unscored_nodes")):
        if strange := [name for name in names if name not in known]:
            raise SiteError(f"{path} names {what} that {_shape(graph)} does not have: {name_some(strange)}")
    about = {}
    for name, node in nodes.items():
        _in_graph(node, name, path)
        unscored = ours.get("unscored_nodes", {}).get(name, {})
        _check_mapping(unscored, f"interp.unscored_nodes.{name}", path)
        fields = {field: value for field, value in node.items() if field != "in_graph"}
        fields |= {field: _nan_for_null(value) for field, value in unscored.items()}
        for field in ("neurons", "neurons_scores"):
            values = fields.get(field, [])
            if not isinstance(values, list) or (field in fields and graph.d_model and len(values) != graph.d_model):
                found = f"{len(values)} values" if isinstance(values, list) else repr(values)
                raise OptionError(
                    f"{path}: {field} of {name} are {found}, not one for each of {graph.d_model} channels"
                )
        if fields:
            about[name] = fields
    return about


def _edges(
    edges: Mapping, ours: Mapping, graph: Graph, path: Path
) -> tuple[Bool[np.ndarray, "source target"], Float[np.ndarray, "source target"] | None]:
    sources, targets = ({name: i for i, name in enumerate(names)} for names in (writers(graph), readers(graph)))
    there = edge_mask(graph)

    def places(names: Mapping | list, what: str) -> list[tuple[int, int]]:
        found, strange = [], []
        for name in map(str, names):
            source, _, target = name.partition("->")
            place = sources.get(source, -1), targets.get(target, -1)
            if min(place) < 0 or not there[place]:
                strange.append(name)
            found.append(place)
        if strange:
            raise SiteError(f"{path} names {what} that {_shape(graph)} does not have: {name_some(strange)}")
        return found

    kept, scores, any_score = np.zeros_like(there), np.full(there.shape, np.nan), False
    for place, (name, edge) in zip(places(edges, "edges"), edges.items(), strict=True):
        kept[place] = _in_graph(edge, name, path)
        if "score" in edge:
            any_score = True
            scores[place] = _score(edge["score"], name, path)
    unscored = ours.get("unscored", [])
    if unscored == "all" or not any_score:
        return kept, None
    for place in places(unscored, "edges in interp.unscored"):
        scores[place] = np.nan
    return kept, scores


def _in_graph(item: object, name: str, path: Path) -> bool:
    _check_mapping(item, name, path)
    if not isinstance(item.get("in_graph"), bool):
        found = repr(item["in_graph"]) if "in_graph" in item else "missing"
        raise OptionError(f"{path}: in_graph of {name} is {found}, not true or false")
    return item["in_graph"]


def _score(value: object, name: str, path: Path) -> float:
    """A finite number, or NaN for one that is null or NaN."""
    if value is None:
        return math.nan
    try:
        score = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.inf
    except OverflowError:  # a whole number of hundreds of digits
        score = math.inf
    if math.isinf(score):
        raise OptionError(f"{path}: the score of {name} is {str(value)[:40]}, not a finite number")
    return score


def _check_mapping(value: object, name: str, path: Path) -> None:
    if not isinstance(value, Mapping):
        raise OptionError(f"{path}: {name} is {type(value).__name__}, not an object with named fields")


def _nan_for_null(value: object) -> object:
    if isinstance(value, list):
        return [_nan_for_null(v) for v in value]
    return math.nan if value is None else value


def _shape(graph: Graph) -> str:
    kind = " (attention and MLP in parallel)" if graph.parallel else ""
    return f"a model of {graph.n_layers} layers x {graph.n_heads} heads{kind}"


# ------------------------------------------------------------------------------------------------------------- writing


def save_circuit(circuit: "Circuit", path: str | Path, *, sign: Literal["mib", "as-is"] = "mib") -> Path:
    """Write a circuit as .json (every edge and node of the graph) or .graphml (the kept edges), and return the path.

    sign: "mib" writes helpful edges positive, as MIB ranks them: scores of noising are multiplied by -1. Where nobody knows
        which sign helps, and with "as-is", scores are written unchanged. The file's `helpful_sign` is that of what is written.

    In JSON a node is `in_graph` if it has a kept edge; the logits always are. `OptionError` for another ending, for a place
    that cannot be written to, and for an infinite score.
    """
    one_of(sign, SIGNS, "sign")
    path = check_writable(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise OptionError(f"{path.name} ends in {ending or 'nothing'}: circuits are written as {' or '.join(ENDINGS)}")
    circuit = _signed(circuit) if sign == "mib" else circuit
    return write_atomically(path, _json(circuit) if ending == ".json" else _graphml(circuit))


def known_sign(circuit: "Circuit") -> int | None:
    """`Circuit.helpful_sign`, or None where nobody knows it."""
    try:
        return circuit.helpful_sign
    except OptionError:
        return None


def _signed(circuit: "Circuit") -> "Circuit":
    """With helpful edges positive; as it is where the sign is not known."""
    known = known_sign(circuit)
    if known is None:
        return circuit
    attrs = {**circuit.attrs, "helpful_sign": 1}
    if known == 1 or circuit.scores is None:
        return replace(circuit, attrs=attrs)
    return replace(circuit, scores=-circuit.scores, attrs={**attrs, "sign": _FLIPPED})


def _json(circuit: "Circuit") -> str:
    graph = circuit.graph
    there = edge_mask(graph)
    scores = np.full(there.shape, np.nan) if circuit.scores is None else circuit.scores
    if (strange := there & np.isinf(scores)).any():
        raise OptionError(f"the score of {circuit.with_edges(strange).edges[0]} is infinite and cannot be written")
    nodes, unscored_nodes = _node_fields(circuit)
    sources, targets, edges, unscored = writers(graph), readers(graph), {}, []
    for u, v in np.argwhere(there):
        name, score = f"{sources[u]}->{targets[v]}", float(scores[u, v])
        if math.isnan(score):
            unscored.append(name)
            score = 0.0
        edges[name] = {"score": score, "in_graph": bool(circuit.kept[u, v])}
    ours = {
        "model": graph.name if graph.name != Graph.name else None,
        "attrs": _plain(dict(circuit.attrs)),
        "unscored": "all" if circuit.scores is None else unscored,
        "unscored_nodes": unscored_nodes,
    }
    content = {
        "cfg": dict(zip(_CFG, (graph.n_layers, graph.n_heads, graph.parallel, graph.d_model), strict=True)),
        "nodes": nodes,
        "edges": edges,
    }
    if ours := {key: value for key, value in ours.items() if value not in (None, [], {})}:
        content["interp"] = ours  # with nothing of ours to say, the file is one of EAP-IG's
    return json.dumps(content, allow_nan=False)


def _node_fields(circuit: "Circuit") -> tuple[dict[str, dict], dict[str, dict]]:
    """(nodes as the format has them, the fields that stay out of it because numbers in them are NaN)."""
    names = [*writers(circuit.graph), "logits"]
    if strange := [name for name in circuit.about_nodes if name not in names]:
        raise SiteError(f"about_nodes names nodes that {_shape(circuit.graph)} does not have: {name_some(strange)}")
    nodes, unscored = {}, {}
    for name, there in zip(names, circuit.has_node, strict=True):
        nodes[name] = {"in_graph": bool(there)}
        for field, value in circuit.about_nodes.get(name, {}).items():
            floats = list(_floats(value))
            if any(map(math.isinf, floats)):
                raise OptionError(f"{field} of {name} is infinite and cannot be written")
            if any(map(math.isnan, floats)):
                unscored.setdefault(name, {})[field] = _plain(value, nan=None)
            else:
                nodes[name][field] = _plain(value)
    return nodes, unscored


def _floats(value: object) -> Iterator[float]:
    if isinstance(value, np.ndarray | list | tuple):
        for v in value:
            yield from _floats(v)
    elif isinstance(value, float | np.floating):
        yield float(value)


def _plain(value: object, nan: str | None = "nan") -> object:
    """As JSON has it: numpy's numbers and arrays as Python's, and what JSON cannot say (infinity, a class) as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(v, nan) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, nan) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return nan if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# -------------------------------------------------------------------------------------------------------------- graphs


def to_networkx(circuit: "Circuit") -> "nx.MultiDiGraph":
    """The kept edges and their nodes as a networkx graph.

    Nodes have `kind` (input, head, mlp, logits), `layer` (-1 for the input, n_layers for the logits) and, for heads, `head`.
    Edges are keyed by what reads (q, k, v, mlp, logits) and have `edge` (the id), `reader` and, where scored, `score`. The
    graph has `model`, `n_layers`, `n_heads` and, where known, `helpful_sign`. Only values that GraphML can hold.
    """
    import networkx as nx

    graph, known = circuit.graph, known_sign(circuit)
    about = {"model": graph.name, "n_layers": graph.n_layers, "n_heads": graph.n_heads}
    found = nx.MultiDiGraph(**about, **({} if known is None else {"helpful_sign": known}))
    for name in circuit.nodes:
        node = parse_node(name)
        layer = {"input": -1, "logits": graph.n_layers}.get(node.kind, node.layer)
        found.add_node(name, kind=node.kind, layer=layer, **({"head": node.index} if node.kind == "head" else {}))
    for row in circuit.table().itertuples():
        target, _, slot = row.target.rstrip(">").partition("<")
        reader = slot or parse_node(target).kind
        score = {} if math.isnan(row.score) else {"score": float(row.score)}
        found.add_edge(row.source, target, key=reader, edge=row.edge, reader=reader, **score)
    return found


def _graphml(circuit: "Circuit") -> bytes:
    """GraphML with the id of each edge, by the writer that needs no other library."""
    import networkx as nx

    buffer = io.BytesIO()
    nx.write_graphml_xml(to_networkx(circuit), buffer, edge_id_from_attribute="edge")
    return buffer.getvalue()
