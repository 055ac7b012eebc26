"""Neurons as tokens.

Held against: the dense table of scores, planted rows, permutations, scipy's kurtosis.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from interp.errors import OptionError, SiteError, UnsupportedModel
from interp.model.tokens import token_strings
from interp.neurons.decode import COLUMNS, decode_neurons, excess_kurtosis
from interp.neurons.readings import MATRICES, SCORES, Reading, reading_rows, token_deviations, vocabulary_rows
from tests.small_pairs import refused


def tokens_of(table, k: int) -> np.ndarray:
    """[neuron and pole, k]"""
    return table["token_id"].to_numpy().reshape(-1, k)


@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_top_tokens_are_those_of_the_dense_table(tiny, matrix, score, screen):
    model, k = tiny("llama", torch.float64), 5
    table = decode_neurons(model, matrix=matrix, score=score, k=k, screen=screen)
    reading = Reading(matrix, score=score)
    expected, values = [], []
    for layer in range(model.cfg.n_layers):
        rows, tokens = reading_rows(model, layer, reading), vocabulary_rows(model, reading)
        scores = rows @ tokens.T / (token_deviations(rows, tokens) if score == "zscore" else 1)
        sides = [scores] if "gate" in matrix and "up" in matrix else [scores, -scores]
        found = [side.sort(dim=1, descending=True, stable=True) for side in sides]
        expected.append(torch.stack([side.indices[:, :k] for side in found], 1).reshape(-1, k))
        values.append(torch.stack([side.values[:, :k] for side in found], 1).reshape(-1))
    assert (tokens_of(table, k) == torch.cat(expected).numpy()).all()
    np.testing.assert_allclose(table["score"], torch.cat(values), rtol=1e-9, atol=1e-12)


def test_what_a_table_looks_like(mini_llama):
    table = decode_neurons(
        mini_llama, matrix=["down", "gate-up"], layers=[3, 1], neurons=[9, 4], k=2, score="logit", kurtosis=True
    )
    assert tuple(table.columns) == (*COLUMNS, "kurtosis")
    assert table["matrix"].tolist() == ["down"] * 16 + ["gate-up"] * 8
    assert table["layer"].tolist() == [3] * 8 + [1] * 8 + [3] * 4 + [1] * 4
    assert table["neuron"].tolist() == ([9] * 4 + [4] * 4) * 2 + ([9] * 2 + [4] * 2) * 2
    assert table["pole"].tolist() == ["+", "+", "-", "-"] * 4 + ["-"] * 8
    assert table["rank"].tolist() == [0, 1] * 12
    assert table["token"].tolist() == token_strings(mini_llama.tokenizer, table["token_id"].tolist())
    assert (table.groupby(["matrix", "layer", "neuron"], observed=True)["kurtosis"].nunique() == 1).all()
    reading = table.attrs["reading"]
    assert (reading["model"], reading["revision"], reading["k"]) == ("mini-llama", "local", 2)
    assert reading["matrices"]["down"] == Reading("down", True, False, "full", "logit").to_dict()
    assert reading["matrices"]["gate-up"]["final_norm"] == "none"


def test_some_neurons_are_those_of_all(mini_gpt2):
    whole = decode_neurons(mini_gpt2, matrix="down", score="zscore", k=3)
    some = decode_neurons(mini_gpt2, matrix="down", score="zscore", k=3, layers=[2], neurons=[40, 7])
    for neuron in (40, 7):
        expected = whole[(whole["layer"] == 2) & (whole["neuron"] == neuron)]
        assert some[some["neuron"] == neuron]["token_id"].tolist() == expected["token_id"].tolist()


@pytest.mark.parametrize("pole", ["+", "-"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_a_planted_neuron_decodes_to_its_token(tiny, family, pole):
    """A row c W_U[:, t] has cosine 1 with t, whatever c."""
    model, sign = copy.deepcopy(tiny(family, torch.float64)), 1 if pole == "+" else -1
    with torch.no_grad():
        for neuron, (token, c) in enumerate([(9, 0.01), (33, 5.0), (4, 1.0)]):
            model.blocks[1].mlp.W_in[:, neuron] = sign * c * model.W_U[:, token]
            model.blocks[1].mlp.W_out[neuron] = sign * c * model.W_U[:, token]
    for matrix in ("up", "down"):
        table = decode_neurons(
            model, matrix=matrix, layers=[1], neurons=range(3), k=1, poles=pole, fold_norm=False, center_rows=False,
            final_norm="none",
        )  # fmt: skip
        assert table["token_id"].tolist() == [9, 33, 4]
        np.testing.assert_allclose(table["score"], 1, rtol=1e-12)
        assert set(table["pole"]) == {pole}


def test_permuted_neurons_have_permuted_tokens(tiny):
    model = tiny("llama")
    turned, order = copy.deepcopy(model), torch.randperm(model.cfg.d_mlp, generator=torch.Generator().manual_seed(1))
    for block in turned.blocks:
        block.mlp.W_in.copy_(block.mlp.W_in[:, order])
        block.mlp.W_gate.copy_(block.mlp.W_gate[:, order])
        block.mlp.W_out.copy_(block.mlp.W_out[order])
    for score in SCORES:
        options = {"matrix": MATRICES, "score": score, "k": 4, "poles": "both"}
        a, b = decode_neurons(model, **options), decode_neurons(turned, **options)
        for matrix in MATRICES:
            shape = (model.cfg.n_layers, model.cfg.d_mlp, -1)
            first, second = (table[table["matrix"] == matrix]["token_id"].to_numpy().reshape(shape) for table in (a, b))
            assert (second == first[:, order.numpy()]).mean() > 0.999  # sums over neurons round in another order


@pytest.mark.parametrize("score", SCORES)
def test_the_other_pole_is_that_of_negated_weights(tiny, score):
    model = tiny("gpt2")
    turned = copy.deepcopy(model)
    for block in turned.blocks:
        block.mlp.W_out.neg_()
    options = {"matrix": "down", "score": score, "k": 6}
    both = decode_neurons(model, **options)
    plus, minus = (decode_neurons(model, poles=pole, **options) for pole in ("+", "-"))
    for pole, alone in (("+", plus), ("-", minus)):
        mine = both[both["pole"] == pole]
        assert mine["token_id"].tolist() == alone["token_id"].tolist()
        assert mine["score"].tolist() == alone["score"].tolist()
    assert decode_neurons(turned, poles="+", **options)["token_id"].tolist() == minus["token_id"].tolist()


def test_ties_go_to_the_lowest_id(tiny):
    model = copy.deepcopy(tiny("llama"))
    model.unembed.W_U.copy_(model.W_U[:, :1].expand_as(model.W_U))
    assert (tokens_of(decode_neurons(model, matrix="down", k=4), 4) == np.arange(4)).all()


@pytest.mark.parametrize("matrix", ["up", "gate+up"])
def test_kurtosis_is_that_of_the_scores(mini_llama, matrix):
    found = decode_neurons(mini_llama, matrix=matrix, layers=[2], k=1, poles="both", kurtosis=True)
    reading = Reading(matrix)
    scores = reading_rows(mini_llama, 2, reading).double() @ vocabulary_rows(mini_llama, reading).double().T
    expected = stats.kurtosis(scores.numpy(), axis=1)
    np.testing.assert_allclose(found.drop_duplicates("neuron")["kurtosis"], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.01, 100))
def test_kurtosis_knows_neither_shift_nor_scale(seed, shift, scale):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    sums = [torch.stack([y.pow(i).sum() for i in (1, 2, 3, 4)])[None] for y in (x, scale * (x + shift))]
    expected = stats.kurtosis(x.numpy())
    for found in sums:
        assert float(excess_kurtosis(found, 200)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_kurtosis_of_a_constant_is_nothing():
    sums = torch.tensor([[6.0, 12.0, 24.0, 48.0], [0.0, 0.0, 0.0, 0.0]])
    assert excess_kurtosis(sums, 3).isnan().all()


def test_a_token_that_all_neurons_score_alike_is_no_outlier(tiny):
    model = copy.deepcopy(tiny("llama", torch.float64))
    model.unembed.W_U[:, 7] = 0
    table = decode_neurons(model, matrix="up", score="zscore", k=64)
    assert (table[table["token_id"] == 7]["score"] == 0).all()


def test_without_a_tokenizer_tokens_are_numbers(tiny):
    model = copy.deepcopy(tiny("gpt2"))
    model.tokenizer = None
    table = decode_neurons(model, k=2)
    assert table["token"].astype(str).tolist() == table["token_id"].astype(str).tolist()


def test_refusals(mini_gpt2, mini_llama):
    with refused(OptionError, "cannot show 836 of 835 tokens"):
        decode_neurons(mini_gpt2, k=836)
    with refused(SiteError, "mini-gpt2 has layers 0 to 3, not 4"):
        decode_neurons(mini_gpt2, layers=[0, 4])
    with refused(SiteError, "layers of mini-gpt2 have neurons 0 to 511, not -1"):
        decode_neurons(mini_gpt2, neurons=[-1])
    with refused(OptionError, "no gates to read"):
        decode_neurons(mini_gpt2, matrix=["up", "gate"])
    with refused(OptionError, "did you mean 'down'"):
        decode_neurons(mini_gpt2, matrix="dow")
    with refused(OptionError, "gate-up is read as pole - only, not as pole +"):
        decode_neurons(mini_llama, matrix=["up", "gate-up"], poles="+")
    with refused(OptionError, "'top' is not a choice of poles"):
        decode_neurons(mini_gpt2, poles="top")
    with refused(OptionError, "'int8' is not a dtype to screen"):
        decode_neurons(mini_gpt2, screen="int8")
    for nothing in ({"matrix": []}, {"layers": []}, {"neurons": []}):
        with refused(OptionError, "there is nothing to decode"):
            decode_neurons(mini_gpt2, **nothing)
    with refused(UnsupportedModel, "load the model with load_model"):
        decode_neurons(torch.nn.Linear(2, 2))
