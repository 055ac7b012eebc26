"""What a whole grid found, for a reader: what was run, what came out by method, and which differences are more than chance.

    found = summary(Runs(), "which way of scoring edges")
    print(found)                       # the tables, for a terminal
    found.report("grid.html")          # with figures, as one page that opens offline

A method is what jobs of one kind differ in: the options that vary. Means are over seeds, and beside them stands how far seeds are
apart: the 95 % BCa interval from 5 seeds on, and with fewer the least and the greatest. Methods are compared in pairs within
models, tasks and seeds (`interp.jobs.comparison`), seeds of one model and task as one cluster, p by Holm over each table.
"""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow.parquet as pq
import xarray as xr

from interp.agreement import compare
from interp.errors import OptionError, name_some
from interp.files import write_atomically
from interp.jobs.arrays import from_table, joined
from interp.jobs.comparison import Measure, compare_measures, means_figure, means_text, pairs_text
from interp.jobs.kinds import KINDS
from interp.jobs.query import is_exact, jobs_of, methods_of, question_of
from interp.jobs.shards import shards_of
from interp.jobs.spec import Job
from interp.jobs.store import Run, Runs, Verified
from interp.page import figure_html, page, provenance_list

Result = xr.DataArray | xr.Dataset


CIRCUITS = (
    Measure("cmd", "CMD", "lower"), Measure("cpr", "CPR", "higher"), Measure("smallest", "smallest circuit, % of edges", "lower"),
    Measure("held_out", "faithfulness, held out", "near 1"), Measure("stability", "stability, Jaccard", "higher"),
)  # fmt: skip
AGREEMENT = (
    Measure("pearson", "Pearson", "higher"), Measure("spearman", "Spearman", "higher"),
    Measure("relative_error", "relative error", "lower"), Measure("sign", "share of signs right", "higher"),
)  # fmt: skip
DICTIONARIES = {
    "sae": (Measure("fvu", "FVU", "lower"), Measure("l0", "L0, active features per token"),
            Measure("dead", "dead, share of features", "lower"), Measure("ce_recovered", "CE recovered, share", "higher")),
    "snmf": (Measure("error", "error, share of squared norm", "lower"), Measure("neurons_per_feature", "neurons per feature"),
             Measure("stability", "stability, cosine", "higher"), Measure("n_iter", "iterations")),
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One part of a summary. says: what the numbers are; notes: what to be careful about; tables and figures by caption."""

    title: str
    says: str = ""
    notes: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, go.Figure] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [
            f"{self.title}\n{'-' * len(self.title)}",
            fill(self.says, 120),
            *(fill(f"Note: {note}", 120) for note in self.notes),
        ]
        parts += [
            f"{fill(caption, 120)}\n{table.to_string(index=False, na_rep='')}" for caption, table in self.tables.items()
        ]
        return "\n\n".join(part for part in parts if part)

    @property
    def html(self) -> str:
        """As a part of a page."""
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in self.notes)
        figures = "".join(figure_html(figure, caption) for caption, figure in self.figures.items())
        tables = "".join(
            f"<p class='pale'>{html.escape(caption)}</p><div style='overflow-x: auto'>{_table(table)}</div>"
            for caption, table in self.tables.items()
        )
        says = f"<p>{html.escape(self.says)}</p>" if self.says else ""
        return f"<h2>{html.escape(self.title)}</h2>{says}{notes}{figures}{tables}"


@dataclass(frozen=True)
class Summary:
    """A run in sections; `data` has the numbers behind them, a row for each job, place or pair of methods."""

    run: Run
    facts: Mapping[str, str]
    sections: Sequence[Section]
    data: Mapping[str, pd.DataFrame]

    def __str__(self) -> str:
        head = f"{self.run.name or self.run.id}: {', '.join(f'{name} {value}' for name, value in self.facts.items())}"
        return "\n\n\n".join([head, *map(str, self.sections)])

    def report(self, path: str | Path) -> Path:
        """Write it as one HTML page, which needs no network. Raises `OptionError` where nothing can be written."""
        title = f"{self.run.name or self.run.id}: summary of a run"
        tiles = "".join(
            f"<div class='tile'><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in self.facts.items()
        )
        run = self.run
        made = {"run": run.id, "status": run.status, "submitted": run.submitted, "finished": run.finished, "host": run.host,
                "device": run.device, **run.running, **run.code, "versions": run.versions, "spec, SHA-256": run.spec_sha256,
                **{f"weights of {name}": value for name, value in run.models.items()}}  # fmt: skip
        return write_atomically(
            path, page(title, [f"<h1>{html.escape(title)}</h1><div class='tiles'>{tiles}</div>",
                               *(section.html for section in self.sections), provenance_list(made)])
        )  # fmt: skip


def summary(runs: Runs, id: str) -> Summary:
    """What a run found so far. id: as `Runs.find` takes it.

    Whole shards only are read, and what is missing, damaged or failed is named. Raises `OptionError` if there is no such run.
    """
    id = runs.find(id)
    run, jobs = runs.get(id), runs.grid(id).everything
    shards = list(shards_of(jobs, run.models, run.environment)) if run.models else []
    found, asked = runs.verify(id, shards), {job.id: job for job in jobs}
    table = jobs_of(run, jobs, shards, found)
    paths = defaultdict(list)
    for shard in shards:
        if shard.id in found.whole:
            paths[shard.job.id].append(found.whole[shard.id])
    read = lambda job: joined([from_table(pq.read_table(path)) for path in paths[job]])  # noqa: E731
    sections, data = [_what_was_run(run, table, found)], {"jobs": table}
    methods = methods_of(table, asked)
    for kinds, tell in (({"circuit"}, _circuits), ({*DICTIONARIES}, _dictionaries), ({"attribute", "edge_scores"}, _agreement),
                        ({k for k, v in KINDS.items() if v.splits}, _strongest)):  # fmt: skip
        if (table.kind.isin(kinds) & (table.status == "done")).any():
            parts, numbers = tell(methods, asked, read)
            sections += parts
            data |= numbers
    count = table.status.value_counts()
    states = {status: f"{count.get(status, 0):,}" for status in ("done", "failed", "missing")}
    facts = {"status": run.status, "jobs": f"{len(table):,}", **states, "seconds of work": f"{run.seconds:,.0f}"}
    return Summary(run, facts, sections, data)


# ------------------------------------------------------------------------------------------------------------ sections


def _what_was_run(run: Run, jobs: pd.DataFrame, found: Verified) -> Section:
    table = pd.DataFrame([
        {"kind": kind, "models": name_some(sorted(part.model.unique())),
         "tasks": name_some(sorted(part.task.dropna().unique())) or ("own prompts" if KINDS[kind].of == "pairs" else "text"),
         "prompt pairs": name_some(sorted(part.n.unique())) if KINDS[kind].of == "pairs" else "-",
         "seeds": name_some(sorted(part.seed.unique()), 10), "jobs": len(part),
         **{state: int((part.status == state).sum()) for state in ("done", "failed", "missing")}}
        for kind, part in jobs.groupby("kind", sort=False)
    ])  # fmt: skip
    tables, notes = {"Jobs by kind.": table}, []
    failed, missing = jobs[jobs.status == "failed"], jobs[jobs.status == "missing"]
    if len(failed):
        reasons = failed.fillna({"task": "text"}).groupby("error", sort=False)
        tables["Jobs that failed, by reason; nothing below is of them."] = pd.DataFrame([
            {"reason": reason, "jobs": len(part), "first": f"{part.kind.iloc[0]} {part.model.iloc[0]} {part.task.iloc[0]}",
             "id": name_some(part.job.tolist(), 3)} for reason, part in reasons
        ])  # fmt: skip
    if len(missing):
        notes.append(f"{len(missing):,} jobs are not complete ({name_some(missing.job.tolist())}): run the same spec again to "
                     "compute what is missing of them.")  # fmt: skip
    notes += [f"{path.name} is damaged: {why}" for path, why in list(found.damaged.items())[:10]]
    if run.error and not len(failed):
        notes.append(run.error)
    return Section("What was run", "", notes, tables)


def _circuits(
    jobs: pd.DataFrame, asked: Mapping[str, Job], read: Callable[[str], Result]
) -> tuple[list[Section], dict]:
    rows, apart = [], set()
    for row in jobs[jobs.kind == "circuit"].to_dict("records"):
        found = read(row["job"])
        total = float(found.n_edges.sel(fraction=1.0))
        apart.add(bool(found.attrs["held_out"]))
        rows.append(row | {
            "cmd": float(found.cmd), "cpr": float(found.cpr), "smallest": 100 * float(found.smallest) / total,
            "edges": float(found.smallest), "held_out": float(found.smallest_held_out),
            "stability": float(found.smallest_stability),
        })  # fmt: skip
    table, other, same = pd.DataFrame(rows), "other pairs of the task than it was found on", "the pairs it was found on"
    judged = {frozenset({True}): other, frozenset({False}): same}.get(
        frozenset(apart), f"{other}, or, for one's own prompts, on {same}"
    )
    says = (
        "Faithfulness f is the share of the metric's gap between no edges and all edges that a circuit carries. CMD is the area "
        "under |1 − f| over the share of edges kept (lower is better), CPR that under f (higher is better, and more than 1 is "
        "possible). The smallest circuit is the first of a ranking that reaches the target of f on the pairs it was found on "
        f"(lower is better); its faithfulness held out is best near 1. CMD, CPR and that are of {judged}. Stability is the mean "
        "Jaccard of the circuits of resampled prompts (higher is better; 2510.00845 asks for 0.8)."
    )
    compared, notes = compare_measures(table, CIRCUITS)
    tables = dict([means_text(table, CIRCUITS)] + ([pairs_text(compared)] if compared is not None else []))
    figures = {"Each dot is a seed, each bar the mean over seeds.": means_figure(table, CIRCUITS)}
    data = {"circuits": table} | ({"circuits_compared": compared} if compared is not None else {})
    return [Section("Circuits", says, notes, tables, figures)], data


def _dictionaries(
    jobs: pd.DataFrame, asked: Mapping[str, Job], read: Callable[[str], Result]
) -> tuple[list[Section], dict]:
    sections, data = [], {}
    for kind, measures in DICTIONARIES.items():
        done = jobs[jobs.kind == kind]
        if len(done):
            table = pd.DataFrame([
                row | {name: float(value) for name, value in read(row["job"]).data_vars.items()}
                for row in done.to_dict("records")
            ])  # fmt: skip
            what = {"sae": "Sparse autoencoders", "snmf": "Semi-NMF"}[kind]
            says = (
                "Measured on text kept apart from training."
                if kind == "sae"
                else "Of the activations that were factorised."
            )
            sections.append(Section(what, says, (), dict([means_text(table, measures)])))
            data[kind] = table
    return sections, data


def _agreement(
    jobs: pd.DataFrame, asked: Mapping[str, Job], read: Callable[[str], Result]
) -> tuple[list[Section], dict]:
    exact = {question_of(asked[id]): id for id in jobs.job if is_exact(asked[id])}
    rows, notes, held = [], [], {}
    for row in jobs[jobs.kind.isin(["attribute", "edge_scores"])].to_dict("records"):
        job = asked[row["job"]]
        if is_exact(job) or (truth := exact.get(question_of(job))) is None:
            continue
        if truth not in held:
            held = {truth: read(truth)}  # one at a time: they are large
        try:
            found = compare(read(job.id), held[truth], n_resamples=1)
        except OptionError as error:
            notes.append(f"{row['label']} on {row['model']}, {row['task']} was not compared: {error}")
            continue
        rows += [row | {"of": f"{job.kind}: {site}", **values} for site, values in found.to_dict("index").items()]
    if not rows:
        return [], {}
    table, tables, parts = pd.DataFrame(rows), {}, []
    for of, part in table.groupby("of", sort=False):
        compared, more = compare_measures(part, AGREEMENT)
        notes += [f"{of}: {note}" for note in more]
        texts = [means_text(part, AGREEMENT)] + ([pairs_text(compared)] if compared is not None else [])
        tables |= {f"{of}. {caption}": text for caption, text in texts}
        parts += [compared.assign(of=of)] if compared is not None else []
    says = (
        "Estimates beside exact patching of the same places, metric, direction and prompts in this grid. Pearson and relative "
        "error are over all prompts and places, Spearman and signs over the places that can change."
    )
    data = {"agreement": table} | ({"agreement_compared": pd.concat(parts, ignore_index=True)} if parts else {})
    return [Section("Agreement with exact patching", says, notes, tables)], data


def _strongest(
    jobs: pd.DataFrame, asked: Mapping[str, Job], read: Callable[[str], Result]
) -> tuple[list[Section], dict]:
    splits, tables = jobs[[KINDS[kind].splits for kind in jobs.kind]], defaultdict(list)
    for (kind, label, question, model, task), group in splits.groupby(
        ["kind", "label", "question", "model", "task"], sort=False
    ):
        effects: dict[tuple[str, str], list[xr.DataArray]] = defaultdict(list)
        for id in group.job:
            for name, array in _by_metric(read(id)):
                bare = array.drop_vars(
                    [c for c in array.coords if c not in array.dims and c != "node"]
                )  # tokens differ by seed
                effects[name].append(bare.mean("prompt", keep_attrs=True))
        for (site, metric), arrays in effects.items():
            mean = (
                arrays[0]
                if len(arrays) == 1
                else xr.concat(arrays, "job", coords="minimal", compat="override", join="outer").mean("job")
            )
            top = ", ".join(f"{place} {value:+.3g}" for place, value in _largest(mean).items())
            about = arrays[0].attrs
            tables[f"{site}, {about.get('direction')}, {metric} in {about.get('unit') or 'its own unit'}."].append({
                "kind": kind, "method": label, "question": question, "model": model, "task": task, "seeds": len(group),
                "strongest": top,
            })  # fmt: skip
    says = (
        "The five places with the largest effect by size, as a mean over prompts and seeds. Positive: the metric is higher after "
        "the patch than before. @3 is position 3. No interval is told here: see the scores themselves."
    )
    found = {caption: pd.DataFrame(rows) for caption, rows in tables.items()}
    data = pd.concat([table.assign(of=caption) for caption, table in found.items()], ignore_index=True)
    shown = {
        c: t if t.groupby("kind").question.nunique().max() > 1 else t.drop(columns="question") for c, t in found.items()
    }
    return [Section("Strongest places", says, (), shown)], {"strongest": data}


# ------------------------------------------------------------------------------------------------------------ numbers


def _by_metric(result: Result) -> list[tuple[tuple[str, str], xr.DataArray]]:
    """Effects of each site and metric."""
    arrays = (
        {str(result.attrs.get("site", result.name or "")): result}
        if isinstance(result, xr.DataArray)
        else result.data_vars
    )
    found = []
    for site, array in arrays.items():
        array = array.assign_attrs({**result.attrs, **array.attrs})
        for metric in array.metric.values if "metric" in array.dims else (None,):
            one = array if metric is None else array.sel(metric=metric)
            found.append(((str(site), str(metric or array.attrs.get("metric", ""))), one))
    return found


def _largest(effects: xr.DataArray, n: int = 5) -> dict[str, float]:
    """The effects of the n places with the largest, by name."""
    values = effects.values.ravel()
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:n]
    return {_named(effects, int(i)): float(values[i]) for i in order if np.isfinite(values[i])}


def _named(effects: xr.DataArray, flat: int) -> str:
    at = {dim: int(i) for dim, i in zip(effects.dims, np.unravel_index(flat, effects.shape), strict=True)}
    label = lambda dim: effects[dim].values[at[dim]]  # noqa: E731
    if {"source", "target"} <= {*at}:
        parts = [f"{label('source')}→{label('target')}"]
        rest = [dim for dim in at if dim not in ("source", "target")]
    else:
        by = effects.node.dims if "node" in effects.coords else ()
        parts = [str(effects.node.values[tuple(at[dim] for dim in by)])] if by else []
        rest = [dim for dim in at if dim not in by]
    return " ".join(parts + [f"@{label(dim)}" if dim == "position" else f"{dim} {label(dim)}" for dim in rest])


# ------------------------------------------------------------------------------------------------------------- drawing


def _table(table: pd.DataFrame) -> str:
    left = {
        i for i, name in enumerate(table.columns) if any(isinstance(v, str) and v[:1].isalpha() for v in table[name])
    }
    style = [" style=text-align:left" if i in left else "" for i in range(len(table.columns))]
    head = "".join(f"<th{s}>{html.escape(str(name))}</th>" for s, name in zip(style, table.columns, strict=True))
    rows = ""
    for row in table.itertuples(index=False, name=None):
        cells = (f"<td{s}>{_cell(value)}</td>" for s, value in zip(style, row, strict=True))
        rows += f"<tr>{''.join(cells)}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(value: object) -> str:
    if not isinstance(value, str):
        return "" if pd.isna(value) else html.escape(str(value))
    if spread := re.fullmatch(r"(\S+) \((\S+ to \S+)\)( \*)?", value):
        return f"{spread[1]}{spread[3] or ''}<br><span class='pale' style='white-space: nowrap'>{spread[2]}</span>"
    parts = value.split(", ")  # names, intervals and the parts of a list stay in one piece; sentences are broken
    if max(map(len, parts)) >= 30:
        return html.escape(value)
    return ", ".join(f"<span style='white-space: nowrap'>{html.escape(part)}</span>" for part in parts)
