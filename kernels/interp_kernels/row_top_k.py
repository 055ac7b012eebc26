"""The k largest values of every row and where they stand: the code of a TopK dictionary, found without sorting a row.

The k-th largest value of a row is the largest t with |{c : x_c >= t}| >= k. That count only falls as t rises, so t can be
halved towards; and since finitely many numbers have a bit pattern, halving the integers that order as the floats do ends
with t itself, after at most as many steps as a float has bits.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import Backend, takes_triton

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def row_top_k(
    x: Float[Tensor, "row column"], k: int, *, backend: Backend = "auto"
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k largest values of each row and their columns (int64), columns ascending within a row.

        values_r = x_r[columns_r],   min(values_r) >= every x_rc whose c is not in columns_r

    Values are compared as they are; -0 equals +0, and NaN counts as +inf. Of values equal to the smallest that is kept,
    Triton keeps those in the lowest columns; which ones torch keeps is unspecified.

    Roofline, H100 SXM, 4096 rows of 12,288 (GPT-2 small, expansion 16) in float32, k = 32: 201 MB read, 0.06 ms at
    3.35 TB/s, and 1.6 MB written. Rows up to 16,384 columns stay in registers; longer ones are read again in each step,
    from L2 at best. A step is a comparison and an addition per value of the padded row, 0.009 ms at 15 T/s; the search
    ends where a count is k, on normal values after 16 steps of at most 32 (16 in half precision): 0.15 ms. So it is
    bound by comparing, at two to three times the read. An estimate: no GPU has timed it yet.

    Raises:
        ValueError: x is no matrix of floats; k is not from 1 to the number of columns.
        ImportError: Triton is to do it and is not installed.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [row, column] in a float dtype, not {list(x.shape)} in {x.dtype}")
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k must be from 1 to the number of columns, {x.shape[1]}, and is {k}")
    if takes_triton(backend, x=x):
        from interp_kernels._row_top_k_triton import launch

        return launch(x, k)
    return row_top_k_torch(x, k)


def row_top_k_torch(x: Float[Tensor, "row column"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The same by `torch.topk`: what the kernel must reproduce, and how a CPU does it. Values carry gradients."""
    columns = x.detach().topk(k, sorted=False).indices.sort().values
    return x.gather(1, columns), columns
