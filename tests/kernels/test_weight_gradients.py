"""Gradients gathered latent by latent: what a loop over entries, and dense autograd, say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import by_latent, sparse_decode, weight_gradients
from tests.small_pairs import refused

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Entries of each latent: none, few, and so many that chunks of 128 lie within; positions 128 to 256 are all latent 3's.
SEGMENTS = [0, 5, 1, 300, 0, 9, 0]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def arguments(
    segments: list[int], n_rows: int, widths: list[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict:
    generator = torch.Generator().manual_seed(sum(segments))
    latents = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments, dtype=torch.int64))
    latents = latents[torch.randperm(len(latents), generator=generator)].to(device)
    order, starts = by_latent(latents, len(segments))
    return {
        "order": order,
        "starts": starts,
        "entry_rows": torch.randint(n_rows, latents.shape, generator=generator).sort().values.to(device),
        "coefficients": [draw(len(latents), device=device, dtype=dtype, seed=i) for i, _ in enumerate(widths)],
        "rows": [draw(n_rows, d, device=device, dtype=dtype, seed=5 + i) for i, d in enumerate(widths)],
    }


def check(given: dict, backend: str, tolerance: float = 1e-5) -> None:
    found = weight_gradients(**given, backend=backend)
    starts = given["starts"].long()
    latent_of = torch.empty(len(given["order"]), dtype=torch.int64, device=starts.device)
    segments = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    latent_of[given["order"].long()] = segments
    assert len(found) == len(given["rows"])
    for result, c, x in zip(found, given["coefficients"], given["rows"], strict=True):
        truth = torch.zeros(len(starts) - 1, x.shape[1], dtype=torch.float64, device=x.device)
        for e, latent in enumerate(latent_of.tolist()):
            truth[latent] += c[e].double() * x[given["entry_rows"][e]].double()
        assert result.dtype == torch.promote_types(x.dtype, torch.float32)
        assert result.shape == truth.shape
        if truth.numel():
            assert (result.double() - truth).abs().max() <= tolerance * max(1, truth.abs().max())


@given(st.lists(st.integers(0, 6), max_size=40), st.sampled_from([torch.int32, torch.int64]))
def test_the_order_is_stable_and_its_segments_are_the_latents(latents, dtype):
    order, starts = by_latent(torch.tensor(latents, dtype=dtype), 7)
    assert order.tolist() == sorted(range(len(latents)), key=latents.__getitem__)
    assert starts.tolist() == [sum(x < latent for x in latents) for latent in range(8)]
    assert order.dtype == starts.dtype == torch.int64


@pytest.mark.parametrize("widths", [[1], [24], [300], [20, 20], [5, 300]], ids=str)
def test_sizes(widths, backend, device):
    check(arguments(SEGMENTS, 11, widths, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    check(arguments(SEGMENTS, 11, [24, 24], device, dtype), backend, DTYPES[dtype])


@pytest.mark.parametrize(
    "segments", [[], [0], [0, 0, 0], [128], [127, 129], [1, 255], [100, 56, 100, 128], [60, 2, 3, 515, 4]], ids=str
)
def test_wherever_the_chunks_are_cut(segments, backend, device):
    check(arguments(segments, 4, [8, 3], device), backend)


def test_segments_longer_than_a_program_adds_at_once(backend, device):
    """Chunks lie ten to a segment: more than the sums of chunks under way at a time."""
    check(arguments([70, 1330], 4, [4], device), backend)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 9), st.integers(100, 300)), max_size=4), st.integers(1, 20), st.booleans())
def test_any_segments(segments, d, two):
    for backend in ("torch", "triton"):
        if backend == "triton":
            pytest.importorskip("triton")
            if torch.cuda.is_available():
                continue  # tensors are on the CPU here, which only the interpreter reads
        check(arguments(segments, 3, [d, 2] if two else [d], torch.device("cpu")), backend)


def test_no_rows(backend, device):
    check(arguments([0, 0], 1, [8], device) | {"rows": [torch.empty(0, 8, device=device)]}, backend)


def test_values_may_be_views(backend, device):
    given = arguments(SEGMENTS, 11, [24, 24], device)
    given["rows"][0] = given["rows"][0].mT.contiguous().mT
    given["rows"][1] = torch.cat(given["rows"], dim=1)[:, 5:29]
    given["coefficients"] = [c.repeat_interleave(2)[::2] for c in given["coefficients"]]
    for name in ("order", "starts", "entry_rows"):
        given[name] = given[name].to(torch.int32).repeat_interleave(2)[::2]
    check(given, backend)


def test_it_is_the_gradient_of_decoding(backend, device):
    latents = torch.randint(6, (40,), generator=torch.Generator().manual_seed(0)).to(device)
    offsets = torch.tensor([0, 9, 9, 20, 40], device=device)
    values = draw(40, device=device, dtype=torch.float64, seed=1)
    weight = draw(6, 10, device=device, dtype=torch.float64, seed=2).requires_grad_()
    rows = draw(4, 10, device=device, dtype=torch.float64, seed=3)
    sparse_decode(values, latents, offsets, weight, backend="torch").backward(rows)
    order, starts = by_latent(latents, 6)
    entry_rows = torch.arange(4, device=device).repeat_interleave(offsets.diff())
    (found,) = weight_gradients(order, starts, entry_rows, [values], [rows], backend=backend)
    torch.testing.assert_close(found, weight.grad)


def test_two_pairs_are_twice_one_pair_and_every_run_is_the_same(backend, device):
    given = arguments(SEGMENTS, 11, [24, 20], device)
    both = weight_gradients(**given, backend=backend)
    again = weight_gradients(**given, backend=backend)
    for i, result in enumerate(both):
        one = {name: given[name][i : i + 1] for name in ("coefficients", "rows")}
        assert torch.equal(result, again[i])
        assert torch.equal(result, weight_gradients(**given | one, backend=backend)[0])


def test_the_torch_path_has_gradients(device):
    given = arguments([2, 0, 3], 2, [4], device, torch.float64)
    c, x = given.pop("coefficients")[0].requires_grad_(), given.pop("rows")[0].requires_grad_()
    function = lambda c, x: weight_gradients(**given, coefficients=[c], rows=[x], backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, (c, x))


def test_what_does_not_fit_is_refused(device):
    given = arguments([3, 4], 5, [8, 8], device)
    with refused(ValueError, "latents must be one row of int32 or int64, not torch.int16"):
        by_latent(given["order"].to(torch.int16), 9)
    c, x = given["coefficients"], given["rows"]
    for name, wrong, says in (
        ("rows", [*x, x[0]], "one or two pairs, not 2 coefficients and 3 rows"),
        ("coefficients", [c[0], c[1][:6]], r"coefficients\[1\] must have shape \[7\], not \[6\]"),
        ("rows", [x[0], x[1][:4]], r"rows\[1\] must be \[5, d\], not \[4, 8\]"),
        ("rows", [x[0], x[1].to("meta")], r"but rows\[1\] on meta"),
        ("entry_rows", given["entry_rows"][:5], r"entry_rows must have shape \[7\], not \[5\]"),
        ("starts", given["starts"].float(), "starts must be one row of int32 or int64, not torch.float32"),
        ("starts", given["starts"][:0], "starts must have one number more than there are latents"),
    ):
        with refused(ValueError, says):
            weight_gradients(**{**given, name: wrong})
    for name, wrong, says in (
        ("order", given["order"] + 1, "order must be from 0 to 6"),
        ("entry_rows", given["entry_rows"] - 5, "entry_rows must be from 0 to 4"),
        ("starts", given["starts"] + 1, "starts must rise from 0 to the 7 entries"),
    ):
        with pytest.raises(ValueError, match=says):
            weight_gradients(**{**given, name: wrong}, backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_the_size_of_gpt2(dtype, gpu):
    segments = [4096, 1000, *[5] * 25_000]
    given = arguments(segments, 4096, [768, 768], gpu, dtype)
    wide = {name: [x.double() for x in given[name]] for name in ("coefficients", "rows")}
    found, truth = weight_gradients(**given), weight_gradients(**given | wide, backend="torch")
    for result, true in zip(found, truth, strict=True):
        assert (result.double() - true).abs().max() <= 1e-5 * true.abs().max()
