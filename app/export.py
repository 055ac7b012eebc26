"""Taking things home: a figure as a page that opens offline, its data, and a notebook that makes it again."""

import io

import pandas as pd
import streamlit as st
import xarray as xr

from app.behaviour import Behaviour
from interp import plots


def figure_and_data(shown: xr.DataArray, whole: xr.DataArray, *, name: str) -> None:
    """Buttons: the shown map as HTML, the whole result (per prompt) as CSV and parquet."""
    row = st.container(horizontal=True)
    row.download_button("Figure (HTML)", lambda: plots.heatmap(shown).to_html(include_plotlyjs=True).encode(), f"{name}.html",
                        "text/html", key=f"{name}_html", on_click="ignore")  # fmt: skip
    row.download_button("Data (CSV)", lambda: table_of(whole).to_csv(index=False).encode(), f"{name}.csv", "text/csv",
                        key=f"{name}_csv", on_click="ignore")  # fmt: skip
    row.download_button("Data (parquet)", lambda: _parquet(table_of(whole)), f"{name}.parquet", key=f"{name}_parquet",
                        on_click="ignore")  # fmt: skip


def table(rows: pd.DataFrame, *, name: str, label: str = "Table") -> None:
    """Buttons: these rows as CSV and parquet, in the container that is open."""
    files = (("CSV", lambda: rows.to_csv(index=False).encode(), "text/csv"), ("parquet", lambda: _parquet(rows), None))
    for kind, content, mime in files:
        st.download_button(f"{label} ({kind})", content, f"{name}.{kind.lower()}", mime, key=f"{name}_{kind.lower()}",
                           on_click="ignore", icon=":material/download:")  # fmt: skip


def table_of(array: xr.DataArray):
    """A row for each number that is there."""
    return array.rename("effect").to_dataframe().reset_index().dropna(subset="effect")


def _parquet(table) -> bytes:
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    return content.getvalue()


def notebook(behaviour: Behaviour, code: str, *, extra: str = "") -> None:
    """A button: a notebook (jupytext percent) that loads the same model and pairs and makes the same result."""
    text = "# %%\n" + behaviour.code() + (extra + "\n" if extra else "") + "\n# %%\n" + code + "\n"
    st.download_button(
        "Notebook (.py)", text.encode(), "interp_notebook.py", "text/x-python", key="notebook", on_click="ignore"
    )
