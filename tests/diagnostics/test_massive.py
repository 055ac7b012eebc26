"""Massive activations and sinks: planted ones are found where they were put, and every number is that of a loop."""

import math

import numpy as np
import pytest
import torch

from interp.diagnostics.massive import attention_sinks, massive_activations, massive_plot, sink_plot
from interp.errors import OptionError, TaskError, UnsupportedModel
from interp.features.sources import Corpus
from interp.model.run import record
from interp.model.tokens import token_strings
from tests.diagnostics.random_corpus import LENGTHS, random_corpus
from tests.small_pairs import refused

FAMILIES = ("gpt2", "llama", "gemma2", "pythia", "mistral")
CORPUS = random_corpus()


def planted(layer: int, position: int, channel: int, value: float):
    """A hook that writes a number into the stream behind a layer."""

    def write(stream, hook):
        stream = stream.clone()
        stream[:, position, channel] = value
        return stream

    return [(f"blocks.{layer}.hook_resid_post", write)]


def test_a_planted_activation_is_found(tiny):
    model = tiny("gpt2", torch.float64)
    with model.hooks(fwd_hooks=planted(1, 0, 7, -5e4)):
        table = massive_activations(model, CORPUS, k=6, batch_size=3)
    massive = table[table["massive"]]
    assert set(massive["layer"]) <= {1, 2}  # what is written behind layer 1 is still there behind layer 2
    of_layer = massive[massive["layer"] == 1]
    assert sorted(of_layer["sequence"]) == [0, 1, 2, 3]
    assert set(of_layer["position"]) == {0}
    assert set(of_layer["channel"]) == {7}
    assert set(of_layer["value"]) == {-5e4}
    assert of_layer["token_id"].tolist() == CORPUS.tokens[of_layer["sequence"].tolist(), 0].tolist()
    assert of_layer["token"].tolist() == token_strings(model.tokenizer, of_layer["token_id"].tolist())
    assert not massive_activations(model, CORPUS)["massive"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_that_of_a_loop(tiny, family):
    model = tiny(family, torch.float64)
    table = massive_activations(model, CORPUS, floor=1.0, factor=3.0, k=5, batch_size=2)
    for layer in range(model.cfg.n_layers):
        entries = []
        for sequence, length in enumerate(LENGTHS):
            hook = f"blocks.{layer}.hook_resid_post"
            stream = record(model, CORPUS.tokens[sequence : sequence + 1, :length], [hook])[hook][0]
            median = float(stream.abs().flatten().sort().values[(stream.numel() - 1) // 2])
            entries += [
                (float(stream[t, c]), sequence, t, c, median) for t in range(length) for c in range(model.cfg.d_model)
            ]
        entries.sort(key=lambda entry: -abs(entry[0]))
        part = table[table["layer"] == layer]
        assert part["rank"].tolist() == [0, 1, 2, 3, 4]
        for (_, row), (value, sequence, t, c, median) in zip(part.iterrows(), entries, strict=False):
            assert (row["sequence"], row["position"], row["channel"]) == (sequence, t, c)
            assert row["value"] == pytest.approx(value)
            assert row["median"] == pytest.approx(median)
            assert row["ratio"] == pytest.approx(abs(value) / median)
            assert row["massive"] == (abs(value) > 1 and abs(value) / median >= 3)


def test_neither_padding_nor_the_batch_counts(tiny):
    model = tiny("llama", torch.float64)
    tables = [
        massive_activations(model, random_corpus(fill=fill), batch_size=n).drop(columns="massive")
        for fill, n in ((33, 8), (12, 1))
    ]
    assert tables[0].drop(columns="token").to_numpy(float) == pytest.approx(
        tables[1].drop(columns="token").to_numpy(float)
    )
    sinks = [attention_sinks(model, random_corpus(fill=fill), batch_size=n) for fill, n in ((33, 8), (12, 1))]
    for name in sinks[0]:
        np.testing.assert_allclose(sinks[0][name], sinks[1][name], rtol=1e-12)


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sinks_by_hand(tiny, family, position):
    model = tiny(family, torch.float64)
    cfg, found = model.cfg, attention_sinks(model, CORPUS, position=position, batch_size=2)
    for layer in range(cfg.n_layers):
        window = cfg.windows[layer] or 99
        for head in range(cfg.n_heads):
            put, entropy, even, at, others = [], [], [], [], []
            for sequence, length in enumerate(LENGTHS):
                if length <= position + 1:
                    continue
                names = [f"blocks.{layer}.attn.hook_{name}" for name in ("v", "pattern")]
                v, pattern = record(model, CORPUS.tokens[sequence : sequence + 1, :length], names).values()
                for t in range(position + 1, length):
                    if t - position < window:
                        row = pattern[0, head, t]
                        put.append(float(row[position]))
                        entropy.append(-sum(float(a) * math.log(float(a)) for a in row if a > 0))
                        even.append(1 / min(t + 1, window))
                norms = v[0, :, head // cfg.group_size].norm(dim=-1).tolist()
                at.append(norms[position])
                others += norms[:position] + norms[position + 1 :]
            here = found.sel(layer=layer, head=head)
            assert float(here["sink"]) == pytest.approx(np.mean(put))
            assert float(here["entropy"]) == pytest.approx(np.mean(entropy))
            assert float(here["uniform"]) == pytest.approx(np.mean(even))
            assert float(here["value_ratio"]) == pytest.approx(np.mean(at) / np.mean(others))


def test_even_attention_and_a_perfect_sink(tiny):
    model = tiny("gpt2", torch.float64)

    def to_first(scores, hook):
        changed = scores.clone()
        changed[..., 0] = 1e4
        return changed

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", to_first)]):
        found = attention_sinks(model, CORPUS)
    np.testing.assert_allclose(found["sink"][1], 1)
    np.testing.assert_allclose(found["entropy"][1], 0, atol=1e-12)
    even = [
        ("blocks.0.attn.hook_attn_scores", lambda scores, hook: scores.where(scores.isinf(), torch.zeros_like(scores)))
    ]
    with model.hooks(fwd_hooks=even):
        found = attention_sinks(model, CORPUS)
    np.testing.assert_allclose(found["sink"][0], float(found["uniform"][0]))


def test_half_precision_runs(tiny):
    model = tiny("llama", torch.bfloat16)
    assert massive_activations(model, CORPUS, k=2)["value"].notna().all()
    assert (attention_sinks(model, CORPUS)["sink"] <= 1.01).all()


def test_pictures(tiny):
    model = tiny("gpt2")
    table = massive_activations(model, CORPUS, floor=0.0, factor=0.0)
    figure = massive_plot(table, ranks=2)
    assert [trace.name for trace in figure.data] == ["1. largest", "2. largest", "median"]
    assert list(figure.data[0].y) == table[table["rank"] == 0]["value"].abs().tolist()
    assert set(figure.data[0].marker.symbol) == {"circle"}
    sinks = attention_sinks(model, CORPUS)
    np.testing.assert_array_equal(sink_plot(sinks, title="sinks").data[0].z, sinks["sink"])


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(OptionError, "cannot show 0 entries of a layer: choose 1 to 32"):
        massive_activations(model, CORPUS, k=0)
    with refused(OptionError, "-1.0 is negative"):
        massive_activations(model, CORPUS, floor=-1.0)
    with refused(OptionError, "-1 is negative"):
        attention_sinks(model, CORPUS, position=-1)
    with refused(TaskError, "no sequence of random words has a token behind position 8"):
        attention_sinks(model, CORPUS, position=8)
    with refused(UnsupportedModel, "load the model with load_model"):
        attention_sinks(torch.nn.Linear(2, 2), Corpus(CORPUS.tokens, CORPUS.lengths))
