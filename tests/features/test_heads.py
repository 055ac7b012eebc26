"""Heads of attention autoencoders.

Held against: loops over heads; pre-activations of the SAE; inputs with all heads but one at b_dec.
"""

import pytest
import torch

from interp.errors import OptionError, SiteError
from interp.features.config import SAEConfig
from interp.features.heads import head_contributions, head_shares
from interp.features.sae import SAE
from tests.small_pairs import refused

HEADS, D_HEAD = 3, 4


def attention_sae(seed: int = 0, **options) -> SAE:
    """An SAE of three heads side by side, all its weights and biases random."""
    options = {"architecture": "topk", "k": 4} | options
    sae = SAE(SAEConfig(d_in=HEADS * D_HEAD, d_sae=16, hook="blocks.0.attn.hook_z", **options))
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return sae


def activations(n: int = 7) -> torch.Tensor:
    return 3 * torch.randn(n, HEADS * D_HEAD, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    pytest.param({}, id="topk"),
    pytest.param({"architecture": "standard"}, id="standard"),
    pytest.param({"architecture": "gated"}, id="gated"),
    pytest.param({"apply_b_dec_to_input": False}, id="raw-input"),
    pytest.param({"normalize": "layer_norm"}, id="layer-norm"),
    pytest.param({"normalize": "constant_norm_rescale"}, id="constant-norm"),
    pytest.param({"d_out": 5, "apply_b_dec_to_input": False}, id="transcoder"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_contributions_sum_to_the_pre_activation(options):
    sae, z = attention_sae(**options), activations()
    bias = sae.b_gate if sae.config.architecture == "gated" else sae.b_enc
    pre = sae.pre_activations(sae.normalize(z)[0])
    for latent in (0, 5, 15):
        found = head_contributions(sae, z, latent, HEADS)
        assert found.shape == (7, HEADS)
        torch.testing.assert_close(found.sum(1) + bias[latent], pre[:, latent])


def test_a_scale_learned_in_training_is_seen():
    sae, z = attention_sae(normalize="expected_average_only_in"), activations()
    sae.scale_in.fill_(0.25)
    pre = sae.pre_activations(sae.normalize(z)[0])[:, 2]
    torch.testing.assert_close(head_contributions(sae, z, 2, HEADS).sum(1) + sae.b_enc[2], pre)


def test_a_contribution_is_what_its_head_does_alone():
    """With all other heads at b_dec, the pre-activation is this head's contribution and the bias."""
    sae, z = attention_sae(), activations()
    found = head_contributions(sae, z, 9, HEADS)
    for head in range(HEADS):
        mine = slice(head * D_HEAD, (head + 1) * D_HEAD)
        alone = sae.b_dec.expand_as(z).clone()
        alone[:, mine] = z[:, mine]
        torch.testing.assert_close(found[:, head] + sae.b_enc[9], sae.pre_activations(alone)[:, 9])


def test_contributions_by_hand():
    sae, z = attention_sae(), activations(2)
    for token in range(2):
        for head in range(HEADS):
            channels = range(head * D_HEAD, (head + 1) * D_HEAD)
            by_hand = sum(float((z[token, c] - sae.b_dec[c]) * sae.W_enc[c, 3]) for c in channels)
            assert float(head_contributions(sae, z, 3, HEADS)[token, head]) == pytest.approx(
                by_hand, rel=1e-5, abs=1e-5
            )


def test_shares_by_hand():
    sae = attention_sae()
    found = head_shares(sae, HEADS)
    for latent in range(16):
        norms = [
            float(sum(w**2 for w in sae.W_dec[latent, h * D_HEAD : (h + 1) * D_HEAD].tolist()) ** 0.5)
            for h in range(HEADS)
        ]
        assert found[latent].tolist() == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)


def test_shares_sum_to_one_and_do_not_know_scale():
    sae = attention_sae()
    shares = head_shares(sae, HEADS)
    torch.testing.assert_close(shares.sum(1), torch.ones(16))
    sae.W_dec.mul_(torch.linspace(0.1, 9, 16)[:, None])
    torch.testing.assert_close(head_shares(sae, HEADS), shares)
    assert torch.equal(head_shares(sae, 1), torch.ones(16, 1))


def test_a_latent_of_one_head_is_all_its_own():
    sae = attention_sae()
    sae.W_dec[4], sae.W_dec[5] = 0.0, 0.0
    sae.W_dec[4, D_HEAD] = -2.0  # in the second head
    shares = head_shares(sae, HEADS)
    assert shares[4].tolist() == [0.0, 1.0, 0.0]
    assert shares[5].tolist() == [0.0, 0.0, 0.0]


def test_refusals():
    sae, z = attention_sae(), activations()
    with refused(OptionError, "12 channels, which are not 5 heads"):
        head_shares(sae, 5)
    with refused(OptionError, "12 channels, which are not 0 heads"):
        head_contributions(sae, z, 0, 0)
    with refused(SiteError, "latents 0 to 15, not 16"):
        head_contributions(sae, z, 16, HEADS)
    with refused(OptionError, "reads 12 channels, and the activations have 11"):
        head_contributions(sae, z[:, 1:], 0, HEADS)
    with refused(OptionError, "a product, not a sum over heads"):
        head_contributions(attention_sae(kron=(2, 2, 4)), z, 0, HEADS)
