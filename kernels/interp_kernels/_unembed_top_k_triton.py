"""`unembed_top_k` on a GPU: a program takes a block of rows through tiles of tokens, and keeps their k best by replacement.

Merging by a sort would cost more than the product. Tile n of a row holds k / n of the k best so far: nearly all rows have
none there, and few have more than one. So the best score of every row that beats the worst in its list replaces it, again
and again until no row has one left. Lists are unsorted; torch sorts them at the end, and merges those of programs that
shared the tokens of a row between them.

Scores are compared as integers that order as the floats do, NaN above all. The lists lie in memory, where L2 or nearer has
those in use; registers hold the tile and, of each list, the worst key and its place.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import at_least_float32
from interp_kernels.unembed_top_k import TopTokens

PART = 8  # entries of a list that are looked at together; more would push the tile out of the registers
BEYOND = tl.constexpr(0x7FFF_FFFF)  # no token of a tile


@triton.jit
@no_type_check
def key_of(score, KEY: tl.constexpr, MAGNITUDE: tl.constexpr, NAN: tl.constexpr):
    """The integer that orders as this float does; -0 and 0 have one, and so do all NaN."""
    bits = tl.where(score == 0, 0.0, score).to(KEY, bitcast=True)
    key = tl.where(bits < 0, bits ^ MAGNITUDE, bits)
    return tl.where(score != score, NAN, key)


@triton.jit
@no_type_check
def worst_of(
    active, least, place, keys_ptr, ids_ptr, k, LOWEST: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """The worst key of the lists of active rows, and where it stands; of equal keys, that of the highest token."""
    own = tl.arange(0, active.shape[0]) * PADDED
    least = tl.where(active, -LOWEST - 1, least)
    last = tl.full([active.shape[0]], -1, tl.int32)
    for at in range(0, k, PART):
        inside = at + tl.arange(0, PART)
        keys = tl.load(keys_ptr + own[:, None] + inside[None, :], mask=active[:, None], other=-LOWEST - 1)
        ids = tl.load(ids_ptr + own[:, None] + inside[None, :], mask=active[:, None], other=-1)
        low = tl.min(keys, 1)
        token = tl.max(tl.where(keys == low[:, None], ids, -1), 1)
        here = tl.max(tl.where((keys == low[:, None]) & (ids == token[:, None]), inside[None, :], -1), 1)
        worse = active & ((low < least) | ((low == least) & (token > last)))
        least, last, place = tl.where(worse, low, least), tl.where(worse, token, last), tl.where(worse, here, place)
    return least, place


@triton.jit
@no_type_check
def replace(
    key, column, start, least, place, keys_ptr, ids_ptr, k,
    LOWEST: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Put what is above `least`, each row's worst key, into its list; the new `least`, and its place in the list."""
    own = tl.arange(0, key.shape[0]) * PADDED
    best = tl.max(key, 1)
    token = tl.min(tl.where(key == best[:, None], column[None, :], BEYOND), 1)
    active = best > least
    while tl.max(active.to(tl.int32), 0) > 0:
        tl.store(keys_ptr + own + place, best, mask=active)
        tl.store(ids_ptr + own + place, start + token, mask=active)
        tl.debug_barrier()  # other threads read them next
        least, place = worst_of(active, least, place, keys_ptr, ids_ptr, k, LOWEST, PADDED, PART)
        # What was taken is told by its place in the order, not marked: the tile is needed whole for the other pole.
        left = (key < best[:, None]) | ((key == best[:, None]) & (column[None, :] > token[:, None]))
        best = tl.max(tl.where(left, key, LOWEST), 1)
        token = tl.min(tl.where(left & (key == best[:, None]), column[None, :], BEYOND), 1)
        active = best > least
        tl.debug_barrier()  # all have read before the next is written
    return least, place


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _unembed_top_k(
    x_ptr,
    weight_ptr,
    keys_ptr,
    ids_ptr,
    sums_ptr,
    x_row,
    x_d,
    weight_token,
    weight_d,
    n_rows,
    n_tokens,
    tokens_each,
    d_model,
    k,
    BOTH: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    KEY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    NAN: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    LOWEST: tl.constexpr = -MAGNITUDE - 1  # below the key of -inf
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    column, d = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_D)
    there = row < n_rows
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row

    # Lists are padded to whole blocks of rows, so that only tiles need masks.
    n_padded = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    lists = (split * n_padded + tl.program_id(0) * BLOCK_ROWS) * PADDED
    negated = lists + tl.num_programs(1) * n_padded * PADDED
    least = tl.full([BLOCK_ROWS], LOWEST, KEY)
    below = tl.full([BLOCK_ROWS], LOWEST, KEY)
    place = tl.zeros([BLOCK_ROWS], tl.int32) + k - 1
    hole = place
    sum1, sum2 = tl.zeros([BLOCK_ROWS], tl.float64), tl.zeros([BLOCK_ROWS], tl.float64)
    sum3, sum4 = tl.zeros([BLOCK_ROWS], tl.float64), tl.zeros([BLOCK_ROWS], tl.float64)

    first = split * tokens_each
    for start in range(first, tl.minimum(first + tokens_each, n_tokens), BLOCK_TOKENS):
        token = start + column
        known = token < n_tokens
        weight_at = weight_ptr + token.to(tl.int64)[None, :] * weight_token
        scores = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], WIDE)
        for at in range(0, d_model, BLOCK_D):
            channel = (at + d).to(tl.int64)
            inside = channel < d_model
            x = tl.load(x_at + channel[None, :] * x_d, mask=there[:, None] & inside[None, :], other=0.0)
            weight_here = weight_at + channel[:, None] * weight_d
            weight = tl.load(weight_here, mask=inside[:, None] & known[None, :], other=0.0)
            scores = tl.dot(x.to(OPERAND), weight.to(OPERAND), scores, input_precision="ieee", out_dtype=WIDE)
        if sums_ptr is not None:
            s = tl.where(known[None, :], scores, 0.0)
            square = s * s
            sum1 += tl.sum(s, 1).to(tl.float64)
            sum2 += tl.sum(square, 1).to(tl.float64)
            sum3 += tl.sum(square * s, 1).to(tl.float64)
            sum4 += tl.sum(square * square, 1).to(tl.float64)
        key = key_of(scores, KEY, MAGNITUDE, NAN)
        key = tl.where(known[None, :], key, LOWEST)
        least, place = replace(
            key, column, start, least, place, keys_ptr + lists, ids_ptr + lists, k, LOWEST, PADDED, PART
        )
        if BOTH:
            key = tl.where(key != NAN, ~key, NAN)
            key = tl.where(known[None, :], key, LOWEST)
            below, hole = replace(
                key, column, start, below, hole, keys_ptr + negated, ids_ptr + negated, k, LOWEST, PADDED, PART
            )
    if sums_ptr is not None:
        sums_at = sums_ptr + (split * n_padded + row) * 4
        tl.store(sums_at, sum1)
        tl.store(sums_at + 1, sum2)
        tl.store(sums_at + 2, sum3)
        tl.store(sums_at + 3, sum4)


class Layout(NamedTuple):
    """How scores of a dtype are compared, and the tile that they are made by."""

    key: tl.dtype  # an integer as wide
    integer: torch.dtype
    nan: int  # the bits of the NaN that stands for all
    block: tuple[int, int, int]  # rows, tokens, d


LAYOUTS = {
    torch.float32: Layout(tl.int32, torch.int32, 0x7FC0_0000, (64, 64, 32)),
    torch.float64: Layout(tl.int64, torch.int64, 0x7FF8 << 48, (32, 32, 16)),
}
OPERANDS = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip
HALF = (128, 128, 64)  # a tile of half precision, which tensor cores multiply


def launch(
    x: Float[Tensor, "row d"], weight: Float[Tensor, "vocabulary d"], k: int, both: bool, moments: bool, *,
    n_splits: int | None = None,
) -> TopTokens:  # fmt: skip
    """Run the kernel; arguments as `unembed_top_k` has checked them. Programs of n_splits share the tokens of a row."""
    n_rows, (n_tokens, d) = len(x), weight.shape
    wide, poles = at_least_float32(x.dtype), 1 + both
    own, half = LAYOUTS[wide], x.dtype != wide
    block_rows, block_tokens, block_d = HALF if half else own.block
    interpreted = not isinstance(_unembed_top_k, triton.JITFunction)  # which would multiply the bits of bfloat16
    operand = OPERANDS[wide if interpreted else x.dtype]
    magnitude = (1 << (8 * wide.itemsize - 1)) - 1
    padded = triton.next_power_of_2(k)
    n_blocks = triton.cdiv(n_rows, block_rows)
    n_padded, n_tiles = n_blocks * block_rows, triton.cdiv(n_tokens, block_tokens)
    if n_splits is None:
        # As many programs as multiprocessors at least, which a few rows alone would not be.
        n_cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        n_splits = triton.cdiv(n_cores, max(1, n_blocks))
    tiles_each = triton.cdiv(n_tiles, min(n_splits, n_tiles))
    n_splits = triton.cdiv(n_tiles, tiles_each)
    # What fills a list from k to a power of two is above every score, so that nothing replaces it. What it starts with is
    # below, and has ids of its own, so that one score replaces one.
    keys = torch.full((poles, n_splits, n_padded, padded), magnitude, dtype=own.integer, device=x.device)
    keys[..., :k] = -magnitude - 1
    ids = torch.arange(padded, dtype=torch.int32, device=x.device).expand_as(keys).contiguous()
    sums = torch.zeros(n_splits, n_padded, 4, dtype=torch.float64, device=x.device) if moments else None
    if n_rows > 0:
        with torch.cuda.device_of(x):
            _unembed_top_k[(n_blocks, n_splits)](
                x, weight, keys, ids, sums, *x.stride(), *weight.stride(), n_rows, n_tokens,
                tiles_each * block_tokens, d, k, BOTH=both, OPERAND=operand, WIDE=OPERANDS[wide], KEY=own.key,
                MAGNITUDE=magnitude, NAN=own.nan, PADDED=padded, PART=min(padded, PART),
                BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, BLOCK_D=block_d,
                num_warps=8 if half else 4, num_stages=3, enable_fp_fusion=True,
            )  # fmt: skip
    keys, ids = (part[:, :, :n_rows, :k].transpose(1, 2).flatten(2) for part in (keys, ids))
    return TopTokens(*merged(keys, ids, k, wide), None if sums is None else sums.sum(0)[:n_rows].to(wide))


def merged(
    keys: Int[Tensor, "pole row entry"], ids: Int[Tensor, "pole row entry"], k: int, wide: torch.dtype
) -> tuple[Float[Tensor, "pole row k"], Int[Tensor, "pole row k"]]:
    """The k best of each row's lists: by descending score, then by ascending id."""
    ids, order = ids.sort(dim=-1, stable=True)
    keys, order = keys.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    keys, ids = keys[..., :k], ids.gather(-1, order)[..., :k]
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.contiguous().view(wide), ids.long()
