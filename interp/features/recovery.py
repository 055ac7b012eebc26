"""How well a learned dictionary found the true one (`interp.features.synthetic`).

    truth = toy_dictionary(seed=0)
    ...                                                           # train on truth.sample(...)
    print(recovery(decoder, truth.atoms, codes=codes, true_codes=true_codes))

Two questions that reconstruction does not answer. Are the directions right? Cosines c_ij = <atom_i, latent_j> of unit rows:

    MMCS          mean over atoms of max_j c_ij           is every atom near some latent? (Sharkey et al. 2022)
    MCC           mean |c_ij| of the best one-to-one matching (Hungarian): an atom found twice counts once
    uniqueness    distinct best matches over latents: how few latents share an atom

And do they fire where the truth does? A latent is a detector of the atom that it is nearest to: precision, recall, F1.

MMCS takes cosines with their sign: codes are not negative, so a latent that points the other way cannot stand for the atom.
MCC ignores signs, as is usual for it. Read both beside `random_baseline`: in few dimensions chance goes far.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from interp.errors import OptionError

_BLOCK = 2**22  # entries of a matrix of codes that are looked at once


@dataclass(frozen=True, eq=False)
class Recovery:
    """What `recovery` found. Shares are of 1. Of firing nothing is known, NaN or None, where no codes were given.

    Dead latents, those of a zero row or that never fire in the codes, match nothing.
    """

    mmcs: float
    mcc: float
    recovered_90: float  # share of atoms whose best cosine exceeds .9
    recovered_95: float
    uniqueness: float  # of all latents, so at most atoms / latents and 1 - dead
    dead: float
    cosine: Float[Tensor, " feature"] = field(
        repr=False
    )  # of each atom and the latent nearest to it; 0 if all are dead
    match: Int[Tensor, " latent"] = field(repr=False)  # the atom nearest to each latent; -1 of a dead one
    l0: float = math.nan  # latents that are not 0, mean over tokens
    true_l0: float = math.nan
    mean_f1: float = math.nan  # over live latents; times 1 - dead for that which counts a dead latent as 0
    shrinkage: float = math.nan  # slope of size on true size where both fire; below 1 codes are too small
    precision: Float[Tensor, " latent"] | None = field(default=None, repr=False)  # of each latent; NaN if dead
    recall: Float[Tensor, " latent"] | None = field(default=None, repr=False)  # NaN, too, if its atom never fires
    f1: Float[Tensor, " latent"] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = [
            f"directions: MMCS {self.mmcs:.4f}, MCC {self.mcc:.4f}; atoms found at cosine .9: {self.recovered_90:.1%}, "
            f"at .95: {self.recovered_95:.1%}",
            f"{len(self.match)} latents for {len(self.cosine)} atoms: {self.dead:.1%} dead, uniqueness {self.uniqueness:.3f}",
        ]
        if self.f1 is not None:
            size = "no live latent within .9 of an atom" if math.isnan(self.shrinkage) else f"{self.shrinkage:.3f}"
            lines.append(
                f"firing: L0 {self.l0:.2f} (true {self.true_l0:.2f}), mean F1 of live latents {self.mean_f1:.3f}"
            )
            lines.append(f"size of codes over true size: {size}")
        return "\n".join(lines)


@torch.no_grad()
def recovery(
    decoder: Float[Tensor, "latent d"], atoms: Float[Tensor, "feature d"], *,
    codes: Float[Tensor, "token latent"] | None = None, true_codes: Float[Tensor, "token feature"] | None = None,
) -> Recovery:  # fmt: skip
    """Compare a decoder's rows with the true atoms and, where both kinds of codes are given, its firing with theirs.

    MCC divides by min(latents, atoms), so that a dead latent that leaves an atom unmatched counts as 0.
    A latent fires where its code is not 0. Precision is the share of its firings at which the atom nearest to it (signed
    cosine) fires, recall the share of the atom's firings that it has, F1 their harmonic mean, 0 if they never meet.
    shrinkage: sum(s t) / sum(t^2) over tokens where a live latent within cosine .9 of its atom and the atom both fire;
        s = code times the norm of the decoder's row, t = true code times that of the atom; NaN if there is none.
    Rows and codes of another scale, row times s and codes over s, give the same. Sums are in float64.
    Raises `OptionError` for shapes that do not fit together, non-finite values and one kind of codes without the other.
    """
    if (
        decoder.ndim != 2
        or atoms.ndim != 2
        or decoder.shape[1:] != atoms.shape[1:]
        or 0 in (*decoder.shape, *atoms.shape)
    ):
        raise OptionError(
            f"a decoder {list(decoder.shape)} and atoms {list(atoms.shape)} are not [latent, d] and [feature, d]"
        )
    if (codes is None) != (true_codes is None):
        raise OptionError("codes and true codes are compared with each other: give both or neither")
    if codes is not None:
        if codes.ndim != 2 or codes.shape[1] != len(decoder):
            raise OptionError(f"codes are [token, latent] of {len(decoder)} latents, not {list(codes.shape)}")
        if true_codes.shape != (len(codes), len(atoms)) or not len(codes):
            raise OptionError(
                f"true codes are [{len(codes)} tokens, {len(atoms)} features], not {list(true_codes.shape)}"
            )
    for name, x in {"decoder": decoder, "atoms": atoms, "codes": codes, "true codes": true_codes}.items():
        if x is not None and not bool(x.isfinite().all()):
            raise OptionError(f"{name} with values that are not finite cannot be compared")
    norms = decoder.double().norm(dim=1)
    live = norms > 0
    if codes is not None:
        live = live & (codes != 0).any(0)
    alive = live.nonzero().flatten()
    cosines = _unit(atoms) @ _unit(decoder[alive]).T  # [feature, live latent]
    best = cosines.amax(1) if len(alive) else cosines.new_zeros(len(atoms))
    match = torch.full((len(decoder),), -1, device=decoder.device)
    if len(alive):
        match[alive] = cosines.argmax(0)
    found = {
        "mmcs": float(best.mean()),
        "mcc": _matched(cosines.abs()) / min(len(decoder), len(atoms)),
        "recovered_90": float((best > 0.9).double().mean()),
        "recovered_95": float((best > 0.95).double().mean()),
        "uniqueness": len(match[alive].unique()) / len(decoder),
        "dead": 1 - len(alive) / len(decoder),
    }
    if codes is not None:
        near = torch.zeros_like(live)
        near[alive] = cosines.amax(0) > 0.9
        found |= _firing(codes, true_codes, match, norms, atoms.double().norm(dim=1), near)
    return Recovery(**found, cosine=best, match=match)


def random_baseline(n_latents: int, atoms: Float[Tensor, "feature d"], *, seed: int, n: int = 10) -> float:
    """MMCS of dictionaries of n_latents random unit rows, mean over n of them: what a decoder that learned nothing has."""
    if n_latents < 1 or n < 1:
        raise OptionError(f"a baseline needs at least 1 latent and 1 dictionary, not {n_latents} and {n}")
    generator, unit = torch.Generator(device=atoms.device).manual_seed(seed), _unit(atoms)
    options = {"generator": generator, "dtype": torch.float64, "device": atoms.device}
    drawn = (_unit(torch.randn(n_latents, atoms.shape[1], **options)) for _ in range(n))
    return sum(float((unit @ rows.T).amax(1).mean()) for rows in drawn) / n


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows of norm 1 in float64; a zero row stays 0."""
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def _matched(gains: Float[Tensor, "row column"]) -> float:
    """The largest sum of entries no two of which share a row or a column."""
    gains = gains.cpu().numpy()
    return float(gains[linear_sum_assignment(gains, maximize=True)].sum())


def _firing(
    codes: Float[Tensor, "token latent"], true_codes: Float[Tensor, "token feature"], match: Int[Tensor, " latent"],
    norms: Float[Tensor, " latent"], true_norms: Float[Tensor, " feature"], near: Bool[Tensor, " latent"],
) -> dict[str, float | Tensor]:  # fmt: skip
    """The fields of `Recovery` about firing; in blocks of tokens, as matched codes take the room of codes once more."""
    live, at = match >= 0, match.clamp_min(0)
    counts = norms.new_zeros(3, len(match))  # firings of the latent, of its atom, of both at once
    firings, true_firings, product, square = 0.0, 0.0, 0.0, 0.0
    block = max(1, _BLOCK // max(codes.shape[1], true_codes.shape[1]))
    for ours, theirs in zip(codes.split(block), true_codes.split(block), strict=True):
        matched = theirs[:, at]
        fired, true_fired = ours != 0, matched != 0
        both = fired & true_fired
        counts += torch.stack([x.sum(0) for x in (fired, true_fired, both)])
        firings += float(fired.sum())
        true_firings += float((theirs != 0).sum())
        token, latent = (both & near).nonzero(as_tuple=True)
        size = ours[token, latent].double() * norms[latent]
        true_size = matched[token, latent].double() * true_norms[at[latent]]
        product += float((size * true_size).sum())
        square += float(true_size.square().sum())
    fired, true_fired, both = counts
    nan = torch.full_like(fired, math.nan)
    f1 = torch.where(live, 2 * both / (fired + true_fired), nan)
    return {
        "l0": firings / len(codes),
        "true_l0": true_firings / len(codes),
        "mean_f1": float(f1[live].mean()) if bool(live.any()) else math.nan,
        "shrinkage": product / square if square else math.nan,
        "precision": torch.where(live, both / fired, nan),
        "recall": torch.where(live & (true_fired > 0), both / true_fired, nan),
        "f1": f1,
    }
