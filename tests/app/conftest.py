"""The dashboard without a browser: `page("patch", site="head")` is that page, run once, with this in its address."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page() -> Callable[..., AppTest]:
    """`page(name, **query)`: an AppTest on that page, run, without an exception."""

    def opened(name: str, **query: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
        for key, value in query.items():
            at.query_params[key] = value
        at.run()
        if name != "prompt":
            at.switch_page(f"app_pages/{name}.py").run()
        assert not at.exception, at.exception[0].message
        return at

    return opened
