"""What comes with interp, in a clone and in an installed wheel alike: models, autoencoders of them, text to train on."""

import importlib.resources
from pathlib import Path


def bundled_folder(kind: str) -> Path | None:
    """The folder of bundled "models", "saes" or "text", if it is there."""
    package = Path(str(importlib.resources.files("interp")))
    for root in (package / "bundled" / kind, package.parent / "data" / kind):
        if root.is_dir():
            return root
    return None


def bundled_models() -> dict[str, Path]:
    """Names and folders of the models that come with interp."""
    root = bundled_folder("models")
    return {} if root is None else {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()}


def bundled_saes() -> dict[str, Path]:
    """Names (`mini-gpt2/resid_post2`) and folders of the sparse autoencoders and transcoders of the bundled models."""
    root = bundled_folder("saes")
    found = [] if root is None else sorted(root.glob("*/*/cfg.json"))
    return {"/".join(path.parts[-3:-1]): path.parent for path in found}


def bundled_text() -> Path | None:
    """Text like that which the bundled models were trained on."""
    root = bundled_folder("text")
    return None if root is None else root / "mini.jsonl"
