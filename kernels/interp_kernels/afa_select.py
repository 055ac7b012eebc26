"""Nucleus selection by energy: of every row, as many of the largest entries as bring its norm nearest to a target.

A dictionary's code f of an activation x has |f| close to |x| if the dictionary's directions are nearly orthogonal. Turned
around, x alone says how many latents to keep: with energies s_i = (a_i |w_i|)^2 of activations and decoder rows, those m
whose norm C_m = sqrt(s_1 + ... + s_m), largest first, is nearest to |x|: top-AFA, arXiv 2503.24277.

S(tau), the sum of all entries not below tau, only falls as tau rises. So the smallest set with S >= target^2 is found by
halving, or in a histogram of energies, and needs no sort; the m in question is its size, or one less.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import Backend, at_least_float32, check_one_device, takes_triton
from interp_kernels.row_top_k import DTYPES

BLOCK = 1 << 17  # entries that the torch path takes at a time: a few of its temporaries fit a core's cache


def afa_select(
    energy: Float[Tensor, "row column"],
    target: Float[Tensor, " row"],
    *,
    k_max: int | None = None,
    backend: Backend = "auto",
) -> tuple[Int[Tensor, " row_plus_1"], Int[Tensor, " entry"]]:
    """Per row, the largest entries whose root sum is nearest to the target: offsets and columns (int64), as CSR has them.

        m_r = argmin_{m >= 1} |C_rm - target_r|,   C_rm = sqrt(sum of row r's m largest energies)

    Row r keeps columns[offsets[r] : offsets[r + 1]], ascending. Of two m as near, the smaller wins; of entries equal at
    the cut, those in the lowest columns are kept. Entries of no energy, or of less, are never kept, so m is 0 in a row
    without others; a target that a row cannot reach keeps all its positive entries. With k_max, m is at most that. Sums
    are in float32 at least (float64 for float64 energies), and what is nearer by less than their rounding may lose. No
    gradient goes through the choice: energies may require one, and are taken as they are. What NaN does is unspecified.

    Roofline, H100 SXM, 4096 rows of 12,288 (GPT-2 small, expansion 16) in float32, 300 kept: read twice, 403 MB, 0.12 ms
    at 3.35 TB/s; 10 MB written. A step of the search is four operations per value of the padded row, 0.018 ms at 15 T/s;
    it ends where one value is left between the bounds, on squares of normal values after 19 steps of at most 31: 0.34 ms.
    So it is bound by comparing and adding, at three times the reads; and the host waits once, for the number of entries.
    An estimate: no GPU has timed it yet.

    Raises:
        ValueError: energy is no matrix of floats; target has another shape or device; k_max is below 1.
        ImportError: Triton is to do it and is not installed.
    """
    _check(energy, target, k_max)
    energy, target = energy.detach(), target.detach()
    if takes_triton(backend, energy=energy, target=target):
        from interp_kernels._afa_select_triton import launch

        return launch(energy, target, k_max)
    return afa_select_torch(energy, target, k_max=k_max)


@torch.no_grad()
def afa_select_torch(
    energy: Float[Tensor, "row column"], target: Float[Tensor, " row"], *, k_max: int | None = None
) -> tuple[Int[Tensor, " row_plus_1"], Int[Tensor, " entry"]]:
    """The same from a histogram of each row: what the kernel must reproduce, and how a CPU does it.

    A bin holds the floats of one exponent and one start of the mantissa. Bins above the one in which the sum passes
    target^2 are kept whole, and only the entries of that one are sorted. Rows are taken a few at a time, so that what is
    computed on the way stays in cache. One thread takes 0.2 ms a row of 12,288, however many are kept; its sort 0.6 ms.
    """
    offsets = torch.zeros(len(energy) + 1, dtype=torch.int64, device=energy.device)
    if energy.numel() == 0:
        return offsets, offsets[:0]
    n_rows = max(1, BLOCK // energy.shape[1])
    kept = [_nearest(*rows, k_max) for rows in zip(energy.split(n_rows), target.split(n_rows), strict=True)]
    offsets[1:] = torch.cat([n for n, _ in kept]).cumsum(0)
    return offsets, torch.cat([columns for _, columns in kept])


def _nearest(
    energy: Float[Tensor, "row column"], target: Float[Tensor, " row"], k_max: int | None
) -> tuple[Int[Tensor, " row"], Int[Tensor, " entry"]]:
    """How many entries each row keeps, and their columns."""
    wide = at_least_float32(energy.dtype)
    energy, target = energy.to(wide).clamp(min=0), target.to(wide).clamp(min=0)
    positive, square = energy > 0, target.square()[:, None]
    bits, dropped = (torch.int64, 50) if wide == torch.float64 else (torch.int32, 19)
    bin_of = (energy.view(bits) >> dropped).clamp(min=0).long()  # 0 may be -0
    n_bins = 1 << (8 * energy.itemsize - 1 - dropped)

    # sums[:, b]: of the b highest bins; the first b that is enough gives the bin that passes, n_bins - b. None: -1.
    from_top = n_bins - bin_of
    sums = energy.new_zeros(len(energy), n_bins + 1).scatter_add_(1, from_top, energy).cumsum(1)
    lacking = (sums < square) | (sums == 0)
    if k_max is not None:
        ones = positive.long()
        lacking &= ones.new_zeros(sums.shape).scatter_add_(1, from_top, ones).cumsum(1) < k_max
    passing = lacking.sum(1, keepdim=True)
    keep = positive & (from_top < passing)
    n_above, sum_above = keep.sum(1), sums.gather(1, passing - 1)

    # Entries of the passing bin per row, largest first and of equal ones the lowest column first, padded with 0.
    row, column = (positive & (from_top == passing)).nonzero(as_tuple=True)
    n_level = torch.bincount(row, minlength=len(energy))
    start = n_level.cumsum(0) - n_level
    level = energy.new_zeros(len(energy), int(n_level.max()))
    level[row, torch.arange(len(row), device=row.device) - start[row]] = energy[row, column]
    level, order = level.sort(dim=1, descending=True, stable=True)
    sums = torch.cat([sum_above, sum_above + level.cumsum(1)], 1)

    # So many of them reach the target, or one less is nearer.
    wanted = 1 + (sums[:, 1:] < square).sum(1)
    room = n_level if k_max is None else n_level.minimum(k_max - n_above)
    taken = wanted.minimum(room)
    with_it = sums.gather(1, taken[:, None])[:, 0].sqrt()
    without = sums.gather(1, (taken - 1).clamp(min=0)[:, None])[:, 0].sqrt()
    one_less = (wanted <= room) & (n_above + wanted > 1) & (target - without <= with_it - target)
    taken = taken - one_less.long()
    chosen = torch.arange(level.shape[1], device=row.device) < taken[:, None]
    at = (start[:, None] + order)[chosen]
    keep[row[at], column[at]] = True
    return n_above + taken, keep.nonzero()[:, 1]


def _check(energy: Tensor, target: Tensor, k_max: int | None) -> None:
    check_one_device(energy=energy, target=target)
    if energy.ndim != 2 or energy.dtype not in DTYPES:
        raise ValueError(f"energy must be [row, column] in a float dtype, not {list(energy.shape)} in {energy.dtype}")
    if target.shape != energy.shape[:1]:
        raise ValueError(f"target must have shape [{len(energy)}], one norm per row, not {list(target.shape)}")
    if k_max is not None and k_max < 1:
        raise ValueError(f"k_max must be at least 1, and is {k_max}")
