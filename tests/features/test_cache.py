"""Activations on disk.

Held against: the source that a cache was made of, row by row and batch by batch; caches that were never interrupted.
"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.features.cache as cache_module
from interp.errors import LoadError, OptionError
from interp.features.cache import CacheSource, cache_activations
from interp.features.shuffle import Shuffled
from interp.features.sources import ArraySource, Corpus, ModelSource, Rows, Source
from tests.small_pairs import refused


class Ragged:
    """Random rows of two hooks, so many of each sequence; `read` counts what is asked for, and can be interrupted."""

    def __init__(self, counts: list[int], *, seed: int = 0, size: float = 1.0, stop_before: float = math.inf):
        self.counts, self.stop_before, self.asked = counts, stop_before, []
        self.widths, self.about = {"a": 3, "b": 2}, {"dataset_path": "ragged", "context_size": 5}
        self.n_sequences, self.rows_per_sequence = len(counts), max(counts)
        generator = torch.Generator().manual_seed(seed)
        self.values = {
            hook: size * torch.randn(len(counts), max(counts), width, generator=generator)
            for hook, width in self.widths.items()
        }

    def read(self, sequences) -> Rows:
        sequences = list(sequences)
        if max(sequences) >= self.stop_before:
            raise KeyboardInterrupt
        self.asked += sequences
        parts = {
            hook: torch.cat([values[s, : self.counts[s]] for s in sequences]) for hook, values in self.values.items()
        }
        ids = [(s, i) for s in sequences for i in range(self.counts[s])]
        return Rows(parts, torch.tensor(ids, dtype=torch.int64).reshape(-1, 2))


COUNTS = [3, 1, 0, 4, 2, 0, 4]


def same_rows(found: Rows, expected: Rows, dtype: torch.dtype = torch.float32) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert found.values.keys() == expected.values.keys()
    for hook, values in found.values.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, expected.values[hook].to(dtype).float())


# --------------------------------------------------------------------------------------------------------------- reading


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.integers(1, 10), st.data())
def test_a_cache_reads_what_its_source_reads(tmp_path_factory, counts, block, data):
    source = Ragged(counts)
    cache = cache_activations(source, tmp_path_factory.mktemp("cache") / "new", block=block)
    order = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=12))
    same_rows(cache.read(order), source.read(order))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_rounded_once(tmp_path, dtype):
    source = Ragged(COUNTS)
    cache = cache_activations(source, tmp_path, dtype=dtype, block=3)
    same_rows(cache.read(range(7)), source.read(range(7)), getattr(torch, dtype))
    n_rows, size = sum(COUNTS), 4 if dtype == "float32" else 2
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".bin"}
    assert sizes == {
        "0.bin": n_rows * 3 * size,
        "1.bin": n_rows * 2 * size,
        "ids.bin": n_rows * 8,
        "offsets.bin": 8 * 8,
    }


def test_a_cache_is_a_source_and_says_what_it_is(tmp_path):
    source = Ragged(COUNTS)
    cache = cache_activations(source, tmp_path / "new" / "deep")
    assert isinstance(cache, Source)
    for name in ("widths", "n_sequences", "rows_per_sequence", "about"):
        assert getattr(cache, name) == getattr(source, name)
    assert repr(cache) == "CacheSource(7 sequences, 14 rows of a [3], b [2], float32)"
    assert cache.read([]).ids.shape == (0, 2)
    with refused(OptionError, "has sequences 0 to 6, not -1 to 2"):
        cache.read([2, -1])


@pytest.mark.parametrize("capacity", [12, 1000])
def test_batches_are_those_of_the_source(tmp_path, capacity):
    source = Ragged([3, 1, 2, 4, 2, 3, 4])
    streams = [
        Shuffled(s, 3, capacity=capacity, seed=1) for s in (source, cache_activations(source, tmp_path, block=2))
    ]
    for _ in range(12):
        expected, found = (stream.next() for stream in streams)
        assert all(torch.equal(found[hook], expected[hook]) for hook in ("a", "b"))


def test_batches_of_a_model_are_those_of_its_cache(tmp_path, mini_gpt2):
    """Bit for bit what the model gave for the cache's own blocks; in other batches of sequences it rounds differently."""
    texts = ["The friends went to the house.", "Anna gave a key to George because it was late.", "Yes, she said."] * 4
    corpus = Corpus.from_texts(mini_gpt2, texts, context=16)
    source = ModelSource(mini_gpt2, corpus, ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"], batch_size=4)
    cache = cache_activations(source, tmp_path, block=5)
    for start in range(0, source.n_sequences, 5):
        block = range(start, min(start + 5, source.n_sequences))
        same_rows(cache.read(block), source.read(block))
    streams = [Shuffled(each, 16, capacity=64) for each in (source, cache)]
    for _ in range(10):
        expected, found = (stream.next() for stream in streams)
        for hook in source.widths:
            torch.testing.assert_close(found[hook], expected[hook], rtol=1e-4, atol=1e-5)


def test_token_ids_are_kept(tmp_path, mini_gpt2):
    corpus = Corpus.from_texts(
        mini_gpt2, ["Mary and John went to the park.", "The capital of Peru is Lima."], name="two"
    )
    cache = cache_activations(ModelSource(mini_gpt2, corpus, ["blocks.0.hook_resid_post"]), tmp_path / "cache")
    assert cache.corpus.name == "two"
    assert torch.equal(cache.corpus.tokens, corpus.tokens)
    assert torch.equal(cache.corpus.lengths, corpus.lengths)
    ids = cache.read([1]).ids
    assert mini_gpt2.to_str_tokens(cache.corpus.tokens[ids[:, 0], ids[:, 1]])[:3] == ["The", " capital", " of"]
    assert cache_activations(ArraySource({"x": torch.randn(4, 2)}), tmp_path / "array").corpus is None
    (tmp_path / "cache" / "tokens.safetensors").write_bytes(b"x")
    with refused(LoadError, "tokens.safetensors is damaged"):
        CacheSource(tmp_path / "cache")


def test_a_matrix_in_memory(tmp_path):
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    cache = cache_activations(ArraySource({"x": values}), tmp_path, block=7)
    assert torch.equal(cache.read([29, 0, 3]).values["x"], values[[29, 0, 3]])


# ----------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("stop_before", range(7))
def test_an_interrupted_cache_goes_on_after_its_last_block(tmp_path, stop_before):
    with pytest.raises(KeyboardInterrupt):
        cache_activations(Ragged(COUNTS, stop_before=stop_before), tmp_path / "cut", block=2)
    done = stop_before // 2 * 2
    with refused(LoadError, f"has {done} of 7 sequences: call cache_activations again"):
        CacheSource(tmp_path / "cut")
    source = Ragged(COUNTS)
    cache_activations(source, tmp_path / "cut", block=3)
    compared = sorted({0, done - 1}) if done else []
    assert source.asked == [*compared, *range(done, 7)]
    cache_activations(Ragged(COUNTS), tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_a_block_whose_numbers_were_written_and_not_counted_is_written_again(tmp_path, monkeypatch):
    written, states = cache_module._write_state, []

    def stop_at_third(folder, state):
        states.append(state["done"])
        if len(states) == 3:
            raise KeyboardInterrupt
        written(folder, state)

    monkeypatch.setattr(cache_module, "_write_state", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(Ragged(COUNTS), tmp_path, block=3)
    monkeypatch.undo()
    assert states == [0, 3, 6]
    source = Ragged(COUNTS)
    cache = cache_activations(source, tmp_path, block=3)
    assert source.asked == [0, 2, 3, 4, 5, 6]
    same_rows(cache.read(range(7)), source.read(range(7)))


def test_a_finished_cache_is_only_compared(tmp_path):
    cache_activations(Ragged(COUNTS), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    source = Ragged(COUNTS)
    cache_activations(source, tmp_path)
    assert source.asked == [0, 6]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --------------------------------------------------------------------------------------------------------------- refusals


def other_text(source: Ragged) -> None:
    source.about["dataset_path"] = "other"


def other_widths(source: Ragged) -> None:
    source.widths = {"a": 3}


def other_number(source: Ragged) -> None:
    source.n_sequences = 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(other_text, r"about\['dataset_path'\] was ragged, and is other now", id="about"),
        pytest.param(other_widths, r"widths\['b'\] was 2, and is None now", id="widths"),
        pytest.param(other_number, "n_sequences was 7, and is 6 now", id="n_sequences"),
    ],
)
def test_a_cache_of_another_source_is_refused(tmp_path, change, says):
    cache_activations(Ragged(COUNTS), tmp_path)
    source = Ragged(COUNTS)
    change(source)
    with refused(OptionError, says):
        cache_activations(source, tmp_path)
    with refused(OptionError, "dtype was float32, and is float16 now"):
        cache_activations(Ragged(COUNTS), tmp_path, dtype="float16")


def test_other_activations_under_the_same_names_are_noticed(tmp_path):
    cache_activations(Ragged(COUNTS), tmp_path)
    with refused(OptionError, "sequence 0 or 6 has other activations now"):
        cache_activations(Ragged(COUNTS, seed=1), tmp_path)
    with refused(OptionError, "sequence 0 or 6 has other activations now"):
        cache_activations(Ragged([4, 1, 0, 4, 2, 0, 4]), tmp_path)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    with refused(OptionError, "a has an activation of .*e.05, more than float16 can hold"):
        cache_activations(Ragged(COUNTS, size=1e5), tmp_path, dtype="float16")
    cache_activations(Ragged(COUNTS, size=1e5), tmp_path / "wide", dtype="bfloat16")


def test_a_source_that_breaks_its_word_is_refused(tmp_path):
    greedy, confused = Ragged(COUNTS), Ragged(COUNTS)
    greedy.rows_per_sequence = 1
    with refused(OptionError, "more rows than 1 per sequence"):
        cache_activations(greedy, tmp_path / "greedy")
    read = confused.read
    confused.read = lambda sequences: read(list(sequences)[::-1])
    with refused(OptionError, "asked for sequences 0 to 6, the source gave others, or not in order"):
        cache_activations(confused, tmp_path / "confused")


def test_options_and_places_are_checked(tmp_path):
    (tmp_path / "file").write_text("something", encoding="utf-8")
    with refused(OptionError, "'float8' is not a dtype of cached activations"):
        cache_activations(Ragged(COUNTS), tmp_path / "new", dtype="float8")
    with refused(OptionError, "at least one sequence, not 0"):
        cache_activations(Ragged(COUNTS), tmp_path / "new", block=0)
    with refused(OptionError, "is a file, and cached activations need a folder"):
        cache_activations(Ragged(COUNTS), tmp_path / "file")
    with refused(OptionError, "is not empty and holds no cache"):
        cache_activations(Ragged(COUNTS), tmp_path)


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path, monkeypatch):
    usage = cache_module.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with refused(OptionError, "the cache may need 0.0 GiB more, and the disk of"):
        cache_activations(Ragged(COUNTS), tmp_path)


@pytest.mark.parametrize("name", ["0.bin", "1.bin", "ids.bin", "offsets.bin"])
def test_a_damaged_cache_is_refused(tmp_path, name):
    cache_activations(Ragged(COUNTS), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with refused(LoadError, f"is damaged: {name} has {len(content) - 1} bytes, and {len(content)} were written"):
        CacheSource(tmp_path)
    (tmp_path / name).unlink()
    with refused(LoadError, f"is damaged: {name} is missing"):
        CacheSource(tmp_path)


def test_offsets_that_make_no_sense_are_refused(tmp_path):
    cache_activations(Ragged(COUNTS), tmp_path)
    (tmp_path / "offsets.bin").write_bytes(bytes(range(64)))
    with refused(LoadError, "offsets.bin does not rise from 0"):
        CacheSource(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', "null"])
def test_a_state_that_is_none_is_refused(tmp_path, content):
    with refused(LoadError, "holds no cache of activations"):
        CacheSource(tmp_path)
    (tmp_path / "cache.json").write_text(content, encoding="utf-8")
    with refused(LoadError, "does not describe a cache of activations"):
        CacheSource(tmp_path)


def test_a_cache_of_a_later_format_is_refused(tmp_path):
    cache_activations(Ragged(COUNTS), tmp_path)
    state = json.loads((tmp_path / "cache.json").read_text(encoding="utf-8"))
    (tmp_path / "cache.json").write_text(json.dumps(state | {"format": 2}), encoding="utf-8")
    with refused(LoadError, "of format 1"):
        CacheSource(tmp_path)
