"""Every notebook runs from top to bottom, as a script, where nothing but the project is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    told = {"start_here", "ioi_from_scratch", "patching_best_practices", "rules_compared", "circuits_and_stability",
            "saes_and_feature_circuits", "snmf_weekdays", "neurons", "batch_runs"}  # fmt: skip
    assert told == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    environment = {"PYTHONWARNINGS": "error::UserWarning:__main__", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one(path):
    text = path.read_text(encoding="utf-8")
    assert "format_name: percent" in text
    assert text.count("# %%") > 5
    assert "# %% [markdown]\n# # " in text, "it has a title"
