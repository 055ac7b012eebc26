"""Masks learned by gradient descent, and the constants of optimal ablation.

Held against: the known circuits; the distributions of masks in closed form; for the gradient that samples carry, the
expected loss of independent coins, worked out over all their outcomes; for constants, means and zeros, and what the loss
does not depend on.
"""

import itertools

import numpy as np
import pytest
import torch

from interp.circuits import learned
from interp.circuits.ablations import Outputs, ablated_outputs
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import faithfulness
from interp.circuits.graph import Graph, edge_mask
from interp.circuits.learned import learn_mask
from interp.circuits.masked import MaskedRuns
from interp.circuits.optimal import kl_to_clean, optimal_outputs
from interp.circuits.similarity import auroc
from interp.errors import MetricError, OptionError, UnsupportedModel
from tests.circuits.masked_oracle import circuits
from tests.circuits.test_exact import prompts
from tests.known_circuits.building import KnownCircuit
from tests.known_circuits.circuits import frac_prevs, induction, reverse
from tests.known_circuits.gates import and_of_two
from tests.small_pairs import refused, small_pairs

DOUBLE = torch.float64
METHODS = pytest.mark.parametrize("method", ["ugs", "hard-concrete"])
LOGITS = torch.tensor([-4.0, -1.5, 0.0, 0.4, 2.2, 5.0], dtype=DOUBLE)


def known_edges(known: KnownCircuit) -> Circuit:
    return Circuit.from_edges(Graph.of(known.model.cfg), known.edges)


def inside_and_outside(scores, known: KnownCircuit) -> tuple[np.ndarray, np.ndarray]:
    mine = known_edges(known).kept
    return scores.values[mine], scores.values[edge_mask(known.model.cfg) & ~mine]


def every_noise(n: int) -> torch.Tensor:
    """[n, edge]: evenly spaced between 0 and 1, so that a mean over them is an integral."""
    return ((torch.arange(n, dtype=DOUBLE) + 0.5) / n)[:, None].expand(n, len(LOGITS))


# -------------------------------------------------------------------------------------------------------- known circuits


@METHODS
@pytest.mark.parametrize("circuit", [induction, reverse, frac_prevs, and_of_two], ids=lambda circuit: circuit.__name__)
def test_a_known_circuit_is_learned(circuit, method):
    known = circuit()
    found = learn_mask(known.model, known.pairs, method=method, penalty=0.01, steps=150)
    inside, outside = inside_and_outside(found, known)
    assert inside.min() > 0.5 > outside.max()
    assert auroc(found, known_edges(known)) == 1.0
    assert np.isnan(found.values[~edge_mask(known.model.cfg)]).all()
    assert ((found >= 0) & (found <= 1)).values[edge_mask(known.model.cfg)].all()
    cut = Circuit.from_scores(found, threshold=0.5)
    assert set(cut.edges) == known.edges
    assert float(faithfulness(known.model, known.pairs, cut).faithfulness[0]) == pytest.approx(1, abs=1e-8)
    assert found.attrs["expected_edges"] < len(known.edges) + 0.05 * edge_mask(known.model.cfg).sum()


def test_a_mask_is_learned_by_another_metric():
    known = reverse()
    found = learn_mask(known.model, known.pairs, metric="logit_diff", steps=120, penalty=0.01)
    inside, outside = inside_and_outside(found, known)
    assert inside.min() > 0.5 > outside.max()
    assert found.attrs["metric"] == "logit_diff"


@METHODS
def test_what_costs_more_than_it_is_worth_goes(method):
    """By noising, an edge of this circuit is worth about 5 nats at most."""
    known = reverse()
    found = learn_mask(known.model, known.pairs, method=method, penalty=50.0, steps=120)
    assert np.nanmax(found) < 0.5
    assert found.attrs["expected_edges"] < 0.05 * edge_mask(known.model.cfg).sum()
    assert found.attrs["loss"] > 1  # and the behaviour with them


@METHODS
def test_for_free_everything_that_helps_is_kept(method):
    known = reverse()
    found = learn_mask(known.model, known.pairs, method=method, penalty=0.0, steps=120)
    inside, outside = inside_and_outside(found, known)
    assert inside.min() > 0.95
    empty = faithfulness(known.model, known.pairs, known_edges(known), metric="kl_divergence").metric_empty.mean()
    assert found.attrs["loss"] < 0.05 * empty
    assert outside.min() > 0.5  # nothing pulls at the others: they stay where they began


@METHODS
def test_masks_are_learned_again_from_the_same_seed(tiny, method):
    model, pairs = tiny("gpt2"), small_pairs(n=4)
    options = {"method": method, "steps": 5, "n_prompts": 2, "ablation": "mean", "reference": small_pairs(n=3, seed=5)}
    found = [learn_mask(model, pairs, seed=seed, **options) for seed in (0, 0, 1)]
    assert found[0].identical(found[1])
    assert np.nanmax(np.abs(found[0] - found[2])) > 1e-6
    without = learn_mask(model, pairs, seed=0, **{**options, "reference": None})
    assert np.nanmax(np.abs(found[0] - without)) > 1e-6
    a = found[0].attrs
    assert (a["method"], a["steps"], a["ablation"], a["mask_seed"]) == (f"learn_mask ({method})", 5, "mean", 0)
    assert Circuit.ranked(found[0]).helpful_sign == 1


@pytest.mark.parametrize("start", [0.5, 0.9])
def test_every_probability_starts_where_it_is_told(tiny, start):
    model, pairs = tiny("gpt2"), small_pairs()
    for method in ("ugs", "hard-concrete"):
        found = learn_mask(model, pairs, method=method, steps=1, learning_rate=1e-9, start=start)
        np.testing.assert_allclose(found.values[edge_mask(model.cfg)], start, rtol=1e-5)
        assert found.attrs["expected_edges"] == pytest.approx(start * edge_mask(model.cfg).sum(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the samplers


def test_the_mean_of_uniform_gradient_sampling_is_the_probability():
    masks, p = learned._ugs(LOGITS, every_noise(200_000)), LOGITS.sigmoid()
    torch.testing.assert_close(masks.mean(0), p, rtol=0, atol=1e-8)
    between = (masks > 0) & (masks < 1)
    torch.testing.assert_close(between.double().mean(0), p * (1 - p), rtol=0, atol=2e-5)
    for i in range(len(LOGITS)):  # uniform between
        values = masks[:, i][between[:, i]]
        torch.testing.assert_close(values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE)),
                                   torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE), rtol=0, atol=1e-3)  # fmt: skip


def test_the_mean_gradient_is_that_of_a_coin():
    """Of E[loss] = p loss(1) + (1 - p) loss(0) with respect to the logit, also if the loss is curved in between."""
    logits = LOGITS.clone().requires_grad_()
    curved = lambda mask: 3 * mask**2 - 5 * mask + mask**3  # noqa: E731
    masks = learned._ugs(logits, every_noise(200_000))
    (found,) = torch.autograd.grad(curved(masks).mean(0).sum(), logits)
    coin = LOGITS.clone().requires_grad_()
    p, end = coin.sigmoid(), torch.ones((), dtype=DOUBLE)
    (expected,) = torch.autograd.grad((p * curved(end) + (1 - p) * curved(0 * end)).sum(), coin)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_the_mean_gradient_is_that_of_independent_coins_where_edges_add_and_multiply():
    """The loss is linear in each mask: then also the others' fractions cost nothing, and it is the gradient exactly."""
    logits = torch.tensor([-0.5, 1.0, 0.3], dtype=DOUBLE, requires_grad=True)
    loss = lambda m: m[..., 0] * m[..., 1] - 2 * m[..., 1] * m[..., 2] + 0.7 * m[..., 0] + m.prod(-1)  # noqa: E731
    noise = torch.rand(400_000, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(loss(learned._ugs(logits, noise)).mean(), logits)
    p, total = logits.sigmoid(), 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=3):
        coins = torch.tensor(outcome, dtype=DOUBLE)
        total = total + (coins * p + (1 - coins) * (1 - p)).prod() * loss(coins)
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_hard_concrete_masks_have_the_mass_at_their_ends_that_the_formula_gives():
    masks = learned._hard_concrete(LOGITS, every_noise(400_000))
    torch.testing.assert_close((masks > 0).double().mean(0), learned._chance_of_some(LOGITS), rtol=0, atol=1e-5)
    torch.testing.assert_close(  # the distribution is its own mirror image
        (masks < 1).double().mean(0), learned._chance_of_some(-LOGITS), rtol=0, atol=1e-5
    )
    assert ((masks >= 0) & (masks <= 1)).all()
    logits = LOGITS.clone().requires_grad_()
    (found,) = torch.autograd.grad(learned._hard_concrete(logits, every_noise(200_000)).mean(0).sum(), logits)
    h = 1e-3
    up, down = (learned._hard_concrete(LOGITS + s * h, every_noise(200_000)).mean(0) for s in (1, -1))
    torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-3, atol=1e-6)


@METHODS
def test_noise_at_the_very_ends_gives_finite_masks_and_gradients(method):
    sampler = {"ugs": learned._ugs, "hard-concrete": learned._hard_concrete}[method]
    logits = torch.tensor([-60.0, 0.0, 60.0], requires_grad=True)
    masks = sampler(logits, torch.tensor([0.0, 1e-9, 1.0])[:, None].expand(3, 3))
    (gradient,) = torch.autograd.grad(masks.sum(), logits)
    assert torch.isfinite(masks).all()
    assert torch.isfinite(gradient).all()


# --------------------------------------------------------------------------------------------------- optimal ablation


def kl(model, pairs, ablated: Outputs, masks: np.ndarray) -> float:
    runs = MaskedRuns(model, pairs, ablated)
    return float(kl_to_clean(model, runs.run(torch.from_numpy(masks)), runs.clean_final).mean())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_optimal_constants_do_better_than_means_and_zeros(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    for mask in circuits(model.cfg, family, (0.0, 0.3)).numpy():
        found = kl(model, pairs, optimal_outputs(model, pairs, mask[None], steps=100), mask[None])
        mean, zero = (kl(model, pairs, ablated_outputs(model, pairs, a), mask[None]) for a in ("mean", "zero"))
        assert found < 0.9 * mean
        assert found < zero


def test_one_set_of_constants_for_several_circuits(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    masks = circuits(model.cfg, "several", (0.2, 0.6, 0.6)).numpy()
    together = optimal_outputs(model, pairs, masks, steps=100)
    assert kl(model, pairs, together, masks) < kl(model, pairs, ablated_outputs(model, pairs, "mean"), masks)
    alone = [kl(model, pairs, optimal_outputs(model, pairs, mask[None], steps=100), mask[None]) for mask in masks]
    assert np.mean(alone) < kl(model, pairs, together, masks)


def test_constants_are_alike_at_all_positions_and_prompts_and_can_be_found_again(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    mask = circuits(model.cfg, "again", (0.5,)).numpy()
    found, same, other = (optimal_outputs(model, pairs, mask, steps=20, n_prompts=2, seed=seed) for seed in (0, 0, 1))
    for name in ("embed", "z", "mlp"):
        every = [[getattr(x, name)] if name == "embed" else getattr(x, name) for x in (found, same, other)]
        for a, b, c in zip(*every, strict=True):
            assert a.shape[:2] == (1, 1)
            assert not a.requires_grad
            assert torch.equal(a, b)
            assert name == "embed" or not torch.equal(a, c)
    assert not found.a_run


def test_what_is_not_ablated_keeps_its_mean(tiny):
    """All edges of a component kept: its constant does nothing and does not move. Of the whole model that is all of them."""
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    mean, there = ablated_outputs(model, pairs, "mean"), edge_mask(model.cfg)
    whole = optimal_outputs(model, pairs, there[None], steps=10**9)  # comes back at once
    for a, b in zip([whole.embed, *whole.z, *whole.mlp], [mean.embed, *mean.z, *mean.mlp], strict=True):
        assert torch.equal(a, b)
    mask = there.copy()
    mask[1 + 5 + 2] = False  # a1.h2 is cut off, and nothing else
    found = optimal_outputs(model, pairs, mask[None], steps=30)
    left_alone = lambda x: [x.embed, *x.mlp, x.z[0], x.z[1][..., [0, 1, 3], :], x.z[2]]  # noqa: E731
    torch.testing.assert_close(left_alone(found), left_alone(mean), rtol=0, atol=1e-6)
    assert (found.z[1] - mean.z[1])[..., 2, :].abs().max() > 0.01


def test_the_whole_model_among_others_does_not_end_the_search(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    masks = np.stack([edge_mask(model.cfg), np.zeros_like(edge_mask(model.cfg))])
    mean = kl(model, pairs, ablated_outputs(model, pairs, "mean"), masks)
    for seed in range(3):
        assert kl(model, pairs, optimal_outputs(model, pairs, masks, steps=60, seed=seed), masks) < 0.9 * mean


def test_the_divergence_is_that_of_the_distributions(tiny):
    model, pairs = tiny("gemma2", DOUBLE), prompts()
    runs = MaskedRuns(model, pairs, ablated_outputs(model, pairs, "corrupt"))
    final = runs.run(circuits(model.cfg, "kl", (0.5, 1.0)))
    p, q = (model.unembed_resid(x).softmax(-1) for x in (runs.clean_final, final))
    expected = (p * (p / q).log()).sum(-1).mean(-1)
    torch.testing.assert_close(kl_to_clean(model, final, runs.clean_final), expected, rtol=1e-9, atol=1e-12)
    assert expected[0] > 1e-3


# ------------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "edge-pruning"}, OptionError, "'edge-pruning' is not a method"),
        ({"ablation": "optimal"}, OptionError, "'optimal' is not a ablation of a learned mask|not an ablation"),
        ({"ablation": "mode"}, OptionError, "'mode' is not an? ablation"),
        ({"metric": "accuracy"}, OptionError, "metric accuracy has no gradient, so no mask can be learned by it"),
        ({"metric": "prob"}, MetricError, "'prob' is not a metric"),
        *(({name: value}, OptionError, "a mask is learned in at least 1 step") for name, value in
          (("steps", 0), ("n_samples", 0), ("n_prompts", 0), ("learning_rate", 0.0), ("penalty", -1.0), ("start", 1.0),
           ("start", 0.0), ("learning_rate", float("nan")))),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_said(tiny, options, error, says):
    with refused(error, says):
        learn_mask(tiny("gpt2"), small_pairs(), **{"steps": 2, **options})


def test_a_penalty_that_is_no_number_is_refused(tiny):
    with refused(OptionError, "a mask is learned"):
        learn_mask(tiny("gpt2"), small_pairs(), steps=2, penalty=float("nan"))


def test_other_models_and_constants_that_cannot_be_found(tiny):
    with refused(UnsupportedModel, "learning a mask needs a model's own layers, and a Linear has others"):
        learn_mask(torch.nn.Linear(2, 2), small_pairs())
    model = tiny("gpt2")
    mask = edge_mask(model.cfg)[None]
    for options in ({"steps": 0}, {"learning_rate": 0.0}):
        with refused(OptionError, "optimal ablation takes at least 1 step at a positive rate, not"):
            optimal_outputs(model, small_pairs(), mask, **options)
