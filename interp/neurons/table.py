"""Decoded neurons as a file, and the question asked of it: which neurons are about this token?

A table of `decode_neurons` goes to parquet sorted by token, in small row groups whose smallest and largest token the format
keeps: a reader that wants one token skips the rest of the file. The options of the reading are in the file's own metadata,
under "interp.neurons", as JSON.

    save_neurons(decode_neurons(model, matrix=["up", "down"]), "neurons.parquet")
    find_neurons("neurons.parquet", " dog", matrix="down")      # which neurons write " dog"?

A token is its exact text: " dog" and "dog" are two tokens.
"""

import difflib
import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import LoadError, OptionError, one_of
from interp.files import check_writable, write_atomically
from interp.neurons.decode import COLUMNS

_KEY = b"interp.neurons"
_ROW_GROUP = 2**14  # rows of a file that are read together
_ORDER = ["matrix", "layer", "neuron", "pole", "rank"]


def save_neurons(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a table of `decode_neurons` to a .parquet file, whole or not at all, with the options of its reading.

    Raises `OptionError` where the file cannot be written or is to be named otherwise, or the table is another one.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    path = check_neurons_path(path)
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise OptionError(f"these are not decoded neurons: the table has no column {missing[0]!r}")
    if "reading" not in table.attrs:
        raise OptionError("the table does not say how neurons were read (attrs['reading']), as decode_neurons' do")
    # texts as plain strings: a dictionary's statistics would not be of its texts
    frame = table.assign(token=table["token"].astype(object)).sort_values(["token", *_ORDER], kind="stable")
    data = pyarrow.Table.from_pandas(frame, preserve_index=False)
    content = BytesIO()
    metadata = {_KEY: json.dumps(table.attrs["reading"]).encode()}
    parquet.write_table(data.replace_schema_metadata(metadata), content, row_group_size=_ROW_GROUP)
    return write_atomically(path, content.getvalue())


def check_neurons_path(path: str | Path) -> Path:
    """The path, if decoded neurons can be written there; `OptionError` otherwise. For before the work."""
    path = check_writable(path)
    if path.suffix != ".parquet":
        raise OptionError(f"decoded neurons are written as .parquet, not {path.suffix or 'without an ending'}")
    return path


def load_neurons(path: str | Path, *, tokens: str | Iterable[str] | None = None) -> pd.DataFrame:
    """The table of a file of `save_neurons`, sorted by matrix, layer, neuron, pole and rank; of some tokens, only those are read.

    Raises `LoadError` where the file is not there or holds something else.
    """
    import pyarrow
    from pyarrow.compute import field

    texts = [tokens] if isinstance(tokens, str) else tokens
    # the type is said because an empty list has none
    wanted = None if texts is None else field("token").isin(pyarrow.array(list(texts), pyarrow.string()))
    return _read(path, wanted).sort_values(_ORDER, kind="stable", ignore_index=True)


def find_neurons(
    table: pd.DataFrame | str | Path, token: str | int, *, matrix: str | None = None, pole: str | None = None,
    max_rank: int | None = None, k: int | None = 20,
) -> pd.DataFrame:  # fmt: skip
    """The k neurons that a token stands out in, best score first: rows of the table whose token it is, exactly.

    table: of `decode_neurons`, or its file. token: text or id. max_rank: only where its rank is at most this (0: the first).
    k=None: all. Scores of different neurons compare only for "cosine" and "zscore". Empty where the token is in the table, but
    not in this matrix, pole or rank. Raises `OptionError` where it is nowhere in the table, naming tokens like it that are.
    """
    if k is not None and k < 1:
        raise OptionError(f"cannot show {k} neurons")
    if pole is not None:
        one_of(pole, ("+", "-"), "pole")
    name = "token_id" if isinstance(token, int | np.integer) else "token"
    if isinstance(table, pd.DataFrame):
        if missing := [column for column in COLUMNS if column not in table.columns]:
            raise OptionError(f"these are not decoded neurons: the table has no column {missing[0]!r}")
        found, reading = table[table[name] == token], table.attrs.get("reading", {})
    else:
        found = _read(table, [(name, "==", token)])
        reading = found.attrs["reading"]
    if matrix is not None:
        one_of(matrix, reading.get("matrices") or found["matrix"].unique(), "matrix of this table")
    if found.empty:
        texts = [] if name == "token_id" else _texts(table)
        raise OptionError(f"no neuron of this table has {token!r} among its top tokens{_hint(token, texts)}")
    if matrix is not None:
        found = found[found["matrix"] == matrix]
    if pole is not None:
        found = found[found["pole"] == pole]
    if max_rank is not None:
        found = found[found["rank"] <= max_rank]
    best = found.sort_values(["score", *_ORDER], ascending=[False] + [True] * len(_ORDER), kind="stable")
    return best.head(len(best) if k is None else k).reset_index(drop=True)


def _texts(table: pd.DataFrame | str | Path) -> list[str]:
    """Every token of a table, once."""
    return (table if isinstance(table, pd.DataFrame) else _read(table, None, ["token"]))["token"].unique().tolist()


def _hint(token: str | int, texts: list[str]) -> str:
    """Tokens of a table that may have been meant: with or without the leading space, in another case, nearly so written."""
    bare = str(token).strip().lower()
    same = sorted(text for text in texts if text.strip().lower() == bare)
    near = same[:4] or (difflib.get_close_matches(str(token), texts, n=3) if texts else [])
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _read(path: str | Path, filters: Any, columns: list[str] | None = None) -> pd.DataFrame:
    import pyarrow
    import pyarrow.parquet as parquet

    path = Path(path)
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    try:
        schema = parquet.read_schema(path)
        if _KEY not in (schema.metadata or {}):
            raise LoadError(f"{path} holds no decoded neurons: it does not say how they were read")
        data = parquet.read_table(path, filters=filters, columns=columns)
        reading = json.loads(schema.metadata[_KEY])
    except (pyarrow.ArrowException, json.JSONDecodeError) as error:
        raise LoadError(f"{path} holds no decoded neurons: {str(error).splitlines()[0]}") from None
    if missing := [name for name in columns or COLUMNS if name not in data.column_names]:
        raise LoadError(f"{path} holds no decoded neurons: it has no column {missing[0]!r}")
    frame = data.replace_schema_metadata(None).to_pandas()
    frame = frame.assign(token=frame["token"].astype("category"))
    if columns is None:
        # what is read of a file may lack a matrix or a pole; its order is the file's
        frame["matrix"] = pd.Categorical(frame["matrix"], list(reading["matrices"]))
        frame["pole"] = pd.Categorical(frame["pole"], ["+", "-"])
    frame.attrs["reading"] = reading
    return frame
