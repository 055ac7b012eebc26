"""Where a model is not linear: every place at which its forward pass asks a rule set, by switch and path."""

from typing import NamedTuple

from interp.model.activations import ACTIVATIONS, Activation
from interp.model.config import ModelConfig


class Nonlinearity(NamedTuple):
    """One place. `switch` is the field of `Rules` that decides; `present` is False where the model has no such thing."""

    path: str
    switch: str
    present: bool = True
    activation: Activation | None = None


def nonlinearities(cfg: ModelConfig) -> list[Nonlinearity]:
    """All places of a canonical transformer, in the order of its forward pass. Paths are modules' or hook points'."""
    places = []
    for layer in range(cfg.n_layers):
        attn, mlp, block = f"blocks.{layer}.attn", f"blocks.{layer}.mlp", f"blocks.{layer}"
        rotary = cfg.rotary[layer] is not None
        places += [
            Nonlinearity(f"{block}.ln1", "norm_scale", cfg.pre_norm),
            Nonlinearity(f"{attn}.q_norm", "qk_norm_scale", cfg.qk_norm is not None),
            Nonlinearity(f"{attn}.hook_rot_q", "rotation", rotary),
            Nonlinearity(f"{attn}.k_norm", "qk_norm_scale", cfg.qk_norm is not None),
            Nonlinearity(f"{attn}.hook_rot_k", "rotation", rotary),
            Nonlinearity(f"{attn}.hook_attn_scores", "query_key"),
            Nonlinearity(f"{attn}.hook_attn_scores", "cap_slope", cfg.attn_softcap is not None),
            Nonlinearity(f"{attn}.hook_pattern", "pattern"),
            Nonlinearity(f"{attn}.hook_z", "pattern_value"),
            Nonlinearity(f"{block}.ln1_post", "norm_scale", cfg.post_norm),
            Nonlinearity(f"{block}.ln2", "norm_scale", cfg.pre_norm and not cfg.shared_norm),
            Nonlinearity(f"{mlp}.hook_pre", "activation_slope", activation=ACTIVATIONS[cfg.activation]),
            Nonlinearity(f"{mlp}.hook_post", "gate_product", cfg.gated),
            Nonlinearity(f"{block}.ln2_post", "norm_scale", cfg.post_norm),
        ]
    return [
        *places,
        Nonlinearity("ln_final", "norm_scale"),
        Nonlinearity("unembed", "cap_slope", cfg.logit_softcap is not None),
    ]
