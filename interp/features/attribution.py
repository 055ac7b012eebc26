"""Which latents carry a behaviour: every latent and error term scored from one backward pass, and exact patching of any of them.

At an SAE's hook a = sum_i c_i w_i + (all else), c_i being the code in the scale of the data; all else is the error node.
With m, what a backward pass delivers at the hook (the gradient, or another rule set's slopes: `interp.rules`),

    score_i = (c_i,source - c_i,base) <m, w_i>      score_error = <m, a_source - a_base> - sum_i score_i

so that latents and error of one hook add up to the score of the activation itself (`attribution`). Sparse feature circuits
(Marks et al. 2403.19647) use m = gradient, or its mean along the line from base to source (`steps`: integrated gradients of the
hook by itself). Exact: `feature_patching` sets c_i to its source value and runs the model.

Nodes are called `blocks.2.hook_resid_post.f17` and `blocks.2.hook_resid_post.error`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import BASES, SIDES, Direction, Side, metric_attrs, other_side
from interp.errors import OptionError, RulesError, SiteError, one_of
from interp.features.sae import SAE
from interp.features.splice import place_saes
from interp.metrics import Metric, get_metric
from interp.model.run import canonical, logits_at, record, run_at
from interp.node_attribution import GRADIENT_POINTS, backward_scores, gradient_points
from interp.paths import quadrature_points
from interp.precision import at_least_float32
from interp.provenance import provenance
from interp.rules import Rules, get_rules
from interp.sites import SITES, Site
from interp.tasks.pairs import PromptPairs

ERROR = -1  # the error node's number among latents
ROWS = 1024  # patched prompts in one forward pass


@dataclass(frozen=True)
class Split:
    """An activation at an SAE's hook as codes in the scale of the data and what it is: a = sum_i c_i w_i + all else."""

    codes: Float[Tensor, "prompt position latent"]
    value: Float[Tensor, "prompt position d"]


def place_of(hook: str, sae: SAE) -> str:
    """The hook that latents write to: the SAE's own, or a transcoder's target."""
    return sae.config.target_hook or hook


def node_name(hook: str, latent: int) -> str:
    """`blocks.2.hook_resid_post.f17`, or `....error`."""
    return f"{hook}.error" if latent == ERROR else f"{hook}.f{latent}"


def layer_of(place: str) -> int:
    """The layer of a hook point. Raises `SiteError` for one outside the layers."""
    number = place.split(".")[1:2]
    if not place.startswith("blocks.") or not number[0].isdigit():
        raise SiteError(f"{place} is in no layer: latents are patched within layers")
    return int(number[0])


def parse_feature(name: str, saes: Mapping[str, SAE]) -> tuple[str, int]:
    """(hook, latent) of a node's name. Raises `SiteError` naming what does not exist."""
    hook, _, last = name.rpartition(".")
    if hook not in saes:
        raise SiteError(f"{name!r} is not a latent of the SAEs at {', '.join(saes)}")
    if last == "error":
        return hook, ERROR
    if not (last[:1] == "f" and last[1:].isdigit()):
        raise SiteError(f"{name!r} does not name a latent: write {hook}.f17, or {hook}.error")
    if int(last[1:]) >= saes[hook].config.d_sae:
        raise SiteError(f"the SAE at {hook} has latents 0 to {saes[hook].config.d_sae - 1}, not {last[1:]}")
    return hook, int(last[1:])


@torch.no_grad()
def split_activation(
    sae: SAE, x: Float[Tensor, "prompt position ..."], value: Float[Tensor, "prompt position ..."]
) -> Split:
    """Codes of x, in the scale of the data, beside the activation that they are part of."""
    flat = x.flatten(2).flatten(0, 1).to(sae.dtype)
    factor = sae.normalize(flat)[1][0]
    codes = sae.codes(flat).dense() * factor
    return Split(codes.unflatten(0, x.shape[:2]), value.flatten(2).to(sae.dtype))


def splits(model, pairs: PromptPairs, saes: Mapping[str, SAE], side: Side) -> dict[str, Split]:
    """Every SAE's part of a run. Raises `SiteError` where one writes outside the layers."""
    for hook, sae in saes.items():
        layer_of(place_of(hook, sae))
    wanted = {place for hook, sae in saes.items() for place in (hook, place_of(hook, sae))}
    values = record(model, pairs.tokens(side), sorted(wanted), pairs.hooks(side), copy=False)
    return {hook: split_activation(sae, values[hook], values[place_of(hook, sae)]) for hook, sae in saes.items()}


def feature_attribution(
    model, pairs: PromptPairs, saes: Mapping[str, SAE] | SAE, *, rules: str | Rules = "gradient", steps: int | None = None,
    metric: str | Metric = "logit_diff", direction: Direction = "denoise", at: Literal["base", "source", "both"] = "base",
    positions: Literal["each", "all"] = "all", batch_size: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """Estimated effect of patching every latent and every error term: [prompt, node], or [prompt, position, node].

    saes: by hook name, or one that knows its hook; transcoders are scored where they write. rules, direction, at, metric: as
    `attribution`'s. steps: integrate the gradient along the line of each hook by itself, at so many Gauss-Legendre points.
    positions: "all" sums over a prompt's tokens; padding scores NaN in "each".
    """
    one_of(at, GRADIENT_POINTS, "gradient point")
    one_of(positions, ("each", "all"), "way to treat positions")
    one_of(direction, BASES, "direction")
    canonical(model, "Attribution of latents")
    rules, metric, saes = get_rules(rules), get_metric(metric), place_saes(model, saes)
    rules.check(model)
    if steps is not None and rules.name != "gradient":
        raise RulesError(f"integrated gradients are gradients' mean; with rules {rules.name!r} leave steps out")
    found: list[np.ndarray] = []
    unpatched: dict[Side, list[Tensor]] = {side: [] for side in SIDES}
    for chunk in pairs.chunks(batch_size):
        parts = {side: splits(model, chunk, saes, side) for side in SIDES}
        logits = {s: logits_at(model, chunk.tokens(s), chunk.read_at, chunk.hooks(s)) for s in SIDES}
        for side in SIDES:
            unpatched[side].append(metric(logits[side], chunk, logits["clean"]).cpu())
        if steps is None:
            points = gradient_points(rules, direction, at)
            multipliers = [_multipliers(model, chunk, saes, metric, rules, side) for side in points]
        else:
            multipliers = [
                _integrated(model, chunk, saes, parts, metric, side, steps, logits) for side in BASES[direction]
            ]
        mean = {hook: sum(m[hook] for m in multipliers) / len(multipliers) for hook in saes}
        scores = [_scores(saes[hook], parts["clean"][hook], parts["corrupt"][hook], mean[hook]) for hook in saes]
        every = torch.cat(scores, -1) * (-1 if direction == "noise" else 1)
        inside = chunk.is_token[..., None]
        every = every.masked_fill(~inside, 0.0).sum(1) if positions == "all" else every.masked_fill(~inside, torch.nan)
        found.append(at_least_float32(every).cpu().numpy())
    names = [node_name(hook, i) for hook, sae in saes.items() for i in (*range(sae.config.d_sae), ERROR)]
    dims = ("prompt", "node") if positions == "all" else ("prompt", "position", "node")
    attrs = {
        "method": "feature attribution", "rules": rules.name, "gradient_at": "path" if steps else at, "steps": steps or 0,
        "direction": direction, "positions": positions, "normalized": 0, **metric_attrs([metric], direction),
        **provenance(model, pairs),
    }  # fmt: skip
    coords = {"node": names, **{f"metric_{s}": ("prompt", torch.cat(unpatched[s]).numpy()) for s in SIDES}}
    return xr.DataArray(np.concatenate(found), dims=dims, coords=coords, attrs=attrs, name="feature_attribution")


def _scores(sae: SAE, clean: Split, corrupt: Split, m: Tensor) -> Float[Tensor, "prompt position node"]:
    """Scores of going from corrupt to clean: every latent's, and the error's, which completes the activation's."""
    m = m.to(clean.value)
    latents = (clean.codes - corrupt.codes) * (m @ sae.W_dec.T)
    whole = (m * (clean.value - corrupt.value)).sum(-1, keepdim=True)
    return torch.cat([latents, whole - latents.sum(-1, keepdim=True)], -1)


def _site(hook: str) -> Site:
    """The site of a hook name; for a place that has none, an address of its own."""
    layer = layer_of(hook)
    return next((site for site in SITES.values() if site.hook(layer) == hook), Site("hook", hook))


def _multipliers(
    model, pairs: PromptPairs, saes: Mapping[str, SAE], metric: Metric, rules: Rules, side: Side
) -> dict[str, Tensor]:
    """What the backward pass through one run delivers at every SAE's place."""
    sites = {place_of(hook, sae): _site(place_of(hook, sae)) for hook, sae in saes.items()}
    if cut := [place for place, site in sites.items() if not rules.reaches(site.name)]:
        raise RulesError(f"rules {rules.name!r} freeze the attention pattern, so no score reaches {cut[0]}")
    found = backward_scores(
        model, pairs, sites, [metric], rules=rules, side=side, reduce=lambda site, g, change: g
    ).scores
    sign = 1 if side == "corrupt" else -1  # backward_scores counts from corrupt to clean
    return {hook: sign * found[place_of(hook, sae)][0].flatten(2).to(model.device) for hook, sae in saes.items()}


def _integrated(
    model,
    pairs: PromptPairs,
    saes: Mapping[str, SAE],
    parts: dict,
    metric: Metric,
    side: Side,
    steps: int,
    logits: dict,
) -> dict[str, Tensor]:
    """Mean gradient at each place while it moves by itself from the run `side` to the other."""
    points, weights = quadrature_points(steps, "gauss")
    rows = pairs.take(torch.arange(len(pairs), device=pairs.clean.device).repeat(steps))
    result = {}
    for hook, sae in saes.items():
        base, source = parts[side][hook].value, parts[other_side(side)][hook].value
        leaf = torch.cat([base + p * (source - base) for p in points]).to(model.dtype).requires_grad_()
        place = place_of(hook, sae)
        with torch.enable_grad():
            end = run_at(model, rows.tokens(side), rows.read_at,
                         [*rows.hooks(side), (place, lambda value, hook, leaf=leaf: leaf.reshape(value.shape))])  # fmt: skip
        seeds = metric.multipliers(end.detach(), rows, logits["clean"].repeat(steps, 1))
        (g,) = torch.autograd.grad(end, [leaf], seeds.to(end.dtype))
        result[hook] = sum(w * part for w, part in zip(weights, g.unflatten(0, (steps, -1)), strict=True))
    return result


@torch.no_grad()
def feature_patching(
    model, pairs: PromptPairs, saes: Mapping[str, SAE] | SAE, nodes: Sequence[str], *, metric: str | Metric = "logit_diff",
    direction: Direction = "denoise", positions: Literal["each", "all"] = "all",
) -> xr.DataArray:  # fmt: skip
    """Exact effect of patching latents and error terms one at a time: [prompt, node], or [prompt, position, node].

    A node's code takes its value in the other run, at one position or at all; later layers are computed again. Many nodes share
    a forward pass. Nodes whose code is the same in both runs have effect 0.
    """
    canonical(model, "Patching of latents")
    one_of(direction, BASES, "direction")
    one_of(positions, ("each", "all"), "way to treat positions")
    saes, metric = place_saes(model, saes), get_metric(metric)
    if not nodes:
        raise OptionError("there are no nodes to patch")
    parsed = [parse_feature(name, saes) for name in nodes]
    parts = {side: splits(model, pairs, saes, side) for side in SIDES}
    logits = {s: logits_at(model, pairs.tokens(s), pairs.read_at, pairs.hooks(s)) for s in SIDES}
    unpatched = {s: metric(logits[s], pairs, logits["clean"]) for s in SIDES}
    width = pairs.clean.shape[1]
    total = torch.zeros(len(nodes), 1 if positions == "all" else width, len(pairs), dtype=unpatched["clean"].dtype)
    for side in BASES[direction]:
        sign = -1 if len(BASES[direction]) > 1 and side == "clean" else 1
        for hook, sae in saes.items():
            mine = [i for i, (at, _) in enumerate(parsed) if at == hook]
            if mine:
                base, source = parts[side][hook], parts[other_side(side)][hook]
                found = _patched(model, pairs, place_of(hook, sae), sae, [parsed[i][1] for i in mine], side, base, source,
                                 metric, logits, unpatched[side], positions)  # fmt: skip
                total[mine] += sign * found / len(BASES[direction])
    values = total.permute(2, 1, 0)
    values = values[:, 0] if positions == "all" else values.masked_fill(~pairs.is_token.cpu()[..., None], torch.nan)
    dims = ("prompt", "node") if positions == "all" else ("prompt", "position", "node")
    attrs = {"method": "feature patching", "direction": direction, "positions": positions, "normalized": 0,
             **metric_attrs([metric], direction), **provenance(model, pairs)}  # fmt: skip
    coords = {"node": list(nodes), **{f"metric_{s}": ("prompt", unpatched[s].cpu().numpy()) for s in SIDES}}
    return xr.DataArray(values.numpy(), dims=dims, coords=coords, attrs=attrs, name="feature_patching")


def _patched(
    model, pairs: PromptPairs, place: str, sae: SAE, latents: list[int], side: Side, base: Split, source: Split,
    metric: Metric, logits: dict, unpatched: Float[Tensor, " prompt"], positions: str,
) -> Float[Tensor, "node spot prompt"]:  # fmt: skip
    """What the metric gains where one node is changed per row, at all positions or at one: rows [node, position, prompt]."""
    codes, width = source.codes - base.codes, pairs.clean.shape[1]
    spots = torch.eye(width, dtype=torch.bool, device=codes.device)[:, None, :] if positions == "each" else None
    n_spots = 1 if spots is None else width
    layer = layer_of(place)
    start = f"blocks.{layer}.hook_resid_pre"
    resid = record(model, pairs.tokens(side), [start], pairs.hooks(side), copy=False)[start]
    everything = source.value - base.value - codes @ sae.W_dec
    found = []
    for at in range(0, len(latents), max(1, ROWS // (len(pairs) * n_spots))):
        some = latents[at : at + max(1, ROWS // (len(pairs) * n_spots))]
        change = torch.stack([everything if i == ERROR else codes[..., i, None] * sae.W_dec[i] for i in some])[:, None]
        change = change if spots is None else change * spots[None, ..., None]
        flat = change.flatten(0, 2).to(resid.dtype)
        effects = torch.zeros(len(flat), dtype=unpatched.dtype)
        found.append(effects.view(len(some), n_spots, len(pairs)))
        moves = flat.flatten(1).any(1).nonzero()[:, 0]  # most latents are silent in most places: no run, and exactly 0
        if not len(moves):
            continue
        rows, flat = moves % len(pairs), flat[moves]

        def shift(value: Tensor, hook: Any, flat: Tensor = flat) -> Tensor:
            return value + flat.reshape(value.shape)

        out, places = resid[rows], model.places(width)
        with model.hooks(fwd_hooks=[(place, shift)]):
            for block in model.blocks[layer:]:
                out = block(out, places, get_rules("gradient"))
        repeated = pairs.take(rows)
        end = model.unembed_resid(out[torch.arange(len(rows), device=out.device), repeated.read_at])
        effects[moves.cpu()] = (metric(end, repeated, logits["clean"][rows]) - unpatched[rows]).cpu()
    return torch.cat(found)
