"""Drawing tokens.

Held against: the loop that `generate` was, an argmax loop, what stays of a distribution counted by hand, log softmax of a run.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.model.sampling import keep, sample, steps
from tests.small_pairs import refused


def prompts(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 64, (n, length), generator=torch.Generator().manual_seed(seed))


def plain_loop(model, ids, n, temperature, seed):
    """The loop of `generate` before it had a module, without the end token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        logits = model(ids)[:, -1]
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        ids = torch.cat([ids, chosen[:, None]], 1)
    return ids


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_tokens_as_the_plain_loop(tiny, family, temperature):
    model, ids = tiny(family), prompts(3, 4)
    for seed in (0, 3):
        expected = plain_loop(model, ids, 6, temperature, seed)
        drawn, _ = sample(model, ids, 6, temperature=temperature, seed=seed, stop_at_eos=False)
        assert torch.equal(drawn, expected)
        written = model.generate(ids, 6, temperature=temperature, seed=seed, stop_at_eos=False)
        assert torch.equal(written, expected)


def test_one_token_to_choose_from_is_greedy(tiny):
    model, ids = tiny("gpt2"), prompts(3, 4)
    greedy = model.generate(ids, 8)
    assert torch.equal(model.generate(ids, 8, temperature=2.0, top_k=1, seed=5), greedy)
    assert torch.equal(model.generate(ids, 8, temperature=2.0, top_p=1e-9, seed=5), greedy)
    assert torch.equal(sample(model, ids, 8, temperature=0.0, top_k=7, top_p=0.5)[0], greedy)


def test_all_tokens_to_choose_from_is_no_choice(tiny):
    model, ids = tiny("gpt2"), prompts(3, 4)
    free, logprobs = sample(model, ids, 8, seed=2)
    for options in ({"top_k": 64}, {"top_p": 1.0}, {"top_k": 10**6, "top_p": 1.0}):
        same, again = sample(model, ids, 8, seed=2, **options)
        assert torch.equal(same, free)
        torch.testing.assert_close(again, logprobs, rtol=0, atol=0, equal_nan=True)


def test_log_probabilities_are_the_models_own(tiny):
    """At temperature 1 with all tokens, however few of them could be drawn at another."""
    model, ids = tiny("llama", torch.float64), prompts(2, 5)
    drawn, logprobs = sample(model, ids, 6, temperature=0.5, top_k=3, top_p=0.9, seed=1, stop_at_eos=False)
    expected = model(drawn[:, :-1])[:, 4:].log_softmax(-1).gather(2, drawn[:, 5:, None])[:, :, 0]
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, expected)


def test_after_the_end_token_there_is_only_that(tiny):
    model = tiny("gpt2")
    eos = model.tokenizer.eos_token_id

    def end_first_row(value, hook):  # only the first row ends, at once
        value = value.clone()
        value[0] = 1e3 * model.W_U[:, eos] / model.W_U[:, eos].norm()
        value[1] = -value[0]
        return value

    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", end_first_row)]):
        ids, logprobs = sample(model, prompts(2, 3), 5)
    assert (ids[0, 3:] == eos).all()
    assert (ids[1, 3:] != eos).all()
    assert logprobs[0].isfinite().tolist() == [True, False, False, False, False]
    assert logprobs[0, 1:].isnan().all()
    assert logprobs[1].isfinite().all()


def test_the_end_of_the_context_ends_it(tiny):
    model = tiny("gpt2")
    assert sample(model, prompts(1, 60), 10, stop_at_eos=False)[1].shape == (1, 4)
    ids, logprobs = sample(model, prompts(2, 64), 10)
    assert ids.shape == (2, 64)
    assert logprobs.shape == (2, 0)


def test_what_stays_by_hand():
    p = torch.tensor([[0.0625, 0.5, 0.1875, 0.25], [0.25, 0.25, 0.25, 0.25]])
    of = lambda **options: keep(p, **options).bool().int().tolist()  # noqa: E731
    assert of(top_k=2) == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert of(top_p=0.5) == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert of(top_p=0.51) == [[0, 1, 0, 1], [1, 1, 1, 0]]
    # of the .9375 kept by top_k, .5 is less than six tenths
    assert of(top_k=3, top_p=0.5) == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert of(top_k=3, top_p=0.6) == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert keep(p) is p


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.01, 1))
def test_what_stays_is_the_likeliest(seed, top_k, top_p):
    p = (3 * torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    for row, kept in zip(p, keep(p, top_k=top_k, top_p=top_p), strict=True):
        inside = kept > 0
        n = int(inside.sum())
        assert 1 <= n <= top_k
        assert torch.equal(kept[inside], row[inside])
        assert row[inside].min() >= row[~inside].max() if n < 12 else True
        mass = row.topk(top_k).values.double()
        # with one token fewer it would be too little; rounding may go either way
        assert row[inside].double().sum() >= top_p * mass.sum() - 1e-6
        assert mass[: n - 1].sum() < top_p * mass.sum() + 1e-6


def test_steps_can_be_stopped_half_way(tiny):
    model, ids = tiny("gpt2"), prompts(2, 4)
    expected = sample(model, ids, 5, seed=4)[0]
    chosen, logp, running = next(steps(model, ids, 5, seed=4))
    assert torch.equal(chosen, expected[:, 4])
    assert logp.shape == (2, 64)
    assert running.all()


def test_refusals(tiny):
    model, ids = tiny("gpt2"), prompts(1, 3)
    for options, says in (
        ({"temperature": -1.0}, "temperature is 0 or more, not -1"),
        ({"top_k": 0}, "at least 1 token, not 0"),
        ({"top_p": 0.0}, "above 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "above 0 and at most 1, not 1.5"),
    ):
        with refused(OptionError, says):
            sample(model, ids, 2, **options)
