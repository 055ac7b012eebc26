"""Norms folded into the weights beside them, up to the scale that differs from token to token.

With g a norm's weight (its gain) and C the subtraction of a vector's mean over its own entries where the norm centres
(LayerNorm, not RMSNorm), a norm makes g * C(x) / scale of the stream x. So a weight row w behind it reads C(g * w) . x /
scale, and a direction d written before it comes out as g * C(d) / scale. Biases are left out: they are the same on every
token.
"""

from jaxtyping import Float
from torch import Tensor

from interp.model.transformer import Norm
from interp.precision import at_least_float32


def gain(norm: Norm) -> Float[Tensor, " d"] | None:
    """What the norm multiplies each channel by, in float32 at least; None where it has no weight."""
    return None if norm.w is None else at_least_float32(1 + norm.w if norm.offset else norm.w)


def centred(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """C: each row less its mean."""
    return rows - rows.mean(1, keepdim=True)


def reads(norm: Norm | None, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The directions of the stream that weight rows behind a norm (or none) read: C(g * w), in float32 at least."""
    rows = at_least_float32(rows)
    if norm is None:
        return rows
    g = gain(norm)
    rows = rows if g is None else rows * g
    return centred(rows) if norm.centred else rows


def behind(norm: Norm | None, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """What a norm (or none) makes of directions written before it: g * C(d), in float32 at least."""
    rows = at_least_float32(rows)
    if norm is None:
        return rows
    rows = centred(rows) if norm.centred else rows
    g = gain(norm)
    return rows if g is None else rows * g
