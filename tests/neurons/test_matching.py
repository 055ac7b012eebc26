"""Neurons of two models matched through the vocabulary.

Held against: projections written out and correlated by numpy; models that are the same but for the order of neurons, the basis of
the stream, or where a norm's gain is kept.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from interp.errors import OptionError, SiteError
from interp.neurons.matching import layer_similarity, match_neurons, stitch
from tests.small_pairs import refused


def rotation(d: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g)).Q


def in_another_basis(model, R: torch.Tensor):
    """The same MLPs and unembedding in a rotated stream; gains are multiplied into the weights first, as they do not rotate."""
    other = copy.deepcopy(model)
    other.unembed.W_U.data = R.T @ (other.ln_final.w[:, None] * other.W_U)
    other.embed.W_E.data = other.W_E @ R
    other.ln_final.w.data.fill_(1.0)
    for block in other.blocks:
        for name in ("W_in", "W_gate"):
            weight = getattr(block.mlp, name)
            weight.data = R.T @ (block.ln2.w[:, None] * weight)
        block.ln2.w.data.fill_(1.0)
        block.mlp.W_out.data = block.mlp.W_out @ R
    return other


def with_neurons_moved(model, order: torch.Tensor):
    """Neuron i of the result is neuron order[i]."""
    other = copy.deepcopy(model)
    for block in other.blocks:
        for name in ("W_in", "W_gate"):
            if getattr(block.mlp, name) is not None:
                getattr(block.mlp, name).data = getattr(block.mlp, name)[:, order]
        block.mlp.W_out.data = block.mlp.W_out[order]
    return other


@pytest.mark.parametrize("matrix", ["down", "up", "gate"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "stablelm"])
def test_a_model_is_itself(tiny, family, matrix):
    model = tiny(family, torch.float64)
    table = match_neurons(model, model, matrix=matrix)
    assert (table["neuron_a"] == table["neuron_b"]).all()
    assert table["layer_a"].tolist() == [i for i in range(model.cfg.n_layers) for _ in range(model.cfg.d_mlp)]
    assert table["correlation"].tolist() == pytest.approx([1.0] * len(table))


@pytest.mark.parametrize("matrix", ["down", "up"])
def test_neurons_that_were_moved_are_found(mini_gpt2, matrix):
    order = torch.randperm(mini_gpt2.cfg.d_mlp, generator=torch.Generator().manual_seed(4))
    moved = with_neurons_moved(mini_gpt2, order)
    table = match_neurons(mini_gpt2, moved, matrix=matrix, layers=[(2, 2)])
    assert order[table["neuron_b"].tolist()].tolist() == table["neuron_a"].tolist()
    assert table["correlation"].min() > 1 - 1e-6


@pytest.mark.parametrize("matrix", ["down", "up", "gate"])
def test_the_basis_of_the_stream_does_not_matter(tiny, matrix):
    model = tiny("llama", torch.float64)
    rotated = in_another_basis(model, rotation(model.cfg.d_model))
    table = match_neurons(model, rotated, matrix=matrix)
    assert (table["neuron_a"] == table["neuron_b"]).all()
    assert table["correlation"].tolist() == pytest.approx([1.0] * len(table))
    other = tiny("llama-relu2", torch.float64)
    tables = [match_neurons(each, other, matrix=matrix) for each in (model, rotated)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-7)


def test_opposite_neurons(tiny):
    model = tiny("gpt2", torch.float64)
    negated = copy.deepcopy(model)
    negated.blocks[0].mlp.W_out.data[5] *= -1
    table = match_neurons(model, negated, layers=[(0, 0)]).set_index("neuron_a")
    assert table.loc[5, "neuron_b"] == 5
    assert table.loc[5, "correlation"] == pytest.approx(-1.0)
    signed = match_neurons(model, negated, layers=[(0, 0)], signed=True).set_index("neuron_a")
    assert signed.loc[5, "neuron_b"] != 5


@pytest.mark.parametrize("signed", [False, True], ids=["size", "signed"])
def test_by_hand(tiny, signed):
    """Models of other widths: projections written out, numpy's correlation, another layer of each."""
    a, b = tiny("gpt2", torch.float64), tiny("pythia", torch.float64)
    projected = []
    for model, layer in ((a, 2), (b, 0)):
        W = model.blocks[layer].mlp.W_out
        projected.append(((W - W.mean(1, keepdim=True)) * model.ln_final.w @ model.W_U).numpy())
    n = len(projected[0])
    correlation = np.corrcoef(*projected)[:n, n:]
    rows, columns = linear_sum_assignment(correlation if signed else np.abs(correlation), maximize=True)
    table = match_neurons(a, b, layers=[(2, 0)], signed=signed)
    assert table["neuron_b"].tolist() == columns.tolist()
    assert table["correlation"].tolist() == pytest.approx(correlation[rows, columns].tolist(), abs=1e-10)


def test_a_dead_neuron_is_matched_last_and_says_so(tiny):
    model = copy.deepcopy(tiny("gpt2", torch.float64))
    model.blocks[1].mlp.W_out.data[3] = 0
    table = match_neurons(model, model, layers=[(1, 1)]).set_index("neuron_a")
    assert table.loc[3, "neuron_b"] == 3
    assert table["correlation"].isna().sum() == 1
    assert not layer_similarity(model, model).isna().any(axis=None)


def test_similarity_of_layers(mini_gpt2):
    table = layer_similarity(mini_gpt2, mini_gpt2, seed=1)
    assert table[["layer_a", "layer_b"]].to_numpy().tolist() == [[a, b] for a in range(4) for b in range(4)]
    same = table["layer_a"] == table["layer_b"]
    assert table["similarity"][same].tolist() == pytest.approx([1.0] * 4)
    assert (table["similarity"][~same] < 0.999).all()
    assert (table["null"] < table["similarity"]).all()
    assert (table["null"] > 0).all()
    pd.testing.assert_frame_equal(table, layer_similarity(mini_gpt2, mini_gpt2, seed=1))
    other = layer_similarity(mini_gpt2, mini_gpt2, seed=2)
    assert (other["null"] != table["null"]).all()
    assert (other["similarity"] == table["similarity"]).all()


def test_the_null_is_that_of_shuffled_tokens(tiny):
    a, b = tiny("llama", torch.float64), tiny("llama-relu2", torch.float64)
    shuffle = torch.randperm(a.cfg.d_vocab, generator=torch.Generator().manual_seed(3))
    shuffled = copy.deepcopy(b)
    shuffled.unembed.W_U.data = shuffled.W_U[:, shuffle]
    null = layer_similarity(a, b, seed=3)["null"]
    assert null.tolist() == pytest.approx(layer_similarity(a, shuffled)["similarity"].tolist())


# --------------------------------------------------------------------------------------------------------- stitching


def test_stitching_to_a_rotated_model_is_the_rotation(tiny):
    model = tiny("llama", torch.float64)
    R = rotation(model.cfg.d_model)
    torch.testing.assert_close(stitch(model, in_another_basis(model, R)), R, rtol=1e-8, atol=1e-8)


def test_a_layer_norm_stitches_to_itself_but_for_the_mean(tiny):
    model = tiny("pythia", torch.float64)
    d = model.cfg.d_model
    expected = torch.eye(d, dtype=torch.float64) - 1 / d
    torch.testing.assert_close(stitch(model, model), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fold_norm", [True, False], ids=["folded", "raw"])
def test_stitching_is_the_least_squares_fit_of_logits(tiny, fold_norm):
    a, b = tiny("llama", torch.float64), tiny("stablelm", torch.float64)
    tables = []
    for model in (a, b):
        E = model.W_U.T
        if fold_norm:
            E = E * model.ln_final.w
            E = E - E.mean(1, keepdim=True) if model.ln_final.centred else E
        tables.append((E - E.mean(0)).numpy())
    # the least norm of all that fit, as the mean over channels is seen by no token of b
    expected = np.linalg.lstsq(tables[1], tables[0], rcond=1e-10)[0].T
    found = stitch(a, b, fold_norm=fold_norm)
    assert found.shape == (a.cfg.d_model, b.cfg.d_model)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_matching_refuses(tiny, mini_gpt2):
    a, letters = tiny("llama"), tiny("qwen2")
    for function in (match_neurons, layer_similarity, stitch):
        with refused(OptionError, f"vocabulary of {a.cfg.d_vocab} tokens and .* one of {mini_gpt2.cfg.d_vocab}"):
            function(a, mini_gpt2)
    assert a.cfg.d_vocab == letters.cfg.d_vocab
    with refused(OptionError, "token [0-9]+ is not the same"):
        match_neurons(a, letters)
    gpt_neo = tiny("gpt_neo")
    with refused(OptionError, "of 3 and 4 layers have no obvious pairs"):
        match_neurons(tiny("gpt2"), gpt_neo)
    with refused(SiteError, "layers 0 to 3, not 4"):
        match_neurons(gpt_neo, gpt_neo, layers=[(0, 4)])
    with refused(SiteError, "have no gate"):
        layer_similarity(gpt_neo, gpt_neo, matrix="gate")
    with refused(OptionError, "not a matrix of neurons"):
        match_neurons(a, a, matrix="sideways")
    with refused(OptionError, "no pairs of layers"):
        match_neurons(a, a, layers=[])
