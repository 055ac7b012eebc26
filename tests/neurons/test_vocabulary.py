"""Heads as tables of token pairs, and correlations over the vocabulary.

Held against: the whole table sorted, ties and all; the model's own modules, run on tokens' directions with every norm's scale
held at 1; correlations of the projections themselves.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError, SiteError, UnsupportedModel
from interp.features.effects import direction_effects
from interp.model.tokens import token_strings
from interp.neurons import vocabulary as module
from interp.neurons.vocabulary import (
    row_tokens,
    top_pairs,
    top_token_pairs,
    vocabulary_correlation,
    vocabulary_covariance,
)
from interp.rules import GRADIENT
from tests.small_pairs import refused

SEEDS = st.integers(0, 10_000)
# LayerNorm, grouped keys, norms behind with an offset, a norm on all queries at once, one on each head, parallel
FAMILIES = ("gpt2-scaled", "llama3", "gemma2", "gemma3", "olmo2", "qwen3", "phi")


def whole_numbers(m: int, n: int, rank: int, seed: int, most: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with few values, so that their products are exact and full of ties; rows of very different lengths."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-most, most + 1, (size, rank), generator=g).float() for size in (m, n))
    return left * torch.randint(0, 4, (m, 1), generator=g), right * torch.randint(0, 4, (n, 1), generator=g)


def dense(left: torch.Tensor, right: torch.Tensor, k: int) -> list[tuple[float, int, int]]:
    """(score, row, column) of the k largest: all of them, sorted by score, then row, then column."""
    table = (left.double() @ right.double().T).to(left.dtype)
    values, places = table.flatten().sort(descending=True, stable=True)
    return [(float(v), int(p) // len(right), int(p) % len(right)) for v, p in zip(values[:k], places[:k], strict=True)]


def listed(found) -> list[tuple[float, int, int]]:
    return list(zip(found.scores.tolist(), found.rows.tolist(), found.columns.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------- top pairs


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 12), st.booleans(), st.data())
def test_top_pairs_are_those_of_the_whole_table(seed, m, n, rank, block, prune, data):
    left, right = whole_numbers(m, n, rank, seed)
    k = data.draw(st.integers(1, m * n))
    assert listed(top_pairs(left, right, k, block=block, prune=prune)) == dense(left, right, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "all blocks"])
@pytest.mark.parametrize("block", [17, 256, 2000])
def test_top_pairs_of_real_numbers(block, prune, dtype):
    g = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 24, generator=g, dtype=dtype) for n in (700, 900))
    found = top_pairs(left, right, 200, block=block, prune=prune)
    expected = dense(left, right, 200)
    assert [entry[1:] for entry in listed(found)] == [entry[1:] for entry in expected]
    assert [entry[0] for entry in listed(found)] == pytest.approx([entry[0] for entry in expected], rel=1e-14)


def test_near_ties_are_told_apart_whatever_a_product_in_float32_makes_of_them():
    """Products of 1 + steps of float32's last digits: a screening without a margin would take wrong ones."""
    g = torch.Generator().manual_seed(0)
    left, right = (1 + torch.randint(0, 8, (120, 32), generator=g) * 2.0**-23 for _ in range(2))
    for prune in (True, False):
        assert listed(top_pairs(left, right, 40, block=32, prune=prune)) == dense(left, right, 40)


def test_equal_scores_by_the_thousand(monkeypatch):
    monkeypatch.setattr(module, "_CANDIDATES", 50)
    left, right = torch.zeros(40, 3), torch.ones(30, 3)
    assert listed(top_pairs(left, right, 35, block=16)) == [(0.0, i // 30, i % 30) for i in range(35)]
    left[7] = 1
    expected = [(3.0, 7, j) for j in range(30)] + [(0.0, 0, j) for j in range(5)]
    assert listed(top_pairs(left, right, 35, block=16)) == expected


def test_skewed_norms_leave_most_blocks_out():
    g = torch.Generator().manual_seed(1)
    left, right = (torch.randn(600, 8, generator=g) * torch.rand(600, 1, generator=g) ** 6 for _ in range(2))
    pruned, every = (top_pairs(left, right, 20, block=50, prune=prune) for prune in (True, False))
    assert listed(pruned) == listed(every) == dense(left, right, 20)
    assert every.n_blocks == 144
    assert pruned.n_blocks < 30


def test_half_precision_is_scored_in_float32():
    left, right = (factor.bfloat16() for factor in whole_numbers(20, 20, 4, seed=5))
    found = top_pairs(left, right, 9)
    assert found.scores.dtype == torch.float32
    assert listed(found) == dense(left.float(), right.float(), 9)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarser_matrix_products_are_allowed_for(precision):
    before = torch.get_float32_matmul_precision()
    left, right = (factor[:, :3] for factor in whole_numbers(50, 60, 3, seed=2))
    try:
        torch.set_float32_matmul_precision(precision)
        assert listed(top_pairs(left, right, 50, block=20)) == dense(left, right, 50)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("left", "right", "k", "says"),
    [
        (torch.ones(3, 2), torch.ones(4, 3), 1, r"not \[3, 2\] and \[4, 3\]"),
        (torch.ones(3, 2), torch.ones(4, 2), 13, "cannot find 13 of 3 x 4 pairs"),
        (torch.ones(3, 2), torch.ones(4, 2), 0, "cannot find 0"),
        (torch.ones(3, 2), torch.full((4, 2), torch.nan), 1, "not finite"),
        (torch.full((3, 2), 1e30), torch.full((4, 2), 1e30), 1, "too large for float32"),
    ],
    ids=["ranks", "too many", "none", "nan", "overflow"],
)
def test_factors_that_have_no_top_pairs(left, right, k, says):
    with refused(OptionError, says):
        top_pairs(left, right, k)


def test_an_empty_block_is_refused():
    with refused(OptionError, "at least one row, not 0"):
        top_pairs(torch.ones(3, 2), torch.ones(4, 2), 1, block=0)


# ----------------------------------------------------------------------------------------------------------- heads


def whole_table(table: pd.DataFrame, n: int) -> torch.Tensor:
    """[row, column] from a listing of every pair."""
    assert len(table) == n * n
    found = torch.full((n, n), torch.nan, dtype=torch.float64)
    scores = torch.tensor(table["score"].tolist(), dtype=torch.float64)
    found[table["row_token_id"].tolist(), table["column_token_id"].tolist()] = scores
    return found


def by_the_model(model, layer: int, head: int, matrix: str, embedding: str) -> torch.Tensor:
    """[row, column], from the model's modules on every token, with norms' scales held at 1; biases fall out of differences."""
    held = [(name, lambda v, hook: torch.ones_like(v)) for name in model.hook_dict if name.endswith("hook_scale")]
    block, cfg = model.blocks[layer], model.cfg

    def linear(function, x):
        return function(x) - function(torch.zeros_like(x))

    def logits(x):
        return linear(model.ln_final, x) @ model.W_U

    def rows(name, x, which):
        x = block.ln1(x) if cfg.pre_norm else x
        x = block.attn.project(name, x)
        return (x if name == "v" else block.attn.place(name, x[None], None, GRADIENT)[0])[:, which]

    def written(z):
        every = torch.zeros(len(z), cfg.n_heads, cfg.d_head, dtype=z.dtype)
        every[:, head] = z
        out = block.attn.output(every)
        return block.ln1_post(out) if cfg.post_norm else out

    with torch.no_grad(), model.hooks(fwd_hooks=held):
        E = model.W_E if embedding == "embed" else logits(torch.eye(cfg.d_model, dtype=model.dtype)).T
        kv = head // (cfg.n_heads // cfg.n_kv_heads)
        if matrix == "QK":
            q, k = (linear(lambda x, n=n, w=w: rows(n, x, w), E) for n, w in (("q", head), ("k", kv)))
            return q @ k.T
        return logits(linear(written, linear(lambda x: rows("v", x, kv), E)))


@pytest.mark.parametrize("embedding", ["unembed", "embed"])
@pytest.mark.parametrize("matrix", ["VO", "QK"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_what_the_model_does_with_tokens(tiny, family, matrix, embedding):
    model = tiny(family, torch.float64)
    n, layer, head = model.cfg.d_vocab, 1, model.cfg.n_heads - 1
    table = top_token_pairs(model, layer, head, matrix=matrix, k=n * n, embedding=embedding, block=20)
    expected = by_the_model(model, layer, head, matrix, embedding)
    torch.testing.assert_close(
        whole_table(table, n), expected, rtol=1e-9, atol=1e-12 + 1e-9 * float(expected.abs().max())
    )
    assert table["score"].is_monotonic_decreasing
    assert table["row_token"].tolist() == token_strings(model.tokenizer, table["row_token_id"].tolist())


@pytest.mark.parametrize("matrix", ["VO", "QK"])
def test_without_norms_it_is_the_paper(tiny, matrix):
    model = tiny("llama3", torch.float64)
    attn, kv = model.blocks[2].attn, 1
    inner = attn.W_V[kv] @ attn.W_O[3] if matrix == "VO" else attn.W_Q[3] @ attn.W_K[kv].T
    table = top_token_pairs(model, 2, 3, matrix=matrix, k=64 * 64, fold_norm=False)
    expected = model.W_U.T @ inner @ model.W_U
    torch.testing.assert_close(whole_table(table, 64), expected)
    centred = top_token_pairs(model, 2, 3, matrix=matrix, k=64 * 64, fold_norm=False, center=True)
    torch.testing.assert_close(whole_table(centred, 64), expected - expected.mean(1, keepdim=True))


def test_poles_and_blocks_and_pruning(mini_gpt2):
    both = top_token_pairs(mini_gpt2, 1, 2, k=30, pole="both")
    assert both["pole"].tolist() == ["+"] * 30 + ["-"] * 30
    assert both["rank"].tolist() == [*range(30), *range(30)]
    for sign, half in both.groupby("pole"):
        other = top_token_pairs(mini_gpt2, 1, 2, k=30, pole=sign, block=100, prune=False)
        pd.testing.assert_frame_equal(half.reset_index(drop=True), other)
    assert both["score"].iloc[0] > 0 > both["score"].iloc[30]
    assert both["score"].iloc[30] == both["score"].min()


def test_only_some_tokens(mini_llama):
    some, more = [300, 7, 41, 7], range(0, 400)
    table = top_token_pairs(mini_llama, 0, 1, tokens=some, k=9)
    assert set(table["row_token_id"]) | set(table["column_token_id"]) == set(some)
    every = top_token_pairs(mini_llama, 0, 1, tokens=more, k=400**2)
    kept = every[every["row_token_id"].isin(some) & every["column_token_id"].isin(some)]
    names = ["row_token_id", "column_token_id", "score"]
    assert (table[names[:2]].to_numpy() == kept[names[:2]].to_numpy()).all()
    assert table["score"].tolist() == pytest.approx(kept["score"].tolist(), rel=1e-5, abs=1e-6)


def test_a_planted_head_writes_what_it_was_built_to(tiny):
    """Attending to token s writes token s + 1: W_V reads s's row and W_O writes the next one's column."""
    model = copy.deepcopy(tiny("gpt2-scaled", torch.float64))
    d, e = model.cfg.d_model, model.cfg.d_head
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    sources, targets = list(range(10, 10 + e)), list(range(40, 40 + e))
    model.embed.W_E.data.zero_()
    model.unembed.W_U.data.zero_()
    model.embed.W_E.data[sources] = basis[:e]
    model.unembed.W_U.data[:, targets] = basis[e : 2 * e].T
    model.blocks[1].attn.W_V.data[2] = basis[:e].T
    model.blocks[1].attn.W_O.data[2] = basis[e : 2 * e]
    table = top_token_pairs(model, 1, 2, embedding="embed", fold_norm=False, k=e + 1)
    found = sorted(zip(table["row_token_id"][:e], table["column_token_id"][:e], strict=True))
    assert found == list(zip(sources, targets, strict=True))
    assert table["score"].tolist() == pytest.approx([1.0] * e + [0.0], abs=1e-12)
    row = row_tokens(model, 1, 2, sources[3], embedding="embed", fold_norm=False, k=1, pole="+")
    assert row["token_id"].tolist() == [targets[3]]


@pytest.mark.parametrize("matrix", ["VO", "QK"])
def test_a_row_is_a_row_of_the_table(tiny, matrix):
    model = tiny("gemma2", torch.float64)
    expected = by_the_model(model, 0, 1, matrix, "unembed")[17]
    found = row_tokens(model, 0, 1, 17, matrix=matrix, k=64)
    for sign, half in found.groupby("pole"):
        order = expected.sort(descending=sign == "+", stable=True).indices
        assert half["token_id"].tolist() == order.tolist()
        assert half["score"].tolist() == pytest.approx(expected[order].tolist(), rel=1e-9, abs=1e-9)


def test_a_row_is_the_direct_effect_of_what_is_written(mini_gpt2):
    """The values of a token at the head, through `direction_effects`: two paths to the same logits."""
    token, (layer, head) = 99, (1, 2)
    block = mini_gpt2.blocks[layer]
    norm = lambda x: x - x.mean()  # noqa: E731
    source = norm(mini_gpt2.W_E[token]) * block.ln1.w
    z = torch.zeros(1, mini_gpt2.cfg.n_heads, mini_gpt2.cfg.d_head)
    z[0, head] = source @ block.attn.W_V[head]
    effects = direction_effects(mini_gpt2, f"blocks.{layer}.attn.hook_z", z.flatten(1), k=6)
    row = row_tokens(mini_gpt2, layer, head, token, embedding="embed", center=True, k=6)
    assert row["token_id"].tolist() == effects["token_id"].tolist()
    assert row["score"].tolist() == pytest.approx(effects["value"].tolist(), rel=1e-4)


def test_a_token_by_its_text(mini_gpt2):
    text = token_strings(mini_gpt2.tokenizer, [99])[0]
    named, numbered = (row_tokens(mini_gpt2, 0, 0, token, k=3) for token in (text, 99))
    pd.testing.assert_frame_equal(named, numbered)


def test_equal_scores_of_a_row_are_in_the_order_of_ids(tiny):
    model = copy.deepcopy(tiny("llama", torch.float64))
    model.blocks[0].attn.W_O.data.zero_()
    for sign in "+-":
        assert row_tokens(model, 0, 0, 5, k=4, pole=sign)["token_id"].tolist() == [0, 1, 2, 3]


def test_what_a_head_refuses(mini_gpt2):
    n = mini_gpt2.cfg.d_vocab
    with refused(SiteError, "heads 0 to .*, not layer 0, head 99"):
        top_token_pairs(mini_gpt2, 0, 99)
    with refused(SiteError, "not layer -1, head 0"):
        row_tokens(mini_gpt2, -1, 0, 3)
    with refused(OptionError, "'OV' is not a matrix of a head"):
        top_token_pairs(mini_gpt2, 0, 0, matrix="OV")
    with refused(OptionError, "not a pole"):
        top_token_pairs(mini_gpt2, 0, 0, pole="?")
    with refused(OptionError, "not a token embedding"):
        row_tokens(mini_gpt2, 0, 0, 3, embedding="both")
    with refused(OptionError, f"has tokens 0 to {n - 1}, not {n}"):
        top_token_pairs(mini_gpt2, 0, 0, tokens=[3, n])
    with refused(OptionError, "cannot show 0 of"):
        row_tokens(mini_gpt2, 0, 0, 3, k=0)
    with refused(UnsupportedModel, "top_token_pairs"):
        top_token_pairs(torch.nn.Linear(2, 2), 0, 0)


# ---------------------------------------------------------------------------------------------------- correlations


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(2, 60), st.sampled_from([0.0, 1.0, 1e4]))
def test_correlation_without_the_vocabulary(seed, d, n_tokens, shift):
    """Also where the mean row is ten thousand times the spread."""
    g = torch.Generator().manual_seed(seed)
    x, y, E = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (3, 4, n_tokens))
    found = vocabulary_correlation(x, y, E + shift)
    projected = np.concatenate([(E @ rows.T).T.numpy() for rows in (x, y)])
    expected = np.corrcoef(projected)[:3, 3:]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10 if shift < 2 else 1e-6)
    torch.testing.assert_close(found, vocabulary_correlation(3.5 * x, 0.1 * y, E + shift), rtol=1e-9, atol=1e-9)


def test_covariance_in_pieces(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 6, generator=g), torch.randn(50, 4, generator=g).double()
    whole = vocabulary_covariance(a, b)
    centred = [table.double() - table.double().mean(0) for table in (a, b)]
    torch.testing.assert_close(whole, centred[0].T @ centred[1] / 50, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(module, "_ENTRIES", 42)
    torch.testing.assert_close(vocabulary_covariance(a, b), whole, rtol=1e-12, atol=1e-14)
    with refused(OptionError, "vocabularies of 50 and 49 tokens"):
        vocabulary_covariance(a, b[1:])


def test_what_every_token_says_alike_has_no_correlation():
    g = torch.Generator().manual_seed(0)
    E = torch.randn(30, 5, generator=g, dtype=torch.float64)
    E[:, 2] = 7.0
    x = torch.eye(5, dtype=torch.float64)
    x[0] = 0
    found = vocabulary_correlation(x, x, E)
    lost = torch.tensor([True, False, True, False, False])
    assert torch.equal(found.isnan(), lost[:, None] | lost)
    assert found.diag()[~lost].tolist() == pytest.approx([1.0] * 3)
