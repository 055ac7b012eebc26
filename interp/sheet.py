"""The sheet that every node analysis fills in: which places, which metrics, which direction, and the xarray at the end.

Exact patching and all approximations of it ask the same of the user and answer in the same form. A `ScoreSheet` holds what
was asked, is filled batch by batch of prompts, and lays the result out.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import BASES, SIDES, Direction, Side, metric_attrs, warn_small_gap
from interp.errors import SiteError, one_of
from interp.grids import Grid, Positions, lay_out, make_grid
from interp.metrics import Metric, get_metrics
from interp.model.run import config_of
from interp.precision import at_least_float32
from interp.provenance import provenance
from interp.sites import Node, Site
from interp.tasks.pairs import PromptPairs

AnyMetric = str | Callable | Metric | Sequence[str | Callable | Metric]


class ScoreSheet:
    """What was asked, checked; `add` scores for each batch of prompts in turn, then take the `result`.

    every_neuron: site "neuron" without a list of neurons means all of them.
    """

    def __init__(
        self, model, pairs: PromptPairs, sites: str | Sequence[str], *, metric: AnyMetric = "logit_diff",
        direction: Direction = "denoise", positions: Positions = "each", neurons: Sequence[str] | None = None,
        window: int = 1, normalize: bool = False, every_neuron: bool = True,
    ):  # fmt: skip
        one_of(direction, BASES, "direction")
        self.model, self.pairs, self.direction, self.normalize = model, pairs, direction, normalize
        self.positions, self.window = positions, window
        self.metrics, self.several = get_metrics(metric)
        self.names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
        if not self.names:
            raise SiteError("no sites to score")
        self.cfg = cfg = config_of(model)
        if every_neuron and not neurons and "neuron" in self.names:
            neurons = [str(Node("neuron", layer, n)) for layer in range(cfg.n_layers) for n in range(cfg.d_mlp)]
        self.grids: list[Grid] = [make_grid(name, pairs, cfg, positions, neurons, window) for name in self.names]
        self._values: list[list[Tensor]] = [[] for _ in self.grids]
        self._unpatched: dict[Side, list[Tensor]] = {side: [] for side in SIDES}

    @property
    def hooks(self) -> dict[str, Site]:
        """Every hook point that is scored."""
        return {grid.site.hook(layer): grid.site for grid in self.grids for layer in range(self.cfg.n_layers)}

    def add(
        self, values: Sequence[Float[Tensor, "metric prompt _"]], unpatched: Mapping[Side, Float[Tensor, "metric prompt"]]
    ) -> None:  # fmt: skip
        """One batch of prompts: for each grid its scores, cells in the grid's order; and the metrics of both runs."""
        for column, value in zip(self._values, values, strict=True):
            column.append(value)
        for side in SIDES:
            self._unpatched[side].append(unpatched[side])

    def add_at_hooks(
        self, passes: Sequence[Mapping[str, Float[Tensor, "metric prompt ..."]]], pairs: PromptPairs,
        unpatched: Mapping[Side, Float[Tensor, "metric prompt"]],
    ) -> None:  # fmt: skip
        """One batch of prompts, by hook name as `at_grid` takes them: the mean over one or more passes."""
        mean = {name: sum(scores[name] for scores in passes) / len(passes) for name in self.hooks}
        self.add([at_grid(grid, mean, pairs) for grid in self.grids], unpatched)

    def result(self, method: str, **attrs: str | int | float) -> xr.DataArray | xr.Dataset:
        """Everything that was added, with attributes that say how it was made."""
        clean, corrupt = (torch.cat(self._unpatched[side], 1) for side in SIDES)
        gap = clean - corrupt
        warn_small_gap(gap[0], self.metrics[0].name)
        values = [torch.cat(column, 1) for column in self._values]
        if self.normalize:
            values = [value / torch.where(gap.abs() > 0, gap, torch.nan)[..., None] for value in values]
        about = {
            "method": method, **attrs, "direction": self.direction, "normalized": int(self.normalize),
            "positions": self.positions if isinstance(self.positions, str) else str(list(self.positions)),
            "window": self.window, **metric_attrs(self.metrics, self.direction, self.normalize),
            **provenance(self.model, self.pairs),
        }  # fmt: skip
        return lay_out(
            self.grids, [value.numpy() for value in values], self.pairs, metrics=self.metrics, several=self.several,
            clean=clean.numpy(), corrupt=corrupt.numpy(), attrs=about,
        )  # fmt: skip


def contract(site: Site, gradient: Tensor, change: Tensor) -> Tensor:
    """Gradient times change at a site's hook point, in float32 at least: summed over the channels of a vector, while
    neurons and cells of a pattern are numbers by themselves."""
    product = at_least_float32(gradient) * at_least_float32(change)
    return product if site.unit == "neuron" or site.source_axis is not None else product.sum(-1)


def at_grid(
    grid: Grid, scores: Mapping[str, Float[Tensor, "metric prompt ..."]], pairs: PromptPairs
) -> Float[Tensor, "metric prompt cell"]:
    """Scores at hook points, as `contract` leaves them, in the order of the grid's cells; several cells' scores add up."""
    if grid.neurons is not None:
        layers = list(dict.fromkeys(n.layer for n in grid.neurons))
        order = [i for layer in layers for i, n in enumerate(grid.neurons) if n.layer == layer]
        chosen = [scores[grid.site.hook(la)][..., [n.index for n in grid.neurons if n.layer == la]] for la in layers]
        units_last = torch.cat(chosen, -1)[..., np.argsort(order)]
        return _spots(grid, units_last.transpose(-1, -2), pairs).flatten(2)
    found = []
    for layer in range(grid.n_layers):
        value = scores[grid.site.hook(layer)]
        if grid.cells is not None:  # [metric, prompt, head, query, key]
            queries, keys = zip(*grid.cells, strict=True)
            found.append(value[..., list(queries), list(keys)].flatten(2))
            continue
        if grid.site.source_axis is not None:
            value = value.sum(-1)
        elif grid.units is not None:  # [metric, prompt, position, unit]
            value = value.transpose(-1, -2)
        found.append(_spots(grid, value, pairs).flatten(2))
    return torch.cat(found, -1)


def _spots(grid: Grid, found: Float[Tensor, "metric prompt *unit position"], pairs: PromptPairs) -> Tensor:
    """The grid's positions out of all; the sum over all of a prompt's tokens if it takes them together."""
    shape = (len(pairs), *(1,) * (found.ndim - 3), -1)
    if grid.positions is None:
        return found.masked_fill(~pairs.is_token.cpu().reshape(shape), 0).sum(-1, keepdim=True)
    wanted = torch.tensor(grid.positions).expand(len(pairs), -1)
    wanted = torch.where(wanted < 0, wanted + pairs.lengths.cpu()[:, None], wanted)
    return found.take_along_dim(wanted.reshape(1, *shape).expand(*found.shape[:-1], -1), -1)
