"""The dashboard as a server that is warm: `interp app` runs this file, `streamlit run app/main.py` goes without.

The same pages; but the server accepts its first visitor when the first page is computed (`app.warm`), and computes what the other
pages begin with while that is read. Streamlit finds the
application below by its type, and enters `warmed` once its caches are there and before it answers.
"""

import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

# Streamlit puts this file's own folder on the path; the package `app` is the folder itself, in a clone and in a wheel.
sys.path[:0] = [root for root in [str(Path(__file__).resolve().parents[1])] if root not in sys.path]

from streamlit.starlette import App  # noqa: E402


@asynccontextmanager
async def warmed(server: App) -> AsyncIterator[None]:
    """Compute the first page, then serve."""
    # not before the caches exist: Streamlit would warn of every cached function
    from app.behaviour import Behaviour
    from app.warm import warm, warm_others

    warm(Behaviour())
    over = threading.Event()
    others = threading.Thread(target=warm_others, args=(Behaviour(), over), daemon=True)
    others.start()
    yield
    over.set()
    others.join()


dashboard = App(Path(__file__).with_name("main.py"), lifespan=warmed)
