"""Neurons' rows as the readings define them.

Held against: the model's own pre-activations and logits, formulas in loops, the explicit table of scores.
"""

import copy
from dataclasses import replace

import pytest
import torch

from interp.errors import OptionError, SiteError, UnsupportedModel
from interp.model.run import record
from interp.neurons.readings import (
    FINAL_NORMS,
    MATRICES,
    SCORES,
    Reading,
    reading_rows,
    token_deviations,
    unit,
    vocabulary_rows,
)
from tests.small_pairs import refused

TOKENS = torch.tensor([[1, 5, 7, 4, 9]])
FAMILIES = ("gpt2", "llama", "gemma2", "olmo", "olmo2", "phi", "gptj")
RAW = {"final_norm": "none", "score": "logit"}


def scores(model, layer: int, reading: Reading) -> torch.Tensor:
    """[neuron, vocabulary]"""
    rows, tokens = reading_rows(model, layer, reading), vocabulary_rows(model, reading)
    table = rows @ tokens.T
    return table / token_deviations(rows, tokens) if reading.score == "zscore" else table


@pytest.mark.parametrize("family", FAMILIES)
def test_up_and_gate_rows_are_what_the_neuron_reads(tiny, family):
    """Rows times the stream, divided by the norm's scale, are the pre-activations, up to biases."""
    model, layer = tiny(family, torch.float64), 1
    cfg, block = model.cfg, f"blocks.{layer}"
    stream = f"{block}.hook_resid_pre" if cfg.parallel else f"{block}.hook_resid_mid"
    norm = f"{block}.ln1" if cfg.shared_norm else f"{block}.ln2"
    sites = {"up": "hook_pre_linear" if cfg.gated else "hook_pre"} | ({"gate": "hook_pre"} if cfg.gated else {})
    names = [stream, *([f"{norm}.hook_scale"] if cfg.pre_norm else []), *(f"{block}.mlp.{s}" for s in sites.values())]
    found = record(model, TOKENS, names)
    x = found[stream] / found[f"{norm}.hook_scale"] if cfg.pre_norm else found[stream]
    for matrix, site in sites.items():
        rows = reading_rows(model, layer, Reading(matrix, **RAW)) / cfg.logit_scale
        pre = found[f"{block}.mlp.{site}"]
        # biases, of the norm through the matrix as well, are the same at all positions
        torch.testing.assert_close((x @ rows.T).diff(dim=1), pre.diff(dim=1), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_down_row_is_what_the_neuron_adds_to_the_stream(tiny, family):
    """Up to the scale of a norm behind the MLP."""
    model, layer, neuron = tiny(family, torch.float64), 1, 3
    out, post = f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.mlp.hook_post"
    held = [(f"blocks.{layer}.ln2_post.hook_scale", lambda v, hook: torch.ones_like(v))] if model.cfg.post_norm else []
    step = torch.zeros(model.cfg.d_mlp, dtype=torch.float64)
    step[neuron] = 1
    plain = record(model, TOKENS, [out], held)[out]
    moved = record(model, TOKENS, [out], [*held, (post, lambda v, hook: v + step)])[out]
    row = reading_rows(model, layer, Reading("down", **RAW))[neuron] / model.cfg.logit_scale
    torch.testing.assert_close(moved - plain, row.expand_as(plain), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo"])
def test_the_full_final_norm_is_the_lens_at_the_last_layer(tiny, family):
    """A stream that is a long multiple of the row has the row's scores as logits, up to biases and the soft-cap."""
    model = tiny(family, torch.float64)
    reading = Reading("down", score="logit")
    rows = reading_rows(model, 1, replace(reading, final_norm="none")) / model.cfg.logit_scale
    logits = model.unembed_resid(1e9 * rows)
    if model.cfg.logit_softcap is not None:
        logits = model.cfg.logit_softcap * torch.atanh(logits / model.cfg.logit_softcap)
    zero = model.unembed_resid(torch.zeros_like(rows))  # what biases alone give
    torch.testing.assert_close(scores(model, 1, reading), logits - zero, rtol=1e-7, atol=1e-8)


def test_by_hand(mini_gpt2):
    """Gain, centring, length and cosine of one neuron and one token, in loops."""
    w, g, u = mini_gpt2.blocks[2].mlp.W_in[:, 7].tolist(), mini_gpt2.blocks[2].ln2.w.tolist(), mini_gpt2.W_U[:, 11]
    read = [a * b for a, b in zip(w, g, strict=True)]
    read = [a - sum(read) / 128 for a in read]
    length = sum(a * a for a in read) ** 0.5 * sum(b * b for b in u.tolist()) ** 0.5
    expected = sum(a * b for a, b in zip(read, u.tolist(), strict=True)) / length
    assert float(scores(mini_gpt2, 2, Reading())[7, 11]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("matrix", MATRICES)
def test_joint_readings_and_negated_weights(tiny, matrix):
    """Poles of a gated neuron add and subtract unit rows; the pole - of w is the pole + of -w."""
    model = tiny("llama", torch.float64)
    gate, up = (unit(reading_rows(model, 0, Reading(name, **RAW))) for name in ("gate", "up"))
    joint = {"gate+up": gate + up, "gate-up": gate - up}
    if matrix in joint:
        torch.testing.assert_close(reading_rows(model, 0, Reading(matrix, **RAW)), joint[matrix])
    turned = copy.deepcopy(model)
    for name in ("W_in", "W_gate", "W_out"):
        getattr(turned.blocks[0].mlp, name).neg_()
    for score in SCORES:
        reading = Reading(matrix, score=score)
        torch.testing.assert_close(scores(turned, 0, reading), -scores(model, 0, reading), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("matrix", ["up", "gate", "down", "gate+up"])
def test_folding_a_gain_of_one_changes_nothing(tiny, matrix, score):
    model = copy.deepcopy(tiny("gemma2", torch.float64))
    for norm in (model.blocks[1].ln2, model.blocks[1].ln2_post):
        norm.w.zero_()  # stored as w - 1
    on, off = (scores(model, 1, Reading(matrix, fold_norm=fold, score=score)) for fold in (True, False))
    torch.testing.assert_close(on, off)
    model.blocks[1].ln2.w[0] = model.blocks[1].ln2_post.w[0] = 4.0
    on = scores(model, 1, Reading(matrix, fold_norm=True, score=score))
    assert not torch.allclose(on, off)


def test_folding_a_gain_of_one_changes_nothing_where_the_norm_centres(tiny):
    model = copy.deepcopy(tiny("gpt2", torch.float64))
    model.blocks[1].ln2.w.fill_(1.0)
    on, off = (scores(model, 1, Reading(fold_norm=fold)) for fold in (True, False))
    torch.testing.assert_close(on, off)
    assert not torch.allclose(on, scores(model, 1, Reading(center_rows=False)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_keeps_the_order_of_tokens(tiny, family):
    """D9: a row's length does not; a gain, centring and a true cosine may."""
    model = tiny(family, torch.float64)
    logit = scores(model, 1, Reading("down", **RAW)).argsort(1)
    assert logit.equal(scores(model, 1, Reading("down", score="logit", final_norm="unit")).argsort(1))
    for other in (Reading("down"), Reading("down", score="logit"), Reading("down", score="zscore", final_norm="none")):
        assert not logit.equal(scores(model, 1, other).argsort(1))
    # without a gain, an RMSNorm divides and nothing else
    bare = copy.deepcopy(model)
    bare.ln_final.w.fill_(1.0)
    full = scores(bare, 1, Reading("down", score="logit", final_norm="full"))
    centred = scores(bare, 1, Reading("down", center_rows=family == "gpt2", **RAW))
    assert full.argsort(1).equal(centred.argsort(1))
    # the length of tokens' vectors reaches the order only of what is not divided by it
    flat = copy.deepcopy(model)
    flat.unembed.W_U.copy_(unit(model.W_U.T).T)
    assert (
        scores(flat, 1, Reading("down", **RAW))
        .argsort(1)
        .equal(scores(model, 1, Reading("down", final_norm="none")).argsort(1))
    )


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("center", [False, True])
def test_cosines_are_those_of_the_vectors(tiny, final_norm, center):
    model = tiny("gpt2", torch.float64)
    plain = Reading("down", score="logit", final_norm=final_norm, center=center)
    rows, tokens = reading_rows(model, 0, plain), vocabulary_rows(model, plain)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], tokens[None], dim=2)
    torch.testing.assert_close(scores(model, 0, replace(plain, score="cosine")), expected)
    assert center == bool(tokens.mean(0).abs().max() < 1e-12)


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_zscores_are_over_neurons(tiny, family):
    """Mean 0 and deviation 1 of each token, in the table that is otherwise never made."""
    model = tiny(family, torch.float64)
    logit = scores(model, 1, Reading("up", score="logit", final_norm="none"))
    found = scores(model, 1, Reading("up", score="zscore"))
    torch.testing.assert_close(found, (logit - logit.mean(0)) / logit.std(0, correction=0))


@pytest.mark.parametrize("shape", [(3, 8), (40, 8), (8, 8), (1, 8)], ids=str)
def test_deviations_without_the_table(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = torch.randn(13, 8, generator=generator, dtype=torch.float64)
    tokens[4] = 0
    expected = (rows @ tokens.T).std(0, correction=0)
    torch.testing.assert_close(token_deviations(rows, tokens), expected, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr("interp.neurons.readings._ENTRIES", 24)
    torch.testing.assert_close(token_deviations(rows, tokens), expected, rtol=1e-10, atol=1e-12)


def test_embedding_or_unembedding(tiny):
    model = tiny("phi", torch.float64)
    assert vocabulary_rows(model, Reading(score="logit")).equal(model.W_U.T.contiguous())
    assert vocabulary_rows(model, Reading(score="logit", vocabulary="embed")).equal(model.W_E)


def test_a_row_of_zeros_stays_one(tiny):
    model = copy.deepcopy(tiny("gpt2"))
    model.blocks[0].mlp.W_out[5] = 0
    for final_norm in FINAL_NORMS:
        assert not reading_rows(model, 0, Reading("down", final_norm=final_norm))[5].any()


def test_options_are_decided_by_the_model(mini_gpt2, mini_llama):
    assert Reading("up").of(mini_gpt2) == Reading("up", True, True, "none")
    assert Reading("down").of(mini_gpt2) == Reading("down", True, False, "full")
    assert Reading("gate").of(mini_llama) == Reading("gate", True, False, "none")
    assert Reading("gate").of(mini_llama).of(mini_llama).to_dict()["final_norm"] == "none"


def test_half_precision_is_read_in_float32(tiny):
    model = tiny("llama", torch.bfloat16)
    assert reading_rows(model, 0, Reading()).dtype == vocabulary_rows(model, Reading()).dtype == torch.float32


def test_refusals(mini_gpt2):
    with refused(OptionError, "did you mean 'gate'"):
        Reading("gates")
    with refused(OptionError, "'softmax' is not a score"):
        Reading(score="softmax")
    with refused(OptionError, "way to apply the final norm"):
        Reading(final_norm="rms")
    with refused(OptionError, "table of tokens' vectors"):
        Reading(vocabulary="both")
    with refused(OptionError, "mini-gpt2 has no gates to read"):
        reading_rows(mini_gpt2, 0, Reading("gate-up"))
    with refused(SiteError, "layers 0 to 3, not 4"):
        reading_rows(mini_gpt2, 4, Reading())
    with refused(UnsupportedModel, "load the model with load_model"):
        vocabulary_rows(torch.nn.Linear(2, 2), Reading())
