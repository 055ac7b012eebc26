"""Which rows a sweep has, when each comes on board, and where its tokens lie: bookkeeping in numpy, no model needed.

A row is one (intervention, prompt). What cannot change the metric gets no row. A row begins at the first place that its
patches touch, with the tokens from the first position that can change to the one the metric reads. Most rows begin with
a change at a single position. Such a row is *lone*: it is one vector until the next attention spreads the change over
its suffix. A lone row that begins after its layer's keys and values is a *guest* of that layer, which computes that one
vector only, and comes on board with the next layer.

Rows on board never move: they are ordered by the layer at whose start they come on board.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np

from interp.interventions import Intervention
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs

# The order in which a layer reaches its sites; q, k and v are one stage.
_ORDER = ("resid_pre", "qkv", "pattern", "head", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post")
STAGE = {name: i for i, name in enumerate(_ORDER)} | dict.fromkeys("qkv", 1)
N_STAGES = len(_ORDER)
ALL = np.iinfo(np.int64).min  # stands for None in integer tables
_NAMES = list(SITES)


def spell_out(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For runs of given lengths laid end to end: each element's run, and its place within the run."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - np.repeat(lengths.cumsum() - lengths, lengths)


class Layout:
    """Where rows' tokens lie in a packed buffer: slot i holds positions starts[i] .. ends[i]-1 of row rows[i]."""

    def __init__(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.rows, self.starts, self.ends = rows, starts, ends
        self.lengths = ends - starts
        self.offsets = np.concatenate([[0], self.lengths.cumsum()])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    def part(self, first: int, last: int) -> "Layout":
        """Some of the slots, in a buffer of their own."""
        return Layout(self.rows[first:last], self.starts[first:last], self.ends[first:last])

    @cached_property
    def _slot_of(self) -> np.ndarray:
        slots = np.full(self.rows.max(initial=-1) + 1, -1)
        slots[self.rows] = np.arange(len(self.rows))
        return slots

    def slots(self, rows: np.ndarray) -> np.ndarray:
        """Slots of some rows; -1 for a row that is not here."""
        if not len(self.rows):
            return np.full(len(rows), -1)
        return np.where(rows < len(self._slot_of), self._slot_of[np.minimum(rows, len(self._slot_of) - 1)], -1)

    def spelled(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Slot and position of every token of slots first..last-1."""
        slot, step = spell_out(self.lengths[first:last])
        return slot + first, step + self.starts[slot + first]

    def tokens(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where positions of slots lie in the buffer."""
        return self.offsets[slots] + positions - self.starts[slots]

    def overlap(self, other: "Layout", n: int) -> "Layout":
        """The positions that both hold, of the first n slots, which are the same rows in both."""
        starts = np.maximum(self.starts[:n], other.starts[:n])
        return Layout(self.rows[:n], starts, np.maximum(starts, np.minimum(self.ends[:n], other.ends[:n])))


@dataclass
class Entries:
    """The patches of one site in one layer, by row: where, and from which prompt's source value."""

    row: np.ndarray  # sorted
    prompt: np.ndarray
    position: np.ndarray  # ALL: every position of the row
    unit: np.ndarray  # -1: all units
    source_position: np.ndarray  # ALL: the pattern's whole row

    def __getitem__(self, which: slice | np.ndarray) -> "Entries":
        return Entries(*(getattr(self, f.name)[which] for f in fields(self)))

    def of(self, layout: Layout) -> tuple["Entries", np.ndarray]:
        """Those of a layout's rows, with their slots."""
        if not len(layout):
            return self[:0], np.zeros(0, dtype=np.int64)
        near = self[slice(*np.searchsorted(self.row, [layout.rows.min(), layout.rows.max() + 1]))]
        slot = layout.slots(near.row)
        return near[slot >= 0], slot[slot >= 0]


@dataclass
class Plan:
    """Which rows there are, when each comes on board, and what is patched where."""

    cell: np.ndarray  # [row] number of the intervention
    prompt: np.ndarray  # [row]
    start: np.ndarray  # [row] first position that can change
    end: np.ndarray  # [row] one past the position that is read
    begin: np.ndarray  # [row] layer * N_STAGES + stage of the first patch
    enter: np.ndarray  # [row] layer at whose start it comes on board; sorted
    spread: np.ndarray  # [row] layer whose attention spreads a lone row's change; -1: changed everywhere from the start
    n_layers: int
    entries: dict[tuple[int, str], Entries] = field(repr=False)

    def __len__(self) -> int:
        return len(self.cell)

    def on_board(self, layer: int) -> int:
        """How many rows are on board at the start of a layer."""
        return int(np.searchsorted(self.enter, layer, side="right"))

    def guests(self, layer: int) -> np.ndarray:
        """Rows that begin in this layer and come on board after it, by stage."""
        first = self.on_board(layer)
        rows = np.arange(first, self.on_board(layer + 1))
        rows = rows[self.begin[rows] // N_STAGES == layer]
        return rows[np.argsort(self.begin[rows], kind="stable")]

    def before_attention(self, layer: int) -> Layout:
        """What each row in a layer's attention has of its own when the layer begins."""
        guests = self.guests(layer)
        early = guests[self.begin[guests] % N_STAGES <= STAGE["pattern"]]
        rows = np.concatenate([np.arange(self.on_board(layer)), early])
        ends = np.where(self.spread[rows] >= layer, self.start[rows] + 1, self.end[rows])
        return Layout(rows, self.start[rows], ends)

    def after_attention(self, layer: int) -> Layout:
        """What is computed from attention on: the changed positions; in the last layer only the one that is read."""
        rows = np.concatenate([np.arange(self.on_board(layer)), self.guests(layer)])
        if layer == self.n_layers - 1:
            return Layout(rows, self.end[rows] - 1, self.end[rows])
        ends = np.where(self.spread[rows] > layer, self.start[rows] + 1, self.end[rows])
        return Layout(rows, self.start[rows], ends)

    def take(self, first_cell: int, last_cell: int) -> "Plan":
        """The rows of some interventions, which are counted from 0 again."""
        keep = (self.cell >= first_cell) & (self.cell < last_cell)
        rank = np.cumsum(keep) - 1
        entries = {}
        for key, e in self.entries.items():
            here = keep[e.row]
            if here.any():
                e = e[here]
                entries[key] = replace(e, row=rank[e.row])
        per_row = (self.prompt, self.start, self.end, self.begin, self.enter, self.spread)
        return Plan(self.cell[keep] - first_cell, *(column[keep] for column in per_row), self.n_layers, entries)


def plan(interventions: Sequence[Intervention], pairs: PromptPairs, n_layers: int, *, differs: np.ndarray) -> Plan:
    """Rows for all interventions on all prompts; those that cannot change what is read have none.

    differs: [prompt, position], where the run that patched values come from has another input than the base run.
    """
    lengths = pairs.lengths.cpu().numpy()
    first_change = np.where(differs.any(1), differs.argmax(1), lengths)
    table = np.array(
        [
            (c, p.layer, _NAMES.index(p.site), -1 if p.unit is None else p.unit,
             ALL if p.position is None else p.position, ALL if p.source_position is None else p.source_position)
            for c, intervention in enumerate(interventions) for p in intervention
        ],
        dtype=np.int64,
    ).reshape(-1, 6)  # fmt: skip
    stages = np.array([STAGE[name] for name in _NAMES])[table[:, 2]]
    is_q = table[:, 2] == _NAMES.index("q")
    last_layer = table[:, 1] == n_layers - 1

    position, end, first = table[:, 4, None], lengths[None], first_change[None]
    at = np.where(position == ALL, first, np.where(position < 0, end + position, position))  # [patch, prompt]
    alive = (at >= first) & (at < end)
    # Before the first attention, positions know nothing of each other.
    unmixed = (table[:, 1] == 0) & (stages < STAGE["pattern"])
    everyone = np.arange(len(pairs))[None]
    alive &= ~unmixed[:, None] | (position == ALL) | differs[everyone, np.clip(at, 0, differs.shape[1] - 1)]
    # In the last layer everything after the keys and values matters only at the position that is read.
    late = last_layer & ((stages >= STAGE["pattern"]) | is_q)
    alive &= ~late[:, None] | (position == ALL) | (at == end - 1)

    patch, prompt = alive.nonzero()
    keys, row = np.unique(table[patch, 0] * len(pairs) + prompt, return_inverse=True)
    cell, row_prompt = np.divmod(keys, len(pairs))
    at, layer, stage, everywhere = at[patch, prompt], table[patch, 1], stages[patch], position[patch, 0] == ALL
    row_end = end[0, row_prompt]
    start, begin = row_end.copy(), np.full(len(keys), n_layers * N_STAGES)
    only_read = last_layer[patch] & (stage >= STAGE["pattern"])
    np.minimum.at(start, row, np.where(only_read, row_end[row] - 1, at))
    np.minimum.at(begin, row, layer * N_STAGES + stage)

    first_layer = begin // N_STAGES
    spreads_there = np.zeros(len(keys), dtype=bool)  # the change is there before the layer's attention
    spreads_there[row[(layer == first_layer[row]) & (stage <= STAGE["qkv"]) & ~is_q[patch]]] = True
    spread = first_layer + ~spreads_there
    # Lone: up to the attention that spreads it, all patches are at the row's first position.
    elsewhere = everywhere | (at != start[row])
    in_spread = (layer == spread[row]) & ((stage == STAGE["pattern"]) | (stage < STAGE["pattern"]) & elsewhere)
    wide = np.zeros(len(keys), dtype=bool)
    wide[row[in_spread | (layer < spread[row]) & elsewhere]] = True
    enter = np.where(wide, first_layer + (begin % N_STAGES > STAGE["pattern"]), spread)
    spread[wide] = -1

    order = np.lexsort((cell, row_prompt, row_end, start, wide, enter))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row = rank[row]
    entries = {}
    place = layer * len(_NAMES) + table[patch, 2]
    by_place = np.lexsort((row, place))
    for group in np.split(by_place, np.flatnonzero(np.diff(place[by_place])) + 1) if len(place) else []:
        key = int(layer[group[0]]), _NAMES[table[patch[group[0]], 2]]
        where = np.where(everywhere[group], ALL, at[group])
        entries[key] = Entries(row[group], prompt[group], where, *table[patch[group]][:, [3, 5]].T)
    per_row = (cell, row_prompt, start, row_end, begin, enter, spread)
    return Plan(*(column[order] for column in per_row), n_layers, entries)
