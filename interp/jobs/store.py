"""A folder of runs: what was asked, how far it is, and its results, in files that are either whole or refused.

    interp-runs/<id>/spec.json                    what was asked (`interp.jobs.grid`)
                     run.json                     the manifest: status, times, process, versions, models' weights
                     progress.json                done, total, stage, seconds, eta
                     cancel                       there if somebody wants it to end
                     lock                         held by the process that works on it, for as long as that lives
                     log.txt                      what a process without a terminal printed
                     shards/<shard>-<digest>.parquet     results of one shard (`interp.jobs.arrays`)
                     files/<shard>/...                   what it learned, in the library's own formats

Files are written beside their place and renamed, and a shard's name says the SHA-256 of its content: what an interruption, a
full disk or a bad one leaves is never taken for a result. Nothing here trusts a clock or a process number: who is at work holds
a lock.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from interp.errors import OptionError, one_of
from interp.files import write_atomically
from interp.jobs.arrays import about_of, from_table, joined
from interp.jobs.grid import Grid
from interp.jobs.shards import Shard, shards_of
from interp.jobs.spec import Job

FORMAT = "interp-run-2"
STATUSES = ("queued", "running", "done", "failed", "cancelled", "interrupted")
ACTIVE = ("queued", "running")
DEFAULT_FOLDER = "interp-runs"
_ID = re.compile(r"[0-9a-f]{16}")
_SHARD = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.parquet")
_TRIES = 20  # of 50 ms, to get a lock that somebody may just be looking at


@dataclass(frozen=True)
class Run:
    """A run's manifest. Times are UTC in ISO 8601, and only told; seconds: what the processes that worked on it took."""

    id: str
    name: str = ""
    status: str = "queued"
    submitted: str = ""
    started: str = ""
    finished: str = ""
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    error: str = ""
    failed: dict[str, str] = field(default_factory=dict)  # job id: why
    warned: dict[str, list[str]] = field(
        default_factory=dict
    )  # job id: what the library warned of when it was computed
    took: dict[str, float] = field(default_factory=dict)  # job id: seconds of computing it, where it was computed
    shards: int = 0
    spec_sha256: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    versions: str = ""
    device: str = "cpu"  # its type
    environment: str = ""  # see `interp.jobs.shards`
    running: dict[str, Any] = field(default_factory=dict)  # executor, workers, threads
    models: dict[str, str] = field(default_factory=dict)  # what each model is, and each text: see `interp.jobs.shards`
    datasets: dict[str, str] = field(default_factory=dict)  # of each model, task, n and seed: digest of its tokens
    seeds: list[int] = field(default_factory=list)

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ACTIVE


@dataclass(frozen=True)
class Progress:
    """How far a run is. done, total: prompts; stage: what it does now; seconds so far; eta: seconds left, if known."""

    done: int = 0
    total: int = 0
    stage: str = "waiting for its process"
    seconds: float = 0.0
    eta: float | None = None


@dataclass(frozen=True)
class Verified:
    """The shards of a run: where those are that are whole, why files are damaged, and what has no whole file."""

    whole: dict[str, Path]
    damaged: dict[Path, str]
    missing: list[Shard]


class Runs:
    """The runs of one folder, which is made when the first is created."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder)

    # ------------------------------------------------------------------------------------------------------- the list

    def path(self, id: str) -> Path:
        """A run's folder. Raises `OptionError` for what is no id, so that none leads out of the runs' folder."""
        if not isinstance(id, str) or _ID.fullmatch(id) is None:
            raise OptionError(f"{id!r} is not the id of a run: those are 16 hexadecimal digits")
        return self.folder / id

    def find(self, text: str) -> str:
        """The id of the run that a text means: an id, the beginning of just one, or a name. `OptionError` for another number."""
        ids = self.ids()
        found = [id for id in ids if id == text] or [id for id in ids if text and id.startswith(text)]
        found = found or [id for id in ids if text and self.name_of(id) == text]
        if len(found) != 1:
            which = f"{len(found)} runs are meant by" if found else "no run is meant by"
            raise OptionError(f"{which} {text!r} in {self.folder} (see interp runs list)")
        return found[0]

    def name_of(self, id: str) -> str:
        """What a run is called; nothing, if its manifest cannot be read."""
        try:
            return self._manifest(id).name
        except OptionError:
            return ""

    def __contains__(self, id: str) -> bool:
        return (self.path(id) / "run.json").is_file()

    def ids(self) -> list[str]:
        """Every run here, the latest submitted first; what is no run is passed by."""
        if not self.folder.is_dir():
            return []
        found = [path.name for path in self.folder.iterdir() if _ID.fullmatch(path.name) and path.name in self]
        return sorted(found, key=lambda id: (self._submitted(id), id), reverse=True)

    def _submitted(self, id: str) -> str:
        try:
            return self._manifest(id).submitted
        except OptionError:
            return ""

    # ----------------------------------------------------------------------------------------------------- a manifest

    def create(self, grid: Grid) -> Run:
        """Write spec and manifest; a run that ended without a result is queued again, and keeps its shards."""
        folder = self.path(grid.id)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        content = json.dumps(grid.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "spec.json", content)
        for name in ("cancel", "progress.json"):
            (folder / name).unlink(missing_ok=True)
        before = self._manifest(grid.id) if grid.id in self else Run(grid.id)
        return self.put(replace(
            before, name=str(grid), status="queued", submitted=now(), started="", finished="", error="", failed={},
            spec_sha256=hashlib.sha256(content.encode()).hexdigest(), seeds=sorted({job.seed for job in grid.everything}),
        ))  # fmt: skip

    def put(self, run: Run) -> Run:
        """Write a manifest."""
        one_of(run.status, STATUSES, "status")
        write_atomically(self.path(run.id) / "run.json", json.dumps({"format": FORMAT, **asdict(run)}, indent=1) + "\n")
        return run

    def change(self, id: str, **changes: Any) -> Run:
        """Write a manifest with these values changed."""
        return self.put(replace(self._manifest(id), **changes))

    def get(self, id: str) -> Run:
        """A run's manifest, told as it is: one that nobody is at work on has failed, whatever the file says.

        Raises `OptionError` if there is no such run, or its manifest cannot be read.
        """
        run = self._manifest(id)
        if not run.active or self.held(id):
            return run
        again = self._manifest(id)  # it may have ended between the reading and the asking
        if again != run:
            return again
        return replace(
            run, status="failed", error="its process ended without a word: see log.txt, and start it again to go on"
        )

    def _manifest(self, id: str) -> Run:
        path = self.path(id) / "run.json"
        values = read_json(path)
        if values is None:
            raise OptionError(f"there is no run {id} in {self.folder}")
        names = {f.name for f in fields(Run)}
        known = {*values} - {"format"} <= names and {"id", "status"} <= {*values}  # an older version knew fewer facts
        if values.get("format") != FORMAT or not known or values["status"] not in STATUSES:
            raise OptionError(f"{path} is no manifest of format {FORMAT}")
        return Run(**{name: values[name] for name in names if name in values})

    def grid(self, id: str) -> Grid:
        """What a run was asked. Raises `OptionError` if it is another grid's folder."""
        grid = Grid.from_file(self.path(id) / "spec.json")
        if grid.id != id:
            raise OptionError(f"the folder {self.path(id)} holds the spec of run {grid.id}")
        return grid

    # ------------------------------------------------------------------------------------------- who is at work on it

    @contextmanager
    def lock(self, id: str) -> Iterator[BinaryIO | None]:
        """The lock of a run, to be held by whoever works on it; None if somebody else does. A child may inherit the file."""
        with open(self.path(id) / "lock", "ab") as file:
            for _ in range(_TRIES):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
                else:
                    yield file
                    return
            yield None

    def held(self, id: str) -> bool:
        """Whether a process works on a run, or is about to: it holds the lock, which ends with it, however it ends."""
        try:
            with open(self.path(id) / "lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def set_progress(self, id: str, progress: Progress) -> None:
        """Tell whoever looks how far it is."""
        write_atomically(self.path(id) / "progress.json", json.dumps(asdict(progress)) + "\n")

    def progress(self, id: str) -> Progress:
        """How far it is."""
        values = read_json(self.path(id) / "progress.json")
        return Progress() if values is None else Progress(**values)

    def cancel(self, id: str) -> None:
        """Ask the process at work to end after the shards in hand."""
        if self.get(id).active:
            write_atomically(self.path(id) / "cancel", "")

    def is_cancelled(self, id: str) -> bool:
        """Whether somebody asked for its end."""
        return (self.path(id) / "cancel").exists()

    # -------------------------------------------------------------------------------------------------------- results

    def keep(self, id: str, shard: str, table: bytes, files: Mapping[str, bytes]) -> Path:
        """Write a shard's files, then its table, which makes it a result."""
        for name, content in files.items():
            folder = self.path(id) / "files" / shard
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, content)
        return write_atomically(self.path(id) / "shards" / f"{shard}-{digest(table, of=shard)}.parquet", table)

    def shards(self, id: str) -> list[Shard]:
        """Every shard of a run, as it was last planned."""
        run = self._manifest(id)
        return list(shards_of(self.grid(id).everything, run.models, run.environment)) if run.models else []

    def verify(self, id: str, shards: Sequence[Shard] | None = None) -> Verified:
        """Read every file of a run's shards and compare it with its digest. shards: default, those of its last plan."""
        shards = self.shards(id) if shards is None else shards
        files, whole, damaged, missing = self._files(id), {}, {}, []
        for shard in shards:
            for path in files.get(shard.id, ()):
                if why := self._damage(id, shard.id, path):
                    damaged[path] = why
                else:
                    whole[shard.id] = path
                    break
            if shard.id not in whole:
                missing.append(shard)
        return Verified(whole, damaged, missing)

    def _files(self, id: str) -> dict[str, list[Path]]:
        """The files that are called a shard's, in order of their names: two runners of old may have left two of one shard."""
        found: dict[str, list[Path]] = {}
        folder = self.path(id) / "shards"
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if match := _SHARD.fullmatch(name):
                found.setdefault(match[1], []).append(folder / name)
        return found

    def _damage(self, id: str, shard: str, path: Path) -> str:
        """What is wrong with a shard's files; nothing, if they are what was written."""
        try:
            content = path.read_bytes()
        except OSError as error:
            return error.strerror or "unreadable"
        if digest(content, of=shard) != path.stem[-16:]:
            return f"its {len(content):,} bytes are not those that were written"
        beside = self.path(id) / "files" / shard
        if not beside.is_dir():
            return ""
        for name, wanted in about_of(_table(content)).get("files", {}).items():
            try:
                if digest((beside / name).read_bytes()) != wanted:
                    return f"{beside / name} is not what was written"
            except OSError as error:
                return f"{beside / name}: {error.strerror}"
        return ""

    def result(self, id: str, job: Job | str | None = None) -> xr.DataArray | xr.Dataset:
        """The result of one job of a run; of the only one, if none is named.

        Raises `OptionError` if the run has several and none is named, if the job is not of this run, or if a shard is missing or
        damaged.
        """
        jobs = {each.id: each for each in self.grid(id).everything}
        wanted = job.id if isinstance(job, Job) else job if job is not None else next(iter(jobs))
        if wanted not in jobs or (job is None and len(jobs) > 1):
            one_of(wanted if job is not None else "", jobs, f"job of run {id}")
        run = self.get(id)
        shards = list(shards_of([jobs[wanted]], run.models, run.environment)) if run.models else []
        found = self.verify(id, shards)
        if not shards or found.missing:
            why = run.failed.get(wanted) or run.error or "; ".join(f"{p}: {w}" for p, w in found.damaged.items())
            raise OptionError(
                f"run {id} has no result of {jobs[wanted]}: it is {run.status}{f' ({why})' if why else ''}"
            )
        return joined([from_table(pq.read_table(found.whole[shard.id])) for shard in shards])

    def files(self, id: str, job: Job | str | None = None) -> Path:
        """The folder of what a job learned, for `SAE.load` or `SNMF.load`. Raises `OptionError` as `result` does."""
        self.result(id, job)
        run, jobs = self._manifest(id), {each.id: each for each in self.grid(id).everything}
        wanted = jobs[job.id if isinstance(job, Job) else job if job is not None else next(iter(jobs))]
        folder = self.path(id) / "files" / next(shards_of([wanted], run.models, run.environment)).id
        if not folder.is_dir():
            raise OptionError(f"{wanted} learned nothing that is kept as files")
        return folder

    def tidy(self, id: str, verified: Verified) -> None:
        """Remove what is damaged, and what a killed process left half written."""
        # whoever cancels a run holds no lock, and may be writing just now
        halves = [path for path in self.path(id).rglob(".*") if not path.name.startswith(".cancel.")]
        for path in (*verified.damaged, *halves):
            path.unlink(missing_ok=True)


def digest(content: bytes, *, of: str = "") -> str:
    """16 hexadecimal digits of the SHA-256 of a file, and of what it is of: another shard's file under this name is not whole."""
    return hashlib.sha256(of.encode() + content).hexdigest()[:16]


def table_bytes(table: pa.Table) -> bytes:
    """A table as a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _table(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


def now() -> str:
    """This moment in UTC, to the millisecond: two jobs of one second keep their order."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file. Raises `OptionError` for what is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OptionError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{path} holds no JSON object")
    return values
