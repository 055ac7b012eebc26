"""Strengths from target divergences.

Held against: Brent's method on a closed form, where the logits are linear in the strength; whole forward passes at the strengths
found; curves that are not monotone, jump or never arrive.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from interp.errors import OptionError, SiteError, TaskError, UnsupportedModel
from interp.model.run import record
from interp.steering.changes import steer
from interp.steering.strength import TARGETS, _Curve, _Search, next_token_kl, steering_strength
from interp.steering.vectors import Vector, neuron_vector
from tests.small_pairs import refused

IDS = torch.tensor([1, 5, 7, 4, 9])
COLUMNS = ["vector", "label", "sign", "target", "alpha", "kl", "reached", "monotone"]


def vector(model, hook: str, seed: int = 0) -> Vector:
    width = record(model, IDS[None], [hook])[hook][0, 0].numel()
    return Vector(hook, torch.randn(width, generator=torch.Generator().manual_seed(seed)), f"{hook} {seed}")


def whole_kl(model, vector: Vector, value: float, positions="all") -> float:
    """By a forward pass of the whole model."""
    with steer(model, [vector.change(value, positions=positions)]):
        changed = model(IDS[None])[0, -1]
    return float(next_token_kl(model(IDS[None])[0, -1], changed[None]))


def search(f, target: float, *, tolerance: float = 0.01, first: float = 1e-3, largest: float = 1e3) -> dict:
    """One target on one curve, as `steering_strength` goes about it."""
    curve = _Curve(0, 1, first)
    while alpha := curve.next_on_grid(target, largest):
        curve.seen[alpha] = f(alpha)
    one = _Search(0, curve, target, tolerance)
    while alpha := one.next():
        curve.seen[alpha] = f(alpha)
    return {**one.row("toy"), "looked": len(curve.seen) - 1}


# ------------------------------------------------------------------------------------------------------------- models


HOOKS = [
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "blocks.0.ln1.hook_normalized",
    "hook_embed",
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_the_whole_model_diverges_so_much(tiny, family):
    """Only layers from the hook's on are run, all rows in one batch; a run of the whole model has the same KL."""
    model = tiny(family, torch.float64)
    vectors = [vector(model, hook) for hook in HOOKS]
    table = steering_strength(model, IDS, vectors, [0.001, 0.01])
    assert list(table.columns) == COLUMNS
    assert table["vector"].tolist() == [i for i in range(5) for _ in range(4)]
    assert table["sign"].tolist() == [1, 1, -1, -1] * 5
    assert table["target"].tolist() == [0.001, 0.01] * 10
    assert table["reached"].all()
    for row in table.itertuples():
        assert row.label == vectors[row.vector].label
        assert abs(row.kl - row.target) < 0.01 * row.target
        assert whole_kl(model, vectors[row.vector], row.sign * row.alpha) == pytest.approx(row.kl, rel=1e-7)


@pytest.mark.parametrize("positions", ["last", "not first", (1, -1)], ids=str)
def test_positions(tiny, positions):
    model = tiny("llama", torch.float64)
    one = vector(model, "blocks.1.hook_resid_pre")
    table = steering_strength(model, IDS, [one], [0.01], positions=positions)
    for row in table.itertuples():
        assert whole_kl(model, one, row.sign * row.alpha, positions) == pytest.approx(row.kl, rel=1e-7)
        assert whole_kl(model, one, row.sign * row.alpha) != pytest.approx(row.kl, rel=1e-3)


def test_batches_and_company_change_nothing(tiny):
    model = tiny("gpt2", torch.float64)
    vectors = [vector(model, "blocks.1.hook_resid_pre", seed) for seed in (0, 1)] + [neuron_vector(model, 2, 5)]
    together = steering_strength(model, IDS, vectors, [0.001, 0.004], tolerance=1e-6)
    for batch_size in (1, 3):
        again = steering_strength(model, IDS, vectors, [0.001, 0.004], tolerance=1e-6, batch_size=batch_size)
        assert again["alpha"].tolist() == pytest.approx(together["alpha"].tolist(), rel=1e-5, nan_ok=True)
    for i, one in enumerate(vectors):
        for target in (0.001, 0.004):
            alone = steering_strength(model, IDS, [one], [target], tolerance=1e-6)
            rows = together[(together["vector"] == i) & (together["target"] == target)]
            assert rows["alpha"].tolist() == pytest.approx(alone["alpha"].tolist(), rel=1e-5, nan_ok=True)


def test_the_opposite_vector_is_the_other_sign(tiny):
    model = tiny("llama", torch.float64)
    one = vector(model, "blocks.1.mlp.hook_post")
    other = Vector(one.hook, -3 * one.direction, "opposite")
    table = steering_strength(model, IDS, [one, other], [0.001, 0.01], tolerance=1e-6)
    alphas = table.set_index(["vector", "sign", "target"])["alpha"]
    for sign in (1, -1):
        for target in (0.001, 0.01):
            assert alphas[0, sign, target] == pytest.approx(alphas[1, -sign, target], rel=1e-5)


def test_it_is_brents_root_of_a_closed_form(tiny):
    """With the final norm's scale held, logits move by alpha w, and KL = log E_P exp(alpha w) - alpha E_P w."""
    model, hook = tiny("gpt2", torch.float64), "blocks.2.hook_resid_post"
    scale = model.run_with_cache(IDS[None], names_filter="ln_final.hook_scale")[1]["ln_final.hook_scale"][0, -1]
    one = vector(model, hook)
    u = one.direction.double() / one.direction.double().norm()
    w = ((u - u.mean()) / scale * model.ln_final.w) @ model.W_U
    p = model(IDS[None])[0, -1].softmax(-1)

    def closed(alpha: float) -> float:
        return float((p * (alpha * w).exp()).sum().log() - alpha * (p * w).sum())

    with model.hooks(fwd_hooks=[("ln_final.hook_scale", lambda v, hook: scale.expand_as(v))]):
        table = steering_strength(model, IDS, [one], tolerance=1e-9)
    assert len(table) == 2 * len(TARGETS)
    assert table["reached"].all()
    assert table["monotone"].all()  # convex in alpha
    for row in table.itertuples():
        root = brentq(lambda alpha, row=row: closed(row.sign * alpha) - row.target, 0, 1e3, xtol=1e-12)
        assert row.alpha == pytest.approx(root, rel=1e-8)


def test_what_the_final_norm_bounds_is_not_reached(tiny):
    """However far the stream moves, the final norm sees a unit of it: KL has a limit. No row is dropped."""
    model = tiny("gpt2", torch.float64)
    one = vector(model, "blocks.2.hook_resid_post")
    table = steering_strength(model, IDS, [one], [0.05, 500.0])
    assert len(table) == 4
    far = table[table["target"] == 500]
    assert far["alpha"].isna().all()
    assert not far["reached"].any()
    assert (far["kl"] < 500).all()
    assert table[table["target"] == 0.05]["reached"].all()
    near = steering_strength(model, IDS, [one], [0.05], largest=2e-3)
    assert near["alpha"].isna().all()


def test_a_search_that_starts_beyond(tiny):
    model = tiny("gpt2", torch.float64)
    one = vector(model, "blocks.1.hook_resid_pre")
    usual, beyond = (steering_strength(model, IDS, [one], [0.01], first=f, tolerance=1e-6) for f in (1e-3, 5.0))
    assert beyond["alpha"].tolist() == pytest.approx(usual["alpha"].tolist(), rel=1e-5)


def test_text_and_bfloat16(tiny):
    model = tiny("llama", torch.bfloat16)
    one = vector(model, "blocks.1.hook_resid_pre")
    text = model.tokenizer.decode(IDS.tolist())
    table = steering_strength(model, text, [one], [0.05], tolerance=0.2)
    assert len(table) == 2
    assert (table["alpha"].notna() == table["reached"]).all()


# ------------------------------------------------------------------------------------------------------------- curves


@given(st.floats(0.1, 4), st.floats(-5, 5), st.sampled_from(TARGETS))
def test_on_powers_it_finds_the_root(power, scale, target):
    f = lambda alpha: math.exp(scale) * alpha**power  # noqa: E731
    root = (target / math.exp(scale)) ** (1 / power)
    found = search(f, target, tolerance=1e-6, first=1e-3, largest=1e9)
    assert found["reached"] == (root < 1e9 * (1 + 1e-9)) or root < 1e-3
    if found["reached"]:
        assert found["alpha"] == pytest.approx(root, rel=1e-4)
        assert found["monotone"]


@given(st.floats(0.05, 20), st.floats(1, 8), st.sampled_from(TARGETS))
def test_on_steep_curves_it_is_brents_root(middle, steep, target):
    f = lambda alpha: 2 / (1 + (middle / alpha) ** (2 * steep)) if alpha else 0.0  # noqa: E731
    root = brentq(lambda alpha: f(alpha) - target, 1e-9, 1e3, xtol=1e-14, rtol=1e-13)
    found = search(f, target, tolerance=1e-8)
    assert found["reached"]
    assert found["alpha"] == pytest.approx(root, rel=1e-6)
    assert found["looked"] < 60


def test_a_curve_that_comes_back_gives_its_first_crossing():
    f = lambda alpha: math.sin(alpha) ** 2 if alpha < 3 else alpha**2  # noqa: E731
    found = search(f, 0.25, tolerance=1e-6)
    assert found["alpha"] == pytest.approx(math.pi / 6, rel=1e-4)
    assert found["monotone"]
    # rises to .5 at 1, falls to 0 at 2, rises again
    f = lambda alpha: 0.5 * math.sin(math.pi * alpha / 2) ** 2 if alpha < 2 else (alpha - 2) ** 2  # noqa: E731
    found = search(f, 0.9, tolerance=1e-6, first=2**-4)
    assert found["reached"]
    assert found["alpha"] == pytest.approx(2 + 0.9**0.5, rel=1e-4)
    assert not found["monotone"]
    assert search(f, 0.3, tolerance=1e-6, first=2**-4)["monotone"]


def test_a_curve_that_jumps_over_the_target_does_not_reach_it():
    found = search(lambda alpha: 0.0 if alpha < 1.3 else 1.0, 0.4)
    assert math.isnan(found["alpha"])
    assert found["kl"] == 0.0  # nearer than 1
    assert not found["reached"]


def test_a_curve_that_breaks_ends_there():
    found = search(lambda alpha: math.nan if alpha > 0.1 else alpha**2, 0.5)
    assert math.isnan(found["alpha"])
    assert not found["reached"]
    assert found["kl"] < 0.01
    assert search(lambda alpha: math.inf if alpha > 0.1 else alpha**2, 0.005)["reached"]


# --------------------------------------------------------------------------------------------------------- divergence


@given(st.integers(0, 10**6))
def test_kl_by_hand(seed):
    base, changed = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
    p, q = base.double().softmax(-1), changed.double().softmax(-1)
    kl = float(next_token_kl(base, changed[None]))
    assert kl == pytest.approx(sum(float(p[i] * (p[i] / q[i]).log()) for i in range(7)), rel=1e-9, abs=1e-15)
    assert kl >= 0
    assert float(next_token_kl(base, base[None])) == 0
    # logits are defined up to a constant
    assert float(next_token_kl(base.double(), base.double()[None] + 3)) == pytest.approx(0, abs=1e-14)


def test_kl_is_symmetric_in_sign_on_a_symmetric_toy():
    """A uniform base and logits that move by alpha w, w with as much up as down: both signs alike, growing all the way."""
    w = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    alphas = torch.linspace(0, 5, 40, dtype=torch.float64)
    up, down = (next_token_kl(torch.zeros(5), sign * alphas[:, None] * w) for sign in (1, -1))
    torch.testing.assert_close(up, down)
    assert up[0] == 0
    assert (up.diff() > 0).all()


def test_a_token_of_no_probability_counts_nothing():
    base = torch.tensor([0.0, 0.0, -math.inf])
    assert float(next_token_kl(base, torch.tensor([[0.0, 0.0, -math.inf]]))) == 0
    assert float(next_token_kl(base, torch.zeros(1, 3))) == pytest.approx(math.log(1.5))
    assert float(next_token_kl(torch.zeros(3), base[None])) == math.inf


def test_refusals(tiny):
    model = tiny("gpt2")
    one = vector(model, "blocks.1.hook_resid_pre")
    for options, says in (
        ({"targets": []}, "nothing to search"),
        ({"targets": [0.1, 0.0]}, "divergence above 0, in nats, not 0.0"),
        ({"tolerance": 1.0}, "between 0 and 1, not 1.0"),
        ({"first": 2.0, "largest": 1.0}, "not from 2.0 to 1.0"),
        ({"batch_size": 0}, "cannot run 0 rows"),
    ):
        with refused(OptionError, says):
            steering_strength(model, IDS, [one], **options)
    with refused(OptionError, "nothing to search"):
        steering_strength(model, IDS, [])
    with refused(TaskError, "the prompt has no token"):
        steering_strength(model, IDS[:0], [one])
    with refused(SiteError, "no hook point 'blocks.8.hook_resid_pre'"):
        steering_strength(model, IDS, [Vector("blocks.8.hook_resid_pre", torch.ones(32), "eight")])
    with refused(SiteError, "'short' has 31 entries, and blocks.1.hook_resid_pre has 32"):
        steering_strength(model, IDS, [Vector("blocks.1.hook_resid_pre", torch.ones(31), "short")])
    with refused(SiteError, "is for position 9, and a prompt has 5 tokens"):
        steering_strength(model, IDS, [one], positions=(9,))
    with refused(OptionError, "'nothing' has a norm of 0"):
        steering_strength(model, IDS, [Vector("blocks.1.hook_resid_pre", torch.zeros(32), "nothing")])
    with refused(UnsupportedModel, "load the model with load_model"):
        steering_strength(torch.nn.Linear(2, 2), IDS, [one])
