"""Circuits as values: how edges are chosen, what pruning takes away, and what a circuit says of itself."""

import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits.circuit import Circuit, prune
from interp.circuits.graph import Graph, edge_mask, readers, select_edges, writers
from interp.errors import OptionError, SiteError
from tests.small_pairs import refused

GRAPHS = st.builds(Graph, st.integers(1, 4), st.integers(1, 3), st.booleans())
SMALL = Graph(3, 2, name="shape")


def edge_scores(graph: Graph, seed: int = 0, *, prompts: int | None = None, **attrs) -> xr.DataArray:
    """Random scores of every edge, as the analyses return them."""
    there = edge_mask(graph)
    shape = there.shape if prompts is None else (prompts, *there.shape)
    values = np.where(there, np.random.default_rng(seed).standard_normal(shape), np.nan)
    axes = ("source", "target") if prompts is None else ("prompt", "source", "target")
    about = {**graph.attrs(), "model": graph.name, "direction": "denoise", **attrs}
    return xr.DataArray(values, {"source": writers(graph), "target": readers(graph)}, axes, attrs=about)


def by_name(scores: xr.DataArray) -> dict[str, float]:
    """{edge: score} of the edges that have one."""
    found = scores.stack(edge=("source", "target")).dropna("edge")
    return {f"{u}->{v}": float(x) for (u, v), x in zip(found.edge.values, found.values, strict=True)}


@st.composite
def masks(draw) -> tuple[Graph, np.ndarray]:
    """A graph and some of its edges."""
    graph = draw(GRAPHS)
    there = edge_mask(graph)
    chance = np.random.default_rng(draw(st.integers(0, 10_000))).random(there.shape)
    return graph, there & (chance < draw(st.floats(0, 1)))


def on_paths(graph: Graph, edges: list[str]) -> set[str]:
    """The edges on a way from the input to the logits, by walking from both ends."""
    ends = [(u, v.partition("<")[0]) for u, _, v in (edge.partition("->") for edge in edges)]

    def walk(start: str, pairs: list[tuple[str, str]]) -> set[str]:
        seen = {start}
        while more := {v for u, v in pairs if u in seen} - seen:
            seen |= more
        return seen

    reached, reaching = walk("input", ends), walk("logits", [(v, u) for u, v in ends])
    return {edge for edge, (u, v) in zip(edges, ends, strict=True) if u in reached and v in reaching}


# ------------------------------------------------------------------------------------------------------------- pruning


@given(masks())
@settings(deadline=None)
def test_pruning_twice_is_pruning_once_and_never_adds(drawn):
    graph, kept = drawn
    pruned = prune(graph, kept)
    assert not (pruned & ~kept).any()
    np.testing.assert_array_equal(prune(graph, pruned), pruned)


@given(masks())
@settings(deadline=None)
def test_what_pruning_leaves_lies_on_paths_from_the_input_to_the_logits(drawn):
    graph, kept = drawn
    circuit = Circuit(graph, kept)
    assert set(circuit.pruned().edges) == on_paths(graph, circuit.edges)


def test_pruning_leaves_what_it_was_given_as_it_was():
    kept = select_edges(SMALL, ["m0->m1"])
    assert Circuit(SMALL, kept).pruned().n_edges == 0
    assert kept.sum() == 1


def test_the_whole_model_has_no_dead_ends():
    for parallel in (False, True):
        full = Circuit.full(Graph(3, 2, parallel))
        assert full.pruned() == full
        assert full.n_edges == edge_mask(full.graph).sum()


# ------------------------------------------------------------------------------------------------------ chosen by score


@pytest.mark.parametrize("by", ["size", "value"])
@pytest.mark.parametrize("direction", ["denoise", "noise", "both"])
def test_the_top_edges_are_those_that_sorting_puts_first(by, direction):
    scores = edge_scores(SMALL, direction=direction)
    sign = -1 if direction == "noise" else 1
    key = {"size": abs, "value": lambda x: sign * x}[by]
    names = by_name(scores)
    expected = sorted(names, key=lambda edge: -key(names[edge]))
    for n in (0, 1, 7, len(expected)):
        circuit = Circuit.from_scores(scores, n_edges=n, by=by, prune=False)
        assert set(circuit.edges) == set(expected[:n])
        assert circuit.n_edges == n


@pytest.mark.parametrize("by", ["size", "value"])
def test_a_threshold_keeps_what_lies_above_it(by):
    scores = edge_scores(SMALL)
    above = {edge for edge, x in by_name(scores).items() if (abs(x) if by == "size" else x) > 0.5}
    assert set(Circuit.from_scores(scores, threshold=0.5, by=by, prune=False).edges) == above
    assert Circuit.from_scores(scores, threshold=-np.inf, by="value", prune=False) == Circuit.full(SMALL)
    assert Circuit.from_scores(scores, threshold=np.inf, by=by).n_edges == 0


def test_a_circuit_is_pruned_unless_asked_not_to():
    scores = edge_scores(SMALL)
    raw = Circuit.from_scores(scores, n_edges=20, prune=False)
    assert Circuit.from_scores(scores, n_edges=20) == raw.pruned() != raw


def test_prompts_are_averaged():
    scores = edge_scores(SMALL, prompts=5)
    circuit = Circuit.from_scores(scores, n_edges=12)
    assert circuit == Circuit.from_scores(scores.mean("prompt", keep_attrs=True), n_edges=12)
    np.testing.assert_allclose(circuit.scores, scores.mean("prompt").values)
    assert (circuit.attrs["n_edges"], circuit.attrs["ranked_by"], circuit.attrs["search"]) == (12, "size", "top")


def test_edges_without_a_score_are_never_chosen():
    scores = edge_scores(SMALL)
    scores.loc[{"source": "m0"}] = np.nan
    circuit = Circuit.from_scores(scores, threshold=0.0, prune=False)
    assert not [edge for edge in circuit.edges if edge.startswith("m0->")]
    scored = int(np.isfinite(scores.values).sum())
    assert circuit.n_edges == scored
    with refused(OptionError, f"cannot keep {scored + 1} of {scored} scored edges"):
        Circuit.from_scores(scores, n_edges=scored + 1)


def test_scores_of_some_components_in_another_order():
    scores = edge_scores(SMALL)
    some = scores.isel(source=[4, 0, 2], target=[20, 3, -1])
    circuit = Circuit.ranked(some)
    assert circuit.table().set_index("edge").score.to_dict() == by_name(some)


def test_of_equal_scores_the_earlier_edge_is_taken():
    scores = edge_scores(SMALL)
    scores.values[edge_mask(SMALL)] = 1.0
    one = Circuit.from_scores(scores, n_edges=1, prune=False)
    assert one.edges == ["input->a0.h0<q>"]


# -------------------------------------------------------------------------------------------------------------- greedy


@given(GRAPHS, st.integers(0, 10_000), st.floats(0, 1), st.sampled_from(["size", "value"]))
@settings(deadline=None)
def test_in_a_greedy_circuit_every_component_reaches_the_logits(graph, seed, share, by):
    scores = edge_scores(graph, seed)
    n = int(share * edge_mask(graph).sum())
    circuit = Circuit.from_scores(scores, n_edges=n, search="greedy", by=by, prune=False)
    assert circuit.n_edges == n
    ends = [(u, v.partition("<")[0]) for u, _, v in (edge.partition("->") for edge in circuit.edges)]
    reaching = {"logits"}
    while more := {u for u, v in ends if v in reaching} - reaching:
        reaching |= more
    assert set(circuit.nodes) <= reaching


@given(GRAPHS, st.integers(0, 10_000), st.integers(0, 30), st.sampled_from(["size", "value"]))
@settings(deadline=None)
def test_greedy_takes_the_best_edge_into_what_is_there_each_time(graph, seed, n, by):
    scores = edge_scores(graph, seed)
    names = by_name(scores)
    key = (lambda e: abs(names[e])) if by == "size" else names.get
    n = min(n, len(names))
    there, taken = {"logits"}, []
    while len(taken) < n:
        best = max((e for e in names if e not in taken and e.split("->")[1].partition("<")[0] in there), key=key)
        taken.append(best)
        there.add(best.split("->")[0])
    assert set(Circuit.from_scores(scores, n_edges=n, search="greedy", by=by, prune=False).edges) == set(taken)


def test_greedy_with_a_threshold_stops_where_nothing_open_lies_above_it():
    scores = edge_scores(SMALL)
    greedy = Circuit.from_scores(scores, threshold=0.8, search="greedy", prune=False)
    top = Circuit.from_scores(scores, threshold=0.8, prune=False)
    assert not (greedy.kept & ~top.kept).any()
    assert greedy.pruned() == top.pruned()  # what reaches the logits through edges above the threshold is the same


# ---------------------------------------------------------------------------------------------------- named, and whole


def test_named_edges_come_back():
    edges = ["input->m0", "m0->a1.h1<v>", "a1.h1->logits"]
    circuit = Circuit.from_edges(SMALL, (edge for edge in edges))
    assert circuit.edges == edges
    assert circuit.nodes == ["input", "m0", "a1.h1", "logits"]
    assert circuit.scores is None
    with refused(SiteError, re.escape("shape has no edge m1->m0: write a0.h1->m2")):
        Circuit.from_edges(SMALL, ["m0->m1", "m1->m0"])


def test_edges_stand_in_forward_order_of_their_targets():
    order = {target: i for i, target in enumerate(readers(SMALL))}
    places = [order[edge.split("->")[1]] for edge in Circuit.full(SMALL).edges]
    assert places == sorted(places)


def test_a_circuit_of_nodes_keeps_all_that_they_write():
    circuit = Circuit.from_nodes(SMALL, ["input", "a1.h0"])
    assert set(circuit.edges) == {e for e in Circuit.full(SMALL).edges if e.split("->")[0] in ("input", "a1.h0")}
    with refused(SiteError, re.escape("shape has no component a7.h0, logits: write a3.h2, m5 or input")):
        Circuit.from_nodes(SMALL, ["m0", "a7.h0", "logits"])


def test_the_logits_are_always_there():
    empty = Circuit.from_edges(SMALL, [])
    assert (empty.nodes, empty.n_edges, empty.edges) == (["logits"], 0, [])
    assert empty.pruned() == empty
    assert len(empty.table()) == 0


@given(masks())
@settings(deadline=None)
def test_nodes_are_the_ends_of_edges(drawn):
    circuit = Circuit(*drawn)
    ends = {end for edge in circuit.edges for end in (edge.split("->")[0], edge.split("->")[1].partition("<")[0])}
    assert set(circuit.nodes) == ends | {"logits"}
    assert circuit.has_node.sum() == len(circuit.nodes)


# ------------------------------------------------------------------------------------------------- what it says of itself


def test_the_table_has_the_largest_score_first():
    scores = edge_scores(SMALL)
    scores.loc[{"source": "m0", "target": "logits"}] = np.nan
    circuit = Circuit.ranked(scores).with_edges(edge_mask(SMALL))
    table = circuit.table()
    assert list(table.columns) == ["edge", "source", "target", "score"]
    assert (table.edge == table.source + "->" + table.target).all()
    assert table.edge.iloc[-1] == "m0->logits"
    assert np.isnan(table.score.iloc[-1])
    assert (np.diff(table.score.abs().iloc[:-1]) <= 0).all()
    assert table.iloc[:-1].set_index("edge").score.to_dict() == by_name(scores)
    assert Circuit.full(SMALL).table().score.isna().all()


def test_its_text_counts_edges_and_nodes():
    assert repr(Circuit.full(Graph(12, 12, name="gpt2"))) == "Circuit(gpt2: 32,491 of 32,491 edges, 158 nodes)"
    assert repr(Circuit.from_edges(SMALL, ["m0->logits"])) == "Circuit(shape: 1 of 100 edges, 2 nodes)"


def test_circuits_are_equal_if_their_edges_are():
    one = Circuit.from_edges(SMALL, ["m0->logits"])
    assert one == Circuit.from_edges(Graph(3, 2, name="another name"), ["m0->logits"])
    assert one == Circuit(SMALL, one.kept, np.zeros(one.kept.shape), {"unit": "logits"})
    assert one != Circuit.from_edges(SMALL, ["m1->logits"])
    assert one != Circuit.from_edges(Graph(3, 2, parallel=True), ["m0->logits"])
    assert one != Circuit.from_edges(Graph(4, 2), ["m0->logits"])
    assert one != "m0->logits"
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


@pytest.mark.parametrize(
    ("attrs", "sign"),
    [({"direction": "denoise"}, 1), ({"direction": "both"}, 1), ({"direction": "noise"}, -1),
     ({"direction": "noise", "helpful_sign": 1}, 1), ({"helpful_sign": -1}, -1)],
)  # fmt: skip
def test_which_sign_helps(attrs, sign):
    scores = np.where(edge_mask(SMALL), 2.0, np.nan)
    circuit = Circuit(SMALL, edge_mask(SMALL), scores, attrs)
    assert circuit.helpful_sign == sign
    assert np.nanmax(circuit.importance("value")) == 2 * sign
    assert np.nanmax(circuit.importance()) == 2


def test_changing_a_circuit_leaves_it_as_it_was():
    circuit = Circuit.ranked(edge_scores(SMALL))
    other = circuit.with_edges(select_edges(SMALL, ["m0->m1"])).with_attrs(unit="logits")
    assert other.edges == ["m0->m1"]
    assert other.attrs["unit"] == "logits"
    assert circuit.n_edges == 100
    assert "unit" not in circuit.attrs


def test_the_best_of_all_scored_edges_whichever_are_kept():
    circuit = Circuit.ranked(edge_scores(SMALL))
    assert circuit.with_edges(np.zeros_like(circuit.kept)).top(20) == circuit.top(20)
    assert circuit.top(20) == Circuit.from_scores(edge_scores(SMALL), n_edges=20)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "how many edges to keep, or above which threshold"),
        ({"n_edges": 3, "threshold": 0.1}, "how many edges to keep, or above which threshold"),
        ({"n_edges": 101}, "cannot keep 101 of 100 scored edges"),
        ({"n_edges": -1}, "cannot keep -1 of 100 scored edges"),
        ({"n_edges": 3, "by": "sise"}, "'sise' is not a ranking .choose from size, value.; did you mean 'size'?"),
        ({"n_edges": 3, "search": "best"}, "'best' is not a search .choose from top, greedy"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options, says):
    with refused(OptionError, says):
        Circuit.from_scores(edge_scores(SMALL), **options)


def test_scores_that_are_not_of_edges_are_refused():
    scores = edge_scores(SMALL)
    with refused(SiteError, "axes source and target, perhaps prompt, not prompt, layer"):
        Circuit.ranked(xr.DataArray(np.zeros((2, 3)), dims=("prompt", "layer")))
    with refused(SiteError, "not scores of edges or nodes: their attributes lack n_layers, n_heads, parallel, d_model"):
        Circuit.ranked(scores.drop_attrs())
    with refused(SiteError, "scores name a source that the graph does not have: a9.h9"):
        Circuit.ranked(scores.assign_coords(source=["a9.h9", *writers(SMALL)[1:]]))
    with refused(SiteError, "scores name a target that the graph does not have: m9"):
        Circuit.ranked(scores.assign_coords(target=[*readers(SMALL)[:-1], "m9"]))


def test_edges_that_do_not_exist_and_shapes_that_do_not_fit_are_refused():
    with refused(SiteError, r"shape has no edge m2->a0.h0<q>"):
        Circuit.full(SMALL).with_edges(np.ones_like(edge_mask(SMALL)) & (np.arange(10) == 9)[:, None])
    with refused(SiteError, r"kept of shape \(10, 21\) do not fit a graph of 13 writers x 29 readers"):
        Circuit(Graph(4, 2), np.zeros((10, 21), bool))
    with refused(SiteError, r"scores of shape \(2, 2\) do not fit a graph of 10 writers x 22 readers"):
        Circuit(SMALL, edge_mask(SMALL), np.zeros((2, 2)))


def test_what_is_not_known_is_not_guessed():
    with refused(OptionError, "not known which sign of these scores helps: run check_sign, or rank by size"):
        Circuit(SMALL, edge_mask(SMALL), np.zeros(edge_mask(SMALL).shape)).importance("value")
    with refused(OptionError, "this circuit has no scores"):
        Circuit.full(SMALL).importance()
