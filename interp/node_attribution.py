"""One backward pass scores every place of a model: attribution patching, with any backward rule.

    score = sum over d of m * (act_source - act_base)              m: what the backward pass delivers at the place

With the plain gradient m is dM/da and the score is attribution patching's first-order estimate (Nanda 2023; Kramar et al.
2403.00745) of exact patching; with other rules (`interp.rules`) m is what their slopes make of it (RelP: 2508.21258). Two
forward passes and one backward pass serve all sites. Scores are laid out as `activation_patching`'s are, and estimate them:

    approximate = attribution(model, pairs, ["resid_pre", "head"], rules="relp")
    exact = activation_patching(model, pairs, ["resid_pre", "head"])
    compare(approximate, exact)
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import BASES, SIDES, Direction, Side, metric_attrs, other_side, warn_small_gap
from interp.errors import PatchError, RulesError, SiteError, one_of
from interp.grids import Grid, Positions, lay_out, make_grid
from interp.metrics import Metric, get_metrics
from interp.model.run import Hooks, config_of, run_at
from interp.provenance import provenance
from interp.rules import Rules, get_rules
from interp.sites import Node, Site
from interp.tasks.pairs import PromptPairs

GRADIENT_POINTS = ("base", "source", "both")


def attribution(
    model, pairs: PromptPairs, sites: str | Sequence[str], *, rules: str | Rules = "gradient",
    metric: str | Callable | Metric | Sequence[str | Callable | Metric] = "logit_diff",
    direction: Direction = "denoise", at: Literal["base", "source", "both"] = "base", positions: Positions = "each",
    neurons: Sequence[str] | None = None, normalize: bool = False, batch_size: int | None = None,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Estimated effect of patching every place of one or several sites, from one backward pass per metric.

    sites, metric, positions, normalize, batch_size and the result: as `activation_patching`'s. Patching "all" positions is
        estimated by the sum over positions. neurons: default all of them.
    rules: a name ("gradient", "relp", "secant", ...; see `interp.rules.RULES`), a name with switches
        ("relp,pattern=frozen") or a `Rules`.
    direction: "both" estimates the mean of the effects of denoising and of minus noising.
    at: the run in which the gradient is taken: "base" (the run that exact patching changes), "source" (the run that values
        come from) or "both" (the mean: the two-point trapezoid of integrated gradients). Secant rules lie between the runs,
        and are the same for all three.

    Raises `RulesError` where the rules cannot be followed in this model or with this metric. Takes a TransformerBridge with
    the plain gradient.
    """
    one_of(direction, BASES, "direction")
    one_of(at, GRADIENT_POINTS, "gradient point")
    rules, (metrics, several), cfg = get_rules(rules), get_metrics(metric), config_of(model)
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    if not names:
        raise SiteError("no sites to score")
    rules.check(model)
    every = neurons or [str(Node("neuron", layer, n)) for layer in range(cfg.n_layers) for n in range(cfg.d_mlp)]
    grids = [make_grid(name, pairs, cfg, positions, every if name == "neuron" else None) for name in names]
    if (zero := [name for name in names if not rules.reaches(name)]) and zero == names:
        raise RulesError(f"rules {rules.name!r} freeze the attention pattern, so no score reaches {', '.join(zero)}")
    if zero:
        warnings.warn(
            f"rules {rules.name!r} freeze the attention pattern: scores of {', '.join(zero)} are 0 by construction",
            stacklevel=2,
        )
    points = gradient_points(rules, direction, at)
    where = {grid.site.hook(layer): grid.site for grid in grids for layer in range(cfg.n_layers)}
    parts: list[list[Tensor]] = [[] for _ in grids]
    unpatched: dict[Side, list[Tensor]] = {side: [] for side in SIDES}
    for chunk in pairs.chunks(batch_size):
        passes = [backward_scores(model, chunk, where, metrics, rules=rules, side=side) for side in points]
        for part, grid in zip(parts, grids, strict=True):
            part.append(sum(grid_scores(grid, found.scores, chunk) for found in passes) / len(passes))
        for side in SIDES:
            unpatched[side].append(passes[0].unpatched[side])
    clean, corrupt = (torch.cat(unpatched[side], 1) for side in SIDES)
    gap = clean - corrupt
    warn_small_gap(gap[0], metrics[0].name)
    scale = torch.full_like(gap, -1.0 if direction == "noise" else 1.0)
    if normalize:
        scale = scale / torch.where(gap.abs() > 0, gap, torch.nan)
    values = [torch.cat(part, 1) * scale[..., None] for part in parts]
    between = "between base and source" if rules.needs_source else "both" if len(points) > 1 else at
    attrs = {
        "method": "attribution", "rules": rules.name, "switches": str(rules.settings()), "gradient_at": between,
        "direction": direction, "normalized": int(normalize),
        "positions": positions if isinstance(positions, str) else str(list(positions)), "window": 1,
        **({"zero_by_construction": ", ".join(zero)} if zero else {}),
        **metric_attrs(metrics, direction, normalize), **provenance(model, pairs),
    }  # fmt: skip
    return lay_out(
        grids, [v.numpy() for v in values], pairs, metrics=metrics, several=several, clean=clean.numpy(),
        corrupt=corrupt.numpy(), attrs=attrs,
    )  # fmt: skip


def gradient_points(rules: Rules, direction: Direction, at: str) -> tuple[Side, ...]:
    """The runs whose multipliers are averaged. Secant rules are symmetric: any one run serves."""
    base = BASES[direction][0]
    if rules.needs_source:
        return (base,)
    if len(BASES[direction]) > 1 or at == "both":
        return ("clean", "corrupt")
    return (base if at == "base" else other_side(base),)


@dataclass(frozen=True)
class Multipliers:
    """What one backward pass per metric found, on the CPU: for each hook name, m * (act_clean - act_corrupt) summed over
    the site's channels; and the metrics of both runs."""

    scores: dict[str, Float[Tensor, "metric prompt ..."]]
    unpatched: dict[Side, Float[Tensor, "metric prompt"]]


def backward_scores(
    model, pairs: PromptPairs, sites: Mapping[str, Site], metrics: Sequence[Metric], *, rules: Rules, side: Side
) -> Multipliers:
    """One forward pass of each run and, through the run `side`, one backward pass per metric.

    sites: by hook name. A site that the rules cut off has score 0; one that is not reached otherwise is a `PatchError`.
    """
    other, sign = other_side(side), 1 if side == "corrupt" else -1
    recording = rules.recording() if rules.needs_source else None
    there: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    roots: list[Tensor] = []

    def keep(value: Tensor, hook) -> None:
        there[hook.name] = value

    def watch(value: Tensor, hook) -> Tensor:
        name, site, change = hook.name, sites[hook.name], there.pop(hook.name) - value.detach()
        if rules.reaches(site.name):
            value.register_hook(lambda g: found[name].append(_contract(site, g, change).cpu() * sign))
        else:
            found[name] = [_contract(site, change, torch.zeros_like(change)).cpu()] * len(metrics)
        return value  # a TransformerBridge's hooks may see a copy, which is in the graph only if handed back

    def cut(value: Tensor, hook) -> Tensor:
        roots.append(value.detach().requires_grad_())
        return roots[0]

    with torch.no_grad():
        hooks: Hooks = [*pairs.hooks(other), *((name, keep) for name in sites)]
        logits = {other: run_at(model, pairs.tokens(other), pairs.read_at, hooks, rules=recording)}
    with torch.enable_grad():
        hooks = [*pairs.hooks(side), ("hook_embed", cut), *((name, watch) for name in sites)]
        bound = rules if recording is None else recording.against()
        end = run_at(model, pairs.tokens(side), pairs.read_at, hooks, rules=bound)
    logits[side] = end.detach()
    for metric in metrics:
        weights = metric.multipliers(logits[side], pairs, logits["clean"], logits[other] if recording else None)
        torch.autograd.grad(end, roots, weights.to(end.dtype), retain_graph=metric is not metrics[-1])
    if silent := [name for name, scores in found.items() if len(scores) != len(metrics)]:
        raise PatchError(f"no gradient arrived at {silent[0]}")
    unpatched = {s: torch.stack([metric(logits[s], pairs, logits["clean"]) for metric in metrics]).cpu() for s in SIDES}
    return Multipliers({name: torch.stack(scores) for name, scores in found.items()}, unpatched)


def _contract(site: Site, gradient: Tensor, change: Tensor) -> Tensor:
    """Their product in float32 at least, summed over a vector's channels; neurons and patterns are single numbers."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    product = gradient.to(wide) * change.to(wide)
    return product if site.unit == "neuron" or site.source_axis is not None else product.sum(-1)


def grid_scores(
    grid: Grid, scores: Mapping[str, Float[Tensor, "metric prompt ..."]], pairs: PromptPairs
) -> Float[Tensor, "metric prompt cell"]:
    """Scores at hook points in the order of the grid's cells."""
    if grid.neurons is not None:
        by_layer = {n.layer: grid.site.hook(n.layer) for n in grid.neurons}
        picked = {
            layer: scores[hook][..., [n.index for n in grid.neurons if n.layer == layer]]
            for layer, hook in by_layer.items()
        }
        order = [i for layer in by_layer for i, n in enumerate(grid.neurons) if n.layer == layer]
        units_last = torch.cat(list(picked.values()), -1)[..., np.argsort(order)]
        return _spots(grid, units_last.transpose(-1, -2), pairs).flatten(2)
    layers = []
    for layer in range(grid.n_layers):
        found = scores[grid.site.hook(layer)]
        if grid.site.source_axis is not None:  # [metric, prompt, head, query, key]
            if grid.cells is not None:
                queries, keys = zip(*grid.cells, strict=True)
                layers.append(found[..., list(queries), list(keys)].flatten(2))
                continue
            found = found.sum(-1)
        elif grid.units is not None:  # [metric, prompt, position, unit]
            found = found.transpose(-1, -2)
        layers.append(_spots(grid, found, pairs).flatten(2))
    return torch.cat(layers, -1)


def _spots(grid: Grid, found: Float[Tensor, "metric prompt *unit position"], pairs: PromptPairs) -> Tensor:
    """The grid's positions out of all; the sum over all of a prompt's tokens if it patches them together."""
    shape = (len(pairs), *(1,) * (found.ndim - 3), -1)
    if grid.positions is None:
        return found.masked_fill(~pairs.is_token.cpu().reshape(shape), 0).sum(-1, keepdim=True)
    wanted = torch.tensor(grid.positions).expand(len(pairs), -1)
    wanted = torch.where(wanted < 0, wanted + pairs.lengths.cpu()[:, None], wanted)
    return found.take_along_dim(wanted.reshape(1, *shape).expand(*found.shape[:-1], -1), -1)
