"""`append_rows` on a GPU: one program per tile of pieces, a piece being a token, or a unit of one."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_kernels._dispatch import alignment

TILE = 2048  # elements of one program: 16 per thread, so each has several loads under way


@triton.jit(do_not_specialize=["prompt_ptr", "position_ptr", "patched_ptr", "n_pieces", "n_across"])
@no_type_check
def _append_rows(
    out_ptr,
    base_ptr,
    source_ptr,
    prompt_ptr,
    position_ptr,
    patched_ptr,
    base_prompt,
    base_position,
    base_unit,
    source_prompt,
    source_position,
    source_unit,
    n_pieces,
    n_units,
    width,
    n_across,
    ALIGNMENT: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    piece = (program // n_across).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    column = (program % n_across) * COLUMNS + tl.arange(0, COLUMNS)
    there = piece < n_pieces
    inside = there[:, None] & (column < width)[None, :]
    token, unit = piece // n_units, piece % n_units
    prompt = tl.load(prompt_ptr + token, mask=there, other=0).to(tl.int64)
    position = tl.load(position_ptr + token, mask=there, other=0).to(tl.int64)
    at = base_ptr + prompt * base_prompt + position * base_position + unit * base_unit
    if patched_ptr is not None:
        patched = tl.load(patched_ptr + piece, mask=there, other=0) != 0
        source_at = source_ptr + prompt * source_prompt + position * source_position + unit * source_unit
        # The compiler loses sight of alignment where it chooses between two pointers, and would load value by value.
        at = tl.multiple_of(tl.where(patched, source_at, at), ALIGNMENT)
    values = tl.load(at[:, None] + column[None, :], mask=inside)
    tl.store(out_ptr + piece[:, None] * width + column[None, :], values, mask=inside)


def launch(
    out: Float[Tensor, "token *rest"],
    first: int,
    base: Float[Tensor, "prompt position *rest"],
    prompt: Int[Tensor, " new"],
    position: Int[Tensor, " new"],
    source: Float[Tensor, "prompt position *rest"] | None,
    patched: Bool[Tensor, " new"] | Bool[Tensor, "new unit"] | None,
) -> None:
    """Run the kernel; arguments as `append_rows` has checked them."""
    new = out[first : first + len(prompt)]
    if new.numel() == 0:
        return
    n_units = 1 if patched is None or patched.ndim == 1 else patched.shape[1]
    width = new[0].numel() // n_units
    # Views, unless the axes of a token are strided oddly; the base run and its source are small beside the rows.
    base = base.reshape(*base.shape[:2], n_units, width)
    base = base if base.stride(3) == 1 else base.contiguous()
    if source is not None:
        source = source.reshape(*source.shape[:2], n_units, width)
        source = source if source.stride(3) == 1 else source.contiguous()
    columns = min(TILE, triton.next_power_of_2(width))
    pieces = TILE // columns
    n_pieces, n_across = len(prompt) * n_units, triton.cdiv(width, columns)
    with torch.cuda.device_of(out):
        _append_rows[(triton.cdiv(n_pieces, pieces) * n_across,)](
            new, base, source, prompt.contiguous(), position.contiguous(),
            None if patched is None else patched.contiguous().view(torch.uint8),
            *base.stride()[:3], *((0, 0, 0) if source is None else source.stride()[:3]),
            n_pieces, n_units, width, n_across,
            ALIGNMENT=alignment(base) if source is None else alignment(base, source),
            PIECES=pieces, COLUMNS=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
