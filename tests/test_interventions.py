"""`PatchedRuns` against a second implementation that shares no line with it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import OptionError, PatchError, SiteError
from interp.interventions import Patch, PatchedRuns, mean_values
from interp.sites import SITES, Node, get_site, parse_node
from tests.small_pairs import refused, sites_of, small_pairs

LENGTHS = (6, 4)
PAIRS = small_pairs(n=2, length=6, lengths=LENGTHS, seed=2)


def by_hand(model, pairs, base: str, patches, source: dict) -> torch.Tensor:
    """Logits [prompt, d_vocab]: one hook per patch, one prompt and one cell at a time."""

    def hook_of(patch):
        site = SITES[patch.site]

        def put(value, hook):
            value = value.clone()
            for row, length in enumerate(pairs.lengths.tolist()):
                here = lambda p: slice(None) if p is None else p if p >= 0 else p + length  # noqa: B023, E731
                unit = slice(None) if patch.unit is None else patch.unit
                if patch.site == "pattern":
                    place = (row, unit, here(patch.position), here(patch.source_position))
                elif site.unit is None:
                    place = (row, here(patch.position))
                else:
                    place = (row, here(patch.position), unit)
                value[place] = source[hook.name][place]
            return value

        return site.hook(patch.layer), put

    with torch.no_grad(), model.hooks(fwd_hooks=[hook_of(p) for p in patches]):
        logits = model(pairs.tokens(base))
    return torch.stack([row[n - 1] for row, n in zip(logits, pairs.lengths.tolist(), strict=True)])


@st.composite
def patches(draw, model, kv_heads: bool = True):
    site = get_site(draw(st.sampled_from(sites_of(model))), model.cfg)
    n_units = site.n_units(model.cfg)
    unit = None if n_units is None else draw(st.none() | st.integers(0, n_units - 1))
    position = draw(st.none() | st.integers(-min(LENGTHS), max(LENGTHS) - 1))
    source_position = draw(st.none() | st.integers(0, max(LENGTHS) - 1)) if site.name == "pattern" else None
    return Patch(site.name, draw(st.integers(0, model.cfg.n_layers - 1)), unit, position, source_position)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "pythia"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_joint_patches_are_those_made_by_hand(tiny, family, data):
    model = tiny(family, torch.float64)
    chosen = tuple(data.draw(st.lists(patches(model), max_size=5)))
    base, other = data.draw(st.sampled_from([("clean", "corrupt"), ("corrupt", "clean")]))
    runs = PatchedRuns(model, PAIRS, base=base, sites=sites_of(model))
    _, source = model.run_with_cache(PAIRS.tokens(other), return_cache_object=False)
    expected = by_hand(model, PAIRS, base, chosen, source)
    torch.testing.assert_close(runs.patched(chosen), expected, rtol=0, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_order_of_patches_does_not_matter(tiny, data):
    model = tiny("gemma2")
    chosen = data.draw(st.lists(patches(model), max_size=5))
    shuffled = data.draw(st.permutations(chosen))
    runs = PatchedRuns(model, PAIRS, base="clean", sites=sites_of(model))
    assert torch.equal(runs.patched(tuple(chosen)), runs.patched(tuple(shuffled)))


def test_no_patch_is_the_plain_run(tiny):
    runs = PatchedRuns(tiny("gpt2"), PAIRS, base="corrupt", sites=["head"])
    assert torch.equal(runs.patched(()), runs.plain("corrupt"))
    assert not torch.equal(runs.plain("corrupt"), runs.plain("clean"))


def test_runs_come_in_the_order_of_their_interventions(tiny):
    runs = PatchedRuns(tiny("gpt2"), PAIRS, base="corrupt", sites=["head"])
    wanted = [(Patch("head", 0, 1, 2),), (), (Patch("head", 2, 0, 3), Patch("head", 1, 0))]
    for logits, one in zip(runs.run(wanted), wanted, strict=True):
        assert torch.equal(logits, runs.patched(one))


def test_zeros_are_zeros(tiny):
    model = tiny("llama3", torch.float64)
    runs = PatchedRuns(model, PAIRS, base="clean", sites=["head", "mlp_out"], source="zero")
    chosen = (Patch("head", 1, 2), Patch("mlp_out", 0))
    _, cache = model.run_with_cache(PAIRS.clean, return_cache_object=False)
    expected = by_hand(model, PAIRS, "clean", chosen, {name: torch.zeros_like(v) for name, v in cache.items()})
    torch.testing.assert_close(runs.patched(chosen), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_means_are_over_the_prompts_that_have_the_position(tiny, size):
    model, pairs = tiny("gpt2", torch.float64), small_pairs(n=3, length=6, lengths=[6, 4, 5], seed=2)
    means = mean_values(model, pairs.chunks(size), "corrupt", ["head", "mlp_out", "pattern"])
    _, cache = model.run_with_cache(pairs.corrupt, return_cache_object=False)
    for name in ("blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"):
        for position, rows in ((0, [0, 1, 2]), (3, [0, 1, 2]), (4, [0, 2]), (5, [0])):
            torch.testing.assert_close(means[name][0, position], cache[name][rows, position].mean(0))
    name = "blocks.1.attn.hook_pattern"
    torch.testing.assert_close(means[name][0, :, 4], cache[name][[0, 2], :, 4].mean(0))


def test_means_do_not_see_the_padding(tiny):
    pairs = small_pairs(n=2, lengths=[6, 4])
    other = dataclasses.replace(pairs, corrupt=torch.where(pairs.is_token, pairs.corrupt, 50))
    first, second = (mean_values(tiny("gpt2"), [p], "corrupt", ["mlp_out"]) for p in (pairs, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_given_values_are_put_in(tiny):
    model = tiny("gpt2", torch.float64)
    given_values = {f"blocks.{i}.hook_mlp_out": torch.full((1, 6, 32), 0.5, dtype=torch.float64) for i in range(3)}
    runs = PatchedRuns(model, PAIRS, base="clean", sites=["mlp_out"], source=given_values)
    expected = by_hand(
        model, PAIRS, "clean", (Patch("mlp_out", 1),), {n: v.expand(2, 6, 32) for n, v in given_values.items()}
    )
    torch.testing.assert_close(runs.patched((Patch("mlp_out", 1),)), expected, rtol=0, atol=1e-10)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny("gpt2")
    before = model(PAIRS.clean)
    runs = PatchedRuns(model, PAIRS, base="corrupt", sites=["head"])
    runs.patched((Patch("head", 0),))
    assert torch.equal(model(PAIRS.clean), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_patch_that_raises_leaves_no_hook(tiny):
    model = tiny("gpt2")
    runs = PatchedRuns(model, PAIRS, base="corrupt", sites=["head"])
    with pytest.raises(IndexError):
        runs.patched((Patch("head", 0, 99),))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_patch_of_a_node():
    assert Patch.of_node(parse_node("a3.h2"), 4) == Patch("head", 3, 2, 4)
    assert Patch.of_node(parse_node("m1")) == Patch("mlp_out", 1)
    assert Patch.of_node(parse_node("m1.n7"), -1) == Patch("neuron", 1, 7, -1)
    with pytest.raises(SiteError, match="node input has no site"):
        Patch.of_node(Node("input"))


def test_unknown_sources_are_said(tiny):
    with refused(OptionError, "'zeros' is not a source .*did you mean 'zero'"):
        PatchedRuns(tiny("gpt2"), PAIRS, base="clean", sites=["head"], source="zeros")


def test_check_passes_on_every_site(tiny):
    for family in ("gpt2", "gemma2", "pythia"):
        PatchedRuns(tiny(family), PAIRS, base="clean", sites=sites_of(tiny(family))).check()


def test_check_sees_values_that_are_not_what_the_run_holds(tiny, monkeypatch):
    from interp.model.run import record

    runs = PatchedRuns(tiny("gpt2"), PAIRS, base="clean", sites=["mlp_out"])
    monkeypatch.setattr("interp.interventions.record", lambda *a: {n: v * 1.01 for n, v in record(*a).items()})
    with pytest.raises(PatchError, match="mlp_out with its own values"):
        runs.check()
