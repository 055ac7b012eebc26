"""Plotly figures of the results. Each takes what an analysis returned and says unit and sign where the colours are read.

    heatmap(activation_patching(model, pairs, "resid_pre")).show()

Conventions: layer 0 at the bottom; a diverging scale centred at 0, blue where the patch raises the metric and red where
it lowers it; spaces in tokens drawn as ␣; what does not exist (padding) is grey, not zero.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.errors import OptionError

RAISES, LOWERS, INK, GREY = "#2166ac", "#b2182b", "#24292f", "#d0d0d0"
SCALE = [[0.0, "#67001f"], [0.25, "#d6604d"], [0.5, "#f7f7f7"], [0.75, "#4393c3"], [1.0, "#053061"]]
_CHANGES = {"denoise": "patched − corrupt", "noise": "patched − clean", "both": "with − without the clean value"}
_AXIS_TITLES = {
    "layer": "layer", "head": "head", "kv_head": "key/value head", "position": "position and token", "node": "component",
    "neuron": "neuron", "source": "key position and token", "prompt": "prompt", "n": "components kept",
}  # fmt: skip


def heatmap(effects: xr.DataArray, *, title: str | None = None, limit: float | None = None) -> go.Figure:
    """Two remaining axes as a heatmap, after averaging over prompts. `limit` fixes the colour range at +-limit."""
    mean = effects.mean("prompt", keep_attrs=True) if "prompt" in effects.dims else effects
    if mean.ndim != 2:
        raise OptionError(
            f"a heatmap needs two axes, these effects have {mean.ndim} ({', '.join(map(str, mean.dims))})"
        )
    y, x = mean.dims
    values = mean.values.astype(float)
    if limit is None:
        limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    x_labels, y_labels = axis_labels(mean, x), axis_labels(mean, y)
    # axes are numbered and labelled by ticks: equal labels would be merged into one row or column
    figure = go.Figure(
        go.Heatmap(
            z=values, zmin=-(limit or 1.0), zmax=limit or 1.0, colorscale=SCALE, hoverongaps=False, xgap=1, ygap=1,
            customdata=_hover(mean, y_labels, x_labels), hovertemplate="%{customdata}<extra></extra>",
            # read sideways, a line each: above the bar they would leave no room for it in a short map
            colorbar={"title": {"text": colour_title(effects.attrs).replace(", ", "<br>"), "side": "right"},
                      "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(_ticks(x, x_labels, rotate=x in ("position", "source")))
    figure.update_yaxes(_ticks(y, y_labels))
    return finish(figure, title, height=max(310, 170 + 26 * len(y_labels)), plot_bgcolor=GREY)


def axis_labels(array: xr.DataArray, dim: str) -> list[str]:
    """What to write along an axis: token strings for positions, ids for nodes, else the coordinate."""
    for name in {"position": ("token",), "source": ("source_token",)}.get(dim, ()):
        if name in array.coords:
            return [str(v) for v in array[name].values]
    return [str(v) for v in array[dim].values] if dim in array.coords else [str(i) for i in range(array.sizes[dim])]


def colour_title(attrs: dict) -> str:
    """Unit and sign, for a colour bar."""
    return ", ".join([*_score(attrs), f"blue = {'raised' if attrs.get('direction') in _CHANGES else 'positive'}"])


def _score(attrs: dict) -> list[str]:
    unit = f" ({attrs['unit']})" if attrs.get("unit") else ""
    estimated = "estimated " if "rules" in attrs else ""
    if attrs.get("direction") not in _CHANGES:  # a logit lens, say, which is no difference of two runs
        return [f"{attrs.get('metric', 'value')}{unit}"]
    return [f"{attrs.get('metric', 'effect')}{unit}", estimated + _CHANGES[attrs["direction"]]]


def _hover(mean: xr.DataArray, y_labels: list[str], x_labels: list[str]) -> np.ndarray:
    y, x = mean.dims
    unit = mean.attrs.get("unit", "")
    return np.array(
        [
            [
                f"{y} {drawn_text(a)}, {x} {drawn_text(b)}<br>{value:+.4g} {unit}"
                for b, value in zip(x_labels, row, strict=True)
            ]
            for a, row in zip(y_labels, mean.values, strict=True)
        ]
    )


def drawn_text(label: str) -> str:
    """Prompt text is data: plotly would read tags in it as markup."""
    return label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _ticks(dim: str, labels: list[str], rotate: bool = False) -> dict:
    return {
        "title": {"text": _AXIS_TITLES.get(dim, dim)}, "tickmode": "array", "tickvals": list(range(len(labels))),
        "ticktext": [drawn_text(label) for label in labels], "tickangle": -50 if rotate else 0, "showgrid": False,
        "zeroline": False,
    }  # fmt: skip


def ranking_bars(ranking: pd.DataFrame, attrs: dict, *, n: int = 20, title: str | None = None) -> go.Figure:
    """The strongest components with their intervals over prompts; those that stand out are solid, the others pale."""
    top = ranking.head(n).iloc[::-1]
    colours = np.where(top.effect > 0, RAISES, LOWERS)
    figure = go.Figure(
        go.Bar(
            x=top.effect, y=top.node, orientation="h",
            marker={"color": colours, "opacity": np.where(top.detected, 1.0, 0.4)},
            error_x={"type": "data", "symmetric": False, "array": top.high - top.effect,
                     "arrayminus": top.effect - top.low, "color": INK, "thickness": 1.2, "width": 3},
            customdata=np.stack([top.low, top.high, top.share], 1),
            hovertemplate="%{y}: %{x:+.4g}<br>95 % interval %{customdata[0]:+.4g} to %{customdata[1]:+.4g}"
                          "<br>%{customdata[2]:.1%} of clean − corrupt<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=f"{', '.join(_score(attrs))}; mean and 95 % interval over prompts")
    figure.update_yaxes(title="component", type="category")
    return finish(figure, title, height=140 + 22 * len(top))


def faithfulness_curve(curve: xr.Dataset, baseline: xr.Dataset | None = None, *, title: str | None = None) -> go.Figure:
    """Share of clean - corrupt recovered by the top n components alone, with its interval, beside a random order."""
    figure = go.Figure()
    for name, data, colour, dash in (("ranked", curve, RAISES, "solid"), ("random order", baseline, "#888888", "dot")):
        if data is None:
            continue
        if name == "ranked":
            band = np.concatenate([data.high.values, data.low.values[::-1]])
            figure.add_scatter(
                x=np.concatenate([data.n.values, data.n.values[::-1]]), y=band, fill="toself", mode="lines",
                line={"width": 0}, fillcolor="rgba(33,102,172,0.15)", hoverinfo="skip", name="95 % interval",
            )  # fmt: skip
        figure.add_scatter(
            x=data.n.values, y=data.recovered.values, mode="lines+markers", name=name,
            line={"color": colour, "dash": dash}, marker={"size": 5}, customdata=data.node.values.astype(str),
            hovertemplate="%{x} kept, last %{customdata}<br>recovered %{y:.1%}<extra>" + name + "</extra>",
        )  # fmt: skip
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": GREY, "width": 1})
    figure.update_xaxes(
        title=f"components kept (of {curve.attrs['n_nodes']}); the rest: {curve.attrs['ablation']} ablation"
    )
    figure.update_yaxes(title=f"recovered {curve.attrs['metric']} (1 = clean, 0 = corrupt)", tickformat=".0%")
    return finish(figure, title, height=400)


def finish(figure: go.Figure, title: str | None, *, height: int, plot_bgcolor: str = "white") -> go.Figure:
    """The house's fonts, margins and colours."""
    return figure.update_layout(
        template="plotly_white", title=title, height=height, plot_bgcolor=plot_bgcolor, font={"color": INK, "size": 12},
        margin={"l": 70, "r": 20, "t": 50 if title else 36, "b": 60}, legend={"orientation": "h", "y": 1.08},
    )  # fmt: skip
