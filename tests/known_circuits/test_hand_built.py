"""Discovery must find the circuit of a transformer that was built around one."""

import numpy as np
import pytest

from interp import activation_patching, discover, node_faithfulness
from tests.known_circuits.hand_built import END, MIDDLE, SOURCE, Move, hand_built, swapped

COPY = [Move(1, 2, SOURCE, END)]
CHAIN = [Move(0, 1, SOURCE, MIDDLE, writes="middle"), Move(2, 3, MIDDLE, END, reads="middle")]
ARMS = [Move(0, 0, SOURCE, END, writes="left"), Move(0, 2, MIDDLE, END, writes="right")]
GAP = 2.0  # logit_diff is 1 on clean prompts and -1 on corrupt ones
DIRECTIONS = pytest.mark.parametrize(("direction", "sign"), [("denoise", 1), ("noise", -1)])


def node_effects(model, pairs, **options) -> dict[str, float]:
    """Effect of every head and MLP at all positions, the same for all prompts."""
    whole = activation_patching(model, pairs, ["head", "mlp_out"], positions="all", **options)
    found = {}
    for layer in whole.layer.values:
        for head in whole["head"].values:
            found[f"a{layer}.h{head}"] = whole.head_out.sel(layer=layer, head=head).values
        found[f"m{layer}"] = whole.mlp_out.sel(layer=layer).values
    return found


def assert_only(effects, expected: dict[str, float]):
    for node, values in effects.items():
        np.testing.assert_allclose(values, expected.get(node, 0.0), rtol=0, atol=1e-9, err_msg=node)
        if node not in expected:
            assert (values == 0).all(), node


def test_the_model_does_what_it_was_built_for():
    pairs = swapped()
    for model in (hand_built(COPY), hand_built(CHAIN, n_layers=3, n_heads=4)):
        for side, tokens in (("clean", pairs.answers), ("corrupt", pairs.wrong_answers)):
            logits = model(pairs.tokens(side))[:, -1]
            assert (logits.argmax(-1) == tokens[:, 0]).all()
            np.testing.assert_allclose(logits.sum(-1).numpy(), 1, atol=1e-9)


@DIRECTIONS
def test_one_head_has_the_whole_effect_and_the_others_none(direction, sign):
    assert_only(node_effects(hand_built(COPY), swapped(), direction=direction), {"a1.h2": sign * GAP})


@DIRECTIONS
def test_both_steps_of_a_chain_have_the_whole_effect(direction, sign):
    model = hand_built(CHAIN, n_layers=3, n_heads=4)
    assert_only(node_effects(model, swapped(), direction=direction), {"a0.h1": sign * GAP, "a2.h3": sign * GAP})


@DIRECTIONS
def test_the_residual_stream_shows_the_token_travelling(direction, sign):
    model = hand_built(CHAIN, n_layers=3, n_heads=4)
    effects = activation_patching(model, swapped(), ["resid_pre", "resid_post"], direction=direction)
    trail = {"resid_pre": (SOURCE, MIDDLE, MIDDLE), "resid_post": (MIDDLE, MIDDLE, END)}
    for site, places in trail.items():
        expected = np.zeros((3, 6))
        expected[range(3), places] = sign * GAP
        np.testing.assert_allclose(effects[site].values, np.broadcast_to(expected, (4, 3, 6)), rtol=0, atol=1e-9)


def test_a_head_acts_through_its_value_where_its_source_is():
    """The pattern and the query are the same in both runs; the value at the source position is what differs."""
    effects = activation_patching(hand_built(COPY), swapped(), ["q", "k", "v", "pattern", "head"])
    expected = {name: np.zeros((2, 3, 6)) for name in ("q", "k", "v", "pattern", "head_out")}
    expected["v"][1, 2, SOURCE] = expected["head_out"][1, 2, END] = GAP
    for name, values in expected.items():
        found = effects[name].values
        np.testing.assert_allclose(found, np.broadcast_to(values, found.shape), rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("gate", "direction", "arm", "whole"),
    [("or", "denoise", 1, 1), ("or", "noise", 0, -1), ("and", "denoise", 0, 1), ("and", "noise", -1, -1)],
)
def test_denoising_finds_either_arm_of_an_or_and_noising_either_arm_of_an_and(gate, direction, arm, whole):
    """Heimersheim & Nanda (2404.15255): the two directions answer different questions."""
    model, pairs = hand_built(ARMS, gate=gate), swapped(positions=(SOURCE, MIDDLE))
    effects = node_effects(model, pairs, direction=direction, metric="answer_logit")
    expected = {"a0.h0": arm, "a0.h2": arm, "m1": whole}
    for node, values in effects.items():
        np.testing.assert_allclose(values, expected.get(node, 0), rtol=0, atol=1e-9, err_msg=node)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean"])
def test_the_one_node_recovers_everything(ablation):
    curve = node_faithfulness(hand_built(COPY), swapped(), ["a1.h2", "m0", "a0.h0"], ablation=ablation)
    nothing = 0.0 if ablation == "corrupt" else 0.5  # without the head both logits are equal, or the mean of the four
    np.testing.assert_allclose(curve.recovered.values[1:], 1, rtol=0, atol=1e-9)
    assert curve.recovered.values[0] == pytest.approx(nothing, abs=1e-9 if ablation != "mean" else 0.5)


def test_a_chain_needs_both_its_nodes():
    model = hand_built(CHAIN, n_layers=3, n_heads=4)
    for ranking in (["a0.h1", "a2.h3"], ["a2.h3", "a0.h1"]):
        curve = node_faithfulness(model, swapped(), ranking)
        np.testing.assert_allclose(curve.recovered.values, [0, 0, 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_discovery_finds_the_chain_and_nothing_else(direction, tmp_path):
    found = discover(hand_built(CHAIN, n_layers=3, n_heads=4), swapped(), direction=direction)
    assert set(found.ranking.node[:2]) == {"a0.h1", "a2.h3"}
    assert set(found.ranking.node[found.ranking.detected]) == {"a0.h1", "a2.h3"}
    assert (found.ranking.effect[2:] == 0).all()
    np.testing.assert_allclose(found.ranking.share[:2].abs(), 1, atol=1e-9)
    np.testing.assert_allclose(found.ranking[["low", "high"]][:2].abs(), GAP, atol=1e-9)
    np.testing.assert_allclose(found.faithfulness.recovered.values[:3], [0, 0, 1], atol=1e-9)
    assert found.summary["accuracy_clean"] == 1
    assert "2 of 15 components recover at least 90 %" in found.text()
    heads = found.effects["top_heads"].mean("prompt")
    assert abs(heads.sel(node="a0.h1", position=MIDDLE)) == pytest.approx(GAP, abs=1e-9)
    assert abs(heads.sel(node="a2.h3", position=END)) == pytest.approx(GAP, abs=1e-9)
    assert "a2.h3" in found.report(tmp_path / "chain.html").read_text(encoding="utf-8")
