"""Training sparse autoencoders.

Held against: a learner's counters, averages and schedules worked out beside it; each SAE trained alone; folded and unfolded
SAEs; dictionaries and linear maps that are known.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.features import train as module
from interp.features.config import SAEConfig
from interp.features.objective import objective
from interp.features.recovery import recovery
from interp.features.sae import SAE
from interp.features.sources import ArraySource, Corpus, ModelSource
from interp.features.synthetic import toy_dictionary
from interp.features.train import DEAD_EVERY, Learner, Training, train_sae, train_saes
from tests.small_pairs import refused

D, N = 12, 400
ROWS = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, D) + 1
TOPK = SAEConfig(d_in=D, d_sae=40, k=3, hook="x")
KINDS = {
    "topk": {"k": 3, "dead_after": 64},
    "abstopk": {"architecture": "abstopk", "k": 3},
    "batchtopk": {"architecture": "batchtopk", "k": 3, "unit_decoder": False},
    "matryoshka": {"architecture": "matryoshka", "k": 3},
    "jumprelu": {"architecture": "jumprelu", "sparsity": 0.1, "bandwidth": 0.5},
    "standard": {"architecture": "standard", "sparsity": 0.1},
    "gated": {"architecture": "gated", "sparsity": 0.1},
    "top-afa": {"architecture": "top-afa"},
    "faithful": {"architecture": "top-afa", "afa": "faithful"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def source(rows: torch.Tensor = ROWS) -> ArraySource:
    return ArraySource({"x": rows})


def config(kind: str, **options) -> SAEConfig:
    return SAEConfig(**{"d_in": D, "d_sae": 40, "hook": "x", **KINDS[kind], **options})


def fvu(sae: SAE, x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    y = x if y is None else y
    return float((y - sae(x)).square().sum() / (y - y.mean(0)).square().sum())


def same(one: SAE, other: SAE) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What the learner asked of `objective`, step by step, and what came out."""
    heard: list[dict] = []

    def listening(sae, x, y, **options):
        outcome = objective(sae, x, y, **options)
        heard.append({"sae": sae, "x": x, "y": y, "outcome": outcome, **options})
        return outcome

    monkeypatch.setattr(module, "objective", listening)
    return heard


# ---------------------------------------------------------------------------------------------------------- schedules


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_rises_and_falls(steps, warmup, decay):
    rates = [Training(steps=steps, warmup=warmup, decay=decay, lr=0.3).rate(step, 8) for step in range(steps)]
    assert all(0 < rate <= 0.3 for rate in rates)
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


def test_rates_by_hand():
    training = Training(steps=100, warmup=0.1, decay=0.2, lr=1.0)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 80: 1.0, 81: 0.95, 90: 0.5, 99: 0.05}
    assert {step: training.rate(step, 8) for step in expected} == pytest.approx(expected)
    plain = Training(steps=100, decay=0.0)
    assert plain.rate(99, 2**14) == 2e-4
    assert plain.rate(0, 2**16) == 1e-4


def test_steps_go_at_their_rates():
    """Adam's first step is as long as the rate in every coordinate."""
    learner = Learner(SAE(config("standard")), Training(steps=20, warmup=0.5, lr=0.1))
    learner.step(ROWS, ROWS)
    torch.testing.assert_close(learner.sae.b_dec.abs(), torch.full((D,), 0.01), rtol=1e-3, atol=0)


def test_k_is_annealed_and_sparsity_warmed_up(calls):
    learner = Learner(SAE(replace(TOPK, k=2)), Training(steps=10, anneal_k=0.5, sparsity_warmup=0.4))
    for _ in range(10):
        learner.step(ROWS, ROWS)
    assert [call["k"] for call in calls] == [12, 10, 8, 6, 4, None, None, None, None, None]
    assert [call["sparsity"] for call in calls] == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 6)
    assert [float(call["outcome"].l0) for call in calls][5:] == [2.0] * 5
    assert float(calls[0]["outcome"].l0) > 6


def test_without_schedules_nothing_is_scheduled(calls):
    learner = Learner(SAE(config("standard")), Training(steps=2))
    learner.step(ROWS, ROWS)
    assert (calls[0]["k"], calls[0]["sparsity"], calls[0]["dead"], calls[0]["encoder"]) == (None, 1.0, None, None)


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_gradients_are_clipped(clip):
    """Adam's first moment after a step is (1 - beta) of the gradient."""
    norms = {}
    for limit in (None, clip):
        learner = Learner(SAE(replace(TOPK, unit_decoder=False)), Training(steps=9, clip=limit, betas=(0.5, 0.9)))
        learner.step(ROWS, ROWS)
        norms[limit] = 2 * math.sqrt(sum(float(m.square().sum()) for m in learner.adam.first.values()))
    assert norms[None] > 1.5
    assert norms[clip] == pytest.approx(clip, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------- counters


def test_firing_is_counted_in_tokens_and_dead_latents_known_before_the_step(calls):
    learner = Learner(SAE(replace(TOPK, d_sae=200, k=1, dead_after=100)), Training(steps=50, lr=1e-2))
    since, seen = torch.zeros(200, dtype=torch.int64), []
    for step, batch in enumerate(ROWS[:392].split(7)[:50]):
        if step % DEAD_EVERY == 0:
            seen.append((since > 100).nonzero()[:, 0])
        fires = (learner.sae.encode(batch) != 0).any(0)
        said = learner.step(batch, batch)
        since = torch.where(fires, 0, since + len(batch))
        assert torch.equal(learner.since_fired, since)
        assert float(said["dead"]) == pytest.approx(float((since > 100).float().mean()))
        asked = calls[-1]["dead"]
        assert (asked is None and not len(seen[-1])) or torch.equal(asked, seen[-1])
    assert [len(dead) > 0 for dead in seen] == [False, True, True, True]
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_the_threshold_is_a_running_mean_from_its_first_value(calls, kind):
    learner = Learner(SAE(config(kind)), Training(steps=9, threshold_rate=0.25, lr=0.05))
    expected = None
    for batch in ROWS.split(50):
        learner.step(batch, batch)
        lowest = float(calls[-1]["outcome"].lowest)
        assert lowest > 0
        expected = lowest if expected is None else 0.75 * expected + 0.25 * lowest
        assert float(learner.sae.batch_threshold) == pytest.approx(expected, rel=1e-12)


def test_thresholds_of_jumprelu_stop_at_0_and_may_leave_it():
    learner = Learner(SAE(config("jumprelu", sparsity=0.0, threshold_init=0.1)), Training(steps=40, lr=0.2, decay=0.0))
    touched = torch.zeros(40, dtype=torch.bool)
    for _ in range(20):
        learner.step(ROWS, ROWS)
        assert (learner.sae.threshold >= 0).all()
        touched |= learner.sae.threshold == 0
    assert touched.any()
    learner.sae.threshold.data.zero_()
    pressed = Learner(learner.sae, Training(steps=2, lr=0.01))
    pressed.sae.config = replace(pressed.sae.config, sparsity=10.0)
    pressed.step(ROWS, ROWS)
    assert (pressed.sae.threshold > 0).any()


def test_what_a_step_says_is_true_of_the_batch():
    sae = SAE(TOPK, seed=4)
    loss = float((ROWS - sae(ROWS)).square().sum(1).mean())
    expected = {"loss": loss, "l0": sae.codes(ROWS).l0(), "fvu": fvu(sae, ROWS), "dead": 0.0}
    said = Learner(sae, Training(steps=1)).step(ROWS, ROWS)
    assert {name: float(value) for name, value in said.items()} == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("b_dec", ["mean", "zero"])
def test_the_bias_starts_where_it_should(calls, b_dec):
    """A step far too small to move it."""
    train_saes(source(), {"a": TOPK}, steps=1, batch_size=9, b_dec=b_dec, lr=1e-12)
    expected = ROWS.mean(0) if b_dec == "mean" else torch.zeros(D)
    torch.testing.assert_close(calls[0]["sae"].b_dec, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- scale


@every_kind
def test_a_scale_is_found_and_folded_away(calls, kind):
    """Batches are the whole data, so that the mean norm that the weights see is what the scale makes it."""
    options = {"steps": 20, "batch_size": N, "lr": 1e-2}
    sae = train_saes(source(), {"a": config(kind, normalize="expected_average_only_in")}, **options)["a"]
    assert float(calls[0]["x"].norm(dim=1).mean()) == pytest.approx(D**0.5, rel=1e-5)
    unfolded = calls[-1]["sae"]
    assert unfolded.config.normalize == "expected_average_only_in"
    assert float(unfolded.scale_in) == pytest.approx(D**0.5 / float(ROWS.norm(dim=1).mean()), rel=1e-6)
    assert sae.config.normalize == "none"
    assert float(sae.scale_in) == float(sae.scale_out) == 1
    assert fvu(sae, ROWS) == pytest.approx(fvu(unfolded, ROWS), rel=1e-4)
    torch.testing.assert_close(sae(ROWS), unfolded(ROWS), rtol=1e-4, atol=1e-4)


@every_kind
def test_the_datas_unit_does_not_matter(kind):
    """A power of two, so that not even a last bit changes."""
    asked = config(kind, normalize="expected_average_only_in")
    found = [train_saes(source(c * ROWS), {"a": asked}, steps=20, batch_size=50)["a"] for c in (1.0, 8.0)]
    assert torch.equal(8 * found[0](ROWS), found[1](8 * ROWS))
    assert torch.equal(found[0].encode(ROWS) != 0, found[1].encode(8 * ROWS) != 0)


def test_a_transcoder_has_a_scale_on_each_side(calls):
    both = ArraySource({"x": ROWS, "y": 100 * ROWS[:, :5] - 7})
    asked = replace(TOPK, d_out=5, target_hook="y", skip=True, apply_b_dec_to_input=False,
                    normalize="expected_average_only_in")  # fmt: skip
    sae = train_saes(both, {"a": asked}, steps=20, batch_size=N, lr=1e-2)["a"]
    assert float(calls[0]["x"].norm(dim=1).mean()) == pytest.approx(D**0.5, rel=1e-5)
    assert float(calls[0]["y"].norm(dim=1).mean()) == pytest.approx(5**0.5, rel=1e-5)
    torch.testing.assert_close(sae(ROWS), calls[-1]["sae"](ROWS), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_scales_by_token_train_as_well(normalize):
    sae = train_saes(source(), {"a": replace(TOPK, normalize=normalize)}, steps=150, batch_size=100, lr=1e-2)["a"]
    assert fvu(sae, ROWS) < 0.5


# ---------------------------------------------------------------------------------------------------------- together


def test_together_is_alone():
    configs = {kind: config(kind) for kind in KINDS}
    options = {"steps": 20, "batch_size": 32, "buffer": 100, "lr": 1e-2}
    together = train_saes(source(), configs, **options)
    for kind, each in configs.items():
        assert same(together[kind], train_saes(source(), {"alone": each}, **options)["alone"]), kind


def test_a_seed_is_a_seed():
    first, again, other = (train_saes(source(), {"a": TOPK}, steps=5, batch_size=32, seed=s)["a"] for s in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("grad", [True, False])
def test_the_world_is_as_before(grad):
    """Training works, and comes out the same, with gradients switched off outside."""
    expected = train_saes(source(), {"a": TOPK}, steps=3, batch_size=32)["a"]
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        sae = train_saes(source(), {"a": TOPK}, steps=3, batch_size=32)["a"]
        assert torch.is_grad_enabled() is grad
    assert torch.equal(state, torch.get_rng_state())
    assert same(sae, expected)
    assert not any(p.requires_grad or p.grad is not None for p in sae.parameters())


def test_options_go_before_those_of_training():
    training = Training(steps=50, batch_size=32)
    records: list[dict] = []
    train_saes(source(), {"a": TOPK}, training=training, steps=2, log_every=1, loggers=[records.append])
    assert [(r["step"], r["tokens"], r["sae"]) for r in records] == [(1, 32, "a"), (2, 64, "a")]
    with pytest.raises(TypeError, match="stepz"):
        train_saes(source(), {"a": TOPK}, training=training, stepz=2)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_a_small_dictionary_is_learned():
    truth = toy_dictionary(d=16, n_features=24, l0=2, seed=0)
    x, _ = truth.sample(20_000, seed=1)
    asked = SAEConfig(d_in=16, d_sae=24, k=2, dead_after=4000)
    start = SAE(asked)
    sae = train_saes(source(x), {"a": asked}, steps=600, batch_size=512, lr=1e-2, seed=3)["a"]
    held_out, _ = truth.sample(4000, seed=2)
    assert fvu(sae, held_out) < 0.35 < 0.5 < fvu(start, held_out)
    assert recovery(sae.W_dec, truth.atoms).mmcs > 0.95 > recovery(start.W_dec, truth.atoms).mmcs


def test_a_transcoder_learns_a_linear_map():
    weight = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    targets = ROWS @ weight.T + torch.arange(5.0)
    asked = SAEConfig(d_in=D, d_sae=16, d_out=5, k=1, hook="x", target_hook="y", skip=True, apply_b_dec_to_input=False)
    sae = train_saes(ArraySource({"x": ROWS, "y": targets}), {"a": asked}, steps=400, batch_size=100, lr=0.03)["a"]
    assert fvu(sae, ROWS, targets) < 0.01


def test_a_model_and_some_texts(mini_gpt2):
    texts = [f"{name} went to the {place} with {other}. {other} decided to give a {thing} to {name}."
             for name, other in (("Anna", "George"), ("Megan", "Edward"), ("Tom", "Sally"))
             for place in ("house", "hotel") for thing in ("book", "key")]  # fmt: skip
    hook = "blocks.2.hook_resid_post"
    options = {"steps": 100, "batch_size": 64, "lr": 3e-3}
    sae = train_sae(mini_gpt2, texts, hook, d_sae=256, **options)
    rows = ModelSource(mini_gpt2, Corpus.from_texts(mini_gpt2, texts), [hook]).read(range(len(texts)))
    assert fvu(sae, rows.values[hook]) < 0.5
    assert (sae.config.architecture, sae.config.k, sae.config.d_sae, sae.config.hook) == ("topk", 32, 256, hook)
    assert sae.metadata["model_name"] == "mini-gpt2"
    assert sae.metadata["hook_name"] == hook
    asked, corpus = replace(sae.config, hook=None), Corpus.from_texts(mini_gpt2, texts)
    assert same(sae, train_sae(mini_gpt2, corpus, hook, config=asked, **options))


def test_a_loss_that_is_no_number_is_refused():
    with refused(OptionError, r"^the loss of a is (nan|inf) after step \d+: try a smaller lr than 1.0e\+25$"):
        train_saes(source(), {"a": TOPK}, steps=30, batch_size=32, lr=1e25, log_every=10)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 1, "buffer": 0}, "buffer must be at least 1"),
        ({"steps": 1, "decay": 1.5}, "decay is a share of the steps, from 0 to 1, not 1.5"),
        ({"steps": 1, "warmup": -0.5}, "warmup is a share of the steps"),
        ({"steps": 1, "lr": 0.0}, "lr must be positive, not 0.0"),
        ({"steps": 1, "b_dec": "median"}, "b_dec starts at 'mean' or 'zero', not 'median'"),
        ({"steps": 1, "encoder_dtype": "float16"}, "encoder_dtype is 'float32' or 'bfloat16', not 'float16'"),
    ],
)
def test_options_are_checked(options, says):
    with refused(OptionError, says):
        Training(**options)


def test_sources_are_checked():
    two = ArraySource({"x": ROWS, "y": ROWS[:, :3]})
    for asked, says in (
        ({"a": replace(TOPK, hook=None)}, "a does not say which hook it reads, and there are x, y"),
        ({"a": replace(TOPK, hook="z")}, "a reads 'z', and the source has x, y"),
        ({"a": replace(TOPK, hook="y")}, "a expects 12 channels at y, and there are 3"),
        ({"a": replace(TOPK, target_hook="y", apply_b_dec_to_input=False)}, "a expects 12 channels at y"),
        ({}, "there is no SAE to train"),
    ):
        with refused(OptionError, says):
            train_saes(two, asked, steps=1, batch_size=8)
    with refused(OptionError, "a batch of 500 tokens is more than the data, at most 400 rows"):
        train_saes(source(), {"a": TOPK}, steps=1, batch_size=500)
