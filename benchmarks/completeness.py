"""How exactly secant attributions add up to the metric's difference: the worst error of every family of models.

    python benchmarks/completeness.py

Tiny random models of all families of `tests/families.py`. At every cut of the residual stream, in both directions, the sum over
positions is held against metric(source) - metric(base); the error is relative to that difference's largest over prompts.
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from interp import attribution, load_model
from tests.families import FAMILIES, save_family
from tests.small_pairs import sites_of, small_pairs

CUTS = ("resid_pre", "resid_mid", "resid_post")
METRICS = ("log_probability", "probability", "probability_diff", "kl_divergence")


def worst(model, metric: str) -> float:
    """Over cuts, directions, layers and prompts."""
    pairs, errors = small_pairs(3, 6), []
    sites = [site for site in CUTS if site in sites_of(model)]
    for direction, sign in (("denoise", 1), ("noise", -1)):
        found = attribution(model, pairs, sites, rules="secant", metric=metric, direction=direction)
        gap = sign * (found.metric_clean - found.metric_corrupt)
        errors += [float(np.abs(found[site].sum("position") - gap).max() / np.abs(gap).max()) for site in sites]
    return max(errors)


def main() -> None:
    warnings.filterwarnings("ignore", message=".*is near zero on prompts")
    print(f"{'family':16} {'float64':>9} {'float32':>9}   other metrics: {'float64':>9} {'float32':>9}")
    rows = []
    for family in FAMILIES:
        if family == "falcon":  # which load_model refuses
            continue
        row = []
        with tempfile.TemporaryDirectory() as scratch:
            for dtype in (torch.float64, torch.float32):
                model = load_model(save_family(family, Path(scratch) / str(dtype), dtype), dtype=dtype)
                row.append([worst(model, "logit_diff"), max(worst(model, metric) for metric in METRICS)])
        rows.append(np.array(row).T.ravel())
        print(
            f"{family:16} {rows[-1][0]:9.1e} {rows[-1][1]:9.1e}   {'':14} {rows[-1][2]:9.1e} {rows[-1][3]:9.1e}",
            flush=True,
        )
    top = np.max(rows, 0)
    print(f"{'worst of ' + str(len(rows)):16} {top[0]:9.1e} {top[1]:9.1e}   {'':14} {top[2]:9.1e} {top[3]:9.1e}")


if __name__ == "__main__":
    main()
