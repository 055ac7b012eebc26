"""Sparse codes say what their matrix says: every product, sparse or not, against the dense one and loops over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.features import codes as module
from interp.features.codes import Codes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = st.integers(0, 10_000)


@pytest.fixture(params=[0.0, 1.0], ids=["dense products", "sparse products"])
def below(request, monkeypatch) -> float:
    """Which products are used whatever the density is."""
    monkeypatch.setattr(module, "SPARSE_BELOW", request.param)
    return request.param


def draw(n_tokens: int, n_latents: int, seed: int = 0, density: float = 0.3) -> tuple[Codes, torch.Tensor]:
    """A code and its matrix; negative values too, and some that are there and 0; the last token has none."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n_tokens, n_latents, generator=g) < density
    mask[-1:] = False
    values = torch.randn(n_tokens, n_latents, generator=g, dtype=torch.float64)
    values[torch.rand(n_tokens, n_latents, generator=g) < 0.1] = 0
    return Codes.where(mask, values), values * mask


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]))
def test_there_and_back(seed, n_tokens, n_latents, density):
    codes, matrix = draw(n_tokens, n_latents, seed, density)
    assert torch.equal(codes.dense(), matrix)
    assert len(codes) == n_tokens
    assert codes.offsets.tolist()[0] == 0
    assert codes.offsets.tolist()[-1] == len(codes.latents) == len(codes.rows)
    for t in range(n_tokens):
        mine = codes.latents[codes.offsets[t] : codes.offsets[t + 1]]
        assert mine.tolist() == codes.latents[codes.rows == t].tolist()
        assert (mine.diff() > 0).all(), "ascending within a token"
    assert codes.l0() == int((matrix != 0).sum()) / n_tokens
    assert torch.equal(codes.fired(), (matrix != 0).any(0))
    torch.testing.assert_close(codes.row_sums(codes.values), matrix.sum(1), **CLOSE)
    assert torch.equal(codes.with_values(2 * codes.values).dense(), 2 * matrix)
    assert torch.equal(codes.dense(2 * codes.values), 2 * matrix)


def test_equally_many_for_every_token():
    latents = torch.tensor([[0, 3], [1, 2]])
    codes = Codes.of_rows(torch.tensor([[1.0, -2.0], [0.0, 4.0]]), latents, 5)
    assert codes.dense().tolist() == [[1, 0, 0, -2, 0], [0, 0, 4, 0, 0]]
    assert codes.rows.tolist() == [0, 0, 1, 1]
    assert codes.l0() == 1.5, "an entry of 0 does not fire"
    assert codes.fired().tolist() == [True, False, True, True, False]


def test_no_tokens_and_no_entries():
    nothing = Codes.where(torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4))
    assert (len(nothing), nothing.l0(), nothing.fired().any()) == (0, 0.0, False)
    silent = Codes.where(torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4))
    assert torch.equal(silent.decode(torch.ones(4, 2)), torch.zeros(3, 2))
    assert torch.equal(silent.outer([silent.values], [torch.ones(3, 2)])[0], torch.zeros(4, 2))


def test_products_equal_the_dense_ones(below):
    codes, matrix = draw(30, 12)
    decoder, rows, others = normal(12, 5), normal(30, 5, seed=2), normal(30, 7, seed=3)
    assert codes.sparse is bool(below)
    torch.testing.assert_close(codes.decode(decoder), matrix @ decoder, **CLOSE)
    dots = [rows[t] @ decoder[i] for t, i in zip(codes.rows.tolist(), codes.latents.tolist(), strict=True)]
    torch.testing.assert_close(codes.dots(decoder, rows), torch.stack(dots), **CLOSE)
    first, second = codes.outer([codes.values, codes.values.square()], [rows, others])
    torch.testing.assert_close(first, matrix.T @ rows, **CLOSE)
    torch.testing.assert_close(second, matrix.square().T @ others, **CLOSE)
    (alone,) = codes.outer([codes.values], [rows])
    torch.testing.assert_close(alone, first, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_keep_the_dtype(below, dtype):
    codes, _ = draw(4, 6)
    codes = codes.with_values(codes.values.to(dtype))
    decoder, rows = normal(6, 3).to(dtype), normal(4, 3).to(dtype)
    results = (codes.dense(), codes.decode(decoder), codes.dots(decoder, rows), *codes.outer([codes.values], [rows]))
    assert {result.dtype for result in results} == {dtype}


def test_products_are_sparse_below_a_density():
    few, many = draw(200, 100, density=0.02)[0], draw(200, 100, density=0.2)[0]
    assert few.sparse
    assert not many.sparse


def test_row_sums_are_differentiable():
    codes, _ = draw(5, 6)
    values = codes.values.clone().requires_grad_()
    weight = normal(5)
    (codes.row_sums(values.square()) @ weight).backward()
    torch.testing.assert_close(values.grad, 2 * codes.values * weight[codes.rows], **CLOSE)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 5), st.sets(st.integers(1, 8), max_size=4))
def test_split_into_nested_blocks(seed, n_tokens, widths):
    codes, matrix = draw(n_tokens, 9, seed)
    edges = (*sorted(widths), 9)
    split = codes.split(edges)
    assert (len(split), split.n_latents) == (len(edges) * n_tokens, 9)
    blocks = split.dense().unflatten(0, (len(edges), n_tokens))
    low = 0
    for block, high in zip(blocks, edges, strict=True):
        assert torch.equal(block[:, low:high], matrix[:, low:high])
        assert int((block != 0).sum()) == int((matrix[:, low:high] != 0).sum()), "nothing beside the block"
        low = high
    decoder = normal(9, 4)
    levels = split.decode(decoder).unflatten(0, (len(edges), n_tokens)).cumsum(0)
    for level, width in zip(levels, edges, strict=True):
        torch.testing.assert_close(level, matrix[:, :width] @ decoder[:width], **CLOSE)
