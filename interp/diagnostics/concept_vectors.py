"""Is the concept gone or only unsaid? Intrinsic readings of single MLP output vectors (ConceptVectors, Hong et al. 2406.11614).

A neuron n of layer l adds post_n v_n to the stream, with v_n its row of W_out; some v read as one concept through the
unembedding. Training against a concept may change what a model says and leave v as it was. Before and after:

    cosine(v, v'),   |v - v'|,   Jaccard = |T & T'| / |T | T'|,   T the k tokens of largest W_U^T v           (no final norm)

Whether v carries the concept at all is asked by noise: with eps ~ N(0, scale^2) the MLP writes post_n (v_n + eps), and the
log-probability of texts on the concept should fall by more than that of other texts, and by more than with the same eps on other
neurons of the layer.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, TaskError
from interp.features.sources import Corpus
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.plots import GREY, RAISES, finish
from interp.precision import at_least_float32

_ENTRIES = 2**24  # of neurons x tokens that are looked at once


@torch.no_grad()
def concept_vector_change(
    model: Transformer, tuned: Transformer, neurons: Sequence[tuple[int, int]], *, k: int = 200
) -> pd.DataFrame:
    """How far the output vectors of some neurons moved from one model to another: layer, neuron, cosine, distance, jaccard.

    neurons: (layer, neuron). distance: L2, in the weights' unit. k: tokens that are compared, each model's own unembedding
    reading its own vector (among equal scores it is open which counts). cosine is NaN where a vector is 0. Raises `SiteError`
    for a neuron that the models do not have, `OptionError` for models of other sizes or a wrong k.
    """
    for each in (model, tuned):
        canonical(each, "concept_vector_change")
    sizes = [(each.cfg.n_layers, each.cfg.d_mlp, *each.W_U.shape) for each in (model, tuned)]
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the models must have the same layers, neurons, channels and tokens, not {sizes[0]} and {sizes[1]}"
        )
    if not 1 <= k <= sizes[0][3]:
        raise OptionError(f"cannot compare {k} of {sizes[0][3]} tokens")
    neurons = _known(model, neurons)
    before, after = (
        torch.stack([each.blocks[layer].mlp.W_out[neuron].to("cpu") for layer, neuron in neurons])
        if neurons
        else torch.zeros(0, sizes[0][2])
        for each in (model, tuned)
    )
    jaccard = []
    for part in torch.arange(len(neurons)).split(max(1, _ENTRIES // sizes[0][3])):
        tops = [
            (at_least_float32(v[part].to(each.W_U)) @ at_least_float32(each.W_U)).topk(k).indices.cpu()
            for v, each in ((before, model), (after, tuned))
        ]
        # each half is without repeats, so a token that two halves share is one that stands twice when they are sorted together
        both = torch.cat(tops, 1).sort(1).values
        shared = (both[:, 1:] == both[:, :-1]).sum(1)
        jaccard += (shared / (2 * k - shared)).tolist()
    before, after = before.double(), after.double()
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (before * after).sum(1).numpy() / (before.norm(dim=1) * after.norm(dim=1)).numpy()
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in neurons],
            "neuron": [neuron for _, neuron in neurons],
            "cosine": cosine,
            "distance": (before - after).norm(dim=1).numpy(),
            "jaccard": jaccard,
        }
    )


@torch.no_grad()
def concept_vector_noise(
    model: Transformer, neurons: Sequence[tuple[int, int]], own: Corpus, unrelated: Corpus, *, scale: float = 0.1,
    n_control: int = 8, seed: int = 0, batch_size: int = 8,
) -> pd.DataFrame:  # fmt: skip
    """What noise on a neuron's output vector does to texts on its concept and to others, beside the same noise on other neurons.

    own, unrelated: texts for all of these neurons, which share one concept. scale: standard deviation of each entry of eps, in
    the weights' unit (.1 in the paper). n_control: other neurons of the layer for each, at random by seed, never one of
    `neurons`. Columns: layer, neuron (that the row belongs to), kind ("concept" or "control"), noisy (the neuron that got the
    noise), own, unrelated (change of the mean log-probability of a next token, nats; negative: the text became less likely). No
    weight is changed. Two forward passes per row and batch. Raises `SiteError` for a neuron that the model does not have,
    `OptionError` for a negative scale or more controls than there are, `TaskError` for texts without a next token.
    """
    canonical(model, "concept_vector_noise")
    neurons, d_mlp = _known(model, neurons), model.cfg.d_mlp
    if scale < 0:
        raise OptionError(f"a standard deviation is not negative, and {scale} is")
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict] = []
    noises: list[Tensor] = []
    for layer, neuron in neurons:
        taken = {n for at, n in neurons if at == layer}
        others = [n for n in torch.randperm(d_mlp, generator=generator).tolist() if n not in taken][:n_control]
        if len(others) < n_control:
            raise OptionError(f"layer {layer} has {d_mlp - len(taken)} other neurons, not {n_control}")
        noise = scale * torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)
        for noisy in (neuron, *others):
            kind = "concept" if noisy == neuron else "control"
            rows.append({"layer": layer, "neuron": neuron, "kind": kind, "noisy": noisy})
            noises.append(noise)
    for name, corpus in (("own", own), ("unrelated", unrelated)):
        there = corpus.mask()
        if not (n := int(there.sum())):
            raise TaskError(f"no sequence of {corpus.name} has a token to predict")
        totals = np.zeros(len(rows))
        for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
            width = int(corpus.lengths[chunk].max())
            tokens, places = (x[chunk, :width].to(model.device) for x in (corpus.tokens, there))
            base = _log_probability(model, tokens, places, [])
            for i, (row, noise) in enumerate(zip(rows, noises, strict=True)):
                hooks = _noisy(model, row["layer"], row["noisy"], noise)
                totals[i] += _log_probability(model, tokens, places, hooks) - base
        for row, total in zip(rows, totals, strict=True):
            row[name] = total / n
    return pd.DataFrame(rows, columns=["layer", "neuron", "kind", "noisy", "own", "unrelated"])


def _known(model: Transformer, neurons: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    cfg, neurons = model.cfg, [(int(layer), int(neuron)) for layer, neuron in neurons]
    for layer, neuron in neurons:
        if not (0 <= layer < cfg.n_layers and 0 <= neuron < cfg.d_mlp):
            raise SiteError(
                f"{cfg.name} has layers 0 to {cfg.n_layers - 1} of neurons 0 to {cfg.d_mlp - 1}, not m{layer}.n{neuron}"
            )
    return neurons


def _noisy(model: Transformer, layer: int, neuron: int, noise: Float[Tensor, " d_model"]) -> list[tuple[str, Callable]]:
    """Hooks under which the neuron writes v + noise."""
    block, path, seen = model.blocks[layer], f"blocks.{layer}", {}

    def write(value: Tensor, hook) -> Tensor:
        post = seen.pop("post")
        added = post[..., neuron, None] * noise.to(post)
        # what a post-norm makes of it depends on the whole output
        return block.ln2_post(block.mlp.output(post) + added) if model.cfg.post_norm else value + added

    return [
        (f"{path}.mlp.hook_post", lambda value, hook: seen.update(post=value)),
        (f"{path}.hook_mlp_out", write),
    ]


def _log_probability(
    model: Transformer, tokens: Int[Tensor, "batch position"], there: Bool[Tensor, "batch position"], hooks: list
) -> float:
    """Sum over tokens that are there, but for first ones, of log P(token | those before it)."""
    s, t = there.nonzero(as_tuple=True)
    logits = at_least_float32(model.run_with_hooks(tokens, fwd_hooks=hooks)[s, t - 1])
    return -float(F.cross_entropy(logits, tokens[s, t], reduction="none").double().sum())


def concept_noise_plot(noise: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Change in own texts over change in unrelated ones, a dot per noisy neuron; a concept's lie below the others and the line.

    noise: of `concept_vector_noise`.
    """
    figure = go.Figure()
    low = min(0.0, float(noise[["own", "unrelated"]].min().min())) if len(noise) else -1.0
    figure.add_scatter(x=[low, 0], y=[low, 0], mode="lines", line={"color": GREY}, name="both alike", hoverinfo="skip")
    for kind, colour, size in (("control", "#888888", 6), ("concept", RAISES, 10)):
        part = noise[noise["kind"] == kind]
        figure.add_scatter(
            x=part["unrelated"], y=part["own"], mode="markers", name=kind, marker={"color": colour, "size": size},
            customdata=part[["layer", "noisy"]],
            hovertemplate="m%{customdata[0]}.n%{customdata[1]}<br>own %{y:+.4g}, unrelated %{x:+.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="unrelated texts: change of log-probability, nats per token")
    figure.update_yaxes(title="own texts: change, nats per token")
    return finish(figure, title, height=440)
