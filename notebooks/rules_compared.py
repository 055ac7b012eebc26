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
# # Backward rules, each beside exact patching
#
# Exact activation patching asks of every place in a model: what happens to the answer if this place, and nothing else, takes
# its value from another run? One backward pass estimates all of these at once: a *multiplier* for every number in the model,
# times that number's difference between the runs. Which multiplier is a choice of *rules*: what flows back through norms,
# activations, gates and attention. This notebook lays every rule set beside the truth.
#
# It runs on the bundled models in about a minute; as a script: `python notebooks/rules_compared.py`.

# %%
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import interp
from benchmarks.fidelity import cases, rows_of, summary
from interp import activation_patching, attribution, compare, get_rules, load_model, load_task, site_secants
from interp.agreement import agreement_text
from interp.plots import heatmap
from interp.rules import RULES

warnings.filterwarnings("ignore", message=".*is near zero on prompts")
SITES = ["resid_pre", "attn_out", "mlp_out", "head"]

# %% [markdown]
# ## One behaviour
#
# mini-llama on indirect object identification: the clean prompt names Mary and John and lets John give; in the corrupt one
# the roles are exchanged. Every score below is in logits of difference between the two names.

# %%
model = load_model("mini-llama")
pairs = load_task("ioi", model, n=16)
exact = activation_patching(model, pairs, SITES)
heatmap(exact.resid_pre, title="exact: residual stream before each layer")

# %%
estimates = {name: attribution(model, pairs, SITES, rules=name) for name in ("gradient", "relp", "secant")}
heatmap(estimates["gradient"].resid_pre, title="gradient (attribution patching)")

# %%
heatmap(estimates["secant"].resid_pre, title="secant")

# %% [markdown]
# The gradient at the corrupt run does not see what a change as large as another name does. How far off is it? No single
# number says so. Pearson is blind to scale; slope and relative error are not; Spearman and sign look at places whose effect
# is not exactly zero, most of which are tiny.

# %%
for name, scores in estimates.items():
    print(f"{name}\n{agreement_text(compare(scores, exact))}\n")

# %% [markdown]
# ## What makes the secant different
#
# A gradient is the slope at one run. A secant is the slope *between* the two runs: `(f(a) - f(b)) / (a - b)` for an
# activation, midpoints for products, and for softmax and norms the exact differences written out. Composed, they carry the
# metric's whole difference back: at every cut of the residual stream the scores add up to metric(clean) - metric(corrupt).

# %%
gap = exact.metric_clean - exact.metric_corrupt
for name, scores in estimates.items():
    off = np.abs(scores.resid_pre.sum("position") - gap).max() / np.abs(gap).max()
    print(f"{name:10} largest error of a sum over positions, at any layer: {float(off):.1e} of the metric's difference")

# %% [markdown]
# ## Which rule is on where
#
# A rule set is a value: nothing in the model changes, and it can be asked what it does. `get_rules("relp,pattern=frozen")`
# turns one switch.

# %%
coverage = get_rules("relp").coverage(model)
coverage[coverage.path.str.startswith(("blocks.0", "ln_final"))]

# %%
pd.DataFrame({name: rules.settings() for name, rules in RULES.items()}).T.fillna("")

# %% [markdown]
# ## Both directions
#
# Patching clean values into the corrupt run (denoise) and corrupt values into the clean run (noise) are different questions
# with different answers. A secant treats both runs alike, so it cannot tell them apart: it estimates their mean, the effect of
# a place averaged over the two orders in which it and everything else can change. Held against that mean it is closer still.

# %%
for direction in ("denoise", "both"):
    truth = activation_patching(model, pairs, SITES, direction=direction)
    found = compare(attribution(model, pairs, SITES, rules="secant", direction=direction), truth)
    print(direction, found[["pearson", "relative_error", "spearman"]].round(3).to_string(), sep="\n", end="\n\n")

# %% [markdown]
# ## A few passes more
#
# One pass answers for all places at once, and so takes the whole of both runs for granted. `site_secants` gives each site of
# each layer a row of its own; with `groups`, neighbouring positions no longer move together, and with `each_unit` neither do
# heads. It costs one row per layer, site, group (and head), and is nearly exact.

# %%
for options in ({}, {"groups": 3}, {"groups": 3, "each_unit": True}):
    found = compare(site_secants(model, pairs, SITES, **options), exact)
    print(options, found[["pearson", "relative_error", "spearman"]].round(3).to_string(), sep="\n", end="\n\n")

# %% [markdown]
# Single heads are the hard case of one pass: heads of one layer that do the same, or undo one another, share their effect,
# where exact patching moves one and lets the others stand. And where effects are small the plain gradient at the run that is
# patched is the best ranking one pass can give: it is exact to first order *there*, which no LRP rule is.
#
# ## Everything
#
# All rule sets on all bundled tasks; with `../shared/data/models/stories260k` present, on a pretrained model too. The same
# table with more prompts and all intervals is `benchmarks/results/fidelity.json`, written by `benchmarks/fidelity.py`.

# %%
stories = Path(interp.__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260k"
rows = [row for model, pairs in cases(n=4, stories=stories) for row in rows_of(model, pairs, ["denoise"])]
print(summary(rows, "denoise"))
