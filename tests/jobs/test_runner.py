"""What is missing is computed, what is there is not; every way to end leaves a true manifest and exit status."""

import time
from dataclasses import replace

import pytest
import torch
import xarray as xr

from interp import activation_patching
from interp.errors import LoadError, OptionError
from interp.jobs import runner, worker
from interp.jobs.executors import Here, Processes
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import crew_of, main, run, submit
from interp.jobs.shards import identity
from interp.jobs.store import Runs
from interp.jobs.worker import Workbench
from tests.jobs.small_grids import GRID, JOB, Forks, assert_same, table_of
from tests.small_pairs import refused

HOOK = "blocks.0.mlp.hook_post"


def by_main(grid, runs) -> int:
    """As `submit` starts it, in this process."""
    runs.path(grid.id).mkdir(parents=True, exist_ok=True)
    with runs.lock(grid.id) as lock:
        runs.create(grid)
        return main([str(runs.path(grid.id)), str(lock.fileno())])


def test_a_single_job(runs, here, mini_gpt2):
    ended = run(JOB, runs)
    assert ended == runs.get(JOB.id)
    assert (ended.status, ended.error, ended.failed, ended.shards) == ("done", "", {}, 3)
    assert ended.models == {"mini-gpt2": identity("mini-gpt2")}
    assert ended.running == {"executor": "local", "workers": 1, "threads": torch.get_num_threads()}
    assert ended.seeds == [0]
    assert list(ended.datasets) == ["ioi of mini-gpt2, n 5, seed 0"]
    assert "torch" in ended.versions
    assert ended.submitted <= ended.started <= ended.finished
    progress = runs.progress(JOB.id)
    assert (progress.done, progress.total, progress.stage) == (5, 5, "done")
    options = dict(JOB.options)
    single = activation_patching(mini_gpt2, JOB.pairs(mini_gpt2), **options, batch_size=JOB.block)
    xr.testing.assert_identical(runs.result(JOB.id), single)


def test_a_run_that_is_done_is_not_computed_again(runs, here):
    seconds = run(GRID, runs).seconds
    assert len(here) == 48
    again = run(GRID, runs)
    assert again.status == "done"
    assert again.seconds > seconds, "of all processes that worked on it"
    assert len(here) == 48


def test_the_folder_may_be_a_text(tmp_path, here):
    assert run(JOB, tmp_path / "a").status == run(JOB, str(tmp_path / "b")).status == "done"
    assert_same(table_of(Runs(tmp_path / "a"), Grid(jobs=[JOB])), table_of(Runs(tmp_path / "b"), Grid(jobs=[JOB])))


def test_several_processes_give_the_same_table(tmp_path, here, monkeypatch):
    monkeypatch.setattr(runner, "Processes", Forks)
    one, two = Runs(tmp_path / "one"), Runs(tmp_path / "two")
    grid = replace(GRID, analyses=[*GRID.analyses, Analysis("circuit", {"method": "eap", "n_resamples": 5})], seeds=[0])
    assert run(grid, one).status == run(grid, two, workers=2).status == "done"
    assert two.get(grid.id).running["workers"] == 2
    assert_same(table_of(one, grid), table_of(two, grid))


def test_an_error_of_one_job_ends_no_other(runs, here):
    bad = replace(JOB, options={"sites": "resid_pre", "window": 99})
    ended = run(Grid(jobs=[bad, JOB, replace(bad, seed=1)]), runs)
    assert ended.status == "failed"
    assert ended.error.startswith("window 99 is not between 1 and")
    assert ended.error.endswith("(and 1 more jobs failed)")
    assert list(ended.failed) == [bad.id, replace(bad, seed=1).id]
    assert len(here) == 5, "what is to be mended is asked once"
    assert runs.result(ended.id, JOB).sizes["prompt"] == 5
    with refused(OptionError, "has no result of .*window 99.*it is failed .window 99 is not"):
        runs.result(ended.id, bad)


def test_another_error_is_told_with_its_kind(runs, monkeypatch, capsys):
    monkeypatch.setattr(worker, "load_model", lambda name, **options: 1 / 0)
    assert by_main(Grid(jobs=[JOB]), runs) == 1
    assert runs.get(JOB.id).error == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


def test_a_model_that_is_not_there_begins_nothing(runs, capsys):
    lost = replace(JOB, model="no/such-model")
    with refused(LoadError, "'no/such-model' is neither a bundled model"):
        run(lost, runs)
    assert runs.get(lost.id).status == "failed"
    assert "no/such-model" in runs.get(lost.id).error
    assert by_main(Grid(jobs=[lost]), runs) == 2
    assert capsys.readouterr().err.startswith("'no/such-model' is neither")


def test_cancelling_between_shards_keeps_what_is_done(runs, here, monkeypatch):
    compute = Workbench.compute

    def then_cancel(bench, shard, wanted):
        if len(here) == 4:
            runs.cancel(GRID.id)
        return compute(bench, shard, wanted)

    monkeypatch.setattr(Workbench, "compute", then_cancel)
    assert by_main(GRID, runs) == 130
    assert runs.get(GRID.id).status == "cancelled"
    assert len(runs.verify(GRID.id).whole) == 5
    monkeypatch.setattr(Workbench, "compute", compute)
    assert run(GRID, runs).status == "done"
    assert len(here) == 48


@pytest.mark.parametrize(
    ("says", "asked"),
    [
        ("'slurm' is not an executor", {"executor": "slurm"}),
        ("workers must be at least 1, not 0", {"workers": 0}),
        ("threads must be at least 1, not 0", {"threads": 0}),
        ("is of a Ray cluster", {"address": "auto"}),
        ("'gpu' is not a torch device", {"device": "gpu"}),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(runs, says, asked):
    with refused(OptionError, says):
        run(JOB, runs, **asked)
    assert not runs.folder.exists()


def test_crews():
    threads = torch.get_num_threads()
    make, running = crew_of(1, "local", None, None, None)
    assert isinstance(make(), Here)
    assert running == {"executor": "local", "workers": 1, "threads": threads}
    make, running = crew_of(1, "local", "cpu", threads + 1, None)
    assert isinstance(make(), Processes), "another number of threads is another process"
    assert make().threads == threads + 1
    assert make().devices == ["cpu"]
    assert crew_of(10**6, "local", None, None, None)[1]["threads"] == 1


def test_no_folder_of_a_run(tmp_path, capsys):
    assert main([str(tmp_path), "3"]) == 2
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_submitting_twice_is_submitting_once(runs, monkeypatch):
    started = []
    monkeypatch.setattr(runner, "start", lambda folder, lock: started.append(folder))
    assert submit(JOB, runs).status == "queued"
    assert started == [runs.path(JOB.id)]
    with runs.lock(JOB.id):
        assert submit(JOB, runs).status == "queued", "its process holds the lock"
    assert len(started) == 1
    runs.change(JOB.id, status="done")
    assert submit(JOB, runs).status == "done"
    assert len(started) == 1
    runs.change(JOB.id, status="interrupted")
    assert submit(JOB, runs).status == "queued"
    assert len(started) == 2


def test_a_submitted_run_is_done_by_a_process_of_its_own(runs, mini_gpt2):
    """The real thing: queued at once, running, done."""
    snmf = Analysis("snmf", {"hook": HOOK, "n_features": 3, "max_iter": 2, "n_texts": 4})
    grid = Grid(models=["mini-gpt2"], analyses=[snmf], jobs=[JOB])
    assert submit(grid, runs).status == "queued"
    assert runs.get(grid.id).active, "from its first moment"
    deadline = time.monotonic() + 120
    while (ended := runs.get(grid.id)).active:
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.05)
    assert ended.status == "done", (runs.path(grid.id) / "log.txt").read_text()
    single = activation_patching(mini_gpt2, JOB.pairs(mini_gpt2), **JOB.options, batch_size=JOB.block)
    xr.testing.assert_identical(runs.result(grid.id, JOB), single)
    assert runs.files(grid.id, grid.everything[1]).is_dir()
