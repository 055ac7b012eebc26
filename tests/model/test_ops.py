"""The operations, by the identities they must obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.model import ops
from interp.model.activations import ACTIVATIONS
from interp.model.config import Rotary
from interp.rules import GRADIENT

ROTARY = {pairs: Rotary((1.0, 0.3, 0.07), pairs=pairs) for pairs in ("half", "adjacent")}
both_pairings = pytest.mark.parametrize("pairs", ["half", "adjacent"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turn(x: torch.Tensor, pairs: str, n_positions: int = 40) -> torch.Tensor:
    """x [position, d_head] rotated at the first positions."""
    cos, sin = ops.rotary_tables(ROTARY[pairs], n_positions, device=x.device, dtype=x.dtype)
    return ops.rotate(x[None, :, None], cos[: len(x)], sin[: len(x)], pairs)[0, :, 0]


# -------------------------------------------------------------------------------------------------------------- rotary


@both_pairings
def test_a_rotation_is_complex_multiplication(pairs):
    x, rotary = draw(5, 6), ROTARY[pairs]
    split = (lambda y: (y[:, :3], y[:, 3:])) if pairs == "half" else (lambda y: (y[:, 0::2], y[:, 1::2]))
    real, imaginary = split(x)
    angles = torch.outer(torch.arange(5, dtype=torch.float64), torch.tensor(rotary.inv_freq, dtype=torch.float64))
    expected = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    real, imaginary = split(turn(x, pairs))
    torch.testing.assert_close(torch.complex(real, imaginary), expected)


@both_pairings
@given(shift=st.integers(0, 20), distance=st.integers(0, 15), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_score_depends_on_the_distance_only(pairs, shift, distance, seed):
    q, k = draw(6, seed=seed), draw(6, seed=seed + 1)

    def score(query: int, key: int) -> torch.Tensor:
        return turn(q.expand(40, 6), pairs)[query] @ turn(k.expand(40, 6), pairs)[key]

    torch.testing.assert_close(score(shift + distance, shift), score(distance, 0))


@both_pairings
def test_a_rotation_keeps_lengths_and_position_zero(pairs):
    x = draw(30, 6)
    torch.testing.assert_close(turn(x, pairs).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turn(x, pairs)[0], x[0])


@both_pairings
def test_a_rotation_is_linear(pairs):
    x, y = draw(10, 6, seed=1), draw(10, 6, seed=2)
    torch.testing.assert_close(turn(2 * x - y, pairs), 2 * turn(x, pairs) - turn(y, pairs))


@both_pairings
def test_channels_beyond_the_frequencies_pass(pairs):
    x = draw(10, 9)
    assert torch.equal(turn(x, pairs)[:, 6:], x[:, 6:])
    assert not torch.equal(turn(x, pairs)[1:, :6], x[1:, :6])


def test_the_scale_multiplies_cos_and_sin():
    plain = ops.rotary_tables(Rotary((1.0, 0.1)), 8, device=torch.device("cpu"), dtype=torch.float64)
    scaled = ops.rotary_tables(Rotary((1.0, 0.1), scale=1.5), 8, device=torch.device("cpu"), dtype=torch.float64)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(1.5 * a, b)


def test_half_precision_angles_are_formed_in_float32():
    rotary = Rotary((1.0,))
    cos, _ = ops.rotary_tables(rotary, 3000, device=torch.device("cpu"), dtype=torch.bfloat16)
    # position 2999 is not a bfloat16 number: forming the angle in it would be off by up to eight radians
    assert cos.dtype == torch.bfloat16
    assert cos[2999, 0].item() == pytest.approx(math.cos(2999), abs=0.01)


# ----------------------------------------------------------------------------------------------------------- attention


@given(n=st.integers(1, 9), window=st.one_of(st.none(), st.integers(1, 10)))
def test_a_query_sees_itself_and_the_window_before_it(n, window):
    index = torch.arange(n)
    mask = ops.causal_mask(index, index, window)
    for query in range(n):
        for key in range(n):
            seen = key <= query and (window is None or key > query - window)
            assert mask[query, key].item() == (not seen)


def test_a_mask_of_some_queries_is_those_rows():
    index, some = torch.arange(9), torch.tensor([2, 7])
    assert torch.equal(ops.causal_mask(some, index, 3), ops.causal_mask(index, index, 3)[some])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_keys_are_repeated_keys(kv_heads):
    q, k, v = draw(2, 5, 4, 3), draw(2, 6, kv_heads, 3, seed=1), draw(2, 6, kv_heads, 3, seed=2)
    repeated_k, repeated_v = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (k, v))
    expected = 0.7 * torch.einsum("bqhe,bkhe->bhqk", q, repeated_k)
    scores = ops.attention_scores(q, k, scale=0.7, softcap=None, rules=GRADIENT)
    torch.testing.assert_close(scores, expected)
    pattern = ops.attention_pattern(scores, GRADIENT)
    torch.testing.assert_close(pattern, expected.exp() / expected.exp().sum(-1, keepdim=True))
    mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, repeated_v)
    torch.testing.assert_close(ops.attention_mix(pattern, v, GRADIENT), mixed)


def test_a_soft_cap_bends_scaled_scores():
    q, k = draw(1, 3, 2, 4), draw(1, 3, 2, 4, seed=1)
    plain = ops.attention_scores(q, k, scale=2.0, softcap=None, rules=GRADIENT)
    capped = ops.attention_scores(q, k, scale=2.0, softcap=1.5, rules=GRADIENT)
    torch.testing.assert_close(capped, 1.5 * torch.tanh(plain / 1.5))
    assert capped.abs().max() < 1.5


def test_masked_keys_get_no_attention_and_rows_sum_to_one():
    scores = draw(2, 3, 6, 6).masked_fill(ops.causal_mask(torch.arange(6), torch.arange(6), 2), -torch.inf)
    pattern = ops.attention_pattern(scores, GRADIENT)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    assert (pattern[scores == -torch.inf] == 0).all()
    assert torch.equal(pattern[..., 0, 0], torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_pattern_keeps_its_dtype(dtype):
    assert ops.attention_pattern(draw(1, 1, 3, 3, dtype=dtype), GRADIENT).dtype == dtype


def test_the_default_scale_is_one_over_the_root_of_the_width():
    assert ops.default_attn_scale(16) == 0.25


# -------------------------------------------------------------------------------------------------- norms, activations


@given(seed=st.integers(0, 99), factor=st.floats(0.1, 10))
def test_a_norm_scale_is_the_root_mean_square(seed, factor):
    x = draw(3, 8, seed=seed)
    by_hand = torch.tensor([[math.sqrt(sum(v * v for v in row) / 8 + 1e-5)] for row in x.tolist()], dtype=x.dtype)
    torch.testing.assert_close(ops.norm_scale(x, 1e-5), by_hand)
    torch.testing.assert_close(ops.norm_scale(factor * x, 0.0), factor * ops.norm_scale(x, 0.0))


def test_statistics_are_at_least_float32():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert ops.at_least_float32(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    x = torch.zeros(1, dtype=torch.float64)
    assert ops.at_least_float32(x) is x


def _tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


BY_HAND = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def test_every_activation_has_a_formula_here():
    assert set(BY_HAND) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", BY_HAND)
@given(x=st.floats(-8, 8))
def test_an_activation_is_its_formula(name, x):
    value = ACTIVATIONS[name](torch.tensor(x, dtype=torch.float64)).item()
    assert value == pytest.approx(BY_HAND[name](x), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_an_activation_is_the_one_transformers_calls_so(name):
    from transformers.activations import ACT2FN

    x = draw(50) * 3
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-7, atol=1e-7)
