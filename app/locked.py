"""Models shared by sessions: loaded once, at most two kept, one user at a time.

Hooks live on the model, so two sessions that ran one model at once would run each other's hooks and get wrong numbers without
an error. Every use of a model goes through its lock: `with locked.use() as model: ...`, one batch of work at a time.
"""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import streamlit as st
import torch

from interp import Transformer, bundled_models, load_model
from interp.errors import LoadError


class LockedModel:
    """A model and the lock that every use of it holds."""

    def __init__(self, model: Transformer):
        self._model, self._lock = model, threading.RLock()

    @contextmanager
    def use(self) -> Iterator[Transformer]:
        """The model, for as long as the block runs; waits for other sessions. Leaves no hook behind, whatever happens inside."""
        with self._lock:
            try:
                yield self._model
            finally:
                self._model.reset_hooks()

    @property
    def cfg(self):
        """The model's sizes, which need no lock."""
        return self._model.cfg

    @property
    def tokenizer(self):
        """The tokenizer, which keeps no state between calls."""
        return self._model.tokenizer


def _release(locked: LockedModel) -> None:
    """Give an evicted model's memory back, once nobody uses it."""
    with locked.use() as model:
        on_gpu = model.device.type != "cpu"
    del model, locked
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


@st.cache_resource(max_entries=2, on_release=_release, show_spinner="Loading the model")
def _load(name: str) -> LockedModel:
    return LockedModel(load_model(name))


def locked_model(name: str) -> LockedModel:
    """The model of that name, loaded if it is not there. Raises `LoadError` for one that is not allowed here: see `allowed`."""
    return _load(allowed(name))


def folders() -> list[Path]:
    """Folders below which local models, autoencoders and results may be opened: those of `interp app --folders`, which the
    environment variable INTERP_APP_FOLDERS hands on; none by default."""
    return [Path(part).resolve() for part in os.environ.get("INTERP_APP_FOLDERS", "").split(os.pathsep) if part]


def allowed(name: str) -> str:
    """The name, if it is a bundled model or a folder below a configured one; `LoadError` otherwise."""
    if name in bundled_models():
        return name
    path = Path(name).resolve()
    if any(path.is_relative_to(folder) for folder in folders()):
        return str(path)
    raise LoadError(
        f"{name!r} is not a bundled model ({', '.join(bundled_models())}), nor a folder below those that this dashboard was "
        "started with"
    )
