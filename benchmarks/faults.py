"""Killing what computes: a grid whose runner and workers are killed at random moments, beside one that is left alone.

    python benchmarks/faults.py --kills 50 --out benchmarks/results/faults.json          about 8 minutes on 2 free cores

The runner is `interp run` with two workers, as a user starts it. It and its workers get kill -9: a worker is replaced, the runner
is started again. When a run is done before all kills are, it is compared and another begins. The tables are equal if
the names of the files are (which have the digests of their contents) and every job's result is identical. A shard that was kept
and is written again, or is gone, would be lost work; a worker that outlives its runner by 30 s would be a leak.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks.machine import describe_machine
from interp.files import write_atomically
from interp.jobs.executors import import_path
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import run
from interp.jobs.store import Runs

GRID = Grid(
    models=["mini-gpt2", "mini-llama"], tasks=["ioi", "capitals"], seeds=range(8), n=16, block=1,
    analyses=[Analysis("patch", {"sites": "head", "direction": "noise"})],
)  # fmt: skip
_PATIENCE = 120  # seconds until the next shard, on a machine that does other things too
_LEAK = 30  # seconds that workers have to find that their runner is gone


@dataclass
class Options:
    """What is killed, and how often."""

    kills: int = 50
    """Kills in all: half of them of a worker, half of the runner, in random order."""
    workers: int = 2
    """Worker processes, one thread each."""
    seed: int = 0
    """Of the moments."""
    out: Path | None = None
    """Write the figures here as JSON."""


@dataclass
class Found:
    """What became of it. seconds: wall time with kills, without the undisturbed run."""

    machine: str = ""
    worker_kills: int = 0
    runner_kills: int = 0
    rounds: int = 0
    shards: int = 0
    written_again: int = 0
    lost: int = 0
    not_shown_failed: int = 0
    leaked_workers: int = 0
    tables_equal: bool = True
    undisturbed_seconds: float = 0.0
    seconds: float = 0.0


def start(folder: Path, workers: int) -> subprocess.Popen:
    """`interp run` on the grid, in a process of its own."""
    spec = GRID.to_file(folder.parent / "grid.json")
    asked = ["run", str(spec), "--runs", str(folder), "--workers", str(workers), "--threads", "1", "--quiet"]
    with open(folder.parent / "log.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "interp.cli", *asked], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def kept(runs: Runs) -> dict[str, int]:
    """The file of every shard that is there: its name, and a number that another writing would change."""
    folder = runs.path(GRID.id) / "shards"
    names = [name for name in os.listdir(folder) if name.endswith(".parquet")] if folder.is_dir() else []
    return {name: (folder / name).stat().st_ino for name in names}


def until(happened: Callable[[], bool]) -> None:
    """Wait for it. Raises `TimeoutError` if it does not happen."""
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened for {_PATIENCE} s")
        time.sleep(0.005)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The workers of a runner; none, if it has ended."""
    try:
        return [child for child in psutil.Process(process.pid).children() if "interp.jobs.worker" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def disturb(runs: Runs, workers: int, turns: list[str], moments: random.Random, found: Found) -> None:
    """Run the grid to its end, with as many kills on the way as are left and find their moment. turns: taken from, last first."""
    before: dict[str, int] = {}
    while True:
        process, first, so_far = start(runs.folder, workers), len(before), found.worker_kills
        try:
            orphans = _kill(process, runs, turns, moments, found)
            code = process.wait()
        finally:
            process.kill()
        if code == 0:
            return
        if code > 0 and found.worker_kills == so_far:
            said = (runs.folder.parent / "log.txt").read_text(encoding="utf-8").strip()
            raise RuntimeError(f"interp run ended with status {code}: {said[-500:]}")
        after = kept(runs)  # a runner may have given up on workers that are killed: it says so, and is started again
        found.written_again += sum(after[name] != number for name, number in before.items() if name in after)
        found.lost += len({*before} - {*after})
        before = after
        if GRID.id in runs and runs.get(GRID.id).status != "failed":
            found.not_shown_failed += 1
        found.leaked_workers += len(psutil.wait_procs(orphans, timeout=_LEAK)[1])
        print(f"{found.worker_kills} workers, {found.runner_kills} runners; {first} to {len(after)} shards", flush=True)


def _kill(
    process: subprocess.Popen, runs: Runs, turns: list[str], moments: random.Random, found: Found
) -> list[psutil.Process]:
    """Kill until it is the runner's turn; the workers that it had. None if it ends before."""
    there = len(kept(runs))
    while turns and process.poll() is None:
        runner = turns[-1] == "runner"
        # now and then long before the first shard: the imports and the look at what is there are moments too
        early = runner and len(kept(runs)) == there and moments.random() < 0.5
        more = len(kept(runs)) + (0 if early else moments.randrange(1, 40))
        until(lambda: len(kept(runs)) >= more or process.poll() is not None)  # noqa: B023
        time.sleep(moments.uniform(0, 6 if early else 0.3))
        workers = workers_of(process)
        if process.poll() is not None or not (runner or workers):
            continue
        turns.pop()
        if runner:
            process.kill()
            found.runner_kills += 1
            return workers
        moments.choice(workers).kill()
        found.worker_kills += 1
    return []


def equal(ours: Runs, theirs: Runs) -> bool:
    """Whether two finished runs have the same table, and nothing else in their folders of shards."""
    whole = ours.verify(GRID.id)
    if whole.missing or whole.damaged or sorted(kept(ours)) != sorted(kept(theirs)):
        return False
    return all(ours.result(GRID.id, job).identical(theirs.result(GRID.id, job)) for job in GRID.everything)


def main(o: Options) -> None:
    found, moments = Found(machine=describe_machine()), random.Random(o.seed)
    turns = ["worker", "runner"] * (o.kills // 2) + ["worker"] * (o.kills % 2)
    moments.shuffle(turns)
    with tempfile.TemporaryDirectory() as scratch:
        alone = Runs(Path(scratch) / "alone")
        began = time.monotonic()
        run(GRID, alone, threads=1)
        found.undisturbed_seconds, found.shards = time.monotonic() - began, len(kept(alone))
        print(f"{found.machine}; {found.shards} shards, undisturbed {found.undisturbed_seconds:.0f} s in one process")
        began = time.monotonic()
        while turns:
            runs = Runs(Path(scratch) / f"{found.rounds}")
            disturb(runs, o.workers, turns, moments, found)
            found.rounds += 1
            found.tables_equal &= equal(runs, alone)
        found.seconds = time.monotonic() - began
    print(
        f"{found.worker_kills} kills of a worker, {found.runner_kills} of the runner, {found.rounds} runs, {found.seconds:.0f} s"
    )
    print(
        f"shards written again {found.written_again}, lost {found.lost}; workers that outlive their runner {found.leaked_workers}"
    )
    print(f"not shown as failed at once {found.not_shown_failed}; tables equal: {found.tables_equal}")
    if o.out is not None:
        write_atomically(o.out, json.dumps(asdict(found), indent=1) + "\n")
    if not found.tables_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
