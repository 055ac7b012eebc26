"""Attention of rows that differ from the base run of their prompt at some positions only."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels._dispatch import Backend, at_least_float32, check_one_device, takes_triton


@dataclass(frozen=True, eq=False)
class Rows:
    """Which positions each row attends at, and where its own values lie; all tensors are int32 or int64, on one device.

    A row's own keys and values are those of positions kv_start..kv_stop-1 and lie at own tokens kv_first, kv_first+1,
    ...; at every other position, before and after, its keys and values are the base run's. z is computed for positions
    q_start..q_stop-1 and lies at output tokens out_first, ...; the queries at positions before q_own_stop are the row's
    own and lie at own queries q_first, ..., those from q_own_stop on are the base run's.

    Attributes:
        n_out: number of output tokens. Those that belong to no row are left uninitialised.
        max_queries: at least the largest q_stop - q_start (known without asking the device).
    """

    prompt: Int[Tensor, " row"]
    kv_start: Int[Tensor, " row"]
    kv_stop: Int[Tensor, " row"]
    kv_first: Int[Tensor, " row"]
    q_start: Int[Tensor, " row"]
    q_stop: Int[Tensor, " row"]
    q_own_stop: Int[Tensor, " row"]
    q_first: Int[Tensor, " row"]
    out_first: Int[Tensor, " row"]
    n_out: int
    max_queries: int

    def columns(self) -> dict[str, Int[Tensor, " row"]]:
        """The tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("n_out", "max_queries")}

    def __len__(self) -> int:
        return len(self.prompt)


def suffix_attention(
    q: Float[Tensor, "own_query head d_head"],
    k: Float[Tensor, "own_token kv_head d_head"],
    v: Float[Tensor, "own_token kv_head d_head"],
    base_q: Float[Tensor, "prompt position head d_head"],
    base_k: Float[Tensor, "prompt position kv_head d_head"],
    base_v: Float[Tensor, "prompt position kv_head d_head"],
    rows: Rows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "out_token head d_head"]:
    """Causal attention of packed rows over their own keys and values and, where they have none, their base run's.

        z_i = sum_j softmax_j(s_ij) v_j   over positions j <= i, and j > i - window if there is a window
        s_ij = scale * q_i . k_j, with a softcap c: c * tanh(scale * q_i . k_j / c)

    q and k enter as they are multiplied, already normed and rotated. Query head h reads kv head h // (head / kv_head).
    Scores, softmax and sums are float32 at least (float64 for float64), float32 products are not rounded to TF32; z has
    q's dtype. Which positions are whose is told by `rows`. Its indices are checked by the torch path only, since a GPU
    would have to be waited for: elsewhere a wrong index reads foreign memory.

    Roofline, H100 SXM, GPT-2 small in float32 in the middle of a sweep (10,800 rows of mean 8 of 15 tokens; 12 heads of
    64): own q, k, v read once and z written once are 4 * 86,400 tokens * 3 KiB = 1.06 GB, 0.32 ms at 3.35 TB/s; the base
    run (1.1 MB) stays in L2. Each query sees 10.3 keys on average: 2.7 GFLOP, 0.04 ms at 67 TFLOP/s, and 0.13 ms with
    tiles padded to 16 x 16. So memory bound, 0.3 ms a layer; half of that in bfloat16.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; window < 1; on the torch path, an index out of range.
        ImportError: Triton is to do it and is not installed.
    """
    _check(q, k, v, base_q, base_k, base_v, rows, window)
    tensors = {"q": q, "k": k, "v": v, "base_q": base_q, "base_k": base_k, "base_v": base_v}
    if takes_triton(backend, **tensors):
        from interp_kernels._suffix_attention_triton import launch

        return launch(q, k, v, base_q, base_k, base_v, rows, scale, softcap, window)
    return suffix_attention_torch(q, k, v, base_q, base_k, base_v, rows, scale=scale, softcap=softcap, window=window)


def suffix_attention_torch(
    q: Float[Tensor, "own_query head d_head"],
    k: Float[Tensor, "own_token kv_head d_head"],
    v: Float[Tensor, "own_token kv_head d_head"],
    base_q: Float[Tensor, "prompt position head d_head"],
    base_k: Float[Tensor, "prompt position kv_head d_head"],
    base_v: Float[Tensor, "prompt position kv_head d_head"],
    rows: Rows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "out_token head d_head"]:
    """The same, row by row: what the kernel must reproduce."""
    z = q.new_empty(rows.n_out, *q.shape[1:])
    wide, group = at_least_float32(q.dtype), q.shape[1] // k.shape[1]
    names = list(rows.columns())
    for number, numbers in enumerate(torch.stack([c.long() for c in rows.columns().values()], 1).tolist()):
        at = dict(zip(names, numbers, strict=True))
        _check_row(number, at, q, k, base_k, rows)
        prompt, q_start, q_stop = at["prompt"], at["q_start"], at["q_stop"]
        n_own, n_own_queries = at["kv_stop"] - at["kv_start"], _n_own_queries(at)
        own = slice(at["kv_first"], at["kv_first"] + n_own)
        places = slice(at["kv_start"], at["kv_stop"])
        keys, values = base_k[prompt].clone(), base_v[prompt].clone()
        keys[places], values[places] = k[own], v[own]
        own_queries = q[at["q_first"] : at["q_first"] + n_own_queries]
        queries = torch.cat([own_queries, base_q[prompt, q_start + n_own_queries : q_stop]])

        keys, values = (x.to(wide).repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhe,khe->hqk", queries.to(wide), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(q_start, q_stop, device=q.device)[:, None] - torch.arange(len(keys), device=q.device)
        forbidden = back < 0 if window is None else (back < 0) | (back >= window)
        pattern = scores.masked_fill(forbidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khe->qhe", pattern, values)
        z[at["out_first"] : at["out_first"] + len(queries)] = mixed.to(q.dtype)
    return z


def _n_own_queries(at: dict[str, int]) -> int:
    return max(0, min(at["q_own_stop"], at["q_stop"]) - at["q_start"])


def _check(
    q: Tensor, k: Tensor, v: Tensor, base_q: Tensor, base_k: Tensor, base_v: Tensor, rows: Rows, window: int | None
) -> None:
    """What can be told without looking at the numbers in `rows`."""
    tensors = {"q": q, "k": k, "v": v, "base_q": base_q, "base_k": base_k, "base_v": base_v}
    columns = rows.columns()
    check_one_device(**tensors, **{f"rows.{name}": column for name, column in columns.items()})
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype}, but {name} {tensor.dtype}")
        if tensor.ndim != (4 if name.startswith("base") else 3):
            raise ValueError(f"{name} has shape {list(tensor.shape)}: a number of axes that does not fit")
    if base_q.shape[2:] != q.shape[1:]:
        raise ValueError(f"q has heads {list(q.shape[1:])}, but base_q {list(base_q.shape[2:])}")
    for name, x in (("v", v), ("base_k", base_k), ("base_v", base_v)):
        if x.shape[-2:] != k.shape[1:]:
            raise ValueError(f"k has heads {list(k.shape[1:])}, but {name} {list(x.shape[-2:])}")
    if len(v) != len(k) or not base_q.shape[:2] == base_k.shape[:2] == base_v.shape[:2]:
        raise ValueError("k and v must have as many tokens, and base_q, base_k, base_v as many prompts and positions")
    if q.shape[2] != k.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{list(q.shape[1:])} query heads cannot share {list(k.shape[1:])} kv heads")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} sees nothing; it must be at least 1")
    for name, column in columns.items():
        if column.shape != (len(rows),) or column.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows.{name} must be int32 or int64 of shape [{len(rows)}], as rows.prompt is")


def _check_row(number: int, at: dict[str, int], q: Tensor, k: Tensor, base_k: Tensor, rows: Rows) -> None:
    n_prompts, n_positions = base_k.shape[:2]
    n_queries = at["q_stop"] - at["q_start"]
    fits = {
        "prompt": 0 <= at["prompt"] < n_prompts,
        "kv_start..kv_stop": 0 <= at["kv_start"] <= at["kv_stop"] <= n_positions,
        "kv_first": 0 <= at["kv_first"] <= len(k) - (at["kv_stop"] - at["kv_start"]),
        "q_start..q_stop": 0 <= at["q_start"] <= at["q_stop"] <= n_positions and n_queries <= rows.max_queries,
        "q_first": 0 <= at["q_first"] <= len(q) - _n_own_queries(at),
        "out_first": 0 <= at["out_first"] <= rows.n_out - n_queries,
    }
    for what, fine in fits.items():
        if not fine:
            raise ValueError(f"row {number}: {what} is out of range ({at})")
