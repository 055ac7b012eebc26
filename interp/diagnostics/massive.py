"""Massive activations and attention sinks: huge numbers in the stream, and the token that heads rest on.

Massive (Sun et al. 2402.17762): an entry a of the residual stream behind a layer, of a sequence's hidden state H [token,
d_model],

    |a| > floor   and   |a| >= factor * median |H|                           floor 100 and factor 1000 in the paper

They stand in few channels and on few tokens, the first one above all, hardly depend on the text, and act as biases of
attention. Sinks (Xiao et al. 2309.17453): with A[t, s] what query t puts on key s, the share that a position p gets from the
queries behind it

    sink = mean over t > p of A[t, p]                                      by layer and head; an even look gives mean 1 / (t + 1)

A head that rests there adds little: the sink's value is short beside others'. Both are of first tokens, which most analyses
skip.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from torch import Tensor

from interp.errors import OptionError, TaskError
from interp.features.sources import Corpus
from interp.model.run import canonical
from interp.model.tokens import token_strings
from interp.model.transformer import Transformer
from interp.plots import GREY, INK, RAISES, finish
from interp.precision import at_least_float32


@torch.no_grad()
def massive_activations(
    model: Transformer, corpus: Corpus, *, floor: float = 100.0, factor: float = 1000.0, k: int = 10, batch_size: int = 8
) -> pd.DataFrame:  # fmt: skip
    """The k largest entries of the residual stream behind each layer, in a corpus, and which of them are massive.

    floor: in the stream's unit; factor: of the median. batch_size: sequences per forward pass. Columns: layer, rank (0: the
    largest), sequence, position, token (text), token_id, channel, value (with its sign), median (of |H|, all tokens and channels
    of that sequence behind that layer), ratio (|value| / median; inf where more than half of H is 0), massive.
    Raises `OptionError` for fewer than one entry, more than a token has, or a negative bound.
    """
    canonical(model, "massive_activations")
    d_model = model.cfg.d_model
    if not 1 <= k <= d_model:
        raise OptionError(f"cannot show {k} entries of a layer: choose 1 to {d_model}, the channels of one token")
    if floor < 0 or factor < 0:
        raise OptionError(f"floor and factor are sizes, and {min(floor, factor)} is negative")
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
        width = int(corpus.lengths[chunk].max())
        padding = ~corpus.mask(skip_first=False)[chunk, :width].to(model.device)

        def keep(value: Tensor, hook, layer: int, first=int(chunk[0]), padding=padding) -> None:
            size = at_least_float32(value).abs().masked_fill(padding[..., None], torch.nan)
            median = size.flatten(1).nanmedian(1).values
            top = size.nan_to_num(nan=-1.0, posinf=torch.inf).flatten().topk(k).indices
            at, channel = top // d_model, top % d_model
            sequence, position = at // padding.shape[1], at % padding.shape[1]
            numbers = (sequence + first, position, channel, value[sequence, position, channel], median[sequence])
            found[layer].append(torch.stack([part.double() for part in numbers], 1).cpu())

        hooks = [
            (f"blocks.{layer}.hook_resid_post", lambda value, hook, layer=layer, keep=keep: keep(value, hook, layer))
            for layer in range(len(model.blocks))
        ]
        model.run_with_hooks(corpus.tokens[chunk, :width].to(model.device), fwd_hooks=hooks, return_type=None)
    rows = []
    for parts in found:
        entries = torch.cat(parts)
        rows.append(entries[entries[:, 3].abs().argsort(descending=True, stable=True)[:k]])
    sequence, position, channel, value, median = torch.cat(rows).numpy().T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(value) / median
    sequence, position = sequence.astype(int), position.astype(int)
    ids = corpus.tokens[sequence, position].tolist()
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(len(rows)), k), "rank": np.tile(np.arange(k), len(rows)), "sequence": sequence,
            "position": position, "token": token_strings(model.tokenizer, ids), "token_id": ids,
            "channel": channel.astype(int), "value": value, "median": median, "ratio": ratio,
            "massive": (np.abs(value) > floor) & (ratio >= factor),
        }
    )  # fmt: skip


@torch.no_grad()
def attention_sinks(model: Transformer, corpus: Corpus, *, position: int = 0, batch_size: int = 8) -> xr.Dataset:
    """How much of its attention each head puts on one position, on average over the queries behind it that can see it.

    sink [layer, head]: mean attention, 0 to 1. entropy [layer, head]: of those queries' attention, mean in nats; log of the
    number of keys where a head looks at all alike. value_ratio [layer, head]: mean |v| at the position over mean |v| of all
    other tokens (query heads of a group share it; NaN where all others are 0). uniform [layer]: what `sink` would be of even
    attention. batch_size: sequences per forward pass; attention patterns of one layer of one batch are held at a time. Raises
    `TaskError` where no sequence goes beyond the position, `OptionError` where it is negative.
    """
    canonical(model, "attention_sinks")
    if position < 0:
        raise OptionError(f"a position counts from the start, and {position} is negative")
    if int(corpus.lengths.max()) <= position + 1:
        raise TaskError(f"no sequence of {corpus.name} has a token behind position {position}")
    cfg = model.cfg
    shape = (cfg.n_layers, cfg.n_heads)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("sink", "entropy", "value", "others")}
    even, n_queries = (torch.zeros(cfg.n_layers, dtype=torch.float64) for _ in range(2))
    n_sinks = n_others = 0
    for chunk in (corpus.lengths > position + 1).nonzero()[:, 0].split(batch_size):
        width = int(corpus.lengths[chunk].max())
        there = corpus.mask(skip_first=False)[chunk, :width].to(model.device)
        n_sinks, n_others = n_sinks + len(chunk), n_others + int(there.sum()) - len(chunk)
        index = torch.arange(width, device=model.device)

        def of_pattern(pattern: Tensor, hook, layer: int, there=there, index=index) -> None:
            window = cfg.windows[layer]
            sees = (index > position) & ((index - position < window) if window is not None else True)
            where = there & sees
            rows = at_least_float32(pattern.transpose(1, 2)[where])  # [query, head, key]
            sums["sink"][layer] += rows[..., position].double().sum(0).cpu()
            sums["entropy"][layer] += torch.special.entr(rows).sum(-1).double().sum(0).cpu()
            keys = index + 1 if window is None else (index + 1).clamp(max=window)
            even[layer] += float((where / keys).double().sum())
            n_queries[layer] += int(where.sum())

        def of_values(value: Tensor, hook, layer: int, there=there) -> None:
            norms = at_least_float32(value).norm(dim=-1).double().repeat_interleave(cfg.group_size, 2)
            at_sink = norms[:, position].sum(0)
            sums["value"][layer] += at_sink.cpu()
            sums["others"][layer] += (norms[there].sum(0) - at_sink).cpu()

        hooks = []
        for layer in range(cfg.n_layers):
            for name, take in (("pattern", of_pattern), ("v", of_values)):
                call = lambda value, hook, take=take, layer=layer: take(value, hook, layer)  # noqa: E731
                hooks.append((f"blocks.{layer}.attn.hook_{name}", call))
        model.run_with_hooks(corpus.tokens[chunk, :width].to(model.device), fwd_hooks=hooks, return_type=None)
    found = {name: (("layer", "head"), (sums[name] / n_queries[:, None]).numpy()) for name in ("sink", "entropy")}
    found["value_ratio"] = (("layer", "head"), ((sums["value"] / n_sinks) / (sums["others"] / n_others)).numpy())
    return xr.Dataset(
        {**found, "uniform": ("layer", (even / n_queries).numpy())},
        {"layer": range(cfg.n_layers), "head": range(cfg.n_heads)},
        {"model": cfg.name, "corpus": corpus.name, "position": position},
    )


def massive_plot(table: pd.DataFrame, *, ranks: int = 3, title: str | None = None) -> go.Figure:
    """Sizes of the largest few entries behind each layer over the median of the largest one's sequence, on a log scale.

    table: of `massive_activations`. Massive entries are filled, others hollow.
    """
    figure = go.Figure()
    for rank in range(min(ranks, int(table["rank"].max()) + 1)):
        part = table[table["rank"] == rank]
        symbols = np.where(part["massive"], "circle", "circle-open")
        figure.add_scatter(
            x=part["layer"], y=part["value"].abs(), mode="lines+markers", name=f"{rank + 1}. largest",
            line={"color": RAISES, "width": 1.5, "dash": ("solid", "dash", "dot")[min(rank, 2)]},
            marker={"size": 8, "symbol": symbols}, customdata=part[["channel", "position", "ratio"]],
            hovertemplate="layer %{x}, channel %{customdata[0]}, position %{customdata[1]}<br>%{y:.4g}, "
                          "%{customdata[2]:.0f} medians<extra></extra>",
        )  # fmt: skip
    first = table[table["rank"] == 0]
    figure.add_scatter(x=first["layer"], y=first["median"], mode="lines", name="median", line={"color": INK})
    figure.update_xaxes(title="behind layer", dtick=max(1, len(first) // 12))
    figure.update_yaxes(title="|activation| in the residual stream", type="log", dtick=1)
    return finish(figure, title, height=400)


def sink_plot(sinks: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Layer by head: mean attention on the position, from 0 (white) to 1. sinks: of `attention_sinks`."""
    text = np.stack([sinks["entropy"].values, sinks["value_ratio"].values], -1)
    figure = go.Figure(
        go.Heatmap(
            z=sinks["sink"].values, x=sinks["head"].values, y=sinks["layer"].values, zmin=0, zmax=1, xgap=1, ygap=1,
            colorscale=[[0.0, "#f7f7f7"], [0.5, "#4393c3"], [1.0, "#053061"]], customdata=text,
            colorbar={"title": {"text": f"attention on position {sinks.attrs['position']}", "side": "right"},
                      "thickness": 14},
            hovertemplate="layer %{y}, head %{x}<br>attention %{z:.3f}, entropy %{customdata[0]:.2f} nats, "
                          "|v| %{customdata[1]:.2f} of others<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="head", dtick=1, showgrid=False)
    figure.update_yaxes(title="layer", dtick=1, showgrid=False)
    return finish(figure, title, height=max(310, 170 + 26 * sinks.sizes["layer"]), plot_bgcolor=GREY)
