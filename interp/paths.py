"""A few passes instead of one: integrated gradients, and secants of one site at a time.

One backward pass between two whole runs answers for every site at once, and so cannot know that exact patching moves one
site while all others stay. Here every site gets rows of its own: the base run with that site moved, from its layer on.

    integrated_gradients(model, pairs, "mlp_out", path="activation", steps=4)      # the site's own straight line
    integrated_gradients(model, pairs, "resid_pre", steps=32)                      # the embeddings' line, as EAP-IG goes
    site_secants(model, pairs, ["resid_pre", "mlp_out"], groups=4)                 # ours: the chord of each site

Moving all positions of a site together mixes their effects up; with `groups` > 1 every position moves with each `groups`-th
neighbour only, at that many times the rows. Exact where a group holds a single position that changes.

Integrated gradients: Sundararajan, Taly & Yan 1703.01365. The groups and the secants are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.directions import BASES, SIDES, Direction, Side, other_side
from interp.errors import OptionError, RulesError, one_of
from interp.grids import Positions
from interp.model.config import ModelConfig
from interp.model.run import logits_at, record, run_at
from interp.model.transformer import Transformer
from interp.rules import GRADIENT, Rules, get_rules
from interp.sheet import AnyMetric, ScoreSheet, contract
from interp.sites import Site
from interp.sweep import memory_limit
from interp.tasks.pairs import PromptPairs

QUADRATURES = ("gauss", "midpoint")


def integrated_gradients(
    model: Transformer, pairs: PromptPairs, sites: str | Sequence[str], *,
    path: Literal["embedding", "activation"] = "embedding", steps: int = 32, quadrature: Literal["gauss", "midpoint"] = "gauss",
    groups: int = 1, metric: AnyMetric = "logit_diff", direction: Direction = "denoise", positions: Positions = "each",
    neurons: Sequence[str] | None = None, normalize: bool = False, max_memory: int | None = None, progress: bool = False,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Scores (act_source - act_base) * mean of dM/dact over a straight line from the base run to the source run.

    path: "embedding" moves the input embeddings and reads the gradient at every site on the way; it is complete (scores sum to
        metric(source) - metric(base)) where the path is straight, at the embeddings, and not behind. "activation" moves one
        site of one layer at a time, all its units together, while all else stays as in the base run; its scores sum to the
        effect of patching the whole site.
    steps: points on the line, by Gauss-Legendre or midpoint quadrature; rows of one batch.
    groups: see the module; path "activation" only.
    Other options and the result: as `attribution`'s. attrs["completeness_gap"] is the largest difference between a sum that
    should be complete and what it should be, over prompts, relative to their largest |metric(clean) - metric(corrupt)|.
    """
    one_of(path, ("embedding", "activation"), "path")
    _check_groups(groups)
    if path == "embedding" and groups != 1:
        raise OptionError('groups of positions are for path="activation"')
    line = quadrature_points(steps, quadrature)
    sheet = ScoreSheet(
        model,
        pairs,
        sites,
        metric=metric,
        direction=direction,
        positions=positions,
        neurons=neurons,
        normalize=normalize,
    )
    about = {"path": path, "steps": steps, "quadrature": quadrature, "groups": groups, "rules": "gradient"}
    along = _along_embeddings if path == "embedding" else _along_sites
    gaps = []

    def one_way(chunk: PromptPairs, side: Side) -> dict[str, Tensor]:
        scores, gap = along(model, chunk, sheet, side, line, groups)
        gaps.append(gap)
        return scores

    rows = steps * (1 if path == "embedding" else groups * len(sheet.grids))
    clean, corrupt = _fill(sheet, one_way, rows, max_memory, progress, "integrated gradients")
    scale = max(float((clean - corrupt).abs().max()), torch.finfo(clean.dtype).tiny)
    return sheet.result("integrated_gradients", **about, completeness_gap=max(gaps) / scale)


def site_secants(
    model: Transformer, pairs: PromptPairs, sites: str | Sequence[str], *, groups: int = 1, rules: str | Rules = "secant",
    metric: AnyMetric = "logit_diff", direction: Direction = "denoise", positions: Positions = "each",
    neurons: Sequence[str] | None = None, normalize: bool = False, max_memory: int | None = None, progress: bool = False,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Secant attribution of one site at a time: between the base run and the base run with that site of the source run.

    One forward and one backward pass over the later layers for each layer, of all sites and groups. Sums over a group's
    positions are exact, being the effect of patching them together; with one changing position per group every score is.
    Heads, keys and the like of a layer move together. groups, and the other options: see `integrated_gradients`.
    """
    rules = get_rules(rules)
    _check_groups(groups)
    if not rules.symmetric:
        raise RulesError(f"site_secants follows secant rules, not {rules.name!r}")
    sheet = ScoreSheet(
        model,
        pairs,
        sites,
        metric=metric,
        direction=direction,
        positions=positions,
        neurons=neurons,
        normalize=normalize,
    )
    one_way = lambda chunk, side: _site_secants(model, chunk, sheet, side, rules, groups)  # noqa: E731
    _fill(sheet, one_way, groups * len(sheet.grids), max_memory, progress, "site secants")
    return sheet.result("site_secants", rules=rules.name, groups=groups)


def quadrature_points(steps: int, kind: str) -> tuple[list[float], list[float]]:
    """Points in [0, 1] and their weights."""
    one_of(kind, QUADRATURES, "quadrature")
    if steps < 1:
        raise OptionError(f"a path needs at least 1 step, not {steps}")
    if kind == "midpoint":
        return [(k + 0.5) / steps for k in range(steps)], [1 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def position_groups(pairs: PromptPairs, groups: int) -> Bool[Tensor, "group prompt position"]:
    """Every token in one group: counted from each prompt's end, as that is where the metric is read."""
    from_end = pairs.read_at[:, None] - torch.arange(pairs.clean.shape[1], device=pairs.clean.device)
    number = torch.arange(groups, device=pairs.clean.device)
    return (from_end % groups == number[:, None, None]) & pairs.is_token


def _check_groups(groups: int) -> None:
    if groups < 1:
        raise OptionError(f"positions need at least 1 group, not {groups}")


def _fill(
    sheet: ScoreSheet, one_way, rows_per_prompt: int, max_memory: int | None, progress: bool, title: str
) -> tuple[Tensor, Tensor]:
    """Fill a sheet batch by batch of prompts, as many as fit into memory; the metric of both runs over all prompts."""
    model, pairs = sheet.model, sheet.pairs
    if not isinstance(model, Transformer):
        raise RulesError(
            f"{title} run single layers, which a {type(model).__name__} does not: load the model with load_model"
        )
    row = graph_bytes_per_token(model.cfg, pairs.clean.shape[1]) * pairs.clean.shape[1] * model.W_E.element_size()
    size = max(1, memory_limit(model.device, max_memory) // (row * rows_per_prompt))
    unpatched: list[dict[Side, Tensor]] = []
    for chunk in tqdm(pairs.chunks(size), desc=title, unit="batch", disable=not progress, leave=False):
        logits = {s: logits_at(model, chunk.tokens(s), chunk.read_at, chunk.hooks(s)) for s in SIDES}
        unpatched.append(
            {s: torch.stack([m(logits[s], chunk, logits["clean"]) for m in sheet.metrics]).cpu() for s in SIDES}
        )
        found = []
        for side in BASES[sheet.direction]:
            # the effect of going from this run to the other one, counted from corrupt to clean where both ways are asked for
            sign = -1 if len(BASES[sheet.direction]) > 1 and side == "clean" else 1
            found.append({name: sign * value for name, value in one_way(chunk, side).items()})
        sheet.add_at_hooks(found, chunk, unpatched[-1])
    clean, corrupt = (torch.cat([u[side] for u in unpatched], 1) for side in SIDES)
    return clean, corrupt


def graph_bytes_per_token(cfg: ModelConfig, n_positions: int) -> int:
    """Numbers that a graph keeps per token, roughly: streams, queries to mixes, scores and patterns, neurons."""
    heads = (3 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head + 4 * cfg.n_heads * n_positions
    return cfg.n_layers * (8 * cfg.d_model + heads + 5 * cfg.d_mlp)


@dataclass(frozen=True)
class _Moved:
    """The base run of some pairs from layer `layer` on, in rows [site, group, step, prompt] with one site moved in each."""

    model: Transformer
    pairs: PromptPairs  # one per row
    layer: int
    resid: Float[Tensor, "row position d_model"]
    starts: dict[str, int]  # by hook name: the site's first row

    def logits(self, values: dict[str, Tensor], rules: Rules) -> Float[Tensor, "row d_vocab"]:
        """values: by hook name, what the site is in its rows."""

        def replacing(name: str, value: Tensor):
            start, end = self.starts[name], self.starts[name] + len(value)
            return name, lambda own, hook: torch.cat([own[:start], value, own[end:]])

        model, resid, places = self.model, self.resid, self.model.places(self.resid.shape[1])
        with model.hooks(fwd_hooks=[replacing(name, value) for name, value in values.items()]):
            for block in model.blocks[self.layer :]:
                resid = block(resid, places, rules)
        return model.unembed_resid(resid[torch.arange(len(resid), device=resid.device), self.pairs.read_at], rules)


class _SitePaths:
    """Rows of one way (base run `side`, towards the other) for one layer after the other."""

    def __init__(self, model: Transformer, pairs: PromptPairs, sheet: ScoreSheet, side: Side, groups: int):
        self.model, self.pairs, self.sheet, self.side = model, pairs, sheet, side
        self.masks = position_groups(pairs, groups)
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
        hooks = list(sheet.hooks)
        self.base = record(model, pairs.tokens(side), [*hooks, *streams], pairs.hooks(side), copy=False)
        source = record(model, pairs.tokens(other_side(side)), hooks, pairs.hooks(other_side(side)), copy=False)
        self.change = {name: source[name] - self.base[name] for name in hooks}

    def layers(self) -> Iterator[tuple[int, dict[str, Site]]]:
        """Each layer with its sites by hook name."""
        for layer in range(self.model.cfg.n_layers):
            yield layer, {grid.site.hook(layer): grid.site for grid in self.sheet.grids}

    def mask(self, site: Site, value: Tensor) -> Bool[Tensor, "group prompt ..."]:
        """Which places of a site move in each group, to multiply its values with."""
        shape = [1] * value.ndim
        shape[0], shape[site.position_axis] = self.masks.shape[1:]
        return self.masks.reshape(len(self.masks), *shape)

    def moved(self, name: str, site: Site, share: float) -> Float[Tensor, "row ..."]:
        """The site in the rows [group, prompt], `share` of the way moved."""
        return (self.base[name] + share * self.change[name] * self.mask(site, self.change[name])).flatten(0, 1)

    def rows(self, layer: int, names: Sequence[str], per_site: int) -> _Moved:
        """`per_site` times [group, prompt] rows of every site."""
        copies = per_site * len(self.masks)
        resid = self.base[f"blocks.{layer}.hook_resid_pre"]
        starts = {name: i * copies * len(self.pairs) for i, name in enumerate(names)}
        everyone = torch.arange(len(self.pairs), device=resid.device).repeat(copies * len(names))
        return _Moved(self.model, self.pairs.take(everyone), layer, resid[everyone], starts)

    def scores(self, site: Site, name: str, gradient: Float[Tensor, "group prompt ..."]) -> Float[Tensor, "prompt ..."]:
        """Gradient times change, every place from the group in which it moves."""
        return contract(site, (gradient * self.mask(site, self.change[name])).sum(0), self.change[name])


def _along_sites(
    model: Transformer,
    pairs: PromptPairs,
    sheet: ScoreSheet,
    side: Side,
    line: tuple[list[float], list[float]],
    groups: int,
) -> tuple[dict[str, Float[Tensor, "metric prompt ..."]], float]:
    """Integrated gradients of every site along its own line, and the largest completeness gap."""
    paths, (points, weights), found, gap = _SitePaths(model, pairs, sheet, side, groups), line, {}, 0.0
    clean = logits_at(model, pairs.clean, pairs.read_at)
    before = logits_at(model, pairs.tokens(side), pairs.read_at, pairs.hooks(side))
    for layer, sites in paths.layers():
        rows = paths.rows(layer, list(sites), len(points))
        leaves = {n: torch.cat([paths.moved(n, s, p) for p in points]).requires_grad_() for n, s in sites.items()}
        with torch.enable_grad():
            end = rows.logits(leaves, GRADIENT)
        with torch.no_grad():
            whole = paths.rows(layer, list(sites), 1)
            ends = whole.logits({name: paths.moved(name, site, 1.0) for name, site in sites.items()}, GRADIENT)
        found |= {name: [] for name in sites}
        for i, metric in enumerate(sheet.metrics):
            seeds = metric.multipliers(end.detach(), rows.pairs, clean.repeat(len(end) // len(pairs), 1))
            more = i < len(sheet.metrics) - 1
            gradients = torch.autograd.grad(end, list(leaves.values()), seeds.to(end.dtype), retain_graph=more)
            effect = metric(ends, whole.pairs, clean.repeat(len(ends) // len(pairs), 1))
            effect = effect.reshape(len(sites), -1, len(pairs)) - metric(before, pairs, clean)
            for (name, site), g, e in zip(sites.items(), gradients, effect, strict=True):
                g = g.reshape(len(points), len(paths.masks), *paths.base[name].shape)
                mean = sum(w * part for w, part in zip(weights, g, strict=True))
                score = paths.scores(site, name, mean)
                total = score.flatten(1).sum(1)
                gap = max(gap, float((total - e.sum(0)).abs().max()))
                found[name].append(score.cpu())
    return {name: torch.stack(scores) for name, scores in found.items()}, gap


def _site_secants(
    model: Transformer, pairs: PromptPairs, sheet: ScoreSheet, side: Side, rules: Rules, groups: int
) -> dict[str, Float[Tensor, "metric prompt ..."]]:
    paths, found = _SitePaths(model, pairs, sheet, side, groups), {}
    clean = logits_at(model, pairs.clean, pairs.read_at)
    for layer, sites in paths.layers():
        rows, recording = paths.rows(layer, list(sites), 1), rules.recording()
        copies = len(rows.pairs) // len(pairs)
        base = _Moved(model, pairs, layer, paths.base[f"blocks.{layer}.hook_resid_pre"], {})
        with torch.no_grad():
            before = base.logits({}, recording).repeat(copies, 1)
        leaves = {name: paths.moved(name, site, 1.0).requires_grad_() for name, site in sites.items()}
        with torch.enable_grad():
            end = rows.logits(leaves, recording.against(copies))
        found |= {name: [] for name in sites}
        for i, metric in enumerate(sheet.metrics):
            seeds = metric.multipliers(end.detach(), rows.pairs, clean.repeat(copies, 1), before)
            more = i < len(sheet.metrics) - 1
            gradients = torch.autograd.grad(end, list(leaves.values()), seeds.to(end.dtype), retain_graph=more)
            for (name, site), g in zip(sites.items(), gradients, strict=True):
                g = g.reshape(len(paths.masks), *paths.base[name].shape)
                found[name].append(paths.scores(site, name, g).cpu())
    return {name: torch.stack(scores) for name, scores in found.items()}


def _along_embeddings(
    model: Transformer,
    pairs: PromptPairs,
    sheet: ScoreSheet,
    side: Side,
    line: tuple[list[float], list[float]],
    groups: int,
) -> tuple[dict[str, Float[Tensor, "metric prompt ..."]], float]:
    """Gradients at every site averaged while the embeddings move, and the gap at the embeddings, where there should be none."""
    (points, weights), sites, other = line, sheet.hooks, other_side(side)
    names = [*sites, "hook_embed"]
    base = record(model, pairs.tokens(side), names, pairs.hooks(side), copy=False)
    source = record(model, pairs.tokens(other), names, pairs.hooks(other), copy=False)
    change = {name: source[name] - base[name] for name in names}
    leaf = torch.cat([base["hook_embed"] + p * change["hook_embed"] for p in points]).requires_grad_()
    reached: dict[str, Tensor] = {}
    hooks = [
        ("hook_embed", lambda value, hook: leaf),
        *((name, lambda v, hook: reached.update({hook.name: v})) for name in sites),
    ]
    rows = pairs.take(torch.arange(len(pairs), device=leaf.device).repeat(len(points)))
    clean = logits_at(model, pairs.clean, pairs.read_at)
    logits = {s: logits_at(model, pairs.tokens(s), pairs.read_at, pairs.hooks(s)) for s in SIDES}
    with torch.enable_grad():
        end = run_at(model, rows.tokens(side), rows.read_at, hooks)
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    gap = 0.0
    for i, metric in enumerate(sheet.metrics):
        seeds = metric.multipliers(end.detach(), rows, clean.repeat(len(points), 1))
        more = i < len(sheet.metrics) - 1
        wanted = [leaf, *(reached[name] for name in sites)]
        at_leaf, *gradients = torch.autograd.grad(end, wanted, seeds.to(end.dtype), retain_graph=more)
        mean = lambda g: sum(w * part for w, part in zip(weights, g.unflatten(0, (len(points), -1)), strict=True))  # noqa: E731
        for (name, site), g in zip(sites.items(), gradients, strict=True):
            found[name].append(contract(site, mean(g), change[name]).cpu())
        total = (mean(at_leaf) * change["hook_embed"]).flatten(1).sum(1)
        effect = metric(logits[other], pairs, clean) - metric(logits[side], pairs, clean)
        gap = max(gap, float((total - effect).abs().max()))
    return {name: torch.stack(scores) for name, scores in found.items()}, gap
