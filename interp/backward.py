"""The backward steps that autograd does not know: each returns the ordinary value, bit for bit, and its own slope.

Names: g is the score that arrives at the output, `other` the same tensor in the other of two runs. Ratios and slopes are
formed in float32 at least and returned in the dtype of what they flow into.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from interp import secants
from interp.blocks import in_blocks
from interp.precision import at_least_float32

Values = Float[Tensor, "..."]


def _to_shape_of(x: Tensor, gradient: Tensor) -> Tensor:
    """Summed over the axes along which x was broadcast, in its dtype."""
    return gradient.sum_to_size(x.shape).to(x.dtype)


class _Half(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


class _Elementwise(Function):
    """y = f(x); the slope is a function of x, and of its other value if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable, slope: Callable, *other: Tensor) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(x, *other)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        def times_slope(g: Tensor, *points: Tensor) -> Tensor:
            return (g * ctx.slope(*(at_least_float32(x) for x in points))).to(g.dtype)

        points = ctx.saved_tensors
        return in_blocks(times_slope, g, *points), None, None, *(None for _ in points[1:])


class _SecantNorm(Function):
    """y = x / scale with scale = sqrt(mean(x^2) + eps).

    From x = y scale: dx = scale_mid dy + y_mid dscale, and dscale = x_mid . dx / (d scale_mid). Splitting x / scale into x
    times 1 / scale would be as exact, but where the two scales differ much its two terms are large and cancel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, other: Tensor, other_scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, other, other_scale)
        return x / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        x, scale, other, other_scale = ctx.saved_tensors
        y_twice, scale_twice = x / scale + other / other_scale, scale + other_scale
        along = (g * y_twice).sum(-1, keepdim=True) / (x.shape[-1] * scale_twice)
        return (2 * g - (x + other) * along) / scale_twice, None, None, None


class _SecantProduct(Function):
    """a * b: the midpoint of each factor is the other's slope (the Shapley split of a product)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, other_a, other_b)
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        a, b, other_a, other_b = ctx.saved_tensors
        g = g / 2
        return g * (b + other_b), g * (a + other_a), None, None


class _SecantMatmul(Function):
    """a @ b, likewise."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, other_a, other_b)
        return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        a, b, other_a, other_b = ctx.saved_tensors
        g = g / 2
        to_a = g @ (b + other_b).transpose(-1, -2) if ctx.needs_input_grad[0] else None
        to_b = (a + other_a).transpose(-1, -2) @ g if ctx.needs_input_grad[1] else None
        return (
            None if to_a is None else _to_shape_of(a, to_a),
            None if to_b is None else _to_shape_of(b, to_b),
            None,
            None,
        )


class _SecantSoftmax(Function):
    """p = softmax(x), from dp = L (dx - dlogZ) with L of `secants.probability_mean` and dlogZ = sum(L dx) / sum(L):
    softmax's own Jacobian with L in the place of p. What is masked is -inf in both runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(x, other)
        return x.softmax(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        mean = secants.probability_mean(*ctx.saved_tensors)
        along = (mean * g).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)
        return mean * (g - along), None


class _WarmSoftmax(Function):
    """softmax(x), with the backward step of softmax(x / temperature) and no factor of 1 / temperature (GIM)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        p = (ctx.saved_tensors[0] / ctx.temperature).softmax(-1)
        return p * (g - (p * g).sum(-1, keepdim=True)), None


def half(x: Values) -> Values:
    """x; half of what arrives flows on."""
    return _Half.apply(x)


def elementwise(x: Values, function: Callable[..., Values], slope: Callable[..., Values], *other: Values) -> Values:
    """function(x); g * slope(x) flows on, or g * slope(x, other) if there is another run."""
    return _Elementwise.apply(x, function, slope, *other)


def secant_norm(
    x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"], other: Float[Tensor, "... d"], other_scale: Float[Tensor, "... 1"]
) -> Float[Tensor, "... d"]:  # fmt: skip
    """x / scale, where scale is the root mean square of x; all of the slope flows into x and none into `scale`."""
    return _SecantNorm.apply(x, scale.detach(), other, other_scale)


def secant_product(a: Values, b: Values, other_a: Values, other_b: Values) -> Values:
    """a * b, of equal shapes."""
    return _SecantProduct.apply(a, b, other_a, other_b)


def secant_matmul(a: Values, b: Values, other_a: Values, other_b: Values) -> Values:
    """a @ b; leading axes broadcast."""
    return _SecantMatmul.apply(a, b, other_a, other_b)


def secant_softmax(x: Float[Tensor, "... key"], other: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
    """softmax over the last axis."""
    return _SecantSoftmax.apply(x, other)


def warm_softmax(x: Float[Tensor, "... key"], temperature: float) -> Float[Tensor, "... key"]:
    """softmax over the last axis, backwards as if it had been warmer."""
    return _WarmSoftmax.apply(x, temperature)
