"""How much of a run's metric each of its own tokens accounts for.

A backward pass by relevance rules (`interp.rules`) hands the metric back through the run until it arrives at the input of
the first layer, where every position keeps its share. Rules that compare two runs share out the difference of the metric
instead. What a rule set loses on the way, to biases or to a softmax, is not hidden: it is the result's `residual`.

    relevance = token_relevance(model, pairs, rules="relp-frozen-attention")         # [prompt, position]
    relevance.sum("position") + relevance.residual                                   # relevance.metric
"""

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import SIDES, Side, other_side
from interp.errors import OptionError, one_of
from interp.grids import without_padding
from interp.lens import about, linear_metric, read_stream, run_strings
from interp.metrics import Metric, get_metric
from interp.model import ops
from interp.model.config import Rotary
from interp.model.run import Hooks, canonical, logits_at, record, run_at
from interp.model.transformer import Transformer
from interp.precision import at_least_float32
from interp.rules import Rules, get_rules
from interp.sheet import contract
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs

_INPUT = "blocks.0.hook_resid_pre"


def token_relevance(
    model: Transformer, pairs: PromptPairs, *, rules: str | Rules = "attnlrp", metric: str | Callable | Metric = "logit_diff",
    run: Side = "clean", absolute_positions: bool = False, batch_size: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """Relevance of every token of one run for that run's metric: [prompt, position], in the metric's unit.

        R_t = sum over d of x_t,d m_t,d       x: input of layer 0, learned positions included; m: what arrives there
        residual = metric - sum over t of R_t

    With rules that compare two runs ("secant"), x is the run's input less the other run's, and the relevance is that of
    metric(run) - metric(other run), which secants share out without a residual.

    rules: as in `attribution`; "gradient" gives gradient x input. Those that leave half of a rotation to the position
        (PA-LRP, Bakish et al. 2506.02138) add, for every rotary layer, the half that queries' and keys' rotations keep at
        their position.
    absolute_positions: add that half as the paper does: its size, by layer and by table (cos and sin), over queries and
        keys of all heads. Sums then mean little.

    Coordinates: `token` [prompt, position] (each prompt's own), `metric` and `residual` [prompt], and with two runs
    `metric_other`. Padding is NaN. Raises `RulesError` where the rules cannot be followed, `UnsupportedModel` for a
    TransformerBridge, `MetricError` where a metric has no gradient or no secant.
    """
    canonical(model, "token relevance")
    one_of(run, SIDES, "run")
    rules, metric = get_rules(rules), get_metric(metric)
    rules.check(model)
    if absolute_positions and rules.rotation != "half":
        raise OptionError(
            f"rules {rules.name!r} leave nothing to positions: absolute_positions goes with rotation=half"
        )
    found = [_relevance(model, chunk, rules, metric, run, absolute_positions) for chunk in pairs.chunks(batch_size)]
    relevance, whole, other = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    explained = f"metric({run}) - metric({other_side(run)})" if rules.needs_source else f"metric({run})"
    more = {"metric_other": ("prompt", other)} if rules.needs_source else {}
    sign = f"share of {explained}: positive means the token raises it"
    attrs = about(
        "token_relevance", model, pairs, metric, run, sign, rules=rules.name, switches=str(rules.settings()),
        gradient_at="between the runs" if rules.symmetric else run, absolute_positions=int(absolute_positions),
    )  # fmt: skip
    residual = whole - other - relevance.sum(1)
    return _by_token(
        model, pairs, run, relevance, attrs, metric=("prompt", whole), residual=("prompt", residual), **more
    )


def norm_x_logit(
    model: Transformer, pairs: PromptPairs, *, metric: str | Callable | Metric = "answer_logit", run: Side = "clean",
    batch_size: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """NormXLogit (Abbasi et al. 2411.16252): [prompt, position], without a backward pass.

        score_t = |embedding of token t| * metric(unembed(final norm(residual stream at t after the last layer)))

    The norm is the 2-norm of the token's embedding as the model scales it, without learned positions. Padding is NaN.
    Raises `MetricError` for a metric that is not linear in the logits, `UnsupportedModel` for a TransformerBridge.
    """
    canonical(model, "NormXLogit")
    one_of(run, SIDES, "run")
    metric = linear_metric(metric, "NormXLogit")
    last, found = model.cfg.n_layers, []
    for chunk in pairs.chunks(batch_size):
        embedding = record(model, chunk.tokens(run), ["hook_embed"], chunk.hooks(run))["hook_embed"]
        logits, whole = read_stream(model, chunk, metric, run, range(last, last + 1))
        found.append((at_least_float32(embedding).norm(dim=-1).cpu() * logits[:, 0], whole))
    values, whole = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    sign = "the metric read at the token's own position times a norm"
    attrs = about("norm_x_logit", model, pairs, metric, run, sign)
    return _by_token(model, pairs, run, values, attrs, metric=("prompt", whole))


def _by_token(
    model: Transformer, pairs: PromptPairs, run: Side, values: Float[np.ndarray, "prompt position"], attrs: dict, **coords
) -> xr.DataArray:  # fmt: skip
    width = range(values.shape[1])
    tokens = [[*row, *[""] * (len(width) - len(row))] for row in run_strings(model, pairs, run)]
    axes = {"prompt": range(len(pairs)), "position": width, "token": (("prompt", "position"), tokens)}
    values = without_padding(values, width, pairs, prompt_axis=0)
    return xr.DataArray(values, axes | coords, ("prompt", "position"), attrs=attrs)


def _relevance(
    model: Transformer, pairs: PromptPairs, rules: Rules, metric: Metric, side: Side, absolute: bool
) -> tuple[Float[Tensor, "prompt position"], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Relevance, the metric of this run, and the metric of the other run if the rules compare them, else 0."""
    other, cfg = other_side(side), model.cfg
    halved = rules.rotation == "half" and rules.reaches("q")
    rotary = [layer for layer in range(cfg.n_layers) if halved and cfg.rotary[layer] is not None]
    names = [_INPUT, *(name for layer in rotary for name in _rotated(layer).values())]
    recording = rules.recording() if rules.needs_source else None
    there: dict[str, Tensor] = {}
    here: dict[str, Tensor] = {}

    def keep(value: Tensor, hook) -> None:
        there[hook.name] = value

    def watch(value: Tensor, hook) -> Tensor:
        here[hook.name] = value.detach().requires_grad_() if hook.name == _INPUT else value
        return here[hook.name]

    def run(of: Side, hook: Callable, bound: Rules) -> Float[Tensor, "prompt d_vocab"]:
        hooks: Hooks = [*pairs.hooks(of), *((name, hook) for name in names)]
        return run_at(model, pairs.tokens(of), pairs.read_at, hooks, rules=bound)

    logits: dict[Side, Tensor] = {}
    if recording is not None:
        with torch.no_grad():
            logits[other] = run(other, keep, recording)
    with torch.enable_grad():
        end = run(side, watch, rules if recording is None else recording.against())
    logits[side] = end.detach()
    if "clean_logits" in metric.needs and "clean" not in logits:
        logits["clean"] = logits_at(model, pairs.clean, pairs.read_at, pairs.hooks("clean"))
    clean = logits.get("clean")
    weights = metric.multipliers(logits[side], pairs, clean, logits.get(other) if recording else None)
    gradients = dict(zip(here, torch.autograd.grad(end, list(here.values()), weights.to(end.dtype)), strict=True))
    changes = {name: value.detach() - there[name] if there else value.detach() for name, value in here.items()}
    relevance = contract(SITES["resid_pre"], gradients[_INPUT], changes[_INPUT])
    rotations = model.places(pairs.clean.shape[1]).rotations if rotary else {}
    for layer in rotary:
        arrived = {x: (gradients[name], changes[name]) for x, name in _rotated(layer).items()}
        relevance = relevance + _kept_by_positions(cfg.rotary[layer], rotations[cfg.rotary[layer]], arrived, absolute)
    before = metric(logits[other], pairs, clean) if recording else None
    whole = metric(logits[side], pairs, clean)
    return relevance, whole, torch.zeros_like(whole) if before is None else before


def _rotated(layer: int) -> dict[str, str]:
    """Hook points of a layer's queries and keys after their rotation."""
    return {x: f"blocks.{layer}.attn.hook_rot_{x}" for x in "qk"}


def _kept_by_positions(
    rotary: Rotary, tables: tuple[Tensor, Tensor], arrived: dict[str, tuple[Tensor, Tensor]], absolute: bool
) -> Float[Tensor, "prompt position"]:
    """The half of what arrives at one layer's rotated channels that its tables keep, for queries and keys together.

        rotated = x cos + quarter_turn(x) sin:  cos keeps sum(g x cos) / 2, sin keeps sum(g quarter_turn(x) sin) / 2

    arrived: of queries and of keys, (g, rotated). absolute: the size of what each table keeps.
    """
    (cos, sin), n, shares = tables, 2 * len(rotary.inv_freq), []
    for x, (g, values) in arrived.items():
        rotated = at_least_float32(values[..., :n])
        x_cos = ops.rotate(rotated, cos, -sin, rotary.pairs) * cos[:, None] / rotary.scale**2  # turned back
        shares.append([contract(SITES[x], g[..., :n], part).sum(-1) / 2 for part in (x_cos, rotated - x_cos)])
    by_table = [sum(of_table) for of_table in zip(*shares, strict=True)]
    return sum(share.abs() if absolute else share for share in by_table)
