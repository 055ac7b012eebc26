"""SAEs of every kind for the tiny models, pairs to try them on, and what a hand-written test asks of a run."""

import torch

from interp import PromptPairs
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from tests.small_pairs import small_pairs

DOUBLE = torch.float64
POST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
READS, WRITES = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
Z = "blocks.1.attn.hook_z"
D, LATENTS, K = 32, 24, 8


def sae_at(d_in: int = D, seed: int = 0, *, dtype: torch.dtype = DOUBLE, **options) -> SAE:
    """A random SAE with random biases."""
    sae = SAE(SAEConfig(d_in=d_in, d_sae=LATENTS, k=K, **options), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    for bias in (sae.b_dec, sae.b_enc):
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return sae


def saes_of(model) -> dict[str, SAE]:
    """A residual stream with tokens normalised, heads side by side, a transcoder, and the last residual stream."""
    d, z, dtype = model.cfg.d_model, model.cfg.n_heads * model.cfg.d_head, model.dtype
    return {
        POST: sae_at(d, 0, normalize="layer_norm", dtype=dtype),
        Z: sae_at(z, 1, dtype=dtype),
        READS: sae_at(d, 2, target_hook=WRITES, apply_b_dec_to_input=False, dtype=dtype),
        LAST: sae_at(d, 3, dtype=dtype),
    }


def small() -> PromptPairs:
    """Three pairs, one of them a token shorter."""
    return small_pairs(3, lengths=[6, 5, 6], differ=(1, 3))


def case(tiny, family: str, dtype: torch.dtype = torch.float32) -> tuple:
    """A model, prompt pairs and SAEs."""
    model = tiny(family, dtype)
    return model, small(), saes_of(model)


def gap(scores, direction: str = "denoise"):
    """metric(source) - metric(base)."""
    return (scores.metric_clean - scores.metric_corrupt) * (-1 if direction == "noise" else 1)


def metric_of(model, pairs, side: str, hooks=()) -> torch.Tensor:
    """The logit difference of a run."""
    rows = torch.arange(len(pairs))
    logits = model.run_with_hooks(pairs.tokens(side), fwd_hooks=[*pairs.hooks(side), *hooks])[rows, pairs.read_at]
    return logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.wrong_answers[:, 0]]


def values_at(model, tokens: torch.Tensor, *places: str) -> list[torch.Tensor]:
    """[prompt, position, channel] at hook points of a run, heads side by side."""
    held = {}
    keep = lambda value, hook: held.update({hook.name: value.flatten(2)})  # noqa: E731
    model.run_with_hooks(tokens, fwd_hooks=[(place, keep) for place in places])
    return [held[place] for place in places]


def split_by_hand(model, pairs, hook: str, sae: SAE, side: str) -> list[torch.Tensor]:
    """Codes in the scale of the data, and the activation that they are part of."""
    x, a = values_at(model, pairs.tokens(side), hook, sae.config.target_hook or hook)
    scale = (x.std(-1, keepdim=True) + 1e-5) if sae.config.normalize == "layer_norm" else 1.0
    return [sae.encode(x) * scale, a]
