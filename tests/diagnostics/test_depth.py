"""Depth use by loops over tokens, and skipping a layer against a model that does not have it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from interp.diagnostics.depth import depth_plot, depth_use, layer_skipping, skipping_plot
from interp.errors import OptionError, TaskError, UnsupportedModel
from interp.model.run import record
from tests.diagnostics.random_corpus import LENGTHS, random_corpus
from tests.small_pairs import refused

FAMILIES = ("gpt2", "llama", "gemma2", "pythia")
CORPUS = random_corpus()


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_share_is_that_of_a_loop(tiny, family, skip_first):
    model = tiny(family, torch.float64)
    found = depth_use(model, CORPUS, skip_first=skip_first, batch_size=3)
    for layer in range(model.cfg.n_layers):
        sums = {"attn": [], "mlp": [], "layer": []}
        for sequence, length in enumerate(LENGTHS):
            names = [f"blocks.{layer}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
            values = record(model, CORPUS.tokens[sequence : sequence + 1, :length], names)
            pre, attn, mlp, post = (values[name][0] for name in names)
            for t in range(int(skip_first), length):
                mid = pre[t] if model.cfg.parallel else pre[t] + attn[t]
                for part, w, x in (
                    ("attn", attn[t], pre[t]),
                    ("mlp", mlp[t], mid),
                    ("layer", post[t] - pre[t], pre[t]),
                ):
                    sums[part].append((float(w.norm() / x.norm()), float(w @ x / (w.norm() * x.norm()))))
        for part, values in sums.items():
            here = found.sel(layer=layer, part=part)
            assert [float(here["contribution"]), float(here["cosine"])] == pytest.approx(np.mean(values, 0).tolist())


def test_a_layer_that_erases_and_one_that_doubles(tiny):
    """What the MLP writes is planted: minus the stream, then the stream itself."""
    model, held = tiny("gpt2", torch.float64), {}
    hooks = []
    for layer, factor in ((0, -0.5), (2, 1.0)):
        hooks += [
            (f"blocks.{layer}.hook_resid_mid", lambda value, hook: held.update(x=value)),
            (f"blocks.{layer}.hook_mlp_out", lambda value, hook, factor=factor: factor * held["x"]),
        ]
    with model.hooks(fwd_hooks=hooks):
        found = depth_use(model, CORPUS).sel(part="mlp")
    assert found["contribution"].values[[0, 2]] == pytest.approx([0.5, 1.0])
    assert found["cosine"].values[[0, 2]] == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["layer", "attn", "mlp"])
def test_skipping_is_a_model_without_it(tiny, family, part):
    model = tiny(family, torch.float64)
    found = layer_skipping(model, CORPUS, part=part, batch_size=2)
    losses, base = [], model(CORPUS.tokens)
    for layer in range(model.cfg.n_layers):
        less = copy.deepcopy(model)
        if part == "layer":
            less.blocks[layer].forward = lambda resid, places, rules: resid
        else:
            zero = torch.zeros_like
            name = f"blocks.{layer}.hook_{part}_out"
            less.add_hook(name, lambda value, hook, zero=zero: zero(value))
        logits = less(CORPUS.tokens)
        change, kl, loss = [], [], []
        for sequence, length in enumerate(LENGTHS):
            for t in range(length - 1):
                p, q = (x[sequence, t].log_softmax(0) for x in (base, logits))
                target = CORPUS.tokens[sequence, t + 1]
                loss.append(-float(p[target]))
                change.append(float(p[target] - q[target]))
                kl.append(float((p.exp() * (p - q)).sum()))
        assert float(found["change"][layer]) == pytest.approx(np.mean(change))
        assert float(found["kl"][layer]) == pytest.approx(np.mean(kl))
        losses.append(np.mean(loss))
    assert found.attrs["loss"] == pytest.approx(losses[0])
    assert found.attrs["n_predictions"] == sum(LENGTHS) - len(LENGTHS)


def test_a_layer_that_writes_nothing_is_not_missed(tiny):
    model = tiny("llama", torch.float64)
    idle = [(f"blocks.1.hook_{part}_out", lambda value, hook: torch.zeros_like(value)) for part in ("attn", "mlp")]
    with model.hooks(fwd_hooks=idle):
        found, use = layer_skipping(model, CORPUS), depth_use(model, CORPUS)
    assert float(found["change"][1]) == pytest.approx(0, abs=1e-12)
    assert float(found["kl"][1]) == pytest.approx(0, abs=1e-12)
    assert use.sel(layer=1)["contribution"].values.tolist() == [0, 0, 0]
    assert use.sel(layer=1)["cosine"].values.tolist() == [0, 0, 0]


def test_the_loss_is_the_models_own(mini_gpt2):
    tokens = random_corpus((7, 7))
    found = layer_skipping(mini_gpt2, tokens, part="mlp")
    assert found.attrs["loss"] == pytest.approx(float(mini_gpt2(tokens.tokens, return_type="loss")), rel=1e-5)
    logits = mini_gpt2(tokens.tokens)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.tokens[:, 1:].flatten())
    assert found.attrs["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_pieces_and_padding_do_not_count(tiny, monkeypatch):
    model = tiny("llama", torch.float64)
    found = [layer_skipping(model, CORPUS), depth_use(model, CORPUS)]
    monkeypatch.setattr("interp.diagnostics.depth._LOGITS", 64 * 3)
    other = random_corpus(fill=5)
    again = [layer_skipping(model, other, batch_size=1), depth_use(model, other, batch_size=1)]
    for a, b in zip(found, again, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-10)


def test_pictures(tiny):
    model = tiny("gpt2")
    use, skipped = depth_use(model, CORPUS), layer_skipping(model, CORPUS)
    figure = depth_plot(use, title="depth")
    assert [trace.name for trace in figure.data] == ["attn", "mlp", "layer"] * 2
    np.testing.assert_array_equal(figure.data[4].y, use["cosine"].sel(part="mlp"))
    figure = skipping_plot(skipped)
    np.testing.assert_array_equal(figure.data[0].y, skipped["change"])
    assert figure.layout.xaxis.title.text == "skipped layer"


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(OptionError, "'head' is not a part of a layer"):
        layer_skipping(model, CORPUS, part="head")
    for function in (depth_use, layer_skipping):
        with refused(TaskError, "random words"):
            function(model, random_corpus((1, 1)))
    with refused(UnsupportedModel, "load the model with load_model"):
        depth_use(torch.nn.Linear(2, 2), CORPUS)
