"""Where a semi-NMF begins. Held against: Lloyd's algorithm in loops, the full SVD, clusters that nobody could miss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import OptionError
from interp.factorize.starts import LLOYD_STEPS, STARTS, start
from tests.small_pairs import refused

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(d: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(d, n, generator=seeded(seed), dtype=DOUBLE)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(STARTS), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12),
    st.sampled_from([DOUBLE, torch.float32]),
)  # fmt: skip
def test_every_start_is_finite_not_negative_and_the_seeds_alone(kind, seed, d, n, k, dtype):
    """Also with more features than tokens, than neurons, and than either."""
    A = gaussian(d, n, seed).to(dtype)
    G = start(kind, A, k, seeded(seed))
    assert G.shape == (k, n)
    assert G.dtype == dtype
    assert G.isfinite().all()
    assert (G >= 0).all()
    assert G.any()
    assert torch.equal(start(kind, A, k, seeded(seed)), G)


def test_random_is_uniform_and_does_not_look_at_the_data():
    G = start("random", gaussian(5, 4000), 3, seeded())
    assert float(G.min()) < 1e-2
    assert 0.99 < float(G.max()) < 1
    assert float(G.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(start("random", 0 * gaussian(5, 4000), 3, seeded()), G)
    assert not torch.equal(start("random", gaussian(5, 4000), 3, seeded(1)), G)


def test_kmeans_is_lloyds_algorithm():
    A, k = gaussian(4, 50), 6
    points = A.T.tolist()
    centres = [points[i] for i in torch.randperm(50, generator=seeded(3))[:k].tolist()]
    for _ in range(LLOYD_STEPS):
        nearest = [
            min(range(k), key=lambda j: sum((a - b) ** 2 for a, b in zip(p, centres[j], strict=True))) for p in points
        ]
        for j in range(k):
            mine = [p for p, cluster in zip(points, nearest, strict=True) if cluster == j]
            if mine:
                centres[j] = [sum(x) / len(mine) for x in zip(*mine, strict=True)]
    G = start("kmeans", A, k, seeded(3))
    assert G.argmax(0).tolist() == nearest
    assert set(G.unique().tolist()) == {0, 1}
    assert (G.sum(0) == 1).all()


def test_kmeans_with_fewer_tokens_than_clusters_gives_each_token_its_own():
    G = start("kmeans", gaussian(5, 3), 7, seeded())
    assert (G.sum(0) == 1).all()
    assert (G.sum(1) <= 1).all()


@pytest.mark.parametrize("sign", [1, -1], ids=["as-is", "mirrored"])
def test_svd_is_the_longer_side_of_each_singular_vector(sign):
    """Of data of low rank, where the randomised range finder is exact."""
    A = sign * gaussian(30, 5, 1) @ (gaussian(5, 40, 2) + torch.linspace(-1, 1, 5, dtype=DOUBLE)[:, None])
    _, sizes, V = torch.linalg.svd(A, full_matrices=False)
    G = start("svd", A, 5, seeded())
    for row, size, v in zip(G, sizes, V, strict=False):
        sides = [v.clamp_min(0), (-v).clamp_min(0)]
        longer = max(sides, key=lambda side: float(side.norm()))
        torch.testing.assert_close(row, longer * size.sqrt(), rtol=1e-8, atol=1e-8)
        assert float(row.norm() / size.sqrt()) >= 0.5**0.5 - 1e-9


def test_svd_of_positive_data_begins_with_its_perron_vector():
    """Which has no negative part, so that nothing of the first direction is lost."""
    A = torch.rand(30, 40, generator=seeded(), dtype=DOUBLE)
    G = start("svd", A, 1, seeded())[0]
    assert (G > 0).all()
    _, sizes, V = torch.linalg.svd(A)
    torch.testing.assert_close(G / sizes[0].sqrt(), V[0].abs(), rtol=1e-3, atol=0)


def test_svd_fills_up_with_random_weights_of_its_own_size():
    A = gaussian(4, 30)
    G = start("svd", A, 9, seeded())
    assert (G[:4] == 0).any()
    assert (G[4:] > 0).all()
    assert float(G[4:].max()) <= float(G[:4].mean())
    torch.testing.assert_close(start("svd", 4 * A, 9, seeded()), 2 * G)


@pytest.mark.parametrize("kind", ["random", "kmeans"])
def test_the_unit_of_the_data_does_not_matter(kind):
    A = gaussian(6, 40)
    torch.testing.assert_close(start(kind, 3.7 * A, 4, seeded()), start(kind, A, 4, seeded()))


def test_an_unknown_kind_is_refused():
    with refused(OptionError, "'kmean' is not a kind of start .*did you mean 'kmeans'"):
        start("kmean", gaussian(3, 4), 2, seeded())
