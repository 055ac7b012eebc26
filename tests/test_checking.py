"""Spot checks: the sample is really patched, in the result's own direction, and errors say what cannot be checked."""

import numpy as np
import pytest

from interp import activation_patching, attribution, compare, spot_check
from interp.errors import OptionError
from tests.small_pairs import NEURONS, refused, small_pairs

SITES = ["resid_pre", "head"]


@pytest.mark.parametrize("direction", ["denoise", "noise", "both"])
def test_checking_everything_is_comparing_with_everything(tiny, direction):
    model, pairs = tiny("llama3"), small_pairs(3, 6, lengths=[6, 5, 6])
    scores = attribution(model, pairs, SITES, direction=direction)
    check = spot_check(model, pairs, scores)
    expected = compare(scores, activation_patching(model, pairs, SITES, direction=direction))
    np.testing.assert_allclose(check.table.values, expected.values, rtol=1e-6)
    assert check.n_checked == check.n_places == 3 * 6 + 3 * 4 * 6
    assert "all 90 places" in str(check)


def test_a_sample_is_drawn_by_its_seed(tiny):
    model, pairs = tiny("gpt2"), small_pairs(3, 6)
    scores = attribution(model, pairs, SITES)
    check = spot_check(model, pairs, scores, n=10, seed=1)
    assert check.n_checked == 20
    assert "20 of 90 places drawn at random" in check.says
    assert check.table.equals(spot_check(model, pairs, scores, n=10, seed=1).table)
    assert not check.table.equals(spot_check(model, pairs, scores, n=10, seed=2).table)


def test_no_place_is_drawn_that_cannot_change(tiny):
    model, pairs = tiny("gpt2"), small_pairs(3, 6, differ=(5,))
    check = spot_check(model, pairs, attribution(model, pairs, SITES), n=4)
    assert check.table.n["head"] == 3 * 4
    assert check.n_checked == 3 + 4, "the stream has one place per layer"


@pytest.mark.parametrize(
    ("sites", "options"),
    [
        ("neuron", {"neurons": NEURONS}),
        ("mlp_out", {"positions": "all"}),
        ("v", {"positions": [-1, 0]}),
        ("pattern", {}),
    ],
    ids=["neurons", "all positions", "some positions", "pattern rows"],
)
def test_every_layout_can_be_checked(tiny, sites, options):
    model, pairs = tiny("llama3"), small_pairs(2, 5)
    scores = attribution(model, pairs, sites, metric="probability", **options)
    exact = activation_patching(model, pairs, sites, metric="probability", **options)
    np.testing.assert_allclose(spot_check(model, pairs, scores).table.values, compare(scores, exact).values, rtol=1e-6)


def test_what_cannot_be_checked_is_refused(tiny):
    model, pairs = tiny("gpt2"), small_pairs()
    for options, says in (
        ({"normalize": True}, "metric's own unit"),
        ({"metric": ["logit_diff", "probability"]}, "reads one metric"),
    ):
        with refused(OptionError, says):
            spot_check(model, pairs, attribution(model, pairs, "mlp_out", **options), metric="logit_diff")
    cells = attribution(model, pairs, "pattern", positions="cells")
    with refused(OptionError, "without windows or single pattern cells"):
        spot_check(model, pairs, cells)
