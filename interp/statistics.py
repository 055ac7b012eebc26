"""How sure we are: intervals over prompts, and the rule by which a component counts as found."""

import numpy as np
from scipy import stats


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) over the first axis, prompts; the interval is the bias-corrected accelerated bootstrap's (BCa).

    values: [prompt, ...]. Where all prompts agree, or there is only one, the interval is the mean itself: there is
    nothing to resample.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = np.asarray(values.mean(0))
    low, high = np.array(mean), np.array(mean)
    flat = values.reshape(len(values), -1)
    varied = flat.std(0) > 1e-12 * np.maximum(1.0, np.abs(flat).max(0))
    if len(values) > 1 and varied.any():
        found = stats.bootstrap(
            (flat[:, varied],), np.mean, axis=0, vectorized=True, n_resamples=n_resamples,
            confidence_level=confidence, method="BCa", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low.reshape(-1)[varied], high.reshape(-1)[varied] = found.low, found.high
    return mean, low, high


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ratio, low, high) of mean(numerator) / mean(denominator) over the first axis, prompts, resampled together.

    numerator: [prompt, ...]; denominator: [prompt]. Percentile bootstrap. All NaN if the denominator's mean is 0.
    """
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    picks = np.random.default_rng(seed).integers(len(denominator), size=(n_resamples, len(denominator)))
    shape = (-1,) + (1,) * (numerator.ndim - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = numerator.mean(0) / denominator.mean()
        resampled = numerator[picks].mean(1) / denominator[picks].mean(1).reshape(shape)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ratio, low, high


def detected(effects: np.ndarray, n_sigma: float = 2.0) -> np.ndarray:
    """True where an effect is more than `n_sigma` standard deviations from the mean over components.

    The detection rule of Zhang & Nanda (2309.16042, section 2). effects: [component], averaged over prompts.
    """
    return np.abs(effects - effects.mean()) > n_sigma * effects.std()
