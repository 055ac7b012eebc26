"""Sparsity of activations: planted patterns whose values are known, and loops over tokens."""

import numpy as np
import pytest
import torch

from interp.diagnostics.activity import activation_sparsity, activity_plot
from interp.errors import OptionError, TaskError, UnsupportedModel
from interp.model.run import record
from tests.diagnostics.random_corpus import LENGTHS, random_corpus
from tests.small_pairs import refused

CORPUS = random_corpus()


def planted(tiny, pattern: torch.Tensor, **options):
    """Layer 1 of a tiny GPT-2, whose 80 neurons have this pattern on every token."""
    model = tiny("gpt2", torch.float64)
    post = lambda value, hook: pattern.to(value).expand_as(value)  # noqa: E731
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", post)]):
        return activation_sparsity(model, CORPUS, **options).sel(layer=1)


def test_one_neuron_alone(tiny):
    pattern = torch.zeros(80)
    pattern[17] = -3.0
    found = planted(tiny, pattern)
    assert found["inactive"].values == pytest.approx([79 / 80] * 3)
    assert found["never"].values == pytest.approx([79 / 80] * 3)
    assert float(found["hoyer"]) == pytest.approx(1)
    assert float(found["carriers"]) == pytest.approx(1 / 80)


def test_all_alike(tiny):
    found = planted(tiny, 1e-200 * torch.ones(80, dtype=torch.float64))
    assert found["inactive"].values.tolist() == [0, 0, 0]
    assert float(found["hoyer"]) == pytest.approx(0, abs=1e-12)
    assert float(found["carriers"]) == pytest.approx(72 / 80)


def test_nothing_at_all(tiny):
    found = planted(tiny, torch.zeros(80))
    assert found["inactive"].values.tolist() == [1, 1, 1]
    assert found["never"].values.tolist() == [1, 1, 1]
    assert float(found["hoyer"]) == 1
    assert float(found["carriers"]) == 0


@pytest.mark.parametrize(("mass", "n"), [(0.3, 1), (0.75, 2), (0.85, 3), (1.0, 4)])
def test_carriers(tiny, mass, n):
    pattern = torch.zeros(80)
    pattern[[3, 9, 50, 51]] = torch.tensor([2.0, -2.0, 1.0, -1.0])  # squares 4, 4, 1, 1
    assert float(planted(tiny, pattern, mass=mass)["carriers"]) == pytest.approx(n / 80)


def test_thresholds_are_of_the_tokens_largest(tiny):
    pattern = torch.zeros(80)
    pattern[:4] = torch.tensor([100.0, -20.0, 5.0, 0.5])
    found = planted(tiny, pattern, thresholds=[0.0, 0.01, 0.1, 0.5])
    assert found["inactive"].values == pytest.approx([76 / 80, 77 / 80, 78 / 80, 79 / 80])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "pythia"])
def test_every_token_by_hand(tiny, family):
    model = tiny(family, torch.float64)
    found = activation_sparsity(model, CORPUS, thresholds=[0.0, 0.3], mass=0.8, batch_size=3)
    for layer in range(model.cfg.n_layers):
        hook, values = f"blocks.{layer}.mlp.hook_post", []
        ever = np.zeros(model.cfg.d_mlp, bool)
        for sequence, length in enumerate(LENGTHS):
            for a in record(model, CORPUS.tokens[sequence : sequence + 1, :length], [hook])[hook][0, 1:].abs().numpy():
                n = len(a)
                total, k = 0.0, 0
                for square in sorted(a**2, reverse=True):
                    total, k = total + square, k + 1
                    if total >= 0.8 * (a**2).sum():
                        break
                hoyer = (n**0.5 - a.sum() / np.linalg.norm(a)) / (n**0.5 - 1)
                values.append(((a == 0).mean(), (a <= 0.3 * a.max()).mean(), hoyer, k / n))
                ever |= a > 0.3 * a.max()
        here = found.sel(layer=layer)
        means = [*here["inactive"].values, float(here["hoyer"]), float(here["carriers"])]
        assert means == pytest.approx(np.mean(values, 0).tolist())
        assert float(here["never"][1]) == pytest.approx(1 - ever.mean())
    if family == "opt":  # ReLU
        assert (found["inactive"].sel(threshold=0.0) > 0.1).all()


def test_the_batch_and_padding_do_not_count(tiny):
    model = tiny("llama", torch.float64)
    found = [activation_sparsity(model, random_corpus(fill=fill), batch_size=n) for fill, n in ((33, 8), (6, 1))]
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-12)


def test_picture(tiny):
    found = activation_sparsity(tiny("gpt2"), CORPUS)
    figure = activity_plot(found, title="activity")
    assert len(figure.data) == 8
    np.testing.assert_array_equal(figure.data[1].y, found["inactive"].sel(threshold=0.01))
    assert figure.data[-1].name == "carriers of 90% of |a|²"


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(OptionError, r"thresholds are shares from 0 up to 1, not \[1.0\]"):
        activation_sparsity(model, CORPUS, thresholds=[1.0])
    with refused(OptionError, "a share above 0, not 0.0"):
        activation_sparsity(model, CORPUS, mass=0.0)
    with refused(TaskError, "no token of random words"):
        activation_sparsity(model, random_corpus((1, 1)))
    with refused(UnsupportedModel, "load the model with load_model"):
        activation_sparsity(torch.nn.Linear(2, 2), CORPUS)
