"""Whatever is killed, damaged, full, doubled or set back: the table is that of an undisturbed run, and no status is wrong."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest

from interp.errors import OptionError
from interp.jobs import runner, worker
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import main, run, submit
from interp.jobs.store import Runs
from interp.jobs.worker import Workbench
from tests.jobs.small_grids import GRID, JOB, Forked, Forks, assert_same, table_of
from tests.small_pairs import refused

# Python 3.12 and later warn of any fork where there are threads; those of torch and Arrow take part in none here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
KILLS = 30  # of runners, and as many of workers
LEARNING = Grid(
    models=["mini-gpt2"],
    analyses=[Analysis("snmf", {"hook": "blocks.0.mlp.hook_post", "n_features": 3, "max_iter": 2, "n_texts": 4})],
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, mini_gpt2):
    """The table of a run of `GRID` that nothing happens to."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "load_model", lambda name, **options: mini_gpt2)
        assert run(GRID, runs).status == "done"
    return table_of(runs, GRID)


def until(happened, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def quick(here, monkeypatch):
    """As `here`, and git is not asked: a kill is to hit a run at its work."""
    monkeypatch.setattr(runner, "code_version", lambda: {"interp": "0"})
    return here


def n_shards(runs: Runs, grid: Grid = GRID) -> int:
    folder = runs.path(grid.id) / "shards"
    return len(list(folder.glob("*.parquet"))) if folder.is_dir() else 0


# ---------------------------------------------------------------------------------------------------------------- kill -9


def test_a_runner_that_is_killed_again_and_again(tmp_path, quick, undisturbed):
    moments, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        runs, rounds, ended = Runs(tmp_path / f"{rounds}"), rounds + 1, False
        while not ended:
            kept = n_shards(runs)
            process, more = Forked(lambda runs=runs: run(GRID, runs)), kept + moments.randrange(6)
            if (
                kills < KILLS
            ):  # somewhere after a few more shards, or before the first; after the last kill it is left alone
                until(lambda: n_shards(runs) >= more or process.ended())  # noqa: B023
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
            ended = process.wait() == 0
            if not ended:
                kills += 1
                assert process.code == -signal.SIGKILL
                assert n_shards(runs) >= kept, "what was kept is lost"
                assert GRID.id not in runs or runs.get(GRID.id).status == "failed", "shown as it is, at once"
        assert_same(table_of(runs, GRID), undisturbed)


class Reaped(Forks):
    """Workers of which one is killed at a random moment, again and again."""

    moments, kills = random.Random(1), 0

    def wait(self, seconds):
        events = super().wait(self.moments.uniform(0, 0.03))
        if self._workers and Reaped.kills < KILLS and self.moments.random() < 0.3:
            os.kill(self._workers[self.moments.choice(sorted(self._workers))][0].pid, signal.SIGKILL)
            Reaped.kills += 1
        return events


def test_workers_that_are_killed_again_and_again(tmp_path, quick, undisturbed, monkeypatch):
    monkeypatch.setattr(runner, "Processes", Reaped)
    rounds = 0
    while Reaped.kills < KILLS:
        runs, rounds, status = Runs(tmp_path / f"{rounds}"), rounds + 1, ""
        while status != "done":
            # three deaths at one shard, or many in a row, are no chance outside a test: it says so, and goes on when asked again
            with suppress(OptionError):
                status = run(GRID, runs, workers=2).status
            assert status == "done" or "killed by signal 9" in runs.get(GRID.id).error
        assert_same(table_of(runs, GRID), undisturbed)


def test_started_processes_that_are_killed(runs, here, undisturbed):
    """A worker is killed and replaced; then the runner, and its workers end by themselves."""
    grid = replace(GRID, seeds=range(12))  # so much that it is at work still
    process = Forked(lambda: run(grid, runs, workers=2, threads=1))
    try:
        until(lambda: n_shards(runs, grid) > 2, 120)
        [one, *_] = psutil.Process(process.pid).children()
        one.kill()
        so_far = n_shards(runs, grid)
        until(lambda: n_shards(runs, grid) > so_far + 2, 120)
        workers = psutil.Process(process.pid).children()
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert runs.get(grid.id).status == "failed"
    assert not psutil.wait_procs(workers, timeout=30)[1], "a worker outlives its runner"
    there = n_shards(runs, grid)
    assert run(grid, runs).status == "done"
    assert len(here) == 192 - there
    again = table_of(runs, grid).results
    assert all(result.identical(again[job]) for job, result in undisturbed.results.items())


# ------------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("what", ["truncated", "flipped", "emptied", "gone", "foreign"])
def test_a_damaged_shard_is_named_and_computed_again(runs, here, undisturbed, what):
    run(GRID, runs)
    here.clear()
    path = sorted((runs.path(GRID.id) / "shards").iterdir())[7]
    content = path.read_bytes()
    broken = {
        "truncated": content[:-5],
        "flipped": content[:900] + bytes([content[900] ^ 4]) + content[901:],
        "emptied": b"",
    }
    if what in broken:
        path.write_bytes(broken[what])
    else:
        path.unlink()
        if what == "foreign":  # a file of something else that is called as a shard is
            path = path.with_name(f"{path.name[:16]}-{'0' * 16}.parquet")
            path.write_bytes(b"PAR1 of another program PAR1")
    found = runs.verify(GRID.id)
    assert [shard.id for shard in found.missing] == [path.name[:16]]
    assert [*found.damaged] == ([] if what == "gone" else [path])
    with refused(OptionError, f"has no result of .*{'' if what == 'gone' else path.name}"):
        runs.result(GRID.id, found.missing[0].job)
    assert run(GRID, runs).status == "done"
    assert [shard.id for shard in here] == [path.name[:16]]
    assert_same(table_of(runs, GRID), undisturbed)


def test_files_that_are_no_shards_are_neither_read_nor_removed(runs, here, undisturbed):
    run(GRID, runs)
    note = runs.path(GRID.id) / "shards" / "notes.txt"
    note.write_text("mine")
    assert not runs.verify(GRID.id).damaged
    run(GRID, runs)
    assert note.read_text() == "mine"
    note.unlink()
    assert_same(table_of(runs, GRID), undisturbed)


@pytest.mark.parametrize("what", ["flipped", "gone"])
def test_a_damaged_file_of_what_was_learned_is_named_and_learned_again(runs, here, what):
    assert run(LEARNING, runs).status == "done"
    files = {path.name: path.read_bytes() for path in runs.files(LEARNING.id).iterdir()}
    path = max(runs.files(LEARNING.id).iterdir(), key=lambda path: path.stat().st_size)
    if what == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    [why] = runs.verify(LEARNING.id).damaged.values()
    assert str(path) in why
    with refused(OptionError, path.name):
        runs.files(LEARNING.id)
    assert run(LEARNING, runs).status == "done"
    assert len(here) == 2
    again = {path.name: path.read_bytes() for path in runs.files(LEARNING.id).iterdir()}
    assert again == files


# ---------------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here ({done.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_a_run_with_a_sentence_and_room_takes_it_up(small_disk, here, undisturbed):
    runs = Runs(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        run(GRID, runs)
    assert runs.get(GRID.id).status == "failed"
    kept = len(runs.verify(GRID.id).whole)
    assert 0 < kept < 48
    assert not runs.verify(GRID.id).damaged
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    here.clear()
    assert run(GRID, runs).status == "done"
    assert len(here) == 48 - kept
    assert_same(table_of(runs, GRID), undisturbed)


# ------------------------------------------------------------------------------------------------------- two at one folder


@pytest.fixture
def slowly(monkeypatch, here):
    """Shards take 20 ms more."""
    compute = Workbench.compute

    def later(bench, shard, wanted):
        time.sleep(0.02)
        return compute(bench, shard, wanted)

    monkeypatch.setattr(Workbench, "compute", later)


def test_the_second_runner_of_a_folder_is_refused_by_name(runs, slowly, undisturbed):
    first = Forked(lambda: run(GRID, runs))
    until(lambda: n_shards(runs) > 0)
    assert runs.get(GRID.id).status == "running"
    with refused(OptionError, f"another process is at work on run {GRID.id}"):
        run(GRID, runs)
    assert submit(GRID, runs).status == "running", "to ask for what is under way is no error"
    assert first.wait() == 0
    assert_same(table_of(runs, GRID), undisturbed)


def test_runners_that_start_at_the_same_moment(runs, slowly, undisturbed):
    codes = [process.wait() for process in [Forked(lambda: run(GRID, runs)) for _ in range(3)]]
    assert 0 in codes
    assert runs.get(GRID.id).status == "done"
    assert_same(table_of(runs, GRID), undisturbed)


def test_a_run_is_active_while_its_process_lives_and_failed_as_soon_as_it_does_not(runs, slowly):
    process = Forked(lambda: run(GRID, runs))
    until(lambda: GRID.id in runs and runs.get(GRID.id).status == "running")
    process.kill()
    process.wait()
    assert runs.get(GRID.id).status == "failed"
    assert "ended without a word" in runs.get(GRID.id).error


def test_a_process_that_dies_before_its_first_word(runs, monkeypatch):
    monkeypatch.setattr(runner.sys, "executable", shutil.which("false"))
    submit(GRID, runs)
    until(lambda: not runs.held(GRID.id), 5)
    assert runs.get(GRID.id).status == "failed"


# --------------------------------------------------------------------------------------------------------------- the clock


def test_a_clock_that_runs_backwards(runs, here, undisturbed, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0)
    assert run(GRID, runs).status == "done"
    assert run(JOB, runs).status == "done"
    assert runs.get(GRID.id).submitted > runs.get(GRID.id).finished, "only told"
    assert runs.get(GRID.id).seconds > 0
    assert 0 <= runs.progress(GRID.id).seconds < 60
    assert runs.ids() == [GRID.id, JOB.id], "by what the clock said, which is all that is known"
    with runs.lock(GRID.id):
        runs.change(GRID.id, status="running", started="2999-01-01T00:00:00.000+00:00")
        assert runs.get(GRID.id).status == "running"
    assert runs.get(GRID.id).status == "failed"
    here.clear()
    assert run(GRID, runs).status == "done"
    assert here == []
    assert_same(table_of(runs, GRID), undisturbed)


def test_a_clock_that_stands_still(runs, here, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    jobs = [replace(JOB, n=1, seed=seed) for seed in range(4)]
    for job in jobs:
        assert run(job, runs).status == "done"
    assert runs.ids() == sorted((job.id for job in jobs), reverse=True), "one order, whatever order files are listed in"


# ----------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order_and_only_the_shard_in_hand_is_lost(runs, here, monkeypatch, undisturbed, number):
    compute, before = Workbench.compute, signal.getsignal(number)

    def then_end(bench, shard, wanted):
        if len(here) == 10:
            os.kill(os.getpid(), number)
        return compute(bench, shard, wanted)

    monkeypatch.setattr(Workbench, "compute", then_end)
    runs.path(GRID.id).mkdir(parents=True)
    with runs.lock(GRID.id) as lock:
        runs.create(GRID)
        assert main([str(runs.path(GRID.id)), str(lock.fileno())]) == 130
    assert runs.get(GRID.id).status == "interrupted"
    assert signal.getsignal(number) == before
    monkeypatch.setattr(Workbench, "compute", compute)
    here.clear()
    assert run(GRID, runs).status == "done"
    assert len(here) == 38
    assert_same(table_of(runs, GRID), undisturbed)


def test_a_signal_to_a_run_with_workers(runs, here, monkeypatch, undisturbed):
    monkeypatch.setattr(runner, "Processes", Forks)
    process = Forked(lambda: run(GRID, runs, workers=2))
    until(lambda: n_shards(runs) > 3)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 0
    assert runs.get(GRID.id).status in ("interrupted", "done")
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert run(GRID, runs).status == "done"
    assert_same(table_of(runs, GRID), undisturbed)
