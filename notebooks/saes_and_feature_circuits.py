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
# # Sparse autoencoders and circuits of their latents
#
# Neurons and heads mostly take part in several things at once. A *sparse autoencoder* (SAE) looks for other units:
# directions of which only a few are at work on any one token, so that each may stand for one thing. This notebook opens
# one that comes with interp, asks what it is worth, reads its latents, finds those that carry a behaviour, and proves
# it by changing one.
#
# Circuits of heads and MLPs are in `circuits_and_stability.py`, features found by factorising neurons in
# `snmf_weekdays.py`. It runs on a bundled model in under a minute; as a script: `python
# notebooks/saes_and_feature_circuits.py`.

# %%
import json

import numpy as np
import pandas as pd
import plotly.express as px
import torch

from interp import (
    SAE,
    Corpus,
    Edit,
    ModelSource,
    SAEConfig,
    bundled_saes,
    evaluate_sae,
    feature_attribution,
    feature_circuit,
    feature_patching,
    load_model,
    load_task,
    logit_effects,
    spliced,
    top_contexts,
    train_sae,
)  # fmt: skip
from interp.bundled import bundled_text
from interp.features.circuits import feature_faithfulness
from interp.features.evaluate import evaluate_reconstruction, random_baseline
from interp.features.zf import zf_plot, zf_points
from interp.plots import finish

# %% tags=["parameters"]
MODEL = "mini-gpt2"
TASK = "gendered_pronoun"
N = 24  # prompt pairs
SEED = 0

# %%
AS_WRITTEN = (MODEL, TASK, N, SEED) == ("mini-gpt2", "gendered_pronoun", 24, 0)


def told(*facts: bool) -> None:
    """What the text says has to hold, with the parameters that it was written with."""
    assert not AS_WRITTEN or all(facts), facts


# %% [markdown]
# ## What it is
#
# An SAE takes a model's activation x at one place, with d channels, and writes it as a sum of a few of h > d
# directions:
#
#     z = (x - b_dec) W_enc + b_enc        f = activation(z)        xhat = f W_dec + b_dec        e = x - xhat
#
# The *encoder* says how strongly each *latent* is on (f, its *code*), the rows of the *decoder* W_dec are the
# directions, and e is what is left out. Training makes |e|^2 small with few latents on. The activation decides how few:
#
# - ReLU with a penalty on the sum of f (standard)
# - TopK: the k largest z of each token, the rest 0. BatchTopK: the (tokens x k) largest of a batch, so that one token
#   may have
#   more than another; when used, every z above a threshold
# - top-AFA (2503.24277): for unit directions that are nearly orthogonal |f| is about |x|, so keep as many of the
#   largest z as
#   bring |f| nearest to |x - b_dec|; there is no k
#
# Bundled is a BatchTopK SAE of the residual stream after layer 2.

# %%
print(list(bundled_saes()))
model, sae = load_model(MODEL), SAE.load(bundled_saes()[f"{MODEL}/resid_post2"])
print(sae)
lines = bundled_text().read_text(encoding="utf-8").splitlines()[:150]
corpus = Corpus.from_texts(model, [json.loads(line)["text"] for line in lines])
source = ModelSource(model, corpus, [sae.hook])
x = source.read(range(source.n_sequences)).values[sae.hook]
f = sae.encode(x[:1])
told(torch.allclose(f @ sae.W_dec + sae.b_dec, sae(x[:1]), atol=1e-4))
on = {i: round(float(f[0, i]), 1) for i in f[0].nonzero()[:, 0].tolist()}
print(f"{len(x):,} tokens; latents on at the first: {on}")

# %% [markdown]
# ## What it is worth
#
# Three questions, which have different answers:
#
# - L0: how many latents are on, on average over tokens?
# - explained variance: 1 - sum |e|^2 / sum |x - mean x|^2
# - loss recovered: put xhat in the place of x and let the model predict the text. With CE for the cross-entropy,
#   (CE_ablated - CE_sae) / (CE_ablated - CE): 1 is a perfect stand-in, 0 one that is no better
#   than what stands there when x is ablated

# %%
some = corpus.take(torch.arange(60))
found = evaluate_sae(model, sae, some, ablation="both")
told(12 < found.l0 < 20, 0.93 < found.explained_variance < 0.98, found.ce - 0.05 < found.ce_sae < found.ce)
print(found)

# %% [markdown]
# About 16 of 1,024 latents stand for an activation, explain 96 % of the variance, and the model predicts text as well
# from xhat as from x. (On this text the loss is even a shade lower. It is no gain that matters.)
#
# High numbers do not show that latents mean anything. A dictionary of *random* directions with the same L0 is a
# baseline that learned nothing.

# %%
own, chance = evaluate_reconstruction(sae, x), 1 - random_baseline(sae, x, seed=SEED)
told(0.3 < chance < 0.6)
print(f"explained variance: {own.explained_variance:.2f}, of random directions {chance:.2f}")
rare = float((own.density < 0.02).float().mean())
told(0.6 < rare < 0.99)
print(f"on for fewer than one token in fifty: {rare:.0%} of latents")
figure = px.histogram(x=own.density[own.density > 0].log10().numpy(), nbins=40)
figure.update_xaxes(title="share of tokens, log10").update_yaxes(title="latents")
finish(figure, "how often latents are on", height=300)

# %% [markdown]
# Nearly half the variance comes for nothing, and what counts is the rest. Most latents are rare.
#
# ## The ZF plot
#
# If directions were orthogonal, |f| would equal |x|. With more directions than channels they cannot be; the claim
# behind top-AFA is that it nearly holds. One dot for each token. The red band is what random signs would give, |x| (1
# +- 1/sqrt(2d)).

# %%
points = zf_points(sae, x)
ratio = points.code_norm / points.x_norm
told(0.8 < ratio.median() < 0.95, (ratio < 1).mean() > 0.9)
print(f"median |f| / |x| {ratio.median():.3f}; below the line: {(ratio < 1).mean():.0%} of tokens")
zf_plot(points, d=sae.config.d_in, title="is the code as long as the activation?", limit=3000)

# %% [markdown]
# Nearly all dots lie below the line: the code is about an eighth too short. Trained SAEs do so mostly, since a part of
# x is not reconstructed and directions that are on together point in similar ways.
#
# The same rule can choose the latents of this SAE, instead of its own threshold: `select="afa"`.

# %%
afa = evaluate_reconstruction(sae, x, select="afa")
told(2.5 < afa.l0 / own.l0 < 4, 0 < afa.explained_variance - own.explained_variance < 0.01)
pd.DataFrame(
    {name: {"L0": r.l0, "explained variance": r.explained_variance} for name, r in (("own", own), ("afa", afa))}
)

# %% [markdown]
# To make the code long enough it takes three times as many latents, for less than one per cent of the variance. The
# rule by itself has no pressure to be sparse, in training either; `docs/sae.md` tells what it takes.
#
# ## Training one
#
# Training a good one takes minutes to days. A few seconds show the call: `train_sae` runs the model, shuffles
# activations and trains. Log and checkpoints go to `folder=`, if there is one, and training goes on from there.

# %%
config = SAEConfig(architecture="topk", d_in=sae.config.d_in, d_sae=512, k=16)
small = train_sae(model, corpus, sae.hook, config=config, steps=150, batch_size=512, lr=1e-3, seed=SEED)
trained = evaluate_reconstruction(small, x)
told(own.explained_variance > trained.explained_variance + 0.05, trained.explained_variance > chance + 0.2)
print(f"explained variance: {trained.explained_variance:.2f} after 150 steps, bundled {own.explained_variance:.2f}")

# %% [markdown]
# ## Which latents carry a behaviour?
#
# The behaviour: in a tag question the pronoun agrees with the name. In the corrupt prompt a name of the other gender
# stands. The metric is the logit of the right pronoun less that of the other.
#
# With the error kept, x = sum_i f_i w_i + b_dec + e is exact, so that each latent and e have an effect of their own.
# Exactly: set f_i to its value in the corrupt run, run the model on. Estimated for all of them at once, with the
# gradient g of the metric at x:
#
#     score_i = (f_i,corrupt - f_i,clean) <g, w_i>        score_error = <g, x_corrupt - x_clean> - sum_i score_i

# %%
pairs = load_task(TASK, model, n=N, seed=SEED)
for side in ("clean", "corrupt"):
    print(f"{side:8}{model.tokenizer.decode(pairs.tokens(side)[0])!r}")
estimates = {
    "gradient": feature_attribution(model, pairs, sae, direction="noise"),
    "integrated gradients": feature_attribution(model, pairs, sae, direction="noise", steps=8),
}
mean = estimates["gradient"].mean("prompt").to_series()
names = mean.abs().sort_values(ascending=False).index[:12].tolist()
exact = feature_patching(model, pairs, sae, names, direction="noise")
table = pd.DataFrame({"exact": exact.mean("prompt").to_series()})
for how, values in estimates.items():
    table[how] = values.mean("prompt").to_series()[names]
gap = float((exact.metric_clean - exact.metric_corrupt).mean())
told(table["exact"].iloc[:2].max() < -5, table["exact"].iloc[2:].abs().max() < 1.5, (mean == 0).mean() > 0.5)
print(f"metric: clean less corrupt {gap:.1f} logits; {(mean != 0).sum()} of {len(mean)} nodes have a score at all")
table.round(2)

# %% [markdown]
# Two latents stand out by far, all others hardly matter, and so little does the error. Estimates get the order right.
# How large are they? The gradient is too small by a quarter, the mean gradient along the way comes much closer.

# %%
off = {how: float(np.linalg.norm(table[how] - table["exact"]) / np.linalg.norm(table["exact"])) for how in estimates}
told(0.15 < off["gradient"] < 0.4, off["integrated gradients"] < 0.12)
print("relative error:", {k: round(v, 3) for k, v in off.items()})

# %% [markdown]
# ## Reading the two
#
# From both sides: where a latent is on most strongly (`top_contexts`, the token in brackets), and which tokens its
# decoder row raises and lowers (`logit_effects`: W_U^T (g * w_i), the unembedding after the final norm's weight).

# %%
latents = [int(name.rpartition(".f")[2]) for name in names[:2]]
contexts = top_contexts(model, sae, corpus, latents=latents, n=4, window=(8, 1))
effects = logit_effects(model, sae, latents, k=5)
for latent in latents:
    seen = contexts[contexts.latent == latent]
    print(f"latent {latent}, on at {seen.density.iloc[0]:.1%} of tokens")
    for row in seen.itertuples():
        print(f"   {row.value:5.1f}  {row.before}[{row.token}]{row.after}".replace("\n", " "))
    for side, part in effects[effects.latent == latent].groupby("side", sort=False):
        print(f"   {side:6} {part.token.tolist()}")
top = effects[effects["rank"] == 0].pivot(index="latent", columns="side", values="token")
told(top.loc[latents[0], "top"] == " she", top.loc[latents[1], "top"] == " he")

# %% [markdown]
# Both sides agree, and agree with the task: one is "a pronoun is due and it is *she*", the other the same for *he*.
# (Two readings that fit are a hypothesis. The proof is below.)
#
# ## A feature circuit
#
# `feature_circuit` keeps the strongest nodes and tests them together: all latents and errors that are *not* in the
# circuit are set to their values in the corrupt run, at every token.
#
#     faithfulness = (M(circuit) - M(corrupt)) / (M(clean) - M(corrupt))
#
# A second dictionary makes it more than a list. The bundled *transcoder* reads what goes into the MLP of layer 1 and
# writes what comes out, so that its latents are steps of a computation. An edge from one to a latent of the SAE is how
# much of the latter's effect comes through it.

# %%
transcoder = SAE.load(bundled_saes()[f"{MODEL}/transcoder1"])
saes = {s.hook: s for s in (transcoder, sae)}
circuit = feature_circuit(model, pairs, saes, n_nodes=20, check=20, steps=8)
SHORT = {transcoder.hook: "transcoder", sae.hook: "SAE"}


def short(node: str) -> str:
    """A node's name with its dictionary in the place of its hook."""
    hook, _, last = node.rpartition(".")
    return f"{SHORT[hook]} {last}"


nodes = circuit.nodes.assign(node=circuit.nodes["node"].map(short))
told(circuit.faithfulness > 0.85, circuit.relative_error < 0.2, nodes["node"][:2].str.startswith("SAE").all())
told(nodes["node"][2:4].str.startswith("transcoder").all(), nodes["node"].str.endswith("error").sum() == 2)
told(0.05 < -circuit.nodes["exact"][2:4].sum() / gap < 0.2)
print(f"faithfulness {circuit.faithfulness:.2f}; relative error of the estimates {circuit.relative_error:.2f}")
nodes.head(10).round(2)

# %% [markdown]
# Two latents of the transcoder come next, by effect, and the errors of both dictionaries are in the circuit: what they
# leave out carries a part of the behaviour, and a circuit without error nodes would hide that. Which acts through
# which? Weights are in logits, positive where the clean value helps. They are slopes in the corrupt run, where a latent
# that is off has none: of *she* and *he* one is off in each prompt, so that a weight counts about half of the prompts.

# %%
flow = circuit.edges.assign(source=circuit.edges["source"].map(short), target=circuit.edges["target"].map(short))
flow = flow.pivot_table(index="source", columns="target", values="weight", sort=False).fillna(0).iloc[:, :6]
main = [f"SAE f{latent}" for latent in latents]
told(set(main) <= set(flow.columns[:3]), (flow[main].iloc[:2] > 0.1).all(axis=None), (flow[main].sum() < 2).all())
figure = px.imshow(flow, text_auto=".2f", color_continuous_scale="Blues", aspect="auto")
figure = finish(
    figure.update_layout(coloraxis_showscale=False), "through which latents those of layer 1 act (logits)", height=300
)
figure.update_layout(margin={"l": 130}).update_xaxes(title=None).update_yaxes(title=None)

# %% [markdown]
# The two latents of the MLP act through *she* and *he* alike, and through the SAE's error. By their exact effects in
# the table they are about a tenth of the behaviour: most of it goes past this MLP, by ways that the transcoder does not
# describe.
#
# ## How many latents does a behaviour take?
#
# Faithfulness of the n strongest latents and error, for three behaviours of the same model. To be few is no law.

# %%
sizes, rows = [1, 2, 4, 8, 16, 32, 64, 128, 256], []
for task in (TASK, "greater_than", "ioi"):
    behaviour = load_task(task, model, n=N, seed=SEED)
    ranked = feature_attribution(model, behaviour, sae, direction="noise", steps=8).mean("prompt").to_series()
    order = ranked.abs().sort_values(ascending=False).index.tolist()
    rows += [(task, n, feature_faithfulness(model, behaviour, sae, order[:n])) for n in sizes]
curve = pd.DataFrame(rows, columns=["task", "nodes", "faithfulness"])
need = curve[curve["faithfulness"] > 0.8].groupby("task")["nodes"].min()
told(need[TASK] <= 4, need["greater_than"] <= 32, need["ioi"] >= 64)
figure = px.line(curve, x="nodes", y="faithfulness", color="task", markers=True, log_x=True, range_y=[0, 1.05])
finish(figure.update_xaxes(tickvals=sizes), "the n strongest nodes of one SAE", height=360)

# %% [markdown]
# A pronoun takes two latents, indirect object identification (IOI) dozens. Its answer may be any of many names. Where
# are its strongest latents on, and which token do they raise?

# %%
strongest = [int(node.rpartition(".f")[2]) for node in order[:12] if ".f" in node]
on = top_contexts(model, sae, corpus, latents=strongest, n=5).groupby("latent")["token"].agg(list)
raised = logit_effects(model, sae, strongest, k=1).query("side == 'top'").set_index("latent")["token"]
names_only = on.map(lambda tokens: sum(token[1:2].isupper() for token in tokens) >= 4)
answers = {model.tokenizer.decode(i) for i in behaviour.answers[:, 0].tolist()}
told(names_only.mean() > 0.5, not answers & set(raised))
print(pd.DataFrame({"on at": on, "raises": raised}).loc[strongest].to_string())

# %% [markdown]
# Most are on at one name or two, and raise no name: they say which name was read, and the layer after them has to carry
# it to where it is needed. With a latent for each name it takes many latents for prompts of many names. Here the direct
# effect on the logits tells nothing about what a latent is for; where it is on does.
#
# ## The proof: change a latent
#
# If the reading is right, then taking *she* away and putting *he* in its place, with nothing else touched, should make
# the model say " he" after a woman's name. `spliced` does so: with the error kept, the model computes what it did but
# for the change (f'_i - f_i) w_i. Control: as much of a random latent in the place of another.

# %%
she, he = latents
ids = {word: model.to_single_token(word) for word in (" she", " he")}
women = pairs.clean[pairs.answers[:, 0] == ids[" she"]]
read_at = women.shape[1] - 1


@torch.no_grad()
def said(edits: list[Edit]) -> list[float]:
    """Mean probability of " she" and of " he" after a woman's name."""
    with spliced(model, sae, edits=edits):
        p = model(women)[:, read_at].softmax(-1)
    return p[:, list(ids.values())].mean(0).tolist()


often = (own.density > 0.001).nonzero()[:, 0]
drawn = often[torch.randperm(len(often), generator=torch.Generator().manual_seed(SEED))][:40].reshape(20, 2).tolist()
controls = [said([Edit(i, 0.0), Edit(j, 10.0)]) for i, j in drawn]
changes = {"as it is": [], "she off": [Edit(she, 0.0)], "he at 10": [Edit(he, 10.0)],
           "she off, he at 10": [Edit(she, 0.0), Edit(he, 10.0)]}  # fmt: skip
result = pd.DataFrame({name: said(edits) for name, edits in changes.items()}, index=list(ids)).T
result.loc["20 random pairs, mean"] = np.mean(controls, 0)
result.loc["20 random pairs, the worst"] = min(controls)
told(result.iloc[0, 0] > 0.99, result.iloc[1, 0] > 0.8, result.iloc[3, 1] > 0.95, result.iloc[5, 0] > 0.9)
print(f"{len(women)} prompts, such as {model.tokenizer.decode(women[0, 1:])!r}")
result.round(3)

# %% [markdown]
# The pair turns the answer round, and none of twenty random pairs does. To turn *she* off is not enough: the model
# still says " she", if a little less surely. So the latent is not *needed*, though putting the other in its place
# suffices: part of the gender reaches the output in other ways (other latents, the error, later layers that read the
# name again). Sufficient and needed are different questions, for latents as for heads.

# %%
doses = [0, 1, 2, 3, 4, 6, 8, 10, 12]
steps = pd.DataFrame([said([Edit(she, 0.0), Edit(he, float(v))]) for v in doses], columns=list(ids), index=doses)
told(steps[" she"].iloc[0] > 0.8, steps[" he"].iloc[-1] > 0.95)
figure = px.line(
    steps,
    markers=True,
    range_y=[0, 1.02],
    labels={"index": "code of the he latent", "value": "probability"},
)
finish(figure.update_layout(legend_title=None), "she off, he at growing strength", height=340)
