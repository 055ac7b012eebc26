"""Patch-and-append: every new token is the base run's value or the source's, to the bit, and no other token changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import append_rows
from tests.small_pairs import refused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
N_PROMPTS, N_POSITIONS = 3, 5


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def where(n: int, device: torch.device, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and position of n new tokens."""
    generator = torch.Generator().manual_seed(n)
    sizes = N_PROMPTS, N_POSITIONS
    return tuple(torch.randint(size, (n,), generator=generator).to(device, dtype) for size in sizes)


def check(
    rest: tuple[int, ...], n: int, units: bool | None, backend: str, device: torch.device, dtype=torch.float32, **index
):
    """units: None for no patch, False for one answer per token, True for one per unit."""
    base, source = (draw(N_PROMPTS, N_POSITIONS, *rest, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    before = draw(n + 4, *rest, device=device, dtype=dtype, seed=3)
    prompt, position = where(n, device, **index)
    out, options = before.clone(), {}
    patched = torch.zeros(n, *rest[:1], dtype=torch.bool)
    if units is not None:
        patched = draw(n, *(rest[:1] if units else ()), device=torch.device("cpu"), seed=4) > 0
        options = {"source": source, "patched": patched.to(device)}
    append_rows(out, 3, base, prompt, position, **options, backend=backend)
    assert torch.equal(out[:3], before[:3])
    assert torch.equal(out[-1], before[-1])
    for t, (p, i) in enumerate(zip(prompt.tolist(), position.tolist(), strict=True)):
        if patched.ndim == 1:
            assert torch.equal(out[3 + t], (source if patched[t] else base)[p, i])
        else:
            for unit, new in enumerate(out[3 + t]):
                assert torch.equal(new, (source if patched[t, unit] else base)[p, i, unit])


@pytest.mark.parametrize("units", [None, False, True])
@pytest.mark.parametrize("rest", [(8,), (20,), (4, 16), (3, 5), (2100,), (2, 3, 7)])
def test_new_tokens_are_the_base_runs_or_the_sources(rest, units, backend, device):
    check(rest, 6, units, backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    check((2, 12), 3, True, backend, device, dtype)


@given(
    width=st.integers(1, 40), n=st.integers(0, 9), n_units=st.integers(1, 5), units=st.sampled_from([None, False, True])
)
@settings(deadline=None, max_examples=30)
def test_any_size_by_triton(width, n, n_units, units, device):
    pytest.importorskip("triton")
    check((n_units, width), n, units, "triton", device)


def test_no_new_tokens(backend, device):
    check((8,), 0, None, backend, device)


def test_values_may_be_views(backend, device):
    base = draw(N_PROMPTS, N_POSITIONS, 4, 6, device=device)
    (prompt, position), out = where(5, device, torch.int32), torch.zeros(5, 4, 3, device=device)
    patched = torch.tensor([[True, False, False, True]] * 5, device=device)
    odd, even = base[..., 1::2], base.transpose(0, 1).contiguous().transpose(0, 1)[..., :3]
    append_rows(out, 0, odd, prompt, position, source=even, patched=patched, backend=backend)
    expected = torch.where(
        patched[..., None], even[prompt.long(), position.long()], odd[prompt.long(), position.long()]
    )
    assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused(device):
    base, out, (prompt, position) = (
        draw(3, 5, 4, 2, device=device),
        torch.zeros(6, 4, 2, device=device),
        where(5, device),
    )
    patched = torch.zeros(5, dtype=torch.bool, device=device)
    with refused(ValueError, "5 tokens from 2 on do not fit into an out of 6"):
        append_rows(out, 2, base, prompt, position)
    with refused(ValueError, "5 tokens from -1 on do not fit"):
        append_rows(out, -1, base, prompt, position)
    with refused(ValueError, "out must be contiguous"):
        append_rows(out.mT.contiguous().mT, 0, base, prompt, position)
    with refused(ValueError, "base must be torch.float32"):
        append_rows(out, 0, base.double(), prompt, position)
    with refused(ValueError, "base must be torch.float32"):
        append_rows(out, 0, base[:, :, :3], prompt, position)
    with refused(ValueError, "position must be int32 or int64"):
        append_rows(out, 0, base, prompt, position[:4])
    with refused(ValueError, "source and patched go together"):
        append_rows(out, 0, base, prompt, position, source=base)
    with refused(ValueError, "source and patched go together"):
        append_rows(out, 0, base, prompt, position, patched=patched)
    with refused(ValueError, "base has shape"):
        append_rows(out, 0, base, prompt, position, source=base[:2], patched=patched)
    with refused(ValueError, "patched must be bool of shape"):
        append_rows(out, 0, base, prompt, position, source=base, patched=patched[:4])
    with refused(ValueError, "out is on .*, but source on meta"):
        append_rows(out, 0, base, prompt, position, source=base.to("meta"), patched=patched)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="position must be from 0 to 4"):
            append_rows(out, 0, base, prompt, torch.full_like(position, wrong), backend="torch")


@pytest.mark.gpu
def test_on_a_gpu_at_the_size_of_gpt2(gpu):
    check((768,), 5000, False, "auto", gpu)
    check((12, 64), 500, True, "auto", gpu)
