"""`interp neurons`: decoding, finding and clamping from the command line, and what bad input gets."""

import pandas as pd
import pytest

from interp.cli import main
from interp.neurons.decode import decode_neurons
from interp.neurons.table import load_neurons


def run(*arguments) -> int:
    return main([str(a) for a in ("neurons", *arguments)])


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("interp: warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("interp: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """mini-gpt2's neurons, written by the command."""
    path = tmp_path_factory.mktemp("neurons-") / "neurons.parquet"
    assert run("decode", "--matrix", "up", "down", "--k", 4, "--out", path, "--quiet") == 0
    return path


def test_decoding_writes_the_table_and_prints_the_most_specialised(file, mini_gpt2, capsys):
    expected = decode_neurons(mini_gpt2, matrix=["up", "down"], k=4, kurtosis=True)
    pd.testing.assert_frame_equal(load_neurons(file), expected)
    assert run("decode", "--matrix", "down", "--layers", 3, "--show", 2, "--quiet") == 0
    out = capsys.readouterr().out
    best = expected.query("matrix == 'down' and layer == 3").nlargest(1, "kurtosis").iloc[0]
    assert "mini-gpt2: 512 neurons" in out
    assert out.count("kurtosis") == 2
    assert out.index(f"m3.n{best['neuron']} down, kurtosis") < out.index("  + ")
    assert f"  + {best['token']!r} {best['score']:+.2f}" in out


def test_options_reach_the_reading(tmp_path):
    path = tmp_path / "n.parquet"
    assert run("decode", "--model", "mini-llama", "--matrix", "gate+up", "--score", "zscore", "--no-fold-norm", "--center",
               "--final-norm", "unit", "--vocabulary", "embed", "--layers", 1, "--screen", "bfloat16", "--out", path,
               "--show", 0, "--quiet") == 0  # fmt: skip
    reading = load_neurons(path).attrs["reading"]
    assert reading["screen"] == "bfloat16"
    assert reading["matrices"]["gate+up"] == {
        "matrix": "gate+up", "fold_norm": False, "center_rows": False, "final_norm": "unit", "score": "zscore",
        "vocabulary": "embed", "center": True,
    }  # fmt: skip


def test_finding_in_a_file_and_in_a_model(file, capsys):
    assert run("find", " near", file, "--matrix", "down", "--poles=-", "--show", 3) == 0
    in_file = capsys.readouterr().out
    assert len(in_file.splitlines()) == 4
    assert in_file.split()[:5] == ["neuron", "matrix", "pole", "rank", "score"]
    assert run("find", " near", "--matrix", "down", "--k", 4, "--poles=-", "--show", 3, "--quiet") == 0
    assert capsys.readouterr().out == in_file
    assert run("find", " near", file) == 0
    both = capsys.readouterr().out
    assert " up " in both
    assert " down " in both


def test_clamping(tmp_path, capsys):
    out = tmp_path / "changes.csv"
    assert run("clamp", "--neuron", "m3.n490", "m3.n268", "--value", 20, 0.5, "--prompt", "Anna went to the", "The friends",
               "--k", 3, "--out", out) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count(" -> ") == 6
    assert "Anna went to the\n" in printed
    table = pd.read_csv(out)
    assert table["prompt"].tolist() == [0] * 3 + [1] * 3
    assert f"{table['token'].iloc[0]!r}" in printed
    assert run("clamp", "--model", "mini-llama", "--neuron", "m1.n3", "--value", 5, "--prompt", "Anna", "--site", "up",
               "--positions", 0) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("decode", "--matrix", "gate"), "no gates to read"),
        (("decode", "--layers", "9"), "layers 0 to 3, not 9"),
        (("decode", "--k", "0"), "cannot show 0 tokens"),
        (("decode", "--matrix"), "--matrix names no matrix"),
        (("decode", "--show", "-1"), "cannot print -1"),
        (("decode", "--model", "mini-llama", "--matrix", "gate-up", "--poles", "+"), "is read as pole - only"),
        (("find", "near"), "did you mean ' near'"),
        (("find", " near", "missing.parquet"), "there is no file missing.parquet"),
        (("find", " near", "missing.parquet", "--score", "logit"), "--score is for decoding a model"),
        (("find", " near", "--max-rank", "-1"), "ranks begin at 0"),
        (("find", " near", "--show", "0"), "cannot print 0"),
        (("clamp", "--neuron", "m2", "--value", "1", "--prompt", "a"), "'m2' is not a neuron"),
        (("clamp", "--neuron", "n2", "--value", "1", "--prompt", "a"), "'n2' is not a node"),
        (("clamp", "--neuron", "m2.n999", "--value", "1", "--prompt", "a"), "0 to 511, not 999"),
        (("clamp", "--neuron", "m2.n1", "m2.n1", "--value", "1", "--prompt", "a"), "named twice"),
        (("clamp", "--neuron", "m2.n1", "--value", "1", "2", "--prompt", "a"), "2 values for 1 neurons"),
        (("clamp", "--neuron", "m2.n1", "--value", "1", "--prompt"), "at least one --neuron and one --prompt"),
        (("clamp", "--neuron", "m2.n1", "--value", "1", "--prompt", "a", "--site", "gate"), "no gates to clamp"),
    ],
    ids=[
        "no gates", "layer", "k", "no matrix", "show", "pole", "space", "no file", "decoded", "rank", "none to show", "mlp",
        "node", "neuron", "twice", "values", "no prompt", "plain",
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(arguments, says, capsys):
    assert run(*arguments, *(("--quiet",) if arguments[0] != "clamp" else ())) == 2
    assert says in error(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("decode", "--out", "n.csv"), "written as .parquet, not .csv"),
        (("decode", "--out", "none/n.parquet"), "the folder none does not exist"),
        (("clamp", "--neuron", "m2.n1", "--value", "1", "--prompt", "a", "--out", "t.txt"), "use .csv or .parquet"),
    ],
    ids=["ending", "folder", "changes"],
)
def test_bad_paths_are_refused_before_a_model_is_loaded(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--model", "no-such-model") == 2
    assert says in error(capsys)
