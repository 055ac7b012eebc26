"""Ground truth on demand for edges: patch a sample of them exactly, and say how far an approximation is off."""

from collections.abc import Callable

import numpy as np
import xarray as xr

from interp.agreement import compare
from interp.checking import CHEAP_FLOPS, SpotCheck
from interp.circuits.circuit import Circuit
from interp.circuits.exact import edge_patching, plan_edges
from interp.circuits.graph import edge_mask
from interp.errors import OptionError
from interp.metrics import Metric, get_metric
from interp.model.transformer import Transformer
from interp.tasks.pairs import PromptPairs


def check_edges(
    model: Transformer, pairs: PromptPairs, approximate: xr.DataArray, *, metric: str | Callable | Metric | None = None,
    n: int | None = None, seed: int = 0, **options,
) -> SpotCheck:  # fmt: skip
    """Patch edges of an approximate result exactly, in its own direction, and compare per prompt (see `interp.compare`).

    n: edges, drawn with `seed` (default: every edge if that takes no more than 1e12 FLOPs, else 256). metric: as the
    approximate result was made with. options: `max_memory`, `batch_size`, `announce`, `progress`.
    """
    if "prompt" not in approximate.dims:
        raise OptionError("a check compares scores of every prompt, and these have been averaged")
    if approximate.attrs["normalized"]:
        raise OptionError("a check compares scores in the metric's own unit, and these are normalised")
    metric = get_metric(approximate.attrs["metric"] if metric is None else metric)
    ranked = Circuit.ranked(approximate)
    there = edge_mask(ranked.graph)
    total = int(there.sum())
    if n is None:
        plan = plan_edges(model, pairs.chunks(options.get("batch_size")), there, max_memory=options.get("max_memory"))
        n = total if plan.flops <= CHEAP_FLOPS else 256
    if n < 1:
        raise OptionError(f"cannot check {n} edges")
    kept = np.zeros_like(there)
    kept.flat[np.random.default_rng(seed).permutation(np.flatnonzero(there))[:n]] = True
    edges = ranked.with_edges(kept).edges
    exact = edge_patching(model, pairs, edges=edges, metric=metric, direction=approximate.attrs["direction"], **options)
    ours = approximate.sel(source=exact.source.values, target=exact.target.values).transpose(*exact.dims)
    table = compare(ours.where(exact.notnull()).assign_attrs(approximate.attrs), exact, seed=seed)
    return SpotCheck(table, len(edges), total, kind="edges")
