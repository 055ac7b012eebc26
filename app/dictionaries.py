"""What the pages Features and Neurons show: dictionaries of latents, neurons as tokens, contexts, clamps; each computed once.

A dictionary is named by a plain text: a bundled SAE ("mini-gpt2/resid_post2"), a folder with an SAE below those that the
dashboard was started with, an upload (`app.uploads`), or "snmf/2": semi-NMF of layer 2's neurons, fitted here on a little text.

Order of locks: what is cached is asked for before the model's lock is taken, never while it is held. Streamlit lets one session
compute a value while others wait for it: one that held the model and waited for a value that waits for the model would never end.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st
import torch
from jaxtyping import Float
from torch import Tensor

from app import uploads
from app.behaviour import Behaviour
from app.charts import visible
from app.compute import cached
from app.locked import folders, locked_model
from interp import (
    SAE,
    Corpus,
    bundled_saes,
    clamp_effect,
    clamp_test,
    decode_neurons,
    direction_effects,
    find_neurons,
    fit_snmf,
    load_sae,
    logit_effects,
    top_contexts,
)
from interp.bundled import bundled_text
from interp.errors import LoadError, OptionError, TaskError, one_of
from interp.features.codes import Codes, Dictionary
from interp.features.sources import ModelSource, read_texts
from interp.features.zf import zf_points
from interp.model.run import record
from interp.neurons.clamp import ClampTest, check_neuron, hook_name

SNMF = "snmf/"
SNMF_OPTIONS = {"n_features": 24, "share": 0.02, "n_init": 2, "max_iter": 30, "seed": 0}
SNMF_TEXTS, ZF_TEXTS = 60, 60
TEXTS = (50, 100, 200, 500)  # of the bundled text, to look for contexts in
N_CONTEXTS, WINDOW = 8, (10, 5)
MAX_NEURONS = 10_000  # that are decoded at once: of a larger model, a layer at a time


# ---------------------------------------------------------------------------------------------------------------- dictionaries


def sources(model: str) -> list[str]:
    """Names of the dictionaries of a model: its bundled SAEs, SAEs in configured folders, an SNMF of each layer."""
    own = [name for name in bundled_saes() if name.split("/")[0] == model]
    local = [str(path.parent) for folder in folders() for pattern in ("cfg.json", "*/cfg.json", "*/*/cfg.json")
             for path in sorted(folder.glob(pattern))]  # fmt: skip
    return [*own, *dict.fromkeys(local), *(f"{SNMF}{layer}" for layer in range(locked_model(model).cfg.n_layers))]


def offered(model: str) -> list[str]:
    """What this session may choose from: its uploads first."""
    return [*uploads.mine(model), *sources(model)]


def check_source(model: str, source: str) -> str:
    """The name, if it is a dictionary's that may be opened for this model; `LoadError` otherwise."""
    if uploads.folder_of(source) is not None:  # whether it fits the model, `load_sae` says
        return source
    return one_of(source, sources(model), f"dictionary of {model}", LoadError)


def describe(source: str) -> str:
    """What the menu calls a dictionary."""
    if source.startswith(uploads.PREFIX):
        return uploads.describe(source)
    return f"SNMF, layer {source.removeprefix(SNMF)}" if source.startswith(SNMF) else f"SAE {source}"


@st.cache_resource(max_entries=4, show_spinner="Reading the text")
def corpus(model: str, n_texts: int) -> Corpus:
    """The first texts of those that come with interp, as the model's tokens."""
    path = bundled_text()
    if path is None:
        raise LoadError("this installation has no bundled text to look for contexts in")
    if not 1 <= n_texts <= max(TEXTS):
        raise OptionError(f"the dashboard looks at 1 to {max(TEXTS)} texts, not {n_texts}")
    return Corpus.from_texts(locked_model(model), read_texts(path)[:n_texts], name=path.name)


@st.cache_resource(max_entries=8, show_spinner="Loading the dictionary")
def dictionary(model: str, source: str) -> Dictionary:
    """The SAE or SNMF of that name, shared by sessions and only read."""
    check_source(model, source)
    locked, bundled = locked_model(model), bundled_saes()
    if not source.startswith(SNMF):
        with locked.use() as running:
            return load_sae(uploads.folder_of(source) or bundled.get(source, source), running)
    text = corpus(model, SNMF_TEXTS)
    with locked.use() as running:
        return fit_snmf(running, text, f"blocks.{int(source.removeprefix(SNMF))}.mlp.hook_post", **SNMF_OPTIONS)


def check_latent(model: str, source: str, latent: int) -> int:
    """The latent, if the dictionary has it; `OptionError` otherwise."""
    n = dictionary(model, source).n_features
    if not 0 <= latent < n:
        raise OptionError(f"{describe(source)} has latents 0 to {n - 1}, not {latent}")
    return latent


@cached
def contexts(model: str, source: str, n_texts: int) -> pd.DataFrame:
    """The strongest contexts of every latent that fires, as `interp.top_contexts` gives them."""
    found, text = dictionary(model, source), corpus(model, n_texts)
    with locked_model(model).use() as running:
        return top_contexts(running, found, text, n=N_CONTEXTS, window=WINDOW)


@cached
def contexts_of(model: str, source: str, n_texts: int, latent: int) -> pd.DataFrame:
    """Those of one latent."""
    table = contexts(model, source, n_texts)
    return table[table["latent"] == check_latent(model, source, latent)].reset_index(drop=True)


@cached
def prompt_codes(behaviour: Behaviour, prompt: int, source: str) -> tuple[list[str], Float[np.ndarray, "token latent"]]:
    """(texts of a clean prompt's tokens, the code of each)."""
    found, locked = dictionary(behaviour.model, source), locked_model(behaviour.model)
    with locked.use() as running:
        ids = _prompt_ids(running, behaviour, prompt)
        x = record(running, ids[None], [found.hook])[found.hook][0].flatten(1)
        codes = found.codes(x.to(found.device, found.dtype)).dense()
        return running.to_str_tokens(ids), codes.float().cpu().numpy()


@cached
def latent_table(behaviour: Behaviour, prompt: int, source: str, n_texts: int) -> pd.DataFrame:
    """A row for each latent that fires in the text: latent, token and strongest (of its first context), density, prompt.

    prompt: its largest |activation| on the prompt, behind the first token.
    """
    best = contexts(behaviour.model, source, n_texts).query("rank == 0")
    codes = np.abs(prompt_codes(behaviour, prompt, source)[1])
    here = codes[min(1, len(codes) - 1) :].max(0)
    return pd.DataFrame({
        "latent": best["latent"], "token": best["token"].map(visible), "strongest": best["value"], "density": best["density"],
        "prompt": here[best["latent"].to_numpy()],
    }).reset_index(drop=True)  # fmt: skip


@cached
def effects(model: str, source: str, latent: int, k: int = 10) -> pd.DataFrame:
    """The k tokens that a latent promotes and the k that it suppresses most: side, rank, token, value."""
    found, latent = dictionary(model, source), check_latent(model, source, latent)
    with locked_model(model).use() as running:
        if isinstance(found, SAE):
            return logit_effects(running, found, [latent], k=k)
        return direction_effects(running, found.hook, found.components_[latent : latent + 1], k=k)


@cached
def zf(model: str, source: str) -> tuple[pd.DataFrame, int]:
    """(length of the code and of the activation at each token of some texts, channels of the activation). SAEs only."""
    found, text = dictionary(model, source), corpus(model, ZF_TEXTS)
    if not isinstance(found, SAE):
        raise OptionError("a ZF plot compares an SAE's code with its activation, and this is an SNMF: choose an SAE")
    hooks = [found.hook, *([found.config.target_hook] if found.config.target_hook else [])]
    with locked_model(model).use() as running:
        rows = ModelSource(running, text, hooks).read(range(len(text.tokens))).values
    target = rows[hooks[1]] if len(hooks) > 1 else None
    return zf_points(found, rows[hooks[0]], target), found.config.out


# --------------------------------------------------------------------------------------------------------------------- neurons


def matrices(model: str) -> tuple[str, ...]:
    """Names of the weights that a neuron of this model has."""
    return ("up", "gate", "down") if locked_model(model).cfg.gated else ("up", "down")


def layer_choices(model: str) -> list[int | None]:
    """Layers that may be decoded at once: None is all of them, for models that are small enough."""
    cfg = locked_model(model).cfg
    return [*([None] if cfg.n_layers * cfg.d_mlp <= MAX_NEURONS else []), *range(cfg.n_layers)]


@cached
def decoded(model: str, layer: int | None, k: int = 8) -> pd.DataFrame:
    """`interp.decode_neurons` of all weights of the layer's neurons, with kurtosis."""
    if layer not in layer_choices(model):
        what = "so many neurons at once: choose a layer" if layer is None else f"layer {layer}"
        raise OptionError(f"the dashboard cannot decode {what} of {model}")
    with locked_model(model).use() as running:
        layers = None if layer is None else [layer]
        return decode_neurons(running, matrix=matrices(model), layers=layers, k=k, kurtosis=True)


@cached
def neuron_table(model: str, matrix: str, layer: int | None) -> pd.DataFrame:
    """A row for each neuron: layer, neuron, kurtosis, its first tokens at either pole; highest kurtosis first."""
    one_of(matrix, matrices(model), f"matrix of {model}")
    table = decoded(model, layer)
    table = table[table["matrix"] == matrix]
    texts = table.assign(token=table["token"].astype(object).map(visible))
    keys = ["layer", "neuron"]
    lines = texts.groupby([*keys, "pole"], observed=True)["token"].agg("  ".join).unstack("pole")
    lines.insert(0, "kurtosis", table.groupby(keys)["kurtosis"].first())
    return lines.sort_values("kurtosis", ascending=False, kind="stable").reset_index()


@cached
def search(model: str, matrix: str, layer: int | None, token: str) -> pd.DataFrame:
    """Neurons that have a token among their first; raises what `interp.find_neurons` raises."""
    found = find_neurons(decoded(model, layer), token, matrix=matrix, k=None)
    return found[["layer", "neuron", "pole", "rank", "score", "kurtosis"]]


@cached
def neuron_tokens(model: str, layer: int, neuron: int, k: int = 10) -> pd.DataFrame:
    """The first tokens of each matrix and pole of one neuron."""
    with locked_model(model).use() as running:
        return decode_neurons(running, matrix=matrices(model), layers=[layer], neurons=[neuron], k=k, kurtosis=True)


@dataclass(frozen=True)
class _Poles:
    """One neuron as a dictionary of two latents, its activations above 0 and those below: contexts of both in one pass."""

    hook: str
    neuron: int
    device: torch.device
    dtype: torch.dtype
    n_features: int = 2

    def codes(self, x: Float[Tensor, "token neuron"]) -> Codes:
        both = x[:, self.neuron, None].expand(-1, 2)
        return Codes.where(torch.stack([both[:, 0] > 0, both[:, 1] < 0], 1), both)


@cached
def neuron_contexts(model: str, layer: int, neuron: int, n_texts: int) -> dict[str, pd.DataFrame]:
    """Where a neuron's activation is most positive ("+") and most negative ("-"): tables of `interp.top_contexts`."""
    text = corpus(model, n_texts)
    with locked_model(model).use() as running:
        check_neuron(running, (layer, neuron))
        poles = _Poles(f"blocks.{layer}.mlp.hook_post", neuron, running.device, running.dtype)
        table = top_contexts(running, poles, text, n=N_CONTEXTS, window=WINDOW)
    return {name: table[table["latent"] == i].reset_index(drop=True) for i, name in enumerate("+-")}


@cached
def neuron_on_prompt(
    behaviour: Behaviour, prompt: int, layer: int, neuron: int, site: str = "post"
) -> tuple[list[str], Float[np.ndarray, " token"]]:
    """(texts of a clean prompt's tokens, a neuron's value at each)."""
    with locked_model(behaviour.model).use() as running:
        check_neuron(running, (layer, neuron))
        ids, hook = _prompt_ids(running, behaviour, prompt), hook_name(running, layer, site)
        values = record(running, ids[None], [hook])[hook][0, :, neuron]
        return running.to_str_tokens(ids), values.float().cpu().numpy()


@cached
def clamped(
    behaviour: Behaviour, prompt: int, layer: int, neuron: int, value: float, site: str = "post", k: int = 10
) -> pd.DataFrame:
    """`interp.clamp_effect` on a clean prompt: token, before, after, difference."""
    text = prompt_texts(behaviour)[_in_range(prompt, behaviour)]
    with locked_model(behaviour.model).use() as running:
        found = clamp_effect(running, text, {(layer, neuron): value}, site=site, k=k)
        return found[["token", "before", "after", "difference"]]


@cached
def compared(
    behaviour: Behaviour, layer: int, neuron: int, sign: float, token: str, site: str = "post", controls: int = 20
) -> ClampTest:
    """`interp.clamp_test` of one neuron over all clean prompts of the behaviour."""
    texts = prompt_texts(behaviour)
    with locked_model(behaviour.model).use() as running:
        return clamp_test(running, texts, token, {(layer, neuron): sign}, site=site, controls=controls)


# --------------------------------------------------------------------------------------------------------------------- prompts


@cached
def prompt_texts(behaviour: Behaviour) -> list[str]:
    """The clean prompts as texts, without the model's own first token."""
    with locked_model(behaviour.model).use() as running:
        pairs = behaviour.pairs(running)
        return [_text(running, row[:n].tolist()) for row, n in zip(pairs.clean, pairs.lengths.tolist(), strict=True)]


def _text(running, ids: list[int]) -> str:
    first = running.tokenizer.bos_token_id if running.cfg.prepend_bos else None
    return running.tokenizer.decode(ids[1:] if ids[:1] == [first] else ids, clean_up_tokenization_spaces=False)


def _in_range(prompt: int, behaviour: Behaviour) -> int:
    n = len(prompt_texts(behaviour))
    if not 0 <= prompt < n:
        raise TaskError(f"the behaviour has prompts 0 to {n - 1}, not {prompt}")
    return prompt


def _prompt_ids(running, behaviour: Behaviour, prompt: int):
    pairs = behaviour.pairs(running)
    if not 0 <= prompt < len(pairs):
        raise TaskError(f"the behaviour has prompts 0 to {len(pairs) - 1}, not {prompt}")
    return pairs.clean[prompt, : int(pairs.lengths[prompt])]
