"""Agreement of two models' decoded neurons.

Held against: identical models, sets in loops, the exact chance of random pairings.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from interp.errors import OptionError
from interp.neurons.decode import decode_neurons
from interp.neurons.stability import decoding_stability
from tests.small_pairs import refused

K = 5


@pytest.fixture(scope="module")
def base(mini_llama):
    return decode_neurons(mini_llama, matrix=["up", "gate+up", "down"], k=K)


def moved(model, amount: float):
    """The model with noise on its MLPs, `amount` times their deviation."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in other.blocks:
            for weight in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out):
                weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def test_identical_models_agree(base):
    found = decoding_stability(base, base)
    assert (found["same_top"] == 1).all()
    assert (found["jaccard"] == 1).all()
    assert found[["matrix", "pole"]].drop_duplicates().to_numpy().tolist() == [
        ["down", "+"], ["down", "-"], ["gate+up", "+"], ["up", "+"], ["up", "-"],
    ]  # fmt: skip
    assert (found["n"] == 344).all()
    assert (found[["same_top_chance", "jaccard_chance"]] < 0.05).all(axis=None)


def test_unrelated_neurons_agree_by_chance(mini_llama, base):
    other = decode_neurons(moved(mini_llama, 100.0), matrix=["up", "gate+up", "down"], k=K)
    found = decoding_stability(base, other)
    assert abs((found["same_top"] - found["same_top_chance"]).mean()) < 0.005
    assert abs((found["jaccard"] - found["jaccard_chance"]).mean()) < 0.005


def test_more_change_is_less_agreement(mini_llama, base):
    means = [
        decoding_stability(base, decode_neurons(moved(mini_llama, amount), matrix=["up", "gate+up", "down"], k=K))[
            ["same_top", "jaccard"]
        ].mean()
        for amount in (0.05, 0.3, 1.0)
    ]
    assert (means[0] > means[1]).all()
    assert (means[1] > means[2]).all()


def test_by_hand_with_sets(mini_llama, base):
    other = decode_neurons(moved(mini_llama, 0.5), matrix=["up", "gate+up", "down"], k=K)
    found = decoding_stability(base, other).set_index(["matrix", "layer", "pole"])
    for key in (("up", 2, "-"), ("gate+up", 0, "+")):
        sets, first = [], []
        for table in (base, other):
            rows = table[(table["matrix"] == key[0]) & (table["layer"] == key[1]) & (table["pole"] == key[2])]
            sets.append(rows.groupby("neuron")["token_id"].agg(set))
            first.append(rows[rows["rank"] == 0].set_index("neuron")["token_id"])
        expected = np.mean([len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
        assert found.loc[key, "jaccard"] == pytest.approx(expected)
        assert found.loc[key, "same_top"] == pytest.approx((first[0] == first[1]).mean())


def test_chance_is_that_of_random_pairs(base):
    """A random pair shares its first token with probability sum_t p_a(t) p_b(t)."""
    found = decoding_stability(base, base, n_permutations=200).set_index(["matrix", "layer", "pole"])
    rows = base[(base["matrix"] == "down") & (base["layer"] == 4) & (base["pole"] == "+") & (base["rank"] == 0)]
    share = rows["token_id"].value_counts(normalize=True)
    assert found.loc[("down", 4, "+"), "same_top_chance"] == pytest.approx((share**2).sum(), rel=0.1)


def test_the_order_of_rows_does_not_matter_and_the_seed_decides(base):
    shuffled = base.sample(frac=1, random_state=0)
    shuffled.attrs = base.attrs
    pd.testing.assert_frame_equal(decoding_stability(base, shuffled), decoding_stability(base, base))
    other = decoding_stability(base, base, seed=1)
    assert not other["jaccard_chance"].equals(decoding_stability(base, base)["jaccard_chance"])


def test_refusals(mini_llama, base):
    with refused(OptionError, "different neurons"):
        decoding_stability(base, base[base["layer"] > 0])
    with refused(OptionError, "read in different ways: k is 5 and 2"):
        decoding_stability(base, decode_neurons(mini_llama, matrix=["up", "gate+up", "down"], k=2))
    with refused(OptionError, "read in different ways: matrices"):
        options = {"matrix": ["up", "gate+up", "down"], "k": K, "score": "logit"}
        decoding_stability(base, decode_neurons(mini_llama, **options))
    with refused(OptionError, "lacks ranks"):
        decoding_stability(base, base.drop(index=3))
    with refused(OptionError, "two vocabularies"):
        decoding_stability(base, base.assign(token="x"))
    with refused(OptionError, "no column 'token_id'"):
        decoding_stability(base.drop(columns="token_id"), base)
    with refused(OptionError, "cannot measure chance by 0"):
        decoding_stability(base, base, n_permutations=0)
    with refused(OptionError, "without neurons"):
        decoding_stability(base.head(0), base)
