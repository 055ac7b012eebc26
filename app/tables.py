"""Small tables and choosers that pages share: probabilities of tokens, answers, which pair."""

import re

import pandas as pd
import streamlit as st

from app.behaviour import OWN, Behaviour
from app.charts import visible


def pair_chooser(place, behaviour: Behaviour) -> int:
    """Which of the pairs to look at; the same on every page that asks."""
    n = 1 if behaviour.task == OWN else behaviour.n
    # numbers of a larger behaviour may be left over
    if st.session_state.get("pair", 0) not in range(n):
        st.session_state["pair"] = 0
    return place.selectbox(
        "Pair", range(n), key="pair", bind="query-params", help="Which of the behaviour's prompt pairs"
    )


def token_table(table: pd.DataFrame, *, key: str) -> None:
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
    st.dataframe(shown, hide_index=True, width="stretch", key=key, column_config=columns)


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
