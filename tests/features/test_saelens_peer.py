"""SAELens and interp read each other's files and compute the same, to 1e-5 of the largest number.

SAELens needs versions of other packages that interp cannot have, so it runs in a Python of its own, which the environment
variable INTERP_SAELENS_PYTHON names; see saelens_peer.py.
"""

import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.features import saelens_format
from interp.features.sae import SAE
from tests.features.test_saelens_format import CASES, inputs, random_sae

PYTHON = os.environ.get("INTERP_SAELENS_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="INTERP_SAELENS_PYTHON names no Python with SAELens")

OURS = {name: values for name, (values, _, _) in CASES.items()} | {
    "heads": {**CASES["topk"][0], "hook": "blocks.1.attn.hook_z"}
}
READABLE = [name for name in OURS if name == "heads" or CASES[name][1] in saelens_format._KNOWN]
THEIRS = [
    "standard", "standard-uncentred", "standard-layer-norm", "standard-heads", "standard-expected", "gated", "topk",
    "topk-rescaled", "abstopk", "abstopk-rescaled", "topk-norm", "jumprelu", "jumprelu-bfloat16", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder", "training-standard", "training-gated", "training-jumprelu",
    "training-topk", "training-topk-free", "training-abstopk", "training-batchtopk", "training-batchtopk-inference",
    "training-batchtopk-free", "training-batchtopk-free-inference", "training-matryoshka_batchtopk",
    "training-matryoshka_batchtopk-inference",
]  # fmt: skip


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> Path:
    """The folder that both have written to."""
    root = tmp_path_factory.mktemp("peer")
    (root / "ours").mkdir()
    for name, values in OURS.items():
        random_sae(values, model_name="mini-gpt2", fvu=0.1).save(root / "ours" / name)
    save_file({"x": inputs()}, root / "inputs.safetensors")
    script = Path(__file__).with_name("saelens_peer.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(script), str(root)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root


def agrees(peer: Path, name: str, sae: SAE, rtol: float = 1e-5) -> None:
    outputs, x = load_file(peer / "outputs.safetensors"), inputs().to(sae.dtype)
    for key, ours in (("f", sae.encode(x)), ("xhat", sae(x))):
        theirs = outputs[f"{name}/{key}"]
        assert theirs.std() > 0.01
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


@pytest.mark.parametrize("name", READABLE)
def test_saelens_computes_what_we_do(name, peer):
    agrees(peer, f"ours/{name}", SAE.load(peer / "ours" / name))


def test_saelens_refuses_only_what_it_lacks(peer):
    refused = json.loads((peer / "refused.json").read_text())
    assert refused.keys() == OURS.keys() - set(READABLE)
    for name, says in refused.items():
        assert CASES[name][1] in says


@pytest.mark.parametrize("name", READABLE)
def test_keys_are_those_that_saelens_writes(name, peer):
    """The names, values and types of its own cfg.json and tensors, for the SAE that it has just loaded from ours."""
    ours = json.loads((peer / "ours" / name / "cfg.json").read_text())
    theirs = json.loads((peer / "resaved" / name / "cfg.json").read_text())
    assert {**theirs, "interp": ours["interp"]} == ours
    a, b = (load_file(peer / kind / name / "sae_weights.safetensors") for kind in ("ours", "resaved"))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key])


@pytest.mark.parametrize("name", READABLE)
def test_what_saelens_saves_again_is_still_the_same_function(name, peer):
    agrees(peer, f"ours/{name}", SAE.load(peer / "resaved" / name))


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_saelens_does(name, peer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*taken as 1")
        sae = SAE.load(peer / "theirs" / name)
    agrees(peer, f"theirs/{name}", sae, rtol=0.02 if "bfloat16" in name else 1e-5)
    assert sae.metadata["model_name"] == "mini-gpt2"
    assert sae.config.hook == ("blocks.1.attn.hook_z" if "heads" in name else "blocks.1.hook_resid_post")


def test_every_saved_architecture_was_read(peer):
    assert sorted(path.name for path in (peer / "theirs").iterdir()) == sorted(THEIRS)
    kinds = {json.loads((path / "cfg.json").read_text())["architecture"] for path in (peer / "theirs").iterdir()}
    assert kinds == set(saelens_format._KNOWN)


# folded in bfloat16, numbers at a threshold may fall on its other side
@pytest.mark.parametrize("name", [name for name in THEIRS if "bfloat16" not in name])
def test_what_we_save_of_theirs_is_the_same_function(name, peer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*taken as 1")
        sae = SAE.load(peer / "theirs" / name)
    again = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(again(inputs()), sae(inputs()), rtol=1e-4, atol=1e-5)
