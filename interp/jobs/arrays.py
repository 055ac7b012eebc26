"""Labelled results as tables that any tool reads, and back, bit for bit.

One row per number: `variable` (the site of an effect, the name of a measure), a column for every label along its axes, `value`.
How the rows were laid out, and the attributes, stand in the table's metadata, so `from_table(to_table(result))` is the result.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr

from interp.errors import OptionError
from interp.sites import SITES

KEY = b"interp"  # of the layout, in the metadata of the table's schema
_OWN = ("variable", "value")


def to_table(result: xr.DataArray | xr.Dataset, about: Mapping[str, Any] | None = None) -> pa.Table:
    """A result as rows. about: plain facts to keep beside the layout, see `about_of`.

    Values are float32 if all variables are, else float64. Raises `OptionError` naming what has no place in a table: a variable
    that is no number, an attribute that is no plain value, a label called `value` or `variable`.
    """
    single = isinstance(result, xr.DataArray)
    # the name of a single array is its site's, where it has one
    named = {str(result.attrs.get("site", result.name or "value")): result} if single else dict(result.data_vars)
    layout = {"single": single, "name": result.name if single else None, "attrs": _plain(result.attrs), "variables": []}
    narrow = all(array.dtype == np.float32 for array in named.values())
    parts = []
    for name, array in named.items():
        if array.dtype.kind not in "fiu":
            raise OptionError(f"{name} holds {array.dtype} values, and a table of results holds numbers")
        if array.dtype.kind in "iu" and array.size and max(abs(int(array.min())), abs(int(array.max()))) > 2**53:
            raise OptionError(f"{name} holds whole numbers beyond 2^53, which a table of floats would round")
        columns: dict[str, pa.Array] = {"variable": _constant(_told(str(name), array), array.size)}
        for key in dict.fromkeys([*(d for d in array.dims), *array.coords]):
            if key in _OWN:
                raise OptionError(f"a label of {name} is called {key}, which is the name of a table's own column")
            columns[str(key)] = _labels(array, key)
        columns["value"] = pa.array(np.ravel(array.values).astype(np.float32 if narrow else np.float64, copy=False))
        parts.append(pa.table(columns))
        layout["variables"].append({"name": str(name), "attrs": {} if single else _plain(array.attrs), **_shape(array)})
    table = pa.concat_tables(parts, promote_options="permissive")
    order = ["variable", *(c for c in table.column_names if c not in _OWN), "value"]
    return table.select(order).replace_schema_metadata(
        {KEY: json.dumps({"about": dict(about or {}), "layout": layout})}
    )


def from_table(table: pa.Table) -> xr.DataArray | xr.Dataset:
    """The result whose rows these are. Raises `OptionError` if the rows are not as they were written."""
    layout, first, arrays = _metadata(table)["layout"], 0, {}
    values = table["value"].to_numpy()
    for item in layout["variables"]:
        n = int(np.prod(item["shape"], dtype=np.int64))
        part = values[first : first + n].astype(item["dtype"]).reshape(item["shape"])
        coords = {name: (dims, np.array(held, dtype=dtype)) for name, dims, dtype, held in item["coords"]}
        arrays[item["name"]] = xr.DataArray(part, coords, item["dims"], attrs=item["attrs"])
        first += n
    if first != len(values):
        raise OptionError(f"a table of {len(values)} rows, and its layout has {first}")
    if layout["single"]:
        [array] = arrays.values()
        return array.rename(layout["name"]).assign_attrs(layout["attrs"])
    return xr.Dataset(arrays, attrs=layout["attrs"])


def about_of(table: pa.Table) -> dict[str, Any]:
    """The facts that were kept beside a table's layout."""
    return _metadata(table)["about"]


def joined(parts: Sequence[xr.DataArray | xr.Dataset]) -> xr.DataArray | xr.Dataset:
    """One result of all prompts from the results of successive blocks of them; one part is returned as it is.

    What has no prompts is the same in all parts.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    n = sum(part.sizes["prompt"] for part in parts)
    if isinstance(first, xr.Dataset):
        arrays = {name: joined([part[name] for part in parts]) for name in first.data_vars}
        coords = {name: coord for array in arrays.values() for name, coord in array.coords.items()}
        variables = {name: (array.dims, array.values, array.attrs) for name, array in arrays.items()}
        return xr.Dataset(variables, coords, {**first.attrs, "n_prompts": n})
    coords = {
        name: (coord.dims, _concatenated([part.coords[name].variable for part in parts]))
        for name, coord in first.coords.items()
    }
    coords["prompt"] = range(n)
    values = _concatenated([part.variable for part in parts])
    return xr.DataArray(values, coords, first.dims, first.name, {**first.attrs, "n_prompts": n})


def _concatenated(parts: Sequence[xr.Variable]) -> np.ndarray:
    """Values one after the other along the prompts."""
    if "prompt" not in parts[0].dims:
        return parts[0].values
    return np.concatenate([part.values for part in parts], parts[0].dims.index("prompt"))


def _metadata(table: pa.Table) -> dict[str, Any]:
    held = (table.schema.metadata or {}).get(KEY)
    if held is None:
        raise OptionError("this table was not written by a run: its metadata has no layout")
    return json.loads(held)


def _told(name: str, array: xr.DataArray) -> str:
    """What the rows call a variable: effects by their site, as a single site's are, whatever a Dataset had to call them."""
    site = array.attrs.get("site")
    if site in SITES and name.startswith(SITES[site].variable):
        return f"{site}{name.removeprefix(SITES[site].variable)}"
    return name


def _constant(text: str, n: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), [text])


def _labels(array: xr.DataArray, key: Any) -> pa.Array:
    """The labels of one coordinate, or the numbers along an axis that has none, for every value in order."""
    dims, values = (
        (array[key].dims, array[key].values) if key in array.coords else ((key,), np.arange(array.sizes[key]))
    )
    shape = [size if dim in dims else 1 for dim, size in zip(array.dims, array.shape, strict=True)]
    # a coordinate's axes come in the array's order, or it could not be laid along it
    values = np.transpose(values, [dims.index(dim) for dim in array.dims if dim in dims])
    spread = lambda x: np.ravel(np.broadcast_to(x.reshape(shape), array.shape))  # noqa: E731
    if values.dtype.kind in "biuf":
        return pa.array(spread(values))
    texts = list(dict.fromkeys(values.ravel().tolist()))
    if not all(isinstance(text, str) for text in texts):
        raise OptionError(f"labels {key} are neither numbers nor texts")
    place = {text: i for i, text in enumerate(texts)}
    numbers = np.array([place[text] for text in values.ravel().tolist()], np.int32).reshape(values.shape)
    return pa.DictionaryArray.from_arrays(pa.array(spread(numbers)), pa.array(texts, pa.string()))


def _shape(array: xr.DataArray) -> dict[str, Any]:
    coords = []
    for name, coord in array.coords.items():
        dtype = "str" if coord.dtype.kind not in "biuf" else str(coord.dtype)
        coords.append([str(name), list(coord.dims), dtype, coord.values.tolist()])
    return {"dims": list(array.dims), "shape": list(array.shape), "dtype": str(array.dtype), "coords": coords}


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as JSON keeps them."""
    found = {}
    for key, value in attrs.items():
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, str | bool | int | float):
            raise OptionError(f"attribute {key} is {type(value).__name__}, and only texts and numbers are saved")
        found[str(key)] = value
    return found
