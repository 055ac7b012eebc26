"""What all reports have in common: one self-contained HTML page that opens offline and says how its numbers were made."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from interp.agreement import STATISTICS
from interp.grids import visible

if TYPE_CHECKING:
    import pandas as pd

    from interp.circuits.discovery import CircuitDiscovery
    from interp.discovery import Discovery

_STYLE = """
:root { color-scheme: light; --ink: #24292f; --pale: #57606a; --line: #d8dee4; --wash: #f6f8fa; --mark: #fff1c2; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 4px; }
p.lead, figcaption, .pale { color: var(--pale); } p.lead { margin-top: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; background: var(--wash); }
.tile b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; }
.tokens { font: 13px/2 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.tokens span { border: 1px solid var(--line); border-radius: 4px; padding: 1px 3px; margin-right: 2px; white-space: pre; }
.tokens span.differs { background: var(--mark); border-color: #d4a72c; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 12px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { background: var(--wash); }
.note { border-left: 4px solid #d4a72c; background: #fffbea; padding: 6px 12px; margin: 6px 0; }
figure { margin: 8px 0 20px; } code { background: var(--wash); padding: 1px 4px; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; } dt { color: var(--pale); } dd { margin: 0; }
"""

_DIRECTIONS = {
    "denoise": "the corrupt prompt is run and clean values are patched in: does this place suffice to bring the answer back?",
    "noise": "the clean prompt is run and corrupt values are patched in: is this place needed for the answer?",
    "both": "the mean of bringing the clean value into the corrupt run and of losing it from the clean run.",
}


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page as HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body>{''.join(sections)}</body></html>\n"
    )


def header(d: Discovery | CircuitDiscovery, title: str, method: str) -> str:
    """The title, how the model does the task, notes of caution and the first pair."""
    a, s = d.attrs, d.summary
    tiles = (
        (f"{a['metric']} on clean", f"{s['metric_clean']:.3g}"),
        (f"{a['metric']} on corrupt", f"{s['metric_corrupt']:.3g}"),
        ("answer is first choice (clean)", f"{s['accuracy_clean']:.0%}"),
        ("answer's probability, clean", f"{s['probability_clean']:.2f}"),
        ("answer's probability, corrupt", f"{s['probability_corrupt']:.2f}"),
        ("prompt pairs", f"{a['n_prompts']}"),
    )
    boxes = "".join(f'<div class="tile"><b>{value}</b>{html.escape(name)}</div>' for name, value in tiles)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in d.notes)
    return (
        f"<h1>{html.escape(title)}</h1><p class='lead'>{method}, direction <b>{a['direction']}</b>: "
        f"{_DIRECTIONS[a['direction']]} A score is {html.escape(a['metric'])} after the patch minus before it"
        f"{', in ' + html.escape(a['unit']) if a['unit'] else ''}.</p>"
        f"<div class='tiles'>{boxes}</div>{notes}{_prompts(d)}"
    )


def _prompts(d: Discovery | CircuitDiscovery) -> str:
    """The first pair, token by token, with what differs marked."""
    pairs = d.pairs
    if pairs.token_strings is None:
        return ""
    differs = pairs.differs[0].tolist()
    n = int(pairs.lengths[0])
    corrupt = d.corrupt_strings or pairs.token_strings[0]

    def line(tokens) -> str:
        return "".join(
            f"<span{' class=differs' if differs[i] else ''}>{html.escape(visible(t))}</span>"
            for i, t in enumerate(tokens[:n])
        )

    answers = ", ".join(html.escape(visible(t)) for t in d.answer_strings[:6])
    wrong = ", ".join(html.escape(visible(t)) for t in d.wrong_strings[:6])
    more = "" if len(d.answer_strings) <= 6 else f" and {len(d.answer_strings) - 6} more"
    versus = f"; wrong answer <code>{wrong}</code>{'' if len(d.wrong_strings) <= 6 else ' ...'}" if wrong else ""
    return (
        f"<p><b>First pair</b> (␣ is a space; marked tokens differ; corruption: {html.escape(pairs.corruption)})</p>"
        f"<p class='tokens'>clean&nbsp;&nbsp; {line(pairs.token_strings[0])}</p>"
        f"<p class='tokens'>corrupt {line(corrupt)}</p>"
        f"<p>Answer after the clean prompt: <code>{answers}</code>{more}{versus}.</p>"
    )


def agreement_table(table: pd.DataFrame) -> str:
    """What `interp.compare` found, each number over its interval."""

    def cell(row, statistic: str) -> str:
        low, high = row[f"{statistic}_low"], row[f"{statistic}_high"]
        return f"<td>{row[statistic]:.3f}<br><span class='pale'>{low:.2f} to {high:.2f}</span></td>"

    rows = "".join(
        f"<tr><td>{html.escape(str(site))}</td>{''.join(cell(row, s) for s in STATISTICS)}</tr>"
        for site, row in table.iterrows()
    )
    heads = "".join(f"<th>{s.replace('_', ' ')}</th>" for s in STATISTICS)
    return f"<table><tr><th>site</th>{heads}</tr>{rows}</table>"


def provenance_list(attrs: Mapping) -> str:
    """Every attribute of a result."""
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in attrs.items())
    return f"<h2>How this was made</h2><dl>{items}</dl>"


def figure_html(figure: go.Figure, caption: str) -> str:
    """A figure with its caption; plotly itself is in the page once."""
    config = {"displaylogo": False, "responsive": True}
    # named by its content: plotly's own names are random, and equal discoveries should give equal pages
    name = f"plot-{hashlib.sha256(figure.to_json().encode()).hexdigest()[:12]}"
    body = figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name)
    return f"<figure>{body}<figcaption>{html.escape(caption)}</figcaption></figure>"
