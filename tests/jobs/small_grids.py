"""Small grids, how a finished run is compared with another, and processes that are forked instead of started."""

import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from tqdm import tqdm

from interp.jobs import worker
from interp.jobs.executors import Processes
from interp.jobs.grid import Analysis, Grid
from interp.jobs.spec import Job
from interp.jobs.store import Runs

JOB = Job("patch", "mini-gpt2", task="ioi", n=5, block=2, options={"sites": "head", "direction": "noise"})
GRID = Grid(
    models=["mini-gpt2"],
    tasks=["ioi", "capitals"],
    seeds=[0, 1, 2],
    n=8,
    block=1,
    analyses=[Analysis("patch", {"sites": "resid_pre", "positions": [-1]})],
)  # 6 jobs in 48 shards of some milliseconds


@dataclass(frozen=True)
class Table:
    """What a run came to: its shards' file names, which have the digests of their contents, and each job's result."""

    files: list[str]
    results: dict[str, xr.DataArray | xr.Dataset]


def table_of(runs: Runs, grid: Grid) -> Table:
    """The table of a finished run, once it is seen to be whole."""
    folder, found = runs.path(grid.id), runs.verify(grid.id)
    assert not found.missing
    assert not found.damaged
    files = sorted(path.name for path in (folder / "shards").iterdir())
    assert len(files) == len(found.whole) == len(runs.shards(grid.id)), "a shard is there twice, or a half is left"
    assert not list(folder.rglob(".*")), "what a killed process left half written is still there"
    return Table(files, {job.id: runs.result(grid.id, job) for job in grid.everything})


def assert_same(ours: Table, theirs: Table) -> None:
    """Two tables are the same to the bit."""
    assert ours.files == theirs.files
    assert [*ours.results] == [*theirs.results]
    for job, result in ours.results.items():
        assert result.identical(theirs.results[job]), job


class Forked:
    """A process that does some work and ends: forked from this one, it has its imports and models without reading them."""

    def __init__(self, work: Callable[[], object]):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                tqdm.set_lock(threading.RLock())  # its own is shared between processes, and one that is killed keeps it
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # whatever happens, printing included: no second pytest goes on from here

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(found[1])
        return self.code is not None

    def wait(self) -> int:
        """Its exit status once it has ended, or minus the signal that ended it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


class Forks(Processes):
    """Worker processes that are forked instead of started."""

    def _start(self, number: int, theirs: socket.socket) -> Forked:
        def work() -> None:
            kept = theirs.fileno()  # a started process has no other file of ours: neither locks nor others' sockets
            os.closerange(3, kept)
            os.closerange(kept + 1, 1024)
            worker.main([str(kept), str(self.threads), str(self.n)])

        return Forked(work)
