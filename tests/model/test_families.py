"""Every family, reproduced: logits and every hook value, against two originals, in float64 and in float32.

The first original is TransformerLens' bridge, through `verify`, which every load goes through. The second is the plain
Hugging Face model, which knows nothing of bridges, compared here by hand: its logits, its hidden states (what we call
`hook_resid_pre`) and its attention patterns. In float64 both run inside `true_float64`, because Hugging Face code
rounds norms, softmax and angles to float32 otherwise, and agreement would stop at 1e-6.
"""

from functools import cache

import pytest
import torch
import transformers

from interp import ModelConfig, Transformer
from interp.errors import LoadError, UnsupportedModel
from interp.model.load import verify
from interp.model.read import check_supported, read_config, read_weights
from tests.families import FAMILIES, N_VOCAB, UNSUPPORTED, build_family, quiet, randomise, true_float64

SUPPORTED = [name for name in FAMILIES if name != "falcon"]

LEARNED_POSITIONS = {"gpt2", "gpt2-scaled", "gpt_neo", "opt"}
PARALLEL = {"pythia", "gptj", "phi"}
GATED = {
    "llama", "llama3", "llama-bias", "llama-relu2", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "stablelm",
    "olmo", "olmo2",
}  # fmt: skip
QK_NORMS = {"qwen3", "gemma3", "olmo2"}
# families whose rotated queries and keys the bridge shows
SHOWS_ROTATION = GATED | {"phi", "starcoder2"}
# families whose attention the bridge leaves to Hugging Face: it shows the pattern under the name of the scores
NATIVE_ATTENTION = {"gpt_neo", "gptj", "opt"}


def _expected_hooks(name: str, cfg: ModelConfig) -> set[str]:
    """Hook points that both sides must have, so that a comparison cannot quietly become empty."""
    names = {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "logits"}
    if name in LEARNED_POSITIONS:
        names.add("hook_pos_embed")
    for layer in range(cfg.n_layers):
        per_layer = {"hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"}
        per_layer |= {f"attn.hook_{x}" for x in ("q", "k", "v", "z", "pattern")} | {"mlp.hook_pre", "mlp.hook_post"}
        if name not in NATIVE_ATTENTION:
            per_layer.add("attn.hook_attn_scores")
        if name in SHOWS_ROTATION:
            per_layer |= {"attn.hook_rot_q", "attn.hook_rot_k"}
        if name in GATED:
            per_layer.add("mlp.hook_pre_linear")
        if name in QK_NORMS:
            per_layer |= {f"attn.{n}_norm.hook_{x}" for n in "qk" for x in ("scale", "normalized")}
        if name not in PARALLEL:
            per_layer.add("hook_resid_mid")
        if name != "olmo2":
            per_layer |= {"ln1.hook_scale", "ln1.hook_normalized"}
        if name not in ("olmo2", "gptj", "phi"):
            per_layer |= {"ln2.hook_scale", "ln2.hook_normalized"}
        if name in ("gemma2", "gemma3"):  # olmo2 has these too, but TransformerLens 3 calls them ln1 and ln2
            per_layer |= {"ln1_post.hook_scale", "ln2_post.hook_normalized"}
        names |= {f"blocks.{layer}.{hook}" for hook in per_layer}
    return names


def _exact_gptj_table(model, rotary_dim: int, n_ctx: int) -> None:
    """GPT-J keeps a table of sines and cosines, made when the model is built and rounded to float32 there (or not,
    depending on how it was built). Its frequencies are float32 too; the angles here are their exact multiples."""
    inv_freq = 1.0 / (10000 ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64) / rotary_dim))
    angles = torch.outer(torch.arange(n_ctx, dtype=torch.float64), inv_freq.double())
    table = torch.cat([angles.sin(), angles.cos()], -1)
    found = 0
    for module in model.modules():
        if torch.is_tensor(getattr(module, "embed_positions", None)):
            assert (module.embed_positions - table).abs().max() < 1e-5
            module.embed_positions = table
            found += 1
    assert found


@cache
def _both(folder, dtype: torch.dtype):
    """(canonical, bridge) over the same loaded tensors."""
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)
    cfg = read_config(bridge, folder.name, None)
    return Transformer(cfg, read_weights(bridge, cfg), bridge.tokenizer), bridge


@pytest.mark.parametrize("name", SUPPORTED)
def test_float64_equals_the_bridge_to_1e_9(name, tiny_folder):
    model, bridge = _both(tiny_folder(name, torch.float64), torch.float64)
    if name == "gptj":
        _exact_gptj_table(bridge.original_model, 8, model.cfg.n_ctx)
    with true_float64():
        differences = verify(model, bridge, tolerance=1e-9)
    assert _expected_hooks(name, model.cfg) <= set(differences)
    assert list(differences)[-1] == "logits"
    assert max(differences.values()) <= 1e-9


@pytest.mark.parametrize("name", SUPPORTED)
def test_float32_equals_the_bridge_to_1e_4(name, tiny_folder):
    model, bridge = _both(tiny_folder(name), torch.float32)
    differences = verify(model, bridge, seed=1)
    assert _expected_hooks(name, model.cfg) <= set(differences)
    assert max(differences.values()) <= 1e-4


@pytest.mark.parametrize("name", SUPPORTED)
def test_float64_equals_plain_hugging_face(name, tiny):
    original, model = build_family(name, torch.float64), tiny(name, torch.float64)
    if name == "gptj":
        _exact_gptj_table(original, 8, model.cfg.n_ctx)
    tokens = torch.randint(N_VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), true_float64():
        theirs = original(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
        logits, ours = model.run_with_cache(tokens)
    assert len(theirs.hidden_states) == model.cfg.n_layers + 1
    assert len(theirs.attentions) == model.cfg.n_layers
    pairs = [(logits, theirs.logits)]
    for layer in range(model.cfg.n_layers):
        pairs.append((ours[f"blocks.{layer}.hook_resid_pre"], theirs.hidden_states[layer]))
        pairs.append((ours[f"blocks.{layer}.attn.hook_pattern"], theirs.attentions[layer]))
    for mine, original_value in pairs:
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, original_value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SUPPORTED)
def test_float32_logits_equal_plain_hugging_face(name, tiny):
    tokens = torch.randint(N_VOCAB, (2, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        theirs = build_family(name)(tokens, use_cache=False).logits
        torch.testing.assert_close(tiny(name)(tokens), theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- settings that FAMILIES leaves at one value

_SMALL = {"vocab_size": N_VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, **_SMALL,
}  # fmt: skip
_GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SMALL}
VARIANTS = {
    "gpt2 with relu": lambda: transformers.GPT2Config(activation_function="relu", **_GPT_LIKE),
    "llama tied": lambda: transformers.LlamaConfig(tie_word_embeddings=True, **_LLAMA_LIKE),
    "llama yarn": lambda: transformers.LlamaConfig(
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
        **_LLAMA_LIKE,
    ),
    "mistral without a window": lambda: transformers.MistralConfig(
        num_key_value_heads=2, sliding_window=None, **_LLAMA_LIKE
    ),
    "qwen2 with some windows": lambda: transformers.Qwen2Config(
        num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=1, **_LLAMA_LIKE
    ),
    "qwen3 without biases": lambda: transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, **_LLAMA_LIKE),
    "opt without biases": lambda: transformers.OPTConfig(
        enable_bias=False, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **_LLAMA_LIKE
    ),
    "starcoder2 without biases": lambda: transformers.Starcoder2Config(
        num_key_value_heads=2, use_bias=False, sliding_window=None, **_LLAMA_LIKE
    ),
    "stablelm without biases": lambda: transformers.StableLmConfig(num_key_value_heads=4, **_LLAMA_LIKE),
    "olmo tied": lambda: transformers.OlmoConfig(tie_word_embeddings=True, **_LLAMA_LIKE),
    "phi with another activation": lambda: transformers.PhiConfig(hidden_act="gelu", **_LLAMA_LIKE),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_equals_plain_hugging_face(variant, tmp_path):
    from interp import load_model
    from tests.families import letter_tokenizer, word_tokenizer

    config = VARIANTS[variant]()
    folder = tmp_path / "variant"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float64
        )
        randomise(original).eval().save_pretrained(folder)
        (letter_tokenizer() if config.model_type == "qwen2" else word_tokenizer()).save_pretrained(folder)
    model = load_model(folder, dtype=torch.float64)
    tokens = torch.randint(N_VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), true_float64():
        torch.testing.assert_close(model(tokens), original(tokens, use_cache=False).logits, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = {
    "mixtral": "experts",
    "mamba": "state-space",
    "t5": "encoder",
    "bert": "bidirectional",
    "opt-350m": "narrower than the residual stream",
    "opt-postnorm": "layer norms after each sublayer",
    "bloom": "ALiBi",
    "falcon": "falcon",
}


def test_every_unsupported_family_has_its_reason():
    assert set(REFUSED) == set(UNSUPPORTED) | {"falcon"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_model_is_refused_by_name(name, tiny_folder):
    from interp import load_model

    folder = tiny_folder(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert name.split("-")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.OlmoConfig(clip_qkv=8.0), "clipped queries"),
        (transformers.PhiConfig(qk_layernorm=True), "layer norms of queries and keys"),
        (transformers.StableLmConfig(qk_layernorm=True), "layer norms of queries and keys"),
        (transformers.StableLmConfig(use_parallel_residual=True), "parallel"),
        (transformers.FalconConfig(alibi=True), "ALiBi"),
        (transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional"),
        (transformers.Qwen2MoeConfig(), "experts"),
        (transformers.GPT2Config(add_cross_attention=True), "cross-attention|encoder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PretrainedConfig) else "",
)  # fmt: skip
def test_a_setting_outside_the_canon_is_refused(config, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        check_supported(config)


# ------------------------------------------------------------------------------------------------- whose memory it is


@pytest.mark.parametrize("name", SUPPORTED)
def test_weights_are_views_of_the_loaded_tensors(name, tiny_folder):
    from transformer_lens.model_bridge import TransformerBridge

    folder = tiny_folder(name)
    with quiet():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        storages = {p.untyped_storage().data_ptr() for p in loaded.parameters()}
        has_unembed_bias = loaded.get_output_embeddings().bias is not None
        bridge = TransformerBridge.boot_transformers(
            str(folder), hf_model=loaded, tokenizer=tokenizer, device="cpu", dtype=torch.float32
        )
    cfg = read_config(bridge, name, None)
    model = Transformer(cfg, read_weights(bridge, cfg))
    copied = {n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() not in storages}
    if name in ("pythia", "neox-sequential"):  # interleaved per head: no view of that is a matrix
        allowed = {f"blocks.{i}.attn.{x}_{y}" for i in range(cfg.n_layers) for x in "Wb" for y in "QKV"}
        assert copied - {"unembed.b_U"} == allowed
    else:
        assert copied - {"unembed.b_U"} == set()
    if "unembed.b_U" in copied:  # the bridge gives every unembedding a bias; where the model has none it is zero
        assert not has_unembed_bias
        assert not model.unembed.b_U.any()
    same = model.W_U.untyped_storage().data_ptr() == model.W_E.untyped_storage().data_ptr()
    assert same == cfg.tied == bool(bridge.original_model.config.tie_word_embeddings)
    assert not any(p.requires_grad for p in model.parameters())


def test_gpt2s_q_k_v_are_thirds_of_one_matrix(tiny):
    attn = tiny("gpt2").blocks[1].attn
    width, item = attn.W_Q.shape[0] * attn.W_Q.shape[2], attn.W_Q.element_size()
    assert attn.W_K.data_ptr() - attn.W_Q.data_ptr() == width * item
    assert attn.W_V.data_ptr() - attn.W_K.data_ptr() == width * item
    assert attn.W_Q.stride() == (attn.W_Q.shape[2], 3 * width, 1)


# ---------------------------------------------------------------------------------------------- the check must have teeth

# a weight of the canonical model -> the first hook whose value it changes
FIRST_TO_DIFFER = {
    "embed.W_E": "hook_embed",
    "blocks.1.ln1.w": "blocks.1.attn.hook_q",
    "blocks.1.attn.W_Q": "blocks.1.attn.hook_q",
    "blocks.1.attn.W_K": "blocks.1.attn.hook_k",
    "blocks.1.attn.W_V": "blocks.1.attn.hook_v",
    "blocks.1.attn.W_O": "blocks.1.hook_attn_out",
    "blocks.1.mlp.W_in": r"blocks.1.mlp.hook_pre(_linear)?",
    "blocks.1.mlp.W_out": "blocks.1.hook_mlp_out",
    "ln_final.w": "logits",
    "unembed.W_U": "logits",
}


def _with_weight(model: Transformer, name: str, change) -> Transformer:
    """The same model with one weight changed; the original, which shares its memory, keeps its own."""
    weights = dict(model.named_parameters())
    weights[name] = change(weights[name].detach().clone())
    return Transformer(model.cfg, weights, model.tokenizer)


@pytest.mark.parametrize("weight", FIRST_TO_DIFFER)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_verify_names_the_first_hook_that_differs(name, weight, tiny_folder):
    model, bridge = _both(tiny_folder(name), torch.float32)
    wrong = _with_weight(model, weight, lambda w: w * 1.01)
    with pytest.raises(LoadError, match=rf"first difference is at {FIRST_TO_DIFFER[weight]} \(") as caught:
        verify(wrong, bridge)
    assert model.cfg.name in str(caught.value)
    verify(model, bridge)  # and nothing was left behind


@pytest.mark.parametrize(
    ("field", "value", "hook"),
    [
        ("windows", (4, 3, 4), "blocks.1.attn.hook_(attn_scores|pattern)"),
        ("attn_scale", (0.3, 0.3, 0.3), "blocks.0.attn.hook_attn_scores"),
        ("eps", 1e-1, "blocks.0.ln1.hook_scale"),
        ("activation", "gelu", "blocks.0.mlp.hook_post"),
    ],
)
def test_verify_sees_a_wrong_convention(field, value, hook, tiny_folder):
    from dataclasses import replace

    model, bridge = _both(tiny_folder("mistral"), torch.float32)
    wrong = Transformer(replace(model.cfg, **{field: value}), dict(model.named_parameters()))
    eps = {id(part): part.config.eps for part in bridge.modules() if hasattr(getattr(part, "config", None), "eps")}
    try:
        with pytest.raises(LoadError, match=f"first difference is at {hook}"):
            verify(wrong, bridge)
    finally:
        for part in bridge.modules():
            if id(part) in eps:
                part.config.eps = eps[id(part)]


@pytest.mark.parametrize("where", ["one entry", "everywhere"])
def test_verify_does_not_overlook_a_nan(where, tiny_folder):
    model, bridge = _both(tiny_folder("gpt2"), torch.float32)

    def spoil(w: torch.Tensor) -> torch.Tensor:
        w.view(-1)[0 if where == "one entry" else slice(None)] = torch.nan
        return w

    with pytest.raises(LoadError, match=r"blocks\.1\.hook_attn_out"):
        verify(_with_weight(model, "blocks.1.attn.b_O", spoil), bridge)
