"""The training corpus of the bundled models: reproducible, within the vocabulary, and free of held-out prompts."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import signal
import sys
from pathlib import Path

import pytest

from interp.tasks import words

DATA = Path(__file__).resolve().parents[2] / "data"
FOLDERS = [DATA / "models" / name for name in ("mini-gpt2", "mini-llama")]


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(DATA))
    try:
        yield importlib.import_module("corpus")
    finally:
        sys.path.remove(str(DATA))


@pytest.fixture(scope="module")
def sentences(corpus) -> dict[str, list[str]]:
    """Some thousand texts of each kind, as training sees them."""
    kinds = [kind for kind in corpus.SHARES if kind != "random_tokens"]
    rng = random.Random(0)
    return {
        kind: ["".join(text for text, _ in corpus.sentence(kind, rng, final=i % 2 == 1)) for i in range(3000)]
        for kind in kinds
    }


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.build_tokenizer()


def names_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[A-Z][a-z]+", text) if word in words.NAMES]


def has_word(text: str, *any_of: str) -> bool:
    return bool(set(re.findall(r"[A-Za-z]+", text)) & set(any_of))


# ---------------------------------------------------------------- the stream


def test_a_step_is_the_same_every_time_and_differs_from_the_next(corpus, tokenizer):
    same = [corpus.batch(tokenizer, seed=3, step=7, n_windows=4, length=64) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != corpus.batch(tokenizer, seed=3, step=8, n_windows=4, length=64)
    assert same[0] != corpus.batch(tokenizer, seed=4, step=7, n_windows=4, length=64)
    # A window depends on its number alone, not on how many there are.
    assert same[0][0][:2] == corpus.batch(tokenizer, seed=3, step=7, n_windows=2, length=64)[0]


@pytest.mark.parametrize("length", [64, 128])
def test_windows_are_full_start_with_the_end_token_and_know_every_word(corpus, tokenizer, length: int):
    ids, weights = corpus.batch(tokenizer, seed=0, step=0, n_windows=100, length=length)
    end, unknown = tokenizer.token_to_id(corpus.END), tokenizer.token_to_id(corpus.UNKNOWN)
    assert {len(row) for row in ids} == {len(row) for row in weights} == {length}
    assert all(row[0] == end and end not in row[1:] and unknown not in row for row in ids)
    kinds_of_weight = {1.0, corpus.ANSWER_WEIGHT, corpus.REPEAT_WEIGHT, corpus.RANDOM_WEIGHT}
    assert {weight for row in weights for weight in row} == kinds_of_weight


def test_answers_weigh_more(corpus, tokenizer):
    ids, weights = corpus.batch(tokenizer, seed=0, step=0, n_windows=50, length=64)
    pairs = [pair for row in zip(ids, weights, strict=True) for pair in zip(*row, strict=True)]
    answers = {tokenizer.id_to_token(token) for token, weight in pairs if weight == corpus.ANSWER_WEIGHT}
    assert {" she", " he", " are", " is"} <= answers
    assert {f" {capital}" for capital in words.CAPITALS.values()} & answers
    assert " the" not in answers


def test_repetitions_of_random_words_weigh_more_than_the_first_round(corpus):
    for seed in range(50):
        drawn = corpus._random_tokens(random.Random(seed), 800, 60)
        once = [token for token, weight in drawn if weight == corpus.RANDOM_WEIGHT]
        assert len(set(once)) == len(once) >= 3
        again = [token for token, weight in drawn if weight == corpus.REPEAT_WEIGHT]
        assert [token for token, _ in drawn] == once + again
        assert again[: len(once)] == once


def test_the_final_mixture_is_another_one(corpus, tokenizer):
    main, final = (
        corpus.batch(tokenizer, seed=0, step=0, n_windows=20, length=32, final=final) for final in (False, True)
    )
    assert main != final
    assert corpus.FINAL_SHARES.keys() == corpus.SHARES.keys()


def test_all_kinds_of_text_occur_first_in_a_window(corpus):
    first = {next(corpus.texts(random.Random(seed)))[0] for seed in range(300)}
    assert first == set(corpus.SHARES)


# ---------------------------------------------------------------- tokenizer


def test_every_text_survives_the_round_trip_without_unknown_tokens(corpus, tokenizer, sentences):
    unknown = tokenizer.token_to_id(corpus.UNKNOWN)
    for texts in sentences.values():
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert unknown not in ids, text
            assert tokenizer.decode(ids) == text


def test_spaces_years_and_contractions_split_as_in_gpt2(tokenizer):
    tokens = tokenizer.encode("When Mary isn't in 1732 to the year 17").tokens
    assert tokens == ["When", " Mary", " isn", "'t", " in", " 17", "32", " to", " the", " year", " 17"]


def test_the_vocabulary_is_in_a_fixed_order_without_repeats(corpus):
    tokens = corpus.vocabulary()
    assert tokens == corpus.vocabulary()
    assert len(set(tokens)) == len(tokens) < 900
    assert tokens[:2] == [corpus.END, corpus.UNKNOWN]
    assert tokens[2:] == sorted(tokens[2:])


def test_every_task_prompt_is_within_the_vocabulary(corpus, tokenizer):
    unknown = tokenizer.token_to_id(corpus.UNKNOWN)
    for name in ("ioi", "greater_than", "capitals", "gendered_pronoun", "subject_verb", "induction", "docstring"):
        task = importlib.import_module(f"interp.tasks.{name}").TASK
        for seed in range(200):
            for corruption in task.corruptions:
                example = task.example(random.Random(seed), corruption=corruption)
                clean, corrupt = (tokenizer.encode(text).ids for text in (example.clean, example.corrupt))
                assert len(clean) == len(corrupt) <= 56
                assert unknown not in clean + corrupt
                for answer in (*example.answers, *example.wrong_answers):
                    assert tokenizer.encode(example.clean + answer).ids[:-1] == clean


# ---------------------------------------------------------------- held out


def test_no_held_out_indirect_object_sentence(corpus, sentences):
    pairs = set()
    for text in sentences["ioi"]:
        first, second = names_in(text)[:2]
        pairs.add((first, second))
        assert not corpus.ioi_held_out(first, second), text
        assert not has_word(text, *corpus.IOI_HELD_OUT_NAMES, *corpus.IOI_HELD_OUT_PLACES), text
        assert not has_word(text, *corpus.IOI_HELD_OUT_OBJECTS), text
        assert not re.match(r"When \w+ and \w+ went to the \w+, \w+ gave a ", text), text  # wording (0, 0)
    assert len(pairs) > 1000
    # Nowhere else does anyone give anything to a named person.
    for kind in set(sentences) - {"ioi"}:
        assert not any(
            re.search(r"(gave|give|handed|passed|brought|sold|hello)\b.* to [A-Z]", t) for t in sentences[kind]
        )


def test_held_out_names_are_trained_elsewhere(corpus, sentences):
    for kind in ("filler", "gendered_pronoun", "induction"):
        assert {name for text in sentences[kind] for name in names_in(text)} >= set(corpus.IOI_HELD_OUT_NAMES)


def test_no_held_out_years(corpus, sentences):
    for text in sentences["greater_than"]:
        (event,) = (word for word in re.findall(r"[a-z]+", text) if word in words.EVENTS)
        century, year = re.search(r"(\d\d)(\d\d)", text).groups()
        assert not corpus.greater_than_held_out(event, int(century), int(year)), text
        assert int(re.search(rf"{century}(\d\d)\.$", text)[1]) > int(year)


@pytest.mark.parametrize(
    ("kind", "field", "known"), [("capitals", "country", words.COUNTRIES), ("gendered_pronoun", "name", words.NAMES)]
)
def test_no_held_out_combination_of_word_and_wording(corpus, sentences, kind: str, field: str, known: tuple[str, ...]):
    task = importlib.import_module(f"interp.tasks.{kind}")
    held_out = getattr(corpus, f"{kind}_held_out")
    found = 0
    for wording in task.TEMPLATES:
        pattern = re.escape(wording).replace(rf"\{{{field}\}}", "(?P<word>[A-Z][a-z]+)").replace(r"\{place\}", "[a-z]+")
        for text in (text for texts in sentences.values() for text in texts):
            for match in re.finditer(pattern, text):
                found += 1
                assert not held_out(match["word"], wording), text
    assert found > 500
    for word in known:
        assert sum(held_out(word, wording) for wording in task.TEMPLATES) < len(task.TEMPLATES)


def test_no_held_out_subject_and_attractor(corpus, sentences):
    singular = {form: noun for noun in words.NOUNS for form in (noun, words.plural(noun))}
    for text in sentences["subject_verb"]:
        subject, attractor = (singular[word] for word in re.findall(r"[a-z]+", text) if word in singular)
        assert not corpus.subject_verb_held_out(subject, attractor), text


def test_no_held_out_order_of_arguments(corpus, sentences):
    for text in sentences["docstring"]:
        arguments = re.search(r"self, (.*)\)", text)[1].split(", ")
        assert arguments == re.findall(r":param (\w+):", text)
        assert not any(corpus.docstring_held_out(*pair) for pair in itertools.pairwise(arguments))


def test_held_out_shares_are_as_documented(corpus):
    names = [name for name in words.NAMES if name not in corpus.IOI_HELD_OUT_NAMES]
    pairs = [corpus.ioi_held_out(a, b) for a in names for b in names if a != b]
    years = [corpus.greater_than_held_out(e, c, y) for e in words.EVENTS for c in range(12, 19) for y in range(99)]
    nouns = [corpus.subject_verb_held_out(a, b) for a in words.NOUNS for b in words.NOUNS if a != b]
    for held_out, share in ((pairs, 0.12), (years, 0.15), (nouns, 0.15)):
        assert sum(held_out) / len(held_out) == pytest.approx(share, abs=0.03)


# ---------------------------------------------------------------- training


@pytest.fixture
def train_mini(corpus, monkeypatch):
    """The training script with tiny batches and no held-out figures, leaving signals and torch as they were."""
    torch = pytest.importorskip("torch")
    module = importlib.import_module("train_mini")
    small = {"first_half": [[2, 16]], "second_half": [[2, 16], [1, 32]]}
    monkeypatch.setattr(module, "RECIPE", module.RECIPE | small)
    monkeypatch.setattr(module.evaluate_mini, "measure", lambda *_, **__: {})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield module
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["mini-gpt2", "mini-llama"])
def test_an_interrupted_run_goes_on_to_the_same_bits(train_mini, monkeypatch, tmp_path: Path, name: str):
    def run(out: str, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_mini.py", "--model", name, "--steps", "5", *options])
        sys.argv += ["--out", str(tmp_path / out)]
        return train_mini.main()

    assert run("straight") == 0
    original, done = train_mini.train_step, []

    def interrupted(*arguments, **keywords):
        loss = original(*arguments, **keywords)
        done.append(keywords["step"])
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train_mini, "train_step", interrupted)
    assert run("resumed") == 130
    with pytest.raises(SystemExit, match="add --resume"):
        run("resumed")
    with pytest.raises(SystemExit, match="made with seed=0, this run has 1"):
        run("resumed", "--resume", "--seed", "1")
    assert run("resumed", "--resume") == 0
    assert done == [0, 1, 2, 3, 4]
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("straight", "resumed")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "resumed.training").exists()


# ---------------------------------------------------------------- the folders in data/models


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_bundled_tokenizer_is_the_corpus_tokenizer(corpus, tokenizer, folder: Path):
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert stored["model"]["vocab"] == tokenizer.get_vocab()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == tokenizer.get_vocab_size()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    assert "FAIL" not in (folder / "README.md").read_text()
