"""`sparse_decode` and `sparse_dots` on a GPU: rows of the dictionary are read several at a time, and never written out.

Both keep one running sum per entry of the group under way, [entry, column], and add across it once, at the end: loads of
a whole group are in flight together, and no two threads wait for each other between groups.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels.sparse_decode import wide_dtype

ENTRIES = 8  # rows of the dictionary under way at a time


def with_rows(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """x, copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
@no_type_check
def _sparse_decode(
    values_ptr,
    latents_ptr,
    offsets_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    result_ptr,
    weight_row,
    target_row,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    low, high = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    sums = tl.zeros((ENTRIES, BLOCK_D), WIDE)
    for start in range(low, high, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        there = entry < high
        latent = tl.load(latents_ptr + entry, mask=there, other=0).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=there, other=0.0).to(WIDE)
        at = weight_ptr + latent[:, None] * weight_row + d[None, :]
        sums += value[:, None] * tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(WIDE)
    result = tl.sum(sums, 0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + d, mask=inside, other=0.0).to(WIDE)
    if target_ptr is not None:
        result = tl.load(target_ptr + row * target_row + d, mask=inside, other=0.0).to(WIDE) - result
    tl.store(result_ptr + row * D + d, result, mask=inside)


@triton.jit
@no_type_check
def _sparse_dots(
    latents_ptr,
    offsets_ptr,
    weight_ptr,
    rows_ptr,
    result_ptr,
    weight_row,
    rows_row,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for start in range(low, high, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        there = entry < high
        latent = tl.load(latents_ptr + entry, mask=there, other=0).to(tl.int64)
        products = tl.zeros((ENTRIES, BLOCK_D), WIDE)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = d < D
            x = tl.load(rows_ptr + row * rows_row + d, mask=inside, other=0.0).to(WIDE)
            at = weight_ptr + latent[:, None] * weight_row + d[None, :]
            products += x[None, :] * tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(WIDE)
        tl.store(result_ptr + entry, tl.sum(products, 1), mask=there)


def launch_decode(
    values: Float[Tensor, " entry"],
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    bias: Float[Tensor, " d"] | None,
    target: Float[Tensor, "row d"] | None,
) -> Float[Tensor, "row d"]:
    """Run the kernel, one program per row and tile of d; arguments as `sparse_decode` has checked them."""
    wide, n_rows, d = wide_dtype(values, weight, bias, target), len(offsets) - 1, weight.shape[1]
    result = torch.empty(n_rows, d, dtype=wide, device=weight.device)
    if result.numel() == 0:
        return result
    weight, target = with_rows(weight), None if target is None else with_rows(target)
    block_d = min(256, triton.next_power_of_2(d))
    with torch.cuda.device_of(weight):
        # Rows are the fast axis of the grid: the dictionary's slice of one tile stays in L2 until all have read it.
        _sparse_decode[(n_rows, triton.cdiv(d, block_d))](
            values.contiguous(), latents.contiguous(), offsets.contiguous(), weight,
            None if bias is None else bias.contiguous(), target, result,
            weight.stride(0), 0 if target is None else target.stride(0),
            D=d, WIDE=tl.float64 if wide == torch.float64 else tl.float32, ENTRIES=ENTRIES, BLOCK_D=block_d,
            num_warps=max(1, block_d // 128), enable_fp_fusion=True,
        )  # fmt: skip
    return result


def launch_dots(
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    rows: Float[Tensor, "row d"],
) -> Float[Tensor, " entry"]:
    """Run the kernel, one program per row; arguments as `sparse_dots` has checked them."""
    wide, d = wide_dtype(weight, rows), weight.shape[1]
    result = torch.empty(len(latents), dtype=wide, device=weight.device)
    if len(latents) == 0 or len(rows) == 0:
        return result
    weight, rows = with_rows(weight), with_rows(rows)
    block_d = min(512, max(16, triton.next_power_of_2(d)))
    with torch.cuda.device_of(weight):
        _sparse_dots[(len(rows),)](
            latents.contiguous(), offsets.contiguous(), weight, rows, result, weight.stride(0), rows.stride(0),
            D=d, WIDE=tl.float64 if wide == torch.float64 else tl.float32, ENTRIES=ENTRIES, BLOCK_D=block_d,
            num_warps=max(1, block_d // 128), enable_fp_fusion=True,
        )  # fmt: skip
    return result
