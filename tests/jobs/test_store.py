"""A run's files are whole or refused; its manifest tells what is, also of a process that died."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from interp.errors import OptionError
from interp.jobs.arrays import to_table
from interp.jobs.grid import Grid
from interp.jobs.store import Progress, Run, digest, table_bytes
from tests.jobs.small_grids import GRID, JOB
from tests.small_pairs import refused

ID = JOB.id
ONE = Grid(jobs=[JOB])
MODELS = {"mini-gpt2": "files:0"}


def block_of(shard) -> xr.DataArray:
    n = shard.beyond - shard.first
    return xr.DataArray(np.full((n, 2), shard.first, np.float32), {"prompt": range(n)}, ("prompt", "layer"))


@pytest.fixture
def planned(runs):
    """A run of one job in three shards, of which none is there."""
    runs.create(ONE)
    runs.change(ID, models=MODELS, shards=3)
    return runs


def keep(runs, shard, files=None) -> None:
    files = files or {}
    about = {"files": {name: digest(content) for name, content in files.items()}}
    runs.keep(ID, shard.id, table_bytes(to_table(block_of(shard), about)), files)


def test_a_new_run_waits(runs):
    run = runs.create(ONE)
    assert run.status == "queued"
    assert run.active
    assert (run.name, run.seeds, run.seconds) == (str(JOB), [0], 0.0)
    assert runs.progress(ID) == Progress()
    assert runs.grid(ID) == ONE
    with runs.lock(ID):
        assert runs.get(ID) == run
    assert runs.get(ID).status == "failed", "nobody is about to work on it"


def test_a_run_that_is_asked_for_again_keeps_what_it_knows(planned):
    planned.change(ID, status="failed", error="a", failed={"b": "c"}, seconds=3.0)
    planned.set_progress(ID, Progress(1, 2, "x", 3.0, 4.0))
    assert planned.progress(ID) == Progress(1, 2, "x", 3.0, 4.0)
    run = planned.create(replace(ONE, name="other"))
    assert (run.status, run.error, run.failed, run.seconds, run.name) == ("queued", "", {}, 3.0, "other")
    assert run.models == MODELS
    assert planned.progress(ID) == Progress()


def test_runs_are_listed_latest_first_and_other_folders_are_not(runs):
    assert runs.ids() == []
    made = [Grid(jobs=[replace(JOB, seed=seed)]).id for seed in range(3)]
    for i, id in enumerate(made):
        runs.create(Grid(jobs=[replace(JOB, seed=i)]))
        runs.change(id, submitted=f"2026-01-0{1 + (i + 1) % 3}T00:00:00.000+00:00")
    (runs.folder / "notes").mkdir()
    (runs.folder / ("a" * 16)).mkdir()
    assert runs.ids() == [made[1], made[0], made[2]]


def test_a_run_is_found_by_the_beginning_of_its_id_or_its_name(runs):
    runs.create(ONE)
    runs.create(replace(GRID, name="which way"))
    assert runs.find(ID) == runs.find(ID[:5]) == ID
    assert runs.find("which way") == GRID.id
    for text in ("", "zzz"):
        with refused(OptionError, f"no run is meant by '{text}'"):
            runs.find(text)
    runs.create(Grid(name="which way", jobs=[replace(JOB, seed=1)]))
    with refused(OptionError, "2 runs are meant by 'which way'"):
        runs.find("which way")


@pytest.mark.parametrize(
    "id", ["..", "a/../b", "", "ABCDEF0123456789", "0123456789abcdef0", "0123456789abcdef\n", None]
)
def test_no_id_leads_out_of_the_folder(runs, id):
    with refused(OptionError, "is not the id of a run"):
        runs.path(id)


def test_a_run_that_is_not_there(runs):
    with refused(OptionError, f"there is no run {ID}"):
        runs.get(ID)
    assert ID not in runs


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"format": "interp-run-1", "id": "x"}', "", "\0"],
    ids=["cut", "list", "empty object", "old", "empty", "zero"],
)
def test_a_manifest_that_is_none_is_refused_by_name(runs, text):
    runs.create(ONE)
    (runs.path(ID) / "run.json").write_text(text)
    with refused(OptionError, "run.json"):
        runs.get(ID)
    assert runs.ids() == [ID], "it is listed all the same, so that somebody mends it"


def test_no_other_status(runs):
    runs.create(ONE)
    with refused(OptionError, "'gone' is not a status"):
        runs.put(Run(ID, status="gone"))
    about = json.loads((runs.path(ID) / "run.json").read_text())
    (runs.path(ID) / "run.json").write_text(json.dumps({**about, "status": "gone"}))
    with refused(OptionError, "is no manifest"):
        runs.get(ID)


def test_a_folder_with_the_spec_of_another(runs):
    runs.create(ONE)
    GRID.to_file(runs.path(ID) / "spec.json")
    with refused(OptionError, f"holds the spec of run {GRID.id}"):
        runs.grid(ID)


def test_one_at_a_time_holds_the_lock(runs):
    runs.create(ONE)
    assert not runs.held(ID)
    with runs.lock(ID) as lock:
        assert lock is not None
        assert runs.held(ID)
        with runs.lock(ID) as other:
            assert other is None
    assert not runs.held(ID)
    with runs.lock(ID) as again:
        assert again is not None


def test_a_child_that_inherits_the_lock_holds_it(runs):
    runs.create(ONE)
    ours, theirs = os.pipe()
    with runs.lock(ID):
        if (child := os.fork()) == 0:
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)
    os.close(ours)
    assert runs.held(ID)
    assert runs.get(ID).active
    os.close(theirs)
    os.waitpid(child, 0)
    assert not runs.held(ID)


def test_cancelling_asks_whoever_is_at_work(runs):
    runs.create(ONE)
    runs.cancel(ID)
    assert not runs.is_cancelled(ID), "nobody is"
    with runs.lock(ID):
        runs.cancel(ID)
        assert runs.is_cancelled(ID)
        assert runs.get(ID).active, "the process says when it has ended"
    runs.create(ONE)
    assert not runs.is_cancelled(ID)


def test_a_result_is_of_all_shards_or_not_at_all(planned):
    shards = planned.shards(ID)
    assert [(shard.first, shard.beyond) for shard in shards] == [(0, 2), (2, 4), (4, 5)]
    for shard in shards[:2]:
        keep(planned, shard)
    assert planned.verify(ID).missing == shards[2:]
    with refused(OptionError, f"run {ID} has no result of patch mini-gpt2"):
        planned.result(ID)
    keep(planned, shards[2])
    result = planned.result(ID)
    assert result.sel(layer=0).values.tolist() == [0, 0, 2, 2, 4]
    assert planned.result(ID, JOB).identical(planned.result(ID, JOB.id))
    assert result.identical(planned.result(ID))
    with refused(OptionError, "learned nothing that is kept as files"):
        planned.files(ID)


def test_which_job_of_many(runs):
    runs.create(GRID)
    with refused(OptionError, f"job of run {GRID.id}"):
        runs.result(GRID.id)
    with refused(OptionError, f"'{ID}' is not a job of run {GRID.id}"):
        runs.result(GRID.id, JOB)


def test_every_flipped_bit_is_noticed(planned):
    shards = planned.shards(ID)
    for shard in shards:
        keep(planned, shard)
    whole = planned.verify(ID).whole[shards[1].id]
    content = whole.read_bytes()
    for place in range(0, len(content), 97):
        whole.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = planned.verify(ID)
        assert list(found.damaged) == [whole]
        assert found.missing == [shards[1]]
    planned.tidy(ID, found)
    assert not whole.exists()
    assert len(planned.verify(ID).whole) == 2


def test_one_of_two_files_of_a_shard_is_enough(planned):
    for shard in planned.shards(ID):
        keep(planned, shard)
    shard = planned.shards(ID)[0]
    other = planned.path(ID) / "shards" / f"{shard.id}-{'0' * 16}.parquet"
    other.write_bytes(b"half")
    found = planned.verify(ID)
    assert not found.missing
    assert list(found.damaged) == [other]
    planned.tidy(ID, found)
    assert not other.exists()
    assert not planned.verify(ID).damaged


def test_what_a_shard_learned_is_checked_with_it(planned):
    for shard in planned.shards(ID):
        keep(planned, shard, {"codes.bin": b"123", "about.json": b"{}"})
    folder = planned.files(ID)
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "codes.bin"]
    (folder / "codes.bin").write_bytes(b"124")
    [(_, why)] = planned.verify(ID).damaged.items()
    assert "codes.bin is not what was written" in why
    (folder / "codes.bin").unlink()
    [(_, why)] = planned.verify(ID).damaged.items()
    assert "codes.bin: No such file" in why


def test_halves_are_tidied_away(planned):
    (planned.path(ID) / "shards" / ".a-b.parquet.x1").write_bytes(b"half")
    (planned.path(ID) / ".run.json.x1").write_bytes(b"half")
    planned.tidy(ID, planned.verify(ID))
    assert not list(planned.path(ID).rglob(".*"))
