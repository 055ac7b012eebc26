"""Results come back bit for bit or not at all; a manifest tells what is, also of a process that died."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interp import activation_patching, load_task
from interp.errors import OptionError
from interp.jobs.store import Progress, Run, Runs, is_alive, load_arrays, me, now, save_arrays
from tests.small_pairs import refused

ID = "0123456789abcdef"
VALUES = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), (2, 3))


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


def small(values=None) -> xr.DataArray:
    values = np.array([[1.5, np.nan], [-0.0, np.inf]], np.float32) if values is None else values
    coords = {
        "prompt": range(2),
        "token": ("position", ["0:␣a", "1:⏎b*"]),
        "gap": ("prompt", np.float32([0.1, np.nan])),
    }
    return xr.DataArray(values, coords, ("prompt", "position"), attrs={"unit": "logits", "n": 2, "share": 0.5})


def test_an_array_comes_back_bit_for_bit(tmp_path):
    xr.testing.assert_identical(load_arrays(save_arrays(tmp_path, "x", small()), "x"), small())
    assert np.signbit(load_arrays(tmp_path, "x").values[1, 0])


@given(VALUES, st.text(), st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.booleans(), max_size=3))
@settings(max_examples=40, deadline=None)
def test_any_numbers_and_texts_come_back(tmp_path_factory, values, text, attrs):
    array = xr.DataArray(values, {"label": ("a", [text, "b"])}, ("a", "b"), attrs=attrs, name="effect")
    folder = tmp_path_factory.mktemp("arrays")
    again = load_arrays(save_arrays(folder, "x", array), "x")
    assert again.dtype == array.dtype
    assert again.values.tobytes() == array.values.tobytes()
    xr.testing.assert_identical(again, array)


@pytest.mark.parametrize("sites", ["head", ["resid_pre", "head"]], ids=["one", "several"])
def test_results_of_the_library_come_back(tmp_path, mini_gpt2, sites):
    effects = activation_patching(
        mini_gpt2, load_task("ioi", mini_gpt2, n=2), sites, positions="all", metric=["logit_diff"]
    )
    again = load_arrays(save_arrays(tmp_path, "x", effects), "x")
    xr.testing.assert_identical(again, effects)
    assert {k: v.dtype for k, v in again.coords.items()} == {k: v.dtype for k, v in effects.coords.items()}


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (xr.DataArray([1.0], attrs={"f": len}), "attribute f is builtin_function"),
        (xr.DataArray([1.0 + 2j]), "holds complex128"),
        (xr.DataArray(np.array([None, "a"], object)), "only numbers and texts"),
    ],
    ids=["callable", "complex", "objects"],
)
def test_what_has_no_plain_form_is_refused(tmp_path, array, says):
    with refused(OptionError, says):
        save_arrays(tmp_path, "x", array)


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_flipped_bit_or_a_lost_end_is_noticed(tmp_path, ending):
    save_arrays(tmp_path, "x", small())
    path = tmp_path / f"x.{ending}"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            again = load_arrays(tmp_path, "x")
        except OptionError:
            continue
        # white space of the JSON, or the "about" that nobody asked for
        xr.testing.assert_identical(again, small())
    path.write_bytes(whole[: len(whole) // 2])
    with refused(OptionError, "x"):
        load_arrays(tmp_path, "x")


def test_a_result_of_another_job_is_refused(tmp_path):
    save_arrays(tmp_path, "x", small(), about={"job": "a"})
    load_arrays(tmp_path, "x", about={"job": "a"})
    with refused(OptionError, "is of job 'a', not 'b'"):
        load_arrays(tmp_path, "x", about={"job": "b"})


def test_a_new_run_waits(runs):
    run = runs.create(ID, {"kind": "patch"})
    assert runs.get(ID) == run
    assert run.status == "queued"
    assert run.active
    assert run.seconds is None
    assert runs.progress(ID) == Progress()
    assert json.loads((runs.path(ID) / "job.json").read_text()) == {"kind": "patch"}


def test_runs_are_listed_latest_first_and_other_folders_are_not(runs):
    assert runs.ids() == []
    for i, id in enumerate(("a" * 16, "c" * 16, "b" * 16)):
        runs.create(id, {})
        runs.change(id, submitted=f"2026-01-0{i + 1}T00:00:00.000+00:00")
    (runs.folder / "notes").mkdir()
    assert runs.ids() == ["b" * 16, "c" * 16, "a" * 16]


@pytest.mark.parametrize("id", ["..", "a/../b", "", "ABCDEF0123456789", "0123456789abcdef0"])
def test_no_id_leads_out_of_the_folder(runs, id):
    with refused(OptionError, "is not the id of a run"):
        runs.path(id)


def test_a_run_that_is_not_there(runs):
    with refused(OptionError, f"there is no run {ID}"):
        runs.get(ID)
    assert ID not in runs


def test_a_living_process_runs(runs):
    runs.create(ID, {})
    runs.change(ID, status="running", started=now(), **me())
    assert runs.get(ID).status == "running"


def test_a_dead_process_has_failed(runs):
    runs.create(ID, {})
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    runs.change(ID, status="running", started=now(), pid=child.pid, born=me()["born"])
    assert runs.get(ID).status == "failed"
    assert "ended without a word" in runs.get(ID).error


def test_another_process_of_the_same_number_is_not_it():
    assert is_alive(os.getpid(), me()["born"])
    assert not is_alive(os.getpid(), me()["born"] - 100)


def test_a_promised_process_that_never_came(runs):
    runs.create(ID, {})
    runs.change(ID, submitted=(datetime.now(UTC) - timedelta(minutes=5)).isoformat())
    assert runs.get(ID).status == "failed"


def test_cancelling(runs):
    runs.create(ID, {})
    runs.cancel(ID)
    assert runs.get(ID).status == "cancelled"
    runs.create(ID, {})
    assert not runs.is_cancelled(ID)
    runs.change(ID, status="running", started=now(), **me())
    runs.cancel(ID)
    assert runs.is_cancelled(ID)
    assert runs.get(ID).status == "running", "the worker says when it has ended"


def test_only_a_finished_run_has_a_result(runs):
    runs.create(ID, {})
    with refused(OptionError, "has no result: it is queued"):
        runs.result(ID)
    save_arrays(runs.path(ID), "result", small(), about={"job": ID})
    runs.change(ID, status="done", finished=now())
    xr.testing.assert_identical(runs.result(ID), small())


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"format": "interp-run-1", "id": "x", "status": "well"}'],
    ids=["cut", "list", "empty", "status"],
)
def test_a_manifest_that_is_none_is_refused_by_name(runs, text):
    runs.create(ID, {})
    (runs.path(ID) / "run.json").write_text(text)
    with refused(OptionError, "run.json"):
        runs.get(ID)
    assert runs.ids() == [ID], "it is listed all the same, so that somebody mends it"


def test_times(runs):
    run = Run(ID, started="2026-01-01T00:00:00.000+00:00", finished="2026-01-01T00:01:30.500+00:00")
    assert run.seconds == 90.5
    with refused(OptionError, "'gone' is not a status"):
        runs.put(Run(ID, status="gone"))
