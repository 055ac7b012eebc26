"""Selection by energy: the rule itself in float64, one row after the other, whoever selects."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import afa_select, row_top_k
from tests.small_pairs import refused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHARES = [0.0, 0.1, 0.5, 0.9, 0.999, 1.5]  # of a row's whole norm


def draw(
    n_columns: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of rectified normal values, and targets from 0 to beyond reach."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.randn(len(SHARES), n_columns, generator=generator).relu().square().to(dtype)
    return energy.to(device), (energy.float().sum(1).sqrt() * torch.tensor(SHARES)).to(device)


def chosen(energy: torch.Tensor, target: torch.Tensor, backend: str, k_max: int | None = None) -> list[list[int]]:
    """The columns each row keeps."""
    offsets, columns = afa_select(energy, target, k_max=k_max, backend=backend)
    assert offsets.dtype == columns.dtype == torch.int64
    assert (len(offsets), int(offsets[0]), int(offsets[-1])) == (len(energy) + 1, 0, len(columns))
    return [columns[start:end].tolist() for start, end in pairwise(offsets.tolist())]


def by_sorting(row: torch.Tensor) -> tuple[list[int], list[float]]:
    """Columns of the positive entries, largest first and the lowest of equal ones first, and the norms C_1, C_2, ..."""
    order = sorted(range(len(row)), key=lambda c: (-row[c].item(), c))
    order = [c for c in order if row[c] > 0]
    return order, [math.sqrt(math.fsum(row[order[: m + 1]].tolist())) for m in range(len(order))]


def check(
    energy: torch.Tensor, target: torch.Tensor, backend: str, k_max: int | None = None, *, tolerance: float = 1e-6
) -> None:
    """That each row keeps its largest, and as many as are nearest; but for differences below what sums are rounded by."""
    for kept, row, t in zip(
        chosen(energy, target, backend, k_max), energy.double().cpu(), target.tolist(), strict=True
    ):
        order, norms = by_sorting(row)
        distances = [abs(norm - t) for norm in norms]
        m = min(len(order), k_max or len(order))
        if order and norms[-1] >= t:
            m = min(m, distances.index(min(distances)) + 1)
        assert kept == sorted(order[: len(kept)])
        if len(kept) != m:
            assert 1 <= len(kept) <= (k_max or len(order))
            assert abs(distances[len(kept) - 1] - distances[m - 1]) <= tolerance * norms[-1]


@pytest.mark.parametrize("k_max", [None, 1, 20])
@pytest.mark.parametrize("n_columns", [1, 2, 37, 700])
def test_sizes(n_columns, k_max, backend, device):
    check(*draw(n_columns, device), backend, k_max)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend, device):
    check(*draw(150, device, dtype), backend, tolerance=1e-14 if dtype == torch.float64 else 1e-6)


def test_a_row_longer_than_a_tile(backend, device):
    energy, target = draw(16_400, device)
    energy[:, 4090:4100] = energy[:, 16_390:] = 30
    target[0] = 20.1  # within the equal ones
    kept = chosen(energy[:3], target[:3], backend)
    assert kept[0] == [*range(4090, 4100), *range(16_390, 16_393)]
    for columns, row, t in zip(kept, energy, target.tolist(), strict=False):
        found = row[columns].sum().sqrt().item()
        assert abs(found - t) <= 0.6 * row[columns].min().item() / t


energies = st.integers(0, 6).map(float) | st.just(-1.0)


@given(rows=st.lists(st.tuples(st.lists(energies, min_size=7, max_size=7), st.integers(-1, 30)), min_size=1, max_size=3),
       k_max=st.none() | st.integers(1, 8))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_few_values_and_many_ties(rows, k_max, device):
    pytest.importorskip("triton")
    energy, quarters = (torch.tensor(x, device=device) for x in zip(*rows, strict=True))
    for backend in ("torch", "triton"):
        check(energy, quarters / 4, backend, k_max)


@given(exponents=st.lists(st.integers(-60, 60), min_size=1, max_size=9), share=st.floats(0, 1.1))
@settings(deadline=None, max_examples=40)
def test_energies_of_any_size(exponents, share, device):
    pytest.importorskip("triton")
    energy = torch.tensor([[2.0**e for e in exponents]], device=device)
    for backend in ("torch", "triton"):
        check(energy, share * energy.sum(1).sqrt(), backend)


def test_by_hand(backend, device):
    row = [1.0, 0.0, 3.0, 5.0, -2.0, 7.0]  # norms sqrt(7), sqrt(12), sqrt(15), 4
    for target, kept in (
        (-1.0, [5]),
        (0.0, [5]),
        (3.0, [5]),
        (3.1, [3, 5]),
        (math.sqrt(12), [3, 5]),
        (3.7, [2, 3, 5]),
        (4.0, [0, 2, 3, 5]),
        (4.1, [0, 2, 3, 5]),
        (math.inf, [0, 2, 3, 5]),
    ):
        assert chosen(torch.tensor([row], device=device), torch.tensor([target], device=device), backend) == [kept]


def test_of_two_as_near_the_fewer(backend, device):
    energy = torch.tensor([[3.0, 5.0, 1.0, 7.0, 9.0]], device=device)  # C_1 = 3, C_2 = 4
    only = torch.tensor([[0.0, 9.0, 0.0, 7.0, 0.0]], device=device)
    assert chosen(energy, torch.tensor([3.0], device=device), backend) == [[4]]
    assert chosen(only, torch.tensor([3.5], device=device), backend) == [[1]]
    assert chosen(only, torch.tensor([3.5 + 2**-20], device=device), backend) == [[1, 3]]


def test_equal_energies_are_kept_from_the_left(backend, device):
    energy = torch.tensor([[1.0, 4.0, 1.0, 1.0, 0.0, 1.0, 1.0]] * 2, device=device)
    target = torch.tensor([7**0.5, 1e3], device=device)
    assert chosen(energy, target, backend) == [[0, 1, 2, 3], [0, 1, 2, 3, 5, 6]]
    assert chosen(energy, target, backend, k_max=3) == [[0, 1, 2]] * 2


def test_rows_without_energy(backend, device):
    energy = torch.zeros(4, 9, device=device)
    energy[1] = -1
    energy[2, 3] = 2.0**-140
    energy[3] = -0.0
    assert chosen(energy, torch.tensor([0.0, 1.0, 0.0, 2.0], device=device), backend) == [[], [], [3], []]


def test_beyond_reach_it_is_top_k(backend, device):
    energy, _ = draw(300, device)
    expected = row_top_k(energy, 40, backend="torch")[1].tolist()
    assert chosen(energy, torch.full((len(energy),), 1e6, device=device), backend, k_max=40) == expected


def test_the_choice_follows_the_scale_and_the_columns(backend, device):
    energy, target = draw(80, device)
    kept = chosen(energy, target, backend)
    assert chosen(energy / 16, target / 4, backend) == kept
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1)).to(device)
    moved = chosen(energy[:, order], target, backend)
    assert [sorted(order[columns].tolist()) for columns in moved] == kept


def test_half_precision_is_summed_in_full(backend, device):
    """In bfloat16, a sum of ones would stop growing at 256."""
    energy = torch.ones(1, 1500, dtype=torch.bfloat16, device=device)
    target = torch.full((1,), 32.0, dtype=torch.bfloat16, device=device)
    assert chosen(energy, target, backend) == [[*range(1024)]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_to_choose_from(shape, backend, device):
    energy = torch.zeros(shape, device=device)
    assert chosen(energy, energy.new_ones(len(energy)), backend) == [[]] * len(energy)


def test_values_may_be_views_and_want_gradients(backend, device):
    energy, target = draw(60, device)
    pair = torch.stack([target, target], dim=1)[:, 0].requires_grad_()
    check(energy[:, 5:44].requires_grad_(), pair, backend)
    check(energy[:, ::2], pair, backend)
    check(energy.mT.contiguous().mT, pair, backend)


def test_what_does_not_fit_is_refused(device):
    energy, target = draw(5, device)
    with refused(ValueError, "k_max must be at least 1, and is 0"):
        afa_select(energy, target, k_max=0)
    with refused(ValueError, r"target must have shape \[6\], one norm per row, not \[5\]"):
        afa_select(energy, target[:5])
    with refused(ValueError, r"energy must be \[row, column\] in a float dtype, not \[5\]"):
        afa_select(energy[0], target)
    with refused(ValueError, r"not \[6, 5\] in torch.int64"):
        afa_select(energy.long(), target)
    with refused(ValueError, "but target on meta"):
        afa_select(energy, target.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_columns", [12_288, 65_536])
def test_on_a_gpu_at_the_size_of_a_dictionary(n_columns, dtype, gpu):
    energy, target = draw(n_columns, gpu, dtype)
    for k_max in (None, 300):
        found, expected = (chosen(energy, target, backend, k_max) for backend in ("triton", "torch"))
        for row, one, other in zip(energy.double(), found, expected, strict=True):
            norms = [row[columns].sum().sqrt().item() for columns in (one, other)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)
