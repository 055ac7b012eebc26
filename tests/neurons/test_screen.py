"""Exact top tokens: the same as a dense table in float64, whatever was screened in what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.neurons import screen
from interp.neurons.screen import top_tokens
from tests.small_pairs import refused

SCREENS = [None, torch.bfloat16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(rows: torch.Tensor, weight: torch.Tensor, k: int, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Every score in float64, rounded, sorted stably: of equal scores the lowest id first."""
    scores = (rows.double() @ weight.double().T).to(torch.promote_types(rows.dtype, torch.float32))
    found = [s.sort(dim=1, descending=True, stable=True) for s in (scores, -scores)[: 1 + both]]
    return torch.stack([f.values[:, :k] for f in found]), torch.stack([f.indices[:, :k] for f in found])


@pytest.mark.parametrize("screened", SCREENS, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9), d=st.integers(1, 20), vocabulary=st.integers(1, 300), k=st.integers(1, 12),
    both=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_dense_table(screened, n, d, vocabulary, k, both, seed):
    k = min(k, vocabulary)
    rows, weight = drawn(n, d, seed=seed), drawn(vocabulary, d, seed=seed + 1)
    found = top_tokens(rows, weight, k, both=both, screen=screened)
    values, ids = dense(rows, weight, k, both)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.values, values)


@pytest.mark.parametrize("screened", SCREENS, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), kinds=st.integers(1, 5), k=st.integers(1, 10))
def test_tokens_with_equal_vectors_come_in_the_order_of_their_ids(screened, seed, kinds, k):
    """A real vocabulary has hundreds of tokens that were never trained, all alike."""
    weight = drawn(kinds, 8, seed=seed)[torch.randint(kinds, (400,), generator=torch.Generator().manual_seed(seed))]
    rows = torch.cat([drawn(5, 8, seed=seed + 1), torch.zeros(1, 8)])
    found = top_tokens(rows, weight, k, both=True, screen=screened)
    values, ids = dense(rows, weight, k, True)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.values, values)
    assert found.ids[:, -1].tolist() == [list(range(k))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scores_in_the_dtype_of_the_rows_and_float32_at_least(dtype):
    rows, weight = drawn(7, 16).to(dtype), drawn(500, 16, seed=1).to(dtype)
    found = top_tokens(rows, weight, 5, both=True)
    values, ids = dense(rows, weight, 5, True)
    assert found.values.dtype == values.dtype
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.values, values, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


def test_what_is_not_certain_is_screened_again(monkeypatch):
    """With hardly a spare candidate, bfloat16 is wrong somewhere, and nothing of it is seen."""
    monkeypatch.setattr(screen, "_SPARE", {False: 0, True: 1})
    rows, weight = drawn(64, 32), drawn(2000, 32, seed=1)
    screened = screen.unembed_top_k(rows.bfloat16(), weight.bfloat16(), 8).ids[0]
    found = top_tokens(rows, weight, 8, screen=torch.bfloat16)
    assert not torch.equal(screened, found.ids[0])
    assert torch.equal(found.ids, dense(rows, weight, 8, False)[1])


def test_the_bound_holds():
    """No screened score is further off than the certificate allows."""
    rows, weight = drawn(50, 64), drawn(300, 64, seed=1)
    exact = rows.double() @ weight.double().T
    size = rows.norm(dim=1, keepdim=True) * weight.norm(dim=1).max()
    for dtype in (torch.float32, torch.bfloat16):
        off = ((rows.to(dtype).float() @ weight.to(dtype).float().T) - exact).abs()
        assert (off <= screen._rounding(64, dtype) * size).all()


def test_moments_are_those_of_the_scores():
    rows, weight = drawn(6, 16), drawn(300, 16, seed=1)
    scores = rows.double() @ weight.double().T
    for k in (3, 300):
        moments = top_tokens(rows, weight, k, moments=True).moments.double()
        torch.testing.assert_close(
            moments, torch.stack([scores.pow(p).sum(1) for p in (1, 2, 3, 4)], 1), rtol=1e-4, atol=1e-2
        )
    assert top_tokens(rows, weight, 3).moments is None


def test_asking_for_more_tokens_than_there_are():
    with refused(OptionError, "cannot name 4 of 3 tokens"):
        top_tokens(drawn(2, 4), drawn(3, 4), 4)
