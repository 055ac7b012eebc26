"""Directions to steer along.

Held against: means of runs of one text each, weights by hand, what the model does with them.
"""

from types import SimpleNamespace

import pytest
import torch

from interp.errors import OptionError, SiteError, TaskError
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.sources import Corpus
from interp.model.run import record
from interp.steering.changes import steer_hooks
from interp.steering.vectors import Vector, contrast_pairs, diff_means, neuron_vector, sae_vector, snmf_vector
from tests.small_pairs import refused

POSITIVE = ["John gave a drink to Mary", "Mary", "When the store went to John"]
NEGATIVE = ["the store", "a drink to the store and a drink"]


def activations(model, hook: str, text: str) -> torch.Tensor:
    return record(model, model.to_tokens(text), [hook])[hook][0].flatten(1).double()


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.mlp.hook_post", "blocks.0.attn.hook_z"])
@pytest.mark.parametrize("model", ["mini_gpt2", "mini_llama"])
def test_diff_means_by_hand(request, model, hook):
    """Every token counts alike, the first ones not at all."""
    model = request.getfixturevalue(model)
    rows = [torch.cat([activations(model, hook, text)[1:] for text in texts]) for texts in (POSITIVE, NEGATIVE)]
    for batch_size in (1, 2, 32):
        vector = diff_means(model, hook, POSITIVE, NEGATIVE, batch_size=batch_size)
        torch.testing.assert_close(vector.direction.double(), rows[0].mean(0) - rows[1].mean(0), rtol=1e-4, atol=1e-5)
    assert vector.hook == hook
    assert vector.direction.dtype == model.dtype


def test_at_the_last_position_each_text_counts_once(mini_gpt2):
    hook = "blocks.1.hook_resid_post"
    ends = [torch.stack([activations(mini_gpt2, hook, text)[-1] for text in texts]) for texts in (POSITIVE, NEGATIVE)]
    vector = diff_means(mini_gpt2, hook, POSITIVE, NEGATIVE, positions="last")
    torch.testing.assert_close(vector.direction.double(), ends[0].mean(0) - ends[1].mean(0), rtol=1e-4, atol=1e-5)


def test_contrast_pairs_by_hand(mini_gpt2):
    hook = "blocks.2.hook_resid_pre"
    pairs = list(zip(POSITIVE[:2], NEGATIVE, strict=True))
    each = [activations(mini_gpt2, hook, p)[-1] - activations(mini_gpt2, hook, n)[-1] for p, n in pairs]
    vector = contrast_pairs(mini_gpt2, hook, pairs, batch_size=1)
    torch.testing.assert_close(vector.direction.double(), torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_sides_exchanged_are_the_opposite(mini_gpt2):
    hook = "blocks.1.mlp.hook_post"
    there, back = (
        diff_means(mini_gpt2, hook, *sides).direction for sides in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE))
    )
    torch.testing.assert_close(there, -back)
    assert diff_means(mini_gpt2, hook, POSITIVE, POSITIVE).direction.abs().max() == 0


def test_a_corpus_is_taken_as_it_is(mini_gpt2):
    hook = "blocks.1.mlp.hook_post"
    corpora = [Corpus.from_texts(mini_gpt2, texts) for texts in (POSITIVE[::2], NEGATIVE)]
    found = diff_means(mini_gpt2, hook, *corpora).direction
    torch.testing.assert_close(found, diff_means(mini_gpt2, hook, POSITIVE[::2], NEGATIVE).direction)


def test_a_neuron_writes_its_weights(tiny):
    model, tokens = tiny("llama", torch.float64), torch.tensor([[1, 5, 7, 4]])
    vector, out = neuron_vector(model, 1, 6), "blocks.1.hook_mlp_out"
    clean = record(model, tokens, [out])[out]
    changed = record(model, tokens, [out], steer_hooks(model, [vector.change(3.0)]))[out]
    torch.testing.assert_close(changed - clean, (3 * model.blocks[1].mlp.W_out[6]).expand_as(clean))


def test_latents_and_features():
    sae = SAE(SAEConfig(d_in=8, d_sae=16, k=4, hook="blocks.0.hook_resid_post"), dtype=torch.float64)
    assert torch.equal(sae_vector(sae, 3).direction, sae.W_dec[3])
    assert sae_vector(sae, 3).hook == "blocks.0.hook_resid_post"
    about = {
        "hook": "blocks.0.ln2.hook_normalized",
        "target_hook": "blocks.0.hook_mlp_out",
        "apply_b_dec_to_input": False,
    }
    assert sae_vector(SAE(SAEConfig(d_in=8, d_sae=16, k=4, **about)), 0).hook == "blocks.0.hook_mlp_out"
    components = torch.arange(12.0).reshape(3, 4)
    vector = snmf_vector(SimpleNamespace(hook="blocks.2.mlp.hook_post", components_=components), 2)
    assert vector.hook == "blocks.2.mlp.hook_post"
    assert torch.equal(vector.direction, components[2])


def test_refusals(mini_gpt2):
    hook = "blocks.1.hook_resid_post"
    with refused(SiteError, "no hook point 'blocks.7.hook_resid_post'"):
        diff_means(mini_gpt2, "blocks.7.hook_resid_post", POSITIVE, NEGATIVE)
    with refused(SiteError, "hook_pattern cannot be steered"):
        diff_means(mini_gpt2, "blocks.1.attn.hook_pattern", POSITIVE, NEGATIVE)
    with refused(OptionError, "'all' is not a choice of positions"):
        diff_means(mini_gpt2, hook, POSITIVE, NEGATIVE, positions="all")
    with refused(OptionError, "cannot run 0 texts"):
        diff_means(mini_gpt2, hook, POSITIVE, NEGATIVE, batch_size=0)
    with refused(TaskError, "the negative texts have no token that counts"):
        diff_means(mini_gpt2, hook, POSITIVE, [""])
    with refused(TaskError, "the negative texts are none"):
        diff_means(mini_gpt2, hook, POSITIVE, [])
    with refused(TaskError, "the positive texts are one string"):
        diff_means(mini_gpt2, hook, "Mary", NEGATIVE)
    with refused(TaskError, "no contrast pairs"):
        contrast_pairs(mini_gpt2, hook, [])
    with refused(SiteError, "features 0 to 2, not 3"):
        snmf_vector(SimpleNamespace(hook=hook, components_=torch.ones(3, 4)), 3)
    with refused(OptionError, "not been fitted"):
        snmf_vector(SimpleNamespace(hook=hook, components_=None), 0)
    with refused(SiteError, "this SNMF does not say"):
        snmf_vector(SimpleNamespace(hook=None, components_=torch.ones(3, 4)), 0)
    with refused(SiteError, "this SAE does not say"):
        sae_vector(SAE(SAEConfig(d_in=8, d_sae=16, k=4)), 0)
    with refused(SiteError, "latents 0 to 15, not -1"):
        sae_vector(SAE(SAEConfig(d_in=8, d_sae=16, k=4, hook=hook)), -1)
    with refused(SiteError, "has channels 0 to"):
        neuron_vector(mini_gpt2, 0, 10**6)
    with refused(OptionError, "has a value"):
        Vector(hook, torch.ones(128), "ones").change()
