"""Reading the residual stream in the metric's own terms, without a backward pass through the model.

The last norm and the unembedding are linear once the norm's scale is held at its value in the run. Along that map every
write to the stream has its share of the metric (direct logit attribution; Elhage et al. 2021, "A mathematical framework
for transformer circuits"), and the same norm and unembedding can be applied to the stream after any layer (the logit lens;
nostalgebraist 2020).

    shares = direct_logit_attribution(model, pairs)             # [prompt, node]; sums to shares.metric
    lens = logit_lens(model, pairs)                             # [prompt, layer, position]
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import writers
from interp.directions import SIDES, Side
from interp.errors import MetricError, one_of
from interp.exact import Reader
from interp.grids import position_labels, without_padding
from interp.metrics import Metric, get_metric
from interp.model import tokens
from interp.model.run import canonical, logits_at, record
from interp.model.transformer import Norm, Transformer
from interp.precision import at_least_float32
from interp.provenance import provenance
from interp.rules import Rules
from interp.secants import tanh_slope
from interp.tasks.pairs import PromptPairs

FROZEN = Rules("frozen norms", norm_scale="frozen")

Direction = Float[Tensor, "prompt d_model"]


def direct_logit_attribution(
    model: Transformer, pairs: PromptPairs, *, metric: str | Callable | Metric = "logit_diff", run: Side = "clean",
    positions: bool = False, heads: bool = True, batch_size: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """Each component's share of a linear metric by what it writes at the position that is read: [prompt, node].

        share = write . d      d: the metric's weights on the logits, back through unembedding and frozen final norm

    Nodes: `input` (with learned positions), every head `a3.h2`, every MLP `m5` (with its bias), and `bias` for what no node
    owns: output biases of attention, biases of norms after attention and of the final norm, the unembedding's bias. Their
    sum is the metric of the run, which the result has as a coordinate. Unit: the metric's. A post-norm's scale is held
    too, and a soft-cap of the logits counts as its ratio tanh(u)/u at each answer.

    run: "clean" or "corrupt". positions: split what heads write by the position it was attended to: [prompt, node,
    position]; all else stands at the position that is read, and padding is NaN. heads: False adds up the heads of a layer
    as `a3`.

    Raises `MetricError` for a metric that is not linear in the logits, `UnsupportedModel` for a TransformerBridge.
    """
    canonical(model, "direct logit attribution")
    one_of(run, SIDES, "run")
    metric = linear_metric(metric, "direct logit attribution")
    found = [_shares(model, chunk, metric, run, positions, heads) for chunk in pairs.chunks(batch_size)]
    values, whole = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    nodes = writers(model.cfg)
    if not heads:
        nodes = ["input", *(f"{kind}{layer}" for layer in range(model.cfg.n_layers) for kind in "am")]
    coords = {"prompt": range(len(pairs)), "node": [*nodes, "bias"], "metric": ("prompt", whole)}
    dims = ("prompt", "node")
    if positions:
        width = range(values.shape[-1])
        dims, values = (*dims, "position"), without_padding(values, width, pairs, prompt_axis=0)
        coords |= {"position": width, "token": ("position", run_labels(model, pairs, run))}
    sign = "share of the metric: positive raises it; all nodes add up to it"
    return xr.DataArray(values, coords, dims, attrs=about("direct_logit_attribution", model, pairs, metric, run, sign))


def logit_lens(
    model: Transformer, pairs: PromptPairs, *, metric: str | Callable | Metric = "logit_diff", run: Side = "clean",
    batch_size: int | None = None,
) -> xr.DataArray:  # fmt: skip
    """The metric as the stream after every layer would have it, at every position: [prompt, layer, position].

        lens[l, t] = metric(unembed(final norm(residual stream at t after l layers)))

    Layer 0 is the embedding; the last layer at the position that is read is the metric of the run. Padding is NaN. Any
    metric, in its unit. run: "clean" or "corrupt". Raises `UnsupportedModel` for a TransformerBridge.
    """
    canonical(model, "the logit lens")
    one_of(run, SIDES, "run")
    metric = get_metric(metric)
    layers = range(model.cfg.n_layers + 1)
    found = [read_stream(model, chunk, metric, run, layers) for chunk in pairs.chunks(batch_size)]
    values, whole = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    coords = {
        "prompt": range(len(pairs)), "layer": layers, "position": range(values.shape[-1]), "metric": ("prompt", whole),
        "token": ("position", run_labels(model, pairs, run)),
    }  # fmt: skip
    sign = "the metric itself, read from the stream after this many layers"
    attrs = about("logit_lens", model, pairs, metric, run, sign)
    return xr.DataArray(values, coords, ("prompt", "layer", "position"), attrs=attrs)


@torch.no_grad()
def read_stream(
    model: Transformer, pairs: PromptPairs, metric: Metric, run: Side, layers: range
) -> tuple[Float[Tensor, "prompt layer position"], Float[Tensor, " prompt"]]:
    """The metric from the residual stream after so many layers (0: the embedding) at every token, NaN at padding; and the
    metric of the run."""
    last, shape = model.cfg.n_layers, pairs.clean.shape
    after = lambda n: f"blocks.{n}.hook_resid_pre" if n < last else f"blocks.{n - 1}.hook_resid_post"  # noqa: E731
    reader = Reader(pairs, [metric], model)
    if "clean_logits" in metric.needs:
        reader.clean_logits = logits_at(model, pairs.clean, pairs.read_at, pairs.hooks("clean"))
    stream = record(model, pairs.tokens(run), [*map(after, layers), after(last)], pairs.hooks(run), copy=False)
    at_end = stream[after(last)][torch.arange(len(pairs), device=model.device), pairs.read_at]
    whole = metric(model.unembed_resid(at_end), pairs, reader.clean_logits).cpu()
    found, at = [], pairs.is_token.nonzero(as_tuple=True)
    for layer in layers:
        read = reader.rows(stream[after(layer)][at], at[0])[0]
        found.append(torch.full(shape, torch.nan, dtype=read.dtype).masked_scatter(pairs.is_token.cpu(), read))
    return torch.stack(found, 1), whole


@torch.no_grad()
def _shares(
    model: Transformer, pairs: PromptPairs, metric: Metric, run: Side, positions: bool, heads: bool
) -> tuple[Float[Tensor, "prompt node ..."], Float[Tensor, " prompt"]]:
    """Shares in the order of the nodes, `bias` last; and the metric of the run."""
    cfg, read = model.cfg, (torch.arange(len(pairs), device=model.device), pairs.read_at)
    final, first = f"blocks.{cfg.n_layers - 1}.hook_resid_post", "blocks.0.hook_resid_pre"
    inner = ("attn.hook_z", "hook_mlp_out", *(("attn.hook_pattern", "attn.hook_v") if positions else ()))
    names = [first, final, *(f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in inner)]
    values = record(model, pairs.tokens(run), names, pairs.hooks(run), copy=False)
    whole = metric(model.unembed_resid(values[final][read]), pairs)
    direction, bias = _final_direction(model, values[final][read], metric, pairs)

    def here(share: Float[Tensor, " prompt"]) -> Tensor:
        """A share that belongs to the position that is read."""
        if not positions:
            return share
        everywhere = share.new_zeros(pairs.clean.shape)
        everywhere[read] = share
        return everywhere

    at_end = lambda name: (at_least_float32(values[name][read]) * direction).sum(-1)  # noqa: E731
    shares = [here(at_end(first))]
    for layer, block in enumerate(model.blocks):
        attn, path = block.attn, f"blocks.{layer}"
        z, into = values[f"{path}.attn.hook_z"][read], direction
        if cfg.post_norm:
            into, share = _through(block.ln1_post, attn.output(z), direction)
            bias = bias + share
        if attn.b_O is not None:
            bias = bias + into @ attn.b_O.to(into.dtype)
        by_head = torch.einsum("hed,bd->bhe", attn.W_O.to(into.dtype), into)  # what a channel of z is worth
        if positions:
            v = values[f"{path}.attn.hook_v"].repeat_interleave(cfg.group_size, 2).to(into.dtype)
            pattern = values[f"{path}.attn.hook_pattern"].transpose(1, 2)[read].to(into.dtype)
            of_heads = pattern * torch.einsum("bkhe,bhe->bhk", v, by_head)
        else:
            of_heads = (z.to(into.dtype) * by_head).sum(-1)
        shares += of_heads.unbind(1) if heads else [of_heads.sum(1)]
        shares.append(here(at_end(f"{path}.hook_mlp_out")))
    return torch.stack([*shares, here(bias)], 1), whole


def _final_direction(
    model: Transformer, resid: Direction, metric: Metric, pairs: PromptPairs
) -> tuple[Direction, Float[Tensor, " prompt"]]:
    """What the metric reads from the final residual stream, and from the biases behind it."""
    cfg, unembed = model.cfg, model.unembed
    weights = metric.weights(pairs, cfg.d_vocab)
    answers = weights.any(0).nonzero()[:, 0]
    weights, bias = weights[:, answers] * cfg.logit_scale, None if unembed.b_U is None else unembed.b_U[answers]
    if cfg.logit_softcap is not None:
        logits = F.linear(model.ln_final(resid), unembed.W_U.T[answers], bias) * cfg.logit_scale / cfg.logit_softcap
        weights = weights * tanh_slope(logits.double(), torch.zeros_like(weights))
    direction = (weights @ unembed.W_U.T[answers].double()).to(torch.promote_types(resid.dtype, torch.float32))
    before, share = _through(model.ln_final, resid, direction)
    return before, share if bias is None else share + (weights @ bias.double()).to(share.dtype)


def _through(norm: Norm, x: Direction, direction: Direction) -> tuple[Direction, Float[Tensor, " prompt"]]:
    """A direction behind a norm as one before it, with the scale that x has; and its share of the norm's bias."""
    with torch.enable_grad():
        x = at_least_float32(x.detach()).requires_grad_()
        (before,) = torch.autograd.grad(norm(x, FROZEN), x, direction)
    return before, direction.new_zeros(len(direction)) if norm.b is None else direction @ norm.b.to(direction.dtype)


# ------------------------------------------------------------------------ shared with other analyses of single runs


def linear_metric(metric: str | Callable | Metric, what: str) -> Metric:
    """The metric, if it is a weighted sum of logits; `MetricError` otherwise."""
    metric = get_metric(metric)
    if not metric.linear:
        raise MetricError(
            f"{what} shares out a metric that is linear in the logits, such as logit_diff, which {metric.name} is not"
        )
    return metric


def about(
    method: str, model: Transformer, pairs: PromptPairs, metric: Metric, run: Side, sign: str, **more: str | int
) -> dict[str, str | int]:
    """Attributes of a result that explains a single run."""
    what = {"metric": metric.name, "unit": metric.unit, "run": run, "sign": sign}
    return {"method": method, **more, **what, **provenance(model, pairs)}


def run_strings(model: Transformer, pairs: PromptPairs, run: Side) -> tuple[tuple[str, ...], ...]:
    """The text of each token of the clean or the corrupt prompts."""
    if run == "clean" and pairs.token_strings is not None:
        return pairs.token_strings
    ids = [row[:length] for row, length in zip(pairs.tokens(run).tolist(), pairs.lengths.tolist(), strict=True)]
    return tuple(tuple(tokens.token_strings(model.tokenizer, row)) for row in ids)


def run_labels(model: Transformer, pairs: PromptPairs, run: Side) -> list[str]:
    """Labels of the positions, from that run's own tokens."""
    shown = replace(pairs, token_strings=run_strings(model, pairs, run))
    return position_labels(shown, range(pairs.clean.shape[1]))
