"""Shuffled batches.

Held against: a source whose rows say which (sequence, position) they are, so that every batch can be traced back.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.features.shuffle import Position, Shuffled
from interp.features.sources import Rows
from tests.small_pairs import refused

LENGTHS = st.lists(st.integers(3, 5), min_size=2, max_size=12)


class Numbered:
    """Sequences of given lengths; each row is its (sequence, position), in two hooks of different widths."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.about, self.reads = lengths, {}, []
        self.widths, self.n_sequences, self.rows_per_sequence = {"id": 2, "code": 1}, len(lengths), max(lengths)

    def read(self, sequences) -> Rows:
        self.reads += list(sequences)
        ids = torch.tensor([[s, t] for s in sequences for t in range(self.lengths[s])], dtype=torch.int64)
        ids = ids.reshape(-1, 2)
        return Rows({"id": ids.float(), "code": (ids[:, :1] * 100 + ids[:, 1:]).float()}, ids)


def draw(stream: Shuffled, n: int) -> list[tuple[Position, list[tuple[int, int]]]]:
    """n batches: from where in the stream each came, and its rows."""
    batches = []
    for _ in range(n):
        stream.first_rows("id")  # chunks that fill no batch are passed over here
        at = replace(stream.position)
        batch = stream.next()
        assert torch.equal(batch["code"][:, 0], batch["id"] @ torch.tensor([100.0, 1.0])), (
            "rows of hooks are not aligned"
        )
        batches.append((at, [tuple(row) for row in batch["id"].int().tolist()]))
    return batches


def epochs(stream: Shuffled, n: int) -> list[tuple[Position, list[tuple[int, int]]]]:
    """Everything in the first n epochs."""
    batches = []
    while stream.position.epoch < n:
        batches += draw(stream, 1)
    return batches


@given(LENGTHS, st.integers(1, 6), st.integers(1, 60), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_each_row_at_most_once(lengths, batch_size, capacity, seed):
    source = Numbered(lengths)
    stream = Shuffled(source, batch_size, capacity=capacity, seed=seed)
    try:
        batches = epochs(stream, 2)
    except OptionError:  # a chunk of short sequences may hold no batch
        assert stream.capacity - stream.per_chunk * 2 < batch_size
        return
    for epoch in range(2):
        seen: list[tuple[int, int]] = []
        for chunk in range(stream.n_chunks):
            rows = [row for at, batch in batches if (at.epoch, at.chunk) == (epoch, chunk) for row in batch]
            assert len({s for s, _ in rows}) <= stream.per_chunk
            assert len(rows) % batch_size == 0
            assert len(rows) <= stream.capacity  # none, where short sequences fill no batch
            seen += rows
        assert len(seen) == len(set(seen))
    assert all(len(batch) == batch_size for _, batch in batches)
    unread = source.n_sequences - stream.n_chunks * stream.per_chunk
    assert 0 <= unread < stream.per_chunk


def test_of_each_chunk_only_what_fills_no_batch_is_left_out():
    lengths = [3, 4, 5, 3, 4, 5, 3, 4]
    source = Numbered(lengths)
    stream = Shuffled(source, 3, capacity=10)
    assert (stream.per_chunk, stream.n_chunks) == (2, 4)
    batches = epochs(stream, 1)
    for chunk in range(4):
        n_rows = sum(lengths[s] for s in source.reads[2 * chunk : 2 * chunk + 2])
        assert sum(at.chunk == chunk for at, _ in batches) == n_rows // 3
    assert sorted(source.reads) == list(range(8))


@given(LENGTHS, st.integers(1, 3), st.integers(4, 60), st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_stream_goes_on_from_any_position(lengths, batch_size, capacity, after, seed):
    """Another stream put at the same place gives the same batches; so does the stream itself when sent back."""
    stream = Shuffled(Numbered(lengths), batch_size, capacity=capacity, seed=seed)
    draw(stream, after)
    at = replace(stream.position)
    expected = draw(stream, 12)
    other = Shuffled(Numbered(lengths), batch_size, capacity=capacity, seed=seed)
    other.position = replace(at)
    torch.manual_seed(after)
    assert draw(other, 12) == expected
    stream.position = replace(at)
    assert draw(stream, 12) == expected


def test_order_depends_on_seed_epoch_and_chunk():
    def order(seed: int, capacity: int, n: int = 2):
        found: dict[tuple[int, int], list] = {}
        for at, batch in epochs(Shuffled(Numbered([1] * 24), 4, capacity=capacity, seed=seed), n):
            found.setdefault((at.epoch, at.chunk), []).extend(batch)
        return found

    assert order(0, 8) == order(0, 8)
    for capacity in (8, 24):
        one, other = order(0, capacity), order(1, capacity)
        assert all(one[key] != other[key] for key in one)
        assert one[0, 0] != one[1, 0]
    source = Numbered([1] * 24)
    batches = epochs(Shuffled(source, 4, capacity=8), 10)
    # where in the buffer each row of a chunk stood: another permutation for each chunk of each epoch
    places = set()
    for chunk, start in enumerate(range(0, len(source.reads), 8)):
        drawn = [s for at, batch in batches if 3 * at.epoch + at.chunk == chunk for s, _ in batch]
        places.add(tuple(source.reads[start : start + 8].index(s) for s in drawn))
    assert len(places) == 30


def test_no_global_random_numbers_are_used():
    state = torch.get_rng_state()
    draw(Shuffled(Numbered([3] * 6), 2, capacity=6), 20)
    assert torch.equal(state, torch.get_rng_state())


def test_what_fits_the_buffer_is_read_once():
    source = Numbered([3, 4, 5, 2])
    stream = Shuffled(source, 4, capacity=1000)
    batches = epochs(stream, 5)
    assert source.reads == [0, 1, 2, 3]
    assert stream.n_chunks == 1
    assert len({tuple(batch) for _, batch in batches}) == 15


def test_a_buffer_of_most_sequences_still_sees_them_all():
    """Six of ten at a time: other six in each epoch."""
    source = Numbered([2] * 10)
    epochs(Shuffled(source, 3, capacity=12), 12)
    assert set(source.reads) == set(range(10))
    assert len(source.reads) == 12 * 6


def test_the_first_rows_are_those_of_the_first_chunk():
    stream = Shuffled(Numbered([3] * 8), 4, capacity=12)
    rows = {tuple(row) for row in stream.first_rows("id").int().tolist()}
    assert len(rows) == 12
    seen = [row for at, batch in epochs(stream, 1) if at.chunk == 0 for row in batch]
    assert set(seen) == rows
    assert {tuple(row) for row in stream.first_rows("id").int().tolist()} != rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batches_are_float32(dtype):
    source = Numbered([3] * 4)
    rows = source.read([0, 1, 2, 3])
    source.read = lambda sequences: Rows({"id": rows.values["id"].to(dtype)}, rows.ids)
    batch = Shuffled(source, 12, capacity=12).next()["id"]
    assert batch.dtype == torch.float32
    assert sorted(batch.tolist()) == rows.values["id"].tolist()


def test_too_large_a_batch_is_refused():
    with refused(OptionError, "a batch of 25 tokens is more than the data, at most 24 rows"):
        Shuffled(Numbered([3, 4] * 3), 25, capacity=100)
    with refused(OptionError, "a batch of 22 tokens is more than the 21 rows of 6 sequences.*smaller batch_size"):
        Shuffled(Numbered([3, 4] * 3), 22, capacity=100).next()


def test_a_chunk_that_fills_no_batch_is_passed_over():
    source = Numbered([3, 1, 0, 4, 2, 0, 4])
    stream = Shuffled(source, 3, capacity=8)
    for _ in range(20):
        assert len(stream.next()["id"]) == 3
    assert stream.position.epoch > 1
