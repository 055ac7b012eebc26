"""Models that sessions share: one at a time, only those that are allowed, and no hook is ever left behind."""

import os
import threading

import pytest
import torch

from app.locked import LockedModel, allowed, folders, locked_model
from interp.errors import LoadError
from tests.small_pairs import refused


def test_two_sessions_get_the_numbers_of_one(mini_gpt2):
    """One thread ablates while the other runs clean: every clean run is bit for bit the lone one."""
    locked = LockedModel(mini_gpt2)
    tokens = mini_gpt2.to_tokens("When Mary and John went to the store, John gave a drink to")
    alone = mini_gpt2(tokens)
    stop, wrong, runs = threading.Event(), [], 60

    def ablating() -> None:
        while not stop.is_set():
            with (
                locked.use() as model,
                model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: 0 * value)]),
            ):
                model(tokens)

    other = threading.Thread(target=ablating)
    other.start()
    try:
        for _ in range(runs):
            with locked.use() as model:
                if not torch.equal(model(tokens), alone):
                    wrong.append(1)
    finally:
        stop.set()
        other.join()
    assert not wrong


def test_a_hook_does_not_outlive_its_user(mini_gpt2):
    locked = LockedModel(mini_gpt2)

    def failing() -> None:
        with locked.use() as model:
            model.add_hook("blocks.0.hook_resid_post", lambda value, hook: 0 * value)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not any(point.fwd_hooks for point in mini_gpt2.hook_dict.values())
    with locked.use() as model:  # and the lock is free
        assert model is mini_gpt2


def test_a_model_is_loaded_once():
    assert locked_model("mini-gpt2") is locked_model("mini-gpt2")


def test_only_bundled_models_and_configured_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("INTERP_APP_FOLDERS", raising=False)
    assert folders() == []
    assert allowed("mini-llama") == "mini-llama"
    for name in ("gpt2", str(tmp_path), "../data/models/mini-gpt2", "/etc"):
        with refused(LoadError, "is not a bundled model .* nor a folder below those"):
            allowed(name)
    inside = tmp_path / "models" / "mine"
    inside.mkdir(parents=True)
    monkeypatch.setenv("INTERP_APP_FOLDERS", os.pathsep.join([str(tmp_path / "models"), "/nowhere"]))
    assert allowed(str(inside)) == str(inside)
    with refused(LoadError, "nor a folder below"):
        allowed(str(inside / ".." / ".."))
