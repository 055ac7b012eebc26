"""Texts, tokens and activations to train on.

Held against: `run_with_cache` on each sequence alone; windows cut by hand; a tokenizer that takes one character for one token.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError, SiteError, TaskError
from interp.features.sources import ArraySource, Corpus, ModelSource, Source, read_texts
from tests.small_pairs import refused

TEXTS = [
    "The friends Megan and Edward walked to the house. They saw a book.",
    "She was late.",
    "Anna went to the hotel with George. George decided to give a key to Anna.",
    "People who visit the capital of Norway go to Oslo.",
]
RESID, HEADS, MLP = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z", "blocks.3.mlp.hook_post"
BOS = 0


def speller(prepend_bos: bool, n_ctx: int = 100) -> SimpleNamespace:
    """As much of a model as `Corpus` asks for; a character is a token, and "~" would be the first of a text."""

    def tokenizer(text: str, *, add_special_tokens: bool, verbose: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    tokenizer.bos_token_id = ord("~")
    return SimpleNamespace(cfg=SimpleNamespace(prepend_bos=prepend_bos, n_ctx=n_ctx), tokenizer=tokenizer)


def windows(corpus: Corpus) -> list[str]:
    return ["".join(map(chr, row[:n])) for row, n in zip(corpus.tokens.tolist(), corpus.lengths.tolist(), strict=True)]


@pytest.fixture(scope="module")
def corpus(mini_gpt2) -> Corpus:
    return Corpus.from_texts(mini_gpt2, TEXTS, context=16)


# ------------------------------------------------------------------------------------------------------------- corpus


@pytest.mark.parametrize(
    ("bos", "context", "expected"),
    [
        (True, 5, ["~abcd", "~efgh", "~xy", "~klmn"]),
        (False, 4, ["abcd", "efgh", "xy", "klmn"]),
        (True, 6, ["~abcde", "~fgh", "~xy", "~klmn"]),
        (False, 7, ["abcdefg", "xy", "klmn"]),
        (True, 1000, ["~abcdefgh", "~xy", "~klmn"]),
    ],
)
def test_windows_by_hand(bos, context, expected):
    """One text of eight tokens, one of one, an empty one, one of two, one of four."""
    corpus = Corpus.from_texts(speller(bos), ["abcdefgh", "i", "", "xy", "klmn"], context=context)
    assert windows(corpus) == expected
    for row, n in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        assert (row[n:] == 0).all()
    assert corpus.tokens.shape[1] == max(len(window) for window in expected)


@given(
    st.lists(st.text("abcdef", max_size=12), min_size=1, max_size=6), st.booleans(), st.integers(3, 9),
    st.integers(3, 9),
)  # fmt: skip
@settings(deadline=None)
def test_texts_are_cut_and_never_joined(texts, bos, context, n_ctx):
    texts = [f"{chr(ord('A') + i)}{text}" if text else "" for i, text in enumerate(texts)]
    model, width = speller(bos, n_ctx), min(context, n_ctx) - bos
    pieces = [text[at : at + width] for text in texts for at in range(0, len(text), width)]
    expected = ["~" * bos + piece for piece in pieces if len(piece) > 1]
    if not expected:
        with refused(TaskError, "no text in x is two tokens long|there is no text in x"):
            Corpus.from_texts(model, texts, context=context, name="x")
    else:
        assert windows(Corpus.from_texts(model, texts, context=context, name="x")) == expected


@pytest.mark.parametrize("name", ["mini_gpt2", "mini_llama"])
def test_every_window_begins_as_the_model_wants(name, request):
    model = request.getfixturevalue(name)
    corpus = Corpus.from_texts(model, [" ".join(TEXTS), TEXTS[1]], context=16)
    assert model.cfg.prepend_bos
    assert (corpus.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    ids = [i for row, n in zip(corpus.tokens.tolist(), corpus.lengths.tolist(), strict=True) for i in row[1:n]]
    text = model.tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    last = model.tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    cut = len(text) - (1 if len(text) % 15 == 1 else 0)  # a window of one token is dropped
    assert ids == text[:cut] + last
    assert model.tokenizer.bos_token_id not in ids


def test_a_long_text_is_cut_to_the_models_context(mini_gpt2):
    corpus = Corpus.from_texts(mini_gpt2, [" ".join(TEXTS * 10)], context=10_000)
    assert corpus.tokens.shape[1] == mini_gpt2.cfg.n_ctx


@pytest.mark.parametrize(("bos", "context"), [(True, 2), (True, 1), (False, 1), (False, 0)])
def test_a_context_without_room_is_refused(bos, context):
    with refused(OptionError, f"a context of {context} tokens holds no two"):
        Corpus.from_texts(speller(bos), ["abc"], context=context)


def test_split_keeps_some_apart(mini_gpt2):
    corpus = Corpus(torch.arange(80).view(20, 4), torch.full((20,), 4), "numbers")
    rest, kept = corpus.split(0.25, seed=3)
    assert (len(rest.tokens), len(kept.tokens)) == (15, 5)
    assert sorted([*rest.tokens[:, 0].tolist(), *kept.tokens[:, 0].tolist()]) == list(range(0, 80, 4))
    assert (rest.tokens.diff(dim=0) > 0).all()
    assert torch.equal(corpus.split(0.25, seed=3)[1].tokens, kept.tokens)
    assert not torch.equal(corpus.split(0.25, seed=4)[1].tokens, kept.tokens)
    assert len(corpus.split(0.001)[1].tokens) == 1
    with refused(TaskError, "numbers has 20 sequences, too few to keep a share of 1.0 apart"):
        corpus.split(1.0)


def test_mask_counts_tokens_that_are_there():
    corpus = Corpus(torch.tensor([[9, 5, 6, 7], [9, 6, 0, 0]]), torch.tensor([4, 2]))
    assert corpus.mask(skip_first=False).tolist() == [[True] * 4, [True, True, False, False]]
    assert corpus.mask().tolist() == [[False, True, True, True], [False, True, False, False]]
    assert corpus.mask(exclude=[6, 7]).tolist() == [[False, True, False, False], [False] * 4]


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\nline\n\n\n  two \n\n", ["one\nline", "two"]),
        ("a.json", '["one", {"text": "two", "more": 1}, " "]', ["one", "two"]),
        ("a.jsonl", '"one"\n\n{"text": "zwei\\u00e4"}\n', ["one", "zweiä"]),
    ],
)
def test_texts_of_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"one", "cannot read texts from .*a.csv: use .txt, .json or .jsonl"),
        ("a.json", b"[1, ", "a.json is not readable as json: Expecting value"),
        ("a.jsonl", b'"one"\n{"text": ', "a.jsonl is not readable as jsonl: Expecting value"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt is not readable as txt: 'utf-8' codec"),
        ("a.json", b'{"text": "one"}', 'a.json must hold a list of texts, or of objects with "text"'),
        ("a.json", b'["one", 2]', "a.json must hold a list of texts"),
        ("a.jsonl", b'{"words": "one"}', "a.jsonl must hold a list of texts"),
        ("a.txt", b" \n\n \n", "there is no text in .*a.txt"),
        ("a.json", b"[]", "there is no text in .*a.json"),
    ],
)
def test_files_without_texts_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with refused(TaskError, says):
        read_texts(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with refused(TaskError, f"there is no file {path}"):
            read_texts(path)


def test_a_corpus_of_a_file_has_its_name(mini_gpt2, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(TEXTS), encoding="utf-8")
    corpus = Corpus.from_file(mini_gpt2, path, context=16)
    assert corpus.name == "stories.json"
    assert torch.equal(corpus.tokens, Corpus.from_texts(mini_gpt2, TEXTS, context=16).tokens)


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["mini_gpt2", "mini_llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_values_are_the_models_own(request, name, batch_size):
    model = request.getfixturevalue(name)
    corpus = Corpus.from_texts(model, TEXTS, context=16)
    source = ModelSource(model, corpus, [RESID, HEADS, MLP], batch_size=batch_size)
    assert isinstance(source, Source)
    assert source.widths == {RESID: 128, HEADS: 128, MLP: model.cfg.d_mlp}
    asked = [3, 0, 4, 1, 0]
    rows = source.read(asked)
    ids, values = [], {hook: [] for hook in source.widths}
    for s in asked:
        n = int(corpus.lengths[s])
        _, cache = model.run_with_cache(corpus.tokens[s : s + 1, :n])
        for hook, of_hook in values.items():
            of_hook.append(cache[hook][0, 1:].reshape(n - 1, -1))
        ids += [[s, t] for t in range(1, n)]
    assert rows.ids.tolist() == ids
    for hook, value in rows.values.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        torch.testing.assert_close(value, torch.cat(values[hook]), rtol=1e-4, atol=1e-5)


def test_heads_lie_side_by_side(mini_gpt2, corpus):
    rows = ModelSource(mini_gpt2, corpus, [HEADS]).read([2])
    _, cache = mini_gpt2.run_with_cache(corpus.tokens[2:3])
    torch.testing.assert_close(rows.values[HEADS][4, 16 * 3 : 16 * 4], cache[HEADS][0, 5, 3], rtol=1e-4, atol=1e-5)


def test_what_is_left_out(mini_gpt2, corpus):
    """Padding always; first positions and some tokens if asked."""
    dot = mini_gpt2.tokenizer(".", add_special_tokens=False)["input_ids"][0]
    for skip_first in (True, False):
        for exclude in ([], [dot, BOS]):
            source = ModelSource(mini_gpt2, corpus, [RESID], skip_first=skip_first, exclude=exclude)
            rows = source.read(range(len(corpus.tokens)))
            expected = [
                [s, t]
                for s, n in enumerate(corpus.lengths.tolist())
                for t in range(skip_first, n)
                if int(corpus.tokens[s, t]) not in exclude
            ]
            assert rows.ids.tolist() == expected
            assert len(rows.values[RESID]) == len(expected)
            assert source.n_sequences == len(corpus.tokens)
            assert source.rows_per_sequence == max(sum(s == i for s, _ in expected) for i in range(source.n_sequences))
            assert source.about["skip_first"] is skip_first
    assert any(int(corpus.tokens[s, t]) == dot for s, n in enumerate(corpus.lengths) for t in range(n))


def test_sequences_without_a_row_give_none(mini_gpt2):
    corpus = Corpus(torch.tensor([[0, 5, 5, 0], [0, 5, 6, 7]]), torch.tensor([3, 4]))
    source = ModelSource(mini_gpt2, corpus, [RESID], exclude=[5], batch_size=1)
    assert source.read([0]).values[RESID].shape == (0, 128)
    assert source.read([1, 0, 1]).ids.tolist() == [[1, 2], [1, 3]] * 2


def test_a_model_source_says_where_it_is_from(mini_gpt2, corpus):
    about = ModelSource(mini_gpt2, corpus, [RESID]).about
    assert about == {"model_name": "mini-gpt2", "dataset_path": "texts", "context_size": 16, "prepend_bos": True,
                     "skip_first": True, "exclude_special_tokens": False}  # fmt: skip
    assert json.loads(json.dumps(about)) == about


def test_hooks_that_give_no_row_a_token_are_refused(mini_gpt2, corpus):
    with refused(SiteError, "mini-gpt2 has no hook point 'blocks.9.hook_resid_post'"):
        ModelSource(mini_gpt2, corpus, [RESID, "blocks.9.hook_resid_post"])
    with refused(SiteError, r"blocks.0.attn.hook_pattern has no activation per token: .* \[1, 8, 1, 1\]"):
        ModelSource(mini_gpt2, corpus, ["blocks.0.attn.hook_pattern"])
    with refused(TaskError, "no token of texts is left to train on"):
        ModelSource(mini_gpt2, corpus, [RESID], exclude=range(mini_gpt2.cfg.d_vocab))


# -------------------------------------------------------------------------------------------------------------- arrays


def test_rows_of_arrays():
    values = {"a": torch.arange(12.0).view(6, 2), "b": torch.arange(6.0)[:, None]}
    source = ArraySource(values)
    assert isinstance(source, Source)
    assert (source.widths, source.n_sequences, source.rows_per_sequence) == ({"a": 2, "b": 1}, 6, 1)
    rows = source.read([5, 0, 5])
    assert rows.ids.tolist() == [[5, 0], [0, 0], [5, 0]]
    assert rows.values["a"].tolist() == [[10, 11], [0, 1], [10, 11]]
    assert rows.values["b"][:, 0].tolist() == [5, 0, 5]


@pytest.mark.parametrize("sizes", [(3, 4), (0, 0)])
def test_arrays_that_are_not_aligned_are_refused(sizes):
    with refused(OptionError, f"equally many rows, at least one, and have .*'b': {sizes[1]}"):
        ArraySource({name: torch.zeros(n, 2) for name, n in zip("ab", sizes, strict=True)})
