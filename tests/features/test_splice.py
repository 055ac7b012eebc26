"""SAEs in a run of the model: bit for bit what it was while nothing is changed, and hand-written hooks when something is.

Held against: plain torch that finds the code, changes it and adds the difference; the SAE's own reconstruction.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError, SiteError
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.splice import Edit, splice_hooks, spliced
from tests.small_pairs import refused

DOUBLE = torch.float64
POST = "blocks.0.hook_resid_post"
READS, WRITES = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
Z = "blocks.1.attn.hook_z"
D, LATENTS, K = 32, 48, 8
NORMALIZATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]


def sae_at(hook: str | None = None, *, seed: int = 0, dtype: torch.dtype = DOUBLE, d_in: int = D, **options) -> SAE:
    """A random SAE whose biases and scales are none that would hide a mistake."""
    sae = SAE(SAEConfig(d_in=d_in, d_sae=LATENTS, k=K, hook=hook, **options), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    for bias in (sae.b_dec, sae.b_enc, *([sae.W_skip] if sae.config.skip else [])):
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    if sae.config.normalize == "expected_average_only_in":
        sae.scale_in.fill_(1.7)
        sae.scale_out.fill_(0.6 if sae.config.transcoder else 1.7)
    return sae


def transcoder(**options) -> SAE:
    options = {"target_hook": WRITES, "apply_b_dec_to_input": False, "seed": 3} | options
    return sae_at(READS, **options)


def tokens_of(n: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(4, 60, (n, length), generator=torch.Generator().manual_seed(7))


def by_hand(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(code, scale of the data, reconstruction) of a top-k SAE, from its weights."""
    kind, scale, shift = sae.config.normalize, x.new_ones(()), 0.0
    seen = x
    if kind == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = ((x - shift).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt() + 1e-5
        seen = (x - shift) / scale
    elif kind == "constant_norm_rescale":
        scale = x.square().mean(-1, keepdim=True).sqrt()
        seen = x / scale
    elif kind == "expected_average_only_in":
        seen, scale = x * sae.scale_in, 1 / sae.scale_out
    z = (seen - sae.b_dec if sae.config.apply_b_dec_to_input else seen) @ sae.W_enc + sae.b_enc
    smallest = z.sort(-1, descending=True).values[..., K - 1 : K]
    f = torch.where(z >= smallest, z, 0.0).clamp_min(0.0)
    xhat = f @ sae.W_dec + sae.b_dec + (seen @ sae.W_skip.T if sae.config.skip else 0.0)
    return f, scale, xhat * scale + shift


def value_at(model, tokens: torch.Tensor, hook: str, hooks=()) -> torch.Tensor:
    """What a hook point has after the given hooks."""
    held = {}
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, (hook, lambda value, hook: held.update(it=value.clone()))])
    return held["it"]


def firing(sae: SAE, x: torch.Tensor, n: int = 3) -> list[int]:
    """Latents that fire on some tokens and not on all of them."""
    share = (by_hand(sae, x)[0] != 0).double().flatten(0, 1).mean(0)
    return ((share > 0) & (share < 1)).nonzero()[:n, 0].tolist()


def hooked(sae: SAE, change) -> object:
    """A hook at the SAE's own place that adds what a change of the code amounts to."""

    def hook_function(value: torch.Tensor, hook) -> torch.Tensor:
        f, scale, _ = by_hand(sae, value.flatten(2))
        return value + ((change(f.clone()) - f) @ sae.W_dec * scale).reshape(value.shape)

    return hook_function


# ----------------------------------------------------------------------------------------------------- nothing changed


def model_saes() -> dict[str, SAE]:
    """One of every kind, for models of width 128."""
    wide = {"d_in": 128, "dtype": torch.float32}
    return {
        "blocks.0.hook_resid_pre": sae_at(**wide),
        "blocks.1.attn.hook_z": sae_at(seed=1, **wide),
        "blocks.2.ln2.hook_normalized": transcoder(target_hook="blocks.2.hook_mlp_out", skip=True, **wide),
        "blocks.3.hook_resid_post": sae_at(seed=2, normalize="layer_norm", **wide),
    }


@pytest.mark.parametrize("name", ["mini_gpt2", "mini_llama"])
def test_with_the_error_kept_the_model_computes_what_it_did_bit_for_bit(request, name):
    model, tokens = request.getfixturevalue(name), tokens_of(3, 9)
    before = model(tokens)
    with spliced(model, model_saes()) as same:
        assert same is model
        assert torch.equal(model(tokens), before)
    with spliced(model, model_saes(), where=torch.ones(3, 9, dtype=torch.bool)):
        assert torch.equal(model(tokens), before)
    with spliced(model, model_saes(), error="drop"):
        assert not torch.allclose(model(tokens), before, atol=0.1)
    assert torch.equal(model(tokens), before)  # the hooks are gone


def test_the_hooks_are_gone_after_an_error_too(tiny):
    model, tokens = tiny("gpt2"), tokens_of()
    before = model(tokens)
    with pytest.raises(RuntimeError, match="inside"), spliced(model, sae_at(POST), error="drop"):
        raise RuntimeError("inside")
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("edit", [Edit(3, 1.0, "scale"), Edit(3, 0.0, "add")], ids=["scale-by-1", "add-0"])
def test_an_edit_that_changes_nothing_changes_nothing(tiny, edit):
    model, tokens = tiny("gpt2"), tokens_of()
    before = model(tokens)
    with spliced(model, sae_at(POST, dtype=torch.float32), edits=[edit]):
        assert torch.equal(model(tokens), before)


# --------------------------------------------------------------------------------------------------------------- edits

CHANGES = {
    "ablate": (Edit, (0.0,), lambda f: 0 * f),
    "clamp": (Edit, (2.5,), lambda f: 0 * f + 2.5),
    "add": (Edit, (-1.25, "add"), lambda f: f - 1.25),
    "scale": (Edit, (3.0, "scale"), lambda f: 3 * f),
}


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_latent_is_a_hook_that_moves_the_activation_by_the_change_of_its_code(tiny, family, normalize, name):
    model, tokens, sae = tiny(family, DOUBLE), tokens_of(), sae_at(POST, normalize=normalize)
    make, arguments, change = CHANGES[name]
    latent = firing(sae, value_at(model, tokens, POST))[0]

    def changed(f: torch.Tensor) -> torch.Tensor:
        f[..., latent] = change(f[..., latent])
        return f

    expected = model.run_with_hooks(tokens, fwd_hooks=[(POST, hooked(sae, changed))])
    with spliced(model, sae, edits=[make(latent, *arguments)]):
        found = model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(found, model(tokens), rtol=1e-3)


EDITS = st.lists(
    st.builds(
        Edit, st.integers(0, LATENTS - 1), st.floats(-3, 3), st.sampled_from(["set", "add", "scale"]),
        only_active=st.booleans(),
    ), min_size=1, max_size=6,
)  # fmt: skip


@given(edits=EDITS, keep=st.booleans())
@settings(max_examples=25, deadline=None)
def test_edits_are_done_in_turn_and_the_activation_moves_by_their_sum(tiny, edits, keep):
    """a' = a + sum (f'_i - f_i) w_i, and f' decoded without the error; several edits of one latent are done in turn."""
    model, tokens, sae = tiny("gpt2", DOUBLE), tokens_of(1, 4), sae_at(POST, normalize="layer_norm")
    before = value_at(model, tokens, POST)
    f, scale, xhat = by_hand(sae, before)
    new = f.clone()
    for edit in edits:
        here = new[..., edit.latent]
        there = {"set": 0 * here + edit.value, "add": here + edit.value, "scale": here * edit.value}[edit.mode]
        new[..., edit.latent] = torch.where(here != 0, there, here) if edit.only_active else there
    error = "keep" if keep else "drop"
    found = value_at(model, tokens, POST, splice_hooks(model, sae, edits=edits, error=error))
    expected = (before if keep else xhat) + (new - f) @ sae.W_dec * scale
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_all_latents_ablated_leave_the_error_and_the_bias(tiny):
    model, tokens, sae = tiny("gpt2", DOUBLE), tokens_of(), sae_at(POST)
    before = value_at(model, tokens, POST)
    edits = [Edit(i, 0.0) for i in range(LATENTS)]
    found = value_at(model, tokens, POST, splice_hooks(model, sae, edits=edits))
    torch.testing.assert_close(found, before - sae(before) + sae.b_dec, rtol=1e-11, atol=1e-12)
    found = value_at(model, tokens, POST, splice_hooks(model, sae, edits=edits, error="drop"))
    torch.testing.assert_close(found, sae.b_dec.expand_as(before), rtol=1e-11, atol=1e-12)


def test_only_active_leaves_tokens_alone_where_the_latent_does_not_fire(tiny):
    model, tokens, sae = tiny("gpt2", DOUBLE), tokens_of(), sae_at(POST)
    before = value_at(model, tokens, POST)
    latent = firing(sae, before)[0]
    fires = by_hand(sae, before)[0][..., latent] != 0
    for edit in (Edit(latent, 4.0, only_active=True), Edit(latent, 4.0, "add", only_active=True)):
        found = value_at(model, tokens, POST, splice_hooks(model, sae, edits=[edit]))
        assert torch.equal(found[~fires], before[~fires])
        assert ((found - before)[fires].norm(dim=-1) > 1e-3).all()
    everywhere = value_at(model, tokens, POST, splice_hooks(model, sae, edits=[Edit(latent, 4.0)]))
    assert (everywhere - before).norm(dim=-1).min() > 1e-3


# ------------------------------------------------------------------------------------------------ error, tokens, places


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_without_the_error_the_model_sees_the_reconstruction(tiny, normalize):
    model, tokens, sae = tiny("llama3", DOUBLE), tokens_of(), sae_at(POST, normalize=normalize)
    before = value_at(model, tokens, POST)
    with spliced(model, sae, error="drop"):
        found = model(tokens)
    assert torch.equal(found, model.run_with_hooks(tokens, fwd_hooks=[(POST, lambda value, hook: sae(value))]))
    torch.testing.assert_close(sae(before), by_hand(sae, before)[2], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(found, model(tokens), rtol=1e-2)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_tokens_outside_the_mask_pass_as_they_are(tiny, error):
    model, tokens, sae = tiny("gpt2"), tokens_of(), sae_at(POST, dtype=torch.float32)
    where = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    options = {"edits": [Edit(5, 3.0)], "error": error}
    before = value_at(model, tokens, POST)
    everywhere = value_at(model, tokens, POST, splice_hooks(model, sae, **options))
    masked = value_at(model, tokens, POST, splice_hooks(model, sae, where=where, **options))
    assert torch.equal(masked, torch.where(where[..., None], everywhere, before))
    nowhere = splice_hooks(model, sae, where=torch.zeros_like(where), **options)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=list(nowhere)), model(tokens))


def test_a_later_sae_sees_what_an_earlier_one_made(tiny):
    model, tokens = tiny("gpt2", DOUBLE), tokens_of()
    later = "blocks.1.hook_resid_post"
    first, second = sae_at(seed=1), sae_at(seed=2)
    i, j = firing(first, value_at(model, tokens, POST))[0], firing(second, value_at(model, tokens, later))[1]

    def ablate(latent: int):
        def changed(f: torch.Tensor) -> torch.Tensor:
            f[..., latent] = 0.0
            return f

        return changed

    hooks = [(POST, hooked(first, ablate(i))), (later, hooked(second, ablate(j)))]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    edits = [Edit(j, 0.0, hook=later), Edit(i, 0.0, hook=POST)]
    with spliced(model, {POST: first, later: second}, edits=edits):
        found = model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"skip": True}, {"normalize": "expected_average_only_in", "skip": True}], ids=["plain", "skip", "scaled"]
)  # fmt: skip
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_a_transcoder_reads_one_place_and_writes_another(tiny, options, error):
    model, tokens, sae = tiny("gpt2", DOUBLE), tokens_of(), transcoder(**options)
    read, wrote = value_at(model, tokens, READS), value_at(model, tokens, WRITES)
    f, scale, yhat = by_hand(sae, read)
    latent = firing(sae, read)[0]
    new = f.clone()
    new[..., latent] *= 3
    expected = (wrote if error == "keep" else yhat) + (new - f) @ sae.W_dec * scale
    hooks = splice_hooks(model, sae, edits=[Edit(latent, 3.0, "scale")], error=error)
    torch.testing.assert_close(value_at(model, tokens, WRITES, hooks), expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(value_at(model, tokens, READS, hooks), read)


def test_a_transcoder_may_have_another_width_on_each_side(tiny):
    model, tokens, place = tiny("gpt2", DOUBLE), tokens_of(), "blocks.1.mlp.hook_post"
    width = value_at(model, tokens, place).shape[-1]
    sae = transcoder(target_hook=place, d_out=width)
    found = value_at(model, tokens, place, splice_hooks(model, sae, error="drop"))
    assert width != D
    assert torch.equal(found, sae(value_at(model, tokens, READS)))


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_heads_are_side_by_side(tiny, error):
    """hook_z is [batch, position, head, d_head]; the SAE sees heads concatenated."""
    model, tokens, sae = tiny("gpt2", DOUBLE), tokens_of(), sae_at(Z)
    before = value_at(model, tokens, Z)
    assert before.ndim == 4
    f, _, xhat = by_hand(sae, before.flatten(2))
    latent = firing(sae, before.flatten(2))[0]
    moved = (2 - f[..., latent, None]) * sae.W_dec[latent]
    expected = (before.flatten(2) if error == "keep" else xhat) + moved
    found = value_at(model, tokens, Z, splice_hooks(model, sae, edits=[Edit(latent, 2.0)], error=error))
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-11, atol=1e-12)
    assert found.shape == before.shape


def test_one_sae_may_say_itself_where_it_belongs(tiny):
    model, tokens, edits = tiny("gpt2"), tokens_of(), [Edit(2, 5.0)]
    itself = splice_hooks(model, sae_at(POST, dtype=torch.float32), edits=edits)
    named = splice_hooks(model, {POST: sae_at("elsewhere", dtype=torch.float32)}, edits=edits)
    logits = [model.run_with_hooks(tokens, fwd_hooks=list(hooks)) for hooks in (itself, named)]
    assert torch.equal(*logits)


def test_an_sae_may_be_of_another_precision_than_the_model(tiny):
    model, tokens, edits = tiny("gpt2"), tokens_of(), [Edit(2, 5.0)]
    narrow, wide = (sae_at(POST, dtype=dtype) for dtype in (torch.float32, DOUBLE))
    one, other = (
        model.run_with_hooks(tokens, fwd_hooks=list(splice_hooks(model, sae, edits=edits))) for sae in (narrow, wide)
    )
    assert other.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("saes", "edits", "says"),
    [
        ({"blocks.9.hook_resid_post": {}}, [], "has no hook point 'blocks.9.hook_resid_post'"),
        ({READS: {"target_hook": "blocks.1.out", "apply_b_dec_to_input": False}}, [], "no hook point 'blocks.1.out'"),
        ({POST: {}}, [Edit(LATENTS, 0.0)], f"has latents 0 to {LATENTS - 1}, not {LATENTS}"),
        ({POST: {}}, [Edit(-1, 0.0)], "not -1"),
        ({POST: {}, Z: {}}, [Edit(3, 0.0)], f"the edit of latent 3 names no hook, and SAEs are at {POST}, {Z}"),
        ({POST: {}}, [Edit(3, 0.0, hook=Z)], f"the edit of latent 3 is for '{Z}', and SAEs are at {POST}"),
    ],
    ids=["hook", "target", "latent", "negative", "which", "other"],
)
def test_what_does_not_exist_is_said(tiny, saes, edits, says):
    saes = {hook: sae_at(**options) for hook, options in saes.items()}
    with pytest.raises(SiteError, match=says):
        splice_hooks(tiny("gpt2"), saes, edits=edits)


@pytest.mark.parametrize(
    ("hook", "options", "says"),
    [
        (POST, {"d_in": 24}, f"reads 24 channels, and {POST} has 32"),
        (READS, {"target_hook": WRITES, "d_out": 24}, f"writes 24 channels, and {WRITES} has 32"),
        (WRITES, {"target_hook": READS}, f"reaches {READS}, which a transcoder writes, before what it reads"),
    ],
    ids=["reads", "writes", "order"],
)
def test_widths_and_places_that_do_not_fit_are_said_when_the_model_runs(tiny, hook, options, says):
    sae = sae_at(dtype=torch.float32, apply_b_dec_to_input=False, **options)
    with spliced(tiny("gpt2"), {hook: sae}) as model, pytest.raises(SiteError, match=says):
        model(tokens_of())


def test_other_mistakes_are_said(tiny):
    model = tiny("gpt2")
    with pytest.raises(SiteError, match="does not say which hook it belongs to"):
        splice_hooks(model, sae_at())
    with pytest.raises(OptionError, match="there is no SAE"):
        splice_hooks(model, {})
    with refused(OptionError, "'dropp' is not a treatment of the error term.*did you mean 'drop'"):
        splice_hooks(model, sae_at(POST), error="dropp")
    with refused(OptionError, "'clamp' is not a way to edit a latent"):
        Edit(1, 0.0, "clamp")
    where = torch.ones(2, 5, dtype=torch.bool)
    with spliced(model, sae_at(POST, dtype=torch.float32), where=where), pytest.raises(OptionError, match="where is"):
        model(tokens_of())
