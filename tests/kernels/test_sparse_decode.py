"""Decoding a sparse code, and the gradient of its values: what the dense product and its autograd say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import sparse_decode, sparse_dots
from tests.small_pairs import refused

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}
LENGTHS = [3, 0, 1, 12, 0]  # entries of each row: none at the end and in between, and more than a program takes at once


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def code(lengths: list[int], n_latents: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """A code whose rows may name a latent twice."""
    n = sum(lengths)
    return {
        "values": draw(n, device=device, dtype=dtype, seed=1),
        "latents": torch.randint(n_latents, (n,), generator=torch.Generator().manual_seed(n)).to(device),
        "offsets": torch.tensor([0, *lengths]).cumsum(0).to(device),
    }


def arguments(
    lengths: list[int], n_latents: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict:
    return code(lengths, n_latents, device, dtype) | {
        "weight": draw(n_latents, d, device=device, dtype=dtype, seed=2),
        "bias": draw(d, device=device, dtype=dtype, seed=3),
        "target": draw(len(lengths), d, device=device, dtype=dtype, seed=4),
    }


def rows_of(offsets: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())


def dense(values, latents, offsets, n_latents: int) -> torch.Tensor:
    """The code as the matrix it stands for, in float64."""
    matrix = torch.zeros(len(offsets) - 1, n_latents, dtype=torch.float64, device=values.device)
    return matrix.index_put((rows_of(offsets), latents.long()), values.double(), accumulate=True)


def expected(values, latents, offsets, weight, bias=None, target=None) -> torch.Tensor:
    decoded = dense(values, latents, offsets, len(weight)) @ weight.double()
    decoded = decoded if bias is None else decoded + bias.double()
    return decoded if target is None else target.double() - decoded


def close(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape
    if truth.numel():
        assert (found.double() - truth).abs().max() <= tolerance * max(1, truth.abs().max())


def check(given: dict, backend: str, tolerance: float = 1e-5) -> None:
    """Both functions, on the arguments of `sparse_decode`; the target serves as the rows of `sparse_dots`."""
    found = sparse_decode(**given, backend=backend)
    wide = torch.promote_types(given["weight"].dtype, torch.float32)
    assert found.dtype == wide
    close(found, expected(**given), tolerance)
    if "target" in given:
        latents, offsets, weight, rows = (given[name] for name in ("latents", "offsets", "weight", "target"))
        dots = sparse_dots(latents, offsets, weight, rows, backend=backend)
        assert dots.dtype == wide
        close(
            dots, torch.einsum("ed,ed->e", weight.double()[latents.long()], rows.double()[rows_of(offsets)]), tolerance
        )


@pytest.mark.parametrize("d", [1, 5, 20, 64, 768, 1100])
def test_sizes(d, backend, device):
    check(arguments(LENGTHS, 7, d, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    check(arguments(LENGTHS, 7, 40, device, dtype), backend, DTYPES[dtype])


def test_dtypes_may_be_mixed(backend, device):
    given = arguments(LENGTHS, 7, 24, device)
    given["weight"] = given["weight"].bfloat16()
    check(given, backend)
    assert sparse_decode(**given | {"values": given["values"].double()}, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("left_out", [["bias"], ["target"], ["bias", "target"]])
def test_what_is_not_given_is_not_there(left_out, backend, device):
    check({name: x for name, x in arguments(LENGTHS, 7, 24, device).items() if name not in left_out}, backend)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=["no_rows", "one_empty_row", "empty_rows"])
def test_no_entries(lengths, backend, device):
    check(arguments(lengths, 7, 24, device), backend)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=5), st.integers(1, 5), st.integers(1, 40))
def test_any_code(lengths, n_latents, d):
    for backend in ("torch", "triton"):
        if backend == "triton":
            pytest.importorskip("triton")
            if torch.cuda.is_available():
                continue  # tensors are on the CPU here, which only the interpreter reads
        check(arguments(lengths, n_latents, d, torch.device("cpu")), backend)


def test_values_may_be_views(backend, device):
    given = arguments(LENGTHS, 7, 24, device)
    given["weight"] = given["weight"].mT.contiguous().mT
    given["target"] = torch.cat([given["target"], given["target"]], dim=1)[:, 5:29]
    given["bias"] = torch.stack([given["bias"], given["bias"]], dim=1)[:, 0]
    for name in ("values", "latents", "offsets"):
        given[name] = given[name].repeat_interleave(2)[::2]
    given["latents"] = given["latents"].to(torch.int32)
    check(given, backend)


def test_the_dots_are_the_gradient_of_the_values(backend, device):
    given = arguments(LENGTHS, 7, 24, device, torch.float64)
    rows = given.pop("target")
    values = given["values"].requires_grad_()
    sparse_decode(**given, backend="torch").backward(rows)
    found = sparse_dots(given["latents"], given["offsets"], given["weight"], rows, backend=backend)
    torch.testing.assert_close(found, values.grad)


def test_the_torch_paths_have_gradients(device):
    given = arguments([2, 0, 1], 3, 4, device, torch.float64)
    latents, offsets = given.pop("latents"), given.pop("offsets")
    values, weight, bias, target = (x.requires_grad_() for x in given.values())
    decode = lambda v, w, b, t: sparse_decode(v, latents, offsets, w, bias=b, target=t, backend="torch")  # noqa: E731
    dots = lambda w, t: sparse_dots(latents, offsets, w, t, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(decode, (values, weight, bias, target))
    assert torch.autograd.gradcheck(dots, (weight, target))
    assert not sparse_dots(latents, offsets, weight.detach(), target.detach(), backend="torch").requires_grad


def test_half_precision_is_summed_in_full(backend, device):
    """In bfloat16, a sum of 1000 ones would stop growing at 256."""
    ones = torch.ones(1000, 8, dtype=torch.bfloat16, device=device)
    latents, offsets = torch.arange(1000, device=device), torch.tensor([0, 1000], device=device)
    found = sparse_decode(ones[:, 0], latents, offsets, ones, backend=backend)
    assert torch.equal(found, torch.full((1, 8), 1000.0, device=device))


def test_what_does_not_fit_is_refused(device):
    given = arguments(LENGTHS, 7, 8, device)
    for name, wrong, says in (
        ("values", given["values"][:4], r"values must have shape \[16\], not \[4\]"),
        ("latents", given["latents"].to(torch.int16), "latents must be one row of int32 or int64, not torch.int16"),
        ("offsets", given["offsets"][:0], "offsets must have one number more than there are rows"),
        ("weight", given["weight"][0], r"weight must be \[latent, d\], not \[8\]"),
        ("bias", given["bias"][:7], r"bias must have shape \[8\], not \[7\]"),
        ("bias", given["bias"].to("meta"), "but bias on meta"),
        ("target", given["target"][:4], r"target must have shape \[5, 8\], not \[4, 8\]"),
    ):
        with refused(ValueError, says):
            sparse_decode(**{**given, name: wrong})
    with refused(ValueError, r"rows must have shape \[5, 8\], not \[4, 8\]"):
        sparse_dots(given["latents"], given["offsets"], given["weight"], given["target"][:4])


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_latent_out_of_range_is_refused_by_torch(wrong, device):
    given = arguments(LENGTHS, 7, 8, device)
    given["latents"][2] = wrong
    with pytest.raises(ValueError, match="latents must be from 0 to 6"):
        sparse_decode(**given, backend="torch")


@pytest.mark.parametrize("offsets", [[1, 3, 16], [0, 3, 15], [0, 17, 16]], ids=["start", "end", "fall"])
def test_offsets_that_do_not_rise_to_the_end_are_refused_by_torch(offsets, device):
    given = arguments(LENGTHS, 7, 8, device)
    with pytest.raises(ValueError, match="offsets must rise from 0 to the 16 entries"):
        sparse_dots(
            given["latents"],
            torch.tensor(offsets, device=device),
            given["weight"],
            given["target"][:2],
            backend="torch",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_the_size_of_gpt2(dtype, gpu):
    check(arguments([32] * 4096, 24_576, 768, gpu, dtype), "auto", 1e-4)
