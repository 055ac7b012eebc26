"""The README's examples run as they stand."""

import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from interp import Grid, cli

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line.split("#")[0] for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def test_python_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "ioi.html").stat().st_size > 100_000
    said = capsys.readouterr().out
    assert all(word in said for word in ("position", "relative_error", "agreement with exact patching", "norm_scale"))


# the dashboard runs until it is stopped: tests/test_app_cli.py starts it; batches are a story of their own
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("interp ") and c.split()[1] not in ("app", "run", "runs")]
)
def test_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    assert cli.main(words) == 0, capsys.readouterr().err
    for flag, value in itertools.pairwise(words):
        if flag == "--out":
            assert (tmp_path / value).stat().st_size > 0


def test_batches_run_in_their_order_on_a_smaller_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grid = Grid.from_file(README.parent / "examples" / "ioi_grid.toml")
    assert len(grid.everything) == 90
    methods = [replace(grid.analyses[0], grid={"method": ["eap", "eap-ig"]}), grid.analyses[1]]
    small = replace(grid, models=["mini-gpt2"], tasks=["ioi"], seeds=[0, 1], n=4, analyses=methods)
    (tmp_path / "examples").mkdir()
    # JSON is YAML
    (tmp_path / "examples" / "ioi_grid.yaml").write_text(json.dumps(small.to_dict()), encoding="utf-8")
    commands = [c for c in COMMANDS if c.startswith(("interp run ", "interp runs "))]
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command.replace(".toml", ".yaml"))[1:]
        assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "summary.html").stat().st_size > 100_000
    said = capsys.readouterr().out
    assert all(
        word in said
        for word in ("6 jobs, 6 shards, 6 of them missing", ": done after", "6 of 6 shards whole", "eap-ig")
    )


def test_make_has_the_targets_the_readme_names():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for command in (c for c in COMMANDS if c.startswith("make ")):
        assert f"\n{command.split()[1]}:" in makefile


def test_folders_the_readme_names_exist():
    for name in re.findall(r"^    (?:  )?([\w/]+(?:/|\.py))\s", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        root = README.parent
        assert (root / name).exists() or (root / "interp" / name).exists(), name
