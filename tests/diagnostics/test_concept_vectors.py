"""Vectors moved by a known amount, and noise against a model whose weight really has it."""

import copy

import numpy as np
import pytest
import torch

from interp.diagnostics.concept_vectors import concept_noise_plot, concept_vector_change, concept_vector_noise
from interp.errors import OptionError, SiteError, TaskError, UnsupportedModel
from tests.diagnostics.random_corpus import random_corpus
from tests.small_pairs import refused

OWN, UNRELATED = random_corpus(seed=1), random_corpus((6, 8), seed=2)


def changed(model, edits: dict[tuple[int, int], torch.Tensor]):
    """A copy with these output vectors."""
    other = copy.deepcopy(model)
    for (layer, neuron), vector in edits.items():
        other.blocks[layer].mlp.W_out.data[neuron] = vector
    return other


def test_a_model_and_itself(tiny):
    model = tiny("gpt2", torch.float64)
    found = concept_vector_change(model, model, [(0, 3), (2, 79)], k=20)
    assert found.columns.tolist() == ["layer", "neuron", "cosine", "distance", "jaccard"]
    assert found[["layer", "neuron"]].to_numpy().tolist() == [[0, 3], [2, 79]]
    assert found["cosine"].tolist() == pytest.approx([1, 1])
    assert found["distance"].tolist() == [0, 0]
    assert found["jaccard"].tolist() == [1, 1]


def test_known_moves(tiny):
    """Turned about, made twice as long, put at a right angle, and wiped out."""
    model = tiny("llama", torch.float64)
    v = {n: model.blocks[1].mlp.W_out[n] for n in range(4)}
    step = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    across = step - (step @ v[2]) / (v[2] @ v[2]) * v[2]
    other = changed(model, {(1, 0): -v[0], (1, 1): 2 * v[1], (1, 2): across, (1, 3): 0 * v[3]})
    found = concept_vector_change(model, other, [(1, n) for n in range(4)], k=32)
    assert found["cosine"].tolist()[:3] == pytest.approx([-1, 1, 0], abs=1e-12)
    assert np.isnan(found["cosine"][3])
    lengths = [float(x.norm()) for x in (2 * v[0], v[1], across - v[2], v[3])]
    assert found["distance"].tolist() == pytest.approx(lengths)
    assert found["jaccard"].tolist()[:2] == [0, 1]  # of 64 tokens, the other 32


@pytest.mark.parametrize("k", [1, 7, 64])
def test_jaccard_is_that_of_sets(tiny, k, monkeypatch):
    model, other = tiny("gpt2"), copy.deepcopy(tiny("gpt2"))
    generator = torch.Generator().manual_seed(0)
    for block in other.blocks:
        block.mlp.W_out.data += 0.2 * torch.randn(block.mlp.W_out.shape, generator=generator)
    neurons = [(layer, neuron) for layer in range(3) for neuron in range(0, 80, 9)]
    monkeypatch.setattr("interp.diagnostics.concept_vectors._ENTRIES", 64 * 5)
    found = concept_vector_change(model, other, neurons, k=k)
    for jaccard, (layer, neuron) in zip(found["jaccard"], neurons, strict=True):
        a, b = (
            set((each.blocks[layer].mlp.W_out[neuron] @ each.W_U).argsort(descending=True)[:k].tolist())
            for each in (model, other)
        )
        assert jaccard == pytest.approx(len(a & b) / len(a | b))


def log_probability(model, corpus) -> float:
    """Mean over next tokens."""
    found = []
    for tokens, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        log_p = model(tokens[None, :length])[0].log_softmax(-1)
        found += [float(log_p[t, tokens[t + 1]]) for t in range(length - 1)]
    return float(np.mean(found))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "pythia"])
def test_the_hook_is_a_change_of_the_weight(tiny, family):
    model = tiny(family, torch.float64)
    found = concept_vector_noise(model, [(1, 5)], OWN, UNRELATED, scale=0.7, n_control=2, seed=4, batch_size=3)
    assert found["kind"].tolist() == ["concept", "control", "control"]
    assert (found[["layer", "neuron"]].to_numpy() == [1, 5]).all()
    assert found["noisy"].nunique() == 3
    generator = torch.Generator().manual_seed(4)
    torch.randperm(model.cfg.d_mlp, generator=generator)
    noise = 0.7 * torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)
    for row in found.itertuples():
        other = changed(model, {(1, row.noisy): model.blocks[1].mlp.W_out[row.noisy] + noise})
        for name, corpus in (("own", OWN), ("unrelated", UNRELATED)):
            expected = log_probability(other, corpus) - log_probability(model, corpus)
            assert getattr(row, name) == pytest.approx(expected, abs=1e-10)


def test_only_what_the_neuron_fires_on_is_hurt(tiny):
    """A neuron that is silent on unrelated texts (its activation is planted) changes nothing there."""
    model = tiny("gpt2", torch.float64)
    special = int(OWN.tokens[0, 0])
    unrelated = random_corpus((6, 8), seed=2)
    unrelated.tokens[unrelated.tokens == special] = 4 if special != 4 else 5
    seen = {}

    def fires(post, hook):
        post = post.clone()
        post[..., 9] = 20.0 * seen["special"].to(post)
        return post

    def look(value, hook):
        seen["special"] = (value == model.W_E[special]).all(-1).any(1, keepdim=True).expand(value.shape[:2])

    with model.hooks(fwd_hooks=[("hook_embed", look), ("blocks.2.mlp.hook_post", fires)]):
        found = concept_vector_noise(model, [(2, 9)], OWN, unrelated, scale=1.0, n_control=6)
    concept, controls = found[found["kind"] == "concept"], found[found["kind"] == "control"]
    assert float(concept["unrelated"].iloc[0]) == 0
    # a model of random weights may as well gain by it
    assert abs(float(concept["own"].iloc[0])) > 2 * float(controls["own"].abs().max()) > 0
    assert controls["unrelated"].all()


def test_no_noise_no_change_and_the_same_seed(tiny):
    model = tiny("llama", torch.float64)
    still = concept_vector_noise(model, [(0, 1), (2, 3)], OWN, UNRELATED, scale=0.0, n_control=1)
    assert not still[["own", "unrelated"]].to_numpy().any()
    assert len(still) == 4
    a, b = (concept_vector_noise(model, [(0, 1)], OWN, UNRELATED, n_control=3, seed=9) for _ in range(2))
    assert a.equals(b)
    weights = model.blocks[0].mlp.W_out.clone()
    concept_vector_noise(model, [(0, 1)], OWN, UNRELATED, n_control=1)
    assert torch.equal(weights, model.blocks[0].mlp.W_out)


def test_controls_are_other_neurons(tiny):
    model = tiny("gpt2")
    neurons = [(0, n) for n in range(70)]
    found = concept_vector_noise(model, neurons[:2], random_corpus((3,)), random_corpus((3,)), n_control=78)
    controls = found[found["kind"] == "control"]
    assert set(controls["noisy"]) == set(range(2, 80))
    with refused(OptionError, "layer 0 has 10 other neurons, not 11"):
        concept_vector_noise(model, neurons, OWN, UNRELATED, n_control=11)


def test_picture(tiny):
    found = concept_vector_noise(tiny("gpt2"), [(0, 3), (1, 4)], OWN, UNRELATED, n_control=2)
    figure = concept_noise_plot(found, title="noise")
    assert [trace.name for trace in figure.data] == ["both alike", "control", "concept"]
    assert list(figure.data[2].y) == found[found["kind"] == "concept"]["own"].tolist()


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(SiteError, "layers 0 to 2 of neurons 0 to 79, not m3.n0"):
        concept_vector_change(model, model, [(3, 0)], k=5)
    with refused(SiteError, "not m0.n80"):
        concept_vector_noise(model, [(0, 80)], OWN, UNRELATED)
    with refused(OptionError, "cannot compare 65 of 64 tokens"):
        concept_vector_change(model, model, [(0, 0)], k=65)
    with refused(OptionError, "the models must have the same"):
        concept_vector_change(model, tiny("pythia"), [(0, 0)], k=5)
    with refused(OptionError, "a standard deviation is not negative"):
        concept_vector_noise(model, [(0, 0)], OWN, UNRELATED, scale=-0.1)
    with refused(TaskError, "has a token to predict"):
        concept_vector_noise(model, [(0, 0)], OWN, random_corpus((1,)))
    with refused(UnsupportedModel, "load the model with load_model"):
        concept_vector_change(model, torch.nn.Linear(2, 2), [(0, 0)])
