"""The circuit page, and what it draws: edges by influence, a graph whose indices mean what was clicked, ablations."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

import interp
from app import circuits, jobs
from app.behaviour import Behaviour
from app.charts import visible
from interp.circuits.circuit import Circuit, prune
from interp.circuits.graph import Graph, edge_mask, owners, writers
from interp.errors import OptionError, SiteError
from interp.jobs.runner import run
from interp.plots import LOWERS, RAISES
from tests.small_pairs import refused

SMALL = Graph(2, 3, False, 8, "small")


def scored(graph: Graph, seed: int = 0, zero: float = 0.0) -> Circuit:
    draw = np.random.default_rng(seed)
    scores = np.where(edge_mask(graph), draw.standard_normal(edge_mask(graph).shape), np.nan)
    scores[draw.random(scores.shape) < zero] *= 0
    return Circuit(graph, edge_mask(graph), scores, {"unit": "logits", "direction": "denoise"})


def event(**indices):
    """What an ECharts selection gives, by the kind of thing selected."""
    return {
        "selection": {"selected": [{"series_index": 0, "data_type": k, "data_indices": v} for k, v in indices.items()]}
    }


# ------------------------------------------------------------------------------------------------------ edges to show


@given(seed=st.integers(0, 50), share=st.floats(0.01, 1), zero=st.sampled_from([0.0, 0.5]))
def test_the_fewest_edges_that_hold_the_share(seed, share, zero):
    ranked = scored(SMALL, seed, zero)
    circuit = circuits.by_influence(ranked, share)
    sizes = np.sort(np.nan_to_num(np.abs(ranked.scores)).ravel())[::-1]
    n = circuit.attrs["n_edges"]
    assert sizes[:n].sum() >= share * sizes.sum() * (1 - 1e-9)
    assert n <= 1 or sizes[: n - 1].sum() < share * sizes.sum() * (1 + 1e-9)
    assert circuit == ranked.top(n)


def test_scores_of_zero_hold_nothing():
    ranked = scored(SMALL, zero=1.0)
    assert circuits.by_influence(ranked, 0.9).n_edges == 0


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_a_share_lies_between_0_and_1(share):
    with refused(OptionError, "share of influence"):
        circuits.by_influence(scored(SMALL), share)


@given(seed=st.integers(0, 20), max_nodes=st.integers(0, 12), max_edges=st.integers(0, 40))
def test_what_is_drawn_is_the_strongest_that_fits(seed, max_nodes, max_edges):
    circuit = scored(SMALL, seed)
    shown = circuits.drawable(circuit, max_nodes=max_nodes, max_edges=max_edges)
    ends = lambda kept: len(np.unique(np.r_[kept.nonzero()[0], owners(SMALL)[kept.any(0)]]))  # noqa: E731
    assert shown.n_edges <= max_edges
    assert ends(shown.kept) <= max_nodes
    order = circuit.order("size")
    assert set(np.flatnonzero(shown.kept)) == set(order[: shown.n_edges])
    if shown.n_edges < min(max_edges, circuit.n_edges):
        more = shown.kept.copy()
        more.flat[order[shown.n_edges]] = True
        assert ends(more) > max_nodes


def test_taking_nodes_and_edges_away():
    full = Circuit.full(SMALL)
    rest = circuits.without(full, ["a0.h1", "input->m1"])
    assert set(full.edges) - set(rest.edges) == {e for e in full.edges if e.startswith("a0.h1->") or e == "input->m1"}
    assert circuits.without(full, []) == full
    for strange in ("logits", "a7.h0", "m0->input"):
        with refused(SiteError, strange):
            circuits.without(full, [strange])


def test_edges_of_a_node():
    circuit = scored(SMALL)
    into, out = circuits.edges_of(circuit, "a1.h2")
    assert set(into.edge) == {e for e in circuit.edges if "->a1.h2<" in e}
    assert set(out.edge) == {e for e in circuit.edges if e.startswith("a1.h2->")}
    assert (into.score.abs().diff().dropna() <= 0).all()
    assert len(circuits.edges_of(circuit, "logits")[1]) == 0


def test_only_what_the_graph_has_is_known():
    names = ["a0.h1", "a9.h0", "logits", "input->m0", "m0->input", "x", "a0.h0->a1.h0<q>"]
    assert circuits.known(names, SMALL) == ["a0.h1", "logits", "input->m0", "a0.h0->a1.h0<q>"]


# ------------------------------------------------------------------------------------------------------------ drawing


def test_the_graph_is_the_circuit():
    circuit = circuits.by_influence(scored(SMALL), 0.7)
    view = circuits.graph_spec(circuit)
    series = view.spec["series"][0]
    assert view.nodes == [*writers(SMALL), "logits"]
    assert sorted(view.edges) == sorted(circuit.edges)
    table = circuit.table().set_index("edge").score
    for name, link in zip(view.edges, series["links"], strict=True):
        assert link["id"] == name
        source, target = view.nodes[link["source"]], view.nodes[link["target"]]
        assert name.startswith(f"{source}->{target}")
        assert link["value"] == pytest.approx(table[name], rel=1e-3)
        assert link["lineStyle"]["color"] == (RAISES if table[name] > 0 else LOWERS)
    widths = [link["lineStyle"]["width"] for link in series["links"]]
    assert widths == sorted(widths), "strong edges lie on top"
    json.dumps(view.spec, allow_nan=False)


def test_nodes_stand_where_they_stood():
    whole, part = (circuits.graph_spec(circuits.by_influence(scored(SMALL), share)) for share in (1, 0.5))
    at = [{d["name"]: (d["x"], d["y"]) for d in view.spec["series"][0]["data"]} for view in (whole, part)]
    assert at[0] == at[1]
    assert len(set(at[0].values())) == len(at[0])
    assert at[0]["input"][1] > at[0]["a0.h0"][1] > at[0]["m0"][1] > at[0]["a1.h0"][1] > at[0]["logits"][1]
    assert at[0]["m0"][0] == at[0]["m1"][0] > at[0]["a0.h2"][0]


def test_marks_are_drawn():
    groups = {"one": ["a0.h0", "m0"], "two": ["a1.h1"]}
    view = circuits.graph_spec(scored(SMALL), pins=["m1"], groups=groups, notes={"m0": "text"})
    data = {d["name"]: d for d in view.spec["series"][0]["data"]}
    border = {name: data[name]["itemStyle"]["borderColor"] for name in ("a0.h0", "m0", "a1.h1", "m1")}
    assert border["a0.h0"] == border["m0"] != border["a1.h1"] != border["m1"]
    assert data["m1"]["itemStyle"]["borderType"] == "dashed"
    assert data["m0"]["itemStyle"]["borderType"] == "solid"
    assert data["m0"]["label"]["formatter"].endswith("*")
    assert not data["m1"]["label"]["formatter"].endswith("*")


def test_selecting_changes_nothing_else():
    view = circuits.graph_spec(scored(SMALL))
    chosen = view.selecting(["m0", "gone"])
    flags = {d["name"]: d["selected"] for d in chosen.spec["series"][0]["data"]}
    assert [name for name, flag in flags.items() if flag] == ["m0"]
    assert (chosen.nodes, chosen.edges) == (view.nodes, view.edges)
    assert "selected" not in view.spec["series"][0]["data"][0]
    assert view.digest == circuits.graph_spec(scored(SMALL)).digest != circuits.graph_spec(scored(SMALL, 1)).digest


def test_every_index_is_its_id():
    view = circuits.graph_spec(scored(SMALL))
    assert circuits.nodes_clicked(event(node=list(range(len(view.nodes)))), view) == view.nodes
    assert circuits.edges_clicked(event(edge=[3, 0], node=[1]), view) == [view.edges[3], view.edges[0]]


@pytest.mark.parametrize(
    "gone",
    [None, {}, {"selection": {}}, event(), event(node=[10_000], edge=[10_000]), event(main=[0]), SimpleNamespace()],
    ids=["none", "empty", "unselected", "nothing", "stale", "another-chart", "no-event"],
)
def test_clicks_that_mean_nothing(gone):
    view = circuits.graph_spec(scored(SMALL))
    assert circuits.nodes_clicked(gone, view) == []
    assert circuits.edges_clicked(gone, view) == []


def test_labels_of_layers_are_no_nodes():
    view = circuits.graph_spec(scored(SMALL))
    data = view.spec["series"][0]["data"]
    assert [d["name"] for d in data[: len(view.nodes)]] == view.nodes
    labels = list(range(len(view.nodes), len(data)))
    assert labels
    assert circuits.nodes_clicked(event(node=labels), view) == []


def test_a_thousand_nodes_and_ten_thousand_edges_in_half_a_second():
    large = scored(Graph(37, 26, True, 64, "large"))
    assert len(writers(large.graph)) == 1000
    shown = circuits.drawable(large, max_nodes=1001)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        view = circuits.graph_spec(shown)
        took.append(time.perf_counter() - start)
    assert len(view.nodes) >= 1000
    assert len(view.edges) == circuits.MAX_EDGES
    assert min(took) < 0.5, f"took {min(took):.2f} s"
    text = circuits.shown_text(shown, large)
    assert f"10,000 of {large.n_edges:,} edges" in text
    assert f"{large.n_edges - 10_000:,} weaker" in text


def test_attention_shows_every_cell_that_a_query_sees():
    pattern = np.tril(np.full((3, 3), 0.5))
    spec = circuits.attention_spec(pattern, ["a", visible(" b"), "a"])
    cells = [d["value"][:2] for d in spec["series"][0]["data"]]
    assert sorted(cells) == [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]]
    assert spec["visualMap"]["min"] == 0
    assert spec["visualMap"]["max"] == 1


# ------------------------------------------------------------------------------------------------------------ numbers

ASKED = (Behaviour(n=2), "eap", "gradient", "logit_diff")


@pytest.fixture(scope="module")
def model():
    return interp.load_model("mini-gpt2")


@pytest.fixture(scope="module")
def pairs(model):
    return interp.load_task("ioi", model, n=2, seed=0)


def test_the_numbers_are_the_library_s(model, pairs):
    circuit = circuits.circuit_of(*ASKED, 0.9)
    chosen = ("a3.h1", "input->m0")
    found = circuits.measured(*ASKED, 0.9, chosen, "corrupt")
    everything = Circuit.full(circuit.graph)
    rest = [e for e in everything.edges if e not in chosen and not e.startswith("a3.h1->")]
    expected = interp.faithfulness(model, pairs, [circuit, Circuit.from_edges(circuit.graph, rest)])
    assert np.array_equal(found.value[:, :2], expected.value)
    assert found.n_edges.values.tolist()[:2] == [circuit.n_edges, len(rest)]


def test_nothing_chosen_changes_nothing():
    found = circuits.measured(*ASKED, 0.9, (), "corrupt").faithfulness
    assert float(found.sel(circuit="model without")) == pytest.approx(1, abs=1e-6)
    assert float(found.sel(circuit="circuit")) == float(found.sel(circuit="circuit without"))


def test_tokens_of_a_head_are_those_of_what_it_writes(model):
    table = circuits.node_tokens(ASKED[0], "a3.h1", 3)
    assert table.groupby("side").size().to_dict() == {"top": 3, "bottom": 3}
    assert (table[table.side == "top"].value.min() > table[table.side == "bottom"].value).all()
    with refused(SiteError, "input is no head or MLP"):
        circuits.node_tokens(ASKED[0], "input")


def test_the_notebook_s_lines_make_the_circuit(model, pairs):
    circuit = circuits.circuit_of(*ASKED, 0.9)
    code = circuits.code_of(circuit, *ASKED[1:], "corrupt", ["a3.h1", "input->m0"])
    names = {"interp": interp, "model": model, "pairs": pairs}
    exec(code, names)
    assert names["circuit"] == circuit
    assert names["ablated"] == circuits.without(Circuit.full(circuit.graph), ["a3.h1", "input->m0"])


def test_the_file_is_the_circuit(tmp_path):
    circuit = circuits.circuit_of(*ASKED, 0.9)
    path = tmp_path / "circuit.json"
    path.write_bytes(circuits.circuit_json(circuit))
    assert Circuit.load(path) == circuit
    assert (prune(circuit.graph, circuit.kept) == circuit.kept).all()


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_from_an_address(page):
    at = page("circuit", share="0.9", n="2", chosen="a3.h1")
    assert at.slider(key="share").value == 0.9
    assert at.multiselect(key="chosen").value == ["a3.h1"]
    assert any("of 1,519 edges" in caption.value for caption in at.caption)
    assert any(text.value == "a3.h1" for text in at.subheader)


def test_ablating_moves_the_metric(page):
    at = page("circuit", n="2")
    assert at.button(key="ablate").disabled
    assert at.info
    at.multiselect(key="chosen").set_value(["a3.h1", "a2.h7"]).run()
    at.button(key="ablate").click().run()
    assert not at.exception, at.exception[0].message
    shown = {metric.label: metric for metric in at.metric}
    without = float(shown["Model without selection"].value)
    assert without < float(shown["Clean"].value)
    assert float(shown["Model without selection"].delta) == pytest.approx(
        without - float(shown["Clean"].value), abs=2e-3
    )
    at.multiselect(key="chosen").set_value(["a3.h1"]).run()
    assert "Model without selection" not in {metric.label for metric in at.metric}, "that was another selection's"


@pytest.mark.parametrize("node", ["m2", "input", "logits"])
def test_every_kind_of_node_can_be_looked_into(page, node):
    at = page("circuit", n="2", at=node)
    assert any(text.value == node for text in at.subheader)


@pytest.mark.parametrize("query", [{"chosen": "a9.h9"}, {"at": "<script>"}, {"share": "7"}, {"metric": "none"}],
                         ids=["node", "markup", "share", "metric"])  # fmt: skip
def test_an_address_that_means_nothing(page, query):
    at = page("circuit", n="2", **query)
    assert not at.multiselect(key="chosen").value
    assert at.slider(key="share").value == 0.95


def test_notes_groups_and_pins_are_kept(page):
    at = page("circuit", n="2", at="m2")
    at.toggle(key="pinned_m2").set_value(True)
    at.text_input(key="group_m2").set_value("late")
    at.text_area(key="note_m2").set_value("<b>writes</b>")
    at.button(key="keep").click().run()
    assert not at.exception, at.exception[0].message
    assert at.session_state["notes"] == {"pins": ["m2"], "groups": {"late": ["m2"]}, "notes": {"m2": "<b>writes</b>"}}
    assert any(text.value == "<b>writes</b>" for text in at.text)


def test_the_curve_when_it_is_asked_for(page):
    at = page("circuit", n="2")
    assert not any("CPR" in caption.value for caption in at.caption)
    at.button(key="curve").click().run()
    assert not at.exception, at.exception[0].message
    assert any("CPR" in caption.value for caption in at.caption)


def test_rules_that_do_not_go_with_a_method_are_one_sentence(page):
    at = page("circuit", n="2", method="eap-ig", edge_rules="secant")
    assert [error.value for error in at.error]
    assert not at.exception


def test_the_primary_place_is_looked_into(page):
    at = page("circuit", n="2", at="m0", chosen="m0")
    at.multiselect(key="chosen").set_value(["m0", "m1"]).run()
    assert [text.value for text in at.subheader] == ["m1"], "the one chosen last"
    at.multiselect(key="chosen").set_value([]).run()
    assert [text.value for text in at.subheader] == ["m1"]


def test_a_model_whose_graph_lacks_the_selection(page):
    at = page("circuit", n="2", at="a3.h1", chosen="a3.h1")
    at.session_state["behaviour"] = Behaviour(model="mini-llama", n=2)
    at.session_state["chosen"] = ["a3.h1", "a40.h1"]
    at.run()
    assert not at.exception, at.exception[0].message
    assert at.multiselect(key="chosen").value == ["a3.h1"]


def test_exact_scores_are_a_jobs_work(page, monkeypatch, tmp_path, mini_gpt2):
    monkeypatch.setenv("INTERP_APP_RUNS", str(tmp_path / "runs"))
    at = page("circuit", method="exact", n="2")
    assert at.button(key="submit").label == "Run as a job"
    assert at.selectbox(key="edge_rules").disabled
    assert not at.get("echarts_chart")
    asked = Behaviour(n=2)
    run(circuits.exact_job(asked, "logit_diff"), jobs.runs())
    at = page("circuit", method="exact", n="2")
    assert len(at.get("echarts_chart")) >= 1
    expected = interp.edge_patching(mini_gpt2, asked.pairs(mini_gpt2), batch_size=8).mean("prompt")
    np.testing.assert_array_equal(circuits.mean_scores(asked, "exact", "gradient", "logit_diff"), expected)
