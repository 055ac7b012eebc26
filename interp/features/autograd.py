"""A dictionary's forward and backward pass through sparse codes: no product over latents that do not fire.

With the places of a code chosen (see `interp.features.activations`), an autoencoder is linear around them:

    f_ti = <x_t - b_in, e_i> + b_i     xhat_t = sum_i f_ti w_i     for the entries (t, i) only

so that with g = dL/dxhat the gradients are df_ti = <g_t, w_i> (plus what other losses say of f), dW_i = sum_t f_ti g_t and
dE_i = sum_t df_ti (x_t - b_in): the two weights' in one pass over the entries sorted by latent. b_in's needs no more than the
sum of df over tokens: db_in = -sum_i (sum_t df_ti) e_i. All equal autograd's through the dense code.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from interp.features.codes import Codes


class _Autoencode(Function):
    """(values, decoded) of codes whose values are `codes.values`, as linear functions of x, the encoder and the decoder.

    With a target, (values, target - decoded - bias)."""

    @staticmethod
    def forward(
        ctx: Any, codes: Codes, live: Tensor | None, x: Tensor, encoder: Tensor, b_enc: Tensor, b_in: Tensor | None,
        decoder: Tensor, bias: Tensor | None, target: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.codes, ctx.live, ctx.sign = codes, live, 1 if target is None else -1
        ctx.save_for_backward(x, encoder, b_in, decoder)
        return codes.values.clone(), codes.decode(decoder, bias=bias, target=target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_values: Tensor, g: Tensor):
        codes: Codes = ctx.codes
        x, encoder, b_in, decoder = ctx.saved_tensors
        g = g if ctx.sign > 0 else -g
        d_bias = g.sum(0) if ctx.needs_input_grad[7] else None
        slope = codes.dots(decoder, g) + g_values
        if ctx.live is not None:
            slope = slope * ctx.live
        sums = torch.zeros(codes.n_latents, dtype=slope.dtype, device=slope.device).index_add_(0, codes.latents, slope)
        seen = x if b_in is None else x - b_in
        if len(codes) != len(x):  # (level, token) rows: each level sees the same tokens
            seen = seen.repeat(len(codes) // len(x), 1)
        d_decoder, d_encoder = codes.outer([codes.values, slope], [g, seen])
        d_b_in = None if b_in is None else -(sums @ encoder)
        return None, None, None, d_encoder, sums, d_b_in, d_decoder, d_bias, None


class _Decode(Function):
    """sum_i f_i w_i of codes whose values are given by other means."""

    @staticmethod
    def forward(ctx: Any, codes: Codes, values: Tensor, decoder: Tensor) -> Tensor:
        ctx.codes = codes.with_values(values)
        ctx.save_for_backward(decoder)
        return ctx.codes.decode(decoder)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        (decoder,) = ctx.saved_tensors
        codes: Codes = ctx.codes
        return None, codes.dots(decoder, g), codes.outer([codes.values], [g])[0]


def autoencode(
    codes: Codes, x: Float[Tensor, "token d_in"], encoder: Float[Tensor, "latent d_in"], b_enc: Float[Tensor, " latent"],
    b_in: Float[Tensor, " d_in"] | None, decoder: Float[Tensor, "latent d_out"], *, rectified: bool = True,
    bias: Float[Tensor, " d_out"] | None = None, target: Float[Tensor, "row d_out"] | None = None,
) -> tuple[Float[Tensor, " entry"], Float[Tensor, "row d_out"]]:  # fmt: skip
    """(values, decoded + bias) of codes chosen from z = (x - b_in) encoder^T + b_enc, whose values they hold.

    With a target, (values, target - decoded - bias), in one pass. Differentiable in encoder, b_enc, b_in, decoder and bias; x and
    target are data. rectified: values are ReLU(z), so that those at 0 pass
    nothing on. Codes with several rows a token (`Codes.split`) decode each by itself.
    """
    live = (codes.values > 0) if rectified else None
    return _Autoencode.apply(codes, live, x, encoder, b_enc, b_in, decoder, bias, target)


def decode(
    codes: Codes, values: Float[Tensor, " entry"], decoder: Float[Tensor, "latent d_out"]
) -> Float[Tensor, "row d_out"]:
    """sum_i f_i w_i without b_dec, at the codes' places; differentiable in values and decoder."""
    return _Decode.apply(codes, values, decoder)
