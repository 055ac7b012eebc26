"""Circuits beside one another: overlap, how well a ranking finds a known circuit, and how stable a circuit is.

Held against: sets of edge names; counting all pairs of an edge inside and one outside; MIB's area worked out by hand on a
graph of eight edges; the known circuits; scores whose agreement between prompts is chosen.
"""

import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from interp import edge_patching
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.circuits.similarity import auroc, compare_circuits, jaccard, stability
from interp.errors import OptionError, SiteError
from tests.circuits.test_circuit import GRAPHS, SMALL, edge_scores
from tests.known_circuits.circuits import CIRCUITS
from tests.small_pairs import refused

SEEDS = st.integers(0, 10_000)


def some_edges(graph: Graph, seed: int, share: float = 0.4) -> Circuit:
    there = edge_mask(graph)
    return Circuit(graph, there & (np.random.default_rng(seed).random(there.shape) < share))


def with_scores(circuit: Circuit, scores: xr.DataArray) -> Circuit:
    return Circuit.ranked(scores).with_edges(circuit.kept)


# ------------------------------------------------------------------------------------------------------------ overlap


@given(GRAPHS, SEEDS, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_overlap_is_that_of_the_sets_of_names(graph, seed, share, other):
    a, b = some_edges(graph, seed, share), some_edges(graph, seed + 1, other)
    found, back = compare_circuits(a, b), compare_circuits(b, a)
    x, y = set(a.edges), set(b.edges)
    assert found.n_edges == (len(x), len(y))
    assert found.n_shared == len(x & y)
    assert found.edge_jaccard == (len(x & y) / len(x | y) if x | y else 1.0) == jaccard(a.kept, b.kept)
    nodes = set(a.nodes), set(b.nodes)
    assert found.node_jaccard == len(nodes[0] & nodes[1]) / len(nodes[0] | nodes[1])
    assert found.overlap == pytest.approx(len(x & y) / max(1, min(len(x), len(y))))
    assert (set(found.only_first), set(found.only_second)) == (x - y, y - x)
    assert (found.edge_jaccard, found.node_jaccard, found.overlap) == (
        back.edge_jaccard,
        back.node_jaccard,
        back.overlap,
    )
    assert found.expected_jaccard == pytest.approx(back.expected_jaccard)
    assert np.isnan([found.pearson, found.spearman]).all()  # neither has scores


@given(GRAPHS, SEEDS)
@settings(deadline=None)
def test_a_circuit_is_like_itself_and_unlike_what_it_lacks(graph, seed):
    a = some_edges(graph, seed)
    rest = a.with_edges(edge_mask(graph) & ~a.kept)
    same, different = compare_circuits(a, a), compare_circuits(a, rest)
    assert (same.edge_jaccard, same.node_jaccard, same.only_first, same.only_second) == (1.0, 1.0, [], [])
    assert (different.edge_jaccard, different.overlap, different.n_shared) == (0.0, 0.0, 0)
    nothing = a.with_edges(np.zeros_like(a.kept))
    assert compare_circuits(nothing, nothing).edge_jaccard == 1.0


def test_the_jaccard_to_expect_by_chance():
    pairs = [compare_circuits(some_edges(SMALL, i, 0.3), some_edges(SMALL, i + 1000, 0.6)) for i in range(300)]
    found, expected = np.mean([p.edge_jaccard for p in pairs]), np.mean([p.expected_jaccard for p in pairs])
    assert found == pytest.approx(expected, abs=0.01)


def test_correlations_are_over_edges_that_both_have_scored():
    x, y = edge_scores(SMALL, 0), edge_scores(SMALL, 1)
    y = (0.5 * x + y).assign_attrs(x.attrs)
    y[:3] = np.nan
    found = compare_circuits(with_scores(some_edges(SMALL, 0), x), with_scores(some_edges(SMALL, 1), y))
    both = np.isfinite(x.values) & np.isfinite(y.values)
    assert found.pearson == pytest.approx(np.corrcoef(x.values[both], y.values[both])[0, 1])
    ranks = [np.argsort(np.argsort(v.values[both])) for v in (x, y)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    same = compare_circuits(Circuit.ranked(x), Circuit.ranked((-2 * x).assign_attrs(x.attrs)))
    assert same.pearson == pytest.approx(-1)
    flat = Circuit.ranked(x.where(x.isnull(), 1.0).assign_attrs(x.attrs))
    assert np.isnan(compare_circuits(Circuit.ranked(x), flat).pearson)


def test_a_comparison_says_what_it_found():
    x = edge_scores(SMALL, 0)
    a, b = Circuit.from_scores(x, n_edges=9, prune=False), Circuit.from_scores(x, n_edges=6, prune=False)
    said = str(compare_circuits(a, b))
    assert re.match(
        r"6 edges shared of 9 and 6: Jaccard 0\.667 \(by chance 0\.\d+\), of the smaller 100\.0%; nodes", said
    )
    assert said.endswith("scores: Pearson 1.000, Spearman 1.000")
    assert "scores" not in str(compare_circuits(some_edges(SMALL, 0), b))


# -------------------------------------------------------------------------------------------------------------- AUROC


@given(GRAPHS, SEEDS, st.integers(1, 6))
@settings(deadline=None)
def test_the_area_is_the_chance_that_an_edge_inside_is_above_one_outside(graph, seed, n_values):
    """Also with ties, which count half; and upside down it is what is missing to 1."""
    there, random = edge_mask(graph), np.random.default_rng(seed)
    known = some_edges(graph, seed)
    if not known.n_edges or known.n_edges == there.sum():
        return
    scores = edge_scores(graph).copy(data=np.where(there, random.integers(0, n_values, there.shape), np.nan))
    inside, outside = scores.values[known.kept], scores.values[there & ~known.kept]
    wins = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
    assert auroc(scores, known) == pytest.approx(wins, abs=1e-12)
    u = stats.mannwhitneyu(inside, outside).statistic if n_values > 1 else wins * inside.size * outside.size
    assert auroc(scores, known) == pytest.approx(u / (inside.size * outside.size), abs=1e-12)
    assert auroc((n_values - scores).assign_attrs(scores.attrs), known) == pytest.approx(1 - wins, abs=1e-12)


def test_the_area_goes_by_size_or_by_what_helps():
    scores, known = edge_scores(SMALL, 3), some_edges(SMALL, 3)
    denoise, noise = Circuit.ranked(scores), Circuit.ranked(scores.assign_attrs(direction="noise"))
    assert auroc(denoise, known) == auroc(noise, known) == auroc(np.abs(scores).assign_attrs(scores.attrs), known)
    assert auroc(denoise, known, by="value") == pytest.approx(1 - auroc(noise, known, by="value"))
    assert auroc(denoise, known) == auroc(scores, known)
    several = edge_scores(SMALL, prompts=2).copy(data=np.stack([scores - 1, scores + 1]))
    assert auroc(several, known) == pytest.approx(auroc(scores, known))


def test_edges_without_a_score_are_last():
    scores, known = edge_scores(SMALL, 4), some_edges(SMALL, 4)
    some = scores.where(np.random.default_rng(0).random(scores.shape) < 0.7)
    filled = some.copy(data=np.where(edge_mask(SMALL), np.nan_to_num(np.abs(some.values), nan=0), np.nan))
    assert auroc(some, known) == pytest.approx(auroc(filled, known))


@pytest.mark.parametrize("method", ["rank", "mib"])
@pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)
def test_exact_patching_ranks_a_known_circuit_first(circuit, method):
    known = circuit()
    scores = edge_patching(
        known.model, known.pairs, direction="noise" if known.direction == "both" else known.direction
    )
    mine = Circuit.from_edges(Graph.of(known.model.cfg), known.edges)
    if method == "rank":
        assert auroc(scores, mine) == 1.0
    else:
        assert 1 - 1 / 40 < auroc(scores, mine, method="mib") <= 1  # where both rates are still 0 it sees nothing


def test_mib_s_area_by_hand():
    """One layer of one head, eight edges: sizes 0 seven times, then 1 (of .2), 4 and 8.

    Greedily from the logits: input->logits (9), a0.h0->logits (6), input->a0.h0<q> (7, now that a0.h0 is in) and
    input->a0.h0<k> (5). m0's own inputs (8, 4) wait until m0->logits (1) is in; input->a0.h0<v> has 2.
    """
    graph = Graph(1, 1, name="one")
    values = {"input->logits": 9, "a0.h0->logits": 6, "m0->logits": 1, "input->a0.h0<q>": 7, "input->a0.h0<k>": 5,
              "input->a0.h0<v>": 2, "input->m0": 8, "a0.h0->m0": 4}  # fmt: skip
    scores = xr.full_like(edge_scores(graph), np.nan)
    for edge, value in values.items():
        source, _, target = edge.partition("->")
        scores.loc[{"source": source, "target": target}] = value
    assert np.isfinite(scores).sum() == len(values) == edge_mask(graph).sum()
    assert Circuit.from_scores(scores, n_edges=4, search="greedy", prune=False).edges == [
        "input->a0.h0<q>", "input->a0.h0<k>", "input->logits", "a0.h0->logits",
    ]  # fmt: skip
    # size 1: input->logits; size 4: those; size 8: all. Truth of 3 and 5 others:
    known = Circuit.from_edges(graph, ["input->logits", "input->a0.h0<q>", "m0->logits"])
    tpr, fpr = [0, 1 / 3, 2 / 3, 1], [0, 0, 2 / 5, 1]
    area = sum((tpr[i] + tpr[i + 1]) / 2 * (fpr[i + 1] - fpr[i]) for i in range(3))
    assert auroc(scores, known, method="mib") == pytest.approx(area)
    # the first edge is no true one
    false = Circuit.from_edges(graph, ["a0.h0->logits", "input->m0"])
    area = (3 / 6 - 1 / 6) * (0 + 1 / 2) / 2 + (1 - 3 / 6) * (1 / 2 + 1) / 2
    assert auroc(scores, false, method="mib") == pytest.approx(area)


def test_what_has_no_area_is_said():
    scores = edge_scores(SMALL)
    for known in (Circuit.full(SMALL), Circuit(SMALL, np.zeros_like(edge_mask(SMALL)))):
        with refused(OptionError, "a known circuit of no edges, or of all, ranks nothing"):
            auroc(scores, known)
    with refused(SiteError, "scores of another model than the known circuit's"):
        auroc(scores, some_edges(Graph(2, 2), 0))
    with refused(OptionError, "'ranks' is not a method"):
        auroc(scores, some_edges(SMALL, 0), method="ranks")
    with refused(OptionError, "this circuit has no scores"):
        auroc(some_edges(SMALL, 0), some_edges(SMALL, 1))
    with refused(SiteError, "circuits of different models"):
        compare_circuits(some_edges(SMALL, 0), some_edges(Graph(3, 2, parallel=True), 0))


# ---------------------------------------------------------------------------------------------------------- stability


def around(n: int, noise: float, seed: int = 0) -> xr.DataArray:
    """[prompt, source, target]: one set of scores, and in each prompt something else on top."""
    same, other = edge_scores(SMALL, 99), edge_scores(SMALL, seed, prompts=n)
    return other.copy(data=same.values + noise * other.values)


def test_prompts_that_agree_give_one_circuit():
    found = stability(around(6, 0.0), n_edges=12)
    assert [float(found[name]) for name in ("jaccard", "jaccard_low", "jaccard_high", "to_whole")] == [1.0] * 4
    whole = Circuit.from_scores(around(6, 0.0), n_edges=12)
    np.testing.assert_array_equal(found.frequency.values[edge_mask(SMALL)], whole.kept[edge_mask(SMALL)])


def test_prompts_that_share_nothing_give_another_circuit_each_time():
    found = stability(edge_scores(SMALL, 5, prompts=12), n_edges=10, prune=False)
    chance = (10 / 44) / (2 - 10 / 44)
    assert edge_mask(SMALL).sum() > 40
    assert found.jaccard < 0.6  # resamples share prompts: more than by chance, and no circuit
    assert found.jaccard > chance / 2
    assert found.jaccard_low <= found.jaccard <= found.jaccard_high
    assert found.to_whole > found.jaccard


def test_more_prompts_make_it_steadier():
    steady = [[float(stability(around(n, 2.0, seed), n_edges=12, prune=False).jaccard) for seed in range(5)] for n in
              (5, 50, 500)]  # fmt: skip
    few, more, many = np.mean(steady, 1)
    assert few + 0.05 < more < many - 0.05
    assert many > 0.8


def test_frequencies_are_shares_of_the_resamples():
    found = stability(around(8, 2.0), n_edges=12, prune=False, n_resamples=40)
    there = edge_mask(SMALL)
    inside = found.frequency.values[there]
    assert ((inside >= 0) & (inside <= 1)).all()
    assert np.isnan(found.frequency.values[~there]).all()
    assert inside.sum() == pytest.approx(12)
    np.testing.assert_allclose(inside * 40, np.round(inside * 40), atol=1e-9)
    assert found.source.values.tolist() == writers(SMALL)
    assert found.target.values.tolist() == readers(SMALL)
    whole = Circuit.from_scores(around(8, 2.0), n_edges=12, prune=False)
    assert inside[whole.kept[there]].mean() > inside[~whole.kept[there]].mean()


def test_the_seed_says_which_prompts_are_drawn():
    scores = around(8, 2.0)
    found = [stability(scores, n_edges=12, seed=seed) for seed in (0, 0, 1)]
    assert found[0].identical(found[1])
    assert found[0].jaccard != found[2].jaccard
    a = found[0].attrs
    assert (a["method"], a["n_resamples"], a["resampling_seed"], a["n_prompts"]) == ("stability", 100, 0, 8)
    turned = scores.transpose("source", "prompt", "target")
    xr.testing.assert_identical(stability(turned, n_edges=12), found[0])
    by_value = stability(scores, threshold=0.5, by="value", search="greedy")
    assert 0 < by_value.jaccard <= 1


def test_the_jaccard_is_the_mean_over_pairs_of_resampled_circuits():
    """Two prompts, so that a resample is one of three: the circuit of the first, of the second, or of both."""
    scores = around(2, 3.0)
    found = stability(scores, n_edges=9, n_resamples=400, prune=False, seed=1)
    cut = lambda rows: Circuit.from_scores(scores.isel(prompt=rows), n_edges=9, prune=False).kept  # noqa: E731
    kinds, share = [cut([0]), cut([1]), cut([0, 1])], np.array([0.25, 0.25, 0.5])
    expected = sum(share[i] * share[j] * jaccard(kinds[i], kinds[j]) for i in range(3) for j in range(3))
    assert float(found.jaccard) == pytest.approx(expected, abs=0.05)
    frequency = sum(weight * kind for weight, kind in zip(share, kinds, strict=True))
    np.testing.assert_allclose(found.frequency.values[edge_mask(SMALL)], frequency[edge_mask(SMALL)], atol=0.1)
    to_whole = sum(weight * jaccard(kind, kinds[2]) for weight, kind in zip(share, kinds, strict=True))
    assert float(found.to_whole) == pytest.approx(to_whole, abs=0.05)


def test_what_cannot_be_resampled_is_said():
    with refused(OptionError, "stability needs scores of every prompt, and these have been averaged"):
        stability(edge_scores(SMALL), n_edges=5)
    scores = edge_scores(SMALL, prompts=3)
    with refused(OptionError, "at least 2 resamples, not 1"):
        stability(scores, n_edges=5, n_resamples=1)
    with refused(OptionError, "how many edges to keep, or above which threshold"):
        stability(scores)
    with refused(OptionError, "cannot keep 999 of"):
        stability(scores, n_edges=999)
