"""One walk through a model's layers with every row on board: the arithmetic of the sweep (see `interp.sweep`).

Rows lie token after token in packed buffers. In each layer the rows on board, those that come on board with it and its
guests (see `interp.rows`) are the slots of one layout: attention writes z for all of them, and everything after attention
runs over blocks of tokens small enough to stay in a cache, with the layer's guests in the last block.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from interp.attend import Base, Own, spread_attention, suffix_attention
from interp.interventions import Values
from interp.model.transformer import Attention, Transformer
from interp.rows import ALL, N_STAGES, STAGE, Entries, Layout, Plan, spell_out
from interp.rules import GRADIENT
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs

_BLOCK_ELEMENTS = 1 << 20  # MLP activations of one block of tokens on a CPU: 4 MiB in float32, which its caches hold


class Walk:
    """One walk through the layers of a `Transformer` for one chunk of interventions."""

    def __init__(self, model: Transformer, pairs: PromptPairs, plan: Plan, base: Values, source: Values):
        self.model, self.cfg, self.plan, self.base, self.source = model, model.cfg, plan, base, source
        self.device = model.device
        self.places = model.places(pairs.clean.shape[1])
        layers = range(self.cfg.n_layers)
        self.before = [plan.before_attention(layer) for layer in layers]
        self.after = [plan.after_attention(layer) for layer in layers]

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def final_resid(self) -> tuple[np.ndarray, Tensor]:
        """Rows in some order, and the residual stream after the last layer where each is read: [row, d_model]."""
        largest = max(layout.n_tokens for layout in (*self.before, *self.after))
        resid = self.model.W_E.new_empty(largest, self.cfg.d_model)
        for layer in range(int(self.plan.begin.min()) // N_STAGES, self.cfg.n_layers):
            self._layer(layer, resid)
        last = self.after[-1]
        return last.rows, resid[: len(last)]

    def value(self, site: str, layer: int) -> Tensor:
        """The base run's values."""
        return self.base[SITES[site].hook(layer)]

    def _take(self, values: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        """values [prompt, position, ...] at the tokens of slots first..last-1."""
        slot, position = layout.spelled(first, last)
        return values[self._index(self.plan.prompt[layout.rows[slot]]), self._index(position)]

    def _layer(self, layer: int, resid: Tensor) -> None:
        """Take everything that is in by now through one layer; resid [token, d_model] is rearranged in place."""
        before, after = self.before[layer], self.after[layer]
        x = self._board(layer, resid)
        self._patch(layer, "resid_pre", x, before)
        z = self._attention(layer, x)
        resid_pre = self.value("resid_pre", layer)
        # slots whose tokens stay where they are
        n_same = _n_equal(before, after)
        kept = int(before.offsets[n_same])
        moved = before.overlap(after, len(before))
        slot, position = moved.spelled(n_same, len(before))
        own = x[self._index(before.tokens(slot, position))]
        computed = int(after.offsets[len(before)])
        resid[kept:computed] = self._take(resid_pre, after, n_same, len(before))
        resid[self._index(after.tokens(slot, position))] = own
        for first, last in self._blocks(layer):
            self._after_attention(layer, resid[first:last], z[first:last], first)

    def _board(self, layer: int, resid: Tensor) -> Tensor:
        """The residual stream before a layer: those on board stay, the guests of the last layer and new rows join."""
        before, n_old = self.before[layer], self.plan.on_board(layer - 1)
        kept = int(before.offsets[n_old])
        was = self.after[layer - 1] if layer > 0 else Layout(*np.zeros((3, 0), dtype=np.int64))
        guest_slot, position = was.spelled(n_old, len(was))
        guests = resid[kept : was.n_tokens].clone()
        resid[kept : before.n_tokens] = self._take(self.value("resid_pre", layer), before, n_old, len(before))
        if len(guest_slot):
            slot = before.slots(was.rows[guest_slot])
            resid[self._index(before.tokens(slot, position))] = guests
        return resid[: before.n_tokens]

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """z at the tokens that `after` names, for all rows that begin before the layer's heads have been mixed, and with
        room for those that begin with a head."""
        block, before, after = self.model.blocks[layer], self.before[layer], self.after[layer]
        attn, n_slots = block.attn, len(before)
        z = x.new_empty(self._end(layer, "head"), self.cfg.n_heads, self.cfg.d_head)
        if n_slots == 0:
            return z
        base = self._base_heads(attn, layer)
        normed = block.ln1.plain(x) if self.cfg.pre_norm else x
        # in the last layer only one query of each suffix is needed
        lone = self.plan.spread[before.rows] >= layer
        wanted = before.overlap(after, n_slots)
        queries = Layout(
            before.rows, np.where(lone, before.starts, wanted.starts), np.where(lone, before.ends, wanted.ends)
        )
        asked = normed
        if queries.n_tokens < before.n_tokens:
            asked = normed[self._index(before.tokens(*queries.spelled(0, n_slots)))]
        own = {}
        for name, given, layout in (("q", asked, queries), ("k", normed, before), ("v", normed, before)):
            own[name] = attn.project(name, given)
            self._patch(layer, name, own[name], layout)
            if name != "v":
                own[name] = self._placed(attn, name, own[name], layout)
        own = Own(own["q"], own["k"], own["v"], queries, before)
        prompts = self.plan.prompt[before.rows]
        spreading = np.flatnonzero(self.plan.spread[before.rows] == layer)  # adjacent, by the order of rows
        first, last = (int(spreading[0]), int(spreading[-1]) + 1) if len(spreading) else (0, 0)
        spread_attention(attn, own, base, prompts, z, after, first, last)
        entries = self.plan.entries.get((layer, "pattern"))
        patch = None if entries is None else self._pattern_patch(layer, entries)
        for a, b in ((0, first), (last, n_slots)):
            if b > a:
                suffix_attention(attn, own, base, prompts, z, after, a, b, patch)
        return z

    def _base_heads(self, attn: Attention, layer: int) -> Base:
        q, k, v = (self.value(name, layer) for name in "qkv")
        rotation = None if attn.rotary is None else self.places.rotations[attn.rotary]
        return Base(attn.place("q", q, rotation, GRADIENT), attn.place("k", k, rotation, GRADIENT), v)

    def _placed(self, attn: Attention, name: str, x_the: Tensor, layout: Layout) -> Tensor:
        """q or k of packed tokens as they enter the scores: after their norm, and rotated by their true positions."""
        rotation = None
        if attn.rotary is not None:
            at = self._index(layout.spelled(0, len(layout))[1])
            rotation = tuple(table[at] for table in self.places.rotations[attn.rotary])
        return attn.place(name, x_the[None], rotation, GRADIENT)[0]

    def _end(self, layer: int, stage: str) -> int:
        """How many tokens of a layer's `after` are in once a stage has been reached."""
        after, n = self.after[layer], self.plan.on_board(layer)
        stages = self.plan.begin[after.rows[n:]] % N_STAGES
        return int(after.offsets[n + np.searchsorted(stages, STAGE[stage], side="right")])

    def _blocks(self, layer: int) -> Iterator[tuple[int, int]]:
        """Ranges of tokens to take through the rest of the layer one after the other; guests all lie in the last."""
        after = self.after[layer]
        total, on_board = after.n_tokens, int(after.offsets[self.plan.on_board(layer)])
        step = max(1, total) if self.device.type != "cpu" else max(64, _BLOCK_ELEMENTS // self.cfg.d_mlp)
        edges = [*range(0, max(1, on_board - step // 2), step), total]
        yield from ((a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a)

    def _after_attention(self, layer: int, x: Tensor, z: Tensor, first: int) -> None:
        """One block of tokens, from `first` on, through the rest of a layer: x becomes the stream after it."""
        block, cfg = self.model.blocks[layer], self.cfg
        value = lambda site: self.value(site, layer)  # noqa: E731
        end = {stage: min(max(self._end(layer, stage) - first, 0), len(x)) for stage in STAGE}
        on_board, after = self.plan.on_board(layer), self.after[layer]

        def join(buffer: Tensor, site: str | Tensor, since: str, upto: str) -> Tensor:
            """buffer with the base run's values for the guests that begin at the stages after `since` up to `upto`."""
            if end[upto] == end[since]:
                return buffer
            stages = self.plan.begin[after.rows[on_board:]] % N_STAGES
            slots = [on_board + int(np.searchsorted(stages, STAGE[s], side="right")) for s in (since, upto)]
            values = self._take(value(site) if isinstance(site, str) else site, after, *slots)
            if len(buffer) >= end[upto]:
                buffer[end[since] : end[upto]] = values
                return buffer
            return torch.cat([buffer, values])

        def patch(site: str, buffer: Tensor) -> None:
            self._patch(layer, site, buffer, after, first)

        join(z, "head", "pattern", "head")
        patch("head", z)
        attn_out = block.attn.output(z)
        attn_out = join(block.ln1_post.plain(attn_out) if cfg.post_norm else attn_out, "attn_out", "head", "attn_out")
        patch("attn_out", attn_out)
        join(x, "resid_pre", "pattern", "attn_out")
        n = end["resid_mid"]
        y = None
        if cfg.parallel:  # the MLP reads the stream before attention has added to it
            y = (block.ln1 if cfg.shared_norm else block.ln2).plain(x[:n]) if cfg.pre_norm else x[:n].clone()
        x[: end["attn_out"]] += attn_out
        mid = value("resid_pre") + value("attn_out") if cfg.parallel and n < len(x) else "resid_mid"
        join(x, mid, "attn_out", "mlp_out")
        patch("resid_mid", x[: end["mlp_out"]])
        if y is None:
            y = block.ln2.plain(x[:n]) if cfg.pre_norm else x[:n]
        post = join(block.mlp.neurons(y, GRADIENT), "neuron", "resid_mid", "neuron")
        patch("neuron", post)
        mlp_out = block.mlp.output(post)
        mlp_out = join(block.ln2_post.plain(mlp_out) if cfg.post_norm else mlp_out, "mlp_out", "neuron", "mlp_out")
        patch("mlp_out", mlp_out)
        x[: end["mlp_out"]] += mlp_out
        join(x, "resid_post", "mlp_out", "resid_post")
        patch("resid_post", x)

    def _patch(self, layer: int, site: str, buffer: Tensor, layout: Layout, first: int = 0) -> None:
        """Write the source's values into the tokens of `buffer`, which begins at token `first` of a layout."""
        entries = self.plan.entries.get((layer, site))
        if entries is None:
            return
        slot = layout.slots(entries.row)
        here = slot >= 0
        everywhere = (entries.position == ALL)[here]
        which, step = spell_out(np.where(everywhere, layout.lengths[slot[here]], 1))
        slot, entry = slot[here][which], np.flatnonzero(here)[which]
        position = np.where(everywhere[which], layout.starts[slot] + step, entries.position[entry])
        token = layout.tokens(slot, position) - first
        inside = (position >= layout.starts[slot]) & (position < layout.ends[slot])
        inside &= (token >= 0) & (token < len(buffer))
        token, position, entry = token[inside], position[inside], entry[inside]
        prompt, unit = entries.prompt[entry], entries.unit[entry]
        source = self.source[SITES[site].hook(layer)]
        for some in (unit < 0, unit >= 0):
            if some.any():
                to, frm = [token[some]], [prompt[some], position[some]]
                if unit[some][0] >= 0:
                    to, frm = [*to, unit[some]], [*frm, unit[some]]
                buffer[tuple(map(self._index, to))] = source[tuple(map(self._index, frm))]

    def _pattern_patch(self, layer: int, entries: Entries):
        """A function that patches attention patterns [slot, head, query, key] of a few slots."""
        source, layout = self.source[SITES["pattern"].hook(layer)], self.before[layer]
        all_slots = layout.slots(entries.row)

        def patch(pattern: Tensor, first_slot: int, first_query: int) -> None:
            n_slots, n_heads, n_queries, n_keys = pattern.shape
            here = np.flatnonzero((all_slots >= first_slot) & (all_slots < first_slot + n_slots))
            entry, head = (here, entries.unit[here])
            for column, n, offset in ((head, n_heads, 0), (None, n_queries, first_query)):
                column = entries.position[entry] if column is None else column
                spread = np.where(column < 0, n, 1)  # -1 and ALL: every head, every query
                which, step = spell_out(spread)
                value = np.where(column[which] < 0, step + offset, column[which])
                if offset == 0 and column is head:
                    entry, head = entry[which], value
                else:
                    entry, head, query = entry[which], head[which], value
            inside = (query >= first_query) & (query < first_query + n_queries)
            entry, head, query = entry[inside], head[inside], query[inside]
            key, prompt = entries.source_position[entry], entries.prompt[entry]
            for some in (key < 0, key >= 0):
                to = [self._index(c[some]) for c in (all_slots[entry] - first_slot, head, query - first_query, key)]
                frm = [self._index(c[some]) for c in (prompt, head, query, key)]
                if some.any() and key[some][0] < 0:
                    pattern[tuple(to[:3])] = source[tuple(frm[:3])][:, :n_keys]
                elif some.any():
                    pattern[tuple(to)] = source[tuple(frm)]

        return patch


def _n_equal(a: Layout, b: Layout) -> int:
    """How many leading slots hold the same positions in both."""
    n = min(len(a), len(b))
    differs = (a.starts[:n] != b.starts[:n]) | (a.ends[:n] != b.ends[:n])
    return int(differs.argmax()) if differs.any() else n
