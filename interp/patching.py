"""Exact activation patching: change one place of one run to its value in another run, and see what the metric does.

    effects = activation_patching(model, pairs, "resid_pre")            # DataArray [prompt, layer, position]
    effects.mean("prompt")                                              # averages are the caller's

`direction="denoise"` runs the corrupt prompt and patches clean values in (is this place *sufficient* to restore the
behaviour?); `"noise"` runs the clean prompt and patches corrupt values in (is it *necessary*?). The two are different
questions, not opposites (Heimersheim & Nanda 2404.15255); `"both"` is the mean of the first and minus the second. A score
is always metric(patched) - metric(unpatched), in the metric's unit.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import xarray as xr

from interp.directions import BASES, Direction, metric_attrs
from interp.errors import one_of
from interp.exact import Announce, exact_effects
from interp.grids import Positions, position_labels, without_padding
from interp.interventions import Patch
from interp.metrics import Metric, get_metric
from interp.model.run import config_of
from interp.provenance import provenance
from interp.sheet import AnyMetric, ScoreSheet
from interp.sites import parse_node
from interp.tasks.pairs import PromptPairs


def activation_patching(
    model, pairs: PromptPairs, sites: str | Sequence[str], *,
    metric: AnyMetric = "logit_diff",
    direction: Direction = "denoise", positions: Positions = "each", window: int = 1,
    neurons: Sequence[str] | None = None, normalize: bool = False, engine: Literal["sweep", "hooks"] = "sweep",
    max_memory: int | None = None, batch_size: int | None = None, announce: Announce = None, progress: bool = False,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Exact effect of patching every place of one or several sites.

    sites: resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, q, k, v, pattern, neuron. Keys and values of a
        model with grouped-query attention are addressed per key/value head.
    metric: a name, a callable `f(logits)` or `f(logits, pairs)`, or a list of them: all are read from the same runs.
    positions: "each" position by itself, "all" at once, or a list of positions (negative ones count from each prompt's
        end). For "pattern", "each" patches a query's whole row, and "cells" each query-key pair by itself.
    window: patch this many adjacent layers together. The result then holds, beside `<site>`, `<site>_summed`: the sum
        of the single-layer effects over the same layers. `layer` is the first layer of the window.
    neurons: the neurons of site "neuron", as node ids: ["m3.n17", "m0.n2"].
    normalize: divide by metric(clean) - metric(corrupt) of each prompt.
    batch_size: prompts per forward pass (default: all at once).

    Returns a DataArray [metric if several, prompt, layer, head or kv_head, position, source] for one site and a Dataset
    for several sites or a window; in a Dataset, sites "head" and "neuron" are called "head_out" and "neuron_out", since
    those names belong to axes. Padding is NaN. Coordinates carry token strings, node ids, and each prompt's metric
    on the clean and the corrupt run; attrs say how the scores were made.

    engine: "sweep" runs all cells as one growing batch (`interp.sweep`); it takes a model from `load_model` without hooks
        of its own. "hooks" makes one forward pass per cell, checks that each hook fired and that patching a run with
        itself changes nothing (`PatchError` otherwise), and takes a TransformerBridge too. They agree to rounding.
    max_memory: bytes that the sweep may take at a time (default: three quarters of what is free).
    announce: called with the sweep's `SweepPlan` (cells, chunks, FLOPs, bytes) before it starts.
    """
    sheet = ScoreSheet(
        model, pairs, sites, metric=metric, direction=direction, positions=positions, neurons=neurons, window=window,
        normalize=normalize, every_neuron=False,
    )  # fmt: skip
    interventions = [list(grid.interventions()) for grid in sheet.grids]
    scores = exact_effects(
        model, pairs, [i for chosen in interventions for i in chosen], metrics=sheet.metrics, direction=direction,
        engine=engine, max_memory=max_memory, batch_size=batch_size, announce=announce, progress=progress,
    )  # fmt: skip
    sheet.add(
        scores.effects.split([len(i) for i in interventions], -1), {"clean": scores.clean, "corrupt": scores.corrupt}
    )
    return sheet.result("activation_patching", engine=engine)


def patch_nodes(
    model, pairs: PromptPairs, nodes: Sequence[str], *, metric: str | Callable | Metric = "logit_diff",
    direction: Direction = "denoise", engine: Literal["sweep", "hooks"] = "sweep",
    max_memory: int | None = None, batch_size: int | None = None, announce: Announce = None, progress: bool = False,
) -> xr.DataArray:  # fmt: skip
    """Exact effect of a few nodes' outputs position by position: [prompt, node, position]. Node ids: "a3.h2", "m5"."""
    cfg, metric, width = config_of(model), get_metric(metric), pairs.clean.shape[1]
    parsed = [parse_node(node, cfg) for node in nodes]
    one_of(direction, BASES, "direction")
    scores = exact_effects(
        model, pairs, [(Patch.of_node(node, position),) for node in parsed for position in range(width)],
        metrics=[metric], direction=direction, engine=engine, max_memory=max_memory, batch_size=batch_size,
        announce=announce, progress=progress,
    )  # fmt: skip
    values = scores.effects[0].reshape(len(pairs), len(parsed), width).numpy()
    coords = {
        "prompt": range(len(pairs)), "node": [str(n) for n in parsed], "position": range(width),
        "token": ("position", position_labels(pairs, range(width))),
    }  # fmt: skip
    attrs = {"method": "activation_patching", "engine": engine, "direction": direction, "site": "nodes",
             **metric_attrs([metric], direction), **provenance(model, pairs)}  # fmt: skip
    values = without_padding(values, range(width), pairs, prompt_axis=0)
    return xr.DataArray(values, dims=("prompt", "node", "position"), coords=coords, attrs=attrs)
