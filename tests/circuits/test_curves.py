"""Faithfulness at growing sizes, the smallest circuit that is faithful, and the sign of scores.

Held against: circuits of each size measured by themselves; MIB's weights and its three synthetic curves, by hand; rankings of
the known circuits, of which it is known at which size they are complete.
"""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import edge_patching
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import (
    MIB_FRACTIONS,
    check_sign,
    faithfulness,
    faithfulness_curve,
    smallest_circuit,
)
from interp.circuits.graph import Graph, edge_mask
from interp.errors import OptionError
from tests.circuits.test_circuit import edge_scores
from tests.circuits.test_exact import prompts
from tests.known_circuits.building import KnownCircuit
from tests.known_circuits.circuits import CIRCUITS, frac_prevs, induction
from tests.small_pairs import refused

DOUBLE = torch.float64
EACH = pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)
WEIGHTS = np.array([0.0005, 0.002, 0.004, 0.0075, 0.02, 0.04, 0.075, 0.2, 0.4, 0.25])  # the methods page's, section 7


def known_edges(known: KnownCircuit) -> Circuit:
    return Circuit.from_edges(Graph.of(known.model.cfg), known.edges)


def exact(known: KnownCircuit) -> xr.DataArray:
    return edge_patching(known.model, known.pairs, direction="noise" if known.direction == "both" else known.direction)


# ------------------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("search", ["top", "greedy"])
@pytest.mark.parametrize("prune", [True, False])
def test_a_curve_is_circuits_of_growing_size_and_their_areas(tiny, search, prune):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    scores = edge_patching(model, pairs, direction="noise")
    found = faithfulness_curve(model, pairs, scores, search=search, prune=prune)
    total = int(edge_mask(model.cfg).sum())
    assert found.n_edges.values.tolist() == [int(k * total) for k in MIB_FRACTIONS]
    assert found.fraction.values.tolist() == list(MIB_FRACTIONS)
    for by in ("value", "size"):
        chosen = [
            Circuit.from_scores(scores, n_edges=n, by=by, search=search, prune=prune)
            for n in found.n_edges.values.tolist()
        ]
        alone = faithfulness(model, pairs, chosen)
        for name in ("faithfulness", "low", "high"):
            np.testing.assert_allclose(found[name].sel(by=by), alone[name], rtol=1e-9, atol=1e-10)
        assert found.n_kept.sel(by=by).values.tolist() == [c.n_edges for c in chosen]
    assert found.faithfulness.values[:, -1] == pytest.approx([1, 1])
    f = found.faithfulness
    assert float(found.cpr) == pytest.approx(f.sel(by="value").values @ WEIGHTS, rel=1e-12)
    assert float(found.cmd) == pytest.approx(np.abs(1 - f.sel(by="size").values) @ WEIGHTS, rel=1e-12)
    k = np.log10(MIB_FRACTIONS)
    trapezoids = lambda y: sum((y[i] + y[i + 1]) / 2 * (k[i + 1] - k[i]) for i in range(9)) / 3  # noqa: E731
    assert float(found.cpr_log) == pytest.approx(trapezoids(f.sel(by="value").values))
    assert float(found.cmd_log) == pytest.approx(trapezoids(np.abs(1 - f.sel(by="size").values)))


def test_the_value_ranking_goes_by_what_helps_and_the_other_by_size(tiny):
    """Scores of noising and their mirror image as scores of denoising are one ranking."""
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    noise = edge_patching(model, pairs, direction="noise")
    mirrored = (-noise).assign_attrs({**noise.attrs, "direction": "denoise"})
    found = [faithfulness_curve(model, pairs, scores, prune=False) for scores in (noise, mirrored)]
    np.testing.assert_array_equal(found[0].faithfulness, found[1].faithfulness)
    by_effect = noise.mean("prompt").stack(edge=("source", "target")).dropna("edge")
    for by, rank in (("value", by_effect), ("size", -np.abs(by_effect))):
        edges = [f"{u}->{v}" for u, v in by_effect.edge.values[np.argsort(rank.values)]]
        chosen = [Circuit.from_edges(Graph.of(model.cfg), edges[:n]) for n in found[0].n_edges.values.tolist()]
        alone = faithfulness(model, pairs, chosen).faithfulness
        np.testing.assert_allclose(found[0].faithfulness.sel(by=by), alone, rtol=1e-9, atol=1e-10)
    loaded = dataclasses.replace(Circuit.ranked(noise), attrs={"helpful_sign": -1})
    again = faithfulness_curve(model, pairs, loaded, prune=False)
    np.testing.assert_array_equal(again.faithfulness, found[0].faithfulness)
    assert again.attrs["scored_by"] == "a file"


def scored(graph: Graph, values: dict[str, float]) -> xr.DataArray:
    """0 for every edge but these, in the denoising direction."""
    scores = edge_scores(graph).copy()
    scores *= 0
    for edge, value in values.items():
        source, _, target = edge.partition("->")
        scores.loc[{"source": source, "target": target}] = value
    return scores


def test_the_three_synthetic_curves():
    """Faithful at every size, only at the last, and (by the weights alone) in proportion to the size."""
    known, k = frac_prevs(), np.array(MIB_FRACTIONS)
    np.testing.assert_allclose([np.trapezoid(row, k) for row in np.eye(10)], WEIGHTS, rtol=1e-9)
    assert (np.trapezoid(k, k), np.trapezoid(1 - k, k)) == (
        pytest.approx(0.5, abs=1e-6),
        pytest.approx(0.499, abs=1e-6),
    )
    graph = Graph.of(known.model.cfg)
    total = int(edge_mask(graph).sum())
    best = scored(graph, dict.fromkeys(known.edges, 1.0))
    sizes = [3 / total, 0.1, 0.2, 0.5, 1.0]
    first = faithfulness_curve(known.model, known.pairs, best, fractions=sizes)
    np.testing.assert_allclose(first.faithfulness, 1, rtol=0, atol=1e-8)
    assert (float(first.cpr), float(first.cpr_log)) == (pytest.approx(1 - sizes[0]), pytest.approx(1))
    assert (float(first.cmd), float(first.cmd_log)) == (pytest.approx(0, abs=1e-8), pytest.approx(0, abs=1e-8))
    backwards = faithfulness_curve(known.model, known.pairs, -best)
    np.testing.assert_allclose(backwards.faithfulness.sel(by="value"), [0] * 9 + [1], rtol=0, atol=1e-8)
    assert float(backwards.cpr) == pytest.approx(0.25)
    needed = scored(graph, dict.fromkeys(set(Circuit.full(graph).edges) - known.edges, 1.0))
    last = faithfulness_curve(known.model, known.pairs, needed)
    np.testing.assert_allclose(last.faithfulness, [[0] * 9 + [1]] * 2, rtol=0, atol=1e-8)
    assert (float(last.cpr), float(last.cmd)) == (pytest.approx(0.25), pytest.approx(0.749))


@EACH
def test_curves_of_known_circuits_are_steps(circuit):
    """Below the circuit's size something lacks, from there on nothing does."""
    known = circuit()
    n, total = len(known.edges), int(edge_mask(known.model.cfg).sum())
    found = faithfulness_curve(known.model, known.pairs, exact(known), fractions=[0.0, n / total, 0.3, 1.0])
    np.testing.assert_allclose(found.faithfulness.sel(by="size"), [0, 1, 1, 1], rtol=0, atol=1e-8)
    assert found.n_edges.values.tolist() == [0, n, int(0.3 * total), total]
    assert "cpr_log" not in found


# ---------------------------------------------------------------------------------------------------- smallest circuit


@EACH
def test_the_smallest_circuit_of_a_known_one_is_that(circuit):
    known, scores = circuit(), exact(circuit())
    found, f = smallest_circuit(known.model, known.pairs, scores, target=0.999)
    assert f == pytest.approx(float(faithfulness(known.model, known.pairs, found).faithfulness[0]), abs=1e-12)
    assert f >= 0.999
    sizes = range(len(known.edges) + 1)
    each = faithfulness(known.model, known.pairs, [Circuit.from_scores(scores, n_edges=n) for n in sizes])
    first = int((each.faithfulness.values >= 0.999).argmax())  # of the backup, that is the main head by itself
    assert found.attrs["n_edges"] == first
    assert set(found.edges) <= known.edges
    assert first == len(known.edges) or known.name in ("backup", "or_of_two")


@pytest.mark.parametrize("needed", [3, 4, 7, 40, 71, 75])
def test_the_size_is_found_wherever_it_is(needed):
    """The path's last edge has this rank: with one edge less there is nothing."""
    known = frac_prevs()
    graph, path = Graph.of(known.model.cfg), sorted(known.edges)
    order = path[:2] + sorted(set(Circuit.full(graph).edges) - known.edges)
    order.insert(needed - 1, path[2])
    scores = scored(graph, {edge: 2.0 - i / 100 for i, edge in enumerate(order)})
    for by in ("size", "value"):
        found, f = smallest_circuit(known.model, known.pairs, scores, by=by, target=0.9)
        assert found.attrs["n_edges"] == needed
        assert f == pytest.approx(1, abs=1e-8)
    less = Circuit.from_scores(scores, n_edges=needed - 1)
    assert abs(float(faithfulness(known.model, known.pairs, less).faithfulness[0])) < 1e-8


def test_a_target_that_nothing_reaches_is_said():
    known = induction()
    with refused(OptionError, "no circuit of this ranking reaches a faithfulness of 1.5"):
        smallest_circuit(known.model, known.pairs, exact(known), target=1.5)


# ---------------------------------------------------------------------------------------------------------------- signs


@pytest.mark.parametrize("sign", [1, -1])
@EACH
def test_the_sign_of_a_file_s_scores_is_found_by_measuring(circuit, sign):
    known = circuit()
    ranked = Circuit.ranked(exact(known))
    helpful = ranked.importance("value")
    unknown = Circuit(ranked.graph, ranked.kept, sign * helpful, {"format": "EAP-IG"})
    with refused(OptionError, "run check_sign"):
        faithfulness_curve(known.model, known.pairs, unknown)
    found = check_sign(known.model, known.pairs, unknown)
    assert found.helpful_sign == sign
    assert found.attrs["format"] == "EAP-IG"
    np.testing.assert_array_equal(found.importance("value"), helpful)


def test_the_sign_of_scores_of_a_bundled_model(mini_gpt2):
    task = interp.load_task("ioi", mini_gpt2, n=4)
    ranked = Circuit.ranked(edge_patching(mini_gpt2, task, direction="noise"))
    for sign in (1, -1):
        unknown = Circuit(ranked.graph, ranked.kept, sign * ranked.scores)
        assert check_sign(mini_gpt2, task, unknown).helpful_sign == -sign
