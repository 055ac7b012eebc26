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
# # Start here
#
# A language model gives " Mary" after "When Mary and John went to the store, John gave a drink to". Which of its parts
# are the reason? This tour goes once around the workbench: a behaviour, a first look, exact interventions, an estimate
# of them that is cheaper, and a report. Each step takes a line or two, and other notebooks go deeper.
#
# It runs on a bundled model in seconds, with no network; as a script: `python notebooks/start_here.py`.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import plotly.express as px
import torch

from interp import (
    PromptPairs,
    activation_patching,
    attribution,
    compare,
    direct_logit_attribution,
    discover,
    load_model,
    load_task,
    logit_lens,
    spot_check,
)
from interp.plots import RAISES, finish, heatmap

# %% tags=["parameters"]
MODEL = "mini-gpt2"
N = 32

# %%
model = load_model(MODEL)
cfg = model.cfg
print(f"{cfg.name}: {cfg.n_layers} layers of {cfg.n_heads} heads, {cfg.d_model} channels, {cfg.d_vocab} tokens")

# %% [markdown]
# ## A behaviour is a pair of prompts and an answer
#
# The *clean* prompt shows the behaviour. The *corrupt* one is as natural and as long, but differs in the one thing the
# answer depends on: here who gives. It has an answer of its own, " John". Comparing two runs that differ in one thing
# is what makes an effect mean something: grammar, names and place are the same in both.

# %%
pairs = PromptPairs.from_text(
    model,
    clean=["When Mary and John went to the store, John gave a drink to"],
    corrupt=["When Mary and John went to the store, Mary gave a drink to"],
    answers=[" Mary"],
    wrong_answers=[" John"],
)
print(pairs.token_strings[0])


# %%
@torch.no_grad()
def next_tokens(side: str, k: int = 4) -> pd.Series:
    """The k likeliest next tokens of the clean or the corrupt prompt."""
    best = model(pairs.tokens(side))[0, -1].softmax(-1).topk(k)
    return pd.Series(best.values.tolist(), [repr(model.tokenizer.decode([i])) for i in best.indices.tolist()])


print({side: next_tokens(side).round(3).to_dict() for side in ("clean", "corrupt")})
assert next_tokens("clean").index[0] == "' Mary'"
assert next_tokens("corrupt").index[0] == "' John'"

# %% [markdown]
# ## One number per prompt
#
# The usual metric is the **logit difference**, logit(answer) - logit(wrong answer). It is linear in the logits, goes on
# counting where a probability is near 0 or 1, and is blind to what helps both names alike. One prompt is an anecdote,
# so from here on there are many of the kind, with names in either order: `load_task` makes them, all of them in the
# model's own tokens. (`interp tasks` on the command line lists the tasks.)

# %%
ioi = load_task("ioi", model, n=N)
print(ioi)
effects = activation_patching(model, ioi, ["resid_pre", "attn_out", "mlp_out"])
clean, corrupt = float(effects.metric_clean.mean()), float(effects.metric_corrupt.mean())
print(f"mean logit difference: {clean:+.2f} clean, {corrupt:+.2f} corrupt")
assert clean > 5
assert corrupt < -4

# %% [markdown]
# ## A look before anything is changed: the logit lens
#
# The residual stream is what all layers read from and add to. Its final norm and unembedding can be applied after any
# layer: what would the model say if it stopped there? At the last token:

# %%
lens = logit_lens(model, ioi).isel(position=-1).mean("prompt")
figure = px.line(x=lens.layer, y=lens.values, markers=True, color_discrete_sequence=[RAISES])
figure.update_xaxes(title="layers that have run", dtick=1).update_yaxes(title="logit difference (logits)")
finish(figure, "logit lens at the last token", height=320)

# %%
jump = lens.diff("layer")
print(f"of {float(lens[-1]):.2f} logits, {float(jump[-1]):.2f} come in the last layer")
assert float(jump[-1]) > 0.5 * float(lens[-1])

# %% [markdown]
# Which component of that layer? What each head and each MLP adds to the stream is a vector, and along the metric's
# direction it has a share of the logit difference. The shares add up to the whole: **direct logit attribution**.

# %%
shares = direct_logit_attribution(model, ioi)
assert float(abs(shares.sum("node") - shares.metric).max()) < 1e-3
mean_share = shares.mean("prompt").to_pandas().sort_values(key=lambda s: -s.abs())
writer = mean_share.index[0]
print(mean_share.head(4).round(2).to_dict())

# %% [markdown]
# That says who writes the answer, not where the news came from, nor what would happen without it. For that, something
# has to be changed.
#
# ## Activation patching: the exact map
#
# Run the corrupt prompt, give *one* place its value from the clean run, and see how much of the answer comes back:
#
#     effect(place) = metric(corrupt run with the clean value at that place) - metric(corrupt run)
#
# All places at once, per prompt, in logits. An effect as large as clean - corrupt means that this place alone suffices.

# %%
heatmap(effects.resid_pre, title="residual stream before each layer: where the answer is carried")

# %%
carried = effects.resid_pre.mean("prompt") / (clean - corrupt)
second = int(carried.isel(layer=0).argmax("position"))
print(f"share restored at token {second}, before layers 0 to {cfg.n_layers - 1}: {carried[:, second].values.round(2)}")
assert float(carried[0, second]) > 0.99
assert float(carried[-1, second]) > 0.7

# %% [markdown]
# The only token that differs carries everything at first, as it must. Less obvious: it still does before the last
# layer. Hardly anything is passed on to the last token until then. Tokens are those of the first prompt; a star marks
# those that differ between prompts. Heads as wholes, all positions together:

# %%
heads = activation_patching(model, ioi, "head", positions="all")
heatmap(heads, title="heads: logit difference that one head restores")

# %%
found = heads.mean("prompt").stack(node_id=("layer", "head")).to_pandas().sort_values(ascending=False)
layer, head = found.index[0]
strongest = f"a{layer}.h{head}"
first, next_best = found.iloc[:2] / (clean - corrupt)
print(f"{strongest} alone restores {first:.0%}, the next {next_best:.0%}")
assert strongest == writer
assert found.iloc[0] > 3 * found.iloc[1]

# %% [markdown]
# One head, and it is the one that direct attribution named. The two need not agree: they answer different questions.
# The other direction, corrupt values into the clean run (`direction="noise"`), asks what is *needed* instead of what
# suffices; `patching_best_practices.py` shows where these differ, and what else can go wrong.
#
# ## The same map from one backward pass
#
# Exact patching takes a run per place (the workbench runs them together). A backward pass estimates all places at once,
# as multiplier x difference between the runs; *rules* choose the multipliers. An estimate is only as good as its
# agreement with the exact map, so that is part of the answer:

# %%
sites = ["resid_pre", "attn_out", "mlp_out"]
rows = {}
for rules in ("gradient", "relp", "secant"):
    rows[rules] = compare(attribution(model, ioi, sites, rules=rules), effects)[["pearson", "slope", "relative_error"]]
agreement = pd.concat(rows).unstack(0)
agreement.round(2)

# %% [markdown]
# Pearson is blind to scale, relative error is not (0 is perfect). The plain gradient is the slope at the corrupt run,
# and a name is a large step away from it. Where the exact map is too dear to make, a sample of it still says how far
# off one is:

# %%
estimate = attribution(model, ioi, "resid_pre", rules="secant")
check = spot_check(model, ioi, estimate, n=20, seed=0)
print(check)
errors = agreement["relative_error"].mean()
print("mean relative error:", errors.round(2).to_dict())
assert errors["secant"] < errors["gradient"]

# %% [markdown]
# ## All of it in one call
#
# `discover` patches, ranks heads and MLPs with intervals over prompts, and then tests its own ranking by intervention:
# keep the top n, corrupt the rest, how much of the metric is left? `report` writes it all as one HTML page.

# %%
discovery = discover(model, ioi)
print(discovery.text(n=6))
with tempfile.TemporaryDirectory() as folder:
    page = discovery.report(Path(folder) / "ioi.html")
    print(f"report: {page.stat().st_size / 1e6:.1f} MB; give a path of your own to keep it")

# %%
recovered = discovery.faithfulness.recovered.values
n_needed = int(discovery.faithfulness.n.values[(recovered >= 0.9).argmax()])
print(f"{n_needed} of {len(discovery.ranking)} components recover 90 %: {list(discovery.ranking.node[:n_needed])}")
assert n_needed <= 8
assert strongest in list(discovery.ranking.node[:2])

# %% [markdown]
# A ranking is a list of suspects, and a good curve says that together they *suffice on these prompts when the rest is
# corrupted*. What they compute is another question.
#
# ## Where to go next
#
# | notebook | question |
# |---|---|
# | `ioi_from_scratch.py` | what do these heads do, and is it what GPT-2 small does? |
# | `patching_best_practices.py` | which corruption, metric, direction, window - and what if one chooses badly? |
# | `rules_compared.py` | every backward rule beside exact patching |
# | `circuits_and_stability.py` | edges: circuits, and whether they are found again on other prompts |
# | `saes_and_feature_circuits.py` | sparse autoencoders, and circuits of their latents |
# | `snmf_weekdays.py` | groups of neurons that fire together |
# | `neurons.py` | what single neurons read and write |
# | `batch_runs.py` | many models, tasks and methods as one job, and querying the results |
#
# `interp app` opens a dashboard on the same behaviour.
