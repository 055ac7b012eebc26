"""Direct effects of latents on logits.

Held against: the model itself, with the latent's direction added in a run whose norm scales are held; the formula in loops.
"""

import pytest
import torch

from interp.errors import OptionError, SiteError, UnsupportedModel
from interp.features.config import SAEConfig
from interp.features.effects import direction_effects, logit_effects, token_effects
from interp.features.sae import SAE
from interp.model.run import record
from interp.model.tokens import token_strings
from tests.small_pairs import refused

TOKENS = torch.tensor([[1, 5, 7, 4, 9]])
FAMILIES = ("gpt2", "llama", "gemma2", "olmo2", "phi")


def random_sae(width: int, hook: str, **options) -> SAE:
    """64 latents, float64."""
    return SAE(SAEConfig(d_in=width, d_sae=64, k=4, hook=hook, **options), dtype=torch.float64)


def every_effect(model, sae: SAE, latent: int) -> torch.Tensor:
    """[d_vocab], from the table: its top side with every token."""
    table = logit_effects(model, sae, [latent], k=model.W_U.shape[1])
    top = table[table["side"] == "top"].sort_values("token_id")
    return torch.tensor(top["value"].to_numpy())


def measured(model, hook: str, direction: torch.Tensor) -> torch.Tensor:
    """How the last logits move when a direction is added at a hook of the last layer, with norms' scales held.

    The final norm divides by 1000 so that a soft-cap is nearly a straight line; what the MLP makes of a change is held back.
    """
    last, scale = model.cfg.n_layers - 1, 1000.0
    held = {
        "ln_final.hook_scale": scale,
        f"blocks.{last}.ln1_post.hook_scale": 1.0,
        f"blocks.{last}.ln2_post.hook_scale": 1.0,
    }
    hooks = [
        (name, lambda v, hook, to=to: torch.full_like(v, to)) for name, to in held.items() if name in model.hook_dict
    ]
    before = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    if not hook.endswith(("hook_post", "mlp_out", "resid_post")):
        mlp = f"blocks.{last}.hook_mlp_out"
        clean = record(model, TOKENS, [mlp], hooks)[mlp]
        hooks = [*hooks, (mlp, lambda v, hook: clean)]
    step = lambda v, hook: v + direction.reshape(v.shape[2:])  # noqa: E731
    moved = model.run_with_hooks(TOKENS, fwd_hooks=[*hooks, (hook, step)])
    if model.cfg.logit_softcap is not None:
        cap = model.cfg.logit_softcap
        before, moved = (cap * torch.atanh(logits / cap) for logits in (before, moved))
    change = (moved - before)[0, -1] * scale
    return change - change.mean()


@pytest.mark.parametrize("place", ["hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_effect_is_what_the_model_does_with_the_direction(tiny, family, place):
    model = tiny(family, torch.float64)
    hook = f"blocks.{model.cfg.n_layers - 1}.{place}"
    width = record(model, TOKENS, [hook])[hook][0, 0].numel()
    sae = random_sae(width, hook)
    for latent in (0, 63):
        found = every_effect(model, sae, latent)
        torch.testing.assert_close(found, measured(model, hook, sae.W_dec[latent]), rtol=1e-6, atol=1e-8)


def test_by_hand(mini_gpt2):
    """W_U, the norm's weight and two means, in loops."""
    sae = random_sae(128, "blocks.1.hook_resid_post")
    w, W_U = mini_gpt2.ln_final.w.double(), mini_gpt2.W_U.double()
    direction = sae.W_dec[7] - sum(sae.W_dec[7]) / 128
    raw = [float(sum(direction * w * W_U[:, token])) for token in range(W_U.shape[1])]
    mean = sum(raw) / len(raw)
    table = logit_effects(mini_gpt2, sae, [7], k=3)
    order = sorted(range(len(raw)), key=lambda token: -raw[token])
    assert table["side"].tolist() == ["top"] * 3 + ["bottom"] * 3
    assert table["rank"].tolist() == [0, 1, 2, 0, 1, 2]
    assert table["token_id"].tolist() == [*order[:3], *order[:-4:-1]]
    assert table["token"].tolist() == token_strings(mini_gpt2.tokenizer, table["token_id"].tolist())
    assert table["value"].tolist() == pytest.approx([raw[t] - mean for t in table["token_id"]], abs=1e-5)


def test_all_latents_in_pieces_are_each_latent(mini_gpt2, monkeypatch):
    sae = random_sae(128, "blocks.1.hook_resid_mid")
    whole = logit_effects(mini_gpt2, sae, k=2)
    assert whole["latent"].tolist() == [latent for latent in range(64) for _ in range(4)]
    monkeypatch.setattr("interp.features.effects._ENTRIES", 5 * 835)
    pieces = logit_effects(mini_gpt2, sae, k=2)
    assert (pieces["token_id"] == whole["token_id"]).all()
    assert pieces["value"].tolist() == pytest.approx(whole["value"].tolist(), rel=1e-6)
    some = logit_effects(mini_gpt2, sae, [9, 3], k=2)
    expected = whole.set_index("latent").loc[[9, 3]]["token_id"]
    assert some["token_id"].tolist() == expected.tolist()
    assert logit_effects(mini_gpt2, sae, []).empty


def test_a_scale_learned_in_training_is_seen(mini_gpt2):
    sae = random_sae(128, "blocks.0.hook_mlp_out", normalize="expected_average_only_in")
    sae.scale_in.fill_(4.0)
    sae.scale_out.fill_(4.0)
    x = torch.randn(9, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latent = int(sae.codes(x).latents[0])
    contributions = [
        each.encode(x)[:, latent, None] * every_effect(mini_gpt2, each, latent) for each in (sae, sae.folded())
    ]
    # a folded SAE has other codes, and the same contributions
    torch.testing.assert_close(*contributions, rtol=1e-4, atol=1e-5)
    plain = random_sae(128, "blocks.0.hook_mlp_out")
    torch.testing.assert_close(every_effect(mini_gpt2, sae, 5), every_effect(mini_gpt2, plain, 5) / 4)


def test_a_transcoder_is_read_where_it_writes(mini_gpt2):
    options = {"target_hook": "blocks.2.hook_mlp_out", "apply_b_dec_to_input": False}
    transcoder = random_sae(128, "blocks.2.ln2.hook_normalized", **options)
    sae = random_sae(128, "blocks.2.hook_mlp_out")
    sae.W_dec.copy_(transcoder.W_dec)
    assert logit_effects(mini_gpt2, transcoder).equals(logit_effects(mini_gpt2, sae))


# ------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("place", ["hook_resid_post", "attn.hook_z", "mlp.hook_post"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_decoder_rows_are_directions(tiny, family, place):
    model = tiny(family, torch.float64)
    hook = f"blocks.0.{place}"
    sae = random_sae(record(model, TOKENS, [hook])[hook][0, 0].numel(), hook)
    found = direction_effects(model, hook, sae.W_dec, k=3)
    assert found.rename(columns={"direction": "latent"}).equals(logit_effects(model, sae, k=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_neurons_are_read_through_their_output_weights(tiny, family):
    """What an SNMF's components write, z W_out, and behind a norm where there is one: the same at two hooks."""
    model = tiny(family, torch.float64)
    W_out = model.blocks[0].mlp.W_out
    groups = torch.randn(5, len(W_out), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups[:, 3:] = 0
    written = groups @ W_out
    if model.cfg.post_norm:  # mlp_out is behind that norm, up to its scale
        norm = model.blocks[0].ln2_post
        written = written - written.mean(1, keepdim=True) if norm.centred else written
        written = written * (1 + norm.w if norm.offset else norm.w)
    neurons, stream = (
        direction_effects(model, f"blocks.0.{hook}", rows, k=4)
        for hook, rows in (("mlp.hook_post", groups), ("hook_mlp_out", written))
    )
    assert neurons["token_id"].tolist() == stream["token_id"].tolist()
    assert neurons["value"].tolist() == pytest.approx(stream["value"].tolist(), rel=1e-9)


def test_a_direction_turned_round_changes_sides_and_one_of_zeros_does_nothing(mini_gpt2):
    hook = "blocks.1.hook_mlp_out"
    z = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    z[1] = 0
    there, back = (
        direction_effects(mini_gpt2, hook, sign * z, k=5).set_index(["direction", "side"]) for sign in (1, -1)
    )
    for side, other in (("top", "bottom"), ("bottom", "top")):
        assert there.loc[(0, side), "token_id"].tolist() == back.loc[(0, other), "token_id"].tolist()
        assert there.loc[(0, side), "value"].tolist() == (-back.loc[(0, other), "value"]).tolist()
        assert there.loc[(1, side), "value"].tolist() == [0] * 5
    assert direction_effects(mini_gpt2, hook, z[:0]).empty


def test_refused_directions(mini_gpt2):
    hook = "blocks.1.mlp.hook_post"
    with refused(SiteError, "the directions have 128 channels, and blocks.1.mlp.hook_post has 512"):
        direction_effects(mini_gpt2, hook, torch.zeros(2, 128))
    with refused(SiteError, "belong to no hook"):
        direction_effects(mini_gpt2, None, torch.zeros(2, 128))
    with refused(SiteError, "reaches the residual stream in no fixed way"):
        direction_effects(mini_gpt2, "blocks.1.mlp.hook_pre", torch.zeros(2, 512))
    with refused(OptionError, "cannot show 836 of 835 tokens"):
        direction_effects(mini_gpt2, hook, torch.zeros(2, 512), k=836)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "hook",
    ["blocks.1.attn.hook_v", "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_pre", "ln_final.hook_normalized"],
)
def test_other_hooks_are_refused(mini_gpt2, hook):
    with refused(SiteError, "reaches the residual stream in no fixed way"):
        logit_effects(mini_gpt2, random_sae(128, hook))


def test_refusals(mini_gpt2):
    sae = random_sae(128, "blocks.1.hook_resid_post")
    with refused(SiteError, "latents 0 to 63, not 64"):
        logit_effects(mini_gpt2, sae, [0, 64])
    with refused(OptionError, "cannot show 0 of 835 tokens"):
        logit_effects(mini_gpt2, sae, k=0)
    with refused(SiteError, "mini-gpt2 has no hook point 'blocks.9.hook_resid_post'"):
        logit_effects(mini_gpt2, random_sae(128, "blocks.9.hook_resid_post"))
    with refused(SiteError, "does not say which hook"):
        logit_effects(mini_gpt2, random_sae(128, None))
    with refused(SiteError, "writes 64 channels, and blocks.1.hook_resid_post has 128"):
        logit_effects(mini_gpt2, random_sae(64, "blocks.1.hook_resid_post"))
    with refused(UnsupportedModel, "load the model with load_model"):
        logit_effects(torch.nn.Linear(2, 2), sae)


def test_effects_on_some_tokens_are_those_of_the_table(tiny):
    model = tiny("gpt2", torch.float32)
    directions = torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    hook, tokens = "blocks.0.hook_resid_post", [5, 2, 40]
    table = direction_effects(model, hook, directions, k=model.cfg.d_vocab)
    wide = table[table["side"] == "top"].pivot(index="direction", columns="token_id", values="value")[tokens]
    torch.testing.assert_close(token_effects(model, hook, directions, tokens), torch.tensor(wide.to_numpy()))
    with pytest.raises(OptionError, match=f"not {model.cfg.d_vocab}"):
        token_effects(model, hook, directions, [model.cfg.d_vocab])
    with pytest.raises(SiteError, match="belong to no hook"):
        token_effects(model, None, directions, tokens)
