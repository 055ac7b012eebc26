"""Two ways to fit a semi-NMF, from starts to the best state: ours, and the published one to compare with.

`descend` (ours) takes every start through some iterations that choose supports anew (search): least squares on the support, two
sweeps of coordinate descent. The first third of them sees a sample of the tokens only, and after each third the worse half of
the starts is dropped. What is left is polished on all tokens with its support fixed, where no step can raise the loss. Choosing
supports can, so the best state of each start is kept.

`multiply` is the loop of 2506.10920: unrestricted least squares, the m largest of each feature, one multiplicative update.

Losses are relative: |A - F G^T|^2 / |A|^2, of the tokens that a step sees.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.factorize import semi_nmf as steps

SEARCH, ROUNDS, SWEEPS = (
    36,
    3,
    2,
)  # steps that choose supports, in rounds between which starts are dropped; sweeps of each
SEARCH_TOKENS = 4096  # that the first round sees; later ones have to see rare features too
_EXTENDING = 4  # sweeps that find the weights of tokens not seen so far
_WINDOW = 5  # polishing steps over which the loss has to fall
_FLOOR = 1e-6  # of the largest entry of a start for multiplicative updates, which cannot leave 0

Start = Callable[[Float[Tensor, "neuron token"], int], Float[Tensor, "feature token"]]  # weights of the i-th start


@dataclass(frozen=True, eq=False)
class Data:
    """What is factorised: neurons as rows, so that those of a support are gathered."""

    A: Float[Tensor, "neuron token"]

    @cached_property
    def norm2(self) -> float:
        return float(self.A.square().sum(dtype=torch.float64))

    def loss(self, P: Tensor, Q: Tensor, G: Float[Tensor, "feature token"]) -> float:
        """The relative loss at G and the F behind P and Q."""
        return steps.loss(self.norm2, P, Q, G, steps.gram(G)) / self.norm2

    def some(self, n: int, seed: int) -> "Data":
        """n of the tokens, drawn by the seed; all, if there are no more, or if those drawn are 0 on every neuron."""
        if self.A.shape[1] <= n:
            return self
        order = torch.randperm(self.A.shape[1], generator=torch.Generator().manual_seed(seed))[:n].sort().values
        few = Data(self.A[:, order.to(self.A.device)].contiguous())
        return few if few.norm2 > 0 else self


@dataclass
class Run:
    """One start and how far it has come."""

    G: Float[Tensor, "feature token"]
    support: steps.Support | None = None
    values: Float[Tensor, "feature m"] | None = None
    loss: float = math.inf

    @property
    def components(self) -> Float[Tensor, "feature neuron"]:
        """F^T, in units of G's columns."""
        return self.support.dense(self.values)


@dataclass(frozen=True)
class Found:
    """The best run; the others that it is compared with; the loss of every start; that of each step of the best."""

    best: Run
    others: list[Run]
    losses: list[float]
    history: list[float]


def descend(
    whole: Data, m: int, start: Start, *, n_init: int, max_iter: int, tol: float, seed: int, progress: bool
) -> Found:  # fmt: skip
    """Search from n_init starts, then at most max_iter polishing steps, until 5 of them lower the loss by less than tol."""
    few = whole.some(SEARCH_TOKENS, seed)
    runs = [Run(start(few.A, i)) for i in range(n_init)]
    best, histories = list(runs), [[] for _ in runs]
    alive = compared = list(range(n_init))
    with tqdm(desc="snmf", unit="step", disable=not progress) as bar:

        def advance(data: Data, i: int, run: Run, support: steps.Support | None = None) -> None:
            _step(data, m, run, support)
            histories[i].append(run.loss)
            bar.set_postfix_str(f"loss {run.loss:.4f}", refresh=False)
            bar.update()

        for stage in range(ROUNDS):
            last = stage == ROUNDS - 1
            data = few if stage == 0 else whole
            for i in alive:
                if stage == 1 and few is not whole:
                    runs[i] = best[i] = Run(_extended(whole, best[i]))
                for _ in range(SEARCH // ROUNDS):
                    advance(data, i, runs[i])
                    if runs[i].loss < best[i].loss or best[i] is runs[i]:
                        best[i] = replace(runs[i], G=runs[i].G.clone())
            order = sorted(alive, key=lambda i: best[i].loss)
            if stage == 0:  # those dropped at once are too far from done to be compared with
                compared = order[: max(2, len(order) // 2)]
            alive = order[: 1 if last else max(1, len(order) // 2)]
        first = alive[0]
        polished, history = best[first], histories[first]
        begun, least = len(history), max(tol, 8 * torch.finfo(whole.A.dtype).eps)
        for _ in range(max_iter):
            advance(whole, first, polished, polished.support)
            if len(history) > begun + _WINDOW and history[-1 - _WINDOW] - history[-1] <= least * history[-1]:
                break
    return Found(polished, [best[i] for i in compared if i != first], [run.loss for run in best], history)


def multiply(
    data: Data, m: int, start: Start, *, n_init: int, max_iter: int, tol: float, patience: int, progress: bool
) -> Found:  # fmt: skip
    """The published loop; the best state seen is taken. patience: iterations without a fall by more than tol."""
    found, histories = [], []
    for i in range(n_init):
        G = start(data.A, i)
        run, best, history, since = Run(G.clamp_min(_FLOOR * float(G.max()))), None, [], 0
        for _ in tqdm(range(max_iter), desc="snmf", unit="update", disable=not progress):
            steps.unit_rows(run.G)
            F = steps.unrestricted(data.A, run.G, steps.gram(run.G))
            run.support = steps.strongest(F, m)
            run.values = F.gather(1, run.support.neurons)
            P, Q = _products(data, run)
            # eps belongs to the data's unit: relative, it leaves c A the same factors but for c
            run.G = steps.multiply(P, Q, run.G, 1e-6 * float(Q.diagonal().mean()))
            run.loss = data.loss(P, Q, run.G)
            history.append(run.loss)
            if best is None or run.loss < best.loss * (1 - tol):
                since = 0
            if best is None or run.loss < best.loss:
                best = replace(run, G=run.G.clone())
            since += 1
            if since > patience:
                break
        found.append(best)
        histories.append(history)
    first = min(range(n_init), key=lambda i: found[i].loss)
    return Found(found[first], found[:first] + found[first + 1 :], [run.loss for run in found], histories[first])


def _step(data: Data, m: int, run: Run, support: steps.Support | None) -> None:
    """One iteration: a support (chosen anew where none is given), F by least squares on it, G by coordinate descent."""
    steps.unit_rows(run.G)
    GG = steps.gram(run.G)
    if support is None:
        right = run.G @ data.A.T
        support = steps.strongest(steps.solve(GG, right), m)
        AG = right.gather(1, support.neurons)
    else:
        AG = steps.correlate(data.A, run.G, support)
    run.support, run.values = support, steps.refit(AG, GG, support)
    P, Q = _products(data, run)
    steps.hals(P, Q, run.G, SWEEPS)
    run.loss = data.loss(P, Q, run.G)


def _products(data: Data, run: Run) -> tuple[Float[Tensor, "feature token"], Float[Tensor, "feature feature"]]:
    return steps.project(data.A, run.support, run.values), steps.gram(run.components)


def _extended(data: Data, run: Run) -> Float[Tensor, "feature token"]:
    """Weights of all tokens at the F that some of them gave."""
    P, Q = _products(data, run)
    diagonal = Q.diagonal()[:, None]
    G = torch.where(diagonal > 0, P / torch.where(diagonal > 0, diagonal, 1), 0).clamp_min(0)
    return steps.hals(P, Q, G, _EXTENDING)
