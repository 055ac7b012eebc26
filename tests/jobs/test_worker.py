"""Shards add up to the single result; what is done is not done again; every way to end leaves a true manifest."""

import os
import signal
import time

import pytest
import xarray as xr

from interp import activation_patching, attribution, edge_patching, load_task
from interp.jobs import worker
from interp.jobs.spec import Job
from interp.jobs.store import Runs, me, now, save_arrays
from interp.jobs.worker import blocks, main, merged, submit
from tests.small_pairs import small_pairs

SINGLE = {"patch": activation_patching, "attribute": attribution, "edges": edge_patching}
CASES = {
    "patch": {"sites": "head", "direction": "noise", "normalize": True},
    "patch several": {"sites": ["resid_pre", "pattern"], "metric": ["logit_diff", "probability"]},
    "patch window": {"sites": "resid_pre", "window": 2, "positions": [-1, 2]},
    "attribute": {"sites": "resid_pre", "rules": "relp"},
    "edges": {"edges": ["a0.h1->m2", "m3->logits"]},
}


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


@pytest.fixture
def here(monkeypatch, mini_gpt2):
    """Work in this process, on the model of the session; counts the blocks that are computed."""
    computed = []
    run = Job.run

    def counted(job, model, pairs, **running):
        computed.append(len(pairs))
        return run(job, model, pairs, **running)

    monkeypatch.setattr(worker, "load_model", lambda name: mini_gpt2)
    monkeypatch.setattr(Job, "run", counted)
    return computed


def job_of(case="patch", **changes) -> Job:
    return Job(case.split()[0], "mini-gpt2", **{"task": "ioi", "n": 5, "block": 2, "options": CASES[case], **changes})


def run(job, runs) -> int:
    if job.id not in runs:
        runs.create(job.id, job.to_dict())
    return main([str(runs.path(job.id))])


def single(job, model, **running):
    options = dict(job.options)
    sites = [options.pop("sites")] if "sites" in options else []
    return SINGLE[job.kind](model, job.pairs(model), *sites, **options, **running)


@pytest.mark.parametrize("case", CASES)
def test_a_job_is_the_single_run_bit_for_bit(runs, here, mini_gpt2, case):
    job = job_of(case)
    assert run(job, runs) == 0
    result = runs.result(job.id)
    xr.testing.assert_identical(result, single(job, mini_gpt2, batch_size=job.block))
    xr.testing.assert_allclose(result, single(job, mini_gpt2), atol=2e-4)  # all at once: up to rounding
    assert here == [2, 2, 1]
    manifest = runs.get(job.id)
    assert (manifest.status, manifest.shards, manifest.error) == ("done", 3, "")
    assert manifest.provenance["model"] == "mini-gpt2"
    progress = runs.progress(job.id)
    assert (progress.done, progress.total, progress.stage, progress.eta) == (5, 5, "done", 0.0)


def test_labels_are_those_of_all_prompts(tiny):
    """Blocks may each agree on a token, or have only padding where another has text."""
    model, pairs = tiny("gpt2"), small_pairs(4, lengths=[4, 4, 6, 5])
    blocks = [activation_patching(model, p, "resid_pre") for p in pairs.chunks(1)]
    xr.testing.assert_identical(merged(blocks, pairs), activation_patching(model, pairs, "resid_pre", batch_size=1))


def test_blocks_cover_the_prompts_once():
    assert blocks(job_of(n=5, block=2)) == [(0, 2), (2, 4), (4, 5)]
    assert blocks(job_of(n=5, block=9)) == [(0, 5)]


@pytest.mark.parametrize("what", ["gone", "truncated", "flipped", "of another job", "of another version"])
def test_only_what_is_missing_or_damaged_is_computed_again(runs, here, what, mini_gpt2):
    job = job_of()
    run(job, runs)
    result = runs.result(job.id)
    folder = runs.path(job.id) / "shards"
    path = folder / "00002-00004.safetensors"
    if what == "gone":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif what == "flipped":
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 64]))
    else:
        old = activation_patching(
            mini_gpt2, load_task("ioi", mini_gpt2, n=2), "head", direction="noise", normalize=True
        )
        other = what == "of another job"
        save_arrays(folder, "00002-00004", old if other else old.assign_attrs(versions="torch 1"),
                    about={"job": "other" if other else job.id})  # fmt: skip
    here.clear()
    assert run(job, runs) == 0
    assert here == [2]
    xr.testing.assert_identical(runs.result(job.id), result)


def test_cancelling_between_blocks_keeps_what_is_done(runs, here, monkeypatch):
    job, compute = job_of(), Job.run

    def then_cancel(self, *args, **kwargs):
        runs.cancel(job.id)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Job, "run", then_cancel)
    assert run(job, runs) == 130
    assert runs.get(job.id).status == "cancelled"
    monkeypatch.setattr(Job, "run", compute)
    runs.create(job.id, job.to_dict())
    assert run(job, runs) == 0
    assert here == [2, 2, 1]


def test_a_signal_in_the_middle_of_a_block_loses_that_block(runs, here, monkeypatch):
    job, compute = job_of(), Job.run

    def then_end(self, *args, **kwargs):
        if len(here) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Job, "run", then_end)
    assert run(job, runs) == 130
    assert runs.get(job.id).status == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list((runs.path(job.id) / "shards").glob("*.json"))) == 1


def test_an_error_of_the_reader_is_told_in_its_own_words(runs, here):
    job = job_of("patch window", options={"sites": "resid_pre", "window": 99})
    assert run(job, runs) == 2
    manifest = runs.get(job.id)
    assert manifest.status == "failed"
    assert manifest.error.startswith("window 99 is not between 1 and")


def test_another_error_is_told_with_its_kind(runs, here, monkeypatch, capsys):
    monkeypatch.setattr(worker, "load_model", lambda name: 1 / 0)
    job = job_of()
    assert run(job, runs) == 1
    assert runs.get(job.id).error == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


def test_the_second_worker_of_a_folder_leaves(runs, here, capsys):
    job = job_of()
    runs.create(job.id, job.to_dict())
    with worker._alone(runs.path(job.id)) as alone:
        assert alone
        assert run(job, runs) == 0
    assert here == []
    assert "another worker" in capsys.readouterr().err


def test_a_folder_of_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_submitting(runs, monkeypatch):
    started = []
    monkeypatch.setattr(worker, "start", started.append)
    job = job_of()
    assert submit(job, runs).status == "queued"
    submit(job, runs)
    assert started == [runs.path(job.id)], "two submits of one job share it"
    runs.change(job.id, status="done", finished=now())
    assert submit(job, runs).status == "done"
    assert len(started) == 1
    runs.change(job.id, status="interrupted", **me())
    assert submit(job, runs).status == "queued"
    assert len(started) == 2


def test_a_worker_process_runs_dies_and_is_taken_up(runs, mini_gpt2):
    """The real thing: killed, it is shown as failed; taken up again, it ends with the single run's bits."""
    job = job_of("patch", n=40, options={"sites": ["head", "resid_pre"], "direction": "both"})
    runs.create(job.id, job.to_dict())
    process = worker.start(runs.path(job.id))
    _until(lambda: any((runs.path(job.id) / "shards").glob("*.json")) or process.poll() is not None)
    process.kill()
    process.wait()
    assert runs.get(job.id).status == "failed"
    kept = len(list((runs.path(job.id) / "shards").glob("*.json")))
    assert 0 < kept < 20
    assert run(job, runs) == 0
    xr.testing.assert_identical(runs.result(job.id), single(job, mini_gpt2, batch_size=2))


def _until(happened, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
