"""Activation functions of MLPs, each with what backward rules need to know of it.

Most are x times a gate between 0 and 1: SiLU is x sigmoid(x), GELU is x Phi(x). The gate is then the ratio f(x)/x, exactly
and also at x = 0, and the slope between two points follows from the gate's (`interp.secants`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from interp import secants
from interp.blocks import in_blocks

Values = Float[Tensor, "..."]


@dataclass(frozen=True)
class Activation:
    """f, called as a function; `ratio` is f(x)/x with its limit at 0, `slope` is (f(a) - f(b)) / (a - b) in closed form.

    A function without ratio or slope can be computed but not explained by the rules that need them.
    """

    function: Callable[[Values], Values]
    ratio: Callable[[Values], Values] | None = None
    slope: Callable[[Values, Values], Values] | None = None

    def __call__(self, x: Values) -> Values:
        return self.function(x)


_TWICE = math.sqrt(8 / math.pi)  # tanh-GELU is x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
_QUICK = 1.702


class _GeluTanh(Function):
    """(1 + tanh u) / 2 = sigmoid(2u), which is twice as fast on a CPU as the tanh of F.gelu and keeps more digits in the tail."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _twice_u(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return in_blocks(_gelu_tanh_backward, g, *ctx.saved_tensors)


def _gelu_tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    gate = _twice_u(x).sigmoid()
    inner = _TWICE + (3 * 0.044715 * _TWICE) * (x * x)
    return g * (gate + x * gate * (1 - gate) * inner)


def _twice_u(x: Tensor) -> Tensor:
    slope = torch.addcmul(torch.full((), _TWICE, dtype=x.dtype, device=x.device), x, x, value=0.044715 * _TWICE)
    return slope * x if torch.is_grad_enabled() else slope.mul_(x)


def _gelu_tanh_slope(a: Tensor, b: Tensor) -> Tensor:
    inner = (a + b).square_().sub_(a * b).mul_(0.044715 * _TWICE).add_(_TWICE)  # of 2u, a polynomial
    return secants.swish_slope(a, b, _twice_u(a), _twice_u(b), inner)


def _gelu_slope(a: Tensor, b: Tensor) -> Tensor:
    phi = torch.special.ndtr
    return secants.product_slope(secants.normal_cdf_slope(a, b), phi(a), phi(b), a, b)


_GELU_TANH = Activation(_GeluTanh.apply, lambda x: torch.sigmoid(_twice_u(x)), _gelu_tanh_slope)
_SILU = Activation(F.silu, torch.sigmoid, lambda a, b: secants.swish_slope(a, b, a, b, 1.0))

# Names as configuration files spell them. Several spellings of tanh-GELU differ only in how it is computed.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.special.ndtr, _gelu_slope),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": Activation(
        lambda x: x * torch.sigmoid(_QUICK * x),
        lambda x: torch.sigmoid(_QUICK * x),
        lambda a, b: secants.swish_slope(a, b, _QUICK * a, _QUICK * b, _QUICK),
    ),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype), secants.relu_slope),
    "relu2": Activation(lambda x: F.relu(x).square(), F.relu, secants.relu_squared_slope),
    "silu": _SILU,
    "swish": _SILU,
    "tanh": Activation(torch.tanh, lambda x: torch.where(x == 0, 1.0, torch.tanh(x) / x), secants.tanh_slope),
}
