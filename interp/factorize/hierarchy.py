"""Features of features: an SNMF whose components are factorised again, level by level, into fewer and more general ones.

    C_{i-1} ~ Y_i C_i,   Y_i >= 0 [k_{i-1}, k_i]               X ~ A_i C_i,   A_i = Y_0 Y_1 ... Y_i  [token, k_i]

X [token, neuron] are activations, C_i [k_i, neuron] the components of level i, each of a small share of the neurons, and Y_0 the
weights of the first SNMF (2506.10920, hierarchy). What days of the week have in common becomes one component of the next level,
and a column of A_i, which is never negative, says where a feature of level i is active.

The levels are found greedily, and then all factors are tuned together by Adam on

    sum_i |X - A_i C_i|^2                                      objective="levels"
    |X - A_L C_L|^2                                            objective="last", the published one

projected to Y >= 0 after every step, with supports as they are. The best iterate is kept, the greedy one among them, so that
tuning cannot raise the loss. The published objective sees only the product: it is free to make the children of a parent alike,
as only their sum counts; ours holds every level to the data. No step forms a matrix [token, neuron]: with P_i = X C_i^T and
Q_i = C_i C_i^T,

    |X - A_i C_i|^2 = |X|^2 - 2 <P_i, A_i> + <Q_i, A_i^T A_i>          gradient by A_i:  2 (A_i Q_i - P_i)

The tree is read off the tuned factors: child c belongs to parent p where Y_i[c, p] is not small beside the largest of column p.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import OptionError, one_of
from interp.factorize.semi_nmf import Support, correlate, gram, loss, nnls, project, refit, strongest, unit_rows
from interp.factorize.snmf import SNMF
from interp.precision import at_least_float32


class Hierarchy:
    """Semi-NMF in levels, A_i = Y_0 ... Y_i >= 0 (2506.10920), under scikit-learn's conventions.

    n_features: features of each level, falling. share: of all neurons that a component may have, one for all levels or one for
    each. fine_tune_steps, lr: of Adam, whose steps are lr times the root mean square of the factor that they change; 0 steps
    leave the greedy levels. objective: see the module. options: of every level's `SNMF` (n_init, init, max_iter, ...).

    After fitting: `components_`, one [feature, neuron] a level, rows of length 1 (or 0, where a feature died); `weights_`, the Y
    of each level, in those units: [token, k_0], [k_0, k_1], ...; `loss_` and `greedy_loss_`, the objective after and before
    fine-tuning, `losses_`, |X - A_i C_i|^2 of each level; `hook`, where the data come from.
    """

    def __init__(
        self, n_features: Sequence[int] = (400, 200, 100, 50), *, share: float | Sequence[float] = 0.01, seed: int = 0,
        fine_tune_steps: int = 500, lr: float = 1e-3, objective: Literal["levels", "last"] = "levels", progress: bool = False,
        **options,
    ) -> None:  # fmt: skip
        self.n_features = tuple(int(k) for k in n_features)
        if len(self.n_features) < 2:
            raise OptionError(f"a hierarchy has two levels or more, not n_features={list(self.n_features)}")
        if any(below <= above for below, above in zip(self.n_features, self.n_features[1:], strict=False)):
            raise OptionError(
                f"every level has fewer features than the one it is made of, not n_features={list(self.n_features)}"
            )
        if self.n_features[-1] < 1:
            raise OptionError(f"every level has a feature, not n_features={list(self.n_features)}")
        self.share = (share,) * len(self.n_features) if isinstance(share, int | float) else tuple(share)
        if len(self.share) != len(self.n_features):
            raise OptionError(f"there are {len(self.n_features)} levels, and shares for {len(self.share)}")
        if fine_tune_steps < 0:
            raise OptionError(f"fine-tuning takes 0 steps or more, not {fine_tune_steps}")
        if lr <= 0:
            raise OptionError(f"the learning rate is above 0, not {lr}")
        self.objective = one_of(objective, ("levels", "last"), "objective")
        self.seed, self.fine_tune_steps, self.lr, self.progress = seed, fine_tune_steps, lr, progress
        self.options = options
        self.hook: str | None = None

    @torch.no_grad()
    def fit(self, X: Float[Tensor, "token neuron"], *, hook: str | None = None) -> "Hierarchy":
        """Find the levels and tune them. hook: where X comes from, kept for those who read components.

        Raises `OptionError` where there are fewer tokens than features, or X is not finite or all 0.
        """
        X = at_least_float32(X)
        if self.n_features[0] > len(X):
            raise OptionError(f"{len(X)} tokens do not make {self.n_features[0]} features")
        state = self._greedy(X)
        levels = range(len(self.n_features)) if self.objective == "levels" else [len(self.n_features) - 1]
        norm2 = float(torch.linalg.vector_norm(X, dtype=torch.float64)) ** 2
        A = X.T.contiguous()  # neurons as rows: those of a support are gathered
        state.refit(A)
        self.greedy_loss_ = sum(state.losses(A, norm2)[i] for i in levels)
        if self.fine_tune_steps:
            state = _fine_tune(state, A, norm2, levels, self.fine_tune_steps, self.lr, self.progress)
            state.refit(A)
        state.normalise()
        self.losses_ = state.losses(A, norm2)
        self.loss_ = sum(self.losses_[i] for i in levels)
        self.weights_ = [state.Y[0].T.contiguous(), *state.Y[1:]]
        self.components_ = [s.dense(values) for s, values in zip(state.supports, state.values, strict=True)]
        self.hook = hook
        return self

    def _greedy(self, X: Float[Tensor, "token neuron"]) -> "_State":
        Y, components = [], X
        supports, values = [], []
        for k, share in zip(self.n_features, self.share, strict=True):
            snmf = SNMF(k, share=share, seed=self.seed, progress=self.progress, **self.options).fit(components)
            Y.append(snmf.weights_.to(X).clone())
            components = snmf.components_.to(X)
            m = max(1, int((components != 0).sum(1).max()))
            supports.append(strongest(components, m))
            values.append(components.gather(1, supports[-1].neurons))
        return _State([Y[0].T.contiguous(), *Y[1:]], supports, values)

    def activations(self, level: int) -> Float[Tensor, "token feature"]:
        """How active each feature of a level is on the tokens of the fit: A = Y_0 ... Y_level, in units of X."""
        return _through(self.weights_[0], self.weights_[1 : self._level(level) + 1])

    def reconstruct(self, level: int) -> Float[Tensor, "token neuron"]:
        """What a level makes of the data: A_level C_level."""
        return self.activations(level) @ self.components_[self._level(level)]

    @torch.no_grad()
    def transform(self, X: Float[Tensor, "token neuron"], level: int = 0) -> Float[Tensor, "token feature"]:
        """Activations of a level on other tokens: non-negative least squares on the first level's components, then the Ys."""
        level, C = self._level(level), self.components_[0]
        if X.shape[1] != C.shape[1]:
            raise OptionError(f"the hierarchy reads {C.shape[1]} neurons, and the activations have {X.shape[1]}")
        found = nnls(C @ X.to(C).T, gram(C)).T
        return _through(found, self.weights_[1 : level + 1])

    def tree(self, *, min_share: float = 0.15, max_children: int = 4) -> pd.DataFrame:
        """Who belongs to whom: features of a level as children of those of the next, by the weights Y of the fine-tuned factors.

        A child is kept where its weight is at least `min_share` of its parent's largest, the strongest `max_children` of each
        parent (ties: the first). Columns: level (the parent's, from 1), parent, child (a feature of level - 1), weight (length
        of the parent's part in a child of length 1), share (of the parent's largest weight). A child may have several parents.
        A feature without a parent is in no row as a child: it is a root, of whatever is below it. One that died, or stands for
        nothing below it, is in no row as a parent; one with a single child is a copy of that.
        """
        self._level(0)
        if not 0 < min_share <= 1:
            raise OptionError(f"min_share is a share above 0, at most 1, not {min_share}")
        if max_children < 1:
            raise OptionError(f"a parent keeps one child or more, not {max_children}")
        rows = []
        for level, Y in enumerate(self.weights_[1:], start=1):
            weights = Y.cpu().double().numpy()
            largest = weights.max(0)
            for parent in np.flatnonzero(largest > 0).tolist():
                order = np.argsort(-weights[:, parent], kind="stable")[:max_children]
                share = weights[order, parent] / largest[parent]
                rows += [
                    (level, parent, int(child), float(weights[child, parent]), float(s))
                    for child, s in zip(order, share, strict=True)
                    if s >= min_share
                ]
        return pd.DataFrame(rows, columns=["level", "parent", "child", "weight", "share"])

    def _level(self, level: int) -> int:
        if not hasattr(self, "weights_"):
            raise OptionError("this hierarchy has not been fitted: call fit first")
        if not 0 <= level < len(self.n_features):
            raise OptionError(f"the hierarchy has levels 0 to {len(self.n_features) - 1}, not {level}")
        return level


def _through(rows: Float[Tensor, "token _"], Y: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "token _"]:
    for factor in Y:
        rows = rows @ factor
    return rows


class _State:
    """All factors: Y_0 by its transpose, [feature, token], and components by supports and values."""

    def __init__(self, Y: list[Tensor], supports: list[Support], values: list[Tensor]):
        self.Y, self.supports, self.values = Y, supports, values

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.Y, *self.values]

    def clone(self) -> "_State":
        return _State([y.clone() for y in self.Y], self.supports, [v.clone() for v in self.values])

    def weights(self) -> list[Float[Tensor, "feature token"]]:
        """A_i^T of every level."""
        found = [self.Y[0]]
        for factor in self.Y[1:]:
            found.append(factor.T @ found[-1])
        return found

    def losses(self, A: Float[Tensor, "neuron token"], norm2: float) -> list[float]:
        """|X - A_i C_i|^2 of every level, in float64, and not below 0 by rounding."""
        parts = zip(self.weights(), self.supports, self.values, strict=True)
        return [max(0.0, _parts(A, G, support, values, norm2)[0]) for G, support, values in parts]

    def refit(self, A: Float[Tensor, "neuron token"]) -> None:
        """Every level's components by least squares on their supports, given its weights: no loss can rise."""
        for i, (G, support) in enumerate(zip(self.weights(), self.supports, strict=True)):
            G = G.clone()
            lengths = unit_rows(G)
            values = refit(correlate(A, G, support), gram(G), support)
            self.values[i] = torch.where(lengths > 0, values / torch.where(lengths > 0, lengths, 1), 0)

    def normalise(self) -> None:
        """Components of length 1, with their lengths in the factors on both sides; products stay what they are."""
        for i, values in enumerate(self.values):
            lengths = values.norm(dim=1)
            lengths = torch.where(lengths > 0, lengths, 1)
            self.values[i] = values / lengths[:, None]
            self.Y[i] = self.Y[i] * (lengths[:, None] if i == 0 else lengths)
            if i + 1 < len(self.Y):
                self.Y[i + 1] = self.Y[i + 1] / lengths[:, None]


def _parts(
    A: Float[Tensor, "neuron token"], G: Float[Tensor, "feature token"], support: Support, values: Float[Tensor, "feature m"],
    norm2: float,
) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, P, Q, G G^T, C) of one level."""
    C = support.dense(values)
    P, Q, GG = project(A, support, values), gram(C), gram(G)
    return loss(norm2, P, Q, G, GG), P, Q, GG, C


def _fine_tune(
    state: _State, A: Float[Tensor, "neuron token"], norm2: float, levels: Sequence[int], steps: int, lr: float, progress: bool
) -> _State:  # fmt: skip
    """The best of `steps` + 1 iterates of projected Adam, the first being the state as it was."""
    now, best, least = state.clone(), state, math.inf
    # Adam's steps have a size of their own: in units of each factor, so that the scale of X does not matter
    sizes = [_typical(p) for p in now.parameters]
    groups = [
        {"params": [p], "lr": lr * size, "eps": 1e-8 / size} for p, size in zip(now.parameters, sizes, strict=True)
    ]
    adam, n_tokens = torch.optim.Adam(groups), A.shape[1]
    with tqdm(total=steps, desc="fine-tuning", disable=not progress) as bar:
        for step in range(steps + 1):
            total = _gradients(now, A, norm2, levels, n_tokens / norm2)
            if total < least:
                best, least = now.clone(), total
            if step == steps:
                return best
            adam.step()
            for factor in now.Y:
                factor.clamp_(min=0)
            bar.update()
            bar.set_postfix(loss=f"{total / norm2:.5f}", refresh=False)
    return best


def _gradients(
    state: _State, A: Float[Tensor, "neuron token"], norm2: float, levels: Sequence[int], scale: float
) -> float:  # fmt: skip
    """The loss of these levels; `scale` times its gradients in every parameter's `grad`."""
    weights, total = state.weights(), 0.0
    above: Tensor | None = None  # the gradient by A_i^T of the levels above i and of i itself
    for i in reversed(range(len(weights))):
        G, support, values = weights[i], state.supports[i], state.values[i]
        values.grad = torch.zeros_like(values)
        own = torch.zeros_like(G)
        if i in levels:
            error, P, Q, GG, C = _parts(A, G, support, values, norm2)
            total += error
            own = torch.addmm(P, Q, G, beta=-1).mul_(2 * scale)
            values.grad = ((GG @ C).gather(1, support.neurons) - correlate(A, G, support)).mul_(2 * scale)
        if above is not None:
            own += state.Y[i + 1] @ above
        state.Y[i].grad = own if i == 0 else weights[i - 1] @ own.T
        above = own
    return total


def _typical(factor: Tensor) -> float:
    """Root mean square of the entries that are not 0."""
    n = int((factor != 0).sum())
    return float(factor.square().sum(dtype=torch.float64) / n) ** 0.5 if n else 1.0
