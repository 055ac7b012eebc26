"""A few passes instead of one: integrated gradients, and secants of one site at a time.

One backward pass between two whole runs answers for every site at once, and so cannot know that exact patching moves one
site while all others stay. Here every site gets rows of its own: the base run with that site moved, from its layer on.

    integrated_gradients(model, pairs, "mlp_out", path="activation", steps=4)      # the site's own straight line
    integrated_gradients(model, pairs, "resid_pre", steps=32)                      # the embeddings' line, as EAP-IG goes
    site_secants(model, pairs, ["resid_pre", "mlp_out"], groups=4)                 # ours: the chord of each site

Moving all positions of a site together mixes their effects up; with `groups` > 1 every position moves with each `groups`-th
neighbour only, at that many times the rows. Heads of a layer that do the same, or undo one another, share their effect when
they move together; with `each_unit` they move one by one, at as many times the rows as there are heads. A secant is exact
where only one position of one unit moves.

Integrated gradients: Sundararajan, Taly & Yan 1703.01365. The groups and the secants are ours.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.directions import BASES, SIDES, Direction, Side, other_side
from interp.errors import OptionError, RulesError, one_of
from interp.grids import Positions
from interp.model.run import canonical, logits_at, record, run_at
from interp.model.transformer import Transformer
from interp.rules import GRADIENT, Rules, get_rules
from interp.sheet import AnyMetric, ScoreSheet, contract
from interp.site_rows import SiteRows, graph_numbers_per_token, n_parts
from interp.sweep import memory_limit
from interp.tasks.pairs import PromptPairs

Line = tuple[list[float], list[float]]  # points in [0, 1] and their weights
QUADRATURES = ("gauss", "midpoint")


def integrated_gradients(
    model: Transformer, pairs: PromptPairs, sites: str | Sequence[str], *,
    path: Literal["embedding", "activation"] = "embedding", steps: int = 32,
    quadrature: Literal["gauss", "midpoint"] = "gauss", groups: int = 1, each_unit: bool = False,
    metric: AnyMetric = "logit_diff", direction: Direction = "denoise", positions: Positions = "each",
    neurons: Sequence[str] | None = None, normalize: bool = False, max_memory: int | None = None, progress: bool = False,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Scores (act_source - act_base) * mean of dM/dact over a straight line from the base run to the source run.

    path: "embedding" moves the input embeddings and reads the gradient at every site on the way; it is complete (scores sum to
        metric(source) - metric(base)) where the path is straight, at the embeddings, and not behind. "activation" moves one
        site of one layer at a time, all its units together unless each_unit, while all else stays as in the base run; its
        scores sum to the effect of patching the whole site.
    steps: points on the line, by Gauss-Legendre or midpoint quadrature; rows of one batch.
    groups, each_unit: see the module; path "activation" only.
    Other options and the result: as `attribution`'s. attrs["completeness_gap"] is the largest difference between a sum that
    should be complete and what it should be, over prompts, relative to their largest |metric(clean) - metric(corrupt)|.
    """
    one_of(path, ("embedding", "activation"), "path")
    _check_groups(groups)
    if path == "embedding" and (groups != 1 or each_unit):
        raise OptionError('groups and each_unit are for path="activation"')
    line = quadrature_points(steps, quadrature)
    sheet = ScoreSheet(
        model, pairs, sites, metric=metric, direction=direction, positions=positions, neurons=neurons, normalize=normalize
    )  # fmt: skip
    about = {"path": path, "steps": steps, "quadrature": quadrature, "groups": groups,
             "each_unit": int(each_unit), "rules": "gradient", "gradient_at": "path"}  # fmt: skip
    gaps = []

    def one_way(chunk: PromptPairs, side: Side) -> dict[str, Tensor]:
        if path == "embedding":
            scores, gap = _along_embeddings(model, chunk, sheet, side, line)
        else:
            rows = SiteRows(model, chunk, sheet, side, groups=groups, each_unit=each_unit)
            scores, gap = _along_sites(rows, line)
        gaps.append(gap)
        return scores

    parts = [n_parts(grid.site, sheet.cfg, groups, each_unit) for grid in sheet.grids]
    rows = steps * (1 if path == "embedding" else sum(parts))
    clean, corrupt = _fill(sheet, one_way, rows, max_memory, progress, "integrated gradients")
    scale = max(float((clean - corrupt).abs().max()), torch.finfo(clean.dtype).tiny)
    return sheet.result("integrated_gradients", **about, completeness_gap=max(gaps) / scale)


def site_secants(
    model: Transformer, pairs: PromptPairs, sites: str | Sequence[str], *, groups: int = 1, each_unit: bool = False,
    rules: str | Rules = "secant", metric: AnyMetric = "logit_diff", direction: Direction = "denoise",
    positions: Positions = "each", neurons: Sequence[str] | None = None, normalize: bool = False,
    max_memory: int | None = None, progress: bool = False,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Secant attribution of one site at a time: between the base run and the base run with that site of the source run.

    One forward and one backward pass over the later layers for each layer, of all sites and groups. Sums over a group's
    positions are exact, being the effect of patching them together; with one changing position per group every score is.
    groups, each_unit and the other options: see `integrated_gradients`.
    """
    rules = get_rules(rules)
    _check_groups(groups)
    if not rules.symmetric:
        raise RulesError(f"site_secants follows secant rules, not {rules.name!r}")
    sheet = ScoreSheet(
        model, pairs, sites, metric=metric, direction=direction, positions=positions, neurons=neurons, normalize=normalize
    )  # fmt: skip

    def one_way(chunk: PromptPairs, side: Side) -> dict[str, Tensor]:
        return _secants_of_sites(SiteRows(model, chunk, sheet, side, groups=groups, each_unit=each_unit), rules)

    rows = sum(n_parts(grid.site, sheet.cfg, groups, each_unit) for grid in sheet.grids)
    _fill(sheet, one_way, rows, max_memory, progress, "site secants")
    where = "between base and base with the site patched"
    return sheet.result("site_secants", rules=rules.name, gradient_at=where, groups=groups, each_unit=int(each_unit))


def quadrature_points(steps: int, kind: str) -> Line:
    """Points in [0, 1] and their weights."""
    one_of(kind, QUADRATURES, "quadrature")
    if steps < 1:
        raise OptionError(f"a path needs at least 1 step, not {steps}")
    if kind == "midpoint":
        return [(k + 0.5) / steps for k in range(steps)], [1 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _check_groups(groups: int) -> None:
    if groups < 1:
        raise OptionError(f"positions need at least 1 group, not {groups}")


def _fill(
    sheet: ScoreSheet, one_way: Callable[[PromptPairs, Side], dict[str, Tensor]], rows_per_prompt: int,
    max_memory: int | None, progress: bool, title: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill a sheet batch by batch of prompts, as many as fit into memory; the metric of both runs over all prompts."""
    model, pairs = sheet.model, sheet.pairs
    canonical(model, title.capitalize())
    row = graph_numbers_per_token(model.cfg, pairs.clean.shape[1]) * pairs.clean.shape[1] * model.W_E.element_size()
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


def _along_sites(rows: SiteRows, line: Line) -> tuple[dict[str, Float[Tensor, "metric prompt ..."]], float]:
    """Integrated gradients of every site along its own line, and the largest completeness gap."""
    (points, weights), metrics, gap = line, rows.sheet.metrics, 0.0
    found: dict[str, list[Tensor]] = {name: [] for name in rows.hooks}
    for layer in range(rows.model.cfg.n_layers):
        names = rows.names(layer)
        leaves = {name: torch.cat([rows.moved(name, p) for p in points]).requires_grad_() for name in names}
        with torch.enable_grad():
            end = rows.run(layer, leaves, GRADIENT)
        with torch.no_grad():
            whole = {name: rows.moved(name, 1.0) for name in names}
            at_end = rows.run(layer, whole, GRADIENT)
        for i, metric in enumerate(metrics):
            seeds = metric.multipliers(end.detach(), *rows.repeated(len(end)))
            gradients = torch.autograd.grad(
                end, list(leaves.values()), seeds.to(end.dtype), retain_graph=i < len(metrics) - 1
            )
            before = metric(rows.base_logits, rows.pairs, rows.clean_logits)
            effects = metric(at_end, *rows.repeated(len(at_end))).split([len(value) for value in whole.values()])
            for name, gradient, effect in zip(names, gradients, effects, strict=True):
                steps = gradient.unflatten(0, (len(points), -1))
                score = rows.scores(name, sum(w * g for w, g in zip(weights, steps, strict=True)))
                expected = (effect.unflatten(0, (-1, len(rows.pairs))) - before).sum(0)
                gap = max(gap, float((score.flatten(1).sum(1) - expected).abs().max()))
                found[name].append(score.cpu())
    return {name: torch.stack(scores) for name, scores in found.items()}, gap


def _secants_of_sites(rows: SiteRows, rules: Rules) -> dict[str, Float[Tensor, "metric prompt ..."]]:
    metrics = rows.sheet.metrics
    found: dict[str, list[Tensor]] = {name: [] for name in rows.hooks}
    for layer in range(rows.model.cfg.n_layers):
        recording = rules.recording()
        leaves = {name: rows.moved(name, 1.0).requires_grad_() for name in rows.names(layer)}
        with torch.no_grad():
            before = rows.run(layer, {}, recording)
        copies = sum(map(len, leaves.values())) // len(before)
        with torch.enable_grad():
            end = rows.run(layer, leaves, recording.against(copies))
        for i, metric in enumerate(metrics):
            seeds = metric.multipliers(end.detach(), *rows.repeated(len(end)), before.repeat(copies, 1))
            gradients = torch.autograd.grad(
                end, list(leaves.values()), seeds.to(end.dtype), retain_graph=i < len(metrics) - 1
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                found[name].append(rows.scores(name, gradient).cpu())
    return {name: torch.stack(scores) for name, scores in found.items()}


def _along_embeddings(
    model: Transformer, pairs: PromptPairs, sheet: ScoreSheet, side: Side, line: Line
) -> tuple[dict[str, Float[Tensor, "metric prompt ..."]], float]:  # fmt: skip
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
