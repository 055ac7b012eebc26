"""Other corruptions: what they put where, exactly."""

import pytest
import torch

from interp import PromptPairs, corrupt
from interp.errors import TaskError
from interp.model.run import logits_at
from tests.small_pairs import refused

KINDS = ("gaussian", "zero", "mean", "resample")
EMBEDDING_KINDS = ("gaussian", "zero", "mean")


@pytest.fixture
def pairs(tiny) -> PromptPairs:
    """Six pairs of two lengths; the third word differs."""
    clean = [f"w{i} w9 w{10 + i} w7" for i in range(4)] + [f"w{i} w9 w{10 + i}" for i in (4, 5)]
    swapped = [text.replace(f"w{10 + i}", f"w{20 + i}") for i, text in enumerate(clean)]
    return PromptPairs.from_text(
        tiny("gpt2"), clean=clean, corrupt=swapped, answers=[" w1"] * 6, wrong_answers=[" w2"] * 6
    )  # fmt: skip


def embeddings(model, pairs: PromptPairs) -> torch.Tensor:
    return model.W_E[pairs.clean]


# ----------------------------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("kind", KINDS)
def test_clean_prompts_and_answers_stay(kind, pairs, tiny):
    other = corrupt(tiny("gpt2"), pairs, kind)
    for name in ("clean", "answers", "wrong_answers", "lengths"):
        assert torch.equal(getattr(other, name), getattr(pairs, name))
    assert other.token_strings == pairs.token_strings
    assert other.corruption.startswith(kind)
    assert other.seed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_the_tokens_that_differ_are_corrupted(kind, pairs, tiny):
    assert torch.equal(corrupt(tiny("gpt2"), pairs, kind).differs, pairs.differs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_corrupt_run_is_the_clean_run_before_the_corrupted_token(kind, pairs, tiny):
    model = tiny("gpt2")
    other = corrupt(model, pairs, kind)
    with model.hooks(fwd_hooks=other.hooks("corrupt")):
        logits = model(other.tokens("corrupt"))
    assert torch.equal(logits[:, :3], model(pairs.clean)[:, :3])
    assert (logits[:, 3] - model(pairs.clean)[:, 3]).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_or_a_text_says_which_tokens(kind, pairs, tiny):
    model = tiny("gpt2")
    mask = torch.zeros_like(pairs.clean, dtype=torch.bool)
    mask[:, 1:4] = True
    assert torch.equal(corrupt(model, pairs, kind, tokens=mask).differs | mask, mask)
    if kind != "resample":  # all prompts have the same word there: nothing else to borrow
        named = corrupt(model, pairs, kind, tokens="w9").differs
        assert named.nonzero().tolist() == [[row, 2] for row in range(6)]
        assert torch.equal(corrupt(model, pairs, kind, tokens=" w9 ").differs, named)


@pytest.mark.parametrize("kind", EMBEDDING_KINDS)
def test_padding_is_never_corrupted(kind, pairs, tiny):
    everything = corrupt(tiny("gpt2"), pairs, kind, tokens=torch.ones_like(pairs.clean, dtype=torch.bool))
    assert torch.equal(everything.differs, pairs.is_token)


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_corrupted_pairs_are_those_rows(kind, pairs, tiny):
    model = tiny("gpt2", torch.float64)
    other = corrupt(model, pairs, kind)
    some = other.take([4, 1])
    runs = [logits_at(model, p.tokens("corrupt"), p.read_at, p.hooks("corrupt")) for p in (other, some)]
    torch.testing.assert_close(runs[1], runs[0][[4, 1]])


# ------------------------------------------------------------------------------------------------------------ each by itself


@pytest.mark.parametrize("kind", EMBEDDING_KINDS)
def test_the_corrupt_run_has_these_embeddings(kind, pairs, tiny):
    model = tiny("gemma2")  # which scales its embeddings: the hook holds what enters the stream
    pairs = PromptPairs(pairs.clean, pairs.corrupt, pairs.answers, lengths=pairs.lengths)
    clean = model.run_with_cache(pairs.clean, names_filter="hook_embed")[1]["hook_embed"]
    torch.testing.assert_close(clean, model.W_E[pairs.clean] * model.cfg.embed_scale)
    other = corrupt(model, pairs, kind, seed=3)
    with model.hooks(fwd_hooks=other.hooks("corrupt")):
        _, cache = model.run_with_cache(other.tokens("corrupt"), names_filter="blocks.0.hook_resid_pre")
    entered, differs = cache["blocks.0.hook_resid_pre"], pairs.differs
    assert torch.equal(entered[~differs], clean[~differs])
    if kind == "zero":
        assert not entered[differs].any()
    elif kind == "mean":
        torch.testing.assert_close(entered[differs], clean[differs].mean(0).expand_as(entered[differs]))
    else:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
        expected = clean + 3 * clean[pairs.is_token].std() * noise
        torch.testing.assert_close(entered[differs], expected[differs])


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_gaussian_noise_has_k_standard_deviations(k, tiny):
    model = tiny("gpt2")
    tokens = torch.randint(4, 60, (60, 20), generator=torch.Generator().manual_seed(0))
    pairs = PromptPairs(tokens, (tokens + 1) % 60, tokens[:, :1])
    noise = (corrupt(model, pairs, "gaussian", k=k, seed=1).embedding_noise - embeddings(model, pairs)).flatten()
    scale = k * embeddings(model, pairs).std()
    assert noise.std() == pytest.approx(scale.item(), rel=0.02)
    assert noise.mean().abs() < 5 * scale / len(noise) ** 0.5
    assert (noise.abs() < scale).float().mean() == pytest.approx(0.6827, abs=0.01)


def test_gaussian_noise_is_repeatable_by_seed(pairs, tiny):
    state = torch.get_rng_state()
    once, again, other = (corrupt(tiny("gpt2"), pairs, "gaussian", seed=s).embedding_noise for s in (4, 4, 5))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_gaussian_noise_is_the_same_at_every_precision(pairs, tiny):
    single, double = (corrupt(tiny("gpt2", d), pairs, "gaussian", seed=1) for d in (torch.float32, torch.float64))
    assert double.embedding_noise.dtype == torch.float64
    torch.testing.assert_close(single.embedding_noise.double(), double.embedding_noise, rtol=1e-5, atol=1e-5)


def test_gaussian_says_its_k(pairs, tiny):
    assert corrupt(tiny("gpt2"), pairs, "gaussian", k=2.5).corruption == "gaussian(k=2.5)"


def test_no_noise_is_the_clean_run(pairs, tiny):
    other, model = corrupt(tiny("gpt2"), pairs, "gaussian", k=0.0), tiny("gpt2")
    with model.hooks(fwd_hooks=other.hooks("corrupt")):
        assert torch.equal(model(other.tokens("corrupt")), model(pairs.clean))


def test_resampled_tokens_come_from_another_prompt_of_that_length(pairs, tiny):
    other = corrupt(tiny("gpt2"), pairs, "resample", seed=2)
    assert other.hooks("corrupt") == []
    for row in range(6):
        borrowed = other.corrupt[row, 3]
        donors = [r for r in range(6) if r != row and pairs.lengths[r] == pairs.lengths[row]]
        assert borrowed in pairs.clean[donors, 3]
        assert borrowed != pairs.clean[row, 3]
    assert torch.equal(other.corrupt[~pairs.differs], pairs.clean[~pairs.differs])


def test_resampling_is_repeatable_by_seed(pairs, tiny):
    drawn = [corrupt(tiny("gpt2"), pairs, "resample", seed=s).corrupt for s in (0, 0, 1, 2, 3)]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])


@pytest.mark.parametrize("first", EMBEDDING_KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_corruption_can_be_replaced_by_another(first, second, pairs, tiny):
    model = tiny("gpt2")
    twice = corrupt(model, corrupt(model, pairs, first), second, seed=1)
    once = corrupt(model, pairs, second, seed=1)
    assert torch.equal(twice.corrupt, once.corrupt)
    assert torch.equal(twice.differs, once.differs)
    assert (twice.embedding_noise is None) == (once.embedding_noise is None)
    if once.embedding_noise is not None:
        assert torch.equal(twice.embedding_noise[once.differs], once.embedding_noise[once.differs])


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_kind_is_named_with_its_neighbour(pairs, tiny):
    with refused(TaskError, r"'gausian' is not a corruption .*did you mean 'gaussian'"):
        corrupt(tiny("gpt2"), pairs, "gausian")


def test_a_text_that_is_not_there_names_its_prompts(pairs, tiny):
    with pytest.raises(TaskError, match=r"nothing to corrupt in prompts \[0, 1, 2, 3, 4\]: 'w29' is not in them"):
        corrupt(tiny("gpt2"), pairs, "zero", tokens="w29")
    with pytest.raises(TaskError, match=r"prompts \[1, 2, 3, 4, 5\]: 'w0'"):
        corrupt(tiny("gpt2"), pairs, "zero", tokens="w0")


def test_equal_prompts_leave_nothing_to_corrupt(tiny):
    same = PromptPairs.from_text(tiny("gpt2"), clean=["w1 w2"], corrupt=["w1 w2"], answers=[" w3"])
    with pytest.raises(TaskError, match=r"prompts \[0\]: their clean and corrupt prompts are equal"):
        corrupt(tiny("gpt2"), same, "gaussian")
    assert corrupt(tiny("gpt2"), same, "zero", tokens="w2").differs.sum() == 1


def test_a_mask_of_another_shape_is_refused(pairs, tiny):
    with pytest.raises(TaskError, match=r"the mask is \[2, 2\], the prompts \[6, 5\]"):
        corrupt(tiny("gpt2"), pairs, "zero", tokens=torch.ones(2, 2, dtype=torch.bool))


def test_a_prompt_alone_has_nobody_to_borrow_from(pairs, tiny):
    with pytest.raises(TaskError, match="no other prompt to borrow tokens from for prompt 0"):
        corrupt(tiny("gpt2"), pairs.take([0, 4]), "resample")
