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
# # Which neurons do related tokens share?
#
# Semi-NMF of MLP activations (Shafran, Geiger and Geva, 2506.10920) finds groups of neurons that fire together. One
# check in that paper uses the days of the week: features of single days share *core* neurons, which raise every day of
# the week, and each day has *exclusive* neurons, which raise that day and lower others.
#
# The bundled models know no days of the week. What mini-gpt2 does know is that a war that began in 1561 did not end in
# 1534: after "from the year 1561 to the year 15" it needs a two-digit number above 61. So the related tokens here are
# the hundred numbers `00` to `99`, and the question is the paper's: does a feature of late years share neurons with a
# feature of early ones, and does raising the shared neurons do something else than raising the others?
#
# It runs on a bundled model in under a minute; as a script: `python notebooks/snmf_weekdays.py`.

# %%
import itertools
import random

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from interp import (
    SNMF,
    Corpus,
    Hierarchy,
    clamp,
    clamp_test,
    compare_steering,
    concept_detection,
    core_neurons,
    diff_means,
    direction_effects,
    fit_snmf,
    load_model,
    neuron_overlap,
    side_by_side,
    snmf_vector,
    steering_scores,
    steering_strength,
    text_activations,
    top_contexts,
)  # fmt: skip
from interp.plots import SCALE, finish
from interp.tasks.named import TASKS, get_task

LAYER = 2
HOOK = f"blocks.{LAYER}.mlp.hook_post"


def sentences(kind: str, n: int, seed: int) -> list[str]:
    """Prompts of a task with one of their right answers."""
    rng, task = random.Random(seed), get_task(kind)
    corruption = next(iter(task.corruptions))
    examples = [task.generate(rng, corruption=corruption) for _ in range(n)]
    return [f"{example.clean}{rng.choice(example.answers)}." for example in examples]


def grid(values, rows, columns, title: str, unit: str, signed: bool = True) -> go.Figure:
    """A labelled heatmap; blue is above 0."""
    values = np.asarray(values, dtype=float)
    limit = np.abs(values).max()
    colours = {"colorscale": SCALE, "zmin": -limit} if signed else {"colorscale": "Blues", "zmin": 0}
    figure = go.Figure(go.Heatmap(z=values, x=columns, y=rows, zmax=limit, colorbar={"title": unit}, **colours))
    figure.update_xaxes(type="category").update_yaxes(type="category", autorange="reversed")
    return finish(figure, title, height=230 + 26 * len(rows))


# %% [markdown]
# ## Texts and features
#
# Sentences of seven kinds, and more of those about years, because a feature of one decade needs to be seen. Nothing
# tells the factorisation which sentence is of which kind.

# %%
model = load_model("mini-gpt2")
texts = {kind: sentences(kind, 180 if kind == "greater_than" else 15, seed=0) for kind in TASKS}
corpus = Corpus.from_texts(model, [text for some in texts.values() for text in some])
snmf = fit_snmf(model, corpus, HOOK, n_features=48, share=0.05)
alive = snmf.components_.any(1)
used = int((snmf.components_ != 0).sum(1).max())
print(
    f"{snmf}: {len(snmf.weights_)} tokens, {used} of {model.cfg.d_mlp} neurons in a feature, {int(alive.sum())} in use"
)

# %% [markdown]
# Never judge it by reconstruction. An SVD of the same rank is the best reconstruction there is, by directions that use
# every neuron; a semi-NMF that may use every neuron comes close to it, and neither can be read. What sparse features
# are worth shows in what they say and do. Whether they are there at all shows in `stability_`: the mean cosine with the
# same feature as other starts find it.

# %%
activations = {kind: text_activations(model, HOOK, some) for kind, some in texts.items()}
X = torch.cat([rows for some in activations.values() for rows in some])
singular = torch.linalg.svdvals(X.double()) ** 2
dense = SNMF(48, share=1.0, n_init=1, max_iter=0).fit(X)
print(f"share of the squares that is lost: SVD {float(singular[48:].sum() / singular.sum()):.3f}, semi-NMF of all neurons "
      f"{dense.relative_loss_:.3f}, of {snmf.share:.0%} of them {snmf.relative_loss_:.3f}")  # fmt: skip
go.Figure(go.Histogram(x=snmf.stability_[alive].numpy(), xbins={"start": 0, "end": 1, "size": 0.05})).update_layout(
    template="plotly_white", title="stability of features", xaxis_title="mean cosine over other starts", height=300
)  # fmt: skip

# %% [markdown]
# ## Reading a feature from both sides
#
# Its strongest contexts say when it fires, `direction_effects` what it writes: the tokens whose logits it raises,
# through the model's own unembedding. The eight most stable features:

# %%
stable = snmf.stability_.where(alive, torch.tensor(-1.0)).argsort(descending=True)[:8].tolist()
contexts = top_contexts(model, snmf, corpus, n=3, window=(7, 0), batch_size=1024)
seen = (contexts["before"] + "[" + contexts["token"] + "]").groupby(contexts["latent"]).agg(list)
effects = direction_effects(model, HOOK, snmf.components_, k=6)
written = effects[effects["side"] == "top"].groupby("direction")["token"].agg(" ".join)
for feature in stable:
    print(f"{feature:3}  stability {snmf.stability_[feature]:.2f}  fires on {seen[feature]}")
    print(f"     writes {written[feature]!r}")

# %% [markdown]
# The two sides need not be about the same: where it fires is what came before, what it writes is what should come next.
# And stable does not mean readable: some write words that have nothing in common.
#
# ## Which feature tells a kind of text from others?
#
# `concept_detection` takes a feature's best cosine with any token of a text. With 48 features, one is the best by luck
# too, so the feature is chosen on half of the texts and judged on the other half. 0.5 would be chance.

# %%
rows = []
for kind in TASKS:
    sides = [(activations[kind][half::2], [x for other in TASKS if other != kind for x in activations[other][half::2]])
             for half in (0, 1)]  # fmt: skip
    choose, judge = (concept_detection(snmf.components_, *side) for side in sides)
    best = int(choose["auroc"].argmax())
    rows.append((kind, best, choose["auroc"][best], judge["auroc"][best], judge["s_cd"][best], written[best]))
pd.DataFrame(rows, columns=["kind", "feature", "auroc, chosen on", "auroc, judged on", "S_CD (nats)", "writes"]).round(
    2
)

# %% [markdown]
# These sentences are made from templates, so telling them apart is easy. And a feature that detects a kind of text need
# not write its words: it may stand for a place in the sentence that only this kind has. Detection and writing are two
# questions.
#
# ## Features of years
#
# For each decade, the feature that writes its ten numbers most, in standard deviations over the whole vocabulary.

# %%
years = [model.to_single_token(f"{year:02d}") for year in range(100)]
decades = [f"{first}0-{first}9" for first in range(10)]
table = direction_effects(model, HOOK, snmf.components_, k=model.cfg.d_vocab)
table = table[table["side"] == "top"].pivot(index="direction", columns="token_id", values="value")
z = table.div(table.std(axis=1).replace(0, 1), axis=0)[years].to_numpy().reshape(-1, 10, 10).mean(2)
group = list(dict.fromkeys(z.argmax(0).tolist()))
names = [f"feature {feature}" for feature in group]
grid(z[group], names, decades, "what features of years write", "sd")

# %% [markdown]
# Not one feature to a number, and not one to a decade: bands that overlap. They fire on a century, the last token
# before the two digits have to be said. Before a second year it is the first one that says how far up: mostly, what is
# written lies above it.

# %%
for feature in group:
    print(feature, seen.get(feature))

# %% [markdown]
# ## Shared neurons
#
# `neuron_overlap` counts the neurons that two features have in common; on the diagonal are a feature's own.

# %%
overlap = neuron_overlap(snmf.components_)
others = overlap[alive][:, alive].double()
mean_other = float((others.sum() - others.trace()) / (len(others) * (len(others) - 1)))
neighbours = [int(overlap[a, b]) for a, b in itertools.pairwise(group)]
far = [int(overlap[a, b]) for i, a in enumerate(group) for b in group[i + 2 :]]
print(f"shared by neighbours {neighbours}, by others of these {far}, by any two features {mean_other:.1f} on average")
grid(overlap[group][:, group], names, names, "neurons in common", "neurons", signed=False)

# %% [markdown]
# Here years differ from the paper's days of the week. Days are seven of a kind, with one core for all. Numbers have an
# order, and so have the features' neurons: neighbours tend to share most, and the two ends of the line next to nothing.
# Instead of one core there is a chain of them.

# %%
core_of_all, exclusive = core_neurons(snmf.components_, group)
counts = {feature: len(neurons) for feature, neurons in exclusive.items()}
print(f"neurons that all {len(group)} features have: {len(core_of_all)}; that one alone has: {counts}")

# %% [markdown]
# ## Do they do what they are said to?
#
# Overlap is a fact about a factorisation. To make it one about the model, neurons are held at what their feature makes
# of them where it is strongest, while the model reads prompts that are not about years at all. What happens to the
# numbers' logits (less the mean over all tokens, to which a softmax is blind)? For each pair of neighbours the core
# they share, then each feature's exclusive neurons.

# %%
prompts = ["The", "We know that the", "In the", "Now the"]
strongest = snmf.components_ * snmf.weights_.amax(0)[:, None]


@torch.no_grad()
def change_of_years(features: list[int], neurons: torch.Tensor) -> np.ndarray:
    """Mean change of the logits of each decade's numbers, the neurons held at their features' mean strength."""
    values = {(LAYER, int(n)): float(strongest[features, n].mean()) for n in neurons}
    found = []
    for prompt in prompts:
        before = model(prompt)[0, -1]
        with clamp(model, values):
            change = model(prompt)[0, -1] - before
        found.append((change - change.mean())[years].reshape(10, 10).mean(1))
    return torch.stack(found).mean(0).numpy()


parts = {}
for a, b in itertools.pairwise(group):
    core, _ = core_neurons(snmf.components_, [a, b])
    if len(core):
        parts[f"core of {a} and {b} ({len(core)})"] = change_of_years([a, b], core)
for feature, neurons in exclusive.items():
    if len(neurons):
        parts[f"only {feature} ({len(neurons)})"] = change_of_years([feature], neurons)
grid(list(parts.values()), list(parts), decades, "change of the numbers' logits", "logits")

# %%
shared = [name for name in parts if name.startswith("core")]
alone = [name for name in parts if name.startswith("only")]
for kind, chosen in (("cores", shared), ("exclusive neurons", alone)):
    least, most = ([bound(parts[name]) for name in chosen] for bound in (np.min, np.max))
    print(f"{kind:17} least raised decade {np.mean(least):+.1f} logits on average, most raised {np.mean(most):+.1f}")

# %% [markdown]
# The paper's pattern, blurred along a line. At the low end a core raises numbers of every decade, as one that means "a
# number comes next" should; further up, cores raise ever fewer decades, the late ones. The features at the two ends
# have most neurons for themselves, and these favour their own end. In the middle, where two features share most of what
# they have, the rest is little, and may do next to nothing by itself: such a band comes from cores that overlap.
#
# Would any neurons have done it? `clamp_test` holds the core of two features at a common strength and sets it against
# as many random neurons of the same layer, for one token.

# %%
pairs = list(itertools.pairwise(group))
a, b = max(pairs, key=lambda pair: int(overlap[pair[0], pair[1]]))
core, _ = core_neurons(snmf.components_, [a, b])
year = f"{int(z[[a, b]].mean(0).argmax())}5"
signs = {(LAYER, int(n)): float(strongest[[a, b], n].mean().sign()) for n in core}
kinds = [kind for kind in TASKS if kind != "greater_than"]
more = [" ".join(text.split()[:n]) for kind in kinds for n, text in enumerate(texts[kind][:6], start=2)]
print(clamp_test(model, [*prompts, *more], year, signs, times=0.5))

# %% [markdown]
# The two p-values answer two questions: would it hold for other prompts, and is this set unusual among sets of neurons?
# The second cannot be below 1 / (sets + 1).
#
# ## Features of features
#
# `Hierarchy` factorises the components again, level by level. What several features share should become their parent.
# The top level's features that write years, and what is below them (the share is of the parent's largest weight):

# %%
hierarchy = Hierarchy((48, 24, 12), share=0.05).fit(X, hook=HOOK)
words = []
for components in hierarchy.components_:
    effects = direction_effects(model, HOOK, components, k=5)
    words.append(effects[effects["side"] == "top"].groupby("direction")["token"].agg(list))
tree = hierarchy.tree()


def show(level: int, feature: int, share: float = 1.0) -> None:
    """A feature and all below it."""
    print(f"{'    ' * (2 - level)}{share:.2f}  {feature}: {' '.join(words[level][feature])!r}")
    for row in tree[(tree["level"] == level) & (tree["parent"] == feature)].itertuples():
        show(level - 1, row.child, row.share)


of_years = [i for i, tokens in words[2].items() if sum(token.isdigit() for token in tokens) >= 3]
for feature in of_years:
    show(2, feature)
print(f"{len(of_years)} of {len(words[2])} features of the top level write years")

# %% [markdown]
# A parent with one child is a copy of it, and a root that joins neighbouring bands is what one hopes for. A share says
# how much a child counts for its parent, not how alike the two are: below a feature that writes years there may be one
# that does not.
#
# ## Steering with one feature, against a mean difference
#
# The concept, fixed beforehand: numbers from 80 on. The feature is the one that writes these most; nothing told the
# factorisation which sentences have them. DiffMeans is told: it is the mean activation of sentences that end on such a
# number less that of those that end on an earlier one, over all their tokens, or at the token before the number only.
# The comparison is at equal effect on the model: `steering_strength` finds for each how strongly to add it for the same
# KL of the next token.

# %%
concept = [years[year] for year in range(80, 100)]
feature = int(z[:, 8:].mean(1).argmax())
endings = [(text, int(text.rstrip(".")[-2:])) for text in texts["greater_than"]]
late, early = ([text for text, year in endings if (year >= 80) == side] for side in (True, False))
before = [[text.rstrip(".")[:-2] for text in side] for side in (late, early)]
vectors = {
    f"SNMF {feature}": snmf_vector(snmf, feature),
    "DiffMeans": diff_means(model, HOOK, late, early),
    "DiffMeans, last token": diff_means(model, HOOK, *before, positions="last"),
}
print(f"{len(late)} sentences end on 80 to 99, {len(early)} do not")
directions = torch.nn.functional.normalize(torch.stack([vector.direction for vector in vectors.values()]), dim=1)
pd.DataFrame((directions @ directions.T).numpy(), list(vectors), list(vectors)).round(2)

# %%
about_years = ["The war lasted from the year 1550 to the year 15", "People remember the plague from 1320 to 13"]
tables = []
for prompt in [*prompts, *about_years]:
    strength = steering_strength(model, prompt, list(vectors.values()), (0.1, 0.25, 0.5))
    for target, found in strength[strength["sign"] == 1].groupby("target"):
        if not found["reached"].all():
            print(f"{prompt!r}: not every vector reaches {target}")
            continue
        pushes = zip(vectors.items(), found["alpha"], strict=True)
        changes = {name: [vector.change(float(alpha))] for (name, vector), alpha in pushes}
        written = side_by_side(model, prompt, changes, n=6, max_new_tokens=12, concept_tokens=concept)
        tables.append(steering_scores(written).assign(prompt=prompt, target=target))
scores = pd.concat(tables, ignore_index=True)
for name in list(vectors)[1:]:
    gain = compare_steering(scores, f"SNMF {feature}", name, by=["prompt", "target", "sample"])
    print(f"SNMF - {name}: {gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] over {gain.n_pairs} pairs")
scores.groupby(["target", "name"])[["concept", "fluency", "final"]].mean().round(3)

# %% [markdown]
# Is that good? Read the texts before the table.

# %%
for prompt in ("We know that the", about_years[0]):
    shown = scores[(scores["prompt"] == prompt) & (scores["target"] == 0.5) & (scores["sample"] == 0)]
    print(prompt, *(f"  {name:22} {text!r}" for name, text in zip(shown["name"], shown["text"], strict=True)), sep="\n")

# %% [markdown]
# The feature wins by far, and by saying numbers over and over. Three things to take from that. The score counts the
# probability of numbers and how likely the text is to the model left alone, and a model that has learned to repeat
# minds repetition less than a reader does. KL was equal for the next token only: where the first number is followed by
# another, the same push goes on to do more. And the feature was chosen by what it writes, which is what was measured,
# while DiffMeans holds all in which the two sets of sentences differ. One concept of one small model decides nothing
# between methods; `benchmarks/steering.py` has seven.
#
# What this shows: a factorisation without labels found groups of neurons that write bands of numbers, neighbouring
# bands share neurons, and holding what two of them share moves a number as random neurons do not. What it does not
# show: that the model compares years by means of these groups. For that they would have to be taken away while it does,
# and its mistakes looked at.
