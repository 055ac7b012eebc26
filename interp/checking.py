"""Ground truth on demand: patch some places of an approximate map exactly, and say how far it is off.

approximate = attribution(model, pairs, ["resid_pre", "head"], rules="relp")
check = spot_check(model, pairs, approximate)
print(check)                        # agreement on a random sample, or on every place where that is cheap
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from interp.agreement import agreement_text, compare
from interp.errors import OptionError
from interp.exact import Announce, exact_effects
from interp.grids import Grid, make_grid
from interp.interventions import Intervention
from interp.metrics import Metric, get_metric
from interp.model.run import config_of
from interp.model.transformer import Transformer
from interp.sites import SITES
from interp.sweep import SweepPlan
from interp.tasks.pairs import PromptPairs

CHEAP_FLOPS = 1e12  # about ten seconds on two cores


@dataclass(frozen=True)
class SpotCheck:
    """Agreement with exact patching (see `compare`) on `n_checked` of `n_places` places, the same for every prompt."""

    table: pd.DataFrame
    n_checked: int
    n_places: int
    kind: str = "places"

    @property
    def says(self) -> str:
        """One line: what was checked."""
        if self.n_checked == self.n_places:
            return f"agreement with exact patching on all {self.n_places:,} {self.kind}, per prompt"
        drawn = f"{self.n_checked:,} of {self.n_places:,} {self.kind} drawn at random"
        return f"agreement with exact patching on {drawn}, per prompt"

    def __str__(self) -> str:
        return f"{self.says}; 95 % bootstrap over prompts\n{agreement_text(self.table)}"


def spot_check(
    model, pairs: PromptPairs, approximate: xr.DataArray | xr.Dataset, *, metric: str | Callable | Metric | None = None,
    n: int | None = None, seed: int = 0, max_memory: int | None = None, batch_size: int | None = None,
    announce: Announce = None, progress: bool = False,
) -> SpotCheck:  # fmt: skip
    """Patch places of an approximate result exactly, in its own direction, and compare.

    n: places of each site that can change, drawn with `seed` (default: every place if that takes no more than 1e12 FLOPs, else
        128).
    metric: as the approximate result was made with (default: its name in the result's attrs).
    """
    arrays = [approximate] if isinstance(approximate, xr.DataArray) else list(approximate.data_vars.values())
    metric = get_metric(approximate.attrs["metric"] if metric is None else metric)
    if any("metric" in array.dims for array in arrays):
        raise OptionError("a spot check reads one metric; choose one of the result's")
    if approximate.attrs["normalized"]:
        raise OptionError("a spot check compares scores in the metric's own unit, and these are normalised")
    grids = [_grid_of(array, pairs, config_of(model)) for array in arrays]
    everything = [list(grid.interventions()) for grid in grids]
    if n is None:
        cheap = isinstance(model, Transformer) and _flops(model, pairs, everything, batch_size) <= CHEAP_FLOPS
        n = max(map(len, everything)) if cheap else 128
    draw = np.random.default_rng(seed)
    chosen = [_draw(cells, n, pairs, draw) for cells in everything]
    effects = exact_effects(
        model, pairs, [cells[i] for cells, kept in zip(everything, chosen, strict=True) for i in kept], metrics=[metric],
        direction=approximate.attrs["direction"], engine="sweep" if isinstance(model, Transformer) else "hooks",
        max_memory=max_memory, batch_size=batch_size, announce=announce, progress=progress, title="checking",
    ).effects[0].numpy()  # fmt: skip
    ends = np.cumsum([len(kept) for kept in chosen])
    ours, theirs = {}, {}
    for array, kept, exact in zip(arrays, chosen, np.split(effects, ends[:-1], axis=1), strict=True):
        scores = array.transpose("prompt", ...).values.reshape(len(pairs), -1)[:, kept]
        name, dims = array.attrs["site"], ("prompt", f"{array.attrs['site']}_place")
        # padding is no place: the approximate result has no number there
        exact = np.where(np.isfinite(scores), exact, np.nan)
        coords = {key: array[key] for key in ("metric_clean", "metric_corrupt")}
        ours[name] = xr.DataArray(scores, dims=dims, coords=coords)
        theirs[name] = xr.DataArray(exact, dims=dims, coords=coords)
    table = compare(xr.Dataset(ours), xr.Dataset(theirs), seed=seed)
    return SpotCheck(table, int(ends[-1]), sum(map(len, everything)))


def _draw(cells: Sequence[Intervention], n: int, pairs: PromptPairs, draw: np.random.Generator) -> np.ndarray:
    """n places out of all, none of them before the first token that differs: there every method scores 0."""
    if n >= len(cells):
        return np.arange(len(cells))
    first = int(pairs.differs.any(0).int().argmax())
    before = [all(p.position is not None and 0 <= p.position < first for p in cell) for cell in cells]
    return np.sort(draw.permutation(np.flatnonzero(~np.array(before)))[:n])


def _grid_of(array: xr.DataArray, pairs: PromptPairs, cfg) -> Grid:
    """The grid that a result was laid out by."""
    if array.attrs.get("site") not in SITES or array.attrs["window"] != 1 or array.attrs["positions"] == "cells":
        raise OptionError("a spot check takes whole sites without windows or single pattern cells")
    positions = array["position"].values.tolist() if "position" in array.dims else "all"
    neurons = array["neuron"].values.tolist() if "neuron" in array.dims else None
    return make_grid(array.attrs["site"], pairs, cfg, positions, neurons)


def _flops(model: Transformer, pairs: PromptPairs, everything: list, batch_size: int | None) -> float:
    return SweepPlan.of(model, pairs.chunks(batch_size), [cell for cells in everything for cell in cells]).flops
