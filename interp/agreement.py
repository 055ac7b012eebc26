"""How far an approximation is from exact patching, and how sure we are.

    compare(attribution(model, pairs, sites, rules="relp"), activation_patching(model, pairs, sites))

No single number will do. Correlation is blind to scale: a component whose rule is wrong by a factor of two still correlates
perfectly; so correlation, slope, error and sign stand together, for each kind of site by itself. A component map has many
places that cannot matter, and there ties and rounding noise drive rank statistics: those are left out.
"""

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import rankdata

from interp.errors import OptionError

STATISTICS = ("pearson", "spearman", "top_k", "slope", "relative_error", "sign")


def compare(
    approximate: xr.DataArray | xr.Dataset, exact: xr.DataArray | xr.Dataset, *, k: int = 10, n_resamples: int = 500,
    confidence: float = 0.95, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Agreement of two results that are laid out alike, one row per site; every statistic with a bootstrap interval.

    Over all prompts and places:
        pearson           correlation
        slope             of the least-squares line of approximate on exact; 1 if the scale is right
        relative_error    |approximate - exact| / |exact|, Euclidean norms
    Over places whose exact effect is not 0 (beyond rounding), which leaves out what cannot change:
        spearman          rank correlation
        sign              share of places with the right sign
        top_k             share of the k places with the largest mean effect that the approximation has among its k largest

    Columns `{statistic}`, `{statistic}_low`, `{statistic}_high`: percentile bootstrap over prompts (Spearman's ranks are those
    among all prompts). n: places that can change, in all prompts together. Raises `OptionError` if the two do not ask the same
    question: other places, direction, metric or normalisation.
    """
    for key in ("direction", "metric", "normalized"):
        a, e = approximate.attrs.get(key), exact.attrs.get(key)
        if a is not None and e is not None and a != e:
            raise OptionError(f"cannot compare scores of {key} {a} with scores of {key} {e}")
    rows = {}
    ours, theirs = _by_site(approximate), _by_site(exact)
    if missing := [name for name in ours if name not in theirs]:
        raise OptionError(f"the exact result has no {missing[0]}")
    for name, array in ours.items():
        other = theirs[name]
        if array.dims != other.dims or array.shape != other.shape:
            raise OptionError(f"scores of {name} are laid out otherwise: {dict(array.sizes)} and {dict(other.sizes)}")
        n = array.sizes["prompt"]
        resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
        a, e = (x.transpose("prompt", ...).values.reshape(n, -1).astype(np.float64) for x in (array, other))
        rows[name] = _agreement(a, e, _noise(other), k, resamples, confidence)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site").astype({"n": int})


def agreement_text(table: pd.DataFrame) -> str:
    """A table of `compare` for a terminal: each statistic with its interval."""
    cell = lambda row, s: f"{row[s]:.3f} [{row[f'{s}_low']:.2f}, {row[f'{s}_high']:.2f}]"  # noqa: E731
    shown = pd.DataFrame({s: [cell(row, s) for _, row in table.iterrows()] for s in STATISTICS}, index=table.index)
    return shown.assign(places=table.n).reset_index().to_string(index=False)


def _by_site(scores: xr.DataArray | xr.Dataset) -> dict[str, xr.DataArray]:
    if isinstance(scores, xr.DataArray):
        return {scores.attrs.get("site", "scores"): scores}
    return dict(scores.data_vars)


def _noise(exact: xr.DataArray) -> float:
    """What rounding alone can make of an effect that is 0, as where another engine patches what cannot change."""
    unpatched = [exact[name].values for name in ("metric_clean", "metric_corrupt") if name in exact.coords]
    return 16 * float(np.finfo(exact.dtype).eps) * max((float(np.abs(x).max()) for x in unpatched), default=0.0)


def _agreement(
    a: np.ndarray, e: np.ndarray, noise: float, k: int, resamples: np.ndarray, confidence: float
) -> dict[str, float]:
    """Statistics of [prompt, place] arrays, and their intervals; resamples: [resample, prompt], how often each is drawn."""
    present = np.isfinite(a) & np.isfinite(e)
    a, e = np.where(present, a, 0.0), np.where(present, e, 0.0)
    can_change = present & (np.abs(e) > noise)
    ranks = [np.where(can_change, _ranks(x, can_change), 0.0) for x in (a, e)]
    weights = np.vstack([np.ones(len(a)), resamples])  # the first row is the estimate itself
    of_all = _moments(a, e, present, weights)
    of_ranks = _moments(*ranks, can_change, weights)
    right = weights @ ((np.sign(a) == np.sign(e)) & can_change).sum(1)
    places = weights @ can_change.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "pearson": of_all["covariance"] / np.sqrt(of_all["a_variance"] * of_all["e_variance"]),
            "spearman": of_ranks["covariance"] / np.sqrt(of_ranks["a_variance"] * of_ranks["e_variance"]),
            "top_k": np.array([_overlap(w @ a, w @ e, w @ present, can_change.any(0), k) for w in weights]),
            "slope": of_all["covariance"] / of_all["e_variance"],
            "relative_error": np.sqrt((weights @ ((a - e) ** 2).sum(1)) / (weights @ (e**2).sum(1))),
            "sign": right / places,
        }
    row = {"n": float(can_change.sum())}
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for name in STATISTICS:
        drawn = found[name][1:][np.isfinite(found[name][1:])]
        low, high = np.quantile(drawn, tails) if len(drawn) and len(a) > 1 else (found[name][0], found[name][0])
        row |= {name: float(found[name][0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def _ranks(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    ranks = np.zeros_like(x)
    ranks[chosen] = rankdata(x[chosen])
    return ranks


def _moments(a: np.ndarray, e: np.ndarray, present: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Variances and covariance over the places present, for each row of prompt weights."""
    # counted from the overall means, so that sums of squares keep their digits
    n = max(int(present.sum()), 1)
    a, e = (np.where(present, x - x[present].sum() / n, 0.0) for x in (a, e))
    count = weights @ present.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_a, mean_e = ((weights @ x.sum(1)) / count for x in (a, e))
        return {
            "covariance": (weights @ (a * e).sum(1)) / count - mean_a * mean_e,
            "a_variance": (weights @ (a * a).sum(1)) / count - mean_a**2,
            "e_variance": (weights @ (e * e).sum(1)) / count - mean_e**2,
        }


def _overlap(a: np.ndarray, e: np.ndarray, count: np.ndarray, can_change: np.ndarray, k: int) -> float:
    """Share of the k places with the largest |mean exact effect| that are among the k largest of the approximation."""
    can_change = can_change & (count > 0)
    if not can_change.any():
        return np.nan
    a, e = (np.abs(x[can_change] / count[can_change]) for x in (a, e))
    k = min(k, len(e))
    top = [set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (a, e)]
    return len(top[0] & top[1]) / k
