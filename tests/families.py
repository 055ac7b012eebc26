"""Tiny random models of every family the canonical transformer must reproduce, and a float64 oracle to judge it by.

A bug in reading weights out of somebody else's model hides wherever a feature is switched off or has a value that
makes it invisible: a norm whose weight is one, a bias of zero, a sliding window longer than the prompt, a soft-cap far
above every score, a head width that happens to equal ``d_model / n_heads``.  The configurations below are therefore
chosen against that: each turns on everything its architecture has, with values at which getting it wrong moves the
logits on a prompt of a dozen tokens.  Weights are redrawn after initialisation for the same reason.

The models have two to four layers and a vocabulary of about sixty words, so building, saving and booting all of them
takes seconds, needs no network, and can be done in float64.

``FAMILIES``
    name -> function returning a configuration; the canonical transformer has to match these.
``UNSUPPORTED``
    the same, for models it has to refuse with a clear message rather than compute wrongly.
``save_family``
    writes one of them, with a tokenizer, to a folder that ``TransformerBridge.boot_transformers`` loads offline.
``boot_family``
    the two steps together, quietly.
``true_float64``
    lets a Hugging Face forward pass really run in float64.
"""

from __future__ import annotations

import contextlib
import string
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

N_VOCAB = 64
N_CTX = 64
# Special ids are the first four; the words fill the rest of the vocabulary (see ``word_tokenizer``).
PAD, BOS, EOS, UNK = 0, 1, 2, 3

_SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_COMMON = {"vocab_size": N_VOCAB, **_SPECIAL_IDS}


def _rope(theta: float, **more) -> dict:
    """Rotary parameters in the form transformers 5 keeps them; the base is never its default of 10000."""
    return {"rope_type": "default", "rope_theta": theta, **more}


# ------------------------------------------------------------------------------------------------ learned positions


def _gpt2(**more) -> PretrainedConfig:
    # n_inner is not 4 * n_embd, so nothing may assume the usual ratio.
    return transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_inner=80, n_positions=N_CTX, layer_norm_epsilon=3e-4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **{**_COMMON, **more},
    )  # fmt: skip


def _gpt2_scaled() -> PretrainedConfig:
    # As in the GPT-2s of the Mistral project (stanford-crfm): layer i divides its scores by a further i + 1.  Untied,
    # to see an unembedding that is not the embedding.  Those models also set reorder_and_upcast_attn, which only
    # changes rounding and is left out here because its code insists on float32 scores, so it has no float64 oracle.
    return _gpt2(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)


def _gpt_neo() -> PretrainedConfig:
    # Scores are not divided by sqrt(d_head); every second layer sees only the last four positions.
    return transformers.GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, intermediate_size=80, max_position_embeddings=N_CTX,
        attention_types=[[["global", "local"], 2]], window_size=4, layer_norm_epsilon=3e-4, **_COMMON,
    )  # fmt: skip


def _opt(**more) -> PretrainedConfig:
    settings = {"do_layer_norm_before": True, "word_embed_proj_dim": 32, **more}
    return transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=80, max_position_embeddings=N_CTX,
        dropout=0.0, activation_function="relu", **_COMMON, **settings,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ rotary, LayerNorm, biases


def _pythia(parallel: bool = True) -> PretrainedConfig:
    # Three heads of sixteen: a quarter of the width rotated is two frequencies, not one.
    width, heads, share = (48, 3, 0.25) if parallel else (32, 4, 0.5)
    return transformers.GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=3, num_attention_heads=heads, intermediate_size=80,
        max_position_embeddings=N_CTX, use_parallel_residual=parallel, layer_norm_eps=3e-4,
        rope_parameters=_rope(500.0, partial_rotary_factor=share), **_COMMON,
    )  # fmt: skip


def _gptj() -> PretrainedConfig:
    # Parallel with one shared norm; rotates adjacent pairs (0,1), (2,3) of the first rotary_dim entries of each head.
    return transformers.GPTJConfig(
        n_embd=48, n_layer=3, n_head=4, n_inner=80, n_positions=N_CTX, rotary_dim=8, layer_norm_epsilon=3e-4,
        tie_word_embeddings=False, **_COMMON,
    )  # fmt: skip


def _phi() -> PretrainedConfig:
    # Parallel with one shared norm, biases everywhere including the unembedding, half of each head rotated.
    return transformers.PhiConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, qk_layernorm=False,
        max_position_embeddings=N_CTX, layer_norm_eps=3e-4,
        rope_parameters=_rope(500.0, partial_rotary_factor=0.5), **_COMMON,
    )  # fmt: skip


def _starcoder2() -> PretrainedConfig:
    # LayerNorm with biases, plain MLP, one shared key/value head, and a window on every layer.
    return transformers.Starcoder2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, intermediate_size=80,
        max_position_embeddings=N_CTX, norm_epsilon=3e-4, use_bias=True, sliding_window=5,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _stablelm() -> PretrainedConfig:
    # LayerNorm with a gated MLP, partial rotary and grouped keys.
    return transformers.StableLmConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        max_position_embeddings=N_CTX, layer_norm_eps=3e-4, use_qkv_bias=True,
        rope_parameters=_rope(500.0, partial_rotary_factor=0.25), **_COMMON,
    )  # fmt: skip


def _falcon() -> PretrainedConfig:
    # One key/value head inside a fused projection: four query heads, then the key, then the value.
    return transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True, parallel_attn=True, bias=True,
        new_decoder_architecture=False, alibi=False, ffn_hidden_size=80, max_position_embeddings=N_CTX,
        layer_norm_epsilon=3e-4, rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- rotary and RMSNorm


def _llama(**more) -> PretrainedConfig:
    # head_dim 12 where d_model / n_heads is 8: the attention is wider than the residual stream.
    settings = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12,
        "intermediate_size": 80, "max_position_embeddings": N_CTX, "rms_norm_eps": 3e-4,
        "rope_parameters": _rope(500.0), **_COMMON, **more,
    }  # fmt: skip
    return transformers.LlamaConfig(**settings)


def _llama3() -> PretrainedConfig:
    # Six frequencies.  With 32 as the original context their wavelengths (6.3, 29, 135, ...) fall one in each regime
    # of the llama3 rule: untouched, interpolated, and divided by the factor.
    return _llama(
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    )  # fmt: skip


def _mistral() -> PretrainedConfig:
    return transformers.MistralConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, max_position_embeddings=N_CTX, rms_norm_eps=3e-4, sliding_window=4,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _qwen2() -> PretrainedConfig:
    return transformers.Qwen2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        max_position_embeddings=N_CTX, rms_norm_eps=3e-4, tie_word_embeddings=True,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _qwen3() -> PretrainedConfig:
    # Per-head RMSNorm on queries and keys before the rotation.
    return transformers.Qwen3Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, max_position_embeddings=N_CTX, rms_norm_eps=3e-4, attention_bias=True,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _gemma() -> PretrainedConfig:
    return transformers.GemmaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
        intermediate_size=80, max_position_embeddings=N_CTX, rms_norm_eps=3e-4,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _gemma2() -> PretrainedConfig:
    # Scores and logits of these models have a spread of a few units, so caps of 5 and 3 bend them.
    return transformers.Gemma2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, max_position_embeddings=N_CTX, rms_norm_eps=3e-4, query_pre_attn_scalar=20,
        sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _gemma3() -> PretrainedConfig:
    # Two rotary embeddings, chosen by the layer's type: unscaled with a small base for the windowed layers, and
    # stretched by eight with a larger base for the full ones.
    return transformers.Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, max_position_embeddings=N_CTX, rms_norm_eps=3e-4, query_pre_attn_scalar=20,
        sliding_window=4, layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": _rope(100.0),
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        },
        **_COMMON,
    )  # fmt: skip


def _olmo() -> PretrainedConfig:
    # A LayerNorm with no parameters at all, and an eps fixed in the code.  Clipping of q, k, v is left off.
    return transformers.OlmoConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        max_position_embeddings=N_CTX, clip_qkv=None, rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


def _olmo2() -> PretrainedConfig:
    # No norm before a sublayer, one after; queries and keys normed over their whole width, before the head split.
    return transformers.Olmo2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        max_position_embeddings=N_CTX, rms_norm_eps=3e-4, rope_parameters=_rope(500.0), **_COMMON,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": _gpt2,
    "gpt2-scaled": _gpt2_scaled,
    "gpt_neo": _gpt_neo,
    "pythia": _pythia,
    "neox-sequential": lambda: _pythia(parallel=False),
    "gptj": _gptj,
    "opt": _opt,
    "llama": _llama,
    "llama3": _llama3,
    "llama-bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-relu2": lambda: _llama(hidden_act="relu2"),
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "falcon": _falcon,
    "olmo": _olmo,
    "olmo2": _olmo2,
}

# --------------------------------------------------------------------------------------- models that must be refused


def _mixtral() -> PretrainedConfig:
    return transformers.MixtralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=N_CTX, **_COMMON,
    )  # fmt: skip


def _mamba() -> PretrainedConfig:
    return transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **_COMMON)


def _t5() -> PretrainedConfig:
    return transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=PAD,
        **_COMMON,
    )  # fmt: skip


def _bert() -> PretrainedConfig:
    return transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=N_CTX, **_COMMON,
    )  # fmt: skip


def _bloom() -> PretrainedConfig:
    return transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_COMMON)


UNSUPPORTED: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": _mixtral,  # mixture of experts
    "mamba": _mamba,  # no attention
    "t5": _t5,  # encoder and decoder
    "bert": _bert,  # bidirectional
    # opt-350m normalises after each sublayer and projects narrower embeddings up; either alone has to be refused.
    "opt-350m": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-postnorm": lambda: _opt(do_layer_norm_before=False),
    "bloom": _bloom,  # ALiBi
}

_AUTO_CLASSES = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModelForMaskedLM}

# ------------------------------------------------------------------------------------------------- building and saving


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Redraw every parameter in place so that none has a value that would hide a mistake.

    Matrices get entries of size ``fan_in ** -0.5``, which keeps activations, scores and logits of order one.  Norm
    weights keep their centre (one, or zero for Gemma's ``1 + w``) and get a spread; biases get a spread around zero.
    Everything is drawn in float64 whatever the model's dtype: one seed gives the same model at every precision, up to
    rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    conv1d = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}  # stored [in, out]
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                parameter.copy_(parameter.double() + 0.3 * noise)
            elif id(parameter) in embeddings:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[0] if id(parameter) in conv1d else parameter.shape[-1]
                parameter.copy_(1.2 * fan_in**-0.5 * noise)
    return model


def build_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The Hugging Face model of a family (supported or not), in evaluation mode and with eager attention."""
    config = {**FAMILIES, **UNSUPPORTED}[name]()
    auto = _AUTO_CLASSES.get(name, transformers.AutoModelForCausalLM)
    # Initialisation draws from the global generator; forking keeps the caller's random state as it was.
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation="eager", dtype=dtype)
    return randomise(model, seed).eval()


def word_tokenizer(n_vocab: int = N_VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words whose decoding concatenates, as with the byte-level tokenizers of real models.

    Half of the words begin with a space (``" w0"``) and half do not (``"w0"``), so text round-trips whether or not it
    begins with a space and there are ids for every row of the embedding.
    """
    half = (n_vocab - 4 + 1) // 2
    words = [f" w{i}" for i in range(half)] + [f"w{i}" for i in range(n_vocab - 4 - half)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of the letters, the digits and some letters with a space before them; 64 ids."""
    space = "\u0120"  # how byte-level tokenizers write a space
    letters = string.ascii_lowercase
    merges = [(space, letter) for letter in letters[-23:]]
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", space, *string.digits, *letters, *("".join(m) for m in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=N_CTX,
    )  # fmt: skip


def save_family(name: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the family ``name`` and a tokenizer to ``folder`` and return it.

    The folder can be booted without a network: a path that exists is never looked up on the hub.

    "qwen2" gets a different tokenizer because transformers insists on its own ``Qwen2Tokenizer`` for that model type,
    whatever the folder says, and reads only a byte-pair vocabulary out of the file; a word-level one comes out empty.
    """
    folder = Path(folder)
    model = build_family(name, dtype, seed)
    with quiet():
        model.save_pretrained(folder)
        tokenizer = letter_tokenizer() if name == "qwen2" else word_tokenizer(model.config.vocab_size)
        tokenizer.save_pretrained(folder)
    return folder


def boot_family(name: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Save a family to ``folder`` and boot a ``TransformerBridge`` from there, with nothing printed."""
    from transformer_lens.model_bridge import TransformerBridge

    save_family(name, folder, dtype, seed)
    with quiet():
        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block, and put its settings back afterwards."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# ------------------------------------------------------------------------------------------------------ float64 oracle


class true_float64(TorchFunctionMode):
    """Context in which code that asks torch for float32 gets float64.

    Hugging Face models compute norms, softmax and rotary angles in float32 *explicitly* (``x.to(torch.float32)``,
    ``x.float()``, ``softmax(..., dtype=torch.float32)``).  In half precision that is an upcast; in a float64 model it
    throws away nine digits, and agreement with any other implementation stops at about 1e-6.  A mistake of that size
    (a wrong eps, a frequency rounded in another order) cannot then be told from rounding.  Within this context such
    requests mean float64, so a float64 oracle is one throughout:

        with torch.no_grad(), true_float64():
            logits = bridge(tokens)

    It is a function mode, not a patch: torch itself is untouched and the effect ends with the block (and is confined
    to the thread).  It is for float64 models only: in a float32 one, activations would become float64 and then meet
    float32 weights.

    What it cannot undo is rounding that happened when the model was built.  Rotary frequencies (the ``inv_freq``
    buffers) stay float32 in a model booted as float64, and GPT-J's table of sines and cosines holds float32 values
    although its dtype says float64.  Code to be compared must read *those values* from the model and upcast them;
    recomputing the powers in float64 gives numbers that differ by 1e-7.  The angles, on the other hand, are
    multiplied out during the forward pass and so are exact here.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
