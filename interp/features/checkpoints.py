"""A training run's folder: what was asked for, the log, and the last checkpoint, each whole or not there.

run.json           what is trained and how: a folder holds one run
log.jsonl          a line per record
checkpoint/        state.safetensors (weights, moments, counters of all SAEs) and state.json (step, place in the stream)
<name>/            a trained SAE, in SAELens' format
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import OptionError
from interp.features.shuffle import Position
from interp.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after `step` steps: tensors by SAE and name."""

    step: int
    position: Position
    tensors: dict[str, dict[str, Tensor]]


class TrainingFolder:
    """The folder of one run. Raises `OptionError` if it holds a run that was asked for differently, naming what differs."""

    def __init__(self, folder: str | Path, asked: dict[str, Any]):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError(f"{self.folder} is a file, and a training run needs a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(asked))
        described = self.folder / "run.json"
        if described.exists():
            before = json.loads(described.read_text(encoding="utf-8"))
            if difference := _first_difference(before, asked):
                raise OptionError(
                    f"{self.folder} holds another run: {difference}; take another folder, or the same options"
                )
        else:
            if any(self.folder.iterdir()):
                raise OptionError(f"{self.folder} is not empty and holds no training run")
            write_atomically(described, json.dumps(asked, indent=2))

    def latest(self) -> Checkpoint | None:
        """The last checkpoint, if there is one."""
        for name in ("checkpoint", "checkpoint.old"):
            described = self.folder / name / "state.json"
            if described.exists():
                state = json.loads(described.read_text(encoding="utf-8"))
                tensors: dict[str, dict[str, Tensor]] = {}
                for key, tensor in load_file(self.folder / name / "state.safetensors").items():
                    sae, _, rest = key.partition("/")
                    tensors.setdefault(sae, {})[rest] = tensor
                return Checkpoint(state["step"], Position(**state["position"]), tensors)
        return None

    def save(self, step: int, position: Position, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint beside the last one, then put it in its place."""
        fresh, old, current = (self.folder / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        flat = {f"{sae}/{name}": t.detach().contiguous() for sae, named in tensors.items() for name, t in named.items()}
        save_file(flat, fresh / "state.safetensors")
        write_atomically(fresh / "state.json", json.dumps({"step": step, "position": asdict(position)}))
        if current.exists():  # else the old one may be all there is
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        fresh.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def logger(self, step: int) -> Callable[[dict], None]:
        """Appends records to the log, from which those after `step` are taken out first: they are about to come again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(line + "\n" for line in kept))

        def log(record: dict) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

        return log


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            if found := _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key):
                return found
        return None
    return None if before == now else f"{path} was {before}, and is {now} now"


def tensorboard(folder: str | Path) -> Callable[[dict], None]:
    """A logger for TensorBoard; needs the package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionError("logging to TensorBoard needs the package tensorboard, which is not installed") from None
    writer = SummaryWriter(str(folder))

    def log(record: dict) -> None:
        for key in record.keys() - {"step", "sae"}:
            writer.add_scalar(f"{record['sae']}/{key}", record[key], record["step"])
        writer.flush()

    return log


def wandb(**options: Any) -> Callable[[dict], None]:
    """A logger for Weights & Biases, started with these options of `wandb.init`; needs the package wandb."""
    try:
        import wandb as client
    except ImportError:
        raise OptionError("logging to Weights & Biases needs the package wandb, which is not installed") from None
    run = client.init(**options)

    def log(record: dict) -> None:
        values = {f"{record['sae']}/{key}": value for key, value in record.items() if key not in ("step", "sae")}
        run.log(values, step=record["step"])

    return log
