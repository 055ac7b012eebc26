"""The known circuits are what they claim to be: the models do their tasks, and exact edge patching finds their edges."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import rankdata

import interp
from interp import Circuit, edge_patching, edge_scores
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.metrics import get_metric
from interp.sites import SITES, component_nodes
from tests.known_circuits.building import BOS, LOGIT, KnownCircuit
from tests.known_circuits.circuits import CIRCUITS, backup, frac_prevs, reverse
from tests.known_circuits.gates import WORDS, and_of_two, mlp_gate, or_of_two, prompts_of

SILENT, LOUD = 1e-9, 0.1  # shares of the gap between clean and corrupt: at most, outside; at least, in the circuit
EACH = pytest.mark.parametrize("circuit", CIRCUITS.values(), ids=CIRCUITS)


def directions(known: KnownCircuit) -> tuple[str, ...]:
    """Those in which exact patching must find the circuit: if it does in both, then also in each."""
    return ("denoise", "noise", "both") if known.direction == "both" else (known.direction,)


def shares(known: KnownCircuit, direction: str) -> xr.DataArray:
    """[prompt, edge]: each edge's effect as a share of the prompt's gap; ids as in `known.edges`."""
    found = edge_patching(known.model, known.pairs, direction=direction, normalize=True).stack(
        edge=("source", "target")
    )
    found = found.isel(edge=found.notnull().all("prompt").values)
    ids = [f"{source}->{target}" for source, target in found.edge.values]
    return xr.DataArray(found.transpose("prompt", "edge").values, {"edge": ids}, ("prompt", "edge"))


def auroc(scores: np.ndarray, member: np.ndarray) -> float:
    """The probability that a member scores higher than a non-member; a tie counts half."""
    n_in, n_out = member.sum(), (~member).sum()
    return (rankdata(scores)[member].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out)


@torch.no_grad()
def logit_diff(known: KnownCircuit, side: str) -> torch.Tensor:
    """[prompt]"""
    logits = known.model(known.pairs.tokens(side), read_at=known.pairs.read_at)
    return get_metric("logit_diff")(logits, known.pairs)


# -------------------------------------------------------------------------------------------------------------- all of them


@EACH
def test_the_model_does_its_task_and_the_corruption_breaks_it(circuit):
    known = circuit()
    clean, corrupt = logit_diff(known, "clean"), logit_diff(known, "corrupt")
    assert known.name == circuit.__name__
    assert 4 <= len(known.pairs) <= 8
    assert len({tuple(row) for row in known.pairs.clean.tolist()}) == len(known.pairs)
    np.testing.assert_allclose(clean.numpy(), LOGIT, rtol=0, atol=1e-8)
    assert (corrupt <= LOGIT / 2 + 1e-8).all()
    logits = known.model(known.pairs.clean, read_at=known.pairs.read_at)
    assert (logits.argmax(-1, keepdim=True) == known.pairs.answers).all()


@EACH
def test_exact_patching_finds_the_edges_of_the_circuit_and_no_others(circuit):
    known, there = circuit(), edge_mask(circuit().model.cfg)
    for direction in directions(known):
        found = shares(known, direction)
        member = np.isin(found.edge.values, list(known.edges))
        effect = np.abs(found.mean("prompt").values)
        assert member.sum() == len(known.edges)
        assert len(found.edge) == there.sum()
        assert (effect[member] > LOUD).all(), dict(zip(found.edge.values[member], effect[member], strict=True))
        assert np.abs(found.values[:, ~member]).max() < SILENT  # in no prompt, not only on average
        assert auroc(effect, member) == 1.0


@EACH
def test_the_edges_lead_from_the_input_to_the_logits(circuit):
    """Whatever a component reads in the circuit it also sends on, and the other way round."""
    known = circuit()
    sources, targets = zip(*(edge.split("->") for edge in known.edges), strict=True)
    assert set(sources) <= set(writers(known.model.cfg))
    assert set(targets) <= set(readers(known.model.cfg))
    assert {source for source in sources if source != "input"} == {
        target.split("<")[0] for target in targets if target != "logits"
    }
    assert {"input", "logits"} <= {*sources, *targets}


@EACH
def test_every_component_outside_of_the_circuit_reacts_to_the_corruption(circuit):
    """Edges outside of the circuit are silent because nobody listens, not because nothing is said."""
    known = circuit()
    inside = {edge.split("->")[0] for edge in known.edges}
    runs = [known.model.run_with_cache(known.pairs.tokens(side))[1] for side in ("clean", "corrupt")]
    for node in component_nodes(known.model.cfg):
        clean, corrupt = (run[node.site.hook(node.layer)] for run in runs)
        change = (clean - corrupt)[:, :, node.index] if node.kind == "head" else clean - corrupt
        assert str(node) in inside or change.abs().max() > 0.01, node


@EACH
def test_the_final_norm_is_the_identity(circuit):
    known, name = circuit(), SITES["resid_post"].hook(circuit().model.cfg.n_layers - 1)
    _, cache = known.model.run_with_cache(known.pairs.clean, names_filter=name)
    resid = cache[name][:, -1]
    torch.testing.assert_close(known.model.ln_final(resid), resid, rtol=1e-10, atol=0)


@EACH
@pytest.mark.parametrize(
    "options", [{"rules": "secant"}, {"method": "eap-ig"}, {"method": "eap-ig-activations"}], ids=str
)
def test_approximations_between_the_runs_rank_every_known_circuit_first(circuit, options):
    """At the ends of a saturated softmax or ReLU gradients are 0; what other methods score is in `benchmarks/results`."""
    known = circuit()
    scores = edge_scores(known.model, known.pairs, direction=known.direction, **options)
    truth = Circuit.from_edges(Graph.of(known.model.cfg), known.edges)
    # effects of opposite sign in different prompts are effects: sizes are averaged
    assert interp.auroc(np.abs(scores).assign_attrs(scores.attrs), truth) == 1.0


def test_a_score_that_ranks_edges_at_random_or_all_alike_has_an_auroc_of_one_half():
    member = np.arange(40) % 4 == 0
    assert auroc(np.zeros(40), member) == 0.5
    assert auroc(member * 1.0, member) == 1.0
    assert auroc(-1.0 * member, member) == 0.0


# ---------------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize(("circuit", "other"), [(or_of_two, "noise"), (and_of_two, "denoise")])
def test_the_other_direction_sees_only_the_edge_after_the_gate(circuit, other):
    """It has the whole effect in both directions, and it alone: no edge before the gate has any in the other one."""
    known = circuit()
    whole, nothing = shares(known, known.direction), shares(known, other)
    sign = {"denoise": 1, "noise": -1}
    before, after = sorted(known.edges - {"m1->logits"}), "m1->logits"
    np.testing.assert_allclose(whole.sel(edge=[*before, after]), sign[known.direction], rtol=0, atol=SILENT)
    np.testing.assert_allclose(nothing.sel(edge=after), sign[other], rtol=0, atol=SILENT)
    assert np.abs(nothing.drop_sel(edge=after).values).max() < SILENT


@pytest.mark.parametrize(
    ("circuit", "table"), [(or_of_two, [0, 1, 1, 1]), (and_of_two, [0, 0, 0, 1]), (mlp_gate, [0, 1, 1, 0])]
)
def test_gates_have_their_truth_table(circuit, table):
    bits = [(0, 0), (0, 1), (1, 0), (1, 1)]
    prompts, _ = prompts_of([(each, each) for each in bits], seed=0)
    with torch.no_grad():
        logits = circuit().model(torch.tensor([WORDS.ids(f"{BOS} {prompt}") for prompt in prompts]))
    one, zero = logits[:, -1, WORDS.ids("1 0")].T
    torch.testing.assert_close(one, LOGIT * torch.tensor(table).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(zero, LOGIT - one, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1), ("noise", -1)])
def test_self_repair_takes_back_half_of_what_the_main_head_does(direction, sign):
    """The direct path of the main head is worth more than the gap; the backup's edges have the opposite sign."""
    expected = {"input->a0.h0<q>": 1, "a0.h0->logits": 2, "a0.h0->a1.h1<q>": -1, "a1.h1->logits": -1}
    found = shares(backup(), direction)
    for edge, share in expected.items():
        np.testing.assert_allclose(found.sel(edge=edge), sign * share, rtol=0, atol=1e-8, err_msg=edge)


def test_the_backup_head_speaks_when_the_main_head_is_silenced():
    known = backup()

    def silence(z, hook):
        z[:, :, 0] = 0.0
        return z

    logits = known.model.run_with_hooks(known.pairs.clean, fwd_hooks=[(SITES["head"].hook(0), silence)])
    repaired = get_metric("logit_diff")(logits[:, -1], known.pairs)
    np.testing.assert_allclose(repaired.numpy(), LOGIT / 2, rtol=0, atol=1e-8)


def test_the_reversing_model_reverses_the_whole_sequence():
    known = reverse()
    sequences = known.pairs.clean[:, :6]  # <bos>, four tokens, sep
    written = known.model.generate(sequences, 4, stop_at_eos=False)
    assert torch.equal(written[:, 6:], sequences[:, 1:5].flip(1))


def test_the_fraction_is_right_for_every_number_of_x():
    bos, x, other, more = 0, 1, 2, 6
    prompts = torch.tensor([[bos, *[x] * k, *[other] * (7 - k)] for k in range(8)])
    with torch.no_grad():
        logits = frac_prevs().model(prompts)[:, -1]
    torch.testing.assert_close(logits[:, more], LOGIT * torch.arange(8).double(), rtol=0, atol=1e-8)
