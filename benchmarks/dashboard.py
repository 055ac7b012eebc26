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
from playwright.sync_api import Error, sync_playwright

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


# the Circuit page's own chart of a random graph, without a model: 1,000 components, the strongest 10,000 of its edges
LARGE = """
import numpy as np
import streamlit as st
from app import circuits
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph, edge_mask

st.set_page_config(layout="wide")
graph = Graph(37, 26, True, 64, "large")
scores = np.where(edge_mask(graph), np.random.default_rng(0).standard_normal(edge_mask(graph).shape), np.nan)
whole = Circuit(graph, edge_mask(graph), scores, {"unit": "logits", "direction": "denoise"})
shown = circuits.drawable(whole, max_nodes=1001)
view = circuits.graph_spec(shown)
event = st.echarts_chart(view.spec, key="large", on_select="rerun", height=700, alt="A large graph")
st.title(f"chosen: {' '.join(circuits.nodes_clicked(event, view)) or 'none'}")
st.caption(f"{len(view.nodes)} nodes, {len(view.edges)} edges")
"""
# milliseconds between frames while the wheel turns over the chart, which zooms it
FRAMES = """async () => {
    const canvas = document.querySelector('canvas'), box = canvas.getBoundingClientRect(), times = [];
    let last = performance.now();
    for (let i = 0; i < 60; i++) {
        canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: i % 20 < 10 ? -60 : 60, bubbles: true,
            clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}));
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
    }
    return times;
}"""


@contextmanager
def server(script: str | None = None):
    """(the address of a dashboard started as `interp app` does it, seconds until it answered). script: this page instead."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        app = App(port=port, no_browser=True, runs=Path(folder) / "runs")
        command = app.command()
        if script is not None:
            (Path(folder) / "page.py").write_text(script, encoding="utf-8")
            command = [str(Path(folder) / "page.py") if word.endswith("serve.py") else word for word in command]
        environment = {**app.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, **quiet)
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


def large_graph(playwright, chromium: str) -> dict[str, float]:
    """Seconds until a large graph stands, milliseconds of a frame while it is zoomed, seconds from a click to its answer."""
    with server(LARGE) as (address, _):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_function(READY)
        began = time.perf_counter()
        page.reload()
        page.wait_for_function(READY)
        page.wait_for_selector("canvas")
        drawn = time.perf_counter() - began
        page.wait_for_timeout(3000)
        box = page.locator("canvas").first.bounding_box()
        clicks, head = [], page.locator("h1")
        for i in range(60):  # until three nodes were hit
            before = head.inner_text()
            began = time.perf_counter()
            page.mouse.click(box["x"] + box["width"] * (0.2 + 0.01 * i), box["y"] + box["height"] * (0.4 + 0.005 * i))
            try:
                page.wait_for_function(
                    "before => document.querySelector('h1').innerText !== before", arg=before, timeout=1500
                )
            except Error:
                continue
            clicks.append(time.perf_counter() - began)
            if len(clicks) == 3:
                break
        frames = sorted(page.evaluate(FRAMES)[5:])
        browser.close()
    return {"drawn": drawn, "frame_median_ms": frames[len(frames) // 2], "frame_95_ms": frames[int(0.95 * len(frames))],
            "click": median(clicks) if clicks else float("nan")}  # fmt: skip


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
        large = large_graph(playwright, chromium)
    print(f"{describe_machine()}\n\nserver up, first page computed: {up:.1f} s")
    print(f"first page, after the server is up: {first:.1f} s\n")
    print(f"{'page':10} {'first visit':>12} {'again':>8}")
    for title, took in times.items():
        print(f"{title:10} {took[0]:10.2f} s {median(took[1:]):6.2f} s")
    print(
        f"\n1,000 nodes, 10,000 edges: there after {large['drawn']:.1f} s; a click is answered after {large['click']:.2f} s"
    )
    print(f"a frame while it is zoomed: {large['frame_median_ms']:.0f} ms, 95 %: {large['frame_95_ms']:.0f} ms")
    if o.out is not None:
        found = {"machine": describe_machine(), "up": up, "first": first, "pages": times, "large": large}
        write_atomically(o.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
