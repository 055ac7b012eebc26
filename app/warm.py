"""What the first reader would otherwise wait for: the imports, the bundled model, the worked example, made before anyone asks.

Importing torch, transformers and TransformerLens takes several seconds, and the first page some more. `app.serve` calls this
once the caches are there and before the server answers, so that a reader meets a page that is ready. Calls inside a cached
function draw no spinner, and so need no page to draw it on.
"""

import streamlit as st

from app import export, looking, sidebar, tables  # noqa: F401 - what the page imports
from app.behaviour import Behaviour
from app.locked import locked_model
from interp.errors import InterpError


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
