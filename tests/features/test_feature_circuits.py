"""Circuits of latents: how faithful they are, what their edges measure, and how they are told.

Held against: runs with hooks by hand; exact patching of one node; finite differences along a latent's direction.
"""

import dataclasses

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from interp.errors import OptionError, RulesError, SiteError
from interp.features.attribution import ERROR, feature_attribution, feature_patching, node_name, parse_feature
from interp.features.circuits import FeatureCircuit, feature_circuit, feature_edges, feature_faithfulness
from interp.features.sae import SAE
from tests.features.small_saes import (
    DOUBLE,
    LAST,
    LATENTS,
    POST,
    READS,
    WRITES,
    Z,
    case,
    gap,
    metric_of,
    sae_at,
    small,
    split_by_hand,
    values_at,
)
from tests.small_pairs import refused

TWO = pytest.mark.parametrize("family", ["gpt2", "llama3"])


def all_nodes(saes: dict[str, SAE]) -> list[str]:
    return [node_name(hook, i) for hook in saes for i in (*range(LATENTS), ERROR)]


def changing(model, pairs, hook: str, sae: SAE, n: int = 2) -> list[int]:
    """Latents that fire in the corrupt run and change the most between the two."""
    (clean, _), (corrupt, _) = (split_by_hand(model, pairs, hook, sae, side) for side in ("clean", "corrupt"))
    moved = ((clean - corrupt).abs() * (corrupt != 0) * pairs.is_token[..., None]).sum((0, 1))
    return moved.argsort(descending=True)[:n].tolist()


# -------------------------------------------------------------------------------------------------------- faithfulness


@TWO
def test_all_nodes_are_the_whole_model_and_none_is_the_corrupt_run(tiny, family):
    model, pairs, saes = case(tiny, family, DOUBLE)
    assert feature_faithfulness(model, pairs, saes, all_nodes(saes)) == pytest.approx(1, abs=1e-9)
    for hook in (POST, LAST):  # a residual stream is all there is to know of the layers before
        assert feature_faithfulness(model, pairs, {hook: saes[hook]}, []) == pytest.approx(0, abs=1e-9)
    latents = [name for name in all_nodes(saes) if not name.endswith(".error")]
    assert feature_faithfulness(model, pairs, saes, latents, errors="keep") == pytest.approx(1, abs=1e-9)
    assert abs(feature_faithfulness(model, pairs, saes, latents) - 1) > 1e-3


@TWO
@pytest.mark.parametrize("hook", [POST, Z, READS, LAST])
def test_one_node_ablated_is_noising_it_and_one_node_kept_of_a_cut_is_denoising_it(tiny, family, hook):
    """With one SAE nothing before it changes: the codes of this run are the clean run's."""
    model, pairs, saes = case(tiny, family, DOUBLE)
    sae = {hook: saes[hook]}
    nodes = all_nodes(sae)
    some = [node_name(hook, i) for i in (*changing(model, pairs, hook, saes[hook]), ERROR)]
    noised, denoised = (feature_patching(model, pairs, sae, some, direction=d) for d in ("noise", "denoise"))
    for node in some:
        found = feature_faithfulness(model, pairs, sae, [other for other in nodes if other != node])
        expected = 1 + noised.sel(node=node).mean() / gap(noised).mean()
        assert found == pytest.approx(float(expected), rel=1e-8)
        if hook in (POST, LAST):
            expected = denoised.sel(node=node).mean() / gap(denoised).mean()
            assert feature_faithfulness(model, pairs, sae, [node]) == pytest.approx(float(expected), rel=1e-8)
    assert abs(noised).mean() > 1e-4


@TWO
@pytest.mark.parametrize("errors", ["nodes", "keep"])
def test_what_is_kept_is_the_code_of_this_very_run(tiny, family, errors):
    """Two residual streams: the second SAE sees what the first one's ablations have made."""
    model, pairs, saes = case(tiny, family, DOUBLE)
    saes = {hook: saes[hook] for hook in (POST, LAST)}
    kept = {hook: changing(model, pairs, hook, sae, 4) for hook, sae in saes.items()}
    kept[LAST].append(ERROR)

    def ablate(at: str):
        sae, (code, a) = saes[at], split_by_hand(model, pairs, at, saes[at], "corrupt")

        def hook_function(value: torch.Tensor, hook) -> torch.Tensor:
            scale = value.std(-1, keepdim=True) + 1e-5 if sae.config.normalize == "layer_norm" else 1.0
            here = sae.encode(value) * scale
            mixed = code.clone()
            for i in set(kept[at]) - {ERROR}:
                mixed[..., i] = here[..., i]
            run = (value, here) if errors == "keep" or ERROR in kept[at] else (a, code)
            return run[0] - run[1] @ sae.W_dec + mixed @ sae.W_dec

        return at, hook_function

    clean, corrupt = (metric_of(model, pairs, side).mean() for side in ("clean", "corrupt"))
    circuit = metric_of(model, pairs, "clean", [ablate(hook) for hook in saes]).mean()
    names = [node_name(hook, i) for hook, latents in kept.items() for i in latents]
    found = feature_faithfulness(model, pairs, saes, names, errors=errors)
    assert found == pytest.approx(float((circuit - corrupt) / (clean - corrupt)), rel=1e-9)
    assert abs(found - 1) > 1e-3


def test_the_order_of_nodes_and_naming_one_twice_do_not_matter(tiny):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    nodes = [node_name(hook, i) for hook, sae in saes.items() for i in (*changing(model, pairs, hook, sae), ERROR)]
    once = feature_faithfulness(model, pairs, saes, nodes)
    again = feature_faithfulness(model, pairs, dict(reversed(saes.items())), [*nodes[::-1], *nodes[:4]])
    assert again == pytest.approx(once, rel=1e-10)


def test_without_a_difference_there_is_nothing_to_be_faithful_to(tiny):
    model, pairs, saes = case(tiny, "gpt2")
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    assert np.isnan(feature_faithfulness(model, pairs, saes, []))


# ------------------------------------------------------------------------------------------------------------- circuits


@pytest.mark.parametrize(
    "options", [{}, {"rules": "relp"}, {"steps": 3, "direction": "both"}], ids=["gradient", "relp", "integrated"]
)
def test_a_circuit_is_the_nodes_with_the_largest_mean_scores(tiny, options):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    circuit = feature_circuit(model, pairs, saes, n_nodes=9, check=4, **options)
    direction = options.get("direction", "noise")
    scores = feature_attribution(model, pairs, saes, **{"direction": direction, **options})
    np.testing.assert_allclose(circuit.scores, scores, rtol=1e-12, atol=1e-15)
    largest = np.sort(abs(scores.mean("prompt").values))[::-1][:9]
    names = circuit.nodes.node.tolist()
    np.testing.assert_allclose(abs(circuit.nodes.estimate), largest, rtol=1e-12)
    np.testing.assert_allclose(circuit.nodes.estimate, scores.sel(node=names).mean("prompt"), rtol=1e-12)
    exact = feature_patching(model, pairs, saes, names[:4], direction=direction).mean("prompt")
    np.testing.assert_allclose(circuit.nodes.exact[:4], exact, rtol=1e-10)
    assert circuit.nodes.exact[4:].isna().all()
    assert circuit.agreement == pytest.approx(np.corrcoef(circuit.nodes.estimate[:4], exact)[0, 1], rel=1e-9)
    assert circuit.faithfulness == pytest.approx(feature_faithfulness(model, pairs, saes, names), rel=1e-12)
    edges = feature_edges(model, pairs, saes, names, rules=options.get("rules", "gradient"))
    pd.testing.assert_frame_equal(circuit.edges, edges)


def test_a_circuit_of_everything_leaves_out_what_has_no_effect(tiny):
    model, pairs, saes = case(tiny, "llama3", DOUBLE)
    circuit = feature_circuit(model, pairs, saes, n_nodes=10_000, check=0, edges=False)
    silent = circuit.scores.node.values[(circuit.scores.mean("prompt") == 0).values]
    assert set(circuit.nodes.node) == set(all_nodes(saes)) - set(silent)
    assert len(silent)
    assert np.isnan(circuit.agreement)
    assert circuit.faithfulness == pytest.approx(1, abs=1e-9)  # what scores 0 is the same in both runs
    assert circuit.edges.columns.tolist() == ["source", "target", "weight"]
    assert len(circuit.edges) == 0


def test_of_equal_prompts_the_circuit_is_empty(tiny):
    model, pairs, saes = case(tiny, "gpt2")
    circuit = feature_circuit(model, dataclasses.replace(pairs, corrupt=pairs.clean), saes)
    assert len(circuit.nodes) == len(circuit.edges) == 0
    assert str(circuit).startswith("0 of 100 nodes, faithfulness nan")
    assert len(circuit.to_networkx()) == 0


def test_a_circuit_can_be_read_and_walked(tiny):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    circuit = feature_circuit(model, pairs, saes, n_nodes=40, check=5)
    text, graph = str(circuit), circuit.to_networkx()
    first = circuit.nodes.iloc[0]
    assert f"40 of {4 * (LATENTS + 1)} nodes, faithfulness {circuit.faithfulness:.3f}" in text
    assert f"5 nodes patched exactly: the estimates' relative error is {circuit.relative_error:.3f}" in text
    assert f"their correlation {circuit.agreement:.3f}" in text
    assert first.node in text
    assert f"{first.estimate:+.4f}" in text
    assert max(len(line) for line in text.splitlines()) < 120
    assert text.count("\n") < 60
    assert list(graph) == circuit.nodes.node.tolist()
    assert graph.nodes[first.node] == {"estimate": first.estimate, "exact": first.exact}
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.number_of_edges() == len(circuit.edges) > 20
    edge = circuit.edges.iloc[3]
    assert graph.edges[edge.source, edge.target]["weight"] == edge.weight
    assert circuit.edges.weight.abs().is_monotonic_decreasing


def test_agreement_is_the_correlation_of_what_was_checked(tiny):
    model, pairs, saes = case(tiny, "gpt2")
    scores = feature_attribution(model, pairs, saes)
    table = {"node": list("abcd"), "estimate": [1.0, 2.0, 3.0, 9.0], "exact": [2.0, 4.0, 6.0, np.nan]}
    edges = pd.DataFrame({"source": [], "target": [], "weight": []})
    circuit = FeatureCircuit(pd.DataFrame(table), edges, scores, 1.0)
    assert circuit.agreement == pytest.approx(1)
    assert circuit.relative_error == pytest.approx(0.5)
    table["exact"] = [-2.0, -4.0, np.nan, np.nan]
    assert np.isnan(FeatureCircuit(pd.DataFrame(table), edges, scores, 1.0).agreement)


# ---------------------------------------------------------------------------------------------------------------- edges


def gradient_at(model, pairs, place: str) -> torch.Tensor:
    """The gradient of the logit difference at a place of the corrupt run."""
    held = {}
    leaf = lambda value, hook: held.setdefault("it", value.detach().requires_grad_())  # noqa: E731
    with torch.enable_grad():
        metric_of(model, pairs, "corrupt", [(place, leaf)]).sum().backward()
    return held["it"].grad.flatten(2)


def through(model, pairs, saes: dict[str, SAE], source: str, target: str, step: float = 1e-6) -> float:
    """d S_target / d epsilon, where the source's change times epsilon is added to the corrupt run: two runs."""
    (first, u), (second, v) = (parse_feature(name, saes) for name in (source, target))
    sae, other = saes[first], saes[second]
    place, end = sae.config.target_hook or first, other.config.target_hook or second
    (clean, a_clean), (corrupt, a) = (split_by_hand(model, pairs, first, sae, side) for side in ("clean", "corrupt"))
    moved = clean - corrupt
    change = moved[..., u, None] * sae.W_dec[u] if u != ERROR else a_clean - a - moved @ sae.W_dec
    held = gradient_at(model, pairs, end)

    def effect(epsilon: float) -> float:
        seen = {}
        add = lambda value, hook: value + epsilon * change.reshape(value.shape)  # noqa: E731
        keep = lambda value, hook: seen.update({hook.name: value.flatten(2)})  # noqa: E731
        model.run_with_hooks(pairs.corrupt, fwd_hooks=[(place, add), *((name, keep) for name in {second, end})])
        x = seen[second]
        scale = x.std(-1, keepdim=True) + 1e-5 if other.config.normalize == "layer_norm" else 1.0
        code, m = other.encode(x) * scale, held
        if v != ERROR:
            return float((code[..., v] * (m @ other.W_dec[v])).sum()) / len(pairs)
        return float((m * (seen[end] - code @ other.W_dec)).sum()) / len(pairs)

    return (effect(step) - effect(-step)) / (2 * step)


ATTN, MID, PRE = "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"
NEIGHBOURS = {
    "stream-to-heads": (POST, Z), "heads-to-transcoder": (Z, READS), "transcoder-to-stream": (READS, LAST),
    "stream-to-transcoder": (POST, READS), "stream-to-normalised": (ATTN, MID),
}  # fmt: skip


@TWO
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_an_edge_is_the_slope_along_the_sources_change(tiny, family, name):
    model, pairs, every = case(tiny, family, DOUBLE)
    d = model.cfg.d_model
    every |= {ATTN: sae_at(d, 5), MID: sae_at(d, 6, normalize="layer_norm")}
    saes = {hook: every[hook] for hook in NEIGHBOURS[name][::-1]}  # in whatever order they are given
    nodes = {hook: [node_name(hook, i) for i in (*changing(model, pairs, hook, saes[hook]), ERROR)] for hook in saes}
    edges = feature_edges(model, pairs, saes, [name for names in nodes.values() for name in names])
    first, second = NEIGHBOURS[name]
    assert {(e.source, e.target) for e in edges.itertuples()} == {(u, v) for u in nodes[first] for v in nodes[second]}
    assert edges.weight.abs().is_monotonic_decreasing
    assert edges.weight.abs().max() > 1e-3
    for edge in edges.itertuples():
        expected = through(model, pairs, saes, edge.source, edge.target)
        assert edge.weight == pytest.approx(expected, rel=1e-5, abs=1e-7), (edge.source, edge.target)


@pytest.mark.parametrize("rules", ["gradient", "relp"])
def test_edges_into_a_node_add_up_whatever_the_dictionary_before_it(tiny, rules):
    """Latents and error of the first SAE are its activation's change, however it is divided among them."""
    model, pairs, saes = case(tiny, "llama3", DOUBLE)
    targets = [node_name(LAST, i) for i in (*changing(model, pairs, LAST, saes[LAST], 3), ERROR)]
    totals = []
    for first in (saes[POST], sae_at(model.cfg.d_model, 8)):
        two = {POST: first, LAST: saes[LAST]}
        edges = feature_edges(model, pairs, two, [*all_nodes({POST: first}), *targets], rules=rules)
        totals.append(edges.groupby("target").weight.sum()[targets])
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-9, atol=1e-12)
    assert (totals[0].abs() > 1e-6).all()


def test_rules_between_two_runs_score_nodes_and_no_edges(tiny):
    model, pairs, saes = case(tiny, "llama3", DOUBLE)
    circuit = feature_circuit(model, pairs, saes, n_nodes=9, check=0, rules="secant")
    assert circuit.edges.attrs["rules"] == "gradient"
    assert "by rules gradient" in str(circuit)
    with refused(RulesError, "rules 'secant' lie between two runs"):
        feature_edges(model, pairs, saes, circuit.nodes.node.tolist(), rules="secant")


def test_edges_join_neighbours_in_the_order_of_the_pass(tiny):
    """Within a layer, too: the stream before it comes before its heads, and those before its MLP."""
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    saes = {READS: saes[READS], LAST: saes[LAST], Z: saes[Z], PRE: sae_at(model.cfg.d_model, 7)}
    nodes = [node_name(hook, i) for hook, sae in saes.items() for i in changing(model, pairs, hook, sae)]
    edges = feature_edges(model, pairs, saes, nodes)
    hooks = {(e.source.rpartition(".")[0], e.target.rpartition(".")[0]) for e in edges.itertuples()}
    assert hooks == {(PRE, Z), (Z, READS), (READS, LAST)}
    assert len(edges) == 3 * 4


def test_two_saes_at_one_place_are_both_there(tiny):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    saes = {READS: saes[READS], WRITES: sae_at(model.cfg.d_model, 7), LAST: saes[LAST]}
    nodes = [node_name(hook, i) for hook, sae in saes.items() for i in (*changing(model, pairs, hook, sae), ERROR)]
    edges = feature_edges(model, pairs, saes, nodes)
    assert len(edges) == 2 * 9
    for edge in edges[edges.target.str.startswith(WRITES)].itertuples():
        expected = through(model, pairs, saes, edge.source, edge.target)
        assert edge.weight == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_where_no_way_leads_there_the_edge_is_nothing(tiny):
    """Attention and MLP of a parallel layer do not see each other."""
    model, pairs, saes = case(tiny, "pythia", DOUBLE)
    saes = {hook: saes[hook] for hook in (Z, READS)}
    nodes = [node_name(hook, i) for hook, sae in saes.items() for i in (*changing(model, pairs, hook, sae), ERROR)]
    edges = feature_edges(model, pairs, saes, nodes)
    assert len(edges) == 9
    assert (edges.weight == 0).all()


def test_a_latent_that_does_not_fire_in_the_corrupt_run_has_no_slope(tiny):
    model, pairs, saes = case(tiny, "gpt2", DOUBLE)
    saes = {hook: saes[hook] for hook in (POST, LAST)}
    (x,) = values_at(model, pairs.corrupt, LAST)
    read = saes[LAST].encode(x)[torch.arange(3), pairs.read_at]
    silent = int((read == 0).all(0).nonzero()[0])  # behind the last layer only the position that is read counts
    edges = feature_edges(model, pairs, saes, [*all_nodes({POST: saes[POST]}), node_name(LAST, silent)])
    assert (edges.weight == 0).all()
    assert len(edges) == LATENTS + 1


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("options", [{"n_nodes": 0}, {"check": -1}], ids=["nodes", "check"])
def test_a_circuit_of_nothing_is_refused(tiny, options):
    model, pairs, saes = case(tiny, "gpt2")
    with pytest.raises(OptionError, match="a circuit has at least 1 node and checks 0 or more"):
        feature_circuit(model, pairs, saes, **options)


@pytest.mark.parametrize("analysis", [feature_faithfulness, feature_edges], ids=["faithfulness", "edges"])
def test_nodes_that_do_not_exist_are_said(tiny, analysis):
    model, pairs, saes = case(tiny, "gpt2")
    with pytest.raises(SiteError, match="is not a latent of the SAEs at"):
        analysis(model, pairs, saes, ["blocks.0.hook_mlp_out.f3"])
    with pytest.raises(SiteError, match=f"has latents 0 to {LATENTS - 1}, not {LATENTS}"):
        analysis(model, pairs, saes, [f"{POST}.f{LATENTS}"])


def test_an_unknown_treatment_of_errors_is_said(tiny):
    with refused(OptionError, "'drop' is not a treatment of error terms"):
        feature_faithfulness(tiny("gpt2"), small(), {POST: sae_at(dtype=torch.float32)}, [], errors="drop")
