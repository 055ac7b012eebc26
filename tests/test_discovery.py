"""The main job on small models: what it reports must be what the single analyses say."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

import interp
from interp import Discovery, PromptPairs, activation_patching, node_faithfulness
from interp.errors import MetricError, OptionError
from interp.sites import component_nodes
from interp.statistics import bootstrap_mean, detected
from tests.small_pairs import refused, small_pairs

discover = interp.discover


@pytest.fixture(scope="module")
def found(tiny) -> Discovery:
    return discover(tiny("gpt2"), small_pairs(n=4), seed=3)


def test_the_public_name_stays_a_function():
    """`interp.discover` the function must not be replaced by a module of that name once it has been imported."""
    for name in interp.__all__:
        first, again = getattr(interp, name), getattr(interp, name)
        assert first is again, name
        assert not isinstance(again, type(interp)), f"interp.{name} is a module"


def test_every_component_is_ranked_by_the_size_of_its_effect(tiny, found):
    table = found.ranking
    assert sorted(table.node) == sorted(str(n) for n in component_nodes(tiny("gpt2").cfg))
    assert (table.effect.abs().diff().dropna() <= 0).all()
    assert table.node[table.kind == "head"].str.match(r"a\d\.h\d").all()
    assert (table.layer == table.node.str[1].astype(int)).all()


def test_the_scores_are_exact_patching(tiny, found):
    pairs = small_pairs(n=4)
    by_hooks = {"engine": "hooks"}
    heads, mlps = (
        activation_patching(tiny("gpt2"), pairs, s, positions="all", **by_hooks) for s in ("head", "mlp_out")
    )
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * float(abs(mlps).max()))
    for layer in range(3):
        same(found.nodes.sel(node=f"m{layer}").values, mlps.sel(layer=layer).values)
        for head in range(4):
            expected = heads.sel(layer=layer, head=head).values
            same(found.nodes.sel(node=f"a{layer}.h{head}").values, expected)
    mean, low, _ = bootstrap_mean(found.nodes.sel(node=found.ranking.node.tolist()).values, seed=3)
    np.testing.assert_allclose(found.ranking.effect, mean)
    np.testing.assert_allclose(found.ranking.low, low, atol=1e-2)
    np.testing.assert_array_equal(found.ranking.detected, detected(mean))
    gap = float((heads.metric_clean - heads.metric_corrupt).mean())
    np.testing.assert_allclose(found.ranking.share, mean / gap, rtol=1e-5)
    for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out"):
        same(found.effects[site].values, activation_patching(tiny("gpt2"), pairs, site, **by_hooks).values)
    top = found.effects["top_heads"]
    assert top.node.values.tolist() == [n for n in found.ranking.node if n[0] == "a"][:4]


def test_the_curve_follows_the_ranking(tiny, found):
    expected = node_faithfulness(tiny("gpt2"), small_pairs(n=4), found.ranking.node.tolist(), seed=3)
    np.testing.assert_array_equal(found.faithfulness.value.values, expected.value.values)
    assert found.faithfulness.recovered[-1] == pytest.approx(1, abs=1e-9)
    random = found.random_faithfulness
    assert random.node.values.tolist() != found.faithfulness.node.values.tolist()
    assert set(random.n.values) <= set(found.faithfulness.n.values)


def test_a_discovery_repeats_exactly(tiny, found):
    again = discover(tiny("gpt2"), small_pairs(n=4), seed=3)
    assert again.ranking.equals(found.ranking)
    assert again.random_faithfulness.identical(found.random_faithfulness)
    assert again.summary == found.summary


def test_batches_change_nothing(tiny):
    whole, parts = (
        discover(tiny("pythia", torch.float64), small_pairs(n=3), batch_size=size, top_heads=1) for size in (None, 2)
    )
    assert parts.ranking.node.tolist() == whole.ranking.node.tolist()
    np.testing.assert_allclose(parts.nodes.values, whole.nodes.values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts.faithfulness.value.values, whole.faithfulness.value.values, rtol=1e-9)
    assert "resid_mid" not in whole.effects


@pytest.mark.filterwarnings("ignore:.*near zero")
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_direction_metric_and_ablation_are_passed_on(tiny, direction):
    found = discover(
        tiny("llama3"), small_pairs(), direction=direction, metric="probability", ablation="zero", top_heads=0
    )
    assert found.attrs["direction"] == direction
    assert found.attrs["metric"] == found.faithfulness.attrs["metric"] == "probability"
    assert found.faithfulness.attrs["ablation"] == "zero"
    assert "top_heads" not in found.effects


def test_text_and_repr_say_what_was_found(tiny, found):
    text = found.text(n=3)
    assert text.startswith("gpt2 on random (given), denoise, 4 pairs: logit_diff ")
    assert found.ranking.node[0] in text
    assert found.ranking.node[3] not in text.split("effect in")[0].split("detected")[1]
    assert "recover at least 90 %" in text
    assert f"first {', '.join(found.ranking.node[:4])}" in repr(found)
    assert found.ranking.node[0] in found._repr_html_()


def test_the_metric_is_the_tasks_own(tiny):
    pairs = dataclasses.replace(small_pairs(), wrong_answers=None, metric="log_probability")
    assert discover(tiny("gpt2"), pairs, top_heads=0).attrs["metric"] == "log_probability"


@pytest.mark.filterwarnings("ignore:.*near zero")
def test_notes_warn_a_careful_reader(tiny):
    model = tiny("gpt2")
    pairs = small_pairs(n=3)
    logits = model(pairs.clean)[:, -1]
    backwards = dataclasses.replace(
        pairs, answers=logits.argmin(-1, keepdim=True), wrong_answers=logits.argmax(-1)[:, None]
    )
    notes = " ".join(discover(model, backwards, top_heads=0).notes)
    assert "first choice is an answer on only 0%" in notes
    assert "The wrong answer wins on the clean prompts 0, 1, 2" in notes
    noisy = interp.corrupt(model, pairs, "gaussian")
    notes = " ".join(discover(model, noisy, metric="probability", top_heads=0).notes)
    assert "Gaussian noise takes the model off its distribution" in notes
    forward = dataclasses.replace(backwards, answers=backwards.wrong_answers, wrong_answers=backwards.answers)
    assert "only" not in " ".join(discover(model, forward, top_heads=0).notes)


def test_text_pairs_show_their_first_prompt(tiny):
    pairs = PromptPairs.from_text(
        tiny("gpt2"), clean=["w1 w2 w3"], corrupt=["w1 w5 w3"], answers=[[" w7", " w9"]], wrong_answers=[" w8"]
    )
    found = discover(tiny("gpt2"), pairs, top_heads=0)
    assert found.corrupt_strings[-3:] == ("w1", " w5", " w3")
    assert found.answer_strings == (" w7", " w9")
    assert found.wrong_strings == (" w8",)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"level": "channel"}, OptionError, "'channel' is not a level"),
        ({"direction": "up"}, OptionError, "'up' is not a direction"),
        ({"ablation": "median"}, OptionError, "'median' is not a[n]? ablation"),
        ({"metric": "logits"}, MetricError, "'logits' is not a metric"),
    ],
)
def test_unknown_options_are_said(tiny, options, error, says):
    with refused(error, says):
        discover(tiny("gpt2"), small_pairs(), **options)


# ------------------------------------------------------------------------------------------------------ approximate maps


def test_with_rules_the_scores_are_attributions_and_the_agreement_is_told(tiny):
    model, pairs = tiny("gpt2"), small_pairs(n=4)
    found = discover(model, pairs, rules="relp", seed=3)
    expected = interp.attribution(model, pairs, ["resid_pre", "head", "mlp_out"], rules="relp")
    np.testing.assert_allclose(found.effects.resid_pre, expected.resid_pre)
    np.testing.assert_allclose(found.nodes.sel(node="m1"), expected.mlp_out.sel(layer=1).sum("position"), rtol=1e-5)
    np.testing.assert_allclose(
        found.nodes.sel(node="a2.h3"), expected.head_out.sel(layer=2, head=3).sum("position"), rtol=1e-5, atol=1e-7
    )
    strongest = found.ranking.node[found.ranking.kind == "head"].iloc[0]
    layer, head = int(strongest[1]), int(strongest.split("h")[1])
    np.testing.assert_allclose(
        found.effects.top_heads.sel(node=strongest), expected.head_out.sel(layer=layer, head=head)
    )
    exact = activation_patching(model, pairs, ["resid_pre", "attn_out"])
    table = interp.compare(interp.attribution(model, pairs, ["resid_pre", "attn_out"], rules="relp"), exact)
    assert found.agreement.table.pearson["attn_out"] == pytest.approx(table.pearson["attn_out"], abs=1e-5)
    assert found.agreement.n_checked == found.agreement.n_places
    assert found.attrs["rules"] == "relp"
    text = found.text()
    assert "approximate effects, rules relp (base)" in text
    assert "relative_error" in text


def test_exact_maps_need_no_check(found):
    assert found.agreement is None
    assert "agreement" not in found.text()


def test_both_directions_are_one_question(tiny):
    model, pairs = tiny("gpt2"), small_pairs(n=3)
    there, back, both = (discover(model, pairs, direction=d, top_heads=0).nodes for d in ("denoise", "noise", "both"))
    np.testing.assert_allclose(both, (there - back) / 2, rtol=1e-5, atol=1e-7)
    assert "the clean value helps" in both.attrs["sign"]
