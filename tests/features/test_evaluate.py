"""What an SAE is worth: identities whose answer is known, sums over tokens in loops, hooks written by hand.

Held against: plain torch over all tokens at once; the model's own loss; `spliced`; another size of batches.
"""

import json
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError, SiteError, TaskError
from interp.features.config import SAEConfig
from interp.features.evaluate import (
    SAEEvaluation,
    decoder_coherence,
    evaluate_reconstruction,
    evaluate_sae,
    random_baseline,
)
from interp.features.sae import SAE
from interp.features.sources import Corpus
from interp.features.splice import spliced
from interp.features.synthetic import coherence, near_orthogonal, toy_dictionary
from interp.model.run import record
from tests.small_pairs import refused

DOUBLE = torch.float64
HOOK, READS, WRITES = "blocks.1.hook_resid_post", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
Z = "blocks.1.attn.hook_z"
D, LATENTS, K = 32, 48, 6
SEEDS = st.integers(0, 2**20)


def random_sae(*, seed: int = 0, dtype: torch.dtype = DOUBLE, d_in: int = D, **options) -> SAE:
    """A random SAE whose biases and scales are none that would hide a mistake."""
    options = {"k": K} | options
    sae = SAE(SAEConfig(d_in=d_in, d_sae=LATENTS, **options), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    for bias in (sae.b_dec, sae.b_enc, *([sae.W_skip] if sae.config.skip else [])):
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    if sae.config.normalize == "expected_average_only_in":
        sae.scale_in.fill_(1.7)
        sae.scale_out.fill_(0.6 if sae.config.transcoder else 1.7)
    return sae


def copying_sae(d: int, *, hook: str | None = None, dtype: torch.dtype = DOUBLE) -> SAE:
    """relu(x) - relu(-x) = x: twice as many latents as channels, and nothing is lost."""
    sae = SAE(SAEConfig(architecture="standard", d_in=d, d_sae=2 * d, hook=hook), dtype=dtype)
    both = torch.cat([torch.eye(d, dtype=dtype), -torch.eye(d, dtype=dtype)])
    sae.W_dec.copy_(both)
    sae.encoder.copy_(both)
    return sae


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def corpus_of(n: int = 5, length: int = 9, *, seed: int = 0, lengths: list[int] | None = None) -> Corpus:
    tokens = torch.randint(4, 60, (n, length), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(lengths or [length] * n)
    return Corpus(tokens.masked_fill(torch.arange(length) >= ends[:, None], 0), ends, "random tokens")


RAGGED = corpus_of(5, 9, lengths=[9, 4, 2, 9, 7])


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("gpt2", DOUBLE)


def same(a, b, tolerance: float = 1e-9, *, but: tuple[str, ...] = ()) -> None:
    """Every figure of two results."""
    for f in fields(a):
        if f.name in but:
            continue
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        elif isinstance(x, float | dict):
            assert x == pytest.approx(y, rel=tolerance, abs=tolerance, nan_ok=True), f.name
        else:
            assert x == y, f.name


# --------------------------------------------------------------------------------------------------------- identities


def test_a_constant_output_explains_nothing_about_the_mean():
    x = normal(200, 8) + 3
    sae = SAE(SAEConfig(architecture="standard", d_in=8, d_sae=16), dtype=DOUBLE)
    sae.encoder.zero_()
    sae.b_dec.copy_(x.mean(0))
    found = evaluate_reconstruction(sae, x)
    assert found.fvu == pytest.approx(1, abs=1e-12)
    assert found.explained_variance == pytest.approx(0, abs=1e-12)
    assert found.nmse < 0.2  # of |x|^2 the mean alone is most
    assert (found.l0, found.l1, found.alive, found.dead, found.dense) == (0, 0, 0, 1, 0)
    assert found.bias == pytest.approx(1)  # the mean is no shrunken mean
    assert math.isnan(found.elbo_1)


def test_a_dictionary_of_both_signs_copies():
    x = normal(100, 8)
    found = evaluate_reconstruction(copying_sae(8), x)
    assert found.fvu == pytest.approx(0, abs=1e-25)
    assert (found.cosine, found.norm_ratio, found.bias) == pytest.approx((1, 1, 1))
    assert found.l0 == 8
    assert found.l1 == pytest.approx(float(x.abs().sum(1).mean()))
    assert found.density.sum() == pytest.approx(8)
    assert (found.alive, found.dense) == (16, 1)
    assert (found.elbo, found.elbo_1) == pytest.approx((0, 0), abs=1e-15)  # no latents overlap that fire together


@pytest.mark.parametrize("scale", [0.5, 0.93, 2.0])
def test_too_small_reconstructions_show_in_g_and_in_nothing_else_that_is_an_angle(scale):
    sae = copying_sae(8)
    sae.W_dec.mul_(scale)
    found = evaluate_reconstruction(sae, normal(60, 8))
    assert (found.bias, found.norm_ratio, found.cosine) == pytest.approx((scale, scale, 1))
    assert found.nmse == pytest.approx((1 - scale) ** 2)


@given(SEEDS, st.sampled_from(["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]))
@settings(deadline=None, max_examples=20)
def test_g_is_the_scalar_that_fits_best(seed, normalize):
    x = normal(40, D, seed=seed)
    sae = random_sae(seed=seed, normalize=normalize)
    g, xhat = evaluate_reconstruction(sae, x).bias, sae(x)
    errors = [float((xhat / (g * s) - x).square().sum()) for s in (1, 0.999, 1.001)]
    assert errors[0] == min(errors)


# --------------------------------------------------------------------------------------------------- sums over tokens


def by_hand(sae: SAE, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | float) -> dict[str, float]:
    """All tokens at once; scale takes codes to the data's unit."""
    f, yhat = sae.encode(x), sae(x)
    size = f.abs() * sae.W_dec.norm(dim=1) * scale
    e = y - yhat
    return {
        "fvu": float(e.square().sum() / (y - y.mean(0)).square().sum()),
        "nmse": float(e.square().sum() / y.square().sum()),
        "cosine": float(torch.cosine_similarity(y, yhat).mean()),
        "norm_ratio": float((yhat.norm(dim=1) / y.norm(dim=1)).mean()),
        "bias": float(yhat.square().sum() / (y * yhat).sum()),
        "l0": float((f != 0).double().sum(1).mean()),
        "l1": float(size.sum(1).mean()),
        "dead": float((f == 0).all(0).double().mean()),
        "dense": float(((f != 0).double().mean(0) > 0.1).double().mean()),
    }


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "layer_norm"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "standard", "jumprelu"])
def test_sums_over_blocks_are_those_over_all_tokens(architecture, normalize, monkeypatch):
    monkeypatch.setattr("interp.features.evaluate._ENTRIES", 7 * LATENTS)  # seven tokens at a time
    k = K if "top" in architecture else None
    sae, x = random_sae(architecture=architecture, normalize=normalize, k=k), normal(45, D) + 1.5
    scale = {"none": 1.0, "expected_average_only_in": 1 / 1.7, "layer_norm": x.std(1, keepdim=True) + 1e-5}[normalize]
    found, expected = evaluate_reconstruction(sae, x), by_hand(sae, x, x, scale)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(found.density, (sae.encode(x) != 0).double().mean(0))
    assert found.density.dtype == DOUBLE
    assert (found.n_tokens, found.normalize, found.select) == (45, normalize, "own")
    assert found.decoder_encoder_cosine == pytest.approx(1)


def test_a_mean_a_million_times_the_spread_costs_no_digits():
    x = normal(64, 4) + 1e6
    sae = SAE(SAEConfig(architecture="standard", d_in=4, d_sae=8), dtype=DOUBLE)
    sae.encoder.zero_()
    sae.b_dec.copy_(x.mean(0))
    assert evaluate_reconstruction(sae, x).fvu == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"unit_decoder": False},
        {"normalize": "expected_average_only_in"},
        {"architecture": "batchtopk", "normalize": "expected_average_only_in"},
        {"architecture": "gated", "k": None, "unit_decoder": False},
    ],
    ids=["norms", "scale", "threshold", "gated"],
)
def test_folding_changes_no_figure(options):
    if options.get("architecture") == "gated":
        sae = SAE(SAEConfig(d_in=D, d_sae=LATENTS, **options), dtype=DOUBLE)
        sae.b_mag.fill_(0.2)
    else:
        sae = random_sae(**options)
    if not sae.config.unit_decoder:
        sae.W_dec.mul_(0.5 + torch.rand(LATENTS, 1, generator=torch.Generator().manual_seed(1)))
    sae.batch_threshold.fill_(0.3)
    x = normal(50, D)
    before, after = (evaluate_reconstruction(s, x, coherence=True) for s in (sae, sae.folded()))
    same(before, after, but=("decoder_norm", "encoder_norm", "normalize"))


@given(SEEDS, st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_activations_of_another_scale_and_a_scale_folded_in(seed, scale):
    """FVU and L0 do not know the unit of activations; L1 has it."""
    x, sae = normal(40, D, seed=seed), random_sae(seed=seed)
    other = random_sae(seed=seed)
    other.config = SAEConfig(**{**vars(sae.config), "normalize": "expected_average_only_in"})
    other.scale_in.fill_(1 / scale)
    other.scale_out.fill_(1 / scale)
    a, b = evaluate_reconstruction(sae, x), evaluate_reconstruction(other.folded(), scale * x)
    unitless = ("fvu", "nmse", "cosine", "norm_ratio", "bias", "l0", "dead", "dense", "elbo", "elbo_1")
    assert [getattr(b, name) for name in unitless] == pytest.approx([getattr(a, name) for name in unitless], rel=1e-8)
    assert b.l1 == pytest.approx(scale * a.l1)


def test_top_afa_may_choose():
    sae, x = random_sae(), normal(50, D)
    found = evaluate_reconstruction(sae, x, select="afa")
    assert found.l0 == pytest.approx(sae.codes(x, select="afa").l0())
    assert found.l0 != K
    assert found.select == "afa"


# ----------------------------------------------------------------------------------------------------------- transcoders


def test_a_transcoder_that_is_the_linear_map():
    x, weight = normal(60, 6), normal(5, 6, seed=1)
    config = SAEConfig(architecture="standard", d_in=6, d_out=5, d_sae=12, apply_b_dec_to_input=False)
    sae = SAE(config, dtype=DOUBLE)
    sae.encoder.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
    sae.W_dec.copy_(torch.cat([weight.T, -weight.T]))
    sae.b_dec.fill_(0.7)
    found = evaluate_reconstruction(sae, x, x @ weight.T + 0.7)
    assert found.fvu == pytest.approx(0, abs=1e-25)
    assert found.decoder_encoder_cosine is None  # two spaces
    assert evaluate_reconstruction(sae, x, x @ weight.T - 0.7).fvu > 0.01
    with refused(OptionError, "give the targets"):
        evaluate_reconstruction(sae, x)


def test_a_skip_path_that_is_the_linear_map():
    x, weight = normal(60, 6), normal(6, 6, seed=1)
    sae = SAE(SAEConfig(d_in=6, d_out=6, d_sae=12, k=2, skip=True, apply_b_dec_to_input=False), dtype=DOUBLE)
    sae.W_skip.copy_(weight)
    sae.W_dec.zero_()
    found = evaluate_reconstruction(sae, x, x @ weight.T)
    assert found.fvu == pytest.approx(0, abs=1e-25)
    assert found.elbo == pytest.approx(0, abs=1e-12)  # all of it is written without latents


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("block", [2**24, 100], ids=["at once", "in blocks"])
def test_coherence_is_over_all_pairs(block, monkeypatch):
    monkeypatch.setattr("interp.features.evaluate._ENTRIES", block)
    rows = near_orthogonal(8, 30, seed=0, steps=5).double()
    largest, mean = decoder_coherence(rows * (1 + torch.arange(30)[:, None]))
    cosines = (rows @ rows.T).abs() - torch.eye(30)
    assert largest == pytest.approx(coherence(rows))
    assert mean == pytest.approx(float(cosines.sum() / (30 * 29)), abs=1e-6)
    assert largest >= math.sqrt((30 - 8) / (8 * 29))  # Welch
    assert decoder_coherence(torch.cat([rows, torch.zeros(3, 8)])) == pytest.approx((largest, mean))
    assert all(math.isnan(value) for value in decoder_coherence(rows[:1]))


def test_coherence_is_looked_at_on_request():
    x, sae = normal(20, D), random_sae()
    assert evaluate_reconstruction(sae, x).coherence is None
    found = evaluate_reconstruction(sae, x, coherence=True)
    assert (found.coherence, found.mean_coherence) == decoder_coherence(sae.W_dec)
    assert found.elbo_1 <= found.coherence
    assert "coherence" in str(found)


def test_a_random_dictionary_explains_something_and_the_true_one_more():
    truth = toy_dictionary(16, 32, 3, seed=0)
    x, _ = truth.sample(2000, seed=1)
    sae = SAE(SAEConfig(d_in=16, d_sae=32, k=3))
    sae.W_dec.copy_(truth.atoms)
    sae.encoder.copy_(truth.atoms)
    chance = random_baseline(sae, x, seed=0)
    assert evaluate_reconstruction(sae, x).fvu < chance < 1
    assert random_baseline(sae, x, seed=0) == chance
    assert random_baseline(sae, x, seed=1) != chance


def test_the_random_dictionary_by_hand():
    x, sae = normal(50, D) + 2, random_sae()
    atoms = torch.nn.functional.normalize(torch.randn(LATENTS, D, generator=torch.Generator().manual_seed(5)).double())
    centred = x - x.mean(0)
    z = centred @ atoms.T
    f = torch.where(z >= z.sort(1, descending=True).values[:, K - 1 : K], z, 0.0).relu()
    rows = (f @ atoms).flatten()
    best = rows[:, None] @ torch.linalg.lstsq(rows[:, None], centred.flatten()[:, None]).solution
    fvu = float((centred.flatten() - best[:, 0]).square().sum() / centred.square().sum())
    assert random_baseline(sae, x, seed=5) == pytest.approx(fvu)


# ---------------------------------------------------------------------------------------------------------- on a model


def test_nothing_lost_costs_nothing(model):
    found = evaluate_sae(model, copying_sae(D, hook=HOOK), RAGGED, ablation="both")
    assert found.fvu == pytest.approx(0, abs=1e-20)
    assert found.ce_sae == pytest.approx(found.ce, abs=1e-12)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.ce_recovered == pytest.approx({"zero": 1, "mean": 1})
    assert found.kl_score == pytest.approx({"zero": 1, "mean": 1})


def test_cross_entropy_is_the_models_own_loss(mini_gpt2):
    sae = random_sae(d_in=128, hook=HOOK, dtype=torch.float32)
    one = corpus_of(1, 12)
    assert evaluate_sae(mini_gpt2, sae, one).ce == pytest.approx(
        float(mini_gpt2(one.tokens, return_type="loss")), rel=1e-5
    )
    found = evaluate_sae(mini_gpt2, sae, RAGGED)
    losses = [
        float(mini_gpt2(t[None, :n], return_type="loss")) for t, n in zip(RAGGED.tokens, RAGGED.lengths, strict=True)
    ]
    n = RAGGED.lengths - 1
    assert found.ce == pytest.approx(float((n * torch.tensor(losses)).sum() / n.sum()), rel=1e-5)
    assert found.n_predictions == int(n.sum())


def run_by_hand(model, corpus: Corpus, change) -> tuple[float, float]:
    """(CE, KL) of the sequences one by one, with a hook that changes what stands behind first positions."""
    ce, kl, n = 0.0, 0.0, 0
    for tokens, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        tokens = tokens[None, :length]
        hook = change(tokens)
        p, q = (
            model(tokens)[0, :-1].log_softmax(-1),
            model.run_with_hooks(tokens, fwd_hooks=hook)[0, :-1].log_softmax(-1),
        )
        ce -= float(q[torch.arange(length - 1), tokens[0, 1:]].sum())
        kl += float((p.exp() * (p - q)).sum())
        n += length - 1
    return ce / n, kl / n


def test_ablations_are_those_of_a_hook_written_by_hand(model):
    values = [
        record(model, t[None, :n], [HOOK])[HOOK][0, 1:] for t, n in zip(RAGGED.tokens, RAGGED.lengths, strict=True)
    ]
    mean = torch.cat(values).mean(0)
    found = evaluate_sae(model, random_sae(hook=HOOK), RAGGED, ablation="both", batch_size=2)
    for kind, new in (("zero", 0.0), ("mean", mean)):

        def hook_function(value, hook, new=new):
            value = value.clone()
            value[:, 1:] = new
            return value

        ce, kl = run_by_hand(model, RAGGED, lambda tokens, f=hook_function: [(HOOK, f)])
        assert (found.ce_ablated[kind], found.kl_ablated[kind]) == pytest.approx((ce, kl))
        assert found.ce_recovered[kind] == pytest.approx((ce - found.ce_sae) / (ce - found.ce))
        assert found.kl_score[kind] == pytest.approx((kl - found.kl) / kl)


PLACES = {
    "residual stream": {"hook": HOOK, "normalize": "expected_average_only_in"},
    "each token's norm": {"hook": HOOK, "normalize": "layer_norm"},
    "heads": {"hook": Z},
    "transcoder": {"hook": READS, "target_hook": WRITES, "apply_b_dec_to_input": False, "skip": True},
}


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_the_sae_in_place_is_that_of_splice(model, options):
    sae = random_sae(**options)
    excluded = [int(RAGGED.tokens[0, 3])]
    found = evaluate_sae(model, sae, RAGGED, exclude=excluded)
    where = RAGGED.mask(exclude=excluded)
    with spliced(model, sae, error="drop", where=where):
        logits = model(RAGGED.tokens)
    there = torch.arange(1, 9) < RAGGED.lengths[:, None]
    nll = -logits[:, :-1].log_softmax(-1).gather(2, RAGGED.tokens[:, 1:, None])[..., 0]
    assert found.ce_sae == pytest.approx(float(nll[there].mean()))
    read, write = sae.config.hook, sae.config.target_hook or sae.config.hook
    values = record(model, RAGGED.tokens, [read, write])
    plain = evaluate_reconstruction(sae, values[read].flatten(2)[where], values[write].flatten(2)[where])
    assert (found.n_tokens, found.hook) == (int(where.sum()), write)
    same(plain, type(plain)(**{f.name: getattr(found, f.name) for f in fields(plain)}))


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_batches_of_any_size_give_the_same(model, options):
    sae = random_sae(**options)
    first, *others = (evaluate_sae(model, sae, RAGGED, ablation="both", batch_size=size) for size in (16, 1, 2, 3))
    for other in others:
        same(first, other)


def test_a_batch_in_which_no_token_counts(model):
    """Its predictions count: nothing is changed there."""
    corpus = corpus_of(2, 6)
    excluded = corpus.tokens[0].tolist()
    corpus.tokens[1] = torch.tensor([t for t in range(4, 60) if t not in excluded][:6])
    sae = random_sae(hook=HOOK)
    same(*(evaluate_sae(model, sae, corpus, exclude=excluded, ablation="both", batch_size=size) for size in (1, 2)))


def test_padding_is_never_looked_at(model):
    other = RAGGED.tokens.masked_fill(torch.arange(9) >= RAGGED.lengths[:, None], 17)
    sae = random_sae(hook=HOOK)
    same(*(evaluate_sae(model, sae, Corpus(t, RAGGED.lengths, "a"), ablation="both") for t in (RAGGED.tokens, other)))


def test_the_result_is_readable_and_json(model):
    found = evaluate_sae(model, random_sae(hook=HOOK), RAGGED, ablation="mean")
    assert isinstance(found, SAEEvaluation)
    assert "FVU" in str(found)
    assert "mean ablation" in str(found)
    assert "zero ablation" not in str(found)
    assert len(str(found).splitlines()) <= 8
    figures = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert figures["fvu"] == found.fvu
    assert set(figures["ce_recovered"]) == {"mean"}
    assert figures["corpus"] == "random tokens"
    sae = SAE(SAEConfig(architecture="standard", d_in=8, d_sae=16), dtype=DOUBLE)
    sae.encoder.zero_()
    assert json.loads(json.dumps(evaluate_reconstruction(sae, normal(9, 8)).to_dict(), allow_nan=False))["elbo"] is None


# -------------------------------------------------------------------------------------------------------------- refusals


def test_refusals(model):
    sae, x = random_sae(hook=HOOK), normal(5, D)
    with refused(OptionError, "kind of ablation"):
        evaluate_sae(model, sae, RAGGED, ablation="resample")
    with refused(OptionError, "way to select"):
        evaluate_reconstruction(sae, x, select="other")
    with refused(OptionError, "at least one sequence"):
        evaluate_sae(model, sae, RAGGED, batch_size=0)
    with refused(TaskError, "no token of random tokens"):
        evaluate_sae(model, sae, RAGGED, exclude=range(60))
    with refused(SiteError, "no hook point 'blocks.9"):
        evaluate_sae(model, random_sae(hook="blocks.9.hook_resid_post"), RAGGED)
    with refused(SiteError, "does not say which hook"):
        evaluate_sae(model, random_sae(), RAGGED)
    with refused(SiteError, "reads 16 channels, and blocks.1.hook_resid_post has 32"):
        evaluate_sae(model, random_sae(hook=HOOK, d_in=16), RAGGED)
    backwards = random_sae(hook=WRITES, target_hook=READS, apply_b_dec_to_input=False)
    with refused(SiteError, "and then"):
        evaluate_sae(model, backwards, RAGGED)
    for wrong in (normal(5, D - 1), normal(0, D)):
        with refused(OptionError, "inputs are"):
            evaluate_reconstruction(sae, wrong)
    with refused(OptionError, "targets are"):
        evaluate_reconstruction(sae, x, normal(4, D))
    with refused(OptionError, "no such baseline of a transcoder"):
        random_baseline(backwards, x, seed=0)
