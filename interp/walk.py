"""One walk through a model's layers with every row on board: the arithmetic of the sweep (see `interp.sweep`).

Rows lie token after token in one packed buffer. In each layer the rows on board, those that come on board with it and
its guests (see `interp.rows`) are the slots of one layout, guests last. A layer is computed block of slots by block of
slots, each small enough for its intermediate values to stay in a cache.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from interp.attend import Base, Own, kernel_attention, read_attention, spread_attention, suffix_attention
from interp.interventions import Values
from interp.model.transformer import Attention, Transformer
from interp.rows import ALL, N_STAGES, STAGE, Entries, Layout, Plan, spell_out
from interp.rules import GRADIENT
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs
from interp_kernels import append_rows

_BLOCK_ELEMENTS = 1 << 21  # MLP activations of one block of tokens on a CPU: 8 MiB in float32, which its caches hold


def takes_kernels(device: torch.device) -> bool:
    """Whether attention on a device goes through `interp_kernels`, whose torch path is a reference and slow."""
    return torch.empty(0, device=device).is_cuda


class Walk:
    """One walk through the layers of a `Transformer` for one chunk of interventions."""

    def __init__(self, model: Transformer, pairs: PromptPairs, plan: Plan, base: Values, source: Values):
        self.model, self.cfg, self.plan, self.base, self.source = model, model.cfg, plan, base, source
        self.device = model.device
        self.kernels = takes_kernels(self.device)
        self.places = model.places(pairs.clean.shape[1])
        layers = range(self.cfg.n_layers)
        self.before = [plan.before_attention(layer) for layer in layers]
        self.after = [plan.after_attention(layer) for layer in layers]

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def final_resid(self) -> tuple[np.ndarray, Tensor]:
        """Rows in some order, and the residual stream after the last layer where each is read: [row, d_model]."""
        largest = max(layout.n_tokens for layout in (*self.before, *self.after[:-1]))
        resid = self.model.W_E.new_empty(largest, self.cfg.d_model)
        read = resid.new_empty(len(self.after[-1]), self.cfg.d_model)
        for layer in range(int(self.plan.begin.min()) // N_STAGES, self.cfg.n_layers):
            self._layer(layer, resid, read if layer == self.cfg.n_layers - 1 else resid)
        return self.after[-1].rows, read

    def value(self, site: str, layer: int) -> Tensor:
        """The base run's values."""
        return self.base[SITES[site].hook(layer)]

    def _take(self, values: Tensor, layout: Layout, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """values [prompt, position, ...] at the tokens of slots first..last-1; written into `out` if it is given."""
        slot, position = layout.spelled(first, last)
        prompt, position = self._index(self.plan.prompt[layout.rows[slot]]), self._index(position)
        if out is None:
            return values[prompt, position]
        append_rows(out, 0, values, prompt, position)
        return out

    def _layer(self, layer: int, resid: Tensor, result: Tensor) -> None:
        """Take everything that is in by now through one layer: resid [token, d_model] becomes result, in place if it is
        the same buffer."""
        before, after = self.before[layer], self.after[layer]
        x = self._board(layer, resid)
        self._patch(layer, "resid_pre", x, before)
        base = self._base_heads(layer)
        # the tokens of the first slots stay where they are; those of the others move
        n_same, moving, kept = 0, x, 0
        if result is resid:
            n_same = min(_n_equal(before, after), self.plan.on_board(layer))
            kept = int(before.offsets[n_same])
            moving = x[kept:].clone()
        for first, last in self._blocks(layer, n_same):
            n_attending = max(first, min(last, len(before)))
            held, lag = (x, 0) if last <= n_same else (moving, kept)
            own = held[:0]
            if first < len(before):
                own = held[int(before.offsets[first]) - lag : int(before.offsets[n_attending]) - lag]
            part, out = before.part(first, n_attending), after.part(first, last)
            z = self._attention(layer, own, part, out, base)
            new = result[int(after.offsets[first]) : int(after.offsets[last])]
            if last > n_same:
                same = part.overlap(out, len(part))
                slot, position = same.spelled(0, len(part))
                picked = own[self._index(part.tokens(slot, position))]
                computed = int(out.offsets[len(part)])
                self._take(self.value("resid_pre", layer), out, 0, len(part), new[:computed])
                new[self._index(out.tokens(slot, position))] = picked
            self._after_attention(layer, new, z, out)

    def _board(self, layer: int, resid: Tensor) -> Tensor:
        """The residual stream before a layer: those on board stay, the guests of the last layer and new rows join."""
        before, n_old = self.before[layer], self.plan.on_board(layer - 1)
        kept = int(before.offsets[n_old])
        was = self.after[layer - 1] if layer > 0 else Layout(*np.zeros((3, 0), dtype=np.int64))
        guest_slot, position = was.spelled(n_old, len(was))
        guests = resid[kept : was.n_tokens].clone()
        new = resid[kept : before.n_tokens]
        self._take(self.value("resid_pre", layer), before, n_old, len(before), new)
        if len(guest_slot):
            slot = before.slots(was.rows[guest_slot])
            resid[self._index(before.tokens(slot, position))] = guests
        return resid[: before.n_tokens]

    def _attention(self, layer: int, x: Tensor, before: Layout, after: Layout, base: Base) -> Tensor:
        """z at the tokens that `after` names, of those of its rows that are in `before`."""
        block, n_slots = self.model.blocks[layer], len(before)
        z = x.new_empty(int(after.offsets[n_slots]), self.cfg.n_heads, self.cfg.d_head)
        if n_slots == 0:
            return z
        attn, spread = block.attn, self.plan.spread[before.rows]
        normed = block.ln1.plain(x) if self.cfg.pre_norm else x
        # in the last layer only one query of each suffix is needed
        queries, asked = before, normed
        if layer == self.cfg.n_layers - 1 and (wide := spread < layer).any():
            queries = Layout(before.rows, np.where(wide, before.ends - 1, before.starts), before.ends)
            asked = normed[self._index(before.tokens(*queries.spelled(0, n_slots)))]
        own = {}
        for name, given, layout in (("q", asked, queries), ("k", normed, before), ("v", normed, before)):
            own[name] = attn.project(name, given)
            self._patch(layer, name, own[name], layout)
            if name != "v":
                own[name] = self._placed(attn, name, own[name], layout)
        own = Own(own["q"], own["k"], own["v"], queries, before)
        prompts = self.plan.prompt[before.rows]
        if self._in_one(layer):
            return kernel_attention(attn, own, base, prompts, after)
        if spread[0] == layer:  # all of them, by the order of rows and the cut into blocks
            spread_attention(attn, own, base, prompts, z, after)
        elif (layer, "pattern") in self.plan.entries:
            patch = self._pattern_patch(layer, self.plan.entries[layer, "pattern"], before)
            suffix_attention(attn, own, base, prompts, z, patch)
        elif queries is not before:
            read_attention(attn, own, base, prompts, z)
        else:
            suffix_attention(attn, own, base, prompts, z)
        return z

    def _in_one(self, layer: int) -> bool:
        """Whether a kernel computes the attention of all rows at once; none can patch patterns."""
        return self.kernels and (layer, "pattern") not in self.plan.entries

    def _base_heads(self, layer: int) -> Base:
        """What the base run's rows attend with."""
        attn = self.model.blocks[layer].attn
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

    def _blocks(self, layer: int, n_same: int) -> Iterator[tuple[int, int]]:
        """Ranges of slots to take through a layer one after the other, each of one kind."""
        before, after, on_board = self.before[layer], self.after[layer], self.plan.on_board(layer)
        kind = self.plan.spread[after.rows[:on_board]] == layer
        size = after.lengths.copy()
        size[: len(before)] = np.maximum(size[: len(before)], before.lengths)
        size = np.concatenate([[0], size.cumsum()])
        step = max(64, (_BLOCK_ELEMENTS if self.device.type == "cpu" else _BLOCK_ELEMENTS << 7) // self.cfg.d_mlp)
        edges = {0, n_same, len(after)}
        if not self._in_one(layer):
            edges |= {on_board, *(np.flatnonzero(np.diff(kind)) + 1).tolist()}
        for first, last in pairwise(sorted(edges)):
            until = size[first + 1 : last + 1] - size[first]
            n_blocks = -(-int(until[-1]) // step)
            cuts = np.searchsorted(until, np.arange(1, n_blocks) * (until[-1] / n_blocks)) + first + 1
            yield from pairwise(sorted({first, last, *cuts.tolist()}))

    def _after_attention(self, layer: int, x: Tensor, z: Tensor, after: Layout) -> None:
        """Some slots through the rest of a layer: x becomes the stream after it. Guests join where they begin."""
        block, cfg = self.model.blocks[layer], self.cfg
        begin = self.plan.begin[after.rows] - layer * N_STAGES
        counts = np.searchsorted(begin, np.arange(N_STAGES), side="right")
        n_slots, end = (
            {stage: int(column[i]) for stage, i in STAGE.items()} for column in (counts, after.offsets[counts])
        )

        def join(buffer: Tensor, values: str | Tensor, since: str, upto: str) -> Tensor:
            """buffer with the base run's values for the guests that begin at the stages after `since` up to `upto`."""
            if end[upto] == end[since]:
                return buffer
            values = self.value(values, layer) if isinstance(values, str) else values
            values = self._take(values, after, n_slots[since], n_slots[upto])
            if len(buffer) < end[upto]:
                return torch.cat([buffer, values])
            buffer[end[since] : end[upto]] = values
            return buffer

        def patch(site: str, buffer: Tensor) -> None:
            self._patch(layer, site, buffer, after)

        z = join(z[: end["head"]], "head", "pattern", "head")
        patch("head", z)
        attn_out = block.attn.output(z)
        attn_out = join(block.ln1_post.plain(attn_out) if cfg.post_norm else attn_out, "attn_out", "head", "attn_out")
        patch("attn_out", attn_out)
        join(x, "resid_pre", "pattern", "attn_out")
        n, y = end["resid_mid"], None
        if cfg.parallel:  # the MLP reads the stream before attention has added to it
            y = (block.ln1 if cfg.shared_norm else block.ln2).plain(x[:n]) if cfg.pre_norm else x[:n].clone()
        x[: end["attn_out"]] += attn_out
        if end["mlp_out"] > end["attn_out"]:
            mid = self.value("resid_pre", layer) + self.value("attn_out", layer) if cfg.parallel else "resid_mid"
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

    def _patch(self, layer: int, site: str, buffer: Tensor, layout: Layout) -> None:
        """Write the source's values into the tokens of a layout's buffer, which may lack the last slots."""
        if (layer, site) not in self.plan.entries:
            return
        entries, slot = self.plan.entries[layer, site].of(layout)
        if not len(slot):
            return
        everywhere = entries.position == ALL
        which, step = spell_out(np.where(everywhere, layout.lengths[slot], 1))
        slot, entries = slot[which], entries[which]
        position = np.where(everywhere[which], layout.starts[slot] + step, entries.position)
        inside = (position >= layout.starts[slot]) & (position < layout.ends[slot])
        inside &= layout.offsets[slot] < len(buffer)
        slot, position, entries = slot[inside], position[inside], entries[inside]
        to, frm = [layout.tokens(slot, position)], [entries.prompt, position]
        source = self.source[SITES[site].hook(layer)]
        whole = entries.unit < 0
        for some, by_unit in ((whole, []), (~whole, [entries.unit])):
            if some.any():
                place, taken = ([self._index(c[some]) for c in (*columns, *by_unit)] for columns in (to, frm))
                buffer[tuple(place)] = source[tuple(taken)]

    def _pattern_patch(self, layer: int, entries: Entries, layout: Layout):
        """A function that patches attention patterns [slot, head, query, key] of a few of a layout's slots."""
        source = self.source[SITES["pattern"].hook(layer)]
        entries, slots = entries.of(layout)

        def patch(pattern: Tensor, first_slot: int, first_query: int) -> None:
            n_slots, n_heads, n_queries, n_keys = pattern.shape
            here = np.flatnonzero((slots >= first_slot) & (slots < first_slot + n_slots))
            # every head, then every query, of the entries that do not name one
            which, head = spell_out(np.where(entries.unit[here] < 0, n_heads, 1))
            here = here[which]
            head = np.where(entries.unit[here] < 0, head, entries.unit[here])
            everywhere = entries.position[here] == ALL
            which, step = spell_out(np.where(everywhere, n_queries, 1))
            here, head = here[which], head[which]
            query = np.where(everywhere[which], first_query + step, entries.position[here])
            inside = (query >= first_query) & (query < first_query + n_queries)
            here, head, query = here[inside], head[inside], query[inside]
            key = entries.source_position[here]
            to, frm = (slots[here] - first_slot, head, query - first_query), (entries.prompt[here], head, query)
            rows, cells = key == ALL, key != ALL
            if rows.any():
                place, taken = (tuple(self._index(c[rows]) for c in columns) for columns in (to, frm))
                pattern[place] = source[taken][:, :n_keys]
            if cells.any():
                place, taken = (tuple(self._index(c[cells]) for c in (*columns, key)) for columns in (to, frm))
                pattern[place] = source[taken]

        return patch


def _n_equal(a: Layout, b: Layout) -> int:
    """How many leading slots hold the same positions in both."""
    n = min(len(a), len(b))
    differs = (a.starts[:n] != b.starts[:n]) | (a.ends[:n] != b.ends[:n])
    return int(differs.argmax()) if differs.any() else n
