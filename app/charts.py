"""ECharts of results: the same labels, colours and units as the Plotly figures of `interp.plots`, from the same arrays.

Plotly's heatmaps do not report clicks to Streamlit; ECharts' do, by the index of the cell in the order of `cell_order`. A
page shows an ECharts map and offers the Plotly figure as a download.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from interp.errors import OptionError
from interp.plots import GREY, INK, SCALE, axis_labels, colour_title

_AXES = {"position": "position and token", "layer": "layer", "head": "head", "kv_head": "key/value head", "node": "component",
         "source": "key position and token"}  # fmt: skip
_SHARES = ["#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"]  # 0 to 1, one hue: readable without colour vision
_COLOURS = [colour for _, colour in SCALE]
# far from every colour of the scale, and from each other, for any eyes
MARKS = {"selected": "#ff9500", "pinned": "#9b00ff"}
MAX_SMALL = 20_000  # cells of all small maps together: beyond, a browser becomes slow
_AS_GIVEN = {"outerBoundsMode": "none"}  # by default ECharts shrinks the map once more for the axis names
_LABELS = 30  # beyond so many labels along an axis, ECharts leaves some out
LABELLED = 24  # columns: texts in narrower cells would run into each other
_WIDE = 6  # characters of a label in a cell


def visible(text: str) -> str:
    """A token with its spaces and line ends drawn, as in the figures."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def cell_order(array: xr.DataArray) -> list[tuple[int, int]]:
    """(row, column) of every cell that is there, in the order in which a map holds them."""
    return [(int(y), int(x)) for y, x in np.argwhere(np.isfinite(array.values))]


def height_of(array: xr.DataArray, *, row: int = 24) -> int:
    """Pixels that a map of these rows takes: its rows, and the room for title, labels and axis."""
    return max(306, 176 + row * array.shape[0])


def heatmap(
    array: xr.DataArray, *, title: str = "", limit: float | None = None, selectable: bool = True,
    subtitle: str | None = None, labels: np.ndarray | None = None, marks: Mapping[tuple[int, int], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A two-dimensional map: diverging about 0, layer 0 at the bottom, absent cells left grey, unit by the colour bar.

    limit: the colour range is +-limit (default: the largest size in the map).
    subtitle: what the colours say (default: metric, difference and sign, as the figures' colour bars have it; of two maps, whose
        array says "difference" in its attributes, which is subtracted from which).
    labels: [row, column] texts such as tokens: in full under the pointer, and in the cells of maps up to `LABELLED` columns.
    marks: (row, column) of cells to frame, with which of `MARKS` they are.
    """
    if array.ndim != 2:
        raise OptionError(f"a map has two axes, and this array has {array.ndim}")
    y_dim, x_dim = array.dims
    x_labels, y_labels = _unique(axis_labels(array, x_dim)), _unique(axis_labels(array, y_dim))
    values = array.values
    if limit is None:
        limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    limit = limit or 1.0
    unit, slanted = str(array.attrs.get("unit", "")), x_dim in ("position", "source")
    row = _AXES.get(y_dim, str(y_dim)) if y_dim in ("layer", "node") else str(y_dim)
    column = "" if x_dim in ("position", "source") else f"{_AXES.get(x_dim, x_dim)} "

    def cell(y: int, x: int) -> dict[str, Any]:
        value = float(f"{values[y, x]:.6g}")
        text = None if labels is None else str(labels[y, x])
        # ECharts selects by name: names are unique. They carry the value, which the tooltip's own fields cannot format.
        name = f"{row} {y_labels[y]}, {column}{x_labels[x]}: {value:+.4g} {unit}".rstrip()
        found = {"value": [x, y, value], "name": name if text is None else f"{name}, {visible(text)}"}
        if text is not None and len(x_labels) <= LABELLED:
            short = visible(text) if len(text) <= _WIDE else visible(text)[: _WIDE - 1] + "…"
            colour = "#ffffff" if abs(value) > 0.6 * limit else INK
            # braces would be read as a template
            found["label"] = {"show": True, "formatter": short.replace("{", "("), "color": colour, "fontSize": 10}
        return found

    order = cell_order(array)
    bar = {"min": -limit, "max": limit, "calculable": True, "orient": "vertical", "right": 0, "top": "middle",
           "itemHeight": 110, "precision": 2, "text": [unit, ""], "seriesIndex": 0,
           "inRange": {"color": _COLOURS}}  # fmt: skip
    # a second layer without colours of its own: frames that the cells' neighbours do not cover
    frames = [
        {"value": [x, y, 0], "name": f"{kind} {y} {x}",
         "itemStyle": {"color": "transparent", "borderColor": MARKS[kind], "borderWidth": 3}}
        for (y, x), kind in (marks or {}).items()
        if (y, x) in set(order)
    ]  # fmt: skip
    if subtitle is None:
        subtitle = _says(array.attrs)
    return {
        "title": {"text": title, "subtext": subtitle, "textStyle": {"fontSize": 14}, "itemGap": 7, "padding": [2, 0]},
        "tooltip": {"formatter": "{b}", "confine": True},
        "grid": {"left": 64, "right": 84, "top": 58, "bottom": 104 if slanted else 52, "backgroundColor": GREY,
                 "show": True, "borderWidth": 0, **_AS_GIVEN},
        "xAxis": _axis(x_dim, x_labels, gap=82 if slanted else 28, slanted=slanted),
        "yAxis": _axis(y_dim, y_labels, gap=44),
        "visualMap": bar,
        "series": [
            {"type": "heatmap", "data": [cell(y, x) for y, x in order],
             "selectedMode": "single" if selectable else False, "itemStyle": {"borderWidth": 1, "borderColor": "#fff"},
             "select": {"itemStyle": {"borderColor": MARKS["selected"], "borderWidth": 3}},
             "emphasis": {"itemStyle": {"borderColor": INK, "borderWidth": 2}}},
            *([{"type": "heatmap", "data": frames, "silent": True, "z": 5, "tooltip": {"show": False},
                "animation": False}] if frames else []),
        ],
        "animation": False,
        "aria": {"enabled": True},
    }  # fmt: skip


def attention(pattern: np.ndarray, tokens: Sequence[str], *, title: str = "") -> dict[str, Any]:
    """One head's pattern: a row for each query, first token on top, and where it looks; what lies ahead stays empty.

    pattern: [query, key], rows summing to 1. tokens: texts, one for each position.
    """
    names = [f"{i}:{visible(token)}" for i, token in enumerate(tokens)]
    return {
        "title": {"text": title, "textStyle": {"fontSize": 14}, "padding": [2, 0]},
        "tooltip": {"formatter": "{b}", "confine": True},
        "grid": {"left": 110, "right": 84, "top": 34, "bottom": 104, **_AS_GIVEN},
        "xAxis": _axis("source", names, gap=82, slanted=True),
        "yAxis": _axis("position", names, gap=92) | {"inverse": True, "name": "query position and token"},
        "visualMap": _share_bar(float(pattern.max()), [0]),
        "series": [_pattern_series(pattern, names)],
        "animation": False,
        "aria": {"enabled": True},
    }  # fmt: skip


def attention_grid(patterns: np.ndarray, tokens: Sequence[str], *, columns: int = 4) -> dict[str, Any]:
    """All heads of a layer as small maps with one colour range; keys to the right, queries downwards.

    patterns: [head, query, key]. Raises `OptionError` above `MAX_SMALL` cells.
    """
    heads, width = patterns.shape[0], patterns.shape[1]
    if (size := heads * width * (width + 1) // 2) > MAX_SMALL:
        raise OptionError(
            f"{heads} heads of {width} tokens are {size:,} cells, more than {MAX_SMALL:,}: look at one head at a time"
        )
    names = [f"{i}:{visible(token)}" for i, token in enumerate(tokens)]
    rows = -(-heads // columns)
    grids, titles = [], []
    for head in range(heads):
        y, x = divmod(head, columns)
        left, top = 3 + x * 87 / columns, 100 * y / rows
        grids.append({"left": f"{left:.2f}%", "top": f"{top + 10 / rows:.2f}%", "width": f"{87 / columns - 2:.2f}%",
                      "height": f"{82 / rows:.2f}%", "show": True, "borderColor": "#888888",
                      **_AS_GIVEN})  # fmt: skip
        titles.append({"text": f"head {head}", "left": f"{left:.2f}%", "top": f"{top:.2f}%",
                       "textStyle": {"fontSize": 12}, "padding": 2})  # fmt: skip
    plain = {"type": "category", "data": names, "axisLabel": {"show": False}, "axisTick": {"show": False},
             "axisLine": {"show": False}}  # fmt: skip
    named = {"nameLocation": "middle", "nameGap": 4, "nameTextStyle": {"fontSize": 10}}
    return {
        "title": titles,
        "tooltip": {"formatter": "{b}", "confine": True},
        "grid": grids,
        # named at the left and below, where there is room; every map has the same axes
        "xAxis": [plain | {"gridIndex": i} | (named | {"name": "key position →"} if i + columns >= heads else {})
                  for i in range(heads)],
        "yAxis": [plain | {"gridIndex": i, "inverse": True} | (named | {"name": "query position →"} if i % columns == 0 else {})
                  for i in range(heads)],
        "visualMap": _share_bar(1.0, list(range(heads))),
        "series": [
            _pattern_series(patterns[i], names, prefix=f"head {i}, ") | {"xAxisIndex": i, "yAxisIndex": i} for i in range(heads)
        ],
        "animation": False,
        "aria": {"enabled": True},
    }  # fmt: skip


def token_strip(
    clean: Sequence[str], corrupt: Sequence[str], *, relevance: Sequence[float] | None = None,
    same: str = "·",
) -> str:  # fmt: skip
    """HTML of a pair of prompts: a column for each position with its number, the clean token and the corrupt one below.

    Where both are equal the corrupt row has a dot; where they differ both are framed. Every text is escaped. relevance: of each
    clean token, which colours it: blue raises the metric, red lowers it.
    """
    limit = max((abs(v) for v in relevance), default=0.0) if relevance is not None else 0.0
    cells = []
    for i, (ours, theirs) in enumerate(zip(clean, corrupt, strict=True)):
        differ = ours != theirs
        frame = f"border:2px solid {MARKS['selected']};font-weight:600;" if differ else "border:2px solid transparent;"
        ground = "" if relevance is None else _ground(relevance[i] / (limit or 1.0))
        tip = "" if relevance is None else f' title="relevance {relevance[i]:+.3g}"'
        box = "padding:1px 4px;border-radius:4px;white-space:pre;"
        cells.append(
            '<div style="display:inline-flex;flex-direction:column;align-items:center;font-family:monospace;font-size:14px">'
            f'<span style="font-size:11px;opacity:.65">{i}</span>'
            f'<span style="{box}{frame}{ground}"{tip}>{_escaped(ours)}</span>'
            f'<span style="{box}{frame}">{_escaped(theirs) if differ else same}</span></div>'
        )
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 2px">{"".join(cells)}</div>'


def _escaped(text: str) -> str:
    return html.escape(visible(text)) or "&nbsp;"


def _ground(share: float) -> str:
    """A background on the diverging scale; its text is dark or light to be read on it, in either theme."""
    at = (min(max(share, -1.0), 1.0) + 1) / 2 * (len(SCALE) - 1)
    low = min(int(at), len(SCALE) - 2)
    ends = [np.array([int(_COLOURS[i][j : j + 2], 16) for j in (1, 3, 5)]) for i in (low, low + 1)]
    red, green, blue = (int(v) for v in ends[0] + (ends[1] - ends[0]) * (at - low))
    return f"background:rgb({red},{green},{blue});color:{'#ffffff' if abs(share) > 0.6 else INK};"


def _says(attrs: Mapping[str, Any]) -> str:
    """What the colours mean. The direction of a patch says nothing of two maps' difference."""
    if "difference" not in attrs:
        return colour_title(dict(attrs))
    unit = f" ({attrs['unit']})" if attrs.get("unit") else ""
    return f"{attrs.get('metric', 'effect')}{unit}, {attrs['difference']}, blue = above 0"


def _axis(dim, labels: list[str], *, gap: int, slanted: bool = False) -> dict[str, Any]:
    # category axes are numbered by place, and their texts have to differ
    text = {"rotate": 45 if slanted else 0, "fontSize": 11, "width": 86, "overflow": "truncate"}
    if len(labels) <= _LABELS:
        text["interval"] = 0
    return {"type": "category", "data": labels, "name": _AXES.get(dim, str(dim)), "nameLocation": "middle", "nameGap": gap,
            "axisLabel": text, "axisTick": {"show": False}, "splitLine": {"show": False}}  # fmt: skip


def _unique(labels: Sequence[str]) -> list[str]:
    labels = [str(label) for label in labels]
    return labels if len(set(labels)) == len(labels) else [f"{i}:{label}" for i, label in enumerate(labels)]


def _pattern_series(pattern: np.ndarray, names: list[str], prefix: str = "") -> dict[str, Any]:
    queries, keys = np.tril_indices(len(pattern))
    data = [
        {"value": [k, q, float(f"{pattern[q, k]:.4g}")], "name": f"{prefix}{names[q]} looks at {names[k]}: {pattern[q, k]:.1%}"}
        for q, k in zip(queries.tolist(), keys.tolist(), strict=True)
    ]  # fmt: skip
    return {"type": "heatmap", "data": data, "emphasis": {"itemStyle": {"borderColor": INK, "borderWidth": 1}}}


def _share_bar(top: float, series: list[int]) -> dict[str, Any]:
    return {"min": 0, "max": round(top, 3) or 1.0, "calculable": True, "orient": "vertical", "right": 0, "top": "middle",
            "itemHeight": 110, "precision": 2, "text": ["attention", ""], "seriesIndex": series,
            "inRange": {"color": _SHARES}}  # fmt: skip
