"""Runs on Ray: the table is that of a run in this process, whatever is lost on the way, and nothing of Ray is left behind."""

import os
import signal
import sys
import time
import uuid
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest

from interp.errors import OptionError
from interp.jobs.cluster import Cluster, Worker
from interp.jobs.executors import Lost, deal
from interp.jobs.runner import run
from interp.jobs.shards import identity, shards_of
from interp.jobs.store import Runs
from interp.jobs.worker import Reply, asked
from tests.jobs.small_grids import GRID, JOB, assert_same, table_of
from tests.small_pairs import refused

ray = pytest.importorskip("ray", reason="Ray (extra cluster) is not installed")
STORE = 80_000_000  # bytes; Ray takes no less


def left(mark: str) -> list[str]:
    """Every other process that was started with a mark in its environment, also by one that has ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("INTERP_MARK") == mark:
                found.append(process.name())
    return found


def until(happened, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def mark():
    """Of all processes that these tests start; none is left."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_MARK", mark)
        patch.setenv("RAY_worker_niceness", "0")  # these tests wait for the workers
        patch.delenv("RAY_ADDRESS", raising=False)
        yield mark
    until(lambda: not left(mark))
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table of `GRID` computed in one process."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"))
    assert run(GRID, runs).status == "done"
    return table_of(runs, GRID)


@pytest.fixture(scope="module")
def two_nodes(mark):
    """A cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    )
    try:
        nodes.add_node(num_cpus=1, object_store_memory=STORE)
        yield nodes
    finally:
        nodes.shutdown()


def test_a_cluster_of_its_own_gives_the_bits_of_one_process_and_ends_with_the_run(tmp_path, mark, undisturbed, capfd):
    wrong = replace(JOB, options={"sites": "head", "positions": [99]})
    grid = replace(GRID, jobs=[wrong])
    before = signal.getsignal(signal.SIGTERM)
    runs = Runs(tmp_path)
    found = run(grid, runs, executor="ray", workers=2)
    assert found.status == "failed"
    assert [*found.failed] == [wrong.id]
    assert "99" in found.failed[wrong.id]
    assert found.running == {"executor": "ray", "workers": 2, "threads": max(1, os.cpu_count() // 2)}
    for job, result in undisturbed.results.items():
        assert runs.result(grid.id, job).identical(result)
    until(lambda: not left(mark))
    assert signal.getsignal(signal.SIGTERM) is before
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    assert capfd.readouterr().out == ""


def test_no_room_for_any_worker_is_said(two_nodes):
    machines = r"2 \(1 CPUs and 0 GPUs; 1 CPUs and 0 GPUs\), where 2 CPUs and 0 GPUs are free"
    says = f"asks for 64 CPUs and 0 GPUs of one machine, and the Ray cluster at {two_nodes.address} has {machines}"
    with Cluster(2, threads=64, address=two_nodes.address, patience=0.5) as crew, refused(OptionError, says):
        next(deal(shards(), {"mini-gpt2": identity("mini-gpt2")}, crew))


def test_what_a_signal_ended_is_taken_up_and_a_node_lost_in_the_midst_takes_nothing_with_it(
    tmp_path, mark, two_nodes, undisturbed, monkeypatch, capfd
):
    runs, kept, keep = Runs(tmp_path), [], Runs.keep

    def ended(runs, id, shard, *content):
        kept.append(shard)
        if len(kept) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return keep(runs, id, shard, *content)

    monkeypatch.setattr(Runs, "keep", ended)
    assert run(GRID, runs, executor="ray", workers=1, threads=1, address=two_nodes.address).status == "interrupted"
    assert not ray.is_initialized()
    until(lambda: "ray::Worker" not in left(mark))
    done = runs.verify(GRID.id).whole
    assert len(done) == 4

    monkeypatch.setattr(Runs, "keep", keep)
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    [node], wait = two_nodes.worker_nodes, Cluster.wait
    held, happened = [], []

    def together(crew, seconds):
        """Events, once there is a worker on both nodes; after some, one node is killed."""
        held.extend(wait(crew, seconds))
        if len(crew._there) < 2 and not happened:
            return []
        events = held[:]
        held.clear()
        happened.extend(events)
        if len(happened) > 7 and node in two_nodes.worker_nodes:
            two_nodes.remove_node(node, allow_graceful=False)
        return events

    monkeypatch.setattr(Cluster, "wait", together)
    found = run(GRID, runs, executor="ray", workers=2, threads=1)
    assert found.status == "done", found.error
    assert node not in two_nodes.worker_nodes
    [lost] = [event for _, event in happened if isinstance(event, Lost)]
    assert "\n" not in lost.why
    assert len(lost.why) <= 300
    there = sorted(worker for worker, event in happened if event is None)
    assert there == [0, 1]  # a third has no room, and holds up nobody
    computed = [event.shard for _, event in happened if isinstance(event, Reply)]
    assert len(computed) == len(set(computed)) == len(undisturbed.files) - len(done)
    assert not {*computed} & {*done}
    assert_same(table_of(runs, GRID), undisturbed)
    assert capfd.readouterr().out == ""
    two_nodes.wait_for_nodes()  # it is there, less the one that was killed


def shards() -> list:
    return list(shards_of([JOB], {"mini-gpt2": identity("mini-gpt2")}, "cpu"))


def test_an_actor_answers_in_bytes_and_says_so_if_its_weights_are_others():
    actor, [shard, *_] = Worker(1, None, 1), shards()
    parts = actor.answer(asked(shard, identity("mini-gpt2")))
    assert all(isinstance(part, bytes) for part in parts)
    reply = Reply.from_parts(parts)
    assert reply.shard == shard.id
    assert not reply.error
    assert reply.parts() == parts
    reply = Reply.from_parts(actor.answer(asked(shard, "files:others")))
    assert reply.mend
    assert "this run is of files:others" in reply.error


def test_files_pass_as_parts():
    reply = Reply("0" * 16, b"table", {"a.json": b"", "b.safetensors": b"\0\1"}, "d", "", False)
    assert Reply.from_parts(reply.parts()) == reply


def test_what_cannot_be_is_said_at_once():
    nothing = "127.0.0.1:1"
    with refused(OptionError, f"no Ray cluster can be joined at {nothing}"):
        Cluster(1, address=nothing).__enter__()
    with refused(OptionError, "not a torch device"):
        Cluster(1, device="gpu9")
    with refused(OptionError, "write meta, not meta:1"):
        Cluster(1, device="meta:1")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused(OptionError, r"pip install interp-workbench\[cluster\]"):
        Cluster(1)


def test_a_machine_with_other_versions_is_named():
    crew, told = Cluster(1), Future()
    told.set_result(("interp 0.0 and torch 1.0", "farm7"))
    crew._events.put((0, told))
    with refused(OptionError, "farm7 has interp 0.0 and torch 1.0, and this run is of interp"):
        crew.wait(1.0)
