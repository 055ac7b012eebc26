"""Run by a Python that has SAELens, never by ours: `python saelens_peer.py FOLDER`.

FOLDER/inputs.safetensors   x [token, d_in]
FOLDER/ours/NAME            saved by interp: loaded, run on x, saved again as FOLDER/resaved/NAME
FOLDER/theirs/NAME          made here with random weights, of every architecture
FOLDER/outputs.safetensors  ours/NAME/f, ours/NAME/xhat, theirs/NAME/f, theirs/NAME/xhat
FOLDER/refused.json         NAME -> what SAELens said of a folder that it did not load
"""

import json
import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

D, H, OUT, HEADS = 6, 16, 5, 2
HOOK, HOOK_Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"


def outputs(sae: SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The code and the reconstruction, heads side by side."""
    if sae.cfg.reshape_activations == "hook_z" and not hasattr(sae.cfg, "d_out"):
        x = x.unflatten(-1, (HEADS, D // HEADS))
    with torch.no_grad():
        return {"f": sae.encode(x).float().contiguous(), "xhat": sae(x).flatten(1).float().contiguous()}


def randomise(sae: SAE, seed: int) -> SAE:
    """Weights without a zero, a one or a unit norm in them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            noise = 0.4 * torch.randn(value.shape, generator=g)
            value.copy_(noise.abs() if name == "threshold" else noise)
        sae.W_dec *= torch.rand(len(sae.W_dec), 1, generator=g) + 0.5
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.3 + torch.rand((), generator=g).item() / 3)
    return sae


def made() -> dict[str, SAE]:
    """Inference SAEs of every architecture that has an encoder, and training SAEs as "training-..."."""
    options = {
        "standard": {}, "standard-uncentred": {"apply_b_dec_to_input": False}, "standard-layer-norm": {
            "normalize_activations": "layer_norm"}, "standard-heads": {"reshape_activations": "hook_z"},
        "standard-expected": {"normalize_activations": "expected_average_only_in"},
        "gated": {}, "topk": {"k": 3}, "topk-rescaled": {"k": 3, "rescale_acts_by_decoder_norm": True},
        "abstopk": {"k": 3}, "abstopk-rescaled": {"k": 3, "rescale_acts_by_decoder_norm": True},
        "topk-norm": {"k": 3, "normalize_activations": "constant_norm_rescale"}, "jumprelu": {}, "jumprelu-bfloat16": {
            "dtype": "bfloat16"},
        "transcoder": {}, "skip_transcoder": {}, "jumprelu_transcoder": {}, "jumprelu_skip_transcoder": {},
        "training-standard": {}, "training-gated": {}, "training-jumprelu": {}, "training-topk": {"k": 3},
        "training-topk-free": {"k": 3, "rescale_acts_by_decoder_norm": False}, "training-abstopk": {"k": 3},
        "training-batchtopk": {"k": 2.5}, "training-batchtopk-free": {"k": 3, "rescale_acts_by_decoder_norm": False},
        "training-matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [4, 8, H]},
    }  # fmt: skip
    result = {}
    for seed, (name, given) in enumerate(options.items()):
        training = name.startswith("training-")
        architecture = name.removeprefix("training-").split("-")[0]
        find = sae_lens.registry.get_sae_training_class if training else sae_lens.registry.get_sae_class
        sae_class, config_class = find(architecture)
        if "transcoder" in name:
            given = {**given, "d_out": OUT, "apply_b_dec_to_input": False}
        config = config_class(d_in=D, d_sae=H, **given)
        config.metadata.hook_name = HOOK_Z if "heads" in name else HOOK
        config.metadata.model_name = "mini-gpt2"
        result[name] = randomise(sae_class(config), seed)
    return result


def main(root: Path) -> None:
    """Everything that the tests look at, in one process: SAELens takes seconds to import."""
    x = load_file(root / "inputs.safetensors")["x"]
    found, refused = {}, {}
    for folder in sorted((root / "ours").iterdir()):
        try:
            sae = SAE.load_from_disk(folder)
        except (KeyError, ValueError) as error:
            refused[folder.name] = repr(error)
            continue
        found |= {f"ours/{folder.name}/{key}": value for key, value in outputs(sae, x).items()}
        sae.save_model(root / "resaved" / folder.name)
    for name, sae in made().items():
        sae.save_model(root / "theirs" / name)
        if hasattr(
            sae, "topk_threshold"
        ):  # in training it selects by batch; what it saves for inference has a threshold
            sae.save_inference_model(root / "theirs" / f"{name}-inference")
            sae = SAE.load_from_disk(root / "theirs" / f"{name}-inference")
            found |= {f"theirs/{name}-inference/{key}": value for key, value in outputs(sae, x).items()}
        found |= {f"theirs/{name}/{key}": value for key, value in outputs(sae, x).items()}
    save_file(found, root / "outputs.safetensors")
    (root / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
