"""Concept detection and shared neurons: planted directions with known scores, pairs counted in loops, sets of neurons."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import OptionError, SiteError, TaskError
from interp.factorize.concepts import concept_detection, core_neurons, neuron_overlap, text_activations
from interp.factorize.snmf import fit_snmf
from interp.features.codes import Dictionary
from interp.features.contexts import top_contexts
from interp.features.effects import direction_effects
from interp.features.sources import Corpus
from interp.model.run import record
from tests.small_pairs import refused

DOUBLE = torch.float64
TEXTS = ["Anna went to the hotel with George.", "She was late.", "They saw a book in the house."]


def with_cosines(cosines: list[float], seed: int = 0, *, d: int = 6) -> Tensor:
    """[token, d]: tokens of random length whose cosines with the first axis are these."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.nn.functional.normalize(torch.randn(len(cosines), d - 1, generator=generator, dtype=DOUBLE), dim=1)
    c = torch.tensor(cosines, dtype=DOUBLE)[:, None]
    rows = torch.cat([c, (1 - c**2).sqrt() * rest], 1)
    return rows * torch.rand(len(cosines), 1, generator=generator, dtype=DOUBLE).exp()


AXIS = torch.eye(6, dtype=DOUBLE)[:1]


# -------------------------------------------------------------------------------------------------------- detection


def test_a_planted_direction_has_its_score():
    active = [with_cosines([0.1, 0.8, -0.9]), with_cosines([0.6, 0.2], 1)]
    neutral = [with_cosines([0.1, -0.5], 2), with_cosines([0.3], 3), with_cosines([0.2, 0.2], 4)]
    table = concept_detection(AXIS, active, neutral)
    assert table.columns.tolist() == [
        "feature", "s_cd", "floored", "auroc", "difference", "mean_active", "mean_neutral",
    ]  # fmt: skip
    (row,) = table.to_dict("records")
    assert row["feature"] == 0
    assert not row["floored"]
    assert row["auroc"] == 1
    assert row["mean_active"] == pytest.approx(0.7)
    assert row["mean_neutral"] == pytest.approx(0.2)
    assert row["difference"] == pytest.approx(0.5)
    assert row["s_cd"] == pytest.approx(math.log(0.7 / 0.2))


@pytest.mark.parametrize(
    ("on", "off", "score"),
    [
        (0.5, -0.2, math.log(0.5 / 0.01)),
        (-0.2, 0.5, -math.log(0.5 / 0.01)),
        (-0.3, -0.6, 0.0),
        (0.5, 0.01, math.log(0.5 / 0.01)),
    ],
    ids=["neutral below", "active below", "both below", "at the floor"],
)
def test_scores_are_there_where_means_are_not_positive(on, off, score):
    table = concept_detection(AXIS, [with_cosines([on])], [with_cosines([off])], floor=0.01 + 1e-12)
    assert table["s_cd"][0] == pytest.approx(score, abs=1e-6)
    assert table["floored"][0]
    assert table["difference"][0] == pytest.approx(on - off)
    assert table["auroc"][0] == (on > off)


LEVELS = st.lists(st.integers(-4, 4), min_size=1, max_size=6)


@given(LEVELS, LEVELS)
def test_auroc_counts_pairs(on, off):
    """Of equal cosines, too: rows are scaled copies of few directions, by powers of two so that they stay equal."""
    text = lambda level, i: 2.0**i * with_cosines([level / 5])  # noqa: E731
    active, neutral = ([text(level, i) for i, level in enumerate(side)] for side in (on, off))
    expected = sum((a > b) + (a == b) / 2 for a in on for b in off) / (len(on) * len(off))
    forward, backward = concept_detection(AXIS, active, neutral), concept_detection(AXIS, neutral, active)
    assert forward["auroc"][0] == pytest.approx(expected)
    assert backward["auroc"][0] == pytest.approx(1 - expected)
    assert backward["s_cd"][0] == pytest.approx(-forward["s_cd"][0])
    assert backward["floored"][0] == forward["floored"][0]


def test_lengths_do_not_matter_and_zeros_have_cosine_0():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 6, generator=generator, dtype=DOUBLE)
    active = [torch.randn(n, 6, generator=generator, dtype=DOUBLE) for n in (4, 1, 7)]
    neutral = torch.randn(2, 5, 6, generator=generator, dtype=DOUBLE)
    plain = concept_detection(z, active, neutral)
    lengths = torch.tensor([[1e-200], [1.0], [1e200]], dtype=DOUBLE)
    scaled = concept_detection(z * lengths, [x * 1e180 for x in active], neutral * 1e-180)
    for name in plain.columns:
        assert scaled[name].tolist() == pytest.approx(plain[name].tolist(), rel=1e-12), name
    dead = concept_detection(torch.zeros(1, 6, dtype=DOUBLE), active, neutral).iloc[0]
    assert dead["floored"]
    assert dead[["s_cd", "auroc", "difference", "mean_active", "mean_neutral"]].tolist() == [0, 0.5, 0, 0, 0]


def test_half_precision_is_read_in_float32():
    active, neutral = [with_cosines([0.8])], [with_cosines([0.1], 1)]
    halves = [[x.to(torch.bfloat16) for x in side] for side in (active, neutral)]
    found = concept_detection(AXIS.to(torch.bfloat16), *halves)["s_cd"][0]
    exact = concept_detection(AXIS.float(), *([x.float() for x in side] for side in halves))["s_cd"][0]
    assert found == pytest.approx(exact, rel=1e-6)


def test_refusals_of_detection():
    text = with_cosines([0.5])
    with refused(OptionError, "there is no neutral text"):
        concept_detection(AXIS, [text], [])
    with refused(OptionError, r"active text 1 is \[1, 5\]"):
        concept_detection(AXIS, [text, text[:, :5]], [text])
    with refused(OptionError, "neutral text 0 has no token"):
        concept_detection(AXIS, [text], [text[:0]])
    with refused(OptionError, "a floor under means is above 0, not 0"):
        concept_detection(AXIS, [text], [text], floor=0.0)


# ------------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_post", "blocks.2.attn.hook_z"], ids=["neurons", "heads"])
def test_each_text_has_what_it_has_alone(mini_gpt2, hook):
    found = text_activations(mini_gpt2, hook, TEXTS, batch_size=2)
    assert len(found) == len(TEXTS)
    for x, text in zip(found, TEXTS, strict=True):
        tokens = Corpus.from_texts(mini_gpt2, [text]).tokens
        torch.testing.assert_close(x, record(mini_gpt2, tokens, [hook])[hook][0, 1:].flatten(1), rtol=1e-4, atol=1e-5)


def test_long_texts_are_read_in_windows(mini_gpt2):
    hook = "blocks.0.hook_resid_post"
    long = " ".join(TEXTS)
    windows = Corpus.from_texts(mini_gpt2, [long], context=10)
    short, read, last = text_activations(mini_gpt2, hook, [TEXTS[1], long, TEXTS[0]], context=10)
    assert len(windows.tokens) > 1
    assert len(read) == int(windows.lengths.sum()) - len(windows.tokens)
    alone = [text_activations(mini_gpt2, hook, [text], context=10)[0] for text in (TEXTS[1], long, TEXTS[0])]
    for x, expected in zip((short, read, last), alone, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_a_concept_is_detected_in_a_model(mini_gpt2):
    """The difference of the means of two kinds of texts, on texts like them."""
    hook = "blocks.2.hook_resid_post"
    wars = [("dispute", 1392), ("siege", 1225), ("war", 1611), ("dispute", 1403)]
    walks = [
        ("Anna", "hotel", "George"),
        ("Megan", "house", "Tom"),
        ("Emily", "house", "Jeff"),
        ("Tom", "hotel", "Anna"),
    ]
    years = [f"The {what} went on from the year {year} until the year {year + 9}." for what, year in wars]
    names = [f"{one} went to the {place} with {other}." for one, place, other in walks]
    active, neutral = (text_activations(mini_gpt2, hook, texts) for texts in (years, names))
    difference = torch.cat(active[:2]).mean(0) - torch.cat(neutral[:2]).mean(0)
    found = concept_detection(torch.stack([difference, -difference]), active[2:], neutral[2:])
    assert found["auroc"].tolist() == [1, 0]
    assert found["s_cd"][0] > 0 > found["s_cd"][1]


def test_features_of_an_snmf_are_read_by_what_reads_dictionaries(mini_gpt2):
    """Contexts, output tokens and concepts of its components, on the text that it was fitted to."""
    hook = "blocks.1.mlp.hook_post"
    corpus = Corpus.from_texts(mini_gpt2, TEXTS)
    snmf = fit_snmf(mini_gpt2, corpus, hook, n_features=4, share=0.05, n_init=2, max_iter=5)
    assert isinstance(snmf, Dictionary)
    contexts = top_contexts(mini_gpt2, snmf, corpus, n=1).set_index("latent")
    weights = snmf.transform(torch.cat(text_activations(mini_gpt2, hook, TEXTS)))
    strongest = weights.max(0)
    places = corpus.mask().nonzero()
    for feature, row in contexts.iterrows():
        assert row["value"] == pytest.approx(float(strongest.values[feature]), rel=1e-3)
        assert (row["sequence"], row["position"]) == tuple(places[strongest.indices[feature]].tolist())
    effects = direction_effects(mini_gpt2, snmf.hook, snmf.components_, k=2)
    written = snmf.components_ @ mini_gpt2.blocks[1].mlp.W_out
    assert effects["token_id"].equals(direction_effects(mini_gpt2, "blocks.1.hook_mlp_out", written, k=2)["token_id"])
    active, neutral = (text_activations(mini_gpt2, hook, texts) for texts in (TEXTS[:2], TEXTS[2:]))
    assert len(concept_detection(snmf.components_, active, neutral)) == 4
    assert (neuron_overlap(snmf.components_).diagonal() == 26).all()


def test_refusals_of_texts(mini_gpt2):
    hook = "blocks.0.hook_resid_post"
    with refused(TaskError, "no texts to read"):
        text_activations(mini_gpt2, hook, [])
    with refused(TaskError, "the text ''"):
        text_activations(mini_gpt2, hook, ["She was late.", ""])
    with refused(SiteError, "no hook point 'blocks.9.hook_resid_post'"):
        text_activations(mini_gpt2, "blocks.9.hook_resid_post", TEXTS)


# ---------------------------------------------------------------------------------------------------------- neurons

DAYS = torch.zeros(3, 9)
DAYS[:, :2] = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [0.5, 0.5]])  # core
DAYS[0, 2:4], DAYS[1, 4], DAYS[2, 5] = 1.0, 2.0, 3.0  # exclusive
DAYS[0, 6] = DAYS[1, 6] = -1.0  # of two


def test_weekdays_share_core_neurons():
    core, exclusive = core_neurons(DAYS, [2, 0, 1])
    assert core.tolist() == [0, 1]
    assert {day: neurons.tolist() for day, neurons in exclusive.items()} == {2: [5], 0: [2, 3], 1: [4]}
    core, exclusive = core_neurons(DAYS, [0, 1])
    assert core.tolist() == [0, 1, 6]
    assert exclusive[1].tolist() == [4]
    assert neuron_overlap(DAYS).tolist() == [[5, 3, 2], [3, 4, 2], [2, 2, 3]]


@given(st.lists(st.lists(st.sampled_from([-1.5, 0.0, 2.0]), min_size=7, max_size=7), min_size=2, max_size=5))
def test_neurons_are_sets(rows):
    components = torch.tensor(rows)
    sets = [{n for n, value in enumerate(row) if value} for row in rows]
    assert neuron_overlap(components).tolist() == [[len(a & b) for b in sets] for a in sets]
    core, exclusive = core_neurons(components, range(len(rows)))
    assert core.tolist() == sorted(set.intersection(*sets))
    for i, own in exclusive.items():
        assert own.tolist() == sorted(sets[i] - set.union(*(s for j, s in enumerate(sets) if j != i)))


def test_refusals_of_neurons():
    with refused(OptionError, r"two or more different features, not \[1\]"):
        core_neurons(DAYS, [1])
    with refused(OptionError, r"two or more different features, not \[1, 1\]"):
        core_neurons(DAYS, [1, 1])
    with refused(OptionError, "features 0 to 2, not 3"):
        core_neurons(DAYS, [0, 3])
