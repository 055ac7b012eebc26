"""Neurons held at values.

Held against: the model without a clamp, the write of one neuron by its down row, the product of a gated neuron, prompts alone.
"""

import json

import numpy as np
import pytest
import torch

from interp.bundled import bundled_text
from interp.errors import OptionError, SiteError, TaskError, UnsupportedModel
from interp.model.run import logits_at, record
from interp.neurons.clamp import clamp, clamp_effect, clamp_test, signs_of
from interp.neurons.decode import decode_neurons
from interp.neurons.table import find_neurons
from tests.small_pairs import refused

TOKENS = torch.tensor([[1, 5, 7, 4, 9], [1, 8, 8, 30, 6]])
PROMPTS = ["Anna went to the", "The dispute went on from the year", "The friends Megan and Edward"]


@pytest.fixture(scope="module")
def openings() -> list[str]:
    """The first six words of twenty texts."""
    lines = bundled_text().read_text(encoding="utf-8").splitlines()[:20]
    return [" ".join(json.loads(line)["text"].split()[:6]) for line in lines]


@pytest.mark.parametrize("site", ["post", "up", "gate"])
def test_a_clamp_to_its_own_value_is_a_no_op(tiny, site):
    model = tiny("llama", torch.float64)
    hook = {"post": "hook_post", "up": "hook_pre_linear", "gate": "hook_pre"}[site]
    own = record(model, TOKENS[:1], [f"blocks.1.mlp.{hook}"])[f"blocks.1.mlp.{hook}"]
    with clamp(model, {(1, 3): float(own[0, 2, 3]), (1, 9): float(own[0, 2, 9])}, site=site, positions=[2]):
        logits = model(TOKENS[:1])
    assert logits.equal(model(TOKENS[:1]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "pythia"])
def test_the_mlp_moves_by_the_change_times_the_down_row(tiny, family):
    model, value = tiny(family, torch.float64), -2.5
    names = ["blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"]
    before = record(model, TOKENS, names)
    with clamp(model, {(1, 3): value}):
        after = record(model, TOKENS, names)
    delta = value - before[names[0]][..., 3]
    expected = delta[..., None] * model.blocks[1].mlp.W_out[3]
    torch.testing.assert_close(after[names[1]] - before[names[1]], expected, rtol=1e-9, atol=1e-12)
    others = torch.arange(model.cfg.d_mlp) != 3
    assert after[names[0]][..., others].equal(before[names[0]][..., others])


def test_sites_before_the_product(tiny):
    """up: post = f(gate) v. gate: post = f(v) up. up of a plain neuron: post = f(v)."""
    model, v = tiny("llama", torch.float64), 1.7
    names = [f"blocks.1.mlp.{name}" for name in ("hook_pre", "hook_pre_linear", "hook_post")]
    gate, up, _ = record(model, TOKENS, names).values()
    f = torch.nn.functional.silu
    for site, expected in (("up", f(gate) * v), ("gate", f(torch.full_like(up, v)) * up)):
        with clamp(model, {(1, 5): v}, site=site):
            post = record(model, TOKENS, names)[names[2]]
        torch.testing.assert_close(post[..., 5], expected[..., 5])
    plain = tiny("gpt2", torch.float64)
    with clamp(plain, {(0, 5): v}, site="up"):
        found = record(plain, TOKENS, ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post"])
    assert (found["blocks.0.mlp.hook_pre"][..., 5] == v).all()
    assert found["blocks.0.mlp.hook_post"][..., 5].unique().numel() == 1


def test_several_neurons_layers_and_positions(tiny):
    model = tiny("gpt2", torch.float64)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in (0, 1, 2)]
    before = record(model, TOKENS, names)
    with clamp(model, {(0, 3): 1.0, (2, 4): 2.0, (0, 7): -3.0}, positions=[4, 1]):
        after = record(model, TOKENS, names)
    moved = [(after[name] - before[name]).abs().amax((0, 2)) > 0 for name in names]
    assert moved[0].tolist() == [False, True, False, False, True]
    assert after[names[0]][:, [1, 4]][..., [3, 7]].tolist() == [[[1.0, -3.0]] * 2] * 2
    assert after[names[2]][:, [1, 4], 4].tolist() == [[2.0, 2.0]] * 2
    assert record(model, TOKENS, names)[names[0]].equal(before[names[0]])  # nothing is left behind


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_effects_of_prompts_of_different_length(mini_gpt2, batch_size):
    """Padding and batches change nothing: each prompt by itself, by the model's own softmax."""
    values = {(2, 17): 5.0, (3, 490): 4.0}
    table = clamp_effect(mini_gpt2, PROMPTS, values, k=835, batch_size=batch_size)
    for number, prompt in enumerate(PROMPTS):
        before = mini_gpt2(prompt)[0, -1].softmax(-1)
        with clamp(mini_gpt2, values):
            after = mini_gpt2(prompt)[0, -1].softmax(-1)
        mine = table[table["prompt"] == number]
        ids = mine["token_id"].tolist()
        np.testing.assert_allclose(mine["before"], before[ids], atol=1e-5)
        np.testing.assert_allclose(mine["after"], after[ids], atol=1e-5)
        np.testing.assert_allclose(mine["difference"], mine["after"] - mine["before"], atol=1e-7)
        assert mine["difference"].abs().is_monotonic_decreasing
        assert mine["rank"].tolist() == list(range(835))
        assert abs(mine["difference"].sum()) < 1e-4
        assert mine["token"].iloc[0] == mini_gpt2.to_str_tokens(torch.tensor([ids[0]]))[0]


def test_a_clamp_at_one_position(mini_gpt2):
    one = clamp_effect(mini_gpt2, PROMPTS[0], {(3, 490): 100.0}, positions=[0], k=835)
    last = clamp_effect(
        mini_gpt2, PROMPTS[0], {(3, 490): 100.0}, positions=[len(mini_gpt2.to_tokens(PROMPTS[0])[0]) - 1]
    )
    assert (one["difference"] == 0).all()  # the last layer's MLP reaches only its own position
    assert last["difference"].abs().max() > 0.1


@pytest.mark.parametrize("name", ["mini_gpt2", "mini_llama"])
def test_clamping_decoded_neurons_raises_their_token(request, openings, name):
    model = request.getfixturevalue(name)
    table = decode_neurons(model, matrix="down")
    for token in (" near", " Kevin"):
        found = clamp_test(model, openings, token, signs_of(find_neurons(table, token, k=8)), times=0.5)
        assert found.difference > 3
        assert found.low > 2
        assert found.low <= found.difference <= found.high
        assert found.p < 1e-5
        assert found.p_sets == pytest.approx(1 / 21)
        assert f"log p({token!r})" in str(found)
        assert found.effect - found.control == pytest.approx(found.difference)


def test_random_neurons_pass_as_what_they_are(mini_gpt2, openings):
    """Sets drawn like their controls: the share of sets above them is uniform."""
    rng, p = np.random.default_rng(0), []
    for seed in range(12):
        neurons = [(3, int(n)) for n in rng.choice(512, size=4, replace=False)]
        p.append(clamp_test(mini_gpt2, openings[:4], " near", neurons, times=0.3, controls=9, seed=seed).p_sets)
    assert 0.3 < np.mean(p) < 0.75
    assert max(p) > 0.6


def test_values_are_shares_of_the_largest_activation(mini_llama):
    model, signs = mini_llama, {(1, 3): 1.0, (1, 5): -1.0, (4, 9): 2.0}
    found = clamp_test(model, PROMPTS, " near", signs, times=0.25, controls=2, site="up")
    for layer in (1, 4):
        name = f"blocks.{layer}.mlp.hook_pre_linear"
        largest = max(float(record(model, model.to_tokens(p), [name])[name].abs().max()) for p in PROMPTS)
        mine = {n: v for (at, n), v in found.neurons.items() if at == layer}
        expected = {1: {3: largest / 4, 5: -largest / 4}, 4: {9: largest / 4}}[layer]
        assert mine == pytest.approx(expected, rel=1e-5)
    # what a prompt gains is the change of its log-probability
    tokens = model.to_tokens(PROMPTS[0])
    last = torch.tensor([tokens.shape[1] - 1])
    with clamp(model, found.neurons, site="up"):
        after = logits_at(model, tokens, last).log_softmax(-1)[0, found.token_id]
    before = logits_at(model, tokens, last).log_softmax(-1)[0, found.token_id]
    assert found.changes[0] == pytest.approx(float(after - before), abs=1e-4)


def test_the_seed_decides(mini_gpt2):
    tests = [
        clamp_test(mini_gpt2, PROMPTS, " near", [(3, 7), (3, 8)], times=0.2, controls=3, seed=s) for s in (0, 0, 1)
    ]
    assert (tests[0].control_changes == tests[1].control_changes).all()
    assert not (tests[0].control_changes == tests[2].control_changes).all()
    assert (tests[0].changes == tests[2].changes).all()
    assert tests[0].control_changes.shape == (3, 3)


def test_signs_are_those_of_the_poles(mini_gpt2):
    found = find_neurons(decode_neurons(mini_gpt2, matrix="down"), " near", k=30)
    signs = signs_of(found)
    assert len(signs) == len(found)
    for row in found.itertuples():
        assert signs[row.layer, row.neuron] == (1 if row.pole == "+" else -1)
    both = found.head(1).loc[[0, 0]].assign(pole=["+", "-"])
    with refused(OptionError, "with both poles"):
        signs_of(both)


def test_refusals(mini_gpt2):
    with refused(SiteError, "has layers 0 to 3, not 4"), clamp(mini_gpt2, {(4, 0): 1.0}):
        pass
    with refused(SiteError, "neurons in a layer 0 to 511, not 512"), clamp(mini_gpt2, {(0, 512): 1.0}):
        pass
    with refused(SiteError, "no gates to clamp"), clamp(mini_gpt2, {(0, 1): 1.0}, site="gate"):
        pass
    with refused(SiteError, "'mid' is not a place to clamp"), clamp(mini_gpt2, {(0, 1): 1.0}, site="mid"):
        pass
    with refused(OptionError, "cannot be held at nan"), clamp(mini_gpt2, {(0, 1): float("nan")}):
        pass
    with refused(OptionError, "no neuron to clamp"), clamp(mini_gpt2, {}):
        pass
    with refused(OptionError, "'last' is not a choice of positions"), clamp(mini_gpt2, {(0, 1): 1.0}, positions="last"):
        pass
    for positions in ([], [2, -1]):
        with refused(SiteError, "counted from the first token"), clamp(mini_gpt2, {(0, 1): 1.0}, positions=positions):
            pass
    with refused(SiteError, "positions 0 to 4, not 5"), clamp(mini_gpt2, {(0, 1): 1.0}, positions=[5]):
        mini_gpt2(TOKENS)
    with refused(UnsupportedModel, "load the model with load_model"), clamp(torch.nn.Linear(2, 2), {(0, 1): 1.0}):
        pass


def test_refusals_of_effects_and_tests(mini_gpt2):
    with refused(SiteError, "shortest prompt has positions 0 to"):
        clamp_effect(mini_gpt2, PROMPTS, {(0, 1): 1.0}, positions=[6])
    with refused(OptionError, "cannot show 0 of 835 tokens"):
        clamp_effect(mini_gpt2, PROMPTS, {(0, 1): 1.0}, k=0)
    for function, last in ((clamp_effect, [{(0, 1): 1.0}]), (clamp_test, [" near", [(0, 1)]])):
        with refused(TaskError, "there is no prompt"):
            function(mini_gpt2, [], *last)
    with refused(TaskError, "is 2 tokens"):
        clamp_test(mini_gpt2, PROMPTS, " near near", [(0, 1)])
    with refused(TaskError, "tokens 0 to 834, not 835"):
        clamp_test(mini_gpt2, PROMPTS, 835, [(0, 1)])
    with refused(OptionError, "needs a sign"):
        clamp_test(mini_gpt2, PROMPTS, 5, {(0, 1): 0.0})
    with refused(OptionError, "no neuron to clamp"):
        clamp_test(mini_gpt2, PROMPTS, 5, [])
    with refused(OptionError, "cannot clamp 0 control sets"):
        clamp_test(mini_gpt2, PROMPTS, 5, [(0, 1)], controls=0)
    with refused(OptionError, "at -1"):
        clamp_test(mini_gpt2, PROMPTS, 5, [(0, 1)], times=-1.0)
    with refused(OptionError, "layer 0 has 212 other neurons, too few to stand for 300"):
        clamp_test(mini_gpt2, PROMPTS, 5, [(0, n) for n in range(300)])
    with refused(UnsupportedModel, "load the model with load_model"):
        clamp_effect(torch.nn.Linear(2, 2), PROMPTS, {(0, 1): 1.0})
    with refused(UnsupportedModel, "load the model with load_model"):
        clamp_test(torch.nn.Linear(2, 2), PROMPTS, 5, [(0, 1)])
