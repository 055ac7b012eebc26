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
# # What weights say, and whether it is so
#
# A neuron of an MLP reads the residual stream with one vector and writes another to it. Both can be put through the
# model's unembedding and read as tokens, without running the model on a single text. That is quick and covers every
# neuron. It is also only what weights *say*: the tokens may be those of another basis, the neuron may never fire, what
# it writes may be undone.
#
# So this notebook reads neurons and heads of a bundled model, and after each reading does something to the model that
# would turn out otherwise if the reading were wrong. It takes well under a minute; as a script: `python
# notebooks/neurons.py`.

# %%
import copy
import json

import pandas as pd
import plotly.express as px
import torch

from interp import (
    Corpus,
    activation_patching,
    clamp_effect,
    clamp_test,
    decode_neurons,
    decoding_stability,
    find_neurons,
    layer_similarity,
    load_model,
    load_task,
    match_neurons,
    row_tokens,
    top_token_pairs,
)  # fmt: skip
from interp.bundled import bundled_text
from interp.features.sources import ModelSource
from interp.neurons.clamp import signs_of

model = load_model("mini-llama")


def as_lines(table: pd.DataFrame) -> pd.Series:
    """Tokens of each neuron and pole of a decoded table, on one line."""
    return table.groupby(["matrix", "layer", "neuron", "pole"], observed=True)["token"].agg(
        lambda t: " ".join(map(repr, t))
    )


# %% [markdown]
# ## Every neuron, read three ways
#
# A gated neuron's activation is `act(gate . x) * (up . x)`. Its up and gate rows say what it looks for, its down row
# what it promotes. All are read as pole + (tokens that the row agrees with) and pole - (tokens that it is against),
# because a gated neuron fires with both signs: at a negative activation it writes minus its down row.

# %%
table = decode_neurons(model, matrix=["up", "gate", "down"], k=8, kurtosis=True)
print(f"{len(table):,} rows; read as {table.attrs['reading']['matrices']['down']}")
table.head(3)

# %% [markdown]
# These options are part of the result, since the order of tokens depends on them. A "cosine" makes scores of different
# neurons comparable, which raw logits are not, and takes the token vectors' lengths out of the order. `fold_norm`
# multiplies the weight of the norm in front of the MLP into what is read (this model has none behind, so what is
# written stays as it is). How many neurons keep their first token?

# %%
first = table[table["rank"] == 0].set_index(["matrix", "layer", "neuron", "pole"])["token_id"]
for name, options in {
    "logit": {"score": "logit"},
    "no norm folded": {"fold_norm": False},
    "mean subtracted": {"center": True},
}.items():
    other = decode_neurons(model, matrix=["up", "gate", "down"], k=1, **options)
    same = first == other.set_index(first.index.names)["token_id"].reindex(first.index)
    print(f"{name:16}", same.groupby("matrix", observed=True).mean().round(2).to_dict())

# %% [markdown]
# ## About something, or about nothing in particular
#
# Excess kurtosis of a row's scores over the vocabulary is high where a few tokens stand out from the rest, and near 0
# where scores look like a bell curve, as those of a random row would.

# %%
each = table[(table["rank"] == 0) & (table["pole"] == "+")]
px.box(each, x="layer", y="kurtosis", color="matrix", title="kurtosis of tokens' scores", template="plotly_white")

# %%
down = table[table["matrix"] == "down"]
loudest = down[down["rank"] == 0].nlargest(24, "kurtosis").drop_duplicates(["layer", "neuron"]).head(6)
lines = as_lines(down)
for row in loudest.itertuples():
    both = [f"{pole} {lines['down', row.layer, row.neuron, pole]}" for pole in "+-"]
    print(f"layer {row.layer} neuron {row.neuron}, kurtosis {row.kurtosis:.1f}\n  {both[0]}\n  {both[1]}")

# %% [markdown]
# Often one pole reads as a word class and the other as leftovers: a long tail on one side. High kurtosis is a good
# place to begin to read; low kurtosis is no proof that a neuron does nothing.
#
# ## In whose language?
#
# In early layers the stream is not yet in the unembedding's basis, and readings drift: tuned lenses exist for that.
# This model's embedding and unembedding are different matrices, so one can ask which of the two a layer is about:
# `vocabulary="embed"` compares rows with the vectors that tokens come in with. Median kurtosis:

# %%
found = []
for vocabulary in ("unembed", "embed"):
    read = decode_neurons(model, matrix=["up", "gate", "down"], poles="+", k=1, kurtosis=True, vocabulary=vocabulary)
    found.append(read.groupby(["matrix", "layer"], observed=True)["kurtosis"].median().rename(vocabulary))
pd.concat(found, axis=1).unstack("layer").round(2)

# %% [markdown]
# What the first layer reads stands out against the embedding and not against the unembedding; what the last layer
# writes, the other way round. In between neither is much above 0, and a list of tokens for a typical neuron there
# deserves little trust.
#
# ## Neurons for a token
#
# `find_neurons` turns the table around: which neurons have this token at the top? It takes the exact text, space and
# all.

# %%
paris = find_neurons(down, " Paris", k=5)
paris[["layer", "neuron", "pole", "rank", "score", "kurtosis"]].round(2)

# %% [markdown]
# ## Another view: where it fires
#
# What a neuron writes does not say when. For the first of the loudest, the places in text like that of the training
# where its activation is most positive and most negative:

# %%
lines_of_text = bundled_text().read_text(encoding="utf-8").splitlines()[:150]
corpus = Corpus.from_texts(model, [json.loads(line)["text"] for line in lines_of_text])
layer, neuron = int(loudest["layer"].iloc[0]), int(loudest["neuron"].iloc[0])
hook = f"blocks.{layer}.mlp.hook_post"
source = ModelSource(model, corpus, [hook])
rows = source.read(range(source.n_sequences))
activation = rows.values[hook][:, neuron]
for pole, order in (("+", activation.argsort(descending=True)), ("-", activation.argsort())):
    print(f"pole {pole} writes {lines['down', layer, neuron, pole]}")
    for i in order[:4].tolist():
        sequence, position = rows.ids[i].tolist()
        text = model.tokenizer.decode(corpus.tokens[sequence, max(0, position - 7) : position + 1].tolist())
        print(f"   {float(activation[i]):+.2f}  {text!r}")

# %% [markdown]
# ## What one neuron does
#
# Now hold it at the largest activation that was seen with either sign, all along two prompts, and look at what comes
# next. If the reading is right, tokens of the pole should gain.

# %%
for pole, value in (("+", float(activation.max())), ("-", float(activation.min()))):
    effect = clamp_effect(model, ["The friends", "We know that the"], {(layer, neuron): value}, k=4)
    print(f"held at {value:+.2f}; pole {pole} reads {lines['down', layer, neuron, pole]}")
    print(effect[["prompt", "token", "before", "after"]].round(3).to_string(index=False), "\n")

# %% [markdown]
# Held at its strongest, its tokens gain many times over where the text leaves room for them, and hardly anything where
# it does not: a softmax hides what happens to unlikely tokens. A pole that no text reaches says nothing about the model
# in use.
#
# `clamp_test` asks a question with an answer: do the neurons found for a token raise its log-probability more than as
# many others of the same layers, held at the same values? Prompts that have nothing to do with the token are the harder
# test.

# %%
prompts = [
    "The",
    "Now the",
    "In the",
    "Yesterday",
    "We know that the",
    "The friends",
    "The war",
    "My friend",
    "So",
    "People remember the",
]
tests = {token: clamp_test(model, prompts, token, signs_of(find_neurons(down, token, k=5))) for token in
         (" Paris", " she", " John", "75", " school", " are")}  # fmt: skip
print("\n".join(map(str, tests.values())))

# %%
summary = [
    (token, test.effect, test.control, test.low, test.high, test.p, test.p_sets) for token, test in tests.items()
]
summary = pd.DataFrame(summary, columns=["token", "effect", "control", "low", "high", "p", "p of sets"])
px.bar(summary.melt("token", ["effect", "control"], "neurons", "nats"), x="token", y="nats", color="neurons", barmode="group",
       title="change of the token's log-probability, five neurons held", template="plotly_white")  # fmt: skip

# %% [markdown]
# The effects are large because five neurons are held at their layer's largest activation at every position, far from
# what text does: their weights reach the output as read, which does not show that the model uses them so. `low` and
# `high` bound the difference to the controls over prompts; p counts prompts, and "p of sets" control sets: it cannot be
# below 1 / (sets + 1).
#
# ## Would the reading survive another training run?
#
# For a model and its fine-tuned sibling, `decoding_stability` says how many neurons keep their first token. In two
# models trained apart a neuron's number means nothing, so here noise is added to weights, in parts of their own
# standard deviation.

# %%
parts = []
before = decode_neurons(model, matrix="down", k=8)
for noise in (0.1, 0.3, 1.0):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in other.blocks:
            weight = block.mlp.W_out
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    stable = decoding_stability(before, decode_neurons(other, matrix="down", k=8), n_permutations=5)
    parts.append(
        stable.groupby("layer")[["same_top", "same_top_chance", "jaccard"]].mean().assign(noise=noise).reset_index()
    )
px.line(pd.concat(parts), x="layer", y="same_top", color="noise", markers=True, range_y=[0, 1], template="plotly_white",
        title="share of neurons that keep their first token, under noise on the weights")  # fmt: skip

# %%
pd.concat(parts).pivot(index="noise", columns="layer", values=["same_top", "same_top_chance"]).round(3)

# %% [markdown]
# This is a property of the readings and of the noise together: it says nothing about what training would do.
#
# ## Heads: which token writes which
#
# A head's value and output matrices map each token to each token: attending to one writes the other. A head that copies
# has its largest entries where both are the same. In the middle layers it is the embedding that a head reads, so again
# the basis decides.

# %%
rows = []
for at in range(model.cfg.n_layers):
    for head in range(model.cfg.n_heads):
        pairs = {e: top_token_pairs(model, at, head, k=40, embedding=e) for e in ("unembed", "embed")}
        rows.append((at, head, *((p["row_token_id"] == p["column_token_id"]).mean() for p in pairs.values())))
heads = pd.DataFrame(rows, columns=["layer", "head", "unembed", "embed"])
print("share of a head's 40 strongest pairs that are a token with itself: layers' means")
heads.groupby("layer")[["unembed", "embed"]].mean().round(2)

# %%
best = heads.nlargest(1, "embed").iloc[0]
at, head = int(best["layer"]), int(best["head"])
pairs = top_token_pairs(model, at, head, k=8, embedding="embed")
own = row_tokens(model, at, head, " stone", k=6, pole="+", embedding="embed")
print(
    f"layer {at} head {head}:",
    [f"{a!r} -> {b!r}" for a, b in zip(pairs["row_token"], pairs["column_token"], strict=True)],
)
print("attending to ' stone' writes", own["token"].tolist())

# %% [markdown]
# The strongest pairs are mostly copies; a token's own row need not be. A head of this model has few channels for
# hundreds of tokens, and copies together with the others of its layer. Is the pattern real? If these heads copy, then
# repeating a sequence should break without them. Exact patching, on the induction task, of each head in turn:

# %%
task = load_task("induction", model, n=16)
effects = activation_patching(model, task, "head", direction="noise").sum("position").mean("prompt")
heads["effect"] = [float(effects.sel(layer=a, head=h)) for a, h in zip(heads["layer"], heads["head"], strict=True)]
print(
    f"rank correlation of copying by weights with the effect: {heads['embed'].corr(-heads['effect'], method='spearman'):.2f}"
)
px.scatter(heads.astype({"layer": str}), x="embed", y="effect", color="layer", template="plotly_white",
           labels={"embed": "copying, by weights", "effect": "logits lost when the head is patched"},
           title="heads that copy by weights, and what induction loses without them")  # fmt: skip

# %% [markdown]
# A prediction from weights alone that patching bears out, for this task. It is no general law. The same heads' share in
# indirect object identification, where late heads write a name that other heads have fetched:

# %%
ioi = (
    activation_patching(model, load_task("ioi", model, n=16), "head", direction="noise").sum("position").mean("prompt")
)
effect = [float(ioi.sel(layer=a, head=h)) for a, h in zip(heads["layer"], heads["head"], strict=True)]
print(f"rank correlation on ioi: {heads['embed'].corr(-pd.Series(effect), method='spearman'):.2f}")
heads.assign(ioi=effect).nsmallest(4, "ioi").round(2)

# %% [markdown]
# ## The same neuron in another model?
#
# mini-gpt2 has another architecture and another stream, but the same tokens. `layer_similarity` compares what neurons
# write over the vocabulary; its null shuffles the tokens of one model: what the best of as many unrelated neurons would
# give.

# %%
gpt2 = load_model("mini-gpt2")
similarity = layer_similarity(gpt2, model)
print(f"null: {similarity['null'].min():.2f} to {similarity['null'].max():.2f}")
px.imshow(similarity.pivot(index="layer_a", columns="layer_b", values="similarity"), text_auto=".2f", template="plotly_white",
          labels={"x": "layer of mini-llama", "y": "layer of mini-gpt2"}, title="mean of the largest |correlation|")  # fmt: skip

# %%
matched = match_neurons(gpt2, model, layers=[(gpt2.cfg.n_layers - 1, model.cfg.n_layers - 1)])
sides = {"a": as_lines(decode_neurons(gpt2, matrix="down", k=5)), "b": as_lines(down[down["rank"] < 5])}
for pair in matched.nlargest(3, "correlation").itertuples():
    print(f"correlation {pair.correlation:.2f}")
    print("  gpt2 ", pair.layer_a, pair.neuron_a, sides["a"]["down", pair.layer_a, pair.neuron_a, "+"])
    print("  llama", pair.layer_b, pair.neuron_b, sides["b"]["down", pair.layer_b, pair.neuron_b, "+"])

# %% [markdown]
# Above the null everywhere, and most in the last layers. The null has no structure at all: two models that both know
# which tokens are numbers will have correlated neurons without computing the same thing. A match is a candidate, and
# the test of it is, as above, to do something to both.
