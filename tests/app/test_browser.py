"""The dashboard in a browser, as a reader uses it: Debian's Chromium, a server of its own, pictures of every page.

Pictures go to tests/app/screenshots (ignored by git): look at them when a page changes.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")
api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")

from app.registry import PAGES  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path(__file__).parent / "screenshots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
    pytest.mark.xdist_group("browser"),
]
WAIT = 60_000  # milliseconds, on a machine that does other things as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the dashboard runs, and keeps its jobs."""
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    """Address of a dashboard that runs for these tests only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app" / "main.py"), "--server.port", str(port),
               "--server.address", "127.0.0.1", "--server.headless", "true", "--browser.gatherUsageStats", "false",
               "--server.fileWatcherType", "none"]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        yield address
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, server) -> Iterator[Callable]:
    """`visit("patch?site=head")`: a session of its own on that page, once it has been drawn."""
    contexts = []

    def opened(path: str = "", **options):
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(f"{server}/{path}")
        settled(page)
        return page

    yield opened
    for context in contexts:
        context.close()


def settled(page) -> None:
    """Wait until the script has run, and fail on an exception that the page shows."""
    page.wait_for_selector('[data-testid="stMain"] h1')
    page.wait_for_function(
        "() => { const app = document.querySelector('[data-testid=\"stApp\"]');"
        " return app && app.getAttribute('data-test-script-state') === 'notRunning'; }"
    )
    page.wait_for_timeout(400)  # fragments and charts
    assert page.locator('[data-testid="stException"]').count() == 0, page.locator(
        '[data-testid="stException"]'
    ).inner_text()


def text_of(page) -> str:
    return page.locator('[data-testid="stMain"]').inner_text()


def click_until(page, key: str, happened: Callable[[], bool]) -> None:
    """Click here and there on a chart until something comes of it."""
    chart = page.locator(f'[class*="st-key-{key}"] canvas').first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    for y in (0.5, 0.35, 0.62, 0.44, 0.27):
        for x in (0.5, 0.42, 0.58, 0.36, 0.64, 0.3):
            page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
            page.wait_for_timeout(700)
            if happened():
                return
    raise AssertionError(f"no click on {key} did anything")


@pytest.mark.parametrize("name", [entry.name for entry in PAGES])
def test_every_page_opens_light_and_dark(visit, name):
    PICTURES.mkdir(exist_ok=True)
    for scheme, size in (("light", (1280, 800)), ("dark", (1920, 1080))):
        page = visit("" if name == PAGES[0].name else name, color_scheme=scheme)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.wait_for_timeout(1500)
        page.screenshot(path=PICTURES / f"{name}-{scheme}.png", full_page=False)
        assert page.locator('[data-testid="stSidebarNav"]').count() == 1


def test_own_prompts_through_the_form(visit):
    page = visit()
    page.get_by_text("My own prompts").click()
    page.get_by_role("textbox", name="Prompt", exact=True).fill(
        "When Anna and Tom went to the park, Tom gave a ring to"
    )
    page.get_by_role("textbox", name="Contrast prompt").fill("When Anna and Tom went to the park, Anna gave a ring to")
    page.get_by_role("textbox", name="Answer", exact=True).fill(" Anna")
    page.get_by_role("textbox", name="Wrong answer").fill(" Tom")
    page.locator(".st-key-form_task input, .st-key-form_task [role=combobox]").first.click()
    page.get_by_role("option", name="my own prompts").click()
    page.get_by_role("button", name="Look").click()
    page.wait_for_url(re.compile("task=my"))
    settled(page)
    assert "Anna" in text_of(page)


def test_a_cell_is_clicked_inspected_and_found_again_by_its_address(visit, server):
    page = visit("patch")
    click_until(page, "exact_resid_pre", lambda: "at=resid_pre" in page.url)
    settled(page)
    heading = page.locator("h3").first.inner_text()
    assert "layer" in heading
    again = visit(page.url.removeprefix(f"{server}/"))
    again.wait_for_selector("h3")
    assert again.locator("h3").first.inner_text() == heading


def focused(page) -> str:
    """What the keyboard is at: its role or tag, and its name."""
    return page.evaluate(
        "() => { const e = document.activeElement; return [e.getAttribute('role') ?? e.tagName.toLowerCase(),"
        " e.getAttribute('aria-label') ?? e.innerText].join(' '); }"
    )


MISSED = """() => [...document.querySelectorAll('[data-testid=stElementContainer]:not([data-reached])')].filter(box =>
    [...box.querySelectorAll('input, button, textarea, [role=slider], [role=combobox], summary')].some(e =>
        e.checkVisibility() && !e.disabled && !e.closest('[data-testid=stElementToolbar]'))).map(box => box.innerText)"""


@pytest.mark.parametrize("name", [entry.name for entry in PAGES])
def test_the_tab_key_reaches_every_control(visit, name):
    """Pressed until the page ends, it has been in every element of the page that has a control and is not disabled.

    A page that is still drawn takes the focus away, so it may have to be gone through again.
    """
    page = visit("" if name == PAGES[0].name else name)
    missed = ["not begun"]
    for _ in range(3):
        for _ in range(300):  # a table takes a few, one for each of its columns
            page.keyboard.press("Tab")
            if page.evaluate(
                "() => { const box = document.activeElement.closest('[data-testid=stElementContainer]');"
                " if (box) box.dataset.reached = 1; return document.activeElement === document.body; }"
            ):
                break
        missed = page.evaluate(MISSED)
        if not missed:
            break
    assert missed == []


def test_a_cell_is_patched_by_the_keyboard_alone(visit):
    page = visit("patch")
    for _ in range(80):
        page.keyboard.press("Tab")
        if focused(page).startswith("combobox") and "Layer of the cell" in focused(page):
            break
    else:
        raise AssertionError("the menu of layers is out of the keyboard's reach")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("at=resid_pre"))
    settled(page)
    assert "resid_pre, layer" in page.locator("h3").first.inner_text()


def test_two_sessions_at_once_get_the_numbers_of_one(visit):
    def numbers(page) -> list[str]:
        return re.findall(r"-?\d+\.\d{3}", text_of(page))

    addresses = ("patch?site=head&rules=relp", "patch?site=head&rules=relp&model=mini-llama&task=greater_than")
    alone = [numbers(visit(address)) for address in addresses]
    both = [visit(address) for address in addresses]
    for _ in range(2):
        for page in both:
            page.reload()
        for page, expected in zip(both, alone, strict=True):
            settled(page)
            page.wait_for_selector("text=Pearson")
            assert numbers(page) == expected


def test_a_running_job_is_watched_and_cancelled(visit, folder):
    from interp.jobs import runner
    from interp.jobs.spec import Job
    from interp.jobs.store import Runs

    job = Job("patch", "mini-gpt2", task="ioi", n=2000, options={"sites": "head"}, block=1)
    runs = Runs(folder / "interp-runs")
    runner.submit(job, runs)
    try:
        page = visit(f"runs?run_id={job.id}")
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_selector("text=It was cancelled")
    finally:
        runs.cancel(job.id)  # whatever the page did, no worker outlives the test
    run = runs.get(job.id)
    assert run.status == "cancelled"
    assert not run.active


def test_a_node_is_selected_and_ablated(visit):
    page = visit("circuit")
    ablate = page.get_by_role("button", name=re.compile("Ablate"))
    assert ablate.is_disabled()
    click_until(page, "graph_", lambda: "chosen=" in page.url)
    settled(page)
    api.expect(ablate).to_be_enabled()
    before = metrics(page)
    ablate.click()
    page.wait_for_timeout(1500)
    settled(page)
    assert metrics(page) != before


def metrics(page) -> list[str]:
    return page.locator('[data-testid="stMetricValue"]').all_inner_texts()
