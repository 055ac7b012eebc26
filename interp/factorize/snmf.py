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
from interp.factorize.solvers import Data, descend, multiply
from interp.factorize.starts import STARTS, start
from interp.features.codes import Codes
from interp.features.sources import Corpus, ModelSource
from interp.model.run import config_of
from interp.precision import at_least_float32

FORMAT = "interp.snmf/1"
SOLVERS = ("hals", "multiplicative")
_DEAD = 1e-6  # of the largest feature: what is smaller stands for nothing but rounding
_ENTRIES = 2**24  # of tokens x neurons that are transformed at once


class SNMF:
    """Semi-NMF with few neurons per feature (2506.10920), under scikit-learn's conventions.

    n_features: k. share: of all neurons that a feature may use, at least one; 1 is plain semi-NMF. solver: "hals" (ours) or
    "multiplicative" (published). init: "svd", "random", "kmeans", or "auto": the SVD once, then k-means and random in turns.
    n_init: starts (default 8; 1 for multiplicative). max_iter: polishing steps at most (default 60), or multiplicative updates
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
        self.max_iter = {"hals": 60, "multiplicative": 2000}[solver] if max_iter is None else max_iter
        self.tol, self.patience, self.seed, self.progress = tol, patience, seed, progress
        self.components_: Tensor | None = None
        self.source_: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------------------- fitting

    @torch.no_grad()
    def fit(self, X: Float[Tensor, "token neuron"], y: None = None) -> "SNMF":
        """Factorise these activations. Raises `OptionError` for rows that are not finite, or data that are all 0."""
        X = _checked(X)
        data = Data(X.T.contiguous())
        largest, limits = float(X.abs().max()), torch.finfo(X.dtype)
        if largest == 0:
            raise OptionError(f"there is nothing to factorise in activations of shape {tuple(X.shape)}: all are 0")
        if not (limits.tiny < largest**2 and data.norm2 < limits.max):
            raise OptionError(f"activations of up to {largest:g} have no square in {X.dtype}: scale them")
        m = max(1, math.ceil(self.share * X.shape[1]))
        options = {"n_init": self.n_init, "max_iter": self.max_iter, "tol": self.tol, "progress": self.progress}
        if self.solver == "hals":
            found = descend(data, m, self._start, seed=self.seed, **options)
        else:
            found = multiply(data, m, self._start, patience=self.patience, **options)
        best = found.best
        components = best.components * steps.unit_rows(best.G)
        sizes = components.norm(dim=1)
        order = sizes.argsort(descending=True, stable=True)
        self.components_, self.weights_ = components[order], best.G[order].T
        self.losses_, self.history_, self.n_iter_ = found.losses, found.history, len(found.history)
        self.relative_loss_, self.reconstruction_err_ = best.loss, math.sqrt(best.loss * data.norm2)
        self.stability_ = _stability(self.components_, [run.components for run in found.others])
        self.source_ = {}
        if dead := int((sizes <= _DEAD * sizes.max()).sum()):
            warnings.warn(f"{dead} of {self.n_features} features are 0: the data have no use for so many", stacklevel=3)
        return self

    def _start(self, A: Float[Tensor, "neuron token"], index: int) -> Float[Tensor, "feature token"]:
        kind = self.init if self.init != "auto" else ("svd", "kmeans", "random")[index and 2 - index % 2]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return start(kind, A, self.n_features, generator)

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
