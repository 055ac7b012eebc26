"""Prompts with a number for every token, drawn as the text itself on a coloured ground.

    token_heatmap(token_relevance(model, pairs)).show()

Colours, visible spaces and grey padding are those of `interp.plots`.
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.errors import OptionError
from interp.grids import visible
from interp.plots import GREY, SCALE, drawn_text, finish

_FONT = 12  # pixels


def token_heatmap(relevance: xr.DataArray, *, n: int = 8, title: str = "") -> go.Figure:
    """The first n prompts, a row each, with every token in a cell coloured by its score: blue positive, red negative.

    relevance: [prompt, position] with coordinate `token` [prompt, position], as `token_relevance` and `norm_x_logit`
    return it. One scale for all rows, centred at 0; padding stays grey and empty. Beside each row: the prompt's metric,
    and what no token accounts for.
    """
    if relevance.dims != ("prompt", "position") or relevance.coords.get("token", relevance[0]).dims != relevance.dims:
        axes = ", ".join(map(str, relevance.dims))
        raise OptionError(f"a token heatmap needs scores [prompt, position] and each prompt's own tokens, not [{axes}]")
    if n < 1:
        raise OptionError(f"a token heatmap needs at least 1 prompt, not {n}")
    shown = relevance[:n]
    values = shown.values.astype(float)
    there = np.isfinite(values)
    limit = float(np.abs(values[there]).max()) if there.any() else 0.0
    texts = [[visible(str(token)) for token in row] for row in shown.token.values]
    words = [[drawn_text(text) for text in row] for row in texts]
    # a column is as wide as its longest token, in characters
    edges = np.cumsum([0, *(max(2, *map(len, column)) + 1.5 for column in zip(*texts, strict=True))])
    unit, rows = shown.attrs.get("unit", ""), [str(p) for p in shown.prompt.values]
    hover = [
        [f"prompt {row}, position {t} {word}<br>{value:+.4g} {unit}" for t, (word, value) in enumerate(zip(*of_row, strict=True))]
        for row, *of_row in zip(rows, words, values, strict=True)
    ]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=values, zmin=-(limit or 1.0), zmax=limit or 1.0, colorscale=SCALE, hoverongaps=False, xgap=1, ygap=1,
            x=edges, text=np.where(there, words, ""), texttemplate="%{text}", textfont={"size": _FONT}, customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorbar={"title": {"text": _colour_title(shown.attrs), "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(
        title="position", tickmode="array", tickvals=(edges[:-1] + edges[1:]) / 2, ticktext=list(shown.position.values),
        showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(
        title="prompt", tickmode="array", tickvals=list(range(len(rows))), ticktext=_row_labels(shown, rows),
        autorange="reversed", showgrid=False, zeroline=False,
    )  # fmt: skip
    figure = finish(figure, title or None, height=max(310, 140 + 34 * len(rows)), plot_bgcolor=GREY)
    return figure.update_layout(width=max(600, 260 + 0.62 * _FONT * edges[-1])).update_yaxes(automargin=True)


def _row_labels(shown: xr.DataArray, rows: list[str]) -> list[str]:
    """Each prompt's number, its metric, and the residual where there is one."""
    labels = rows
    for name, sign in (("metric", ": {:.3g}"), ("residual", ", rest {:+.2g}")):
        if name in shown.coords and shown[name].dims == ("prompt",):
            labels = [label + sign.format(value) for label, value in zip(labels, shown[name].values, strict=True)]
    return labels


def _colour_title(attrs: dict) -> str:
    unit = f" ({attrs['unit']})" if attrs.get("unit") else ""
    return f"{attrs.get('metric', 'score')}{unit}<br>blue = positive"
