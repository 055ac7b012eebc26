"""Who computes: Triton for tensors on a CUDA device, torch for all others, and nobody unasked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_kernels import _dispatch, answer_logits, suffix_attention
from tests.kernels.attention_cases import Case, Row, Shape
from tests.small_pairs import refused

ROOT = Path(_dispatch.__file__).resolve().parents[2]
CASE = [Row(0, (3, 7), (3, 7), 7)]


def environment(**changes: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels")]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **changes}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=120).stdout


def test_triton_is_not_imported_before_it_is_needed():
    assert run("""if True:
        import sys
        import torch
        from interp_kernels import answer_logits
        before = "triton" in sys.modules
        x, which = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
        answer_logits(x, x, which, norm="rms", eps=0.1)
        print(before, "interp_kernels._answer_logits_triton" in sys.modules)
    """).split() == ["False", "False"]


def test_triton_that_is_missing(monkeypatch, device):
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package triton, which is not installed"):
        suffix_attention(*Case(CASE, Shape(), device).arguments(), scale=1.0, backend="triton")
    Case(CASE, Shape(), device).check("torch", scale=1.0)


def test_a_cpu_tensor_without_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on a CUDA device only"):
        suffix_attention(*Case(CASE, Shape(), torch.device("cpu")).arguments(), scale=1.0, backend="triton")


def test_no_such_backend(device):
    with refused(ValueError, "backend is one of auto, triton, torch, not 'numpy'"):
        suffix_attention(*Case(CASE, Shape(), device).arguments(), scale=1.0, backend="numpy")


def test_gradients_are_torchs(device):
    pytest.importorskip("triton")
    x = torch.randn(2, 4, device=device, requires_grad=True)
    which = torch.zeros(2, dtype=torch.int64, device=device)
    answer_logits(x, x, which, norm="rms", eps=0.1, backend="torch").sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no kernel has a backward, and resid requires gradients"):
        answer_logits(x, x, which, norm="rms", eps=0.1, backend="triton")
    with torch.no_grad():
        answer_logits(x, x, which, norm="rms", eps=0.1, backend="triton")


def test_alignment():
    x = torch.zeros(64)
    start = x.data_ptr() % 16 // 4  # torch aligns to 64 bytes; said in case it should not
    x = x[-start % 4 :]
    assert _dispatch.alignment(x[:32].view(4, 8)) == 16
    assert _dispatch.alignment(x[1:33].view(4, 8)) == 4
    assert _dispatch.alignment(x[:30].view(5, 6)) == 8
    assert _dispatch.alignment(x[:30].view(5, 6)[:1]) == 16


def test_every_kernel_compiles_for_an_h100(tmp_path):
    """With no GPU at hand: Triton's compiler and its assembler need none. Sizes as `compile_for_hopper` chooses them."""
    pytest.importorskip("triton.backends.nvidia")
    if sys.platform != "linux":
        pytest.skip("Triton compiles for CUDA on Linux")
    import json

    command = [sys.executable, "-W", "error", Path(__file__).with_name("compile_for_hopper.py")]
    fresh = environment(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run(command, env=fresh, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        "_suffix_attention", "_append_rows", "_answer_logits", "_row_top_k", "_afa_cut", "_afa_compact",
        "_sparse_decode", "_sparse_dots", "_sum_chunks", "_weight_gradients", "_adam_rows",
        "_unembed_top_k",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["spilled"] <= 64, kernel
        # Three programs or more on a multiprocessor; a large product fills its registers, and pipelines its loads instead.
        assert kernel["shared"] <= (96 if kernel["kernel"] == "_unembed_top_k" else 64) * 1024, kernel
        wide = [access for access in kernel["accesses"] if re.search(r"v4\.b32|v2\.b64|cp\.async\.cg", access)]
        assert wide, f"no 16-byte access to memory: {kernel}"
