"""The process that runs one job: `python -m interp.jobs.worker FOLDER`, FOLDER being a run's (`interp.jobs.store`).

Prompts are taken in blocks. The scores of each block are a shard, a file by itself; a shard that is there and whole, of this
job and of this model, is not computed again. At the end the shards become one result: the bits of the analysis run at once with
`batch_size=job.block`, and those of all prompts in one batch up to rounding.

    status       how it came to it                                exit status
    done         the result is written                            0
    failed       an error; run.json and log.txt say which         1, or 2 if the job itself is at fault
    cancelled    a file `cancel` was seen between blocks          130
    interrupted  SIGTERM or SIGINT; the block in hand is lost     130

Two workers on one folder do not disturb each other: the second sees the first's lock and leaves.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xarray as xr

import interp
import interp_kernels
from interp.errors import InterpError, OptionError
from interp.grids import position_labels
from interp.jobs.spec import Job
from interp.jobs.store import Progress, Run, Runs, load_arrays, me, now, save_arrays
from interp.model.load import load_model
from interp.provenance import provenance
from interp.tasks.pairs import PromptPairs

_LABELS = {"token": "position", "source_token": "source"}  # what depends on the prompts of all shards together


class Cancelled(Exception):
    """Somebody asked for the end of this run."""


class Interrupted(BaseException):
    """The machine asks for the end of this process."""


def submit(job: Job, runs: Runs) -> Run:
    """Have a job done by a process of its own, unless that is done or under way already; its manifest.

    A run that failed, was cancelled or interrupted is taken up where it ended.
    """
    if job.id in runs and ((run := runs.get(job.id)).active or run.status == "done"):
        return run
    run = runs.create(job.id, job.to_dict())
    start(runs.path(job.id))
    return run


def start(folder: Path) -> subprocess.Popen:
    """Start the worker of a run's folder. It belongs to no terminal, so Ctrl-C of a dashboard leaves it at work."""
    # the worker imports what this process imports, also where the packages are on the path by chance of the working folder
    roots = [str(Path(package.__file__).resolve().parents[1]) for package in (interp, interp_kernels)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "interp.jobs.worker", str(folder.resolve())], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    # somebody has to wait for a child, or it stays in the process table when it has ended
    threading.Thread(target=process.wait, name=f"reaper of {folder.name}", daemon=True).start()
    return process


def blocks(job: Job) -> list[tuple[int, int]]:
    """First prompt of each shard, and the first beyond it."""
    return [(first, min(first + job.block, job.n)) for first in range(0, job.n, job.block)]


def work(runs: Runs, id: str) -> Run:
    """Run a job in this process, block by block, and write its result. Returns the manifest of the finished run.

    Raises `Cancelled` between blocks; whatever the analysis raises; `OptionError` if the folder holds another job.
    """
    job = Job.from_file(runs.path(id) / "job.json")
    if job.id != id:
        raise OptionError(f"the folder {runs.path(id)} holds the job {job.id}")
    ranges, began = blocks(job), time.monotonic()

    def tell(stage: str, done: int = 0, eta: float | None = None) -> None:
        if runs.is_cancelled(id):
            raise Cancelled
        runs.set_progress(id, Progress(done, job.n, stage, time.monotonic() - began, eta))

    tell("loading the model")
    model = load_model(job.model)
    tell("making the prompt pairs")
    pairs = job.pairs(model)
    about = provenance(model, pairs)
    runs.change(id, provenance=about, shards=len(ranges))
    shards, computed, spent = [], 0, 0.0
    for first, beyond in ranges:
        shard = _shard(runs.path(id), job, first, beyond, about)
        if shard is None:
            left = job.n - first
            tell("computing", first, spent / computed * left if computed else None)
            start_of_block = time.monotonic()
            shard = job.run(model, pairs.take(slice(first, beyond)), batch_size=job.block)
            save_arrays(runs.path(id) / "shards", _name(first, beyond), shard, about={"job": id})
            computed, spent = computed + beyond - first, spent + time.monotonic() - start_of_block
        shards.append(shard)
    tell("writing the result", job.n)
    save_arrays(runs.path(id), "result", merged(shards, pairs), about={"job": id})
    runs.set_progress(id, Progress(job.n, job.n, "done", time.monotonic() - began, 0.0))
    return runs.change(id, status="done", finished=now(), error="")


def merged(shards: Sequence[xr.DataArray | xr.Dataset], pairs: PromptPairs) -> xr.DataArray | xr.Dataset:
    """One result from the results of successive blocks of the pairs, labelled as if they had been run at once."""
    first = shards[0]
    if isinstance(first, xr.Dataset):
        arrays = {name: merged([shard[name] for shard in shards], pairs) for name in first.data_vars}
        coords = {name: c for array in arrays.values() for name, c in array.coords.items()}
        variables = {name: (a.dims, a.values, a.attrs) for name, a in arrays.items()}
        return xr.Dataset(variables, coords, {**first.attrs, "n_prompts": len(pairs)})
    coords: dict[str, Any] = {}
    for name, coord in first.coords.items():
        if name in _LABELS:
            axis = _LABELS[name]
            coords[name] = (axis, position_labels(pairs, first[axis].values.tolist()))
        else:
            coords[name] = (coord.dims, _joined([shard.coords[name].variable for shard in shards]))
    coords["prompt"] = range(len(pairs))
    values = _joined([shard.variable for shard in shards])
    return xr.DataArray(values, coords, first.dims, first.name, {**first.attrs, "n_prompts": len(pairs)})


def _joined(parts: Sequence[xr.Variable]) -> np.ndarray:
    """Values one after the other along the prompts; what has no prompts is the same in all parts."""
    if "prompt" not in parts[0].dims:
        return parts[0].values
    return np.concatenate([part.values for part in parts], parts[0].dims.index("prompt"))


def _name(first: int, beyond: int) -> str:
    return f"{first:05d}-{beyond:05d}"


def _shard(folder: Path, job: Job, first: int, beyond: int, about: dict) -> xr.DataArray | xr.Dataset | None:
    """The shard of these prompts if it is there, whole, of this job, and of the model and libraries of today."""
    try:
        shard = load_arrays(folder / "shards", _name(first, beyond), about={"job": job.id})
    except OptionError:
        return None
    same = all(shard.attrs.get(key) == value for key, value in about.items() if key != "n_prompts")
    return shard if same and shard.sizes["prompt"] == beyond - first else None


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other worker holds this folder; it is held until the end of the block, or of the process."""
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _interrupt(number: int, frame: object) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # once is enough, and the manifest is to be written in peace
    raise Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job of a folder; the module says what the exit status means."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 1 or not (Path(arguments[0]) / "run.json").is_file():
        print("usage: python -m interp.jobs.worker FOLDER (that of a run, with job.json and run.json)", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    runs, id = Runs(folder.parent), folder.name
    with _alone(folder) as alone:
        if not alone:
            print("another worker is at this run", file=sys.stderr)
            return 0
        return _run(runs, id)


def _run(runs: Runs, id: str) -> int:
    ended, error, code = "failed", "", 1
    before = {name: signal.signal(name, _interrupt) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        runs.change(id, status="running", started=now(), finished="", error="", **me())
        work(runs, id)
        return 0
    except Cancelled:
        ended, code = "cancelled", 130
    except Interrupted:
        ended, code = "interrupted", 130
    except InterpError as caught:
        error, code = str(caught), 2
        print(error, file=sys.stderr)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        traceback.print_exc()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    # a run that was interrupted after its result was written is done
    if runs.get(id).status != "done":
        runs.change(id, status=ended, finished=now(), error=error)
    return code


if __name__ == "__main__":
    psutil.Process().nice(5)  # the dashboard and its reader come first
    raise SystemExit(main())
