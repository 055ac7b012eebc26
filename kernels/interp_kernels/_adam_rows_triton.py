"""`adam_rows` on a GPU: every number is read once and written once, and what a row needs of itself stays in registers."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
@no_type_check
def _adam_rows(
    weight_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    copy_ptr,
    step_size,
    correction,
    D: tl.constexpr,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    EPS: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * D + d
    there = d < D
    w = tl.load(weight_ptr + at, mask=there, other=0.0)
    g = tl.load(gradient_ptr + at, mask=there, other=0.0)
    m = tl.load(first_ptr + at, mask=there, other=0.0)
    v = tl.load(second_ptr + at, mask=there, other=0.0)
    if UNIT_ROWS:
        squares = tl.sum(w * w, 0)
        g -= tl.sum(g * w, 0) / tl.where(squares == 0, 1.0, squares) * w
    m += (g - m) * (1 - BETA_1)
    v = v * BETA_2 + g * g * (1 - BETA_2)
    w -= step_size * m / (tl.sqrt(v) / correction + EPS)
    if UNIT_ROWS:
        squares = tl.sum(tl.where(there, w * w, 0.0), 0)
        w = w / tl.sqrt(tl.where(squares == 0, 1.0, squares))
    tl.store(weight_ptr + at, w, mask=there)
    tl.store(first_ptr + at, m, mask=there)
    tl.store(second_ptr + at, v, mask=there)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, w, mask=there)


def launch(
    weight: Float[Tensor, "row d"],
    gradient: Float[Tensor, "row d"],
    first: Float[Tensor, "row d"],
    second: Float[Tensor, "row d"],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool,
    copy: Float[Tensor, "row d"] | None,
) -> None:
    """Run the kernel, one program per row; arguments as `adam_rows` has checked them."""
    if weight.numel() == 0:
        return
    d = weight.shape[1]
    block_d = triton.next_power_of_2(d)
    if not unit_rows:
        block_d = min(2048, block_d)  # nothing is summed over a row, so several programs may share it
    with torch.cuda.device_of(weight):
        _adam_rows[(len(weight), triton.cdiv(d, block_d))](
            weight, gradient, first, second, copy, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5,
            D=d, BETA_1=float(betas[0]), BETA_2=float(betas[1]), EPS=float(eps), UNIT_ROWS=unit_rows, BLOCK_D=block_d,
            num_warps=max(1, min(32, block_d // 256)),  # 8 values of each matrix a thread
            enable_fp_fusion=True,
        )  # fmt: skip
