"""Circuits as files: MIB's published circuit, what comes back of what is written, and what is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp.circuits.circuit import Circuit
from interp.circuits.export import save_circuit, to_networkx
from interp.circuits.graph import Graph, edge_mask, select_edges
from interp.errors import InterpError, OptionError, SiteError
from tests.circuits.test_circuit import by_name, edge_scores
from tests.small_pairs import refused

SMALL = Graph(2, 2, d_model=4, name="shape")
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def mib_file(shared_data) -> Path:
    path = shared_data / "reference" / "mib_ioi_graph" / "circuits" / "ioi-eap-ig.json"
    if not path.exists():
        pytest.skip(f"{path} is not there (a file of another project, beside a clone and not part of it)")
    return path


def content(path: Path) -> dict:
    """The file as a strict reader has it: one that refuses NaN."""

    def no_nan(text: str):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_nan)


def assert_same(one: Circuit, other: Circuit) -> None:
    """The same in every bit: edges, scores, attributes, and what is said of nodes."""
    assert one == other
    assert one.graph == other.graph
    assert (one.scores is None) == (other.scores is None)
    if one.scores is not None:
        np.testing.assert_array_equal(one.scores, other.scores)
    assert dict(one.attrs) == dict(other.attrs)
    assert one.about_nodes.keys() == other.about_nodes.keys()
    for name, fields in one.about_nodes.items():
        assert fields.keys() == other.about_nodes[name].keys()
        for field, value in fields.items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(other.about_nodes[name][field]))


def small(**about) -> Circuit:
    """Every third edge of a small model, all of them scored."""
    scores = edge_scores(SMALL, metric="logit_diff", unit="logits")
    circuit = Circuit.ranked(scores)
    kept = circuit.kept & (np.arange(circuit.kept.size).reshape(circuit.kept.shape) % 3 == 0)
    return Circuit(circuit.graph, kept, circuit.scores, circuit.attrs, **about)


# ------------------------------------------------------------------------------------------------------- MIB's own file


def test_mibs_circuit_is_what_it_is_known_to_be(mib_file):
    circuit = Circuit.load(mib_file)
    assert repr(circuit) == "Circuit(model: 756 of 32,491 edges, 81 nodes)"
    assert circuit.graph == Graph(12, 12, parallel=False, d_model=768)
    assert np.isfinite(circuit.scores).sum() == 32_491
    assert dict(circuit.attrs) == dict(circuit.about_nodes) == {}
    stored = content(mib_file)
    assert {name for name, node in stored["nodes"].items() if node["in_graph"]} == set(circuit.nodes)
    assert {name for name, edge in stored["edges"].items() if edge["in_graph"]} == set(circuit.edges)
    table = circuit.with_edges(edge_mask(circuit.graph)).table().set_index("edge").score
    assert table.to_dict() == {name: edge["score"] for name, edge in stored["edges"].items()}


def test_mibs_circuit_is_its_800_largest_edges_without_dead_ends(mib_file):
    circuit = Circuit.load(mib_file)
    assert circuit.top(800).edges == circuit.edges
    assert circuit.top(800, prune=False).n_edges == 800


def test_in_mibs_file_helpful_edges_are_negative_and_nobody_says_so(mib_file):
    circuit = Circuit.load(mib_file)
    score = circuit.table().set_index("edge").score
    assert score["a9.h9->logits"] < score["a9.h6->logits"] < 0  # name movers
    assert score["a10.h7->logits"] > score["a11.h10->logits"] > 0  # negative name movers
    with refused(OptionError, "not known which sign of these scores helps"):
        _ = circuit.helpful_sign


def test_mibs_file_comes_back_as_it_was(mib_file, tmp_path):
    circuit = Circuit.load(mib_file)
    again = circuit.save(tmp_path / "again.json")
    assert content(again) == content(mib_file)
    assert_same(Circuit.load(again), circuit)


def test_once_its_sign_is_known_mibs_file_is_written_with_helpful_edges_positive(mib_file, tmp_path):
    circuit = Circuit.load(mib_file).with_attrs(helpful_sign=-1)
    found = Circuit.load(save_circuit(circuit, tmp_path / "mib.json"))
    np.testing.assert_array_equal(found.scores, -circuit.scores)
    assert found == circuit
    assert found.helpful_sign == 1
    assert found.top(800, by="value") == circuit.top(800, by="value")


# ------------------------------------------------------------------------------------------------------ there and back


@given(
    graph=st.builds(Graph, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.just(4), st.text(max_size=5)),
    data=st.data(),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again(graph, data, tmp_path):
    there, random = edge_mask(graph), np.random.default_rng(data.draw(st.integers(0, 999)))
    unscored = random.random(there.shape) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    size = data.draw(st.sampled_from([1e-300, 1.0, 1e300]))
    scores = np.where(there & ~unscored, size * random.standard_normal(there.shape), np.nan)
    kept = there & (random.random(there.shape) < 0.5)
    attrs = data.draw(
        st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | FINITE | st.text())
    )
    number = FINITE | st.just(math.nan)
    fields = st.fixed_dictionaries(
        {}, optional={"score": number, "neurons": st.lists(st.booleans(), min_size=4, max_size=4),
                      "neurons_scores": st.lists(number, min_size=4, max_size=4), "note": st.text()}
    )  # fmt: skip
    about = data.draw(st.dictionaries(st.sampled_from(Circuit.full(graph).nodes), fields.filter(bool), max_size=3))
    circuit = Circuit(graph, kept, scores if data.draw(st.booleans()) else None, attrs, about)
    path = save_circuit(circuit, tmp_path / "circuit.json", sign="as-is")
    content(path)
    found = Circuit.load(path)
    assert_same(found, circuit)
    first = path.read_bytes()
    assert found.save(path).read_bytes() == first


def test_a_file_names_every_edge_and_every_node(tmp_path):
    circuit = small()
    stored = content(circuit.save(tmp_path / "circuit.json"))
    assert list(stored) == ["cfg", "nodes", "edges", "interp"]
    assert stored["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 4}
    assert list(stored["nodes"]) == Circuit.full(SMALL).nodes
    assert set(stored["edges"]) == set(Circuit.full(SMALL).edges)
    assert {name for name, edge in stored["edges"].items() if edge["in_graph"]} == set(circuit.edges)
    assert {name for name, node in stored["nodes"].items() if node["in_graph"]} == set(circuit.nodes)
    assert stored["interp"]["model"] == "shape"
    assert stored["interp"]["attrs"]["unit"] == "logits"


def test_edges_that_were_not_scored_are_zero_for_others_and_unscored_for_us(tmp_path):
    scores = edge_scores(SMALL)
    scores.loc[{"source": "m0"}] = np.nan
    scores.loc[{"source": "input", "target": "m0"}] = 0.0
    circuit = Circuit.ranked(scores).with_edges(select_edges(SMALL, ["m0->a1.h0<q>", "input->m0"]))
    stored = content(circuit.save(tmp_path / "circuit.json"))
    of_m0 = {edge for edge in stored["edges"] if edge.startswith("m0->")}
    assert {edge for edge, about in stored["edges"].items() if about["score"] == 0} == of_m0 | {"input->m0"}
    assert set(stored["interp"]["unscored"]) == of_m0
    assert_same(Circuit.load(tmp_path / "circuit.json"), circuit.with_attrs(helpful_sign=1))


def test_a_circuit_without_scores_has_none_afterwards(tmp_path):
    circuit = Circuit.from_edges(SMALL, ["m0->m1"])
    stored = content(circuit.save(tmp_path / "circuit.json"))
    assert stored["interp"]["unscored"] == "all"
    assert_same(Circuit.load(tmp_path / "circuit.json"), circuit)


def test_a_node_field_with_nan_stays_out_of_the_format(tmp_path):
    about = {"m0": {"score": math.nan, "neurons": [True] * 4}, "a0.h1": {"neurons_scores": [0.5, math.nan, 1.0, 2.0]}}
    circuit = small(about_nodes=about)
    stored = content(circuit.save(tmp_path / "circuit.json"))
    assert stored["nodes"]["m0"].keys() == {"in_graph", "neurons"}
    assert stored["nodes"]["a0.h1"].keys() == {"in_graph"}
    assert stored["interp"]["unscored_nodes"] == {
        "a0.h1": {"neurons_scores": [0.5, None, 1.0, 2.0]}, "m0": {"score": None},
    }  # fmt: skip
    assert_same(Circuit.load(tmp_path / "circuit.json"), circuit.with_attrs(helpful_sign=1))


def test_eap_igs_nan_is_read_as_not_scored(tmp_path):
    path = tmp_path / "circuit.json"
    stored = content(Circuit.from_edges(SMALL, []).save(path))
    del stored["interp"]
    stored["edges"] = {"m0->m1": {"score": math.nan, "in_graph": True}, "m0->logits": {"score": 2, "in_graph": False},
                       "m1->logits": {"score": None, "in_graph": False}, "input->m0": {"in_graph": True}}  # fmt: skip
    stored["nodes"]["m0"]["score"] = math.nan
    path.write_text(json.dumps(stored))
    circuit = Circuit.load(path)
    assert set(circuit.edges) == {"m0->m1", "input->m0"}
    assert by_name_of(circuit) == {"m0->logits": 2.0}  # edges that the file does not name are not scored either
    assert math.isnan(circuit.about_nodes["m0"]["score"])
    for edge in stored["edges"].values():
        edge.pop("score", None)
    path.write_text(json.dumps(stored))
    assert Circuit.load(path).scores is None


def by_name_of(circuit: Circuit) -> dict[str, float]:
    table = circuit.with_edges(edge_mask(circuit.graph)).table().dropna()
    return dict(zip(table.edge, table.score, strict=True))


def test_attributes_become_plain_values(tmp_path):
    attrs = {"n": np.int64(3), "share": np.float32(0.5), "sizes": (1, 2), "names": np.array(["a", "b"]), "on": np.bool_(True),
             "threshold": -np.inf, "versions": {"torch": 2}, "path": Path("x")}  # fmt: skip
    circuit = Circuit(SMALL, edge_mask(SMALL), None, attrs)
    found = Circuit.load(circuit.save(tmp_path / "circuit.json")).attrs
    assert found == {"n": 3, "share": 0.5, "sizes": [1, 2], "names": ["a", "b"], "on": True, "threshold": "-inf",
                     "versions": {"torch": 2}, "path": "x"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- sign


@pytest.mark.parametrize(
    ("attrs", "sign", "factor", "helpful"),
    [
        ({"direction": "denoise"}, "mib", 1, 1),
        ({"direction": "noise"}, "mib", -1, 1),
        ({"direction": "noise"}, "as-is", 1, -1),
        ({"helpful_sign": -1}, "mib", -1, 1),
        ({"helpful_sign": -1}, "as-is", 1, -1),
        ({}, "mib", 1, None),
        ({}, "as-is", 1, None),
    ],
)
@pytest.mark.parametrize("ending", ["json", "graphml"])
def test_helpful_edges_are_positive_in_files_unless_nobody_knows(tmp_path, attrs, sign, factor, helpful, ending):
    scores = edge_scores(SMALL)
    circuit = Circuit(SMALL, edge_mask(SMALL), scores.values, attrs)
    path = save_circuit(circuit, tmp_path / f"circuit.{ending}", sign=sign)
    if ending == "json":
        found = Circuit.load(path)
        written, known = by_name_of(found), found.helpful_sign if helpful else None
    else:
        graph = nx.read_graphml(path, force_multigraph=True)
        written = {edge: about["score"] for *_, edge, about in graph.edges(keys=True, data=True)}
        known = graph.graph.get("helpful_sign")
    assert written == {edge: factor * score for edge, score in by_name(scores).items()}
    assert known == helpful


def test_the_meaning_of_the_sign_is_turned_round_with_it(tmp_path):
    attrs = {
        "direction": "noise",
        "sign": "metric(patched) - metric(clean): positive means the patch raises the metric",
    }
    circuit = Circuit(SMALL, edge_mask(SMALL), edge_scores(SMALL).values, attrs)
    assert Circuit.load(save_circuit(circuit, tmp_path / "a.json", sign="as-is")).attrs["sign"] == attrs["sign"]
    turned = Circuit.load(save_circuit(circuit, tmp_path / "a.json"))
    assert "the clean value of the edge helps" in turned.attrs["sign"]
    assert_same(Circuit.load(turned.save(tmp_path / "b.json")), turned)  # and not a second time


# -------------------------------------------------------------------------------------------------------------- graphs


def test_networkx_has_the_nodes_and_edges_of_the_circuit():
    circuit = Circuit.from_edges(SMALL, ["input->m0", "input->a1.h1<k>", "input->a1.h1<v>", "a1.h1->logits"])
    graph = to_networkx(circuit)
    assert dict(graph.nodes(data=True)) == {
        "input": {"kind": "input", "layer": -1},
        "m0": {"kind": "mlp", "layer": 0},
        "a1.h1": {"kind": "head", "layer": 1, "head": 1},
        "logits": {"kind": "logits", "layer": 2},
    }
    assert set(graph.edges(keys=True)) == {
        ("input", "m0", "mlp"), ("input", "a1.h1", "k"), ("input", "a1.h1", "v"), ("a1.h1", "logits", "logits"),
    }  # fmt: skip
    assert graph.edges["input", "a1.h1", "k"] == {"edge": "input->a1.h1<k>", "reader": "k"}
    assert graph.graph == {"model": "shape", "n_layers": 2, "n_heads": 2}
    assert nx.is_directed_acyclic_graph(to_networkx(Circuit.full(SMALL)))


@pytest.mark.parametrize("make", [small, lambda: Circuit.full(SMALL), lambda: Circuit.from_edges(SMALL, [])])
def test_graphml_is_read_by_networkx_with_the_same_edges(tmp_path, make):
    circuit = make()
    graph = nx.read_graphml(circuit.save(tmp_path / "circuit.graphml"), force_multigraph=True)
    ours = circuit.to_networkx()
    assert dict(graph.nodes(data=True)) == dict(ours.nodes(data=True))
    assert {edge for *_, edge in graph.edges(keys=True)} == set(circuit.edges)
    ends = {(u, v, about["reader"]): about for u, v, about in graph.edges(data=True)}
    assert ends == {key: ours.edges[key] for key in ours.edges(keys=True)}
    assert ours.graph.items() <= graph.graph.items()


def test_graphml_has_each_edge_under_its_own_id(tmp_path):
    text = Circuit.full(SMALL).save(tmp_path / "circuit.graphml").read_text()
    ids = re.findall(r'<edge [^>]*id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) == Circuit.full(SMALL).n_edges
    assert "input-&gt;a0.h0&lt;q&gt;" in ids


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "says"),
    [("circuit.pt", "circuit.pt ends in .pt: circuits are written as .json or .graphml"),
     ("circuit", "circuit ends in nothing: circuits are written as .json or .graphml"),
     ("no folder/circuit.json", "the folder .*no folder does not exist")],
)  # fmt: skip
def test_places_that_cannot_be_written_to_are_refused(tmp_path, name, says):
    with refused(OptionError, says):
        small().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_cannot_hold_is_refused_before_it_is_written(tmp_path):
    circuit, path = small(), tmp_path / "circuit.json"
    circuit.scores[0, 0] = -np.inf
    with refused(OptionError, "the score of input->a0.h0<q> is infinite"):
        circuit.save(path)
    with refused(OptionError, "score of m1 is infinite"):
        small(about_nodes={"m1": {"score": math.inf}}).save(path)
    with refused(SiteError, "about_nodes names nodes that a model of 2 layers x 2 heads does not have: m7"):
        small(about_nodes={"m7": {"score": 1.0}}).save(path)
    with refused(OptionError, "'mbi' is not a sign .choose from mib, as-is.; did you mean 'mib'"):
        save_circuit(small(), path, sign="mbi")
    assert not path.exists()


def test_files_that_are_not_json_are_refused(tmp_path):
    path = tmp_path / "circuit.json"
    with refused(OptionError, "circuit.json cannot be read .No such file or directory"):
        Circuit.load(path)
    with refused(OptionError, "cannot be read .Is a directory"):
        Circuit.load(tmp_path)
    path.write_text('{"cfg": {\n"n_layers": ')
    with refused(OptionError, r"circuit.json line 2: not valid JSON .*cut short\?"):
        Circuit.load(path)
    path.write_text("[]")
    with refused(OptionError, "circuit.json: the file is list, not an object with named fields"):
        Circuit.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with refused(OptionError, "circuit.json is not text in UTF-8"):
        Circuit.load(path)
    path.write_text(f'{{"cfg": {"9" * 5000}}}')
    with refused(OptionError, "circuit.json is not a circuit"):
        Circuit.load(path)
    with refused(OptionError, "circuit.pt is pickled, and pickled files are not read: export JSON"):
        Circuit.load(tmp_path / "circuit.pt")


def put(*keys: str, value: object) -> Callable[[dict], None]:
    """A change to a file's content: set what is under these keys."""

    def change(stored: dict) -> None:
        for key in keys[:-1]:
            stored = stored[key]
        stored[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[dict], None]:
    """A change to a file's content: take away what is under these keys."""

    def change(stored: dict) -> None:
        for key in keys[:-1]:
            stored = stored[key]
        del stored[keys[-1]]

    return change


MODEL = "a model of 2 layers x 2 heads"
SPOILED = [
    (drop("cfg"), "is not a circuit: it lacks cfg"),
    (drop("nodes"), "is not a circuit: it lacks nodes"),
    (drop("edges"), "is not a circuit: it lacks edges"),
    (put("edges", value=[]), "edges is list, not an object with named fields"),
    (drop("cfg", "d_model"), "its cfg lacks d_model"),
    (put("cfg", "n_layers", value=0), "n_layers is 0, not a whole number of at least 1"),
    (put("cfg", "n_heads", value=2.0), "n_heads is 2.0, not a whole number"),
    (put("cfg", "n_heads", value=True), "n_heads is True, not a whole number"),
    (put("cfg", "parallel_attn_mlp", value="no"), "parallel_attn_mlp is 'no', not true or false"),
    (put("cfg", "n_layers", value=3), "names 8 nodes, but a model of 3 layers x 2 heads has 11"),
    (put("cfg", "n_layers", value=10**12), "names 8 nodes, but a model of 1000000000000 layers"),
    (put("cfg", "n_layers", value=1), "names nodes that a model of 1 layers x 2 heads does not have: a1.h0, a1.h1, m1"),
    (put("cfg", "parallel_attn_mlp", value=True),
     "names edges that a model of 2 layers x 2 heads .attention and MLP in parallel. does not have: a0.h0->m0, a0.h1->m0"),
    (drop("nodes", "m1"), f"names 7 nodes, but {MODEL} has 8 .with input and logits"),
    (put("nodes", "a0.h7", value={"in_graph": False}), f"names nodes that {MODEL} does not have: a0.h7"),
    (put("nodes", "m0", value=True), "m0 is bool, not an object with named fields"),
    (drop("nodes", "m0", "in_graph"), "in_graph of m0 is missing, not true or false"),
    (put("nodes", "m0", "neurons", value=[True] * 3), "neurons of m0 are 3 values, not one for each of 4 channels"),
    (put("nodes", "m0", "neurons_scores", value=0.5), "neurons_scores of m0 are 0.5, not one for each of 4 channels"),
    (put("edges", "m1->m0", value={"score": 0.0, "in_graph": True}), f"names edges that {MODEL} does not have: m1->m0"),
    (put("edges", "m0", value={"score": 0.0, "in_graph": True}), f"names edges that {MODEL} does not have: m0"),
    (drop("edges", "m0->m1", "in_graph"), "in_graph of m0->m1 is missing"),
    (put("edges", "m0->m1", "in_graph", value=1), "in_graph of m0->m1 is 1, not true or false"),
    (put("edges", "m0->m1", "score", value="high"), "the score of m0->m1 is high, not a finite number"),
    (put("edges", "m0->m1", "score", value=True), "the score of m0->m1 is True, not a finite number"),
    (put("edges", "m0->m1", "score", value=math.inf), "the score of m0->m1 is inf, not a finite number"),
    (put("edges", "m0->m1", "score", value=10**400), "the score of m0->m1 is 1000"),
    (put("edges", "m0->m1", value=0.5), "m0->m1 is float, not an object with named fields"),
    (put("interp", value="ours"), "interp is str, not an object with named fields"),
    (put("interp", "model", value=7), "interp.model is 7, not a name"),
    (put("interp", "attrs", value=[]), "interp.attrs is list, not an object"),
    (put("interp", "attrs", "helpful_sign", value=0), "interp.attrs.helpful_sign is 0, not 1 or -1"),
    (put("interp", "unscored", value="some"), "interp.unscored is 'some', not a list of edges"),
    (put("interp", "unscored", value=["m1->m0"]), f"names edges in interp.unscored that {MODEL} does not have: m1->m0"),
    (put("interp", "unscored_nodes", value={"m9": {}}), f"names interp.unscored_nodes that {MODEL} does not have: m9"),
    (put("interp", "unscored_nodes", value={"m0": 1}), "interp.unscored_nodes.m0 is int, not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), SPOILED, ids=[says for _, says in SPOILED])
def test_a_spoiled_file_is_refused_naming_it_and_what_is_wrong(tmp_path, spoil, says):
    path = small().save(tmp_path / "circuit.json")
    stored = content(path)
    spoil(stored)
    path.write_text(json.dumps(stored))
    with refused(InterpError, r"circuit\.json:? .*" + says):
        Circuit.load(path)
