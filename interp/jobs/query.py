"""Asking many runs at once, in SQL.

    query("SELECT model, method, avg(value) FROM scores WHERE variable = 'cmd' GROUP BY ALL", Runs())

DuckDB answers, from three tables that are there for the length of one question:

    runs     a row for each run: its manifest
    jobs     a row for each job of each run: what was asked, every option as a column, and done, failed or missing
    scores   a row for each number of each whole shard, with its run, its job and the columns of `jobs`

Shards are compared with their digests before they are read, and what is damaged is named in the answer's notes. They are read as
the question needs them, so a table may be larger than memory. The question can reach no file and no other database.
"""

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
import pyarrow.parquet as pq

from interp.errors import OptionError
from interp.jobs.kinds import KINDS, options_of
from interp.jobs.shards import Shard, shards_of
from interp.jobs.spec import Job
from interp.jobs.store import Run, Runs, Verified

_ASKED = {"kind": pa.string(), "model": pa.string(), "task": pa.string(), "n": pa.int64(), "seed": pa.int64(),
          "corruption": pa.string(), "template": pa.int64(), "dtype": pa.string()}  # fmt: skip
_KEY = {"run": pa.string(), "job": pa.string()}
_STATE = {
    "shards": pa.int64(),
    "whole": pa.int64(),
    "seconds": pa.float64(),
    "status": pa.string(),
    "error": pa.string(),
}
_RUN = {"run": pa.string(), "name": pa.string(), "status": pa.string(), "submitted": pa.string(), "started": pa.string(),
        "finished": pa.string(), "seconds": pa.float64(), "jobs": pa.int64(), "failed": pa.int64(), "shards": pa.int64(),
        "device": pa.string(), "host": pa.string(), "executor": pa.string(), "workers": pa.int64(), "threads": pa.int64(),
        "commit": pa.string(), "dirty": pa.bool_(), "versions": pa.string(), "error": pa.string()}  # fmt: skip
_OWN = ("variable", "value")
_FIXED = {*_KEY, *_ASKED, *_STATE, "shard", "first", *_OWN}  # names that no option and no label of a result may take


_QUESTIONS = (
    "sites",
    "metric",
    "direction",
    "positions",
    "neurons",
    "normalize",
    "edges",
    "level",
    "hook",
    "ablation",
    "target",
)
_BARE = ("method", "rules", "sites", "hook", "architecture")  # options whose values say what they are


@dataclass(frozen=True)
class _Held:
    """One run as it was read."""

    run: Run
    jobs: Sequence[Job]
    shards: Sequence[Shard] = ()
    found: Verified | None = None


def query(sql: str, runs: Runs, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """The answer to a question in DuckDB's SQL about any number of runs.

    ids: the runs, as `Runs.find` takes them (default: all of the folder). Tables:

    runs: run, name, status, submitted, started, finished (UTC), seconds, jobs, failed, shards, device, host, executor, workers,
        threads, commit, dirty, versions, error.
    jobs: run, job, kind, model, task, n, seed, corruption, template, dtype; a column for every option that any job was given (a
        list as JSON; empty where the job has the default); shards, whole (how many of them can be read), seconds (of computing
        it), status (done, failed, missing), error.
    scores: run, job, shard, the columns of `jobs` up to the options, variable (a site or the name of a measure), the labels of
        the results (layer, head, prompt, ...; prompts are counted through the whole job), value (in the metric's unit). NaNs,
        which stand for places that are not there, are left out. A label with the name of an option (metric) stands in its place;
        one with the name of another column is called `label_` and its name. SQL's own words are quoted: "by".

    A job that two runs ask for is in both. `answer.attrs["notes"]` is a list of sentences about what could not be read. Raises
    `OptionError` with the first line of DuckDB's message for a wrong question, and for a run that is not there.
    """
    tables = {name: re.search(rf"\b{name}\b", sql, re.IGNORECASE) is not None for name in ("jobs", "scores")}
    held, notes = _read(runs, runs.ids() if ids is None else [runs.find(id) for id in ids], files=any(tables.values()))
    with duckdb.connect(":memory:") as connection:
        connection.register("runs", pa.Table.from_pylist([_of_run(h) for h in held], pa.schema(_RUN)))
        if any(tables.values()):
            jobs, options = _jobs(held)
            connection.register("jobs", jobs)
            if tables["scores"]:
                _add_scores(connection, held, options)
        # the last word on what a question can reach: nothing but what was registered
        for setting in ("python_enable_replacements = false", "autoinstall_known_extensions = false",
                        "autoload_known_extensions = false", "enable_external_access = false",
                        "lock_configuration = true"):  # fmt: skip
            connection.execute(f"SET {setting}")
        try:
            if not connection.extract_statements(sql):
                raise OptionError("this query asks nothing: SELECT * FROM runs, jobs or scores")
            found = connection.execute(sql)
            answer = found.df()
        except duckdb.Error as error:
            raise OptionError(f"this query fails: {str(error).splitlines()[0]}") from None
    answer.attrs["notes"] = notes
    return answer


def jobs_of(run: Run, jobs: Sequence[Job], shards: Sequence[Shard], found: Verified) -> pd.DataFrame:
    """The table `jobs` of one run, see `query`, from what `Runs.grid`, `Runs.shards` and `Runs.verify` say of it."""
    return _jobs([_Held(run, jobs, shards, found)])[0].to_pandas()


def _read(runs: Runs, ids: Sequence[str], *, files: bool) -> tuple[list[_Held], list[str]]:
    held, notes = [], []
    for id in ids:
        try:
            run = runs.get(id)
            if not files:
                held.append(_Held(run, runs.grid(id).everything))
                continue
            one = _held(runs, id)
        except OptionError as error:
            notes.append(f"run {id} was left out: {error}")
            continue
        held.append(one)
        notes += [f"run {id}: {path.name} was left out: {why}" for path, why in one.found.damaged.items()]
        if one.found.missing:
            notes.append(
                f"run {id} is {run.status}: {len(one.found.missing):,} of its {len(one.shards):,} shards are not there"
            )
        elif not one.shards:
            notes.append(f"run {id} is {run.status} and has no shards yet")
    return held, notes


def _held(runs: Runs, id: str) -> _Held:
    run, jobs = runs.get(id), runs.grid(id).everything
    shards = list(shards_of(jobs, run.models, run.environment)) if run.models else []
    return _Held(run, jobs, shards, runs.verify(id, shards))


def _of_run(held: _Held) -> dict[str, Any]:
    """A run's row."""
    run = held.run
    about = {**run.running, **run.code}
    facts = {name: getattr(run, name, about.get(name)) for name in _RUN}
    return {name: None if value == "" else value for name, value in facts.items()} | {
        "run": run.id, "jobs": len(held.jobs), "failed": len(run.failed),
    }  # fmt: skip


def _jobs(held: Sequence[_Held]) -> tuple[pa.Table, list[str]]:
    """(the table `jobs`, the columns of it that are options)."""
    types: dict[str, pa.DataType] = {}
    for job in {job.id: job for one in held for job in one.jobs}.values():
        for name, value in job.options.items():
            if value is not None:
                column = _column(name, ())
                types[column] = _common(types.get(column), _type_of(value))
    rows = []
    for one in held:
        n_shards: dict[str, int] = {}
        n_whole: dict[str, int] = {}
        for shard in one.shards:
            n_shards[shard.job.id] = n_shards.get(shard.job.id, 0) + 1
            n_whole[shard.job.id] = n_whole.get(shard.job.id, 0) + (shard.id in one.found.whole)
        for job in one.jobs:
            total, whole = n_shards.get(job.id, 0), n_whole.get(job.id, 0)
            status = "done" if total and whole == total else "failed" if job.id in one.run.failed else "missing"
            options = {
                _column(name, ()): _cell(value, types.get(_column(name, ()))) for name, value in job.options.items()
            }
            rows.append(options | {name: getattr(job, name) for name in _ASKED} | {
                "run": one.run.id, "job": job.id, "shards": total, "whole": whole, "status": status,
                "seconds": one.run.took.get(job.id),
                "error": one.run.failed.get(job.id) if status == "failed" else None,
            })  # fmt: skip
    schema = pa.schema({**_KEY, **_ASKED, **dict(sorted(types.items())), **_STATE})
    return pa.Table.from_pylist(rows, schema), sorted(types)


def _add_scores(connection: duckdb.DuckDBPyConnection, held: Sequence[_Held], options: Sequence[str]) -> None:
    """Register the numbers, to be read when they are asked for, and the view that joins jobs to them."""
    rows, paths, labels = [], [], {}
    for one in held:
        seen: set[str] = set()
        for shard in one.shards:
            if (path := one.found.whole.get(shard.id)) is None:
                continue
            rows.append(
                {"file": len(paths), "run": one.run.id, "job": shard.job.id, "shard": shard.id, "first": shard.first}
            )
            paths.append(path)
            if shard.job.id not in seen:  # shards of one job have the same columns
                seen.add(shard.job.id)
                for field in pq.read_schema(path):
                    labels[field.name] = _common(labels.get(field.name), _plain_type(field.type))
    labels = {name: kind for name, kind in labels.items() if name not in _OWN}
    kinds = {"file": pa.int64(), "run": pa.string(), "job": pa.string(), "shard": pa.string(), "first": pa.int64()}
    connection.register("_files", pa.Table.from_pylist(rows, pa.schema(kinds)))
    schema = pa.schema({"file": pa.int64(), "variable": pa.string(), **labels, "value": pa.float64()})
    connection.register("_numbers", _dataset(paths, schema) if paths else schema.empty_table())
    connection.execute(f"CREATE TEMP VIEW scores AS {_view(options, labels)}")


def _dataset(paths: Sequence[Path], schema: pa.Schema) -> ds.Dataset:
    """Files with some of these columns as one table; `file` is the place of each in the list."""
    return ds.FileSystemDataset.from_paths(
        [os.path.abspath(path) for path in paths], schema=schema, format=ds.ParquetFileFormat(),
        filesystem=fs.LocalFileSystem(), partitions=[ds.field("file") == i for i in range(len(paths))],
    )  # fmt: skip


def _view(options: Sequence[str], labels: Mapping[str, pa.DataType]) -> str:
    columns = ["f.run", "f.job", "f.shard", *(f"j.{_quoted(name)}" for name in _ASKED)]
    columns += [f"j.{_quoted(name)}" for name in options if name not in labels]
    columns.append("s.variable")
    for name in labels:
        label = f"s.{_quoted(name)}"
        if name == "prompt":
            columns.append(f"{label} + f.first AS prompt")  # a shard counts its own
        elif name in options:
            text = f"coalesce(CAST({label} AS VARCHAR), CAST(j.{_quoted(name)} AS VARCHAR))"
            columns.append(f"{text} AS {_quoted(name)}")
        else:
            columns.append(f"{label} AS {_quoted(_column(name, options))}")
    return (
        f"SELECT {', '.join(columns)}, s.value FROM _numbers s JOIN _files f ON s.file = f.file "
        "JOIN jobs j ON j.run = f.run AND j.job = f.job WHERE NOT isnan(s.value)"
    )


def _column(name: str, options: Sequence[str]) -> str:
    """The column of an option or a label: its own name, if no other column has it."""
    return f"label_{name}" if name in _FIXED or name in options else name


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _type_of(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    return pa.int64() if isinstance(value, int) else pa.float64() if isinstance(value, float) else pa.string()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a label's column: texts are kept as numbers of a list in a file."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.int64() if pa.types.is_integer(kind) else pa.float64() if pa.types.is_floating(kind) else kind


def _common(first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    """A type that holds both: text, if nothing else does."""
    if first is None or first == second:
        return second
    numbers = (pa.int64(), pa.float64())
    return pa.float64() if first in numbers and second in numbers else pa.string()


def _cell(value: Any, kind: pa.DataType | None) -> Any:
    if kind == pa.string() and value is not None and not isinstance(value, str):
        return json.dumps(value)
    return float(value) if kind == pa.float64() and value is not None else value


# ------------------------------------------------------------------------------------------------- methods and questions


def methods_of(jobs: pd.DataFrame, asked: Mapping[str, Job]) -> pd.DataFrame:
    """The jobs that are done, with two columns more, in words: `label`, their method, and `question`, what it is asked.

    Both are the options that vary among the done jobs of a kind: the question those that make numbers of another meaning or scale
    (sites, metric, direction, ablation, n, ...), the method all others. A task or corruption that is not given is told in words.
    asked: the jobs by id.
    """
    done = jobs[jobs.status == "done"].fillna({"corruption": "default", "dtype": "default"})
    done["template"] = ["default" if pd.isna(t) else str(int(t)) for t in done.template]
    own = ["own prompts" if KINDS[kind].of == "pairs" else "text" for kind in done.kind]
    done["task"] = done.task.where(done.task.notna(), own)
    labels, questions = {}, {}
    for kind, part in done.groupby("kind"):
        given = {id: options_given(asked[id]) for id in part.job}
        varied = [name for name in options_of(kind) if len({json.dumps(g[name]) for g in given.values()}) > 1]
        also = [name for name in ("n", "corruption", "template", "dtype") if part[name].nunique() > 1]
        for row in part.to_dict("records"):
            id, options = row["job"], given[row["job"]]
            words = {name: _word(name, options[name]) for name in varied} | {
                name: f"{name} {row[name]}" for name in also
            }
            questions[id] = " ".join(word for name, word in words.items() if name in (*_QUESTIONS, *also))
            method = " ".join(word for name, word in words.items() if name not in (*_QUESTIONS, *also))
            labels[id] = method or str(options.get("method") or options.get("rules") or kind)
    return done.assign(label=done.job.map(labels), question=done.job.map(questions))


def options_given(job: Job) -> dict[str, Any]:
    """Every option of a job's analysis, with the default of those that it does not say."""
    known = inspect.signature(KINDS[job.kind].analysis).parameters
    defaults = {name: known[name].default for name in options_of(job.kind)}
    return {name: None if value is inspect.Parameter.empty else value for name, value in defaults.items()} | dict(
        job.options
    )


def is_exact(job: Job) -> bool:
    """Whether a job patches, rather than estimates what patching would do."""
    return job.kind in ("patch", "edges") or job.options.get("method") == "exact"


def question_of(job: Job) -> str:
    """A text that an estimate (attribute, edge_scores) shares with the exact effects (patch, edges) that it estimates."""
    kinds = ("attribute", "patch") if job.kind in ("attribute", "patch") else ("edge_scores", "edges")
    given, shared = options_given(job), {*options_of(kinds[0])} & {*options_of(kinds[1])}
    options = {name: given[name] for name in sorted(shared)}
    if kinds[1] == "edges":  # of one layout: every edge, over all positions
        options |= {
            name: given.get(name, usual) for name, usual in (("level", "edge"), ("positions", "all"), ("edges", None))
        }
    about = {name: value for name, value in job.to_dict().items() if name not in ("kind", "options", "block")}
    return json.dumps([kinds, about, options], sort_keys=True)


def _word(name: str, value: Any) -> str:
    text = "default" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if name in _BARE else f"{name} {text}"
