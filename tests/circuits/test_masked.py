"""Circuits in one pass (`MaskedRuns`) and what stands outside of them (`ablated_outputs`).

Held against: the definition done slowly, one reader and one circuit at a time (tests/circuits/masked_oracle.py); exact
edge patching, where one edge is left out; exact node patching, where a whole component is; the runs themselves, where all
edges are kept or none; EAP, for gradients with respect to the mask at the whole model; finite differences, elsewhere.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch

from interp import PromptPairs, activation_patching, corrupt, edge_patching
from interp.circuits.ablations import Outputs, ablated_outputs, outputs
from interp.circuits.edges import edge_scores
from interp.circuits.graph import edge_mask, select_edges, writers
from interp.circuits.masked import MaskedRuns
from interp.errors import OptionError, PatchError
from tests.circuits.masked_oracle import POST_NORM, SlowRun, at_end, circuits, cut, embeddings, fractions, late, whole
from tests.circuits.test_exact import DIFFERENT, OTHERS, logit_diff, names, prompts, sample
from tests.families import quiet
from tests.small_pairs import refused

ABLATIONS = ("corrupt", "zero", "mean", "positional-mean")
EVERY = (*DIFFERENT, *OTHERS)  # family that load_model knows
DOUBLE = torch.float64


def metric(model, pairs: PromptPairs, final: torch.Tensor) -> torch.Tensor:
    """[circuit, prompt]."""
    return torch.stack([logit_diff(model.unembed_resid(one), pairs) for one in final])


def final_of(model, pairs: PromptPairs, side: str) -> torch.Tensor:
    """The final stream of an ordinary run, where it is read."""
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with model.hooks(fwd_hooks=pairs.hooks(side)):
        _, cache = model.run_with_cache(pairs.tokens(side), return_type=None, names_filter=name)
    return at_end(pairs, cache[name])


def assert_slow_runs(model, pairs: PromptPairs, ablated: Outputs, masks: torch.Tensor, found: torch.Tensor):
    embed = embeddings(model, pairs, "clean")
    for mask, mine in zip(masks, found, strict=True):
        expected = at_end(pairs, SlowRun(model, embed, mask, ablated).final)
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("family", DIFFERENT)
def test_circuits_run_as_they_are_defined(tiny, family, ablation):
    model, pairs = tiny(family, DOUBLE), prompts()
    ablated = ablated_outputs(model, pairs, ablation, reference=None if ablation == "mean" else prompts(seed=1))
    runs = MaskedRuns(model, pairs, ablated)
    for masks in (circuits(model.cfg, family + ablation), fractions(model.cfg)):
        found = runs.run(masks)
        assert_slow_runs(model, pairs, ablated, masks, found)
        assert ((found - final_of(model, pairs, "clean")).abs().amax((1, 2)) > 0.01).all()  # they are not the whole


@pytest.mark.parametrize("family", OTHERS)
def test_circuits_of_every_other_family_run_as_they_are_defined(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    masks = circuits(model.cfg, family, (0.7,))
    ablated = ablated_outputs(model, pairs, random.Random(family).choice(ABLATIONS))
    assert_slow_runs(model, pairs, ablated, masks, MaskedRuns(model, pairs, ablated).run(masks))


@pytest.mark.parametrize("family", DIFFERENT)
def test_components_that_nothing_reads_are_left_out_and_nothing_else_changes(tiny, family):
    """Circuits of few edges, each by itself: of most layers some heads, or none, have a way on."""
    model, pairs = tiny(family, DOUBLE), prompts()
    for ablation in ("corrupt", "mean"):
        ablated = ablated_outputs(model, pairs, ablation)
        runs = MaskedRuns(model, pairs, ablated)
        for mask in circuits(model.cfg, family + ablation, (0.003, 0.01, 0.03)):
            masks = torch.stack([mask, mask & circuits(model.cfg, "half", (0.5,))[0]])
            assert_slow_runs(model, pairs, ablated, masks, runs.run(masks))
            torch.testing.assert_close(runs.run(masks.double()), runs.run(masks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["middle", "last", "short"])
@pytest.mark.parametrize("family", DIFFERENT)
def test_positions_before_the_first_difference_are_those_of_both_runs(tiny, family, which):
    """Under corrupt ablation nothing changes there; values, and gradients, behind are as they are defined."""
    model, (pairs, first) = tiny(family, DOUBLE), late(which)
    ablated = ablated_outputs(model, pairs, "corrupt")
    runs = MaskedRuns(model, pairs, ablated)
    assert runs.first == first
    masks = circuits(model.cfg, family + which, (0.0, 0.02, 0.6))
    assert_slow_runs(model, pairs, ablated, masks, runs.run(masks))
    shares = fractions(model.cfg, 1).requires_grad_()
    slow = at_end(pairs, SlowRun(model, embeddings(model, pairs, "clean"), shares[0], ablated).final)[None]
    quick = runs.final(shares)
    torch.testing.assert_close(quick, slow, rtol=1e-10, atol=1e-10)
    mine, theirs = (torch.autograd.grad(metric(model, pairs, x).sum(), shares)[0] for x in (quick, slow))
    there = whole(model.cfg)
    torch.testing.assert_close(mine[0][there], theirs[0][there], rtol=1e-9, atol=1e-10)
    assert theirs.abs().max() > 0.01


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_equal_beginnings_share_nothing_where_ablated_values_are_no_runs(tiny, family):
    """Embeddings of the corrupt run, which begin alike, beside outputs of components from elsewhere."""
    model, (pairs, _) = tiny(family, DOUBLE), late("middle")
    mean = ablated_outputs(model, pairs, "mean")
    ablated = Outputs(outputs(model, pairs, "corrupt").embed, mean.z, mean.mlp)
    masks = circuits(model.cfg, family)
    assert_slow_runs(model, pairs, ablated, masks, MaskedRuns(model, pairs, ablated).run(masks))


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_other_ablated_values_for_the_same_pairs(tiny, family):
    model, (pairs, first) = tiny(family, DOUBLE), late("middle")
    masks = circuits(model.cfg, family)
    values = {ablation: ablated_outputs(model, pairs, ablation) for ablation in ABLATIONS}
    expected = {ablation: MaskedRuns(model, pairs, value).run(masks) for ablation, value in values.items()}
    runs = MaskedRuns(model, pairs, values["corrupt"])
    for ablation in ("mean", "corrupt", "zero", "corrupt", "positional-mean"):
        before, runs = runs, runs.with_ablated(values[ablation])
        assert torch.equal(runs.run(masks), expected[ablation])
        assert runs.first == (first if ablation == "corrupt" else 0)
        assert before is not runs


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_circuits_that_share_their_first_layers_share_nothing_else(tiny, family):
    """Streams that circuits have in common are computed once; from where they differ, they go their own ways."""
    model, pairs = tiny(family, DOUBLE), prompts()
    masks, per_layer = circuits(model.cfg, family, (0.6, 0.6, 0.6)), 3 * model.cfg.n_heads + 1
    masks[:, :, : per_layer + 2] = masks[:1, :, : per_layer + 2]
    ablated = ablated_outputs(model, pairs, "corrupt")
    assert_slow_runs(model, pairs, ablated, masks, MaskedRuns(model, pairs, ablated).run(masks))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gptj"])
def test_layers_that_are_whole_are_not_run_again_and_nothing_else_changes(tiny, family):
    """Masks that leave out edges of late layers only: each place at which what is run may begin."""
    model, pairs = tiny(family, DOUBLE), prompts()
    per_layer, last = 3 * model.cfg.n_heads + 1, model.cfg.n_layers - 1
    there, first = whole(model.cfg), []
    for column in (per_layer, 2 * per_layer - 1, last * per_layer + 5, (last + 1) * per_layer - 1, -1):
        mask = there.clone()
        mask[1:3, column] = False
        mask[0, -1] = False
        first.append(mask)
    masks = torch.stack(first)
    for ablation in ("corrupt", "mean"):
        ablated = ablated_outputs(model, pairs, ablation)
        runs = MaskedRuns(model, pairs, ablated)
        found = torch.cat([runs.run(mask[None]) for mask in masks])
        torch.testing.assert_close(found, runs.run(masks), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, runs.run(masks.double()), rtol=1e-12, atol=1e-12)
        assert_slow_runs(model, pairs, ablated, masks, found)


@pytest.mark.parametrize("reference", [None, prompts(seed=3)], ids=["own", "others"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_ablated_values_are_what_they_are_by_hand(tiny, family, reference):
    model, pairs = tiny(family, DOUBLE), prompts()
    n, over = model.cfg.n_layers, pairs if reference is None else reference
    find = lambda ablation: ablated_outputs(model, pairs, ablation, reference=reference)  # noqa: E731
    found = {ablation: find(ablation) for ablation in ABLATIONS}
    hooks = ["hook_embed", *(f"blocks.{la}.{x}" for x in ("attn.hook_z", "hook_mlp_out") for la in range(n))]
    assert Outputs.hooks(n) == hooks
    _, own = model.run_with_cache(pairs.corrupt, return_type=None)
    _, cache = model.run_with_cache(over.corrupt, return_type=None)
    lengths, width = over.lengths.tolist(), over.clean.shape[1]
    for i, hook in enumerate(hooks):
        values = {ablation: [value.embed, *value.z, *value.mlp][i] for ablation, value in found.items()}
        assert torch.equal(values["corrupt"], own[hook])
        assert (values["zero"] == 0).all()
        tokens = [cache[hook][p, t] for p, length in enumerate(lengths) for t in range(length)]
        mean = lambda some: sum(some) / len(some)  # noqa: E731
        torch.testing.assert_close(values["mean"], mean(tokens)[None, None], rtol=1e-12, atol=1e-14)
        at = [mean([cache[hook][p, t] for p, length in enumerate(lengths) if t < length]) for t in range(width)]
        torch.testing.assert_close(values["positional-mean"], torch.stack(at)[None], rtol=1e-12, atol=1e-14)


def test_a_position_that_is_padding_in_every_prompt_has_mean_0(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    pairs = dataclasses.replace(pairs, lengths=torch.tensor([5, 6, 3, 6]))
    ablated = ablated_outputs(model, pairs, "positional-mean")
    for value in (ablated.embed, *ablated.z, *ablated.mlp):
        assert (value[:, 6:] == 0).all()
        assert (value[:, :6] != 0).any()


# ------------------------------------------------------------------------------------------------------------- both ends


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DIFFERENT)
def test_the_whole_model_is_the_clean_run_to_the_last_bit(tiny, family, dtype):
    model, pairs = tiny(family, dtype), prompts()
    full, clean = whole(model.cfg).expand(2, -1, -1), final_of(model, pairs, "clean")
    for ablation in ABLATIONS:
        runs = MaskedRuns(model, pairs, ablated_outputs(model, pairs, ablation))
        for masks in (full, torch.ones_like(full)):  # what is no edge may be in or out
            assert torch.equal(runs.run(masks), clean.expand(2, -1, -1))
        tolerance = {DOUBLE: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
        found = runs.run(full.to(dtype))
        torch.testing.assert_close(found, clean.expand(2, -1, -1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", EVERY)
def test_nothing_at_all_under_corrupt_ablation_is_the_corrupt_run(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    found = MaskedRuns(model, pairs, outputs(model, pairs, "corrupt")).run(torch.zeros_like(whole(model.cfg))[None])
    torch.testing.assert_close(found[0], final_of(model, pairs, "corrupt"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_corrupted_embeddings_are_an_ablation_too(tiny, family):
    model = tiny(family, DOUBLE)
    pairs = corrupt(model, late("middle")[0], "gaussian", seed=1)
    ablated = ablated_outputs(model, pairs, "corrupt")
    runs, masks = MaskedRuns(model, pairs, ablated), circuits(model.cfg, family, (0.0, 0.5, 1.0))
    found = runs.run(masks)
    torch.testing.assert_close(found[0], final_of(model, pairs, "corrupt"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], final_of(model, pairs, "clean"), rtol=1e-12, atol=1e-12)
    assert_slow_runs(model, pairs, ablated, masks, found)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia", "gptj"])
def test_what_is_no_edge_carries_nothing(tiny, family):
    """A mask may be set where the model has no edge: from later components, or from the heads beside a parallel MLP."""
    model, pairs = tiny(family, DOUBLE), prompts()
    runs, masks = MaskedRuns(model, pairs, ablated_outputs(model, pairs, "mean")), circuits(model.cfg, family)
    for kind in (torch.bool, DOUBLE):
        found = runs.run((masks | ~whole(model.cfg)).to(kind))
        torch.testing.assert_close(found, runs.run(masks.to(kind)), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- one left out


@pytest.mark.parametrize("family", EVERY)
def test_one_edge_left_out_is_edge_patching(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    edges = sample(model.cfg, family, 4)
    masks = torch.stack([whole(model.cfg) & ~torch.from_numpy(select_edges(model.cfg, [e])) for e in names(edges)])
    final = MaskedRuns(model, pairs, ablated_outputs(model, pairs, "corrupt")).run(masks)
    found = metric(model, pairs, final) - logit_diff(model.unembed_resid(final_of(model, pairs, "clean")), pairs)
    exact = edge_patching(model, pairs, edges=names(edges), direction="noise")
    expected = np.stack([exact.sel(source=source, target=target) for source, target in edges])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert (abs(expected) > 0.01).any()


@pytest.mark.parametrize("family", EVERY)
def test_a_component_left_out_is_node_patching(tiny, family):
    """All its outgoing edges: heads under a post-norm too, where the norm is of what the others leave."""
    model, pairs = tiny(family, DOUBLE), prompts()
    nodes = writers(model.cfg)
    masks = whole(model.cfg).repeat(len(nodes), 1, 1)
    masks[range(len(nodes)), range(len(nodes))] = False
    runs = MaskedRuns(model, pairs, ablated_outputs(model, pairs, "corrupt"))
    found = metric(model, pairs, runs.run(masks)) - metric(model, pairs, runs.clean_final[None])
    sites = ["resid_pre", "head", "mlp_out"]
    exact = activation_patching(model, pairs, sites, positions="all", direction="noise")
    expected = [exact.resid_pre.sel(layer=0)]
    for layer in range(model.cfg.n_layers):
        expected += [exact.head_out.sel(layer=layer, head=head) for head in range(model.cfg.n_heads)]
        expected.append(exact.mlp_out.sel(layer=layer))
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------- what must not change anything


@pytest.mark.parametrize("family", DIFFERENT)
def test_circuits_in_a_batch_and_in_chunks_are_each_by_itself(tiny, family, monkeypatch):
    model, pairs = tiny(family, DOUBLE), prompts()
    masks, ablated = circuits(model.cfg, family, (0.1, 1.0, 0.5, 0.0, 0.9)), ablated_outputs(model, pairs, "mean")
    runs = MaskedRuns(model, pairs, ablated)
    whole_batch, shares = runs.run(masks), runs.run(masks.double())
    torch.testing.assert_close(shares, whole_batch, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(runs.run(masks.float()), whole_batch, rtol=1e-12, atol=1e-12)
    alone = torch.cat([runs.run(mask[None]) for mask in masks])
    torch.testing.assert_close(alone, whole_batch, rtol=1e-12, atol=1e-12)
    sizes, final = [], MaskedRuns.final
    monkeypatch.setattr(MaskedRuns, "final", lambda self, some: sizes.append(len(some)) or final(self, some))
    for max_memory, expected in ((1, [1] * 5), (2 * runs.bytes_per_circuit(), [2, 2, 1])):
        sizes.clear()
        chunked = MaskedRuns(model, pairs, ablated, max_memory=max_memory).run(masks)
        torch.testing.assert_close(chunked, whole_batch, rtol=1e-12, atol=1e-12)
        assert sizes == expected


def test_running_out_of_memory_halves_the_chunk(tiny, monkeypatch):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    runs, masks = MaskedRuns(model, pairs, outputs(model, pairs, "corrupt")), circuits(model.cfg, "oom", (0.5,) * 5)
    expected, final, limit = runs.run(masks), MaskedRuns.final, 2

    def narrow(self, some):
        if len(some) > limit:
            raise torch.OutOfMemoryError("too many circuits")
        return final(self, some)

    monkeypatch.setattr(MaskedRuns, "final", narrow)
    torch.testing.assert_close(runs.run(masks), expected, rtol=1e-12, atol=1e-12)
    limit = 0
    with pytest.raises(OptionError, match="one circuit on 4 prompts: use a smaller batch_size"):
        runs.run(masks)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
def test_a_prompt_alone_is_what_it_is_among_longer_ones(tiny, family, ablation):
    model, pairs = tiny(family, DOUBLE), dataclasses.replace(prompts(), lengths=torch.tensor([8, 7, 6, 8]))
    masks = circuits(model.cfg, family)
    found = MaskedRuns(model, pairs, ablated_outputs(model, pairs, ablation)).run(masks)
    for i in range(len(pairs)):
        one = cut(pairs, i)
        alone = MaskedRuns(model, one, ablated_outputs(model, one, ablation, reference=pairs)).run(masks)
        torch.testing.assert_close(alone[:, 0], found[:, i], rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", EVERY)
def test_the_gradient_at_the_whole_model_is_minus_eap(tiny, family):
    """To leave an edge out is to noise it. Under a post-norm a head's share of the norm is a slope, and no difference."""
    model, pairs = tiny(family, DOUBLE), prompts()
    masks = whole(model.cfg).double()[None].requires_grad_()
    final = MaskedRuns(model, pairs, ablated_outputs(model, pairs, "corrupt")).final(masks)
    (found,) = torch.autograd.grad(metric(model, pairs, final).sum(), masks)
    there, eap = edge_mask(model.cfg), edge_scores(model, pairs, direction="noise").sum("prompt").fillna(0)
    if model.cfg.post_norm:
        there = there & np.array([not name.startswith("a") for name in writers(model.cfg)])[:, None]
    assert (family in POST_NORM) == model.cfg.post_norm
    np.testing.assert_allclose(found[0].numpy()[there], -eap.values[there], rtol=1e-9, atol=1e-11)
    assert abs(eap.values[there]).max() > 0.01


@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia", "olmo2"])
def test_gradients_are_those_of_finite_differences(tiny, family, ablation):
    """With respect to masks and ablated values at once, at fractional masks of two circuits."""
    model, pairs = tiny(family, DOUBLE), prompts()
    masks, ablated = fractions(model.cfg, 2), ablated_outputs(model, pairs, ablation)
    generator = torch.Generator().manual_seed(7)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    to_masks, to_ablated = noise(masks) * whole(model.cfg), ablated.map(noise)
    runs = MaskedRuns(model, pairs, ablated)
    weights = torch.randn(2, len(pairs), model.cfg.d_model, generator=generator, dtype=DOUBLE)

    def moved(share: torch.Tensor) -> torch.Tensor:
        """share [2]: how far the masks and the ablated values are moved."""
        flat = lambda value: (value.embed, *value.z, *value.mlp)  # noqa: E731
        embed, *rest = (a + share[1] * b for a, b in zip(flat(ablated), flat(to_ablated), strict=True))
        other = Outputs(embed, tuple(rest[: len(ablated.z)]), tuple(rest[len(ablated.z) :]))
        return (runs.with_ablated(other).final(masks + share[0] * to_masks) * weights).sum()

    share = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    (found,) = torch.autograd.grad(moved(share), share)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(2, dtype=DOUBLE)
        expected = torch.stack([(moved(step) - moved(-step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert (expected.abs() > 0.1).all()


@pytest.mark.parametrize("kind", [torch.bool, DOUBLE], ids=str)
@pytest.mark.parametrize("family", ["llama3", "gemma2", "gptj"])
def test_with_and_without_a_graph_circuits_are_the_same_and_so_are_gradients_to_ablated_values(tiny, family, kind):
    model, pairs = tiny(family, DOUBLE), prompts()
    masks = circuits(model.cfg, family, (0.9, 0.5)).to(kind)
    first = 3 * model.cfg.n_heads + 1
    masks[:, :, :first] = whole(model.cfg)[:, :first]
    asking = ablated_outputs(model, pairs, "mean").map(lambda value: value.requires_grad_())
    runs = MaskedRuns(model, pairs, asking)
    final = runs.final(masks)
    torch.testing.assert_close(final, runs.run(masks), rtol=1e-12, atol=1e-12)
    values = (asking.embed, *asking.z, *asking.mlp)
    found = torch.autograd.grad(metric(model, pairs, final).sum(), values)
    slow = [SlowRun(model, embeddings(model, pairs, "clean"), mask, asking).final for mask in masks]
    total = metric(model, pairs, torch.stack([at_end(pairs, one) for one in slow])).sum()
    expected = torch.autograd.grad(total, values)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------------------------------------------------- refusals


def test_means_at_positions_need_prompts_of_one_length(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    shorter = dataclasses.replace(pairs, clean=pairs.clean[:, :6], corrupt=pairs.corrupt[:, :6], lengths=None)
    with pytest.raises(OptionError, match="the reference's have 6 tokens, these 8; use ablation='mean'"):
        ablated_outputs(model, pairs, "positional-mean", reference=shorter)
    masks = circuits(model.cfg, "mean")
    ablated = ablated_outputs(model, pairs, "mean", reference=shorter)
    assert_slow_runs(model, pairs, ablated, masks, MaskedRuns(model, pairs, ablated).run(masks))


@pytest.mark.parametrize("ablation", ["optimal", "means", "resample"])
def test_an_ablation_that_is_none_is_refused(tiny, ablation):
    with refused(OptionError, f"'{ablation}' is not a.* ablation .choose from corrupt, zero, mean, positional-mean.*"):
        ablated_outputs(tiny("gpt2", DOUBLE), prompts(), ablation)


def test_a_model_with_hooks_of_its_own_is_refused(tiny):
    model = tiny("gpt2", DOUBLE)
    ablated = ablated_outputs(model, prompts(), "zero")
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value * 0)]),
        refused(PatchError, r"hook of its own at blocks\.1\.hook_mlp_out"),
    ):
        MaskedRuns(model, prompts(), ablated)


def test_a_bridge_is_refused(tiny_folder, tiny):
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        bridge = TransformerBridge.boot_transformers(str(tiny_folder("gpt2")), device="cpu", dtype=torch.float32)
    with refused(OptionError, "needs a model from load_model"):
        MaskedRuns(bridge, prompts(), ablated_outputs(tiny("gpt2"), prompts(), "zero"))
