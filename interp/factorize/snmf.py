"""Semi-NMF of MLP activations: neurons in groups, tokens as non-negative sums of groups (Shafran, Geiger and Geva, 2506.10920).

    X ~ W H          X [token, neuron], W >= 0 [token, feature], H [feature, neuron] with ceil(share d) non-zeros in each row

H is `components_`: each feature is a signed group of few neurons, and since W is not negative, a feature means the same thing on
every token on which it is active. It reconstructs less than an SVD of the same rank does, by design: what it is for is to be read
(`top_contexts`, `direction_effects`) and steered with. So never judge it by reconstruction alone. Loss cannot even choose the
share: on planted groups a support twice too wide reaches a lower loss and finds the groups less well.

    snmf = interp.fit_snmf(model, corpus, "blocks.2.mlp.hook_post", n_features=100, share=0.01)
    interp.direction_effects(model, snmf.hook, snmf.components_)

`solver="hals"` is ours: least squares on the support and coordinate descent (`interp.factorize.semi_nmf`), first from many starts
while supports are still chosen anew (search), then from the best with its support fixed, where no step can raise the loss
(polish). Of the starts, the worse half is dropped twice on the way. `solver="multiplicative"` is the published algorithm, to
compare with.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import OptionError, name_some, one_of
from interp.factorize import semi_nmf as steps
from interp.factorize.folder import load_folder, save_folder
from interp.factorize.starts import STARTS, start
from interp.features.codes import Codes
from interp.features.sources import Corpus, ModelSource
from interp.model.run import config_of
from interp.precision import at_least_float32

FORMAT = "interp.snmf/1"
SOLVERS = ("hals", "multiplicative")
SEARCH, ROUNDS = 36, 3  # steps that choose supports, in rounds between which starts are dropped
SWEEPS = 2  # of HALS in each step
_WINDOW = 5  # polishing steps over which the loss has to fall
_DEAD = 1e-6  # of the largest feature: what is smaller stands for nothing but rounding
_FLOOR = 1e-6  # of starts for multiplicative updates, as a share of their largest weight
_ENTRIES = 2**24  # of tokens x neurons that are transformed at once


@dataclass
class _Run:
    """One start and how far it has come."""

    G: Float[Tensor, "feature token"]
    support: steps.Support | None = None
    values: Float[Tensor, "feature m"] | None = None
    loss: float = math.inf
    n_iter: int = 0

    @property
    def components(self) -> Float[Tensor, "feature neuron"]:
        return self.support.dense(self.values)


class SNMF:
    """Semi-NMF with few neurons per feature (2506.10920), under scikit-learn's conventions.

    n_features: k. share: of all neurons that a feature may use, at least one; 1 is plain semi-NMF. solver: "hals" (ours) or
    "multiplicative" (published). init: "svd", "random", "kmeans", or "auto": the SVD once, then k-means and random in turns.
    n_init: starts (default 8; 1 for multiplicative). max_iter: polishing steps at most (default 100), or multiplicative updates
    (default 2,000). tol: stop when the loss falls by less than this share of it, within 5 steps (hals) or since `patience`
    updates (multiplicative). seed: of all starts.

    After fitting: `components_` [feature, neuron], `weights_` [token, feature] with columns of length 1, strongest feature first
    (by |h|), `n_iter_`, `reconstruction_err_` (|X - W H|), `relative_loss_` (|X - W H|^2 / |X|^2), `losses_` (relative, one for
    each start as far as it was taken), `history_` (relative loss after each step of the best start),
    `stability_` [feature]: mean cosine with the feature that is matched to it (Hungarian) in the other starts, those dropped
    at once left out; NaN for one start. `hook`: where the data came from, if `fit_snmf` knows it.
    """

    def __init__(
        self, n_features: int = 100, *, share: float = 0.01, solver: Literal["hals", "multiplicative"] = "hals",
        init: Literal["auto", "svd", "kmeans", "random"] = "auto", n_init: int | None = None, max_iter: int | None = None,
        tol: float = 1e-5, patience: int = 1500, seed: int = 0, progress: bool = False,
    ) -> None:  # fmt: skip
        one_of(solver, SOLVERS, "solver of semi-NMF")
        one_of(init, ("auto", *STARTS), "kind of start")
        for name, value in (("n_features", n_features), ("n_init", n_init), ("patience", patience)):
            if value is not None and value < 1:
                raise OptionError(f"{name} is at least 1, not {value}")
        if not 0 < share <= 1:
            raise OptionError(f"the share of neurons of a feature is above 0 and at most 1, not {share}")
        if (max_iter is not None and max_iter < 0) or tol < 0:
            raise OptionError(f"max_iter and tol are not negative, and are {max_iter} and {tol}")
        if solver == "multiplicative" and max_iter == 0:
            raise OptionError("multiplicative updates need a max_iter of at least 1, not 0")
        self.n_features, self.share, self.solver, self.init = n_features, share, solver, init
        self.n_init = n_init or {"hals": 8, "multiplicative": 1}[solver]
        self.max_iter = {"hals": 100, "multiplicative": 2000}[solver] if max_iter is None else max_iter
        self.tol, self.patience, self.seed, self.progress = tol, patience, seed, progress
        self.components_: Tensor | None = None
        self.source_: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------------------- fitting

    @torch.no_grad()
    def fit(self, X: Float[Tensor, "token neuron"], y: None = None) -> "SNMF":
        """Factorise these activations. Raises `OptionError` for rows that are not finite, or data that are all 0."""
        X = _checked(X)
        A, norm2 = X.T.contiguous(), float(X.square().sum(dtype=torch.float64))
        largest, limits = float(X.abs().max()), torch.finfo(X.dtype)
        if largest == 0:
            raise OptionError(f"there is nothing to factorise in activations of shape {tuple(X.shape)}: all are 0")
        if not (limits.tiny < largest**2 and norm2 < limits.max):
            raise OptionError(f"activations of up to {largest:g} have no square in {X.dtype}: scale them")
        m = max(1, math.ceil(self.share * len(A)))
        solve = self._hals if self.solver == "hals" else self._multiplicative
        runs, converged, history = solve(A, norm2, m)
        best = min(runs, key=lambda run: run.loss)
        lengths = steps.unit_rows(best.G)
        components = best.components * lengths
        order = components.norm(dim=1).argsort(descending=True, stable=True)
        self.components_, self.weights_ = components[order], best.G[order].T
        self.losses_ = [run.loss / norm2 for run in runs]
        self.relative_loss_, self.reconstruction_err_ = best.loss / norm2, math.sqrt(max(best.loss, 0.0))
        self.history_, self.n_iter_ = [value / norm2 for value in history], len(history)
        self.stability_ = _stability(self.components_, [run.components for run in converged if run is not best])
        self.source_ = {}
        sizes = self.components_.norm(dim=1)
        if dead := int((sizes <= _DEAD * sizes.max()).sum()):
            warnings.warn(f"{dead} of {self.n_features} features are 0: the data have no use for so many", stacklevel=2)
        return self

    def _start(self, A: Tensor, index: int) -> Float[Tensor, "feature token"]:
        kind = self.init if self.init != "auto" else ("svd", "kmeans", "random")[index and 2 - index % 2]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return start(kind, A, self.n_features, generator)

    def _hals(self, A: Tensor, norm2: float, m: int) -> tuple[list[_Run], list[_Run], list[float]]:
        runs = [_Run(self._start(A, i)) for i in range(self.n_init)]
        best, histories = list(runs), [[] for _ in runs]  # of each start: its best state, as choosing supports may raise the loss
        with tqdm(desc="snmf", unit="step", disable=not self.progress) as bar:

            def advance(i: int, run: _Run, support: steps.Support | None) -> None:
                _step(A, norm2, m, run, support)
                histories[i].append(run.loss)
                bar.set_postfix_str(f"loss {run.loss / norm2:.4f}", refresh=False)
                bar.update()

            alive = compared = list(range(len(runs)))
            for stage in range(ROUNDS):
                for i in alive:
                    for _ in range(SEARCH // ROUNDS):
                        advance(i, runs[i], None)
                        if runs[i].loss < best[i].loss or best[i] is runs[i]:
                            best[i] = replace(runs[i], G=runs[i].G.clone())
                if stage < ROUNDS - 1:
                    order = sorted(alive, key=lambda i: best[i].loss)
                    alive = order[: max(1, len(alive) // 2)]
                    compared = order[: max(2, len(alive))] if stage == 0 else compared
            first = min(range(len(best)), key=lambda i: best[i].loss)
            polished, own = best[first], histories[first]
            begun, least = len(own), max(self.tol, 8 * torch.finfo(A.dtype).eps)
            for _ in range(self.max_iter):
                advance(first, polished, polished.support)
                if len(own) > begun + _WINDOW and own[-1 - _WINDOW] - own[-1] <= least * own[-1]:
                    break
        return best, [best[i] for i in compared], own

    def _multiplicative(self, A: Tensor, norm2: float, m: int) -> tuple[list[_Run], list[_Run], list[float]]:
        """The published loop: unrestricted least squares, the m largest kept, Ding's update; the best state seen is taken."""
        found, histories = [], []
        for i in range(self.n_init):
            G = self._start(A, i)
            run, best, history, since = _Run(G.clamp_min(_FLOOR * float(G.max()))), None, [], 0
            for _ in tqdm(range(self.max_iter), desc="snmf", unit="update", disable=not self.progress):
                steps.unit_rows(run.G)
                right = run.G @ A.T
                F = steps.solve(steps.gram(run.G), right)
                run.support = steps.strongest(F, m)
                run.values = F.gather(1, run.support.neurons)
                P, Q = _products(A, run)
                # eps belongs to the data's unit: relative, it leaves c A the same factors but for c
                run.G = steps.multiply(P, Q, run.G, 1e-6 * float(Q.diagonal().mean()))
                run.n_iter += 1
                run.loss = steps.loss(norm2, P, Q, run.G, steps.gram(run.G))
                history.append(run.loss)
                if best is None or run.loss < best.loss * (1 - self.tol):
                    since = 0
                if best is None or run.loss < best.loss:
                    best = _Run(run.G.clone(), run.support, run.values, run.loss, run.n_iter)
                since += 1
                if since > self.patience:
                    break
            found.append(best)
            histories.append(history)
        first = min(range(len(found)), key=lambda i: found[i].loss)
        return found, found, histories[first]

    # ---------------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def transform(self, X: Float[Tensor, "token neuron"]) -> Float[Tensor, "token feature"]:
        """Weights of any tokens: min |x - w H| over w >= 0, row by row (NNLS by HALS, to rounding)."""
        H = self._fitted()
        if X.shape[1] != H.shape[1]:
            raise OptionError(f"these activations are {X.shape[1]} wide, and the components {H.shape[1]}")
        parts = _checked(X).to(H).split(max(1, _ENTRIES // H.shape[1]))
        Q = steps.gram(H)
        return torch.cat([steps.nnls(H @ rows.T, Q).T for rows in parts])

    def fit_transform(self, X: Float[Tensor, "token neuron"], y: None = None) -> Float[Tensor, "token feature"]:
        """`fit`, then the weights that the fit found; `transform` may differ from them as far as the fit is from its optimum."""
        return self.fit(X).weights_

    def inverse_transform(self, W: Float[Tensor, "token feature"]) -> Float[Tensor, "token neuron"]:
        """W H."""
        return W @ self._fitted()

    def codes(self, x: Float[Tensor, "token neuron"]) -> Codes:
        """Features that are active on each token, as an SAE's code: see `transform`."""
        W = self.transform(x)
        return Codes.where(W > 0, W)

    @property
    def hook(self) -> str | None:
        """Hook point that the data came from."""
        return self.source_.get("hook")

    @property
    def dtype(self) -> torch.dtype:
        return self._fitted().dtype

    @property
    def device(self) -> torch.device:
        return self._fitted().device

    def _fitted(self) -> Float[Tensor, "feature neuron"]:
        if self.components_ is None:
            raise OptionError("this SNMF has no components yet: call fit or fit_snmf first")
        return self.components_

    # --------------------------------------------------------------------------------------------------------- keeping

    def save(self, folder: str | Path) -> Path:
        """Write `snmf.safetensors` (components, weights, stability) and `snmf.json` (options, losses) into a folder."""
        tensors = {"components": self._fitted(), "weights": self.weights_, "stability": self.stability_}
        options = {name: getattr(self, name) for name in _OPTIONS}
        results = {name: getattr(self, name) for name in _RESULTS}
        return save_folder(folder, "snmf", tensors, {"format": FORMAT, **options, **results})

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str | None = None) -> "SNMF":
        """Read what `save` wrote, bit for bit. Raises `OptionError` naming the file or the field that is missing."""
        names = ("components", "weights", "stability")
        tensors, about = load_folder(
            folder, "snmf", FORMAT, fields=(*_OPTIONS, *_RESULTS), tensors=names, device=device
        )
        snmf = cls(**{name: about[name] for name in _OPTIONS})
        for name in names:
            setattr(snmf, f"{name}_", tensors[name])
        for name in _RESULTS:
            setattr(snmf, name, about[name])
        return snmf

    def __repr__(self) -> str:
        fitted = "not fitted" if self.components_ is None else f"relative loss {self.relative_loss_:.3f}"
        return f"SNMF({self.n_features} features, share={self.share:g}, solver={self.solver!r}, {fitted})"


_OPTIONS = ("n_features", "share", "solver", "init", "n_init", "max_iter", "tol", "patience", "seed")
_RESULTS = ("losses_", "relative_loss_", "reconstruction_err_", "history_", "n_iter_", "source_")


def fit_snmf(
    model, corpus: Corpus, hook: str, *, batch_size: int = 32, n_features: int = 100, **options: Any
) -> SNMF:  # fmt: skip
    """The SNMF of one hook point of a model over a text, first positions left out, every token of equal weight.

    hook: as "blocks.2.mlp.hook_post", after the non-linearity (gated: the product). options: those of `SNMF`. Rows of `weights_`
    are the tokens of `corpus.mask()`, in order. Raises `SiteError` for a hook point that does not exist or has no vector per
    token.
    """
    snmf = SNMF(n_features, **options)
    source = ModelSource(model, corpus, [hook], batch_size=batch_size)
    parts = [source.read(range(s, min(s + batch_size, source.n_sequences))).values[hook]
             for s in tqdm(range(0, source.n_sequences, batch_size), desc="activations", disable=not snmf.progress)]  # fmt: skip
    snmf.fit(torch.cat(parts))
    snmf.source_ = {"model": config_of(model).name, "hook": hook, "text": corpus.name, "n_tokens": len(snmf.weights_)}
    return snmf


def _step(A: Tensor, norm2: float, m: int, run: _Run, support: steps.Support | None) -> None:
    """One iteration: a support (chosen anew where none is given), F by least squares on it, G by coordinate descent."""
    steps.unit_rows(run.G)
    GG = steps.gram(run.G)
    if support is None:
        right = run.G @ A.T
        support = steps.strongest(steps.solve(GG, right), m)
        AG = right.gather(1, support.neurons)
    else:
        AG = steps.correlate(A, run.G, support)
    run.support, run.values = support, steps.refit(AG, GG, support)
    P, Q = _products(A, run)
    steps.hals(P, Q, run.G, SWEEPS)
    run.loss, run.n_iter = steps.loss(norm2, P, Q, run.G, steps.gram(run.G)), run.n_iter + 1


def _products(A: Tensor, run: _Run) -> tuple[Float[Tensor, "feature token"], Float[Tensor, "feature feature"]]:
    return steps.project(A, run.support, run.values), steps.gram(run.components)


def _stability(H: Float[Tensor, "feature neuron"], others: list[Tensor]) -> Float[Tensor, " feature"]:
    """Mean cosine of each feature with the one that is matched to it in every other solution."""
    if not others:
        return H.new_full((len(H),), math.nan)
    unit: Callable[[Tensor], Tensor] = lambda F: torch.nn.functional.normalize(F, dim=1)  # noqa: E731
    found = H.new_zeros(len(H))
    for other in others:
        cosine = unit(H) @ unit(other).T
        row, column = linear_sum_assignment(cosine.double().cpu().numpy(), maximize=True)
        found[row] += cosine[row, column]
    return found / len(others)


def _checked(X: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
    if X.ndim != 2 or not X.numel():
        raise OptionError(f"activations are [token, neuron] with at least one of each, not {list(X.shape)}")
    if bad := (~X.isfinite().all(1)).nonzero().flatten().tolist():
        raise OptionError(f"activations are not finite in rows {name_some(bad)}")
    return at_least_float32(X.detach())
