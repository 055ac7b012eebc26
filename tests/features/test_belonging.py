"""An SAE that belongs elsewhere is told apart: against what a reader would compute with the model's own cache."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from interp.errors import LoadError, SiteError
from interp.features import belonging
from interp.features.belonging import check_belongs, load_sae
from interp.features.config import SAEConfig
from interp.features.sae import SAE

HOOK, NEURONS, Z = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def tokens(mini_gpt2) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(1, mini_gpt2.cfg.d_vocab, (19, 11), generator=g)  # 19: not a multiple of a batch


@pytest.fixture(scope="module")
def inputs(mini_gpt2, tokens) -> torch.Tensor:
    """Activations at HOOK, without the first position."""
    _, cache = mini_gpt2.run_with_cache(tokens)
    return cache[HOOK][:, 1:].flatten(0, 1)


def perfect(d: int, **config) -> SAE:
    """relu(x) - relu(-x) = x."""
    sae = SAE(SAEConfig(architecture="standard", d_in=d, d_sae=2 * d, **config))
    sae.encoder.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    sae.W_dec.copy_(sae.encoder)
    return sae


def said(sae: SAE, model, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert check_belongs(sae, model, *args) is None
    return [str(entry.message) for entry in caught]


def fvu_of(sae: SAE, x: torch.Tensor) -> float:
    x, xhat = x.double(), sae(x).double()
    return float((x - xhat).square().sum() / (x - x.mean(0)).square().sum())


def test_an_sae_that_belongs_says_nothing(mini_gpt2, tokens, inputs):
    sae = perfect(mini_gpt2.cfg.d_model, hook=HOOK)
    sae.metadata.update(model_name="mini-gpt2", activation_mean_norm=float(inputs.norm(dim=1).mean()))
    assert said(sae, mini_gpt2) == []
    assert said(sae, mini_gpt2, tokens) == []


def test_a_warning_points_at_the_caller(mini_gpt2):
    if hasattr(check_belongs, "__wrapped__"):
        pytest.skip("the type checker calls it")
    sae = perfect(mini_gpt2.cfg.d_model, hook=HOOK)
    sae.metadata["model_name"] = "another"
    with pytest.warns(UserWarning, match="trained on another") as caught:
        check_belongs(sae, mini_gpt2)
    assert caught[0].filename == __file__


def test_what_is_not_known_is_not_held_against_it(mini_gpt2, tokens):
    assert said(perfect(mini_gpt2.cfg.d_model, hook=HOOK), mini_gpt2, tokens) == []


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (
            "blocks.9.hook_resid_post",
            r"^this SAE reads blocks\.9\.hook_resid_post, and mini-gpt2 has no such hook point$",
        ),
        (NEURONS, r"^this SAE reads 128 channels at blocks\.1\.mlp\.hook_post, and mini-gpt2 has \d+ there$"),
        (None, "^this SAE does not say which hook point it reads"),
    ],
    ids=["absent", "width", "none"],
)
def test_a_hook_that_does_not_fit_is_an_error(hook, says, mini_gpt2):
    with pytest.raises(SiteError, match=says):
        check_belongs(perfect(128, hook=hook), mini_gpt2)


def test_a_transcoder_is_checked_where_it_writes(mini_gpt2, tokens):
    d = mini_gpt2.cfg.d_model
    fits = {"hook": HOOK, "apply_b_dec_to_input": False}
    with pytest.raises(SiteError, match=r"^this SAE writes nowhere, and mini-gpt2 has no such hook point$"):
        check_belongs(perfect(d, target_hook="nowhere", **fits), mini_gpt2)
    with pytest.raises(SiteError, match=rf"^this SAE writes {d} channels at {re.escape(NEURONS)}, and mini-gpt2 has"):
        check_belongs(perfect(d, target_hook=NEURONS, **fits), mini_gpt2)
    copies = perfect(d, target_hook=HOOK, **fits)  # predicts a layer's output from itself
    assert said(copies, mini_gpt2, tokens) == []
    (message,) = said(perfect(d, target_hook="blocks.1.hook_mlp_out", **fits), mini_gpt2, tokens)
    assert message.startswith("this SAE leaves out more than a constant would")
    assert said(perfect(d, d_out=d, **fits), mini_gpt2, tokens) == []  # it does not say what it predicts


def test_heads_lie_side_by_side_or_one_is_meant(mini_gpt2, tokens):
    cfg = mini_gpt2.cfg
    assert said(perfect(cfg.n_heads * cfg.d_head, hook=Z), mini_gpt2, tokens) == []
    one = perfect(cfg.d_head, hook=Z)
    with pytest.raises(
        SiteError, match=f"reads {cfg.d_head} channels at {Z}, and mini-gpt2 has {cfg.n_heads * cfg.d_head}"
    ):
        check_belongs(one, mini_gpt2)
    one.metadata["hook_head_index"] = 1
    assert said(one, mini_gpt2, tokens) == []


@pytest.mark.parametrize(
    ("trained_on", "model", "warned"),
    [
        ("mini-gpt2", "mini-gpt2", False),
        ("mini-llama", "mini-gpt2", True),
        ("someone/Mini-GPT2", "mini-gpt2", False),
        ("gpt2-small", "gpt2", False),
        ("gpt2-small", "openai-community/gpt2", False),
        ("gpt2-medium", "gpt2", True),
    ],
)
def test_another_models_name_is_warned_about(trained_on, model, warned, mini_gpt2, monkeypatch):
    sae = perfect(mini_gpt2.cfg.d_model, hook=HOOK)
    sae.metadata["model_name"] = trained_on
    monkeypatch.setattr(belonging, "config_of", lambda _: SimpleNamespace(name=model))
    expected = [f"this SAE at {HOOK} was trained on {trained_on}, and the model is {model}"]
    assert said(sae, mini_gpt2) == (expected if warned else [])


@pytest.mark.parametrize(("factor", "warned"), [(0.4, True), (0.6, False), (1.9, False), (2.1, True)])
def test_activations_of_another_size_are_warned_about(factor, warned, mini_gpt2, tokens, inputs):
    sae = perfect(mini_gpt2.cfg.d_model, hook=HOOK)
    norm = float(inputs.double().norm(dim=1).mean())
    sae.metadata["activation_mean_norm"] = norm / factor
    messages = said(sae, mini_gpt2, tokens)
    assert len(messages) == warned
    if warned:
        assert (
            f"have a mean norm of {norm:.3g}, and those that this SAE was trained on had {norm / factor:.3g}"
            in messages[0]
        )
    assert said(sae, mini_gpt2) == []


@pytest.mark.parametrize("gain", [0.5, 1.9, 2.5])
def test_more_left_out_than_by_a_constant_is_warned_about(gain, mini_gpt2, tokens, inputs):
    sae = perfect(mini_gpt2.cfg.d_model, hook=HOOK)
    sae.W_dec *= gain  # e = (1 - gain) x
    fvu = fvu_of(sae, inputs)
    assert fvu == pytest.approx((1 - gain) ** 2 * fvu_of(perfect_zero(inputs.shape[1]), inputs), rel=1e-5)
    messages = said(sae, mini_gpt2, tokens)
    assert len(messages) == (fvu > 1)
    if messages:
        assert messages[0].endswith(f"at {HOOK} of mini-gpt2 (FVU {fvu:.3g}): it belongs elsewhere")


def perfect_zero(d: int) -> SAE:
    """Reconstructs 0 of everything."""
    sae = perfect(d)
    sae.W_dec.zero_()
    return sae


def test_first_positions_do_not_count(mini_gpt2, tokens):
    sae = SAE(SAEConfig(architecture="standard", d_in=mini_gpt2.cfg.d_model, d_sae=4, hook=HOOK))
    sae.W_dec.zero_()
    sae.b_dec.fill_(50.0)
    assert len(said(sae, mini_gpt2, tokens)) == 1
    assert said(sae, mini_gpt2, tokens[:, :1]) == []  # nothing is left to judge by


def test_loading_checks(mini_gpt2, mini_llama, tmp_path):
    sae = load_sae(
        "mini-gpt2/resid_post2", mini_gpt2, tokens=mini_gpt2.to_tokens(["Mary and John went to the park."] * 2)
    )
    assert sae.config.hook == "blocks.2.hook_resid_post"
    with pytest.warns(UserWarning, match="was trained on mini-gpt2, and the model is mini-llama"):
        load_sae("mini-gpt2/resid_post2", mini_llama)
    with pytest.raises(LoadError, match="there is no folder"):
        load_sae(tmp_path / "none", mini_gpt2)
