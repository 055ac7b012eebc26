"""Searches that take edges away: ACDC, and the elimination of whatever changes least.

Held against: the same algorithms written down plainly, one circuit at a time; for ACDC on the slow definition of a circuit's
run as well (masked_oracle.py); exact edge patching, which says what makes any difference; the known circuits.
"""

import numpy as np
import pytest
import torch

from interp import edge_patching
from interp.circuits.ablations import ablated_outputs
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import Evaluation, faithfulness
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.circuits.search import acdc, eliminate
from interp.circuits.similarity import auroc
from interp.errors import MetricError, OptionError, UnsupportedModel
from interp.metrics import get_metric
from tests.circuits.masked_oracle import SlowRun, at_end, embeddings
from tests.circuits.test_exact import prompts
from tests.known_circuits.building import KnownCircuit
from tests.known_circuits.circuits import CIRCUITS
from tests.known_circuits.gates import or_of_two
from tests.small_pairs import refused, small_pairs

DOUBLE = torch.float64
TINY = 1e-10  # differences of rounding are smaller, those that an edge makes larger
EACH = pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)
BY_NOISING = [circuit for circuit in CIRCUITS.values() if circuit().direction != "denoise"]
EACH_BY_NOISING = pytest.mark.parametrize("circuit", BY_NOISING, ids=lambda circuit: circuit.__name__)


def known_edges(known: KnownCircuit) -> Circuit:
    return Circuit.from_edges(Graph.of(known.model.cfg), known.edges)


def visited(graph: Graph) -> list[str]:
    """Readers from the logits to the input; those of one layer's heads in their own order, queries first."""
    layers = [
        [f"m{la}"] + [f"a{la}.h{h}<{x}>" for x in "qkv" for h in range(graph.n_heads)] for la in range(graph.n_layers)
    ]
    return ["logits", *(reader for layer in reversed(layers) for reader in layer)]


def plain_acdc(graph: Graph, loss, threshold: float) -> tuple[np.ndarray, dict[str, float]]:
    """Edge by edge: what is kept, and what each edge that was tried changed. loss: of one circuit."""
    source, target = ({name: i for i, name in enumerate(names(graph))} for names in (writers, readers))
    kept, changes = edge_mask(graph), {}
    before = loss(kept)
    for reader in visited(graph):
        component, column = reader.split("<")[0], target[reader]
        if reader != "logits" and not kept[source[component]].any():
            kept[:, column] = False
            continue
        for name in reversed(writers(graph)):
            if not kept[source[name], column]:
                continue
            kept[source[name], column] = False
            after = loss(kept)
            changes[f"{name}->{reader}"] = after - before
            if after - before <= threshold:
                before = after
            else:
                kept[source[name], column] = True
    return kept, changes


def slow_loss(model, pairs, metric: str, ablation: str):
    """The loss of one circuit, by the slow definition of its run."""
    metric, ablated, embed = (
        get_metric(metric),
        ablated_outputs(model, pairs, ablation),
        embeddings(model, pairs, "clean"),
    )
    logits = lambda **kept: model.unembed_resid(at_end(pairs, SlowRun(model, embed, **kept).final))  # noqa: E731
    with torch.no_grad():
        whole = logits()
        clean = metric(whole, pairs, whole)

    @torch.no_grad()
    def loss(kept: np.ndarray) -> float:
        return float((metric(logits(kept=torch.from_numpy(kept), ablated=ablated), pairs, whole) - clean).abs().mean())

    return loss


def measured_loss(model, pairs, metric: str, ablation: str = "corrupt"):
    """The same, by the engine's run of one circuit."""
    evaluation = Evaluation(model, pairs, metric=metric, ablation=ablation)

    def loss(kept: np.ndarray) -> float:
        found = evaluation(kept[None])
        return float(np.abs(found.circuits[:, 0] - found.clean).mean())

    return loss


def assert_same_search(found: Circuit, kept: np.ndarray, changes: dict[str, float]):
    assert set(found.edges) == set(Circuit(found.graph, kept).edges)
    tried = Circuit(found.graph, np.isfinite(found.scores), found.scores).table()
    assert set(tried.edge) == set(changes)
    np.testing.assert_allclose(tried.score, [changes[edge] for edge in tried.edge], rtol=1e-6, atol=1e-10)
    assert found.attrs["n_decided"] == len(changes)
    assert found.attrs["n_measured"] >= len(changes)


def away_from(values, share: float) -> float:
    """A threshold such that about this share of the changes lies below it, and none near it."""
    values = np.sort([value for value in values if value > TINY])
    at = int(share * (len(values) - 1))
    return float(np.sqrt(values[at] * values[at + 1]))


# -------------------------------------------------------------------------------------------------------------- ACDC


@pytest.mark.parametrize(
    ("family", "ablation", "metric"), [("gpt2", "corrupt", "kl_divergence"), ("pythia", "mean", "logit_diff")]
)
def test_acdc_decides_what_the_plain_algorithm_decides(tiny, family, metric, ablation):
    model, pairs = tiny(family, DOUBLE), prompts(2)
    graph, loss = Graph.of(model.cfg), measured_loss(model, pairs, metric, ablation)
    first = plain_acdc(graph, loss, -np.inf)[1]
    kept_n = []
    for share in (0.2, 0.6, 0.95):
        threshold = away_from(first.values(), share)
        kept, changes = plain_acdc(graph, loss, threshold)
        found = acdc(model, pairs, threshold=threshold, metric=metric, ablation=ablation)
        assert_same_search(found, kept, changes)
        kept_n.append(found.n_edges)
    assert kept_n[2] < kept_n[0] < edge_mask(graph).sum()
    assert kept_n[0] > 10


@pytest.mark.parametrize("metric", ["kl_divergence", "logit_diff"])
def test_acdc_on_the_slow_definition(metric):
    known = CIRCUITS["induction"]()
    graph, loss = Graph.of(known.model.cfg), slow_loss(known.model, known.pairs, metric, "corrupt")
    for threshold in (1e-6, 0.5, 2.0):
        kept, changes = plain_acdc(graph, loss, threshold)
        assert_same_search(acdc(known.model, known.pairs, threshold=threshold, metric=metric), kept, changes)


def test_acdc_of_a_random_model_on_the_slow_definition(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts(1)
    loss = slow_loss(model, pairs, "logit_diff", "zero")
    threshold = loss(np.zeros_like(edge_mask(model.cfg))) / 100  # a hundredth of what everything does
    kept, changes = plain_acdc(Graph.of(model.cfg), loss, threshold)
    found = acdc(model, pairs, threshold=threshold, metric="logit_diff", ablation="zero")
    assert_same_search(found, kept, changes)
    assert 0 < found.n_edges < edge_mask(model.cfg).sum()


@EACH_BY_NOISING
@pytest.mark.parametrize("metric", ["kl_divergence", "logit_diff"])
def test_acdc_finds_a_known_circuit(circuit, metric):
    known = circuit()
    found = acdc(known.model, known.pairs, threshold=1e-6, metric=metric)
    assert set(found.edges) == known.edges
    assert auroc(found.with_edges(np.isfinite(found.scores)), known_edges(known)) == 1.0


def test_acdc_keeps_one_arm_of_an_or():
    """Neither is missed alone; when one has gone the other one is needed."""
    known = or_of_two()
    found = acdc(known.model, known.pairs, threshold=1e-6)
    arms = [{f"input->{head}<v>", f"{head}->m1", "m1->logits"} for head in ("a0.h0", "a0.h2")]
    assert set(found.edges) in arms
    assert float(faithfulness(known.model, known.pairs, found).faithfulness[0]) == pytest.approx(1, abs=1e-8)


def test_acdc_keeps_all_that_makes_a_difference_at_threshold_zero(tiny):
    """Tokens that differ early only: what the last layer's queries and MLP read of the input itself is alike in both runs."""
    model, pairs = tiny("gpt2", DOUBLE), small_pairs(n=3)
    effects = edge_patching(model, pairs, direction="noise")
    some = np.abs(effects).max("prompt").values > TINY
    assert not (some & ~acdc(model, pairs, threshold=0.0, metric="logit_diff").kept).any()
    found = acdc(model, pairs, threshold=TINY, metric="logit_diff")  # 0, if it were not for rounding
    np.testing.assert_array_equal(found.kept, some)
    assert 0 < (edge_mask(model.cfg) & ~some).sum() < some.sum()
    changes = np.abs(effects).mean("prompt").values[some]
    np.testing.assert_allclose(found.scores[some], changes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("metric", ["kl_divergence", "logit_diff"])
def test_thresholds_without_end_keep_everything_and_nothing(tiny, metric):
    model, pairs = tiny("gemma2", DOUBLE), small_pairs()
    everything, nothing = (acdc(model, pairs, threshold=end, metric=metric) for end in (-np.inf, np.inf))
    assert everything == Circuit.full(Graph.of(model.cfg))
    assert np.isfinite(everything.scores[edge_mask(model.cfg)]).all()
    assert everything.attrs["n_decided"] == edge_mask(model.cfg).sum()
    assert nothing.n_edges == 0
    tried = [edge.split("->")[1] for edge in Circuit(nothing.graph, np.isfinite(nothing.scores)).edges]
    assert tried == ["logits"] * len(writers(model.cfg))  # all others are dead by then


def test_a_circuit_of_acdc_says_how_it_was_found(tiny):
    model, pairs = tiny("gpt2"), small_pairs()
    found = acdc(model, pairs, threshold=0.05, ablation="zero")
    a = found.attrs
    assert (a["method"], a["threshold"], a["metric"], a["ablation"]) == ("acdc", 0.05, "kl_divergence", "zero")
    assert a["order"] == "logits to input, latest writer first"
    assert a["n_decided"] == np.isfinite(found.scores).sum() <= a["n_measured"]
    assert found.helpful_sign == 1
    assert (found.scores[found.kept] > 0.05).all()
    assert (found.scores[np.isfinite(found.scores) & ~found.kept] <= 0.05).all()
    # what is left reaches the logits, as nothing else was tried
    assert all(name in {edge.split("->")[0] for edge in found.edges} for name in found.nodes if name != "logits")


def test_acdc_in_batches_of_prompts_and_with_little_memory(tiny):
    model, pairs = tiny("pythia", DOUBLE), prompts()
    whole = acdc(model, pairs, threshold=0.01)
    for options in ({"batch_size": 3}, {"max_memory": 1 << 18}):
        parts = acdc(model, pairs, threshold=0.01, **options)
        assert parts == whole
        np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-7, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- eliminate


def plain_elimination(model, pairs, keep: float) -> list[tuple[str, int]]:
    """Edges in the order in which they go, with the sign of the change that their absence made."""
    graph = Graph.of(model.cfg)
    left, gone = list(Circuit.full(graph).edges), []
    while left:
        sets = [left, *([edge for edge in left if edge != out] for out in left)]
        chosen = [Circuit.from_edges(graph, edges) for edges in sets]
        values = faithfulness(model, pairs, chosen, batch_size=2).value.mean("prompt").values
        changes = values[1:] - values[0]
        n = len(left) - int(keep * len(left))
        order = np.argsort(np.abs(changes), kind="stable")[:n]
        gone += [(left[i], 1 if changes[i] > 0 else -1) for i in order]
        left = [edge for i, edge in enumerate(left) if i not in set(order.tolist())]
    return gone


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_elimination_goes_round_by_round(tiny, keep):
    """Which edges are left after each round, and the sign of all that make a difference."""
    model, pairs = tiny("gpt2", DOUBLE), prompts(2)
    found = eliminate(model, pairs, keep=keep).stack(edge=("source", "target")).dropna("edge")
    mine = {f"{u}->{v}": float(x) for (u, v), x in zip(found.edge.values, found.values, strict=True)}
    plain, total, at = plain_elimination(model, pairs, keep), len(mine), 0
    assert len(plain) == total
    ranked = sorted(mine, key=lambda edge: abs(mine[edge]))
    while at < total:
        n = (total - at) - int(keep * (total - at))
        same = set(ranked[at : at + n]) == {edge for edge, _ in plain[at : at + n]}
        assert same, (at, n)
        at += n
    signs = dict(plain)
    late = ranked[total // 2 :]
    assert [np.sign(mine[edge]) for edge in late] == [signs[edge] for edge in late]


@EACH_BY_NOISING
def test_the_last_edges_to_go_are_a_known_circuit(circuit):
    known = circuit()
    scores = eliminate(known.model, known.pairs)
    assert auroc(scores, known_edges(known)) == 1.0
    values = scores.values[edge_mask(known.model.cfg)]
    np.testing.assert_allclose(np.sort(np.abs(values)) * len(values), np.arange(1, len(values) + 1), rtol=1e-12)
    assert np.isnan(scores.values[~edge_mask(known.model.cfg)]).all()
    smaller = Circuit.full(Graph.of(known.model.cfg))
    for n in range(len(values), -1, -1):  # each size's circuit lies within the next larger one
        circuit_of_n = Circuit.from_scores(scores, n_edges=n, prune=False)
        assert not (circuit_of_n.kept & ~smaller.kept).any()
        smaller = circuit_of_n


def test_what_helps_is_negative_and_what_hinders_positive():
    known = CIRCUITS["backup"]()
    scores = eliminate(known.model, known.pairs)
    signs = {}
    for edge in known.edges:
        source, _, target = edge.partition("->")
        signs[edge] = float(np.sign(scores.sel(source=source, target=target)))
    assert signs["a0.h0->logits"] == signs["input->a0.h0<q>"] == -1
    assert signs["a0.h0->a1.h1<q>"] == 1
    assert Circuit.ranked(scores).helpful_sign == -1
    assert scores.attrs["direction"] == "noise"
    assert (scores.attrs["method"], scores.attrs["keep"], scores.attrs["unit"]) == ("eliminate", 0.7, "rank")


def test_elimination_leaves_one_arm_of_an_or():
    known = or_of_two()
    last = Circuit.from_scores(eliminate(known.model, known.pairs), n_edges=3, prune=False)
    assert {edge for edge in last.edges if "m1" in edge} < known.edges
    assert set(last.edges) in [{f"input->{head}<v>", f"{head}->m1", "m1->logits"} for head in ("a0.h0", "a0.h2")]


def test_eliminations_can_be_repeated(tiny):
    model, pairs = tiny("pythia"), small_pairs()
    assert eliminate(model, pairs, keep=0.3).identical(eliminate(model, pairs, keep=0.3))


# -------------------------------------------------------------------------------------------------------- greedy search


@EACH
def test_greedy_search_of_exact_scores_returns_the_known_circuit(circuit):
    known = circuit()
    scores = edge_patching(
        known.model, known.pairs, direction="noise" if known.direction == "both" else known.direction
    )
    for prune in (True, False):
        found = Circuit.from_scores(scores, n_edges=len(known.edges), search="greedy", prune=prune)
        assert set(found.edges) == known.edges
    found = Circuit.from_scores(scores, threshold=1e-6, search="greedy")
    assert set(found.edges) == known.edges


# ------------------------------------------------------------------------------------------------- what cannot be done


def test_what_cannot_be_searched_is_said(tiny):
    model, pairs = tiny("gpt2"), small_pairs()
    with refused(OptionError, "the threshold is not a number"):
        acdc(model, pairs, threshold=float("nan"))
    for keep in (0.0, 1.0, -0.5, 1.5):
        with refused(OptionError, f"the share of edges kept in each round lies between 0 and 1, not {keep:g}"):
            eliminate(model, pairs, keep=keep)
    for search in (lambda **o: acdc(model, pairs, threshold=0.1, **o), lambda **o: eliminate(model, pairs, **o)):
        with refused(OptionError, "'mode' is not an? ablation"):
            search(ablation="mode")
        with refused(MetricError, "'prob' is not a metric"):
            search(metric="prob")
    with refused(UnsupportedModel, "measuring a circuit needs a model's own layers"):
        acdc(torch.nn.Linear(2, 2), pairs, threshold=0.1)
