"""The k tokens that every row scores highest, from rows and an unembedding, without the table of scores in between.

A score is a product, s_rt = x_r . weight_t; of 458,752 rows against 128,256 tokens the table alone would be 235 GB. So a
tile of scores is made, looked through, and overwritten by the next. What has been seen before a tile bounds what may come
from it: with k scores in hand, the next tile matters only where it beats the worst of them, and since token ids only rise
from tile to tile, a score that merely equals the worst one loses the tie. In random order tile b of n holds k / b of the
k best so far, so that all tiles bring k (1 + 1/2 + ... + 1/n) scores: beyond the product, next to no work.

A tile is looked through by groups of neighbouring tokens. The k-th largest of the groups' maxima is reached by at least k
scores, so it bounds the first tile; a group whose maximum stays below the bound is not opened.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_kernels._dispatch import Backend, at_least_float32, check_one_device, takes_triton

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_K = 128  # of the longest list that a program of the kernel keeps

BLOCK = (512, 8192)  # rows and tokens of a tile: 16 MiB of float32, and as good for a product as the whole table
CONVERTED = 2**23  # values of a block of half-precision tokens in float32, 32 MiB
LISTED = 2**17  # entries of the lists of a tile's rows, unless 64 rows have more
GROUP = 32  # scores per maximum, at most
CACHED = 2**17  # scores whose powers are summed at a time, 512 KiB of float32
SORTED = 2**19  # scores sorted at a time where a row must be sorted whole


class TopTokens(NamedTuple):
    """Scores and ids of the tokens that rows score highest; on the second pole, if asked for, lowest."""

    values: Float[Tensor, "pole row k"]
    """Descending: values[0] of the scores s, values[1] of -s."""
    ids: Int[Tensor, "pole row k"]
    moments: Float[Tensor, "row 4"] | None
    """Sums over all tokens of s, s^2, s^3 and s^4."""


def unembed_top_k(
    x: Float[Tensor, "row d"],
    weight: Float[Tensor, "vocabulary d"],
    k: int,
    *,
    both: bool = False,
    moments: bool = False,
    backend: Backend = "auto",
) -> TopTokens:
    """The k largest of the scores s_rt = x_r . weight_t of each row, descending, and their tokens' ids (int64).

        values[0]_r1 >= ... >= values[0]_rk >= every other s_rt,   values[1] the same of -s if `both`

    Scores are summed, compared and returned in float32 at least (float64 for float64), never rounded to half precision.
    Of equal scores the lowest id comes first, and stays where k cuts between them; -0 equals 0. NaN ranks above all
    numbers on both poles, as in `torch.topk`, and comes back as NaN. Results carry no gradients. `weight` may be a view,
    as W_U.T; it is never copied whole. Another backend or tile size sums products in another order: exact arithmetic gives
    the same result, rounded arithmetic the same to rounding, and neighbours that close may swap.

    `moments` are sums of p-th powers. Their relative error is about 2^-24 of sum |s|^p, times sqrt(d) for the products';
    central moments take differences of them, so variance and kurtosis lose a factor (mean / sd)^2 and ^4 of precision.
    Subtract the mean row of `weight` from it where that matters.

    A CPU multiplies half precision in float32, block by block, because its own half-precision product would round. On one
    core, 1,024 rows of 768 against 50,257 tokens took 0.93 s for the product alone, 1.00 s with k = 50, 1.09 s with both
    poles, and 1.13 s with moments too.

    Roofline, H100 SXM, the 458,752 neurons of Llama-3.1-8B (d = 4096) in bfloat16 against 128,256 tokens: 4.82e14 FLOP,
    0.49 s at 989 TFLOP/s. Memory gives 4.8 GB, 1.4 ms at 3.35 TB/s, as long as programs that run together share tokens in
    L2; a tile of 128 x 128 reads a byte there for every 64 FLOPs, 15 TB/s at full speed, so expect half of it. Looking for
    a score in a tile is some 12 operations a value, 0.9 us: once per tile, and again for each score that the busiest of its
    rows gains. With k = 50 that is 3,050 times in the 1,002 tiles of a program, 2.8 ms a pole, against 18 ms for their
    product. So it is bound by the product. An estimate: no GPU has timed it yet.

    Raises:
        ValueError: x and weight are no matrices of one float dtype and one d; k is not from 1 to the number of tokens, or
            above 128 for Triton.
        ImportError: Triton is to do it and is not installed.
    """
    check_one_device(x=x, weight=weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be matrices that share d")
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x and weight must share a float dtype, and are {x.dtype} and {weight.dtype}")
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must be from 1 to the number of tokens, {len(weight)}, and is {k}")
    x, weight = x.detach(), weight.detach()
    if takes_triton(backend, x=x, weight=weight):
        if k > TRITON_K:
            raise ValueError(f'k must be at most {TRITON_K} for Triton, and is {k}; backend="torch" takes any k')
        from interp_kernels._unembed_top_k_triton import launch

        return launch(x, weight, k, both, moments)
    return unembed_top_k_torch(x, weight, k, both=both, moments=moments)


def unembed_top_k_torch(
    x: Float[Tensor, "row d"],
    weight: Float[Tensor, "vocabulary d"],
    k: int,
    *,
    both: bool = False,
    moments: bool = False,
    block: tuple[int, int] = BLOCK,
) -> TopTokens:
    """The same by torch, tile by tile: what the kernel must reproduce, and how a CPU does it.

    Buffers take about 60 MB beside the result, up to 80 MB where many scores are equal, and more only where 64 rows of k
    are more. `block` is the largest tile, in rows and tokens.
    """
    wide, converts = at_least_float32(x.dtype), x.dtype != at_least_float32(x.dtype)
    n_rows, (n_tokens, d) = len(x), weight.shape
    height = min(block[0], n_rows, max(64, LISTED // k))
    # Tokens are the outer loop, so that each block of them is converted once.
    n_block = min(block[1], n_tokens, max(256, CONVERTED // max(d, 1)) if converts else n_tokens)
    group = max(1, min(GROUP, 1 << (n_block // (4 * k)).bit_length() >> 1))
    values = torch.empty(1 + both, n_rows, k, dtype=wide, device=x.device)
    ids = torch.empty(1 + both, n_rows, k, dtype=torch.int64, device=x.device)
    sums = torch.zeros(n_rows, 4, dtype=torch.float64, device=x.device)
    n_padded = -(-n_block // group) * group
    buffer = torch.empty(height * n_padded, dtype=wide, device=x.device)
    for start in range(0, n_tokens, n_block):
        tokens = weight[start : start + n_block].to(wide)
        width = -(-len(tokens) // group) * group
        for first in range(0, n_rows, max(1, height)):
            rows = slice(first, first + height)
            some = x[rows].to(wide)
            scores = buffer[: len(some) * width].view(len(some), width)
            torch.mm(some, tokens.T, out=scores[:, : len(tokens)])
            if moments:
                sums[rows] += _moments(scores[:, : len(tokens)])
            # A group that is not full repeats its last score, which changes neither its maximum nor its minimum.
            scores[:, len(tokens) :] = scores[:, len(tokens) - 1 : len(tokens)]
            for pole in range(1 + both):
                _merge(scores, pole == 1, len(tokens), group, start, values[pole, rows], ids[pole, rows])
    return TopTokens(values, ids, sums.to(wide) if moments else None)


def _merge(
    scores: Float[Tensor, "row padded"], negated: bool, width: int, group: int, start: int,
    values: Float[Tensor, "row k"], ids: Int[Tensor, "row k"],
) -> None:  # fmt: skip
    """Take into the running lists what `width` scores, of tokens from `start` on, put among the k best of each row."""
    n_rows, k, n_seen = len(values), values.shape[1], min(start, values.shape[1])
    grouped = scores.unflatten(1, (-1, group))
    tops = -grouped.amin(2) if negated else grouped.amax(2)
    if n_seen < k and tops.shape[1] < k:
        _merge_whole(scores, negated, width, start, values, ids, torch.arange(n_rows, device=ids.device))
        return
    # `drop` is asked, and not its contrary, so that NaN is never dropped.
    if n_seen == 0:
        floor = tops.topk(k, sorted=False).values.amin(1, keepdim=True)
        drop = torch.lt
    else:
        floor = values[:, -1:]
        drop = torch.le
    reached = drop(tops, floor).logical_not_()
    # A row of many equal or rising scores is sorted whole, lest all other rows be padded to its length.
    crowded = reached.sum(1) > 2 * k + GROUP
    reached &= ~crowded[:, None]
    row, which = reached.nonzero(as_tuple=True)
    opened = grouped.flatten(0, 1).index_select(0, row * tops.shape[1] + which)
    opened = opened.neg_() if negated else opened
    keep = drop(opened, floor[row]).logical_not_()
    keep &= which[:, None] * group + torch.arange(group, device=ids.device) < width
    pair, inside = keep.nonzero(as_tuple=True)
    row, column = row[pair], which[pair] * group + inside
    n_new = torch.bincount(row, minlength=n_rows)
    crowded |= n_new > 4 * k + GROUP
    if crowded.any():
        _merge_whole(scores, negated, width, start, values, ids, crowded.nonzero()[:, 0])
    active = (n_new > 0) & ~crowded
    light = active[row]
    _merge_few(opened[pair, inside][light], column[light] + start, row[light], active, n_seen, values, ids)


def _merge_few(
    found: Float[Tensor, " found"], token: Int[Tensor, " found"], row: Int[Tensor, " found"],
    active: Bool[Tensor, " row"], n_seen: int, values: Float[Tensor, "row k"], ids: Int[Tensor, "row k"],
) -> None:  # fmt: skip
    """Merge found scores, ordered by row and then by token, into the lists of the rows that are active."""
    if len(found) == 0:
        return
    # Stable sorting leaves equal scores as they stand: those in the list, then new ones, by id; what only pads, last.
    n_new = torch.bincount(row, minlength=len(active))
    place = n_seen + torch.arange(len(row), device=row.device) - (n_new.cumsum(0) - n_new)[row]
    which, dense = active.nonzero()[:, 0], active.cumsum(0) - 1
    width = n_seen + int(n_new.max())
    all_values = values.new_full((len(which), width), -torch.inf)
    all_ids = ids.new_full((len(which), width), -1)
    all_values[:, :n_seen], all_ids[:, :n_seen] = values[which, :n_seen], ids[which, :n_seen]
    all_values[dense[row], place], all_ids[dense[row], place] = found, token
    ordered, order = all_values.sort(dim=1, descending=True, stable=True)
    values[which] = ordered[:, : values.shape[1]]
    ids[which] = all_ids.gather(1, order[:, : values.shape[1]])


def _merge_whole(
    scores: Float[Tensor, "row padded"], negated: bool, width: int, start: int,
    values: Float[Tensor, "row k"], ids: Int[Tensor, "row k"], rows: Int[Tensor, " some"],
) -> None:  # fmt: skip
    """Merge by sorting every score of these rows."""
    k = values.shape[1]
    n_seen, n_now = min(start, k), min(start + width, k)
    tokens = torch.arange(start, start + width, device=ids.device)
    for some in rows.split(max(1, SORTED // (n_seen + width))):
        new = scores[some, :width]
        all_values = torch.cat([values[some, :n_seen], -new if negated else new], dim=1)
        all_ids = torch.cat([ids[some, :n_seen], tokens.expand(len(some), -1)], dim=1)
        ordered, order = all_values.sort(dim=1, descending=True, stable=True)
        values[some, :n_now], ids[some, :n_now] = ordered[:, :n_now], all_ids.gather(1, order[:, :n_now])


def _moments(scores: Float[Tensor, "row token"]) -> Float[Tensor, "row 4"]:
    """Sums of the first four powers, a few rows at a time, whose powers then stay in a core's cache."""
    sums = []
    for some in scores.split(max(1, CACHED // scores.shape[1])):
        square = some.square()
        sums.append(torch.stack([some.sum(1), square.sum(1), (square * some).sum(1), square.square_().sum(1)], dim=1))
    return torch.cat(sums)
