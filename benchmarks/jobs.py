"""What a batch costs beside its computing: planning, resuming, dealing out shards; and what a second worker brings.

    python benchmarks/jobs.py --out benchmarks/results/jobs.json

planning   a grid of 100,000 shards from its file to the list of shards
resuming   the same, from the file too, when every shard is there: all are read and compared with their digests
overhead   of one shard, dealt to a worker process, checked, kept: wall time of a run less what the worker computed for
scaling    shards per second of two workers over those of one, one thread each, from the first shard to the last
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.machine import describe_machine
from interp.files import write_atomically
from interp.jobs.executors import Here, Processes, deal
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import run
from interp.jobs.shards import Shard, environment_of, identity, shards_of
from interp.jobs.store import Runs, digest
from interp.jobs.worker import Workbench

MODEL = "mini-gpt2"


@dataclass
class Options:
    """What is measured."""

    shards: int = 100_000
    """Shards that are planned and resumed."""
    tiny: int = 300
    """Shards that overhead is measured on."""
    shards_of_scaling: int = 160
    """Shards of each run that scaling is measured on."""
    rounds: int = 3
    """Rounds of scaling, one worker and two in turn."""
    out: Path | None = None
    """JSON to write."""


def large(n: int) -> Grid:
    """A grid of n tiny shards: one pair each."""
    return Grid(models=[MODEL], tasks=["ioi"], seeds=range(n // 5), n=1,
                analyses=[Analysis("patch", {"sites": "attn_out"}, {"window": [1, 2, 3, 4]}),
                          Analysis("patch", {"sites": "mlp_out"})])  # fmt: skip


def planned(n: int, folder: Path) -> tuple[float, list[Shard]]:
    """(seconds, shards) from a file."""
    path = large(n).to_file(folder / "grid.json")
    began = time.perf_counter()
    grid = Grid.from_file(path)
    shards = list(shards_of(grid.everything, {MODEL: identity(MODEL)}, environment_of("cpu")))
    return time.perf_counter() - began, shards


def resumed(n: int, shards: list[Shard], folder: Path) -> float:
    """Seconds of a run whose shards are all there."""
    runs, grid = Runs(folder / "runs"), large(n)
    run_folder = runs.path(grid.id) / "shards"
    run_folder.mkdir(parents=True)
    content = Workbench().compute(shards[0], identity(MODEL)).table
    for shard in shards:
        (run_folder / f"{shard.id}-{digest(content, of=shard.id)}.parquet").write_bytes(content)
    path = grid.to_file(folder / "again.json")
    began = time.perf_counter()
    done = run(Grid.from_file(path), runs)
    seconds = time.perf_counter() - began
    assert done.status == "done", done
    return seconds


def overhead(n: int, folder: Path) -> tuple[float, float]:
    """(seconds of a shard through a worker process and into a file, seconds of computing it there)."""
    shards = list(shards_of(large(n).everything, identities := {MODEL: identity(MODEL)}, environment_of("cpu")))
    runs, times, computing = Runs(folder / "overhead"), [], []
    (runs.path("0" * 16) / "shards").mkdir(parents=True)
    with Processes(1) as crew:
        for shard, reply in deal(shards, identities, crew):
            runs.keep("0" * 16, shard.id, reply.table, reply.files)
            times.append(time.perf_counter())
            computing.append(reply.seconds)
    # the first ones wait for the worker and its model
    return (times[-1] - times[10]) / (n - 11), sum(computing[11:]) / (n - 11)


def throughput(workers: int, n: int) -> float:
    """Shards per second, from the first to the last."""
    grid = Grid(
        models=[MODEL], tasks=["ioi"], seeds=range(n), n=8, analyses=[Analysis("patch", {"sites": "resid_pre"})]
    )
    shards = list(shards_of(grid.everything, identities := {MODEL: identity(MODEL)}, environment_of("cpu")))
    times = []
    with Here() if workers == 1 else Processes(workers) as crew:
        for _ in deal(shards, identities, crew):
            times.append(time.perf_counter())
    warm = n // 8  # both workers have their model by then
    return (n - warm) / (times[-1] - times[warm - 1])


def main(o: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planning, shards = planned(o.shards, folder)
        resuming = resumed(o.shards, shards, folder)
        through, computing = overhead(o.tiny, folder)
        rates = [(throughput(1, o.shards_of_scaling), throughput(2, o.shards_of_scaling)) for _ in range(o.rounds)]
    scaling = median(two / one for one, two in rates)
    print(f"{describe_machine()}\n")
    print(f"planning {len(shards):,} shards      {planning:6.2f} s")
    print(f"resuming {len(shards):,} shards      {resuming:6.2f} s")
    print(
        f"overhead of a shard          {1000 * (through - computing):6.2f} ms ({1000 * through:.1f} less {1000 * computing:.1f})"
    )
    print(
        f"two workers over one         {scaling:6.2f} x  ({', '.join(f'{a:.1f} -> {b:.1f}' for a, b in rates)} shards/s)"
    )
    if o.out is not None:
        found = {"machine": describe_machine(), "shards": len(shards), "planning": planning, "resuming": resuming,
                 "shard_through_a_worker": through, "shard_computing": computing, "rates": rates, "scaling": scaling}  # fmt: skip
        write_atomically(o.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
