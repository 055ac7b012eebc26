"""A discovery as one self-contained HTML page: opens offline, carries its data, says how every number was made."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from interp import plots
from interp.files import write_atomically
from interp.page import agreement_table, figure_html, header, page, provenance_list

if TYPE_CHECKING:
    from interp.discovery import Discovery

_SITES = {
    "resid_pre": "Residual stream before each layer",
    "resid_mid": "Residual stream between attention and MLP",
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
}


def write_report(discovery: Discovery, path: str | Path) -> Path:
    """Write the page and return its path."""
    return write_atomically(path, render(discovery))


def render(discovery: Discovery) -> str:
    """The whole page as HTML."""
    a = discovery.attrs
    title = f"{a['model']} on {a['task']}: where the behaviour lives"
    method = (
        "Exact activation patching"
        if discovery.agreement is None
        else "Activation patching, estimated from one backward pass"
    )
    sections = [
        header(discovery, title, method),
        _ranking(discovery),
        _agreement(discovery),
        _faithfulness(discovery),
        _maps(discovery),
        provenance_list(a),
    ]
    return page(title, sections)


def _ranking(d: Discovery) -> str:
    found = d.ranking[d.ranking.detected]
    names = ", ".join(f"<code>{n}</code>" for n in found.node) or "none"
    rows = "".join(
        f"<tr><td><code>{r.node}</code></td><td>{r.effect:+.3f}</td><td>{r.low:+.3f} to {r.high:+.3f}</td>"
        f"<td>{r.share:+.1%}</td><td>{'yes' if r.detected else ''}</td></tr>"
        for r in d.ranking.head(12).itertuples()
    )
    unit = html.escape(d.attrs["unit"])
    how = "patched together" if d.agreement is None else "scored from one backward pass and added up"
    return (
        "<h2>Components, ranked</h2>"
        f"<p>Every attention head (<code>a3.h2</code>: layer 3, head 2) and MLP (<code>m5</code>), all positions {how}. "
        f"Standing out, by more than two standard deviations from the mean over components: {names}.</p>"
        + figure_html(plots.ranking_bars(d.ranking, d.attrs), "Mean effect with its 95 % bootstrap interval over prompts; "
                  "solid bars stand out, pale ones do not.")
        + f"<table><tr><th>component</th><th>effect ({unit})</th><th>95 % interval</th><th>share of clean − corrupt</th>"
        f"<th>stands out</th></tr>{rows}</table>"
    )  # fmt: skip


def _agreement(d: Discovery) -> str:
    if d.agreement is None:
        return ""
    return (
        "<h2>How far to trust this map</h2><p class='note'>The effects on this page are estimates from one backward pass by "
        f"the rules <code>{html.escape(d.attrs['rules'])}</code>. Below: {html.escape(d.agreement.says)}, with 95 % bootstrap "
        f"intervals over prompts. The curve of kept components is exact.</p>{agreement_table(d.agreement.table)}"
    )


def _faithfulness(d: Discovery) -> str:
    curve = d.faithfulness
    enough = [(int(n), float(r)) for n, r in zip(curve.n.values, curve.recovered.values, strict=True) if r >= 0.9]
    says = (
        f"The first {enough[0][0]} recover {enough[0][1]:.0%}."
        if enough and enough[0][0] < curve.attrs["n_nodes"]
        else ""
    )
    figure = plots.faithfulness_curve(curve, d.random_faithfulness)
    return (
        "<h2>Do the top components suffice?</h2>"
        f"<p>The clean prompt is run with only the first n components of the ranking left as they are; all other heads and "
        f"MLPs are replaced ({html.escape(curve.attrs['ablation'])} ablation). The embeddings stay clean. {says}</p>"
        + figure_html(
            figure, "Above 1 or below 0 is possible: components that work against the answer are ablated too."
        )
    )


def _maps(d: Discovery) -> str:
    maps = [(name, label) for name, label in _SITES.items() if name in d.effects]
    parts = ["<h2>Where, position by position</h2><p class='pale'>Means over prompts. A star marks positions whose token "
             "differs between prompts; the first prompt's is shown. Grey: no such place in these prompts.</p>"]  # fmt: skip
    for name, label in maps:
        parts.append(figure_html(plots.heatmap(d.effects[name], title=label), ""))
    heads = d.nodes.where(d.nodes.node.str.startswith("a"), drop=True)
    n_layers = len({n.split(".")[0] for n in heads.node.values})
    grid = heads.mean("prompt").values.reshape(n_layers, -1)
    array = d.nodes.__class__(
        grid, dims=("layer", "head"), coords={"layer": range(n_layers), "head": range(grid.shape[1])}
    )
    parts.append(
        figure_html(plots.heatmap(array.assign_attrs(d.attrs), title="Attention heads, all positions at once"), "")
    )
    if "top_heads" in d.effects:
        parts.append(
            figure_html(plots.heatmap(d.effects["top_heads"], title="The strongest heads, position by position"), "")
        )
    return "".join(parts)
