"""Running a model for its logits and activations, the same way for a `Transformer` and for a TransformerBridge.

Hook-only analyses (exact patching by hooks, caching) need no more than hook points, and both have them.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UnsupportedModel
from interp.model.config import ModelConfig
from interp.model.transformer import Transformer
from interp.rules import Rules

Hooks = Sequence[tuple[str, Any]]


def canonical(model, what: str) -> None:
    """Raise `UnsupportedModel` if this is not a model from `load_model`; what: the analysis that needs one."""
    if not isinstance(model, Transformer):
        raise UnsupportedModel(
            f"{what} needs a model's own layers, and a {type(model).__name__} has others: load the model with load_model"
        )


def config_of(model) -> ModelConfig:
    """The sizes of a model, whichever of the two it is."""
    if isinstance(model, Transformer):
        return model.cfg
    cfg = model.cfg
    return ModelConfig(
        name=str(getattr(cfg, "model_name", "model")).rstrip("/").split("/")[-1],
        family=str(cfg.architecture),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        norm="rms" if "RMS" in str(cfg.normalization_type) else "layer",
        eps=cfg.eps,
        parallel=bool(cfg.parallel_attn_mlp),
        gated=bool(cfg.gated_mlp),
    )


def dtype_of(model) -> torch.dtype:
    """The dtype of the token embeddings."""
    return model.W_E.dtype


def run_at(
    model, tokens: Int[Tensor, "prompt position"], read_at: Int[Tensor, " prompt"], hooks: Hooks = (),
    *, rules: Rules | None = None,
) -> Float[Tensor, "prompt d_vocab"]:  # fmt: skip
    """Logits at one position of every prompt, with forward hooks in place for this run only; with a graph if one is asked for."""
    if isinstance(model, Transformer):
        return model.run_with_hooks(tokens, rules=rules, read_at=read_at, fwd_hooks=list(hooks))
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
    return logits[torch.arange(len(tokens), device=logits.device), read_at]


@torch.no_grad()
def logits_at(
    model, tokens: Int[Tensor, "prompt position"], read_at: Int[Tensor, " prompt"], hooks: Hooks = ()
) -> Float[Tensor, "prompt d_vocab"]:
    """The same without a graph."""
    return run_at(model, tokens, read_at, hooks)


def _last_layer(names: Sequence[str]) -> int | None:
    """Layers that have to run for these hook points to fire; None for all."""
    layers = [re.match(r"blocks\.(\d+)\.|hook_(?:pos_)?embed$", name) for name in names]
    return None if None in layers else max((int(found[1] or -1) for found in layers), default=-1) + 1


@torch.no_grad()
def record(
    model, tokens: Int[Tensor, "prompt position"], names: Iterable[str], hooks: Hooks = (), *, copy: bool = True
) -> dict[str, Tensor]:
    """Values at the named hook points. Raises KeyError if a name does not exist, RuntimeError if it did not fire.

    copy=False keeps the run's own tensors: right for a `Transformer` without other hooks, which changes nothing in place.
    """
    values: dict[str, Tensor] = {}

    def keep(name: str):
        def hook_function(value: Tensor, hook: Any) -> None:
            values[name] = value.detach().clone() if copy else value.detach()

        return hook_function

    names = list(dict.fromkeys(names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"return_type": None, "n_layers": _last_layer(names)} if isinstance(model, Transformer) else {}
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *((name, keep(name)) for name in names)], **kwargs)
    if silent := [name for name in names if name not in values]:
        raise RuntimeError(f"hook points that did not fire: {', '.join(silent)}")
    return values
