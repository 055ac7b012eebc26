"""Elementwise work in pieces that stay in a CPU's caches.

An elementwise formula of twenty steps on a large tensor reads and writes main memory twenty times, and fresh memory at that.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 1 << 16  # numbers: 256 KiB in float32


def in_blocks(function: Callable[..., Tensor], *tensors: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """An elementwise function of tensors of one shape, in the first one's dtype; in one piece unless on a CPU."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= BLOCK:
        return function(*tensors)
    flat, result = [t.reshape(-1) for t in tensors], torch.empty(first.numel(), dtype=first.dtype)
    for start in range(0, len(result), BLOCK):
        piece = slice(start, start + BLOCK)
        result[piece] = function(*(t[piece] for t in flat))
    return result.view(first.shape)
