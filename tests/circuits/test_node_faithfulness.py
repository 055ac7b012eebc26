"""Keeping some components and ablating the rest, against a loop of hooks written out here."""

import dataclasses

import numpy as np
import pytest
import torch

from interp import node_faithfulness
from interp.circuits.node_faithfulness import default_sizes
from interp.errors import MetricError, OptionError, SiteError
from interp.metrics import METRICS
from interp.sites import component_nodes
from tests.small_pairs import refused, small_pairs


def names(model) -> list[str]:
    return [str(node) for node in component_nodes(model.cfg)]


def by_hand(model, pairs, kept: set[str], ablation: str) -> torch.Tensor:
    """Metric [prompt] of the clean run with all but `kept` replaced by the corrupt run, zero or its mean."""
    _, corrupt = model.run_with_cache(pairs.corrupt, return_cache_object=False)

    def replacement(name):
        value = corrupt[name]
        return {"corrupt": value, "zero": 0 * value, "mean": value.mean(0, keepdim=True).expand_as(value)}[ablation]

    def heads(layer):
        def hook_function(value, hook):
            value = value.clone()
            for head in range(model.cfg.n_heads):
                if f"a{layer}.h{head}" not in kept:
                    value[:, :, head] = replacement(hook.name)[:, :, head]
            return value

        return hook_function

    hooks = []
    for layer in range(model.cfg.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_z", heads(layer)))
        if f"m{layer}" not in kept:
            hooks.append((f"blocks.{layer}.hook_mlp_out", lambda value, hook: replacement(hook.name)))
    with torch.no_grad():
        logits = model.run_with_hooks(pairs.clean, fwd_hooks=hooks)[:, -1]
    return METRICS["logit_diff"](logits, pairs)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean"])
def test_the_curve_is_the_one_made_by_hand(tiny, family, ablation):
    model, pairs = tiny(family, torch.float64), small_pairs(n=3)
    ranking = names(model)[::2]
    curve = node_faithfulness(model, pairs, ranking, sizes=[0, 1, 4, len(ranking)], ablation=ablation)
    for i, n in enumerate(curve.n.values):
        expected = by_hand(model, pairs, set(ranking[:n]), ablation)
        np.testing.assert_allclose(curve.value[:, i].values, expected.numpy(), rtol=0, atol=1e-9)
    clean, corrupt = (METRICS["logit_diff"](model(pairs.tokens(s))[:, -1], pairs).mean() for s in ("clean", "corrupt"))
    recovered = (curve.value.mean("prompt").values - corrupt.item()) / (clean - corrupt).item()
    np.testing.assert_allclose(curve.recovered.values, recovered, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama3", "olmo2", "pythia"])
def test_keeping_everything_recovers_everything(tiny, family, ablation):
    model, pairs = tiny(family), small_pairs()
    curve = node_faithfulness(model, pairs, names(model), sizes=[len(names(model))], ablation=ablation)
    assert curve.recovered.item() == pytest.approx(1, abs=1e-12)


def test_keeping_everything_is_certain(tiny):
    """It recovers 1 whichever prompts are drawn: a ratio of means is resampled as one, gap and all."""
    model = tiny("gpt2")
    curve = node_faithfulness(model, small_pairs(n=4), names(model), sizes=[15])
    assert curve.low.item() == pytest.approx(1, abs=1e-6)
    assert curve.high.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_keeping_nothing_leaves_the_direct_path(tiny, family):
    """If the last tokens agree, the direct path carries nothing: the corrupt run comes back exactly."""
    pairs = small_pairs(differ=(2,))
    curve = node_faithfulness(tiny(family), pairs, ["m0"], sizes=[0])
    assert curve.recovered.item() == pytest.approx(0, abs=1e-6)
    pairs = small_pairs(differ=(2, 5))
    curve = node_faithfulness(tiny(family), pairs, ["m0"], sizes=[0])
    assert abs(curve.recovered.item()) > 1e-3


def test_nodes_beyond_the_size_do_not_matter(tiny):
    model, pairs = tiny("gpt2"), small_pairs()
    first = node_faithfulness(model, pairs, ["a0.h1", "m1", "a2.h0"], sizes=[2, 1])
    second = node_faithfulness(model, pairs, ["a0.h1", "m1"])
    assert first.n.values.tolist() == [1, 2]
    assert second.n.values.tolist() == [0, 1, 2]
    assert second.node.values.tolist() == ["", "a0.h1", "m1"]
    np.testing.assert_array_equal(first.value.values, second.value.values[:, 1:])


@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
def test_batches_and_padding_change_nothing(tiny, ablation):
    model, pairs = tiny("llama3", torch.float64), small_pairs(n=3, lengths=[6, 4, 5])
    options = {"sizes": [0, 2], "ablation": ablation}
    whole = node_faithfulness(model, pairs, ["a1.h0", "m0"], **options)
    parts = node_faithfulness(model, pairs, ["a1.h0", "m0"], batch_size=2, **options)
    np.testing.assert_allclose(parts.value.values, whole.value.values, rtol=1e-9)
    np.testing.assert_allclose(parts.recovered.values, whole.recovered.values, rtol=1e-9)
    other = dataclasses.replace(pairs, corrupt=torch.where(pairs.is_token, pairs.corrupt, 44))
    assert node_faithfulness(model, other, ["a1.h0", "m0"], **options).identical(whole)


def test_it_says_how_it_was_made(tiny):
    curve = node_faithfulness(tiny("gpt2"), small_pairs(), ["m0"], ablation="mean", metric="answer_logit")
    a = curve.attrs
    assert (a["method"], a["ablation"], a["n_nodes"], a["metric"], a["unit"]) == (
        "node_faithfulness", "mean", 15, "answer_logit", "logits",
    )  # fmt: skip
    assert (curve.low <= curve.recovered).all()
    assert (curve.recovered <= curve.high).all()


def test_without_a_gap_nothing_can_be_recovered(tiny):
    pairs = small_pairs()
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    curve = node_faithfulness(tiny("gpt2"), pairs, ["m0"])
    assert curve.recovered.isnull().all()


@pytest.mark.parametrize(
    ("ranking", "options", "error", "says"),
    [
        (["m0", "a0.h0", "m0"], {}, OptionError, "names a node twice"),
        (["m0"], {"sizes": [2]}, OptionError, "cannot keep 2 of 1 ranked nodes"),
        (["m0"], {"sizes": [-1]}, OptionError, "cannot keep -1 of 1"),
        (["m7"], {}, SiteError, "has no node m7"),
        (["input"], {}, SiteError, "input"),
        (["m0.n3"], {}, SiteError, "m0.n3"),
        (["m0"], {"ablation": "mode"}, OptionError, "'mode' is not a"),
        (["m0"], {"metric": "prob"}, MetricError, "'prob' is not a metric"),
        (["m0"], {"batch_size": 0}, OptionError, "at least 1"),
    ],
)
def test_what_cannot_be_kept_is_said(tiny, ranking, options, error, says):
    with refused(error, says):
        node_faithfulness(tiny("gpt2"), small_pairs(), ranking, **options)


@pytest.mark.parametrize("n", [0, 1, 39, 40, 41, 157, 1056])
def test_sizes_go_from_none_to_all(n):
    sizes = default_sizes(n)
    assert sizes[0] == 0
    assert sizes[-1] == n
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 42
    assert len(sizes) == n + 1 if n <= 40 else len(sizes) > 20
