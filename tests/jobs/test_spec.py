"""A job is a value: checked when it is made, the same through a file, and its id is the question's."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import PromptPairs, load_task
from interp.directions import BASES
from interp.errors import OptionError, TaskError
from interp.jobs.spec import Job
from interp.metrics import METRICS
from interp.sites import SITES
from interp.tasks.named import TASKS
from tests.small_pairs import refused

IOI = Job("patch", "mini-gpt2", task="ioi", n=4, options={"sites": "head"})
HOOK = "blocks.0.mlp.hook_post"
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


def test_kinds_that_need_all_prompts_have_one_block():
    job = Job("circuit", "mini-gpt2", task="ioi", n=12, block=3)
    assert job.block == 12
    assert job.id == Job("circuit", "mini-gpt2", task="ioi", n=12, block=5).id
    assert replace(IOI, block=3).id != replace(IOI, block=2).id, "sums of other blocks are rounded otherwise"


def test_a_job_about_text_has_a_seed_and_no_prompts():
    job = Job("snmf", "mini-gpt2", n=77, seed=5, options={"hook": HOOK}, corruption="x", template=3)
    assert (job.n, job.seed, job.corruption, job.template) == (1, 5, None, 0)
    assert str(job) == f"snmf mini-gpt2 (hook {HOOK}), seed 5"
    with refused(TaskError, "is about a text, and takes no task"):
        replace(job, task="ioi")
    with refused(OptionError, "a snmf job needs a hook|an snmf job needs a hook"):
        replace(job, options={})


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (OptionError, "'pitch' is not a kind of job .* did you mean 'patch'", {"kind": "pitch"}),
        (OptionError, "did you mean 'direction'", {"options": {"sites": "head", "directoin": "noise"}}),
        (OptionError, "'batch_size' is not an option", {"options": {"sites": "head", "batch_size": 4}}),
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
        (OptionError, "n of a job", {"n": True}),
        (OptionError, "seed of a job is a whole number, at least 0", {"seed": -1}),
        (OptionError, "a job's model is a name or a folder", {"model": ""}),
        (OptionError, "a job's template", {"template": "a"}),
        (OptionError, "a job's options are names", {"options": ["head"]}),
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
    ("values", "says"),
    [
        ([], "no JSON object"),
        ({"format": "interp-job-0"}, "format 'interp-job-0'"),
        ({"kind": "patch"}, "lacks model"),
        ({"model": "m"}, "lacks kind"),
        ({"kind": "patch", "model": "m", "taks": "ioi"}, "'taks' is not a key of a job .* did you mean 'task'"),
    ],
    ids=["list", "old", "no model", "no kind", "misspelt"],
)
def test_what_is_no_job_is_refused_by_name(values, says):
    with pytest.raises(OptionError, match=says) as caught:
        Job.from_dict(values, source="a.toml")
    assert "a.toml" in str(caught.value)


def test_pairs_are_the_librarys(mini_gpt2):
    pairs, ours = load_task("ioi", mini_gpt2, n=4), IOI.pairs(mini_gpt2)
    assert ours.clean.equal(pairs.clean)
    texts = {"clean": ["Anna went to the"], "corrupt": ["Mary went to the"], "answers": [" store"]}
    job = Job("edges", "mini-gpt2", **{k: tuple(v) for k, v in texts.items()})
    own = PromptPairs.from_text(mini_gpt2, **texts)
    assert job.pairs(mini_gpt2).clean.equal(own.clean)
    assert job.pairs(mini_gpt2).wrong_answers is None


def test_pairs_to_judge_by_are_others_of_the_same_task(mini_gpt2):
    ours, apart = IOI.pairs(mini_gpt2), IOI.held_out(mini_gpt2)
    assert len(apart) == len(ours)
    assert not apart.clean.equal(ours.clean)
    assert apart.clean.equal(IOI.held_out(mini_gpt2).clean)
    own = Job("edges", "mini-gpt2", clean=("Anna went",), corrupt=("Mary went",), answers=(" to",))
    assert own.held_out(mini_gpt2) is None
    assert Job("snmf", "mini-gpt2", options={"hook": HOOK}).pairs(mini_gpt2) is None
