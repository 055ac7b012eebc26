"""Activations of sparse autoencoders: which latents fire, given the pre-activations z = (x - b_dec) W_enc + b_enc.

Selections (no gradient runs through the choice, so they only choose) return `Codes` of ReLU(z):

- `top_k`, `abs_top_k`: k per token (Makhzani & Frey 1312.5663; Gao et al. 2406.04093). `batch_top_k`: tokens x k per batch
  (Bussmann et al. 2412.06410); at inference, `above` the threshold that the batches had.
- `afa` (top-AFA, Lee et al. 2503.24277): as many of the largest as bring |f| nearest to the target |x|. For near-orthogonal
  unit decoder rows |x|^2 = |f|^2 + sum_{i != j} f_i f_j <u_i, u_j>, so |f| ~ |x|. The published worst case, a factor of
  1/sqrt(1 -+ eps (h - 1)) for coherence eps, says nothing for real dictionaries (eps (h - 1) is far beyond 1 by Welch's
  bound); what holds is statistical: signs cancel, and |x| / |f| has a standard deviation of sqrt((1 - 1/L0) / (2 d)).

Gradients of steps are estimated straight through (`jump_relu`, `fires`: Rajamanoharan et al. 2407.14435):

    d f / d theta = -(theta / eps) R((z - theta) / eps)     d 1[z > theta] / d theta = -(1 / eps) R((z - theta) / eps)

with R(u) = 1 for |u| < 1/2. theta is kept as it is: as log theta, Adam moves it by about lr * theta a step, so it never rises.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from interp.features.codes import Codes
from interp_kernels.afa_select import afa_select
from interp_kernels.row_top_k import row_top_k


def _ranked(z: Float[Tensor, "token latent"], norms: Float[Tensor, " latent"] | None) -> Float[Tensor, "token latent"]:
    return z if norms is None else z * norms


def top_k(z: Float[Tensor, "token latent"], k: int, norms: Float[Tensor, " latent"] | None = None) -> Codes:
    """The k largest of z (of z * norms, where decoder rows are not unit) of each token, through a ReLU."""
    values, latents = row_top_k(_ranked(z, norms), k)
    if norms is not None:
        values = z.gather(1, latents)
    return Codes.of_rows(values.relu(), latents, z.shape[1])


def abs_top_k(z: Float[Tensor, "token latent"], k: int, norms: Float[Tensor, " latent"] | None = None) -> Codes:
    """The k largest in absolute value, signs kept."""
    _, latents = row_top_k(_ranked(z, norms).abs(), k)
    return Codes.of_rows(z.gather(1, latents), latents, z.shape[1])


def batch_top_k(
    z: Float[Tensor, "token latent"], k: int, norms: Float[Tensor, " latent"] | None = None, *, hint: float = 0.0
) -> tuple[Codes, Float[Tensor, ""]]:
    """The (tokens x k) largest positive entries of the whole batch, and the smallest of them (0 if there is none).

    hint: a guess below that smallest one (the last batch's, say). It only saves time: entries under it are looked at again
    if there turn out to be too few above it.
    """
    ranked, wanted = _ranked(z, norms), len(z) * k
    mask = ranked > max(hint, 0.0)
    candidates = ranked[mask]
    if len(candidates) < wanted and hint > 0:
        mask = ranked > 0
        candidates = ranked[mask]
    if len(candidates) > wanted:
        kept = candidates.topk(wanted, sorted=False)
        mask = mask.clone()
        mask[mask.clone()] = torch.zeros_like(candidates, dtype=torch.bool).scatter_(0, kept.indices, True)
        candidates = kept.values
    lowest = candidates.min() if len(candidates) else torch.zeros((), dtype=z.dtype, device=z.device)
    return Codes.where(mask, z), lowest


def above(z: Float[Tensor, "token latent"], threshold: Tensor | float, norms: Tensor | None = None) -> Codes:
    """Entries of z with z * norms above a threshold, of all latents or one for each, and above 0: JumpReLU's code."""
    ranked = _ranked(z, norms)
    return Codes.where((ranked > threshold) & (ranked > 0), z)


def afa(
    z: Float[Tensor, "token latent"], target: Float[Tensor, " token"], norms: Float[Tensor, " latent"] | None = None,
    *, k_max: int | None = None, sentinel: float | None = None,
) -> Codes:  # fmt: skip
    """top-AFA: the m largest f |w| of each token, m >= 1 minimising | |f|w||_m - target |; ties go to the smaller m.

    k_max: at most so many. sentinel: the published code overwrites the last cumulative sum of squares by 1e8 so that a whole
    row is never chosen; given as that number, it is here too (and, as there, targets beyond about 1e4 then choose all).
    """
    active = z.relu()
    energy = _ranked(active, norms).square()
    offsets, latents = afa_select(energy, target, k_max=k_max)
    rows = torch.repeat_interleave(torch.arange(len(z), device=z.device), offsets.diff(), output_size=len(latents))
    codes = Codes(offsets, latents, active[rows, latents], z.shape[1])
    return codes if sentinel is None else _with_sentinel(codes, active, energy, target, sentinel)


def _with_sentinel(codes: Codes, active: Tensor, energy: Tensor, target: Tensor, sentinel: float) -> Codes:
    """The last cumulative sum of the sorted squares replaced: all latents are chosen only if that number is the nearest."""
    mask = torch.zeros_like(energy, dtype=torch.bool)
    mask[codes.rows, codes.latents] = True
    reached = (energy * mask).sum(1).sqrt()
    whole = codes.offsets.diff() == codes.n_latents
    drop = whole.nonzero()[:, 0]
    if len(drop) and codes.n_latents > 1:  # without the smallest, unless the sentinel is the nearest after all
        smallest = codes.n_latents - 1 - energy[drop].flip(1).argmin(1)  # of equal ones the last, as at any cut
        mask[drop, smallest] = False
        reached[drop] = (energy[drop].sum(1) - energy[drop, smallest]).clamp_min(0).sqrt()
    mask[(sentinel**0.5 - target).abs() < (reached - target).abs()] = True
    return Codes.where(mask & (energy > 0), active)


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.bandwidth / 2).to(g.dtype)
        return g * (z > theta), -(theta / ctx.bandwidth) * (near * g).sum(0), None


class _Fires(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.bandwidth / 2).to(g.dtype)
        return None, -(near * g).sum(0) / ctx.bandwidth, None


def jump_relu(
    z: Float[Tensor, "token latent"], theta: Float[Tensor, " latent"], bandwidth: float
) -> Float[Tensor, "token latent"]:
    """z where z > theta, else 0; theta's gradient is the kernel estimate of width `bandwidth`, z's is the mask."""
    return _JumpReLU.apply(z, theta, bandwidth)


def fires(
    z: Float[Tensor, "token latent"], theta: Float[Tensor, " latent"], bandwidth: float
) -> Float[Tensor, "token latent"]:
    """1 where z > theta: its sum is L0, with a kernel estimate of its gradient in theta and none in z."""
    return _Fires.apply(z, theta, bandwidth)


def mand(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KronSAE's gate (2505.22255): sqrt(u v) where both are positive, else 0.

    Its slope at 0 is infinite; the estimate there is 0, as for a ReLU.
    """
    both = (u > 0) & (v > 0)
    return torch.where(both, torch.where(both, u * v, 1.0).sqrt(), 0.0)
