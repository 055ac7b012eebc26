"""`load_task`: every named task, in GPT-2's own tokens."""

import pytest
import torch

from interp import METRICS
from interp.errors import OptionError, TaskError
from interp.tasks.named import TASKS, get_task, load_task

CASES = [(name, corruption) for name in TASKS for corruption in get_task(name).corruptions]


def texts(model, pairs, side: str) -> list[str]:
    rows = zip(pairs.tokens(side).tolist(), pairs.lengths.tolist(), strict=True)
    return ["".join(model.to_str_tokens(torch.tensor(row[:n]))) for row, n in rows]


@pytest.mark.parametrize(("name", "corruption"), CASES)
def test_every_task_gives_n_different_pairs(name, corruption, gpt2_words):
    pairs, task = load_task(name, gpt2_words, n=12, corruption=corruption), get_task(name)
    assert len(pairs) == 12
    assert (pairs.name, pairs.corruption, pairs.metric, pairs.seed) == (name, corruption, task.metric, 0)
    both = set(zip(texts(gpt2_words, pairs, "clean"), texts(gpt2_words, pairs, "corrupt"), strict=True))
    assert len(both) == 12
    assert pairs.differs.any(1).all()
    for right, wrong in zip(pairs.answers.tolist(), pairs.wrong_answers.tolist(), strict=True):
        assert not {t for t in right if t >= 0} & {t for t in wrong if t >= 0}
    assert METRICS[pairs.metric](gpt2_words(pairs.clean, read_at=pairs.read_at), pairs).shape == (12,)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_pairs(name, gpt2_words):
    once, again, other = (load_task(name, gpt2_words, n=6, seed=seed) for seed in (3, 3, 4))
    for field in ("clean", "corrupt", "answers", "wrong_answers"):
        assert torch.equal(getattr(once, field), getattr(again, field))
    assert texts(gpt2_words, once, "clean") != texts(gpt2_words, other, "clean")


@pytest.mark.parametrize("name", TASKS)
def test_fewer_pairs_are_the_first_of_more(name, gpt2_words):
    few, many = load_task(name, gpt2_words, n=4), load_task(name, gpt2_words, n=9)
    assert texts(gpt2_words, few, "clean") == texts(gpt2_words, many, "clean")[:4]


def test_the_default_corruption_is_the_first(gpt2_words):
    for name in TASKS:
        assert load_task(name, gpt2_words, n=1).corruption == next(iter(get_task(name).corruptions))


@pytest.mark.parametrize("kind", ["gaussian", "zero", "mean", "resample"])
def test_a_corruption_of_embeddings_acts_where_the_words_would_change(kind, gpt2_words):
    words, other = (load_task("ioi", gpt2_words, n=12, seed=1, corruption=c) for c in (None, kind))
    assert torch.equal(other.clean, words.clean)
    assert torch.equal(other.differs, words.differs)
    assert other.corruption.startswith(kind)
    assert (other.embedding_noise is None) == (kind == "resample")


def test_one_wording_or_all_of_them(gpt2_words):
    one = load_task("ioi", gpt2_words, n=20, template=1)
    assert len(set(one.lengths.tolist())) == 1
    mixed = load_task("ioi", gpt2_words, n=40, template=None)
    assert len(set(mixed.lengths.tolist())) > 1
    assert mixed.read_at.tolist() == (mixed.lengths - 1).tolist()


def test_a_bundled_model_can_say_its_tasks(mini_gpt2):
    for name in ("ioi", "greater_than", "capitals", "gendered_pronoun", "subject_verb", "induction"):
        assert len(load_task(name, mini_gpt2, n=8, template=None)) == 8


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("name", "near"), [("ioii", "ioi"), ("greater-than", "greater_than"), ("capital", "capitals")])
def test_an_unknown_task_is_named_with_its_neighbour(name, near, gpt2_words):
    with pytest.raises(TaskError, match=f"'{name}' is not a task .*did you mean '{near}'"):
        load_task(name, gpt2_words)


def test_an_unknown_corruption_is_named_with_all_there_are(gpt2_words):
    with pytest.raises(
        TaskError, match=r"'subject_numbr' is not a corruption of subject_verb .*gaussian.*did you mean"
    ):
        load_task("subject_verb", gpt2_words, corruption="subject_numbr")


@pytest.mark.parametrize("n", [0, -3])
def test_no_pairs_cannot_be_asked_for(n, gpt2_words):
    with pytest.raises(OptionError, match=f"n must be at least 1, not {n}"):
        load_task("ioi", gpt2_words, n=n)


@pytest.mark.parametrize("template", [99, -1])
def test_a_template_that_is_none_is_named(template, gpt2_words):
    with pytest.raises(OptionError, match=rf"task ioi has templates 0 to \d+, not {template}"):
        load_task("ioi", gpt2_words, template=template)


def test_more_pairs_than_there_are_cannot_be_had(gpt2_words):
    with pytest.raises(TaskError, match=r"gpt2-words: only \d+ of 5000 different gendered_pronoun pairs can be made"):
        load_task("gendered_pronoun", gpt2_words, n=5000)


def test_a_model_that_cannot_say_the_words_is_told_which(tiny):
    with pytest.raises(
        TaskError, match=r"gpt2: only 0 of 4 different ioi pairs can be made; for instance .*vocabulary"
    ):
        load_task("ioi", tiny("gpt2"), n=4)
