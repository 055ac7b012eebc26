"""Faithfulness, completeness and minimality; what all measurements of circuits refuse.

Held against: the slow definition of a circuit's run (masked_oracle.py); the engines that patch whole components
(`node_faithfulness`) and single edges (`edge_patching`); the known circuits, of which it is written down what each edge does.
Curves over size are in test_curves.py.
"""

import numpy as np
import pytest
import torch

import interp
from interp import edge_patching, node_faithfulness
from interp.circuits.ablations import ABLATIONS, ablated_outputs
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import (
    Evaluation,
    check_sign,
    completeness,
    faithfulness,
    faithfulness_curve,
    minimality,
    smallest_circuit,
)
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.errors import MetricError, OptionError, SiteError, UnsupportedModel
from interp.sites import component_nodes
from tests.circuits.masked_oracle import SlowRun, at_end, circuits, embeddings
from tests.circuits.test_circuit import edge_scores
from tests.circuits.test_exact import logit_diff, prompts
from tests.known_circuits.building import KnownCircuit
from tests.known_circuits.circuits import CIRCUITS, backup
from tests.known_circuits.gates import and_of_two, or_of_two
from tests.small_pairs import refused, small_pairs

DOUBLE = torch.float64
EACH = pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)


def random_circuits(model, seed: str, densities=(0.05, 0.5, 0.9)) -> list[Circuit]:
    return [Circuit(Graph.of(model.cfg), mask.numpy()) for mask in circuits(model.cfg, seed, densities)]


def slow_metric(model, pairs, circuit: Circuit, ablation: str, reference=None) -> np.ndarray:
    """[prompt]"""
    ablated = ablated_outputs(model, pairs, ablation, reference=reference)
    run = SlowRun(model, embeddings(model, pairs, "clean"), torch.from_numpy(circuit.kept), ablated)
    return logit_diff(model.unembed_resid(at_end(pairs, run.final)), pairs).numpy()


def known_edges(known: KnownCircuit) -> Circuit:
    return Circuit.from_edges(Graph.of(known.model.cfg), known.edges)


def without(circuit: Circuit, *edges: str) -> Circuit:
    return Circuit.from_edges(circuit.graph, set(circuit.edges) - set(edges))


# -------------------------------------------------------------------------------------------------------- both ends


def both_ends(graph: Graph) -> list[Circuit]:
    return [Circuit.full(graph), Circuit(graph, np.zeros_like(edge_mask(graph)))]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_whole_model_is_faithful_and_nothing_is_not(tiny, ablation):
    for family in ("gpt2", "gemma2"):
        model = tiny(family, DOUBLE)
        found = faithfulness(model, prompts(), both_ends(Graph.of(model.cfg)), ablation=ablation)
        for name in ("faithfulness", "low", "high"):
            np.testing.assert_allclose(found[name], [1, 0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.value.T, [found.metric_clean, found.metric_empty], rtol=1e-12)
        assert found.n_edges.values.tolist() == [edge_mask(model.cfg).sum(), 0]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_both_ends_of_a_bundled_model(mini_gpt2, ablation):
    task = interp.load_task("ioi", mini_gpt2, n=4)
    found = faithfulness(mini_gpt2, task, both_ends(Graph.of(mini_gpt2.cfg)), ablation=ablation)
    np.testing.assert_allclose(found.faithfulness, [1, 0], rtol=0, atol=1e-5)
    if ablation == "corrupt":
        sides = [mini_gpt2(task.tokens(side), read_at=task.read_at) for side in ("clean", "corrupt")]
        for name, logits in zip(("metric_clean", "metric_empty"), sides, strict=True):
            np.testing.assert_allclose(found[name], logit_diff(logits, task).detach(), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what a circuit does


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean", "positional-mean"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_faithfulness_is_what_its_definition_says(tiny, family, ablation):
    model, pairs, held = tiny(family, DOUBLE), prompts(3), prompts(seed=1)
    chosen = random_circuits(model, family + ablation)
    found = faithfulness(model, pairs, chosen, ablation=ablation, reference=held)
    full, nothing = (slow_metric(model, pairs, c, ablation, held) for c in both_ends(Graph.of(model.cfg)))
    np.testing.assert_allclose(found.metric_clean, full, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.metric_empty, nothing, rtol=1e-9, atol=1e-9)
    for i, circuit in enumerate(chosen):
        mine = slow_metric(model, pairs, circuit, ablation, held)
        np.testing.assert_allclose(found.value[:, i], mine, rtol=1e-9, atol=1e-9)
        f = (mine.mean() - nothing.mean()) / (full.mean() - nothing.mean())
        np.testing.assert_allclose(found.faithfulness[i], f, rtol=1e-8, atol=1e-12)
        assert found.low[i] <= found.faithfulness[i] + 1e-12
        assert found.faithfulness[i] <= found.high[i] + 1e-12
    if ablation in ("mean", "positional-mean"):  # the held-out prompts were really used
        ours = faithfulness(model, pairs, chosen, ablation=ablation)
        assert (np.abs(ours.metric_empty - found.metric_empty) > 1e-6).all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia", "llama3"])
def test_a_circuit_of_nodes_is_the_other_engine_s(tiny, family):
    model, pairs = tiny(family, DOUBLE), small_pairs(n=3)
    ranking = [str(node) for node in component_nodes(model.cfg)][::-2]
    sizes, graph = [0, 1, 4, len(ranking)], Graph.of(model.cfg)
    chosen = [Circuit.from_nodes(graph, ["input", *ranking[:n]]) for n in sizes]
    for mine, theirs in (("corrupt", "corrupt"), ("positional-mean", "mean"), ("zero", "zero")):
        found = faithfulness(model, pairs, chosen, ablation=mine)
        curve = node_faithfulness(model, pairs, ranking, sizes=sizes, ablation=theirs)
        np.testing.assert_allclose(found.value, curve.value, rtol=1e-9, atol=1e-9)
        if mine == "corrupt":
            for ours, other in (("faithfulness", "recovered"), ("low", "low"), ("high", "high")):
                np.testing.assert_allclose(found[ours], curve[other], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("metric", ["logit_diff", "kl_divergence", "probability"])
def test_the_model_without_one_edge_is_edge_patching(tiny, metric):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    edges = ["input->a0.h1<v>", "a0.h3->a1.h2<q>", "m0->m2", "a2.h1->m2", "m1->logits", "input->a2.h0<k>"]
    full = Circuit.full(Graph.of(model.cfg))
    found = faithfulness(model, pairs, [without(full, edge) for edge in edges], metric=metric)
    effects = edge_patching(model, pairs, edges=edges, metric=metric, direction="noise")
    for i, (source, target) in enumerate(edge.split("->") for edge in edges):
        change = found.value[:, i] - found.metric_clean
        np.testing.assert_allclose(change, effects.sel(source=source, target=target), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean", "positional-mean"])
def test_batches_memory_and_company_change_nothing(tiny, ablation):
    model, pairs = tiny("gemma2", DOUBLE), prompts()
    chosen = random_circuits(model, ablation, (0.2, 0.5, 0.8, 0.9, 0.95))
    whole = faithfulness(model, pairs, chosen, ablation=ablation)
    for options in ({"batch_size": 3}, {"max_memory": 1 << 20}, {"batch_size": 1, "max_memory": 1}):
        parts = faithfulness(model, pairs, chosen, ablation=ablation, **options)
        for name in ("value", "faithfulness", "low", "high"):
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-10)
    for i, circuit in enumerate(chosen):
        alone = faithfulness(model, pairs, circuit, ablation=ablation)
        np.testing.assert_allclose(alone.value[:, 0], whole.value[:, i], rtol=1e-9, atol=1e-10)
    assert whole.identical(faithfulness(model, pairs, chosen, ablation=ablation))


def test_more_circuits_than_go_into_one_batch(tiny):
    model, pairs = tiny("pythia", DOUBLE), prompts(2)
    chosen = random_circuits(model, "many", np.linspace(0, 1, 150))
    found = faithfulness(model, pairs, chosen)
    for i in (0, 63, 64, 128, 149):
        np.testing.assert_allclose(found.value[:, i], slow_metric(model, pairs, chosen[i], "corrupt"), rtol=1e-9)


def test_the_seed_says_which_prompts_are_drawn(tiny):
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(n=9)
    chosen = random_circuits(model, "seed", (0.7,))
    first, again, other = (faithfulness(model, pairs, chosen, seed=seed) for seed in (0, 0, 1))
    assert first.identical(again)
    assert first.value.identical(other.value)
    assert first.low != other.low
    options = {"ablation": "optimal", "seed": 3}
    assert faithfulness(model, pairs, chosen, **options).identical(faithfulness(model, pairs, chosen, **options))


def test_constants_are_not_given_up_because_one_of_several_circuits_is_the_whole_model(tiny):
    """Nothing is ablated in it, so it says nothing about the constants; those of the others are the same as without it."""
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    graph, nothing = Graph.of(model.cfg), np.zeros_like(edge_mask(model.cfg))
    optimal, mean = (faithfulness(model, pairs, [Circuit.full(graph), Circuit(graph, nothing)], ablation=ablation,
                                  metric="kl_divergence") for ablation in ("optimal", "mean"))  # fmt: skip
    assert optimal.metric_empty.mean() < 0.9 * mean.metric_empty.mean()


def test_it_says_how_it_was_measured(tiny):
    model = tiny("gpt2")
    a = faithfulness(
        model, small_pairs(), Circuit.full(Graph.of(model.cfg)), ablation="zero", metric="answer_logit"
    ).attrs
    assert (a["method"], a["ablation"], a["metric"], a["n_heads"]) == ("faithfulness", "zero", "answer_logit", 4)


# -------------------------------------------------------------------------------------------------- known circuits


@EACH
def test_a_known_circuit_is_all_that_is_needed(circuit):
    """It alone has the whole behaviour, everything else has none, and no edge more is needed."""
    known = circuit()
    mine = known_edges(known)
    np.testing.assert_allclose(faithfulness(known.model, known.pairs, mine).faithfulness, 1, rtol=0, atol=1e-8)
    found = completeness(known.model, known.pairs, mine, n_subsets=5)
    assert abs(found.complement) < 1e-8
    assert (np.abs(found.incompleteness) < 1e-8).all()  # knocked out of the circuit or of the model: the same
    full = Circuit.full(mine.graph)
    assert abs(completeness(known.model, known.pairs, full).complement) < 1e-12


@EACH
def test_every_edge_of_a_known_circuit_counts_as_much_as_patching_says(circuit):
    known = circuit()
    useless = sorted(set(Circuit.full(Graph.of(known.model.cfg)).edges) - known.edges)[::7]
    found = minimality(
        known.model, known.pairs, Circuit.from_edges(Graph.of(known.model.cfg), [*known.edges, *useless])
    )
    effects = edge_patching(known.model, known.pairs, direction="noise").mean("prompt")
    ends = faithfulness(known.model, known.pairs, known_edges(known))
    gap = float((ends.metric_clean - ends.metric_empty).mean())
    assert set(found.edge.values) == {*known.edges, *useless}
    assert found.attrs["whole"] == pytest.approx(1, abs=1e-8)
    assert np.abs(found.sel(edge=useless)).max() < 1e-8
    for edge in known.edges:
        source, _, target = edge.partition("->")
        share = -float(effects.sel(source=source, target=target)) / gap
        assert float(found.sel(edge=edge)) == pytest.approx(share, abs=1e-8), edge
        if known.direction != "denoise":
            assert abs(share) > 0.1, edge


@pytest.mark.parametrize(("circuit", "arm", "left"), [(or_of_two, "a0.h0", 1.0), (and_of_two, "a0.h0", 0.0)])
def test_one_arm_of_a_gate(circuit, arm, left):
    """Half an OR is faithful and minimal, but the other half is a whole OR too: only completeness notices."""
    known = circuit()
    half = without(known_edges(known), f"input->{arm}<v>", f"{arm}->m1")
    assert float(faithfulness(known.model, known.pairs, half).faithfulness[0]) == pytest.approx(left, abs=1e-8)
    found = completeness(known.model, known.pairs, half, n_subsets=40, seed=1)
    if circuit is or_of_two:
        np.testing.assert_allclose(minimality(known.model, known.pairs, half), 1, rtol=0, atol=1e-8)
        assert found.incompleteness.max() > 0.99  # without its head the circuit is dead, and the model is not
    assert abs(found.complement) < 1e-8  # the MLP that both arms need is not in it


def test_a_backup_left_out_shows_by_what_knocking_out_does():
    known = backup()
    main = without(known_edges(known), "a0.h0->a1.h1<q>", "a1.h1->logits")
    assert float(faithfulness(known.model, known.pairs, main).faithfulness[0]) == pytest.approx(2, abs=1e-8)
    found = completeness(known.model, known.pairs, main, n_subsets=40)
    assert found.incompleteness.max() > 0.9
    np.testing.assert_allclose(found.incompleteness, np.abs(found.circuit - found.model), rtol=0, atol=0)
    whole = found.n_knocked.values == 0
    np.testing.assert_allclose(found.circuit.values[whole], 2, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.model.values[whole], 1, rtol=0, atol=1e-8)
    assert 0 <= found.n_knocked.min() < found.n_knocked.max() <= 2


def test_what_is_knocked_out_writes_nothing_in_either(tiny):
    """With a circuit of one component, a set is that component or none: its outgoing edges go, the others stay."""
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    graph = Graph.of(model.cfg)
    one = Circuit.from_edges(graph, ["input->logits"])
    found = completeness(model, pairs, one, n_subsets=8, seed=0)
    others = Circuit.from_nodes(graph, [name for name in writers(graph) if name != "input"])
    expected = faithfulness(model, pairs, [one, others, Circuit.full(graph)]).faithfulness.values
    assert set(found.n_knocked.values.tolist()) == {0, 1}
    for knocked, mine, whole in zip(found.n_knocked.values, found.circuit.values, found.model.values, strict=True):
        assert mine == pytest.approx(0 if knocked else expected[0], abs=1e-9)
        assert whole == pytest.approx(expected[1] if knocked else expected[2], abs=1e-9)
    assert found.identical(completeness(model, pairs, one, n_subsets=8, seed=0))


# ------------------------------------------------------------------------------------------------- what cannot be done

MEASURES = {
    "faithfulness": lambda model, pairs, c, **o: faithfulness(model, pairs, c, **o),
    "curve": lambda model, pairs, c, **o: faithfulness_curve(model, pairs, edge_scores(c.graph), **o),
    "smallest": lambda model, pairs, c, **o: smallest_circuit(model, pairs, edge_scores(c.graph), **o),
    "completeness": lambda model, pairs, c, **o: completeness(model, pairs, c, **o),
    "minimality": lambda model, pairs, c, **o: minimality(model, pairs, c, **o),
    "sign": lambda model, pairs, c, **o: check_sign(model, pairs, Circuit.ranked(edge_scores(c.graph)), **o),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_what_cannot_be_measured_is_said(tiny, measure):
    model, pairs = tiny("gpt2"), small_pairs()
    mine = Circuit.full(Graph.of(model.cfg))
    with refused(SiteError, "a circuit of 2 layers of 3 heads, in parallel is none of .*gpt2"):
        measure(model, pairs, Circuit.full(Graph(2, 3, parallel=True)))
    with refused(OptionError, "'mode' is not a ablation|'mode' is not an ablation"):
        measure(model, pairs, mine, ablation="mode")
    with refused(OptionError, "prompts of one length: the reference's have 9 tokens, these 6"):
        measure(model, pairs, mine, ablation="positional-mean", reference=small_pairs(length=9))
    with refused(MetricError, "'prob' is not a metric"):
        measure(model, pairs, mine, metric="prob")
    with refused(OptionError, "at least 1"):
        measure(model, pairs, mine, batch_size=0)

    class TransformerBridge:
        cfg = model.cfg

    with refused(
        UnsupportedModel, "measuring a circuit needs a model's own layers, and a TransformerBridge has others"
    ):
        measure(TransformerBridge(), pairs, mine)


def test_circuits_and_sizes_that_are_none(tiny):
    model, pairs = tiny("gpt2"), small_pairs()
    with refused(OptionError, "no circuits to measure"):
        faithfulness(model, pairs, [])
    for fraction in (1.1, -0.1):
        with refused(OptionError, f"a share of the edges lies between 0 and 1, not {fraction}"):
            faithfulness_curve(model, pairs, edge_scores(Graph.of(model.cfg)), fractions=[0.5, fraction])
    with refused(SiteError, "masks of .* do not fit"):
        Evaluation(model, pairs)(np.ones((1, 3, len(readers(model.cfg))), bool))
