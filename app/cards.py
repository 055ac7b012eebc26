"""Parts that Features, Neurons and Steer share: which row was clicked, tokens as bars and tables, the way to Steer."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app.charts import visible
from app.selection import parse_cell, selection
from app.sidebar import behaviour
from app.steered import Recipe
from interp.plots import LOWERS, RAISES

HANDED = "handed_recipe"
_NEURON = re.compile(r"m(\d+)\.n(\d+)\Z")
_MARK = "background-color: rgba(255, 149, 0, 0.35)"  # seen in both themes, under text of either colour


def chosen_row(event: Any, ids: Sequence) -> Any | None:
    """The id of the row that a table's selection names, of those it shows now; None if none is, or it is of a longer table."""
    rows = (event or {}).get("selection", {}).get("rows", []) if hasattr(event, "get") else []
    return ids[rows[-1]] if rows and 0 <= rows[-1] < len(ids) else None


def latent_of(place: str | None, n_latents: int) -> int | None:
    """The latent that a place names, if there is one of that number."""
    cell = parse_cell(place)
    return cell.layer if cell is not None and cell.site == "latent" and cell.layer < n_latents else None


def neuron_of(place: str | None, n_layers: int, d_mlp: int) -> tuple[int, int] | None:
    """The (layer, neuron) that a place names, if the model has it."""
    match = _NEURON.match(place or "")
    found = match and (int(match[1]), int(match[2]))
    return found if found and found[0] < n_layers and found[1] < d_mlp else None


def token_bars(tokens: Sequence[str], values: np.ndarray, *, unit: str) -> dict[str, Any]:
    """An ECharts bar for each token of a prompt, blue above 0 and red below; every label is of its own position."""
    labels = [f"{i}:{visible(token)}" for i, token in enumerate(tokens)]
    data = [{"value": float(f"{value:.6g}"), "name": label, "itemStyle": {"color": RAISES if value > 0 else LOWERS}}
            for label, value in zip(labels, values.tolist(), strict=True)]  # fmt: skip
    return {
        "tooltip": {"formatter": "{b}: {c}"},
        "grid": {"left": 60, "right": 10, "top": 30, "bottom": 92, "outerBoundsMode": "none"},
        "xAxis": {"type": "category", "data": labels, "name": "position and token", "nameLocation": "middle", "nameGap": 72,
                  "axisLabel": {"rotate": 60, "interval": 0 if len(labels) <= 48 else "auto", "fontSize": 10}},
        "yAxis": {"type": "value", "name": unit, "nameTextStyle": {"align": "left"}},
        "series": [{"type": "bar", "data": data}], "animation": False, "aria": {"enabled": True},
    }  # fmt: skip


def context_table(table: pd.DataFrame, *, key: str, alt: str) -> None:
    """Contexts in lines of their own, the firing token marked and in the middle."""
    shown = table[["value", "before", "token", "after"]].copy()
    shown["token"] = shown["token"].map(visible)
    for column in ("before", "after"):  # running text: only ends of lines are drawn
        shown[column] = shown[column].str.replace("\n", "⏎")
    styled = shown.style.map(lambda _: _MARK, subset=["token"])
    columns = {
        "value": st.column_config.NumberColumn("activation", format="%.2f", width=80),
        "before": st.column_config.TextColumn("before", alignment="right"),
        "token": st.column_config.TextColumn("token", alignment="center"),
        "after": st.column_config.TextColumn("after"),
    }
    st.dataframe(styled, hide_index=True, column_config=columns, key=key, width="stretch", alt=alt)


def effect_tables(table: pd.DataFrame, *, key: str) -> None:
    """The promoted tokens beside the suppressed."""
    for column, side, title in zip(st.columns(2), ("top", "bottom"), ("promotes", "suppresses"), strict=True):
        part = table[table["side"] == side]
        shown = pd.DataFrame({title: part["token"].map(visible), "logits": part["value"]})
        column.dataframe(shown, hide_index=True, key=f"{key}_{side}", height=240, alt=f"Tokens that it {title}",
                         column_config={"logits": st.column_config.NumberColumn(format="%.3f")})  # fmt: skip


def prompt_choice(texts: Sequence[str], *, key: str) -> int:
    """A menu of the behaviour's prompts; the number of one."""
    places = list(range(len(texts)))
    return st.selectbox("Prompt", places, format_func=lambda i: f"{i}: {texts[i]}", key=key, bind="query-params",
                        help="The clean prompts of the behaviour in the sidebar")  # fmt: skip


def steer_button(recipe: Recipe, *, key: str) -> None:
    """A button that opens the page Steer with this vector."""
    if st.button("Steer with this", icon=":material/tune:", key=key, help="Opens the page Steer"):
        st.session_state[HANDED] = recipe
        # what is looked at stays in the address; without a word, Streamlit refuses to drop what this page's widgets put there
        st.switch_page("app_pages/steer.py", query_params=behaviour().to_query() | selection().to_query())
