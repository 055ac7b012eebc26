"""Edge scores and faithfulness beside TransformerLens' own, which share nothing with ours.

TransformerLens 4.3 scores every edge at every position of one prompt pair by split inputs and hooks on a TransformerBridge, and
measures a circuit by ablating what is outside with hooks. It refuses grouped-query attention, so the models are GPT-2's family.
"""

import numpy as np
import pytest
import torch

from interp import Circuit, edge_scores, faithfulness, load_model
from interp.circuits.graph import Graph
from tests.families import boot_family
from tests.small_pairs import small_pairs

LENGTH = 6


@pytest.fixture(scope="module")
def peer():
    """Imported late: it imports triton, which the kernels' tests must have set up before."""
    module = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    if not hasattr(module, "faithfulness"):
        pytest.skip("edges came with TransformerLens 4")
    return module


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(the Bridge, our model of the same weights, pairs, the metric as the peer takes it)."""
    folder = tmp_path_factory.mktemp("gpt2")
    bridge = boot_family("gpt2", folder)
    pairs = small_pairs(1, LENGTH)
    answer, wrong = int(pairs.answers[0, 0]), int(pairs.wrong_answers[0, 0])
    return bridge, load_model(folder), pairs, lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]


def name_of(node) -> str:
    """The peer's node as we call it."""
    reads = {"q_input": "<q>", "k_input": "<k>", "v_input": "<v>"}
    if node.kind in ("embed", "logits"):
        return {"embed": "input", "logits": "logits"}[node.kind]
    return f"m{node.layer}" if node.head is None else f"a{node.layer}.h{node.head}{reads.get(node.kind, '')}"


def test_every_edge_at_every_position_scores_alike(setting, peer):
    bridge, model, pairs, metric = setting
    config = peer.EdgeAttributionConfig(granularity="edge")
    theirs = peer.attribution_patch(bridge, pairs.clean, pairs.corrupt, metric, config=config).edge_scores
    ours = edge_scores(model, pairs, positions="each")[0]
    found = {(name_of(u), name_of(v), u.position): score for (u, v), score in theirs.items()}
    mine = np.array([ours.sel(source=u, target=v, position=p).item() for u, v, p in found])
    wanted = np.array(list(found.values()))
    assert len(found) == int(ours.notnull().sum())
    np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("n", [5, 40, 150])
def test_circuits_are_as_faithful(setting, peer, n):
    bridge, model, pairs, metric = setting
    circuit = Circuit.from_scores(edge_scores(model, pairs), n_edges=n, prune=False)
    config = peer.EdgeAttributionConfig(granularity="edge")
    edges = peer.attribution_patch(bridge, pairs.clean, pairs.corrupt, metric, config=config).edge_scores
    kept = [(u, v) for u, v in edges if f"{name_of(u)}->{name_of(v)}" in set(circuit.edges)]
    theirs = peer.faithfulness(bridge, pairs.clean, pairs.corrupt, metric, kept).recovered
    ours = faithfulness(model, pairs, circuit).faithfulness.item()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert circuit.graph == Graph.of(model.cfg)


def test_the_peer_and_we_count_the_same_edges(setting, peer):
    bridge, model, pairs, metric = setting
    config = peer.EdgeAttributionConfig(granularity="edge")
    edges = peer.attribution_patch(bridge, pairs.clean, pairs.corrupt, metric, config=config).edge_scores
    names = {f"{name_of(u)}->{name_of(v)}" for u, v in edges}
    assert names == set(Circuit.full(Graph.of(model.cfg)).edges)
    assert torch.equal(pairs.lengths, torch.tensor([LENGTH]))
