"""A summary tells what the shards hold, names what is not there, and compares what can be compared."""

import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp.circuits.evaluate import MIB_FRACTIONS
from interp.errors import OptionError
from interp.jobs.comparison import Measure, compare_measures, compare_methods, means_text
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import run
from interp.jobs.summary import summary
from tests.jobs.test_query import filled, heads

METHODS = {"eap": 3.0, "eap-ig": 1.0, "eliminate": 2.0}
TASKS = {"ioi": 1.0, "capitals": 10.0}


def circuits(seeds=(0, 1), **changes) -> Grid:
    asked = {"name": "<b>which</b>", "models": ["mini-gpt2", "mini-llama"], "tasks": [*TASKS], "seeds": list(seeds), "n": 4,
             "analyses": [Analysis("circuit", {}, {"method": [*METHODS]})]}  # fmt: skip
    return Grid(**{**asked, **changes})


def judged(shard) -> xr.Dataset:
    """A circuit whose CMD is known: (method + seed / 10) times the task's factor; elimination has no stability."""
    method = shard.job.options["method"]
    cmd = (METHODS[method] + shard.job.seed / 10) * TASKS[shard.job.task]
    n = np.floor(np.array(MIB_FRACTIONS) * 200)
    return xr.Dataset(
        {"cmd": cmd, "cpr": 1.0, "smallest": 20.0, "smallest_held_out": 1 + 0.01 * METHODS[method],
         "smallest_stability": np.nan if method == "eliminate" else 0.9, "n_edges": ("fraction", n)},
        {"fraction": list(MIB_FRACTIONS)}, attrs={"held_out": 1},
    )  # fmt: skip


def section(found, title: str):
    [one] = [s for s in found.sections if s.title == title]
    return one


def table_of(found, title: str, start: str = "") -> pd.DataFrame:
    return next(table for caption, table in section(found, title).tables.items() if caption.startswith(start))


# -------------------------------------------------------------------------------------------------------------- circuits


def test_means_are_over_seeds_and_the_best_is_marked(runs):
    found = summary(runs, filled(runs, circuits(), judged))
    table = table_of(found, "Circuits", "Means").set_index(["model", "task", "method"])
    assert len(table) == 2 * 2 * 3
    row = table.loc["mini-llama", "ioi", "eap-ig"]
    assert row["CMD ↓"] == "1.05 (1 to 1.1) *"
    assert row["smallest circuit, % of edges ↓"] == "10 (10 to 10) *"  # 20 of 200 edges; a tie is marked for all
    assert row["faithfulness, held out → 1"] == "1.01 (1.01 to 1.01) *"
    assert table.loc["mini-gpt2", "capitals", "eliminate"]["CMD ↓"] == "20.5 (20 to 21)"
    assert set(table.xs("eliminate", level="method")["stability, Jaccard ↑"]) == {"-"}


def test_pairs_are_those_of_compare_methods(runs):
    found = summary(runs, filled(runs, circuits(), judged))
    compared, jobs = found.data["circuits_compared"], found.data["circuits"]
    direct = compare_methods(jobs.rename(columns={"cmd": "value"}), by="label", match=["model", "task", "seed"],
                             cluster=["model", "task"], better="lower", correction="none")  # fmt: skip
    ours = compared[compared.measure == "CMD ↓"]
    pd.testing.assert_frame_equal(ours[direct.columns].drop(columns="p_adjusted"), direct.drop(columns="p_adjusted"))
    assert ours.won.tolist() == [0.0, 0.0, 1.0]  # eap against both; eap-ig against elimination
    assert (ours.units == 4).all()
    near = compared[compared.measure == "|1 − faithfulness, held out| ↓"]
    assert near.mean_first.tolist() == pytest.approx([0.03, 0.03, 0.01])
    assert len(compared) == 4 * 3 + 1  # of stability only the pair that has it
    assert (compared.p_adjusted >= compared.p).all()
    notes = section(found, "Circuits").notes
    assert notes[0] == "stability, Jaccard is not defined for eliminate, so that is not compared by it."
    assert notes[-1].startswith("With 4 clusters (a model and a task each) no p can be below 0.125")


def test_from_five_seeds_on_the_interval_is_the_bootstraps(runs):
    few, many = (circuits(range(n), models=["mini-gpt2"], tasks=["ioi"]) for n in (4, 6))
    told = [table_of(summary(runs, filled(runs, grid, judged)), "Circuits", "Means") for grid in (few, many)]
    ends = [[float(x) for x in re.findall(r"[\d.]+", table["CMD ↓"][0])] for table in told]
    assert ends[0] == [3.15, 3.0, 3.3]
    mean, low, high = ends[1]
    assert 3.0 < low < mean < high < 3.5


def test_the_page_and_the_text_hold_the_numbers_and_no_markup_of_names(runs, tmp_path):
    found = summary(runs, filled(runs, circuits(), judged))
    text, page = str(found), found.report(tmp_path / "grid.html").read_text()
    assert text.startswith("<b>which</b>: status done, jobs 24, done 24")
    for part in ("20.5 (20 to 21)", "p by Holm", "lower is better", "With 4 clusters"):
        assert part in text
    body = page[page.index("<body>") :]
    assert "<b>which</b>" not in body
    assert "&lt;b&gt;which" in body
    for part in ("20 to 21", "p by Holm", "lower is better", "weights of mini-llama", "plot-"):
        assert part in body
    assert not re.search(r"(src|href)=[\"']?http", body)


def test_figures_show_every_seed(runs):
    found = summary(runs, filled(runs, circuits(), judged))
    [figure] = section(found, "Circuits").figures.values()
    dots = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name for trace in dots] == [*METHODS]
    assert sorted(dots[0].x) == pytest.approx(sorted(found.data["circuits"].query("label == 'eap'").cmd))


# ---------------------------------------------------------------------------------------------------- what is not there


def test_failed_missing_and_damaged_are_told_and_never_averaged(runs):
    grid = circuits()
    id = filled(runs, grid, judged, keep=lambda shard: (shard.job.seed, shard.job.options["method"]) != (1, "eap"))
    lost = [job for job in grid.everything if (job.seed, job.options["method"]) == (1, "eap")]
    runs.change(id, status="failed", failed={lost[0].id: "no room <here>"})
    path = next(iter(runs.verify(id).whole.values()))
    path.write_bytes(path.read_bytes()[:-1])
    found = summary(runs, id)
    assert found.facts["failed"] == "1"
    assert found.facts["missing"] == "4"
    assert "no room <here>" in str(found)
    notes = " ".join(section(found, "What was run").notes)
    assert path.name in notes
    assert "4 jobs are not complete" in notes
    circuit_notes = section(found, "Circuits").notes
    assert "CMD: 5 of 8 cells are not compared: some method lacks them." in circuit_notes
    means = table_of(found, "Circuits", "Means").set_index(["model", "task", "method"])
    assert means.loc[("mini-llama", "ioi", "eap"), "seeds"] == 1
    assert (found.data["circuits_compared"].query("measure == 'CMD ↓'").n == 3).all()


def test_a_run_without_results_has_a_summary(runs, tmp_path):
    id = filled(runs, circuits(), judged, keep=lambda shard: False)
    found = summary(runs, id)
    assert [s.title for s in found.sections] == ["What was run"]
    assert found.report(tmp_path / "x.html").is_file()


def test_a_run_that_is_not_there_is_refused(runs):
    with pytest.raises(OptionError, match="no run is meant by 'it'"):
        summary(runs, "it")


def test_methods_of_own_prompts_that_cannot_be_told_apart_are_not_compared():
    table = pd.DataFrame(
        {"model": "m", "task": "own prompts", "question": "", "seed": 0, "label": ["a", "a", "b"], "x": [1.0, 2, 3]}
    )
    compared, [note] = compare_measures(table, [Measure("x", "X", "higher")])
    assert compared is None
    assert "has more than one value of label a" in note


def test_one_method_is_compared_with_nothing():
    table = pd.DataFrame({"model": "m", "task": "t", "question": "", "seed": [0, 1], "label": "a", "x": [1.0, 2.0]})
    assert compare_measures(table, [Measure("x", "X", "higher")]) == (None, [])
    assert "*" not in means_text(table, [Measure("x", "X", "higher")])[1].to_string()


# ------------------------------------------------------------------------------------------------------------ other kinds


def estimated(shard) -> xr.DataArray:
    """Exact effects of heads; estimates by "gradient" are these, by others noise."""
    effects = heads(shard) - 200
    if shard.job.options.get("rules", "gradient") == "gradient":
        return effects.assign_attrs(heads(shard).attrs)
    rng = np.random.default_rng(shard.job.seed)
    return effects.copy(data=rng.normal(size=effects.shape).astype(np.float32)).assign_attrs(heads(shard).attrs)


@pytest.fixture
def patched(runs):
    analyses = [
        Analysis("patch", {"sites": "head"}),
        Analysis("attribute", {"sites": "head"}, {"rules": ["gradient", "relp"]}),
        Analysis("attribute", {"sites": "head", "direction": "noise"}),  # nothing exact answers it
    ]
    grid = Grid(models=["mini-gpt2"], tasks=["ioi", "capitals"], seeds=[0, 1], n=4, block=2, analyses=analyses)
    return summary(runs, filled(runs, grid, estimated))


def test_estimates_stand_beside_the_exact_effects_of_the_same_question(patched):
    found = patched.data["agreement"]
    assert sorted(found.label.unique()) == ["gradient", "relp"]
    assert set(found.question) == {"direction denoise"}
    assert found.query("label == 'gradient'").pearson.to_numpy() == pytest.approx(1.0)
    assert found.query("label == 'gradient'").relative_error.to_numpy() == pytest.approx(0.0)
    assert found.query("label == 'relp'").pearson.abs().max() < 0.9
    compared = patched.data["agreement_compared"]
    assert compared.query("measure == 'Pearson ↑'").won.tolist() == [1.0]
    assert (compared.of == "attribute: head").all()


def test_the_strongest_places_are_means_over_prompts_and_seeds(patched):
    rows = patched.data["strongest"]
    [row] = rows[(rows.kind == "patch") & (rows.task == "ioi")].itertuples()
    # 100 prompt + 10 layer + head - 200, prompts 0 to 3: layer and head 0 is the farthest from 0
    assert row.strongest.split(", ") == ["a0.h0 -50", "a0.h1 -49", "a0.h2 -48", "a1.h0 -40", "a1.h1 -39"]
    assert row.seeds == 2
    assert row.of == "head, denoise, logit_diff in logits."


def test_seeds_of_other_lengths_are_averaged_place_by_place(runs):
    def result(shard) -> xr.DataArray:
        n = 2 + shard.job.seed  # the longer prompts have one position more
        values = np.tile(np.arange(n, dtype=np.float32), (shard.beyond - shard.first, 1, 1))
        labels = {"layer": [0], "position": range(n), "token": ("position", [f"{i}:x{n}" for i in range(n)])}
        return xr.DataArray(values + n, labels, ("prompt", "layer", "position"),
                            attrs={"site": "resid_pre", "metric": "logit_diff", "direction": "denoise"})  # fmt: skip

    grid = Grid(
        models=["mini-gpt2"], tasks=["ioi"], seeds=[0, 1], n=2, analyses=[Analysis("patch", {"sites": "resid_pre"})]
    )
    [row] = summary(runs, filled(runs, grid, result)).data["strongest"].itertuples()
    assert row.strongest == "layer 0 @2 +5, layer 0 @1 +3.5, layer 0 @0 +2.5"


def test_dictionaries_stand_in_tables_by_what_varies(runs):
    def result(shard) -> xr.Dataset:
        k = shard.job.options["n_features"]
        return xr.Dataset({"error": 1 / k, "n_iter": 5.0, "neurons_per_feature": 2.0 * k, "stability": np.nan})

    analyses = [Analysis("snmf", {"hook": "blocks.0.mlp.hook_post"}, {"n_features": [4, 8]})]
    id = filled(runs, Grid(models=["mini-gpt2"], seeds=[0], analyses=analyses), result)
    table = table_of(summary(runs, id), "Semi-NMF")
    assert table.method.tolist() == ["n_features 4", "n_features 8"]
    assert table["error, share of squared norm ↓"].tolist() == ["0.25", "0.125 *"]
    assert table["neurons per feature"].tolist() == ["8", "16"]
    assert table["stability, cosine ↑"].tolist() == ["-", "-"]


def test_a_real_grid_from_jobs_to_page(runs, here, tmp_path):
    """Circuits, exact effects and estimates of a model, as they come out of the runner."""
    analyses = [
        Analysis("circuit", {"method": "eap", "n_resamples": 3}),
        Analysis("patch", {"sites": "head"}),
        Analysis("attribute", {"sites": "head"}, {"rules": ["gradient", "relp"]}),
    ]
    grid = Grid(models=["mini-gpt2"], tasks=["ioi"], n=2, block=1, analyses=analyses)
    made = run(grid, runs)
    assert made.status == "done", made.error
    found = summary(runs, made.id)
    [job] = [job for job in grid.everything if job.kind == "circuit"]
    assert found.data["circuits"].cmd.tolist() == [float(runs.result(made.id, job).cmd)]
    assert found.data["agreement"].label.tolist() == ["gradient", "relp"]
    assert "a3.h1 @14" in str(found)
    assert found.report(tmp_path / "grid.html").stat().st_size > 1e6  # plotly is in it
