"""Long work in processes of their own, as the pages see it: submit, watch, cancel, and what came of it.

A click elsewhere, a reload or a closed browser does not touch a job: it is a process of its own (`interp.jobs.runner`) that
writes into a folder, and a page only reads there. The same question is the same job, so it is answered once. Runs of many jobs,
from the command line or a cluster, lie in the same folders: they are listed, filtered and opened job by job.
"""

import os
from collections.abc import Iterable

import pandas as pd
import streamlit as st
import xarray as xr

from app.behaviour import OWN, Behaviour
from app.compute import cached
from app.locked import allowed
from interp.errors import InterpError, OptionError, TaskError, name_some
from interp.jobs import runner
from interp.jobs.grid import Grid
from interp.jobs.kinds import KINDS
from interp.jobs.spec import Job
from interp.jobs.store import DEFAULT_FOLDER, Progress, Run, Runs
from interp.jobs.summary import Summary, summary


def runs() -> Runs:
    """The folder of runs: INTERP_APP_RUNS (`interp app --runs`), else `interp-runs` where the dashboard was started."""
    return Runs(os.environ.get("INTERP_APP_RUNS") or DEFAULT_FOLDER)


def job_of(behaviour: Behaviour, kind: str, **options) -> Job:
    """The job that asks this of a behaviour. options: as the analysis takes them, `sites="head"`, `direction="noise"`, ..."""
    behaviour.checked()
    model = allowed(behaviour.model)
    if behaviour.task != OWN:
        return Job(kind, model, task=behaviour.task, n=behaviour.n, seed=behaviour.seed, options=options)
    return Job(kind, model, clean=(behaviour.clean,), corrupt=(behaviour.corrupt,), answers=(behaviour.answer,),
               wrong_answers=(behaviour.wrong,), options=options)  # fmt: skip


def behaviour_of(job: Job) -> Behaviour:
    """What to look at so as to see a job's prompts. Raises `TaskError` where the dashboard takes less than the job has."""
    if job.task is not None:
        return Behaviour(job.model, job.task, job.n, job.seed).checked()
    if not job.clean:
        raise TaskError(f"a job of kind {job.kind} is about a text, and has no prompts to look at")
    if job.n > 1:
        raise TaskError(f"the dashboard takes one pair of own prompts, and this run has {job.n}")
    wrong = job.wrong_answers[0] if job.wrong_answers else ""
    return Behaviour(job.model, OWN, 1, 0, job.clean[0], job.corrupt[0], job.answers[0], wrong).checked()


def submit(asked: Job | Grid) -> Run:
    """Start a job or a grid, unless it is done or under way: one that ended without a result goes on where it was."""
    for model in {each.model for each in (asked.everything if isinstance(asked, Grid) else [asked])}:
        allowed(model)
    return runner.submit(asked, runs())


def poll(id: str) -> Run:
    """A run's manifest, as it is now."""
    return runs().get(id)


def cancel(id: str) -> None:
    """Ask a run to end after the shards in hand."""
    runs().cancel(id)


def grid(id: str) -> Grid:
    """What a run was asked."""
    return _grid(str(runs().path(id).resolve()), runs().path(id).joinpath("spec.json").stat().st_mtime_ns)


@cached
def _grid(folder: str, changed: int) -> Grid:
    parent, id = os.path.split(folder)
    return Runs(parent).grid(id)


def job(id: str, job_id: str | None = None) -> Job:
    """One job of a run; the first, if none is named or the one that is named is not there."""
    asked = {each.id: each for each in grid(id).everything}
    return asked.get(job_id or "", next(iter(asked.values())))


def result(id: str, job_id: str | None = None) -> xr.DataArray | xr.Dataset:
    """The result of a run's job (`job`), as soon as all its shards are there; kept until the run is finished anew."""
    wanted, run = job(id, job_id).id, poll(id)
    if run.active:
        return runs().result(id, wanted)
    return _result(str(runs().path(id).resolve()), wanted, run.finished)


@cached
def _result(folder: str, job_id: str, finished: str) -> xr.DataArray | xr.Dataset:
    parent, id = os.path.split(folder)
    return Runs(parent).result(id, job_id)


def whole(id: str) -> Summary:
    """What a run of many jobs comes to, as `interp runs report` has it."""
    return _whole(str(runs().path(id).resolve()), poll(id).finished)


@cached
def _whole(folder: str, finished: str) -> Summary:
    parent, id = os.path.split(folder)
    return summary(Runs(parent), id)


def table(text: str = "", statuses: tuple[str, ...] = ()) -> pd.DataFrame:
    """Runs as rows, the latest first: those of these statuses (none given: all) that have every word of a text in them."""
    rows = []
    for id in runs().ids():
        try:
            run, asked = poll(id), grid(id).everything
        except (InterpError, OSError) as error:  # a file that somebody wrote by hand: shown, so that it can be mended
            rows.append({"status": "failed", "kind": "unreadable", "options": str(error), "id": id})
            continue
        rows.append({
            "status": run.status, "kind": _several(each.kind for each in asked), "model": _several(each.model for each in asked),
            "task": _several(each.task or OWN for each in asked), "options": _several(map(_options, asked)), "jobs": len(asked),
            "n": _several(each.n for each in asked), "seconds": run.seconds, "submitted": pd.Timestamp(run.submitted), "id": id,
        })  # fmt: skip
    columns = ["status", "kind", "model", "task", "options", "jobs", "n", "seconds", "submitted", "id"]
    found = pd.DataFrame(rows, columns=columns)
    whole = [" ".join(map(str, row.values())).lower() for row in rows]
    kept = [all(word in row for word in text.lower().split()) for row in whole]
    if statuses:
        kept = [k and status in statuses for k, status in zip(kept, found.status, strict=True)]
    return found[kept].reset_index(drop=True)


def _several(values: Iterable) -> str:
    """Different values in a cell, as many as are readable."""
    return name_some(list(dict.fromkeys(map(str, values))), 4)


def chosen(event, ids: list[str]) -> list[str]:
    """Ids of the rows that are selected in a table of these; rows that are no longer there are passed by."""
    rows = (event or {}).get("selection", {}).get("rows", []) if hasattr(event, "get") else []
    return [ids[i] for i in rows if 0 <= i < len(ids)]


def result_or_offer(asked: Job) -> xr.DataArray | None:
    """A job's result; None where there is none yet, after drawing its progress or a button to start it: the page should stop."""
    run = poll(asked.id) if asked.id in runs() else None
    if run is not None and run.status == "done":
        return result(asked.id)
    if run is not None and run.active:
        job_panel(asked.id)
        return None
    if run is not None:
        st.warning(sentence(run), icon=":material/history:")
    st.info("This takes longer than a page should. It runs in a process of its own, and its result is kept.",
            icon=":material/timer:")  # fmt: skip
    st.button("Run as a job" if run is None else "Go on", type="primary", key="submit", on_click=submit, args=(asked,),
              icon=":material/play_arrow:")  # fmt: skip
    return None


def job_panel(id: str) -> None:
    """A run's progress with its time left and a button to cancel; redrawn every second until it ends, then the page once."""
    run = poll(id)
    st.fragment(_panel, run_every=1 if run.active else None, key=f"job_{id}")(id)


def _panel(id: str) -> None:
    run = poll(id)
    if not run.active:
        if st.session_state.get(f"watched_{id}"):
            del st.session_state[f"watched_{id}"]
            st.rerun()  # the whole page: the result can be shown now
        st.markdown(sentence(run))
        return
    st.session_state[f"watched_{id}"] = True
    progress = runs().progress(id)
    st.progress(progress.done / max(progress.total, 1), text=progress_text(progress))
    stopping = runs().is_cancelled(id)
    st.button("Stopping" if stopping else "Cancel", key=f"cancel_{id}", on_click=cancel, args=(id,), disabled=stopping,
              icon=":material/stop_circle:", help="It ends after the shards in hand; what is done is kept")  # fmt: skip


def progress_text(progress: Progress) -> str:
    """Where a run is, in a line: stage, prompts done, time so far and time left."""
    left = "" if progress.eta is None else f", about {duration(progress.eta)} left"
    done = f": {progress.done} of {progress.total} pairs" if progress.total else ""
    return f"{progress.stage}{done}, {duration(progress.seconds)} so far{left}"


def sentence(run: Run) -> str:
    """What became of a run, in a sentence."""
    took = f" after {duration(run.seconds)}" if run.seconds else ""
    return {
        "queued": "It waits for its process to start.",
        "running": "It runs.",
        "done": f"Done{took.replace('after', 'in')}.",
        "failed": f"It failed{took}: {run.error}",
        "cancelled": f"It was cancelled{took}; the shards that were done are kept.",
        "interrupted": f"It was interrupted{took}; the shards that were done are kept.",
    }[run.status]


def duration(seconds: float) -> str:
    """8 s, 3 min or 2.5 h."""
    if seconds < 1:
        return "1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def poll_quietly(id: str) -> bool:
    """Whether a run is under way; not, if its files cannot be read."""
    try:
        return poll(id).active
    except InterpError:
        return False


def title(asked: Job) -> str:
    """What a job was asked, in a line."""
    model, about = os.path.basename(asked.model), f"{asked.kind} {_options(asked)}".strip()
    if KINDS[asked.kind].of == "text":
        return f"{about} · {model}, seed {asked.seed}"
    return f"{about} · {model} on {asked.task or OWN}, n {asked.n}{f', seed {asked.seed}' if asked.seed else ''}"


def run_title(id: str) -> str:
    """What a run was asked, in a line."""
    asked = grid(id)
    return title(asked.everything[0]) if len(asked.everything) == 1 else f"{asked}, {len(asked.everything):,} jobs"


def _options(asked: Job) -> str:
    """The options, those that speak for themselves without their names."""
    said = []
    for name, value in asked.options.items():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        said.append(text if name in ("sites", "method", "metric", "direction", "rules", "hook") else f"{name} {text}")
    return ", ".join(said)


def labels(ids: list[str]) -> dict[str, str]:
    """What a list calls each run: its title and the start of its id, so that no two look alike."""
    found = {}
    for id in ids:
        try:
            found[id] = f"{run_title(id)} · {id[:4]}"
        except (InterpError, OSError):
            found[id] = f"unreadable · {id}"
    return found


def take_rows() -> None:
    """Callback of the table of runs: open the first selected row, compare with the second."""
    picked = chosen(st.session_state.get("runs_table"), st.session_state.get("runs_shown", []))
    if picked:
        open_runs(picked[0], picked[1] if len(picked) > 1 else None)
        st.session_state["runs_picked"] = True


def opened() -> tuple[str | None, str | None]:
    """The run that the page shows and the one it is compared with: those of the address when the page first opens.

    An id that is no longer there is None. A list of runs could be bound to the address only by its labels, not by ids.
    """
    kept = st.session_state.setdefault("runs_open", (st.query_params.get("run_id"), st.query_params.get("with_id")))
    ids = runs().ids()
    run, other = (id if id in ids else None for id in kept)
    return run, None if other == run else other


def open_runs(run: str | None, other: str | None) -> None:
    """Show these, here and in the address."""
    st.session_state["runs_open"] = (run, other)
    for name, id in (("run_id", run), ("with_id", other)):
        if id:
            st.query_params[name] = id
        elif name in st.query_params:
            del st.query_params[name]


def take_choice() -> None:
    """Callback of the two lists of runs."""
    run = st.session_state.get("runs_run")
    open_runs(run, st.session_state.get("runs_with") if run else None)


def flat(array: xr.DataArray) -> xr.DataArray:
    """What a map shows: the mean over prompts, with heads summed over positions, as on the page Patch."""
    mean = array.mean("prompt", keep_attrs=True)
    if mean.ndim > 2 and "position" in mean.dims:
        mean = mean.sum("position", keep_attrs=True)
    return mean


def is_map(found: xr.DataArray | xr.Dataset) -> bool:
    """Whether a result is effects of places, prompt by prompt; else it is measures of a whole job."""
    return "prompt" in found.dims


def measures(found: xr.Dataset) -> pd.DataFrame:
    """The measures of a job that are single numbers, as rows; curves are left to `curve`."""
    single = {name: float(array) for name, array in found.data_vars.items() if not array.ndim}
    return pd.DataFrame({"measure": list(single), "value": list(single.values())})


def difference(ours: xr.DataArray, theirs: xr.DataArray) -> xr.DataArray:
    """ours - theirs as a map, place by place in their order. Raises `OptionError` if they are laid out otherwise."""
    a, b = flat(ours), flat(theirs)
    if a.dims != b.dims or a.shape != b.shape:
        raise OptionError(f"these maps are laid out otherwise: {dict(a.sizes)} and {dict(b.sizes)}")
    return a.copy(data=a.values - b.values).assign_attrs(difference="the opened run − the other")
