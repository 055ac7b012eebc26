"""Results that pages show, computed once for what they depend on: functions of plain values that hold the model's lock.

Streamlit keeps what these return (at most 500 MiB of each, copies for every reader), so coming back to a page or to an older
behaviour is instant. What takes longer than a few seconds is a job instead (`app.jobs`).
"""

from collections.abc import Callable
from functools import wraps

import streamlit as st

from app.behaviour import Behaviour
from app.locked import locked_model
from interp.errors import InterpError


def cached(function: Callable) -> Callable:
    """`st.cache_data` with our limits. Arguments must be plain values: they are the key."""
    return wraps(function)(st.cache_data(max_size="500MiB", show_spinner="Computing")(function))


@cached
def tokens(behaviour: Behaviour) -> dict[str, list]:
    """Token texts of the pairs: {"clean": [[text]], "corrupt": [[text]], "answers": [text], "wrong": [text]}."""
    with locked_model(behaviour.model).use() as model:
        pairs = behaviour.pairs(model)
        texts = {
            side: [model.to_str_tokens(row[:n]) for row, n in zip(pairs.tokens(side), pairs.lengths.tolist(), strict=True)]
            for side in ("clean", "corrupt")
        }  # fmt: skip
        answers = {"answers": pairs.answers, "wrong": pairs.wrong_answers}
        return texts | {k: [] if ids is None else model.to_str_tokens(ids[:, 0]) for k, ids in answers.items()}


def attempt(function: Callable, *args, **kwargs):
    """What the function returns; on an error that the reader can mend, one sentence in its place, and the page ends there."""
    from app.sidebar import stop

    try:
        return function(*args, **kwargs)
    except InterpError as error:
        stop(error)
