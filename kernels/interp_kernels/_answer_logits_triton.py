"""`answer_logits` on a GPU: one program per row, which it reads once and keeps in registers."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import at_least_float32


@triton.jit
@no_type_check
def _answer_logits(
    resid_ptr,
    directions_ptr,
    which_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    result_ptr,
    resid_row,
    directions_row,
    D_MODEL: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = d < D_MODEL
    which = tl.load(which_ptr + row).to(tl.int64)
    y = tl.load(resid_ptr + row * resid_row + d, mask=there, other=0.0).to(WIDE)
    direction = tl.load(directions_ptr + which * directions_row + d, mask=there, other=0.0).to(WIDE)
    if CENTRED:
        y = tl.where(there, y - tl.sum(y, 0) / D_MODEL, 0.0)
    y = y / tl.sqrt(tl.sum(y * y, 0) / D_MODEL + EPS)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + d, mask=there, other=0.0).to(WIDE)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + d, mask=there, other=0.0).to(WIDE)
    result = tl.sum(y * direction, 0)
    if offset_ptr is not None:
        result += tl.load(offset_ptr + which).to(WIDE)
    tl.store(result_ptr + row, result)


def launch(
    resid: Float[Tensor, "row d_model"],
    directions: Float[Tensor, "direction d_model"],
    which: Int[Tensor, " row"],
    weight: Float[Tensor, " d_model"] | None,
    bias: Float[Tensor, " d_model"] | None,
    norm: str,
    eps: float,
    offset: Float[Tensor, " direction"] | None,
) -> Float[Tensor, " row"]:
    """Run the kernel; arguments as `answer_logits` has checked them."""
    result = torch.empty(len(resid), dtype=at_least_float32(resid.dtype), device=resid.device)
    if len(resid) == 0:
        return result
    d_model = resid.shape[1]
    block_d = triton.next_power_of_2(d_model)
    resid, directions = (x if x.stride(1) == 1 else x.contiguous() for x in (resid, directions))
    weight, bias, offset = (None if x is None else x.contiguous() for x in (weight, bias, offset))
    with torch.cuda.device_of(resid):
        _answer_logits[(len(resid),)](
            resid, directions, which.contiguous(), weight, bias, offset, result, resid.stride(0), directions.stride(0),
            D_MODEL=d_model, EPS=float(eps), CENTRED=norm == "layer",
            WIDE=tl.float64 if result.dtype == torch.float64 else tl.float32, BLOCK_D=block_d,
            num_warps=max(1, min(16, block_d // 512)),  # 16 values a thread
            enable_fp_fusion=True,
        )  # fmt: skip
    return result
