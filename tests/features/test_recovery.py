"""How well a dictionary found the true one.

Held against: the true dictionary itself; a 2 x 2 example worked out by hand; loops over latents; brute force over matchings.
"""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.features.recovery import Recovery, random_baseline, recovery
from interp.features.synthetic import TrueDictionary, toy_dictionary
from tests.small_pairs import refused

SEEDS = st.integers(0, 10_000)
NAN = pytest.approx(math.nan, nan_ok=True)


@pytest.fixture(scope="module")
def truth() -> TrueDictionary:
    return toy_dictionary(8, 16, 2, seed=0, stop_at=0.6)


@pytest.fixture(scope="module")
def true_codes(truth) -> torch.Tensor:
    return truth.sample(3000, seed=1)[1]


def rough(seed: int, n_latents: int, n_features: int, n_tokens: int = 40) -> tuple[torch.Tensor, ...]:
    """(decoder, atoms, codes, true codes), all random, a third of the codes not 0."""
    g = torch.Generator().manual_seed(seed)
    decoder, atoms = (torch.randn(n, 3, generator=g) for n in (n_latents, n_features))
    codes, true = (
        torch.rand(n_tokens, n, generator=g) * (torch.rand(n_tokens, n, generator=g) < 0.3)
        for n in (n_latents, n_features)
    )
    return decoder, atoms, codes, true


def numbers(found: Recovery) -> list[float]:
    """All that does not depend on the order of latents."""
    return [
        found.mmcs, found.mcc, found.recovered_90, found.recovered_95, found.uniqueness, found.dead, found.l0, found.true_l0,
        found.mean_f1, found.shrinkage,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- identities


def test_the_truth_recovers_itself(truth, true_codes):
    found = recovery(truth.atoms, truth.atoms, codes=true_codes, true_codes=true_codes)
    ones = [
        found.mmcs,
        found.mcc,
        found.recovered_90,
        found.recovered_95,
        found.uniqueness,
        found.mean_f1,
        found.shrinkage,
    ]
    assert ones == pytest.approx([1.0] * 7)
    assert found.dead == 0
    assert found.match.tolist() == list(range(16))
    assert found.l0 == found.true_l0 == pytest.approx(2, abs=0.2)
    for each in (found.precision, found.recall, found.f1, found.cosine):
        assert each.dtype == torch.float64
        torch.testing.assert_close(each, torch.ones(16, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_order_and_scale_of_latents_change_nothing(seed, n_latents, n_features):
    decoder, atoms, codes, true = rough(seed, n_latents, n_features)
    g = torch.Generator().manual_seed(seed + 1)
    order, scale = torch.randperm(n_latents, generator=g), 2.0 ** torch.randint(-8, 9, (n_latents,), generator=g)
    found = recovery(decoder, atoms, codes=codes, true_codes=true)
    moved = recovery((decoder * scale[:, None])[order], atoms, codes=(codes / scale)[:, order], true_codes=true)
    assert numbers(moved) == pytest.approx(numbers(found), rel=1e-12, nan_ok=True)
    assert torch.equal(moved.match, found.match[order])
    torch.testing.assert_close(moved.cosine, found.cosine)
    torch.testing.assert_close(moved.f1, found.f1[order], equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 5))
def test_against_loops(seed, n_latents, n_features):
    decoder, atoms, codes, true = (x.double() for x in rough(seed, n_latents, n_features))
    found = recovery(decoder, atoms, codes=codes, true_codes=true)
    cos = [[float(torch.cosine_similarity(a, w, dim=0)) for w in decoder] for a in atoms]
    assert found.mmcs == pytest.approx(sum(max(row) for row in cos) / n_features)
    long, short = max(n_latents, n_features), min(n_latents, n_features)
    square = [[abs(cos[i][j]) if i < n_features and j < n_latents else 0 for j in range(long)] for i in range(long)]
    best = max(sum(square[i][j] for i, j in enumerate(p)) for p in permutations(range(long)))
    assert found.mcc == pytest.approx(best / short)
    for j in range(n_latents):
        i = max(range(n_features), key=lambda i: cos[i][j])
        assert found.match[j] == i
        ours, theirs = set(codes[:, j].nonzero().flatten().tolist()), set(true[:, i].nonzero().flatten().tolist())
        hits = len(ours & theirs)
        assert float(found.precision[j]) == pytest.approx(hits / len(ours))
        assert float(found.recall[j]) == pytest.approx(hits / len(theirs))
        assert float(found.f1[j]) == pytest.approx(2 * hits / (len(ours) + len(theirs)))


def test_by_hand():
    """Atoms along the axes; one latent along the first, at twice the length, one at 3:4 between them."""
    atoms, decoder = torch.eye(2), torch.tensor([[2.0, 0.0], [0.6, 0.8]])
    true = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    codes = torch.tensor([[0.25, 1.0], [1.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
    found = recovery(decoder, atoms, codes=codes, true_codes=true)
    assert found.cosine.tolist() == pytest.approx([1.0, 0.8])
    assert (found.mmcs, found.mcc) == pytest.approx((0.9, 0.9))
    assert (found.recovered_90, found.recovered_95, found.uniqueness, found.dead) == (0.5, 0.5, 1.0, 0.0)
    assert found.match.tolist() == [0, 1]
    # latent 0 fires on tokens 0, 1, 2 and its atom on 0, 1; latent 1 fires on 0, 1 and its atom on 1, 2
    assert found.precision.tolist() == pytest.approx([2 / 3, 1 / 2])
    assert found.recall.tolist() == pytest.approx([1.0, 1 / 2])
    assert found.f1.tolist() == pytest.approx([0.8, 0.5])
    assert found.mean_f1 == pytest.approx(0.65)
    assert (found.l0, found.true_l0) == (5 / 4, 1.0)
    # only latent 0 is within .9 of its atom: sizes 2 (.25, 1) against (1, 2)
    assert found.shrinkage == pytest.approx((0.5 * 1 + 2 * 2) / (1 + 4))


def test_a_decoder_in_training_is_taken_as_it_is():
    decoder, atoms, codes, true = (x.double() for x in rough(0, 4, 3))
    still = recovery(decoder, atoms, codes=codes, true_codes=true)
    learning = recovery(decoder.requires_grad_(), atoms, codes=codes.requires_grad_(), true_codes=true)
    assert numbers(learning) == numbers(still)
    assert not learning.cosine.requires_grad


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_duplicates_lower_uniqueness_and_mcc_but_not_mmcs():
    atoms = torch.eye(3)
    more = recovery(atoms[[0, 1, 2, 0]], atoms)
    assert (more.mmcs, more.mcc, more.uniqueness) == pytest.approx((1.0, 1.0, 3 / 4))
    fewer = recovery(atoms[[0, 0, 1]], atoms)
    assert (fewer.mmcs, fewer.mcc, fewer.uniqueness) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


def test_a_latent_that_points_the_other_way_is_no_find(truth):
    flipped = truth.atoms.clone()
    flipped[3] *= -1
    found = recovery(flipped, truth.atoms)
    assert found.mmcs < 1 - 0.3 / 16
    assert found.mcc == pytest.approx(1.0)
    assert found.recovered_90 == 15 / 16
    assert recovery(-torch.eye(1), torch.eye(1)).mmcs == -1.0


@pytest.mark.parametrize("death", ["zero row", "never fires"])
def test_the_dead_match_nothing(truth, true_codes, death):
    decoder, codes = truth.atoms.clone(), true_codes.clone()
    if death == "zero row":
        decoder[5] = 0
    else:
        codes[:, 5] = 0
    found = recovery(decoder, truth.atoms, codes=codes, true_codes=true_codes)
    assert found.dead == found.uniqueness - 14 / 16 == 1 / 16
    assert found.match[5] == -1
    assert torch.isnan(torch.stack([found.precision[5], found.recall[5], found.f1[5]])).all()
    assert found.mean_f1 == pytest.approx(1.0)
    assert found.recovered_90 == 15 / 16
    assert found.mcc == pytest.approx(15 / 16)
    assert found.cosine[5] < 0.7


def test_all_dead():
    found = recovery(torch.zeros(3, 2), torch.eye(2))
    assert (found.mmcs, found.mcc, found.recovered_90, found.uniqueness, found.dead) == (0, 0, 0, 0, 1)
    silent = recovery(torch.eye(2), torch.eye(2), codes=torch.zeros(4, 2), true_codes=torch.ones(4, 2))
    assert (silent.mmcs, silent.dead, silent.l0, silent.true_l0) == (0, 1, 0, 2)
    assert (silent.mean_f1, silent.shrinkage) == (NAN, NAN)
    assert "100.0% dead" in str(silent)


def test_an_atom_that_never_fires_has_no_recall():
    found = recovery(torch.eye(2), torch.eye(2), codes=torch.ones(3, 2), true_codes=torch.tensor([[1.0, 0.0]] * 3))
    assert found.recall.tolist() == [1.0, NAN]
    assert found.precision.tolist() == [1.0, 0.0]
    assert found.f1.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("share", [0.5, 1.0, 1.25])
def test_shrinkage_is_the_factor_by_which_codes_are_too_small(truth, true_codes, share):
    found = recovery(truth.atoms, truth.atoms, codes=share * true_codes, true_codes=true_codes)
    assert found.shrinkage == pytest.approx(share)
    assert found.mean_f1 == pytest.approx(1.0)


def test_blocks_of_tokens_add_up(truth, true_codes, monkeypatch):
    codes = (true_codes + 0.2 * truth.sample(3000, seed=9)[1]).roll(1, 1)
    whole = recovery(truth.atoms, truth.atoms, codes=codes, true_codes=true_codes)
    monkeypatch.setattr("interp.features.recovery._BLOCK", 16 * 700)
    parts = recovery(truth.atoms, truth.atoms, codes=codes, true_codes=true_codes)
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ baseline


def test_chance_grows_with_the_dictionary(truth):
    few, many = (random_baseline(n, truth.atoms, seed=0) for n in (2, 200))
    assert 0 < few < many < 0.95
    assert random_baseline(2, truth.atoms, seed=0) == few
    assert random_baseline(2, truth.atoms, seed=1) != few


def test_chance_of_one_latent_is_nothing_and_in_one_dimension_everything():
    assert random_baseline(1, torch.eye(4), seed=0, n=2000) == pytest.approx(0, abs=0.03)
    assert random_baseline(40, torch.ones(3, 1), seed=0) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------- saying, and errors


def test_what_is_printed(truth, true_codes):
    bare = str(recovery(truth.atoms, truth.atoms))
    assert "MMCS 1.0000, MCC 1.0000" in bare
    assert "F1" not in bare
    full = str(recovery(truth.atoms, truth.atoms, codes=true_codes, true_codes=true_codes))
    assert "16 latents for 16 atoms: 0.0% dead, uniqueness 1.000" in full
    assert "mean F1 of live latents 1.000" in full
    far = recovery(torch.ones(1, 2), torch.eye(2), codes=torch.ones(1, 1), true_codes=torch.ones(1, 2))
    assert "no live latent within .9 of an atom" in str(far)


WRONG = {
    "width": ({"decoder": torch.ones(2, 3)}, r"a decoder \[2, 3\] and atoms \[2, 2\]"),
    "vector": ({"decoder": torch.ones(2)}, r"a decoder \[2\]"),
    "no latents": ({"decoder": torch.ones(0, 2)}, r"a decoder \[0, 2\]"),
    "one kind": ({"true_codes": None}, "both or neither"),
    "latents": ({"codes": torch.ones(4, 3)}, r"of 2 latents, not \[4, 3\]"),
    "features": ({"true_codes": torch.ones(4, 3)}, r"2 features\], not \[4, 3\]"),
    "tokens": ({"true_codes": torch.ones(5, 2)}, r"4 tokens, 2 features\], not \[5, 2\]"),
    "no tokens": ({"codes": torch.ones(0, 2), "true_codes": torch.ones(0, 2)}, "true codes are"),
    "infinite": ({"decoder": torch.full((2, 2), torch.inf)}, "decoder with values that are not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_compared_is_refused(case):
    given = {"decoder": torch.eye(2), "atoms": torch.eye(2), "codes": torch.ones(4, 2), "true_codes": torch.ones(4, 2)}
    changed, says = WRONG[case]
    given |= changed
    with refused(OptionError, says):
        recovery(given.pop("decoder"), given.pop("atoms"), **given)


def test_a_baseline_of_nothing():
    with refused(OptionError, "at least 1 latent and 1 dictionary, not 0 and 10"):
        random_baseline(0, torch.eye(2), seed=0)
