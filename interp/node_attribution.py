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

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import BASES, SIDES, Direction, Side, other_side
from interp.errors import PatchError, RulesError, one_of
from interp.grids import Positions
from interp.metrics import Metric
from interp.model.run import Hooks, run_at
from interp.rules import Rules, get_rules
from interp.sheet import AnyMetric, ScoreSheet, contract
from interp.sites import Site
from interp.tasks.pairs import PromptPairs

GRADIENT_POINTS = ("base", "source", "both")


def attribution(
    model, pairs: PromptPairs, sites: str | Sequence[str], *, rules: str | Rules = "gradient",
    metric: AnyMetric = "logit_diff",
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
    one_of(at, GRADIENT_POINTS, "gradient point")
    rules = get_rules(rules)
    rules.check(model)
    sheet = ScoreSheet(
        model, pairs, sites, metric=metric, direction=direction, positions=positions, neurons=neurons, normalize=normalize
    )  # fmt: skip
    zero = refuse_unreached(rules, sheet.names)
    points, sign = gradient_points(rules, direction, at), -1 if direction == "noise" else 1
    for chunk in pairs.chunks(batch_size):
        passes = [backward_scores(model, chunk, sheet.hooks, sheet.metrics, rules=rules, side=side) for side in points]
        scores = [{name: value * sign for name, value in found.scores.items()} for found in passes]
        sheet.add_at_hooks(scores, chunk, passes[0].unpatched)
    where = "between base and source" if rules.symmetric else "both" if len(points) > 1 else at
    return sheet.result(
        "attribution", rules=rules.name, switches=str(rules.settings()), gradient_at=where,
        **({"zero_by_construction": ", ".join(zero)} if zero else {}),
    )  # fmt: skip


def refuse_unreached(rules: Rules, sites: Sequence[str]) -> list[str]:
    """The sites whose scores these rules make 0, with a warning; `RulesError` if that is all of them."""
    zero = [name for name in sites if not rules.reaches(name)]
    if zero and zero == list(sites):
        raise RulesError(f"rules {rules.name!r} freeze the attention pattern, so no score reaches {', '.join(zero)}")
    if zero:
        warnings.warn(
            f"rules {rules.name!r} freeze the attention pattern: scores of {', '.join(zero)} are 0 by construction",
            stacklevel=3,
        )
    return zero


def gradient_points(rules: Rules, direction: Direction, at: str) -> tuple[Side, ...]:
    """The runs whose multipliers are averaged. Of rules that are symmetric in the two runs, any one serves."""
    base = BASES[direction][0]
    if rules.symmetric:
        return (base,)
    if len(BASES[direction]) > 1 or at == "both":
        return ("clean", "corrupt")
    return (base if at == "base" else other_side(base),)


@dataclass(frozen=True)
class Multipliers:
    """What one backward pass per metric found, on the CPU: for each hook name, m * (act_clean - act_corrupt) summed over
    the site's channels (or what else was asked for, times that sign); and the metrics of both runs."""

    scores: dict[str, Float[Tensor, "metric prompt ..."]]
    unpatched: dict[Side, Float[Tensor, "metric prompt"]]


def backward_scores(
    model, pairs: PromptPairs, sites: Mapping[str, Site], metrics: Sequence[Metric], *, rules: Rules, side: Side,
    reduce: Callable[[Site, Tensor, Tensor], Tensor] = contract,
) -> Multipliers:  # fmt: skip
    """One forward pass of each run and, through the run `side`, one backward pass per metric.

    sites: by hook name. A site that the rules cut off has score 0; one that is not reached otherwise is a `PatchError`.
    reduce: what is kept of a site's multipliers and its change; the default is their product, summed over channels.
    """
    other, sign = other_side(side), 1 if side == "corrupt" else -1
    recording = rules.recording() if rules.needs_source else None
    there: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    roots: list[Tensor] = []

    def keep(name: str):
        def hook_function(value: Tensor, hook) -> None:
            there[name] = value

        return name, hook_function

    def watch(name: str, site: Site):
        def hook_function(value: Tensor, hook) -> Tensor:
            change = there.pop(name) - value.detach()
            if rules.reaches(site.name):
                value.register_hook(lambda g: found[name].append(reduce(site, g, change)))
            else:
                found[name] = [reduce(site, torch.zeros_like(change), change)] * len(metrics)
            return value  # a TransformerBridge's hooks may see a copy, which is in the graph only if handed back

        return name, hook_function

    def cut(value: Tensor, hook) -> Tensor:
        roots.append(value.detach().requires_grad_())
        return roots[0]

    with torch.no_grad():
        hooks: Hooks = [*pairs.hooks(other), *map(keep, sites)]
        logits = {other: run_at(model, pairs.tokens(other), pairs.read_at, hooks, rules=recording)}
    with torch.enable_grad():
        hooks = [*pairs.hooks(side), ("hook_embed", cut), *(watch(*item) for item in sites.items())]
        bound = rules if recording is None else recording.against()
        end = run_at(model, pairs.tokens(side), pairs.read_at, hooks, rules=bound)
    logits[side] = end.detach()
    for metric in metrics:
        weights = metric.multipliers(logits[side], pairs, logits["clean"], logits[other] if recording else None)
        torch.autograd.grad(end, roots, weights.to(end.dtype), retain_graph=metric is not metrics[-1])
    if silent := [name for name, scores in found.items() if len(scores) != len(metrics)]:
        raise PatchError(f"no gradient arrived at {silent[0]}")
    unpatched = {s: torch.stack([metric(logits[s], pairs, logits["clean"]) for metric in metrics]).cpu() for s in SIDES}
    return Multipliers({name: sign * torch.stack(scores).cpu() for name, scores in found.items()}, unpatched)
