"""The operations of a canonical transformer, each written once.

Axes: b batch, t position (q: of a query, k: of a key), d d_model, h query head, g key/value head, e d_head, m d_mlp.
A suffix on a name says what it holds: `q_bthe` is [batch, position, head, d_head].
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.config import Rotary
from interp.precision import at_least_float32
from interp.rules import GRADIENT, Rules


def norm_scale(x: Float[Tensor, "... d"], eps: float) -> Float[Tensor, "... 1"]:
    """Root mean square of x over its last axis: sqrt(mean(x^2) + eps)."""
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotary_tables(
    rotary: Rotary, n_positions: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "position rotated"], Float[Tensor, "position rotated"]]:
    """cos and sin of the rotation at positions 0..n_positions-1, per rotated channel.

    Angles are formed in float32 at least, as position * inv_freq, and then cast.
    """
    wide = torch.promote_types(dtype, torch.float32)
    inv_freq = torch.tensor(rotary.inv_freq, device=device, dtype=wide)
    angles = torch.outer(torch.arange(n_positions, device=device, dtype=wide), inv_freq)
    angles = torch.cat([angles, angles], -1) if rotary.pairs == "half" else angles.repeat_interleave(2, -1)
    return (angles.cos() * rotary.scale).to(dtype), (angles.sin() * rotary.scale).to(dtype)


def rotate(
    x_bthe: Float[Tensor, "batch position head d_head"],
    cos: Float[Tensor, "position rotated"],
    sin: Float[Tensor, "position rotated"],
    pairs: str,
    rules: Rules = GRADIENT,
) -> Float[Tensor, "batch position head d_head"]:
    """Rotary position embedding (Su et al. 2104.09864) of the first channels of every head; linear in x."""
    n_rotated = cos.shape[-1]
    turned, passed = x_bthe[..., :n_rotated], x_bthe[..., n_rotated:]
    if pairs == "half":
        first, second = turned.chunk(2, dim=-1)
        quarter_turn = torch.cat([-second, first], -1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        quarter_turn = torch.stack([-second, first], -1).flatten(-2)
    turned = rules.rotate(turned * cos[:, None, :] + quarter_turn * sin[:, None, :])
    return torch.cat([turned, passed], -1) if passed.shape[-1] else turned


def causal_mask(
    query_positions: Int[Tensor, "*rows query"], key_positions: Int[Tensor, " key"], window: int | None
) -> Bool[Tensor, "*rows query key"]:
    """True where attention is forbidden: later keys, and keys `window` or more positions back."""
    distance = query_positions[..., None] - key_positions
    forbidden = distance < 0
    return forbidden if window is None else forbidden | (distance >= window)


def attention_scores(
    q_bqhe: Float[Tensor, "batch query head d_head"],
    k_bkge: Float[Tensor, "batch key kv_head d_head"],
    *,
    scale: float,
    softcap: float | None,
    rules: Rules,
) -> Float[Tensor, "batch head query key"]:
    """scale * q.k for every query head, each reading the key head of its group; soft-capped if the model does so."""
    q = rearrange(q_bqhe, "b q (g r) e -> b g r q e", g=k_bkge.shape[2])
    k = rearrange(k_bkge, "b k g e -> b g 1 k e")
    scores = rules.scores(q, k) * scale
    if softcap is not None:
        scores = rules.soft_cap(scores, softcap)
    return rearrange(scores, "b g r q k -> b (g r) q k")


def attention_pattern(
    scores_bhqk: Float[Tensor, "batch head query key"], rules: Rules
) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys, in float32 at least, returned in the scores' dtype."""
    return rules.softmax(at_least_float32(scores_bhqk)).to(scores_bhqk.dtype)


def attention_mix(
    pattern_bhqk: Float[Tensor, "batch head query key"], v_bkge: Float[Tensor, "batch key kv_head d_head"], rules: Rules
) -> Float[Tensor, "batch query head d_head"]:
    """z: every query head's pattern-weighted sum of its group's values."""
    pattern = rearrange(pattern_bhqk, "b (g r) q k -> b g r q k", g=v_bkge.shape[2])
    z = rules.mix(pattern, rearrange(v_bkge, "b k g e -> b g 1 k e"))
    return rearrange(z, "b g r q e -> b q (g r) e")


def default_attn_scale(d_head: int) -> float:
    """1 / sqrt(d_head)."""
    return 1.0 / math.sqrt(d_head)
