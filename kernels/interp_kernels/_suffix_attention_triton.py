"""`suffix_attention` on a GPU: one program per row, kv head and block of queries, with an online softmax over keys."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from interp_kernels._dispatch import alignment
from interp_kernels.suffix_attention import Rows


@triton.jit
@no_type_check
def _tanh(x):
    size = tl.abs(x)
    shrunk = tl.exp(-2.0 * size)
    y = (1.0 - shrunk) / (1.0 + shrunk)
    if x.dtype == tl.float32:
        # 1 - exp(-2x) loses x's last digits where x is small, and a softcap multiplies the loss: there, the series.
        s = size * size
        series = 1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        y = tl.where(size < 0.25, size * series, y)
    return tl.where(x < 0, -y, y)


# What tells rows apart says nothing that a compiler could use; without this list it would compile anew for some of it.
_TABLES = [
    "prompt_ptr",
    "kv_start_ptr",
    "kv_stop_ptr",
    "kv_first_ptr",
    "q_start_ptr",
    "q_stop_ptr",
    "q_own_stop_ptr",
    "q_first_ptr",
    "out_first_ptr",
]


@triton.jit(do_not_specialize=[*_TABLES, "window", "n_blocks"])
@no_type_check
def _suffix_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    base_q_ptr,
    base_k_ptr,
    base_v_ptr,
    z_ptr,
    prompt_ptr,
    kv_start_ptr,
    kv_stop_ptr,
    kv_first_ptr,
    q_start_ptr,
    q_stop_ptr,
    q_own_stop_ptr,
    q_first_ptr,
    out_first_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    base_q_prompt,
    base_q_position,
    base_q_head,
    base_k_prompt,
    base_k_position,
    base_k_head,
    base_v_prompt,
    base_v_position,
    base_v_head,
    window,
    n_kv_heads,
    n_blocks,
    GROUP: tl.constexpr,
    D_HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Heads turn fastest: programs that run together then read neighbouring memory.
    program = tl.program_id(0)
    kv_head = (program % n_kv_heads).to(tl.int64)
    block = (program // n_kv_heads) % n_blocks
    row = program // n_kv_heads // n_blocks

    # Positions fit int32; offsets in memory may not.
    q_start = tl.load(q_start_ptr + row).to(tl.int32)
    q_stop = tl.load(q_stop_ptr + row).to(tl.int32)
    first = q_start + block * BLOCK_M // GROUP
    if first >= q_stop:
        return
    prompt = tl.load(prompt_ptr + row).to(tl.int64)
    kv_start = tl.load(kv_start_ptr + row).to(tl.int32)
    kv_stop = tl.load(kv_stop_ptr + row).to(tl.int32)
    kv_first = tl.load(kv_first_ptr + row).to(tl.int64)
    q_own_stop = tl.load(q_own_stop_ptr + row).to(tl.int32)
    q_first = tl.load(q_first_ptr + row).to(tl.int64)
    out_first = tl.load(out_first_ptr + row).to(tl.int64)

    # A slot is one query of one of the heads that share this kv head.
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = q_start + slot // GROUP
    head = kv_head * GROUP + slot % GROUP
    real = position < q_stop
    position = tl.minimum(position, q_stop - 1)  # slots past the end see what the last query sees: no empty softmax
    d = tl.arange(0, BLOCK_D)
    in_head = d < D_HEAD

    own_q = q_ptr + (q_first + position - q_start) * q_token + head * q_head
    shared_q = base_q_ptr + prompt * base_q_prompt + position.to(tl.int64) * base_q_position + head * base_q_head
    # The compiler loses sight of alignment where it chooses between two pointers, and would load value by value.
    q_at = tl.multiple_of(tl.where(position < q_own_stop, own_q, shared_q), ALIGNMENT)
    inside = real[:, None] & in_head[None, :]
    q = tl.load(q_at[:, None] + d[None, :], mask=inside, other=0.0).to(WIDE)

    k_ptr += (kv_first - kv_start) * k_token + kv_head * k_head
    v_ptr += (kv_first - kv_start) * v_token + kv_head * v_head
    base_k_ptr += prompt * base_k_prompt + kv_head * base_k_head
    base_v_ptr += prompt * base_v_prompt + kv_head * base_v_head

    high = tl.minimum(q_start + (block * BLOCK_M + BLOCK_M - 1) // GROUP, q_stop - 1) + 1
    low = 0
    if window is not None:
        low = tl.maximum(first - window + 1, 0)

    peak = tl.full([BLOCK_M], float("-inf"), WIDE)
    total = tl.zeros([BLOCK_M], WIDE)
    z = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    # Every position is read once, from whichever side has it: a block may hold both, which short rows need, whose few
    # own and few shared keys then fill one block together.
    for start in range(low, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        own = (key >= kv_start) & (key < kv_stop)
        there = key < high
        at = key.to(tl.int64)
        k_at = tl.multiple_of(tl.where(own, k_ptr + at * k_token, base_k_ptr + at * base_k_position), ALIGNMENT)
        k = tl.load(k_at[None, :] + d[:, None], mask=there[None, :] & in_head[:, None], other=0.0).to(WIDE)
        scores = tl.dot(q, k, input_precision=PRECISION, out_dtype=WIDE) * SCALE
        if SOFTCAP is not None:
            scores = SOFTCAP * _tanh(scores / SOFTCAP)
        visible = there[None, :] & (key[None, :] <= position[:, None])
        if window is not None:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # With a window, a query may see nothing of the first blocks: -inf - -inf is to be avoided.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - shift[:, None])
        if PRECISION == "tf32":
            # The tensor cores cut off what goes beyond ten bits, always downwards; rounded to as many, nothing is lost.
            weights = weights.to(tl.float16).to(WIDE)
        kept = tl.exp(peak - shift)
        peak = new_peak
        total = total * kept + tl.sum(weights, 1)
        v_at = tl.multiple_of(tl.where(own, v_ptr + at * v_token, base_v_ptr + at * base_v_position), ALIGNMENT)
        v = tl.load(v_at[:, None] + d[None, :], mask=there[:, None] & in_head[None, :], other=0.0).to(WIDE)
        z = tl.dot(weights, v, z * kept[:, None], input_precision=PRECISION, out_dtype=WIDE)

    z_token = n_kv_heads * GROUP * D_HEAD
    z_at = z_ptr + (out_first + position - q_start) * z_token + head * D_HEAD
    tl.store(z_at[:, None] + d[None, :], (z / total[:, None]).to(z_ptr.dtype.element_ty), mask=inside)


def _block(wanted: int, block_d: int, itemsize: int) -> int:
    """Rows of a tile: at least 16, of which a matrix product is made, else no more than wanted or than fit 16 KiB.

    Exact float32 products run outside the tensor cores on values held in registers, and more than 32 rows spill them.
    """
    return max(16, min(32, triton.next_power_of_2(wanted), 2**14 // (block_d * itemsize)))


def launch(
    q: Float[Tensor, "own_query head d_head"],
    k: Float[Tensor, "own_token kv_head d_head"],
    v: Float[Tensor, "own_token kv_head d_head"],
    base_q: Float[Tensor, "prompt position head d_head"],
    base_k: Float[Tensor, "prompt position kv_head d_head"],
    base_v: Float[Tensor, "prompt position kv_head d_head"],
    rows: Rows,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Float[Tensor, "out_token head d_head"]:
    """Run the kernel; arguments as `suffix_attention` has checked them."""
    n_heads, d_head = q.shape[1:]
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    z = torch.empty(rows.n_out, n_heads, d_head, dtype=q.dtype, device=q.device)
    # Channels must be neighbours in memory; every other axis may have any stride.
    q, k, v, base_q, base_k, base_v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, base_q, base_k, base_v)
    )
    wide = tl.float64 if q.dtype == torch.float64 else tl.float32
    itemsize = 8 if wide == tl.float64 else 4
    block_d = max(16, triton.next_power_of_2(d_head))
    block_m = _block(rows.max_queries * group, block_d, itemsize)
    block_n = _block(base_k.shape[1], block_d, itemsize)
    n_blocks = triton.cdiv(rows.max_queries * group, block_m)
    n_programs = len(rows) * n_kv_heads * n_blocks
    if n_programs == 0 or z.numel() == 0:
        return z
    with torch.cuda.device_of(q):
        _suffix_attention[(n_programs,)](
            q, k, v, base_q, base_k, base_v, z,
            *(column.contiguous() for column in rows.columns().values()),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *base_q.stride()[:3], *base_k.stride()[:3], *base_v.stride()[:3],
            window, n_kv_heads, n_blocks,
            GROUP=group, D_HEAD=d_head, SCALE=float(scale), SOFTCAP=None if softcap is None else float(softcap),
            WIDE=wide,
            # Half-precision values are exact in TF32, so the tensor cores may multiply them; float32 ones are not.
            PRECISION="ieee" if q.dtype.itemsize >= 4 else "tf32",
            ALIGNMENT=alignment(q, k, v, base_q, base_k, base_v),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=4 if block_d <= 64 else 8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return z
