"""AtP*: attribution patching without its two known blind spots (Kramar et al. 2403.00745).

A saturated softmax has next to no gradient, though another query or key may turn it over; and a place that helps along one
path and harms along another may look idle where the two cancel. Hence two repairs:

* QK fix: for queries and keys the softmax is recomputed,  score = sum over the pattern of (p' - p) dM/dp
* GradDrop: one backward pass per layer l, without what layer l writes,  score = 1/(L-1) sum over l of |score_l|

    sizes = atp_star(model, pairs, ["q", "k", "head", "mlp_out"])
    signed = atp_star(model, pairs, ["q", "k", "head", "mlp_out"], grad_drop=False)
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import BASES, Direction, Side
from interp.errors import OptionError
from interp.grids import Positions
from interp.model import ops
from interp.model.run import Hooks, canonical
from interp.model.transformer import Attention, Places, Transformer
from interp.node_attribution import backward_scores
from interp.precision import at_least_float32
from interp.rules import GRADIENT
from interp.secants import sigmoid_slope
from interp.sheet import AnyMetric, ScoreSheet, at_grid
from interp.tasks.pairs import PromptPairs

Pattern = Float[Tensor, "prompt head query key"]


def atp_star(
    model: Transformer, pairs: PromptPairs, sites: str | Sequence[str], *, metric: AnyMetric = "logit_diff",
    direction: Direction = "denoise", positions: Positions = "each", neurons: Sequence[str] | None = None,
    normalize: bool = False, grad_drop: bool = True, batch_size: int | None = None,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Estimated effect of patching every place of one or several sites; of its size only, with GradDrop.

    grad_drop: the mean size over one backward pass per layer l, through which nothing flows back into what layer l's
        attention and MLP write; scores are then not negative. A place within layer l scores 0 in pass l, hence the mean
        over L - 1. False: a single backward pass, whose scores keep their sign and are `attribution`'s but for q and k.
    direction: "both" is the mean of the scores of denoising and of minus noising; with GradDrop, of their sizes.
    Other options, units and the layout of the result: as `attribution`'s. With GradDrop, normalize divides by
        |metric(clean) - metric(corrupt)|, so that sizes stay sizes.

    Raises `UnsupportedModel` for a TransformerBridge, whose attention cannot be recomputed, and `OptionError` for GradDrop in a
    model of one layer.
    """
    canonical(model, "AtP*")
    n_layers = model.cfg.n_layers
    if grad_drop and n_layers == 1:
        raise OptionError(
            f"GradDrop averages over other layers, and {model.cfg.name} has just one: use grad_drop=False"
        )
    sheet = ScoreSheet(
        model, pairs, sites, metric=metric, direction=direction, positions=positions, neurons=neurons, normalize=normalize
    )  # fmt: skip
    sign = -1 if direction == "noise" else 1
    for chunk in pairs.chunks(batch_size):
        runs = [_backward(model, chunk, sheet, side, n_layers if grad_drop else 0) for side in BASES[direction]]
        passes, unpatched = [scores for run, _ in runs for scores in run], runs[0][1]
        if not grad_drop:
            passes = [{name: sign * value for name, value in scores.items()} for scores in passes]
            sheet.add_at_hooks(passes, chunk, unpatched)
            continue
        of_gap = (unpatched["clean"] - unpatched["corrupt"]).sign()[..., None] if normalize else 1
        share = of_gap / (len(runs) * (n_layers - 1))
        # a place that is many cells together is added up before its size is taken
        sizes = [sum(at_grid(grid, scores, chunk).abs() for scores in passes) for grid in sheet.grids]
        sheet.add([share * size for size in sizes], unpatched)
    result = sheet.result(
        "atp_star", rules="gradient", gradient_at="base", grad_drop=int(grad_drop), qk="softmax recomputed"
    )
    if grad_drop:
        for array in (result, *(result.data_vars.values() if isinstance(result, xr.Dataset) else ())):
            array.attrs["aggregation"] = "mean absolute over dropped layers"
            array.attrs["sign"] = "none: the size of an estimated effect; grad_drop=False has signs"
    return result


def _backward(
    model: Transformer, pairs: PromptPairs, sheet: ScoreSheet, side: Side, n_drops: int
) -> tuple[list[dict[str, Tensor]], dict[Side, Tensor]]:
    """As `backward_scores`, with the QK fix: scores of one backward pass for every dropped layer, or of one without drops;
    and the metrics of both runs."""
    sites, n_metrics = sheet.hooks, len(sheet.metrics)
    places, hooks = model.places(pairs.clean.shape[1]), []
    fixed: dict[str, list[Tensor]] = {name: [] for name, site in sites.items() if site.name in ("q", "k")}
    for layer in range(model.cfg.n_layers):
        for write in ("attn_out", "mlp_out") if n_drops else ():
            hooks.append((f"blocks.{layer}.hook_{write}", _drop(layer, n_metrics)))
        hooks += _recompute(model.blocks[layer].attn, f"blocks.{layer}.attn", places, fixed)
    n_passes = n_drops or 1  # over one graph; they are told apart by counting
    metrics = [replace(metric) for _ in range(n_passes) for metric in sheet.metrics]
    plain = {name: site for name, site in sites.items() if name not in fixed}
    with model.hooks(fwd_hooks=hooks):
        found = backward_scores(model, pairs, plain, metrics, rules=GRADIENT, side=side)
    sign = 1 if side == "corrupt" else -1
    scores = found.scores | {name: sign * torch.stack(values).cpu() for name, values in fixed.items()}
    passes = [slice(i * n_metrics, (i + 1) * n_metrics) for i in range(n_passes)]
    unpatched = {s: values[:n_metrics] for s, values in found.unpatched.items()}
    return [{name: value[of_pass] for name, value in scores.items()} for of_pass in passes], unpatched


def _drop(layer: int, n_metrics: int):
    """A hook on what a layer writes: in its own turn, nothing flows back there."""
    passes = count()

    def stop(g: Tensor) -> Tensor | None:
        return torch.zeros_like(g) if next(passes) // n_metrics == layer else None

    def hook_function(value: Tensor, hook) -> None:
        if value.requires_grad:
            value.register_hook(stop)

    return hook_function


# ------------------------------------------------------------------------------------------------------- the QK fix


def _recompute(attn: Attention, path: str, places: Places, found: dict[str, list[Tensor]]) -> Hooks:
    """Hooks that take one layer's queries and keys from the source run and then from the base run, and when a gradient
    arrives at the pattern append the effects to what is `found` of `hook_q` and `hook_k`."""
    wanted = [name for name in ("q", "k") if f"{path}.hook_{name}" in found]
    runs: list[dict[str, Tensor]] = []  # source, base

    def keep(value: Tensor, hook) -> None:
        name = hook.name[-1]
        if name == "q":
            runs.append({})
        runs[-1][name] = value.detach()

    def watch(pattern: Tensor, hook) -> None:
        if pattern.requires_grad:
            pattern.register_hook(arrive)

    def arrive(g: Tensor) -> None:
        source, base = runs
        for name in wanted:
            found[f"{path}.hook_{name}"].append(softmax_effects(attn, name, base, source, g, places))

    return [(f"{path}.hook_q", keep), (f"{path}.hook_k", keep), (f"{path}.hook_pattern", watch)] if wanted else []


@torch.no_grad()
def softmax_effects(
    attn: Attention, name: str, base: dict[str, Float[Tensor, "prompt position _ d_head"]],
    source: dict[str, Float[Tensor, "prompt position _ d_head"]], g: Pattern, places: Places,
) -> Float[Tensor, "prompt position unit"]:  # fmt: skip
    """Sum over the pattern of (p' - p) g, for every single query (name="q") or key ("k") taken from the source run.

    base, source: queries and keys as they are projected; norm, rotation, scale, soft-cap, window and mask are the
    layer's own. A key serves all query heads of its group.
    """
    rotation = None if attn.rotary is None else places.rotations[attn.rotary]
    own, other = ({x: at_least_float32(run[x]) for x in "qk"} for run in (base, source))
    g, effects = at_least_float32(g), _of_queries if name == "q" else _of_keys

    def scores(**changed: Tensor) -> Pattern:
        q, k = (attn.place(x, (own | changed)[x], rotation, GRADIENT) for x in "qk")
        found = ops.attention_scores(q, k, scale=attn.scale, softcap=attn.cfg.attn_softcap, rules=GRADIENT)
        return found.masked_fill(places.masks[attn.window], -torch.inf)

    before, n_units = scores(), own[name].shape[2]
    if attn.cfg.qk_norm != "all":
        of_heads = effects(before, scores(**{name: other[name]}), g)
        return of_heads.unflatten(1, (n_units, -1)).sum(2).transpose(1, 2)
    found = []
    for unit in range(n_units):  # one norm over all heads: a single head's query changes all heads' scores
        changed = own[name].clone()
        changed[:, :, unit] = other[name][:, :, unit]
        found.append(effects(before, scores(**{name: changed}), g).sum(1))
    return torch.stack(found, -1)


def _of_queries(before: Pattern, after: Pattern, g: Pattern) -> Float[Tensor, "prompt head query"]:
    """A query changes its own row of the scores."""
    return ((after.softmax(-1) - before.softmax(-1)) * g).sum(-1)


def _of_keys(before: Pattern, after: Pattern, g: Pattern) -> Float[Tensor, "prompt head key"]:
    """A key changes one entry of every row that sees it, which contributes

        (p'_t - p_t) (g_t - mean of g over the other keys)

    with p_t and p'_t = sigmoid of log odds that differ by the change of the score.
    """
    p, top = before.softmax(-1), before.argmax(-1, keepdim=True)
    # of a saturated row, what is left beside its largest key cannot be had as 1 - p: it is added up without that key
    rest = before.scatter(-1, top, -torch.inf)
    log_p, log_rest = before.log_softmax(-1), torch.log1p(-p)
    log_rest = log_rest.scatter(-1, top, rest.logsumexp(-1, keepdim=True) - before.logsumexp(-1, keepdim=True))
    others = ((p * g).sum(-1, keepdim=True) - p * g) / (1 - p)
    others = others.scatter(-1, top, (rest.softmax(-1) * g).sum(-1, keepdim=True))
    odds, change = log_p - log_rest, after - before
    effect = change * sigmoid_slope(odds, odds + change) * (g - others)
    nothing = before.isneginf() | rest.isneginf().all(-1, keepdim=True)  # masked, or a row's only key
    return effect.masked_fill(nothing, 0).sum(-2)
