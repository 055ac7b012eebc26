"""Which heads a latent reads and writes: autoencoders of attention outputs (Kissane et al. 2406.17759).

Trained on `hook_z` with the heads' outputs side by side, d_in = heads x d_head, so that each weight belongs to one head. Writing
w_i for a decoder row and its slice of head h as w_i,h:

    share of head h in what latent i writes       |w_i,h| / sum over heads of |w_i,h'|
    pre-activation of latent i                    b_enc,i + sum over heads of (z - b_dec)_h . W_enc[h, i]      exactly

The shares are of the weights alone; which head makes a latent fire on a token is in the second sum.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, SiteError
from interp.features.sae import SAE


def _check(n_heads: int, channels: int, what: str) -> None:
    if n_heads < 1 or channels % n_heads:
        raise OptionError(f"this SAE {what} {channels} channels, which are not {n_heads} heads side by side")


@torch.no_grad()
def head_shares(sae: SAE, n_heads: int) -> Float[Tensor, "latent head"]:
    """|w_i,h| / sum over heads, of each latent's decoder row; rows sum to 1 (to 0 where a decoder row is 0).

    Raises `OptionError` where the channels that the SAE writes do not divide into so many heads.
    """
    _check(n_heads, sae.config.out, "writes")
    norms = sae.W_dec.unflatten(1, (n_heads, -1)).norm(dim=2)
    total = norms.sum(1, keepdim=True)
    return norms / torch.where(total > 0, total, 1.0)


@torch.no_grad()
def head_contributions(
    sae: SAE, z: Float[Tensor, "token d_in"], latent: int, n_heads: int
) -> Float[Tensor, "token head"]:
    """(z - b_dec)_h . W_enc[h, i] of one latent; with b_enc,i (b_gate,i of a gated SAE) heads sum to its pre-activation.

    z: as the model has it; the SAE's own normalisation is applied first, and b_dec subtracted only where the SAE does so.
    Raises `OptionError` where the channels do not divide into so many heads and for a kron encoder, whose pre-activations are not
    linear; `SiteError` where there is no such latent.
    """
    _check(n_heads, sae.config.d_in, "reads")
    if sae.config.kron is not None:
        raise OptionError("a kron encoder's pre-activation is a product, not a sum over heads")
    if not 0 <= latent < sae.config.d_sae:
        raise SiteError(f"the SAE has latents 0 to {sae.config.d_sae - 1}, not {latent}")
    if z.shape[1] != sae.config.d_in:
        raise OptionError(f"this SAE reads {sae.config.d_in} channels, and the activations have {z.shape[1]}")
    seen, _ = sae.normalize(z)
    if sae.b_in is not None:
        seen = seen - sae.b_in
    return (seen * sae.encoder[latent]).unflatten(1, (n_heads, -1)).sum(2)
