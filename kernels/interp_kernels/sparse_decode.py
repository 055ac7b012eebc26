"""Decoding the code of a sparse autoencoder, and the gradient of its values, at the cost of the entries that are there.

A code is stored as compressed rows: row r holds the entries e in offsets[r]:offsets[r+1], each a latent and a value.
Decoding is a product of that sparse matrix with the dictionary, and the gradient of its values samples the product of
two dense ones where the code has entries; a dense code would do latents / entries-per-row times the work of both.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import Backend, at_least_float32, check_one_device, takes_triton


def sparse_decode(
    values: Float[Tensor, " entry"],
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    *,
    bias: Float[Tensor, " d"] | None = None,
    target: Float[Tensor, "row d"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "row d"]:
    """What each row of a code decodes to; with a target, what that leaves of the target.

        decoded_r = sum_{e in row r} values_e * weight[latents_e] + bias
        result_r  = decoded_r, or target_r - decoded_r if there is a target

    A row without entries decodes to the bias. Everything is computed, summed and returned in float32 at least (float64 if
    any argument is). Latents and offsets are checked by the torch path only, since a GPU would have to be waited for:
    elsewhere a wrong one reads foreign memory.

    Roofline, H100 SXM, 4096 rows of 32 entries, d 768, 24576 latents: 131,072 rows of the dictionary are read, 403 MB in
    float32 and half in bfloat16, and 25 MB of target and result: 0.13 ms at 3.35 TB/s if none of it were in cache. The
    dictionary is 75 MB, 38 MB in bfloat16, before 50 MB of L2, and programs go through it one tile of d after another, so
    most reads hit. 0.2 GFLOP, 0.003 ms at 67 TFLOP/s: bound by memory, or by L2.

    Raises:
        ValueError: shapes or devices do not fit together; on the torch path, a latent out of range or offsets that do not
            rise from 0 to the number of entries.
        ImportError: Triton is to do it and is not installed.
    """
    check_one_device(values=values, latents=latents, offsets=offsets, weight=weight, bias=bias, target=target)
    _check_code(latents, offsets, weight)
    n_rows, d = len(offsets) - 1, weight.shape[1]
    for name, x, shape in (("values", values, [len(latents)]), ("bias", bias, [d]), ("target", target, [n_rows, d])):
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {list(x.shape)}")
    if takes_triton(backend, values=values, weight=weight, bias=bias, target=target):
        from interp_kernels._sparse_decode_triton import launch_decode

        return launch_decode(values, latents, offsets, weight, bias, target)
    return sparse_decode_torch(values, latents, offsets, weight, bias=bias, target=target)


def sparse_dots(
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    rows: Float[Tensor, "row d"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, " entry"]:
    """Each entry's row along its latent's direction: the gradient of a code's values.

        result_e = rows_r . weight[latents_e]        for e in row r

    With rows = dL/d(decoded) that is dL/d(values). Computed, summed and returned in float32 at least (float64 if an
    argument is). Latents and offsets are checked by the torch path only.

    Roofline, H100 SXM, sizes as in `sparse_decode`: the same 403 MB of the dictionary (201 MB in bfloat16) and 13 MB of
    rows, 0.12 ms at 3.35 TB/s before L2 takes its share; 0.2 GFLOP, 0.003 ms at 67 TFLOP/s.

    Raises:
        ValueError: shapes or devices do not fit together; on the torch path, a latent out of range or offsets that do not
            rise from 0 to the number of entries.
        ImportError: Triton is to do it and is not installed.
    """
    check_one_device(latents=latents, offsets=offsets, weight=weight, rows=rows)
    _check_code(latents, offsets, weight)
    shape = [len(offsets) - 1, weight.shape[1]]
    if list(rows.shape) != shape:
        raise ValueError(f"rows must have shape {shape}, not {list(rows.shape)}")
    if takes_triton(backend, weight=weight, rows=rows):
        from interp_kernels._sparse_decode_triton import launch_dots

        return launch_dots(latents, offsets, weight, rows)
    return sparse_dots_torch(latents, offsets, weight, rows)


def sparse_decode_torch(
    values: Float[Tensor, " entry"],
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    *,
    bias: Float[Tensor, " d"] | None = None,
    target: Float[Tensor, "row d"] | None = None,
) -> Float[Tensor, "row d"]:
    """The same as a weighted embedding bag, torch's name for such a sum: what the kernel must reproduce."""
    _check_values(latents, offsets, len(weight))
    wide = wide_dtype(values, weight, bias, target)
    result = _bags(values.to(wide), latents, offsets, weight.to(wide))
    if bias is not None:
        result = result + bias.to(wide)
    return result if target is None else target.to(wide) - result


def sparse_dots_torch(
    latents: Int[Tensor, " entry"],
    offsets: Int[Tensor, " row_plus_1"],
    weight: Float[Tensor, "latent d"],
    rows: Float[Tensor, "row d"],
) -> Float[Tensor, " entry"]:
    """The same through torch's own gradient of a weighted embedding bag: what the kernel must reproduce."""
    _check_values(latents, offsets, len(weight))
    wide = wide_dtype(weight, rows)
    weight, rows = weight.to(wide), rows.to(wide)
    if torch.is_grad_enabled() and (weight.requires_grad or rows.requires_grad):
        # The gradient of the gradient is not there; a gather has one, at six times the cost.
        row_of = torch.repeat_interleave(offsets.diff(), output_size=len(latents))
        return (weight[latents] * rows[row_of]).sum(1)
    # Gathering writes every entry's row out before it is read again; the bag's gradient does not.
    with torch.enable_grad():
        values = torch.zeros(len(latents), dtype=wide, device=weight.device, requires_grad=True)
        decoded = _bags(values, latents, offsets, weight.detach())
    return torch.autograd.grad(decoded, values, rows)[0]


def wide_dtype(*tensors: Float[Tensor, "..."] | None) -> torch.dtype:
    """The dtype that sums over all these tensors are kept in: float64 if one of them is float64, else float32."""
    wide = torch.float32
    for tensor in tensors:
        wide = wide if tensor is None else torch.promote_types(wide, at_least_float32(tensor.dtype))
    return wide


def _bags(values: Tensor, latents: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(
        latents.long(), weight, offsets.long(), mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _check_code(latents: Tensor, offsets: Tensor, weight: Tensor) -> None:
    for name, index in (("latents", latents), ("offsets", offsets)):
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be one row of int32 or int64, not {index.dtype} of shape {list(index.shape)}"
            )
    if len(offsets) == 0:
        raise ValueError("offsets must have one number more than there are rows, and has none")
    if weight.ndim != 2:
        raise ValueError(f"weight must be [latent, d], not {list(weight.shape)}")


def _check_values(latents: Tensor, offsets: Tensor, n_latents: int) -> None:
    if ((latents < 0) | (latents >= n_latents)).any():
        raise ValueError(f"latents must be from 0 to {n_latents - 1}, and are not everywhere")
    if offsets[0] != 0 or offsets[-1] != len(latents) or (offsets.diff() < 0).any():
        raise ValueError(f"offsets must rise from 0 to the {len(latents)} entries there are")
