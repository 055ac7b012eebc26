"""Factorisations on disk, bit for bit: a folder of tensors (`<name>.safetensors`) and options (`<name>.json`), with a digest."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from interp.errors import OptionError
from interp.files import write_atomically


def save_folder(folder: str | Path, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write `name.safetensors` and `name.json` into a folder, made if need be. about: holds "format"; a digest is added."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file, and this is saved as a folder")
    if not folder.parent.is_dir():
        raise OptionError(f"the folder {folder.parent} does not exist")
    data = tensor_bytes({key: value.cpu().contiguous() for key, value in tensors.items()})
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.safetensors", data)
    # The digest ties the two files together: an interruption between them leaves a pair that is refused.
    write_atomically(folder / f"{name}.json", json.dumps({**about, "sha256": _digest(data)}, indent=1) + "\n")
    return folder


def load_folder(
    folder: str | Path, name: str, form: str, *, fields: Sequence[str], tensors: Sequence[str],
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """(tensors, options) of such a folder. form: what "format" must say; fields, tensors: names that must be there.

    Raises `OptionError` naming the file or the field that is missing.
    """
    folder = Path(folder)
    options, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in (options, weights):
        if not path.is_file():
            raise OptionError(f"{folder} holds no {name}: it has no {path.name}")
    try:
        about = json.loads(options.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{options} is not JSON: {error}") from None
    if not isinstance(about, dict):
        raise OptionError(f"{options} lacks format: it holds no JSON object")
    if missing := [field for field in ("format", *fields, "sha256") if field not in about]:
        raise OptionError(f"{options} lacks {', '.join(missing)}")
    if about["format"] != form:
        raise OptionError(f"{options} is of format {about['format']!r}, and this reads {form}")
    data = weights.read_bytes()
    if about["sha256"] != _digest(data):
        raise OptionError(f"{weights} is not the file that {options.name} was written with: save it again")
    found = read_tensors(data)
    if missing := [key for key in tensors if key not in found]:
        raise OptionError(f"{weights} lacks {', '.join(missing)}")
    return {key: value.to(device or "cpu") for key, value in found.items()}, about


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
