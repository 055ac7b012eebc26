"""A job is a value: checked when it is made, the same through a file, and its id is the question's."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import PromptPairs, load_task
from interp.directions import BASES
from interp.errors import OptionError, TaskError
from interp.jobs.spec import Job, options_of
from interp.metrics import METRICS
from interp.sites import SITES
from interp.tasks.named import TASKS
from tests.small_pairs import refused

IOI = Job("patch", "mini-gpt2", task="ioi", n=4, options={"sites": "head"})
OWN = {"clean": ("a b",), "corrupt": ("a c",), "answers": (" d",)}

JOBS = st.builds(
    Job,
    st.just("patch"),
    st.sampled_from(["mini-gpt2", "a/folder", "Größe"]),
    task=st.sampled_from(TASKS),
    n=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    options=st.fixed_dictionaries(
        {"sites": st.lists(st.sampled_from(list(SITES)), min_size=1)},
        optional={
            "metric": st.sampled_from(list(METRICS)),
            "direction": st.sampled_from(list(BASES)),
            "window": st.integers(1, 9),
            "normalize": st.booleans(),
            "positions": st.lists(st.integers(-3, 9)),
        },
    ),
    block=st.integers(1, 64),
)


@given(JOBS)
@settings(max_examples=50, deadline=None)
def test_a_job_comes_back_from_json_with_its_id(job):
    text = json.dumps(job.to_dict())
    again = Job.from_dict(json.loads(text))
    assert again == job
    assert again.id == job.id
    assert len(job.id) == 16


@given(JOBS, JOBS)
@settings(max_examples=50, deadline=None)
def test_two_jobs_share_an_id_only_if_they_ask_the_same(a, b):
    assert (a.id == b.id) == (a.to_dict() == b.to_dict())


def test_a_job_comes_back_from_a_file(tmp_path):
    assert Job.from_file(IOI.to_file(tmp_path / "job.json")) == IOI


def test_the_order_of_options_is_no_question():
    given = {"sites": "head", "direction": "noise"}
    assert replace(IOI, options=given).id == replace(IOI, options=dict(reversed(given.items()))).id


def test_tuples_and_lists_are_one_question():
    assert replace(IOI, options={"sites": ("head", "q")}).id == replace(IOI, options={"sites": ["head", "q"]}).id


def test_own_prompts_are_not_drawn_so_n_and_seed_ask_nothing():
    job = Job("edges", "mini-gpt2", **OWN, n=77, seed=5)
    assert (job.n, job.seed) == (1, 0)
    assert job.id == Job("edges", "mini-gpt2", **OWN).id


def test_a_job_is_frozen_and_takes_no_part_in_what_its_maker_does_later():
    options = {"sites": ["head"]}
    job = replace(IOI, options=options)
    options["sites"].append("q")
    assert job.options == {"sites": ["head"]}
    with pytest.raises(FrozenInstanceError):
        job.n = 3


def test_options_are_the_analysis_own():
    assert "window" in options_of("patch")
    assert "rules" in options_of("attribute")
    assert "sites" not in options_of("edges")
    assert not {"batch_size", "announce", "progress", "max_memory", "model"} & {*options_of("patch")}


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (OptionError, "'pitch' is not a kind of job .* did you mean 'patch'", {"kind": "pitch"}),
        (OptionError, "did you mean 'direction'", {"options": {"sites": "head", "directoin": "noise"}}),
        (OptionError, "'batch_size' is not a option", {"options": {"sites": "head", "batch_size": 4}}),
        (OptionError, "needs sites", {"options": {}}),
        (OptionError, "'heads' is not a site", {"options": {"sites": ["heads"]}}),
        (OptionError, "is not a metric", {"options": {"sites": "head", "metric": "logitdiff"}}),
        (OptionError, "is not a direction", {"options": {"sites": "head", "direction": "up"}}),
        (OptionError, "positions of a job is text, a number", {"options": {"sites": "head", "positions": float("nan")}}),
        (TaskError, "did you mean 'ioi'", {"task": "ioii"}),
        (TaskError, "either a named task or prompts", {"task": None}),
        (TaskError, "takes no clean of its own", {"clean": ("a",)}),
        (OptionError, "n of a job is a whole number, at least 1, not 0", {"n": 0}),
        (OptionError, "block of a job", {"block": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(error, says, change):
    with refused(error, says):
        replace(IOI, **change)


def test_own_prompts_need_an_answer_each():
    with refused(TaskError, "0 answers for 1 clean prompts"):
        Job("edges", "mini-gpt2", clean=("a",), corrupt=("b",))
    with refused(TaskError, "clean of a job are a list of texts"):
        Job("edges", "mini-gpt2", clean="abc", corrupt=("b",), answers=(" d",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"format": "interp-job-0"}', "format 'interp-job-0'"),
        ('{"format": "interp-job-1", "kind": "patch"}', "lacks model"),
        ('{"format": "interp-job-1", "kind": "patch", "model": "m", "taks": "ioi"}', "'taks' is not a key of a job"),
    ],
    ids=["cut off", "list", "old", "incomplete", "misspelt"],
)
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path, text, says):
    path = tmp_path / "job.json"
    path.write_text(text, encoding="utf-8")
    with refused(OptionError, f"job.json.*{says}|{says}.*job.json"):
        Job.from_file(path)


def test_pairs_are_the_librarys(mini_gpt2):
    pairs, ours = load_task("ioi", mini_gpt2, n=4), IOI.pairs(mini_gpt2)
    assert ours.clean.equal(pairs.clean)
    texts = {"clean": ["Anna went to the"], "corrupt": ["Mary went to the"], "answers": [" store"]}
    job = Job("edges", "mini-gpt2", **{k: tuple(v) for k, v in texts.items()})
    own = PromptPairs.from_text(mini_gpt2, **texts)
    assert job.pairs(mini_gpt2).clean.equal(own.clean)
    assert job.pairs(mini_gpt2).wrong_answers is None
