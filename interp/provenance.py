"""Where a number came from: the facts that every result carries in its attributes."""

import importlib.metadata
from functools import lru_cache

from interp.model.run import config_of, dtype_of


@lru_cache(maxsize=1)
def versions() -> str:
    """Versions of the libraries that can change a number, as one line."""
    parts = []
    for name in ("torch", "transformer_lens", "transformers", "numpy"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} not installed")
    from interp import __version__

    return ", ".join([f"interp {__version__}", *parts])


def provenance(model, pairs) -> dict[str, str | int]:
    """Model, task, corruption, dtype, device, seed and library versions, as plain values."""
    cfg = config_of(model)
    return {
        "model": cfg.name,
        "revision": cfg.revision or "local",
        "task": pairs.name,
        "corruption": pairs.corruption,
        "n_prompts": len(pairs),
        "seed": -1 if pairs.seed is None else pairs.seed,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "device": str(model.W_E.device),
        "versions": versions(),
    }
