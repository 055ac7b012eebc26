"""Running a grid: what is missing is computed, kept shard by shard, and told as it goes.

    run(Grid.from_file("grid.toml"), workers=4)           the same again computes only what is missing or damaged
    python -m interp.jobs.runner FOLDER FD                a run of its own process, as `submit` starts it

    status       how it came to it                                exit status
    done         every shard is there                             0
    failed       some job has an error; run.json says which       1; 2 if nothing could begin
    cancelled    a file `cancel` was seen                         130
    interrupted  SIGTERM or SIGINT; the shards in hand are lost   130

One process at a time works on a run, holds its lock and writes its files; workers only compute (`interp.jobs.executors`).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import psutil
import torch
from tqdm.auto import tqdm

from interp.errors import InterpError, OptionError, one_of
from interp.jobs.executors import Crew, Here, Processes, deal, devices_of, import_path
from interp.jobs.grid import Grid
from interp.jobs.shards import Shard, code_version, environment_of, identities_of, shards_of
from interp.jobs.spec import Job
from interp.jobs.store import Progress, Run, Runs, now
from interp.jobs.worker import Reply
from interp.provenance import versions

EXECUTORS = ("local", "ray")
_EVERY = 0.5  # seconds between looks at how far it is, for those who look


class Interrupted(BaseException):
    """The machine asks for the end of this process."""


def run(
    grid: Grid | Job, runs: Runs | str | Path = "interp-runs", *, workers: int = 1, executor: Literal["local", "ray"] = "local",
    device: str | None = None, threads: int | None = None, address: str | None = None, progress: bool = False,
) -> Run:  # fmt: skip
    """Run a grid, or a single job, and return its manifest; `Runs(folder).result(id, job)` has the results.

    workers: 1 is this process; more are processes of their own, each with its model. executor: "ray" has them on the machines
    of the Ray cluster at `address` (default: RAY_ADDRESS, else one of its own). device: "cuda" deals workers out to all GPUs.
    threads: of each worker (default: the machine's cores over the workers, or torch's own number for this process).

    A run that is there is taken up: only shards that are missing, damaged, or of other weights or versions are computed. Errors
    of single jobs end neither the others nor this call: see `status` and `failed`. Raises `OptionError` if another process is at
    work on the run, or the options are wrong; `LoadError` for a model that is not there; `OSError` where files cannot be written.
    """
    runs = runs if isinstance(runs, Runs) else Runs(runs)
    grid = grid if isinstance(grid, Grid) else Grid(jobs=[grid])
    make, running = crew_of(workers, executor, device, threads, address)  # before anything is written
    runs.path(grid.id).mkdir(parents=True, exist_ok=True)
    with runs.lock(grid.id) as lock:
        if lock is None:
            raise OptionError(
                f"another process is at work on run {grid.id} in {runs.folder}: wait for it, or cancel it"
            )
        runs.create(grid)
        return _run(runs, grid, make, running, device, progress)


def crew_of(
    workers: int, executor: str, device: str | None, threads: int | None, address: str | None
) -> tuple[Callable[[], Crew], dict[str, int | str]]:
    """(what makes the crew, how it runs in plain values). Raises `OptionError` for options that are wrong."""
    one_of(executor, EXECUTORS, "executor")
    for name, value in (("workers", workers), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, not {value}")
    if address is not None and executor != "ray":
        raise OptionError(f"an address ({address}) is of a Ray cluster: add executor ray")
    devices = devices_of(device)
    alone = executor == "local" and workers == 1 and threads in (None, torch.get_num_threads())
    each = threads or (torch.get_num_threads() if alone else max(1, (os.cpu_count() or 1) // workers))
    running = {"executor": executor, "workers": workers, "threads": each}
    if executor == "ray":
        from interp.jobs.cluster import Cluster

        return (lambda: Cluster(workers, threads=each, device=device, address=address)), running
    if alone:
        return (lambda: Here(devices[0] if devices else None)), running
    return (lambda: Processes(workers, threads=each, devices=devices)), running


def _run(runs: Runs, grid: Grid, make: Callable[[], Crew], running: dict, device: str | None, progress: bool) -> Run:
    """Work on a run whose lock this process holds, until it ends in one of the ways of the module's table."""
    id, ended, error, began = grid.id, "failed", "", time.monotonic()
    kind = torch.device(device or torch.get_default_device()).type
    run = runs.change(
        id, status="running", started=now(), pid=os.getpid(), host=socket.gethostname(), running=running, device=kind
    )
    before = _catch_signals()
    try:
        ended, error = _work(runs, grid, make, progress)
    except Interrupted:
        ended = "interrupted"
    except InterpError as caught:
        error = str(caught)
        raise
    except OSError as caught:  # a full disk, a folder that went away
        error = f"{caught.filename or runs.path(id)}: {caught.strerror or caught}"
        raise
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run = runs.change(id, status=ended, finished=now(), error=error, seconds=run.seconds + time.monotonic() - began)
    return run


def _work(runs: Runs, grid: Grid, make: Callable[[], Crew], progress: bool) -> tuple[str, str]:
    """Compute what is missing; (status, error)."""
    id, teller = grid.id, _Teller(runs, grid.id)
    teller.tell("looking at the models")
    models, run = identities_of(grid.everything), runs.get(id)
    environment = environment_of(run.device)
    shards = list(shards_of(grid.everything, models, environment))
    runs.change(
        id, models=models, environment=environment, shards=len(shards), code=code_version(), versions=versions()
    )
    teller.tell("looking at what is there")
    found = runs.verify(id, shards)
    runs.tidy(id, found)
    teller.begin(shards, found.missing)
    failed, datasets, took, warned = {}, dict(run.datasets), dict(run.took), dict(run.warned)
    left = len(found.missing)

    def kept() -> None:
        runs.change(id, datasets=datasets, took=took, warned=warned, failed=failed)

    try:
        with tqdm(
            total=len(shards), initial=len(found.whole), desc=str(grid), unit="shard", disable=not progress
        ) as bar:
            for shard, reply in _computed(runs, id, found.missing, models, make):
                if reply.error:
                    failed.setdefault(shard.job.id, reply.error)
                else:
                    runs.keep(id, shard.id, reply.table, reply.files)
                    left -= 1
                    datasets[_name(shard.job)] = reply.dataset
                    if reply.warned:
                        warned[shard.job.id] = list(dict.fromkeys([*warned.get(shard.job.id, []), *reply.warned]))
                    took[shard.job.id] = took.get(shard.job.id, 0.0) + reply.seconds
                teller.finished(shard)
                bar.update()
    finally:
        kept()
    if failed:
        first, more = next(iter(failed.values())), len(failed) - 1
        return "failed", f"{first}{f' (and {more} more jobs failed)' if more else ''}"
    if left:  # nothing failed, so somebody cancelled it; after the last shard that comes too late
        return "cancelled", ""
    teller.tell("done")
    return "done", ""


def _computed(
    runs: Runs, id: str, shards: Sequence[Shard], models: dict[str, str], make: Callable[[], Crew]
) -> Iterator[tuple[Shard, Reply]]:
    """Shards with their replies, until somebody cancels the run; no crew is made for nothing."""
    if shards:
        with make() as crew:
            yield from deal(shards, models, crew, stopped=lambda: runs.is_cancelled(id))


class _Teller:
    """Writes how far a run is, now and then: a shard may take a millisecond."""

    def __init__(self, runs: Runs, id: str):
        self._runs, self._id, self._began, self._told = runs, id, time.monotonic(), 0.0
        self._total = self._there = self._done = 0

    def begin(self, shards: Sequence[Shard], missing: Sequence[Shard]) -> None:
        """Shards are about to be computed."""
        count = lambda some: sum(shard.beyond - shard.first for shard in some)  # noqa: E731
        self._total = count(shards)
        self._there = self._done = self._total - count(missing)
        self._began = time.monotonic()
        self.tell("computing")

    def finished(self, shard: Shard) -> None:
        """A shard is done, or has failed."""
        self._done += shard.beyond - shard.first
        if time.monotonic() - self._told > _EVERY:
            self.tell("computing")

    def tell(self, stage: str) -> None:
        """Write it now."""
        self._told = time.monotonic()
        spent, new, left = self._told - self._began, self._done - self._there, self._total - self._done
        eta = spent / new * left if new else None
        self._runs.set_progress(self._id, Progress(self._done, self._total, stage, spent, eta))


def _name(job: Job) -> str:
    """What a job's prompts are of, in the manifest."""
    return f"{job.task or 'own prompts'} of {job.model}, n {job.n}, seed {job.seed}"


def _interrupt(number: int, frame: object) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # once is enough, and the manifest is to be written in peace
    raise Interrupted


def _catch_signals() -> dict[int, Any]:
    """Have signals end the run in order; what they did before. Another thread than the first leaves them as they are."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}


def submit(grid: Grid | Job, runs: Runs) -> Run:
    """Have a grid or a job run by a process of its own, unless that is done or under way already; its manifest.

    A run that failed, was cancelled or interrupted is taken up where it ended. The process belongs to no terminal, so Ctrl-C of
    who submits it leaves it at work.
    """
    grid = grid if isinstance(grid, Grid) else Grid(jobs=[grid])
    if grid.id in runs and ((run := runs.get(grid.id)).active or run.status == "done"):
        return run
    runs.path(grid.id).mkdir(parents=True, exist_ok=True)
    with runs.lock(grid.id) as lock:
        if lock is None:  # somebody was quicker
            return runs.get(grid.id)
        run = runs.create(grid)
        start(runs.path(grid.id), lock)
    return run


def start(folder: Path, lock: BinaryIO) -> subprocess.Popen:
    """Start the process of a run's folder, which inherits its lock."""
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "interp.jobs.runner", str(folder.resolve()), str(lock.fileno())], pass_fds=[lock.fileno()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": import_path()},
        )  # fmt: skip
    # somebody has to wait for a child, or it stays in the process table when it has ended
    threading.Thread(target=process.wait, name=f"reaper of {folder.name}", daemon=True).start()
    return process


def main(arguments: Sequence[str] | None = None) -> int:
    """Work on the run of a folder, whose lock was inherited; the module says what the exit status means."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 2 or not (Path(arguments[0]) / "run.json").is_file():
        print(
            "usage: python -m interp.jobs.runner FOLDER FD (a run's folder, and its lock as an open file)",
            file=sys.stderr,
        )
        return 2
    folder = Path(arguments[0]).resolve()
    runs = Runs(folder.parent)
    os.set_inheritable(int(arguments[1]), False)
    try:
        make, running = crew_of(1, "local", None, None, None)
        run = _run(runs, runs.grid(folder.name), make, running, None, progress=False)
    except InterpError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    if run.error:
        print(run.error, file=sys.stderr)
    return STATUS[run.status]


STATUS = {"done": 0, "failed": 1, "cancelled": 130, "interrupted": 130}

if __name__ == "__main__":
    psutil.Process().nice(5)  # the dashboard and its reader come first
    raise SystemExit(main())
