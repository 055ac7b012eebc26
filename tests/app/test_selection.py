"""Places by name: what is clicked becomes an id, an id becomes a cell again, and what is out of date becomes nothing."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from app.charts import heatmap
from app.looking import effect_at, lens_cell, lens_place, marks
from app.selection import Cell, Selection, clicked, parse_cell, place_of

cells = st.builds(
    Cell,
    st.sampled_from(["resid_pre", "head", "mlp_out"]),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(0, 99)),
    st.one_of(st.none(), st.integers(0, 999)),
)


def event(*indices: int, kind: str = "main") -> dict:
    """What a chart reports after a click."""
    return {"selection": {"selected": [{"series_index": 0, "data_type": kind, "data_indices": list(indices)}]}}


def effects(second: str, site: str, values=None) -> xr.DataArray:
    values = np.arange(12.0).reshape(3, 4) + 1 if values is None else values
    coords = {"layer": range(3), second: range(4)}
    if second == "position":
        coords["token"] = ("position", [f"{i}:t" for i in range(4)])
    return xr.DataArray(values, coords, ("layer", second), attrs={"site": site})


@given(cell=cells)
def test_a_cell_is_read_back_from_its_name(cell):
    assert parse_cell(str(cell)) == cell


@pytest.mark.parametrize(
    "text", ["", None, "a3.h2", "head@", "head@1.", "head@1.2@", "head@-1", "../x@1", "head@1.2@3\n"]
)
def test_what_is_no_cell_is_none(text):
    assert parse_cell(text) is None


@pytest.mark.parametrize(("second", "site"), [("position", "resid_pre"), ("head", "head"), ("kv_head", "v")])
def test_every_cell_goes_from_its_index_to_its_name_and_back(second, site):
    array = effects(second, site)
    for index, drawn in enumerate(heatmap(array)["series"][0]["data"]):
        place = place_of(event(index), array)
        (where,) = marks(array, selected=place)
        assert [where[1], where[0]] == drawn["value"][:2]
        assert effect_at(array.expand_dims("prompt"), place) == [array.values[where]]


def test_absent_cells_have_no_index():
    values = np.arange(12.0).reshape(3, 4)
    values[0, :2] = np.nan
    assert place_of(event(0), effects("position", "resid_pre", values)) == "resid_pre@0@2"


@pytest.mark.parametrize(
    "old",
    [event(12), event(), {}, None, event(0, kind="node")],
    ids=["beyond the map", "nothing selected", "no event", "none", "another kind"],
)
def test_a_stale_click_is_nothing(old):
    assert place_of(old, effects("position", "resid_pre")) is None


def test_the_last_of_several_is_the_click():
    assert clicked(event(1, 5)) == [1, 5]
    assert place_of(event(1, 5), effects("position", "resid_pre")) == "resid_pre@1@1"


def test_rows_of_nodes_are_named_by_the_node():
    array = xr.DataArray(np.ones((2, 2)), {"node": ["a0.h1", "m1"], "position": [0, 1]}, ("node", "position"))
    assert place_of(event(2), array) == "m1"


def test_a_selection_writes_only_what_it_has():
    assert Selection().to_query() == {}
    assert Selection("m5", "a0.h1").to_query() == {"at": "m5", "pin": "a0.h1"}


# ------------------------------------------------------------------------------------------------ places of results


@pytest.mark.parametrize(
    "place", [None, "m5", "mlp_out@0@0", "resid_pre@3@0", "resid_pre@0@4", "resid_pre@0.1", "resid_pre@0"]
)
def test_places_that_a_result_lacks_have_no_effect(place):
    assert effect_at(effects("position", "resid_pre").expand_dims("prompt"), place) is None
    assert marks(effects("position", "resid_pre"), selected=place) == {}


def test_the_selection_is_drawn_over_the_pin():
    array = effects("position", "resid_pre")
    assert marks(array, pinned="resid_pre@1@1", selected="resid_pre@1@1") == {(1, 1): "selected"}


@given(layer=st.integers(0, 4), position=st.integers(0, 9))
def test_a_cell_of_the_lens_has_a_name_that_other_pages_know(layer, position):
    place = lens_place(f"resid_pre@{layer}@{position}", 4)
    assert lens_cell(place, 4, 10) == (layer, position)
    assert parse_cell(place).layer < 4


@pytest.mark.parametrize(
    "place", [None, "m5", "mlp_out@1@1", "resid_pre@5@0", "resid_post@4@0", "resid_pre@1@10", "resid_pre@1"]
)
def test_places_outside_the_lens_are_none(place):
    assert lens_cell(place, 4, 10) is None
