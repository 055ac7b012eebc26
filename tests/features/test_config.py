"""What a sparse autoencoder may be asked to be: every refusal names its offender, and what is left out has a default."""

import dataclasses

import pytest

from interp.errors import OptionError
from interp.features.config import ARCHITECTURES, SPARSE, WITH_K, SAEConfig
from tests.small_pairs import refused

TRANSCODER = {"d_out": 5, "apply_b_dec_to_input": False}
REFUSALS = {
    "unknown architecture": (
        {"architecture": "topq"}, r"'topq' is not a kind of sparse autoencoder .*batchtopk.*did you mean 'topk'\?"),
    "unknown normalisation": (
        {"normalize": "layernorm"}, r"'layernorm' is not a way to normalise .*did you mean 'layer_norm'\?"),
    "unknown mode": ({"architecture": "top-afa", "afa": "exact"}, "'exact' is not a mode of top-AFA .*faithful, corrected"),
    "d_in": ({"d_in": 0}, "d_in must be at least 1, not 0"),
    "d_sae": ({"d_sae": -1}, "d_sae must be at least 1, not -1"),
    "d_out": ({**TRANSCODER, "d_out": 0}, "d_out must be at least 1, not 0"),
    "k": ({"k": 0}, "^k must be at least 1, not 0"),
    "k_max": ({"k_max": 0}, "k_max must be at least 1, not 0"),
    "k_aux": ({"k_aux": 0}, "k_aux must be at least 1, not 0"),
    "more k than latents": ({"k": 25}, "k = 25 latents per token, and d_sae has only 24"),
    "widths fall": ({"widths": (6, 3, 24)}, r"widths must rise .* d_sae = 24, not \(6, 3, 24\)"),
    "widths repeat": ({"widths": (6, 6, 24)}, r"not \(6, 6, 24\)"),
    "widths end early": ({"widths": (6, 12)}, r"d_sae = 24, not \(6, 12\)"),
    "widths from nothing": ({"widths": (0, 24)}, r"from at least 1 .*not \(0, 24\)"),
    "kron product": ({"kron": (2, 3, 5)}, r"kron = \(2, 3, 5\) makes 30 latents, and d_sae is 24"),
    "kron and a threshold": ({"kron": (2, 3, 4), "architecture": "jumprelu"}, "selects by size .*top-afa.*, not jumprelu"),
    "transcoder subtracts b_dec": ({"d_out": 5}, "set apply_b_dec_to_input=False"),
    "another target subtracts b_dec": ({"target_hook": "blocks.0.hook_mlp_out"}, "set apply_b_dec_to_input=False"),
    "transcoder with layer_norm": ({**TRANSCODER, "normalize": "layer_norm"}, "normalize='layer_norm' is undone on the output"),
    "transcoder with a constant norm": (
        {**TRANSCODER, "normalize": "constant_norm_rescale"}, "normalize='constant_norm_rescale' is undone"),
    "transcoder with top-afa": ({**TRANSCODER, "architecture": "top-afa"}, "top-afa makes the code as long as"),
    "skip around itself": ({"skip": True}, "skip is for transcoders"),
    "k_max in the published mode": ({"architecture": "top-afa", "afa": "faithful", "k_max": 4}, "k_max .*afa='corrected'"),
    "sparsity": ({"sparsity": -0.5}, "sparsity must not be negative, as -0.5 is"),
    "afa_weight": ({"afa_weight": -1.0}, "afa_weight must not be negative, as -1.0 is"),
    "aux_weight": ({"aux_weight": -1.0}, "aux_weight must not be negative, as -1.0 is"),
    "dead_after": ({"dead_after": -3}, "dead_after must not be negative, as -3 is"),
    "bandwidth": ({"bandwidth": 0.0}, "bandwidth must be positive, not 0.0"),
    "target_l0": ({"target_l0": 0.0}, "target_l0 must be positive, not 0.0"),
}  # fmt: skip


def config(**options) -> SAEConfig:
    return SAEConfig(**{"d_in": 8, "d_sae": 24, "k": 3, **options})


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_named(case):
    options, says = REFUSALS[case]
    with refused(OptionError, says):
        config(**options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_k_is_needed_where_k_latents_are_chosen(architecture):
    if architecture in WITH_K:
        with refused(OptionError, f"^{architecture} needs k, the number of latents per token$"):
            config(architecture=architecture, k=None)
    else:
        assert config(architecture=architecture, k=None).k is None


def test_names():
    assert WITH_K < SPARSE < set(ARCHITECTURES)
    assert {name for name in SPARSE if name not in WITH_K} == {"top-afa"}


@pytest.mark.parametrize(
    "options",
    [{"k": 24}, {"widths": (24,)}, {"widths": (1, 24)}, {"kron": (2, 3, 4)}, {"kron": (1, 1, 24)}],
    ids=["every latent", "one width", "a width of one", "kron", "kron of one"],
)
def test_the_outermost_that_is_allowed(options):
    config(**options)


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().k = 5


def test_a_transcoder_has_a_target_or_another_width():
    assert not config().transcoder
    assert config().out == 8
    elsewhere = config(target_hook="blocks.0.hook_mlp_out", apply_b_dec_to_input=False, skip=True)
    assert elsewhere.transcoder
    assert elsewhere.out == 8
    wider = config(**TRANSCODER)
    assert wider.transcoder
    assert wider.out == 5


def test_the_published_top_afa_is_asked_for():
    assert config(architecture="top-afa", afa="faithful").faithful
    assert not config(architecture="top-afa").faithful
    assert not config(afa="faithful").faithful, "of another architecture afa says nothing"


@pytest.mark.parametrize(
    ("d_sae", "levels"), [(1, (1,)), (3, (1, 3)), (24, (1, 3, 6, 12, 24)), (100, (6, 12, 25, 50, 100))]
)
def test_nested_widths_double_and_never_repeat(d_sae, levels):
    assert config(architecture="matryoshka", d_sae=d_sae, k=1).levels == levels
    assert config(d_sae=d_sae, k=1).levels == (d_sae,), "of any other architecture all at once"


def test_nested_widths_as_given():
    assert config(architecture="matryoshka", widths=(5, 24)).levels == (5, 24)


@pytest.mark.parametrize(
    ("options", "n"),
    [({}, 4), ({"d_in": 1}, 1), ({"k_aux": 7}, 7), ({"k_aux": 500}, 24), ({"d_in": 900}, 24)],
    ids=["half of d_in", "at least one", "as given", "not more than there are", "a narrow dictionary"],
)
def test_how_many_dead_latents_speak(options, n):
    assert config(**options).n_aux == n
