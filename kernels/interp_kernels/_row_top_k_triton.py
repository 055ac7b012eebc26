"""`row_top_k` on a GPU: one program per row halves towards the k-th largest value, then compacts what is not below it.

What is halved is an integer key that orders as the floats do: a positive float orders as its bits, and a negative one
backwards, so that its bits but the sign are turned. Only the bound is a key; values are compared with it as floats.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import at_least_float32

WHOLE = 16_384  # columns of the longest row that stays in registers, 32 values a thread
TILE = 4096  # columns that longer rows are read by, in every step
COMPACT = 2048  # columns written at a time: few, so that two programs of 16 warps share a multiprocessor's registers


@triton.jit
@no_type_check
def tile_of(x_ptr, column, n_columns, WIDE: tl.constexpr):
    """Values of these columns; NaN is +inf, and what is no column -inf."""
    x = tl.load(x_ptr + column, mask=column < n_columns, other=float("-inf")).to(WIDE)
    return tl.where(x != x, float("inf"), x)


@triton.jit
@no_type_check
def float_of(key, FLOAT: tl.constexpr, BITS: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr):
    """The float with this key. INFINITY is the key of +inf, and -INFINITY - 1 that of -inf."""
    bits = tl.where(key < 0, key ^ MAGNITUDE, key)
    return bits.to(BITS).to(FLOAT, bitcast=True).to(WIDE)


@triton.jit
@no_type_check
def halfway(low, high):
    """floor((low + high) / 2), for sums that would overflow too."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
@no_type_check
def compact(
    x_ptr, values_ptr, columns_ptr, n_columns, low, high, n_level, WIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write, in ascending order, the columns of values from `high` on, and of the first n_level from `low` to `high`."""
    n_kept, n_seen = 0, 0
    for start in range(0, n_columns, TILE):
        column = start + tl.arange(0, TILE)
        x = tile_of(x_ptr, column, n_columns, WIDE)
        above = x >= high
        level = (x >= low) & (column < n_columns) & (above == 0)
        rank = n_seen + tl.cumsum(level.to(tl.int32), 0)
        kept = above | (level & (rank <= n_level))
        place = n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(columns_ptr + place, column, mask=kept)
        if values_ptr is not None:
            tl.store(values_ptr + place, tl.load(x_ptr + column, mask=kept), mask=kept)
        n_kept += tl.sum(kept.to(tl.int32), 0)
        n_seen += tl.sum(level.to(tl.int32), 0)


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _row_top_k(
    x_ptr,
    values_ptr,
    columns_ptr,
    x_row,
    n_columns,
    k,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    KEY: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    COMPACT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    column = tl.arange(0, TILE)
    first = tile_of(x_ptr, column, n_columns, WIDE)
    # Throughout, at least k values are not below `low`, and fewer than k not below `high`; first -inf and beyond +inf.
    low, high = tl.full((), -INFINITY - 1, KEY), tl.full((), INFINITY + 1, KEY)
    n_low, n_high = tl.full((), 0, tl.int32) + n_columns, tl.full((), 0, tl.int32)
    while (n_low != k) & (high > low + 1):
        middle = halfway(low, high)
        least = float_of(middle, FLOAT, BITS, MAGNITUDE, WIDE)
        count = (first >= least).to(tl.int32)
        if not WHOLE:
            for start in range(TILE, n_columns, TILE):
                count += (tile_of(x_ptr, start + column, n_columns, WIDE) >= least).to(tl.int32)
        n = tl.sum(count, 0)
        enough = n >= k
        low, n_low = tl.where(enough, middle, low), tl.where(enough, n, n_low)
        high, n_high = tl.where(enough, high, middle), tl.where(enough, n_high, n)
    # Either all from `low` on are the k, or all from `low` to `high` are equal, and the first of them fill up to k.
    compact(
        x_ptr, values_ptr + row * k, columns_ptr + row * k, n_columns,
        float_of(low, FLOAT, BITS, MAGNITUDE, WIDE), float_of(high, FLOAT, BITS, MAGNITUDE, WIDE), k - n_high,
        WIDE, COMPACT,
    )  # fmt: skip


class Layout(NamedTuple):
    """How a float dtype is read."""

    float: tl.dtype
    bits: tl.dtype  # an integer as wide
    infinity: int  # the bits of +inf


LAYOUTS = {
    torch.float16: Layout(tl.float16, tl.int16, 0x7C00),
    torch.bfloat16: Layout(tl.bfloat16, tl.int16, 0x7F80),
    torch.float32: Layout(tl.float32, tl.int32, 0x7F80_0000),
    torch.float64: Layout(tl.float64, tl.int64, 0x7FF0 << 48),
}


def layout(x: Float[Tensor, "row column"]) -> dict:
    """Of a kernel that searches: how it reads x's dtype, how many columns it takes at a time, and by how many warps."""
    own, wide = LAYOUTS[x.dtype], at_least_float32(x.dtype)
    whole = x.shape[1] <= WHOLE
    tile = triton.next_power_of_2(x.shape[1]) if whole else TILE
    return {
        "FLOAT": own.float, "BITS": own.bits, "INFINITY": own.infinity, "MAGNITUDE": (1 << (8 * x.itemsize - 1)) - 1,
        "KEY": tl.int64 if x.itemsize == 8 else tl.int32, "WIDE": LAYOUTS[wide].float,
        "TILE": tile, "WHOLE": whole, "num_warps": max(1, min(16, tile // 256)),
    }  # fmt: skip


def launch(x: Float[Tensor, "row column"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Run the kernel; arguments as `row_top_k` has checked them."""
    values = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    columns = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return values, columns
    x = x if x.stride(1) == 1 else x.contiguous()
    options = layout(x)
    with torch.cuda.device_of(x):
        _row_top_k[(len(x),)](
            x, values, columns, x.stride(0), x.shape[1], k, **options, COMPACT=min(COMPACT, options["TILE"]),
            enable_fp_fusion=True,
        )  # fmt: skip
    return values, columns
