"""Activations on disk: computed once, read by every training run after.

    cache = cache_activations(ModelSource(model, corpus, hooks), "folder")      # started again, it goes on where it stopped
    train_saes(CacheSource("folder"), ...)                                       # a source like the one it was made of

A cache is a folder of raw numbers, in the machine's byte order, which are mapped and not loaded:

    cache.json         what it is a cache of, and how many sequences are done
    0.bin, 1.bin, ...  [row, d] of each hook, in the order of `widths`; bfloat16 as its two bytes
    ids.bin            [row, 2] int32: the sequence and position of each row
    offsets.bin        [sequence + 1] int64: sequence s has rows offsets[s]:offsets[s + 1]
    tokens.safetensors token ids and lengths of the sequences, if the source is of a corpus: `CacheSource.corpus`

The files are made at their largest size (sequences x rows per sequence; a file's holes take no space) and cut when all is done.
A block counts as done only after its numbers have reached the disk, so an interruption costs at most one block.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor
from tqdm import tqdm

from interp.errors import LoadError, OptionError, one_of
from interp.features.sources import Corpus, Rows, Source
from interp.files import write_atomically

# name -> (in torch, how its bytes lie in a file)
_DTYPES = {
    "float32": (torch.float32, np.dtype("float32")),
    "float16": (torch.float16, np.dtype("float16")),
    "bfloat16": (torch.bfloat16, np.dtype("uint16")),  # numpy has no bfloat16
}


def cache_activations(
    source: Source, folder: str | Path, *, dtype: Literal["float32", "float16", "bfloat16"] = "float32", block: int = 64,
    progress: bool = False,
) -> "CacheSource":  # fmt: skip
    """Write all rows of a source to a folder, `block` sequences at a time; interrupted, the same call goes on.

    dtype: of the numbers on disk. float32 keeps a float32 source's rows bit for bit, bfloat16 8 bits of each number, float16 11
    but nothing beyond 65504. (A model gives a sequence other last bits in other batches. A cache has those of its own blocks, so
    that training from it and training from its `ModelSource` see the same batches up to that.)
    Raises `OptionError` where the folder holds something else, naming what differs, where its disk is too small, and where a
    number does not fit the dtype; `LoadError` where what was written before is damaged.
    """
    one_of(dtype, _DTYPES, "dtype of cached activations")
    if block < 1:
        raise OptionError(f"a block needs at least one sequence, not {block}")
    folder = Path(folder)
    state = _begun(source, folder, dtype)
    _check_space(source, folder, state)
    n_rows = _write(source, folder, state, block, progress)
    corpus = getattr(source, "corpus", None)
    if corpus is not None:
        content = {"tokens": corpus.tokens.cpu().to(torch.int32), "lengths": corpus.lengths.cpu().to(torch.int32)}
        write_atomically(folder / "tokens.safetensors", tensor_bytes(content, {"name": corpus.name}))
    for name, row_bytes in _row_bytes(state).items():
        if (folder / name).stat().st_size > n_rows * row_bytes:
            os.truncate(folder / name, n_rows * row_bytes)
    return CacheSource(folder)


class CacheSource:
    """The source that a cache was made of, read from its folder: float32 rows, in memory of the CPU.

    Raises `LoadError` where the folder holds no cache, one that is not finished, or one whose files are not as they were written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        state = _read_state(self.folder)
        if state["done"] < state["n_sequences"]:
            raise LoadError(
                f"{self.folder} has {state['done']} of {state['n_sequences']} sequences: call cache_activations again, "
                "with the same source, to finish it"
            )
        self.dtype: str = state["dtype"]
        self.widths: dict[str, int] = state["widths"]
        self.n_sequences: int = state["n_sequences"]
        self.rows_per_sequence: int = state["rows_per_sequence"]
        self.about: dict = state["about"]
        self._offsets, self._ids, self._values = _open(self.folder, state, "r")
        self.corpus = _read_corpus(self.folder)  # None where the source was not of one

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{width}]" for hook, width in self.widths.items())
        return f"CacheSource({self.n_sequences} sequences, {int(self._offsets[-1])} rows of {hooks}, {self.dtype})"

    def read(self, sequences: Sequence[int]) -> Rows:
        """The rows of these sequences, in this order: one copy out of the mapped files."""
        at = np.asarray(sequences, dtype=np.int64)
        if at.size and not 0 <= at.min() <= at.max() < self.n_sequences:
            raise OptionError(f"{self.folder} has sequences 0 to {self.n_sequences - 1}, not {at.min()} to {at.max()}")
        rows = _rows_of(self._offsets, at)
        values = {hook: _from_disk(mapped, rows, self.dtype) for hook, mapped in self._values.items()}
        return Rows(values, torch.from_numpy(np.take(self._ids, rows, axis=0)).long())


def _read_corpus(folder: Path) -> Corpus | None:
    path = folder / "tokens.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("name", "tokens")
            return Corpus(file.get_tensor("tokens").long(), file.get_tensor("lengths").long(), name)
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged: {error}") from None


# --------------------------------------------------------------------------------------------------------------- numbers


def _rows_of(offsets: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The numbers of all rows of these sequences: their ranges, one behind the other."""
    counts = offsets[sequences + 1] - offsets[sequences]
    before = np.cumsum(counts) - counts  # rows of the sequences before
    return np.repeat(offsets[sequences] - before, counts) + np.arange(counts.sum())


def _to_disk(values: Tensor, hook: str, dtype: str) -> np.ndarray:
    kept = values.detach().cpu().to(_DTYPES[dtype][0])
    if not kept.isfinite().all() and values.isfinite().all():
        largest = float(values.abs().max())
        raise OptionError(f"{hook} has an activation of {largest:.3g}, more than {dtype} can hold: use another dtype")
    return (kept.view(torch.uint16) if dtype == "bfloat16" else kept).numpy()


def _from_disk(mapped: np.ndarray, rows: np.ndarray, dtype: str) -> Tensor:
    values = torch.from_numpy(np.take(mapped, rows, axis=0))
    return values.view(_DTYPES[dtype][0]).float()


# ----------------------------------------------------------------------------------------------------------------- files


def _write(source: Source, folder: Path, state: dict[str, Any], block: int, progress: bool) -> int:
    """Write what is not done yet; the number of rows that there are then. Its maps are gone after, so files can be cut."""
    offsets, ids, values = _open(folder, state, "r+")
    if state["done"]:
        _check_same_rows(source, folder, state, offsets, ids, values)
    with tqdm(total=source.n_sequences, initial=state["done"], desc="caching", unit="seq", disable=not progress) as bar:
        for start in range(state["done"], source.n_sequences, block):
            stop = min(start + block, source.n_sequences)
            rows = source.read(range(start, stop))
            first = int(offsets[start])
            end = first + len(rows.ids)
            if end > len(ids):
                raise OptionError(f"the source has more rows than {source.rows_per_sequence} per sequence, as it says")
            sequence = rows.ids[:, 0].cpu() - start
            if (sequence.diff() < 0).any() or ((sequence < 0) | (sequence >= stop - start)).any():
                raise OptionError(f"asked for sequences {start} to {stop - 1}, the source gave others, or not in order")
            offsets[start + 1 : stop + 1] = first + torch.bincount(sequence, minlength=stop - start).cumsum(0).numpy()
            ids[first:end] = rows.ids.cpu().numpy()
            for hook, mapped in values.items():
                mapped[first:end] = _to_disk(rows.values[hook], hook, state["dtype"])
            for mapped in (offsets, ids, *values.values()):
                mapped.flush()
            state["done"] = stop
            _write_state(folder, state)
            bar.update(stop - start)
    return int(offsets[-1])


def _begun(source: Source, folder: Path, dtype: str) -> dict[str, Any]:
    """The state of a cache of this source in this folder, which is made where there is none."""
    asked = {"format": 1, "dtype": dtype, "n_sequences": source.n_sequences, "rows_per_sequence": source.rows_per_sequence,
             "widths": dict(source.widths), "about": json.loads(json.dumps(source.about))}  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file, and cached activations need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "cache.json").exists():
        state = _read_state(folder)
        before, now = _flat(state), _flat(asked)
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                raise OptionError(
                    f"{folder} is a cache of another source: {name} was {before.get(name)}, and is {now.get(name)} now"
                )
    elif any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty and holds no cache of activations")
    else:
        state = asked | {"done": 0}
        _write_state(folder, state)
    if not state["done"]:  # whatever an interruption left: zeros, of the largest size
        sizes = {name: size * source.n_sequences * source.rows_per_sequence for name, size in _row_bytes(state).items()}
        for name, size in (sizes | {"offsets.bin": 8 * (source.n_sequences + 1)}).items():
            with (folder / name).open("wb") as file:
                file.truncate(size)
    return state


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    """What a cache is of, by name, entries of dictionaries by their own."""
    flat = {name: value for name, value in state.items() if name not in ("done", "widths", "about")}
    return flat | {f"{name}[{key!r}]": value for name in ("widths", "about") for key, value in state[name].items()}


def _check_space(source: Source, folder: Path, state: dict[str, Any]) -> None:
    """Holes in files are filled later, and a mapped file that finds no space then ends the process without a word."""
    left = (source.n_sequences - state["done"]) * source.rows_per_sequence * sum(_row_bytes(state).values())
    free = shutil.disk_usage(folder).free
    if left > free:
        raise OptionError(
            f"the cache may need {left / 2**30:.1f} GiB more, and the disk of {folder} has {free / 2**30:.1f} GiB left"
        )


def _check_same_rows(
    source: Source, folder: Path, state: dict[str, Any], offsets: np.ndarray, ids: np.ndarray, values: dict[str, np.ndarray]
) -> None:  # fmt: skip
    """Compare two sequences with what is on disk: another text or other weights under the same names look alike until then.

    Values may differ by rounding, as they do when sequences run in other batches.
    """
    at = np.unique([0, state["done"] - 1])
    rows, found = _rows_of(offsets, at), source.read(at.tolist())
    same = np.array_equal(ids[rows], found.ids.cpu().numpy())
    for hook, mapped in values.items():
        if same:
            before, now = _from_disk(mapped, rows, state["dtype"]), found.values[hook].cpu().float()
            same = float((before - now).norm()) <= 0.01 * float(now.norm())
    if not same:
        raise OptionError(
            f"{folder} is a cache of another source: sequence {at[0]} or {at[-1]} has other activations now"
        )


def _row_bytes(state: dict[str, Any]) -> dict[str, int]:
    """Bytes of a row by file."""
    size = _DTYPES[state["dtype"]][1].itemsize
    return {f"{i}.bin": width * size for i, width in enumerate(state["widths"].values())} | {"ids.bin": 8}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / "cache.json", json.dumps(state, indent=2))


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    if not path.is_file():
        raise LoadError(f"{folder} holds no cache of activations: there is no cache.json")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        sizes = [state["n_sequences"], state["rows_per_sequence"], *state["widths"].values()]
        sound = state["format"] == 1 and state["dtype"] in _DTYPES and 0 <= state["done"] <= state["n_sequences"]
        sound = sound and isinstance(state["about"], dict) and all(isinstance(size, int) and size > 0 for size in sizes)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise LoadError(f"{path} does not describe a cache of activations of format 1")
    return state


def _open(
    folder: Path, state: dict[str, Any], mode: Literal["r", "r+"]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(offsets, ids, values by hook), mapped; to read, just the rows that there are."""

    def mapped(name: str, dtype: np.dtype, rows: int, *columns: int) -> np.ndarray:
        path, needed = folder / name, rows * int(np.prod(columns, dtype=np.int64)) * dtype.itemsize
        if not path.is_file():
            raise LoadError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size < needed:
            raise LoadError(f"{folder} is damaged: {name} has {path.stat().st_size} bytes, and {needed} were written")
        if not needed:
            raise LoadError(f"{folder} holds no activations")
        return np.memmap(path, dtype, mode, shape=(rows, *columns))

    n, done = state["n_sequences"], state["done"]
    offsets = mapped("offsets.bin", np.dtype("int64"), n + 1)
    if offsets[0] != 0 or (np.diff(offsets[: done + 1]) < 0).any() or offsets[done] > n * state["rows_per_sequence"]:
        raise LoadError(f"{folder} is damaged: offsets.bin does not rise from 0")
    # a finished cache has been cut, and is whole with the rows it has
    rows = int(offsets[n]) if done == n else n * state["rows_per_sequence"]
    number = _DTYPES[state["dtype"]][1]
    values = {hook: mapped(f"{i}.bin", number, rows, width) for i, (hook, width) in enumerate(state["widths"].items())}
    return offsets, mapped("ids.bin", np.dtype("int32"), rows, 2), values
