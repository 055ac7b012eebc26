"""The strongest contexts of latents.

Held against: all tokens of a small corpus, latent by latent, in loops; lists of small integers, full of ties.
"""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import LoadError, OptionError, SiteError
from interp.features.codes import Codes, Dictionary
from interp.features.config import SAEConfig
from interp.features.contexts import COLUMNS, _Best, _Firings, load_contexts, save_contexts, top_contexts
from interp.features.sae import SAE
from interp.features.sources import Corpus
from interp.model.run import record
from interp.model.tokens import token_strings
from tests.small_pairs import refused

HOOK = "blocks.1.hook_resid_post"
TEXTS = [
    "The friends Megan and Edward walked to the house. They saw a book.",
    "Anna went to the hotel with George. George decided to give a key to Anna.",
    "The dispute went on from the year 1392 until the year 1398.",
    "People who visit the capital of Norway go to Oslo.",
    "She was late.",
    "The siege began in the year 1225 and ended in the year 1231. Sally was late because she was tired.",
    "Tom Diana Jeff Emily Tom Diana Jeff Emily Tom Diana Jeff Emily.",
]


@pytest.fixture(scope="module")
def corpus(mini_gpt2) -> Corpus:
    return Corpus.from_texts(mini_gpt2, TEXTS, context=24)


def random_sae(hook: str = HOOK, d_in: int = 128, **options) -> SAE:
    options = {"k": 4} | options
    return SAE(SAEConfig(d_in=d_in, d_sae=64, hook=hook, **options), seed=3)


def by_hand(model, sae: SAE, corpus: Corpus, n: int, window: tuple[int, int]) -> pd.DataFrame:
    """Every token of every sequence, one at a time."""
    codes, n_tokens = [], 0
    for tokens, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        x = record(model, tokens[None, :length], [sae.config.hook])[sae.config.hook][0].flatten(1)
        codes.append(sae.encode(x).tolist())
        n_tokens += length - 1
    table = []
    for latent in range(64):
        best, fired = [], 0
        for s, of_sequence in enumerate(codes):
            firing = [(abs(f[latent]), -t) for t, f in enumerate(of_sequence) if t > 0 and f[latent] != 0]
            fired += len(firing)
            if firing:
                size, t = max(firing)
                best.append((-size, s, -t))
        for rank, (_, s, t) in enumerate(sorted(best)[:n]):
            length = int(corpus.lengths[s])
            strings = token_strings(model.tokenizer, corpus.tokens[s, :length].tolist())
            before, after = strings[max(0, t - window[0]) : t], strings[t + 1 : t + 1 + window[1]]
            table.append(
                [latent, rank, codes[s][t][latent], s, t, strings[t], "".join(before), "".join(after), fired / n_tokens]
            )
    return pd.DataFrame(table, columns=list(COLUMNS))


def same_contexts(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found.columns) == list(COLUMNS)
    assert len(found) == len(expected) > 0
    for name in COLUMNS:
        if name in ("value", "density"):
            assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-4)
        else:
            assert found[name].tolist() == expected[name].tolist(), name


SAES = [
    pytest.param({}, id="topk"),
    pytest.param({"architecture": "abstopk"}, id="abstopk"),
    pytest.param({"architecture": "standard", "k": None}, id="standard"),
    pytest.param({"architecture": "top-afa", "k": None, "normalize": "layer_norm"}, id="afa"),
    pytest.param({"hook": "blocks.2.attn.hook_z"}, id="heads"),
    pytest.param(
        {"target_hook": "blocks.2.hook_mlp_out", "apply_b_dec_to_input": False, "hook": "blocks.2.ln2.hook_normalized"},
        id="transcoder",
    ),
]


@pytest.mark.parametrize("options", SAES)
def test_contexts_are_the_strongest_tokens(mini_gpt2, corpus, options):
    sae = random_sae(**options)
    found = top_contexts(mini_gpt2, sae, corpus, n=3, window=(4, 2), batch_size=2)
    same_contexts(found, by_hand(mini_gpt2, sae, corpus, 3, (4, 2)))


class Loudest:
    """Some channels as a dictionary, where they are positive."""

    def __init__(self, hook: str | None, channels: list[int]):
        self.hook, self.channels, self.n_features = hook, channels, len(channels)
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def codes(self, x: torch.Tensor) -> Codes:
        assert x.dtype == self.dtype
        return Codes.where(x[:, self.channels] > 0, x[:, self.channels])


def test_every_dictionary_has_contexts(mini_gpt2, corpus):
    """Of its own codes, without a model of what it is."""
    hook, channels = "blocks.2.mlp.hook_post", [7, 300, 12]
    dictionary = Loudest(hook, channels)
    assert isinstance(dictionary, Dictionary)
    assert isinstance(random_sae(), Dictionary)
    assert not isinstance(torch.nn.Linear(2, 2), Dictionary)
    found = top_contexts(mini_gpt2, dictionary, corpus, n=1).set_index("latent")
    for latent, channel in enumerate(channels):
        best = max(
            (float(record(mini_gpt2, tokens[None, :length], [hook])[hook][0, t, channel]), s, t)
            for s, (tokens, length) in enumerate(zip(corpus.tokens, corpus.lengths.tolist(), strict=True))
            for t in range(1, length)
        )
        assert found.loc[latent, "value"] == pytest.approx(best[0], rel=1e-4)
        assert tuple(found.loc[latent, ["sequence", "position"]]) == best[1:]
    with refused(SiteError, "this Loudest does not say which hook"):
        top_contexts(mini_gpt2, Loudest(None, channels), corpus)
    with refused(SiteError, "the Loudest has latents 0 to 2, not 3"):
        top_contexts(mini_gpt2, dictionary, corpus, latents=[3])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("n", [1, 20])
def test_batches_and_pieces_do_not_matter(mini_gpt2, corpus, monkeypatch, n, batch_size):
    monkeypatch.setattr("interp.features.contexts._ENTRIES", 64 * 5)
    sae = random_sae()
    found = top_contexts(mini_gpt2, sae, corpus, n=n, window=(0, 30), batch_size=batch_size)
    same_contexts(found, by_hand(mini_gpt2, sae, corpus, n, (0, 30)))


def test_some_latents_are_rows_of_all(mini_gpt2, corpus):
    whole = top_contexts(mini_gpt2, random_sae(), corpus)
    asked = [int(latent) for latent in whole["latent"].unique()[[5, 2, 9]]]
    found = top_contexts(mini_gpt2, random_sae(), corpus, latents=[*asked, asked[0]])
    expected = pd.concat([whole[whole["latent"] == latent] for latent in asked], ignore_index=True)
    pd.testing.assert_frame_equal(found, expected)
    assert top_contexts(mini_gpt2, random_sae(), corpus, latents=[]).empty


def test_a_latent_that_never_fires_has_no_row(mini_gpt2, corpus):
    sae = random_sae(architecture="standard", k=None)
    sae.b_enc[7] = -1e6
    assert 7 not in set(top_contexts(mini_gpt2, sae, corpus)["latent"])
    sae.b_enc.fill_(-1e6)
    nothing = top_contexts(mini_gpt2, sae, corpus)
    assert nothing.empty
    assert list(nothing.columns) == list(COLUMNS)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 4), st.integers(1, 5),
)  # fmt: skip
def test_ties_go_to_what_comes_first(corpus_of_codes, n, batch_size):
    """Sequences of codes of three latents, small integers; a running top n against sorted lists."""
    best = _Best(3, n, torch.device("cpu"), torch.float32)
    for start in range(0, len(corpus_of_codes), batch_size):
        chunk = range(start, min(start + batch_size, len(corpus_of_codes)))
        firings = [
            (i, f, s, t) for s in chunk for t, row in enumerate(corpus_of_codes[s]) for i, f in enumerate(row) if f
        ]
        halves = [firings[: len(firings) // 2], firings[len(firings) // 2 :]]
        parts = [torch.tensor(half, dtype=torch.int64).reshape(-1, 4).unbind(1) for half in halves]
        best.add([_Firings(i, f.float(), s, t) for i, f, s, t in parts], chunk)
    for latent in range(3):
        places = []
        for s, rows in enumerate(corpus_of_codes):
            size, t = max((abs(row[latent]), -t) for t, row in enumerate(rows))
            if size:
                places.append((-size, s, -t))
        expected = [(corpus_of_codes[s][t][latent], s, t) for _, s, t in sorted(places)[:n]]
        expected += [(0, -1, -1)] * (n - len(expected))
        assert [
            *zip(*(side[latent].tolist() for side in (best.value, best.sequence, best.position)), strict=True)
        ] == expected


def test_characters_of_several_tokens_are_put_together(gpt2_words):
    text = "she said 雪が降る and left"
    corpus = Corpus.from_texts(gpt2_words, [text], context=64)
    table = top_contexts(gpt2_words, random_sae("blocks.0.hook_resid_post", 8), corpus, window=(64, 64))
    assert table["after"].str.contains("雪が降る", regex=False).any()
    bos = gpt2_words.tokenizer.bos_token if gpt2_words.cfg.prepend_bos else ""
    for row in table.itertuples():
        if "\ufffd" not in row.before + row.token + row.after:
            assert row.before + row.token + row.after == bos + text


def test_refusals(mini_gpt2, corpus):
    with refused(SiteError, "latents 0 to 63, not -1"):
        top_contexts(mini_gpt2, random_sae(), corpus, latents=[3, -1])
    with refused(SiteError, "mini-gpt2 has no hook point 'blocks.7.hook_resid_post'"):
        top_contexts(mini_gpt2, random_sae("blocks.7.hook_resid_post"), corpus)
    with refused(SiteError, "does not say which hook"):
        top_contexts(mini_gpt2, random_sae(None), corpus)
    with refused(OptionError, "reads 64 channels, and the activations have 128"):
        top_contexts(mini_gpt2, random_sae(HOOK, 64), corpus)
    with refused(OptionError, "cannot keep 0 contexts"):
        top_contexts(mini_gpt2, random_sae(), corpus, n=0)
    with refused(OptionError, "a number of tokens before and one after"):
        top_contexts(mini_gpt2, random_sae(), corpus, window=(-1, 5))


# ----------------------------------------------------------------------------------------------------------------- files


def many_contexts(n_latents: int, n: int = 20) -> pd.DataFrame:
    """A table of the right form, in no order."""
    rng = np.random.default_rng(0)
    size = n_latents * n
    table = pd.DataFrame(
        {
            "latent": np.repeat(np.arange(n_latents), n),
            "rank": np.tile(np.arange(n), n_latents),
            "value": rng.random(size, dtype=np.float32),
            "sequence": rng.integers(0, 10**6, size),
            "position": rng.integers(1, 128, size),
            "token": [f" word{i % 997}" for i in range(size)],
            "before": [f"text that stands before number {i}" for i in range(size)],
            "after": [f" and after {i}" for i in range(size)],
            "density": np.repeat(rng.random(n_latents), n),
        }
    )
    return table.iloc[rng.permutation(size)]


def test_a_file_gives_back_what_was_saved(mini_gpt2, corpus, tmp_path):
    table = top_contexts(mini_gpt2, random_sae(), corpus, latents=range(40, 10, -1))
    path = save_contexts(table, tmp_path / "contexts.parquet")
    ordered = table.sort_values(["latent", "rank"], ignore_index=True)
    pd.testing.assert_frame_equal(load_contexts(path), ordered)
    some = [int(latent) for latent in ordered["latent"].unique()[[3, 0]]]
    expected = ordered[ordered["latent"].isin(some)].reset_index(drop=True)
    pd.testing.assert_frame_equal(load_contexts(path, latents=some), expected)
    assert load_contexts(path, latents=[9]).empty


def test_one_latent_is_found_at_once(tmp_path):
    """Of 100 000 rows; the fastest of several times, with room for a slow machine."""
    table = many_contexts(5000)
    path = save_contexts(table, tmp_path / "contexts.parquet")
    load_contexts(path, latents=[1])
    times = []
    for latent in (17, 2500, 4999):
        start = time.perf_counter()
        found = load_contexts(path, latents=[latent])
        times.append(time.perf_counter() - start)
        expected = table[table["latent"] == latent].sort_values("rank", ignore_index=True)
        pd.testing.assert_frame_equal(found, expected)
    assert min(times) < 0.1


def test_files_that_hold_no_contexts_are_refused(tmp_path):
    with refused(LoadError, "there is no file"):
        load_contexts(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet", encoding="utf-8")
    with refused(LoadError, "text.parquet holds no contexts"):
        load_contexts(tmp_path / "text.parquet")
    pd.DataFrame({"latent": [1], "value": [2.0]}).to_parquet(tmp_path / "other.parquet")
    with refused(LoadError, "other.parquet holds no contexts"):
        load_contexts(tmp_path / "other.parquet")
    pd.DataFrame({"value": [2.0]}).to_parquet(tmp_path / "third.parquet")
    with refused(LoadError, "third.parquet holds no contexts"):
        load_contexts(tmp_path / "third.parquet", latents=[1])
    with refused(OptionError, "contexts are written as .parquet, not .csv"):
        save_contexts(many_contexts(1), tmp_path / "contexts.csv")
    with refused(OptionError, "the table has no column 'before'"):
        save_contexts(many_contexts(1).drop(columns="before"), tmp_path / "contexts.parquet")
