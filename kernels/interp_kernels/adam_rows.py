"""One Adam step of a dictionary whose rows stay on the unit sphere, in one pass over its memory.

A decoder with unit rows needs more than Adam around each step: the gradient's part along a row would only change a length
that is put right afterwards, yet it would feed the moments, so it is taken out before; and the row, which the step
leaves off the sphere, is put back after. Done one after another on a large matrix, each of these reads it from memory
again, and together they cost several times Adam itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from interp_kernels._dispatch import Backend, check_one_device, takes_triton

BLOCK = 2**18  # numbers of each matrix that the torch path works on at a time: four such blocks stay in a CPU's cache


def adam_rows(
    weight: Float[Tensor, "row d"],
    gradient: Float[Tensor, "row d"],
    first: Float[Tensor, "row d"],
    second: Float[Tensor, "row d"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    unit_rows: bool,
    copy: Float[Tensor, "row d"] | None = None,
    backend: Backend = "auto",
) -> None:
    """Take one step of Adam in place, with unit_rows along the unit sphere of each row.

        g <- g - (g.w / w.w) w                                     with unit_rows
        first <- b1 first + (1 - b1) g,   second <- b2 second + (1 - b2) g^2
        w <- w - lr / (1 - b1^t) * first / (sqrt(second / (1 - b2^t)) + eps)
        w <- w / |w|                                               with unit_rows

    t is `step`, 1 for the first. `weight`, `first` and `second` (Adam's moments, zeros before the first step) change in
    place; `gradient` may, and is of no use afterwards; `copy`, such as bfloat16 for the next forward pass, receives the
    new weight. A row that is zero has no direction: it keeps its gradient and is not renormalised. Arithmetic is that of
    the weights' dtype, but on a GPU the learning rate and the two bias corrections are float32 also for float64 weights.
    Since `step` is a number, a call recorded in a CUDA graph would replay the bias correction of the recording.

    Roofline, H100 SXM, 24576 * 768 in float32: 28 B a weight are read and written, 30 B with a bfloat16 copy, 566 MB,
    0.17 ms at 3.35 TB/s; about 20 FLOPs a weight are 0.4 GFLOP, 0.006 ms at 67 TFLOP/s. Memory bound.

    Raises:
        ValueError: step is below 1; shapes or devices do not fit together; dtypes are not all float32 or all float64, but
            for copy's; a tensor is not contiguous.
        ImportError: Triton is to do it and is not installed.
    """
    _check(weight, gradient, first, second, step, copy)
    with torch.no_grad():
        if takes_triton(backend, weight=weight, gradient=gradient, first=first, second=second, copy=copy):
            from interp_kernels._adam_rows_triton import launch

            launch(weight, gradient, first, second, step, lr, betas, eps, unit_rows, copy)
        else:
            adam_rows_torch(
                weight, gradient, first, second, step=step, lr=lr, betas=betas, eps=eps, unit_rows=unit_rows, copy=copy
            )


@torch.no_grad()
def adam_rows_torch(
    weight: Float[Tensor, "row d"],
    gradient: Float[Tensor, "row d"],
    first: Float[Tensor, "row d"],
    second: Float[Tensor, "row d"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    unit_rows: bool,
    copy: Float[Tensor, "row d"] | None = None,
) -> None:
    """The same around torch's own fused Adam, a block of rows after the other: what the kernel must reproduce."""
    if weight.numel() == 0:
        return
    size = max(1, BLOCK // weight.shape[1])
    copies = [None] * -(-len(weight) // size) if copy is None else copy.split(size)
    blocks = zip(*(x.split(size) for x in (weight, gradient, first, second)), copies, strict=True)
    for w, g, m, v, c in blocks:
        if unit_rows:
            along, squares = torch.linalg.vecdot(g, w), torch.linalg.vecdot(w, w)
            g.addcmul_(w, (along / squares.masked_fill(squares == 0, 1))[:, None], value=-1)
        before = torch.full((), step - 1, dtype=torch.float32, device=w.device)  # a new one, for adam counts it up
        adam(
            [w], [g], [m], [v], [], [before], fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
            weight_decay=0.0, eps=eps, maximize=False,
        )  # fmt: skip
        if unit_rows:
            norms = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            w.div_(norms.masked_fill_(norms == 0, 1))
        if c is not None:
            c.copy_(w)


def _check(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, copy: Tensor | None) -> None:
    given = {"weight": weight, "gradient": gradient, "first": first, "second": second, "copy": copy}
    check_one_device(**given)
    if step < 1:
        raise ValueError(f"step counts from 1, and is {step}")
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight must be float32 or float64 [row, d], not {weight.dtype} {list(weight.shape)}")
    for name, x in given.items():
        if x is None:
            continue
        if x.shape != weight.shape:
            raise ValueError(f"{name} must have the weight's shape {list(weight.shape)}, not {list(x.shape)}")
        if name != "copy" and x.dtype != weight.dtype:
            raise ValueError(f"{name} must be {weight.dtype} as the weight is, not {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, for a step works in place")
