"""The prompt generators: deterministic, answers distinct, and pairs that line up token by token on GPT-2."""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from interp.tasks import words
from interp.tasks.examples import Example, Task, pick_other

NAMES = ("ioi", "greater_than", "capitals", "gendered_pronoun", "subject_verb", "induction", "docstring")
TASKS: dict[str, Task] = {name: importlib.import_module(f"interp.tasks.{name}").TASK for name in NAMES}
CASES = [(name, corruption) for name, task in TASKS.items() for corruption in task.corruptions]
GPT2 = Path(__file__).resolve().parents[3] / "shared/data/models/gpt2_bpe/GPT2"

seeds = st.integers(min_value=0, max_value=2**32)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not GPT2.exists():
        pytest.skip("GPT-2's vocabulary is not beside the checkout")
    tokenizer = Tokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def example_of(name: str, corruption: str, seed: int) -> Example:
    return TASKS[name].example(random.Random(seed), corruption=corruption, template=seed % TASKS[name].n_templates)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_describes_itself(name: str):
    task = TASKS[name]
    assert task.name == name
    assert "\n" not in task.summary
    assert task.metric in ("logit_diff", "probability_diff")
    assert task.default_corruption in task.corruptions
    assert all(task.corruptions.values())


@pytest.mark.parametrize(("name", "corruption"), CASES)
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_same_seed_gives_the_same_example(name: str, corruption: str, seed: int):
    example = example_of(name, corruption, seed)
    assert example == example_of(name, corruption, seed)
    assert example.clean != example.corrupt
    assert example.answers
    assert example.wrong_answers
    assert not set(example.answers) & set(example.wrong_answers)


@pytest.mark.parametrize(("name", "corruption"), CASES)
@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_pairs_line_up_on_gpt2(gpt2: Tokenizer, name: str, corruption: str, seed: int):
    example = example_of(name, corruption, seed)
    clean, corrupt = (gpt2.encode(text).tokens for text in (example.clean, example.corrupt))
    assert len(clean) == len(corrupt)
    # What differs are single words or numbers, never how the text around them is split.
    assert all(re.fullmatch(r"Ġ?\w+", token) for a, b in zip(clean, corrupt, strict=True) if a != b for token in (a, b))
    assert all(len(gpt2.encode(answer).ids) == 1 for answer in example.answers + example.wrong_answers)


@pytest.mark.parametrize("name", NAMES)
def test_random_templates_reach_all_and_a_fixed_one_keeps_the_words(name: str):
    task = TASKS[name]
    fixed = {task.example(random.Random(1), template=i).clean for i in range(task.n_templates)}
    assert len(fixed) == task.n_templates
    # A random template is one of those, with the very same words in it.
    assert task.example(random.Random(1)).clean in fixed


@pytest.mark.parametrize("name", NAMES)
def test_unknown_choices_are_refused_by_name(name: str):
    task = TASKS[name]
    with pytest.raises(ValueError, match=f"no corruption 'nonsense'; it has '{task.default_corruption}'"):
        task.example(random.Random(0), corruption="nonsense")
    with pytest.raises(ValueError, match=f"templates 0 to {task.n_templates - 1}, not 99"):
        task.example(random.Random(0), template=99)


WORD_LISTS = {key: value for key, value in vars(words).items() if key.isupper() and isinstance(value, tuple)}


@pytest.mark.parametrize("key", WORD_LISTS)
def test_words_are_single_gpt2_tokens(gpt2: Tokenizer, key: str):
    plurals = tuple(map(words.plural, words.NOUNS)) if key == "NOUNS" else ()
    values = tuple(words.CAPITALS.values()) if key == "COUNTRIES" else ()
    assert len(set(WORD_LISTS[key])) == len(WORD_LISTS[key])
    assert [word for word in WORD_LISTS[key] + plurals + values if len(gpt2.encode(f" {word}").ids) != 1] == []


def test_merged_years_are_exactly_those_gpt2_merges(gpt2: Tokenizer):
    from interp.tasks.greater_than import MERGED_YEARS

    for century, merged in MERGED_YEARS.items():
        tokens = {year: gpt2.encode(f" {century}{year:02d}").tokens for year in range(100)}
        assert {year for year in tokens if tokens[year] != [f"Ġ{century}", f"{year:02d}"]} == merged


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_ioi_repeats_the_subject_and_each_corruption_does_what_it_says(seed: int):
    flip, abc, new = (example_of("ioi", name, seed) for name in ("s2_io_flip", "abc", "random_names"))

    def names(text: str) -> list[str]:
        return [word for word in re.findall(r"[A-Z][a-z]+", text) if word in words.NAMES]

    first, second, giver = names(flip.clean)
    io = flip.answers[0].strip()
    assert flip.clean == abc.clean == new.clean
    assert {io, giver} == {first, second}
    assert flip.wrong_answers == (f" {giver}",)
    assert names(flip.corrupt) == [first, second, io]
    assert names(abc.corrupt)[:2] == [first, second]
    assert names(abc.corrupt)[2] not in (first, second)
    assert not set(names(new.corrupt)) & {first, second}
    assert len(set(names(new.corrupt))) == 2
    assert (names(new.corrupt)[0] == names(new.corrupt)[2]) == (first == giver)


def test_both_orders_of_ioi_occur():
    examples = [example_of("ioi", "s2_io_flip", seed) for seed in range(40)]
    starts = [
        example.clean.find(example.answers[0]) < example.clean.find(example.wrong_answers[0]) for example in examples
    ]
    assert any(starts)
    assert not all(starts)


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_greater_than_answers_are_the_later_years(seed: int):
    example = example_of("greater_than", "start_01", seed)
    century, year = re.search(r"(\d\d)(\d\d)", example.clean).groups()
    assert example.clean.endswith(f" {century}")
    assert re.search(rf"{century}01", example.corrupt)
    assert example.answers + example.wrong_answers == tuple(f"{y:02d}" for y in [*range(int(year) + 1, 100)]) + tuple(
        f"{y:02d}" for y in range(int(year) + 1)
    )


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_induction_answer_follows_the_last_word_in_the_first_round(seed: int):
    copied, fresh = (example_of("induction", name, seed) for name in ("first_occurrence", "no_repeat"))
    for example, text in ((copied.answers, copied.clean), (copied.wrong_answers, copied.corrupt)):
        *before, last = text.split()
        assert f" {before[before.index(last) + 1]}" == example[0]
    *before, last = fresh.corrupt.split()
    assert last not in before
    assert fresh.answers[0].strip() not in before


@pytest.mark.parametrize("number", ["opposite", "same"])
def test_the_attractor_number_can_be_chosen(number: str):
    for seed in range(50):
        example = TASKS["subject_verb"].example(random.Random(seed), attractor_number=number)
        nouns = [w for w in re.findall(r"[a-z]+", example.clean) if w in words.NOUNS or w[:-1] in words.NOUNS]
        is_plural = [noun not in words.NOUNS for noun in nouns]
        assert (is_plural[0] != is_plural[1]) == (number == "opposite")
        assert (example.answers[0] in (" are", " were", " have")) == is_plural[0]


def test_words_can_be_restricted():
    example = TASKS["ioi"].example(random.Random(0), names=("Anna", "Tom"), places=("park",), objects=("hat",))
    assert "park" in example.clean
    assert "hat" in example.clean
    assert {*example.answers, *example.wrong_answers} == {" Anna", " Tom"}
    with pytest.raises(ValueError, match="no word is left: all of Anna are taken"):
        pick_other(random.Random(0), ("Anna",), "Anna")
    with pytest.raises(ValueError, match="none of the years"):
        TASKS["greater_than"].example(random.Random(0), years=(0, 1))
    with pytest.raises(ValueError, match="length - 1 = 3, not 4"):
        TASKS["induction"].example(random.Random(0), length=4, repeated=4)


def test_generators_do_not_import_torch():
    imports = "; ".join(f"import interp.tasks.{name}" for name in NAMES)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=True)
