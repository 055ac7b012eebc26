"""The README's examples run as they stand."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from interp import cli

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


# the dashboard runs until it is stopped: tests/test_app_cli.py starts it
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("interp ") and c.split()[1] != "app"])
def test_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    assert cli.main(words) == 0, capsys.readouterr().err
    for flag, value in itertools.pairwise(words):
        if flag == "--out":
            assert (tmp_path / value).stat().st_size > 0


def test_make_has_the_targets_the_readme_names():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for command in (c for c in COMMANDS if c.startswith("make ")):
        assert f"\n{command.split()[1]}:" in makefile


def test_folders_the_readme_names_exist():
    for name in re.findall(r"^    (?:  )?([\w/]+(?:/|\.py))\s", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        root = README.parent
        assert (root / name).exists() or (root / "interp" / name).exists(), name
