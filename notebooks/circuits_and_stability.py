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
# # Circuits: finding them, testing them, finding them again
#
# A *circuit* is a part of a model that does a behaviour by itself: some edges of the model's graph, everything else
# being replaced by values that know nothing of the prompt. This notebook scores every edge in several ways, cuts
# circuits from the scores, asks whether they are faithful (and to what), and whether other prompts would have given the
# same ones.
#
# Patching single places comes first: see `rules_compared.py`. Circuits of latents instead of heads and MLPs are in
# `saes_and_feature_circuits.py`. It runs on a bundled model in under a minute; as a script:
# `python notebooks/circuits_and_stability.py`.

# %%
import time

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

import interp
from interp import Circuit, compare_circuits, edge_scores, faithfulness, load_task, smallest_circuit, stability
from interp.plots import finish

# %% tags=["parameters"]
MODEL = "mini-llama"
N = 24  # prompt pairs
SEED = 0

# %%
AS_WRITTEN = (MODEL, N, SEED) == ("mini-llama", 24, 0)


def told(*facts: bool) -> None:
    """What the text says has to hold, with the parameters that it was written with."""
    assert not AS_WRITTEN or all(facts), facts


# %% [markdown]
# ## The graph
#
# Every component *writes*: it adds its output to the residual stream. Every component *reads*: its input is the sum of
# all that was written before. So the model is a graph with an edge from each writer to each later reader. Writers are
# the `input` (token embeddings), heads (`a3.h2`) and MLPs (`m3`); a head reads three times, as queries, keys and values
# (`a3.h2<q>`, `<k>`, `<v>`), an MLP once, and the `logits` once. With L layers of H heads that makes
#
#     sum over layers l of 3H (1 + l(H+1)) + (1 + l(H+1)) + H,   plus 1 + L(H+1) into the logits
#
# edges. The behaviour is indirect object identification (IOI): after two names, one of which is said again, the other
# one is to come. In the corrupt prompt the other name is repeated, so that the right answer becomes the wrong one. The
# metric is the logit of the right name less that of the wrong one.

# %%
model = interp.load_model(MODEL)
pairs, held_out = (load_task("ioi", model, n=N, seed=seed) for seed in (SEED, SEED + 1))
for side in ("clean", "corrupt"):
    print(f"{side:8}{model.tokenizer.decode(pairs.tokens(side)[0])!r}")

# %% [markdown]
# ## Scores of edges
#
# The exact effect of an edge u -> v: run the clean prompt, but let v, and v alone, read what u wrote in the corrupt
# prompt.
#
#     effect(u -> v) = metric(clean run with the edge corrupted) - metric(clean run)
#
# An edge that helps has a *negative* effect here (`direction="noise"`), as corrupting it hurts. One run for each edge
# is much for a large model, so there are estimates, which all have the form
#
#     score(u -> v) = sum over positions of (u's corrupt output - u's clean output) . m_v
#
# with another *multiplier* m_v at v's input:
#
# - EAP (Syed et al. 2310.10348): the gradient of the metric in the clean run. Two forward passes, one backward pass.
# - EAP-IG (Hanna et al. 2403.17806): the mean gradient while the token embeddings move from clean to corrupt.
# - RelP (`rules="relp"`): one backward pass in which norms, activations and gates count as linear maps (LRP rules).
# - secant (`rules="secant"`, ours): one backward pass of slopes *between* the two runs.

# %%
METHODS = {
    "exact": {"method": "exact"}, "EAP": {"method": "eap"}, "EAP-IG": {"method": "eap-ig", "steps": 10},
    "RelP": {"rules": "relp"}, "secant": {"rules": "secant"},
}  # fmt: skip
scores, seconds = {}, {}
for name, options in METHODS.items():
    start = time.perf_counter()
    scores[name] = edge_scores(model, pairs, direction="noise", **options)
    seconds[name] = round(time.perf_counter() - start, 1)
table = pd.DataFrame({name: s.mean("prompt").to_series() for name, s in scores.items()}).dropna()
table = table.reindex(table["exact"].abs().sort_values(ascending=False).index)
print(f"{len(table):,} edges; seconds: {seconds}")
table.head(10).round(2)

# %% [markdown]
# What the exact numbers say: nearly everything enters through the first MLP; two heads of layer 1 read values from it,
# and three heads of the last layer write the name. Now how well do the estimates agree with the exact scores, over all
# edges? Pearson's correlation is about the large ones, Spearman's rank correlation mostly about the many tiny ones.

# %%
agreement = pd.DataFrame({kind: table.corr(kind)["exact"].drop("exact") for kind in ("pearson", "spearman")})
told(
    table.index[0] == ("input", "m0"), agreement.pearson["EAP"] < 0.4, agreement.pearson.drop("EAP").min() > 0.8,
    agreement.spearman.idxmax() == "EAP", agreement.spearman["secant"] < 0.4,
)  # fmt: skip
agreement.round(2)

# %% [markdown]
# They do not rank alike. EAP is best for the many small edges and worst for the few that matter. The largest edge of
# all, `input->m0`, is nearly 0 to EAP, and the second has the wrong sign. A gradient knows how the metric would change
# for a small step away from the clean run, and another name is not a small step. Secants look across the whole step,
# and so are good for large edges and poor for small ones. In the figure the line is where an estimate would equal the
# exact effect.

# %%
first, second = table.iloc[0], table.iloc[1]
told(abs(first.EAP) < 0.05 * abs(first.exact), second.EAP > 0 > second.exact)
long = table.rename_axis(["source", "target"]).reset_index()
long["edge"] = long["source"] + "->" + long["target"]
long = long.melt(["edge", "exact"], [name for name in METHODS if name != "exact"], "method", "estimate")
figure = px.scatter(long, x="exact", y="estimate", facet_col="method", hover_name="edge", facet_col_spacing=0.03)
ends = [table.to_numpy().min(), table.to_numpy().max()]
for column in range(1, len(METHODS)):
    figure.add_scatter(x=ends, y=ends, mode="lines", line_color="#888888", showlegend=False, row=1, col=column)
figure.for_each_annotation(lambda a: a.update(text=a.text.split("=")[1]))
finish(figure.update_traces(marker={"size": 5}), "estimates beside exact effects of edges (logits)", height=360)

# %% [markdown]
# Is there a way to notice without exact patching? `check_edges` patches a sample, and for a large model that is all one
# can afford. But a *random* sample is mostly of small edges: it finds EAP nearly perfect, and misses what is wrong with
# it. Completeness is another check. Summed over the edges that leave the input, EAP-IG and secants should give the
# whole difference of the metric between the runs.

# %%
print(interp.check_edges(model, pairs, scores["EAP"], n=100))
whole = float((scores["EAP"].metric_corrupt - scores["EAP"].metric_clean).mean())
left = {name: float(s.sel(source="input").sum("target").mean()) / whole for name, s in scores.items()}
coarse = edge_scores(model, pairs, direction="noise", method="eap-ig", steps=5)
left["EAP-IG, 5 steps"] = float(coarse.sel(source="input").sum("target").mean()) / whole
told(left["EAP"] < 0.1, abs(left["secant"] - 1) < 0.01)
told(abs(left["EAP-IG"] - 1) < 0.08, 1.2 < left["EAP-IG, 5 steps"] < 1.5)
print(pd.Series(left, name=f"share of the metric's difference of {whole:.1f} logits").round(3))

# %% [markdown]
# EAP accounts for next to nothing of the difference. EAP-IG with five steps, a common choice, goes a third too far on
# this model; with ten it is within a few per cent. Exact effects need not add up, as edges interact.
#
# ## From scores to a circuit
#
# Rank edges by |score|, keep the n largest, take dead ends away (*pruning*): a component that nothing kept reaches, or
# that reaches nothing, goes, and with it its edges.

# %%
forty = Circuit.from_scores(scores["RelP"], n_edges=40)
print(forty)
forty.draw(title="40 edges by |RelP score|, pruned")

# %% [markdown]
# ## Is it faithful?
#
# Run the clean prompts so that only the circuit's edges carry clean values and everything else reads *ablated* ones:
#
#     f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing))
#
# m is the mean metric. f is 1 for the whole model and 0 for no edges. It may exceed 1, when what was left out works
# against the behaviour. Ablated values are for now those of the corrupt prompt.

# %%
sizes = [5, 10, 20, 40, 80, 160]
found = faithfulness(model, held_out, [Circuit.from_scores(scores["RelP"], n_edges=n) for n in sizes])
told((found.n_edges[:2] == 0).all(), 0.75 < found.faithfulness[3] < 0.95 < found.faithfulness[4])
found[["faithfulness", "low", "high", "n_edges"]].to_pandas().set_axis(pd.Index(sizes, name="asked for")).round(3)

# %% [markdown]
# Of the ten largest edges nothing is left: they do not yet make a path from the input to the logits, so that pruning
# takes all of them. Forty do most of it, eighty all. `low` and `high` are a 95 % bootstrap interval over prompts.
#
# ## Faithfulness at every size: CPR and CMD
#
# One size is a choice; MIB (2504.13151) takes ten, from 0.1 % of the edges to all of them, and two areas:
#
# - CPR, the area under f, edges ranked by how much they *help* (signed score): the more the better.
# - CMD, the area between f and 1, edges ranked by *size*: 0 is best.
#
# An order drawn at random shows what a ranking is worth that knows nothing. All is measured on prompts that the scores
# have not seen.

# %%
blank = scores["exact"].mean("prompt", keep_attrs=True)
noise = np.random.default_rng(SEED).normal(size=blank.shape)
ranked = {**scores, "random": blank.copy(data=np.where(blank.notnull(), noise, np.nan))}
curves = {name: interp.faithfulness_curve(model, held_out, s) for name, s in ranked.items()}
areas = pd.DataFrame({name: {k: float(c[k]) for k in ("cpr", "cmd", "cmd_log")} for name, c in curves.items()}).T
told(
    areas.cmd["random"] > 0.7, areas.cmd.drop("random").max() < 0.05,
    areas.cpr["EAP"] < 0.5 < 0.8 < areas.cpr.drop(["EAP", "random"]).min(),
    areas.cmd_log.drop("random").idxmax() == "EAP", abs(areas.cpr["EAP"] - areas.cpr["random"]) < 0.1,
)  # fmt: skip
areas.round(3)

# %%
figure = go.Figure()
for name, curve in curves.items():
    dash = {"random": "dot", "exact": "dash"}.get(name, "solid")
    f = curve.faithfulness.sel(by="size")
    figure.add_scatter(x=100 * curve.fraction.values, y=f.values, name=name, mode="lines+markers", line={"dash": dash})
figure.add_hline(y=1, line={"color": "#888888", "width": 1})
figure.update_xaxes(type="log", title="edges kept, % of all", tickvals=[0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
figure.update_yaxes(title="faithfulness, held-out prompts")
finish(figure, "edges ranked by |score|", height=400)

# %% [markdown]
# By size all rankings beat chance by far, and the areas are close: on a linear axis most of the area lies above 10 % of
# the edges, where every method is done. With the logarithm of the size as axis (`cmd_log`) small circuits count, and
# EAP's come late: as long as `input->m0` is not among them, pruning leaves nothing. By *help* EAP falls out: edges
# whose sign it has wrong come last, the circuit cannot do without them, and its CPR is near that of an order drawn at
# random.
#
# ## The smallest circuit that is 90 % faithful
#
# `smallest_circuit` searches the sizes of a ranking for the first that reaches the target on the prompts it is given.
# That size was chosen for these prompts, so f is too good there. Fresh prompts tell what it is worth.

# %%
circuits, rows = {}, []
for name, s in scores.items():
    circuits[name], reached = smallest_circuit(model, pairs, s, target=0.9)
    fresh = faithfulness(model, held_out, circuits[name])
    rows.append((name, circuits[name].n_edges, reached, *(float(fresh[k][0]) for k in ("faithfulness", "low", "high"))))
smallest = pd.DataFrame(rows, columns=["method", "edges", "f", "f, held out", "low", "high"]).set_index("method")
told(
    smallest["f, held out"].between(0.8, 0.95).all(), smallest["f, held out"].mean() < smallest["f"].mean(),
    smallest.edges["secant"] < 0.8 * smallest.edges["exact"], smallest.edges.max() < 0.04 * len(table),
)  # fmt: skip
smallest.round(3)

# %% [markdown]
# A few per cent of the edges do 90 % of it, and on other prompts a little less on average. Exact scores do not give the
# smallest circuit. An exact effect is that of one edge with all others intact, and a circuit has to do without most of
# them, so the best ranking for the one need not be the best for the other. Two more questions. *Completeness*: what
# does the model still do *without* the circuit's edges? *Minimality*: what does the circuit lose without each single
# edge?

# %%
circuit = circuits["RelP"]
without = float(interp.completeness(model, pairs, circuit, n_subsets=1).complement)
loss = interp.minimality(model, pairs, circuit).to_series().sort_values(ascending=False)
told(without < 0.1, loss.index[0] == "input->m0", loss.iloc[0] > 0.7, loss.median() < 0.1)
print(f"f of the model without the circuit: {without:.3f}; median loss of an edge: {loss.median():.3f}")
loss.head(8).round(3)

# %% [markdown]
# Without the circuit nothing is left, and within it a few edges carry most.
#
# ## Faithful to what? The ablation decides
#
# "Everything else replaced by something that knows nothing" is a choice, and Miller et al. (2407.08734) show that the
# verdict turns on it. The same circuits, the same prompts, four replacements:
#
# - corrupt: what the component puts out in the paired corrupt prompt
# - zero: nothing
# - mean: its mean over corrupt prompts and their positions
# - positional-mean: the mean at each position by itself

# %%
ABLATIONS = ("corrupt", "zero", "mean", "positional-mean")
verdicts = {a: faithfulness(model, held_out, list(circuits.values()), ablation=a, reference=pairs) for a in ABLATIONS}
f_by = pd.DataFrame({a: v.faithfulness.values for a, v in verdicts.items()}, index=list(circuits))
f_by.loc["metric with no edges (logits)"] = [float(v.metric_empty.mean()) for v in verdicts.values()]
fs, empty = f_by.iloc[:-1], f_by.iloc[-1]
told(fs[["zero", "mean"]].max(axis=None) < 0.5, fs["positional-mean"].min() > 0.75, fs["positional-mean"].max() > 1.1)
told(empty["corrupt"] < -5, empty.drop("corrupt").abs().max() < 2)
f_by.round(2)

# %% [markdown]
# From "90 % faithful" to "does nothing" to "better than the model", with not an edge changed. The circuits were found
# from the *difference* between two prompts that differ in one name. What both share (that a name is due, which places
# hold names) they need not contain: corrupt values bring it along, and so, for prompts of one template, do means by
# position. Zeros and overall means destroy it. The circuit is faithful to "which of the two names", and not to "say a
# name". The scale differs too: with corrupt values no edges at all means the *wrong* name, with the others about even
# odds.
#
# So a sentence like "this circuit is 90 % faithful" needs its ablation. How many edges would each of them ask for?

# %%
needed = {a: smallest_circuit(model, pairs, scores["RelP"], ablation=a)[0].n_edges for a in ABLATIONS}
told(min(needed["zero"], needed["mean"]) > 10 * needed["corrupt"], needed["positional-mean"] < needed["corrupt"])
figure = px.bar(x=list(needed), y=list(needed.values()), text=list(needed.values()), log_y=True,
                labels={"x": "what stands in for the rest", "y": "edges"})  # fmt: skip
figure.update_traces(width=0.5).update_yaxes(range=[0, 3.5], dtick=1)
finish(figure, "smallest circuit with f of 0.9, edges ranked by RelP", height=340)

# %% [markdown]
# Under zero and mean ablation the first circuit that reaches the target holds a large part of the model, and is none.
# Such ablations call for scores made for them.
#
# ## Would other prompts have given the same circuit?
#
# Draw the prompts again with replacement, average the scores, cut at the same size, a hundred times: the mean pairwise
# *Jaccard* index (shared edges over all edges of either) says how alike the circuits are. Meloux et al. (2510.00845)
# ask for 0.8. No model runs for it, as scores are per prompt.

# %%
again = {name: stability(s, n_edges=circuits[name].attrs["n_edges"], seed=SEED) for name, s in scores.items()}
KEYS = ["jaccard", "jaccard_low", "jaccard_high"]
stable = pd.DataFrame({name: [float(a[k]) for k in KEYS] for name, a in again.items()}, index=KEYS).T
told(stable.jaccard.idxmin() == "EAP", stable.jaccard["EAP"] < 0.8, (stable.jaccard.drop("EAP") > 0.75).all())
stable.round(2)

# %% [markdown]
# A mean hides which edges come and go. `frequency` is the share of resamples that have an edge: most of a circuit's
# edges are always there, and a fringe around the cut comes and goes. The figure cuts at other sizes. It begins where
# pruning leaves something: two circuits without an edge are equal, with a Jaccard of 1, and no evidence of stability.

# %%
frequency = again["exact"].frequency.to_series().dropna()
core, fringe = frequency[frequency == 1], frequency[(frequency > 0) & (frequency < 1)].sort_values()
print(f"exact scores: {len(core)} edges in every resample, {len(fringe)} in some of them")
told(len(core) > 20, len(fringe) > 5)
cuts = [10, 20, 30, 40, 50, 60, 80, 100, 150, 200]
along = pd.DataFrame(
    [(n, name, float(stability(scores[name], n_edges=n, n_resamples=50, seed=SEED).jaccard))
     for name in ("exact", "RelP", "secant") for n in cuts if Circuit.from_scores(scores[name], n_edges=n).n_edges],
    columns=["edges asked for", "method", "Jaccard"])  # fmt: skip
told(along["Jaccard"][along["edges asked for"] == 200].max() < along["Jaccard"].max() - 0.15)
figure = px.line(along, x="edges asked for", y="Jaccard", color="method", markers=True, log_x=True, range_y=[0, 1.05])
figure.add_hline(y=0.8, line={"color": "#888888", "dash": "dot"})
figure.update_xaxes(tickvals=cuts)
finish(figure, "stability over resamples, by size", height=360)

# %% [markdown]
# Stability depends on where one cuts: between edges of nearly the same score chance decides, and the more edges one
# asks for, the closer are their scores. EAP is lowest because `input->m0` lies near its cut: in some resamples it is
# out, and with it the whole circuit.
#
# The bootstrap knows only the prompts it has. New prompts from other seeds are the harder test, and another behaviour
# is the control: if its circuit looked the same, the circuit would not be about the behaviour.

# %%
size = circuit.attrs["n_edges"]
others = {f"IOI, seed {seed}": load_task("ioi", model, n=N, seed=seed) for seed in range(SEED, SEED + 4)}
others |= {task: load_task(task, model, n=N, seed=SEED) for task in ("greater_than", "gendered_pronoun")}
fresh = {name: edge_scores(model, p, direction="noise", rules="relp") for name, p in others.items()}
cut = {name: Circuit.from_scores(s, n_edges=size) for name, s in fresh.items()}


def jaccards(circuits: dict[str, Circuit]) -> pd.DataFrame:
    """Edge Jaccard of every two of them."""
    rows = [[compare_circuits(x, y).edge_jaccard for y in circuits.values()] for x in circuits.values()]
    return pd.DataFrame(rows, index=list(circuits), columns=list(circuits))


def grid(found: pd.DataFrame, title: str) -> go.Figure:
    """A heatmap of shares."""
    figure = px.imshow(found, text_auto=".2f", zmin=0, zmax=1, color_continuous_scale="Blues", aspect="auto")
    figure = finish(figure.update_layout(coloraxis_showscale=False), title, height=340)
    return figure.update_layout(margin={"l": 130}).update_xaxes(title=None).update_yaxes(title=None)


between = jaccards(cut)
seeds, tasks = list(cut)[:4], list(cut)[4:]
told(between.loc[seeds, seeds].to_numpy().min() > 0.7, between.loc[seeds, tasks].to_numpy().max() < 0.4)
print(compare_circuits(cut[seeds[0]], cut[seeds[1]]))
grid(between, f"Jaccard of circuits of {size} edges by RelP")

# %% [markdown]
# Over seeds the circuit is found again; other behaviours have other circuits, with few edges in common.
#
# ## And other methods?
#
# Last, the smallest circuits of all methods beside one another. All are about 90 % faithful.

# %%
methods = jaccards(circuits)
chance = compare_circuits(circuits["exact"], circuits["secant"]).expected_jaccard
shared = np.logical_and.reduce([c.kept for c in circuits.values()])
pairwise = methods.to_numpy()[np.triu_indices(len(methods), 1)]
common = circuit.with_edges(shared)
f_common = float(faithfulness(model, held_out, common).faithfulness[0])
told(pairwise.mean() < 0.8, pairwise.min() > 0.4, chance < 0.02, common.n_edges < circuit.n_edges, 0.4 < f_common < 0.8)
print(f"mean {pairwise.mean():.2f}, by chance {chance:.2f}; in all: {common.n_edges} edges with an f of {f_common:.2f}")
grid(methods, "Jaccard of the smallest 90 % faithful circuits")

# %% [markdown]
# Far more alike than chance, and far from the same: several circuits are about as faithful, and none is *the* circuit.
# What all methods find is the safest claim. Say with a circuit how edges were scored, what was ablated, on which
# prompts it was judged, and how stable it is. `circuit.save("ioi.json")` writes it in EAP-IG's and MIB's format, with
# its scores.
