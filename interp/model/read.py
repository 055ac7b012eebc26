"""Reads a loaded TransformerBridge: its configuration as a `ModelConfig`, its weights as views under our names.

The bridge knows where every architecture keeps its parts (`blocks[0].attn.q`, `mlp.gate`, `ln_final`, ...); what is
left to us is how the parts are laid out in memory and the few conventions a configuration file does not spell out.
Both are here and nowhere else. `interp.model.load` then checks the result against the bridge, value by value, so a
wrong entry in this file cannot go unnoticed.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from interp.errors import UnsupportedModel
from interp.model.activations import ACTIVATIONS
from interp.model.config import ModelConfig, Rotary
from interp.model.ops import default_attn_scale

# Model types (as configuration files name them) whose layout and conventions this file knows.
FAMILIES = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    "phi", "starcoder2", "stablelm", "olmo", "olmo2",
)  # fmt: skip
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3_text")  # weight stored as w - 1
_PARALLEL = ("gptj", "phi")
_POST_NORM_ONLY = ("olmo2",)
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # scalings that do not depend on the prompt's length


def check_supported(hf_config) -> None:
    """Raise `UnsupportedModel`, saying what is missing, for a configuration the canonical transformer cannot be."""
    kind = hf_config.model_type
    get = lambda name, default=None: getattr(hf_config, name, default)  # noqa: E731
    lacks = []
    if get("num_local_experts") or get("num_experts") or get("n_routed_experts") or get("moe_intermediate_size"):
        lacks.append("a mixture of experts")
    if get("state_size") or get("ssm_cfg") or get("mamba_d_state"):
        lacks.append("state-space layers")
    if get("use_bidirectional_attention"):
        lacks.append("bidirectional attention")
    if get("add_cross_attention"):
        lacks.append("cross-attention to an encoder")
    if get("is_encoder_decoder"):
        lacks.append("an encoder")
    if kind in ("bert", "roberta", "distilbert", "deberta", "deberta-v2", "electra", "modernbert"):
        lacks.append("bidirectional attention")
    if get("alibi") or kind in ("bloom", "mpt"):
        lacks.append("ALiBi position biases")
    if kind == "opt" and not get("do_layer_norm_before"):
        lacks.append("layer norms after each sublayer in the old (post-residual) place")
    if kind == "opt" and get("word_embed_proj_dim") != get("hidden_size"):
        lacks.append("an embedding narrower than the residual stream")
    if get("clip_qkv") is not None:
        lacks.append("clipped queries, keys and values")
    if get("qk_layernorm") and kind in ("phi", "stablelm"):
        lacks.append("per-head layer norms of queries and keys with biases")
    if kind == "stablelm" and get("use_parallel_residual"):
        lacks.append("a parallel StableLM block")
    for rope in _rope_parameters(hf_config):
        if rope.get("rope_type", "default") not in _STATIC_ROPE:
            lacks.append(f"rotary scaling of type {rope['rope_type']!r}")
    if get("quantization_config"):
        lacks.append("quantised weights")
    if not lacks and kind in FAMILIES:
        return
    why = (
        f"needs {' and '.join(lacks)}, which the canonical transformer lacks"
        if lacks
        else "has a layout not known here"
    )
    raise UnsupportedModel(
        f"{get('_name_or_path') or kind} ({kind}) {why}; hook-only analyses still take a TransformerBridge "
        f"(families supported: {', '.join(FAMILIES)})"
    )


def _rope_parameters(hf_config) -> Iterator[dict]:
    rope = getattr(hf_config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    yield from nested or [rope]


def _part(component):
    """The Hugging Face module behind a bridge component; None if the model has no such part."""
    return None if component is None else component.original_component


def _sub(component, name: str):
    return component._modules.get(name)


def _matrix(component) -> Tensor | None:
    """Weight as [in, out]: Conv1D stores it so, Linear the other way round. Always a view."""
    module = _part(component)
    if module is None:
        return None
    return module.weight.data if type(module).__name__ == "Conv1D" else module.weight.data.T


def _bias(component) -> Tensor | None:
    bias = getattr(_part(component), "bias", None)
    return None if bias is None else bias.data


def read_config(bridge, name: str, revision: str | None) -> ModelConfig:
    """The facts of a booted bridge, from its modules where they show and from its configuration where not."""
    hf, cfg, kind = bridge.original_model.config, bridge.cfg, bridge.original_model.config.model_type
    block = bridge.blocks[0]
    attn, mlp = block.attn, block.mlp
    norm = _part(bridge.ln_final)
    q_norm = _part(_sub(attn, "q_norm"))
    activation = next(
        (
            a
            for n in ("hidden_act", "activation_function", "hidden_activation")
            if isinstance(a := getattr(hf, n, 0), str)
        ),
        "gelu",
    )
    if kind in ("gemma", "gemma2", "gemma3_text"):  # their code reads hidden_activation, whatever hidden_act says
        activation = getattr(hf, "hidden_activation", None) or "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"{name} uses the activation {activation!r}, which the canonical transformer lacks")
    n_layers, n_heads, d_head = cfg.n_layers, cfg.n_heads, cfg.d_head
    embed, d_model = _part(bridge.embed), cfg.d_model
    unembed = _part(bridge.unembed)
    pos_embed = _part(_sub(bridge, "pos_embed"))
    return ModelConfig(
        name=name,
        family=kind,
        revision=revision,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=cfg.n_key_value_heads or n_heads,
        d_head=d_head,
        d_mlp=_matrix(_sub(mlp, "out")).shape[0],
        d_vocab=embed.weight.shape[0],
        n_ctx=cfg.n_ctx,
        norm="rms" if "RMSNorm" in type(norm).__name__ else "layer",
        eps=float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))),
        norm_offset=kind in _OFFSET_NORMS,
        pre_norm=kind not in _POST_NORM_ONLY,
        post_norm=kind in _POST_NORM_ONLY or _sub(block, "ln1_post") is not None,
        qk_norm=None if q_norm is None else "head" if q_norm.weight.shape[0] == d_head else "all",
        parallel=kind in _PARALLEL or (kind == "gpt_neox" and hf.use_parallel_residual),
        shared_norm=kind in _PARALLEL,
        activation=activation,
        gated=_sub(mlp, "gate") is not None,
        attn_scale=tuple(_attn_scale(hf, d_head, layer) for layer in range(n_layers)),
        attn_softcap=getattr(hf, "attn_logit_softcapping", None),
        logit_softcap=getattr(hf, "final_logit_softcapping", None),
        windows=tuple(_window(hf, layer) for layer in range(n_layers)),
        rotary=_rotaries(bridge, n_layers),
        position_offset=None if pos_embed is None else getattr(pos_embed, "offset", 0),
        embed_scale=float(getattr(embed, "embed_scale", 1.0)),
        logit_scale=1.0,
        tied=unembed.weight.data_ptr() == embed.weight.data_ptr(),
        prepend_bos=bool(getattr(cfg, "default_prepend_bos", True)),
    )


def _attn_scale(hf, d_head: int, layer: int) -> float:
    if hf.model_type == "gpt_neo":
        return 1.0
    if hf.model_type in ("gemma2", "gemma3_text"):
        return hf.query_pre_attn_scalar**-0.5
    if hf.model_type == "gpt2":
        scale = default_attn_scale(d_head) if hf.scale_attn_weights else 1.0
        return scale / (layer + 1) if hf.scale_attn_by_inverse_layer_idx else scale
    return default_attn_scale(d_head)


def _window(hf, layer: int) -> int | None:
    if hf.model_type == "gpt_neo":
        return hf.window_size if hf.attention_layers[layer] == "local" else None
    layer_types = getattr(hf, "layer_types", None)
    if layer_types:
        return hf.sliding_window if layer_types[layer] == "sliding_attention" else None
    return getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", True) else None


def _rotaries(bridge, n_layers: int) -> tuple[Rotary | None, ...]:
    hf = bridge.original_model.config
    if hf.model_type == "gptj":
        dim = hf.rotary_dim
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
        return (Rotary(tuple(inv_freq.tolist()), pairs="adjacent"),) * n_layers
    source = _part(_sub(bridge, "rotary_emb"))
    if source is None:
        return (None,) * n_layers

    def rotary(layer: int) -> Rotary:
        # Gemma 3 has one set of frequencies per kind of layer, under names of their own. The buffers are float32 in
        # the original whatever the dtype; their values are taken as they are.
        prefix = "" if hasattr(source, "inv_freq") else f"{hf.layer_types[layer]}_"
        return Rotary(
            tuple(getattr(source, f"{prefix}inv_freq").tolist()),
            scale=float(getattr(source, f"{prefix}attention_scaling")),
        )

    return tuple(rotary(layer) for layer in range(n_layers))


def read_weights(bridge, cfg: ModelConfig) -> dict[str, Tensor]:
    """Every parameter under TransformerLens' names, as views of the loaded tensors.

    The exception is GPT-NeoX, which stores queries, keys and values interleaved per head: no view of that is a matrix,
    so its three projections are copied, and the interleaved original goes when the bridge does.
    """
    weights: dict[str, Tensor | None] = {
        "embed.W_E": _part(bridge.embed).weight.data,
        "unembed.W_U": _matrix(bridge.unembed),
        "unembed.b_U": _bias(bridge.unembed),
        **_norm("ln_final", bridge.ln_final),
    }
    if cfg.position_offset is not None:
        weights["pos_embed.W_pos"] = _part(bridge.pos_embed).weight.data
    for layer in range(cfg.n_layers):
        block, prefix = bridge.blocks[layer], f"blocks.{layer}"
        for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
            if cfg.pre_norm or norm.endswith("_post"):
                # TransformerLens 3 calls the norms of a block that has only post-norms ln1 and ln2
                theirs = norm if cfg.pre_norm or _sub(block, norm) else norm.removesuffix("_post")
                weights |= _norm(f"{prefix}.{norm}", _sub(block, theirs))
        for norm in ("q_norm", "k_norm"):
            weights |= _norm(f"{prefix}.attn.{norm}", _sub(block.attn, norm))
        for name, tensor in _attention(block.attn, cfg):
            weights[f"{prefix}.attn.{name}"] = tensor
        for name, key in (("in", "in"), ("gate", "gate"), ("out", "out")):
            weights[f"{prefix}.mlp.W_{name}"] = _matrix(_sub(block.mlp, key))
            weights[f"{prefix}.mlp.b_{name}"] = _bias(_sub(block.mlp, key))
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def _norm(prefix: str, component) -> dict[str, Tensor | None]:
    weight = getattr(_part(component), "weight", None)
    return {f"{prefix}.w": None if weight is None else weight.data, f"{prefix}.b": _bias(component)}


def _attention(attn, cfg: ModelConfig) -> Iterator[tuple[str, Tensor | None]]:
    joint = _sub(attn, "qkv")
    n_heads = {"Q": cfg.n_heads, "K": cfg.n_kv_heads, "V": cfg.n_kv_heads}
    if joint is None:
        columns = {name: _matrix(_sub(attn, name.lower())) for name in "QKV"}
        biases = {name: _bias(_sub(attn, name.lower())) for name in "QKV"}
    elif cfg.family == "gpt2":  # [all queries | all keys | all values]
        columns = dict(zip("QKV", _matrix(joint).chunk(3, dim=-1), strict=True))
        biases = dict(zip("QKV", _bias(joint).chunk(3, dim=-1), strict=True))
    else:  # gpt_neox: query, key, value of head 0, then of head 1, ...
        per_head = {"h": cfg.n_heads, "three": 3}
        parts = rearrange(_part(joint).weight.data, "(h three e) d -> three (h e) d", **per_head).contiguous()
        columns = {name: part.T for name, part in zip("QKV", parts, strict=True)}
        parts = rearrange(_bias(joint), "(h three e) -> three (h e)", **per_head).contiguous()
        biases = dict(zip("QKV", parts, strict=True))
    for name in "QKV":
        yield f"W_{name}", rearrange(columns[name], "d (h e) -> h d e", h=n_heads[name])
        if biases[name] is not None:
            yield f"b_{name}", rearrange(biases[name], "(h e) -> h e", h=n_heads[name])
    out = _sub(attn, "o")
    yield "W_O", rearrange(_matrix(out), "(h e) d -> h e d", h=cfg.n_heads)
    yield "b_O", _bias(out)
