"""`weight_gradients` on a GPU: a program per latent and tile of columns, and no latent longer than the rest.

Latents fire at very different rates, and a program that walked a whole long segment would still run when all others have
ended. So the sorted entries are cut at every multiple of CHUNK, and a chunk that lies within one segment is summed by a
program of its own. A latent then adds what is left of its segment before its first whole chunk and behind its last, less
than CHUNK entries each, and the sums of the chunks between, in their order: 16,384 entries cost it 128 + 256 additions at
most. Where the cuts lie depends on positions alone, so nothing is counted on the host and sums do not vary.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._sparse_decode_triton import with_rows
from interp_kernels.sparse_decode import wide_dtype

CHUNK = 128


@triton.jit
@no_type_check
def _add_entries(
    sums_0,
    sums_1,
    low,
    high,
    d,
    order_ptr,
    entry_rows_ptr,
    coefficients_0_ptr,
    coefficients_1_ptr,
    rows_0_ptr,
    rows_1_ptr,
    rows_0_row,
    rows_1_row,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add sorted entries low to high to the running sums of both pairs."""
    for start in range(low, high, ENTRIES):
        position = start + tl.arange(0, ENTRIES)
        there = position < high
        entry = tl.load(order_ptr + position, mask=there, other=0)
        row = tl.load(entry_rows_ptr + entry, mask=there, other=0).to(tl.int64)
        c = tl.load(coefficients_0_ptr + entry, mask=there, other=0.0).to(WIDE)
        at = rows_0_ptr + row[:, None] * rows_0_row + d[None, :]
        sums_0 += c[:, None] * tl.load(at, mask=there[:, None] & (d < D_0)[None, :], other=0.0).to(WIDE)
        if rows_1_ptr is not None:
            c = tl.load(coefficients_1_ptr + entry, mask=there, other=0.0).to(WIDE)
            at = rows_1_ptr + row[:, None] * rows_1_row + d[None, :]
            sums_1 += c[:, None] * tl.load(at, mask=there[:, None] & (d < D_1)[None, :], other=0.0).to(WIDE)
    return sums_0, sums_1


@triton.jit
@no_type_check
def _sum_chunks(
    order_ptr,
    ends_ptr,
    entry_rows_ptr,
    coefficients_0_ptr,
    coefficients_1_ptr,
    rows_0_ptr,
    rows_1_ptr,
    chunks_0_ptr,
    chunks_1_ptr,
    rows_0_row,
    rows_1_row,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = chunk * CHUNK
    high = low + CHUNK
    if tl.load(ends_ptr + chunk) >= high:
        zeros = tl.zeros((ENTRIES, BLOCK_D), WIDE)
        sums_0, sums_1 = _add_entries(
            zeros, zeros, low, high, d, order_ptr, entry_rows_ptr, coefficients_0_ptr, coefficients_1_ptr,
            rows_0_ptr, rows_1_ptr, rows_0_row, rows_1_row, D_0, D_1, WIDE, ENTRIES,
        )  # fmt: skip
        tl.store(chunks_0_ptr + chunk * D_0 + d, tl.sum(sums_0, 0), mask=d < D_0)
        if rows_1_ptr is not None:
            tl.store(chunks_1_ptr + chunk * D_1 + d, tl.sum(sums_1, 0), mask=d < D_1)


@triton.jit
@no_type_check
def _weight_gradients(
    order_ptr,
    starts_ptr,
    entry_rows_ptr,
    coefficients_0_ptr,
    coefficients_1_ptr,
    rows_0_ptr,
    rows_1_ptr,
    chunks_0_ptr,
    chunks_1_ptr,
    result_0_ptr,
    result_1_ptr,
    rows_0_row,
    rows_1_row,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.load(starts_ptr + latent).to(tl.int64)
    high = tl.load(starts_ptr + latent + 1).to(tl.int64)
    first, last = (low + CHUNK - 1) // CHUNK, high // CHUNK
    head = tl.where(first < last, first * CHUNK, high)
    tail = tl.where(first < last, last * CHUNK, high)
    zeros = tl.zeros((ENTRIES, BLOCK_D), WIDE)
    sums_0, sums_1 = _add_entries(
        zeros, zeros, low, head, d, order_ptr, entry_rows_ptr, coefficients_0_ptr, coefficients_1_ptr,
        rows_0_ptr, rows_1_ptr, rows_0_row, rows_1_row, D_0, D_1, WIDE, ENTRIES,
    )  # fmt: skip
    for start in range(first, last, ENTRIES):
        chunk = start + tl.arange(0, ENTRIES)
        there = (chunk < last)[:, None]
        sums_0 += tl.load(chunks_0_ptr + chunk[:, None] * D_0 + d[None, :], mask=there & (d < D_0)[None, :], other=0.0)
        if rows_1_ptr is not None:
            at = chunks_1_ptr + chunk[:, None] * D_1 + d[None, :]
            sums_1 += tl.load(at, mask=there & (d < D_1)[None, :], other=0.0)
    sums_0, sums_1 = _add_entries(
        sums_0, sums_1, tail, high, d, order_ptr, entry_rows_ptr, coefficients_0_ptr, coefficients_1_ptr,
        rows_0_ptr, rows_1_ptr, rows_0_row, rows_1_row, D_0, D_1, WIDE, ENTRIES,
    )  # fmt: skip
    tl.store(result_0_ptr + latent * D_0 + d, tl.sum(sums_0, 0), mask=d < D_0)
    if rows_1_ptr is not None:
        tl.store(result_1_ptr + latent * D_1 + d, tl.sum(sums_1, 0), mask=d < D_1)


def launch(
    order: Int[Tensor, " entry"],
    starts: Int[Tensor, " latent_plus_1"],
    entry_rows: Int[Tensor, " entry"],
    coefficients: Sequence[Float[Tensor, " entry"]],
    rows: Sequence[Float[Tensor, "row _"]],
) -> tuple[Float[Tensor, "latent _"], ...]:
    """Run the kernels; arguments as `weight_gradients` has checked them."""
    wide, n_latents, n_chunks = wide_dtype(*coefficients, *rows), len(starts) - 1, len(order) // CHUNK
    like = {"dtype": wide, "device": order.device}
    results = tuple(torch.empty(n_latents, x.shape[1], **like) for x in rows)
    chunks = [torch.empty(n_chunks, x.shape[1], **like) for x in rows]
    widest = max(x.shape[1] for x in rows)
    if n_latents == 0 or widest == 0:
        return results
    rows = [with_rows(x) for x in rows]
    strides, widths = _two([x.stride(0) for x in rows], 0), _two([x.shape[1] for x in rows], 0)
    block_d = min(256, triton.next_power_of_2(widest))
    n_tiles = triton.cdiv(widest, block_d)
    order, starts = order.contiguous(), starts.contiguous()
    coefficients = [c.contiguous() for c in coefficients]
    pointers = (entry_rows.contiguous(), *_two(coefficients, None), *_two(rows, None), *_two(chunks, None))
    options = {
        "D_0": widths[0], "D_1": widths[1], "WIDE": tl.float64 if wide == torch.float64 else tl.float32, "CHUNK": CHUNK,
        "ENTRIES": 4 if wide == torch.float64 else 8, "BLOCK_D": block_d, "num_warps": max(1, block_d // 128),
        "enable_fp_fusion": True,
    }  # fmt: skip
    with torch.cuda.device_of(order):
        if n_chunks > 0:
            # The end of the segment that a chunk's first entry is in: the chunk is whole if that is not before its own.
            begin = torch.arange(n_chunks, dtype=starts.dtype, device=order.device) * CHUNK
            ends = starts[torch.searchsorted(starts, begin, right=True)]
            _sum_chunks[(n_chunks, n_tiles)](order, ends, *pointers, *strides, **options)
        _weight_gradients[(n_latents, n_tiles)](order, starts, *pointers, *_two(results, None), *strides, **options)
    return results


def _two(items: Sequence, missing: int | None) -> tuple:
    """What one or two pairs have, with something that says so where the second would be."""
    return (*items, missing)[:2]
