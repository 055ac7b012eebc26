"""What the page Steer shows: a vector as a plain value, strengths that it needs, texts with and without it.

A `Recipe` says where a direction comes from, so that it can be a key of the cache, be handed from page to page, and be written
out as the code that makes it again. Locks are taken in the order that `app.dictionaries` explains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from app.behaviour import MAX_CHARACTERS
from app.compute import cached
from app.dictionaries import SNMF, SNMF_OPTIONS, SNMF_TEXTS, check_latent, dictionary
from app.locked import locked_model
from app.uploads import PREFIX
from interp import (
    SAE,
    diff_means,
    direction_effects,
    neuron_vector,
    sae_vector,
    side_by_side,
    snmf_vector,
    steering_scores,
)
from interp import steering_strength as search_strength
from interp.bundled import bundled_saes
from interp.errors import OptionError, TaskError, one_of
from interp.steering.changes import PLACES
from interp.steering.vectors import Vector

KINDS = ("two texts", "latent", "neuron")
UP, DOWN = "+", "−"
# what the page begins with
POSITIVE = ("She was tired because she was late.", "Alice said that she was glad.", "Emma went home and she was happy.")
NEGATIVE = ("He was tired because he was late.", "Tom said that he was glad.", "Paul went home and he was happy.")
PROMPT, TARGET = "The friends", 0.25
MAX_SAMPLES, MAX_TOKENS, MAX_EXAMPLES = 8, 60, 64


@dataclass(frozen=True)
class Recipe:
    """Where a steering vector comes from: the difference of "two texts" at a layer's end, a dictionary's "latent", a "neuron".

    layer, positive, negative: of two texts, lines of them; source, index: of a latent; layer, index: of a neuron.
    """

    kind: str
    layer: int = 0
    index: int = 0
    source: str = ""
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    def checked(self) -> "Recipe":
        """The same, or an error of `interp.errors` naming what is wrong."""
        one_of(self.kind, KINDS, "kind of vector")
        if self.kind == "two texts":
            for side, texts in (("positive", self.positive), ("negative", self.negative)):
                if not texts:
                    raise TaskError(f"type at least one {side} text")
                if len(texts) > MAX_EXAMPLES or max(map(len, texts)) > MAX_CHARACTERS:
                    raise TaskError(
                        f"the dashboard takes {MAX_EXAMPLES} {side} texts of {MAX_CHARACTERS:,} characters at most"
                    )
        return self

    def make(self, model: str) -> Vector:
        """The vector. Takes the model's lock."""
        self.checked()
        found = dictionary(model, self.source) if self.kind == "latent" else None
        if found is not None:
            check_latent(model, self.source, self.index)
            return sae_vector(found, self.index) if isinstance(found, SAE) else snmf_vector(found, self.index)
        with locked_model(model).use() as running:
            if self.kind == "neuron":
                _check_neuron(running.cfg, self.layer, self.index)
                return neuron_vector(running, self.layer, self.index)
            return diff_means(running, f"blocks.{self.layer}.hook_resid_post", self.positive, self.negative)

    def code(self) -> tuple[str, ...]:
        """Lines of Python that make `vector` with `model`."""
        if self.kind == "two texts":
            sides = f"{list(self.positive)!r}, {list(self.negative)!r}"
            return (f'vector = interp.diff_means(model, "blocks.{self.layer}.hook_resid_post", {sides})',)
        if self.kind == "neuron":
            return (f"vector = interp.neuron_vector(model, {self.layer}, {self.index})",)
        return (*dictionary_code(self.source), f"vector = interp.{'snmf' if self.source.startswith(SNMF) else 'sae'}_vector("
                f"dictionary, {self.index})")  # fmt: skip


def dictionary_code(source: str) -> tuple[str, ...]:
    """Lines of Python that make `dictionary` with `model`."""
    if source.startswith(PREFIX):
        return ('dictionary = interp.load_sae("FOLDER", model)  # FOLDER: where the two uploaded files lie',)
    if not source.startswith(SNMF):
        folder = f"interp.bundled_saes()[{source!r}]" if source in bundled_saes() else repr(source)
        return (f"dictionary = interp.load_sae({folder}, model)",)
    options = ", ".join(f"{name}={value!r}" for name, value in SNMF_OPTIONS.items())
    return (
        "from interp.bundled import bundled_text", "from interp.features.sources import read_texts", "",
        f"corpus = interp.Corpus.from_texts(model, read_texts(bundled_text())[:{SNMF_TEXTS}])",
        f'dictionary = interp.fit_snmf(model, corpus, "blocks.{int(source.removeprefix(SNMF))}.mlp.hook_post", {options})',
    )  # fmt: skip


def _check_neuron(cfg, layer: int, neuron: int) -> None:
    if not (0 <= layer < cfg.n_layers and 0 <= neuron < cfg.d_mlp):
        raise OptionError(f"{cfg.name} has layers 0 to {cfg.n_layers - 1} with neurons 0 to {cfg.d_mlp - 1}, "
                          f"not neuron {neuron} of layer {layer}")  # fmt: skip


@cached
def promoted(model: str, recipe: Recipe, k: int = 12) -> dict[str, int]:
    """The tokens that a vector promotes most by itself, strongest first: text and id."""
    vector = recipe.make(model)
    with locked_model(model).use() as running:
        table = direction_effects(running, vector.hook, vector.direction[None], k=k)
    top = table[table["side"] == "top"]
    return dict(zip(top["token"], top["token_id"].tolist(), strict=True))


@cached
def length(model: str, recipe: Recipe) -> tuple[str, float]:
    """(hook, length) of a vector."""
    vector = recipe.make(model)
    return vector.hook, float(vector.direction.norm())


@cached
def strengths(model: str, recipe: Recipe, prompt: str, target: float, positions: str) -> pd.DataFrame:
    """`interp.steering_strength` for one target: a row for each sign."""
    vector = recipe.make(model)
    _check(prompt, positions)
    with locked_model(model).use() as running:
        return search_strength(running, prompt, [vector], [target], positions=positions)


@cached
def texts(
    model: str, recipe: Recipe, prompt: str, strength: tuple[float | None, float | None], positions: str, n: int, new_tokens: int,
    temperature: float, seed: int, concept: tuple[int, ...],
) -> pd.DataFrame:  # fmt: skip
    """`interp.side_by_side`: unsteered, + and −, each at its own strength (None: left out)."""
    vector = recipe.make(model)
    _check(prompt, positions)
    if not (1 <= n <= MAX_SAMPLES and 1 <= new_tokens <= MAX_TOKENS):
        raise OptionError(
            f"the dashboard writes 1 to {MAX_SAMPLES} texts of 1 to {MAX_TOKENS} tokens, not {n} of {new_tokens}"
        )
    changes = {name: [vector.change(sign * alpha, positions=positions)]
               for name, sign, alpha in zip((UP, DOWN), (1, -1), strength, strict=True)
               if alpha is not None and math.isfinite(alpha)}  # fmt: skip
    with locked_model(model).use() as running:
        return side_by_side(running, prompt, changes, n=n, max_new_tokens=new_tokens, temperature=temperature, seed=seed,
                            concept_tokens=concept or None)  # fmt: skip


def scores(written: pd.DataFrame) -> pd.DataFrame:
    """Means over samples of `interp.steering_scores`, a row for each variant."""
    table = steering_scores(written)
    return table.groupby("name", sort=False)[["concept", "perplexity", "fluency", "final"]].mean().reset_index()


def code(
    recipe: Recipe, prompt: str, strength: tuple[float | None, float | None], target: float | None, positions: str, n: int,
    new_tokens: int, temperature: float, seed: int, concept: Sequence[int],
) -> str:  # fmt: skip
    """Lines of Python that make `written` and, with concept tokens, `scores`, once there are `interp` and `model`."""
    lines = [*recipe.code(), f"prompt = {prompt!r}"]
    if target is not None:
        lines += [
            f"strength = interp.steering_strength(model, prompt, [vector], [{target!r}], positions={positions!r})"
        ]
    changes = ", ".join(
        f"{name!r}: [vector.change({sign}{float(alpha)!r}, positions={positions!r})]"
        for name, sign, alpha in zip((UP, DOWN), ("", "-"), strength, strict=True)
        if alpha is not None and math.isfinite(alpha)
    )
    options = f"n={n}, max_new_tokens={new_tokens}, temperature={temperature!r}, seed={seed}"
    if concept:
        options += f", concept_tokens={list(concept)!r}"
    lines.append(f"written = interp.side_by_side(model, prompt, {{{changes}}}, {options})")
    return "\n".join([*lines, "interp.steering_scores(written)" if concept else "written"])


def _check(prompt: str, positions: str) -> None:
    one_of(positions, PLACES, "choice of positions")
    if not prompt:
        raise TaskError("type a prompt for the texts to begin with")
    if len(prompt) > MAX_CHARACTERS:
        raise TaskError(f"the prompt has {len(prompt):,} characters, and the dashboard takes {MAX_CHARACTERS:,}")


@cached
def token_ids(model: str, texts: tuple[str, ...]) -> list[int]:
    """Ids of texts that are one token each in running text; `TaskError` names one that is not."""
    with locked_model(model).use() as running:
        try:
            return [running.to_single_token(text) for text in texts]
        except ValueError as error:
            raise TaskError(str(error)) from None
