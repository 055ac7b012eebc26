"""SAELens' file format: what is written is what the format's description says, and comes back bit for bit.

Against SAELens itself, in an environment of its own: test_saelens_peer.py.
"""

import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from interp.errors import LoadError, OptionError
from interp.features import saelens_format as module
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.saelens_format import read_folder, saelens_name, write_folder
from tests.small_pairs import refused

D, H, OUT = 6, 16, 5
FOUR = {"W_enc": [D, H], "W_dec": [H, D], "b_enc": [H], "b_dec": [D]}
GATED = {"W_enc": [D, H], "W_dec": [H, D], "b_dec": [D], "b_gate": [H], "b_mag": [H], "r_mag": [H]}
ACROSS = {"W_enc": [D, H], "W_dec": [H, OUT], "b_enc": [H], "b_dec": [OUT]}
THETA, SKIP = {"threshold": [H]}, {"W_skip": [OUT, D]}

_AE = {"d_in": D, "d_sae": H, "hook": "blocks.1.hook_resid_post"}
_TC = {**_AE, "d_out": OUT, "target_hook": "blocks.1.hook_mlp_out", "apply_b_dec_to_input": False}

# name -> (config, the architecture and the tensors that the format's description says)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, list[int]]]] = {
    "standard": ({"architecture": "standard", **_AE}, "standard", FOUR),
    "standard-free": ({"architecture": "standard", "unit_decoder": False, **_AE}, "standard", FOUR),
    "gated": ({"architecture": "gated", "unit_decoder": False, **_AE}, "gated", GATED),
    "topk": ({"architecture": "topk", "k": 3, **_AE}, "topk", FOUR),
    "topk-free": ({"architecture": "topk", "k": 3, "unit_decoder": False, **_AE}, "topk", FOUR),
    "topk-uncentred": ({"architecture": "topk", "k": 3, "apply_b_dec_to_input": False, **_AE}, "topk", FOUR),
    "topk-layer-norm": ({"architecture": "topk", "k": 3, "normalize": "layer_norm", **_AE}, "topk", FOUR),
    "abstopk": ({"architecture": "abstopk", "k": 3, "normalize": "constant_norm_rescale", **_AE}, "abstopk", FOUR),
    "jumprelu": ({"architecture": "jumprelu", "unit_decoder": False, **_AE}, "jumprelu", FOUR | THETA),
    "batchtopk": ({"architecture": "batchtopk", "k": 3, "unit_decoder": False, **_AE}, "jumprelu", FOUR | THETA),
    "matryoshka": ({"architecture": "matryoshka", "k": 3, "widths": (4, 9, H), **_AE}, "jumprelu", FOUR | THETA),
    "transcoder": ({"architecture": "standard", **_TC}, "transcoder", ACROSS),
    "skip": ({"architecture": "standard", "skip": True, **_TC}, "skip_transcoder", ACROSS | SKIP),
    "jumprelu-transcoder": ({"architecture": "jumprelu", **_TC}, "jumprelu_transcoder", ACROSS | THETA),
    "jumprelu-skip": ({"architecture": "jumprelu", "skip": True, **_TC}, "jumprelu_skip_transcoder", ACROSS | THETA | SKIP),
    "batchtopk-skip": ({"architecture": "batchtopk", "k": 3, "skip": True, **_TC}, "jumprelu_skip_transcoder",
                       ACROSS | THETA | SKIP),
    "topk-transcoder": ({"architecture": "topk", "k": 3, **_TC}, "topk_transcoder", ACROSS),
    "topk-skip": ({"architecture": "topk", "k": 3, "skip": True, **_TC}, "topk_skip_transcoder", ACROSS | SKIP),
    "top-afa": ({"architecture": "top-afa", "k_max": 7, "tied": True, **_AE}, "top_afa", FOUR),
    "top-afa-faithful": ({"architecture": "top-afa", "afa": "faithful", "normalize": "layer_norm", **_AE}, "top_afa", FOUR),
    "kron": ({"architecture": "topk", "k": 3, "kron": (2, 2, 4), "unit_decoder": False, **_AE}, "kron_topk",
             FOUR | {"W_enc": [D, 12], "b_enc": [12]}),
    "kron-batchtopk": ({"architecture": "batchtopk", "k": 3, "kron": (2, 2, 4), **_AE}, "kron_batchtopk",
                       FOUR | {"W_enc": [D, 12], "b_enc": [12]}),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES)
ALWAYS = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "metadata", "interp",
}  # fmt: skip
FACTS = {
    "model_name": "mini-gpt2",
    "model_revision": "0a1b",
    "activation_mean_norm": 3.25,
    "fvu": 0.1,
    "context_size": 64,
}


def random_sae(values: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32, **facts) -> SAE:
    """An SAE with nothing in it that is 0 or 1 by convention."""
    config = SAEConfig(**values)
    sae = SAE(config, seed=seed, dtype=dtype, metadata=facts)
    g = torch.Generator().manual_seed(seed + 1)
    for name, value in sae.state_dict().items():
        if name == "threshold":
            value.copy_(0.5 * torch.rand(value.shape, generator=g))
        elif value.ndim and name != "W_dec":
            value.copy_(0.4 * torch.randn(value.shape, generator=g))
    sae.W_dec *= 1 if config.unit_decoder else torch.rand(config.d_sae, 1, generator=g) + 0.5
    sae.batch_threshold.fill_(0.1 + 1 / 3 * float(torch.rand((), generator=g)))
    return sae


def written(sae: SAE, folder: Path) -> Path:
    """The folder without what only interp reads: what SAELens sees."""
    sae.save(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["interp"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def edited(folder: Path, **changes) -> Path:
    """cfg.json with fields changed, or without those that are `...`."""
    path = folder / "cfg.json"
    cfg = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in cfg.items() if value is not ...}))
    return folder


def retensored(folder: Path, **changes) -> Path:
    path = folder / "sae_weights.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    return folder


def inputs(n: int = 40) -> torch.Tensor:
    return 2 * torch.randn(n, D, generator=torch.Generator().manual_seed(5))


def same(a: SAE, b: SAE) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
        assert value.dtype == b.state_dict()[name].dtype


# ----------------------------------------------------------------------------------------------------------- round trips


@EACH
def test_what_is_saved_comes_back_bit_for_bit(case, tmp_path):
    sae = random_sae(CASES[case][0], **FACTS)
    again = SAE.load(sae.save(tmp_path / "sae"))
    same(again, sae.folded())
    x = inputs()
    assert torch.equal(again.encode(x), sae.folded().encode(x))
    assert torch.equal(again(x), sae.folded()(x))
    assert FACTS.items() <= again.metadata.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["jumprelu", "batchtopk", "gated", "skip"])
def test_dtypes_come_back(case, dtype, tmp_path):
    sae = random_sae(CASES[case][0], dtype=dtype)
    same(SAE.load(sae.save(tmp_path / "sae")), sae.folded())
    said = json.loads((tmp_path / "sae" / "cfg.json").read_text())["dtype"]
    assert getattr(torch, said) == dtype
    other = SAE.load(written(sae, tmp_path / "seen"))
    assert other.dtype == dtype
    if case in ("jumprelu", "batchtopk"):
        assert other.threshold.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@EACH
def test_saving_what_was_read_writes_the_same_bytes(case, tmp_path):
    random_sae(CASES[case][0], **FACTS).save(tmp_path / "a")
    SAE.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_input_scale_is_in_the_weights(tmp_path):
    values = {**CASES["batchtopk"][0], "normalize": "expected_average_only_in"}
    sae = random_sae(values)
    sae.scale_in.fill_(0.7)
    sae.scale_out.fill_(0.7)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config.normalize == "none"
    torch.testing.assert_close(again(inputs()), sae(inputs()))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.floats(allow_nan=False, allow_infinity=False))
def test_float64_numbers_survive_json(seed, threshold, tmp_path_factory):
    sae = random_sae(CASES["batchtopk"][0], seed=seed)
    sae.batch_threshold.fill_(threshold)
    folder = tmp_path_factory.mktemp("sae") / "sae"
    same(SAE.load(sae.save(folder)), sae.folded())


# ------------------------------------------------------------------------------------------------------------- the files


@EACH
def test_keys_and_tensors_are_those_of_the_format(case, tmp_path):
    values, name, shapes = CASES[case]
    sae = random_sae(values, **FACTS)
    folder = sae.save(tmp_path / "sae")
    cfg, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    own = {"k", "rescale_acts_by_decoder_norm"} if values["architecture"] in ("topk", "abstopk") else set()
    own |= {"d_out"} if "d_out" in values else set()
    assert cfg.keys() == ALWAYS | own
    assert cfg["architecture"] == name == saelens_name(sae.config)
    assert {key: list(value.shape) for key, value in tensors.items()} == shapes
    assert all(value.dtype == torch.float32 for value in tensors.values())
    torch.testing.assert_close(tensors["W_enc"], sae.folded().encoder.T, rtol=0, atol=0)
    assert cfg["interp"]["config"] == json.loads(json.dumps(asdict(sae.folded().config)))
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"], cfg["device"]) == (D, H, "float32", "cpu")
    assert cfg["metadata"]["hook_name"] == _AE["hook"]
    assert FACTS.items() <= cfg["metadata"].items()


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka", "batchtopk-skip"])
def test_a_batch_threshold_is_one_for_every_latent(case, tmp_path):
    folder = random_sae(CASES[case][0]).save(tmp_path / "sae")
    theta = load_file(folder / "sae_weights.safetensors")["threshold"]
    assert torch.equal(theta, torch.full((H,), float(SAE.load(folder).batch_threshold)))
    facts = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert facts["training_architecture"] == {"matryoshka": "matryoshka_batchtopk"}.get(case, "batchtopk")
    assert facts["training_architecture_details"]["k"] == 3
    if case == "matryoshka":
        assert facts["training_architecture_details"]["matryoshka_widths"] == [4, 9, H]


def test_heads_are_said_to_lie_side_by_side(tmp_path):
    values = {**CASES["topk"][0], "hook": "blocks.1.attn.hook_z"}
    folder = random_sae(values).save(tmp_path / "sae")
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    again = SAE.load(folder)
    assert again.metadata["reshape_activations"] == "hook_z"
    again.save(tmp_path / "again")
    cfg = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z"
    assert "reshape_activations" not in cfg["metadata"]


def test_files_are_as_readable_as_any_other(tmp_path):
    folder = random_sae(CASES["topk"][0]).save(tmp_path / "sae")
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    for ours, plain in (
        (folder, "folder"),
        (folder / "cfg.json", "plain"),
        (folder / "sae_weights.safetensors", "plain"),
    ):
        assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE((tmp_path / plain).stat().st_mode)


def test_only_our_files_are_replaced_and_nothing_is_left_behind(tmp_path):
    folder = random_sae(CASES["topk"][0]).save(tmp_path / "sae")
    (folder / "notes.txt").write_text("mine")
    other = random_sae(CASES["gated"][0], seed=3)
    other.save(folder)
    same(SAE.load(folder), other.folded())
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "notes.txt", "sae_weights.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_save_that_fails_changes_nothing(there, tmp_path, monkeypatch):
    folder, sae = tmp_path / "sae", random_sae(CASES["topk"][0])
    if there:
        sae.save(folder)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            random_sae(CASES["gated"][0]).save(folder)
    assert [path.name for path in tmp_path.iterdir()] == (["sae"] if there else [])
    if there:
        same(SAE.load(folder), sae.folded())


def test_half_of_one_save_is_not_read_with_half_of_another(tmp_path, monkeypatch):
    folder = random_sae(CASES["batchtopk"][0]).save(tmp_path / "sae")
    replaced = []

    def interrupted(source, target, replace=os.replace):
        if target.parent == folder:
            if replaced:
                raise KeyboardInterrupt
            replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", lambda a, b: interrupted(Path(a), Path(b)))
        with pytest.raises(KeyboardInterrupt):
            random_sae(CASES["batchtopk"][0], seed=1).save(folder)
    with pytest.raises(LoadError, match=r"sae_weights\.safetensors is not the file that cfg\.json was written with"):
        SAE.load(folder)


def test_places_and_weights_that_cannot_be_saved(tmp_path):
    sae = random_sae(CASES["topk"][0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="file is a file, and a sparse autoencoder is saved as a folder"):
        sae.save(tmp_path / "file")
    with pytest.raises(OptionError, match=r"folder .*nowhere does not exist"):
        sae.save(tmp_path / "nowhere" / "sae")
    with pytest.raises(OptionError, match=r"metadata\['mean'\] is a Tensor, which JSON cannot hold"):
        random_sae(CASES["topk"][0], mean=torch.zeros(2)).save(tmp_path / "sae")
    free = random_sae(CASES["topk-free"][0])
    with pytest.raises(OptionError, match="only folded weights can be saved"):
        write_folder(tmp_path / "sae", free.config, free.state_dict(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -------------------------------------------------------------------------------- folders that only SAELens' keys describe


@pytest.mark.parametrize("case", [name for name, (_, kind, _) in CASES.items() if kind in module._KNOWN])
def test_saelens_keys_alone_give_the_same_function(case, tmp_path):
    sae = random_sae(CASES[case][0], **FACTS)
    other = SAE.load(written(sae, tmp_path / "sae"))
    x = inputs()
    assert other.config.hook == _AE["hook"]
    assert other.config.target_hook == CASES[case][0].get("target_hook")
    assert other.metadata["model_name"] == "mini-gpt2"
    batch = other.config.architecture == "jumprelu" != sae.config.architecture
    assert batch == (sae.config.architecture in ("batchtopk", "matryoshka"))
    torch.testing.assert_close(other.encode(x), sae.folded().encode(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x), sae(x))


@pytest.mark.parametrize("case", [name for name, (_, kind, _) in CASES.items() if kind not in module._KNOWN])
def test_what_saelens_lacks_is_nothing_without_our_own_part(case, tmp_path):
    with pytest.raises(LoadError, match=f"architecture '{CASES[case][1]}', which interp does not read"):
        read_folder(written(random_sae(CASES[case][0]), tmp_path / "sae"))


def free_topk(tmp_path: Path, name: str, **changes) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with decoder rows of many norms, and its tensors."""
    folder = edited(written(random_sae(CASES["topk"][0]), tmp_path / name), **changes)
    norms = torch.linspace(0.3, 3, H)[:, None]
    retensored(folder, W_dec=load_file(folder / "sae_weights.safetensors")["W_dec"] * norms)
    return folder, load_file(folder / "sae_weights.safetensors")


@pytest.mark.parametrize("rescale", [False, True, ...], ids=["no", "yes", "not-said"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_ranking_by_norms_is_as_saelens_does_it(architecture, rescale, tmp_path):
    folder, w = free_topk(tmp_path, "sae", architecture=architecture, rescale_acts_by_decoder_norm=rescale)
    x = inputs()
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    n = w["W_dec"].norm(dim=1) if rescale is True else torch.ones(H)
    ranked = z * n if architecture == "topk" else (z * n).abs()
    f = torch.zeros_like(z).scatter(1, ranked.topk(3).indices, 1.0) * z * n
    f = f.relu() if architecture == "topk" else f
    sae = SAE.load(folder)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), (f / n) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescale", [False, True], ids=["no", "yes"])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_save_has_one_threshold(architecture, rescale, tmp_path):
    folder, w = free_topk(
        tmp_path,
        "sae",
        architecture=architecture,
        rescale_acts_by_decoder_norm=rescale,
        k=2.6,
        matryoshka_widths=[3, 8],
    )
    theta = torch.tensor(0.61, dtype=torch.float64)
    retensored(folder, topk_threshold=theta)
    x = inputs()
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    n = w["W_dec"].norm(dim=1) if rescale else torch.ones(H)
    f = z * n * (z * n > theta)
    sae = SAE.load(folder)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), (f / n) @ w["W_dec"] + w["b_dec"])
    if rescale:
        assert (sae.config.k, float(sae.batch_threshold)) == (3, 0.61)
        assert sae.config.levels == ((H,) if architecture == "batchtopk" else (3, 8, H))
    else:
        assert sae.config.architecture == "jumprelu"


@pytest.mark.parametrize("rescale", [False, True], ids=["no", "yes"])
def test_a_scale_beside_the_weights_is_folded_in(rescale, tmp_path):
    changes = {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": rescale}
    plain, _ = free_topk(tmp_path, "plain", **changes)
    scaled, _ = free_topk(tmp_path, "scaled", **changes, normalize_activations="expected_average_only_in")
    for folder in (plain, scaled):
        retensored(folder, topk_threshold=torch.tensor(0.61, dtype=torch.float64))
    x, s = inputs(), 1.7
    with pytest.warns(
        UserWarning, match=r"cfg\.json was trained on inputs of mean norm sqrt\(d_in\).* it is taken as 1"
    ):
        assert torch.equal(SAE.load(scaled)(x), SAE.load(plain)(x))
    (scaled / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s, "has_whitening": False}))
    torch.testing.assert_close(SAE.load(scaled)(x), SAE.load(plain)(s * x) / s)


def test_old_names_are_read(tmp_path):
    sae = random_sae(CASES["jumprelu"][0])
    folder = written(sae, tmp_path / "sae")
    theta = load_file(folder / "sae_weights.safetensors")["threshold"]
    retensored(folder, threshold=None, log_threshold=theta.log(), scaling_factor=torch.ones(H))
    torch.testing.assert_close(SAE.load(folder).threshold, theta)
    retensored(folder, scaling_factor=torch.full((H,), 2.0))
    with pytest.raises(LoadError, match=r"scaling_factor in .*safetensors is not 1"):
        SAE.load(folder)


def old_config(tmp_path: Path, **changes) -> Path:
    """A cfg.json as SAELens had it before 6."""
    folder = written(random_sae(CASES["topk"][0]), tmp_path / "sae")
    old = {
        "hook_point": "blocks.1.attn.hook_z", "hook_point_layer": 1, "model_name": "gpt2-small", "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3}, "d_in": D, "d_sae": H, "dtype": "torch.float32", "device": "mps", "l1_coefficient": 2,
        "normalize_activations": False, **changes,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in old.items() if value is not ...}))
    return folder


def test_an_old_configuration_is_read(tmp_path):
    sae = SAE.load(old_config(tmp_path))
    assert sae.config == replace(random_sae(CASES["topk"][0]).config, hook="blocks.1.attn.hook_z")
    assert torch.equal(sae.encode(inputs()), random_sae(CASES["topk"][0]).encode(inputs()))
    facts = {"hook_name": "blocks.1.attn.hook_z", "model_name": "gpt2-small", "reshape_activations": "hook_z"}
    assert sae.metadata == facts
    assert facts.items() <= SAE.load(sae.save(tmp_path / "again")).metadata.items()


def test_an_old_configuration_without_an_architecture_is_standard(tmp_path):
    sae = SAE.load(old_config(tmp_path, activation_fn_str="relu", activation_fn_kwargs=..., normalize_activations=...))
    assert (sae.config.architecture, sae.config.normalize, sae.config.apply_b_dec_to_input) == (
        "standard",
        "none",
        True,
    )


# --------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("case", "field"),
    [(case, field) for case in ("topk", "transcoder") for field in (
        "architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations")]
    + [("topk", "k"), ("transcoder", "d_out")],
)  # fmt: skip
def test_a_missing_field_is_named_with_its_file(case, field, tmp_path):
    folder = edited(written(random_sae(CASES[case][0]), tmp_path / "sae"), **{field: ...})
    with pytest.raises(LoadError, match=rf"^\S*sae/cfg\.json lacks the field {field}$"):
        read_folder(folder)


@pytest.mark.parametrize("field", ["architecture", "k", "widths", "dead_after"])
def test_a_missing_field_of_ours_is_named(field, tmp_path):
    folder = random_sae(CASES["matryoshka"][0]).save(tmp_path / "sae")
    resigned(folder, drop=field)
    with pytest.raises(LoadError, match=rf"lacks the field interp\.config\.{field}$"):
        SAE.load(folder)


def resigned(folder: Path, drop: str | None = None, **changes) -> None:
    """Our part of cfg.json changed, with a digest that says so."""
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["interp"]["config"] |= changes
    cfg["interp"]["config"].pop(drop, None)
    edited(folder, interp=cfg["interp"])
    save_file(
        load_file(folder / "sae_weights.safetensors"), folder / "sae_weights.safetensors",
        metadata={"interp": module._digest(cfg["interp"])},
    )  # fmt: skip


def test_fields_that_cannot_be_are_named(tmp_path):
    folder = random_sae(CASES["topk"][0]).save(tmp_path / "sae")
    resigned(folder, colour="red")
    with pytest.raises(LoadError, match=r"a field that this interp does not know: interp\.config\.colour"):
        SAE.load(folder)
    resigned(folder, drop="colour", k=H + 1)
    with refused(LoadError, f"describes no sparse autoencoder of interp: k = {H + 1} latents"):
        SAE.load(folder)
    resigned(folder, k="many")
    with refused(LoadError, "describes no sparse autoencoder of interp"):
        SAE.load(folder)


WRONG = {
    "a string for a size": ({"d_in": "6"}, "d_in in .*cfg.json must be int, not '6'"),
    "a truth value for a size": ({"k": True}, "k in .*cfg.json must be int, not True"),
    "a fraction for k": ({"k": 2.5}, "k in .*cfg.json must be int, not 2.5"),
    "metadata that is a list": ({"metadata": []}, "metadata in .*cfg.json must be dict"),
    "a whitened input": ({"normalize_activations": "covariance_whitening"}, "covariance_whitening, which interp does not"),
    "an unknown normalisation": ({"normalize_activations": "softmax"}, "cfg.json describes .*'softmax' is not a way"),
    "an unknown dtype": ({"dtype": "float8"}, "'float8' is not a dtype of .*cfg.json"),
    "an attention-based code": ({"architecture": "temporal"}, "architecture 'temporal', which interp does not read"),
    "a code by search": ({"architecture": "matching_pursuit"}, "'matching_pursuit', which interp does not read"),
    "more k than latents": ({"k": 99}, "cfg.json describes no .*k = 99 latents per token, and d_sae has only 16"),
    "another width": ({"d_sae": 17}, r"W_enc in .*safetensors has shape \[6, 16\], and by cfg.json it is \[6, 17\]"),
    "another architecture": ({"architecture": "gated"}, r"safetensors lacks the tensor b_gate, b_mag, r_mag$"),
    "an architecture of less": ({"architecture": "transcoder", "d_out": 7, "apply_b_dec_to_input": False}, "W_dec in .* 7]"),
    "a transcoder of its own input": ({"architecture": "transcoder", "d_out": D}, "a transcoder's b_dec belongs to its output"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_named(case, tmp_path):
    changes, says = WRONG[case]
    folder = edited(written(random_sae(CASES["topk"][0]), tmp_path / "sae"), **changes)
    with refused(LoadError, says):
        read_folder(folder)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("own", [True, False], ids=["ours", "saelens"])
def test_a_missing_or_misshapen_tensor_is_named(name, own, tmp_path):
    sae = random_sae(CASES["topk"][0])
    folder = sae.save(tmp_path / "sae") if own else written(sae, tmp_path / "sae")
    about = {"metadata": {"interp": module._digest(json.loads((folder / "cfg.json").read_text()).get("interp"))}}
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: torch.zeros(3, 2)}, path, **about)
    with pytest.raises(LoadError, match=rf"{name} in \S*safetensors has shape \[3, 2\], and by cfg\.json"):
        read_folder(folder)
    save_file({**tensors, "extra": torch.zeros(1)}, path, **about)
    with pytest.raises(LoadError, match=r"has a tensor that the architecture of cfg\.json has no use for: extra"):
        read_folder(folder)
    save_file({key: value for key, value in tensors.items() if key != name}, path, **about)
    with pytest.raises(LoadError, match=rf"sae_weights\.safetensors lacks the tensor {name}$"):
        read_folder(folder)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(LoadError, match=r"there is no folder .*nowhere"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"holds no sparse autoencoder: it has no cfg\.json"):
        read_folder(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(LoadError, match=r"cfg\.json is not JSON: "):
        read_folder(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(LoadError, match=r"the content of .*cfg\.json must be an object"):
        read_folder(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(LoadError, match=r"it has no sae_weights\.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(LoadError, match=r"sae_weights\.safetensors is damaged: "):
        read_folder(tmp_path)


def test_old_configurations_that_are_refused(tmp_path):
    with pytest.raises(LoadError, match="the activation function 'tanh-relu', which interp does not read"):
        SAE.load(old_config(tmp_path, activation_fn_str="tanh-relu"))
    with pytest.raises(LoadError, match=r"cfg\.json lacks the field activation_fn_kwargs\.k$"):
        SAE.load(old_config(tmp_path, activation_fn_kwargs={}))
