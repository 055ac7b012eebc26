"""Decoded neurons on disk, and finding a token in them."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet
import pytest

from interp.errors import LoadError, OptionError
from interp.neurons.decode import decode_neurons
from interp.neurons.table import find_neurons, load_neurons, save_neurons
from tests.small_pairs import refused


@pytest.fixture(scope="module")
def table(mini_llama):
    return decode_neurons(mini_llama, matrix=["gate-up", "up", "down"], k=3, kurtosis=True)


@pytest.fixture(scope="module")
def file(table, tmp_path_factory) -> Path:
    return save_neurons(table, tmp_path_factory.mktemp("neurons-") / "neurons.parquet")


@pytest.fixture(params=["table", "file"])
def source(request, table, file):
    """The same neurons in memory and on disk."""
    return table if request.param == "table" else file


def test_what_is_saved_is_loaded(table, file):
    loaded = load_neurons(file)
    pd.testing.assert_frame_equal(loaded, table)
    assert loaded.attrs == table.attrs


def test_the_options_are_in_the_file_for_other_readers(table, file):
    assert json.loads(parquet.read_schema(file).metadata[b"interp.neurons"]) == table.attrs["reading"]
    plain = pd.read_parquet(file)
    assert plain["token"].is_monotonic_increasing
    assert sorted(plain["score"]) == sorted(table["score"])


def test_one_token_is_few_row_groups(table, tmp_path, monkeypatch):
    monkeypatch.setattr("interp.neurons.table._ROW_GROUP", 100)
    meta = parquet.ParquetFile(save_neurons(table, tmp_path / "n.parquet")).metadata
    token = meta.schema.names.index("token")
    groups = [meta.row_group(i).column(token).statistics for i in range(meta.num_row_groups)]
    holding = [group for group in groups if group.min <= " to" <= group.max]
    assert len(groups) > 100
    assert len(holding) <= 2 + (table["token"] == " to").sum() // 100


def test_some_tokens(table, file):
    found = load_neurons(file, tokens=[" to", " the"])
    expected = table[table["token"].isin([" to", " the"])].reset_index(drop=True)
    assert found["score"].tolist() == expected["score"].tolist()
    assert found["token"].astype(str).tolist() == expected["token"].astype(str).tolist()
    assert load_neurons(file, tokens=" to")["token"].unique().tolist() == [" to"]
    assert load_neurons(file, tokens=[]).empty


def test_finding_is_filtering_and_sorting(table, source):
    found = find_neurons(source, " to", k=None)
    expected = table[table["token"] == " to"]
    assert found["score"].tolist() == sorted(expected["score"], reverse=True)
    assert set(found["token"]) == {" to"}
    down = find_neurons(source, " to", matrix="down", pole="-", max_rank=0, k=4)
    expected = expected.query("matrix == 'down' and pole == '-' and rank == 0").nlargest(4, "score")
    assert down[["layer", "neuron"]].to_numpy().tolist() == expected[["layer", "neuron"]].to_numpy().tolist()


def test_by_id_and_by_text(mini_llama, source):
    by_text = find_neurons(source, " to")
    pd.testing.assert_frame_equal(by_text, find_neurons(source, mini_llama.to_single_token(" to")))
    assert by_text.attrs["reading"]["model"] == "mini-llama"


def test_a_token_elsewhere_in_the_table_is_an_empty_answer(table, source):
    only_up = sorted(set(table[table["matrix"] == "up"]["token"]) - set(table[table["matrix"] == "down"]["token"]))
    assert find_neurons(source, only_up[0], matrix="down").empty


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("to", "has 'to' among its top tokens; did you mean ' to'"),
        (" TO", "did you mean ' to'"),
        (" handedd", "did you mean ' handed'"),
        ("qqqq", "has 'qqqq' among its top tokens$"),
        (10**6, "has 1000000 among"),
    ],
    ids=["space", "case", "spelling", "nothing", "id"],
)
def test_a_token_that_is_nowhere_gets_a_hint(source, token, says):
    with refused(OptionError, says):
        find_neurons(source, token)


def test_refusals(table, source, tmp_path):
    with refused(OptionError, "'gate' is not a matrix of this table"):
        find_neurons(source, " to", matrix="gate")
    with refused(OptionError, "'plus' is not a pole"):
        find_neurons(source, " to", pole="plus")
    with refused(OptionError, "cannot show 0 neurons"):
        find_neurons(source, " to", k=0)
    with refused(OptionError, "not .csv"):
        save_neurons(table, tmp_path / "n.csv")
    with refused(OptionError, "does not exist"):
        save_neurons(table, tmp_path / "none" / "n.parquet")
    for bad, says in (
        (table.drop(columns="pole"), "no column 'pole'"),
        (pd.DataFrame(table.to_dict("list")), "how neurons were"),
    ):
        with refused(OptionError, says):
            save_neurons(bad, tmp_path / "n.parquet")
    assert not list(tmp_path.iterdir())
    with refused(OptionError, "no column 'rank'"):
        find_neurons(table.drop(columns="rank"), " to")


def test_other_files_are_refused(tmp_path):
    with refused(LoadError, "there is no file"):
        load_neurons(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with refused(LoadError, "holds no decoded neurons"):
        find_neurons(tmp_path / "text.parquet", " to")
    pd.DataFrame({"token": [" to"]}).to_parquet(tmp_path / "other.parquet")
    with refused(LoadError, "does not say how they were read"):
        load_neurons(tmp_path / "other.parquet")
