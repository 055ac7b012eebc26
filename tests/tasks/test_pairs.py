"""Prompt pairs: what lines up is taken, what does not is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import PromptPairs
from interp.errors import OptionError, TaskError
from tests.small_pairs import refused

CLEAN = ["w0 w1 w2", "w3 w4 w5 w6 w7"]
CORRUPT = ["w0 w8 w2", "w3 w9 w5 w6 w8"]


@pytest.fixture
def pairs(tiny):
    return PromptPairs.from_text(
        tiny("gpt2"), clean=CLEAN, corrupt=CORRUPT, answers=[" w1", [" w2", " w3"]], wrong_answers=[[" w8", " w9"], " w9"]
    )  # fmt: skip


@pytest.fixture
def from_text(tiny):
    """`PromptPairs.from_text` of one good pair, with some of it replaced."""

    def make(name: str = "gpt2", **changed) -> PromptPairs:
        good = {"clean": ["w0 w1"], "corrupt": ["w0 w2"], "answers": [" w1"], "wrong_answers": [" w2"]}
        return PromptPairs.from_text(tiny(name), **(good | changed))

    return make


# ------------------------------------------------------------------------------------------------------------ what is made


def test_ids_are_those_the_model_makes_of_the_text(pairs, tiny):
    model = tiny("gpt2")
    for side, texts in (("clean", CLEAN), ("corrupt", CORRUPT)):
        for row, text in enumerate(texts):
            ids = model.to_tokens(text)[0]
            assert torch.equal(pairs.tokens(side)[row, : len(ids)], ids)
            assert pairs.lengths[row] == len(ids)
    assert torch.equal(pairs.clean, model.to_tokens(CLEAN))


def test_every_prompt_is_read_at_its_own_last_token(pairs, tiny):
    model = tiny("gpt2")
    last = model(pairs.clean, read_at=pairs.read_at)
    for row, text in enumerate(CLEAN):
        torch.testing.assert_close(last[row], model(text)[0, -1])


def test_padding_is_no_token_and_never_differs(pairs):
    assert pairs.is_token.sum(1).tolist() == pairs.lengths.tolist()
    assert not pairs.differs[~pairs.is_token].any()
    assert pairs.differs.nonzero().tolist() == [[0, 2], [1, 2], [1, 5]]


def test_several_answers_are_filled_with_minus_one(pairs, tiny):
    one = tiny("gpt2").to_single_token
    assert pairs.answers.tolist() == [[one(" w1"), -1], [one(" w2"), one(" w3")]]
    assert pairs.wrong_answers.tolist() == [[one(" w8"), one(" w9")], [one(" w9"), -1]]


def test_token_strings_are_those_of_the_clean_prompts(pairs):
    assert pairs.token_strings == (("<bos>", "w0", " w1", " w2"), ("<bos>", "w3", " w4", " w5", " w6", " w7"))


def test_a_single_text_is_a_set_of_one(from_text):
    assert torch.equal(from_text(clean="w0 w1", corrupt="w0 w2", answers=" w1").clean, from_text().clean)


def test_answers_may_be_token_ids(from_text):
    assert from_text(answers=[[7, 9]], wrong_answers=[8]).answers.tolist() == [[7, 9]]


def test_wrong_answers_may_be_left_out(from_text):
    assert from_text(wrong_answers=None).wrong_answers is None


def test_bos_follows_the_model_unless_asked_otherwise(from_text):
    assert from_text().clean.shape == (1, 3)
    assert from_text(prepend_bos=False).clean.shape == (1, 2)
    assert from_text("qwen3").clean.shape == (1, 2)
    assert from_text("qwen3", prepend_bos=True).clean.shape == (1, 3)


def test_pairs_are_made_from_ids_alone():
    pairs = PromptPairs(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 5], [3, 6]]), torch.tensor([2, 4]))
    assert pairs.answers.shape == (2, 1)
    assert pairs.read_at.tolist() == [1, 1]
    assert pairs.is_token.all()
    assert len(pairs) == 2
    assert repr(pairs) == "PromptPairs(pairs: 2 prompts x 2 tokens, corruption given, metric logit_diff)"


def test_a_plain_pair_needs_no_hooks(pairs):
    assert pairs.hooks("clean") == pairs.hooks("corrupt") == []


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5), seed=st.integers(0, 999), swap=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_words_swapped_for_words_always_line_up(tiny, lengths, seed, swap):
    words = [[f"w{(seed + 3 * row + i) % 30}" for i in range(n)] for row, n in enumerate(lengths)]
    swapped = [[f"w{(int(w[1:]) + 1) % 30}" if i == swap else w for i, w in enumerate(row)] for row in words]
    pairs = PromptPairs.from_text(
        tiny("gpt2"), clean=[" ".join(r) for r in words], corrupt=[" ".join(r) for r in swapped],
        answers=[" w0"] * len(words),
    )  # fmt: skip
    expected = [[swap + 1] if swap < len(row) else [] for row in words]  # after the beginning-of-sequence token
    assert [row.nonzero().flatten().tolist() for row in pairs.differs] == expected


# -------------------------------------------------------------------------------------------------------- taking some


@pytest.mark.parametrize(
    ("rows", "expected"), [([1], [1]), (slice(0, 1), [0]), (torch.tensor([1, 0]), [1, 0]), (torch.tensor([False, True]), [1])]
)  # fmt: skip
def test_some_pairs_are_those_rows(rows, expected, pairs):
    some = pairs.take(rows)
    for name in ("clean", "corrupt", "answers", "wrong_answers", "lengths", "differs"):
        assert torch.equal(getattr(some, name), getattr(pairs, name)[expected])
    assert some.token_strings == tuple(pairs.token_strings[i] for i in expected)
    assert (some.name, some.metric, some.corruption) == (pairs.name, pairs.metric, pairs.corruption)


def test_no_pairs_cannot_be_taken(pairs):
    with pytest.raises(TaskError, match="no prompts"):
        pairs.take([])


def test_chunks_are_the_pairs_again(pairs):
    many = pairs.take([0, 1, 0, 1, 1])
    chunks = many.chunks(2)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([chunk.clean for chunk in chunks]), many.clean)
    assert many.chunks(None) == [many]
    with pytest.raises(OptionError, match="at least 1 prompt, not 0"):
        many.chunks(0)


# -------------------------------------------------------------------------------------------------------------- errors


def test_prompts_of_unequal_length_are_named(tiny):
    clean = ["w0 w1", "w0 w1 w2", "w0 w1", "w0"]
    corrupt = ["w0 w1", "w0 w1", "w0 w2", "w0 w1"]
    with pytest.raises(
        TaskError, match=r"differ in length on prompts 1, 3: prompt 1 is 4 tokens clean and 3 corrupt"
    ) as e:
        PromptPairs.from_text(tiny("gpt2"), clean=clean, corrupt=corrupt, answers=[" w1"] * 4)
    assert "'w0 w1 w2' / 'w0 w1'" in str(e.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": [], "corrupt": [], "answers": [], "wrong_answers": None}, "no prompts"),
        ({"clean": [""], "corrupt": [""], "prepend_bos": False}, "no prompts"),
        ({"corrupt": ["w0 w2", "w0 w3"]}, "2 corrupt prompts for 1 clean prompts"),
        ({"answers": [" w1", " w2"]}, "2 answers for 1 clean prompts"),
        ({"wrong_answers": []}, "0 wrong answers for 1 clean prompts"),
        ({"answers": [[]]}, "no answers for prompts 0"),
        ({"answers": [" w1 w2"]}, r"answer ' w1 w2' is 2 tokens \[' w1', ' w2'\], not one \(prompt 'w0 w1'\)"),
        ({"answers": [""]}, r"answer '' is 0 tokens \[\], not one"),
        ({"answers": [" Mary"]}, "Mary'?: not in the model's vocabulary"),
        (
            {"clean": ["w0 Mary and John"], "corrupt": ["w0 w1 w2 w3"]},
            "Mary.*and.*John.*: not in the model's vocabulary",
        ),
        ({"corrupt": ["w0 Mary"]}, r"Mary'?: not in the model's vocabulary \(prompt 'w0 Mary'\)"),
    ],
)
def test_what_cannot_be_a_pair_is_named(changed, message, from_text):
    with pytest.raises(TaskError, match=message):
        from_text(**changed)


@pytest.mark.parametrize("token", [64, -2])
def test_an_answer_outside_the_vocabulary_is_named(token, from_text):
    with pytest.raises(TaskError, match=f"{token}"):
        from_text(answers=[token])


def test_an_answer_that_joins_its_prompt_is_refused(gpt2_words):
    with pytest.raises(TaskError, match=r"answer 'ary' changes how its prompt 'Call M' is tokenized: .*a space"):
        PromptPairs.from_text(gpt2_words, clean="Call M", corrupt="Call J", answers="ary")


def test_the_end_of_a_year_is_a_token_of_its_own(gpt2_words):
    """ " 1280" happens to be one token of GPT-2's, but after " 12" the model says it as "80" all the same."""
    years = [f"{year:02d}" for year in range(100)]
    pairs = PromptPairs.from_text(gpt2_words, clean="from 1235 to 12", corrupt="from 1201 to 12", answers=[years])
    assert gpt2_words.tokenizer.decode(pairs.answers[0].tolist()) == "".join(years)


def test_gpt2s_end_token_is_no_unknown_word(gpt2_words):
    assert gpt2_words.tokenizer.unk_token_id == gpt2_words.tokenizer.eos_token_id
    pairs = PromptPairs.from_text(gpt2_words, clean="A<|endoftext|>", corrupt="B<|endoftext|>", answers=" Mary")
    assert pairs.answers.tolist() == [[5335]]


def test_a_model_without_a_tokenizer_cannot_read_text(tiny):
    model = tiny("gpt2")
    bare = SimpleNamespace(cfg=model.cfg, tokenizer=None, W_E=model.W_E)
    with pytest.raises(ValueError, match="no tokenizer"):
        PromptPairs.from_text(bare, clean="w0", corrupt="w1", answers=" w1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corrupt": torch.zeros(2, 4, dtype=torch.long)}, r"clean prompts are \[2, 3\] .* corrupt ones \[2, 4\]"),
        ({"clean": torch.zeros(0, 3, dtype=torch.long)}, "no prompts"),
        ({"clean": torch.zeros(3, dtype=torch.long)}, "no prompts|prompt, position"),
        ({"answers": torch.tensor([1])}, "1 answers for 2 prompts"),
        ({"answers": torch.tensor([[1], [-1]])}, "no answers for prompts 1"),
        ({"wrong_answers": torch.tensor([[-1, -1], [-1, -1]])}, "no wrong answers for prompts 0, 1"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changed, message):
    good = {
        "clean": torch.zeros(2, 3, dtype=torch.long), "corrupt": torch.ones(2, 3, dtype=torch.long),
        "answers": torch.tensor([1, 2]),
    }  # fmt: skip
    PromptPairs(**good)
    with refused(TaskError, message):
        PromptPairs(**(good | changed))
