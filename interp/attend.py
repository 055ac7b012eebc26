"""Attention of a sweep's rows over the base run's keys and values and their own.

What a row has not changed it reads from the base run of its prompt. Two cases, both exact:

* *suffix*: the row's own keys and values run from some position to its end. Its queries see the base run's keys before
  that position and its own from there on.
* *spread*: the row has changed at one position p only. Later queries are the base run's, so attention without p is the
  same for all rows of a prompt that changed at p; with z_hole, lse_hole its mix and its log-sum-exp, and s the new score
  of p,

      z = z_hole + sigmoid(s - lse_hole) (v_p - z_hole)

  which costs one interpolation per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.model import ops
from interp.model.transformer import Attention
from interp.precision import at_least_float32
from interp.rows import Layout, spell_out
from interp.rules import GRADIENT
from interp_kernels import Rows
from interp_kernels import suffix_attention as kernel_suffix_attention

_HOLE_ELEMENTS = 1 << 22  # scores of attention without one position that are held at a time

Heads = Float[Tensor, "token head d_head"]


@dataclass
class Own:
    """Queries, keys and values of rows' own, packed, as they enter the scores, and where they lie."""

    q: Float[Tensor, "query head d_head"]
    k: Float[Tensor, "token kv_head d_head"]
    v: Float[Tensor, "token kv_head d_head"]
    q_layout: Layout
    kv_layout: Layout


@dataclass
class Base:
    """The base run's queries, keys and values of one layer, as they enter the scores: [prompt, position, head, d_head]."""

    q: Tensor
    k: Tensor
    v: Tensor


def _index(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def suffix_attention(
    attn: Attention, own: Own, base: Base, prompts: np.ndarray, z: Heads,
    patch: Callable[[Tensor, int, int], None] | None = None,
) -> None:  # fmt: skip
    """z at the rows' own queries, written into z; their own keys and values run up to the last query.

    prompts: [slot]. patch: called with (pattern [slot, head, query, key], first slot, first query position) before the
    pattern is used. Slots with the same queries attend together.
    """
    q_layout, kv, cap = own.q_layout, own.kv_layout, attn.cfg.attn_softcap
    places = np.stack([q_layout.starts, q_layout.ends])
    edges = (np.flatnonzero((np.diff(places, axis=1) != 0).any(0)) + 1).tolist()
    n_shared = base.k.shape[0] * base.k.shape[1]
    tables = None
    for a, b in zip([0, *edges], [*edges, len(kv)], strict=True):
        first_query, end = places[:, a].tolist()
        queries = slice(q_layout.offsets[a], q_layout.offsets[b])
        q = own.q[queries].unflatten(0, (b - a, -1))
        if kv.starts[a:b].any():  # keys and values of all positions, picked from the base run's and the rows' own
            if tables is None:
                tables = [torch.cat([x.flatten(0, 1), y]) for x, y in ((base.k, own.k), (base.v, own.v))]
            at = np.arange(end)
            shared = prompts[a:b, None] * base.k.shape[1] + at
            mine = n_shared + kv.offsets[a:b, None] + at - kv.starts[a:b, None]
            picked = _index(np.where(at < kv.starts[a:b, None], shared, mine).ravel(), z)
            k, v = (table.index_select(0, picked).unflatten(0, (b - a, -1)) for table in tables)
        else:
            keys = slice(kv.offsets[a], kv.offsets[b])
            k, v = (x[keys].unflatten(0, (b - a, -1)) for x in (own.k, own.v))
        at = torch.arange(end, device=z.device)
        forbidden = ops.causal_mask(at[first_query:], at, attn.window)
        if cap is None and patch is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, ~forbidden, scale=attn.scale, enable_gqa=True)
            mixed = mixed.transpose(1, 2)
        else:
            scores = ops.attention_scores(q, k, scale=attn.scale, softcap=cap, rules=GRADIENT)
            pattern = ops.attention_pattern(scores.masked_fill(forbidden, -torch.inf), GRADIENT)
            if patch is not None:
                patch(pattern, a, first_query)
            mixed = ops.attention_mix(pattern, v, GRADIENT)
        z[queries].unflatten(0, (b - a, -1)).copy_(mixed)


def read_attention(attn: Attention, own: Own, base: Base, prompts: np.ndarray, z: Heads) -> None:
    """`suffix_attention` of rows that ask one query each, at their last position: the last layer's.

    The base run's keys serve all rows of a prompt in one product, and own keys are multiplied where they lie, so that
    nothing is gathered but a query per token.
    """
    kv, n_heads, cap = own.kv_layout, base.q.shape[2], attn.cfg.attn_softcap
    by_prompt = _ByPrompt(prompts, len(base.k), z)
    shared = ops.attention_scores(by_prompt.table(own.q), base.k, scale=attn.scale, softcap=cap, rules=GRADIENT)
    forbidden = ops.causal_mask(
        by_prompt.table_of(kv.ends - 1), torch.arange(shared.shape[-1], device=z.device), attn.window
    )
    scores = at_least_float32(shared.permute(0, 2, 3, 1)).contiguous()  # [prompt, row of that prompt, key, head]
    slot, position = kv.spelled(0, len(kv))
    row, key = _index(slot, z), _index(by_prompt.flat[slot] * scores.shape[2] + position, z)
    own_scores = (own.q.index_select(0, row) * _for_each_head(own.k, n_heads)).sum(-1) * attn.scale
    scores.flatten(0, 2)[key] = (own_scores if cap is None else GRADIENT.soft_cap(own_scores, cap)).to(scores.dtype)
    pattern = scores.masked_fill_(forbidden[..., None], -torch.inf).softmax(2)
    weight = pattern.flatten(0, 2).index_select(0, key)
    pattern.flatten(0, 2)[key] = 0
    mixed = ops.attention_mix(pattern.permute(0, 3, 1, 2).to(z.dtype), base.v, GRADIENT)
    mixed = at_least_float32(by_prompt.untable(mixed))  # summed token by token: not in half precision
    z.copy_(mixed.index_add_(0, row, weight[..., None] * _for_each_head(own.v, n_heads)))


def spread_attention(attn: Attention, own: Own, base: Base, prompts: np.ndarray, z: Heads, after: Layout) -> None:
    """z at the positions that `after` names of rows that changed at one position each, written into z.

    prompts: [slot]; slots are ordered by position and prompt.
    """
    point, n_heads = own.kv_layout.starts, base.q.shape[2]
    v_heads = _for_each_head(own.v, n_heads)
    by_prompt = _ByPrompt(prompts, len(base.k), z)
    keys = by_prompt.table(own.k)
    slot, position = after.spelled(0, len(after))
    later = position > point[slot]
    if later.any():
        # scores of the base run's queries with each row's new key: [prompt, query, row of that prompt, head]
        scores = ops.attention_scores(
            base.q, keys, scale=attn.scale, softcap=attn.cfg.attn_softcap, rules=GRADIENT
        ).permute(0, 2, 3, 1)
        if attn.window is not None:
            distance = torch.arange(scores.shape[1], device=z.device)[:, None] - by_prompt.table_of(point)[:, None]
            scores = scores.masked_fill((distance >= attn.window)[..., None], -torch.inf)
        row = _index(slot, z)
        s = scores[_index(prompts[slot], z), _index(position, z), _index(by_prompt.place[slot], z)]
        # rows that changed one prompt at one position share what attention is without it
        new_pair = np.concatenate([[True], (np.diff(prompts) != 0) | (np.diff(point) != 0)])
        pair, firsts = new_pair.cumsum() - 1, np.flatnonzero(new_pair)
        first_query = int(position[later].min())
        queries = np.arange(first_query, int(position.max()) + 1)
        hole = pair[slot] * len(queries) + np.maximum(position - first_query, 0)
        per_block = max(1, _HOLE_ELEMENTS // (n_heads * len(queries) * base.k.shape[1]))
        for first in range(0, len(firsts), per_block):
            block = firsts[first : first + per_block]
            tokens = slice(*np.searchsorted(pair[slot], [first, first + per_block]).tolist())
            z_hole, lse_hole = _without_point(attn, base, prompts[block], point[block], queries)
            at = _index(hole[tokens] - first * len(queries), z)
            weight = torch.sigmoid(at_least_float32(s[tokens]) - lse_hole.index_select(0, at)).to(z.dtype)
            torch.index_select(z_hole, 0, at, out=z[tokens])
            z[tokens].lerp_(v_heads.index_select(0, row[tokens]), weight[..., None])
    if not later.all():
        rows = _index(slot[~later], z)
        own_query = _at_the_point(attn, by_prompt.table(own.q), keys, base, by_prompt.table_of(point))
        z_own, weight = (by_prompt.untable(x)[rows] for x in own_query)
        z[_index(np.flatnonzero(~later), z)] = z_own + weight[..., None] * v_heads[rows]


def kernel_attention(attn: Attention, own: Own, base: Base, prompts: np.ndarray, after: Layout) -> Heads:
    """z of all rows, suffixes and spreading ones alike, from one launch of a kernel that reads both sides in place."""
    kv, queries, n = own.kv_layout, own.q_layout, len(own.kv_layout)
    after = after.part(0, n)
    columns = {
        "prompt": prompts, "kv_start": kv.starts, "kv_stop": kv.ends, "kv_first": kv.offsets[:-1],
        "q_start": after.starts, "q_stop": after.ends, "q_own_stop": queries.ends, "q_first": queries.offsets[:-1],
        "out_first": after.offsets[:-1],
    }  # fmt: skip
    table = _index(np.stack([column.astype(np.int64) for column in columns.values()]), own.q)
    rows = Rows(**dict(zip(columns, table, strict=True)), n_out=after.n_tokens, max_queries=int(after.lengths.max()))
    return kernel_suffix_attention(
        own.q, own.k, own.v, base.q, base.k, base.v, rows,
        scale=attn.scale, softcap=attn.cfg.attn_softcap, window=attn.window,
    )  # fmt: skip


def _at_the_point(
    attn: Attention, q: Tensor, k: Tensor, base: Base, point: Tensor
) -> tuple[Float[Tensor, "prompt row head d_head"], Float[Tensor, "prompt row head"]]:
    """A changed query over the base run's keys before it and its own: the mix without its own value, and the weight of that.

    q, k: [prompt, row, head, d_head]; point: [prompt, row].
    """
    cap, n_heads = attn.cfg.attn_softcap, q.shape[2]
    scores = ops.attention_scores(q, base.k, scale=attn.scale, softcap=cap, rules=GRADIENT)
    own = (q * _for_each_head(k, n_heads)).sum(-1) * attn.scale  # [prompt, row, head]
    own = own if cap is None else GRADIENT.soft_cap(own, cap)
    forbidden = ops.causal_mask(point, torch.arange(scores.shape[-1], device=q.device), attn.window)
    at = point[:, None, :, None].expand(-1, n_heads, -1, 1)
    scores = scores.masked_fill(forbidden[:, None], -torch.inf).scatter(-1, at, own.transpose(1, 2)[..., None])
    pattern = ops.attention_pattern(scores, GRADIENT)
    weight = pattern.gather(-1, at)
    return ops.attention_mix(pattern.scatter(-1, at, 0), base.v, GRADIENT), weight[..., 0].transpose(1, 2)


def _without_point(
    attn: Attention, base: Base, prompts: np.ndarray, points: np.ndarray, queries: np.ndarray
) -> tuple[Float[Tensor, "place head d_head"], Float[Tensor, "place head"]]:
    """Attention of the base run without one position of one prompt, at some queries; place is (pair, query)."""
    which, point, query = _index(prompts, base.q), _index(points, base.q), _index(queries, base.q)
    scores = ops.attention_scores(
        base.q[:, query], base.k, scale=attn.scale, softcap=attn.cfg.attn_softcap, rules=GRADIENT
    )
    key = torch.arange(base.k.shape[1], device=query.device)
    forbidden = ops.causal_mask(query, key, attn.window) | (key == point[:, None, None])  # [pair, query, key]
    scores = at_least_float32(scores[which]).masked_fill(forbidden[:, None], -torch.inf)
    lse = scores.logsumexp(-1)  # where a query comes before its pair's point nobody reads the result
    pattern = (scores - lse[..., None]).exp().to(base.v.dtype)
    mixed = ops.attention_mix(pattern, base.v[which], GRADIENT)
    return mixed.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _for_each_head(x: Float[Tensor, "*rows kv_head d_head"], n_heads: int) -> Float[Tensor, "*rows head d_head"]:
    """Keys or values as each query head reads them."""
    return x if x.shape[-2] == n_heads else x.repeat_interleave(n_heads // x.shape[-2], -2)


class _ByPrompt:
    """Rows side by side with those of the same prompt: [prompt, place], padded, so that one product serves all."""

    def __init__(self, prompts: np.ndarray, n_prompts: int, like: Tensor):
        order = np.argsort(prompts, kind="stable")
        counts = np.bincount(prompts, minlength=n_prompts)
        _, step = spell_out(counts)
        self.place = np.empty_like(step)
        self.place[order] = step
        self.rows = np.zeros((n_prompts, counts.max()), dtype=np.int64)  # padding repeats row 0; nobody reads it
        self.rows[prompts, self.place] = np.arange(len(prompts))
        self.flat = prompts * self.rows.shape[1] + self.place
        self._index, self._back = _index(self.rows, like), _index(self.flat, like)

    def table(self, x: Float[Tensor, "row *rest"]) -> Float[Tensor, "prompt place *rest"]:
        return x[self._index]

    def table_of(self, per_row: np.ndarray) -> Tensor:
        return _index(per_row, self._index)[self._index]

    def untable(self, x: Float[Tensor, "prompt place *rest"]) -> Float[Tensor, "row *rest"]:
        return x.flatten(0, 1)[self._back]
