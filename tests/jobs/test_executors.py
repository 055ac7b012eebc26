"""Shards are dealt to whoever is free, and those of lost workers to others; some are given up with a sentence."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.jobs.executors import Here, Lost, deal, devices_of
from interp.jobs.shards import shards_of
from interp.jobs.worker import Reply
from tests.jobs.small_grids import GRID, Forks
from tests.small_pairs import refused

IDENTITIES = {"a": "files:a", "b": "files:b"}
BOTH = replace(GRID, models=["a", "b"])
SHARDS = list(shards_of(BOTH.everything, IDENTITIES, "cpu"))


class Script:
    """A crew of n that exists on paper: `happens(worker, shard)` says what a worker answers, one event a wait."""

    def __init__(self, n, happens, seed=0):
        self.n, self.happens, self.random = n, happens, random.Random(seed)
        self.hired, self.events, self.asked = 0, [], []

    def hire(self):
        self.events.append((self.hired, None))
        self.hired += 1

    def ask(self, worker, shard, wanted):
        assert wanted == IDENTITIES[shard.job.model]
        self.asked.append((worker, shard))
        self.events.append((worker, self.happens(worker, shard)))

    def wait(self, seconds):
        assert self.events, "nobody is at work, and it is waited for"
        return [self.events.pop(self.random.randrange(len(self.events)))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def well(worker, shard) -> Reply:
    return Reply(shard.id)


@given(st.integers(1, 5), st.integers(0, 2**20), st.floats(0, 0.25))
@settings(max_examples=60, deadline=None)
def test_every_shard_is_replied_to_once_whoever_is_lost(n, seed, risk):
    dice = random.Random(seed)
    crew = Script(n, lambda worker, shard: Lost("x") if dice.random() < risk else Reply(shard.id), seed)
    try:
        replies = list(deal(SHARDS, IDENTITIES, crew))
    except OptionError:
        return  # more in a row than a crew can lose
    assert sorted(shard.id for shard, _ in replies) == sorted(shard.id for shard in SHARDS)
    assert all(reply.shard == shard.id for shard, reply in replies)


def test_a_worker_keeps_its_model():
    crew = Script(2, well)
    list(deal(SHARDS, IDENTITIES, crew))
    changes = Counter()
    for worker in (0, 1):
        models = [shard.job.model for who, shard in crew.asked if who == worker]
        changes[worker] = sum(a != b for a, b in pairwise(models))
    assert changes.total() <= 2


def test_no_more_workers_than_shards():
    crew = Script(8, well)
    assert len(list(deal(SHARDS[:3], IDENTITIES, crew))) == 3
    assert crew.hired == 3


def test_a_shard_that_takes_three_workers_with_it_is_given_up():
    bad = SHARDS[5]
    crew = Script(2, lambda worker, shard: Lost("killed by signal 9") if shard is bad else Reply(shard.id))
    errors = {shard.id: reply.error for shard, reply in deal(SHARDS, IDENTITIES, crew) if reply.error}
    assert errors == {bad.id: "3 workers ended while at it (killed by signal 9)"}
    assert crew.hired == 2 + 3


def test_workers_that_all_end_are_not_hired_for_ever():
    crew = Script(2, lambda worker, shard: Lost("ended with status 1"))
    with refused(OptionError, r"no worker stays alive: the last 7 ended without a result \(ended with status 1\)"):
        list(deal(SHARDS, IDENTITIES, crew))


@pytest.mark.parametrize("mend", [True, False])
def test_a_job_with_an_error_is_asked_for_once(mend):
    bad = SHARDS[0].job
    crew = Script(1, lambda worker, shard: Reply(shard.id, error="no" if shard.job == bad else "", mend=mend))
    replies = list(deal(SHARDS, IDENTITIES, crew))
    assert sum(shard.job == bad for shard, _ in replies) == 1
    assert len(replies) == len(SHARDS) - 7


@pytest.mark.parametrize("n", [1, 3])
def test_after_a_stop_only_those_in_hand_are_waited_for(n):
    crew, replies = Script(n, well), []
    for reply in deal(SHARDS, IDENTITIES, crew, stopped=lambda: len(replies) >= 5):
        replies.append(reply)
    assert len(replies) == len(crew.asked)
    assert 5 <= len(replies) <= 5 + n - 1


def test_nothing_to_deal():
    assert list(deal([], IDENTITIES, Script(2, well), stopped=lambda: True)) == []


def test_this_process_is_a_crew_of_one(here):
    jobs = [replace(job, model="mini-gpt2") for job in GRID.everything[:1]]
    identities = {"mini-gpt2": "files:0"}
    with Here() as crew:
        replies = list(deal(list(shards_of(jobs, identities, "cpu")), identities, crew))
    assert len(here) == len(replies) == 1, "other weights than those wanted are the asker's to mend"
    assert "its files have changed" in replies[0][1].error


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_end_with_their_crew(here):
    with Forks(2) as crew:
        crew.hire()
        crew.hire()
        ready = []
        while len(ready) < 2:
            ready += crew.wait(1.0)
        assert sorted(ready) == [(0, None), (1, None)]
        processes = [process for process, _ in crew._workers.values()]
        processes[0].kill()
        assert crew.wait(5.0) == [(0, Lost("killed by signal 9"))]
        crew.ask(1, SHARDS[0], "files:a")
        [(worker, reply)] = crew.wait(20.0)
        assert worker == 1
        assert "a" in reply.error
    assert processes[1].code is not None


def test_devices(monkeypatch):
    assert devices_of(None) == []
    assert devices_of("cpu") == ["cpu"]
    with refused(OptionError, "'gpu' is not a torch device"):
        devices_of("gpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert devices_of("meta") == ["meta:0", "meta:1", "meta:2"]
    assert devices_of("meta:1") == ["meta:1"]
