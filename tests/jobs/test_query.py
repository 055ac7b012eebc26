"""What SQL says of runs is what their files hold: every number once, in its job, and nothing beyond the tables."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp.errors import OptionError
from interp.jobs.arrays import to_table
from interp.jobs.grid import Analysis, Grid
from interp.jobs.query import is_exact, jobs_of, methods_of, query, question_of
from interp.jobs.runner import run
from interp.jobs.spec import Job
from interp.jobs.store import Runs, table_bytes
from tests.jobs.small_grids import JOB

MODELS = {"mini-gpt2": "files:a", "mini-llama": "files:b", "text:": "file:0"}


def filled(runs: Runs, grid: Grid, result, keep=lambda shard: True) -> str:
    """A run whose shards hold what `result` makes of them, without a model; its id."""
    runs.create(grid)
    runs.change(grid.id, models=MODELS, status="done")
    for shard in runs.shards(grid.id):
        if keep(shard):
            runs.keep(grid.id, shard.id, table_bytes(to_table(result(shard))), {})
    return grid.id


def heads(shard) -> xr.DataArray:
    """Effects of heads that say which prompt, layer and head they are of: 100 prompt + 10 layer + head."""
    n = shard.beyond - shard.first
    prompt = np.arange(shard.first, shard.beyond)[:, None, None]
    values = 100 * prompt + 10 * np.arange(2)[:, None] + np.arange(3)
    names = [[f"a{layer}.h{head}" for head in range(3)] for layer in range(2)]
    coords = {"prompt": range(n), "layer": range(2), "head": range(3), "node": (("layer", "head"), names)}
    return xr.DataArray(values.astype(np.float32), coords, ("prompt", "layer", "head"),
                        attrs={"site": "head", "metric": "logit_diff", "unit": "logits", "direction": "denoise"})  # fmt: skip


def grid(**changes) -> Grid:
    asked = {"models": ["mini-gpt2"], "tasks": ["ioi"], "seeds": [0, 1], "n": 5, "block": 2,
             "analyses": [Analysis("patch", {"sites": "head"})]}  # fmt: skip
    return Grid(**{**asked, **changes})


def texts(frame: pd.DataFrame) -> list[tuple]:
    return [tuple(None if pd.isna(v) else v for v in row) for row in frame.itertuples(index=False, name=None)]


# --------------------------------------------------------------------------------------------------------- what is there


def test_a_real_result_is_there_number_by_number(runs, here):
    made = run(JOB, runs)
    result = runs.result(made.id)
    rows = query("SELECT prompt, layer, head, position, value FROM scores", runs)
    assert rows.attrs["notes"] == []
    found = rows.set_index(["prompt", "layer", "head", "position"]).value
    wanted = result.rename("value").to_dataframe().value.dropna()
    assert len(found) == len(wanted)
    pd.testing.assert_series_equal(found.sort_index(), wanted.astype(float).sort_index(), check_index_type=False)


def test_prompts_are_counted_through_the_job(runs):
    filled(runs, grid(), heads)
    answer = query("SELECT DISTINCT prompt, seed, value - 10 * layer - head AS hundreds FROM scores ORDER BY ALL", runs)
    assert texts(answer) == [(p, seed, 100 * p) for p in range(5) for seed in (0, 1)]


def test_jobs_have_their_options_as_columns(runs):
    analyses = [
        Analysis("patch", {"sites": ["head", "mlp_out"], "normalize": True}),
        Analysis("edge_scores", {}, {"method": ["eap", "eap-ig"], "steps": [3]}),
    ]
    id = filled(runs, grid(analyses=analyses, seeds=[0], corruption="random"), heads)
    answer = query("SELECT run, kind, sites, normalize, method, steps, corruption, status FROM jobs ORDER BY ALL", runs)
    assert texts(answer) == [
        (id, "edge_scores", None, None, "eap", 3, "random", "done"),
        (id, "edge_scores", None, None, "eap-ig", 3, "random", "done"),
        (id, "patch", json.dumps(["head", "mlp_out"]), True, None, None, "random", "done"),
    ]


def test_an_option_of_several_types_is_text_and_of_several_numbers_a_number(runs):
    many = {"target": [0.5, 1], "metric": ["probability", ["probability", "logit_diff"]]}
    filled(runs, grid(seeds=[0], analyses=[Analysis("circuit", {}, many)]), heads, keep=lambda shard: False)
    answer = query("SELECT DISTINCT target, metric FROM jobs ORDER BY ALL", runs)
    assert texts(answer) == [(t, m) for t in (0.5, 1.0) for m in ('["probability", "logit_diff"]', "probability")]


def test_results_of_other_layouts_stand_in_one_table(runs):
    measures = xr.Dataset({"cmd": 0.25, "f": ("by", [1.0, 2.0])}, {"by": ["value", "size"]})
    both = grid(seeds=[0], n=2, analyses=[Analysis("patch", {"sites": "head"}), Analysis("circuit")])
    filled(runs, both, lambda shard: heads(shard) if shard.job.kind == "patch" else measures)
    answer = query("SELECT kind, variable, \"by\", layer, value FROM scores WHERE kind = 'circuit' OR value = 0", runs)
    assert sorted(texts(answer), key=str) == [
        ("circuit", "cmd", None, None, 0.25), ("circuit", "f", "size", None, 2.0), ("circuit", "f", "value", None, 1.0),
        ("patch", "head", None, 0, 0.0),
    ]  # fmt: skip


def test_places_that_are_not_there_are_left_out(runs):
    filled(runs, grid(seeds=[0]), lambda shard: heads(shard).where(heads(shard) % 100 != 11))
    assert texts(query("SELECT count(*), count(*) FILTER (layer = 1 AND head = 1) FROM scores", runs)) == [(5 * 5, 0)]


def test_labels_that_are_called_as_a_column_is(runs):
    def result(shard) -> xr.DataArray:
        return xr.DataArray([[1.0, 2.0]], {"metric": ["probability"], "seed": [7, 8]}, ("metric", "seed"), name="x")

    asked = [Analysis("circuit", {"metric": ["probability"]})]
    filled(runs, grid(seeds=[3], analyses=asked), result)
    answer = query("SELECT seed, label_seed, metric, value FROM scores ORDER BY value", runs)
    assert texts(answer) == [(3, 7, "probability", 1.0), (3, 8, "probability", 2.0)]


def test_several_runs_stand_side_by_side(runs):
    first = filled(runs, grid(), heads)
    second = filled(runs, grid(models=["mini-gpt2", "mini-llama"], name="both"), heads)
    answer = query(
        "SELECT run, count(DISTINCT job) AS jobs, count(*) AS n FROM scores GROUP BY run ORDER BY jobs", runs
    )
    assert texts(answer) == [(first, 2, 60), (second, 4, 120)]
    assert texts(query("SELECT DISTINCT run FROM scores", runs, ["both"])) == [(second,)]
    assert texts(query("SELECT run, name, status, jobs FROM runs", runs, [second[:12]])) == [
        (second, "both", "done", 4)
    ]
    shared = "SELECT count(*) FROM jobs a JOIN jobs b ON a.job = b.job AND a.run < b.run"
    assert texts(query(shared, runs)) == [(2,)]


def test_no_runs_are_no_rows(tmp_path):
    runs = Runs(tmp_path / "nothing")
    for name in ("runs", "jobs", "scores"):
        assert len(query(f"SELECT * FROM {name}", runs)) == 0


def test_a_question_about_runs_reads_no_shards(runs, monkeypatch):
    filled(runs, grid(), heads)
    monkeypatch.setattr(Runs, "verify", lambda *_: pytest.fail("shards were read"))
    assert texts(query("SELECT shards, failed FROM runs", runs)) == [(0, 0)]


# ------------------------------------------------------------------------------------------------------- what is not there


def test_missing_and_failed_jobs_are_told(runs):
    id = filled(
        runs,
        grid(seeds=[0, 1, 2]),
        heads,
        keep=lambda shard: shard.job.seed == 0 or (shard.job.seed == 1 and shard.first),
    )
    runs.change(id, failed={job.id: "no room" for job in runs.grid(id).everything if job.seed == 2})
    answer = query("SELECT seed, shards, whole, status, error FROM jobs ORDER BY seed", runs)
    assert texts(answer) == [(0, 3, 3, "done", None), (1, 3, 2, "missing", None), (2, 3, 0, "failed", "no room")]
    assert answer.attrs["notes"] == [f"run {id} is done: 4 of its 9 shards are not there"]
    assert texts(query("SELECT seed, count(*) FROM scores GROUP BY seed ORDER BY seed", runs)) == [(0, 30), (1, 18)]


def test_a_damaged_shard_is_named_and_not_read(runs):
    id = filled(runs, grid(seeds=[0]), heads)
    path = min((runs.path(id) / "shards").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    answer = query("SELECT count(DISTINCT shard) FROM scores", runs)
    assert texts(answer) == [(2,)]
    assert answer.attrs["notes"][0].startswith(f"run {id}: {path.name} was left out: ")


def test_a_run_that_cannot_be_read_is_named(runs):
    id, broken = filled(runs, grid(), heads), filled(runs, grid(seeds=[9]), heads)
    (runs.path(broken) / "run.json").write_text("{}")
    answer = query("SELECT run FROM runs", runs)
    assert texts(answer) == [(id,)]
    assert answer.attrs["notes"][0].startswith(f"run {broken} was left out: ")


def test_a_run_that_is_not_there_is_refused(runs):
    with pytest.raises(OptionError, match="no run is meant by 'nothing'"):
        query("SELECT * FROM runs", runs, ["nothing"])


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEKT 1", "this query fails: Parser Error: syntax error"),
        ("SELECT nope FROM scores", 'this query fails: Binder Error: Referenced column "nope" not found'),
        ("SELECT * FROM nope", "this query fails: Catalog Error: Table with name nope does not exist"),
        ("SELECT CAST('x' AS INTEGER)", "this query fails: Conversion Error"),
        ("", "this query asks nothing"),
        (" ; -- a remark", "this query asks nothing"),
    ],
)
def test_a_wrong_question_is_one_sentence(runs, sql, says):
    with pytest.raises(OptionError, match=says) as caught:
        query(sql, runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "COPY runs TO '{folder}/out.parquet'",
        "EXPORT DATABASE '{folder}/out'",
        "ATTACH '{folder}/out.db'",
        "SELECT * FROM read_text('{folder}/secret.txt')",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM glob('{folder}/*')",
        "SET enable_external_access = true",
        "SET lock_configuration = false; SELECT 1",
        "INSTALL httpfs",
        "SELECT * FROM held",
        "SELECT * FROM jobs_table",
    ],
)
def test_a_question_reaches_nothing_else(runs, tmp_path, sql):
    filled(runs, grid(seeds=[0]), heads)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.csv").write_text("a\n1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match="this query fails"):
        query(sql.format(folder=tmp_path), runs)
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------- methods and questions


def test_methods_are_what_jobs_differ_in(runs):
    analyses = [
        Analysis("circuit", {}, {"method": ["eap", "eap-ig"], "ablation": ["corrupt", "mean"]}),
        Analysis("attribute", {"sites": "head", "rules": "relp"}),
        Analysis("snmf", {"hook": "blocks.0.mlp.hook_post"}, {"n_features": [4, 8]}),
    ]
    id = filled(runs, grid(seeds=[0], analyses=analyses), heads)
    jobs = runs.grid(id).everything
    told = methods_of(jobs_of(runs.get(id), jobs, runs.shards(id), runs.verify(id)), {job.id: job for job in jobs})
    assert sorted(zip(told.kind, told.task, told.label, told.question, strict=True)) == [
        ("attribute", "ioi", "relp", ""),
        ("circuit", "ioi", "eap", "ablation corrupt"),
        ("circuit", "ioi", "eap", "ablation mean"),
        ("circuit", "ioi", "eap-ig", "ablation corrupt"),
        ("circuit", "ioi", "eap-ig", "ablation mean"),
        ("snmf", "text", "n_features 4", ""),
        ("snmf", "text", "n_features 8", ""),
    ]


def test_an_estimate_and_its_truth_have_one_question():
    def job(kind, n=8, **options) -> Job:
        return Job(kind, "mini-gpt2", task="ioi", n=n, options=options)

    same = [
        (job("attribute", sites="head", rules="relp"), job("patch", sites="head", direction="denoise")),
        (job("edge_scores", method="eap-ig", steps=3), job("edges")),
        (job("edge_scores", direction="noise"), job("edge_scores", method="exact", direction="noise")),
    ]
    other = [
        (job("attribute", sites="head"), job("patch", sites="mlp_out")),
        (job("attribute", sites="head"), job("patch", sites="head", direction="noise")),
        (job("attribute", sites="head"), job("patch", sites="head", n=4)),
        (job("edge_scores", level="node"), job("edges")),
        (job("edge_scores"), job("edges", edges="m0->m1")),
    ]
    for one, truth in same:
        assert question_of(one) == question_of(truth), (one, truth)
    for one, truth in other:
        assert question_of(one) != question_of(truth), (one, truth)
    assert [is_exact(one) for pair in same for one in pair] == [False, True] * 3
