"""Compile the kernels for an H100 as their launchers ask for them, on a machine without one. See test_compile.py.

A program of its own: Triton either interprets or compiles, in all of a process. Prints one line of JSON per compiled
kernel: its name, registers, spilled bytes and shared memory per program, and how wide its memory accesses are.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from interp_kernels import (
    Rows,
    _adam_rows_triton,
    _afa_select_triton,
    _answer_logits_triton,
    _append_rows_triton,
    _row_top_k_triton,
    _sparse_decode_triton,
    _suffix_attention_triton,
    _unembed_top_k_triton,
    _weight_gradients_triton,
    by_latent,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiling(kernel, about: str) -> Callable:
    """`kernel.run` that compiles and launches nothing."""
    run = type(kernel).run.__get__(kernel)

    def compile_only(*args, grid, warmup, **options):
        compiled = run(*args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        widths = re.findall(r"(?:ld\.global\S*|st\.global\S*|cp\.async\.c[ag]\S*)", compiled.asm["ptx"])
        print(json.dumps({
            "about": about, "kernel": compiled.name, "registers": registers, "spilled": stack,
            "shared": compiled.metadata.shared, "accesses": Counter(widths),
        }), flush=True)  # fmt: skip

    return compile_only


def attention(dtype: torch.dtype, d_head: int, n_queries: int, n_positions: int, group: int = 1, **options) -> None:
    kernel = _suffix_attention_triton._suffix_attention
    kernel.run = compiling(kernel, f"{dtype} d_head {d_head} queries {n_queries} positions {n_positions} {options}")
    n_kv_heads, table = 2, torch.zeros(3, dtype=torch.int64)
    q = torch.zeros(4, n_kv_heads * group, d_head, dtype=dtype)
    k = torch.zeros(4, n_kv_heads, d_head, dtype=dtype)
    base_q = torch.zeros(2, n_positions, *q.shape[1:], dtype=dtype)
    base_k = torch.zeros(2, n_positions, *k.shape[1:], dtype=dtype)
    rows = Rows(*[table] * 9, n_out=4, max_queries=n_queries)
    options = {"scale": d_head**-0.5, "softcap": None, "window": None, **options}
    _suffix_attention_triton.launch(q, k, k, base_q, base_k, base_k, rows, **options)


def append(dtype: torch.dtype, shape: tuple[int, ...], patched: torch.Tensor | None) -> None:
    kernel = _append_rows_triton._append_rows
    kernel.run = compiling(kernel, f"{dtype} {shape} patched {None if patched is None else list(patched.shape)}")
    base, index = torch.zeros(2, 5, *shape, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    source = None if patched is None else base
    _append_rows_triton.launch(torch.zeros(4, *shape, dtype=dtype), 1, base, index, index, source, patched)


def answer(dtype: torch.dtype, d_model: int, norm: str, whole: bool) -> None:
    kernel = _answer_logits_triton._answer_logits
    kernel.run = compiling(kernel, f"{dtype} {d_model} {norm} {whole}")
    x, which, weight = torch.zeros(3, d_model, dtype=dtype), torch.zeros(3, dtype=torch.int64), None
    if whole:
        weight = x[0]
    _answer_logits_triton.launch(x, x, which, weight, weight, norm, 1e-5, None if weight is None else x[:, 0])


def top_k(dtype: torch.dtype, n_columns: int) -> None:
    _row_top_k_triton._row_top_k.run = compiling(_row_top_k_triton._row_top_k, f"{dtype} columns {n_columns}")
    _row_top_k_triton.launch(torch.zeros(3, n_columns, dtype=dtype), 7)


def afa(dtype: torch.dtype, n_columns: int) -> None:
    for kernel in (_afa_select_triton._afa_cut, _afa_select_triton._afa_compact):
        kernel.run = compiling(kernel, f"{dtype} columns {n_columns}")
    _afa_select_triton.launch(torch.zeros(3, n_columns, dtype=dtype), torch.zeros(3), None)


def decode(dtype: torch.dtype, d: int, whole: bool) -> None:
    for kernel in (_sparse_decode_triton._sparse_decode, _sparse_decode_triton._sparse_dots):
        kernel.run = compiling(kernel, f"{dtype} {d} {whole}")
    weight = torch.zeros(4, d, dtype=dtype)
    latents, offsets = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4])
    bias, target = (weight[0], weight[:2]) if whole else (None, None)
    _sparse_decode_triton.launch_decode(weight[:, 0], latents, offsets, weight, bias, target)
    _sparse_decode_triton.launch_dots(latents, offsets, weight, weight[:2])


def gradients(dtype: torch.dtype, *widths: int) -> None:
    for kernel in (_weight_gradients_triton._sum_chunks, _weight_gradients_triton._weight_gradients):
        kernel.run = compiling(kernel, f"{dtype} {widths}")
    latents = torch.zeros(200, dtype=torch.int64)
    rows = [torch.zeros(3, d, dtype=dtype) for d in widths]
    coefficients = [torch.zeros(200, dtype=dtype) for _ in widths]
    _weight_gradients_triton.launch(*by_latent(latents, 2), latents, coefficients, rows)


def adam(dtype: torch.dtype, d: int, unit_rows: bool) -> None:
    _adam_rows_triton._adam_rows.run = compiling(_adam_rows_triton._adam_rows, f"{dtype} {d} {unit_rows}")
    x = torch.zeros(3, d, dtype=dtype)
    copy = x.bfloat16() if unit_rows else None
    _adam_rows_triton.launch(x, x, x, x, 1, 1e-3, (0.9, 0.999), 1e-8, unit_rows, copy)


def unembed(dtype: torch.dtype, d: int, n_tokens: int, k: int, whole: bool) -> None:
    kernel = _unembed_top_k_triton._unembed_top_k
    kernel.run = compiling(kernel, f"{dtype} d {d} tokens {n_tokens} k {k} {whole}")
    x, weight = torch.zeros(3, d, dtype=dtype), torch.zeros(n_tokens, d, dtype=dtype)
    _unembed_top_k_triton.launch(x, weight if whole else weight.view(d, -1).mT, k, both=whole, moments=whole)


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    everything = "--all" in sys.argv
    attention(torch.float32, 64, 15, 15)
    attention(torch.float32, 80, 40, 100, group=2, softcap=50.0, window=7)
    attention(torch.bfloat16, 128, 40, 100, group=4)
    attention(torch.float64, 20, 5, 15)
    append(torch.float32, (768,), None)
    append(torch.float32, (12, 64), torch.zeros(3, 12, dtype=torch.bool))
    answer(torch.float32, 768, "layer", whole=True)
    answer(torch.bfloat16, 4096, "rms", whole=False)
    top_k(torch.float32, 12288)
    top_k(torch.bfloat16, 65536)
    afa(torch.float32, 12288)
    afa(torch.bfloat16, 65536)
    decode(torch.float32, 768, whole=True)
    decode(torch.bfloat16, 2304, whole=False)
    gradients(torch.float32, 768, 768)
    gradients(torch.bfloat16, 2304)
    adam(torch.float32, 768, unit_rows=True)
    adam(torch.float32, 4096, unit_rows=False)
    unembed(torch.bfloat16, 4096, 1280, 10, whole=True)
    unembed(torch.float32, 768, 1257, 50, whole=True)
    if everything:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for d_head in (16, 64, 80, 96, 128, 256):
                for n_queries, n_positions in ((1, 15), (15, 15), (300, 300)):
                    attention(dtype, d_head, n_queries, n_positions)
                attention(dtype, d_head, 300, 300, group=4, softcap=50.0, window=7)
            append(dtype, (768,), torch.zeros(3, dtype=torch.bool))
            append(dtype, (3072,), torch.zeros(3, 3072, dtype=torch.bool))
            answer(dtype, 768, "layer", whole=True)
            decode(dtype, 768, whole=True)
            gradients(dtype, 768, 2304)
            for k in (1, 10, 128):
                unembed(dtype, 4096, 1280, k, whole=True)
            unembed(dtype, 768, 1280, 50, whole=False)
            for n_columns in (1000, 3072, 24576):
                top_k(dtype, n_columns)
                afa(dtype, n_columns)
        for dtype in (torch.float32, torch.float64):
            for d in (768, 2304, 8192):
                adam(dtype, d, unit_rows=True)


if __name__ == "__main__":
    main()
