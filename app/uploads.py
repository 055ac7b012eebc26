"""An SAE that a reader brings along: two files of SAELens' layout, checked on the server, kept until the server ends.

What comes from a browser is data of strangers. Names and sizes are checked before a byte is written, to a folder of our own
under a name that is the digest of the content; then the files are read as any SAE is (JSON and safetensors, nothing that could
run), its shapes are compared with its own configuration and its hook with the model. What fails is deleted again.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import streamlit as st
import torch

from app.locked import locked_model
from interp import load_sae
from interp.errors import InterpError, LoadError
from interp.features.saelens_format import CONFIG, SCALER, WEIGHTS

PREFIX = "upload/"
LIMITS = {CONFIG: 1, SCALER: 1, WEIGHTS: 200}  # MiB
NEEDED = (CONFIG, WEIGHTS)
MAX_KEPT = 6  # on the server; the oldest goes
SCALED = ("expected_average_only_in", True)  # as SAELens says today, and said before version 6
KEY = "uploaded"


@st.cache_resource(max_entries=1, show_spinner=False)
def _folder() -> tempfile.TemporaryDirectory:
    """Where they are kept: gone with the server."""
    return tempfile.TemporaryDirectory(prefix="interp-uploads-")


def folder_of(source: str) -> Path | None:
    """The folder of an uploaded SAE; None if it is no upload's name, or of one that is not kept any more."""
    digest = source.removeprefix(PREFIX)
    if not source.startswith(PREFIX) or not digest.isalnum():
        return None
    found = Path(_folder().name) / digest
    return found if found.is_dir() else None


def mine(model: str) -> list[str]:
    """Names of the SAEs that this session uploaded for a model, as far as they are kept."""
    return [
        source for source, (kept, _) in st.session_state.get(KEY, {}).items() if kept == model and folder_of(source)
    ]


def describe(source: str) -> str:
    """What the menu calls one of this session's uploads: the hook that it reads."""
    return f"SAE at {st.session_state.get(KEY, {}).get(source, ('', 'a hook'))[1]}, uploaded"


def take(model: str, files: Sequence) -> str:
    """Keep what a file field handed over, for this session; the source's name. Raises as `store` does."""
    for file in files:  # before anything is read into memory
        _check_file(file.name, file.size)
    if len({file.name for file in files}) < len(files):
        raise LoadError(f"choose each file once: {', '.join(NEEDED)}, and {SCALER} if there is one")
    source, hook = store(model, {file.name: file.getvalue() for file in files})
    st.session_state[KEY] = st.session_state.get(KEY, {}) | {source: (model, hook)}
    return source


def store(model: str, files: Mapping[str, bytes]) -> tuple[str, str]:
    """(source name, hook) of an SAE of these files: {"cfg.json": ..., "sae_weights.safetensors": ...}.

    Takes the model's lock. Raises `LoadError` for files of other names, that are missing, too large, damaged or do not fit one
    another, and `SiteError` for an SAE of a hook or a width that the model does not have.
    """
    for name, content in files.items():
        _check_file(name, len(content))
    if missing := [name for name in NEEDED if name not in files]:
        raise LoadError(f"an SAE is two files, and {missing[0]} is missing: choose {' and '.join(NEEDED)} together")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + len(files[name]).to_bytes(8, "big") + files[name])
    source = f"{PREFIX}{digest.hexdigest()[:16]}"
    base, locked = Path(_folder().name), locked_model(model)
    new = Path(tempfile.mkdtemp(dir=base, prefix=".new-"))
    try:
        for name, content in files.items():
            (new / name).write_bytes(content)
        _check_scale(files)
        with locked.use() as running:
            found = load_sae(new, running)
        if not all(torch.isfinite(value).all() for value in found.state_dict().values()):
            raise LoadError(f"{WEIGHTS} holds numbers that are not finite")
        if folder_of(source) is None:
            new.rename(base / source.removeprefix(PREFIX))
    except InterpError as error:  # without the server's own path in it
        raise type(error)(str(error).replace(f"{new}/", "").replace(str(new), "the upload")) from None
    except RecursionError:
        raise LoadError(f"{CONFIG} is nested too deeply to be that of an SAE") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    kept = sorted(
        (path for path in base.iterdir() if not path.name.startswith(".")), key=lambda p: p.stat().st_mtime_ns
    )
    for old in kept[:-MAX_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return source, found.hook


def _check_file(name: str, size: int) -> None:
    if name not in LIMITS:
        raise LoadError(f"{name[:60]!r} is no file of an SAE: choose {' and '.join(NEEDED)}, as SAELens names them")
    if size > LIMITS[name] * 2**20:
        raise LoadError(f"{name} has {size / 2**20:,.0f} MiB, and the dashboard takes {LIMITS[name]}: "
                        "start it with --folders and open the SAE from there")  # fmt: skip


def _check_scale(files: Mapping[str, bytes]) -> None:
    """Reading takes a scale that is not there as 1, with a warning that no page would show."""
    try:
        said = json.loads(files[CONFIG])
    except ValueError:
        return  # reading says it better
    if (
        isinstance(said, dict)
        and "interp" not in said
        and said.get("normalize_activations") in SCALED
        and SCALER not in files
    ):
        raise LoadError(
            f"by {CONFIG} this SAE scales its inputs, and the scale is in a third file: choose {SCALER} too"
        )
