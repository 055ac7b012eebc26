"""What a grid will take, before it is run: shards, FLOPs, time and memory, from a small pilot of each kind of job.

Formulas know multiplications, not overhead, so a pilot does each analysis of each model on one pair and on four, of the first
task and seed, and draws the line through both: matrix products as torch counts them, seconds on this machine and device, and the
resident memory that came on top of the model's. Other tasks are scaled by their tokens; what learns from text is done with few
steps, and scaled by steps.
"""

import inspect
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import psutil
from jaxtyping import Float
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from interp.errors import InterpError, OptionError
from interp.jobs.grid import Grid
from interp.jobs.kinds import KINDS
from interp.jobs.shards import Shard, environment_of, identities_of, shards_of
from interp.jobs.spec import Job
from interp.jobs.store import Runs
from interp.jobs.worker import Workbench
from interp.model.transformer import Transformer

PILOT = (1, 4)  # prompt pairs
_SMALLER = {"steps": 10, "max_iter": 5, "n_texts": 20}  # of kinds that learn from text
_EVERY = 0.005  # seconds between looks at the memory


@dataclass(frozen=True)
class Estimate:
    """table: one row per model and analysis: jobs, shards, missing, flops, seconds (of what is missing), memory (bytes, of one
    worker at a time). weights: bytes of each model. As text, what `interp run --dry-run` prints."""

    table: pd.DataFrame
    weights: dict[str, int]
    workers: int
    failed: dict[str, str]

    @property
    def seconds(self) -> float:
        """Time of everything that is missing, with as many workers, if each is as fast as one alone."""
        return float(self.table.seconds.sum()) / self.workers

    def __str__(self) -> str:
        shown = self.table.assign(
            flops=[_with_unit(v, 1000, "FLOPs") for v in self.table.flops], seconds=[_time(v) for v in self.table.seconds],
            memory=[_with_unit(v, 1024, "B") for v in self.table.memory],
        ).rename(columns={"flops": "work", "seconds": "time"})  # fmt: skip
        peak = max((self.weights[r.model] + r.memory for r in self.table.itertuples()), default=0.0)
        t, each = self.table, "" if self.workers == 1 else f" with {self.workers} workers"
        lines = [
            shown.to_string(index=False),
            "",
            f"{t.jobs.sum():,} jobs, {t.shards.sum():,} shards, {t.missing.sum():,} of them missing: "
            f"{_with_unit(t.flops.sum(), 1000, 'FLOPs')}, about {_time(self.seconds)}{each}, "
            f"and {_with_unit(peak * self.workers, 1024, 'B')} of memory beside the libraries'",
            "from a small pilot of each row on this machine and device; loading models is not counted",
        ]
        return "\n".join([*lines, *(f"will fail: {job}: {why}" for job, why in self.failed.items())])


def estimate(
    grid: Grid, runs: Runs, *, workers: int = 1, device: str | None = None, tell: Callable[[str], None] = lambda line: None
) -> Estimate:  # fmt: skip
    """What running a grid would take here. tell: hears what is being measured.

    Raises `LoadError` for a model that is not there; jobs that cannot be run are in `failed`, with the reason.
    """
    bench, rows, failed, weights = Workbench(device), [], {}, {}
    identities = identities_of(grid.everything)
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in grid.everything:
        groups.setdefault((job.model, _analysis(job)), []).append(job)
    for (name, analysis), jobs in groups.items():
        tell(f"measuring {name}: {analysis}")
        model = bench.model(jobs[0], identities[name])
        weights[name] = _weights(model)
        shards = list(shards_of(jobs, identities, environment_of(model.device.type)))
        missing = runs.verify(grid.id, shards).missing
        try:
            line = _line(bench, jobs[0], identities[name])
        except InterpError as error:
            failed[str(jobs[0])], line = str(error), lambda n: np.full(3, np.nan)
        size = {(j.task, j.n): _size(j, model) for j in {(j.task, j.n): j for j in jobs}.values()}
        first = size[jobs[0].task, jobs[0].n]
        each = [line(s.beyond - s.first) * (size[s.job.task, s.job.n] / first) for s in missing]
        flops, seconds, _ = np.sum(each, axis=0) if each else np.zeros(3)
        memory = max((costs[2] for costs in each), default=0.0)
        rows.append({"model": name, "analysis": analysis, "jobs": len(jobs), "shards": len(shards), "missing": len(missing),
                     "flops": flops, "seconds": seconds, "memory": memory})  # fmt: skip
    return Estimate(pd.DataFrame(rows), weights, workers, failed)


def _analysis(job: Job) -> str:
    options = ", ".join(f"{name} {value}" for name, value in job.options.items())
    return f"{job.kind}{f' ({options})' if options else ''}"


def _line(bench: Workbench, job: Job, wanted: str) -> Callable[[int], np.ndarray]:
    """(FLOPs, seconds, bytes) of so many prompts of a job, from what few of them take; what learns from text has no prompts."""
    if KINDS[job.kind].of == "text":
        given = {name: _option(job, name) for name in _SMALLER}
        small = {name: min(value, _SMALLER[name]) for name, value in given.items() if value is not None}
        found = _pilot(bench, replace(job, options={**job.options, **small}), wanted)
        times = math.prod(given[name] / value for name, value in small.items())
        return lambda n: found * np.array([times, times, 1.0])
    few, more = (min(n, job.n) for n in PILOT)
    at_few, at_more = (_pilot(bench, _part(job, n), wanted) for n in (few, more))
    slope = np.maximum(at_more - at_few, 0.0) / max(1, more - few)
    return lambda n: np.maximum(at_few + slope * (n - few), slope * n)


def _part(job: Job, n: int) -> Job:
    """The same job of fewer pairs."""
    own = {name: getattr(job, name)[:n] for name in ("clean", "corrupt", "answers", "wrong_answers")}
    return replace(job, n=n, block=n, **own)


def _option(job: Job, name: str) -> int | None:
    """The value of an option: the job's, or what its kind takes without one."""
    parameters = inspect.signature(KINDS[job.kind].analysis).parameters
    return job.options.get(name, parameters[name].default if name in parameters else None)


def _size(job: Job, model: Transformer) -> float:
    """Tokens of a prompt of the job, by which tasks differ."""
    pairs = job.pairs(model)
    return 1.0 if pairs is None else pairs.clean.numel() / len(pairs)


def _weights(model: Transformer) -> int:
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(seen.values())


def _pilot(bench: Workbench, job: Job, wanted: str) -> Float[np.ndarray, " 3"]:
    """(FLOPs, seconds, bytes) of a small job. Raises `OptionError` if it cannot be done."""
    shard = Shard(job, 0, job.n, "0" * 16)
    with _Counter() as counter:
        reply = bench.compute(shard, wanted)  # counted, and warmed up
    if reply.error:
        raise OptionError(reply.error)
    with _Peak() as peak:
        began = time.perf_counter()
        bench.compute(shard, wanted)
        seconds = time.perf_counter() - began
    return np.array([counter.total, seconds, peak.bytes], dtype=np.float64)


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of matrix products. (torch's own counter watches modules too, and refuses `autograd.grad` of a leaf.)"""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator._overloadpacket in flop_registry:
            self.total += flop_registry[operator._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class _Peak:
    """How far this process' resident memory rose inside the block."""

    bytes = 0

    def __enter__(self) -> "_Peak":
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _with_unit(value: float, base: int, unit: str) -> str:
    if value != value:
        return "?"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < base:
            return f"{value:.3g} {prefix}{unit}"
        value /= base
    return f"{value:.3g} E{unit}"


def _time(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
