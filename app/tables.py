"""Small tables and choosers that pages share: probabilities of tokens, answers, which pair."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

from app.behaviour import OWN, Behaviour
from app.charts import visible
from interp.plots import axis_labels


def pair_chooser(place, behaviour: Behaviour) -> int:
    """Which of the pairs to look at; the same on every page that asks."""
    n = 1 if behaviour.task == OWN else behaviour.n
    # numbers of a larger behaviour may be left over
    if st.session_state.get("pair", 0) not in range(n):
        st.session_state["pair"] = 0
    return place.selectbox(
        "Pair", range(n), key="pair", bind="query-params", help="Which of the behaviour's prompt pairs"
    )


def cell_chooser(
    array: xr.DataArray, chosen: tuple[int, int] | None, *, key: str, take: Callable[[int, int], None]
) -> None:
    """Menus of a map's rows and columns: what a click on a cell does, for readers without a mouse.

    chosen: (row, column) that is selected. take: called with the new ones; the one not chosen yet is the last.
    """
    for axis, (field, column) in enumerate(zip(("row", "column"), st.columns(2), strict=True)):
        name, labels = str(array.dims[axis]), axis_labels(array, array.dims[axis])
        if chosen is not None:  # a click on the map, or an address, moves the menus too
            st.session_state[f"{key}_{field}"] = chosen[axis]
        elif (st.session_state.get(f"{key}_{field}") or 0) >= len(labels):
            st.session_state[f"{key}_{field}"] = None  # of a longer map
        column.selectbox(
            f"{name.capitalize()} of the cell", range(len(labels)), index=None, format_func=labels.__getitem__,
            key=f"{key}_{field}", on_change=_take_cell, args=(array, key, take), placeholder="or click the map",
        )  # fmt: skip


def _take_cell(array: xr.DataArray, key: str, take: Callable[[int, int], None]) -> None:
    """Callback of the menus."""
    said = [st.session_state.get(f"{key}_{field}") for field in ("row", "column")]
    y, x = (n - 1 if at is None else at for at, n in zip(said, array.shape, strict=True))
    if np.isfinite(array.values[y, x]):
        take(y, x)
    else:
        st.toast("The map has no such cell.", icon=":material/grid_off:")


def token_table(table: pd.DataFrame, *, key: str, alt: str = "Likeliest tokens and their probabilities") -> None:
    """Tokens with their probabilities; spaces drawn, answers marked by a sign and a word."""
    shown = table.assign(token=[visible(t) for t in table.token])
    marks = {"answer": "✓ answer", "wrong answer": "✗ wrong", "": ""}
    shown["role"] = [marks[r] for r in table.role]
    shares = [c for c in shown if c not in ("token", "role", "rank")]
    columns = {c: st.column_config.NumberColumn(c, format="percent") for c in shares}
    columns |= {
        "role": st.column_config.TextColumn("", width="small"),
        "token": st.column_config.TextColumn(width="small"),
    }
    st.dataframe(shown, hide_index=True, width="stretch", key=key, column_config=columns, alt=alt)


def answers_text(tokens: dict[str, list[str]]) -> str:
    """`Answer: ␣Mary; wrong: ␣John.` as markdown code, which shows a token as it is."""
    listed = {name: " ".join(code(t) for t in tokens[name][:6]) + (" …" if len(tokens[name]) > 6 else "")
              for name in ("answers", "wrong")}  # fmt: skip
    return f"Answer: {listed['answers']}" + (f"; wrong: {listed['wrong']}." if tokens["wrong"] else ".")


def code(token: str) -> str:
    """A token as inline code of markdown, whatever is in it."""
    text = visible(token)
    # the fence is longer than any run of backticks inside, as markdown wants it
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
