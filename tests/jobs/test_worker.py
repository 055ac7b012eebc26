"""A job in blocks is the library's own call to the bit, and a worker says in a sentence what it cannot do."""

import socket
import threading
from dataclasses import replace
from multiprocessing.connection import Connection

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr

from interp import activation_patching, attribution, edge_patching, load_task
from interp.circuits.edges import edge_scores
from interp.jobs import worker
from interp.jobs.arrays import about_of, from_table, joined
from interp.jobs.shards import identity, shards_of
from interp.jobs.spec import Job
from interp.jobs.worker import Reply, Workbench, answer, asked, dataset_digest, relabelled
from tests.small_pairs import small_pairs

SINGLE = {"patch": activation_patching, "attribute": attribution, "edges": edge_patching, "edge_scores": edge_scores}
CASES = {
    "patch": {"sites": "head", "direction": "noise", "normalize": True},
    "patch several": {"sites": ["resid_pre", "pattern"], "metric": ["logit_diff", "probability"]},
    "patch window": {"sites": "resid_pre", "window": 2, "positions": [-1, 2]},
    "attribute": {"sites": "resid_pre", "rules": "relp"},
    "edges": {"edges": ["a0.h1->m2", "m3->logits"]},
    "edge_scores": {"method": "eap"},
}


def job_of(case="patch", **changes) -> Job:
    return Job(case.split()[0], "mini-gpt2", **{"task": "ioi", "n": 5, "block": 2, "options": CASES[case], **changes})


def shards(job) -> list:
    return list(shards_of([job], {job.model: identity(job.model)}, "cpu"))


def computed(job, bench=None) -> list[Reply]:
    bench = bench or Workbench()
    return [bench.compute(shard, identity(job.model)) for shard in shards(job)]


def table(reply: Reply) -> pa.Table:
    assert not reply.error
    return pq.read_table(pa.BufferReader(reply.table))


def single(job, model, **running):
    options = dict(job.options)
    sites = [options.pop("sites")] if "sites" in options else []
    return SINGLE[job.kind](model, job.pairs(model), *sites, **options, **running)


@pytest.mark.parametrize("case", CASES)
def test_a_job_in_blocks_is_the_librarys_own_call(here, mini_gpt2, case):
    job = job_of(case)
    result = joined([from_table(table(reply)) for reply in computed(job)])
    xr.testing.assert_identical(result, single(job, mini_gpt2, batch_size=job.block))
    xr.testing.assert_allclose(result, single(job, mini_gpt2), atol=2e-4)  # all at once: up to rounding


def test_own_prompts(here, mini_gpt2):
    texts = {"clean": ["Anna went to the"], "corrupt": ["Mary went to the"], "answers": [" store"]}
    job = Job("patch", "mini-gpt2", **texts, options={"sites": "resid_pre", "metric": "log_probability"})
    [reply] = computed(job)
    xr.testing.assert_identical(from_table(table(reply)), single(job, mini_gpt2, batch_size=8))


def test_a_table_says_whose_it_is(here, mini_gpt2):
    job = job_of()
    shard, reply = shards(job)[1], computed(job)[1]
    about = about_of(table(reply))
    assert about == {"shard": shard.id, "job": job.id, "first": 2, "beyond": 4, "files": {},
                     "dataset": dataset_digest(job.pairs(mini_gpt2))}  # fmt: skip
    assert reply.dataset == about["dataset"]


def test_labels_are_those_of_all_prompts(tiny):
    """Blocks may each agree on a token, or have only padding where another has text."""
    model, pairs = tiny("gpt2"), small_pairs(4, lengths=[4, 4, 6, 5])
    blocks = [relabelled(activation_patching(model, p, "resid_pre"), pairs) for p in pairs.chunks(1)]
    xr.testing.assert_identical(joined(blocks), activation_patching(model, pairs, "resid_pre", batch_size=1))


def test_a_datasets_digest_is_of_its_tokens(mini_gpt2):
    pairs = load_task("ioi", mini_gpt2, n=4)
    assert dataset_digest(pairs) == dataset_digest(load_task("ioi", mini_gpt2, n=4))
    others = [
        load_task("ioi", mini_gpt2, n=4, seed=1),
        load_task("ioi", mini_gpt2, n=5),
        load_task("capitals", mini_gpt2, n=4),
    ]
    assert len({dataset_digest(other) for other in [pairs, *others]}) == 4
    assert dataset_digest(None) == ""


def test_a_model_is_loaded_once_and_prompts_once_a_job(monkeypatch, mini_gpt2):
    loaded, drawn, pairs = [], [], Job.pairs
    monkeypatch.setattr(worker, "load_model", lambda name, **options: loaded.append(name) or mini_gpt2)
    monkeypatch.setattr(Job, "pairs", lambda job, model: drawn.append(job.id) or pairs(job, model))
    bench, jobs = Workbench(), [job_of(), job_of(seed=1), job_of()]
    for job in jobs:
        computed(job, bench)
    assert loaded == ["mini-gpt2"]
    assert drawn == [job.id for job in jobs]
    computed(replace(job_of(), dtype="float64"), bench)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("patch window", {"options": {"sites": "resid_pre", "window": 99}}, "window 99 is not between 1 and"),
        ("edges", {"options": {"edges": ["a9.h1->m2"]}}, "a9.h1"),
    ],
)
def test_what_the_asker_has_to_mend_is_said_in_the_librarys_words(here, case, change, says):
    reply = computed(job_of(case, **change))[0]
    assert says in reply.error
    assert reply.mend
    assert not reply.table


def test_another_error_is_told_with_its_kind(here, monkeypatch, capsys):
    monkeypatch.setattr(worker, "load_model", lambda name, **options: 1 / 0)
    reply = computed(job_of())[0]
    assert reply.error == "ZeroDivisionError: division by zero"
    assert not reply.mend
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("files", [{}, {"codes.bin": b"\0\xff" * 9, "empty": b""}])
def test_a_reply_comes_through_a_pipe(files):
    reply = Reply("a" * 16, b"PAR1", files, "digest", "why", True)
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    with ours, theirs:
        reply.send(ours)
        assert Reply.receive(theirs) == reply
        ours.send_bytes(b"null")
        assert Reply.receive(theirs) is None
        ours.close()
        with pytest.raises(EOFError):
            Reply.receive(theirs)


def test_a_question_is_answered_with_its_shard(here):
    shard = shards(job_of())[2]
    reply = answer(asked(shard, identity("mini-gpt2")), Workbench())
    assert reply == computed(job_of())[2]
    assert here[0] == shard


def test_a_worker_answers_until_the_other_end_is_closed(here, monkeypatch):
    monkeypatch.setattr(worker.signal, "signal", lambda *args: None)  # only a process's first thread may set one
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=worker.main, args=([str(theirs.detach()), "1", "1"],))
    thread.start()
    with Connection(ours.detach()) as pipe:
        assert Reply.receive(pipe) is None, "it is ready"
        pipe.send_bytes(asked(shards(job_of())[0], identity("mini-gpt2")))
        assert Reply.receive(pipe).shard == shards(job_of())[0].id
    thread.join(20)
    assert not thread.is_alive()
