"""How long a reader of the dashboard waits, in Chromium: for the server, its first page, pages new to it, and them again.

    python benchmarks/dashboard.py --out benchmarks/results/dashboard.json

A server of its own, started as `interp app` starts it, with the bundled model and 8 pairs. "up" is from its start until it
answers its health check; the first page is timed from there, in a browser that is open, and every other from the click until
the page's script has run and its heading stands. Pictures of charts follow within a frame or two. Needs playwright and Chromium
(`chromium` on the path).
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from playwright.sync_api import sync_playwright

from app.registry import PAGES
from benchmarks.machine import describe_machine
from interp.app_cli import App
from interp.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
READY = (
    "() => document.querySelector('[data-testid=\"stMain\"] h1') && "
    "document.querySelector('[data-testid=\"stApp\"]').getAttribute('data-test-script-state') === 'notRunning'"
)


@dataclass
class Options:
    """What is timed."""

    rounds: int = 3
    """Visits of every page after the first."""
    out: Path | None = None
    """JSON to write."""


@contextmanager
def server():
    """(the address of a dashboard started as `interp app` does it, seconds until it answered its health check)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        app = App(port=port, no_browser=True, runs=Path(folder) / "runs")
        environment = {**app.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.perf_counter()
        process = subprocess.Popen(app.command(), cwd=folder, env=environment, **quiet)
        while True:
            if (code := process.poll()) is not None:
                raise SystemExit(f"the dashboard's server ended with status {code}")
            try:
                with urllib.request.urlopen(f"{app.url}/_stcore/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.05)
        took = time.perf_counter() - began
        try:
            yield app.url, took
        finally:
            process.terminate()
            process.wait()


def main(o: Options) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with server() as (address, up), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_function(READY)
        first = time.perf_counter() - began
        times: dict[str, list[float]] = {entry.title: [] for entry in PAGES}
        for _ in range(1 + o.rounds):
            for entry in (*PAGES[1:], PAGES[0]):
                began = time.perf_counter()
                page.locator('[data-testid="stSidebarNav"]').get_by_role("link", name=entry.title).click()
                page.wait_for_function(
                    f"() => document.querySelector('[data-testid=\"stMain\"] h1')?.innerText === '{entry.title}'"
                )
                page.wait_for_function(READY)
                times[entry.title].append(time.perf_counter() - began)
        browser.close()
    print(f"{describe_machine()}\n\nserver up, first page computed: {up:.1f} s")
    print(f"first page, after the server is up: {first:.1f} s\n")
    print(f"{'page':10} {'first visit':>12} {'again':>8}")
    for title, took in times.items():
        print(f"{title:10} {took[0]:10.2f} s {median(took[1:]):6.2f} s")
    if o.out is not None:
        write_atomically(
            o.out,
            json.dumps({"machine": describe_machine(), "up": up, "first": first, "pages": times}, indent=1) + "\n",
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
