"""Which rows a sweep has, where each joins, and where its tokens lie: bookkeeping in numpy, no model needed.

A row is one (intervention, prompt). It joins the sweep at the first place that its patches touch, with the tokens from
the first position that can change to the one the metric reads. Rows are ordered by where they join, so the active ones
are always a prefix and nothing moves when others join. What cannot change the metric gets no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from interp.interventions import Intervention
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs

# The order in which a layer reaches its sites; q, k and v are one stage.
_ORDER = ("resid_pre", "qkv", "pattern", "head", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post")
STAGE = {name: i for i, name in enumerate(_ORDER)} | dict.fromkeys("qkv", 1)
N_STAGES = len(_ORDER)
ALL = np.iinfo(np.int64).min  # stands for None in integer tables


class Layout:
    """Where each row's tokens lie in a packed buffer: row r holds positions starts[r] .. ends[r]-1 of its prompt."""

    def __init__(self, prompts: np.ndarray, starts: np.ndarray, ends: np.ndarray, device: torch.device):
        lengths = ends - starts
        self.prompts, self.starts, self.ends = prompts, starts, ends
        self.offsets = np.concatenate([[0], lengths.cumsum()])
        row = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(row)) - self.offsets[row] + starts[row]
        self.token_prompt = torch.from_numpy(prompts[row]).to(device)
        self.token_position = torch.from_numpy(positions).to(device)

    def take(self, values: Tensor, first_row: int, last_row: int) -> Tensor:
        """values [prompt, position, ...] at the tokens of rows first_row..last_row-1."""
        tokens = slice(self.offsets[first_row], self.offsets[last_row])
        return values[self.token_prompt[tokens], self.token_position[tokens]]


@dataclass
class Entries:
    """The patches of one site in one layer, spelled out: which row, where, and from which prompt's source value."""

    row: np.ndarray
    prompt: np.ndarray
    position: np.ndarray  # ALL: every position of the row
    unit: np.ndarray  # -1: all units
    source_position: np.ndarray  # ALL: the pattern's whole row


@dataclass
class Plan:
    """Which rows there are, where each joins, and what is patched where. Rows are in the order in which they join."""

    cell: np.ndarray  # [row] number of the intervention
    prompt: np.ndarray  # [row]
    start: np.ndarray  # [row] first position that can change
    end: np.ndarray  # [row] one past the position that is read
    join: np.ndarray  # [row] layer * N_STAGES + stage
    point: (
        np.ndarray
    )  # [row] the one position that the layer where it joins must compute after attention; -1: all of them
    entries: dict[tuple[int, str], Entries] = field(repr=False)

    def joined(self, layer: int, stage: int) -> int:
        """How many rows have joined once this stage of this layer has been reached."""
        return int(np.searchsorted(self.join, layer * N_STAGES + stage, side="right"))


def plan(interventions: Sequence[Intervention], pairs: PromptPairs, n_layers: int, *, first_change: np.ndarray) -> Plan:
    """Rows for all interventions on all prompts; those that cannot change what is read have none.

    first_change: [prompt], the first position at which a patched value can differ from the base run's.
    """
    names = list(SITES)
    flat = [(c, p) for c, intervention in enumerate(interventions) for p in intervention]
    table = np.array(
        [
            (c, p.layer, STAGE[p.site], names.index(p.site), -1 if p.unit is None else p.unit,
             ALL if p.position is None else p.position, ALL if p.source_position is None else p.source_position)
            for c, p in flat
        ],
        dtype=np.int64,
    ).reshape(-1, 7)  # fmt: skip
    _, layer, stage, site, _, position, _ = (column[:, None] for column in table.T)
    end = pairs.lengths.cpu().numpy()[None]
    first = first_change[None]
    at = np.where(position == ALL, first, np.where(position < 0, end + position, position))  # [patch, prompt]
    alive = (at >= first) & (at < end)
    # In the last layer everything after the keys and values matters only at the position that is read.
    late = (layer == n_layers - 1) & ((stage >= STAGE["pattern"]) | (site == names.index("q")))
    alive &= ~late | (position == ALL) | (at == end - 1)
    only_read = (layer == n_layers - 1) & (stage >= STAGE["pattern"])

    patch, prompt = alive.nonzero()
    row_key = table[patch, 0] * len(pairs) + prompt
    keys, row = np.unique(row_key, return_inverse=True)
    start = np.full(len(keys), np.iinfo(np.int64).max)
    join = start.copy()
    np.minimum.at(start, row, np.where(only_read, end - 1, at)[patch, prompt])
    np.minimum.at(join, row, (layer * N_STAGES + stage)[patch, 0])
    # Queries, patterns and whatever comes after attention touch their own position only, as far as their layer goes.
    first_layer = layer[patch, 0] == join[row] // N_STAGES
    local = ((stage >= STAGE["pattern"]) | (site == names.index("q")))[patch, 0] & (position[patch, 0] != ALL)
    low, high = np.full(len(keys), np.iinfo(np.int64).max), np.full(len(keys), -1)
    np.minimum.at(low, row[first_layer], np.where(local, at[patch, prompt], -1)[first_layer])
    np.maximum.at(high, row[first_layer], at[patch, prompt][first_layer])
    point = np.where(low == high, low, -1)
    row_cell, row_prompt = np.divmod(keys, len(pairs))
    row_end = end[0, row_prompt]
    order = np.lexsort((row_cell, row_prompt, row_end, start, join))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row = rank[row]
    entries = {}
    for key in np.unique(table[patch][:, [1, 3]], axis=0):
        here = (table[patch, 1] == key[0]) & (table[patch, 3] == key[1])
        p, i = patch[here], prompt[here]
        where = np.where(table[p, 5] == ALL, ALL, at[p, i])
        entries[int(key[0]), names[key[1]]] = Entries(row[here], i, where, table[p, 4], table[p, 6])
    return Plan(row_cell[order], row_prompt[order], start[order], row_end[order], join[order], point[order], entries)
