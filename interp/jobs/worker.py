"""Where shards are computed: a process that keeps one model and the prompts of the job in hand.

    python -m interp.jobs.worker FD THREADS SHARE [DEVICE]     answers what comes through a socket, and ends when that does

A shard is asked for as JSON. The answer is a `Reply`: a line of JSON and the bytes of what is to be kept, a parquet table first;
no pickle either way. The process writes nothing: who asked keeps the result, so a worker can be killed at any moment.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.connection import Connection

import psutil
import torch
import xarray as xr

from interp.errors import InterpError, LoadError
from interp.grids import position_labels
from interp.jobs.arrays import to_table
from interp.jobs.kinds import KINDS, Output, plans_memory
from interp.jobs.shards import Shard, identity
from interp.jobs.spec import Job
from interp.jobs.store import digest, table_bytes
from interp.model.load import load_model
from interp.model.transformer import Transformer
from interp.sweep import memory_limit
from interp.tasks.pairs import PromptPairs

_READY = b"null"
_LABELS = {"token": "position", "source_token": "source"}  # what depends on the prompts of all shards together


@dataclass(frozen=True)
class Reply:
    """What became of a shard. error: nothing, or why there is no table; mend: whether it is the asker's to mend.

    seconds: what it took, the loading of its model and prompts included. warned: what the library warned of.
    """

    shard: str
    table: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    dataset: str = ""
    error: str = ""
    mend: bool = False
    seconds: float = field(default=0.0, compare=False)
    warned: tuple[str, ...] = ()

    def parts(self) -> list[bytes]:
        """It as bytes: a line of JSON, the table, and the files in the line's order."""
        about = {"shard": self.shard, "files": list(self.files), "dataset": self.dataset, "error": self.error,
                 "mend": self.mend, "seconds": self.seconds, "warned": list(self.warned)}  # fmt: skip
        return [json.dumps(about).encode(), self.table, *self.files.values()]

    @classmethod
    def from_parts(cls, parts: Sequence[bytes]) -> "Reply":
        """The reply whose parts these are."""
        about, table, *files = parts
        values = json.loads(about)
        files = dict(zip(values["files"], files, strict=True))
        return cls(**{**values, "table": table, "files": files, "warned": tuple(values["warned"])})

    def send(self, pipe: Connection) -> None:
        """Write it to a pipe."""
        for part in self.parts():
            pipe.send_bytes(part)

    @classmethod
    def receive(cls, pipe: Connection) -> "Reply | None":
        """Read one from a pipe; None is a worker's word that it is ready. Raises `EOFError` if the other end is gone."""
        if (values := json.loads(about := pipe.recv_bytes())) is None:
            return None
        return cls.from_parts([about, *(pipe.recv_bytes() for _ in range(1 + len(values["files"])))])


class Workbench:
    """One model at a time, on one device, and the prompt pairs of the job that was last asked for.

    share: of how many that share a device this is one; each plans with its part of the memory that is free.
    """

    def __init__(self, device: str | None = None, share: int = 1):
        self.device, self.share = device, share
        self._model: tuple[tuple[str, str | None, str], Transformer] | None = None
        self._pairs: tuple[str, PromptPairs | None, PromptPairs | None] | None = None

    def compute(self, shard: Shard, wanted: str) -> Reply:
        """The reply to a shard. wanted: the identity that its model has to have. Errors are replies too."""
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                output = self._output(shard, wanted)
            dataset = dataset_digest(self._pairs[1])
            about = {"shard": shard.id, "job": shard.job.id, "first": shard.first, "beyond": shard.beyond, "dataset": dataset,
                     "files": {name: digest(content) for name, content in output.files.items()}}  # fmt: skip
            table = table_bytes(to_table(output.scores, about))
            warned = tuple(dict.fromkeys(str(one.message) for one in seen if issubclass(one.category, UserWarning)))
            return Reply(shard.id, table, output.files, dataset, seconds=time.perf_counter() - began, warned=warned)
        except InterpError as error:
            return Reply(shard.id, error=str(error), mend=True)
        except Exception as error:
            traceback.print_exc()
            return Reply(shard.id, error=f"{type(error).__name__}: {error}".splitlines()[0])

    def _output(self, shard: Shard, wanted: str) -> Output:
        job = shard.job
        model, kind = self.model(job, wanted), KINDS[job.kind]
        running: dict[str, int] = {} if kind.splits else {"seed": job.seed}
        if self.share > 1 and plans_memory(job.kind):
            running["max_memory"] = memory_limit(model.device, None) // self.share
        if self._pairs is None or self._pairs[0] != job.id:
            apart = None if kind.splits or kind.of == "text" else job.held_out(model)
            self._pairs = (job.id, job.pairs(model), apart)
        _, pairs, held_out = self._pairs
        if kind.of == "text":
            return kind.analysis(model, **job.options, **running)
        if not kind.splits:
            return Output(kind.analysis(model, pairs, held_out, **job.options, **running))
        block = pairs.take(slice(shard.first, shard.beyond))
        scores = kind.analysis(model, block, **job.options, **running, batch_size=job.block)
        return Output(relabelled(scores, pairs))

    def model(self, job: Job, wanted: str) -> Transformer:
        """The job's model, loaded if it is not the last one. Raises `LoadError` if its weights are not those wanted."""
        key = (job.model, job.dtype, wanted)
        if self._model is None or self._model[0] != key:
            self._model = self._pairs = None  # room for the next one
            if (found := identity(job.model)) != wanted:
                raise LoadError(f"{job.model} is {found} here, and this run is of {wanted}: its files have changed")
            self._model = (key, load_model(job.model, device=self.device, dtype=job.dtype))
        return self._model[1]


def relabelled(result: xr.DataArray | xr.Dataset, pairs: PromptPairs) -> xr.DataArray | xr.Dataset:
    """The result of some of the pairs, with positions labelled by what all of them have there."""
    return result.assign_coords({
        name: (axis, position_labels(pairs, result[axis].values.tolist()))
        for name, axis in _LABELS.items() if name in result.coords
    })  # fmt: skip


def dataset_digest(pairs: PromptPairs | None) -> str:
    """16 hexadecimal digits of the prompts and answers of some pairs, as tokens; nothing of none."""
    if pairs is None:
        return ""
    found = sha256()
    for name in ("clean", "corrupt", "answers", "wrong_answers", "lengths"):
        if (value := getattr(pairs, name)) is not None:
            found.update(f"{name} {value.shape} {value.tolist()}\n".encode())
    return found.hexdigest()[:16]


def asked(shard: Shard, wanted: str) -> bytes:
    """A shard as a worker is asked for it."""
    values = {
        "job": shard.job.to_dict(),
        "first": shard.first,
        "beyond": shard.beyond,
        "shard": shard.id,
        "wanted": wanted,
    }
    return json.dumps(values).encode()


def answer(question: bytes, bench: Workbench) -> Reply:
    """The reply to a question of `asked`."""
    values = json.loads(question)
    shard = Shard(Job.from_dict(values["job"]), values["first"], values["beyond"], values["shard"])
    return bench.compute(shard, values["wanted"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer until the other end of the socket is closed, by whatever end of the process that holds it."""
    descriptor, threads, share, *device = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, and says what to do
    torch.set_num_threads(int(threads))
    bench = Workbench(*device, share=int(share))
    with Connection(int(descriptor)) as pipe:
        pipe.send_bytes(_READY)
        while True:
            try:
                answer(pipe.recv_bytes(), bench).send(pipe)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return 0


if __name__ == "__main__":
    psutil.Process().nice(5)  # the dashboard and its reader come first
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
