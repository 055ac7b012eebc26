"""The server of `interp app`: the first page is computed before anyone asks, into the very caches that it reads."""

import ast
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from app.behaviour import OWN, Behaviour
from app.locked import LockedModel
from app.warm import warm, warm_others


@contextmanager
def nobody(self):
    """In the place of the model: whoever asks for it computes."""
    raise AssertionError("the model was used")
    yield


def test_the_first_page_computes_nothing_once_it_is_warm(page, monkeypatch):
    assert warm(Behaviour()) is None
    monkeypatch.setattr(LockedModel, "use", nobody)
    at = page("prompt")
    assert len(at.get("echarts_chart")) == 2
    assert len(at.dataframe) == 2


@pytest.mark.parametrize("name", ["patch", "circuit", "features"])
def test_other_pages_compute_nothing_once_they_are_warm(page, monkeypatch, name):
    assert warm(Behaviour()) is None
    assert warm_others(Behaviour(), threading.Event()) is None
    monkeypatch.setattr(LockedModel, "use", nobody)
    assert not page(name).exception


def test_a_server_that_ends_waits_for_one_step_only():
    over = threading.Event()
    over.set()
    assert warm_others(Behaviour(n=3), over) == "the server ended first"


def test_another_prompt_is_not_warm(page, monkeypatch):
    monkeypatch.setattr(LockedModel, "use", nobody)
    with pytest.raises(AssertionError, match="the model was used"):
        page("prompt", pair="0", n="3", seed="77")


@pytest.mark.parametrize(
    ("asked", "says"),
    [(Behaviour(model="no-such"), "'no-such' is not a bundled model"), (Behaviour(task=OWN, answer=""), "answer")],
    ids=["model", "prompts"],
)
def test_what_cannot_be_computed_is_left_to_the_page_to_tell(asked, says):
    assert says in warm(asked)


def test_the_server_is_one_that_streamlit_finds():
    from streamlit.web.server.app_discovery import discover_asgi_app

    path = Path(__file__).resolve().parents[2] / "app" / "serve.py"
    found = discover_asgi_app(path)
    assert found.is_asgi_app
    assert found.import_string == "serve:dashboard"
    imported = [node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name.startswith(("app", "interp"))], "caches do not exist at import time"
