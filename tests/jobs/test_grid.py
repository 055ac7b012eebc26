"""A grid is its jobs: however it is written down it is one run, and what is wrong in a file is named."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import InterpError, OptionError, TaskError
from interp.jobs.grid import Analysis, Grid
from interp.jobs.spec import Job
from tests.small_pairs import refused

PATCH = Analysis("patch", {"sites": "head"})
JOB = Job("patch", "mini-gpt2", task="ioi", n=4, options={"sites": "head"})
GRID = Grid(
    name="which way",
    models=["mini-gpt2", "mini-llama"],
    tasks=["ioi", "capitals"],
    seeds=[0, 1, 2],
    n=16,
    analyses=[Analysis("circuit", {"ablation": "corrupt"}, {"method": ["eap", "eap-ig"], "target": [0.8, 0.9]}), PATCH],
    jobs=[JOB],
)
TOML = """
name = "which way"
models = ["mini-gpt2", "mini-llama"]
tasks = ["ioi", "capitals"]
seeds = [0, 1, 2]
n = 16
[[analyses]]
kind = "circuit"
options = { ablation = "corrupt" }
grid = { method = ["eap", "eap-ig"], target = [0.8, 0.9] }
[[analyses]]
kind = "patch"
options = { sites = "head" }
[[jobs]]
kind = "patch"
model = "mini-gpt2"
task = "ioi"
n = 4
options = { sites = "head" }
"""
YAML = """
name: which way
models: [mini-gpt2, mini-llama]
tasks: [ioi, capitals]
seeds: [0, 1, 2]
n: 16
analyses:
  - kind: circuit
    options: {ablation: corrupt}
    grid: {method: [eap, eap-ig], target: [0.8, 0.9]}
  - kind: patch
    options: {sites: head}
jobs:
  - {kind: patch, model: mini-gpt2, task: ioi, n: 4, options: {sites: head}}
"""


def test_every_combination_is_a_job_once():
    jobs = GRID.everything
    assert len(jobs) == 1 + 2 * 2 * 3 * (4 + 1)
    assert len({job.id for job in jobs}) == len(jobs)
    assert {job.options["method"] for job in jobs if job.kind == "circuit"} == {"eap", "eap-ig"}
    assert len(replace(GRID, jobs=[JOB, JOB]).everything) == len(jobs)
    models = [job.model for job in jobs[1:]]
    assert models == sorted(models), "model by model, so that models are loaded seldom"


@pytest.mark.parametrize(("name", "text"), [("g.toml", TOML), ("g.yaml", YAML), ("g.yml", YAML)])
def test_one_grid_has_one_id_in_every_language(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert Grid.from_file(tmp_path / name).id == GRID.id
    assert Grid.from_file(tmp_path / name).name == "which way"
    assert Grid.from_file(GRID.to_file(tmp_path / "again.json")) == GRID
    assert Grid.from_dict(json.loads(json.dumps(GRID.to_dict()))).id == GRID.id


@given(st.permutations(range(2)), st.permutations(range(3)), st.permutations(range(2)), st.text())
@settings(max_examples=20, deadline=None)
def test_neither_order_nor_name_is_a_question(models, seeds, analyses, name):
    other = replace(
        GRID,
        name=name,
        models=[GRID.models[i] for i in models],
        seeds=seeds,
        analyses=[GRID.analyses[i] for i in analyses],
    )
    assert other.id == GRID.id


def test_a_single_job_is_a_grid_of_its_own_id():
    assert Grid(jobs=[JOB]).id == JOB.id
    drawn = Grid(models=["mini-gpt2"], tasks=["ioi"], n=4, analyses=[PATCH])
    assert drawn.id == JOB.id
    assert str(drawn) == str(JOB)
    assert replace(GRID, seeds=[0, 1]).id != GRID.id


def test_a_grid_of_text_needs_no_tasks():
    of_text = Analysis("snmf", {"hook": "blocks.0.mlp.hook_post"})
    assert [job.seed for job in Grid(models=["mini-gpt2"], seeds=[3, 4], analyses=[of_text]).everything] == [3, 4]
    both = Grid(models=["mini-gpt2"], tasks=["ioi", "capitals"], analyses=[of_text, PATCH])
    assert [job.kind for job in both.everything] == ["snmf", "patch", "patch"]


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("models of a grid are a list, not 'mini-gpt2'", {"models": "mini-gpt2"}),
        ("seeds of a grid are a list, not", {"seeds": [True]}),
        ("a grid's name is a text", {"name": 3}),
        ("has analyses and no models", {"models": []}),
        ("has analyses and no seeds", {"seeds": []}),
        ("kind circuit needs tasks", {"tasks": []}),
        ("asks nothing", {"analyses": [], "jobs": []}),
        ("'iooi' is not a task .* did you mean 'ioi'", {"tasks": ["iooi"]}),
        ("n of a job is a whole number", {"n": 0}),
    ],
)
def test_a_wrong_grid_is_refused_by_name(says, change):
    with refused(InterpError, says):
        replace(GRID, **change)


@pytest.mark.parametrize(
    ("says", "values"),
    [
        ("did you mean 'patch'", {"kind": "pach"}),
        ("options of an analysis are names", {"kind": "patch", "options": ["sites"]}),
        ("grid.window of a patch analysis is a list", {"kind": "patch", "grid": {"window": 3}}),
        ("grid.window of a patch analysis is a list", {"kind": "patch", "grid": {"window": []}}),
        ("sites of a patch .* twice", {"kind": "patch", "options": {"sites": "q"}, "grid": {"sites": ["q"]}}),
    ],
)
def test_a_wrong_analysis_is_refused_by_name(says, values):
    with refused(OptionError, says):
        Analysis(**values)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("g.toml", "models = [", "is no TOML"),
        ("g.yaml", "models: [", "is no YAML"),
        ("g.json", "{", "is no JSON"),
        ("g.json", "[]", "holds no table of a grid"),
        ("g.ini", "", "'.ini' is not an ending .*g.ini"),
        ("g.toml", 'modles = ["mini-gpt2"]', "'modles' is not a key of a grid .* did you mean 'models'"),
        ("g.toml", "[[analyses]]\nknid = 'patch'", "'knid' is not a key of an analysis .* did you mean 'kind'"),
        ("g.toml", "[[analyses]]\noptions = {}", "lacks its kind"),
        ("g.toml", "analyses = 3", "analyses of .* are a list of tables"),
        ("g.toml", "[[jobs]]\nkind = 'patch'", "lacks model"),
        ("g.toml", "[[jobs]]\nkind = 'patch'\nmodle = 'm'", "'modle' is not a key of a job .* did you mean 'model'"),
        ("g.toml", "format = 'interp-grid-0'", "of format 'interp-grid-0'"),
        ("g.toml", "[[analyses]]\nkind = 'patch'\ngrid = {q = 3}", "grid.q of a patch analysis"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InterpError, match=says) as caught:
        Grid.from_file(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_option_of_a_job_names_the_file(tmp_path):
    path = tmp_path / "g.toml"
    path.write_text(TOML.replace("sites", "stes"), encoding="utf-8")
    with refused(OptionError, "g.toml.*did you mean 'sites'"):
        Grid.from_file(path)
    path.write_text(TOML.replace('"ioi"', '"iio"'), encoding="utf-8")
    with refused(TaskError, "g.toml.*did you mean 'ioi'"):
        Grid.from_file(path)


def test_a_file_that_is_not_there():
    with refused(OptionError, "nowhere.toml: No such file"):
        Grid.from_file("nowhere.toml")
