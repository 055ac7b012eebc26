# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many runs, and one question to all of them
#
# One map of one model on one task is an anecdote. To say that a method is better than another, it has to be so over
# models, tasks and draws of prompts, and somebody has to keep count. This notebook asks which of three ways of scoring
# edges finds the more faithful circuits: it writes the grid down, runs it, breaks it on purpose, and asks the results.
#
# It runs on the bundled models in about a minute; as a script: `python notebooks/batch_runs.py`. What circuits, CMD and
# faithfulness are is told in `circuits_and_stability.py`.

# %%
import tempfile
from pathlib import Path

from interp import (
    Analysis,
    Grid,
    Job,
    Runs,
    activation_patching,
    compare_methods,
    load_model,
    load_task,
    query,
    run,
    summary,
)

# %% tags=["parameters"]
MODELS = ["mini-gpt2", "mini-llama"]
TASKS = ["ioi", "capitals"]
SEEDS = [0, 1]
N = 8

# %% [markdown]
# ## The question, written down
#
# A `Grid` is every analysis of every model on every task with every seed. It is frozen, its names are checked when it
# is made, and it may as well be a TOML or YAML file for `interp run`. The seed draws the prompt pairs; the circuits are
# judged on as many others.

# %%
grid = Grid(
    name="ways of scoring edges", models=MODELS, tasks=TASKS, seeds=SEEDS, n=N,
    analyses=[Analysis("circuit", grid={"method": ["eap", "clean-corrupted", "eap-ig"]})],
)  # fmt: skip
print(f"{len(grid.everything)} jobs, run {grid.id}; the first: {grid.everything[0]}")

# %% [markdown]
# A grid's id is a hash of its jobs, so the same question is the same run, however it is written. A typing error does
# not make another question: it is refused, with the nearest right name.

# %%
folder = Path(tempfile.mkdtemp())
same = Grid.from_file(grid.to_file(folder / "grid.json"))
assert same.id == grid.id
try:
    Grid(models=MODELS, tasks=TASKS, analyses=[Analysis("circuit", grid={"metod": ["eap"]})])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Running it
#
# `run` computes what is missing and keeps each *shard* - some prompts of one job - as one parquet file, which is written
# beside its place, named by its own checksum and then renamed. `workers=2` would use two processes, `executor="ray"` a
# cluster; the numbers are the same.

# %%
runs = Runs(folder / "runs")
done = run(grid, runs)
print(f"{done.status} after {done.seconds:.0f} s: {done.shards} shards; weights {done.models}")
assert done.status == "done"

# %% [markdown]
# ## Breaking it
#
# Whatever happens to a run - a killed process, a full disk, a flipped bit - the same call goes on where it ended. Here one
# shard is cut short and another is removed. Both are found, named, and computed again; nothing else is.

# %%
first, second = sorted((runs.path(grid.id) / "shards").glob("*.parquet"))[:2]
first.write_bytes(first.read_bytes()[:-100])
second.unlink()
found = runs.verify(grid.id)
print(f"{len(found.whole)} whole, {len(found.missing)} missing")
print(*(f"{path.name}: {why}" for path, why in found.damaged.items()))
run(grid, runs)
assert not runs.verify(grid.id).missing
assert first.is_file(), "the same bits, so the same checksum and the same name"

# %% [markdown]
# ## Asking
#
# Every number of every run can be asked for in SQL. The table `scores` has a row for each number, with everything that
# its job was asked as columns; `jobs` and `runs` say what was done, on what machine, from which weights.

# %%
cmd = query("SELECT model, task, seed, method, value FROM scores WHERE variable = 'cmd'", runs)
print(cmd.pivot_table(index="method", columns=["model", "task"], values="value").round(4).to_string())

# %% [markdown]
# ## Is the difference real?
#
# Cells of the grid differ more than methods do, so methods are compared within cells. The interval is a bootstrap over
# cells, p is of a sign-flip test, corrected (Holm) for the number of comparisons. Seeds of one model and task are not
# independent: `cluster` makes the model and task the unit, and then there are only four of them, for which no test can
# give a p below 1/8. A grid that is to settle something needs more models and tasks, not more seeds.

# %%
cells = compare_methods(cmd, better="lower", reference="eap")
clusters = compare_methods(cmd, better="lower", reference="eap", cluster=("model", "task"))
shown = ["first", "second", "units", "difference", "low", "high", "p_adjusted", "won"]
print(cells[shown].round(4).to_string(index=False))
print(clusters[shown].round(4).to_string(index=False))
assert (clusters.units == len(MODELS) * len(TASKS)).all()
assert (clusters.p >= 2.0 ** (1 - clusters.units) - 1e-12).all(), (
    "of 2^n ways to flip n differences, two are as extreme"
)

# %% [markdown]
# ## The same numbers as anywhere else
#
# A job is one call of the library, so its result is that of the call, bit for bit. Prompts are done in blocks, each of
# them a shard, and come back as one array.

# %%
job = Job("patch", MODELS[0], task="ioi", n=N, block=4, options={"sites": "head", "positions": "all"})
run(job, runs)
model = load_model(MODELS[0])
direct = activation_patching(model, load_task("ioi", model, n=N), "head", positions="all", batch_size=4)
assert runs.result(job.id).identical(direct)
print(runs.result(job.id).mean("prompt").to_pandas().round(2).to_string())

# %% [markdown]
# ## A report, and other doors
#
# `summary` tells a whole grid on one page. `interp run grid.toml`, `interp runs query "..."` and `interp runs report ID`
# do all of this from the command line, and the dashboard's page *Runs* (`interp app --runs FOLDER`) lists the runs of a
# folder and opens any job of theirs.

# %%
told = summary(runs, grid.id)
print(str(told)[:1200])
print("report:", told.report(folder / "summary.html").name)
