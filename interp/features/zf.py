"""The ZF plot: is a sparse code as long as the activation that it stands for? One dot per token, |code| against |activation|.

    points = zf_points(sae, activations)
    zf_plot(points, d=sae.config.d_in).show()

Write x = sum_i f_i u_i with unit rows u_i and let eps = max |<u_i, u_j>| over pairs. Then |x|^2 is |f|^2 and what pairs add:

    | |x|^2 - |f|^2 | <= eps (|f|_1^2 - |f|_2^2) <= eps (h - 1) |f|^2
    |x| / sqrt(1 + eps (h - 1)) <= |f| <= |x| / sqrt(1 - eps (h - 1))           the right side only where eps (h - 1) < 1

This worst case, from which |f| ~ |x| has been argued (top-AFA, 2503.24277), holds and says nothing. More unit rows than
dimensions cannot all be nearly orthogonal: by Welch (1974) eps >= sqrt((h - d) / (d (h - 1))), so eps (h - 1), about h / sqrt(d),
is at least 873 for d = 768, h = 24,576. No upper side is left then, and the lower one is at |x| / 30. Even with L0 in the
place of h (only latents that fire make pairs) there are both sides only for L0 < 29 in that example.

What makes |f| ~ |x| true all the same is that pairs do not conspire. If <u_i, u_j> have random signs and a size of 1 / sqrt(d),
their sum is a random walk:

    sd of |x| / |f| = sqrt((1 - 1 / L0) / (2 d)) < 1 / sqrt(2 d)                2.6 % for d = 768, whatever h and L0

Hence the band |x| (1 +- 1 / sqrt(2 d)), one standard deviation to either side. Trained SAEs mostly lie below it: latents fire too
weakly (shrinkage), a part of x is not reconstructed, or latents that fire together point the same way.
"""

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, one_of
from interp.features.evaluate import targets, token_geometry
from interp.features.sae import SAE
from interp.plots import INK, RAISES, finish

COLUMNS = ("x_norm", "code_norm", "elbo", "elbo_1", "l0")
WORST_CASES = (0.25, 0.5, 1.0)  # values of eps (h - 1) whose bands are drawn
_ENTRIES = 2**24  # of tokens x latents that are encoded at once


@torch.no_grad()
def zf_points(
    sae: SAE, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"] | None = None, *,
    select: Literal["own", "afa"] = "own",
) -> pd.DataFrame:  # fmt: skip
    """A row per token, in float64 and the activations' unit; y: a transcoder's targets, which then stand for x.

    x_norm: |x|, raw, with its mean. code_norm: |(f_1 |w_1|, ..., f_h |w_h|, |b_dec|)|, the bias being a feature that is always on
    (with a skip path or layer_norm: all that the SAE writes when no latent fires). l0: latents that fire.
    elbo = | |x|^2 - |code|^2 | / ((h - 1) |code|^2): the least eps that the worst case would need, reconstruction error included;
    the divisor stays h - 1. NaN for a code of length 0.
    elbo_1 = | |v|^2 - |f|^2 | / (|f|_1^2 - |f|_2^2), v = sum_i f_i w_i and f without the bias: never above max |<u_i, u_j>|, as
    the raw x in the place of v could be. NaN where fewer than two latents fire: there is no pair to say anything about.
    Raises `OptionError` for shapes that do not fit, and for a transcoder without targets.
    """
    one_of(select, ("own", "afa"), "way to select latents")
    y = targets(sae, x, y)
    size, parts = max(1, _ENTRIES // sae.config.d_sae), []
    for part, target in zip(x.split(size), y.split(size), strict=True):
        part = part.to(sae.device, sae.dtype)
        codes = sae.codes(part, select=select)
        found = token_geometry(sae, part, target.to(sae.device), codes, sae.reconstruct(part, codes))
        parts.append(pd.DataFrame({name: found[name].cpu().numpy() for name in COLUMNS}))
    return pd.concat(parts, ignore_index=True)


def zf_plot(points: pd.DataFrame, *, d: int, title: str | None = None, limit: int = 10_000) -> go.Figure:
    """|code| over |x|, the line where they are equal, the worst case's bands, and the one that signs explain.

    points: of `zf_points`. d: channels of the activations. Dots below the line are under-activated. Worst cases are drawn for
    eps (h - 1) = .25, .5 and 1, the last without an upper side; a real dictionary's is in the hundreds. Of more than `limit`
    tokens evenly spaced ones are drawn; numbers in the legend are of all.
    Raises `OptionError` for points without their columns or without a token.
    """
    if missing := [name for name in COLUMNS if name not in points.columns]:
        raise OptionError(f"these are not ZF points: the table has no column {missing[0]!r}")
    if not len(points) or d < 1 or limit < 1:
        raise OptionError(f"a ZF plot needs tokens, channels and dots, not {len(points)}, {d} and {limit}")
    known = points[points.x_norm > 0]
    ratio = known.code_norm / known.x_norm
    width = 1 / np.sqrt(2 * d)
    within = float((np.abs(ratio - 1) <= width).mean()) if len(ratio) else np.nan
    middle = float(ratio.median()) if len(ratio) else np.nan
    shown = points.iloc[:: -(-len(points) // limit)]
    end = 1.05 * float(points.x_norm.max()) or 1.0
    figure = go.Figure()
    figure.add_scatter(
        x=[0, end, end, 0], y=[0, end * (1 + width), end * (1 - width), 0], fill="toself", mode="lines", line={"width": 0},
        fillcolor="rgba(178,24,43,0.25)", hoverinfo="skip", name=f"|x| (1 ± 1/√(2d)), d = {d}: {within:.0%} of tokens",
    )  # fmt: skip
    for worst, dash in zip(WORST_CASES, ("dot", "dash", "dashdot"), strict=True):
        for i, slope in enumerate(worst_case_slopes(worst)):
            if np.isfinite(slope):
                figure.add_scatter(
                    x=[0, end], y=[0, end * slope], mode="lines", line={"color": "#888888", "width": 1, "dash": dash},
                    hoverinfo="skip", name=f"worst case, ε(h − 1) = {worst:g}", legendgroup=str(worst), showlegend=i == 0,
                )  # fmt: skip
    figure.add_scatter(
        x=[0, end], y=[0, end], mode="lines", line={"color": INK, "width": 1.2}, hoverinfo="skip", name="|code| = |x|"
    )
    figure.add_scattergl(
        x=shown.x_norm, y=shown.code_norm, mode="markers", marker={"color": RAISES, "size": 4, "opacity": 0.5},
        name=f"tokens, median |code| / |x| {middle:.3f}", customdata=shown[["l0", "elbo", "elbo_1"]],
        hovertemplate="|x| %{x:.4g}, |code| %{y:.4g}<br>L0 %{customdata[0]:.0f}, eLBO %{customdata[1]:.3g}, "
                      "eLBO₁ %{customdata[2]:.3g}<extra></extra>",
    )  # fmt: skip
    top = 1.05 * max(end, float(points.code_norm.max()))
    figure.update_xaxes(title="|x|, raw activation", range=[0, end])
    figure.update_yaxes(title="|code|, with |b_dec| as one more feature", range=[0, top])
    figure = finish(figure, title, height=560)
    # six long names: in the corner above the line, where dots are rare
    return figure.update_layout(legend={"orientation": "v", "x": 0.01, "y": 0.99, "bgcolor": "rgba(255,255,255,0.8)"})


def worst_case_slopes(worst: float) -> tuple[float, float]:
    """(1 / sqrt(1 + worst), 1 / sqrt(1 - worst)), the range of |code| / |x| for eps (h - 1) = worst; the second may be inf."""
    return 1 / np.sqrt(1 + worst), 1 / np.sqrt(1 - worst) if worst < 1 else np.inf
