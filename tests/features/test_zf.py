"""Codes as long as activations: inequalities that hold exactly, the random walk that signs make, the plot's lines.

Held against: formulas token by token; the coherence of the dictionary; dictionaries whose coherence is chosen.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError
from interp.features.config import SAEConfig
from interp.features.evaluate import decoder_coherence, evaluate_reconstruction
from interp.features.sae import SAE
from interp.features.zf import COLUMNS, worst_case_slopes, zf_plot, zf_points
from interp.plots import RAISES
from tests.small_pairs import refused

DOUBLE = torch.float64
SEEDS = st.integers(0, 2**20)
KINDS = {
    "topk": {"k": 6},
    "signs kept": {"architecture": "abstopk", "k": 5},
    "relu": {"architecture": "standard"},
    "free norms": {"k": 6, "unit_decoder": False},
    "scaled": {"k": 6, "normalize": "expected_average_only_in"},
    "by token": {"k": 6, "normalize": "layer_norm"},
    "transcoder": {"k": 6, "apply_b_dec_to_input": False, "d_out": 7, "skip": True},
}


def sae_of(kind: str, seed: int = 0, d: int = 12, h: int = 20) -> SAE:
    """A random SAE whose biases, norms and scales are none that would hide a mistake."""
    sae = SAE(SAEConfig(d_in=d, d_sae=h, **KINDS[kind]), seed=seed, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(seed + 1)
    for weight in (sae.b_dec, sae.b_enc, *([sae.W_skip] if sae.config.skip else [])):
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    if kind == "free norms":
        sae.W_dec.mul_(0.3 + 3 * torch.rand(h, 1, generator=generator))
    if kind == "scaled":
        sae.scale_in.fill_(0.4)
        sae.scale_out.fill_(0.4)
    return sae


def rows(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def points_of(sae: SAE, n: int = 30, seed: int = 0) -> pd.DataFrame:
    y = rows(n, sae.config.out, seed + 1) if sae.config.transcoder else None
    return zf_points(sae, rows(n, sae.config.d_in, seed), y)


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_elbo_1_is_at_most_the_coherence(kind, seed):
    sae = sae_of(kind, seed)
    elbo_1 = points_of(sae, seed=seed).elbo_1
    assert elbo_1.notna().any()
    assert elbo_1.max() <= decoder_coherence(sae.W_dec)[0] + 1e-9


@given(SEEDS, st.integers(2, 30), st.integers(2, 10), st.floats(0.001, 1000))
@settings(deadline=None, max_examples=40)
def test_elbo_1_is_at_most_the_coherence_whatever_the_sizes(seed, h, d, scale):
    sae = SAE(SAEConfig(architecture="standard", d_in=d, d_sae=h), seed=seed, dtype=DOUBLE)
    found = zf_points(sae, scale * rows(20, d, seed))
    assert not (found.elbo_1 > decoder_coherence(sae.W_dec)[0] + 1e-6).any()
    assert found.elbo_1[found.l0 < 2].isna().all()


def test_two_latents_that_fire_give_their_own_cosine():
    """The bound is reached where there is but one pair."""
    angle = 1.1
    sae = SAE(SAEConfig(architecture="standard", d_in=2, d_sae=3), dtype=DOUBLE)
    sae.W_dec.copy_(torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)], [0, -1]]))
    sae.encoder.copy_(torch.tensor([[1.0, 0], [0, 1], [0, -1]]))
    x = torch.tensor([[1.0, 2], [3, 0.1], [2, -0.5], [1, 0], [-1, 0]], dtype=DOUBLE)
    found = zf_points(sae, x)
    assert found.elbo_1.tolist() == pytest.approx([math.cos(angle), math.cos(angle), 0, np.nan, np.nan], nan_ok=True)
    assert found.l0.tolist() == [2, 2, 2, 1, 0]
    assert found.elbo.isna().tolist() == [False] * 4 + [True]  # nothing fires, and there is no bias


def test_latents_too_weak_to_tell_from_none_say_nothing():
    sae = SAE(SAEConfig(architecture="standard", d_in=2, d_sae=2), dtype=DOUBLE)
    sae.W_dec.copy_(torch.tensor([[1.0, 0], [0.6, 0.8]]))
    sae.encoder.copy_(torch.eye(2))
    found = zf_points(sae, torch.tensor([[1.0, 1e-12], [1.0, 1e-4]], dtype=DOUBLE))
    assert found.elbo_1.tolist() == pytest.approx([np.nan, 0.6], nan_ok=True, rel=1e-6)


@pytest.mark.parametrize("d", [32, 128])
def test_signs_make_it_a_random_walk(d):
    """|x| / |f| of random unit rows: sd sqrt((1 - 1/L0) / (2 d)), and the worst case far off."""
    sae = SAE(SAEConfig(d_in=d, d_sae=8 * d, k=16), seed=0, dtype=DOUBLE)
    sae.encoder.copy_(rows(8 * d, d, 5))  # so that which latents fire has nothing to do with their directions
    x = rows(4000, d)
    written = zf_points(sae, x, sae(x))
    ratio = written.x_norm / written.code_norm
    assert ratio.std() == pytest.approx(math.sqrt((1 - 1 / 16) / (2 * d)), rel=0.15)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    largest, mean = decoder_coherence(sae.W_dec)
    assert largest * (8 * d - 1) > 20
    assert written.elbo_1.median() < mean


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("by token", "transcoder")])
def test_points_token_by_token(kind, monkeypatch):
    monkeypatch.setattr("interp.features.zf._ENTRIES", 7 * 20)  # seven tokens at a time
    sae, x = sae_of(kind), rows(30) + 0.5
    found = zf_points(sae, x)
    assert tuple(found.columns) == COLUMNS
    assert len(found) == 30
    unit = 1 / float(sae.scale_out)
    for i, row in enumerate(found.itertuples()):
        f = sae.encode(x[i : i + 1])[0]
        size = f * sae.W_dec.norm(dim=1) * unit
        code = float(torch.cat([size, sae.b_dec.norm()[None] * unit]).norm())
        v = f @ sae.W_dec * unit
        assert row.x_norm == pytest.approx(float(x[i].norm()))
        assert row.code_norm == pytest.approx(code)
        assert row.elbo == pytest.approx(abs(row.x_norm**2 - code**2) / (19 * code**2))
        pairs = float(size.abs().sum() ** 2 - size.square().sum())
        assert row.elbo_1 == pytest.approx(abs(float(v.square().sum() - size.square().sum())) / pairs)
        assert row.l0 == int((f != 0).sum())


@pytest.mark.parametrize("kind", ["by token", "transcoder"])
def test_the_feature_that_is_always_on_is_all_that_is_written_without_latents(kind):
    sae, x = sae_of(kind), rows(30) + 0.5
    y = rows(30, 7, 3) if kind == "transcoder" else x
    found = zf_points(sae, x, y)
    scale = x.std(1, keepdim=True) + 1e-5 if kind == "by token" else torch.ones(30, 1)
    silent = SAE.of(sae.config, {**sae.state_dict(), "W_dec": torch.zeros_like(sae.W_dec)})
    code = (sae.encode(x) * sae.W_dec.norm(dim=1) * scale).square().sum(1) + silent(x).square().sum(1)
    np.testing.assert_allclose(found.code_norm, code.sqrt().numpy())
    np.testing.assert_allclose(found.x_norm, y.norm(dim=1).numpy())


@pytest.mark.parametrize("kind", ["free norms", "scaled"])
def test_folding_moves_no_point(kind):
    sae = sae_of(kind)
    pd.testing.assert_frame_equal(points_of(sae), points_of(sae.folded()))


def test_medians_are_those_of_an_evaluation():
    sae, x = sae_of("relu"), rows(30)
    found, points = evaluate_reconstruction(sae, x), zf_points(sae, x)
    assert (found.elbo, found.elbo_1) == pytest.approx((points.elbo.median(), points.elbo_1.median()))
    afa = zf_points(sae, x, select="afa")
    assert (afa.code_norm < points.code_norm).any()  # fewer latents are enough


# ------------------------------------------------------------------------------------------------------------ the plot


def line(figure, name: str) -> list[tuple[list, list]]:
    return [(list(t.x), list(t.y)) for t in figure.data if t.name == name]


def test_lines_and_bands():
    points = pd.DataFrame({name: [10.0, 20.0, 0.0] for name in COLUMNS}).assign(code_norm=[10.5, 15.0, 0.0])
    figure = zf_plot(points, d=50, title="a plot")
    end = 21.0
    assert line(figure, "|code| = |x|") == [([0, end], [0, end])]
    (band,) = line(figure, "|x| (1 ± 1/√(2d)), d = 50: 50% of tokens")
    assert band[1] == pytest.approx([0, 1.1 * end, 0.9 * end, 0])
    for worst, slopes in ((0.25, [1 / math.sqrt(1.25), 1 / math.sqrt(0.75)]), (1.0, [1 / math.sqrt(2)])):
        drawn = line(figure, f"worst case, ε(h − 1) = {worst:g}")
        assert [y[1] / end for _, y in drawn] == pytest.approx(slopes)
        assert worst_case_slopes(worst)[0] == pytest.approx(slopes[0])
    assert worst_case_slopes(1.0)[1] == np.inf
    (dots,) = line(figure, "tokens, median |code| / |x| 0.900")
    assert dots == ([10, 20, 0], [10.5, 15, 0])
    assert figure.data[-1].marker.color == RAISES
    assert figure.layout.title.text == "a plot"
    assert figure.layout.xaxis.range == (0, end)


def test_many_tokens_are_thinned_evenly():
    points = pd.DataFrame({name: np.arange(1.0, 1002) for name in COLUMNS})
    figure = zf_plot(points, d=8, limit=100)
    shown = figure.data[-1].x
    assert len(shown) <= 100
    assert set(np.diff(shown)) == {11}
    assert len(zf_plot(points, d=8).data[-1].x) == 1001


def test_a_dead_code_is_drawn_too():
    points = pd.DataFrame({"x_norm": [0.0], "code_norm": [0.0], "elbo": [np.nan], "elbo_1": [np.nan], "l0": [0.0]})
    assert len(zf_plot(points, d=8).data[-1].x) == 1


def test_refusals():
    sae = sae_of("topk")
    with refused(OptionError, "give the targets"):
        zf_points(sae_of("transcoder"), rows(3))
    with refused(OptionError, "inputs are"):
        zf_points(sae, rows(3, 11))
    with refused(OptionError, "way to select"):
        zf_points(sae, rows(3), select="all")
    points = points_of(sae)
    with refused(OptionError, "no column 'elbo_1'"):
        zf_plot(points.drop(columns="elbo_1"), d=12)
    for bad in ({"points": points[:0], "d": 12}, {"points": points, "d": 0}, {"points": points, "d": 12, "limit": 0}):
        with refused(OptionError, "needs tokens, channels and dots"):
            zf_plot(**bad)
