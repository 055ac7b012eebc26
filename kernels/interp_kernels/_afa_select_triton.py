"""`afa_select` on a GPU: one program per row halves towards the cut; when all counts are known, another compacts."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import at_least_float32
from interp_kernels._row_top_k_triton import TILE, compact, float_of, halfway, layout, tile_of


@triton.jit(do_not_specialize=["k_max"])
@no_type_check
def _afa_cut(
    energy_ptr,
    target_ptr,
    cut_ptr,
    over_ptr,
    n_level_ptr,
    offsets_ptr,
    energy_row,
    n_columns,
    k_max,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    KEY: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    energy_ptr += row * energy_row
    column = tl.arange(0, TILE)
    first = tile_of(energy_ptr, column, n_columns, WIDE)
    target = tl.maximum(tl.load(target_ptr + row).to(WIDE), 0.0)
    square = target * target

    # The entries not below `low` are enough: there are some, and they reach the target or k_max. Those not below `high`
    # are not. The first step looks at all positive entries; where even they are not enough, it is the last.
    low, high, middle = tl.full((), 0, KEY), tl.full((), INFINITY + 1, KEY), tl.full((), 1, KEY)
    n_low, n_high = tl.full((), 0, tl.int32) + n_columns, tl.full((), 0, tl.int32)
    sum_high = tl.full((), 0.0, WIDE)
    while (n_low - n_high > 1) & (high > low + 1):
        least = float_of(middle, FLOAT, BITS, MAGNITUDE, WIDE)
        count, energy = (first >= least).to(tl.int32), tl.where(first >= least, first, 0.0)
        if not WHOLE:
            for start in range(TILE, n_columns, TILE):
                x = tile_of(energy_ptr, start + column, n_columns, WIDE)
                count += (x >= least).to(tl.int32)
                energy += tl.where(x >= least, x, 0.0)
        n, total = tl.sum(count, 0), tl.sum(energy, 0)
        enough = ((total >= square) | (n >= k_max)) & (n > 0)
        low, n_low = tl.where(enough, middle, low), tl.where(enough, n, n_low)
        high, n_high = tl.where(enough, high, middle), tl.where(enough, n_high, n)
        sum_high = tl.where(enough, sum_high, total)
        middle = halfway(low, high)

    # Those from `low` to `high` are equal now, to `cut`; or there is none, and `cut` is 0. So many of them reach the
    # target, or one less is nearer. `over` is NaN if `high` still lies beyond +inf, and then no value is over it.
    over = float_of(high, FLOAT, BITS, MAGNITUDE, WIDE)
    below = tl.where(first >= over, 0.0, first)
    if not WHOLE:
        for start in range(TILE, n_columns, TILE):
            x = tile_of(energy_ptr, start + column, n_columns, WIDE)
            below = tl.maximum(below, tl.where(x >= over, 0.0, x))
    cut = tl.maximum(tl.max(below, 0), 0.0)
    room = tl.where(cut > 0, tl.minimum(n_low, k_max) - n_high, 0)
    each = tl.where(cut > 0, cut, 1.0).to(tl.float64)
    target, sum_high = target.to(tl.float64), sum_high.to(tl.float64)
    wanted = tl.ceil((square.to(tl.float64) - sum_high) / each)
    wanted = tl.maximum(tl.minimum(wanted, room + 1.0), 1.0).to(tl.int32)
    with_it = tl.sqrt(sum_high + wanted * each)
    without = tl.sqrt(sum_high + (wanted - 1) * each)
    one_less = (wanted <= room) & (n_high + wanted > 1) & (target - without <= with_it - target)
    n_level = tl.where(one_less, wanted - 1, tl.minimum(wanted, room))
    tl.store(cut_ptr + row, cut)
    tl.store(over_ptr + row, over)
    tl.store(n_level_ptr + row, n_level)
    tl.store(offsets_ptr + row + 1, n_high + n_level)  # a count, until all are summed up


@triton.jit
@no_type_check
def _afa_compact(
    energy_ptr,
    cut_ptr,
    over_ptr,
    n_level_ptr,
    offsets_ptr,
    columns_ptr,
    energy_row,
    n_columns,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cut, over, n_level = tl.load(cut_ptr + row), tl.load(over_ptr + row), tl.load(n_level_ptr + row)
    columns_ptr += tl.load(offsets_ptr + row)
    compact(energy_ptr + row * energy_row, None, columns_ptr, n_columns, cut, over, n_level, WIDE, TILE)


def launch(
    energy: Float[Tensor, "row column"], target: Float[Tensor, " row"], k_max: int | None
) -> tuple[Int[Tensor, " row_plus_1"], Int[Tensor, " entry"]]:
    """Run the kernels; arguments as `afa_select` has checked them."""
    n_rows, n_columns = energy.shape
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=energy.device)
    if energy.numel() == 0:
        return offsets, offsets[:0]
    energy = energy if energy.stride(1) == 1 else energy.contiguous()
    size, options = (energy.stride(0), n_columns), layout(energy)
    cut, over = torch.empty(2, n_rows, dtype=at_least_float32(energy.dtype), device=energy.device)
    n_level = torch.empty(n_rows, dtype=torch.int32, device=energy.device)
    with torch.cuda.device_of(energy):
        _afa_cut[(n_rows,)](
            energy, target.contiguous(), cut, over, n_level, offsets, *size,
            n_columns if k_max is None else min(k_max, n_columns), **options, enable_fp_fusion=True,
        )  # fmt: skip
        offsets.cumsum_(0)
        columns = torch.empty(int(offsets[-1]), dtype=torch.int64, device=energy.device)
        _afa_compact[(n_rows,)](
            energy, cut, over, n_level, offsets, columns, *size,
            WIDE=options["WIDE"], TILE=min(TILE, options["TILE"]), num_warps=options["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
    return offsets, columns
