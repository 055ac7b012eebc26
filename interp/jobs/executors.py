"""Who computes shards, and how they are dealt out: one loop for this process, for others on this machine, and for a cluster.

A `Crew` has workers that are hired, asked for one shard at a time, and lost. `deal` gives each the next shard of the model that
it has loaded, hands the shard of a lost worker to another, and gives up on a shard that has taken three workers with it.
"""

import os
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch

import interp
import interp_kernels
from interp.errors import OptionError
from interp.jobs.shards import Shard
from interp.jobs.worker import Reply, Workbench, asked

_TAKEN = 3  # workers that a shard may take with it


@dataclass(frozen=True)
class Lost:
    """A worker is gone. why: as far as is known."""

    why: str


Event = tuple[int, Reply | Lost | None]


@runtime_checkable
class Crew(Protocol):
    """At most n workers, by number. As a context, it ends all of them."""

    n: int

    def hire(self) -> None:
        """Ask for another worker; it is told as an event when it is there."""

    def ask(self, worker: int, shard: Shard, wanted: str) -> None:
        """Give a free worker a shard, of a model with the identity wanted."""

    def wait(self, seconds: float) -> list[Event]:
        """What has happened, after at most so long: a worker is there (None), has a reply, or is `Lost`."""

    def __enter__(self) -> "Crew": ...
    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Here:
    """A crew of one: this process."""

    n = 1

    def __init__(self, device: str | None = None):
        self._bench, self._events, self._asked = Workbench(device), [], None

    def hire(self) -> None:
        self._events.append((0, None))

    def ask(self, worker: int, shard: Shard, wanted: str) -> None:
        self._asked = (shard, wanted)

    def wait(self, seconds: float) -> list[Event]:
        events, self._events = self._events, []
        if self._asked is not None:
            (shard, wanted), self._asked = self._asked, None
            events.append((0, self._bench.compute(shard, wanted)))
        return events

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Processes:
    """A crew of processes on this machine (`interp.jobs.worker`). devices: taken in turn; none: torch's default."""

    def __init__(self, n: int, *, threads: int = 1, devices: Sequence[str] = ()):
        self.n, self.threads, self.devices = n, threads, list(devices)
        self._workers: dict[int, tuple[subprocess.Popen, Connection]] = {}
        self._hired = 0

    def hire(self) -> None:
        number, self._hired = self._hired, self._hired + 1
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._start(number, theirs)
        self._workers[number] = (process, Connection(ours.detach()))  # it says when it is ready

    def _start(self, number: int, theirs: socket.socket) -> subprocess.Popen:
        """Start a worker that answers through a socket."""
        share = -(-self.n // max(1, len(self.devices)))
        device = [self.devices[number % len(self.devices)]] if self.devices else []
        return subprocess.Popen(
            [sys.executable, "-m", "interp.jobs.worker", str(theirs.fileno()), str(self.threads), str(share), *device],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
            env={**os.environ, "PYTHONPATH": import_path(), "OMP_NUM_THREADS": str(self.threads)},
        )  # fmt: skip

    def ask(self, worker: int, shard: Shard, wanted: str) -> None:
        with suppress(OSError):  # it is gone, which the next wait finds
            self._workers[worker][1].send_bytes(asked(shard, wanted))

    def wait(self, seconds: float) -> list[Event]:
        pipes, events = {pipe: number for number, (_, pipe) in self._workers.items()}, []
        for pipe in wait(list(pipes), seconds):
            try:
                events.append((pipes[pipe], Reply.receive(pipe)))
            except (EOFError, OSError):
                events.append((pipes[pipe], Lost(self._bury(pipes[pipe]))))
        return events

    def _bury(self, worker: int) -> str:
        process, pipe = self._workers.pop(worker)
        pipe.close()
        process.kill()
        code = process.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._bury(worker)


class _Pile:
    """Shards that are still to be dealt, by model, so that a worker keeps the one that it has loaded."""

    def __init__(self, shards: Sequence[Shard]):
        self._piles: dict[str, deque[Shard]] = {}
        self._dropped: set[str] = set()
        for shard in shards:
            self._piles.setdefault(shard.job.model, deque()).append(shard)

    def take(self, model: str | None) -> Shard | None:
        """The next shard: of that model, if there is one, else of the model with most left."""
        while self._piles:
            name = model if model in self._piles else max(self._piles, key=lambda name: len(self._piles[name]))
            shard = self._piles[name].popleft()
            if not self._piles[name]:
                del self._piles[name]
            if shard.job.id not in self._dropped:
                return shard
        return None

    def put_back(self, shard: Shard) -> None:
        self._piles.setdefault(shard.job.model, deque()).appendleft(shard)

    def drop(self, job: str) -> None:
        """Deal no more shards of a job."""
        self._dropped.add(job)


def deal(
    shards: Sequence[Shard], identities: Mapping[str, str], crew: Crew, *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Shard, Reply]]:
    """Have a crew compute shards; yields them with their replies as those come.

    A job of which one shard has an error is not asked for again. After `stopped()` no shard is dealt, and those in hand
    are waited for. Raises `OptionError` if workers end again and again without a single reply.
    """
    pile, free, busy, holds = _Pile(shards), set(), {}, {}
    taken: Counter[str] = Counter()
    in_vain = 0
    for _ in range(min(crew.n, len(shards))):
        crew.hire()
    while True:
        while free and not stopped() and (shard := pile.take(holds.get(worker := max(free)))) is not None:
            free.remove(worker)
            busy[worker], holds[worker] = shard, shard.job.model
            crew.ask(worker, shard, identities[shard.job.model])
        if not busy and (free or stopped()):
            return
        for worker, event in crew.wait(0.5):
            if isinstance(event, Reply):
                in_vain, shard = 0, busy.pop(worker)
                free.add(worker)
                if event.error:
                    pile.drop(shard.job.id)
                yield shard, event
            elif event is None:
                free.add(worker)
            else:
                free.discard(worker)
                in_vain += 1
                shard = busy.pop(worker, None)
                if in_vain > _TAKEN * crew.n:
                    raise OptionError(f"no worker stays alive: the last {in_vain} ended without a result ({event.why})")
                crew.hire()
                if shard is not None:
                    taken[shard.id] += 1
                    if taken[shard.id] < _TAKEN:
                        pile.put_back(shard)
                    else:
                        yield shard, Reply(shard.id, error=f"{_TAKEN} workers ended while at it ({event.why})")


def devices_of(device: str | None) -> list[str]:
    """The devices that workers take in turn: those of a kind if it has several, as cuda:0 and cuda:1; else the one; none: [].

    Raises `OptionError` for what is no device of torch's.
    """
    if device is None:
        return []
    try:
        named = torch.device(device)
    except RuntimeError:
        raise OptionError(f"{device!r} is not a torch device: write cpu, cuda, cuda:1, mps, ...") from None
    here = torch.accelerator.current_accelerator()
    if named.index is not None or here is None or here.type != named.type:
        return [device]
    return [f"{named.type}:{i}" for i in range(torch.accelerator.device_count())]


def import_path() -> str:
    """What another Python needs so as to import what this one does, also where packages are found by the working folder."""
    roots = [str(Path(package.__file__).resolve().parents[1]) for package in (interp, interp_kernels)]
    return os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
