"""Depth use: what each layer adds to the stream, and what is lost when it is skipped (Csordas et al. 2505.13898).

A sublayer (or whole layer) adds w to the stream x that stands before it. By layer, means over tokens of

    contribution = |w| / |x|         cosine = w . x / (|w| |x|)         below 0 it erases, near 0 it writes something new, above 0
                                                                         it strengthens what is there

and, with the layer left out (x goes on as it is), of the model's predictions

    change = CE_skipped - CE         kl = KL(P || P_skipped)             nats per predicted token

A low contribution is not a low effect: a norm behind may amplify it, so the two are to be read together.
"""

from collections.abc import Callable
from typing import Literal

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from interp.errors import TaskError, one_of
from interp.features.sources import Corpus
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.plots import GREY, INK, LOWERS, RAISES, finish
from interp.precision import at_least_float32

PARTS = ("attn", "mlp", "layer")
_LOGITS = 2**22  # of tokens x vocabulary that are looked at in float64 at once


@torch.no_grad()
def depth_use(model: Transformer, corpus: Corpus, *, skip_first: bool = True, batch_size: int = 8) -> xr.Dataset:
    """contribution and cosine [layer, part] of what attention, the MLP and the whole layer add to the stream.

    Each is compared with the stream that it is added to: attention and layer with resid_pre, the MLP with resid_mid (with
    resid_pre in models whose attention and MLP run side by side). What is added is taken behind a post-norm where there is one.
    A cosine with nothing counts as 0.
    skip_first: leave out first positions, whose stream is often huge. Raises `TaskError` where no token is left.
    """
    canonical(model, "depth_use")
    n_layers, counts = model.cfg.n_layers, corpus.mask(skip_first=skip_first)
    if not counts.any():
        raise TaskError(f"no token of {corpus.name} is left to look at")
    sums = {name: torch.zeros(n_layers, 3, dtype=torch.float64) for name in ("contribution", "cosine")}
    for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
        width = int(corpus.lengths[chunk].max())
        where = counts[chunk, :width].to(model.device)
        hooks = [hook for layer in range(n_layers) for hook in _uses(model, layer, where, sums)]
        model.run_with_hooks(corpus.tokens[chunk, :width].to(model.device), fwd_hooks=hooks, return_type=None)
    n = int(counts.sum())
    return xr.Dataset(
        {name: (("layer", "part"), (total / n).numpy()) for name, total in sums.items()},
        {"layer": range(n_layers), "part": list(PARTS)},
        {"model": model.cfg.name, "corpus": corpus.name, "n_tokens": n},
    )


def _uses(model: Transformer, layer: int, where: Tensor, sums: dict[str, Tensor]) -> list[tuple[str, Callable]]:
    """Hooks of one layer that add to the sums; the stream of one layer is held at a time."""
    stream: dict[str, Tensor] = {}

    def begins(value: Tensor, hook) -> None:
        stream["pre"] = stream["mid"] = at_least_float32(value[where])

    def adds(part: str, before: str, whole: bool = False) -> Callable:
        def look(value: Tensor, hook) -> None:
            x, w = stream[before], at_least_float32(value[where])
            w = w - x if whole else w
            ratio = w.norm(dim=-1) / x.norm(dim=-1)
            column = PARTS.index(part)
            sums["contribution"][layer, column] += float(ratio.double().sum())
            sums["cosine"][layer, column] += float(F.cosine_similarity(w, x, dim=-1).double().sum())

        return look

    def middle(value: Tensor, hook) -> None:
        stream["mid"] = at_least_float32(value[where])

    path = f"blocks.{layer}.hook"
    found = [(f"{path}_resid_pre", begins), (f"{path}_attn_out", adds("attn", "pre"))]
    if not model.cfg.parallel:
        found.append((f"{path}_resid_mid", middle))
    return [
        *found,
        (f"{path}_mlp_out", adds("mlp", "mid")),
        (f"{path}_resid_post", adds("layer", "pre", whole=True)),
    ]


@torch.no_grad()
def layer_skipping(
    model: Transformer, corpus: Corpus, *, part: Literal["layer", "attn", "mlp"] = "layer", batch_size: int = 8
) -> xr.Dataset:
    """change and kl [layer], nats per predicted token, when a layer (or its attention, or its MLP) adds nothing.

    attrs: loss (of the model as it is, nats per token), n_predictions. One forward pass per layer and batch; the next token of
    every position that has one is predicted, the first too. Raises `TaskError` where there is none.
    """
    canonical(model, "layer_skipping")
    one_of(part, PARTS, "part of a layer")
    there = corpus.mask(skip_first=False)
    n = int(there[:, 1:].sum())
    if not n:
        raise TaskError(f"no sequence of {corpus.name} has a token to predict")
    n_layers = model.cfg.n_layers
    loss, change, kl = 0.0, [0.0] * n_layers, [0.0] * n_layers
    for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
        width = int(corpus.lengths[chunk].max())
        tokens, places = (x[chunk, :width].to(model.device) for x in (corpus.tokens, there))
        base = model(tokens)
        for layer in range(n_layers):
            skipped = model.run_with_hooks(tokens, fwd_hooks=_skip(layer, part))
            losses = _compare(base, skipped, tokens, places[:, 1:])
            change[layer] += losses[1] - losses[0]
            kl[layer] += losses[2]
            loss += losses[0] if layer == 0 else 0.0
    return xr.Dataset(
        {"change": ("layer", [x / n for x in change]), "kl": ("layer", [x / n for x in kl])},
        {"layer": range(n_layers)},
        {"model": model.cfg.name, "corpus": corpus.name, "part": part, "loss": loss / n, "n_predictions": n},
    )


def _skip(layer: int, part: str) -> list[tuple[str, Callable]]:
    if part != "layer":
        return [(f"blocks.{layer}.hook_{part}_out", lambda value, hook: torch.zeros_like(value))]
    held: dict[str, Tensor] = {}
    return [
        (f"blocks.{layer}.hook_resid_pre", lambda value, hook: held.update(x=value)),
        (f"blocks.{layer}.hook_resid_post", lambda value, hook: held.pop("x")),
    ]


def _compare(base: Tensor, skipped: Tensor, tokens: Tensor, there: Tensor) -> tuple[float, float, float]:
    """(cross-entropy, cross-entropy of the skipping model, KL), sums over predictions."""
    totals = torch.zeros(3, dtype=torch.float64)
    for places in there.nonzero().split(max(1, _LOGITS // base.shape[2])):
        s, t = places.unbind(1)
        p, q = (logits[s, t].double().log_softmax(1) for logits in (base, skipped))
        losses = [F.nll_loss(x, tokens[s, t + 1], reduction="sum") for x in (p, q)]
        totals += torch.stack([*losses, F.kl_div(q, p, log_target=True, reduction="sum")]).cpu()
    return tuple(totals.tolist())


def depth_plot(use: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Contribution (above) and cosine (below) by layer, a line per part. use: of `depth_use`."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (name, label) in enumerate([("contribution", "|w| / |x|"), ("cosine", "cosine of w and x")], 1):
        for part, colour in zip(PARTS, (RAISES, LOWERS, INK), strict=True):
            figure.add_scatter(
                x=use["layer"].values, y=use[name].sel(part=part).values, mode="lines+markers", name=part, row=row, col=1,
                line={"color": colour}, legendgroup=part, showlegend=row == 1,
                hovertemplate=f"{part} of layer %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(title=label, row=row, col=1)
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=2, col=1)
    figure.update_xaxes(dtick=max(1, use.sizes["layer"] // 12))
    figure.update_xaxes(title="layer", row=2, col=1)
    return finish(figure, title, height=560)


def skipping_plot(skipped: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Loss change and KL by skipped layer, nats per token. skipped: of `layer_skipping`."""
    figure = go.Figure()
    for name, label, colour in (("change", "change in loss", RAISES), ("kl", "KL(P || P skipped)", LOWERS)):
        figure.add_scatter(
            x=skipped["layer"].values, y=skipped[name].values, mode="lines+markers", name=label, line={"color": colour},
            hovertemplate=f"without layer %{{x}}: {label} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    what = {"layer": "layer", "attn": "attention of layer", "mlp": "MLP of layer"}[skipped.attrs["part"]]
    figure.update_xaxes(title=f"skipped {what}", dtick=max(1, skipped.sizes["layer"] // 12))
    figure.update_yaxes(title=f"nats per token (loss as it is: {skipped.attrs['loss']:.3f})")
    return finish(figure, title, height=400)
