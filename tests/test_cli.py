"""The command line: it does what it says or says in one line why not, and never leaves half a file."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from interp import METRICS, Circuit, PromptPairs, activation_patching, attribution, edge_patching, load_model
from interp.cli import main
from interp.metrics import Metric
from interp.rules import RULES
from interp.tasks.named import TASKS

ROWS = [
    {"clean": "w1 w2 w3 w4", "corrupt": "w1 w5 w3 w4", "answer": " w7", "wrong_answer": " w8"},
    {"clean": "w2 w9 w3 w4", "corrupt": "w2 w8 w3 w4", "answer": " w6", "wrong_answer": " w5"},
]


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("gpt2")


@pytest.fixture
def given(tmp_path):
    """`given(rows)`: a file of pairs, in a folder of its own so that `tmp_path / "out"` holds only what was written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()

    def write(rows=ROWS, name="toy.jsonl"):
        path = tmp_path / "in" / name
        path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    return write


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def left(tmp_path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "out").iterdir())


def one_line(capsys) -> str:
    """The error on stderr, which must be one line and no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("interp: warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("interp: error: ")
    return lines[0]


def test_discover_prints_the_ranking_and_writes_the_report(folder, given, tmp_path, capsys):
    out = tmp_path / "out" / "report.html"
    assert run("discover", "--model", folder, "--pairs", given(), "--out", out, "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "gpt2 on toy (given), denoise, 2 pairs: logit_diff" in said.out
    assert f"report: {out}" in said.out
    assert "gpt2 on toy" in out.read_text(encoding="utf-8")
    assert left(tmp_path) == ["report.html"]


def test_patch_writes_what_the_library_returns(folder, given, tmp_path, capsys):
    pairs, out = given(), tmp_path / "out" / "heads.csv"
    options = ("--sites", "head", "resid_pre", "--positions", "all", "--direction", "noise", "--metric", "probability")
    assert run("patch", "--model", folder, "--pairs", pairs, *options, "--out", out, "--quiet") == 0
    model = load_model(folder)
    expected = activation_patching(
        model,
        PromptPairs.from_jsonl(pairs, model),
        ["head", "resid_pre"],
        positions="all",
        direction="noise",
        metric="probability",
    )
    table = pd.read_csv(out)
    assert len(table) == 2 * 3 * 4 + 2 * 3
    heads = table[table.site == "head_out"].set_index(["prompt", "layer", "head"]).effect
    assert heads[1, 2, 3] == pytest.approx(expected.head_out[1, 2, 3].item(), abs=1e-6)
    said = capsys.readouterr().out
    assert f"scores: {out}" in said
    assert "metric(patched) - metric(clean)" in said


@pytest.mark.parametrize("name", ["scores.parquet", "scores.html"])
def test_patch_writes_every_kind_of_file(folder, given, tmp_path, name):
    assert run("patch", "--model", folder, "--pairs", given(), "--out", tmp_path / "out" / name, "--quiet") == 0
    assert left(tmp_path) == [name]


def test_patch_without_a_file_only_prints(folder, given, tmp_path, capsys):
    options = ("--sites", "neuron", "--neurons", "m0.n3", "m2.n1", "--normalize", "--dtype", "float64", "--n", "1")
    assert run("patch", "--model", folder, "--pairs", given(), *options, "--quiet") == 0
    said = capsys.readouterr().out
    assert "share of clean - corrupt" in said
    assert "mean over 1 prompts" in said
    assert left(tmp_path) == []


def test_windows_and_embedding_corruptions_are_options(folder, given, tmp_path, capsys):
    options = ("--sites", "mlp_out", "--window", "2", "--corruption", "gaussian", "--seed", "3", "--batch-size", "1")
    assert run("patch", "--model", folder, "--pairs", given(), *options, "--quiet") == 0
    said = capsys.readouterr().out
    assert "gaussian(k=3)" in said
    assert "mlp_out_summed" in said


def test_a_named_task_runs_on_a_real_model(stories, shared_data, tmp_path, capsys):
    folder = shared_data / "models" / "stories260k"
    options = ("--task", "gendered_pronoun", "--n", "2", "--positions", "all", "--quiet")
    status = run("patch", "--model", folder, *options)
    said = capsys.readouterr()
    assert status == 0 or "gendered_pronoun pairs can be made" in said.err
    assert "Traceback" not in said.err


def test_the_bundled_model_is_the_default(given, tmp_path, capsys):
    assert run("patch", "--n", "2", "--positions", "all", "--quiet") == 0
    assert "mini-gpt2 on ioi" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- bad input

LINE = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{**ROWS[0], "corrupt": "w1 w5"}], "differ in length on prompts 0"),
        ("", "has no pairs in it"),
        ("\n\n", "has no pairs in it"),
        (LINE + "\n" + LINE[:40], r"line 2: not valid JSON .*cut short"),
        ("[" + LINE, "not valid JSON"),
        ([{"clean": "w1", "corrupt": "w2"}], "line 1: no answers"),
        ([{**ROWS[0], "clean": "w1 zebra w3 w4"}], "zebra.*not in the model's vocabulary"),
        ([{**ROWS[0], "answer": " w7 w8"}], "is 2 tokens"),
        ([ROWS[0], {k: v for k, v in ROWS[1].items() if k != "wrong_answer"}], "wrong answers for some pairs only"),
        ("[1, 2]", "expected an object with named fields"),
        ([{**ROWS[0], **dict.fromkeys(("clean", "corrupt"), "w1" + " w2" * 64)}], "longer than gpt2's 64"),
        ([{**ROWS[0], "clean": 7}], "clean"),
        ([{**ROWS[0], "answer": [[" w7"]]}], "answer"),
        ([{**ROWS[0], "answer": 99}], "99"),
        ([{**ROWS[0], "wrong_answer": -1}], "-1 is not a token"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_used(folder, given, tmp_path, capsys, rows, says):
    out = tmp_path / "out" / "report.html"
    assert run("discover", "--model", folder, "--pairs", given(rows), "--out", out, "--quiet") == 2
    assert re.search(says, one_line(capsys))
    assert left(tmp_path) == []


def test_a_csv_cut_short(folder, given, tmp_path, capsys):
    text = "clean,corrupt,answer,wrong_answer\nw1 w2,w1 w3, w7, w8\nw1 w2,w1"
    assert run("patch", "--model", folder, "--pairs", given(text, "toy.csv")) == 2
    assert "line 3: not as many fields as the header has" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "ioii"), "'ioii' is not a task .*did you mean 'ioi'"),
        (("--pairs", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--sites", "resid_per"), "did you mean 'resid_pre'"),
        (("--sites", "neuron"), "needs neurons="),
        (("--sites", "neuron", "--neurons", "m0.n9999"), "has no node m0.n9999"),
        (("--metric", "logit-diff"), "did you mean 'logit_diff'"),
        (("--window", "9"), "window 9 is not between 1 and"),
        (("--positions", "cells"), "cells"),
        (("--batch-size", "0"), "at least 1"),
        (("--corruption", "blur"), "'blur' is not a corruption"),
        (("--dtype", "float23"), "'float23' is not a .*dtype"),
        (("--dtype", "nn"), "'nn' is not a .*dtype"),
        (("--device", "abacus"), "abacus"),
        (("--n", "0"), "n must be at least 1|no pairs"),
        (("--max-memory", "plenty"), "'plenty' is not an amount of memory: write 800M or 4G"),
        (("--max-memory", "0"), "'0' is not an amount of memory"),
        (("--out", "nowhere/x.csv"), "folder nowhere does not exist"),
        (("--out", "{out}/x.txt"), r"cannot write '\.txt': use \.csv, \.parquet or \.html"),
        (("--out", "{out}/x"), "cannot write a file without an ending"),
        (("--out", "{out}"), "is a folder"),
        (("--out", "{out}/x.html", "--sites", "head", "q"), "one site"),
        (("--out", "{out}/x.html", "--sites", "head"), "two axes"),
        (("--model", "nowhere/at/all"), "no folder nowhere/at/all"),
        (("--model", "{out}"), "no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_cannot_be_used(folder, given, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path / "in")
    arguments = [a.replace("{out}", str(tmp_path / "out")) for a in arguments]
    pairs = [] if "--task" in arguments or "--pairs" in arguments else ["--pairs", given()]
    model = [] if "--model" in arguments else ["--model", folder]
    assert run("patch", *model, *pairs, *arguments, "--quiet") == 2
    assert re.search(says, one_line(capsys))
    assert left(tmp_path) == []


def test_a_report_that_could_not_be_written_is_said_before_the_model_is_loaded(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("interp.model.load.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert run("discover", "--pairs", given(), "--out", tmp_path / "nowhere" / "x.html") == 2
    assert "does not exist" in one_line(capsys)


def test_a_metric_that_is_not_finite(folder, given, tmp_path, capsys, monkeypatch):
    broken = Metric("probability", "", lambda logits, pairs, clean: logits[:, 0] / torch.tensor([1.0, 0.0]))
    monkeypatch.setitem(METRICS, "probability", broken)
    out = tmp_path / "out" / "report.html"
    status = run("discover", "--model", folder, "--pairs", given(), "--metric", "probability", "--out", out, "--quiet")
    assert status == 2
    assert "metric probability is not finite on prompts 1" in one_line(capsys)
    assert left(tmp_path) == []


@pytest.mark.parametrize("damage", ["half", "empty", "missing", "config", "tokenizer"])
def test_models_that_are_not_whole(folder, given, tmp_path, capsys, damage):
    broken = tmp_path / "in" / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    if damage == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    else:
        path = broken / ("config.json" if damage == "config" else "tokenizer.json")
        path.write_text(path.read_text()[:80])
    assert run("patch", "--model", broken, "--pairs", given(), "--out", tmp_path / "out" / "x.csv", "--quiet") == 2
    assert "broken" in one_line(capsys)
    assert left(tmp_path) == []


def test_a_full_disk_is_said_in_one_line(folder, given, tmp_path, capsys, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    pairs = given()
    assert run("patch", "--model", folder, "--pairs", pairs, "--out", tmp_path / "out" / "x.csv", "--quiet") == 2
    assert "No space left on device" in one_line(capsys)
    assert left(tmp_path) == []


def test_a_plan_is_told_before_the_run_unless_asked_to_be_quiet(folder, given, capsys):
    assert run("patch", "--model", folder, "--pairs", given(), "--max-memory", "2K") == 0
    assert "interp: 15 cells x" in (told := capsys.readouterr().err)
    assert "chunks, " in told
    assert run("patch", "--model", folder, "--pairs", given(), "--quiet") == 0
    assert "cells" not in capsys.readouterr().err


def test_edges_writes_what_the_library_returns(folder, given, tmp_path, capsys):
    out, pairs = tmp_path / "out" / "edges.csv", given()
    assert run("edges", "--model", folder, "--pairs", pairs, "--out", out, "--quiet") == 0
    model = load_model(folder)
    expected = edge_patching(model, PromptPairs.from_jsonl(pairs, model)).to_dataframe("effect").effect.dropna()
    table = pd.read_csv(out).set_index(["prompt", "source", "target"]).effect
    np.testing.assert_allclose(table.loc[expected.index].values, expected.values, rtol=1e-4, atol=1e-6)
    assert "input" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--edges", "m2->m0"), "has no edge m2->m0"),
        (("--engine", "hooks"), 'edges are patched by engine "sweep" only'),
        (("--out", "{out}/x.html"), r"cannot write \.html: use \.csv or \.parquet"),
    ],
)
def test_edges_that_cannot_be_patched(folder, given, tmp_path, capsys, arguments, says):
    arguments = [a.replace("{out}", str(tmp_path / "out")) for a in arguments]
    assert run("edges", "--model", folder, "--pairs", given(), "--quiet", *arguments) == 2
    assert re.search(says, one_line(capsys))
    assert left(tmp_path) == []


@pytest.mark.parametrize("where", ["interp.walk.Walk.final_resid", "os.replace"])
@pytest.mark.parametrize("command", ["discover", "patch"])
def test_an_interruption_leaves_nothing(folder, given, tmp_path, capsys, monkeypatch, where, command):
    def interrupted(*args):
        raise KeyboardInterrupt

    out, pairs = tmp_path / "out" / "x.html", given()
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupted)
        assert run(command, "--model", folder, "--pairs", pairs, "--out", out, "--quiet") == 130
    assert capsys.readouterr().err == "interp: interrupted; nothing was written\n"
    assert left(tmp_path) == []


def test_warnings_are_one_line_each(folder, given, tmp_path, capsys, recwarn):
    import warnings

    warnings.simplefilter("always")
    rows = [*ROWS, {**ROWS[0], "corrupt": ROWS[0]["clean"]}]
    assert run("patch", "--model", folder, "--pairs", given(rows), "--quiet") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("interp: warning: |logit_diff(clean) - logit_diff(corrupt)| is near zero on prompts 2")


# ------------------------------------------------------------------------------------------------ what there is, help


def test_tasks_are_listed_with_their_corruptions(capsys):
    assert run("tasks") == 0
    said = capsys.readouterr().out
    for name in TASKS:
        assert f"{name}: " in said


def test_bundled_models_are_listed(capsys):
    assert run("models") == 0
    said = capsys.readouterr().out
    assert "mini-gpt2" in said
    assert "mini-llama" in said


@pytest.mark.parametrize("arguments", [["--help"], ["discover", "--help"], ["patch", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys\nfrom interp.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'pandas', 'xarray'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert "interp" in result.stdout


def test_no_command_and_unknown_commands_are_refused(capsys):
    for arguments in ([], ["discovery"], ["patch", "--direction", "up"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error_and_costs_nothing(folder, given, tmp_path):
    """`interp patch ... --out x.csv | head -1`: the file is written, nothing is said about the pipe."""
    out = tmp_path / "x.csv"
    words = ["patch", "--model", str(folder), "--pairs", str(given()), "--quiet", "--out", str(out)]
    code = f"import sys; from interp.cli import main; sys.stdin.read(); sys.exit(main({words!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # before it prints
        process.stdin.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said == ""
    assert out.stat().st_size > 0


# ------------------------------------------------------------------------------------------------------------ attribution


def test_attribute_prints_scores_with_their_agreement_and_writes_them(folder, given, tmp_path, capsys):
    pairs, out = given(), tmp_path / "out" / "scores.csv"
    options = ("--sites", "mlp_out", "head", "--rules", "relp,pattern=frozen", "--positions", "all")
    assert run("attribute", "--model", folder, "--pairs", pairs, *options, "--out", out, "--quiet") == 0
    model = load_model(folder)
    expected = attribution(
        model, PromptPairs.from_jsonl(pairs, model), "mlp_out", rules="relp,pattern=frozen", positions="all"
    )
    table = pd.read_csv(out)
    mlps = table[table.site == "mlp_out"].set_index(["prompt", "layer"]).effect
    assert mlps[1, 2] == pytest.approx(expected[1, 2].item(), abs=1e-6)
    said = capsys.readouterr()
    assert "rules relp,pattern=frozen, gradient at base" in said.out
    assert "agreement with exact patching on all 15 places" in said.out
    assert f"scores: {out}" in said.out
    assert said.err == ""


def test_a_check_can_be_small_or_left_out(folder, given, capsys):
    for check, says in ((0, None), (5, "on 5 of 15 places drawn at random")):
        assert (
            run("attribute", "--model", folder, "--pairs", given(), "--sites", "mlp_out", "--check", check, "--quiet")
            == 0
        )
        said = capsys.readouterr().out
        assert ("agreement" not in said) if says is None else (says in said)


def test_discover_takes_rules(folder, given, tmp_path, capsys):
    out = tmp_path / "out" / "report.html"
    assert run("discover", "--model", folder, "--pairs", given(), "--rules", "secant", "--out", out, "--quiet") == 0
    assert "approximate effects, rules secant (between base and source)" in capsys.readouterr().out
    assert "How far to trust this map" in out.read_text(encoding="utf-8")


def test_rules_are_listed_and_shown_on_a_model(folder, capsys):
    assert run("rules") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RULES)
    assert run("rules", "--model", folder, "--rules", "attnlrp") == 0
    lines = capsys.readouterr().out.splitlines()
    status = {(line.split()[0], line.split()[1]): " ".join(line.split()[3:]) for line in lines[1:]}
    assert status["blocks.0.ln1", "norm_scale"] == "on"
    assert status["blocks.2.mlp.hook_post", "gate_product"] == "not applicable"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rules", "rlp"], "did you mean 'relp'"),
        (["--rules", "relp,patern=frozen"], "did you mean 'pattern'"),
        (["--rules", "relp,pattern=cold"], "'cold' is not a setting of pattern"),
        (["--rules", "relp", "--metric", "accuracy"], "accuracy has no gradient"),
        (["--rules", "cp-lrp", "--sites", "q", "k"], "freeze the attention pattern, so no score reaches q, k"),
        (["--check", "-1"], "cannot check -1 places"),
        (["--out", "scores.txt"], "cannot write '.txt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_attributed_is_one_sentence(folder, given, capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert run("attribute", "--model", folder, "--pairs", given(), "--quiet", *arguments) == 2
    assert says in one_line(capsys)


# ------------------------------------------------------------------------------------------------------------ circuits of edges


def test_discover_writes_a_circuit_of_edges_and_its_report(folder, given, tmp_path, capsys):
    out, saved = tmp_path / "out" / "report.html", tmp_path / "out" / "circuit.json"
    options = ("--level", "edge", "--method", "exact", "--edges", "12", "--save", saved, "--out", out, "--quiet")
    assert run("discover", "--model", folder, "--pairs", given(), *options) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "cut from scores by exact patching, noise" in said.out
    assert f"circuit: {saved}" in said.out
    circuit = Circuit.load(saved)
    model = load_model(folder)
    scores = edge_patching(model, PromptPairs.from_jsonl(tmp_path / "in" / "toy.jsonl", model), direction="noise")
    assert circuit == Circuit.from_scores(scores, n_edges=12)
    assert html.escape(circuit.edges[0]) in out.read_text(encoding="utf-8")
    assert left(tmp_path) == ["circuit.json", "report.html"]


def test_a_circuit_is_as_faithful_as_it_was_asked_to_be(folder, given, tmp_path, capsys):
    out = tmp_path / "out" / "report.html"
    options = ("--level", "edge", "--rules", "relp", "--faithfulness", "0.5", "--out", out, "--quiet")
    assert run("discover", "--model", folder, "--pairs", given(), *options) == 0
    said = capsys.readouterr().out
    assert "eap with rules relp" in said
    assert float(re.search(r"faithfulness (\S+) \(", said)[1]) >= 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "eap"), "--method is for circuits of edges: add --level edge"),
        (("--edges", "5"), "--edges is for circuits of edges"),
        (("--save", "x.json"), "--save is for circuits of edges"),
        (("--level", "edge", "--edges", "5", "--faithfulness", "0.9"), "give one of them"),
        (("--level", "edge", "--save", "x.pt"), "cannot write .pt: use .json or .graphml"),
        (("--level", "edge", "--save", "nowhere/x.json"), "the folder nowhere does not exist"),
        (("--level", "edge", "--engine", "hooks"), 'engine "sweep" only'),
        (("--level", "edge", "--faithfulness", "7"), "at most 1, not 7"),
        (("--level", "edge", "--edges", "100000"), "cannot keep 100000 of"),
        (("--level", "node", "--ablation", "optimal"), "optimal"),
    ],
)
def test_a_circuit_that_cannot_be_is_refused_in_one_line(folder, given, tmp_path, capsys, options, says):
    out = tmp_path / "out" / "report.html"
    assert run("discover", "--model", folder, "--pairs", given(), "--out", out, "--quiet", *options) == 2
    assert says in one_line(capsys)
    assert left(tmp_path) == []
