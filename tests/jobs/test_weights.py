"""What other weights gave is never taken for a result: not after training, not while a run is at it, not by another machine."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from interp import activation_patching, load_model
from interp.bundled import bundled_models
from interp.jobs.runner import run
from interp.jobs.shards import shards_of
from interp.jobs.worker import Workbench
from tests.jobs.small_grids import JOB


@pytest.fixture
def folder(tmp_path):
    """A model's folder of one's own."""
    return Path(shutil.copytree(bundled_models()["mini-gpt2"], tmp_path / "model"))


def change(folder: Path) -> None:
    """Train the model in a folder a little."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[0]].mul_(1.01)
    save_file(weights, path, metadata={"format": "pt"})


def test_with_other_weights_everything_is_computed_again(runs, folder):
    job = replace(JOB, model=str(folder))
    assert run(job, runs).status == "done"
    before, old = runs.result(job.id), runs.get(job.id).models
    change(folder)
    assert run(job, runs).status == "done"
    after, shards = runs.result(job.id), runs.verify(job.id)
    assert runs.get(job.id).models != old
    assert len(shards.whole) == 3
    assert not (after == before).all()
    model = load_model(folder)
    assert after.identical(activation_patching(model, job.pairs(model), **job.options, batch_size=2))
    written = len(list((runs.path(job.id) / "shards").iterdir()))
    assert written == 6, "what the old weights gave stays, under names that nobody asks for"


def test_weights_that_change_while_a_run_is_at_it(runs, folder, monkeypatch):
    job, compute = replace(JOB, model=str(folder)), Workbench.compute

    def then_train(bench, shard, wanted):
        change(folder)
        return compute(bench, shard, wanted)

    monkeypatch.setattr(Workbench, "compute", then_train)
    ended = run(job, runs)
    assert ended.status == "failed"
    assert "its files have changed" in ended.error
    assert not runs.verify(job.id).whole
    monkeypatch.setattr(Workbench, "compute", compute)
    assert run(job, runs).status == "done"


def test_a_worker_that_finds_other_weights_says_so(here):
    shard = next(shards_of([JOB], {"mini-gpt2": "files:0"}, "cpu"))
    reply = Workbench().compute(shard, "files:0")
    assert reply.mend
    assert not reply.table
    assert "mini-gpt2 is files:" in reply.error
