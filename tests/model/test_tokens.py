"""Text to token ids and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.model import tokens as tok
from tests.families import BOS, PAD, letter_tokenizer, word_tokenizer

WORDS, LETTERS = word_tokenizer(), letter_tokenizer()
sentences = st.lists(st.integers(0, 29), min_size=1, max_size=8).map(lambda ws: " ".join(f"w{i}" for i in ws))
letters = st.text("abcdefghijklmnopqrstuvwxyz0123456789 ", min_size=1, max_size=20)


@given(sentences)
def test_the_strings_of_the_tokens_are_the_text_words(text):
    ids = tok.ids_of(WORDS, text, prepend_bos=False)
    assert "".join(tok.token_strings(WORDS, ids)) == text


@given(letters)
def test_the_strings_of_the_tokens_are_the_text_letters(text):
    ids = tok.ids_of(LETTERS, text, prepend_bos=False)
    assert "".join(tok.token_strings(LETTERS, ids)) == text


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40))
def test_the_strings_of_gpt2s_tokens_are_the_text(gpt2_tokenizer, text):
    ids = tok.ids_of(gpt2_tokenizer, text, prepend_bos=False)
    assert "".join(tok.token_strings(gpt2_tokenizer, ids)) == text


@pytest.mark.parametrize("text", ["don't  stop", " n't", "a . b , c !", "it 's"])
def test_decoding_tidies_nothing_away(text, gpt2_tokenizer):
    assert "".join(tok.token_strings(gpt2_tokenizer, tok.ids_of(gpt2_tokenizer, text, prepend_bos=False))) == text


def test_a_sentencepiece_token_keeps_its_leading_space(stories):
    strings = stories.to_str_tokens("Once upon a time", prepend_bos=False)
    assert strings == [" Once", " upon", " a", " time"]  # that tokenizer begins every text with a space
    for string in strings:
        token = stories.to_single_token(string)
        assert stories.to_str_tokens(torch.tensor([token])) == [string]


def test_bos_comes_once_or_not_at_all(tiny, stories):
    for model, text in ((tiny("llama"), "w1 w2"), (stories, "Once upon")):
        with_bos, without = model.to_tokens(text, prepend_bos=True), model.to_tokens(text, prepend_bos=False)
        assert with_bos[0, 0] == model.tokenizer.bos_token_id
        assert torch.equal(with_bos[:, 1:], without)
        assert (without != model.tokenizer.bos_token_id).all()
        assert torch.equal(model.to_tokens(text), with_bos if model.cfg.prepend_bos else without)


def test_a_model_trained_without_bos_gets_none(tiny):
    assert not tiny("qwen3").cfg.prepend_bos
    assert tiny("qwen3").to_tokens("w1 w2").shape == (1, 2)


def test_a_tokenizer_that_adds_bos_by_itself_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )  # fmt: skip
    assert tokenizer.encode("w1 w2").count(BOS) == 1
    assert tok.ids_of(tokenizer, "w1 w2", prepend_bos=True).count(BOS) == 1
    assert tok.ids_of(tokenizer, "w1 w2", prepend_bos=False).count(BOS) == 0


@given(st.lists(st.lists(st.integers(4, 60), max_size=6), min_size=1, max_size=5))
def test_padding_is_on_the_right(rows):
    padded = tok.pad(rows, PAD)
    assert padded.shape == (len(rows), max(map(len, rows)))
    assert padded.dtype == torch.long
    for row, line in zip(rows, padded.tolist(), strict=True):
        assert line[: len(row)] == row
        assert set(line[len(row) :]) <= {PAD}


def test_several_texts_are_one_tensor():
    ids = tok.encode(WORDS, ["w1 w2 w3", "w4"], prepend_bos=True)
    assert ids.shape == (2, 4)
    assert ids[1].tolist() == [BOS, tok.ids_of(WORDS, "w4", prepend_bos=False)[0], PAD, PAD]


def test_the_padding_id_is_pad_then_end_then_zero(gpt2_tokenizer):
    assert tok.pad_id(WORDS) == PAD
    assert tok.pad_id(gpt2_tokenizer) == gpt2_tokenizer.eos_token_id == 50256
    assert tok.pad_id(None) == 0


def test_a_single_token_is_that_of_running_text(gpt2_tokenizer):
    assert tok.single_token(gpt2_tokenizer, " Mary") == 5335
    assert tok.single_token(WORDS, " w3") == WORDS.convert_tokens_to_ids(" w3")
    with pytest.raises(ValueError, match=r"' Maryland sheep' is 2 tokens \[' Maryland', ' sheep'\], not one"):
        tok.single_token(gpt2_tokenizer, " Maryland sheep")
    with pytest.raises(ValueError, match="is 0 tokens"):
        tok.single_token(gpt2_tokenizer, "")


@given(token=st.integers(0, 50255))
def test_every_text_of_a_token_finds_its_token(gpt2_tokenizer, token):
    text = tok.token_strings(gpt2_tokenizer, [token])[0]
    if not text.startswith(" ") or not text[1:].isalpha():
        return  # bytes of a character, or text that joins what stands before it
    assert tok.single_token(gpt2_tokenizer, text) == token


def test_without_a_tokenizer_there_is_no_text():
    with pytest.raises(ValueError, match="no tokenizer: pass token ids"):
        tok.ids_of(None, "text", prepend_bos=False)
    assert tok.token_strings(None, [3, 4]) == ["3", "4"]
