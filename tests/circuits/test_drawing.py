"""Pictures of circuits: every edge where, as wide and as coloured as it should be, in few traces."""

import json
from collections import Counter

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits.circuit import Circuit
from interp.circuits.drawing import WIDTHS, draw_by_position, draw_circuit
from interp.circuits.graph import Graph, edge_mask, readers, select_edges, writers
from interp.errors import OptionError, SiteError
from interp.plots import LOWERS, RAISES
from tests.circuits.test_circuit import edge_scores
from tests.small_pairs import refused

SMALL = Graph(3, 2, name="shape")
ENDS = {"input": (-1, 0), "logits": (99, 0)}
MOST_TRACES = 30  # whatever the circuit


def scored(scores: dict[str, float], graph: Graph = SMALL, **attrs) -> Circuit:
    """A circuit of these edges with these scores."""
    kept, values = select_edges(graph, list(scores)), np.full(edge_mask(graph).shape, np.nan)
    for edge, score in scores.items():
        values[select_edges(graph, [edge])] = score
    return Circuit(graph, kept, values, {"metric": "logit_diff", "unit": "logits", **attrs})


def trace_named(figure: go.Figure, name: str):
    return next(trace for trace in figure.data if trace.name == name)


def hover(figure: go.Figure) -> dict[tuple[float, float], str]:
    """{point to point at: the text shown}."""
    points = trace_named(figure, "edges")
    return dict(zip(zip(points.x, points.y, strict=True), points.customdata, strict=True))


def lines(figure: go.Figure) -> dict[str, dict]:
    """{hover text of an edge: its width, colour and ends}, read from the line that goes through the point it is shown at."""
    texts, found = hover(figure), {}
    for trace in figure.data:
        if trace.mode != "lines" or trace.showlegend is not False or trace.legendgroup is None or trace.line.dash:
            continue
        xs, ys = np.asarray(trace.x, float), np.asarray(trace.y, float)
        for points in np.split(np.stack([xs, ys], 1), np.flatnonzero(np.isnan(xs))):
            points = points[~np.isnan(points[:, 0])]
            if len(points):
                texts_on_it = [texts[point] for point in map(tuple, points.tolist()) if point in texts]
                assert len(texts_on_it) == 1
                found[texts_on_it[0]] = {
                    "width": trace.line.width, "colour": trace.line.color, "start": points[0], "end": points[-1],
                }  # fmt: skip
    assert len(found) == len(texts)
    return found


def edge_of(text: str) -> str:
    return text.split("<br>")[0].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def subtitle(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text or ""


def legend(figure: go.Figure) -> dict[str, str]:
    """{text: colour} of the legend."""
    return {trace.name: trace.line.color for trace in figure.data if trace.showlegend is not False}


# --------------------------------------------------------------------------------------------------- layer by head


@given(st.builds(Graph, st.integers(1, 4), st.integers(1, 4), st.booleans()), st.integers(0, 999), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_every_edge_is_drawn_once_with_its_width_and_colour(graph, seed, share):
    scores = edge_scores(graph, seed)
    circuit = Circuit.from_scores(scores, n_edges=int(share * edge_mask(graph).sum()), prune=False)
    figure = draw_circuit(circuit, max_edges=10_000)
    assert len(figure.data) <= MOST_TRACES
    drawn = {edge_of(text): line for text, line in lines(figure).items()}
    score = circuit.table().set_index("edge").score
    assert drawn.keys() == set(circuit.edges)
    ranked = sorted(drawn, key=lambda edge: abs(score[edge]))
    widths = [drawn[edge]["width"] for edge in ranked]
    assert widths == sorted(widths)
    assert set(widths) <= set(WIDTHS)
    if widths:
        assert widths[-1] == WIDTHS[-1]
    assert all(line["colour"] == (RAISES if score[edge] > 0 else LOWERS) for edge, line in drawn.items())


def place_of(node: str) -> tuple[int, bool]:
    if node in ENDS:
        return ENDS[node]
    return int(node[1:].split(".")[0]), node.startswith("m")


def test_rows_are_in_forward_order_from_the_input_up():
    circuit = Circuit.full(SMALL)
    figure = draw_circuit(circuit)
    assert list(figure.layout.yaxis.ticktext) == [
        "input", "layer 0 heads", "layer 0 MLP", "layer 1 heads", "layer 1 MLP", "layer 2 heads", "layer 2 MLP", "logits",
    ]  # fmt: skip
    boxes = trace_named(figure, "components")
    height = dict(zip(boxes.text, boxes.y, strict=True))
    assert height.keys() == set(circuit.nodes)
    ordered = sorted(height, key=place_of)
    assert [height[node] for node in ordered] == sorted(height.values())
    for text, line in lines(figure).items():
        source, target = edge_of(text).split("->")
        assert height[source] < line["start"][1] < line["end"][1] < height[target.partition("<")[0]]


def test_a_column_for_each_head_and_everything_else_in_the_middle():
    figure = draw_circuit(Circuit.full(Graph(2, 3)))
    boxes = trace_named(figure, "components")
    across = dict(zip(boxes.text, boxes.x, strict=True))
    assert {across[node] for node in ("input", "m0", "m1", "logits")} == {0}
    assert across["a0.h0"] == across["a1.h0"] < 0 < across["a0.h1"] < across["a0.h2"]
    ticks = dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True))
    assert {node: ticks[x] for node, x in across.items()} == {
        node: node.split("h")[1] if ".h" in node else "MLP" for node in across
    }  # fmt: skip
    assert len(set(zip(boxes.x, boxes.y, strict=True))) == len(boxes.text)


def test_what_is_not_in_the_circuit_is_not_drawn():
    figure = draw_circuit(scored({"input->a2.h1<v>": 1.0, "a2.h1->logits": 2.0}))
    assert list(figure.layout.yaxis.ticktext) == ["input", "layer 2 heads", "logits"]
    assert set(trace_named(figure, "components").text) == {"input", "a2.h1", "logits"}
    assert list(figure.layout.xaxis.ticktext) == ["MLP", "1"]


def test_queries_keys_and_values_arrive_at_the_left_the_middle_and_the_right():
    figure = draw_circuit(scored({f"m0->a1.h0<{x}>": 1.0 for x in "qkv"}))
    end = {edge_of(text): line["end"][0] for text, line in lines(figure).items()}
    boxes = trace_named(figure, "components")
    assert end["m0->a1.h0<q>"] < end["m0->a1.h0<k>"] < end["m0->a1.h0<v>"]
    assert end["m0->a1.h0<k>"] == dict(zip(boxes.text, boxes.x, strict=True))["a1.h0"]


def test_lines_of_one_column_do_not_run_through_what_stands_between():
    circuit = scored({"input->logits": 1.0, "m0->m2": 1.0, "m0->m1": 1.0, "m1->m2": 1.0})
    figure = draw_circuit(circuit)
    points = {edge_of(text): x for (x, _), text in hover(figure).items()}
    assert points["m0->m1"] == points["m1->m2"] == 0
    assert abs(points["input->logits"]) > abs(points["m0->m2"]) > 0.1


def test_no_two_edges_are_pointed_at_in_one_place():
    for graph in (SMALL, Graph(2, 4, parallel=True)):
        points = hover(draw_circuit(Circuit.full(graph), max_edges=10_000))
        assert len(points) == edge_mask(graph).sum()
        assert len({(round(x, 6), round(y, 6)) for x, y in points}) == len(points)


@pytest.mark.parametrize(
    ("attrs", "colours", "names"),
    [
        ({"direction": "denoise"}, (RAISES, LOWERS), ("helps (score &gt; 0)", "harms (score &lt; 0)")),
        ({"direction": "noise"}, (LOWERS, RAISES), ("harms (score &gt; 0)", "helps (score &lt; 0)")),
        ({"direction": "noise", "helpful_sign": 1}, (RAISES, LOWERS), ("helps (score &gt; 0)", "harms (score &lt; 0)")),
        ({}, (RAISES, LOWERS), ("score &gt; 0", "score &lt; 0")),
    ],
)
def test_blue_helps_and_the_legend_says_so(attrs, colours, names):
    figure = draw_circuit(scored({"input->m0": 1.0, "m0->logits": -1.0}, **attrs))
    drawn = {edge_of(text): line["colour"] for text, line in lines(figure).items()}
    assert (drawn["input->m0"], drawn["m0->logits"]) == colours
    assert [legend(figure)[name] for name in names] == list(colours)


def test_the_legend_says_what_widths_mean():
    figure = draw_circuit(scored({"input->m0": 1.2, "m0->logits": -0.1}))
    samples = {trace.name: trace.line.width for trace in figure.data if trace.legendgroup == "width"}
    assert samples == {"0.2 logits": WIDTHS[0], "0.6 logits": WIDTHS[2], "1.2 logits": WIDTHS[5]}
    assert trace_of_width(figure).legendgrouptitle.text == "|score| up to"
    found = {edge_of(text): line["width"] for text, line in lines(figure).items()}
    assert found == {"input->m0": WIDTHS[5], "m0->logits": WIDTHS[0]}


def trace_of_width(figure: go.Figure):
    return next(trace for trace in figure.data if trace.legendgroup == "width")


def test_pointing_at_an_edge_shows_its_id_score_and_unit():
    texts = hover(draw_circuit(scored({"input->a0.h1<q>": -0.25, "m0->logits": 1e-9})))
    assert set(texts.values()) == {"input-&gt;a0.h1&lt;q&gt;<br>-0.25 logits", "m0-&gt;logits<br>+1e-09 logits"}


def test_edges_without_a_score_are_grey():
    for circuit in (
        Circuit.from_edges(SMALL, ["input->m0"]),
        scored({"input->m0": np.nan}),
        scored({"input->m0": 0.0}),
    ):
        figure = draw_circuit(circuit)
        (line,) = lines(figure).values()
        assert line["colour"] not in (RAISES, LOWERS)
        assert line["width"] <= WIDTHS[1]
        assert list(legend(figure)) == ["no score, or 0"]


def test_of_many_edges_the_strongest_are_drawn_and_the_picture_says_so():
    circuit = Circuit.ranked(edge_scores(SMALL, unit="logits"))
    figure = draw_circuit(circuit, max_edges=7)
    drawn = {edge_of(text) for text in hover(figure).values()}
    assert drawn == set(circuit.table().edge[:7])
    assert "the 7 strongest of 100 edges" in subtitle(figure)
    ends = {end for edge in drawn for end in (edge.split("->")[0], edge.split("->")[1].partition("<")[0])}
    assert set(trace_named(figure, "components").text) == ends | {"input", "logits"}
    assert "strongest" not in subtitle(draw_circuit(circuit, max_edges=100))


def test_scored_edges_come_before_those_without_a_score():
    circuit = scored({"input->m0": np.nan, "m0->m1": -0.1, "m1->logits": np.nan})
    assert {edge_of(text) for text in hover(draw_circuit(circuit, max_edges=1)).values()} == {"m0->m1"}


def test_an_empty_circuit_has_its_two_ends_and_a_note():
    figure = draw_circuit(Circuit.from_edges(SMALL, []))
    assert list(trace_named(figure, "components").text) == ["input", "logits"]
    assert subtitle(figure) == "there is no edge to draw"
    assert hover(figure) == {}
    assert figure.layout.title.text == "shape: circuit of 0 edges"


def test_names_of_models_are_text_and_not_markup():
    circuit = scored({"input->m0": 1.0}, Graph(1, 1, name="<b>&"), unit="<i>u</i>", metric="<u>m</u>")
    text = json.dumps(json.loads(draw_circuit(circuit).to_json()), ensure_ascii=False)
    assert "&lt;b&gt;&amp;: circuit of 1 edge" in text
    assert not [tag for tag in ("<b>", "<i>", "<u>") if tag in text]


def test_a_title_of_ones_own_and_the_circuits_own_method():
    circuit = scored({"input->m0": 1.0})
    assert circuit.draw(title="mine", max_edges=5).layout.title.text == "mine"
    assert circuit.draw().to_json() == draw_circuit(circuit).to_json()
    with refused(OptionError, "max_edges is -1"):
        circuit.draw(max_edges=-1)


# ----------------------------------------------------------------------------------------------- layer by position

TOKENS = ["␣Mary", "␣and", "<b>", "␣to"]


def by_position(scores: dict[tuple[str, int], float], graph: Graph = SMALL, n: int = 4, **attrs) -> xr.DataArray:
    """Scores [source, target, position]: these, and 0 elsewhere."""
    values = np.where(edge_mask(graph), 0.0, np.nan)[..., None].repeat(n, -1)
    for (edge, t), score in scores.items():
        values[select_edges(graph, [edge]), t] = score
    about = {**graph.attrs(), "model": graph.name, "direction": "denoise", "unit": "logits", **attrs}
    coords = {"source": writers(graph), "target": readers(graph), "position": range(n)}
    return xr.DataArray(values, coords, ("source", "target", "position"), attrs=about)


MOVING = {("input->a1.h0<v>", 1): 2.0, ("input->a1.h0<q>", 3): -0.1, ("a1.h0->logits", 3): 3.0, ("input->m0", 0): 0.5}
MOVER = Circuit.from_edges(SMALL, ["input->a1.h0<v>", "input->a1.h0<q>", "a1.h0->logits", "input->m0"])


def columns(figure: go.Figure) -> np.ndarray:
    return np.asarray(figure.layout.xaxis.tickvals, float)


def test_edges_stand_at_their_positions():
    figure = draw_by_position(by_position(MOVING), MOVER, tokens=TOKENS)
    drawn = lines(figure)
    assert {(edge_of(text), text.split("position ")[1]) for text in drawn} == {
        (edge, TOKENS[t].replace("<b>", "&lt;b&gt;")) for edge, t in MOVING
    }  # fmt: skip
    rows = {name: y for y, name in enumerate(figure.layout.yaxis.ticktext)}
    assert list(rows) == ["input", "layer 0 MLP", "layer 1 heads", "logits"]
    for text, line in drawn.items():
        middle = columns(figure)[TOKENS.index(text.split("position ")[1])]
        assert abs(line["start"][0] - middle) < 20
        assert abs(line["end"][0] - middle) < 20
        assert line["start"][1] < line["end"][1]
    width = {edge_of(text): line["width"] for text, line in drawn.items()}
    assert width["a1.h0->logits"] == WIDTHS[-1] > width["input->a1.h0<v>"] > width["input->a1.h0<q>"] == WIDTHS[0]
    assert {edge_of(text): line["colour"] for text, line in drawn.items()}["input->a1.h0<q>"] == LOWERS
    assert len(figure.data) <= MOST_TRACES


def test_a_head_moves_what_it_reads_at_one_position_to_another():
    figure = draw_by_position(by_position(MOVING), MOVER, tokens=TOKENS)
    moves = trace_named(figure, "moves")
    assert list(moves.customdata) == ["a1.h0 reads at ␣and<br>and writes at ␣to"]
    assert list(moves.marker.symbol) == ["triangle-right"]
    (arc,) = [trace for trace in figure.data if trace.line.dash == "dot"]
    assert (arc.x[0], arc.x[-2]) == (columns(figure)[1], columns(figure)[3])
    dots = trace_named(figure, "components")
    assert dict(Counter(zip(dots.customdata, dots.text, strict=True))) == {
        ("a1.h0<br>position ␣and", "h0"): 1, ("a1.h0<br>position ␣to", "h0"): 1, ("logits<br>position ␣to", ""): 1,
        ("input<br>position ␣Mary", ""): 1, ("m0<br>position ␣Mary", ""): 1, ("input<br>position ␣and", ""): 1,
        ("input<br>position ␣to", ""): 1,
    }  # fmt: skip


def test_a_head_that_stays_where_it_is_has_no_arc():
    figure = draw_by_position(by_position({("input->a1.h0<v>", 3): 2.0, ("a1.h0->logits", 3): 3.0}), MOVER)
    assert not [trace for trace in figure.data if trace.line.dash == "dot"]
    only_query = draw_by_position(by_position({("input->a1.h0<q>", 1): 2.0, ("a1.h0->logits", 3): 3.0}), MOVER)
    assert not [trace for trace in only_query.data if trace.line.dash == "dot"]


def test_only_kept_edges_are_drawn_and_of_those_the_strongest():
    scores = by_position({**MOVING, ("m0->m1", 2): 50.0})
    figure = draw_by_position(scores, MOVER, max_edges=2)
    assert {edge_of(text) for text in hover(figure).values()} == {"a1.h0->logits", "input->a1.h0<v>"}
    assert "the 2 strongest of 4 pairs of an edge and a position" in subtitle(figure)
    assert "strongest" not in subtitle(draw_by_position(scores, MOVER))


def test_heads_of_one_place_stand_apart():
    edges = [f"input->a0.h{h}<v>" for h in range(4)]
    graph = Graph(1, 4)
    circuit = Circuit.from_edges(graph, edges)
    figure = draw_by_position(by_position({(edge, 1): 1.0 for edge in edges}, graph), circuit)
    dots = trace_named(figure, "components")
    heads = sorted((x, text) for x, text in zip(dots.x, dots.text, strict=True) if text)
    assert [text for _, text in heads] == ["h0", "h1", "h2", "h3"]
    assert np.diff([x for x, _ in heads]).min() > 15
    assert np.diff(columns(figure)).min() > 20


def test_prompts_are_averaged_and_padding_is_left_out():
    one = by_position(MOVING)
    prompts = xr.concat([one, 3 * one, one * np.nan], "prompt").assign_attrs(one.attrs)
    figure = draw_by_position(prompts, MOVER)
    np.testing.assert_array_equal(
        list(hover(figure)), list(hover(draw_by_position((2 * one).assign_attrs(one.attrs), MOVER)))
    )
    assert "input-&gt;m0<br>+1 logits<br>position 0" in hover(figure).values()


def test_labels_are_the_scores_own_tokens_unless_others_are_given():
    scores = by_position(MOVING)
    assert list(draw_by_position(scores, MOVER).layout.xaxis.ticktext) == ["0", "1", "2", "3"]
    labelled = scores.assign_coords(token=("position", ["0:<b>", "1:b", "2:c", "3:d"]))
    assert list(draw_by_position(labelled, MOVER).layout.xaxis.ticktext) == ["0:&lt;b&gt;", "1:b", "2:c", "3:d"]
    own = draw_by_position(labelled, MOVER, tokens=[" a", "b\n", "c", "d"], title="mine")
    assert list(own.layout.xaxis.ticktext) == ["␣a", "b⏎", "c", "d"]
    assert own.layout.title.text == "mine"


def test_the_sign_is_that_of_the_scores_and_else_the_circuits():
    scores = by_position(MOVING, direction="noise")

    def colour(scores: xr.DataArray, circuit: Circuit) -> str:
        found = lines(draw_by_position(scores, circuit))
        return next(line["colour"] for text, line in found.items() if edge_of(text) == "input->m0")

    assert colour(scores, MOVER.with_attrs(helpful_sign=1)) == LOWERS
    del scores.attrs["direction"]
    assert colour(scores, MOVER.with_attrs(helpful_sign=-1)) == LOWERS
    assert colour(scores, MOVER) == RAISES


def test_nothing_to_draw_is_said():
    for scores, circuit in ((by_position({}), MOVER), (by_position(MOVING), Circuit.from_edges(SMALL, []))):
        figure = draw_by_position(scores, circuit)
        assert subtitle(figure) == "there is no edge to draw"
        assert list(figure.layout.yaxis.ticktext) == ["input", "logits"]


def test_scores_and_labels_that_do_not_fit_are_refused():
    scores = by_position(MOVING)
    with refused(OptionError, "axes source, target and position, not source, target"):
        draw_by_position(scores.isel(position=0), MOVER)
    with refused(OptionError, "3 tokens cannot label 4 positions"):
        draw_by_position(scores, MOVER, tokens=["a", "b", "c"])
    with refused(SiteError, "scores name a source that shape does not have: a9.h9"):
        draw_by_position(scores.assign_coords(source=["a9.h9", *writers(SMALL)[1:]]), MOVER)


def test_the_same_circuit_gives_the_same_picture():
    scores = by_position(MOVING)
    assert draw_by_position(scores, MOVER).to_json() == draw_by_position(scores, MOVER).to_json()
