"""Features of features: planted families of days, the objective by dense algebra, gradients by autograd, trees by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from interp.errors import OptionError
from interp.factorize import hierarchy as module
from interp.factorize.hierarchy import Hierarchy
from interp.factorize.semi_nmf import strongest
from tests.small_pairs import refused

DOUBLE = torch.float64
FAMILY = [0, 0, 0, 0, 1, 1, 1]  # of each day
CORE, OWN, NEURONS = 5, 7, 120
OBJECTIVES = pytest.mark.parametrize("objective", ["levels", "last"])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def planted(seed: int, n: int = 300, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, weights, days, families): days have core neurons in common and exclusive ones; a token is of one day or two.

    Fewer exclusive neurons than core ones could not be recovered: the difference of two days would fit into one feature.
    """
    values = lambda m, i: (1 + draw(m, seed=i)) * torch.where(draw(m, seed=i + 1) < 0.5, -1.0, 1.0)  # noqa: E731
    neurons = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed)).tolist()
    families, days = torch.zeros(2, NEURONS, dtype=DOUBLE), torch.zeros(len(FAMILY), NEURONS, dtype=DOUBLE)
    for i, row in enumerate(families):
        row[[neurons.pop() for _ in range(CORE)]] = values(CORE, 100 * seed + 2 * i)
    for i, row in enumerate(days):
        row[:] = families[FAMILY[i]]
        row[[neurons.pop() for _ in range(OWN)]] = values(OWN, 100 * seed + 20 + 2 * i)
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(len(days), (2, n), generator=generator)
    first, second = 0.5 + draw(n, 1, seed=seed), draw(n, 1, seed=seed + 1) * (draw(n, 1, seed=seed + 2) < 0.3)
    weights = first * F.one_hot(one, len(days)) + second * F.one_hot(other, len(days))
    return weights @ days + noise * torch.randn(n, NEURONS, generator=generator, dtype=DOUBLE), weights, days, families


def of_days(objective: str = "levels", **options) -> Hierarchy:
    options = {"init": "kmeans", "n_init": 12, "fine_tune_steps": 100} | options
    return Hierarchy((len(FAMILY), 2), share=((CORE + OWN) / NEURONS, CORE / NEURONS), objective=objective, **options)


def small(objective: str = "levels", dtype: torch.dtype = DOUBLE, **options) -> tuple[Tensor, Hierarchy]:
    """Three levels of noise."""
    X = (draw(60, 30, seed=3) - 0.3).to(dtype)
    options = {"n_init": 2, "max_iter": 5, "fine_tune_steps": 40} | options
    return X, Hierarchy((8, 4, 2), share=0.2, objective=objective, **options).fit(X)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


# ------------------------------------------------------------------------------------------------------------ planted


@pytest.mark.parametrize("seed", [0, 1])
@OBJECTIVES
def test_a_planted_tree_is_recovered(objective, seed):
    X, weights, days, families = planted(seed)
    found = of_days(objective).fit(X, hook="blocks.0.mlp.hook_post")
    assert found.hook == "blocks.0.mlp.hook_post"
    (day, which), (family, parent) = (
        cosines(planted, C).max(1) for planted, C in zip((days, families), found.components_, strict=True)
    )
    assert day.min() > 0.98
    assert family.min() > 0.98
    tree = found.tree()
    expected = {(int(parent[f]), int(which[d])) for d, f in enumerate(FAMILY)}
    assert {*zip(tree["parent"], tree["child"], strict=True)} == expected
    assert len(tree) == len(FAMILY)
    active = cosines(weights.T, found.activations(0).T)
    assert (active.max(1).values > 0.98).all()
    together = torch.stack([weights[:, [f == i for f in FAMILY]].sum(1) for i in range(2)], 1)
    assert (cosines(together.T, found.activations(1).T).max(1).values > 0.95).all()


def test_the_published_objective_forgets_the_first_level():
    """It sees only the last: a lower loss there, and a higher one where children are to be told apart."""
    X = planted(2)[0]
    ours, published = (of_days(objective, n_init=2, fine_tune_steps=300).fit(X) for objective in ("levels", "last"))
    assert published.losses_[0] > ours.losses_[0]
    assert published.losses_[1] < ours.losses_[1]


# ------------------------------------------------------------------------------------------------------------ algebra


@OBJECTIVES
def test_factors_are_what_they_promise(objective):
    X, found = small(objective)
    assert [tuple(Y.shape) for Y in found.weights_] == [(60, 8), (8, 4), (4, 2)]
    product = torch.eye(60, dtype=DOUBLE)
    for level, (Y, C) in enumerate(zip(found.weights_, found.components_, strict=True)):
        assert (Y >= 0).all()
        product = product @ Y
        torch.testing.assert_close(found.activations(level), product)
        torch.testing.assert_close(found.reconstruct(level), product @ C)
        assert found.losses_[level] == pytest.approx(float((X - product @ C).square().sum()), rel=1e-10)
        assert ((C != 0).sum(1) <= 6).all()
        lengths = C.norm(dim=1)
        torch.testing.assert_close(lengths, (lengths > 0).to(DOUBLE))
        # least squares on the support, given the activations: what is left has nothing to do with them
        left = product.T @ (X - product @ C)
        assert left[C != 0].abs().max() < 1e-8 * float(X.square().sum())
    assert found.loss_ == pytest.approx(sum(found.losses_) if objective == "levels" else found.losses_[-1])
    assert found.loss_ < found.greedy_loss_


@OBJECTIVES
def test_tuning_never_raises_the_loss(objective):
    """However wild its steps."""
    _, greedy = small(objective, fine_tune_steps=0)
    assert greedy.loss_ == pytest.approx(greedy.greedy_loss_, rel=1e-12)
    for options in ({"fine_tune_steps": 1}, {"lr": 10.0}, {"fine_tune_steps": 120}):
        _, tuned = small(objective, **options)
        assert tuned.greedy_loss_ == greedy.greedy_loss_
        assert tuned.loss_ <= greedy.loss_ * (1 + 1e-12)


@pytest.mark.parametrize("levels", [[0, 1, 2], [2], [1]], ids=["all", "last", "middle"])
def test_gradients_are_those_of_autograd(levels):
    X = draw(20, 15, seed=0) - 0.5
    Y = [draw(6, 20, seed=1), draw(6, 4, seed=2), draw(4, 2, seed=3)]
    C = [draw(k, 15, seed=k) - 0.5 for k in (6, 4, 2)]
    supports = [strongest(c, m) for c, m in zip(C, (1, 3, 15), strict=True)]
    state = module._State(Y, supports, [c.gather(1, s.neurons) for c, s in zip(C, supports, strict=True)])
    norm2 = float(X.square().sum())
    total = module._gradients(state, X.T.contiguous(), norm2, levels, 3.0)
    other = [p.detach().clone().requires_grad_() for p in state.parameters]
    A, expected = other[0].T, 0
    for i in range(3):
        A = A if i == 0 else A @ other[i]
        if i in levels:
            dense = torch.zeros(C[i].shape, dtype=DOUBLE).scatter(1, supports[i].neurons, other[3 + i])
            expected = expected + (X - A @ dense).square().sum()
    grads = torch.autograd.grad(3 * expected, other, allow_unused=True)
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for parameter, grad in zip(state.parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter) if grad is None else grad)


def test_the_scale_of_the_data_is_that_of_the_activations():
    X = planted(0)[0]
    options = {"n_init": 2, "fine_tune_steps": 50}
    one, other = of_days(**options).fit(X), of_days(**options).fit(1e-3 * X)
    for level in range(2):
        torch.testing.assert_close(other.components_[level], one.components_[level], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(1e3 * other.activations(level), one.activations(level), rtol=1e-6, atol=1e-8)
    assert 1e6 * other.loss_ == pytest.approx(one.loss_)
    assert one.tree()[["parent", "child"]].equals(other.tree()[["parent", "child"]])


def test_a_seed_is_a_result():
    X, one = small(seed=4, n_init=3)
    other = Hierarchy((8, 4, 2), share=0.2, seed=4, n_init=3, max_iter=5, fine_tune_steps=40).fit(X)
    assert all(torch.equal(a, b) for a, b in zip(one.weights_, other.weights_, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.components_, other.components_, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_precisions(dtype):
    X, found = small(dtype=dtype)
    assert {t.dtype for t in [*found.weights_, *found.components_]} == {torch.float32}
    dense = [float((X.double() - found.reconstruct(i).double()).square().sum()) for i in range(3)]
    assert found.losses_ == pytest.approx(dense, rel=1e-4)
    assert found.loss_ <= found.greedy_loss_


# ------------------------------------------------------------------------------------------------------- other tokens


def test_other_tokens_go_through_the_same_factors():
    X = draw(9, 30, seed=8) - 0.3
    _, found = small()
    C = found.components_[0].numpy()
    expected = torch.from_numpy(np.stack([nnls(C.T, row)[0] for row in X.numpy()]))
    for level in range(3):
        torch.testing.assert_close(found.transform(X, level), expected, rtol=1e-6, atol=1e-8)
        if level < 2:
            expected = expected @ found.weights_[level + 1]


# --------------------------------------------------------------------------------------------------------------- trees


def with_weights(*Y: list[list[float]]) -> Hierarchy:
    """As if these had been fitted."""
    found = Hierarchy((len(Y[0]), *(len(factor[0]) for factor in Y)))
    found.weights_ = [torch.ones(1, len(Y[0])), *(torch.tensor(factor) for factor in Y)]
    return found


def test_children_by_hand():
    found = with_weights(
        [[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.1, 0.31, 0.0], [0.5, 0.29, 0.0], [0.0, 0.0, 0.0]],
        [[0.0], [8.0], [0.0]],
    )
    tree = found.tree()
    assert tree.columns.tolist() == ["level", "parent", "child", "weight", "share"]
    rows = [*zip(tree["level"], tree["parent"], tree["child"], strict=True)]
    # child 4 has no parent, parent 2 no child; 1 of level 0 has two parents
    assert rows == [(1, 0, 0), (1, 0, 1), (1, 0, 3), (1, 1, 1), (1, 1, 2), (2, 0, 1)]
    assert tree["weight"].tolist() == pytest.approx([1, 0.5, 0.5, 2, 0.31, 8])
    assert tree["share"].tolist() == pytest.approx([1, 0.5, 0.5, 1, 0.155, 1])
    assert found.tree(max_children=2)["child"].tolist() == [0, 1, 1, 2, 1]
    assert found.tree(min_share=0.1)["child"].tolist() == [0, 1, 3, 2, 1, 2, 3, 1]
    assert found.tree(min_share=1.0)["child"].tolist() == [0, 1, 1]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_features": (4,)}, r"two levels or more, not n_features=\[4\]"),
        ({"n_features": (4, 4)}, r"fewer features than the one it is made of, not n_features=\[4, 4\]"),
        ({"n_features": (2, 4)}, "fewer features than the one it is made of"),
        ({"n_features": (4, 2, 0)}, "every level has a feature"),
        ({"n_features": (4, 2), "share": (0.1,)}, "there are 2 levels, and shares for 1"),
        ({"fine_tune_steps": -1}, "takes 0 steps or more, not -1"),
        ({"lr": 0.0}, "the learning rate is above 0, not 0"),
        ({"objective": "first"}, "objective"),
    ],
    ids=["one", "equal", "rising", "none", "shares", "steps", "rate", "objective"],
)
def test_refused_options(options, says):
    with refused(OptionError, says):
        Hierarchy(**options)


def test_refusals():
    with refused(OptionError, "3 tokens do not make 4 features"):
        Hierarchy((4, 2)).fit(draw(3, 10, seed=0))
    with refused(OptionError, "has not been fitted"):
        Hierarchy((4, 2)).tree()
    _, found = small()
    with refused(OptionError, "levels 0 to 2, not 3"):
        found.activations(3)
    with refused(OptionError, "reads 30 neurons, and the activations have 29"):
        found.transform(draw(2, 29, seed=0))
    with refused(OptionError, "a share above 0, at most 1, not 0"):
        found.tree(min_share=0.0)
    with refused(OptionError, "keeps one child or more, not 0"):
        found.tree(max_children=0)
