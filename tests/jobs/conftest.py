"""A folder of runs, and work in this process on the session's model, counted."""

import pytest

from interp.jobs import worker
from interp.jobs.store import Runs
from interp.jobs.worker import Workbench


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


@pytest.fixture
def here(monkeypatch, mini_gpt2):
    """Computes on the model of the session, whatever the name; a list of the shards that are computed."""
    computed, compute = [], Workbench.compute

    def counted(bench, shard, wanted):
        computed.append(shard)
        return compute(bench, shard, wanted)

    monkeypatch.setattr(worker, "load_model", lambda name, **options: mini_gpt2)
    monkeypatch.setattr(Workbench, "compute", counted)
    return computed
