"""What the first reader would otherwise wait for: the imports, the bundled model, the worked example, made before anyone asks.

Importing torch, transformers and TransformerLens takes several seconds, and the first page some more. `app.serve` calls this
once the caches are there and before the server answers, so that a reader meets a page that is ready. Calls inside a cached
function draw no spinner, and so need no page to draw it on.
"""

import threading
from collections.abc import Callable, Iterator

import streamlit as st

from app import cards, circuits, compute, dictionaries, export, looking, sidebar, steered, tables  # noqa: F401 - what pages import
from app.behaviour import Behaviour
from app.locked import locked_model
from interp.errors import InterpError
from interp.rules import RULES
from interp.steering.changes import PLACES


@st.cache_resource(show_spinner=False, max_entries=1)
def warm(asked: Behaviour) -> str | None:
    """Compute what the page Prompt shows of a behaviour at its defaults, into the caches that it reads.

    Returns None, or in one sentence why it could not: the page will say the same to its reader.
    """
    try:
        cfg = locked_model(asked.model).cfg
        pair = looking.pair(asked, 0)
        metric = looking.metric_names(bool(pair["wrong"]))[0]
        looking.lens(asked, "clean", metric)
        looking.lens_tokens(asked, 0, "clean")
        looking.next_tokens(asked, 0)
        looking.decoded(asked, 0, "clean", cfg.n_layers, len(pair["clean"]) - 1)
        looking.patterns(asked, 0, "clean", 0)
    except InterpError as error:
        return str(error)
    return None


def other_pages(asked: Behaviour) -> Iterator[Callable[[], object]]:
    """What the other pages show of a behaviour at their defaults, each a step that takes a second or so."""
    metric = looking.metric_names(bool(looking.pair(asked, 0)["wrong"]))[0]
    yield lambda: looking.flops(asked, "resid_pre")
    yield lambda: looking.exact_map(asked, "resid_pre", metric, "denoise")
    scored = (asked, circuits.METHODS[0], next(iter(RULES)), "logit_diff")
    yield lambda: circuits.mean_scores(*scored)
    yield lambda: circuits.measured(*scored, 0.95, (), circuits.QUICK_ABLATIONS[0])
    source = dictionaries.sources(asked.model)[0]
    yield lambda: dictionaries.prompt_texts(asked)
    yield lambda: dictionaries.latent_table(asked, 0, source, 100)
    yield lambda: _first_latent(asked, source)
    yield lambda: dictionaries.neuron_table(asked.model, "down", dictionaries.layer_choices(asked.model)[0])
    yield lambda: _first_neuron(asked)
    layer = locked_model(asked.model).cfg.n_layers // 2
    recipe = steered.Recipe("two texts", layer=layer, positive=steered.POSITIVE, negative=steered.NEGATIVE)
    yield lambda: steered.length(asked.model, recipe)
    yield lambda: steered.promoted(asked.model, recipe)
    yield lambda: steered.strengths(asked.model, recipe, steered.PROMPT, steered.TARGET, PLACES[0])


def _first_latent(asked: Behaviour, source: str) -> None:
    """The card that the page Features opens with."""
    table = dictionaries.latent_table(asked, 0, source, 100)
    latent = int(table.sort_values("prompt", ascending=False, kind="stable")["latent"].iloc[0])
    dictionaries.contexts_of(asked.model, source, 100, latent)
    dictionaries.effects(asked.model, source, latent)


def _first_neuron(asked: Behaviour) -> None:
    """The card that the page Neurons opens with."""
    first = dictionaries.neuron_table(asked.model, "down", dictionaries.layer_choices(asked.model)[0]).iloc[0]
    layer, neuron = int(first["layer"]), int(first["neuron"])
    dictionaries.neuron_tokens(asked.model, layer, neuron)
    dictionaries.neuron_on_prompt(asked, 0, layer, neuron)
    dictionaries.neuron_contexts(asked.model, layer, neuron, 100)


@st.cache_resource(show_spinner=False, max_entries=1)
def warm_others(asked: Behaviour, _over: threading.Event) -> str | None:
    """Compute `other_pages` beside the first reader, until it is over; returns what `warm` does."""
    for step in other_pages(asked):
        if _over.is_set():
            return "the server ended first"
        try:
            step()
        except InterpError as error:
            return str(error)
    return None
