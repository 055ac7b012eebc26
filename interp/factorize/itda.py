"""ITDA, inference-time decomposition of activations: a dictionary made of the activations themselves (2505.17769).

Nothing is trained. Rows go by one at a time; each is encoded by k steps of matching pursuit (`interp.factorize.pursuit`) with the
dictionary so far, and if too much of it is left over, the row itself becomes an atom:

    u = (x - mean) / |x - mean|;    store u  if  |u - pursuit(u)|^2 > threshold

So every atom is a centred, unit-length copy of one activation and has an address, the (prompt, position) it came from. A stored
row is reconstructed exactly, in one step. Two dictionaries built from the same text, of two models or two layers, can be
compared by which places they had to store: `jaccard`.

    >>> itda = fit_itda(model, tokens, "blocks.2.hook_resid_post", k=8, threshold=0.3)
    >>> values, atoms = itda.encode(activations)
    >>> prompt, position = itda.ids_[atoms[0, 0]]

The order of the rows matters, as in every greedy method; it is drawn from `seed`. Greedy pursuit is not monotone in the
dictionary: an atom that is added can make the error of *other* rows larger, also of rows that were let pass before.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import OptionError, SiteError, name_some
from interp.factorize.folder import load_folder, save_folder
from interp.factorize.pursuit import GRAM_NUMBERS, matching_pursuit
from interp.model.run import config_of, record
from interp.precision import at_least_float32

BLOCK = 128  # rows encoded at once while the dictionary grows: those behind a new atom may have to be encoded again
FORMAT = "interp.itda/1"


class ITDA:
    """A dictionary of activations grown by matching pursuit (2505.17769), under scikit-learn's conventions.

    k: steps of pursuit, so at most k atoms a row. threshold: a row is stored if more than this share of its squared distance
    from the mean is left over, 0 <= threshold < 1; with 0 every row that is not exact already, to rounding. max_atoms: no more
    than these, the first ones. centre: subtract the mean of the data of `fit`, or of the first batch of `partial_fit`; it is
    frozen after that. positive: only positive coefficients. seed: the order in which `fit` and `fit_itda` go through the data;
    None is the order given.

    After fitting: `atoms_` [atom, d], unit rows in the order they were stored; `ids_` [atom, 2], (prompt, position) of each, or
    None; `mean_` [d]; `n_atoms`; `n_seen_`, rows gone through; `source_`, what `fit_itda` knows of model and hook.
    """

    def __init__(
        self, *, k: int = 16, threshold: float = 0.1, max_atoms: int | None = None, centre: bool = True,
        positive: bool = False, seed: int | None = 0,
    ) -> None:  # fmt: skip
        if k < 1:
            raise OptionError(f"a row is encoded with at least one atom, not k={k}")
        if not 0 <= threshold < 1:
            raise OptionError(f"the threshold is a share of the squared error, at least 0 and below 1, not {threshold}")
        if max_atoms is not None and max_atoms < 1:
            raise OptionError(f"a dictionary has room for at least one atom, not max_atoms={max_atoms}")
        self.k, self.threshold, self.max_atoms = k, threshold, max_atoms
        self.centre, self.positive, self.seed = centre, positive, seed
        self._forget()

    def _forget(self) -> None:
        self.mean_: Tensor | None = None
        self.n_atoms, self.n_seen_, self.source_ = 0, 0, {}
        self._store: Tensor | None = None  # [room, d]: atoms, and room for more
        self._id_list: list[list[int]] | None = None
        self._gram: Tensor | None = None  # [room, room], while it is small enough: made again when it is not there

    @property
    def atoms_(self) -> Float[Tensor, "atom d"]:
        """Unit vectors, in the order in which they were stored. `OptionError` before fitting."""
        return self._fitted()[: self.n_atoms]

    @property
    def ids_(self) -> Int[Tensor, "atom 2"] | None:
        """(prompt, position) of every atom; None if the data came without."""
        return None if self._id_list is None else torch.tensor(self._id_list, dtype=torch.long).reshape(-1, 2)

    # -------------------------------------------------------------------------------------------------------- fitting

    def fit(self, activations: Float[Tensor, "token d"], ids: Int[Tensor, "token 2"] | None = None) -> "ITDA":
        """Forget everything and go through these rows once, in the order of the seed; the mean is that of all of them."""
        _check(activations, ids)
        self._forget()
        self._start(activations)
        if self.seed is None:
            return self.partial_fit(activations, ids)
        order = _shuffled(len(activations), self.seed).to(activations.device)
        return self.partial_fit(activations[order], None if ids is None else ids[order.to(ids.device)])

    def partial_fit(self, activations: Float[Tensor, "token d"], ids: Int[Tensor, "token 2"] | None = None) -> "ITDA":
        """Go through more rows, in the order given. The result does not depend on how rows are cut into batches, except for
        the mean, which is the first batch's, and for rounding.

        ids: (prompt, position) of every row; all batches have them or none. Raises `OptionError` for rows that are not finite or
        of another width.
        """
        _check(activations, ids)
        if self.n_seen_ and (ids is None) != (self._id_list is None):
            raise OptionError(f"all batches have ids or none, and this one has {'none' if ids is None else 'some'}")
        if self._store is None:
            self._start(activations)
        x = self._checked(activations)
        if ids is not None and self._id_list is None:
            self._id_list = []
        listed = None if ids is None else ids.tolist()
        with torch.no_grad():
            for start in range(0, len(x), BLOCK):
                if self._full:
                    break
                self._grow(self._unit(x[start : start + BLOCK])[0], listed and listed[start:])
        self.n_seen_ += len(x)
        return self

    def _start(self, x: Float[Tensor, "token d"]) -> None:
        """Dtype, device, width and mean: all taken from the first rows."""
        if not x.numel():
            raise OptionError(f"there is nothing to fit in activations of shape {tuple(x.shape)}")
        dtype = at_least_float32(x).dtype
        mean = x.detach().mean(0, dtype=torch.float64) if self.centre else x.new_zeros(x.shape[1])
        self.mean_, self._store = mean.to(dtype), x.new_zeros(0, x.shape[1], dtype=dtype)

    @property
    def _full(self) -> bool:
        return self.max_atoms is not None and self.n_atoms >= self.max_atoms

    def _grow(self, rows: Float[Tensor, "token d"], ids: list[list[int]] | None) -> None:
        """What going through unit rows one by one does, with few pursuits more than that: all rows are encoded at once, the first
        one left over is stored, and of those behind it only the ones that would take the new atom are encoded again."""
        values, atoms, error = self._pursue(rows)
        at, allowed = 0, max(self.threshold, self._rounding**2)
        while at < len(rows) and not self._full and len(left := (error[at:] > allowed).nonzero()):
            at += int(left[0])
            reach = self._append(rows[at])
            if self._id_list is not None:
                self._id_list.append(ids[at])
            at += 1
            lured = self._lured(rows[at:], values[at:], atoms[at:], reach).nonzero().flatten() + at
            if len(lured):
                values[lured], atoms[lured], error[lured] = self._pursue(rows[lured])

    def _pursue(
        self, rows: Float[Tensor, "token d"]
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"], Float[Tensor, " token"]]:
        """Code of unit rows, and the squared length of what is left over."""
        if self._gram is None and len(self._store) ** 2 <= GRAM_NUMBERS:
            self._gram = self._store @ self._store.T
        gram = None if self._gram is None else self._gram[: self.n_atoms, : self.n_atoms]
        options = {"positive": self.positive, "tolerance": self._rounding, "gram": gram}
        values, atoms = matching_pursuit(rows, self.atoms_, self.k, **options)
        return values, atoms, (rows - _mixed(values, atoms, self.atoms_)).square().sum(1)

    def _append(self, row: Float[Tensor, " d"]) -> Float[Tensor, " atom"]:
        """Store one more atom; its correlations with all atoms, itself last."""
        n = self.n_atoms
        if n == len(self._store):
            room = max(64, 2 * n)
            self._store = F.pad(self._store, (0, 0, 0, room - n))
            self._gram = None if self._gram is None or room**2 > GRAM_NUMBERS else F.pad(self._gram, (0, room - n) * 2)
        self._store[n] = row
        self.n_atoms = n + 1
        reach = self.atoms_ @ row
        if self._gram is not None:
            self._gram[n, : n + 1] = self._gram[: n + 1, n] = reach
        return reach

    def _lured(
        self, rows: Float[Tensor, "token d"], values: Float[Tensor, "token k"], atoms: Int[Tensor, "token k"],
        reach: Float[Tensor, " atom"],
    ) -> Bool[Tensor, " token"]:  # fmt: skip
        """Rows that would take the newest atom w in some step: |<r_s, w>| is not below the |v_s| of what they took.

        <r_s, w> = <u, w> - sum_{t<s} v_t <w_{i_t}, w>, so no residual is needed. Rounding counts as taking it.
        """
        taken = values * reach[atoms]
        left = (rows @ self.atoms_[-1])[:, None] - (taken.cumsum(1) - taken)
        score = left if self.positive else left.abs()
        return ((score > values.abs() - self._rounding) & (score > self._rounding)).any(1)

    # ----------------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "token d"]) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """(coefficients in the unit of x, which atoms), a slot for every step, as `matching_pursuit` returns them.

        Pursuit of a row ends before k steps where nothing but rounding is left of it; unused slots have value 0 and atom 0.
        """
        rows, norms = self._unit(self._checked(x))
        options = {"positive": self.positive, "tolerance": self._rounding}
        values, atoms = matching_pursuit(rows, self.atoms_, self.k, **options)
        return values * norms, atoms

    def decode(self, values: Float[Tensor, "token k"], atoms: Int[Tensor, "token k"]) -> Float[Tensor, "token d"]:
        """mean + sum_s values[:, s] * atoms_[atoms[:, s]]."""
        store = self._fitted()
        outside = (atoms < 0) | (atoms >= max(self.n_atoms, 1))
        if outside.any() or (not self.n_atoms and values.any()):
            raise OptionError(f"these codes name atoms that a dictionary of {self.n_atoms} does not have")
        return _mixed(values.to(store.dtype), atoms, self.atoms_) + self.mean_

    def reconstruct(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """decode(encode(x))."""
        return self.decode(*self.encode(x))

    def transform(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token atom"]:
        """Codes with a column for every atom; x is about transform(x) @ atoms_ + mean_."""
        values, atoms = self.encode(x)
        return values.new_zeros(len(x), self.n_atoms).scatter_add_(1, atoms, values) if self.n_atoms else values[:, :0]

    def fvu(self, x: Float[Tensor, "token d"]) -> float:
        """Fraction of variance unexplained, sum |x - xhat|^2 / sum |x - mean(x)|^2 = 1 - EV, in float64; the mean is that of x.

        `OptionError` if all rows are equal.
        """
        found, x = self.reconstruct(x), x.detach().double()
        around = float((x - x.mean(0)).square().sum()) if len(x) else 0.0
        if around == 0:
            raise OptionError(f"{len(x)} rows that do not differ have no variance to explain")
        return float((x - found).square().sum()) / around

    def _fitted(self) -> Float[Tensor, "room d"]:
        if self._store is None:
            raise OptionError("this ITDA has no dictionary yet: call fit, partial_fit or fit_itda first")
        return self._store

    @property
    def _rounding(self) -> float:
        """What is left of a unit row that is reconstructed exactly is shorter than this."""
        return 32 * torch.finfo(self._store.dtype).eps

    def _checked(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        width = self._fitted().shape[1]
        if x.shape[1] != width:
            raise OptionError(f"these activations are {x.shape[1]} wide, and those of the dictionary {width}")
        _check(x)
        return x.detach().to(self._store.dtype)

    def _unit(self, x: Float[Tensor, "token d"]) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token 1"]]:
        """Directions from the mean and distances. Pursuit of a direction is pursuit of the row in units of its length, so one
        tolerance serves all. A row that is the mean, to rounding, has no direction: 0."""
        rows = x - self.mean_
        norms = rows.norm(dim=1, keepdim=True)
        none = norms <= self._rounding * self.mean_.norm()
        norms = norms.masked_fill(none, 0)
        return torch.where(none, 0, rows / norms), norms

    # ---------------------------------------------------------------------------------------------------------- keeping

    def save(self, folder: str | Path) -> Path:
        """Write `itda.safetensors` (atoms, mean, ids) and `itda.json` (options) into a folder, made if need be."""
        tensors = {"atoms": self.atoms_, "mean": self.mean_}
        if self._id_list is not None:
            tensors["ids"] = self.ids_
        options = {name: getattr(self, name) for name in _OPTIONS}
        about = {"format": FORMAT, **options, "n_seen": self.n_seen_, "source": self.source_}
        return save_folder(folder, "itda", tensors, about)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str | None = None) -> "ITDA":
        """Read what `save` wrote, bit for bit; fitting can go on. device: where to put it, default the CPU.

        Raises `OptionError` naming the file or the field that is missing.
        """
        tensors, about = load_folder(
            folder, "itda", FORMAT, fields=(*_OPTIONS, "n_seen", "source"), tensors=("atoms", "mean"), device=device
        )
        itda = cls(**{name: about[name] for name in _OPTIONS})
        itda._store, itda.mean_ = tensors["atoms"], tensors["mean"]
        itda.n_atoms, itda.n_seen_, itda.source_ = len(itda._store), about["n_seen"], about["source"]
        itda._id_list = tensors["ids"].tolist() if "ids" in tensors else None
        return itda

    def __repr__(self) -> str:
        return f"ITDA({self.n_atoms:,} atoms from {self.n_seen_:,} rows, k={self.k}, threshold={self.threshold:g})"


_OPTIONS = ("k", "threshold", "max_atoms", "centre", "positive", "seed")


def jaccard(a: ITDA, b: ITDA) -> float:
    """How alike two dictionaries are: |A and B| / |A or B| of the (prompt, position) they stored, from 0 to 1.

    Both must have gone through the same text. `OptionError` if either has no ids, or both are empty.
    """
    kept = []
    for itda, which in ((a, "first"), (b, "second")):
        if itda._id_list is None:
            raise OptionError(f"the {which} dictionary has no ids to compare: fit it with ids, or with fit_itda")
        kept.append({tuple(place) for place in itda._id_list})
    if not (either := kept[0] | kept[1]):
        raise OptionError("neither dictionary has an atom to compare")
    return len(kept[0] & kept[1]) / len(either)


def fit_itda(
    model, tokens: Int[Tensor, "prompt position"], hook: str, *, mask: Bool[Tensor, "prompt position"] | None = None,
    batch_size: int = 32, skip_first: bool = True, progress: bool = False, **options: Any,
) -> ITDA:  # fmt: skip
    """The ITDA of one hook point of a model over these prompts; ids are (prompt, position) in `tokens`.

    Prompts come in the order of the seed, positions in order; the mean is that of the first batch of prompts. Heads are laid side
    by side. mask: tokens to use, such as `pairs.is_token` (default all). skip_first: leave position 0 out, whose activations
    are of another size in most models. batch_size: prompts run at once. options: those of `ITDA`. Raises `SiteError` for a hook
    point that does not exist or has no vector at every position.
    """
    if batch_size < 1:
        raise OptionError(f"a batch has at least one prompt, not batch_size={batch_size}")
    if mask is not None and mask.shape != tokens.shape:
        raise OptionError(f"the mask of tokens {tuple(tokens.shape)} has shape {tuple(mask.shape)}")
    use = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).clone()
    if skip_first:
        use[:, :1] = False
    if not use.any():
        raise OptionError(f"no token is left to fit in prompts of shape {tuple(tokens.shape)}")
    itda = ITDA(**options)
    order = torch.arange(len(tokens)) if itda.seed is None else _shuffled(len(tokens), itda.seed)
    batches = order.to(tokens.device).split(batch_size)
    for prompts in tqdm(batches, desc="itda", unit="batch", disable=not progress, leave=False):
        here = use[prompts].nonzero()
        if len(here):
            rows = _vectors(model, tokens[prompts], hook)[here.unbind(1)]
            itda.partial_fit(rows, torch.stack([prompts[here[:, 0]], here[:, 1]], 1))
    cfg = config_of(model)
    itda.source_ = {"model": cfg.name, "revision": cfg.revision or "local", "hook": hook, "skip_first": skip_first}
    return itda


def _vectors(model, tokens: Int[Tensor, "prompt position"], hook: str) -> Float[Tensor, "prompt position d"]:
    try:
        value = record(model, tokens, [hook])[hook]
    except KeyError:
        raise SiteError(f"{config_of(model).name} has no hook point {hook!r}") from None
    # Heads may be as many as positions: the shape of a pattern does not always give it away.
    if value.shape[:2] != tokens.shape or value.ndim < 3 or hook.endswith(("hook_pattern", "hook_attn_scores")):
        raise SiteError(f"{hook} has no vector at every position: its shape is {tuple(value.shape)}")
    return value.flatten(2)


def _mixed(
    values: Float[Tensor, "token k"], chosen: Int[Tensor, "token k"], atoms: Float[Tensor, "atom d"]
) -> Float[Tensor, "token d"]:
    """sum_s values[:, s] * atoms[chosen[:, s]], without a tensor of every token's atoms."""
    if not len(atoms) or not len(values):
        return values.new_zeros(len(values), atoms.shape[1])
    return F.embedding_bag(chosen, atoms, per_sample_weights=values, mode="sum")


def _check(x: Float[Tensor, "token d"], ids: Int[Tensor, "token 2"] | None = None) -> None:
    if ids is not None and len(ids) != len(x):
        raise OptionError(f"{len(x)} activations came with {len(ids)} ids")
    if bad := (~x.isfinite().all(1)).nonzero().flatten().tolist():
        raise OptionError(f"activations are not finite in rows {name_some(bad)}")


def _shuffled(n: int, seed: int) -> Int[Tensor, " row"]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
