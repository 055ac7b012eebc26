"""Activation functions of MLPs, each with what backward rules need to know of it.

Most are x times a gate between 0 and 1: SiLU is x sigmoid(x), GELU is x Phi(x). The gate is then the ratio f(x)/x, exactly
and also at x = 0, and the slope between two points follows from the gate's (`interp.secants`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp import secants

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


def _gated(
    function: Callable[[Values], Values], gate: Callable[[Values], Values], slope: Callable[[Values, Values], Values]
) -> Activation:
    """x gate(x), given the gate and the gate's slope between two points."""
    return Activation(function, gate, lambda a, b: secants.product_slope(slope(a, b), gate(a), gate(b), a, b))


_TWICE = math.sqrt(8 / math.pi)  # tanh-GELU is x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
_QUICK = 1.702


def _gelu_tanh(x: Tensor) -> Tensor:
    # (1 + tanh u) / 2 = sigmoid(2u), which is twice as fast on a CPU as the tanh of F.gelu and keeps more digits in the tail
    slope = torch.addcmul(torch.full((), _TWICE, dtype=x.dtype, device=x.device), x, x, value=0.044715 * _TWICE)
    if torch.is_grad_enabled() and x.requires_grad:
        return x * torch.sigmoid(x * slope)
    return slope.mul_(x).sigmoid_().mul_(x)  # the same, without three more tensors


def _twice_u(x: Tensor) -> Tensor:
    return _TWICE * (x + 0.044715 * x * x * x)


def _gelu_tanh_gate_slope(a: Tensor, b: Tensor) -> Tensor:
    inner = _TWICE * (1 + 0.044715 * (a * a + a * b + b * b))  # of 2u, which is a polynomial
    return secants.sigmoid_slope(_twice_u(a), _twice_u(b)) * inner


_GELU_TANH = _gated(_gelu_tanh, lambda x: torch.sigmoid(_twice_u(x)), _gelu_tanh_gate_slope)
_SILU = _gated(F.silu, torch.sigmoid, secants.sigmoid_slope)

# Names as configuration files spell them. Several spellings of tanh-GELU differ only in how it is computed.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gated(F.gelu, torch.special.ndtr, secants.normal_cdf_slope),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": _gated(
        lambda x: x * torch.sigmoid(_QUICK * x),
        lambda x: torch.sigmoid(_QUICK * x),
        lambda a, b: _QUICK * secants.sigmoid_slope(_QUICK * a, _QUICK * b),
    ),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype), secants.relu_slope),
    "relu2": Activation(lambda x: F.relu(x).square(), F.relu, secants.relu_squared_slope),
    "silu": _SILU,
    "swish": _SILU,
    "tanh": Activation(torch.tanh, lambda x: torch.where(x == 0, 1.0, torch.tanh(x) / x), secants.tanh_slope),
}
