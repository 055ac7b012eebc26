"""Jobs as the pages see them: one question is one job, clicks are re-validated, and the page shows what is there."""

import time

import numpy as np
import pytest
import xarray as xr
from streamlit.testing.v1 import AppTest

from app import jobs
from app.behaviour import OWN, Behaviour
from interp import activation_patching, compare
from interp.errors import LoadError, OptionError, TaskError
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import run
from interp.jobs.spec import Job
from interp.jobs.store import Runs, now
from tests.small_pairs import refused

HEADS = {"sites": "head", "metric": "logit_diff", "direction": "denoise"}
NOW = Behaviour(n=2)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Runs:
    """A runs folder of this test's own."""
    monkeypatch.setenv("INTERP_APP_RUNS", str(tmp_path / "runs"))
    return jobs.runs()


@pytest.fixture
def computed(runs, mini_gpt2, monkeypatch):
    """`computed(asked)`: the id of a job's or a grid's run that is done, computed here."""
    monkeypatch.setattr("interp.jobs.worker.load_model", lambda *_, **__: mini_gpt2)
    return lambda asked: run(asked, runs).id


@pytest.fixture
def finished(computed):
    """`finished(kind, behaviour, **options)`: the id of one job's run that is done."""

    def made(kind="patch", behaviour=NOW, **options) -> str:
        options = options or ({} if kind == "edges" else HEADS)
        return computed(jobs.job_of(behaviour, kind, **options))

    return made


@pytest.fixture
def started(monkeypatch) -> list:
    """Folders of the runs that would have been started, had this not been a test."""
    folders: list = []
    monkeypatch.setattr("interp.jobs.runner.start", lambda folder, lock: folders.append(folder))
    return folders


# ---------------------------------------------------------------------------------------------------- plain functions


def test_a_behaviour_and_its_job_are_one_question():
    assert jobs.behaviour_of(jobs.job_of(NOW, "patch", **HEADS)) == NOW
    own = Behaviour(task=OWN, n=1)
    assert jobs.behaviour_of(jobs.job_of(own, "edges")) == own
    assert jobs.job_of(NOW, "patch", **HEADS).id == Job("patch", "mini-gpt2", task="ioi", n=2, options=HEADS).id


def test_what_the_dashboard_does_not_take_is_refused():
    with refused(LoadError, "is not a bundled model"):
        jobs.job_of(Behaviour(model="/etc"), "patch", **HEADS)
    with refused(LoadError, "is not a bundled model"):
        jobs.submit(Job("edges", "somebody/model", task="ioi"))
    with refused(TaskError, "takes 1 to 64 pairs"):
        jobs.behaviour_of(Job("edges", "mini-gpt2", task="ioi", n=1000))
    two = ("a", "b")
    with refused(TaskError, "is about a text"):
        jobs.behaviour_of(Job("snmf", "mini-gpt2", options={"hook": "blocks.1.mlp.hook_post"}))
    with refused(TaskError, "one pair of own prompts"):
        jobs.behaviour_of(Job("edges", "mini-gpt2", clean=two, corrupt=two, answers=two))


@pytest.mark.parametrize(
    ("event", "ids"),
    [
        (None, []),
        ({}, []),
        ({"selection": {"rows": []}}, []),
        ({"selection": {"rows": [1]}}, ["b"]),
        ({"selection": {"rows": [1, 0]}}, ["b", "a"]),
        ({"selection": {"rows": [0, 2, -1]}}, ["a"]),
        ("stale", []),
    ],
    ids=["none", "empty", "no rows", "one", "two", "out of date", "no event"],
)
def test_clicked_rows_are_ids_that_are_there(event, ids):
    assert jobs.chosen(event, ["a", "b"]) == ids


def test_the_table_is_filtered_by_words_and_status(finished, runs):
    a, b = finished("patch"), finished("edges")
    grid = Grid(
        models=["mini-llama"], tasks=["capitals"], analyses=[Analysis("patch", grid={"sites": [["q", "k"], "z"][:1]})]
    )
    runs.create(grid)
    table = jobs.table()
    assert table.id.tolist() == [grid.id, b, a]
    assert table.options.tolist()[0] == "q+k"
    assert jobs.table("PATCH gpt2").id.tolist() == [a]
    with runs.lock(grid.id):
        assert jobs.table("", ("queued",)).id.tolist() == [grid.id]
    assert jobs.table("", ("failed",)).id.tolist() == [grid.id], "nobody is at work on it"
    assert jobs.table("patch", ("done",)).id.tolist() == [a]
    assert jobs.table("no such word").empty


def test_a_damaged_run_is_listed_with_what_is_wrong(finished, runs):
    id = finished()
    (runs.path(id) / "spec.json").write_text("{")
    assert "is no JSON" in jobs.table().options[0]
    assert jobs.labels([id]) == {id: f"unreadable · {id}"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (8, "8 s"), (200, "3 min"), (9000, "2.5 h")], ids=["instant", "s", "min", "h"]
)
def test_durations_are_told_as_people_do(seconds, text):
    assert jobs.duration(seconds) == text


def test_a_difference_is_place_by_place(finished):
    a, b = (jobs.result(finished("patch", sites="head", direction=d)) for d in ("denoise", "noise"))
    found = jobs.difference(a, b)
    assert found.dims == ("layer", "head")
    np.testing.assert_allclose(found, (a - b.values).mean("prompt").sum("position"), atol=1e-5)
    with refused(OptionError, "laid out otherwise"):
        jobs.difference(a, jobs.result(finished("patch", sites="resid_pre")))


# ------------------------------------------------------------------------------------------------------------ the page


def texts(at) -> str:
    return " ".join(
        e.value for kind in ("markdown", "caption", "info", "error", "warning", "subheader") for e in at.get(kind)
    )


@pytest.fixture
def opened(page):
    """`opened(id, other)`: the page showing a run. A switch of pages empties the address of an AppTest; a browser has a test
    of its own for that."""

    def shown(run: str, other: str | None = None):
        at = page("runs")
        at.session_state["runs_open"] = (run, other)
        at.run()
        assert not at.exception, at.exception[0].message
        return at

    return shown


def test_without_runs_the_page_says_how_they_come(page):
    assert "No runs yet" in texts(page("runs"))


def test_a_run_is_opened(opened, finished):
    id = finished()
    at = opened(id)
    assert at.subheader[0].value == "patch head, logit_diff, denoise · mini-gpt2 on ioi, n 2"
    assert "metric(patched) - metric(corrupt)" in texts(at)
    assert len(at.get("echarts_chart")) == 1
    assert "1 of 1 runs" in texts(at)


def test_an_unknown_run_opens_nothing(opened, finished):
    finished()
    at = opened("e" * 16)
    assert "Open a run to see its map" in texts(at)


def test_a_filter_that_matches_nothing(page, finished):
    finished()
    at = page("runs")
    at.text_input(key="runs_filter").set_value("nonsense").run()
    assert "None of 1 runs matches" in texts(at)


def test_two_runs_are_compared_as_the_library_does(opened, finished):
    approximate, exact = finished("attribute", **HEADS, rules="relp"), finished()
    at = opened(approximate, exact)
    table = next(d.value for d in at.dataframe if "statistic" in d.value).set_index("statistic").value
    row = compare(jobs.result(approximate), jobs.result(exact)).iloc[0]
    assert table["pearson"] == row.pearson
    assert table["slope"] == row.slope
    assert len(at.get("echarts_chart")) == 2
    swapped = opened(exact, approximate)
    again = next(d.value for d in swapped.dataframe if "statistic" in d.value).set_index("statistic").value
    assert again["slope"] == row.slope, "the exact run stays the reference"


def test_runs_that_ask_otherwise_are_not_compared(opened, finished):
    at = opened(finished(), finished("patch", sites="head", direction="noise"))
    assert "cannot compare scores of direction" in at.error[0].value


@pytest.mark.parametrize("options", [{"sites": ["resid_pre", "head"]}, {"sites": "pattern", "positions": "cells"}],
                         ids=["several sites", "too many cells"])  # fmt: skip
def test_results_without_a_single_map(opened, finished, options):
    id = finished("patch", **options)
    at = opened(id)
    if isinstance(options["sites"], list):
        at.selectbox(key=f"site_{id}").set_value("head_out").run()
        assert not at.exception
        assert len(at.get("echarts_chart")) == 1
    else:
        assert "the 30 strongest of" in texts(at)


def test_edges_are_a_map_of_writers_and_readers(opened, finished):
    assert len(opened(finished("edges")).get("echarts_chart")) == 1


def test_looking_at_a_runs_prompts(opened, finished):
    at = opened(finished("patch", Behaviour(task="capitals", n=3)))
    at.button(key="runs_look").click().run()
    assert not at.exception
    assert at.session_state["behaviour"] == Behaviour(task="capitals", n=3)


def test_a_run_of_several_jobs_is_opened_job_by_job(opened, computed):
    circuits = Analysis("circuit", {"n_resamples": 2}, {"method": ["eap", "clean-corrupted"]})
    id = computed(
        Grid(name="a grid", models=["mini-gpt2"], tasks=["ioi"], n=2, analyses=[Analysis("patch", HEADS), circuits])
    )
    assert jobs.table().jobs.tolist() == [3]
    at = opened(id)
    assert at.subheader[0].value == "a grid, 3 jobs"
    assert len(at.get("echarts_chart")) == 1, "the first is a map"
    last = jobs.grid(id).everything[2]
    at.selectbox(key=f"job_of_{id}").set_value(last.id).run()
    assert not at.exception
    measures = next(d.value for d in at.dataframe if "measure" in d.value).set_index("measure").value
    assert measures["cmd"] == float(jobs.result(id, last.id).cmd)
    assert "lower is better" in texts(at)
    at.toggle(key="runs_whole").set_value(True).run()
    assert not at.exception
    assert any("second" in d.value for d in at.dataframe), "methods in pairs"


def test_a_failed_run_says_why_and_goes_on(opened, runs, started):
    job = jobs.job_of(NOW, "patch", **HEADS)
    runs.create(Grid(jobs=[job]))
    runs.change(job.id, status="failed", started=now(), finished=now(), error="the disk is full")
    at = opened(job.id)
    assert "the disk is full" in at.error[0].value
    at.button(key="runs_resume").click().run()
    assert started == [runs.path(job.id)]
    with runs.lock(job.id):
        assert runs.get(job.id).status == "queued"


def test_a_running_job_shows_progress_and_is_cancelled(opened, runs):
    job = jobs.job_of(NOW, "patch", **HEADS)
    runs.create(Grid(jobs=[job]))
    runs.change(job.id, status="running", started=now())
    with runs.lock(job.id):
        at = opened(job.id)
        at.button(key=f"cancel_{job.id}").click().run()
        assert not at.exception
        assert runs.is_cancelled(job.id)
        assert at.button(key=f"cancel_{job.id}").disabled
    runs.change(job.id, status="cancelled", finished=now())
    at.run()
    assert "It was cancelled" in texts(at)


def _patching(n: int):
    import streamlit as st

    from app import jobs
    from app.behaviour import Behaviour

    asked = jobs.job_of(Behaviour(n=n), "patch", sites="head", metric="logit_diff", direction="denoise")
    found = jobs.result_or_offer(asked)
    st.text("stopped" if found is None else f"{found.sizes['prompt']} prompts")


def test_long_work_is_offered_as_a_job_watched_and_shown(runs, finished, started):
    at = AppTest.from_function(_patching, kwargs={"n": 2}, default_timeout=60).run()
    assert "longer than a page should" in at.info[0].value
    assert at.text[0].value == "stopped"
    assert runs.ids() == []  # nothing starts by itself
    id = jobs.job_of(NOW, "patch", **HEADS).id
    at.button(key="submit").click().run()
    assert started == [runs.path(id)]
    with runs.lock(id):
        assert at.run().button(key=f"cancel_{id}").label == "Cancel"
    finished()
    at.run()
    assert not at.exception
    assert at.text[0].value == "2 prompts"


def test_a_job_from_submit_to_its_map(opened, mini_gpt2):
    """A real worker process: what the page shows is the library's own result."""
    job = jobs.job_of(NOW, "patch", **HEADS)
    assert jobs.submit(job).active
    deadline = time.monotonic() + 60
    while jobs.poll(job.id).active:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    expected = activation_patching(mini_gpt2, NOW.pairs(mini_gpt2), **HEADS, batch_size=8)
    xr.testing.assert_identical(jobs.result(job.id), expected)
    assert jobs.submit(job).status == "done", "answered once"
    assert len(opened(job.id).get("echarts_chart")) == 1
