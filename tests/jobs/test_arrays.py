"""A result is its table and back, to the bit; blocks of prompts are joined to the result of all."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interp import activation_patching, load_task
from interp.errors import OptionError
from interp.jobs.arrays import about_of, from_table, joined, to_table
from tests.small_pairs import refused

NAMES = st.text(min_size=1, max_size=5).filter(lambda name: name not in ("variable", "value"))
ATTRS = st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.booleans() | st.floats(), max_size=3)
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int32, np.int8, np.uint16])
LABELS = st.sampled_from([np.dtype("U3"), np.int64, np.float32, np.bool_])


@st.composite
def arrays(draw, sizes=None, dims=None):
    """An array with coordinates along some of its axes, with and without their names, and one that has none."""
    dims = draw(st.lists(NAMES, min_size=0, max_size=3, unique=True)) if dims is None else dims
    sizes = {dim: draw(st.integers(1, 3)) for dim in dims} if sizes is None else sizes
    shape = tuple(sizes[dim] for dim in dims)
    values = draw(hnp.arrays(draw(DTYPES), shape))
    coords = {}
    for dim in dims:
        if draw(st.booleans()):
            coords[dim] = draw(hnp.arrays(draw(LABELS), sizes[dim], unique=False))
        if draw(st.booleans()):
            name = draw(NAMES.filter(lambda name: name not in dims and name not in coords))
            coords[name] = (dim, draw(hnp.arrays(draw(LABELS), sizes[dim])))
    if draw(st.booleans()):
        name = draw(NAMES.filter(lambda name: name not in dims and name not in coords))
        coords[name] = ((*dims,), draw(hnp.arrays(draw(LABELS), shape)))
    return xr.DataArray(values, coords, dims, draw(st.none() | NAMES), draw(ATTRS))


def back(result, **about):
    """Through the bytes of a parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(to_table(result, **about), buffer)
    return from_table(pq.read_table(pa.BufferReader(buffer.getvalue())))


def assert_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.dims == theirs.dims
    assert ours.name == theirs.name
    assert ours.values.tobytes() == theirs.values.tobytes()
    assert {*ours.coords} == {*theirs.coords}
    for name, coord in theirs.coords.items():
        assert ours.coords[name].dims == coord.dims
        assert ours.coords[name].dtype.kind == coord.dtype.kind
        np.testing.assert_array_equal(ours.coords[name].values, coord.values)


@given(arrays())
@settings(max_examples=80, deadline=None)
def test_any_array_comes_back_to_the_bit(array):
    again = back(array)
    assert_bits(again, array)
    assert json.dumps(again.attrs) == json.dumps(array.attrs)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_dataset_comes_back_to_the_bit(data):
    sizes = {"prompt": 2, "layer": 3}
    dims = st.sampled_from([("prompt",), ("prompt", "layer"), ("layer",), ()])
    names = data.draw(st.lists(NAMES.filter(lambda name: name not in sizes), min_size=1, max_size=3, unique=True))
    held = {name: data.draw(arrays(sizes, data.draw(dims))).reset_coords(drop=True) for name in names}
    coords = {"prompt": range(2), "layer": ["a", "b", "a"], "gap": ("prompt", [0.5, np.nan])}
    alone = {dim: coords[dim] for dim in sizes if any(dim in array.dims for array in held.values())}
    dataset = xr.Dataset({name: array.variable for name, array in held.items()}, attrs={"unit": "logits", "n": 3})
    dataset = dataset.assign_coords(alone)
    if "prompt" in alone:
        dataset = dataset.assign_coords(gap=coords["gap"])
    again = back(dataset)
    assert list(again.data_vars) == list(dataset.data_vars)
    assert again.attrs == dataset.attrs
    for name in dataset.data_vars:
        assert_bits(again[name], dataset[name])


@pytest.mark.parametrize("sites", ["head", ["resid_pre", "head"]], ids=["one", "several"])
def test_results_of_the_library_come_back(mini_gpt2, sites):
    effects = activation_patching(
        mini_gpt2, load_task("ioi", mini_gpt2, n=2), sites, positions="all", metric=["logit_diff"]
    )
    table = to_table(effects, {"shard": "a", "n": 3})
    assert from_table(table).identical(effects)
    assert about_of(table) == {"shard": "a", "n": 3}
    n = sum(a.size for a in effects.data_vars.values()) if isinstance(effects, xr.Dataset) else effects.size
    assert table.num_rows == n
    assert table.column_names[0] == "variable"
    assert table.column_names[-1] == "value"
    assert {"prompt", "layer", "head"} <= {*table.column_names}
    rows = table.to_pandas()
    name = "head"  # whether the site is asked for alone or beside others
    row = rows[(rows.variable == name) & (rows.prompt == 1) & (rows.layer == 1)].iloc[0]
    effect = effects["head_out"] if isinstance(effects, xr.Dataset) else effects
    place = {key: row[key] for key in effect.dims}
    assert row.value == effect.sel(place).item()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (xr.DataArray([1.0], attrs={"f": len}), "attribute f is builtin_function"),
        (xr.DataArray([1.0], attrs={"f": None}), "attribute f is NoneType"),
        (xr.DataArray([1.0 + 2j]), "holds complex128"),
        (xr.DataArray([True], name="kept"), "kept holds bool"),
        (xr.DataArray(["a"]), "holds <U1"),
        (xr.DataArray([2**53 + 1], name="big"), "big holds whole numbers beyond"),
        (xr.DataArray([1.0], {"a": np.array([None], object)}, ["a"]), "labels a are neither numbers nor texts"),
        (xr.DataArray([1.0], {"value": ["b"]}, ["value"]), "a label of value is called value"),
    ],
    ids=["callable", "none", "complex", "bool", "text", "big", "objects", "value"],
)
def test_what_has_no_place_in_a_table_is_refused(array, says):
    with refused(OptionError, says):
        to_table(array)


def test_rows_that_are_not_as_they_were_written_are_refused():
    table = to_table(xr.DataArray([1.0, 2.0]))
    with refused(OptionError, "3 rows, and its layout has 2|2 rows"):
        from_table(pa.concat_tables([table, table.slice(0, 1)]))
    with refused(OptionError, "was not written by a run"):
        from_table(pa.table({"value": [1.0]}))


def test_blocks_are_joined_to_the_result_of_all(mini_gpt2):
    pairs = load_task("ioi", mini_gpt2, n=5)
    for sites in ("head", ["resid_pre", "pattern"]):
        whole = activation_patching(mini_gpt2, pairs, sites, positions=[-1], batch_size=2)
        parts = [
            activation_patching(mini_gpt2, block, sites, positions=[-1], batch_size=2) for block in pairs.chunks(2)
        ]
        ours = joined(parts)
        assert ours.drop_vars("token", errors="ignore").identical(whole.drop_vars("token", errors="ignore"))
        assert joined([whole]) is whole


def test_joining_keeps_what_is_not_of_prompts():
    part = xr.DataArray(np.ones((2, 3)), {"layer": ("layer", [4, 5, 6])}, ("prompt", "layer"), attrs={"n_prompts": 2})
    both = joined([part, part])
    assert both.sizes == {"prompt": 4, "layer": 3}
    assert both.layer.values.tolist() == [4, 5, 6]
    assert both.attrs == {"n_prompts": 4}
