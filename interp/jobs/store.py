"""A folder of runs: what was asked, how far it is, and its result, in files that are either whole or refused.

    interp-runs/<id>/job.json                     what was asked (`interp.jobs.spec`)
                     run.json                     status, times, process, provenance
                     progress.json                done, total, stage, seconds, eta
                     cancel                       there if somebody wants it to end
                     log.txt                      what the worker printed
                     shards/00000-00008.*         scores of the prompts 0 to 7
                     result.safetensors, .json    all scores

Labelled arrays are kept without pickle: numbers as tensors, bit for bit; names, texts and attributes as JSON; and a digest of
each, so that a damaged file is never believed. Every file is written beside its place and renamed.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr

from interp.errors import OptionError, one_of
from interp.factorize.folder import load_folder, save_folder
from interp.files import write_atomically

FORMAT, ARRAYS = "interp-run-1", "interp-arrays-1"
STATUSES = ("queued", "running", "done", "failed", "cancelled", "interrupted")
ACTIVE = ("queued", "running")
DEFAULT_FOLDER = "interp-runs"
_ID = re.compile(r"[0-9a-f]{16}")
_GRACE = 60.0  # seconds that a queued run may wait for the process that was promised to it


def save_arrays(
    folder: str | Path, name: str, arrays: xr.DataArray | xr.Dataset, *, about: Mapping[str, Any] | None = None
) -> Path:  # fmt: skip
    """Write a labelled result as `name.safetensors` and `name.json` into a folder, made if need be.

    Values, coordinates, dtypes, the order of axes and attributes come back as they were, NaN included. about: what else the
    reader should check. Raises `OptionError` naming a variable or an attribute that has no plain form.
    """
    single = isinstance(arrays, xr.DataArray)
    # a variable may share its name with no coordinate; "value" is only what a single array is called in here
    variables = {"value": arrays} if single else dict(arrays.data_vars)
    layout: dict[str, Any] = {"single": single, "name": arrays.name if single else None, "attrs": _attrs(arrays.attrs)}
    tensors: dict[str, torch.Tensor] = {}
    for part, group in (("variables", variables), ("coords", arrays.coords)):
        layout[part] = [_describe(part, str(key), array.variable, tensors) for key, array in group.items()]
    return save_folder(folder, name, tensors, {"format": ARRAYS, "about": dict(about or {}), "layout": layout,
                                               "layout_sha256": _digest(layout)})  # fmt: skip


def load_arrays(
    folder: str | Path, name: str, *, about: Mapping[str, Any] | None = None
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """Read it back. Raises `OptionError` if a file is missing or damaged, or if what it says is not `about`."""
    tensors, options = load_folder(folder, name, ARRAYS, fields=("about", "layout", "layout_sha256"), tensors=())
    layout = options["layout"]
    if _digest(layout) != options["layout_sha256"]:
        raise OptionError(f"{Path(folder) / name}.json is damaged: its labels are not those that were written")
    for key, value in (about or {}).items():
        if options["about"].get(key) != value:
            raise OptionError(f"{Path(folder) / name} is of {key} {options['about'].get(key)!r}, not {value!r}")
    parts = {
        part: {item["name"]: (item["dims"], _read(part, item, tensors), item["attrs"]) for item in layout[part]}
        for part in ("variables", "coords")
    }  # fmt: skip
    if not layout["single"]:
        return xr.Dataset(parts["variables"], parts["coords"], layout["attrs"])
    dims, values, _ = parts["variables"]["value"]
    return xr.DataArray(values, parts["coords"], dims, layout["name"], layout["attrs"])


def _describe(part: str, key: str, variable: xr.Variable, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Where to find a variable again; its numbers go to `tensors`, its texts into the description."""
    values = np.asarray(variable.values)
    about = {"name": key, "dims": list(variable.dims), "attrs": _attrs(variable.attrs), "dtype": str(values.dtype)}
    if values.dtype.kind in "biuf":
        tensors[f"{part}/{key}"] = torch.from_numpy(np.array(values))
        return about
    texts = values.tolist()
    if values.dtype.kind not in "UTO" or not all(isinstance(v, str) for v in values.ravel().tolist()):
        raise OptionError(f"{key} holds {values.dtype} values, and only numbers and texts are saved")
    return {**about, "texts": texts}


def _read(part: str, item: dict[str, Any], tensors: dict[str, torch.Tensor]) -> np.ndarray:
    if "texts" in item:
        dtype = np.dtypes.StringDType() if item["dtype"].startswith("StringDType") else np.dtype(item["dtype"])
        return np.array(item["texts"], dtype=dtype)
    return tensors[f"{part}/{item['name']}"].numpy()


def _attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as JSON keeps them."""
    found = {}
    for key, value in attrs.items():
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, str | bool | int | float):
            raise OptionError(f"attribute {key} is {type(value).__name__}, and only texts and numbers are saved")
        found[str(key)] = value
    return found


def _digest(layout: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A run's manifest. Times are UTC in ISO 8601; pid and born (seconds since 1970) name the process that works on it."""

    id: str
    status: str = "queued"
    submitted: str = ""
    started: str = ""
    finished: str = ""
    pid: int = 0
    born: float = 0.0
    error: str = ""
    shards: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ACTIVE

    @property
    def seconds(self) -> float | None:
        """How long it took, or has taken so far; None before it started."""
        if not self.started:
            return None
        end = datetime.fromisoformat(self.finished) if self.finished else datetime.now(UTC)
        return max(0.0, (end - datetime.fromisoformat(self.started)).total_seconds())


@dataclass(frozen=True)
class Progress:
    """How far a run is. done, total: prompts; stage: what it does now; seconds so far; eta: seconds left, if known."""

    done: int = 0
    total: int = 0
    stage: str = "waiting for the worker"
    seconds: float = 0.0
    eta: float | None = None


class Runs:
    """The runs of one folder, which is made when the first is created. It knows no kinds of jobs: a job is what JSON holds."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder)

    def path(self, id: str) -> Path:
        """A run's folder. Raises `OptionError` for what is no id, so that none leads out of the runs' folder."""
        if not isinstance(id, str) or _ID.fullmatch(id) is None:
            raise OptionError(f"{id!r} is not the id of a run: those are 16 hexadecimal digits")
        return self.folder / id

    def __contains__(self, id: str) -> bool:
        return (self.path(id) / "run.json").is_file()

    def ids(self) -> list[str]:
        """Every run here, the latest submitted first; what is no run is passed by."""
        if not self.folder.is_dir():
            return []
        found = [p.name for p in self.folder.iterdir() if _ID.fullmatch(p.name) and (p / "run.json").is_file()]
        return sorted(found, key=lambda id: (self._submitted(id), id), reverse=True)

    def _submitted(self, id: str) -> str:
        try:
            return self.get(id).submitted
        except OptionError:
            return ""

    def create(self, id: str, job: Mapping[str, Any]) -> Run:
        """Write job and manifest; a run that ended without a result is queued again, and keeps its shards."""
        folder = self.path(id)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "job.json", json.dumps(job, indent=1, ensure_ascii=False) + "\n")
        for name in ("cancel", "progress.json"):
            (folder / name).unlink(missing_ok=True)
        return self.put(Run(id, submitted=now()))

    def put(self, run: Run) -> Run:
        """Write a manifest."""
        one_of(run.status, STATUSES, "status")
        write_atomically(self.path(run.id) / "run.json", json.dumps({"format": FORMAT, **asdict(run)}, indent=1) + "\n")
        return run

    def change(self, id: str, **changes: Any) -> Run:
        """Write a manifest with these values changed."""
        return self.put(replace(self._manifest(id), **changes))

    def get(self, id: str) -> Run:
        """A run's manifest, told as it is: one whose process is gone has failed, whatever the file says.

        Raises `OptionError` if there is no such run, or its manifest cannot be read.
        """
        run = self._manifest(id)
        if not run.active or (run.pid and is_alive(run.pid, run.born)):
            return run
        if not run.pid and (datetime.now(UTC) - datetime.fromisoformat(run.submitted)).total_seconds() < _GRACE:
            return run
        again = self._manifest(id)  # it may have ended between the reading and the asking
        if again != run:
            return again
        return replace(
            run, status="failed", error="its process ended without a word: see log.txt, and submit it again to go on"
        )

    def _manifest(self, id: str) -> Run:
        path = self.path(id) / "run.json"
        values = read_json(path)
        if values is None:
            raise OptionError(f"there is no run {id} in {self.folder}")
        names = {f.name for f in fields(Run)}
        if values.get("format") != FORMAT or {*values} - {"format"} != names or values["status"] not in STATUSES:
            raise OptionError(f"{path} is no manifest of format {FORMAT}")
        return Run(**{name: values[name] for name in names})

    def set_progress(self, id: str, progress: Progress) -> None:
        """Tell whoever looks how far it is."""
        write_atomically(self.path(id) / "progress.json", json.dumps(asdict(progress)) + "\n")

    def progress(self, id: str) -> Progress:
        """How far it is."""
        values = read_json(self.path(id) / "progress.json")
        return Progress() if values is None else Progress(**values)

    def cancel(self, id: str) -> None:
        """Ask the worker to end after the block in hand; one that no process works on is cancelled at once."""
        run = self.get(id)
        if not run.active:
            return
        write_atomically(self.path(id) / "cancel", "")
        if not run.pid:
            self.put(replace(run, status="cancelled", finished=now()))

    def is_cancelled(self, id: str) -> bool:
        """Whether somebody asked for its end."""
        return (self.path(id) / "cancel").exists()

    def result(self, id: str) -> xr.DataArray | xr.Dataset:
        """The scores of a finished run. Raises `OptionError` if it has none, or they are damaged."""
        run = self.get(id)
        if run.status != "done":
            raise OptionError(f"run {id} has no result: it is {run.status}{f' ({run.error})' if run.error else ''}")
        return load_arrays(self.path(id), "result", about={"job": id})


def now() -> str:
    """This moment in UTC, to the millisecond: two jobs of one second keep their order."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")


def me() -> dict[str, Any]:
    """This process, as a manifest names it."""
    return {"pid": os.getpid(), "born": psutil.Process().create_time()}


def is_alive(pid: int, born: float) -> bool:
    """Whether that very process still runs: a number is given again, and a dead child stays in the table for a while."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


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
