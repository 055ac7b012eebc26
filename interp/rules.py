"""How a backward pass treats each non-linearity.

A transformer is linear except in a few places: norms divide by a scale that depends on the input, the MLP applies an
activation and, if gated, a product, attention multiplies queries with keys, applies a softmax and multiplies patterns
with values, and some models cap scores or logits. Each of those places calls one method of a `Rules` object.
`Rules()` itself is the plain gradient: autograd decides. A subclass changes what flows *back* through a place and must
leave the forward value bit-identical.

    model(tokens)                      # plain gradient
    model(tokens, rules=MyRules())     # same logits, another backward pass
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """The plain gradient. Immutable; a rule set is passed to a forward pass and nothing needs undoing afterwards."""

    name: str = "gradient"

    def norm(self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d"]:
        """x / scale, with x already centred if the norm is a LayerNorm; scale was computed from x."""
        return x / scale

    def activation(self, x: Float[Tensor, "..."], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "..."]:
        """The MLP's elementwise function."""
        return function(x)

    def product(self, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Gate times up, in gated MLPs."""
        return a * b

    def scores(
        self, q: Float[Tensor, "... query d_head"], k: Float[Tensor, "... key d_head"]
    ) -> Float[Tensor, "... query key"]:
        """Query-key products, unscaled."""
        return q @ k.transpose(-1, -2)

    def softmax(self, scores: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
        """Attention pattern of masked scores."""
        return scores.softmax(dim=-1)

    def mix(
        self, pattern: Float[Tensor, "... query key"], v: Float[Tensor, "... key d_head"]
    ) -> Float[Tensor, "... query d_head"]:
        """Pattern times values."""
        return pattern @ v

    def soft_cap(self, x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
        """cap * tanh(x / cap), of attention scores or logits."""
        return cap * torch.tanh(x / cap)


GRADIENT = Rules()
