"""What the reader is looking at: one primary place, one pinned for reference, shared by all pages and copied to the address bar.

A place is a node id (`a3.h2`, `m5`, `m5.n17`, `input`, `logits`) or a cell of a map, written site@layer.unit@position with what
it has of these (`resid_pre@2@7`, `head@3.1`). `place_of` turns a click into one and gives None for a click that is out of date.
"""

import re
from dataclasses import dataclass, replace

import streamlit as st
import xarray as xr

KEY = "selection"
_CELL = re.compile(r"(?P<site>[a-z_]+)@(?P<layer>\d+)(?:\.(?P<unit>\d+))?(?:@(?P<position>\d+))?\Z")


@dataclass(frozen=True)
class Selection:
    """The primary place and the pinned one, if any."""

    primary: str | None = None
    pinned: str | None = None

    def to_query(self) -> dict[str, str]:
        return {k: v for k, v in (("at", self.primary), ("pin", self.pinned)) if v}


@dataclass(frozen=True)
class Cell:
    """A cell of a map."""

    site: str
    layer: int
    unit: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        unit = "" if self.unit is None else f".{self.unit}"
        position = "" if self.position is None else f"@{self.position}"
        return f"{self.site}@{self.layer}{unit}{position}"


def parse_cell(text: str | None) -> Cell | None:
    """The cell of that name; None if it is no cell's."""
    match = _CELL.match(text or "")
    if match is None:
        return None
    unit, position = (None if match[name] is None else int(match[name]) for name in ("unit", "position"))
    return Cell(match["site"], int(match["layer"]), unit, position)


def selection() -> Selection:
    """This session's selection: that of the address when it opens."""
    if KEY not in st.session_state:
        query = st.query_params
        st.session_state[KEY] = Selection(query.get("at"), query.get("pin"))
    return st.session_state[KEY]


def select(place: str | None) -> None:
    """Make a place the primary one, here and in the address."""
    _store(replace(selection(), primary=place))


def pin(place: str | None) -> None:
    """Pin a place for reference, or none."""
    _store(replace(selection(), pinned=place))


def _store(new: Selection) -> None:
    st.session_state[KEY] = new
    for name, value in (("at", new.primary), ("pin", new.pinned)):
        if value:
            st.query_params[name] = value
        elif name in st.query_params:
            del st.query_params[name]


def clicked(event, kind: str = "main") -> list[int]:
    """Indices that an ECharts selection names: of cells ("main"), nodes ("node") or edges ("edge"); none where none is."""
    chosen = (event or {}).get("selection", {}).get("selected", []) if hasattr(event, "get") else []
    return [int(i) for part in chosen if part.get("data_type") == kind for i in part.get("data_indices", [])]


def place_of(event, array: xr.DataArray) -> str | None:
    """The cell of a two-dimensional map that was clicked, by the index that `charts.heatmap` gave it; None where there is none.

    array: [layer, position], [layer, head] or [node, position], as it is shown now: an index beyond it is of an older map.
    """
    from app.charts import cell_order

    found = clicked(event)
    order = cell_order(array)
    if not found or found[-1] >= len(order):
        return None
    return place_at(array, *order[found[-1]])


def place_at(array: xr.DataArray, y: int, x: int) -> str:
    """The name of the cell in row y and column x of a map."""
    site = array.attrs.get("site", "site")
    if array.dims[0] == "node":
        return str(array["node"].values[y])
    layer = int(array[array.dims[0]].values[y])
    value = int(array[array.dims[1]].values[x])
    return str(
        Cell(site, layer, unit=value) if array.dims[1] in ("head", "kv_head") else Cell(site, layer, position=value)
    )
