"""A head's weights as tokens to tokens, and weights compared by what they say of the vocabulary, without a V-wide table.

Dar, Geva, Gupta and Berant (arXiv 2209.02535) read parameters in "embedding space". With E [d_vocab, d_model] a direction of
the residual stream for every token, each map of a head has one entry for every pair of tokens:

    W_VO[s, t] = (E_s W_V) . (W_O E_t)      attending to token s (row) writes the direction of token t (column)
    W_QK[q, k] = (E_q W_Q) . (E_k W_K)      token q (row, the query) looks for token k (column, the key)

V x V is 10 GB for GPT-2, but its rank is d_head: it is U W^T with U, W [d_vocab, d_head]. `top_pairs` finds its largest entries
block by block, and leaves out blocks that cannot hold one, because |u_i . w_j| <= |u_i| |w_j|.

E: `embedding="unembed"`, as in the paper, is the columns of W_U for rows and columns alike, so that a head that copies has a
large diagonal. "embed" takes the rows of W_E wherever a head reads, which is what the first layers see; what a head writes is
always read by W_U. The paper folds no norm. `fold_norm=True` folds every one that stands between: the gain of the norm before
the head, a norm behind it, and the final norm, whose gain belongs to the direction of a token (E_t = g * W_U[:, t]); LayerNorms
also subtract the mean over channels. Then the numbers do not depend on whether a gain was multiplied into a weight before.

Left out: norms' scales, which differ between tokens; biases; rotary and other positions (W_QK is the score at distance 0); the
softmax; and the constants that change no order: attn_scale, embed_scale and logit_scale. An early layer's stream need not be
in the basis of W_U at all. Key and value tokens of MLPs are `decode_neurons`.

Comparing two weight vectors by their V projections needs no V either. With C = E^T E / V - m m^T, m the mean row,

    corr(E x, E y) = x . C y / sqrt( (x . C x) (y . C y) )
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, one_of
from interp.model.folding import behind, gain, reads
from interp.model.run import canonical
from interp.model.tokens import token_strings
from interp.model.transformer import Norm, Transformer
from interp.precision import at_least_float32

EMBEDDINGS = ("unembed", "embed")
MATRICES = ("VO", "QK")
POLES = {"+": ("+",), "-": ("-",), "both": ("+", "-")}
_ENTRIES = 2**24  # of tokens x channels that are looked at once
_CANDIDATES = 2**16  # entries of a block that are scored again at once


class TopPairs(NamedTuple):
    """The largest entries of left @ right.T, largest first, and how many of its blocks were formed to find them."""

    scores: Float[Tensor, " k"]
    rows: Int[Tensor, " k"]
    columns: Int[Tensor, " k"]
    n_blocks: int


# ---------------------------------------------------------------------------------------------------------- heads


@torch.no_grad()
def top_token_pairs(
    model: Transformer, layer: int, head: int, *, matrix: Literal["VO", "QK"] = "VO", k: int = 50,
    pole: Literal["+", "-", "both"] = "+", fold_norm: bool = True, center: bool = False,
    embedding: Literal["unembed", "embed"] = "unembed", tokens: Sequence[int] | None = None, block: int = 1024,
    prune: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """The k pairs of tokens with the largest entries of a head's W_VO or W_QK, exactly (see the module for both).

    pole: "+" the largest, "-" the most negative, "both" k of each. center: subtract each row's mean over all columns, on which
    no softmax depends. tokens: only rows and columns of these ids. block, prune: see `top_pairs`; they change no result.
    Columns: pole, rank (0: the strongest of its pole), row_token (text), row_token_id, column_token, column_token_id, score.
    Of equal scores the lowest row comes first, then the lowest column. 2 d_vocab^2 d_head FLOP a pole where nothing is pruned.
    Raises `SiteError` for a layer or head that is not there, `OptionError` for an option or a token id that is not.
    """
    canonical(model, "top_token_pairs")
    one_of(pole, POLES, "pole")
    ids = _ids(model, tokens)
    left, right = _factors(model, layer, head, matrix, fold_norm, center, embedding, ids)
    tables = []
    for sign in POLES[pole]:
        found = top_pairs(left if sign == "+" else -left, right, k, block=block, prune=prune)
        sides = {"row_token": ids[found.rows].tolist(), "column_token": ids[found.columns].tolist()}
        about: dict = {"pole": sign, "rank": range(k)}
        for name, chosen in sides.items():
            texts = dict(zip(present := sorted(set(chosen)), token_strings(model.tokenizer, present), strict=True))
            about |= {name: [texts[token] for token in chosen], f"{name}_id": chosen}
        score = found.scores if sign == "+" else 0 - found.scores
        tables.append(pd.DataFrame({**about, "score": score.cpu().numpy()}))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def row_tokens(
    model: Transformer, layer: int, head: int, token: int | str, *, matrix: Literal["VO", "QK"] = "VO", k: int = 10,
    pole: Literal["+", "-", "both"] = "both", fold_norm: bool = True, center: bool = False,
    embedding: Literal["unembed", "embed"] = "unembed",
) -> pd.DataFrame:  # fmt: skip
    """One token's row: what attending to it writes ("VO"), or which keys it looks for as a query ("QK").

    token: an id, or a text that is one token. The other options, and their errors, are those of `top_token_pairs`.
    Columns: pole, rank, token (text), token_id, score. Of equal scores the lowest token comes first.
    """
    canonical(model, "row_tokens")
    one_of(pole, POLES, "pole")
    row = _ids(model, [model.to_single_token(token) if isinstance(token, str) else token])
    ids = _ids(model, None)
    left, right = _factors(model, layer, head, matrix, fold_norm, center, embedding, ids, rows=row)
    if not 1 <= k <= len(ids):
        raise OptionError(f"cannot show {k} of {len(ids)} tokens")
    scores = (right.double() @ left[0].double()).to(left.dtype)
    tables = []
    for sign in POLES[pole]:
        chosen = scores.sort(descending=sign == "+", stable=True).indices[:k]
        about = {"pole": sign, "rank": range(k), "token": token_strings(model.tokenizer, chosen.tolist())}
        tables.append(pd.DataFrame({**about, "token_id": chosen.tolist(), "score": scores[chosen].cpu().numpy()}))
    return pd.concat(tables, ignore_index=True)


def _ids(model: Transformer, tokens: Sequence[int] | None) -> Int[Tensor, " token"]:
    """Token ids, ascending, each once: equal scores are then in the order of ids."""
    n = model.cfg.d_vocab
    if tokens is None:
        return torch.arange(n, device=model.device)
    if wrong := [token for token in tokens if not 0 <= token < n]:
        raise OptionError(f"{model.cfg.name} has tokens 0 to {n - 1}, not {wrong[0]}")
    return torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=model.device)


def _factors(
    model: Transformer, layer: int, head: int, matrix: str, fold_norm: bool, center: bool, embedding: str,
    ids: Int[Tensor, " token"], rows: Int[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, "row d_head"], Float[Tensor, "token d_head"]]:  # fmt: skip
    """U and W with score = U W^T; rows: ids on the left, where they are others."""
    one_of(matrix, MATRICES, "matrix of a head")
    one_of(embedding, EMBEDDINGS, "token embedding")
    cfg = model.cfg
    if not 0 <= layer < cfg.n_layers or not 0 <= head < cfg.n_heads:
        has = f"layers 0 to {cfg.n_layers - 1} and heads 0 to {cfg.n_heads - 1}"
        raise SiteError(f"{cfg.name} has {has}, not layer {layer}, head {head}")
    block = model.blocks[layer]
    attn, kv = block.attn, head // cfg.group_size
    before = block.ln1 if fold_norm and cfg.pre_norm else None
    if matrix == "VO":
        left = reads(before, attn.W_V[kv].T)
        right = behind(block.ln1_post if fold_norm and cfg.post_norm else None, attn.W_O[head])
    else:
        norms = (attn.q_norm, attn.k_norm) if fold_norm else (None, None)
        left = reads(before, _scaled(attn.W_Q, head, norms[0], cfg.qk_norm).T)
        right = reads(before, _scaled(attn.W_K, kv, norms[1], cfg.qk_norm).T)
    columns = "unembed" if matrix == "VO" else embedding
    left = _projected(model, left, embedding, fold_norm, ids if rows is None else rows)
    mean = (
        token_table(model, columns).mean(0, keepdim=True, dtype=at_least_float32(model.W_E).dtype) if center else None
    )
    seen = seen_by_tokens(model, right, columns, fold_norm=fold_norm)
    right = _projected(model, right, columns, fold_norm, ids)
    return left, right if mean is None else right - mean @ seen.T


def _scaled(
    weight: Float[Tensor, "head d_model d_head"], head: int, norm: Norm | None, kind: str | None
) -> Float[Tensor, "d_model d_head"]:
    """W_Q or W_K of a head with the norm on queries or keys in it, but for the norm's scale."""
    if norm is None:
        return weight[head]
    weight = at_least_float32(weight)
    if norm.centred:
        weight = weight - weight.mean(2 if kind == "head" else (0, 2), keepdim=True)
    g = gain(norm)
    if g is None:
        return weight[head]
    return weight[head] * (g if kind == "head" else g.unflatten(0, (weight.shape[0], -1))[head])


# -------------------------------------------------------------------------------------------------- token embeddings


def token_table(model: Transformer, embedding: str) -> Float[Tensor, "d_vocab d_model"]:
    """The rows of W_E ("embed") or the columns of W_U ("unembed"), as the model has them."""
    return model.W_E if one_of(embedding, EMBEDDINGS, "token embedding") == "embed" else model.W_U.T


def seen_by_tokens(
    model: Transformer, rows: Float[Tensor, "r d_model"], embedding: str, *, fold_norm: bool = True
) -> Float[Tensor, "r d_model"]:
    """Rows such that `token_table @ result.T` is E @ rows.T: the gain in E_t = g * u_t is moved to the rows."""
    return behind(model.ln_final if fold_norm and embedding == "unembed" else None, rows)


def _projected(
    model: Transformer, rows: Float[Tensor, "r d_model"], embedding: str, fold_norm: bool, ids: Int[Tensor, " token"]
) -> Float[Tensor, "token r"]:
    """E @ rows.T for some tokens, some at a time: a whole table in float32 may not fit beside one in bfloat16."""
    table, seen = token_table(model, embedding), seen_by_tokens(model, rows, embedding, fold_norm=fold_norm).T
    parts = ids.split(max(1, _ENTRIES // table.shape[1]))
    return torch.cat([table[part].to(seen.dtype) @ seen for part in parts])


# ------------------------------------------------------------------------------------------------------ top pairs


@torch.no_grad()
def top_pairs(
    left: Float[Tensor, "m r"], right: Float[Tensor, "n r"], k: int, *, block: int = 1024, prune: bool = True
) -> TopPairs:
    """The k largest entries of left @ right.T, exactly, without ever holding more of it than block x block.

        score_ij = sum_r left_ir right_jr       summed in float64, rounded once to the factors' dtype (float32 at least)

    Equal scores: lowest row first, then lowest column. The result depends on neither `block` nor `prune`: blocks are screened by
    a matrix product in the factors' dtype, and every entry that its rounding could have hidden is scored again.
    prune: rows and columns sorted by norm, blocks taken by falling max |left_i| max |right_j|; none is formed once that is
    below the k-th score found. It saves where norms are skewed, and costs two sorts where they are not.
    Raises `OptionError` where shapes do not fit, k is not from 1 to m n, or a factor is not finite.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise OptionError(f"factors must be [m, r] and [n, r], not {list(left.shape)} and {list(right.shape)}")
    m, n, rank = len(left), len(right), left.shape[1]
    if not 1 <= k <= m * n:
        raise OptionError(f"cannot find {k} of {m} x {n} pairs")
    if block < 1:
        raise OptionError(f"a block must have at least one row, not {block}")
    dtype = torch.promote_types(at_least_float32(left).dtype, at_least_float32(right).dtype)
    left, right = left.to(dtype), right.to(dtype)
    sides = [_side(factor, prune) for factor in (left, right)]
    (left, row_ids, row_norms), (right, column_ids, column_norms) = sides
    tops = [[float(part.max()) for part in norms.split(block)] for norms in (row_norms, column_norms)]
    if max(tops[0]) * max(tops[1]) > torch.finfo(dtype).max:
        raise OptionError(f"products of these factors may be too large for {str(dtype).removeprefix('torch.')}")
    walk = [(a * b, i, j) for i, a in enumerate(tops[0]) for j, b in enumerate(tops[1])]
    if prune:
        walk.sort(key=lambda entry: -entry[0])
    info, wide = torch.finfo(dtype), torch.finfo(torch.float64).eps
    # what a score may exceed |u| |w| by, and what a product in `dtype` may be off by, both in parts of |u| |w|
    slack = 4 * info.eps + 4 * rank * wide
    error = (rank + 4) * info.eps + slack + (2.1 * _input_rounding() if dtype == torch.float32 else 0.0)

    lefts, rights = left.split(block), right.split(block)
    buffer = left.new_empty(min(block, m) * min(block, n))
    scores, keys = left.new_empty(0), row_ids.new_empty(0)
    floor, n_blocks = -torch.inf, 0
    for bound, i, j in walk:
        if prune and bound * (1 + slack) < floor:
            break
        n_blocks += 1
        u, w = lefts[i], rights[j]
        found = torch.mm(u, w.T, out=buffer[: len(u) * len(w)].view(len(u), len(w)))
        for a, b in _candidates(found, k, floor, error * bound + rank * info.tiny):
            exact = (u[a].double() * w[b].double()).sum(1).to(dtype)
            key = row_ids[i * block + a] * n + column_ids[j * block + b]
            scores, keys = _best(torch.cat([scores, exact]), torch.cat([keys, key]), k)
            floor = float(scores[-1]) if len(scores) == k else -torch.inf
    return TopPairs(scores, keys // n, keys % n, n_blocks)


def _side(
    factor: Float[Tensor, "n r"], by_norm: bool
) -> tuple[Float[Tensor, "n r"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """(rows in the order in which they are walked, their ids, their lengths)."""
    norms = torch.linalg.vector_norm(factor, dim=1, dtype=torch.float64)
    if not norms.isfinite().all():
        raise OptionError("a factor has entries that are not finite, so its largest products are not defined")
    if not by_norm:
        return factor, torch.arange(len(factor), device=factor.device), norms
    norms, order = norms.sort(descending=True, stable=True)
    return factor[order], order, norms


def _input_rounding() -> float:
    """What a float32 matrix product may round its inputs by, as torch was told: TF32 and bfloat16 are coarser than float32."""
    return {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}[torch.get_float32_matmul_precision()]


def _candidates(
    found: Float[Tensor, "a b"], k: int, floor: float, margin: float
) -> list[tuple[Int[Tensor, " candidate"], Int[Tensor, " candidate"]]]:
    """Rows and columns of all entries that may be among the k largest, some at a time."""
    lowest = floor - margin
    if float(found.max()) < lowest:
        return []
    if found.numel() > k and (floor == -torch.inf or int((found >= lowest).sum()) > _CANDIDATES):
        # k entries of this block are at least its k-th less the margin, so no smaller one is among the k largest
        lowest = max(lowest, float(found.flatten().topk(k).values[-1]) - 2 * margin)
    rows, columns = (found >= lowest).nonzero(as_tuple=True)
    return list(zip(rows.split(_CANDIDATES), columns.split(_CANDIDATES), strict=True))


def _best(
    scores: Float[Tensor, " n"], keys: Int[Tensor, " n"], k: int
) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
    keys, order = keys.sort()
    scores, by_score = scores[order].sort(descending=True, stable=True)
    return scores[:k], keys[by_score[:k]]


# ---------------------------------------------------------------------------------------------------- correlations


@torch.no_grad()
def vocabulary_covariance(
    embedding: Float[Tensor, "d_vocab d"], other: Float[Tensor, "d_vocab e"] | None = None
) -> Float[Tensor, "d e"]:
    """C = E^T F / V - m_E m_F^T over the vocabulary, in float64, in blocks of tokens; other: F, default E itself.

    Means are subtracted before products are formed, so a mean far larger than the spread costs no digits.
    Raises `OptionError` where the two have different vocabularies.
    """
    other = embedding if other is None else other
    n = len(embedding)
    if n != len(other):
        raise OptionError(f"vocabularies of {n} and {len(other)} tokens have no covariance")
    means = [table.mean(0, keepdim=True, dtype=torch.float64) for table in (embedding, other)]
    covariance = means[0].new_zeros(embedding.shape[1], other.shape[1])
    size = max(1, _ENTRIES // max(embedding.shape[1], other.shape[1]))
    for a, b in zip(embedding.split(size), other.split(size), strict=True):
        covariance.addmm_((a - means[0]).T, b - means[1])
    return covariance / n


def vocabulary_correlation(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], embedding: Float[Tensor, "d_vocab d"]
) -> Float[Tensor, "n m"]:
    """corr(E x_i, E y_j) over the vocabulary for all pairs of rows, through E's covariance, in float64.

    NaN where E x_i or E y_j is the same for every token, as it is for a row of zeros: nothing to correlate with.
    """
    covariance = vocabulary_covariance(embedding)
    return correlation_through(x, y, covariance, covariance, covariance)


@torch.no_grad()
def correlation_through(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m e"], cross: Float[Tensor, "d e"], own_x: Float[Tensor, "d d"],
    own_y: Float[Tensor, "e e"],
) -> Float[Tensor, "n m"]:  # fmt: skip
    """x . C_EF y / sqrt( (x . C_E x) (y . C_F y) ) for all pairs of rows: those of two models have embeddings of their own."""
    x, y = (_of_unit_spread(rows.to(cross), own) for rows, own in ((x, own_x), (y, own_y)))
    return (x @ cross @ y.T).clamp(-1, 1)


def _of_unit_spread(rows: Float[Tensor, "n d"], covariance: Float[Tensor, "d d"]) -> Float[Tensor, "n d"]:
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # zeros become NaN
    variance = ((rows @ covariance) * rows).sum(1, keepdim=True)
    # below this it is rounding of a direction that every token has alike
    lowest = len(covariance) * torch.finfo(covariance.dtype).eps * covariance.trace()
    return rows / variance.where(variance > lowest, torch.nan).sqrt()
