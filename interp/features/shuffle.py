"""Batches of shuffled activations from a preallocated buffer, at any point of which training can stop and go on.

Sequences are drawn in a random order; as many as fill the buffer are read into it, its rows are permuted by index, and batches
are gathered from it (nothing is concatenated, and all hooks share one permutation, so rows stay aligned). Order and permutation
are functions of (seed, epoch, chunk), so a position in the stream is three small numbers, and the buffer's content is read again
from its sequences: bit for bit what it was, without storing it. (Refilling half a buffer at a time mixes neighbours as well, but
then what is in it depends on everything before. Random sequences in each chunk do the same.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError
from interp.features.sources import Source


@dataclass
class Position:
    """Where a stream stands: the next batch is the one after `row` rows of a chunk of an epoch."""

    epoch: int = 0
    chunk: int = 0
    row: int = 0


class Shuffled:
    """An endless stream of batches {hook: [batch_size, d]}. Of each chunk, rows that fill no batch are left out.

    capacity: rows of the buffer, at most all there are; they are float32. A chunk of so short sequences that it fills no batch
    is passed over; `OptionError` where a whole epoch of them is.
    """

    def __init__(self, source: Source, batch_size: int, *, capacity: int, seed: int = 0):
        per_sequence = source.rows_per_sequence
        if batch_size > source.n_sequences * per_sequence:
            raise OptionError(
                f"a batch of {batch_size} tokens is more than the data, at most {source.n_sequences * per_sequence} rows"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.per_chunk = min(source.n_sequences, max(1, -(-max(capacity, batch_size) // per_sequence)))
        self.capacity = self.per_chunk * per_sequence
        self.n_chunks = source.n_sequences // self.per_chunk
        self._whole = self.per_chunk == source.n_sequences  # read once, shuffled anew every epoch
        self.position = Position()
        self._buffers: dict[str, Tensor] = {}
        self._filled: tuple[int, int] | None = None
        self._n_rows = 0

    def _draw(self, n: int, *key: int) -> Tensor:
        """A permutation that depends on the seed and the key alone."""
        mixed = self.seed
        for number in key:
            mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
        return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))

    def _sequences(self, epoch: int, chunk: int) -> Sequence[int]:
        if self._whole:
            return list(range(self.per_chunk))
        order = self._draw(self.source.n_sequences, 0, epoch)
        return order[chunk * self.per_chunk : (chunk + 1) * self.per_chunk].tolist()

    def _fill(self) -> None:
        for _ in range(self.n_chunks):
            n = self._read()
            if n >= self.batch_size:
                at = self.position
                self._order = self._draw(n, 1, at.epoch, at.chunk)
                self._ordered_for = (at.epoch, at.chunk)
                return
            self._next_chunk()
        raise OptionError(
            f"a batch of {self.batch_size} tokens is more than the {n} rows of {self.per_chunk} sequences: "
            "take a smaller batch_size, a larger buffer, or more data"
        )

    def _next_chunk(self) -> None:
        at = self.position
        at.row, at.chunk = 0, at.chunk + 1
        if at.chunk == self.n_chunks:
            at.chunk, at.epoch = 0, at.epoch + 1

    def _read(self) -> int:
        """Fill the buffer with the position's chunk, unless it is there; the number of its rows."""
        content = (0, 0) if self._whole else (self.position.epoch, self.position.chunk)
        if self._filled != content:
            sequences, n = self._sequences(*content), 0
            step = max(1, self.batch_size // self.source.rows_per_sequence)
            for start in range(0, len(sequences), step):
                rows = self.source.read(sequences[start : start + step])
                for hook, values in rows.values.items():
                    if hook not in self._buffers:
                        self._buffers[hook] = values.new_empty(self.capacity, values.shape[1], dtype=torch.float32)
                    self._buffers[hook][n : n + len(values)] = values
                n += len(rows.ids)
            self._n_rows, self._filled = n, content
        return self._n_rows

    _ordered_for: tuple[int, int] | None = None

    def next(self) -> dict[str, Float[Tensor, "token _"]]:
        """The next batch."""
        at = self.position
        if self._ordered_for != (at.epoch, at.chunk):
            self._fill()
        rows = self._order[at.row : at.row + self.batch_size]
        batch = {hook: values[rows.to(values.device)] for hook, values in self._buffers.items()}
        at.row += self.batch_size
        if at.row + self.batch_size > self._n_rows:
            self._next_chunk()
        return batch

    def first_rows(self, hook: str) -> Float[Tensor, "row _"]:
        """What the buffer holds now, or is filled with first: for means and scales before training."""
        if self._ordered_for != (self.position.epoch, self.position.chunk):
            self._fill()
        return self._buffers[hook][: self._n_rows]
