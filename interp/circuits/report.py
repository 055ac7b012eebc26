"""A circuit discovery as one self-contained HTML page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.circuits.drawing import draw_by_position, draw_circuit
from interp.circuits.edges import how_scored
from interp.circuits.similarity import stability_text
from interp.files import write_atomically
from interp.page import agreement_table, figure_html, header, page, provenance_list
from interp.plots import GREY, LOWERS, RAISES, finish

if TYPE_CHECKING:
    from interp.circuits.discovery import CircuitDiscovery


def write_report(found: CircuitDiscovery, path: str | Path) -> Path:
    """Write the page and return its path."""
    return write_atomically(path, render(found))


def render(found: CircuitDiscovery) -> str:
    """The whole page as HTML."""
    a = found.attrs
    title = f"{a['model']} on {a['task']}: the circuit"
    sections = [
        header(found, title, f"Edges scored by {how_scored(a)}"),
        _circuit(found),
        _curve(found),
        _agreement(found),
        _stability(found),
        _positions(found),
        provenance_list({**a, **found.faithfulness.attrs, "method": a["method"]}),
    ]
    return page(title, sections)


def curve_figure(curve: xr.Dataset, circuit_size: int | None = None, *, title: str | None = None) -> go.Figure:
    """Faithfulness by the share of edges kept, on a logarithmic axis, for both rankings, with intervals over prompts."""
    figure = go.Figure()
    names = {"size": ("ranked by |score|", RAISES, "rgba(33,102,172,0.15)"), "value": ("ranked by help", LOWERS, None)}
    x = curve.n_edges.values.astype(float)
    drawn = x > 0
    for by, (name, colour, band) in names.items():
        one = curve.sel(by=by)
        if band:
            figure.add_scatter(
                x=np.concatenate([x[drawn], x[drawn][::-1]]), hoverinfo="skip", name="95 % interval", mode="lines",
                y=np.concatenate([one.high.values[drawn], one.low.values[drawn][::-1]]), fill="toself", line={"width": 0},
                fillcolor=band,
            )  # fmt: skip
        figure.add_scatter(
            x=x[drawn], y=one.faithfulness.values[drawn], mode="lines+markers", name=name, line={"color": colour},
            marker={"size": 5}, customdata=np.stack([curve.fraction.values[drawn], one.n_kept.values[drawn]], 1),
            hovertemplate="%{x} edges (%{customdata[0]:.1%}), %{customdata[1]} after pruning<br>faithfulness %{y:.3f}"
                          f"<extra>{name}</extra>",
        )  # fmt: skip
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": GREY, "width": 1})
    if circuit_size:
        figure.add_vline(x=circuit_size, line={"color": "#888888", "dash": "dot"})
        figure.add_annotation(  # on a logarithmic axis its place is an exponent
            x=np.log10(circuit_size), y=0.06, text="the circuit", showarrow=False, xanchor="left", xshift=4
        )
    figure.update_xaxes(title=f"edges kept before pruning; the rest: {curve.attrs['ablation']} ablation", type="log")
    figure.update_yaxes(title="faithfulness (1 = whole model, 0 = no edges)")
    return finish(figure, title, height=400)


def _circuit(d: CircuitDiscovery) -> str:
    f, c = d.faithfulness, d.circuit
    rows = "".join(
        f"<tr><td><code>{html.escape(r.edge)}</code></td><td>{r.score:+.4f}</td><td>{r.found_again:.0%}</td></tr>"
        for r in d.table().head(20).itertuples()
    )
    more = f"<p class='pale'>The 20 strongest of {c.n_edges} edges.</p>" if c.n_edges > 20 else ""
    return (
        f"<h2>The circuit</h2><p>{c.n_edges:,} of the model's edges, between {len(c.nodes)} components. With these edges alone "
        f"(everything else: {html.escape(f.attrs['ablation'])} ablation) the model keeps <b>{float(f.faithfulness[0]):.1%}</b> "
        f"of the behaviour (95 % interval over prompts {float(f.low[0]):.1%} to {float(f.high[0]):.1%}); without them, "
        f"{float(d.completeness.complement):z.1%}.</p>"
        + figure_html(draw_circuit(c), "Width: size of the score. Blue edges help the answer, red ones work against it. "
                      "Point at the middle of an edge for its numbers.")
        + f"<table><tr><th>edge</th><th>score ({html.escape(d.attrs['unit'])})</th><th>in resampled circuits</th></tr>{rows}"
        f"</table>{more}"
    )  # fmt: skip


def _curve(d: CircuitDiscovery) -> str:
    curve = d.curve
    return (
        f"<h2>Faithfulness by size</h2><p>CPR {float(curve.cpr):.3f} (area under the curve of edges ranked by help; more is "
        f"better), CMD {float(curve.cmd):.4f} (area between the curve ranked by size and 1; 0 is best).</p>"
        + figure_html(curve_figure(curve, int(d.circuit.attrs["n_edges"])),
                      "Above 1 is possible: edges that work against the answer are left out too.")
    )  # fmt: skip


def _agreement(d: CircuitDiscovery) -> str:
    if d.agreement is None:
        return (
            "<h2>How far to trust the scores</h2><p>Every edge was patched exactly: the scores are interventions.</p>"
        )
    return (
        "<h2>How far to trust the scores</h2>"
        "<p class='note'>Scores are estimates; the circuit's faithfulness is measured. Below: "
        f"{html.escape(d.agreement.says)}, with 95 % bootstrap intervals.</p>" + agreement_table(d.agreement.table)
    )


def _stability(d: CircuitDiscovery) -> str:
    return f"<h2>Would other prompts give the same circuit?</h2><p>{html.escape(stability_text(d.stability))}.</p>"


def _positions(d: CircuitDiscovery) -> str:
    if not d.circuit.n_edges:
        return ""
    how = html.escape(how_scored(d.by_position.attrs))
    return (
        f"<h2>Where, position by position</h2><p>The circuit's edges at the tokens where they act, as {how} estimates them; "
        "means over prompts, the first prompt's tokens.</p>"
        + figure_html(draw_by_position(d.by_position, d.circuit), "")
    )
