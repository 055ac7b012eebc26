"""The SAE in use: what each architecture computes, one token and one latent at a time; folding changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import OptionError
from interp.features.config import ARCHITECTURES, NORMALIZATIONS, SPARSE, SAEConfig
from interp.features.sae import SAE
from tests.small_pairs import refused

N, D, H, D_OUT, KRON = 12, 8, 24, 5, (2, 3, 4)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(architecture: str, *, transcoder: bool = False, scale: float = 1.0, dtype=torch.float64, **options) -> SAE:
    """One whose parameters and buffers are all as training might leave them."""
    elsewhere = {"d_out": D_OUT, "skip": True, "apply_b_dec_to_input": False} if transcoder else {}
    k = None if architecture == "top-afa" else 4
    config = SAEConfig(**{"architecture": architecture, "d_in": D, "d_sae": H, "k": k, **elsewhere, **options})
    sae = SAE(config, dtype=dtype, metadata={"from": "a test"})
    for seed, (name, p) in enumerate(sae.named_parameters()):
        p += (0.3 * normal(*p.shape, seed=seed)).to(p.dtype)
        if name == "W_dec" and config.unit_decoder:
            p /= p.norm(dim=1, keepdim=True)
    if architecture == "jumprelu":
        sae.threshold.abs_()
    sae.batch_threshold.fill_(0.4)
    sae.scale_in.fill_(scale)
    sae.scale_out.fill_(
        scale * (2 if transcoder and scale != 1 else 1)
    )  # only a transcoder's target has a scale of its own
    return sae


def kinds(**options) -> list:
    """(architecture, options) of every architecture: unit and free decoder, transcoders, kron."""
    found = []
    for architecture in ARCHITECTURES:
        for unit in (True, False):
            name = f"{architecture}-{'unit' if unit else 'free'}"
            each = {"unit_decoder": unit, **options}
            found.append(pytest.param(architecture, each, id=name))
            if architecture != "top-afa":
                found.append(pytest.param(architecture, {**each, "transcoder": True}, id=f"{name}-transcoder"))
            if architecture in SPARSE:
                found.append(pytest.param(architecture, {**each, "kron": KRON}, id=f"{name}-kron"))
    return [*found, pytest.param("top-afa", {"afa": "faithful", **options}, id="top-afa-faithful")]


# ------------------------------------------------------------------------------------------------- what is computed


def pre_activation(sae: SAE, seen: Tensor, i: int) -> float:
    """z_i of one token, less b_dec if it is to be: <x, e_i> + b_i, or of KronSAE sqrt(u v)."""
    if sae.config.kron is None:
        return float(sae.W_enc[:, i] @ seen + sae.bias[i])
    heads, m, n = sae.config.kron
    places = [(head, a, b) for head in range(heads) for a in range(m) for b in range(n)]
    head, a, b = places[i]
    row_u, row_v = head * m + a, heads * m + head * n + b
    u, v = (float(sae.encoder[row] @ seen + sae.b_enc[row]) for row in (row_u, row_v))
    return math.sqrt(u * v) if u > 0 and v > 0 else 0.0


def code_by_hand(sae: SAE, x: Tensor) -> Tensor:
    """The code of one normalised token, latent by latent."""
    c, result = sae.config, torch.zeros(H, dtype=x.dtype)
    seen = x - sae.b_dec if c.apply_b_dec_to_input else x
    z = [pre_activation(sae, seen, i) for i in range(H)]
    n = [float(row.norm()) if not c.unit_decoder or c.faithful else 1.0 for row in sae.W_dec]
    rank = [abs(z[i]) * n[i] if c.architecture == "abstopk" else z[i] * n[i] for i in range(H)]
    order = sorted(range(H), key=lambda i: -rank[i])
    if c.architecture in ("topk", "abstopk"):
        kept = order[: c.k]
    elif c.architecture in ("batchtopk", "matryoshka"):
        kept = [i for i in order if rank[i] > float(sae.batch_threshold)]
    elif c.architecture == "jumprelu":
        kept = [i for i in order if z[i] > float(sae.threshold[i])]
    elif c.architecture == "top-afa":
        reached = [math.sqrt(sum(max(rank[i], 0) ** 2 for i in order[:m])) for m in range(1, H + 1)]
        away = [abs(r - float(seen.norm())) for r in reached]
        kept = order[: away.index(min(away)) + 1]
    else:
        kept = [i for i in order if z[i] > 0]
    for i in kept:
        strength = z[i]
        if c.architecture == "gated":
            strength = float((sae.encoder[i] @ seen) * sae.r_mag[i].exp() + sae.b_mag[i])
        result[i] = strength if c.architecture == "abstopk" else max(strength, 0.0)
    return result


@pytest.mark.parametrize(("architecture", "options"), kinds())
def test_every_architecture_by_hand(architecture, options):
    sae, x = make(architecture, **options), normal(N, D, seed=50)
    f = torch.stack([code_by_hand(sae, token) for token in x])
    assert 0 < int((f != 0).sum()) < N * H
    torch.testing.assert_close(sae.encode(x), f, **CLOSE)
    expected = torch.stack([sum(f[t, i] * sae.W_dec[i] for i in range(H)) + sae.b_dec for t in range(N)])
    torch.testing.assert_close(sae.decode(f), expected, **CLOSE)
    if sae.config.skip:
        expected = expected + torch.stack([sae.W_skip @ token for token in x])
    torch.testing.assert_close(sae(x), expected, **CLOSE)
    assert torch.equal(sae.reconstruct(x, sae.codes(x)), sae(x))
    assert torch.equal(sae.codes(x).dense(), sae.encode(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_top_afa_chooses_the_latents_of_any(architecture):
    sae, x = make(architecture, unit_decoder=False), normal(N, D, seed=50)
    seen, found = x - sae.b_dec, sae.encode(x, select="afa")
    strength = sae.magnitudes(sae.pre_activations(x)).relu()
    sized = strength * sae.W_dec.norm(dim=1)
    ordered, order = sized.sort(dim=1, descending=True)
    for t in range(N):
        away = (ordered[t].square().cumsum(0).sqrt() - seen[t].norm()).abs()
        kept = order[t, : int(away.argmin()) + 1]
        expected = torch.zeros(H, dtype=x.dtype)
        expected[kept] = strength[t, kept]
        assert torch.equal(found[t], expected)
    torch.testing.assert_close(sae(x, select="afa"), found @ sae.W_dec + sae.b_dec, **CLOSE)


def test_k_max_holds_wherever_top_afa_chooses():
    x = normal(N, D, seed=50)
    for architecture in ("standard", "top-afa"):
        assert int((make(architecture, k_max=2).encode(x, select="afa") != 0).sum(1).max()) == 2


def test_the_published_top_afa_ignores_its_encoders_bias():
    sae, x = make("top-afa", afa="faithful"), normal(N, D, seed=50)
    before = sae(x)
    sae.b_enc.fill_(5.0)
    assert torch.equal(sae(x), before)


# --------------------------------------------------------------------------------------------------- shapes, refusals


@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 4), (2, 0), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_any_leading_axes(architecture, transcoder, leading):
    sae, x = make(architecture, transcoder=transcoder), normal(*leading, D, seed=3)
    flat = x.reshape(-1, D)
    for select in ("own",) if transcoder else ("own", "afa"):
        assert torch.equal(sae.encode(x, select=select), sae.encode(flat, select=select).reshape(*leading, H))
        assert torch.equal(
            sae(x, select=select), sae(flat, select=select).reshape(*leading, D_OUT if transcoder else D)
        )
    f = sae.encode(x)
    torch.testing.assert_close(sae.decode(f).flatten(), sae.decode(f.reshape(-1, H)).flatten(), **CLOSE)


def test_heads_are_concatenated():
    """hook_z is [batch, position, head, d_head]; an SAE reads all heads of a position as one activation."""
    sae, z = make("topk"), normal(2, 3, 4, 2, seed=3)
    assert sae.encode(z.flatten(-2)).shape == (2, 3, H)
    with refused(OptionError, "this SAE reads 8 channels, and the activations have 2"):
        sae.encode(z)


def test_refusals():
    sae, x = make("topk"), normal(N, D, seed=3)
    for use in (sae, sae.encode, sae.codes):
        with refused(OptionError, "this SAE reads 8 channels, and the activations have 9"):
            use(normal(N, 9, seed=3))
    with refused(OptionError, "'afq' is not a way to select latents .*own, afa.*did you mean 'afa'"):
        sae.encode(x, select="afq")
    with refused(OptionError, "a transcoder does not see that"):
        make("topk", transcoder=True).encode(x, select="afa")
    for normalize in ("layer_norm", "constant_norm_rescale"):
        each = make("topk", normalize=normalize)
        with refused(
            OptionError, f"normalize='{normalize}' is undone with each token's own scale: call the SAE on inputs"
        ):
            each.decode(each.encode(x))


# ------------------------------------------------------------------------------------------------------ normalisation


def test_layer_norm_is_undone():
    sae, bare, x = make("topk", normalize="layer_norm"), make("topk"), 5 * normal(N, D, seed=3) + 7
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    torch.testing.assert_close(sae.encode(x), bare.encode((x - mean) / std), **CLOSE)
    torch.testing.assert_close(sae(x), bare((x - mean) / std) * std + mean, **CLOSE)
    torch.testing.assert_close(sae(100 * x - 3), 100 * sae(x) - 3, rtol=1e-4, atol=1e-4)  # but for the 1e-5


def test_constant_norm_is_undone():
    sae, bare, x = make("topk", normalize="constant_norm_rescale"), make("topk"), 5 * normal(N, D, seed=3)
    factor = x.norm(dim=1, keepdim=True) / math.sqrt(D)
    torch.testing.assert_close(sae.normalize(x)[0].norm(dim=1), torch.full((N,), math.sqrt(D), dtype=x.dtype), **CLOSE)
    torch.testing.assert_close(sae.encode(x), bare.encode(x / factor), **CLOSE)
    torch.testing.assert_close(sae(x), bare(x / factor) * factor, **CLOSE)
    torch.testing.assert_close(sae(100 * x), 100 * sae(x), **CLOSE)
    assert sae(torch.zeros(1, D, dtype=x.dtype)).isfinite().all()


@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])
def test_a_scale_is_undone(transcoder):
    options = {"transcoder": transcoder, "normalize": "expected_average_only_in"}
    sae, bare, x = make("topk", scale=3.0, **options), make("topk", **options), normal(N, D, seed=3)
    assert torch.equal(sae.encode(x), bare.encode(3 * x))
    torch.testing.assert_close(sae(x), bare(3 * x) / (6 if transcoder else 3), **CLOSE)
    if not transcoder:
        torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x), **CLOSE)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_normalisation_and_its_inverse(normalize):
    sae, x = make("topk", normalize=normalize, scale=0.5), normal(N, D, seed=3)
    seen, (factor, shift) = sae.normalize(x)
    torch.testing.assert_close(seen * factor + shift, x, **CLOSE)


# ------------------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("architecture", "options"), kinds())
def test_folding_leaves_outputs_as_they_are(architecture, options, normalize):
    if options.get("transcoder") and normalize in ("layer_norm", "constant_norm_rescale"):
        with refused(OptionError, "undone on the output"):
            make(architecture, normalize=normalize, **options)
        return
    scale = 2.5 if normalize == "expected_average_only_in" else 1.0
    sae, x = make(architecture, normalize=normalize, scale=scale, **options), normal(N, D, seed=50)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    folded = sae.folded()
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items()), "the original stays"
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if architecture == "jumprelu" else CLOSE  # a threshold is float32
    torch.testing.assert_close(folded(x), sae(x), **tolerance)
    assert float(folded.scale_in) == float(folded.scale_out) == 1
    assert folded.config.normalize == ("none" if scale != 1 else normalize)
    if sae.config.kron is None:  # codes become f |w|, in the scale of the data
        norms = sae.W_dec.norm(dim=1) / sae.scale_out if folded.config != sae.config else 1.0
        torch.testing.assert_close(folded.encode(x), sae.encode(x) * norms, **tolerance)
        assert folded.config.unit_decoder
        if not sae.config.faithful:
            torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(H, dtype=x.dtype), **CLOSE)
    else:
        torch.testing.assert_close(folded.encode(x), sae.encode(x), **CLOSE)
    if not sae.config.transcoder:
        torch.testing.assert_close(folded(x, select="afa"), sae(x, select="afa"), **tolerance)
    assert folded.metadata == sae.metadata


@pytest.mark.parametrize(("architecture", "options"), kinds(normalize="expected_average_only_in", scale=2.5))
def test_folding_twice_is_folding_once(architecture, options):
    once = make(architecture, **options).folded()
    twice = once.folded()
    assert twice.config == once.config
    for name, value in once.state_dict().items():
        assert torch.allclose(twice.state_dict()[name].double(), value.double(), rtol=1e-12), name


def test_a_latent_without_a_direction_can_be_folded():
    sae, x = make("topk", unit_decoder=False), normal(N, D, seed=50)
    sae.W_dec[3] = 0
    torch.testing.assert_close(sae.folded()(x), sae(x), **CLOSE)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([a for a in ARCHITECTURES if a != "jumprelu"]), st.floats(0.01, 100))
def test_data_in_another_unit_with_that_unit_as_scale(architecture, unit):
    """FVU and L0 do not change when data are rescaled and the scale is given, or folded."""
    bare, x = make(architecture, unit_decoder=False), normal(N, D, seed=50)
    scaled = make(architecture, unit_decoder=False, scale=unit, normalize="expected_average_only_in")
    for sae in (scaled, scaled.folded()):
        torch.testing.assert_close(sae(x / unit) * unit, bare(x), rtol=1e-8, atol=1e-8)
        assert sae.codes(x / unit).l0() == bare.codes(x).l0()


# ------------------------------------------------------------------------------------------------------- exact oracles


def test_an_empty_encoder_gives_the_mean():
    sae, x = make("standard"), normal(N, D, seed=3)
    for p in (sae.encoder, sae.b_enc):
        p.zero_()
    sae.b_dec.copy_(x.mean(0))
    torch.testing.assert_close(sae(x), x.mean(0).expand(N, D), **CLOSE)
    assert sae.codes(x).l0() == 0


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "top-afa"])
def test_positive_and_negative_parts_reconstruct_exactly(architecture):
    """W_enc = [I, -I] and W_dec = [I; -I]: orthogonal pairs, so that the code is as long as what it encodes."""
    x, eye = normal(N, D, seed=3), torch.eye(D, dtype=torch.float64)
    sae = SAE(SAEConfig(architecture=architecture, d_in=D, d_sae=2 * D, k=D), dtype=torch.float64)
    both = torch.cat([eye, -eye])
    sae.encoder.copy_(both)
    sae.W_dec.copy_(both)
    sae.b_dec.fill_(0.25)
    if architecture == "jumprelu":
        sae.threshold.zero_()
    torch.testing.assert_close(sae(x), x, **CLOSE)
    torch.testing.assert_close(sae.encode(x).norm(dim=1), (x - 0.25).norm(dim=1), **CLOSE)


# ------------------------------------------------------------------------------------------------------ how it is made


def test_initial_weights():
    sae = SAE(SAEConfig(d_in=D, d_sae=H, k=4), seed=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(H))
    assert torch.equal(sae.encoder, sae.W_dec)
    assert sae.W_enc.shape == (D, H)
    assert not sae.b_dec.any()
    assert not sae.b_enc.any()
    assert torch.equal(SAE(sae.config, seed=3).W_dec, sae.W_dec)
    assert not torch.equal(SAE(sae.config, seed=4).W_dec, sae.W_dec)
    assert not any(p.requires_grad for p in sae.parameters())
    free = SAE(SAEConfig(d_in=D, d_sae=H, k=4, unit_decoder=False), seed=3)
    torch.testing.assert_close(free.norms(), torch.full((H,), 0.1))
    assert torch.equal(SAE(sae.config, seed=3, dtype=torch.bfloat16).W_dec, sae.W_dec.bfloat16())
    threshold = SAE(
        SAEConfig(architecture="jumprelu", d_in=D, d_sae=H, threshold_init=0.2), dtype=torch.bfloat16
    ).threshold
    assert torch.equal(threshold, torch.full((H,), 0.2)), "in float32, whatever the other weights are in"


def test_a_transcoder_starts_with_an_encoder_of_its_own():
    sae = SAE(SAEConfig(d_in=D, d_out=D, d_sae=H, k=4, skip=True, apply_b_dec_to_input=False))
    assert not torch.equal(sae.encoder, sae.W_dec)
    assert not sae.W_skip.any()
    assert sae.b_in is None


def test_of_takes_the_tensors_as_they_are():
    sae, x = make("gated", unit_decoder=False), normal(N, D, seed=3)
    again = SAE.of(sae.config, dict(sae.state_dict()), sae.metadata)
    assert again.W_dec.data_ptr() == sae.W_dec.data_ptr(), "no second copy"
    assert torch.equal(again(x), sae(x))
    assert not any(p.requires_grad for p in again.parameters())


def test_pre_activations_in_a_narrower_dtype():
    sae, x = make("topk"), normal(N, D, seed=3)
    z, narrow = sae.pre_activations(x), sae.pre_activations(x, dtype=torch.bfloat16)
    assert narrow.dtype == z.dtype
    assert 0 < float((narrow - z).abs().max()) < 0.05 * float(z.abs().max())
    assert torch.equal(sae.pre_activations(x, dtype=torch.float64), z)


def test_it_says_what_it_is():
    assert (
        repr(SAE(SAEConfig(d_in=8, d_sae=24, k=4, hook="blocks.1.hook_z")))
        == "SAE(topk k=4, 8 -> 24 at blocks.1.hook_z)"
    )
    assert repr(make("jumprelu", transcoder=True, k=None)) == "SAE(jumprelu, 8 -> 24 -> 5)"
