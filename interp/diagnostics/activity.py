"""How many neurons work on a token: four readings of the sparsity of MLP activations, by layer.

With a [neuron] the activations of one token (`mlp.hook_post`; of a gated MLP the product), n neurons:

    inactive(eps) = share of neurons with |a_i| <= eps max_j |a_j|              0: exactly zero, as only ReLU-like functions give
    Hoyer         = (sqrt(n) - |a|_1 / |a|_2) / (sqrt(n) - 1)                    0: all alike, 1: one alone (Hoyer 2004)
    carriers      = share of neurons, largest first, that have `mass` of |a|^2   small: few do the work
    never(eps)    = share of neurons that are inactive on every token

The first three are means over tokens. They disagree where activations are dense but heavy-tailed, as of GELU and SiLU, of which
no single one may be called the sparsity.
"""

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
import xarray as xr
from torch import Tensor

from interp.errors import OptionError, TaskError
from interp.features.sources import Corpus
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.plots import INK, LOWERS, RAISES, finish
from interp.precision import at_least_float32


@torch.no_grad()
def activation_sparsity(
    model: Transformer, corpus: Corpus, *, thresholds: Sequence[float] = (0.0, 0.01, 0.1), mass: float = 0.9,
    skip_first: bool = True, batch_size: int = 8,
) -> xr.Dataset:  # fmt: skip
    """inactive and never [layer, threshold], hoyer and carriers [layer], of a model's MLP neurons in a corpus.

    thresholds: shares eps of a token's largest |a|. mass: share of |a|^2 that carriers have. All values are shares, 0 to 1.
    A token whose activations are all 0 counts as Hoyer 1 and no carriers. `never` is of this corpus: in a small one rare neurons
    are among them. Raises `OptionError` for thresholds outside [0, 1) or a mass outside (0, 1], `TaskError` without tokens.
    """
    canonical(model, "activation_sparsity")
    if not thresholds or not all(0 <= eps < 1 for eps in thresholds):
        raise OptionError(f"thresholds are shares from 0 up to 1, not {list(thresholds)}")
    if not 0 < mass <= 1:
        raise OptionError(f"the mass that carriers have is a share above 0, not {mass}")
    counts = corpus.mask(skip_first=skip_first)
    if not (n := int(counts.sum())):
        raise TaskError(f"no token of {corpus.name} is left to look at")
    n_layers, width = model.cfg.n_layers, model.cfg.d_mlp
    inactive = torch.zeros(n_layers, len(thresholds), dtype=torch.float64)
    hoyer, carriers = (torch.zeros(n_layers, dtype=torch.float64) for _ in range(2))
    ever = torch.zeros(n_layers, len(thresholds), width, dtype=torch.bool)

    def look(layer: int, value: Tensor, where: Tensor) -> None:
        size = at_least_float32(value[where]).abs()
        bound = size.amax(1, keepdim=True)
        for i, eps in enumerate(thresholds):
            active = size > eps * bound
            inactive[layer, i] += float((~active).double().mean(1).sum())
            ever[layer, i] |= active.any(0).cpu()
        unit = size / bound.clamp(min=torch.finfo(size.dtype).tiny)  # squares of huge or tiny activations stay in range
        ratio = unit.sum(1) / unit.norm(dim=1)
        dense = width**0.5
        hoyer[layer] += float(((dense - ratio) / (dense - 1)).nan_to_num(nan=1.0).double().sum())
        squares = unit.double().square().sort(1, descending=True).values.cumsum(1)
        # as many as stand below the mass, and the one that reaches it
        below = (squares < mass * squares[:, -1:]).sum(1) + (squares[:, -1] > 0)
        carriers[layer] += float((below.double().clamp(max=width) / width).sum())

    for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
        end = int(corpus.lengths[chunk].max())
        where = counts[chunk, :end].to(model.device)
        hooks = [
            (f"blocks.{layer}.mlp.hook_post", lambda value, hook, layer=layer, where=where: look(layer, value, where))
            for layer in range(n_layers)
        ]
        model.run_with_hooks(corpus.tokens[chunk, :end].to(model.device), fwd_hooks=hooks, return_type=None)
    return xr.Dataset(
        {
            "inactive": (("layer", "threshold"), (inactive / n).numpy()),
            "never": (("layer", "threshold"), 1 - ever.double().mean(2).numpy()),
            "hoyer": ("layer", (hoyer / n).numpy()),
            "carriers": ("layer", (carriers / n).numpy()),
        },
        {"layer": range(n_layers), "threshold": list(thresholds)},
        {
            "model": model.cfg.name,
            "corpus": corpus.name,
            "mass": mass,
            "n_tokens": n,
            "activation": model.cfg.activation,
        },
    )


def activity_plot(sparsity: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """All readings by layer: inactive neurons solid, those that never work dotted. sparsity: of `activation_sparsity`."""
    figure, layers = go.Figure(), sparsity["layer"].values
    for name, dash in (("inactive", "solid"), ("never", "dot")):
        for i, eps in enumerate(sparsity["threshold"].values):
            strength = 1 - 0.6 * i / max(1, sparsity.sizes["threshold"] - 1)
            figure.add_scatter(
                x=layers, y=sparsity[name].values[:, i], mode="lines", name=f"{name}, |a| ≤ {eps:g} max",
                line={"color": RAISES, "dash": dash}, opacity=strength,
            )  # fmt: skip
    labels = (("hoyer", "Hoyer", INK), ("carriers", f"carriers of {sparsity.attrs['mass']:.0%} of |a|²", LOWERS))
    for name, label, colour in labels:
        figure.add_scatter(x=layers, y=sparsity[name].values, mode="lines+markers", name=label, line={"color": colour})
    figure.update_traces(hovertemplate="layer %{x}: %{y:.3f}")
    figure.update_xaxes(title="layer", dtick=max(1, len(layers) // 12))
    figure.update_yaxes(title="share of neurons (Hoyer: 0 dense, 1 sparse)", range=[0, 1.02])
    figure = finish(figure, title, height=440)
    # many names: above the picture they would lie over it
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1})
