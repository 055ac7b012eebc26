"""What a sparse autoencoder is trained to do, per architecture: one loss per batch, squared errors summed over d.

    loss = mean over tokens of |y - xhat|^2  +  the architecture's own terms  +  AuxK

- standard: sparsity * sum f n. gated: sparsity * sum ReLU(pi) n + |y - (ReLU(pi) W_dec + b_dec)|^2.
- jumprelu: sparsity * L0, or sparsity * (2 / T) (L0 - T)^2 with a target T; gradients straight through.
- matryoshka: |y - xhat_l|^2 summed over nested dictionaries.
- top-afa: afa_weight * d * (|f| - t)^2; the factor d because the published lambda goes with errors averaged over d. Faithful:
  f as it is against |x|, while the selection looks at f n and |x - b_dec|. Corrected: f n against |x - b_dec| in both, and
  sparsity * sum f n: |f|_1 at a given |f|_2 is a pressure on sparsity that the selection alone does not have.
- AuxK (Gao et al.): the strongest dead latents, without b_dec, predict the detached residual e; relative to what is left,
  in units of the targets' variance V, so that it does not depend on the data's scale: aux_weight * V * |ehat - e|^2 / |e
  - mean e|^2.

Where codes are sparse from the start (topk and its relatives) neither the forward nor the backward pass has a dense product but
the encoder's (`interp.features.autograd`); the other architectures start dense and are left to autograd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from interp.features import activations
from interp.features.autograd import autoencode, decode
from interp.features.codes import Codes
from interp.features.config import SPARSE
from interp.features.sae import SAE


@dataclass(frozen=True)
class Outcome:
    """What a batch said. loss has the graph; all else is detached. lowest: the smallest code kept (batchtopk), if any."""

    loss: Float[Tensor, ""]
    fired: Bool[Tensor, " latent"]
    l0: Float[Tensor, ""]
    error: Float[Tensor, "token d_out"]
    lowest: Float[Tensor, ""] | None = None


def objective(
    sae: SAE, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], *, dead: Tensor | None = None,
    sparsity: float = 1.0, k: int | None = None, encoder: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """The loss of a batch of normalised inputs x and targets y, with a graph to the SAE's parameters.

    dead: indices of dead latents, if there are any. sparsity: schedule's factor on the sparsity coefficient. k: another k than
    the config's (annealing). encoder: the encoder's weights in another dtype; the choice of latents is then made in that dtype,
    and values are computed as usual.
    """
    if sae.config.architecture in SPARSE:
        return _sparse(sae, x, y, dead, sparsity, k or sae.config.k, encoder)
    return _dense(sae, x, y, dead, sparsity)


def _sparse(sae: SAE, x: Tensor, y: Tensor, dead, sparsity: float, k: int | None, narrow: Tensor | None) -> Outcome:
    config, lowest = sae.config, None
    kind, faithful = config.architecture, config.faithful
    b_enc = sae.bias
    with torch.no_grad():
        seen = x if sae.b_in is None else x - sae.b_in
        if narrow is None:
            z = F.linear(seen, sae.encoder, b_enc)
        else:
            z = F.linear(seen.to(narrow.dtype), narrow).to(x.dtype).add_(b_enc)
        if config.kron is not None:
            z = sae.pair(z)
        norms, length = sae.norms(), seen.norm(dim=1)
        if kind == "topk":
            codes = activations.top_k(z, k, norms)
        elif kind == "abstopk":
            codes = activations.abs_top_k(z, k, norms)
        elif kind == "top-afa":
            codes = activations.afa(z, length, norms, k_max=config.k_max, sentinel=1e8 if faithful else None)
        else:
            codes, lowest = activations.batch_top_k(z, k, norms, hint=0.9 * float(sae.batch_threshold))
        if narrow is not None and config.kron is None:
            codes = _exact(codes, sae.encoder, b_enc, seen, rectified=kind != "abstopk")

    levels, rectified = config.levels, kind != "abstopk"
    if len(levels) == 1 and config.kron is None and not config.skip:  # decoded and subtracted in one pass
        values, residual = autoencode(
            codes, x, sae.encoder, b_enc, sae.b_in, sae.W_dec, rectified=rectified, bias=sae.b_dec, target=y
        )  # fmt: skip
        errors = residual[None]
    else:
        codes = codes if len(levels) == 1 else codes.split(levels)
        values, decoded = _through(sae, codes, x, b_enc, rectified=rectified)
        errors = y - _biased(sae, decoded.unflatten(0, (len(levels), len(x))).cumsum(0), x)
    loss = errors.square().sum() / len(x)
    error = errors[-1].detach()

    if kind == "top-afa":
        scaled = values if faithful or norms is None else values * norms.detach()[codes.latents]
        reached = codes.row_sums(scaled.square()).clamp_min(1e-24).sqrt()
        goal = x.norm(dim=1) if faithful else length
        loss = loss + config.afa_weight * x.shape[1] * (reached - goal).square().mean()
        if config.sparsity:
            loss = loss + sparsity * config.sparsity * scaled.sum() / len(x)
    if dead is not None and len(dead) and config.aux_weight:
        with torch.no_grad():
            ranks = None if norms is None or faithful else norms[dead]
            strongest = activations.top_k(z[:, dead], min(config.n_aux, len(dead)), ranks)
            strongest = Codes(strongest.offsets, dead[strongest.latents], strongest.values, config.d_sae)
            if narrow is not None and config.kron is None:
                strongest = _exact(strongest, sae.encoder, b_enc, seen)
        guess = _through(sae, strongest, x, b_enc)[1]
        if faithful:
            loss = loss + config.aux_weight * (guess - errors[-1]).square().sum() / len(x)
        else:
            loss = loss + config.aux_weight * _relative(guess, error, y)
    return Outcome(loss, codes.fired(), (codes.values != 0).sum() / len(x), error, lowest)


def _exact(codes: Codes, encoder: Tensor, b_enc: Tensor, seen: Tensor, rectified: bool = True) -> Codes:
    values = codes.dots(encoder, seen) + b_enc[codes.latents]
    return codes.with_values(values.relu() if rectified else values)


def _through(sae: SAE, codes: Codes, x: Tensor, b_enc: Tensor, rectified: bool = True) -> tuple[Tensor, Tensor]:
    if sae.config.kron is None:
        return autoencode(codes, x, sae.encoder, b_enc, sae.b_in, sae.W_dec, rectified=rectified)
    heads, m, n = sae.config.kron
    pre = F.linear(x if sae.b_in is None else x - sae.b_in, sae.encoder, b_enc)
    head, i, j = codes.latents // (m * n), codes.latents // n % m, codes.latents % n
    token = codes.rows % len(x)
    values = activations.mand(pre[token, head * m + i], pre[token, heads * m + head * n + j])
    return values, decode(codes, values, sae.W_dec)


def _biased(sae: SAE, decoded: Tensor, x: Tensor) -> Tensor:
    out = decoded + sae.b_dec
    return out + F.linear(x, sae.W_skip) if sae.config.skip else out


def _relative(guess: Tensor, error: Tensor, y: Tensor) -> Tensor:
    """Mean over tokens of |guess - error|^2, over what there is to explain, times the targets' variance."""
    left = (error - error.mean(0)).square().sum()
    variance = (y - y.mean(0)).square().sum() / len(y)
    return variance * (guess - error).square().sum() / left.clamp_min(torch.finfo(left.dtype).tiny)


def _dense(sae: SAE, x: Tensor, y: Tensor, dead, sparsity: float) -> Outcome:
    config = sae.config
    seen = x if sae.b_in is None else x - sae.b_in
    norms = 1.0 if config.unit_decoder else sae.W_dec.norm(dim=1)
    weight = sparsity * config.sparsity
    if config.architecture == "gated":
        gate = F.linear(seen, sae.encoder, sae.b_gate)
        f = (gate > 0) * sae.magnitudes(gate).relu()
        strength = gate.relu()
        decoder, bias = (
            (sae.W_dec.detach(), sae.b_dec.detach()) if config.detach_gate_decoder else (sae.W_dec, sae.b_dec)
        )
        through_gate = strength @ decoder + bias
        if config.skip:
            through_gate = through_gate + F.linear(x, sae.W_skip.detach() if config.detach_gate_decoder else sae.W_skip)
        extra = weight * (strength * norms).sum(1).mean() + (y - through_gate).square().sum(1).mean()
    else:
        z = F.linear(seen, sae.encoder, sae.b_enc)
        if config.architecture == "jumprelu":
            threshold = sae.threshold.to(z.dtype)
            f = activations.jump_relu(z, threshold, config.bandwidth)
            l0 = activations.fires(z, threshold, config.bandwidth).sum(1)
            if config.target_l0 is None:
                extra = weight * l0.mean()
            else:
                extra = weight * (2 / config.target_l0) * (l0.mean() - config.target_l0).square()
            if dead is not None and len(dead):  # nothing else reaches a latent that never fires
                extra = extra + config.aux_weight * (threshold - z)[:, dead].relu().sum(1).mean()
        else:
            f = z.relu()
            extra = weight * (f * norms).sum(1).mean()
    error = y - _biased(sae, f @ sae.W_dec, x)
    loss = error.square().sum(1).mean() + extra
    there = f.detach() != 0
    return Outcome(loss, there.any(0), there.sum() / len(x), error.detach())
