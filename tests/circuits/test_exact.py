"""Exact edge patching against the definition done by hand, one edge and one forward pass at a time.

By hand means: what the source writes, what the target reads, what it then puts out and what the metric makes of it are
computed here from the model's weights, with no help from the sweep; a hook puts the target's new output in its place.
"""

import copy
import dataclasses
import random
import re

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from interp import PromptPairs, Transformer, activation_patching, corrupt, edge_patching
from interp.circuits.exact import EdgeRuns
from interp.circuits.graph import edge_mask, readers, select_edges, writers
from interp.errors import MetricError, OptionError, PatchError, SiteError
from interp.model.activations import ACTIVATIONS
from interp.rules import GRADIENT
from interp.sweep import SweepPlan, row_bytes
from interp.walk import Walk
from tests.families import FAMILIES, quiet
from tests.known_circuits.hand_built import END, MIDDLE, SOURCE, Move, block, hand_built, swapped
from tests.small_pairs import refused, small_pairs

# learned positions; GQA; post-norms, soft-caps and windows; parallel; q/k norm per head; post-norm only, q/k norm over all
# heads
DIFFERENT = ("gpt2", "llama3", "gemma2", "pythia", "qwen3", "olmo2")
OTHERS = [name for name in FAMILIES if name not in (*DIFFERENT, "falcon")]
DIRECTIONS = pytest.mark.parametrize("direction", ["denoise", "noise"])
WIDTH = 8


def prompts(n: int = 4, seed: int = 0) -> PromptPairs:
    """Prompts that first differ in the middle, at the start, before their padding and at the very end.

    One has two answers, another two wrong ones; the padding is of other tokens in clean and corrupt.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(4, 60, (4, WIDTH), generator=generator)
    changed = clean.clone()
    for row, position in ((0, 3), (0, 5), (1, 0), (1, 6), (2, 2), (2, 6), (2, 7), (3, 7)):
        changed[row, position] = (clean[row, position] + 7) % 56 + 4
    answers = torch.tensor([[5, 9], [6, -1], [7, -1], [8, -1]])
    wrong = torch.tensor([[30, -1], [31, -1], [32, 33], [9, 40]])
    lengths = torch.tensor([WIDTH, WIDTH, WIDTH - 2, WIDTH])
    return PromptPairs(clean, changed, answers, wrong, lengths=lengths).take(slice(n))


def logit_diff(logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    """[prompt]: mean logit of the answers minus that of the wrong ones, prompt by prompt."""
    mean = lambda row, tokens: row[[t for t in tokens.tolist() if t >= 0]].mean()  # noqa: E731
    rows = zip(logits, pairs.answers, pairs.wrong_answers, strict=True)
    return torch.stack([mean(row, right) - mean(row, wrong) for row, right, wrong in rows])


class ByHand:
    """Effects of single edges from their definition, in forward passes of the whole model."""

    def __init__(self, model, pairs: PromptPairs, direction: str, metric=logit_diff):
        self.model, self.cfg, self.pairs, self.metric = model, model.cfg, pairs, metric
        self.side, other = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        self.at_end = torch.arange(len(pairs)), pairs.lengths - 1
        self.base, self.other = self.run(self.side), self.run(other)
        self.clean, self.corrupt = (self.base, self.other) if self.side == "clean" else (self.other, self.base)
        self.before = self.metric(self.logits(self.base[self.last]), pairs)

    @property
    def last(self) -> str:
        return f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"

    def run(self, side: str, hooks=(), only=None) -> dict[str, torch.Tensor]:
        """Values at all hook points, or at one, of a whole forward pass."""
        with self.model.hooks(fwd_hooks=[*self.pairs.hooks(side), *hooks]):
            _, cache = self.model.run_with_cache(self.pairs.tokens(side), return_type=None, names_filter=only)
        return dict(cache.items())

    def logits(self, resid: torch.Tensor) -> torch.Tensor:
        """At the position that is read, of a stream after the last layer."""
        y = self.model.ln_final(resid[self.at_end]) @ self.model.W_U
        if self.model.unembed.b_U is not None:
            y = y + self.model.unembed.b_U
        y = y * self.cfg.logit_scale
        return y if self.cfg.logit_softcap is None else self.cfg.logit_softcap * torch.tanh(y / self.cfg.logit_softcap)

    def contribution(self, source: str) -> torch.Tensor:
        """[prompt, position, d_model]: what the source adds in the other run less what it adds in the base run."""
        if source == "input":
            return self.other["hook_embed"] - self.base["hook_embed"]
        if source[0] == "m":
            hook = f"blocks.{source[1:]}.hook_mlp_out"
            return self.other[hook] - self.base[hook]
        layer, head = map(int, source[1:].split(".h"))
        part, hook = self.model.blocks[layer], f"blocks.{layer}.attn.hook_z"
        if not self.cfg.post_norm:
            return (self.other[hook] - self.base[hook])[:, :, head] @ part.attn.W_O[head]
        z = self.base[hook].clone()
        z[:, :, head] = self.other[hook][:, :, head]
        attn_out = torch.einsum("bthe,hed->btd", z, part.attn.W_O)
        attn_out = attn_out if part.attn.b_O is None else attn_out + part.attn.b_O
        return part.ln1_post(attn_out) - self.base[f"blocks.{layer}.hook_attn_out"]

    def head(self, layer: int, head: int, x: str, stream: torch.Tensor) -> torch.Tensor:
        """z of one query head whose query, key or value comes from another stream than everything else."""
        part, at = self.model.blocks[layer], f"blocks.{layer}.attn.hook_"
        attn, places = part.attn, self.model.places(stream.shape[1])
        own = {name: self.base[at + name] for name in "qkv"}
        weight, bias = getattr(attn, f"W_{x.upper()}"), getattr(attn, f"b_{x.upper()}")
        own[x] = torch.einsum("btd,hde->bthe", part.ln1(stream) if self.cfg.pre_norm else stream, weight)
        own[x] = own[x] if bias is None else own[x] + bias
        rotation = None if attn.rotary is None else places.rotations[attn.rotary]
        q, k = (attn.place(name, own[name], rotation, GRADIENT) for name in "qk")
        shared = head // (self.cfg.n_heads // self.cfg.n_kv_heads)
        q, k, v = q[:, :, head], k[:, :, shared], own["v"][:, :, shared]
        scores = attn.scale * torch.einsum("bie,bje->bij", q, k)
        if (cap := self.cfg.attn_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (back >= 0) & (back < (attn.window or q.shape[1]))
        return torch.einsum("bij,bje->bie", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    def mlp(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """What an MLP adds to the residual stream when it reads this one."""
        part, activation = self.model.blocks[layer], ACTIVATIONS[self.cfg.activation]
        norm = part.ln1 if self.cfg.shared_norm else part.ln2 if self.cfg.pre_norm else None
        y = stream if norm is None else norm(stream)

        def through(y: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = getattr(part.mlp, f"W_{name}"), getattr(part.mlp, f"b_{name}")
            return y @ weight if bias is None else y @ weight + bias

        neurons = activation(through(y, "gate")) * through(y, "in") if self.cfg.gated else activation(through(y, "in"))
        out = through(neurons, "out")
        return part.ln2_post(out) if self.cfg.post_norm else out

    @torch.no_grad()
    def effect(self, source: str, target: str) -> torch.Tensor:
        """[prompt]: the metric of the base run in which the target alone reads the source's other output, less before."""
        change = self.contribution(source)
        if target == "logits":
            return self.metric(self.logits(self.base[self.last] + change), self.pairs) - self.before
        layer = int(re.search(r"\d+", target)[0])
        stream = "hook_resid_pre" if target[0] == "a" or self.cfg.parallel else "hook_resid_mid"
        stream = self.base[f"blocks.{layer}.{stream}"] + change
        if target[0] == "a":
            head = int(re.search(r"h(\d+)", target)[1])
            hook, new = f"blocks.{layer}.attn.hook_z", self.head(layer, head, target[-2], stream)
            place = (slice(None), slice(None), head)
        else:
            hook, new, place = f"blocks.{layer}.hook_mlp_out", self.mlp(layer, stream), ...

        def replace(value, hook):
            value = value.clone()
            value[place] = new
            return value

        return (
            self.metric(self.logits(self.run(self.side, [(hook, replace)], self.last)[self.last]), self.pairs)
            - self.before
        )


def edges_of(cfg) -> list[tuple[str, str]]:
    there = edge_mask(cfg)
    return [(u, v) for i, u in enumerate(writers(cfg)) for j, v in enumerate(readers(cfg)) if there[i, j]]


def kind(target: str) -> str:
    return target[-3:] if target[0] == "a" else target[0]


def sample(cfg, seed: str, n: int = 6) -> list[tuple[str, str]]:
    """Up to n edges into the queries, the keys, the values, the MLPs and the logits each."""
    rng, edges = random.Random(seed), edges_of(cfg)
    by_kind = [[edge for edge in edges if kind(edge[1]) == k] for k in ("<q>", "<k>", "<v>", "m", "l")]
    return [edge for some in by_kind for edge in rng.sample(some, min(n, len(some)))]


def names(edges) -> list[str]:
    return [f"{source}->{target}" for source, target in edges]


def assert_by_hand(scores: xr.DataArray, by_hand: ByHand, edges, tolerance: float = 1e-10):
    largest = 0.0
    for source, target in edges:
        found, expected = scores.sel(source=source, target=target).values, by_hand.effect(source, target).numpy()
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=f"{source}->{target}")
        largest = max(largest, np.abs(expected).max())
    assert largest > 0.01  # or the comparison means nothing


# -------------------------------------------------------------------------------------------------- against the definition


@DIRECTIONS
@pytest.mark.parametrize("family", DIFFERENT)
def test_every_kind_of_edge_is_what_it_is_by_hand(tiny, family, direction):
    model, pairs = tiny(family, torch.float64), prompts()
    scores = edge_patching(model, pairs, direction=direction)
    assert scores.dtype == np.float64
    assert_by_hand(scores, ByHand(model, pairs, direction), sample(model.cfg, family + direction))


def test_all_edges_of_a_model_are_what_they_are_by_hand(tiny):
    model, pairs = tiny("gpt2", torch.float64), prompts()
    assert_by_hand(edge_patching(model, pairs), ByHand(model, pairs, "denoise"), edges_of(model.cfg))


@pytest.mark.parametrize("family", OTHERS)
def test_edges_of_every_other_family_are_what_they_are_by_hand(tiny, family):
    model, pairs, direction = tiny(family, torch.float64), prompts(), random.Random(family).choice(["denoise", "noise"])
    edges = sample(model.cfg, family, 3)
    scores = edge_patching(model, pairs, edges=names(edges), direction=direction)
    assert_by_hand(scores, ByHand(model, pairs, direction), edges)


@settings(
    max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # examples are small as is
@given(
    data=st.data(), family=st.sampled_from(["gpt2", "gemma3", "mistral", "gptj", "olmo2"]), seed=st.integers(0, 10**6),
    direction=st.sampled_from(["denoise", "noise"]), n=st.integers(1, 4), width=st.integers(1, 6),
    max_memory=st.sampled_from([1, 50_000, None]), batch_size=st.sampled_from([None, 1, 2]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_any_edges_of_any_prompts(tiny, data, family, seed, direction, n, width, max_memory, batch_size):
    model = tiny(family, torch.float64)
    lengths = data.draw(st.lists(st.integers(1, width), min_size=n, max_size=n), label="lengths")
    generator = torch.Generator().manual_seed(seed)
    clean, changed = torch.randint(4, 60, (2, n, width), generator=generator)
    differs = torch.rand(n, width, generator=generator) < 0.4  # in some prompts nowhere
    pairs = PromptPairs(
        clean, torch.where(differs, changed, clean), torch.arange(5, 5 + n), torch.arange(30, 30 + n),
        lengths=torch.tensor(lengths),
    )  # fmt: skip
    edges = data.draw(st.lists(st.sampled_from(edges_of(model.cfg)), min_size=1, max_size=6), label="edges")
    options = {"direction": direction, "max_memory": max_memory, "batch_size": batch_size}
    scores, by_hand = edge_patching(model, pairs, edges=names(edges), **options), ByHand(model, pairs, direction)
    for source, target in edges:
        expected = by_hand.effect(source, target).numpy()
        found = scores.sel(source=source, target=target).values
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10, err_msg=f"{source}->{target}")


@DIRECTIONS
def test_noise_on_embeddings_travels_along_edges_too(tiny, direction):
    model = tiny("llama3", torch.float64)
    pairs = corrupt(model, prompts(), "gaussian", seed=1)
    scores = edge_patching(model, pairs, direction=direction)
    assert_by_hand(scores, ByHand(model, pairs, direction), sample(model.cfg, "noise"))


def test_a_metric_that_compares_with_the_clean_run(tiny):
    model, pairs = tiny("gemma2", torch.float64), prompts()
    with torch.no_grad():
        clean = (by_hand := ByHand(model, pairs, "noise")).logits(by_hand.clean[by_hand.last]).log_softmax(-1)
    kl = lambda logits, _: (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)  # noqa: E731
    edges = sample(model.cfg, "kl", 4)
    for direction in ("denoise", "noise"):
        scores = edge_patching(model, pairs, edges=names(edges), metric="kl_divergence", direction=direction)
        assert_by_hand(scores, ByHand(model, pairs, direction, kl), edges)


def test_a_callable_metric_is_handed_the_pairs_of_its_rows(tiny):
    model, pairs = tiny("gemma2", torch.float64), prompts()

    def surprise(logits, pairs):
        log_p = zip(logits.log_softmax(-1), pairs.answers, strict=True)
        return torch.stack([row[tokens[tokens >= 0]].exp().sum().log() for row, tokens in log_p])

    edges = sample(model.cfg, "callable", 4)
    scores = edge_patching(model, pairs, edges=names(edges), metric=surprise)
    assert_by_hand(scores, ByHand(model, pairs, "denoise", surprise), edges)
    named = edge_patching(model, pairs, edges=names(edges), metric="log_probability")
    np.testing.assert_allclose(named, scores, rtol=1e-10, atol=1e-10)
    assert scores.attrs["metric"] == "surprise"


# ----------------------------------------------------------------------------------------------------------- identities


@DIRECTIONS
@pytest.mark.parametrize("family", DIFFERENT)
def test_an_edge_into_the_logits_is_the_residual_normed_anew(tiny, family, direction):
    """E19, for every source: logits of the base run's last residual plus what the source adds."""
    model, pairs = tiny(family, torch.float64), prompts()
    by_hand = ByHand(model, pairs, direction)
    scores = edge_patching(model, pairs, edges=[f"{u}->logits" for u in writers(model.cfg)], direction=direction)
    expected = [by_hand.effect(source, "logits") for source in writers(model.cfg)]
    np.testing.assert_allclose(scores[:, :, 0], torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2", "gptj"])
def test_the_last_mlp_acts_through_its_one_edge(tiny, family, direction):
    """E19: with one path only, patching the edge is patching the node."""
    model, pairs = tiny(family, torch.float64), prompts()
    last = model.cfg.n_layers - 1
    edge = edge_patching(model, pairs, edges=[f"m{last}->logits"], direction=direction)
    node = activation_patching(model, pairs, "mlp_out", positions="all", direction=direction, engine="hooks")
    np.testing.assert_allclose(edge[:, 0, 0], node.sel(layer=last), rtol=1e-12, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_heads_that_nothing_else_reads_act_through_their_edge_into_the_logits(tiny, family, direction):
    """The same for the last layer's heads, where no MLP reads them: in parallel models, or if the last MLP writes 0."""
    model, pairs = copy.deepcopy(tiny(family, torch.float64)), prompts()
    last, n_heads = model.cfg.n_layers - 1, model.cfg.n_heads
    if not model.cfg.parallel:
        mlp = model.blocks[last].mlp
        for parameter in (mlp.W_out, mlp.b_out):
            if parameter is not None:
                parameter.zero_()
    scores = edge_patching(model, pairs, direction=direction)
    edges = scores.sel(source=[f"a{last}.h{h}" for h in range(n_heads)], target="logits")
    nodes = activation_patching(model, pairs, "head", positions="all", direction=direction, engine="hooks")
    np.testing.assert_allclose(edges, nodes.sel(layer=last), rtol=1e-11, atol=1e-12)
    if not model.cfg.parallel:
        np.testing.assert_allclose(scores.sel(target=f"m{last}").fillna(0), 0, rtol=0, atol=1e-12)


CHAIN = [Move(0, 1, SOURCE, MIDDLE, writes="middle"), Move(2, 3, MIDDLE, END, reads="middle")]
GAP = 2.0


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1), ("noise", -1)])
@pytest.mark.parametrize("max_memory", [None, 1])
def test_a_chain_is_its_three_edges(direction, sign, max_memory):
    """The token travels input -> a0.h1 -> a2.h3 -> logits, by values; no other edge does anything."""
    scores = edge_patching(
        hand_built(CHAIN, n_layers=3, n_heads=4), swapped(), direction=direction, max_memory=max_memory
    )
    for source, target in edges_of(hand_built(CHAIN, n_layers=3, n_heads=4).cfg):
        path = (source, target) in {("input", "a0.h1<v>"), ("a0.h1", "a2.h3<v>"), ("a2.h3", "logits")}
        found = scores.sel(source=source, target=target)
        np.testing.assert_allclose(found, sign * GAP if path else 0, rtol=0, atol=1e-9, err_msg=f"{source}->{target}")


@DIRECTIONS
@pytest.mark.parametrize("through", ["q", "k", "v"])
def test_the_one_way_into_a_head_is_the_node_that_goes_it(through, direction):
    """E19: a0.h1 writes where only the query, only the key or only the value of a2.h3 looks, so that edge is the node."""
    read_at = END if through == "q" else MIDDLE
    model = hand_built([Move(0, 1, SOURCE, read_at, writes="middle")], n_layers=3, n_heads=4)
    attn, generator = model.blocks[2].attn, torch.Generator().manual_seed(3)
    for x in "qkv":
        weight = getattr(attn, f"W_{x.upper()}")[3]
        weight.zero_()
        rows = block("middle" if x == through else "position")
        weight[rows] = torch.randn(weight[rows].shape, generator=generator, dtype=weight.dtype)
    attn.W_O[3][:, block("out")] = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    pairs = swapped()
    node = activation_patching(model, pairs, "head", positions="all", direction=direction, engine="hooks")
    node = node.sel(layer=0, head=1).values
    assert np.abs(node).max() > 0.01
    scores = edge_patching(model, pairs, direction=direction)
    for source, target in edges_of(model.cfg):
        if source == "a0.h1":
            expected = node if target == f"a2.h3<{through}>" else np.zeros_like(node)
            found = scores.sel(source=source, target=target)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=target)


@pytest.mark.parametrize(
    ("family", "metric"), [("gpt2", "logit_diff"), ("gpt2", "kl_divergence"), ("gemma2", "logit_diff")]
)
@DIRECTIONS
def test_equal_prompts_have_no_edges_that_matter(tiny, family, metric, direction):
    model, pairs = tiny(family, torch.float32), prompts()
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    with pytest.warns(UserWarning, match="near zero on prompts 0, 1, 2, 3"):
        scores = edge_patching(model, pairs, direction=direction, metric=metric)
    assert (scores.fillna(0) == 0).all()
    assert int(scores.notnull().sum()) == 4 * edge_mask(model.cfg).sum()


@pytest.mark.filterwarnings("ignore:.*is near zero")
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 1, "metric": "log_probability"}], ids=str)
def test_a_pair_that_does_not_differ_is_exactly_0_beside_pairs_that_do(tiny, options):
    model, pairs = tiny("gpt2", torch.float64), prompts()
    changed = pairs.corrupt.clone()
    changed[1] = pairs.clean[1]
    changed[2, :6] = pairs.clean[2, :6]  # what is left of the difference is padding
    scores = edge_patching(model, dataclasses.replace(pairs, corrupt=changed), **options)
    there = scores.notnull()
    assert (scores[1:3].fillna(0) == 0).all()
    assert there.all("prompt").equals(there.any("prompt"))
    whole = edge_patching(model, pairs, **options)
    np.testing.assert_allclose(scores[[0, 3]], whole[[0, 3]], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- what must not change anything


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama3", {"max_memory": 1}), ("gemma2", {"max_memory": 100_000}), ("pythia", {"batch_size": 1})],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_chunks_and_batches_change_nothing(tiny, family, options):
    model, pairs = tiny(family, torch.float64), prompts()
    parts, whole = edge_patching(model, pairs, **options), edge_patching(model, pairs)
    xr.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama3", "pythia"])
def test_the_order_of_prompts_changes_nothing(tiny, family):
    model, pairs, order = tiny(family, torch.float64), prompts(), [2, 0, 3, 1]
    moved, scores = edge_patching(model, pairs.take(order), batch_size=3), edge_patching(model, pairs)
    np.testing.assert_allclose(moved, scores[order], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moved.metric_clean, scores.metric_clean[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "n"), [("gpt2", 1), ("mistral", 5), ("gptj", 40), ("gemma2", 40)])
def test_some_edges_are_the_same_as_among_all(tiny, family, n):
    model, pairs = tiny(family, torch.float64), prompts()
    edges = random.Random(n).sample(edges_of(model.cfg), n)
    some, whole = edge_patching(model, pairs, edges=names(edges)), edge_patching(model, pairs)
    assert some.dims == whole.dims == ("prompt", "source", "target")
    assert some.source.values.tolist() == [u for u in writers(model.cfg) if u in {u for u, _ in edges}]
    assert some.target.values.tolist() == [v for v in readers(model.cfg) if v in {v for _, v in edges}]
    for source in some.source.values:
        for target in some.target.values:
            found = some.sel(source=source, target=target)
            if (source, target) in edges:
                np.testing.assert_allclose(found, whole.sel(source=source, target=target), rtol=1e-12, atol=1e-12)
            else:
                assert found.isnull().all()
    again = edge_patching(model, pairs, edges=[*reversed(names(edges)), *names(edges)])  # order and repetition
    np.testing.assert_array_equal(again, some)


@pytest.mark.parametrize("family", DIFFERENT)
def test_float32_agrees_to_five_digits(tiny, family):
    """The same weights, to the last bit, in both precisions."""
    narrow, pairs = tiny(family, torch.float32), prompts()
    direction = random.Random(family).choice(["denoise", "noise"])
    wide = copy.deepcopy(narrow).double()
    found = edge_patching(narrow, pairs, direction=direction).fillna(0)
    expected = edge_patching(wide, pairs, direction=direction).fillna(0)
    assert (found.dtype, expected.dtype) == (np.float32, np.float64)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("limit", [1, 7, 40, 10**6])
def test_running_out_of_memory_changes_nothing(tiny, monkeypatch, limit):
    """Chunks of more than `limit` rows fail; one source has at most 4 prompts x 13 targets in a layer."""
    model, pairs = tiny("llama3", torch.float64), prompts()
    per_source = len(pairs) * (3 * model.cfg.n_heads + 1)
    whole, walk, done = edge_patching(model, pairs), Walk.final_resid, []

    def final_resid(self):
        if len(self.plan) > limit:
            raise torch.OutOfMemoryError("too many rows")
        done.append(len(self.plan))
        return walk(self)

    monkeypatch.setattr(Walk, "final_resid", final_resid)
    if limit < per_source:
        with refused(OptionError, "one source on 4 prompts: use a smaller batch_size"):
            edge_patching(model, pairs)
        return
    np.testing.assert_allclose(edge_patching(model, pairs), whole, rtol=1e-12, atol=1e-12)
    into_layers = int(edge_mask(model.cfg)[:, :-1].sum())
    assert sum(done) == into_layers * len(pairs)  # every edge once
    assert max(done) <= limit


def test_memory_is_halved_until_a_chunk_fits(tiny, monkeypatch):
    model, pairs = tiny("llama3", torch.float64), prompts()
    whole, walk, sizes = edge_patching(model, pairs), Walk.final_resid, []

    def final_resid(self):
        sizes.append(len(self.plan))
        if len(self.plan) > 60:
            raise torch.OutOfMemoryError("too many rows")
        return walk(self)

    monkeypatch.setattr(Walk, "final_resid", final_resid)
    np.testing.assert_allclose(edge_patching(model, pairs), whole, rtol=1e-12, atol=1e-12)
    assert any(size > 60 for size in sizes)
    into_layers = int(edge_mask(model.cfg)[:, :-1].sum())
    assert sum(size for size in sizes if size <= 60) == into_layers * len(pairs)


# --------------------------------------------------------------------------------------------------------- how it is told


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_there_is_a_number_for_every_edge_and_nan_for_everything_else(tiny, family):
    model = tiny(family, torch.float32)
    scores = edge_patching(model, prompts(2))
    assert scores.source.values.tolist() == writers(model.cfg)
    assert scores.target.values.tolist() == readers(model.cfg)
    assert scores.prompt.values.tolist() == [0, 1]
    np.testing.assert_array_equal(scores.notnull(), np.broadcast_to(edge_mask(model.cfg), scores.shape))
    assert np.isfinite(scores.values[scores.notnull().values]).all()


@DIRECTIONS
def test_both_unpatched_metrics_are_told_and_normalised_scores_are_shares_of_their_difference(tiny, direction):
    model, pairs = tiny("llama3", torch.float64), prompts()
    scores = edge_patching(model, pairs, direction=direction)
    by_hand = ByHand(model, pairs, direction)
    with torch.no_grad():
        for name, run in (("clean", by_hand.clean), ("corrupt", by_hand.corrupt)):
            expected = logit_diff(by_hand.logits(run[by_hand.last]), pairs)
            np.testing.assert_allclose(scores[f"metric_{name}"], expected, rtol=1e-12, atol=1e-12)
    shares = edge_patching(model, pairs, direction=direction, normalize=True)
    np.testing.assert_allclose(shares, scores / (scores.metric_clean - scores.metric_corrupt), rtol=1e-12, atol=1e-15)
    assert (scores.attrs["normalized"], shares.attrs["normalized"]) == (0, 1)
    assert (scores.attrs["unit"], shares.attrs["unit"]) == ("logits", "share of clean - corrupt")


def test_where_clean_and_corrupt_score_alike_shares_are_nan_and_a_warning_names_the_prompts(tiny):
    model, pairs = tiny("gpt2", torch.float32), prompts()
    changed = pairs.corrupt.clone()
    changed[2] = pairs.clean[2]
    with pytest.warns(UserWarning, match=r"near zero on prompts 2: normalised scores are unreliable"):
        scores = edge_patching(model, dataclasses.replace(pairs, corrupt=changed), normalize=True)
    assert scores[2].isnull().all()
    np.testing.assert_array_equal(scores[[0, 1, 3]].notnull(), np.broadcast_to(edge_mask(model.cfg), (3, 16, 40)))


@DIRECTIONS
def test_attributes_say_how_the_numbers_were_made(tiny, direction):
    model, pairs = tiny("gpt2", torch.float32), small_pairs()
    attrs = edge_patching(model, pairs, edges=["m0->m1"], direction=direction, metric="answer_logit").attrs
    expected = {
        "method": "edge_patching", "direction": direction, "metric": "answer_logit", "unit": "logits", "normalized": 0,
        "task": "random", "corruption": "given", "dtype": "float32", "n_prompts": 2, "model": model.cfg.name,
    }  # fmt: skip
    assert expected.items() <= attrs.items()
    base = "corrupt" if direction == "denoise" else "clean"
    assert attrs["sign"] == f"metric(patched) - metric({base}): positive means the patch raises the metric"


def test_progress_counts_every_edge(tiny):
    model, done = tiny("gpt2", torch.float32), []
    list(EdgeRuns(model, prompts(), base="clean", max_memory=1).run(edge_mask(model.cfg), done.append))
    assert sum(done) == edge_mask(model.cfg).sum()


def test_results_can_be_written_to_a_file(tiny, tmp_path):
    scores = edge_patching(tiny("gpt2", torch.float32), prompts(2))
    with xr.set_options(keep_attrs=True):
        back = xr.DataArray.from_dict(scores.to_dict())
    xr.testing.assert_identical(back, scores)
    assert all(isinstance(value, str | int | float) for value in scores.attrs.values())


# ----------------------------------------------------------------------------------------------------------- plan, memory


def rows_run(model, pairs, chosen, monkeypatch, **options) -> tuple[int, list]:
    """How many rows the edges really have, and the plans of the walks that were made."""
    walks, init = [], Walk.__init__

    def spy(self, model, pairs, plan, base, source):
        walks.append(plan)
        init(self, model, pairs, plan, base, source)

    with monkeypatch.context() as patched:
        patched.setattr(Walk, "__init__", spy)
        runs = EdgeRuns(model, pairs, base="corrupt", **options)
        n_rows = sum(len(prompts) for *_, prompts, _ in runs.run(chosen))
    return n_rows, walks


@pytest.mark.parametrize(("family", "max_memory"), [("gpt2", None), ("gpt2", 100_000), ("pythia", 1)])
def test_the_plan_says_what_will_be_done(tiny, monkeypatch, family, max_memory):
    model, pairs, plans = tiny(family, torch.float32), prompts(), []
    edge_patching(model, pairs, announce=plans.append, max_memory=max_memory)
    (plan,) = plans
    assert isinstance(plan, SweepPlan)
    n_edges = int(edge_mask(model.cfg).sum())
    assert (plan.cells, plan.prompts) == (n_edges, len(pairs))
    n_rows, walks = rows_run(model, pairs, edge_mask(model.cfg), monkeypatch, max_memory=max_memory)
    assert plan.rows == n_rows == n_edges * len(pairs)
    assert plan.chunks == len(walks)
    assert plan.flops < plan.naive_flops


def test_a_row_begins_where_its_target_has_put_out(tiny):
    """An edge into a head costs W_O and the MLP of that layer more than one into its MLP: their tokens times their weights."""
    model, pairs, plans = tiny("gpt2", torch.float32), prompts(), []
    cfg = model.cfg
    for edge in ("m0->a1.h0<q>", "m0->a1.h3<v>", "m0->m1"):
        edge_patching(model, pairs, edges=[edge], announce=plans.append)
    n_tokens = (8 - 3) + (8 - 0) + (6 - 2) + (8 - 7)
    rest_of_layer = 2 * cfg.d_model * (cfg.n_heads * cfg.d_head + 2 * cfg.d_mlp)
    assert plans[0].flops == plans[1].flops == plans[2].flops + n_tokens * rest_of_layer
    assert [plan.rows for plan in plans] == [4, 4, 4]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("edges", [None, ["m0->m1", "a0.h1->m1"], ["m0->a1.h0<q>", "input->a0.h2<k>"]], ids=str)
def test_the_flops_planned_are_about_those_of_the_matrix_products_that_run(tiny, family, edges):
    """Counted by torch; the plan counts whole layers for what each source makes its targets read anew."""
    model, plans = tiny(family, torch.float32), []
    with FlopCounterMode(display=False) as counter:
        edge_patching(model, prompts(), edges=edges, announce=plans.append)
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert 0.85 * plans[0].flops <= matrices <= 1.05 * plans[0].flops


def test_the_plan_is_announced_once_and_before_anything_is_computed(tiny, monkeypatch):
    model, computed, forward = tiny("gpt2", torch.float32), [], Transformer.forward

    def spy(self, *args, **options):
        computed.append("forward")
        return forward(self, *args, **options)

    monkeypatch.setattr(Transformer, "forward", spy)
    edge_patching(model, prompts(), batch_size=1, announce=computed.append)
    assert isinstance(computed[0], SweepPlan)
    assert computed[1:] == ["forward"] * 4


def test_a_row_less_sweep_costs_two_unpatched_runs(tiny):
    model, pairs, plans = tiny("gpt2", torch.float32), prompts(), []
    with pytest.warns(UserWarning, match="near zero"):
        edge_patching(model, dataclasses.replace(pairs, corrupt=pairs.clean), edges=["m0->m1"], announce=plans.append)
    assert plans[0].rows == 0


def selection(cfg, which: str) -> np.ndarray:
    """All edges, or all into the last layer from one source and one each from others."""
    if which == "all":
        return edge_mask(cfg)
    last = cfg.n_layers - 1
    targets = [target for target in readers(cfg) if target.startswith((f"a{last}", f"m{last}"))]
    return select_edges(cfg, [f"input->{v}" for v in targets] + [f"{u}->m{last}" for u in writers(cfg)[1:11]])


@pytest.mark.parametrize("which", ["all", "uneven"])
@pytest.mark.parametrize("max_memory", [100_000, 200_000, 500_000])
def test_a_chunk_stays_within_max_memory_unless_one_source_alone_is_larger(tiny, monkeypatch, which, max_memory):
    model, pairs = tiny("gpt2", torch.float32), prompts()
    chosen = selection(model.cfg, which)
    _, walks = rows_run(model, pairs, chosen, monkeypatch, max_memory=max_memory)
    for plan in walks:
        used, sources = row_bytes(model, plan).sum(), np.unique(plan.cell // chosen.shape[1])
        assert used <= max_memory or len(sources) == 1, f"{len(sources)} sources take {used} of {max_memory} bytes"


@pytest.mark.parametrize("which", ["all", "uneven"])
@pytest.mark.parametrize("max_memory", [None, 200_000, 1])
def test_the_peak_is_no_less_than_the_rows_of_the_largest_chunk(tiny, monkeypatch, which, max_memory):
    model, pairs, plans = tiny("gpt2", torch.float32), prompts(), []
    chosen = selection(model.cfg, which)
    edges = [f"{writers(model.cfg)[i]}->{readers(model.cfg)[j]}" for i, j in np.argwhere(chosen)]
    edge_patching(model, pairs, edges=edges, max_memory=max_memory, announce=plans.append)
    _, walks = rows_run(model, pairs, chosen, monkeypatch, max_memory=max_memory)
    assert plans[0].peak_bytes >= max(row_bytes(model, plan).sum() for plan in walks)


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_model_with_hooks_of_its_own_is_refused(tiny):
    model = tiny("gpt2", torch.float32)
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 0)]),
        refused(PatchError, r"hook of its own at blocks\.1\.hook_resid_pre"),
    ):
        edge_patching(model, prompts())
    edge_patching(model, prompts(1), edges=["m0->m1"])


def test_a_bridge_is_refused(tiny_folder):
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        bridge = TransformerBridge.boot_transformers(str(tiny_folder("gpt2")), device="cpu", dtype=torch.float32)
    with refused(OptionError, "needs a model from load_model"):
        edge_patching(bridge, prompts())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"edges": ["m0->a9.h0<q>"]}, SiteError, "no edge m0->a9.h0<q>: write a0.h1->m2"),
        ({"edges": ["m0->m1", "m1->m0"]}, SiteError, "no edge m1->m0: .*from an earlier component to a later one"),
        ({"direction": "up"}, OptionError, r"'up' is not a direction \(choose from denoise, noise, both\)"),
        ({"max_memory": 0}, OptionError, "max_memory is a number of bytes, at least 1, not 0"),
        ({"max_memory": 0, "announce": lambda plan: None}, OptionError, "max_memory is a number of bytes"),
        ({"batch_size": 0}, OptionError, "a batch needs at least 1 prompt, not 0"),
        ({"metric": "logit_dif"}, MetricError, "did you mean 'logit_diff'"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused(tiny, options, error, says):
    with refused(error, says):
        edge_patching(tiny("gpt2", torch.float32), prompts(), **options)


def test_a_metric_that_lacks_what_it_needs_is_refused(tiny):
    pairs = dataclasses.replace(prompts(), wrong_answers=None)
    with refused(MetricError, "needs wrong answers, and these pairs have none"):
        edge_patching(tiny("gpt2", torch.float32), pairs, edges=["m0->m1"])
