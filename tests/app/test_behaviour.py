"""What is looked at, as a value: through the address bar and back, checked on the server, and as code that runs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.behaviour import MAX_CHARACTERS, MAX_PROMPTS, OWN, Behaviour
from interp.errors import TaskError
from interp.tasks.named import TASKS
from tests.small_pairs import refused

TEXT = st.text(min_size=1, max_size=40).filter(str.strip)


@given(
    task=st.sampled_from([*TASKS, OWN]), n=st.integers(1, MAX_PROMPTS), seed=st.integers(0, 9), clean=TEXT, answer=TEXT
)
def test_through_the_address_and_back(task, n, seed, clean, answer):
    own = {"clean": clean, "answer": answer} if task == OWN else {"n": n, "seed": seed}
    behaviour = Behaviour("mini-llama", task, **own)
    assert Behaviour.from_query(behaviour.to_query()) == behaviour


def test_the_default_needs_no_address():
    assert Behaviour().to_query() == {}
    assert Behaviour.from_query({}) == Behaviour()


@pytest.mark.parametrize(
    "query", [{"n": "many"}, {"n": "0"}, {"n": "1e9"}, {"task": "nonsense"}, {"task": OWN, "clean": " "}]
)
def test_an_address_that_makes_no_sense_is_the_default(query):
    found = Behaviour.from_query(query)
    assert found == Behaviour()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n": MAX_PROMPTS + 1}, "takes 1 to 64 pairs, not 65"),
        ({"task": "io"}, "'io' is not a task"),
        ({"task": OWN, "clean": ""}, "type a clean prompt"),
        ({"task": OWN, "answer": ""}, "type a right and a wrong answer"),
        ({"clean": "x" * (MAX_CHARACTERS + 1)}, "the clean prompt has 2,001 characters"),
    ],
    ids=["too many", "no task", "no prompt", "no answer", "too long"],
)
def test_limits_are_checked_here(changes, says):
    with refused(TaskError, says):
        replace(Behaviour(), **changes).checked()


@pytest.mark.parametrize("behaviour", [Behaviour(n=3, seed=2), Behaviour(task=OWN)], ids=["a task", "own prompts"])
def test_its_code_makes_the_same_pairs(behaviour, mini_gpt2):
    names: dict = {}
    exec(behaviour.code(), names)
    pairs = behaviour.pairs(mini_gpt2)
    assert torch.equal(names["pairs"].clean, pairs.clean)
    assert torch.equal(names["pairs"].answers, pairs.answers)
