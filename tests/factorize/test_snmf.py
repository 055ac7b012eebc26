"""Semi-NMF: against the SVD, which bounds it on both sides, groups that were planted, and the published algorithm.

Also what may not matter: the unit of the data, a rotation, the order of tokens, neurons and features, threads, the disk.
"""

import json
import math
import warnings
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.optimize import nnls as scipy_nnls
from torch import Tensor

from interp.errors import OptionError, SiteError
from interp.factorize import snmf as module
from interp.factorize import solvers
from interp.factorize.snmf import SNMF, fit_snmf
from interp.factorize.solvers import SEARCH
from interp.features.sources import Corpus
from interp.model.run import record
from tests.small_pairs import refused

DOUBLE = torch.float64
SOLVERS = pytest.mark.parametrize("solver", ["hals", "multiplicative"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@cache
def planted(
    seed: int = 0, noise: float = 0.0, *, d: int = 400, n: int = 600, k: int = 10, m: int = 12
) -> tuple[Tensor, Tensor]:
    """X [token, neuron] = W H + noise, and H: k features of m random neurons each, every one on every token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    H = torch.zeros(k, d, dtype=DOUBLE)
    for row in H:
        row[torch.randperm(d, generator=generator)[:m]] = draw(m)
    X = torch.rand(n, k, generator=generator, dtype=DOUBLE) @ H
    return X + noise * X.std() * draw(n, d), H


@cache
def gelu(seed: int = 0) -> Tensor:
    """What activations of an MLP look like: [200, 150]."""
    return torch.nn.functional.gelu(gaussian(200, 150, seed=seed) + gaussian(1, 150, seed=seed + 100))


@cache
def fitted(**options) -> SNMF:
    """A fit of planted features at their true share, for what does not depend on how it was found."""
    return SNMF(**{"n_features": 10, "share": 12 / 400, "n_init": 4} | options).fit(planted(0, 0.05)[0])


def matched(H: Tensor, truth: Tensor) -> Tensor:
    """Cosines of the best pairing of features."""
    cosines = torch.nn.functional.normalize(H, dim=1) @ torch.nn.functional.normalize(truth, dim=1).T
    return cosines[linear_sum_assignment(cosines.numpy(), maximize=True)]


def tail(X: Tensor, k: int) -> float:
    """What a truncated SVD of rank k leaves: the sum of the squares of all further singular values."""
    return float(torch.linalg.svdvals(X)[k:].square().sum())


def squared_error(snmf: SNMF, X: Tensor, W: Tensor | None = None) -> float:
    W = snmf.weights_ if W is None else W
    return float((X - W @ snmf.components_).square().sum())


def svd_with_positive_weights(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gillis and Kumar's semi-NMF of rank k that is as good as the SVD of rank k - 1.

    One feature more, minus the sum of all others, cancels what is added to every feature's weights to lift them above 0.
    """
    U, sizes, V = torch.linalg.svd(X, full_matrices=False)
    W, H = U[:, : k - 1] * sizes[: k - 1], V[: k - 1]
    lift = (-W).amax(1, keepdim=True).clamp_min(0)
    return torch.cat([W + lift, lift], 1), torch.cat([H, -H.sum(0, keepdim=True)])


# ------------------------------------------------------------------------------------------------ bounds by the SVD


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 12), st.data())
def test_the_upper_bound_can_be_built(seed, n, d, data):
    X, k = gaussian(n, d, seed=seed), data.draw(st.integers(2, min(n, d)))
    W, H = svd_with_positive_weights(X, k)
    assert W.shape == (n, k)
    assert (W >= 0).all()
    assert float((X - W @ H).square().sum()) == pytest.approx(tail(X, k - 1), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_fit_without_supports_lies_between_the_bounds(k):
    X = gaussian(100, 80)
    found = squared_error(SNMF(k, share=1.0).fit(X), X)
    assert tail(X, k) <= found <= tail(X, k - 1)


def test_with_positive_data_it_is_as_good_as_the_svd():
    """The optimum is the SVD's error there, for every rank; the figure is numpy's for this matrix."""
    X = uniform(100, 80)
    snmf = SNMF(6, share=1.0, tol=0.0, max_iter=400).fit(X)
    assert squared_error(snmf, X) == pytest.approx(tail(X, 6), rel=1e-12)
    assert squared_error(snmf, X) == pytest.approx(520.2937031613814, rel=1e-9)


def test_it_is_no_worse_than_nmf_and_no_better_than_the_svd():
    decomposition = pytest.importorskip("sklearn.decomposition")
    X = uniform(100, 80)
    nmf = decomposition.NMF(6, init="nndsvd", max_iter=2000, tol=1e-5).fit(X.numpy())
    ours = squared_error(SNMF(6, share=1.0).fit(X), X)
    assert tail(X, 6) * (1 - 1e-12) <= ours <= nmf.reconstruction_err_**2


@pytest.mark.parametrize("seed", [0, 1])
def test_one_feature_more_than_the_rank_is_exact_and_the_rank_alone_is_not(seed):
    """Unless a positive vector lies in the space of the tokens, as it does in the second case."""
    X = gaussian(60, 3, seed=seed) @ gaussian(3, 80, seed=seed + 10)
    assert SNMF(4, share=1.0).fit(X).relative_loss_ < 1e-8
    assert SNMF(3, share=1.0).fit(X).relative_loss_ > 1e-2
    X = uniform(60, 3, seed=seed) @ gaussian(3, 80, seed=seed + 10)
    assert SNMF(3, share=1.0, tol=0.0, max_iter=300).fit(X).relative_loss_ < 1e-10


@pytest.mark.parametrize(("positive", "tolerance"), [(True, 1e-7), (False, 1e-3)], ids=["positive", "noise"])
def test_it_ends_where_no_factor_can_be_improved(positive, tolerance):
    """Karush, Kuhn and Tucker: F (G^T G) = A G; G >= 0, slope >= 0, and one of the two is 0."""
    X = (uniform if positive else gaussian)(100, 80)
    snmf = SNMF(6, share=1.0, tol=0.0, max_iter=400).fit(X)
    W, H = snmf.weights_, snmf.components_
    scale = float(X.norm())
    torch.testing.assert_close(W.T @ W @ H, W.T @ X, rtol=0.0, atol=tolerance * scale)
    slope = W @ (H @ H.T) - X @ H.T
    assert (W >= 0).all()
    assert (W * slope).abs().max() <= tolerance * scale**2
    assert (slope[W == 0] >= -tolerance * scale**2).all()


# ---------------------------------------------------------------------------------------------------- planted groups


@pytest.mark.parametrize("noise", [0, 0.05], ids=["exact", "noisy"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_features_are_found_at_their_share(seed, noise):
    X, H = planted(seed, noise)
    snmf = SNMF(10, share=12 / 400, seed=seed).fit(X)
    assert matched(snmf.components_, H).min() > 0.98
    assert snmf.relative_loss_ < (1e-10 if noise == 0 else 0.01)
    if not noise:
        found = {tuple(row.nonzero()[:, 0].tolist()) for row in snmf.components_}
        assert found == {tuple(row.nonzero()[:, 0].tolist()) for row in H}


def test_reconstruction_proves_nothing():
    """Without supports as good as no error and other features; with a share twice too wide, most of them."""
    X, H = planted(0)
    free, wide = SNMF(10, share=1.0).fit(X), SNMF(10, share=24 / 400).fit(X)
    assert free.relative_loss_ < 1e-4
    assert matched(free.components_, H).mean() < 0.8
    assert wide.relative_loss_ < 1e-4
    assert 0.8 < matched(wide.components_, H).mean() < 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_beats_the_published_algorithm_in_a_tenth_of_its_steps(seed):
    for X, share in ((planted(seed, 0.05, n=300)[0], 12 / 400), (gelu(seed), 0.05)):
        ours = SNMF(10, share=share, n_init=4, max_iter=0).fit(X)
        published = SNMF(10, share=share, solver="multiplicative", max_iter=360).fit(X)
        assert ours.n_iter_ == SEARCH
        assert ours.relative_loss_ < published.relative_loss_


# ----------------------------------------------------------------------------------------------- what may not matter


def advance(A: Tensor, G: Tensor, share: float, n: int = 5) -> solvers.Run:
    """A few steps that choose supports and a few that keep them, from these weights."""
    run = solvers.Run(G.clone())
    for step in range(2 * n):
        m = math.ceil(share * len(A))
        solvers._step(solvers.Data(A), m, run, None if step < n else run.support)
    return run


CASES = pytest.mark.parametrize("share", [0.1, 1.0], ids=["sparse", "plain"])


def test_a_rotation_of_neurons_rotates_the_features():
    A, G = gaussian(30, 50), uniform(5, 50)
    R = torch.linalg.qr(gaussian(30, 30, seed=1)).Q
    there, turned = advance(A, G, 1.0), advance(R @ A, G, 1.0)
    torch.testing.assert_close(turned.components, there.components @ R.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turned.G, there.G, rtol=1e-9, atol=1e-9)


@CASES
def test_the_order_of_tokens_and_of_neurons_does_not_matter(share):
    A, G = gaussian(30, 50), uniform(5, 50)
    here = advance(A, G, share)
    tokens, neurons = torch.randperm(50, generator=torch.Generator().manual_seed(1)), torch.arange(29, -1, -1)
    other = advance(A[:, tokens], G[:, tokens], share)
    torch.testing.assert_close(other.components, here.components, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.G, here.G[:, tokens], rtol=1e-9, atol=1e-9)
    other = advance(A[neurons], G, share)
    torch.testing.assert_close(other.components, here.components[:, neurons], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.G, here.G, rtol=1e-9, atol=1e-9)


def test_the_order_of_features_does_not_matter_in_the_end():
    """Coordinate descent goes through them in order, so that only what it arrives at is the same."""
    A = planted(0, 0.05)[0].T
    G = fitted().weights_.T + 0.01 * uniform(10, 600)
    one, other = advance(A, G, 12 / 400, 40), advance(A, G.flip(0), 12 / 400, 40)
    assert other.loss == pytest.approx(one.loss, rel=1e-9)
    torch.testing.assert_close(other.components.flip(0), one.components, rtol=1e-6, atol=1e-6)


@SOLVERS
@pytest.mark.parametrize("init", ["svd", "random", "kmeans"])
@pytest.mark.parametrize("scale", [2.0**-20, 3.7e-4, 41.0], ids=str)
def test_the_unit_of_the_data_is_the_unit_of_the_components(solver, init, scale):
    X = planted(1, 0.05, d=200, n=200)[0]
    options = {"share": 12 / 200, "solver": solver, "init": init, "n_init": 1, "max_iter": 40}
    one, other = SNMF(10, **options).fit(X), SNMF(10, **options).fit(scale * X)
    assert other.relative_loss_ == pytest.approx(one.relative_loss_, rel=1e-8)
    assert other.reconstruction_err_ == pytest.approx(scale * one.reconstruction_err_, rel=1e-8)
    largest = float(one.components_.abs().max())
    torch.testing.assert_close(other.components_ / scale, one.components_, rtol=1e-6, atol=1e-9 * largest)
    torch.testing.assert_close(other.weights_, one.weights_, rtol=1e-6, atol=1e-9)


@SOLVERS
def test_a_seed_is_a_result_and_threads_are_not_part_of_it(solver, monkeypatch):
    monkeypatch.setattr(solvers, "SEARCH", 9)  # threads that wait for each other on a busy machine are slow
    X = planted(0, 0.05, d=300, n=200)[0]
    fit = lambda seed: SNMF(10, share=12 / 300, solver=solver, n_init=2, max_iter=4, seed=seed).fit(X)  # noqa: E731
    one, again, other = fit(0), fit(0), fit(1)
    assert torch.equal(one.components_, again.components_)
    assert torch.equal(one.weights_, again.weights_)
    assert one.losses_ == again.losses_ != other.losses_
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = fit(0)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two.components_, one.components_, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(two.weights_, one.weights_, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------- what a fit consists of


@SOLVERS
@pytest.mark.parametrize("init", ["auto", "svd", "random", "kmeans"])
def test_the_parts_of_a_fit(solver, init):
    X = planted(0, 0.05, n=300)[0]
    snmf = SNMF(10, share=12 / 400, solver=solver, init=init, n_init=3, max_iter=30).fit(X)
    H, W = snmf.components_, snmf.weights_
    assert (H.shape, W.shape) == ((10, 400), (300, 10))
    assert (W >= 0).all()
    assert ((H != 0).sum(1) == 12).all()
    strengths = H.norm(dim=1)
    assert torch.equal(strengths, strengths.sort(descending=True).values)
    torch.testing.assert_close(W.norm(dim=0), torch.ones(10, dtype=DOUBLE))
    assert snmf.reconstruction_err_ == pytest.approx(float((X - W @ H).norm()), rel=1e-9)
    assert snmf.relative_loss_ == pytest.approx(squared_error(snmf, X) / float(X.square().sum()), rel=1e-9)
    assert len(snmf.losses_) == 3
    assert snmf.relative_loss_ == pytest.approx(min(snmf.losses_), rel=1e-12)
    assert len(snmf.history_) == snmf.n_iter_ <= (30 if solver == "multiplicative" else 30 + SEARCH)
    if solver == "hals":
        assert snmf.relative_loss_ == pytest.approx(snmf.history_[-1], rel=1e-12)
    assert ((snmf.stability_ >= -1 - 1e-12) & (snmf.stability_ <= 1 + 1e-12)).all()
    torch.testing.assert_close(snmf.inverse_transform(W), W @ H)
    assert (snmf.hook, snmf.dtype, snmf.device) == (None, DOUBLE, X.device)


@SOLVERS
def test_nothing_is_subnormal(solver):
    X = torch.nn.functional.relu(gelu().float())
    snmf = SNMF(20, share=0.05, solver=solver, n_init=1, max_iter=200).fit(X)
    for part in (snmf.components_, snmf.weights_):
        assert not ((part != 0) & (part.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_with_supports_frozen_no_step_raises_the_loss(dtype, share):
    """From the last step of the search on: each is least squares on its support, then coordinate descent."""
    for X in (gelu(), planted(2, 0.05)[0]):
        snmf = SNMF(10, share=share, n_init=1, tol=0.0, max_iter=60).fit(X.to(dtype))
        polish = snmf.history_[SEARCH - 1 :]
        slack = 1e-12 if dtype == DOUBLE else 1e-6
        assert len(polish) > 5
        assert all(later <= sooner + slack for sooner, later in pairwise(polish))


def test_the_published_loop_keeps_the_best_it_has_seen_and_patience_ends_it():
    X = gelu()
    snmf = SNMF(10, share=0.05, solver="multiplicative", max_iter=300).fit(X)
    assert any(later > sooner for sooner, later in pairwise(snmf.history_))
    assert snmf.relative_loss_ == pytest.approx(min(snmf.history_), rel=1e-12)
    assert snmf.relative_loss_ == pytest.approx(squared_error(snmf, X) / float(X.square().sum()), rel=1e-9)
    impatient = SNMF(10, share=0.05, solver="multiplicative", max_iter=300, patience=5, tol=1e-2).fit(X)
    assert impatient.n_iter_ < 100
    assert impatient.history_ == snmf.history_[: impatient.n_iter_]


@pytest.mark.parametrize(("d", "share", "m"), [(40, 0.01, 1), (40, 0.05, 2), (40, 0.06, 3), (40, 1.0, 40), (7, 0.5, 4)])
def test_a_share_is_rounded_up_to_neurons(d, share, m):
    snmf = SNMF(3, share=share, n_init=2).fit(gaussian(50, d))
    assert ((snmf.components_ != 0).sum(1) == m).all()


def test_twins_and_dead_neurons_leave_the_number_of_neurons_as_it_is():
    """Every neuron twice, so that all strengths are tied, and as many again that are always 0."""
    half = torch.nn.functional.relu(gaussian(80, 12))
    X = torch.cat([torch.zeros(80, 24), half, half], 1)
    H = SNMF(4, share=5 / 48, n_init=3).fit(X).components_
    assert ((H != 0).sum(1) == 5).all()
    assert (H[:, :24] == 0).all()


def test_more_features_than_the_data_have_a_use_for_are_0_and_say_so():
    X = gaussian(6, 20)
    with pytest.warns(UserWarning, match="6 of 12 features are 0: the data have no use for so many"):
        snmf = SNMF(12, share=0.5, init="kmeans", n_init=2).fit(X)
    assert snmf.components_.count_nonzero(1).tolist() == [10] * 6 + [0] * 6
    for part in (snmf.components_, snmf.weights_, snmf.stability_, snmf.transform(X)):
        assert part.isfinite().all()
    assert snmf.transform(X)[:, 6:].count_nonzero() == 0
    assert snmf.codes(X).latents.max() < 6


@SOLVERS
@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_one_direction_and_five_features_for_it(solver, share, dtype):
    """All are alike or superfluous: singular least squares, and no NaN."""
    X = (uniform(50, 1) @ gaussian(1, 40)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whether the superfluous ones end at 0 is up to rounding
        snmf = SNMF(5, share=share, solver=solver, n_init=2, max_iter=100).fit(X)
        one = SNMF(1, share=share, n_init=1).fit(X)
    assert snmf.components_.isfinite().all()
    assert snmf.weights_.isfinite().all()
    assert snmf.relative_loss_ <= one.relative_loss_ + 1e-5


def test_one_token_and_one_neuron():
    assert SNMF(1, n_init=2).fit(torch.tensor([[-3.0]])).components_.tolist() == [[pytest.approx(-3)]]


def test_narrow_activations_are_fitted_in_float32():
    X = planted(0)[0].bfloat16()
    narrow, wide = (SNMF(10, share=0.03, n_init=1, max_iter=10).fit(x) for x in (X, X.float()))
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow.components_, wide.components_)
    assert torch.equal(narrow.transform(X[:9]), wide.transform(X[:9].float()))


# -------------------------------------------------------------------------------------------------------- stability


def test_stability_is_that_of_solutions_which_are_the_same():
    H = gaussian(5, 30)
    others = [H.flip(0), 3 * H[[2, 0, 1, 4, 3]]]
    torch.testing.assert_close(module._stability(H, others), torch.ones(5, dtype=DOUBLE))


def test_stability_by_hand():
    """Matched one to one: the second feature has to take what the first leaves, and a mirror image is its opposite."""
    H = torch.eye(3, dtype=DOUBLE)[:2]
    others = torch.tensor([[[2.0, 0, 0], [1, 0, 1]], [[1, 0, 0], [0, -5, 0]]], dtype=DOUBLE).unbind()
    assert module._stability(H, list(others)).tolist() == pytest.approx([1, -0.5])
    assert module._stability(H, [torch.zeros_like(H)]).tolist() == [0, 0]
    assert module._stability(H, []).isnan().all()


def test_features_that_every_start_finds_are_stable():
    H = torch.block_diag(*gaussian(5, 1, 8))
    W = torch.nn.functional.one_hot(torch.arange(200) % 5, 5) * (1 + uniform(200, 1))
    snmf = SNMF(5, share=8 / 40, init="svd", n_init=3).fit(W @ H)
    torch.testing.assert_close(snmf.stability_, torch.ones(5, dtype=DOUBLE))
    assert matched(snmf.components_, H).min() > 1 - 1e-9
    assert SNMF(5, share=8 / 40, n_init=1).fit(W @ H).stability_.isnan().all()


# ------------------------------------------------------------------------------------------------------ transforming


def test_tokens_that_it_has_not_seen_have_their_nnls_weights():
    snmf, X = fitted(), planted(5, 0.05)[0][:40]
    found = snmf.transform(X)
    F = snmf.components_.T.numpy()
    expected = np.stack([scipy_nnls(F, row)[0] for row in X.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.0, atol=1e-8 * expected.max())
    assert (found == 0).any()


@SOLVERS
def test_transforming_the_data_is_no_worse_than_the_weights_of_the_fit(solver):
    for X in (planted(0, 0.05)[0], gelu()):
        snmf = SNMF(10, share=0.03, solver=solver, n_init=1, max_iter=20).fit(X)
        assert squared_error(snmf, X, snmf.transform(X)) <= squared_error(snmf, X) * (1 + 1e-12)


def test_tokens_are_transformed_one_by_one(monkeypatch):
    snmf, X = fitted(), planted(0, 0.05)[0][:23]
    whole = snmf.transform(X)
    monkeypatch.setattr(module, "_ENTRIES", 400 * 5)
    torch.testing.assert_close(snmf.transform(X), whole, rtol=1e-9, atol=1e-10)


def test_codes_are_the_weights_that_are_not_0():
    snmf, X = fitted(), planted(5, 0.05)[0][:40]
    codes, W = snmf.codes(X), snmf.transform(X)
    assert torch.equal(codes.dense(), W)
    assert (codes.values > 0).all()
    assert codes.n_latents == 10
    assert len(codes.values) == W.count_nonzero()
    torch.testing.assert_close(codes.decode(snmf.components_), snmf.inverse_transform(W))


def test_fit_transform_and_fit_return_what_scikit_learn_says():
    X = gelu()
    snmf = SNMF(4, share=0.1, n_init=2)
    assert snmf.fit(X) is snmf
    assert torch.equal(SNMF(4, share=0.1, n_init=2).fit_transform(X), snmf.weights_)
    assert torch.equal(SNMF(4, share=0.1, n_init=2).fit(X, None).components_, snmf.components_)


def test_fitting_again_forgets_the_first_data():
    snmf = SNMF(4, share=0.1, n_init=2).fit(gelu())
    snmf.source_ = {"hook": "blocks.0.mlp.hook_post"}
    again = snmf.fit(gelu(1))
    assert again.hook is None
    assert torch.equal(again.components_, SNMF(4, share=0.1, n_init=2).fit(gelu(1)).components_)


def test_data_are_left_as_they_are_and_take_no_gradient():
    X = gelu().clone().requires_grad_()
    snmf = SNMF(4, share=0.1, n_init=2, max_iter=5).fit(X)
    assert torch.equal(X.detach(), gelu())
    assert not snmf.components_.requires_grad
    assert not snmf.transform(X).requires_grad


def test_progress_is_silent_unless_asked_for(capfd):
    SNMF(2, share=0.1, n_init=1, max_iter=2).fit(gelu())
    assert capfd.readouterr().err == ""
    SNMF(2, share=0.1, n_init=1, max_iter=2, progress=True).fit(gelu())
    assert "snmf" in capfd.readouterr().err


def test_it_says_what_it_is():
    assert repr(SNMF(7)) == "SNMF(7 features, share=0.01, solver='hals', not fitted)"
    assert repr(fitted()).startswith("SNMF(10 features, share=0.03, solver='hals', relative loss 0.0")


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_features": 0}, "n_features is at least 1, not 0"),
        ({"n_init": 0}, "n_init is at least 1, not 0"),
        ({"patience": 0}, "patience is at least 1, not 0"),
        ({"share": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"share": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"share": math.nan}, "above 0 and at most 1, not nan"),
        ({"solver": "hal"}, "'hal' is not a solver of semi-NMF .*did you mean 'hals'"),
        ({"init": "svds"}, "'svds' is not a kind of start .*did you mean 'svd'"),
        ({"max_iter": -1}, "max_iter and tol are not negative"),
        ({"tol": -1e-3}, "max_iter and tol are not negative"),
        ({"solver": "multiplicative", "max_iter": 0}, "a max_iter of at least 1, not 0"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_options_that_make_no_sense(options, says):
    with refused(OptionError, says):
        SNMF(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_rows_that_are_not_finite_are_named(bad):
    X = gelu().clone()
    X[[3, 8, 9], [1, 2, 3]] = bad
    with refused(OptionError, "activations are not finite in rows 3, 8, 9$"):
        SNMF(4).fit(X)
    with refused(OptionError, "not finite in rows 3, 8, 9$"):
        fitted().transform(X[:, :1].expand(-1, 400).clone().index_fill_(0, torch.tensor([3, 8, 9]), bad))


@pytest.mark.parametrize("shape", [(5,), (0, 4), (4, 0), (2, 3, 4)], ids=str)
def test_data_that_are_not_a_matrix_with_something_in_it(shape):
    with refused(OptionError, "with at least one of each, not"):
        SNMF(2).fit(torch.ones(shape))


def test_data_with_nothing_in_them():
    with refused(OptionError, r"nothing to factorise in activations of shape \(5, 7\): all are 0"):
        SNMF(2).fit(torch.zeros(5, 7))


@pytest.mark.parametrize("scale", [1e-30, 1e25], ids=str)
def test_data_whose_squares_are_out_of_range(scale):
    with refused(OptionError, "no square in torch.float32: scale them"):
        SNMF(2, share=0.1).fit((scale * gelu()).float())
    assert SNMF(2, share=0.1, n_init=1).fit(scale * gelu()).relative_loss_ < 1  # float64 has room for them


def test_components_that_are_not_there_yet():
    for use in (SNMF.transform, SNMF.codes, SNMF.inverse_transform, SNMF.save):
        with refused(OptionError, "no components yet: call fit or fit_snmf first"):
            use(SNMF(3), "nowhere" if use is SNMF.save else torch.ones(2, 3))
    with refused(OptionError, "no components yet"):
        _ = SNMF(3).dtype


def test_activations_of_another_width():
    with refused(OptionError, "these activations are 7 wide, and the components 400"):
        fitted().transform(torch.ones(2, 7))


# ----------------------------------------------------------------------------------------------------------- keeping


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_it_comes_back_from_the_disk_bit_for_bit(tmp_path, dtype):
    snmf = SNMF(4, share=0.1, n_init=3, tol=1e-4, seed=5).fit(gelu().to(dtype))
    snmf.source_ = {"hook": "blocks.2.mlp.hook_post", "n_tokens": 200}
    again = SNMF.load(snmf.save(tmp_path / "snmf"))
    for name in ("components_", "weights_", "stability_"):
        assert torch.equal(getattr(again, name), getattr(snmf, name))
        assert getattr(again, name).dtype == dtype
    skipped = {"components_", "weights_", "stability_"}
    assert {k: v for k, v in vars(again).items() if k not in skipped} == {
        k: v for k, v in vars(snmf).items() if k not in skipped
    }
    assert again.hook == "blocks.2.mlp.hook_post"
    assert torch.equal(again.transform(gelu()[:9]), snmf.transform(gelu()[:9]))
    assert torch.equal(again.fit(gelu().to(dtype)).components_, snmf.components_)


def test_one_start_has_no_stability_and_comes_back_too(tmp_path):
    SNMF(2, share=0.1, n_init=1, max_iter=2).fit(gelu()).save(tmp_path / "snmf")
    assert SNMF.load(tmp_path / "snmf").stability_.isnan().all()


def test_what_was_tampered_with_is_refused(tmp_path):
    folder = fitted().save(tmp_path / "snmf")
    about = json.loads((folder / "snmf.json").read_text())
    del about["share"]
    (folder / "snmf.json").write_text(json.dumps(about))
    with refused(OptionError, "snmf.json lacks share$"):
        SNMF.load(folder)
    fitted().save(folder)
    data = bytearray((folder / "snmf.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "snmf.safetensors").write_bytes(bytes(data))
    with refused(OptionError, "snmf.safetensors is not the file that snmf.json was written with"):
        SNMF.load(folder)


# ------------------------------------------------------------------------------------------------------ from a model


def small_corpus() -> Corpus:
    tokens = torch.randint(4, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    return Corpus(tokens, torch.tensor([9, 4, 2, 9, 7]), name="random")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_a_model_it_is_the_fit_of_the_rows_that_count(tiny, family):
    model, corpus, hook = tiny(family, torch.float32), small_corpus(), "blocks.1.mlp.hook_post"
    snmf = fit_snmf(model, corpus, hook, batch_size=2, n_features=3, share=0.1, n_init=2, seed=4)
    assert snmf.hook == hook
    assert len(snmf.weights_) == int(corpus.mask().sum()) == snmf.source_["n_tokens"]
    assert snmf.source_["text"] == "random"
    X = record(model, corpus.tokens, [hook])[hook][corpus.mask()]
    torch.testing.assert_close(X, snmf_rows(model, corpus, hook), rtol=1e-4, atol=1e-6)
    same = SNMF(3, share=0.1, n_init=2, seed=4).fit(X)
    assert snmf.relative_loss_ == pytest.approx(same.relative_loss_, rel=1e-3)
    assert float((X - snmf.weights_ @ snmf.components_).norm()) == pytest.approx(snmf.reconstruction_err_, rel=1e-3)


def snmf_rows(model, corpus: Corpus, hook: str) -> Tensor:
    """Sequence by sequence, without padding and the first position."""
    rows = []
    for tokens, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        rows.append(record(model, tokens[None, :length], [hook])[hook][0, 1:])
    return torch.cat(rows)


def test_a_fit_of_a_model_comes_back_with_its_hook(tiny, tmp_path):
    snmf = fit_snmf(tiny("gpt2", DOUBLE), small_corpus(), "blocks.0.hook_mlp_out", n_features=2, share=0.5, n_init=1)
    assert SNMF.load(snmf.save(tmp_path / "snmf")).source_ == snmf.source_


@pytest.mark.parametrize("hook", ["blocks.9.mlp.hook_post", "blocks.0.mlp.hook_pots", "blocks.0.attn.hook_pattern"])
def test_hook_points_that_are_not_there_or_have_no_vector_per_token(tiny, hook):
    with refused(SiteError, hook):
        fit_snmf(tiny("gpt2", torch.float32), small_corpus(), hook, n_features=2)


def test_the_options_of_a_model_s_fit_are_checked_like_any(tiny):
    with refused(OptionError, "n_features is at least 1"):
        fit_snmf(tiny("gpt2", torch.float32), small_corpus(), "blocks.0.mlp.hook_post", n_features=0)
