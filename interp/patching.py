"""Exact activation patching: change one place of one run to its value in another run, and see what the metric does.

    effects = activation_patching(model, pairs, "resid_pre")            # DataArray [prompt, layer, position]
    effects.mean("prompt")                                              # averages are the caller's

`direction="denoise"` runs the corrupt prompt and patches clean values in (is this place *sufficient* to restore the
behaviour?); `"noise"` runs the clean prompt and patches corrupt values in (is it *necessary*?). The two are different
questions, not opposites (Heimersheim & Nanda 2404.15255). A score is always metric(patched) - metric(unpatched), in the
metric's unit.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.errors import MetricError, OptionError, SiteError, name_some, one_of
from interp.exact import Announce, exact_scores
from interp.interventions import Intervention, Patch
from interp.metrics import Metric, get_metric
from interp.model.run import config_of
from interp.provenance import provenance
from interp.sites import Node, Site, get_site, parse_node
from interp.tasks.pairs import PromptPairs

DIRECTIONS = {"denoise": "corrupt", "noise": "clean"}  # the run that is changed
Positions = Literal["each", "all", "cells"] | Sequence[int]


def activation_patching(
    model, pairs: PromptPairs, sites: str | Sequence[str], *,
    metric: str | Callable | Metric | Sequence[str | Callable | Metric] = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise", positions: Positions = "each", window: int = 1,
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
    one_of(direction, DIRECTIONS, "direction")
    several = not isinstance(metric, str | Metric) and isinstance(metric, Sequence)
    metrics = [get_metric(m) for m in (metric if several else [metric])]
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    cfg = config_of(model)
    if not names:
        raise SiteError("no sites to patch")
    if not metrics:
        raise MetricError("no metric to read")
    if not 1 <= window <= cfg.n_layers:
        raise OptionError(f"window {window} is not between 1 and the model's {cfg.n_layers} layers")
    grids = [_grid(get_site(name, cfg), pairs, cfg, positions, neurons, window) for name in names]
    interventions = [list(grid.interventions()) for grid in grids]
    scores = exact_scores(
        model, pairs, [i for chosen in interventions for i in chosen], metrics=metrics, base=DIRECTIONS[direction], engine=engine,
        max_memory=max_memory, batch_size=batch_size, announce=announce, progress=progress,
    )  # fmt: skip
    effects, gap = scores.effects, scores.clean - scores.corrupt
    warn_small_gap(gap[0], metrics[0].name)
    if normalize:
        effects = effects / torch.where(gap.abs() > 0, gap, torch.nan)[..., None]
    attrs = {
        "method": "activation_patching", "engine": engine, "direction": direction,
        "normalized": int(normalize), "positions": positions if isinstance(positions, str) else str(list(positions)),
        "window": window, **metric_attrs(metrics, direction, normalize), **provenance(model, pairs),
    }  # fmt: skip
    dims = ("metric", "prompt") if several else ("prompt",)
    lead: dict = {"prompt": range(len(pairs))} | ({"metric": [m.name for m in metrics]} if several else {})
    for name, values in (("metric_clean", scores.clean), ("metric_corrupt", scores.corrupt)):
        lead[name] = (dims, (values if several else values[0]).numpy())
    coords, arrays = lead, {}
    for grid, values in zip(grids, effects.split([len(i) for i in interventions], -1), strict=True):
        axes, labels = grid.axes(pairs)
        coords = coords | axes | labels
        for name, array in grid.arrays(values.numpy(), pairs):
            about = attrs | {"site": grid.site.name}
            arrays[name] = ((*dims, *axes), array if several else array[0], about)
    if len(arrays) == 1:
        axes, values, about = next(iter(arrays.values()))
        return xr.DataArray(values, coords, axes, attrs=about)
    return xr.Dataset(arrays, coords, attrs)


def patch_nodes(
    model, pairs: PromptPairs, nodes: Sequence[str], *, metric: str | Callable | Metric = "logit_diff",
    direction: Literal["denoise", "noise"] = "denoise", engine: Literal["sweep", "hooks"] = "sweep",
    max_memory: int | None = None, batch_size: int | None = None, announce: Announce = None, progress: bool = False,
) -> xr.DataArray:  # fmt: skip
    """Exact effect of a few nodes' outputs position by position: [prompt, node, position]. Node ids: "a3.h2", "m5"."""
    cfg, metric, width = config_of(model), get_metric(metric), pairs.clean.shape[1]
    parsed = [parse_node(node, cfg) for node in nodes]
    scores = exact_scores(
        model, pairs, [(Patch.of_node(node, position),) for node in parsed for position in range(width)],
        metrics=[metric], base=DIRECTIONS[direction], engine=engine, max_memory=max_memory, batch_size=batch_size,
        announce=announce, progress=progress,
    )  # fmt: skip
    values = scores.effects[0].reshape(len(pairs), len(parsed), width).numpy()
    coords = {
        "prompt": range(len(pairs)), "node": [str(n) for n in parsed], "position": range(width),
        "token": ("position", position_labels(pairs, range(width))),
    }  # fmt: skip
    attrs = {"method": "activation_patching", "engine": engine, "direction": direction, "site": "nodes",
             **metric_attrs([metric], direction), **provenance(model, pairs)}  # fmt: skip
    values = _without_padding(values, range(width), pairs, prompt_axis=0)
    return xr.DataArray(values, dims=("prompt", "node", "position"), coords=coords, attrs=attrs)


def metric_attrs(metrics: Sequence[Metric], direction: str, normalize: bool = False) -> dict[str, str]:
    """How to read a score: the metric's name, its unit, and what the sign means."""
    base = DIRECTIONS[direction]
    return {
        "metric": ", ".join(m.name for m in metrics),
        "unit": "share of clean - corrupt" if normalize else ", ".join(dict.fromkeys(m.unit for m in metrics)),
        "sign": f"metric(patched) - metric({base}): positive means the patch raises the metric",
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
            stacklevel=3,
        )


@dataclass(frozen=True)
class Grid:
    """The places of one site that a call patches, in order: layer (or first layer of a window) x unit x positions."""

    site: Site
    layers: tuple[int, ...]
    units: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    cells: tuple[tuple[int, int], ...] | None  # (query, key) of single pattern cells
    window: int
    n_layers: int
    neurons: tuple[Node, ...] | None = None

    @property
    def places(self) -> list[dict]:
        """Unit and position of every cell within a layer."""
        units = [{}] if self.units is None else [{"unit": u} for u in self.units]
        if self.cells is not None:
            spots = [{"position": q, "source_position": k} for q, k in self.cells]
        else:
            spots = [{}] if self.positions is None else [{"position": p} for p in self.positions]
        return [u | s for u, s in product(units, spots)]

    def interventions(self) -> Iterator[Intervention]:
        """Every single-layer (or neuron) cell, then, for windows of more than one layer, every window."""
        name = self.site.name
        if self.neurons is not None:
            spots = [None] if self.positions is None else self.positions
            yield from ((Patch(name, n.layer, n.index, p),) for n in self.neurons for p in spots)
            return
        yield from ((Patch(name, layer, **place),) for layer in range(self.n_layers) for place in self.places)
        if self.window > 1:
            for first in self.layers:
                for place in self.places:
                    yield tuple(Patch(name, layer, **place) for layer in range(first, first + self.window))

    def axes(self, pairs: PromptPairs) -> tuple[dict, dict]:
        """Coordinates of the axes after `prompt`, in order, and labels along them: node ids and token strings."""
        axes, labels, width = {}, {}, range(pairs.clean.shape[1])
        if self.neurons is not None:
            axes["neuron"] = [str(n) for n in self.neurons]
        else:
            axes["layer"] = list(self.layers)
        if self.units is not None:
            axes[self.site.unit] = list(self.units)
        if self.site.name == "head":
            nodes = [[str(Node("head", layer, head)) for head in self.units] for layer in self.layers]
            labels["node"] = (("layer", "head"), nodes)
        if self.cells is not None:
            axes |= {"position": width, "source": width}
            labels["source_token"] = ("source", position_labels(pairs, width))
        elif self.positions is not None:
            axes["position"] = list(self.positions)
        if "position" in axes:
            labels["token"] = ("position", position_labels(pairs, axes["position"]))
        return axes, labels

    def arrays(self, values: np.ndarray, pairs: PromptPairs) -> Iterator[tuple[str, np.ndarray]]:
        """Named arrays [metric, prompt, *axes] from values [metric, prompt, cell] in the order of `interventions`."""
        lead = values.shape[:2]
        n_single = self.n_layers * len(self.places) if self.neurons is None else values.shape[-1]
        single = values[..., :n_single]
        if self.neurons is not None or self.window == 1:
            yield self.site.variable, self._spread_out(single, pairs)
            return
        single = single.reshape(*lead, self.n_layers, -1)
        summed = np.stack([single[:, :, first : first + self.window].sum(2) for first in self.layers], 2)
        yield self.site.variable, self._spread_out(values[..., n_single:], pairs)
        yield f"{self.site.variable}_summed", self._spread_out(summed, pairs)

    def _spread_out(self, values: np.ndarray, pairs: PromptPairs) -> np.ndarray:
        n_layers = len(self.layers) if self.neurons is None else len(self.neurons)
        sizes = [*values.shape[:2], n_layers, *(() if self.units is None else (len(self.units),))]
        if self.cells is not None:
            width = pairs.clean.shape[1]
            full = np.full((*sizes, width, width), np.nan, dtype=values.dtype)
            queries, keys = zip(*self.cells, strict=True)
            full[..., list(queries), list(keys)] = values.reshape(*sizes, len(self.cells))
            return _without_padding(full, range(width), pairs, axis=-2)
        if self.positions is None:
            return values.reshape(sizes)
        return _without_padding(values.reshape(*sizes, len(self.positions)), self.positions, pairs)


def _without_padding(
    values: np.ndarray, positions: Sequence[int], pairs: PromptPairs, *, prompt_axis: int = 1, axis: int = -1
) -> np.ndarray:
    """NaN where a prompt has no such position: padding is no place, and its effect is not 0."""
    padding = np.asarray(positions) >= pairs.lengths.cpu().numpy()[:, None]
    if not padding.any():
        return values
    shape = np.ones(values.ndim, dtype=int)
    shape[[prompt_axis, axis]] = padding.shape
    return np.where(padding.reshape(shape), np.nan, values)


def _grid(site: Site, pairs: PromptPairs, cfg, positions: Positions, neurons, window: int) -> Grid:
    width = pairs.clean.shape[1]
    chosen_neurons = None
    if site.name == "neuron":
        if not neurons:
            raise SiteError('site "neuron" needs neurons=["m3.n17", ...]: which ones to patch')
        chosen_neurons = tuple(parse_node(n, cfg) for n in neurons)
        if wrong := [n for n in chosen_neurons if n.kind != "neuron"]:
            raise SiteError(f"{wrong[0]} is not a neuron")
        if window > 1:
            raise OptionError("windows of layers do not apply to single neurons")
    if isinstance(positions, str):
        one_of(positions, ("each", "all", "cells"), "choice of positions")
        if positions == "cells" and site.name != "pattern":
            raise OptionError(f'positions="cells" is for site "pattern", not for {site.name!r}')
        spots = tuple(range(width)) if positions == "each" else None
        cells = tuple((q, k) for q in range(width) for k in range(q + 1)) if positions == "cells" else None
    else:
        spots, cells = tuple(positions), None
        if not spots:
            raise OptionError("no positions to patch")
        shortest = int(pairs.lengths.min())
        if bad := [p for p in spots if not -shortest <= p < width]:
            raise OptionError(f"position {bad[0]} is outside the prompts ({shortest} to {width} tokens)")
    units = None if site.unit is None or site.name == "neuron" else tuple(range(site.n_units(cfg)))
    layers = tuple(range(cfg.n_layers - window + 1))
    return Grid(site, layers, units, spots, cells, window, cfg.n_layers, chosen_neurons)


def position_labels(pairs: PromptPairs, positions: Sequence[int]) -> list[str]:
    """`"9:␣John*"` for each position: number, token with visible spaces, and a star where prompts have other tokens."""
    labels = []
    for p in positions:
        if pairs.token_strings is None:
            labels.append(str(p))
            continue
        seen = [row[p] for row in pairs.token_strings if -len(row) <= p < len(row)]
        text = visible(seen[0]) if seen else "(padding)"
        labels.append(f"{p}:{text}{'*' if len(set(seen)) > 1 else ''}")
    return labels


def visible(token: str) -> str:
    """A token's text with spaces and line breaks drawn."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
