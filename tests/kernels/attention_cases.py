"""Packed rows with random values, beside the same rows spelled out in full: what `suffix_attention` is tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_kernels import Rows, suffix_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Row(NamedTuple):
    """One row: its prompt and the positions of `Rows`; where its values lie is for `Case` to say."""

    prompt: int
    kv: tuple[int, int]
    q: tuple[int, int]
    q_own_stop: int


@dataclass
class Shape:
    """Sizes and dtypes of a case."""

    n_positions: int = 7
    n_kv_heads: int = 2
    group: int = 1
    d_head: int = 16
    dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int64


class Case:
    """Rows in full ([row, position, head, d_head]) and packed in an order of their own, with gaps between them."""

    def __init__(self, table: Sequence[Row], shape: Shape, device: torch.device, seed: int = 0):
        self.table, self.shape, self.device = table, shape, device
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            x = torch.randn(size, generator=generator, dtype=torch.float64).to(shape.dtype)
            return x.to(device)

        n_heads, n_prompts = shape.n_kv_heads * shape.group, 3
        heads = {"q": n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
        self.base = {x: draw(n_prompts, shape.n_positions, n, shape.d_head) for x, n in heads.items()}
        own = {x: draw(len(table), shape.n_positions, n, shape.d_head) for x, n in heads.items()}
        order = torch.randperm(len(table), generator=generator).tolist()
        own_queries = [(row.q[0], max(row.q[0], min(row.q_own_stop, row.q[1]))) for row in table]
        self.packed = {}
        self.packed["q"], q_first = self._pack(own["q"], own_queries, order)
        self.packed["k"], kv_first = self._pack(own["k"], [row.kv for row in table], order)
        self.packed["v"], _ = self._pack(own["v"], [row.kv for row in table], order)
        self.out_first, n_out = self._places([row.q for row in table], order)
        column = lambda values: torch.tensor(list(values), dtype=shape.index, device=device)  # noqa: E731
        self.rows = Rows(
            prompt=column(row.prompt for row in table),
            kv_start=column(row.kv[0] for row in table),
            kv_stop=column(row.kv[1] for row in table),
            kv_first=column(kv_first),
            q_start=column(row.q[0] for row in table),
            q_stop=column(row.q[1] for row in table),
            q_own_stop=column(row.q_own_stop for row in table),
            q_first=column(q_first),
            out_first=column(self.out_first),
            n_out=n_out,
            max_queries=max((row.q[1] - row.q[0] for row in table), default=0),
        )
        self.full = {}
        for name, values in own.items():
            self.full[name] = self.base[name][[row.prompt for row in table]].clone()
            for r, row in enumerate(table):
                places = slice(*(own_queries[r] if name == "q" else row.kv))
                self.full[name][r, places] = values[r, places]

    def _places(self, spans: Sequence[tuple[int, int]], order: Sequence[int]) -> tuple[list[int], int]:
        """Where each span begins in a packed buffer that leaves two tokens free before each, and the buffer's length."""
        first, end = [0] * len(spans), 0
        for r in order:
            first[r] = end + 2
            end = first[r] + spans[r][1] - spans[r][0]
        return first, end + 1

    def _pack(self, own: Tensor, spans: Sequence[tuple[int, int]], order: Sequence[int]) -> tuple[Tensor, list[int]]:
        first, length = self._places(spans, order)
        packed = torch.full((length, *own.shape[2:]), torch.nan, dtype=own.dtype, device=own.device)
        for r, (start, stop) in enumerate(spans):
            packed[first[r] : first[r] + stop - start] = own[r, start:stop]
        return packed, first

    def arguments(self) -> tuple:
        """What `suffix_attention` takes before its options."""
        return (*self.packed.values(), *self.base.values(), self.rows)

    def expected(self, scale: float, softcap: float | None = None, window: int | None = None) -> list[Tensor]:
        """Per row, z at its queries in float64, from every row's keys, values and queries in full."""
        q, k, v = (x.double().transpose(1, 2) for x in self.full.values())
        k, v = (x.repeat_interleave(self.shape.group, dim=1) for x in (k, v))
        at = torch.arange(self.shape.n_positions, device=self.device)
        seen = at <= at[:, None]
        if window is not None:
            seen &= at > at[:, None] - window
        if softcap is None:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        else:
            scores = softcap * torch.tanh(q @ k.mT * scale / softcap)
            weights = torch.where(seen, scores.exp(), 0)
            z = weights @ v / weights.sum(-1, keepdim=True)
        return [z[r, :, slice(*row.q)].transpose(0, 1) for r, row in enumerate(self.table)]

    def check(self, backend: str, **options) -> None:
        """`suffix_attention` says what is expected, relative to the largest value."""
        z = suffix_attention(*self.arguments(), **options, backend=backend)
        assert z.dtype == self.shape.dtype
        assert z.device.type == self.device.type
        for r, expected in enumerate(self.expected(**options)):
            found = z[self.out_first[r] : self.out_first[r] + len(expected)].double()
            if len(expected):
                error = (found - expected).abs().max() / expected.abs().max()
                assert error <= TOLERANCE[self.shape.dtype], (r, self.table[r], error)
