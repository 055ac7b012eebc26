"""How the scores of a site are laid out: which places there are, in which order, and the xarray they become.

Exact and approximate methods fill the same `Grid`, so that their results can be laid on each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import xarray as xr

from interp.errors import OptionError, SiteError, one_of
from interp.interventions import Intervention, Patch
from interp.metrics import Metric
from interp.sites import Node, Site, get_site, parse_node
from interp.tasks.pairs import PromptPairs

Positions = Literal["each", "all", "cells"] | Sequence[int]


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
            return without_padding(full, range(width), pairs, axis=-2)
        if self.positions is None:
            return values.reshape(sizes)
        return without_padding(values.reshape(*sizes, len(self.positions)), self.positions, pairs)


def lay_out(
    grids: Sequence[Grid], values: Sequence[np.ndarray], pairs: PromptPairs, *, metrics: Sequence[Metric], several: bool,
    clean: np.ndarray, corrupt: np.ndarray, attrs: dict,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """One DataArray for one array of scores, a Dataset for more; with token strings, node ids and unpatched metrics.

    values: for each grid, [metric, prompt, cell] in the order of its `interventions`. clean, corrupt: [metric, prompt].
    several: keep the metric axis.
    """
    dims = ("metric", "prompt") if several else ("prompt",)
    coords: dict = {"prompt": range(len(pairs))} | ({"metric": [m.name for m in metrics]} if several else {})
    for name, metric in (("metric_clean", clean), ("metric_corrupt", corrupt)):
        coords[name] = (dims, metric if several else metric[0])
    arrays = {}
    for grid, found in zip(grids, values, strict=True):
        axes, labels = grid.axes(pairs)
        coords = coords | axes | labels
        for name, array in grid.arrays(found, pairs):
            arrays[name] = ((*dims, *axes), array if several else array[0], attrs | {"site": grid.site.name})
    if len(arrays) == 1:
        axes, array, about = next(iter(arrays.values()))
        return xr.DataArray(array, coords, axes, attrs=about)
    return xr.Dataset(arrays, coords, attrs)


def without_padding(
    values: np.ndarray, positions: Sequence[int], pairs: PromptPairs, *, prompt_axis: int = 1, axis: int = -1
) -> np.ndarray:
    """NaN where a prompt has no such position: padding is no place, and its effect is not 0."""
    padding = np.asarray(positions) >= pairs.lengths.cpu().numpy()[:, None]
    if not padding.any():
        return values
    shape = np.ones(values.ndim, dtype=int)
    shape[[prompt_axis, axis]] = padding.shape
    return np.where(padding.reshape(shape), np.nan, values)


def make_grid(
    name: str,
    pairs: PromptPairs,
    cfg,
    positions: Positions = "each",
    neurons: Sequence[str] | None = None,
    window: int = 1,
) -> Grid:
    """The places of one site; errors name what this model or these prompts do not have. neurons: for site "neuron"."""
    site, width = get_site(name, cfg), pairs.clean.shape[1]
    chosen_neurons = None
    if not 1 <= window <= cfg.n_layers:
        raise OptionError(f"window {window} is not between 1 and the model's {cfg.n_layers} layers")
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
