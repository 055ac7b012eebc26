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
# # Indirect object identification, from scratch
#
# "When Mary and John went to the store, John gave a drink to" - " Mary". Wang et al. (2211.00593) took GPT-2 small
# apart for this sentence and found 26 heads with distinct jobs. Here the same questions go to mini-gpt2, a model of 4
# layers that was trained on such sentences: find the heads, ablate them, explain them, assemble a circuit, test it. The
# answer turns out to be another algorithm than GPT-2 small's, made of parts that GPT-2 small has too.
#
# It assumes what `start_here.py` tells; what could mislead is the subject of `patching_best_practices.py`.

# %%
import pandas as pd
import torch

from interp import (
    Circuit,
    activation_patching,
    compare_circuits,
    completeness,
    direct_logit_attribution,
    edge_scores,
    faithfulness,
    load_model,
    load_task,
    minimality,
    smallest_circuit,
    stability,
)
from interp.plots import heatmap
from interp.tasks.words import NAMES

# %% tags=["parameters"]
MODEL = "mini-gpt2"
N = 32

# %% [markdown]
# ## 1. The behaviour, and what it is measured against
#
# IO is the indirect object (Mary), S1 and S2 are the two mentions of the subject (John), END is the last token, where
# the answer is due. The names come in either order, so that no position gives the answer away.

# %%
model = load_model(MODEL)
cfg = model.cfg
pairs = load_task("ioi", model, n=N)
others = load_task("ioi", model, n=2 * N, seed=1)  # for mean ablation
held_out = load_task("ioi", model, n=N, seed=2)  # for judging what was chosen on `pairs`
rows, END = torch.arange(N), -1
io, s = pairs.answers[:, 0], pairs.wrong_answers[:, 0]
IO = (pairs.clean == io[:, None]).int().argmax(1)
S1 = (pairs.clean == s[:, None]).int().argmax(1)
S2 = pairs.differs.int().argmax(1)
s2 = int(S2[0])
assert bool(S2.eq(s2).all())  # one wording, so S2 stands at the same place in every prompt


def behaviour(logits: torch.Tensor) -> dict[str, float]:
    """Means over prompts at END: P(IO), P(S), their logit difference, and how often IO is ahead."""
    p, difference = logits.softmax(-1), logits[rows, io] - logits[rows, s]
    found = {"P(IO)": p[rows, io], "P(S)": p[rows, s], "logit diff": difference, "IO ahead": (difference > 0).float()}
    return {name: float(value.mean()) for name, value in found.items()}


with torch.no_grad():
    runs = {side: behaviour(model(pairs.tokens(side))[:, END]) for side in ("clean", "corrupt")}
assert runs["clean"]["P(IO)"] > 0.95
assert runs["corrupt"]["logit diff"] < -4
pd.DataFrame(runs).T.round(3)

# %% [markdown]
# The corrupt prompts exchange S2 for IO: the other one gives now, so the answer flips. Nothing else changes. (GPT-2
# small gives IO about half of the probability and a difference of 3.6 logits; this model is surer, having learned
# little else.)
#
# ## 2. Find: where is the news, and who moves it?
#
# Patch the residual stream from the clean into the corrupt run, place by place.

# %%
stream = activation_patching(model, pairs, "resid_pre")
heatmap(stream, title="logit difference restored: residual stream before each layer")

# %%
gap = float((stream.metric_clean - stream.metric_corrupt).mean())
at_s2, at_end = (stream.mean("prompt").isel(position=i) / gap for i in (s2, END))
print("share restored at S2 ", at_s2.values.round(2), "\nshare restored at END", at_end.values.round(2))
assert float(at_s2[0]) > 0.99
assert float(at_s2[-1]) > 0.7

# %% [markdown]
# The news (who is named twice) stays at S2 until the last layer and then goes to END in one step. In GPT-2 small it
# arrives at END in layers 7 and 8, and heads of layers 9 to 11 use it there. Heads, all positions together:

# %%
heads = activation_patching(model, pairs, "head", positions="all")
heatmap(heads, title="logit difference restored by one head")

# %%
# What each head writes at END, along logit(IO) - logit(S), split by the position that was attended to.
shares = direct_logit_attribution(model, pairs, positions=True).mean("prompt")
by_node = shares.sum("position").to_pandas().sort_values(key=lambda x: -x.abs())
top = by_node.index[0]
restored = heads.mean("prompt").to_pandas().stack().sort_values(ascending=False)
deciders = [f"a{layer}.h{head}" for layer, head in restored.index[:2]]
print("written:", by_node.head(5).round(2).to_dict(), "\npatched:", deciders, restored[:3].round(2).tolist())
print(f"of {top}'s {by_node[top]:.2f} logits, {float(shares.sel(node=top)[s2]):.2f} come from attending to S2")
assert top == deciders[0]
assert float(shares.sel(node=top)[s2]) > 0.9 * by_node[top]

# %% [markdown]
# Here is the first surprise. A *name mover* attends to IO and copies it. This head decides for IO, and attends to
# **S2**.
#
# ## 3. Explain: what do heads attend to, and what do they write?
#
# Two questions to each head. Its attention says where it reads: the mean weight from END to each role. Its output-value
# circuit says what it would write for a name there. Wang et al.'s **copy score**: take the stream of a name after the
# first layer, send it through the head alone, unembed,
#
#     logits(x) = LN(x) W_V W_O W_U
#
# and count how often that very name is among the five highest of all tokens. A head that suppresses has it among the
# lowest.

# %%
with torch.no_grad():
    _, cache = model.run_with_cache(pairs.clean)
    names = torch.tensor([model.to_single_token(f" {name}") for name in NAMES])
    bos = pairs.clean[0, 0].expand(len(names))
    _, of_names = model.run_with_cache(torch.stack([bos, names], 1))
    x, table = of_names["blocks.0.hook_resid_post"][:, 1], []
    for layer in range(1, cfg.n_layers):
        block, pattern = model.blocks[layer], cache[f"blocks.{layer}.attn.hook_pattern"]
        for head in range(cfg.n_heads):
            written = block.ln1(x) @ block.attn.W_V[head] @ block.attn.W_O[head] @ model.W_U
            five = lambda side: side.topk(5).indices  # noqa: E731
            copies, suppresses = ((five(v) == names[:, None]).any(1).float().mean() for v in (written, -written))
            seen = [float(pattern[rows, head, END, at].mean()) for at in (IO, S1, S2)]
            table.append((f"a{layer}.h{head}", *seen, float(copies), float(suppresses)))
table = pd.DataFrame(table, columns=["head", "END>IO", "END>S1", "END>S2", "copies", "suppresses"]).set_index("head")
movers = list(table.index[(table["END>IO"] + table["END>S1"] > 0.8) & (table["copies"] > 0.5)])
table.loc[[*deciders, *movers]].round(2)

# %%
mean = table.loc[movers].mean()
print(f"{len(movers)} heads look at both names and copy: {movers}\nmean attention {mean.iloc[:2].round(2).to_dict()}")
assert len(movers) > 10
assert abs(mean["END>IO"] - mean["END>S1"]) < 0.1
assert table["END>S2"].loc[deciders].min() > 0.7
assert table["suppresses"].idxmax() == deciders[0]
assert table["suppresses"].max() > 0.8
assert table["copies"].loc[deciders].max() < 0.1

# %% [markdown]
# So there are two kinds. Many heads attend from END to the two names of the first clause, to both alike, and copy what
# they see: they raise Mary *and* John. And one head attends to S2 and writes *against* the name there (a second, weaker
# one does likewise). The candidates come from the first kind, the choice from the second.
#
# Why did patching show none of the first kind? Because the logit difference is blind to what raises both names, and
# because in the corrupt prompt these heads see the same two names. Both have to change to see them: replace all names
# (`random_names`), and measure the answer's logit by itself.

# %%
renamed = load_task("ioi", model, n=N, corruption="random_names")
names_in = activation_patching(model, renamed, "head", positions="all", metric="answer_logit")
heatmap(names_in, title="logit of the answer restored by one head, all names being others")

# %%
raised = names_in.mean("prompt").to_pandas().stack()
raised.index = [f"a{layer}.h{head}" for layer, head in raised.index]
best = list(raised.sort_values(ascending=False).index[:10])
print("ten heads that raise the answer most:", best, f"\n{deciders[0]}: {raised[deciders[0]]:+.2f} logits")
assert len(set(best) & set(movers)) >= 9
assert raised[deciders[0]] < -0.5

# %% [markdown]
# The suppressor even lowers the answer: its attention is not perfect, and some of it falls on names that are right.
#
# ## 4. Ablate: does the story predict?
#
# It does, and boldly. Without suppressors the model should waver between *both* names. Without movers it should not
# know any name, and yet the logit difference should hardly fall. Mean ablation: the head's output becomes its mean over
# other prompts of the same wording, position by position.

# %%
with torch.no_grad():
    _, reference = model.run_with_cache(others.clean)


@torch.no_grad()
def without(chosen: list[str], tokens: torch.Tensor, watch: str | None = None, at=slice(None)) -> torch.Tensor:
    """Logits at END, or END's row of a pattern, with these heads mean ablated at all positions or one."""
    found = []

    def ablate(z: torch.Tensor, hook) -> torch.Tensor:
        z, layer = z.clone(), hook.name.split(".")[1]
        for head in (int(name.split(".h")[1]) for name in chosen if name.startswith(f"a{layer}.")):
            z[:, at, head] = reference[hook.name][:, at, head].mean(0)
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", ablate) for layer in range(cfg.n_layers)]
    if watch is not None:
        hooks.append((watch, lambda pattern, hook: found.append(pattern[:, :, END])))
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, END]
    return found[0] if watch is not None else logits


knocked = {"nothing": [], "suppressors": deciders, deciders[0]: deciders[:1], "movers": movers}
outcome = pd.DataFrame({name: behaviour(without(chosen, pairs.clean)) for name, chosen in knocked.items()}).T
outcome.index.name = "ablated"
assert outcome["P(S)"]["suppressors"] > 0.3
assert outcome["P(IO)"]["suppressors"] + outcome["P(S)"]["suppressors"] > 0.9
assert outcome["P(IO)"]["movers"] < 0.1
assert outcome["logit diff"]["movers"] > 0.8 * outcome["logit diff"]["nothing"]
outcome.round(3)

# %% [markdown]
# As predicted. Note what a metric hides: judged by logit difference alone, the movers do nothing.
#
# ## 5. How does the suppressor know which name to suppress?
#
# Does it look for a name that is *repeated*, or just for whoever gives? Let a third person give (`abc`: Mary, John,
# then Paul gives). Then no name is repeated, and both are equally good answers.

# %%
third = load_task("ioi", model, n=N, corruption="abc")
layer, head = (int(part) for part in deciders[0][1:].split(".h"))
watch = f"blocks.{layer}.attn.hook_pattern"
layer_1 = [f"a1.h{h}" for h in range(cfg.n_heads)]
looks = {}
for name, chosen, at in (("intact", [], END), ("no movers at END", movers, END), ("no layer 1 at S2", layer_1, s2),
                         ("neither", movers, slice(None))):  # fmt: skip
    ends = [without(chosen, tokens, watch, at)[:, head, s2].mean() for tokens in (third.clean, third.corrupt)]
    looks[name] = {"repeated name": float(ends[0]), "third name": float(ends[1])}
looks = pd.DataFrame(looks).T
change = looks["repeated name"] - looks["third name"]
print(f"attention of {deciders[0]} from END to the giver's name; layer 1 is among the movers")
assert change["intact"] > 0.4
assert change["no movers at END"] < 0.75 * change["intact"]
assert change["no layer 1 at S2"] < 0.95 * change["intact"]
assert abs(change["neither"]) < 0.15
looks.round(2)

# %% [markdown]
# It attends to a *repeated* name, and two things tell it. Without movers at END, the difference shrinks: they have
# written both candidates there, the head's query matches those names, and a third one does not match. Attending to what
# is about to be predicted and writing against it is **copy suppression** (McDougall et al. 2310.04625). Without layer 1
# at S2 it shrinks as well. Without either it is all but gone: the head attends to any giver.
#
# What does layer 1 do at S2? Exact effects of single edges on the head's keys, noising with the third name, say what
# comes in. This is patching of *paths*: only what one component sends to one input of another is changed; what comes
# after runs on.

# %%
edges = edge_scores(model, third, method="exact", direction="noise")
into = edges.mean("prompt").sel(target=f"{deciders[0]}<k>").to_pandas().dropna().sort_values()
print("edges into the keys (logits):", into.head(7).round(2).to_dict())
induction = [name for name in into.index[:7] if name.startswith("a1.")]
print("attention from S2 to the token after S1, and the edge's effect:")
after_s1 = {}
for name in induction:
    pattern = cache["blocks.1.attn.hook_pattern"][rows, int(name[-1]), S2]
    after_s1[name] = float(pattern[rows, S1 + 1].mean())
    print(f"  {name}: {after_s1[name]:.2f}, {into[name]:+.2f}")
assert into.index[0] == "m0"
assert len(induction) >= 3
assert max(after_s1.values()) > 0.5

# %% [markdown]
# Most of it is the name itself, by way of the first MLP: what the query matches. Then come heads of layer 1, which
# attend, at S2, to the token after S1. That is what **induction heads** do, and Wang et al. found that very pattern at
# S2. The same heads are movers at END: a head has no single job. In GPT-2 small the news goes on by S-inhibition heads
# into the *queries* of name movers; here it goes into the *keys* of the suppressor.
#
# ## 6. Assemble: a circuit of edges
#
# Every edge is scored exactly; the smallest circuit of that ranking is the first that brings back 90 % of the
# difference when everything else runs on corrupt values:
#
#     f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing))

# %%
scores = edge_scores(model, pairs, method="exact", direction="noise")
circuit, reached = smallest_circuit(model, pairs, scores, target=0.9)
n_all = int(scores.isel(prompt=0).notnull().sum())
print(f"{circuit.n_edges} of {n_all:,} edges, faithfulness {reached:.2f}")
circuit.draw(title="names exchanged: what carries the difference")

# %%
again = faithfulness(model, held_out, circuit)
without_it = completeness(model, held_out, circuit)
needed = minimality(model, held_out, circuit)
stable = float(stability(scores, n_edges=circuit.n_edges).jaccard)
f, low, high = (float(again[name].item()) for name in ("faithfulness", "low", "high"))
print(f"faithfulness on other prompts {f:.2f} [{low:.2f}, {high:.2f}]")
print(f"completeness: the model without it has f = {without_it.complement.item():.3f}; "
      f"|f(C - K) - f(M - K)| over random sets K: {float(without_it.incompleteness.mean()):.3f}")  # fmt: skip
weakest = needed.to_pandas().idxmin()
print(f"minimality: least loss of f by an edge {float(needed.min()):.3f}, at {weakest}")
print(f"stability: mean Jaccard over bootstrap samples {stable:.2f}")
assert circuit.n_edges < 20
assert f > 0.85
assert abs(without_it.complement.item()) < 0.05
assert float(needed.min()) > 0.01
assert stable > 0.8

# %% [markdown]
# Faithful, complete, minimal, stable. And still most of the story is missing: no movers, no queries, no keys. A circuit
# explains a *difference between two runs*, and in these runs movers and attention do the same. Three checks show it.
#
# First, take the rest away in another manner. `positional-mean` keeps what all sentences of this wording share; `mean`,
# over prompts and positions, does not. (More than 1 means that what was taken away had worked against the answer.)

# %%
sizes, kept = {}, {}
for ablation in ("corrupt", "positional-mean", "mean"):
    options = {"ablation": ablation, "reference": others}
    sizes[ablation] = smallest_circuit(model, pairs, scores, target=0.9, **options)[0].n_edges
    kept[ablation] = faithfulness(model, held_out, circuit, **options).faithfulness.item()
assert kept["mean"] < 0.3
assert sizes["mean"] > 10 * sizes["corrupt"]
pd.DataFrame({"faithfulness of this circuit": kept, "edges of the smallest one": sizes}).round(2)

# %% [markdown]
# Second, another contrast: with a third name as giver, the circuit needs the check for repetition as well. It is a
# larger circuit that contains the first; heads of layer 1 appear in it, but still no movers' outputs to the logits.

# %%
larger, _ = smallest_circuit(model, third, edges, target=0.9)
both = compare_circuits(circuit, larger)
print(both)
print("new components:", sorted(set(larger.nodes) - set(circuit.nodes)))
first_f = faithfulness(model, third, circuit).faithfulness.item()
print(f"the first circuit's faithfulness on this contrast: {first_f:.2f}")
assert both.overlap > 0.9
assert first_f < 0.6
assert not {f"{name}->logits" for name in movers} & set(larger.edges)
assert any(name.startswith("a1.") for name in set(larger.nodes) - set(circuit.nodes))

# %% [markdown]
# Third, all names replaced and the answer's logit as metric: the outputs of movers are among the strongest edges.

# %%
answering = Circuit.ranked(edge_scores(model, renamed, method="exact", direction="noise", metric="answer_logit"))
out = answering.top(60, prune=False).table()
out = out[out.target == "logits"]
writing = sorted(set(out.source) & set(movers))
print("edges into the logits among the 60 strongest:", out.source.tolist())
assert len(writing) >= 5

# %% [markdown]
# ## 7. Beside GPT-2 small
#
# | | GPT-2 small (Wang et al.) | mini-gpt2 (above) |
# |---|---|---|
# | who is named twice? | duplicate token and induction heads, at S2 | heads of layer 1 at S2 attend after S1 |
# | carried to END by | S-inhibition heads, layers 7 and 8 | nothing in between: S2 is read in the last layer |
# | where it acts | queries of name movers: they turn from S to IO | keys and values of the suppressor |
# | who names candidates? | 3 name movers and backups, mostly at IO | more than ten, at IO and S1 alike |
# | who writes against a name? | 2 negative name movers, the *answer* | 1 strong and 1 weak suppressor, the *subject* |
# | what is ablated | mean over another distribution (`abc`) | corrupt, and two means, with different answers |
#
# Alike: repetition found by induction, heads that copy names, heads that write against them, and a first MLP that turns
# tokens into what later layers read. Not alike: the *algorithm*. GPT-2 small inhibits attention to S and then copies
# what is left; mini-gpt2 copies both and then subtracts S. Both are right nearly always, so behaviour would not have
# told them apart.
#
# What this does not show: it is one wording, one seed of one small model trained on sentences like these. Names that
# never occurred in such sentences during training work as well (see the model's card), but natural text is another
# matter. Which parts of the suppressor's keys come from where was measured one edge at a time, and heads that back one
# another up are underrated so. Next: `patching_best_practices.py` on choices like those of section 6,
# `circuits_and_stability.py` on circuits, `rules_compared.py` on cheaper scores.
