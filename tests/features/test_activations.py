"""Which latents fire: each selection against a plain sort or a loop over entries; each step against its formula, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.features import activations
from interp.features.codes import Codes

SENTINEL = 1e8
SEEDS = st.integers(0, 10_000)
NORMED = st.booleans()
WHOLE = st.lists(st.lists(st.integers(-3, 4), min_size=5, max_size=5), min_size=1, max_size=4)  # full of ties


def draw(n_tokens: int, n_latents: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations, a third of them above 0, and norms that change their order."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n_tokens, n_latents, generator=g, dtype=torch.float64) - 0.4
    return z, 0.5 + torch.rand(n_latents, generator=g, dtype=torch.float64)


def largest(keys: list[float], k: int) -> list[int]:
    """Places of the k largest; of equal ones the first."""
    return sorted(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k])


def together(chosen: list[list[int]]) -> list[int]:
    return [place for places in chosen for place in places]


def as_matrix(chosen: list[list[int]], values: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(values)
    for t, places in enumerate(chosen):
        result[t, places] = values[t, places]
    return result


# ------------------------------------------------------------------------------------------------------ k of each token


@settings(max_examples=40, deadline=None)
@given(SEEDS, NORMED, st.integers(1, 7))
def test_top_k_is_what_a_sort_keeps(seed, normed, k):
    z, norms = draw(5, 7, seed)
    ranked = z * norms if normed else z
    chosen = [largest(row, k) for row in ranked.tolist()]
    codes = activations.top_k(z, k, norms if normed else None)
    assert codes.offsets.tolist() == list(range(0, 5 * k + 1, k))
    assert codes.latents.tolist() == together(chosen)
    assert torch.equal(codes.dense(), as_matrix(chosen, z.relu())), "values are ReLU(z), without norms"


@settings(max_examples=40, deadline=None)
@given(SEEDS, NORMED, st.integers(1, 7))
def test_abs_top_k_is_what_a_sort_keeps(seed, normed, k):
    z, norms = draw(5, 7, seed)
    chosen = [largest(row, k) for row in (z * norms if normed else z).abs().tolist()]
    codes = activations.abs_top_k(z, k, norms if normed else None)
    assert codes.latents.tolist() == together(chosen)
    assert torch.equal(codes.dense(), as_matrix(chosen, z)), "signs are kept"


def test_norms_decide_who_is_first():
    z, norms = torch.tensor([[3.0, 2.0, -4.0]]), torch.tensor([1.0, 2.0, 3.0])
    assert activations.top_k(z, 1).dense().tolist() == [[3, 0, 0]]
    assert activations.top_k(z, 1, norms).dense().tolist() == [[0, 2, 0]]
    assert activations.abs_top_k(z, 1, norms).dense().tolist() == [[0, 0, -4]]


@settings(max_examples=40, deadline=None)
@given(WHOLE, st.integers(1, 5))
def test_of_equal_values_exactly_so_many_are_kept(rows, k):
    z = torch.tensor(rows, dtype=torch.float64)
    for select, keys in ((activations.top_k, z), (activations.abs_top_k, z.abs())):
        codes = select(z, k)
        kept = keys.gather(1, codes.latents.reshape(len(z), k)).sort(1).values
        assert torch.equal(kept, keys.sort(1).values[:, -k:])


# -------------------------------------------------------------------------------------------------------- k of a batch


@settings(max_examples=50, deadline=None)
@given(SEEDS, NORMED, st.integers(1, 6), st.sampled_from([0.0, -1.0, 0.1, 0.5, 1.0, 3.0, math.inf]))
def test_batch_top_k_is_what_a_sort_keeps_whatever_the_hint(seed, normed, k, hint):
    z, norms = draw(5, 6, seed)
    ranked = (z * norms if normed else z).flatten().tolist()
    places = [place for place in largest(ranked, 5 * k) if ranked[place] > 0]
    codes, lowest = activations.batch_top_k(z, k, norms if normed else None, hint=hint)
    assert (codes.rows * 6 + codes.latents).tolist() == places
    assert torch.equal(codes.values, z.flatten()[places])
    assert float(lowest) == min((ranked[place] for place in places), default=0.0)


@settings(max_examples=50, deadline=None)
@given(WHOLE, st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.5]))
def test_batch_top_k_of_equal_values(rows, k, hint):
    z = torch.tensor(rows, dtype=torch.float64)
    codes, lowest = activations.batch_top_k(z, k, hint=hint)
    wanted = [value for value in z.flatten().sort(descending=True).values.tolist()[: len(z) * k] if value > 0]
    assert codes.values.sort(descending=True).values.tolist() == wanted
    assert torch.equal(codes.values, z[codes.rows, codes.latents])
    assert float(lowest) == (wanted[-1] if wanted else 0.0)


def test_the_threshold_of_a_batch_gives_its_code_again():
    z, norms = draw(40, 30)
    codes, lowest = activations.batch_top_k(z, 4, norms)
    assert len(codes.values) == 160
    below = math.nextafter(float(lowest), 0.0)
    assert torch.equal(activations.above(z, below, norms).dense(), codes.dense())
    assert len(activations.above(z, float(lowest), norms).values) == 159, "the smallest itself is not above it"


def test_fewer_positive_than_wanted():
    z = torch.tensor([[1.0, -2.0, 0.0], [-1.0, -1.0, 3.0]])
    codes, lowest = activations.batch_top_k(z, 2)
    assert codes.dense().tolist() == [[1, 0, 0], [0, 0, 3]]
    assert float(lowest) == 1
    silent, lowest = activations.batch_top_k(-z.abs(), 2, hint=0.3)
    assert len(silent.values) == 0
    assert float(lowest) == 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, NORMED, st.sampled_from([-1.0, 0.0, 0.3, 2.0]))
def test_above_a_threshold(seed, normed, threshold):
    z, norms = draw(4, 6, seed)
    ranked = (z * norms if normed else z).tolist()
    each = torch.linspace(threshold, threshold + 1, 6, dtype=torch.float64)
    for theta in (threshold, torch.tensor(threshold, dtype=torch.float64), each):
        limits = each.tolist() if theta is each else [threshold] * 6
        chosen = [[i for i in range(6) if row[i] > limits[i] and row[i] > 0] for row in ranked]
        codes = activations.above(z, theta, norms if normed else None)
        assert codes.latents.tolist() == together(chosen)
        assert torch.equal(codes.dense(), as_matrix(chosen, z))


# ------------------------------------------------------------------------------------------------------------ top-AFA


def nearest(energy: list[float], target: float, k_max: int | None = None) -> list[int]:
    """The rule in words: of the positive ones, largest first, so many that the norm is nearest; the smaller number of two."""
    order = [i for i in sorted(range(len(energy)), key=lambda i: (-energy[i], i)) if energy[i] > 0][:k_max]
    away = [abs(math.sqrt(math.fsum(energy[i] for i in order[:m])) - target) for m in range(1, len(order) + 1)]
    return sorted(order[: away.index(min(away)) + 1]) if order else []


def published(active: torch.Tensor, energy: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The published rule: sort, running sum, its last entry overwritten, root, argmin; the code as vectors."""
    ordered, order = energy.sort(dim=1, descending=True, stable=True)
    sums = ordered.cumsum(1)
    sums[:, -1] = SENTINEL
    m = (sums.sqrt() - target[:, None]).abs().argmin(1) + 1
    kept = torch.arange(energy.shape[1]) < m[:, None]
    return active * torch.zeros_like(kept).scatter(1, order, kept)


def targets(z: torch.Tensor, norms: torch.Tensor | None, seed: int) -> torch.Tensor:
    """From nothing to twice what all latents together reach."""
    full = (z.relu() if norms is None else z.relu() * norms).norm(dim=1)
    return full * 2 * torch.rand(len(z), generator=torch.Generator().manual_seed(seed), dtype=z.dtype)


@settings(max_examples=60, deadline=None)
@given(SEEDS, NORMED, st.sampled_from([None, 1, 2, 30]))
def test_afa_takes_the_number_whose_norm_is_nearest(seed, normed, k_max):
    z, norms = draw(6, 9, seed)
    norms = norms if normed else None
    target = targets(z, norms, seed)
    energy = (z.relu() if norms is None else z.relu() * norms).square()
    codes = activations.afa(z, target, norms, k_max=k_max)
    chosen = [nearest(row, t, k_max) for row, t in zip(energy.tolist(), target.tolist(), strict=True)]
    assert codes.latents.tolist() == together(chosen)
    assert torch.equal(codes.dense(), as_matrix(chosen, z.relu()))


@settings(max_examples=60, deadline=None)
@given(WHOLE, st.integers(0, 9))
def test_afa_where_many_are_equal(rows, target):
    z = torch.tensor(rows, dtype=torch.float64)
    codes = activations.afa(z, torch.full((len(z),), float(target), dtype=torch.float64))
    chosen = [nearest(row, target) for row in z.relu().square().tolist()]
    assert torch.equal(codes.dense(), as_matrix(chosen, z.relu()))


def test_afa_by_hand():
    z = torch.tensor([[3.0, 4.0, -7.0, 0.0, 12.0]], dtype=torch.float64)  # norms 12, 12.65, 13

    def kept(target: float, **options) -> list[int]:
        return activations.afa(z, torch.tensor([target], dtype=torch.float64), **options).latents.tolist()

    assert kept(0.0) == [4], "one at least"
    assert kept(12.3) == [4]
    assert kept(12.4) == [1, 4]
    assert kept((12 + math.sqrt(160)) / 2 - 1e-9) == [4]
    assert kept(99.0) == [0, 1, 4], "out of reach: all that are positive"
    assert kept(99.0, k_max=2) == [1, 4]
    ten = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    assert activations.afa(ten, torch.tensor([9.0], dtype=torch.float64)).latents.tolist() == [1], (
        "as near: the smaller"
    )
    assert kept(99.0, sentinel=SENTINEL) == [0, 1, 4], "the last latent has no energy, so the sentinel replaces none"


@settings(max_examples=80, deadline=None)
@given(SEEDS, NORMED, st.sampled_from([1.0, 3e3, 1e4]), st.booleans())
def test_the_sentinel_gives_the_published_codes(seed, normed, scale, all_positive):
    z, norms = draw(8, 5, seed)
    z, norms = scale * (z.abs() if all_positive else z), norms if normed else None
    active = z.relu()
    energy = (active if norms is None else active * norms).square()
    target = targets(z, norms, seed)
    codes = activations.afa(z, target, norms, sentinel=SENTINEL)
    assert torch.equal(codes.dense(), published(active, energy, target))


@settings(max_examples=60, deadline=None)
@given(WHOLE, st.integers(0, 12))
def test_the_sentinel_where_many_are_equal(rows, target):
    z = torch.tensor(rows, dtype=torch.float64)
    goal = torch.full((len(z),), float(target), dtype=torch.float64)
    codes = activations.afa(z, goal, sentinel=SENTINEL)
    assert torch.equal(codes.dense(), published(z.relu(), z.relu().square(), goal))


def test_the_sentinel_forbids_a_whole_row_until_targets_are_beyond_it():
    z = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3e4, 2.0]], dtype=torch.float64)
    target = torch.tensor([5.0, 9999.0, 1.2e4], dtype=torch.float64)
    assert activations.afa(z, target).dense().tolist() == [[3, 4], [3, 4], [3e4, 0]]
    as_near = activations.afa(z[:1], torch.tensor([5002.0], dtype=torch.float64), sentinel=SENTINEL)
    assert as_near.dense().tolist() == [[0, 4]], "of two as near, the smaller number"
    with_it = activations.afa(z, target, sentinel=SENTINEL)
    assert with_it.dense().tolist() == [[0, 4], [3, 4], [3e4, 2]], (
        "1e4 is nearer to 9999 than 4 is, and to 1.2e4 than 3e4"
    )


def test_a_dictionary_of_one_latent():
    z, target = torch.tensor([[2.0], [-1.0]]), torch.tensor([7.0, 7.0])
    for sentinel in (None, SENTINEL):
        assert activations.afa(z, target, sentinel=sentinel).dense().tolist() == [[2.0], [0.0]]


# --------------------------------------------------------------------------------------------------------------- steps

Z, THETA, WIDTH = [[0.9, 1.02, 1.2], [1.1, -0.4, 0.46]], [1.0, 1.0, 0.5], 0.1  # |z - theta| < .05 in (0, 1) and (1, 2)
UPSTREAM = [[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]]


def steps(kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and gradients of z and theta."""
    z, theta = torch.tensor(Z, dtype=torch.float64), torch.tensor(THETA, dtype=torch.float64)
    z.requires_grad_()
    theta.requires_grad_()
    out = kind(z, theta, WIDTH)
    (out * torch.tensor(UPSTREAM, dtype=torch.float64)).sum().backward()
    return out.detach(), z.grad, theta.grad


def test_jump_relu_and_its_estimated_gradient():
    out, d_z, d_theta = steps(activations.jump_relu)
    assert out.tolist() == [[0, 1.02, 1.2], [1.1, 0, 0]]
    assert d_z.tolist() == [[0, 3, 5], [7, 0, 0]], "the mask"
    # -(theta / eps) times what comes from above, at z within eps / 2 of theta, on either side
    assert d_theta.tolist() == pytest.approx([0, -(1.0 / 0.1) * 3, -(0.5 / 0.1) * 13])


def test_the_step_and_its_estimated_gradient():
    out, d_z, d_theta = steps(activations.fires)
    assert out.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert d_z is None, "a step has no slope in z"
    assert d_theta.tolist() == pytest.approx([0, -3 / 0.1, -13 / 0.1])


def test_estimated_gradients_are_those_of_the_mean():
    """Over z spread evenly, the estimate is the slope of the mean in theta; E[f] falls by theta per unit of density."""
    z = torch.linspace(0, 2, 200_001, dtype=torch.float64)[:, None]
    theta = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activations.jump_relu(z, theta, 0.05).mean(), theta)
    assert float(slope) == pytest.approx(-0.8 / 2, rel=1e-3)
    (slope,) = torch.autograd.grad(activations.fires(z, theta, 0.05).mean(), theta)
    assert float(slope) == pytest.approx(-1 / 2, rel=1e-3)


def test_mand_and_its_gradient():
    u = torch.tensor([4.0, 4.0, -4.0, -1.0, 0.0, 9.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([9.0, -9.0, 9.0, -1.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    out = activations.mand(u, v)
    assert out.tolist() == [6, 0, 0, 0, 0, 0]
    out.sum().backward()
    assert u.grad.tolist() == [0.75, 0, 0, 0, 0, 0], "sqrt(v / u) / 2, and 0 where its slope is infinite"
    assert v.grad.tolist() == pytest.approx([1 / 3, 0, 0, 0, 0, 0])


def test_selections_are_codes_of_their_inputs_dtype():
    z = draw(3, 6)[0].float()
    target = torch.ones(3)
    for codes in (
        activations.top_k(z, 2), activations.abs_top_k(z, 2), activations.batch_top_k(z, 2)[0], activations.above(z, 0.1),
        activations.afa(z, target), activations.afa(z, target, sentinel=SENTINEL),
    ):  # fmt: skip
        assert isinstance(codes, Codes)
        assert codes.values.dtype == torch.float32
        assert codes.n_latents == 6
