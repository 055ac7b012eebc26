"""Which run is changed, towards which, and how a score is to be read.

denoise   the corrupt run is changed towards the clean one: does this place suffice?     M(corrupt, patched) - M(corrupt)
noise     the clean run is changed towards the corrupt one: is this place needed?        M(clean, patched) - M(clean)
both      the mean of the first and minus the second: what the clean value adds on average over the two orders in which
          this place and everything else can be changed (its Shapley value in that game of two)
"""

import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from interp.errors import name_some
from interp.metrics import Metric

Side = Literal["clean", "corrupt"]
Direction = Literal["denoise", "noise", "both"]
SIDES: tuple[Side, ...] = ("clean", "corrupt")
BASES: dict[str, tuple[Side, ...]] = {"denoise": ("corrupt",), "noise": ("clean",), "both": ("corrupt", "clean")}


def other_side(side: Side) -> Side:
    """The run that values come from when `side` is changed."""
    return "corrupt" if side == "clean" else "clean"


def metric_attrs(metrics: Sequence[Metric], direction: str, normalize: bool = False) -> dict[str, str]:
    """How to read a score: the metric's name, its unit, and what the sign means."""
    signs = {
        base: f"metric(patched) - metric({base}): positive means the patch raises the metric" for base in BASES["both"]
    }
    both = "mean of metric(patched) - metric(corrupt) and metric(clean) - metric(patched): positive means the clean value helps"
    bases = BASES[direction]
    return {
        "metric": ", ".join(m.name for m in metrics),
        "unit": "share of clean - corrupt" if normalize else ", ".join(dict.fromkeys(m.unit for m in metrics)),
        "sign": signs[bases[0]] if len(bases) == 1 else both,
    }


def warn_small_gap(gap: Tensor, metric: str) -> None:
    """Warn, naming the prompts, where clean and corrupt hardly differ: there is little to restore or to break there."""
    size = gap.abs()
    small = (size < 0.02 * size.median()) | (size < 1e-6)
    if small.any():
        rows = small.nonzero().flatten().tolist()
        warnings.warn(
            f"|{metric}(clean) - {metric}(corrupt)| is near zero on prompts {name_some(rows)}: "
            "normalised scores are unreliable there",
            stacklevel=4,  # whoever called the analysis that filled a sheet
        )
