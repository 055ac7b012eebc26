"""Readings that hold when one acts on them, on a bundled model: the small version of benchmarks/steering.py."""

import pytest

from benchmarks.steering import Options, clamp_check, planted_texts, steering_check
from interp import compare_steering
from interp.tasks.named import TASKS


def test_clamping_the_neurons_that_read_as_a_token_raises_it_more_than_others_do(mini_llama, monkeypatch):
    monkeypatch.setattr("benchmarks.steering.TOKENS", (" Mary", " Paris", " he", " keys"))
    rows = clamp_check(mini_llama, Options())
    assert len(rows) == 4
    for row in rows:
        assert row["low"] > 0, row["token"]
        assert row["p"] < 1e-6
        assert row["p_sets"] < 0.05


def test_an_snmf_feature_steers_its_concept_at_least_as_well_as_diffmeans(mini_gpt2, monkeypatch):
    monkeypatch.setattr("benchmarks.steering.PROMPTS", ("We know that the",))
    scores = steering_check(mini_gpt2, Options(texts=30, n=2, k=40))
    compared = compare_steering(scores, "SNMF", "DiffMeans", by=["concept_name", "target", "sample"])
    assert compared.n_pairs > 50
    assert compared.high > 0
    assert compared.difference > 0


def test_the_planted_texts_are_the_tasks_with_their_answers():
    texts = planted_texts(3, seed=0)
    assert list(texts) == list(TASKS)
    assert all(len(some) == 3 for some in texts.values())
    assert planted_texts(3, seed=0) == texts


@pytest.mark.parametrize("model", ["mini_gpt2", "mini_llama"])
def test_a_concepts_tokens_are_its_own(model, request):
    from benchmarks.steering import own_tokens

    tokens = own_tokens(request.getfixturevalue(model), planted_texts(30, seed=0))
    named = [token for some in tokens.values() for token in some]
    assert len(named) == len(set(named))
    assert all(tokens.values())
