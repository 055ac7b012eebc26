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
# # Activation patching: choices that change the answer
#
# Patching is exact, and still two people can patch the same model on the same behaviour and name different heads. Zhang
# and Nanda (2309.16042) and Heimersheim and Nanda (2404.15255) say which choices decide that: how prompts are
# corrupted, what is measured, which run is patched into which, and whether layers are patched one by one. Here each
# choice is made both ways on a bundled model. Where these small models do not show what GPT-2 does, the numbers say so.
#
# For what patching is, see `start_here.py`; for what the heads named here do, `ioi_from_scratch.py`.

# %%
import warnings

import pandas as pd
import plotly.express as px
import torch
import xarray as xr

from interp import PromptPairs, activation_patching, corrupt, load_model, load_task
from interp.plots import LOWERS, RAISES, finish
from interp.statistics import bootstrap_mean, detected

# %% tags=["parameters"]
MODEL = "mini-gpt2"
N = 32

# %%
model = load_model(MODEL)
BESIDE = {"orientation": "v", "x": 1.01, "y": 1}  # a legend that covers no bar


def heads(pairs: PromptPairs, **options) -> xr.DataArray:
    """Exact effect of every head, all positions together: [metric if several, prompt, node]."""
    found = activation_patching(model, pairs, "head", positions="all", **options)
    stacked = found.stack(place=("layer", "head"))
    names = [f"a{layer}.h{head}" for layer, head in stacked["place"].values]
    return stacked.drop_vars(["place", "layer", "head", "node"]).rename(place="node").assign_coords(node=names)


def standing_out(effects: xr.DataArray) -> list[str]:
    """Heads more than two standard deviations from the mean over heads (Zhang and Nanda's rule), strongest first."""
    mean = effects.mean("prompt").to_pandas()
    chosen = mean[detected(mean.to_numpy())]
    return [f"{name} {value:+.2g}" for name, value in chosen.sort_values(key=lambda x: -x.abs()).items()]


# %% [markdown]
# ## 1. How to corrupt: replace words, or add noise?
#
# **Symmetric token replacement** (STR) exchanges a word for another of its kind: the corrupt prompt is as ordinary as
# the clean one. **Gaussian noise** (GN) adds noise of k standard deviations to the embeddings of the same tokens, k = 3
# since ROME. Noise needs no second word, but no text ever gave the model such a vector. Induction: the words of a list
# come again, and the model says what follows. What is corrupted is the word that will be the answer, in the first
# round.

# %%
replaced = load_task("induction", model, n=N)
noised = [corrupt(model, replaced, "gaussian", k=3, seed=seed) for seed in range(3)]
at = int(replaced.differs[0].int().argmax())
print("".join(replaced.token_strings[0]), "-> ?   changed:", replaced.token_strings[0][at])
str_effects = heads(replaced, direction="noise")
gn_effects = [heads(pairs, direction="noise") for pairs in noised]
print("STR:", standing_out(str_effects))
for seed, effects in enumerate(gn_effects):
    print(f"GN, seed {seed}:", standing_out(effects))

# %%
compared = pd.DataFrame({"STR": str_effects.mean("prompt").to_pandas(), "GN": gn_effects[0].mean("prompt").to_pandas()})
compared = compared.loc[compared.abs().max(axis=1).sort_values(ascending=False).index[:9]].reset_index()
figure = px.bar(compared.melt("node", var_name="corruption", value_name="effect"), x="node", y="effect",
                color="corruption", barmode="group", color_discrete_sequence=[RAISES, LOWERS])  # fmt: skip
figure.update_yaxes(title="effect of noising (logits)").update_xaxes(title="head")
finish(figure, "induction: which heads are needed?", height=340).update_layout(legend=BESIDE)

# %%
OFF = "a0.h5"
by_str = float(str_effects.sel(node=OFF).mean())
by_gn = [float(effects.sel(node=OFF).mean()) for effects in gn_effects]


@torch.no_grad()
def attention(pairs: PromptPairs, side: str, head: str, query: int, key: int) -> float:
    """Mean attention weight of one head in the clean or the corrupt run."""
    layer, number = (int(part) for part in head[1:].split(".h"))
    found = []
    look = (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: found.append(pattern[:, number, query, key]))
    model.run_with_hooks(pairs.tokens(side), fwd_hooks=[*pairs.hooks(side), look])
    return float(found[0].mean())


before = {side: attention(replaced, run, OFF, at, at - 1) for side, run in (("clean", "clean"), ("STR", "corrupt"))}
before |= {f"GN {i}": attention(pairs, "corrupt", OFF, at, at - 1) for i, pairs in enumerate(noised)}
print(f"{OFF} loses {by_str:+.2f} logits by STR and {[round(x, 2) for x in by_gn]} by GN")
print("its attention from the changed word to the word before:", {k: round(v, 2) for k, v in before.items()})
assert abs(by_str) < 0.5
assert max(by_gn) < -5
assert abs(before["STR"] - before["clean"]) < 0.05
assert max(before[f"GN {i}"] for i in range(3)) < 0.6

# %% [markdown]
# The head that GN puts first is not in STR's list at all. It is a *previous token* head, and induction does need it:
# but it says which word came *before*, and that word is the same in both runs, so a contrast of two answers cannot see
# it. Noise sees it for another reason: its attention breaks, as the name movers' does in GPT-2 small (Zhang and Nanda).
# So noise asks "what fails when this position is garbage?", replacement "what carries the difference?". How much fails
# depends on how much garbage:

# %%
dose = []
for k in (0.5, 1, 2, 3, 5):
    pairs = corrupt(model, replaced, "gaussian", k=k, seed=0)
    effects = heads(pairs, direction="noise")
    dose.append((k, float(effects.metric_corrupt.mean()), float(effects.sel(node=OFF).mean())))
dose = pd.DataFrame(dose, columns=["k", "logit difference of the noised run", f"effect of {OFF}"]).set_index("k")
assert dose[f"effect of {OFF}"][1] > -1
assert dose[f"effect of {OFF}"][3] < -5
dose.round(2)

# %% [markdown]
# At k = 1 nearly nothing, at k = 3 nearly everything, and nothing in the model says which k is right. Use replacement
# where there is a word to put; where there is none, give the seed and k, and try more than one.
#
# ## 2. Which tokens to replace
#
# Replacement has choices as well. In indirect object identification (Mary and John ..., John gave a drink to) one may
# exchange the giver for the other person, for a third one, or replace all names:

# %%
corruptions = ("s2_io_flip", "abc", "random_names")
ioi = {name: load_task("ioi", model, n=N, corruption=name) for name in corruptions}
rows = []
for name, pairs in ioi.items():
    effects = heads(pairs, direction="noise")
    mean = effects.mean("prompt").to_pandas().sort_values()
    rows.append((name, float(effects.metric_clean.mean()), float(effects.metric_corrupt.mean()),
                 *(f"{node} {value:+.2f}" for node, value in mean.head(4).items())))  # fmt: skip
columns = ["corruption", "clean", "corrupt", "1st", "2nd", "3rd", "4th"]
table = pd.DataFrame(rows, columns=columns).set_index("corruption")
assert set(table["1st"].str.split().str[0]) == {"a3.h1"}
assert table.loc["abc", "3rd"].startswith("a1.")
assert float(table.loc["s2_io_flip", "3rd"].split()[1]) > -0.1
assert table.loc["random_names", "2nd"].startswith(OFF)
table.round(2)

# %% [markdown]
# The strongest head is the same. Others come and go: with a third giver no name is repeated, so heads of layer 1, which
# detect repetition, begin to count; when all names change, the previous token head does. None of these maps is wrong.
# Each is about *what differs between its two runs*. Say which contrast it is, and try a second one.
#
# ## 3. What to measure
#
# Logit difference, probability of the answer, and KL divergence from the clean run can all be read from the same
# patched runs. First the paper's warning about probability: with all names replaced, P(answer) is near 0 in the corrupt
# run.

# %%
METRICS = ["logit_diff", "probability", "kl_divergence"]
all_names = heads(ioi["random_names"], metric=METRICS)
print("corrupt run:", dict(zip(METRICS, all_names.metric_corrupt.mean("prompt").values.round(4), strict=True)))
for metric in METRICS:
    print(f"{metric:14}", standing_out(all_names.sel(metric=metric)))
seen = {metric: all_names.sel(metric=metric, node="a3.h1").mean("prompt").item() for metric in METRICS}
print("a3.h1:", {metric: round(value, 4) for metric, value in seen.items()})
assert seen["logit_diff"] > 3
assert abs(seen["probability"]) < 0.001
assert standing_out(all_names.sel(metric="logit_diff"))[0].startswith("a3.h1")
assert not any(name.startswith("a3.h1") for name in standing_out(all_names.sel(metric="probability")))

# %% [markdown]
# The head that decides between the names has no effect on the probability at all: from a probability near 0, no single
# head gets anywhere. KL and probability find heads that raise *both* names instead, which logit difference cannot see,
# since they cancel in it. (`ioi_from_scratch.py` tells these heads apart.) So one metric is not simply better: logit
# difference for the choice between two answers, another beside it for what is common to both.
#
# **Negative heads.** Wang et al. found heads that write against the answer; under probability Zhang and Nanda lose
# them, because below a probability near 0 there is no room. Gendered pronouns (The queen ... she):

# %%
pronoun = load_task("gendered_pronoun", model, n=N)
by_metric = heads(pronoun, metric=["logit_diff", "probability"])
rows = []
for metric in ("logit_diff", "probability"):
    effects = by_metric.sel(metric=metric)
    mean, low, high = bootstrap_mean(effects.values)
    order = abs(mean).argsort()[::-1][:4]
    out = detected(mean)
    rows += [(metric, str(effects.node.values[i]), mean[i], low[i], high[i], bool(out[i])) for i in order]
columns = ["metric", "head", "effect", "low", "high", "2 s.d."]
strongest = pd.DataFrame(rows, columns=columns).set_index(["metric", "head"])
print(strongest.round(4).to_string())
negative = strongest.loc[("logit_diff", "a3.h1")]
p_negative = float(by_metric.sel(metric="probability", node="a3.h1").mean())
print(f"a3.h1: {negative['effect']:+.2f} logits, {p_negative:+.1e} in probability")
assert negative["high"] < -0.3
assert abs(p_negative) < 1e-3

# %% [markdown]
# There it is: a negative head, clear of 0 over prompts, and invisible in probability. But so are two *positive* heads
# of two and three logits. Near the ends of its range, probability shows what tips the balance by itself and nothing
# else.
#
# The second thing in this table: by the rule of two standard deviations only the first head stands out. One very large
# effect widens the deviation for all. Intervals over prompts say which effects are real; the rule says which are
# outstanding.
#
# **Where it happens** depends on the metric as well. Capitals: the country's token against the last token, before layer
# 2.

# %%
capitals = load_task("capitals", model, n=N)
stream = activation_patching(model, capitals, "resid_pre", metric=METRICS).mean("prompt").sel(layer=2)
country = int(capitals.differs[0].int().argmax())
places = pd.DataFrame({"country": stream[:, country], "last token": stream[:, -1]}, index=METRICS)
places["last / country"] = places["last token"] / places["country"]
assert places["last / country"]["probability"] > 10 * places["last / country"]["logit_diff"]
places.round(3)

# %% [markdown]
# By logit difference a quarter of the effect is still at the country; by probability, everything has moved on. (In
# GPT-2 XL, second-hand, 4.3 times against 1.2 times.) The more confident the model, the more extreme the ratio, and
# this one is very confident.
#
# ## 4. Which run is patched: sufficient or needed?
#
# `denoise` puts clean values into the corrupt run (does this place *suffice*?), `noise` corrupt values into the clean
# run (is it *needed*?). With two places A and B that carry the same behaviour:
#
# | behaviour needs | denoise A alone | noise A alone |
# |---|---|---|
# | A **and** B | nothing | everything |
# | A **or** B | everything | nothing |
# | sum of both | its part | its part |
#
# The two directions are not opposites, but related. If A and B carry *everything*, then a run with A clean and B
# corrupt can be made from either side, so that noising B and denoising A are one experiment:
#
#     noise(B) = denoise(A) - (metric(clean) - metric(corrupt))
#
# The residual stream before a layer is such a set: all its positions together are the whole run. Where do sums over
# single positions come to, as a share of clean - corrupt? 1 both ways means one place, or places that add up.

# %%
cuts = []
for name, layer in (("ioi", 1), ("capitals", 2), ("greater_than", 1)):
    for kind in ("STR", "GN"):
        pairs = load_task(name, model, n=N, corruption="gaussian" if kind == "GN" else None)
        both = {}
        for direction in ("denoise", "noise"):
            effects = activation_patching(model, pairs, "resid_pre", direction=direction).sel(layer=layer)
            gap = float((effects.metric_clean - effects.metric_corrupt).mean())
            both[direction] = effects.mean("prompt") * (1 if direction == "denoise" else -1) / gap
        at = int(pairs.differs[0].int().argmax())
        cuts.append((name, layer, kind, *(float(both[d][i]) for d in both for i in (at, -1)),
                     *(float(both[d].sum()) for d in both)))  # fmt: skip
columns = ["task", "layer", "corruption", "denoise token", "denoise last"]
columns += ["noise token", "noise last", "denoise", "noise"]
cuts = pd.DataFrame(cuts, columns=columns).set_index(["task", "corruption"])
year_str, year_gn = cuts.loc[("greater_than", "STR")], cuts.loc[("greater_than", "GN")]
assert abs(cuts.loc[("ioi", "STR"), ["denoise", "noise"]] - 1).max() < 0.1
assert abs(cuts.loc[("capitals", "STR"), ["denoise", "noise"]] - 1).max() < 0.1
assert year_str["denoise"] < 0.8
assert year_str["noise"] > 1.2
assert year_gn["denoise"] > 1.2
assert year_gn["noise"] < 0.8
assert abs(cuts["noise token"] - (1 - cuts["denoise last"])).max() < 0.1
cuts.rename(columns={"denoise": "denoise, all summed", "noise": "noise, all summed"}).round(2)

# %% [markdown]
# Indirect object identification is all in one place, and capitals (replaced) adds up. Greater-than (The war lasted from
# the year 1732 to the year 17) does neither. Part of the news is still at the year, part has been moved to the last
# token. With replaced years the two act like an **and**: singly they restore little, and losing either costs much. With
# noised years they act like an **or**. The model is the same and so are the places: *and* and *or* belong to a model, a
# contrast and a metric together. The last assertion in the cell is the identity above.
#
# One direction alone shows half of that. A head that is needed without sufficing, by the same task:

# %%
years = load_task("greater_than", model, n=N)
one_way = {direction: heads(years, direction=direction) for direction in ("denoise", "noise")}
sides = pd.DataFrame({name: effects.mean("prompt").to_pandas() for name, effects in one_way.items()})
strong = sides.loc[sides.abs().max(axis=1).sort_values(ascending=False).index[:6]]
assert strong.index[0] == "a0.h2"
assert -strong["noise"].iloc[0] > 2.5 * strong["denoise"].iloc[0]
figure = px.bar(strong.reset_index().melt("node", var_name="direction", value_name="effect"), x="node", y="effect",
                color="direction", barmode="group", color_discrete_sequence=[RAISES, LOWERS])  # fmt: skip
figure.update_yaxes(title="effect (logits)").update_xaxes(title="head")
figure = finish(figure, "greater-than: what suffices and what is needed", height=340)
figure.update_layout(legend=BESIDE)

# %% [markdown]
# ## 5. Windows of layers
#
# ROME restores several neighbouring MLPs together. In GPT-2 XL, Zhang and Nanda find that a window's peak is 1.4 to
# 1.75 times the peak of the *sum* of its layers' single effects (second-hand): the window finds what no layer has.
# `window=` gives both. MLP outputs, at each position, on both bundled models:

# %%
# Noise leaves a prompt or two as they were. Normalised scores would explode there; these are means in logits.
warnings.filterwarnings("ignore", message=".*is near zero on prompts")
rows = []
for name in ("mini-gpt2", "mini-llama"):
    small = load_model(name)
    for task in ("ioi", "capitals", "greater_than", "gendered_pronoun", "subject_verb"):
        for kind in ("STR", "GN"):
            pairs = load_task(task, small, n=N, corruption="gaussian" if kind == "GN" else None)
            for width in (2, 3):
                found = activation_patching(small, pairs, "mlp_out", window=width).mean("prompt")
                together, summed = (float(abs(found[key]).max()) for key in ("mlp_out", "mlp_out_summed"))
                rows.append((name, task, kind, width, together, summed, together / summed))
windows = pd.DataFrame(rows, columns=["model", "task", "corruption", "width", "window", "sum", "ratio"])
lowest, highest = windows["ratio"].min(), windows["ratio"].max()
print(f"peak of the window / peak of the sum: {lowest:.2f} to {highest:.2f}")
assert highest < 1.2
assert lowest < 0.7
windows.pivot_table(index=["model", "task"], columns=["width", "corruption"], values="ratio").round(2)

# %% [markdown]
# These models show the opposite: a window is worth what its layers are worth singly, or much less. With 4 or 5 layers,
# MLPs stand in a row: the first changes what the next ones read, so restoring it restores them, and the sum counts the
# same news several times. A window that exceeds its sum needs layers each of which does too little alone (an *and*).
# Either way the lesson is one: single layers first, and never a window without the sum beside it.

# %%
verbs = load_task("subject_verb", model, n=N)
shown = activation_patching(model, verbs, "mlp_out", window=3).mean("prompt")
subject = int(abs(shown["mlp_out_summed"]).max("layer").argmax("position"))
single = activation_patching(model, verbs, "mlp_out").mean("prompt").isel(position=subject)
bars = {f"layer {int(layer)}": float(value) for layer, value in zip(single.layer, single.values, strict=True)}
first = shown.isel(position=subject, layer=0)
bars |= {"0 to 2, summed": float(first["mlp_out_summed"]), "0 to 2, together": float(first["mlp_out"])}
assert bars["0 to 2, together"] < 1.05 * max(single.values)
figure = px.bar(x=list(bars), y=list(bars.values()), color_discrete_sequence=[RAISES])
figure.update_xaxes(title="MLPs restored at the subject").update_yaxes(title="effect (logits)")
finish(figure, "subject-verb agreement: a window and its layers", height=340)

# %% [markdown]
# ## In short
#
# 1. Replace words; noise only where nothing else is possible, with its k and seed. Say what differs between the runs.
# 2. Logit difference for a choice between two; probability and KL beside it, from the same runs; look at the corrupt
#    run's probability before believing a small effect on it.
# 3. Both directions. A place that suffices need not be needed, nor the reverse.
# 4. Single layers before windows, windows only beside their sum.
# 5. Effects per prompt with intervals; "stands out" and "is real" are two things.
# 6. Choose on some prompts and confirm on others: `load_task(..., seed=1)` gives fresh ones.
#
# All of this is about one place at a time. `circuits_and_stability.py` asks it of sets of edges, `rules_compared.py` of
# cheaper scores, and `batch_runs.py` makes every choice at once, as a grid.
