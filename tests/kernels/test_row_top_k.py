"""The k largest values of each row: what a full sort keeps, in ascending columns, whatever the values are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import row_top_k
from tests.small_pairs import refused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DENORMAL = 2.0**-140  # of float32, 512 times its smallest
VALUES = [-math.inf, -3.0, -DENORMAL, -0.0, 0.0, DENORMAL, 2 * DENORMAL, 1.0, 1.0 + 2**-23, 3.0, math.inf]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def check(x: torch.Tensor, k: int, backend: str) -> None:
    """Against a stable sort, which of equal values has the lowest column first."""
    values, columns = row_top_k(x, k, backend=backend)
    assert values.shape == columns.shape == (len(x), k)
    assert (values.dtype, columns.dtype) == (x.dtype, torch.int64)
    assert (columns.diff(dim=1) > 0).all()
    assert torch.equal(values, x.gather(1, columns))
    ordered, order = x.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values.sort(dim=1, descending=True).values, ordered[:, :k])
    if backend == "triton":
        assert torch.equal(columns, order[:, :k].sort(dim=1).values)


@pytest.mark.parametrize("n_columns", [1, 2, 33, 512, 3000])
def test_sizes(n_columns, backend, device):
    x = draw(3, n_columns, device=device)
    for k in sorted({1, (n_columns + 4) // 5, n_columns}):
        check(x, k, backend)


def test_a_row_longer_than_a_tile(backend, device):
    x = draw(2, 16_400, device=device)
    check(x, 40, backend)
    x[:, 4090:4100] = x[:, 16_390:] = 9
    check(x, 12, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    check(draw(4, 300, device=device, dtype=dtype), 20, backend)
    check(draw(4, 300, device=device, dtype=dtype).relu(), 200, backend)


@given(rows=st.lists(st.lists(st.sampled_from(VALUES), min_size=9, max_size=9), min_size=1, max_size=3),
       k=st.integers(1, 9))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_ties_infinities_and_denormals(rows, k, device):
    pytest.importorskip("triton")
    x = torch.tensor(rows, device=device)
    check(x, k, "triton")
    check(x, k, "torch")


def test_equal_values_are_kept_from_the_left(device):
    pytest.importorskip("triton")
    x = torch.tensor([[1.0, 0.0, 2.0, -0.0, 0.0, 2.0]], device=device)
    for k, kept in ((1, [2]), (3, [0, 2, 5]), (4, [0, 1, 2, 5]), (5, [0, 1, 2, 3, 5])):
        values, columns = row_top_k(x, k, backend="triton")
        assert columns.tolist() == [kept]
        assert torch.equal(values.signbit(), x[:, kept].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_counts_as_infinity(dtype, backend, device):
    x = torch.tensor([[1.0, math.nan, -2.0, math.inf, 5.0, -math.nan]], device=device, dtype=dtype)
    assert row_top_k(x, 3, backend=backend)[1].tolist() == [[1, 3, 5]]
    assert row_top_k(x, 4, backend=backend)[1].tolist() == [[1, 3, 4, 5]]
    assert row_top_k(torch.full_like(x, math.nan), 6, backend=backend)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_choice_follows_the_columns_and_ignores_scale(backend, device):
    x = draw(4, 90, device=device)
    _, columns = row_top_k(x, 11, backend=backend)
    assert torch.equal(row_top_k(x.exp(), 11, backend=backend)[1], columns)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(device)
    _, moved = row_top_k(x[:, order], 11, backend=backend)
    assert torch.equal(order[moved].sort(dim=1).values, columns)


def test_no_rows(backend, device):
    check(draw(0, 8, device=device), 3, backend)


def test_values_may_be_views(backend, device):
    x = draw(6, 40, device=device)
    check(x[::2, 3:30], 5, backend)
    check(x[:, ::3], 5, backend)
    check(x.mT, 4, backend)


def test_gradients_are_torchs(device):
    pytest.importorskip("triton")
    x = torch.tensor([[3.0, 1.0, 2.0]], device=device, requires_grad=True)
    row_top_k(x, 2, backend="torch")[0].sum().backward()
    assert x.grad.tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match="no kernel has a backward, and x requires gradients"):
        row_top_k(x, 2, backend="triton")


def test_what_does_not_fit_is_refused(device):
    x = draw(2, 5, device=device)
    for k in (0, -1, 6):
        with refused(ValueError, f"k must be from 1 to the number of columns, 5, and is {k}"):
            row_top_k(x, k)
    with refused(ValueError, r"x must be \[row, column\] in a float dtype, not \[5\] in torch.float32"):
        row_top_k(x[0], 1)
    with refused(ValueError, r"not \[2, 5\] in torch.int64"):
        row_top_k(x.long(), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_columns", [12_288, 65_536])
def test_on_a_gpu_at_the_size_of_a_dictionary(n_columns, dtype, gpu):
    for k in (1, 32, 500):
        check(draw(500, n_columns, device=gpu, dtype=dtype), k, "triton")
