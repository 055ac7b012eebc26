"""One walk through a model's layers with every row on board: the arithmetic of the sweep (see `interp.sweep`).

At each place where rows join, they are appended to packed buffers with the base run's values from their first position
on, and the layer then runs on all rows so far. A row's queries read the base run's keys and values for positions before
its first, and its own from there on. In the layer where it joins, a row computes only what its patch can change there;
in the last layer, only the position that the metric reads.
"""

import numpy as np
import torch
from torch import Tensor

from interp.interventions import Values
from interp.model import ops
from interp.model.transformer import Attention, Transformer
from interp.rows import ALL, N_STAGES, STAGE, Entries, Layout, Plan
from interp.rules import GRADIENT
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs


class Walk:
    """One walk through the layers of a `Transformer` for one chunk of interventions."""

    def __init__(self, model: Transformer, pairs: PromptPairs, plan: Plan, base: Values, source: Values):
        self.model, self.cfg, self.plan, self.base, self.source = model, model.cfg, plan, base, source
        self.device = model.device
        self.full = Layout(plan.prompt, plan.start, plan.end, self.device)
        self.read_tokens = self._index(self.full.offsets[1:] - 1)
        self.prompts = self._index(plan.prompt)
        self.places = model.places(pairs.clean.shape[1])

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def final_resid(self) -> Tensor:
        """The residual stream after the last layer at every row's read position: [row, d_model]."""
        n_layers = self.cfg.n_layers
        resid = torch.empty(int(self.full.offsets[-1]), self.cfg.d_model, device=self.device, dtype=self.model.dtype)
        for layer in range(int(self.plan.join[0]) // N_STAGES, n_layers):
            self._layer(layer, resid, last=layer == n_layers - 1)
        return resid[self.read_tokens]

    def _layer(self, layer: int, resid: Tensor, last: bool) -> None:
        """Take all rows that are in by now through one layer: resid [token, d_model] before it becomes resid after it."""
        block, cfg, full = self.model.blocks[layer], self.cfg, self.full
        value = lambda site: self.base[SITES[site].hook(layer)]  # noqa: E731
        rows = {stage: self.plan.joined(layer, i) for stage, i in STAGE.items()}
        before, now = self.plan.joined(layer, -1), rows["resid_post"]
        layout = self._computed(before, now, last)
        end = lambda stage: int(layout.offsets[rows[stage]])  # noqa: E731

        def join(buffer: Tensor, site_values: Tensor, after: str, upto: str) -> None:
            if rows[upto] > rows[after]:
                buffer[end(after) : end(upto)] = layout.take(site_values, rows[after], rows[upto])

        if rows["pattern"] > before:
            tokens = slice(full.offsets[before], full.offsets[rows["pattern"]])
            resid[tokens] = full.take(value("resid_pre"), before, rows["pattern"])
        self._patch(layer, "resid_pre", resid, full)
        z = self._attention(layer, resid, before, rows, layout, last)

        # From here on, only the positions of `layout`.
        n_tokens = end("resid_post")
        whole = not last and now == before  # nobody joins: the computed positions are all positions
        x = resid[:n_tokens] if whole else resid.new_empty(n_tokens, cfg.d_model)
        if not whole:
            n = end("pattern")
            x[:n] = resid[self._tokens(layout, 0, rows["pattern"])]
            join(x, value("resid_pre"), "pattern", "attn_out")
        join(z, value("head"), "pattern", "head")
        self._patch(layer, "head", z, layout)
        attn_out = resid.new_empty(end("attn_out"), cfg.d_model)
        if (n := end("head")) > 0:
            out = block.attn.output(z[:n])
            attn_out[:n] = block.ln1_post(out) if cfg.post_norm else out
        join(attn_out, value("attn_out"), "head", "attn_out")
        self._patch(layer, "attn_out", attn_out, layout)
        mlp_in = x[: end("resid_mid")].clone() if cfg.parallel else x
        x[: end("attn_out")] += attn_out
        mid = value("resid_pre") + value("attn_out") if cfg.parallel else value("resid_mid")
        join(x, mid, "attn_out", "mlp_out")
        self._patch(layer, "resid_mid", x, layout)
        post = resid.new_empty(end("neuron"), cfg.d_mlp)
        if (n := end("resid_mid")) > 0:
            y = mlp_in[:n]
            if cfg.pre_norm:
                y = (block.ln1 if cfg.shared_norm else block.ln2)(y)
            post[:n] = block.mlp.neurons(y, GRADIENT)
        join(post, value("neuron"), "resid_mid", "neuron")
        self._patch(layer, "neuron", post, layout)
        mlp_out = resid.new_empty(end("mlp_out"), cfg.d_model)
        if (n := end("neuron")) > 0:
            out = block.mlp.output(post)
            mlp_out[:n] = block.ln2_post(out) if cfg.post_norm else out
        join(mlp_out, value("mlp_out"), "neuron", "mlp_out")
        self._patch(layer, "mlp_out", mlp_out, layout)
        x[: end("mlp_out")] += mlp_out
        join(x, value("resid_post"), "mlp_out", "resid_post")
        self._patch(layer, "resid_post", x, layout)
        if not whole:
            if not last:
                resid[full.offsets[before] : full.offsets[now]] = full.take(value("resid_post"), before, now)
            resid[self._tokens(layout, 0, now)] = x

    def _computed(self, before: int, now: int, last: bool) -> Layout:
        """The positions that a layer computes after attention, for the rows that are in by its end."""
        p = self.plan
        start, end, point = p.start[:now], p.end[:now], p.point[:now].copy()
        point[:before] = -1  # rows from earlier layers have changed everywhere by now
        if last:
            start = end - 1
        else:
            start, end = np.where(point >= 0, point, start), np.where(point >= 0, point + 1, end)
        return Layout(p.prompt[:now], start, end, self.device)

    def _tokens(self, layout: Layout, first: int, last: int) -> Tensor:
        """Index in the full buffer of the tokens of some rows of another layout."""
        lengths = (layout.ends - layout.starts)[first:last]
        shift = self.full.offsets[first:last] + layout.starts[first:last] - self.full.starts[first:last]
        return self._index(np.repeat(shift - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum()))

    def _attention(
        self, layer: int, resid: Tensor, before: int, rows: dict[str, int], layout: Layout, last: bool
    ) -> Tensor:
        """z at the positions of `layout`, for all rows in by stage "pattern"; with room for those that join after."""
        cfg, full, block = self.cfg, self.full, self.model.blocks[layer]
        attn, n_rows = block.attn, rows["pattern"]
        z = resid.new_empty(int(layout.offsets[rows["head"]]), cfg.n_heads, cfg.d_head)
        if n_rows == 0:
            return z
        # Rows from earlier layers need all their q, k, v; rows that join here, only where resid_pre was patched.
        n_before = int(full.offsets[before])
        changed = self._changed(layer, before)
        x = resid[:n_before] if changed is None else torch.cat([resid[:n_before], resid[changed]])
        x = block.ln1(x) if cfg.pre_norm else x
        found = {}
        for name, where, n_heads in (
            ("q", layout, cfg.n_heads),
            ("k", full, cfg.n_kv_heads),
            ("v", full, cfg.n_kv_heads),
        ):
            buffer = resid.new_empty(int(where.offsets[n_rows]), n_heads, cfg.d_head)
            n_old = int(where.offsets[before])
            if n_rows > before:
                buffer[n_old:] = where.take(self.base[SITES[name].hook(layer)], before, n_rows)
            if where is full or not last:  # rows in by resid_pre have all their positions in both layouts
                out = attn.project(name, x)
                buffer[:n_old] = out[:n_before]
                if changed is not None:
                    buffer[changed] = out[n_before:]
            else:
                buffer[:n_old] = attn.project(name, x[self._tokens(layout, 0, before)])
                if changed is not None:  # one query per row, computed only where the change was there
                    place = torch.full((len(resid),), -1, device=self.device)
                    place[self._tokens(layout, before, n_rows)] = torch.arange(n_old, len(buffer), device=self.device)
                    hit = place[changed] >= 0
                    buffer[place[changed][hit]] = attn.project(name, x[n_before:][hit])
            self._patch(layer, name, buffer, where)
            found[name] = buffer
        q = self._placed(attn, "q", found["q"], layout.token_position)
        k, v = self._placed(attn, "k", found["k"], full.token_position), found["v"]
        base_k = self.base[SITES["k"].hook(layer)]
        base_k = attn.place("k", base_k, None if attn.rotary is None else self.places.rotations[attn.rotary], GRADIENT)
        base_v = self.base[SITES["v"].hook(layer)]
        patterns = self.plan.entries.get((layer, "pattern"))
        # Rows of like size attend together: keys in full, the base run's overwritten by the row's own; queries padded in
        # front to a power of two. The padding costs little, since attention itself is a small part of a layer.
        n_queries = (layout.ends - layout.starts)[:n_rows]
        width = np.minimum(1 << np.ceil(np.log2(n_queries)).astype(np.int64), layout.ends[:n_rows])
        for end, n_wide in np.unique(np.stack([self.plan.end[:n_rows], width]), axis=1).T.tolist():
            members = np.flatnonzero((self.plan.end[:n_rows] == end) & (width == n_wide))
            prompts = self.prompts[self._index(members)]
            all_k, all_v = base_k[prompts, :end], base_v[prompts, :end]  # copies
            n_own = (full.ends - full.starts)[members]
            group_row = np.repeat(np.arange(len(members)), n_own)
            step = np.arange(len(group_row)) - np.repeat(n_own.cumsum() - n_own, n_own)
            own = self._index(full.offsets[members][group_row] + step)
            at = self._index(group_row), self._index(full.starts[members][group_row] + step)
            all_k[at], all_v[at] = k[own], v[own]
            # query slot j of a row is position past - n_wide + j; slots before the row's first query are padding
            past = layout.ends[members][:, None]
            positions = past - n_wide + np.arange(n_wide)
            real = positions >= layout.starts[members][:, None]
            slots = layout.offsets[members][:, None] + np.maximum(positions - layout.starts[members][:, None], 0)
            slots, positions, real = self._index(slots), self._index(np.maximum(positions, 0)), self._index(real)
            scores = ops.attention_scores(q[slots], all_k, scale=attn.scale, softcap=cfg.attn_softcap, rules=GRADIENT)
            forbidden = ops.causal_mask(positions, torch.arange(end, device=self.device), attn.window)
            pattern = ops.attention_pattern(scores.masked_fill(forbidden[:, None], -torch.inf), GRADIENT)
            if patterns is not None:
                self._patch_pattern(layer, patterns, pattern, members, past[:, 0] - n_wide, end)
            mixed = ops.attention_mix(pattern, all_v, GRADIENT)
            z[slots[real]] = mixed[real]
        return z

    def _changed(self, layer: int, before: int) -> Tensor | None:
        """Tokens of the full buffer in which rows that join at this layer's resid_pre differ from the base run."""
        entries = self.plan.entries.get((layer, "resid_pre"))
        if entries is None:
            return None
        row, _, _, position = self._spread(entries, self.full)
        tokens = np.unique((self.full.offsets[row] + position - self.full.starts[row])[row >= before])
        return self._index(tokens) if len(tokens) else None

    def _placed(self, attn: Attention, name: str, x_the: Tensor, positions: Tensor) -> Tensor:
        """q or k of packed tokens as they enter the scores: after their norm, and rotated by their true positions."""
        rotation = None
        if attn.rotary is not None:
            cos, sin = self.places.rotations[attn.rotary]
            at = positions[: len(x_the)]
            rotation = cos[at], sin[at]
        return attn.place(name, x_the[None], rotation, GRADIENT)[0]

    def _patch(self, layer: int, site: str, buffer: Tensor, layout: Layout) -> None:
        """Write the source's values into the rows that are patched here."""
        entries = self.plan.entries.get((layer, site))
        if entries is None:
            return
        row, unit, prompt, position = self._spread(entries, layout)
        token = self._index(layout.offsets[row] + position - layout.starts[row])
        prompt, position = self._index(prompt), self._index(position)
        source = self.source[SITES[site].hook(layer)]
        for whole in (True, False):
            some = self._index(np.flatnonzero((unit < 0) == whole))
            if len(some) == 0:
                continue
            to, frm = (token[some],), (prompt[some], position[some])
            if not whole:
                units = self._index(unit)[some]
                to, frm = (*to, units), (*frm, units)
            buffer[to] = source[frm]

    def _spread(self, entries: Entries, layout: Layout):
        """Entries at all positions, spelled out one by one: (row, unit, prompt, position)."""
        everywhere = entries.position == ALL
        count = np.where(everywhere, (layout.ends - layout.starts)[entries.row], 1)
        which = np.repeat(np.arange(len(count)), count)
        step = np.arange(len(which)) - np.repeat(count.cumsum() - count, count)
        row = entries.row[which]
        position = np.where(everywhere[which], layout.starts[row] + step, entries.position[which])
        return row, entries.unit[which], entries.prompt[which], position

    def _patch_pattern(
        self, layer: int, entries: Entries, pattern: Tensor, members: np.ndarray, first: np.ndarray, end: int
    ) -> None:
        """The same for attention patterns [row of the group, head, query, key]; first: [row] position of query slot 0."""
        place = np.searchsorted(members, entries.row)
        here = (place < len(members)) & (members[np.minimum(place, len(members) - 1)] == entries.row)
        source = self.source[SITES["pattern"].hook(layer)]
        heads = np.arange(pattern.shape[1])
        for e in np.flatnonzero(here):
            r = int(place[e])
            unit = heads if entries.unit[e] < 0 else entries.unit[e : e + 1]
            everywhere = np.arange(max(int(first[r]), 0), int(first[r]) + pattern.shape[2])
            query = everywhere if entries.position[e] == ALL else entries.position[e : e + 1]
            u, q = (self._index(a.ravel()) for a in np.meshgrid(unit, query, indexing="ij"))
            key = slice(0, end) if entries.source_position[e] == ALL else int(entries.source_position[e])
            pattern[r, u, q - int(first[r]), key] = source[int(entries.prompt[e]), u, q, key]
