"""Norm and answer direction in one step: what torch's own norms say, whoever computes it."""

import pytest
import torch
import torch.nn.functional as F

from interp_kernels import answer_logits
from tests.small_pairs import refused

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}
EPS = 1e-3


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def arguments(
    n: int, d_model: int, n_directions: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict:
    generator = torch.Generator().manual_seed(n)
    return {
        "resid": 3 + draw(n, d_model, device=device, dtype=dtype, seed=1),
        "directions": draw(n_directions, d_model, device=device, dtype=dtype, seed=2),
        "which": torch.randint(n_directions, (n,), generator=generator).to(device),
        "weight": draw(d_model, device=device, dtype=dtype, seed=3),
        "bias": draw(d_model, device=device, dtype=dtype, seed=4),
        "offset": draw(n_directions, device=device, dtype=dtype, seed=5),
    }


def expected(resid, directions, which, norm, weight=None, bias=None, offset=None) -> torch.Tensor:
    """In float64, by torch's own norms and logits of all directions."""
    resid, directions, weight, bias, offset = (
        None if x is None else x.double() for x in (resid, directions, weight, bias, offset)
    )
    if norm == "layer":
        y = F.layer_norm(resid, resid.shape[1:], weight, bias, EPS)
    else:
        y = F.rms_norm(resid, resid.shape[1:], weight, EPS)
        y = y if bias is None else y + bias
    return F.linear(y, directions, offset).gather(1, which.long()[:, None])[:, 0]


def check(given: dict, norm: str, backend: str, tolerance: float) -> None:
    found = answer_logits(**given, norm=norm, eps=EPS, backend=backend)
    assert found.dtype == torch.promote_types(given["resid"].dtype, torch.float32)
    assert found.shape == given["which"].shape
    truth = expected(**given, norm=norm)
    if len(truth):
        assert (found.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("d_model", [1, 20, 64, 768, 1100])
def test_sizes(d_model, norm, backend, device):
    check(arguments(4, d_model, 3, device), norm, backend, 1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, norm, backend, device):
    check(arguments(5, 48, 2, device, dtype), norm, backend, DTYPES[dtype])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("left_out", [["weight"], ["bias"], ["offset"], ["weight", "bias", "offset"]])
def test_what_is_not_given_is_not_there(left_out, norm, backend, device):
    given = {name: x for name, x in arguments(3, 24, 2, device).items() if name not in left_out}
    check(given, norm, backend, 1e-5)


def test_no_rows(backend, device):
    check(arguments(0, 24, 2, device), "layer", backend, 1e-5)


def test_values_may_be_views(backend, device):
    given = arguments(6, 24, 4, device)
    given["resid"] = torch.cat([given["resid"], given["resid"]], dim=1)[:, 5:29]
    given["directions"] = given["directions"].mT.contiguous().mT
    given["weight"] = torch.stack([given["weight"], given["bias"]], dim=1)[:, 0]
    given["which"] = given["which"].to(torch.int32).repeat_interleave(2)[::2]
    check(given, "layer", backend, 1e-5)


def test_half_precision_is_summed_in_full(backend, device):
    """In bfloat16, a sum of 4096 like values would stop growing long before its end."""
    resid = torch.ones(1, 4096, dtype=torch.bfloat16, device=device)
    which = torch.zeros(1, dtype=torch.int64, device=device)
    found = answer_logits(resid, resid, which, norm="rms", eps=0.0, backend=backend)
    assert found.item() == pytest.approx(4096, rel=1e-6)


def test_what_does_not_fit_is_refused(device):
    given = arguments(5, 8, 3, device) | {"eps": EPS}
    with refused(ValueError, "norm is one of layer, rms, not 'batch'"):
        answer_logits(**given, norm="batch")
    for name, wrong, says in (
        ("directions", given["directions"][:, :7], "must share d_model"),
        ("which", given["which"][:4], r"which must be int32 or int64 of shape \[5\]"),
        ("which", given["which"].to(torch.int16), "which must be int32 or int64"),
        ("weight", given["weight"][:7], r"weight must have shape \[8\], not \[7\]"),
        ("offset", given["offset"][:2], r"offset must have shape \[3\], not \[2\]"),
        ("bias", given["bias"].to("meta"), "but bias on meta"),
    ):
        with refused(ValueError, says):
            answer_logits(**{**given, name: wrong}, norm="rms")
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="which must be from 0 to 2"):
            answer_logits(**{**given, "which": torch.full_like(given["which"], wrong)}, norm="rms", backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_the_size_of_gpt2(dtype, gpu):
    check(arguments(10_800, 768, 8, gpu, dtype), "layer", "auto", 1e-5)
