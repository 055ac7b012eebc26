"""`interp run` and `interp runs`, as a person uses them: what is printed, what is refused, the exit status."""

import json

import pandas as pd
import pytest

from interp import Grid, Runs, cli
from interp.jobs import worker

GRID = """
name = "heads"
models = ["mini-gpt2"]
tasks = ["ioi"]
seeds = [0, 1]
n = 2
[[analyses]]
kind = "patch"
options = { sites = "head", positions = "all" }
grid = { direction = ["denoise", "noise"] }
"""


@pytest.fixture
def spec(tmp_path, monkeypatch, mini_gpt2):
    """A grid of four quick jobs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "load_model", lambda name, **options: mini_gpt2)
    path = tmp_path / "grid.toml"
    path.write_text(GRID, encoding="utf-8")
    return path


def interp(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code)


@pytest.fixture
def done(spec, capsys) -> str:
    assert interp("run", spec, "--quiet") == 0
    capsys.readouterr()
    return Grid.from_file(spec).id


def test_running_and_running_again(spec, capsys):
    id = Grid.from_file(spec).id
    assert interp("run", spec) == 0
    said = capsys.readouterr()
    assert f"run {id}: done after" in said.out
    assert "4 shards" in said.out
    assert "heads" in said.err, "a bar with the grid's name"
    before = {path: path.stat().st_mtime_ns for path in Runs("interp-runs").path(id).glob("shards/*")}
    assert interp("run", spec, "--quiet") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not capsys.readouterr().err


def test_a_dry_run_runs_nothing(spec, capsys, tmp_path):
    assert interp("run", spec, "--dry-run") == 0
    said = capsys.readouterr()
    assert "4 jobs, 4 shards, 4 of them missing" in said.out
    assert "measuring mini-gpt2" in said.err
    assert not (tmp_path / "interp-runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tasks", "task", "'task' is not a key of a grid (grid.toml)"),
        ('"ioi"', '"oii"', "'oii' is not a task"),
        ('"patch"', '"patches"', "did you mean 'patch'?"),
        ("positions", "position", "'position' is not an option of a patch job"),
        ("seeds = [0, 1]", "seeds = 3", "seeds of a grid are a list, not 3"),
        ('"head"', '"heads"', "did you mean 'head'?"),
        ("[[analyses]]", "[[analyses]", "grid.toml is no TOML"),
        ('["denoise", "noise"]', '"noise"', "grid.direction of a patch analysis is a list of values, not 'noise'"),
    ],
)
def test_a_wrong_grid_is_refused_in_a_sentence(spec, capsys, old, new, says):
    spec.write_text(GRID.replace(old, new, 1), encoding="utf-8")
    assert interp("run", "grid.toml") == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workers", 0], "workers must be at least 1, not 0"),
        (["--address", "auto"], "an address (auto) is of a Ray cluster"),
        (["--device", "gpu"], "'gpu' is not a torch device"),
        (["--threads", 0], "threads must be at least 1"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_wrong_options_are_said_before_anything_runs(spec, capsys, tmp_path, words, says, dry):
    assert interp("run", spec, *words, *dry) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "interp-runs").exists()


def test_a_missing_file_and_another_ending(spec, capsys):
    assert interp("run", "nothing.toml") == 2
    assert "nothing.toml: No such file" in capsys.readouterr().err
    assert interp("run", "grid.txt") == 2
    assert "'.txt' is not an ending of a file of jobs" in capsys.readouterr().err


def test_jobs_that_fail_are_named_and_the_others_are_kept(spec, capsys):
    spec.write_text(GRID.replace('noise"]', 'noise"], window = [1, 99]'), encoding="utf-8")
    assert interp("run", spec, "--quiet") == 1
    said = capsys.readouterr()
    assert said.err.count("window 99 is not between 1 and the model's 4 layers") == 4
    assert ": failed after" in said.out
    assert interp("runs", "verify") == 1
    assert "4 of 8 shards whole" in capsys.readouterr().out


def test_listing_and_showing(done, capsys):
    assert interp("runs", "list") == 0
    assert capsys.readouterr().out.split()[:2] == [done, "done"]
    assert interp("runs", "show", "heads", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == done
    assert interp("runs", "show", done[:6]) == 0
    assert "direction noise" in capsys.readouterr().out
    assert interp("runs", "show", "nothing") == 2
    assert "no run is meant by 'nothing'" in capsys.readouterr().err


def test_cancelling(done, capsys):
    assert interp("runs", "cancel", "heads") == 2
    assert f"nobody works on run {done}: it is done" in capsys.readouterr().err
    runs = Runs("interp-runs")
    runs.change(done, status="running")
    with runs.lock(done):
        assert interp("runs", "cancel", "heads") == 0
        assert runs.is_cancelled(done)


def test_no_runs_at_all(spec, capsys):
    assert interp("runs", "list") == 2
    assert "there are no runs in interp-runs" in capsys.readouterr().err


def test_damage_is_named_and_mended(done, spec, capsys):
    assert interp("runs", "verify") == 0
    assert "4 of 4 shards whole" in capsys.readouterr().out
    first, second = sorted(Runs("interp-runs").path(done).glob("shards/*"))[:2]
    first.write_bytes(b"PAR1")
    second.unlink()
    assert interp("runs", "verify", done[:8]) == 1
    said = capsys.readouterr().out
    assert f"damaged: {first}: its 4 bytes are not those that were written" in said
    assert f"missing: {second.name[:16]}" in said
    assert interp("run", spec, "--quiet") == 0
    assert interp("runs", "verify") == 0


def test_asking(done, capsys, tmp_path):
    sql = "SELECT direction, count(*) AS n FROM scores GROUP BY direction ORDER BY direction"
    assert interp("runs", "query", sql, "--out", tmp_path / "found.csv") == 0
    assert pd.read_csv(tmp_path / "found.csv").values.tolist() == [["denoise", 128], ["noise", 128]]
    assert "128" in capsys.readouterr().out
    assert interp("runs", "query", "SELECT x FROM scores") == 2
    assert "this query fails" in capsys.readouterr().err
    assert interp("runs", "query", sql, "--out", tmp_path / "found.pickle") == 2
    assert "cannot write .pickle" in capsys.readouterr().err


def test_a_report(done, capsys, tmp_path):
    assert interp("runs", "report", "heads", "--out", "summary.html") == 0
    assert "report:" in capsys.readouterr().out
    assert "heads" in (tmp_path / "summary.html").read_text(encoding="utf-8")
