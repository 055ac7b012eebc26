"""The k best tokens of each row: what a stable sort of all scores puts first, whatever the tiles and whoever computes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import TopTokens, unembed_top_k
from interp_kernels.unembed_top_k import TRITON_K, unembed_top_k_torch
from tests.small_pairs import refused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def whole(
    *shape: int, largest: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Whole numbers: their products are exact in every dtype here and in any order, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype).to(device)


def dense(x: torch.Tensor, weight: torch.Tensor, k: int, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids by a stable sort of all scores in float64, which of equal ones has the lowest id first."""
    scores = x.double() @ weight.double().T
    poles = torch.stack([scores, -scores] if both else [scores])
    values, ids = poles.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]


def check(found: TopTokens, x: torch.Tensor, weight: torch.Tensor, k: int, both: bool) -> None:
    """Of whole numbers: equal to the dense result, bit for bit."""
    values, ids = dense(x, weight, k, both)
    assert found.values.shape == found.ids.shape == (1 + both, len(x), k)
    assert (found.values.dtype, found.ids.dtype) == (torch.promote_types(x.dtype, torch.float32), torch.int64)
    assert torch.equal(found.values.double(), values)
    assert torch.equal(found.ids, ids)


@given(n_rows=st.integers(1, 9), n_tokens=st.integers(1, 150), d=st.integers(1, 5), largest=st.integers(0, 4),
       rows=st.integers(1, 9), tokens=st.integers(1, 150), k=st.floats(0, 1), seed=st.integers(0, 99),
       both=st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_torch_equals_a_sort_whatever_the_tiles(n_rows, n_tokens, d, largest, rows, tokens, k, seed, both, device):
    x = whole(n_rows, d, largest=largest, device=device, seed=seed)
    weight = whole(n_tokens, d, largest=largest, device=device, seed=seed + 1)
    k = 1 + round(k**3 * (n_tokens - 1))
    check(unembed_top_k_torch(x, weight, k, both=both, block=(rows, tokens)), x, weight, k, both)


@given(n_rows=st.integers(1, 3), n_tokens=st.integers(1, 200), d=st.integers(1, 40), k=st.integers(1, 12),
       largest=st.integers(0, 3), n_splits=st.integers(1, 4), dtype=st.sampled_from(DTYPES),
       both=st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=12)
def test_triton_equals_a_sort_whatever_the_splits(n_rows, n_tokens, d, k, largest, n_splits, dtype, both, device):
    pytest.importorskip("triton")
    from interp_kernels._unembed_top_k_triton import launch

    x = whole(n_rows, d, largest=largest, device=device, dtype=dtype)
    weight = whole(n_tokens, d, largest=largest, device=device, dtype=dtype, seed=1)
    k = min(k, n_tokens)
    check(launch(x, weight, k, both, False, n_splits=n_splits), x, weight, k, both)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    x, weight = (whole(n, 20, largest=2, device=device, dtype=dtype, seed=n) for n in (3, 140))
    check(unembed_top_k(x, weight, 9, both=True, backend=backend), x, weight, 9, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_rounded(dtype, backend, device):
    """Scores 4096 + t differ in float32; in half precision many would be equal."""
    x = torch.tensor([[64.0, 1.0]], device=device, dtype=dtype)
    weight = torch.stack([torch.full((60,), 64.0), torch.arange(60.0)], dim=1).to(dtype).to(device)
    found = unembed_top_k(x, weight, 3, backend=backend)
    assert found.values.tolist() == [[[4155, 4154, 4153]]]
    assert found.ids.tolist() == [[[59, 58, 57]]]


def test_a_long_list(device):
    """Longer than a tile of tokens, and looked through in parts."""
    pytest.importorskip("triton")
    x, weight = whole(1, 2, largest=9, device=device), whole(130, 2, largest=9, device=device, seed=1)
    check(unembed_top_k(x, weight, 90, backend="triton"), x, weight, 90, False)


def test_any_k_for_torch(device):
    x, weight = whole(3, 4, largest=9, device=device), whole(300, 4, largest=9, device=device, seed=1)
    for k in (1, 40, 129, 299, 300):
        check(unembed_top_k(x, weight, k, both=True, backend="torch"), x, weight, k, True)


@pytest.mark.parametrize("order", ["equal", "rising", "falling"])
def test_scores_in_the_worst_order(order, device):
    """Rows that outgrow their share of a tile are sorted whole, beside others that do not."""
    n = 900
    line = {"equal": torch.ones(n), "rising": torch.arange(n), "falling": torch.arange(n).flip(0)}[order]
    weight = torch.stack([line.float(), whole(n, largest=500, device=torch.device("cpu"))], dim=1).to(device)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], device=device)
    for block in ((4, 900), (4, 512), (3, 100)):
        check(unembed_top_k_torch(x, weight, 3, both=True, block=block), x, weight, 3, True)


def test_rows_and_tokens_may_be_permuted(backend, device):
    x, weight = draw(5, 8, device=device), draw(70, 8, device=device, seed=1)
    found = unembed_top_k(x, weight, 4, both=True, backend=backend)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    moved = unembed_top_k(x[order], weight, 4, both=True, backend=backend)
    assert torch.equal(moved.ids, found.ids[:, order])
    torch.testing.assert_close(moved.values, found.values[:, order])
    back = unembed_top_k(x, weight.flip(0), 4, both=True, backend=backend)
    assert torch.equal(69 - back.ids, found.ids)


def test_the_other_pole_is_the_one_of_minus_x(backend, device):
    x, weight = whole(3, 4, largest=3, device=device), whole(90, 4, largest=3, device=device, seed=1)
    found, negated = (unembed_top_k(y, weight, 5, both=True, backend=backend) for y in (x, -x))
    assert torch.equal(found.ids, negated.ids.flip(0))
    assert torch.equal(found.values, negated.values.flip(0))


def test_a_planted_token_comes_first(backend, device):
    weight = torch.nn.functional.normalize(draw(100, 16, device=device), dim=1)
    ids = torch.tensor([0, 17, 99], device=device)
    found = unembed_top_k(weight[ids], weight, 1, backend=backend)
    assert torch.equal(found.ids[0, :, 0], ids)
    torch.testing.assert_close(found.values[0, :, 0], torch.ones(3, device=device))


def test_weight_and_rows_may_be_views(backend, device):
    x = whole(8, 30, largest=2, device=device)
    unembedding = whole(6, 150, largest=2, device=device, seed=1)
    for rows in (x[::2, 3:9], x[:, ::5], x[:6].mT[:3]):
        for weight in (unembedding.mT, unembedding.mT[::2], unembedding.mT.contiguous()[3:]):
            check(unembed_top_k(rows, weight, 4, both=True, backend=backend), rows, weight, 4, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_sums_of_powers(dtype, backend, device):
    x, weight = draw(4, 24, device=device, dtype=dtype), draw(200, 24, device=device, dtype=dtype, seed=1)
    found = unembed_top_k(x, weight, 2, moments=True, backend=backend).moments
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    scores = x.double() @ weight.double().T
    size = torch.stack([scores.abs().pow(p).sum(1) for p in (1, 2, 3, 4)], dim=1)
    truth = torch.stack([scores.pow(p).sum(1) for p in (1, 2, 3, 4)], dim=1)
    assert ((found.double() - truth).abs() <= (1e-12 if dtype == torch.float64 else 3e-6) * size).all()


def test_moments_do_not_depend_on_the_tiles(device):
    x, weight = whole(5, 3, largest=2, device=device), whole(100, 3, largest=2, device=device, seed=1)
    once = unembed_top_k_torch(x, weight, 1, moments=True)
    for block in ((1, 1), (2, 7), (5, 33)):
        assert torch.equal(unembed_top_k_torch(x, weight, 1, moments=True, block=block).moments, once.moments)
    assert unembed_top_k_torch(x, weight, 1).moments is None


def test_zeros_of_either_sign_are_equal(backend, device):
    weight = torch.tensor([[-0.0], [0.0], [-0.0], [1.0], [-1.0]], device=device)
    found = unembed_top_k(torch.ones(1, 1, device=device), weight, 5, both=True, backend=backend)
    assert found.ids.tolist() == [[[3, 0, 1, 2, 4]], [[4, 0, 1, 2, 3]]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's 0 * inf in padding
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(dtype, backend, device):
    """NaN above all on both poles, so that it cannot pass unseen."""
    weight = torch.tensor([1.0, -math.inf, math.nan, 3.0, math.inf, math.nan, -math.inf], dtype=dtype, device=device)
    x = torch.ones(1, 1, dtype=dtype, device=device)
    found = unembed_top_k(x, weight[:, None], 7, both=True, backend=backend)
    assert found.ids.tolist() == [[[2, 5, 4, 3, 0, 1, 6]], [[2, 5, 1, 6, 0, 3, 4]]]
    expected = torch.tensor([math.nan, math.nan, math.inf, 3, 1, -math.inf, -math.inf], device=device)
    torch.testing.assert_close(found.values[0, 0], expected.to(found.values.dtype), equal_nan=True)


def test_a_row_of_nan_takes_the_first_tokens(device):
    x = torch.tensor([[math.nan], [1.0]], device=device)
    weight = torch.arange(600.0, device=device)[:, None]
    for block in ((2, 600), (2, 100), (1, 7)):
        found = unembed_top_k_torch(x, weight, 3, both=True, block=block)
        assert found.ids.tolist() == [[[0, 1, 2], [599, 598, 597]], [[0, 1, 2], [0, 1, 2]]]
        assert found.values[:, 0].isnan().all()


def test_no_rows(backend, device):
    found = unembed_top_k(draw(0, 4, device=device), draw(9, 4, device=device), 3, moments=True, backend=backend)
    assert found.values.shape == found.ids.shape == (1, 0, 3)
    assert found.moments.shape == (0, 4)


def test_results_carry_no_gradients(backend, device):
    x = draw(2, 4, device=device).requires_grad_()
    assert not unembed_top_k(x, draw(9, 4, device=device), 3, backend=backend).values.requires_grad


def test_what_does_not_fit_is_refused(device):
    pytest.importorskip("triton")
    x, weight = draw(2, 4, device=device), draw(200, 4, device=device)
    for k in (0, 201):
        with refused(ValueError, f"k must be from 1 to the number of tokens, 200, and is {k}"):
            unembed_top_k(x, weight, k)
    with refused(ValueError, f"k must be at most {TRITON_K} for Triton, and is 129"):
        unembed_top_k(x, weight, 129, backend="triton")
    for wrong in (x[0], x[:, :3]):
        with refused(ValueError, "must be matrices that share d"):
            unembed_top_k(wrong, weight, 1)
    with refused(ValueError, "must share a float dtype, and are torch.float32 and torch.float64"):
        unembed_top_k(x, weight.double(), 1)
    with refused(ValueError, "must share a float dtype, and are torch.int64 and torch.int64"):
        unembed_top_k(x.long(), weight.long(), 1)
    with refused(ValueError, "but weight on meta"):
        unembed_top_k(x, weight.to("meta"), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [3, 3000])
def test_on_a_gpu_at_the_size_of_gpt2(n_rows, dtype, gpu):
    x = whole(n_rows, 768, largest=2, device=gpu, dtype=dtype)
    weight = whole(768, 50_257, largest=2, device=gpu, dtype=dtype, seed=1).mT
    for k in (1, 10, 128):
        check(unembed_top_k(x, weight, k, both=True), x, weight, k, True)
