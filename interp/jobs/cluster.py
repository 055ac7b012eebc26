"""Workers on the machines of a Ray cluster: actors, each with one model loaded once, asked for one shard at a time.

    run(grid, executor="ray", workers=8, threads=4)            on a cluster of its own on this machine, unless RAY_ADDRESS is set

With several machines, that have the same interp, torch and Ray, and the models by the same name (a folder by the same path):

    ray start --head --port 6379                               on the first
    ray start --address FIRST:6379                             on each of the others
    interp run spec.toml --executor ray --workers 8 --address auto       on any of them; ray stop on each when all is done

Only the machine where the run is started needs its folder: questions and results travel as bytes (`interp.jobs.worker`). An actor
asks Ray for as many CPUs as it has threads, and for one GPU if its device is one. One for which there is no room yet waits until
there is, while the others work. What actors print stands in the logs of Ray's session on their machine.
"""

import logging
import os
import queue
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

import interp
from interp.errors import OptionError
from interp.jobs.executors import Event, Lost, devices_of, import_path
from interp.jobs.shards import Shard
from interp.jobs.worker import Reply, Workbench, answer, asked

_PATIENCE = 120.0  # seconds
_STORE = 128 * 2**20  # bytes of shared memory for results on their way, on a cluster of our own; more goes to disk
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "5"}  # the second as for processes on this machine
_NO_GPU = ("cpu", "mps")  # Ray counts no GPU for these


class Worker:
    """What an actor is: a `Workbench` that takes and gives bytes."""

    def __init__(self, threads: int, device: str | None, share: int):
        torch.set_num_threads(threads)
        self._bench = Workbench(device, share)

    def installed(self) -> tuple[str, str]:
        """(what computes here, the machine's name)."""
        return _installed(), os.uname().nodename

    def answer(self, question: bytes) -> list[bytes]:
        """The parts of the reply to a question."""
        return answer(question, self._bench).parts()


class Cluster:
    """A crew of Ray actors (see `interp.jobs.executors.Crew`).

    threads: CPUs of each actor. device: of each, "cpu" or one GPU that Ray picks. address: of the cluster, "auto" for the one of
    this machine; default: RAY_ADDRESS, else one of its own, which ends with the crew. patience: seconds without any worker after
    which it gives up.

    Raises `OptionError` if Ray is not installed, the device is none or has a number above 0, there is no cluster at the address,
    a machine of it has other versions, or no worker comes.
    """

    def __init__(
        self, n: int, *, threads: int = 1, device: str | None = None, address: str | None = None, patience: float = _PATIENCE
    ):  # fmt: skip
        devices_of(device)  # is it one at all
        named = torch.get_default_device() if device is None else torch.device(device)
        if named.index:
            raise OptionError(f"Ray picks the GPU of each worker: write {named.type}, not {device}")
        self.n, self.threads, self.device, self.address, self.patience = n, threads, device, address, patience
        self.gpus = int(named.type not in _NO_GPU)
        self._ray = _imported()
        self._actors: dict[int, Any] = {}
        self._there: set[int] = set()
        self._events: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._hired, self._alone, self._joined = 0, 0.0, False

    def hire(self) -> None:
        """Ask Ray for another actor, which is told as an event when it is there."""
        number, self._hired = self._hired, self._hired + 1
        variables = {
            "PYTHONPATH": import_path(), "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        kind = self._ray.remote(Worker).options(
            num_cpus=self.threads, num_gpus=self.gpus, scheduling_strategy="SPREAD", runtime_env={"env_vars": variables}
        )
        self._actors[number] = actor = kind.remote(self.threads, self.device, self._share())
        self._tell(number, actor.installed.remote())

    def _share(self) -> int:
        """How many workers may share a device's memory at most."""
        nodes = [] if self.gpus else self._nodes()
        return max([1, *(min(self.n, int(node.get("CPU", 0)) // self.threads) for node in nodes)])

    def _nodes(self) -> list[dict[str, float]]:
        """The resources of each machine."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def ask(self, worker: int, shard: Shard, wanted: str) -> None:
        """Give a free worker a shard, of a model with the identity wanted."""
        self._tell(worker, self._actors[worker].answer.remote(asked(shard, wanted)))

    def _tell(self, worker: int, result: Any) -> None:
        # waiting for a queue is Python's own, so that what a signal's handler raises ends it
        result.future().add_done_callback(lambda future: self._events.put((worker, future)))

    def wait(self, seconds: float) -> list[Event]:
        """What has happened: a worker is there (None), has a reply, or is `Lost`. Raises `OptionError` if none comes."""
        try:
            events = [self._event(*self._events.get(timeout=seconds))]
        except queue.Empty:
            if not self._there and time.monotonic() - self._alone > self.patience:
                raise OptionError(self._nobody()) from None
            return []
        while not self._events.empty():
            events.append(self._event(*self._events.get()))
        return events

    def _event(self, worker: int, future: Future) -> Event:
        try:
            result = future.result()
        except self._ray.exceptions.RayError as error:
            self._dismiss(worker)
            return worker, Lost(_why(error))
        if worker in self._there:
            return worker, Reply.from_parts(result)
        found, machine = result
        if found != _installed():
            raise OptionError(f"{machine} has {found}, and this run is of {_installed()}: install the same there")
        self._there.add(worker)
        return worker, None

    def _dismiss(self, worker: int) -> None:
        actor = self._actors.pop(worker)
        self._ray.kill(actor)  # it may live, out of reach, and would keep its CPUs
        if worker in self._there:
            self._there.discard(worker)
            self._alone = time.monotonic()

    def _nobody(self) -> str:
        """That no worker has come, what was asked for, and what there is."""
        amount = lambda some: f"{some.get('CPU', 0):g} CPUs and {some.get('GPU', 0):g} GPUs"  # noqa: E731
        wanted, machines = {"CPU": self.threads, "GPU": self.gpus}, [amount(node) for node in self._nodes()]
        return (
            f"no worker has come in {self.patience:g} s: each asks for {amount(wanted)} of one machine, and the Ray cluster at "
            f"{self._ray.get_runtime_context().gcs_address} has {len(machines)} ({'; '.join(machines)}), where "
            f"{amount(self._ray.available_resources())} are free"
        )

    def __enter__(self) -> "Cluster":
        try:
            self._join()
            self._alone = time.monotonic()
        except BaseException:  # a signal that comes while the cluster starts
            self._leave()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _join(self) -> None:
        """Be connected to a cluster; what is connected before is left so afterwards."""
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        if self._ray.is_initialized():
            there = self._ray.get_runtime_context().gcs_address
            if self.address not in (None, "auto", there):
                raise OptionError(
                    f"this process is connected to the Ray cluster at {there}, and cannot join {address} too"
                )
            return
        _knock(address)
        size: dict[str, Any] = {}
        if address == "local":
            size = {
                "num_cpus": max(os.cpu_count() or 1, self.n * self.threads),
                "object_store_memory": _STORE,
                "include_dashboard": False,
            }
        self._joined = True
        try:
            with _as_it_was():
                self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **size)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OptionError(f"no Ray cluster can be joined at {address}: {' '.join(str(error).split())}") from error
        self._print(False)

    def _print(self, whether: bool) -> None:
        # Ray prints to stdout that a worker was lost, which no setting of it prevents; in a version without this name it prints
        self._ray._private.worker._worker_logs_enabled = whether

    def _leave(self) -> None:
        """End all actors, and the cluster if it is our own."""
        while self._actors:
            self._ray.kill(self._actors.popitem()[1])
        if self._joined:
            self._joined = False
            try:
                self._ray.shutdown()  # of a cluster that was there before, it ends our connection
            finally:
                self._print(True)


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise OptionError("executor ray needs Ray: pip install interp-workbench[cluster]") from None
    return ray


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Start Ray with `_SETTINGS`, and without leaving it what SIGTERM does."""
    before, environment = signal.getsignal(signal.SIGTERM), {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update({name: environment[name] or value for name, value in _SETTINGS.items()})
    try:
        yield
    except SystemExit:  # Ray's own end of the process by SIGTERM
        if not callable(before):
            raise
        before(signal.SIGTERM, None)
    finally:
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Raise `OptionError` if nothing listens at HOST:PORT: Ray itself would try for a quarter of an hour."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise OptionError(f"no Ray cluster can be joined at {address}: {error}") from None


def _installed() -> str:
    """The versions that a shard's numbers are of."""
    return f"interp {interp.__version__} and torch {torch.__version__}"


def _why(error: Exception) -> str:
    """What Ray says of a lost actor, in one line: the last of its lines that is no detail."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    last = lines[-1].split(" Some common causes")[0] if lines else "no reason given"
    return textwrap.shorten(f"{type(error).__name__}: {last}", 300, placeholder=" ...")
