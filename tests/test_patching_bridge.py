"""Exact patching against a plain loop over TransformerBridge's `run_with_hooks`, on a small Llama trained on real text.

The loop below shares nothing with interp: it boots the bridge, caches the source run, puts one place of it into the
base run and reads the logits at the last position.
"""

import numpy as np
import pytest
import torch

from interp import PromptPairs, activation_patching, discover, load_model
from interp.errors import PatchError
from interp.interventions import Patch, PatchedRuns
from interp.metrics import METRICS
from tests.families import quiet

LONG = ("Once upon a time, there was a little girl named Lily.", "Once upon a time, there was a little boy named Tim.")
SHORT = ("Lily was happy.", "Tim was happy.")  # five tokens
MIDDLE = ("The girl was happy.", "The boy was happy.")  # eight
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "head": "attn.hook_z", "q": "attn.hook_q",
    "k": "attn.hook_k", "v": "attn.hook_v", "pattern": "attn.hook_pattern", "neuron": "mlp.hook_post",
}  # fmt: skip
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
UNITS = ("head", "q", "k", "v", "pattern")
NEURONS = ["m0.n3", "m2.n100", "m4.n171"]
DIRECTIONS = pytest.mark.parametrize("direction", ["denoise", "noise"])


@pytest.fixture(scope="module")
def bridge(shared_data):
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        return TransformerBridge.boot_transformers(
            str(shared_data / "models" / "stories260k"), device="cpu", dtype=torch.float32
        )


class Loop:
    """One pair's patched logit differences, one forward pass of the bridge each."""

    def __init__(self, bridge, prompts, direction: str):
        clean, corrupt = (bridge.to_tokens(text) for text in prompts)
        self.base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        self.bridge, self.length = bridge, clean.shape[1]
        self.she, self.he = (bridge.to_tokens(prompts[0] + w)[0, -1] for w in (" She", " He"))
        names = [f"blocks.{i}.{hook}" for i in range(5) for hook in HOOKS.values()]
        self.own, self.values = ({n: v.clone() for n, v in bridge.run_with_cache(t, names_filter=names)[1].items()}
                                 for t in (self.base, source))  # fmt: skip
        self.unpatched = self.run([])

    def run(self, hooks) -> float:
        with torch.no_grad():
            logits = self.bridge.run_with_hooks(self.base, fwd_hooks=hooks)[0, -1]
        return (logits[self.she] - logits[self.he]).item()

    def effect(self, site: str, layer: int, place: tuple) -> float:
        name = f"blocks.{layer}.{HOOKS[site]}"
        if site == "resid_mid":
            # the bridge's resid_mid feeds the MLP alone; what attention adds is the way to change the stream there
            name, change = f"blocks.{layer}.hook_attn_out", self.values[name] - self.own[name]
            put = lambda value, hook: _with(value, place, value[place] + change[place])  # noqa: E731
        else:
            put = lambda value, hook: _with(value, place, self.values[name][place])  # noqa: E731
        return self.run([(name, put)]) - self.unpatched


def _with(value, place, new):
    value = value.clone()
    value[place] = new
    return value


def pairs_of(model, prompts) -> PromptPairs:
    return PromptPairs.from_text(
        model, clean=[prompts[0]], corrupt=[prompts[1]], answers=[" She"], wrong_answers=[" He"]
    )


def assert_same(ours, theirs, loop):
    """To 1e-5 of the logit difference's own size, which float32 holds to about seven digits."""
    scale = max(1.0, abs(loop.unpatched))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_the_prompts_are_equally_long(stories):
    for prompts, length in ((LONG, 16), (SHORT, 5), (MIDDLE, 8)):
        assert [len(stories.to_str_tokens(text)) for text in prompts] == [length, length]


@DIRECTIONS
@pytest.mark.parametrize("site", STREAM)
def test_stream_sites_at_every_position(stories, bridge, site, direction):
    loop = Loop(bridge, LONG, direction)
    ours = activation_patching(stories, pairs_of(stories, LONG), site, direction=direction)[0]
    assert (ours[:, :10] == 0).all()  # the prompts agree there
    theirs = [[loop.effect(site, layer, (0, p)) for p in range(9, 16)] for layer in range(5)]
    assert_same(ours[:, 9:].values, theirs, loop)
    assert np.abs(theirs).max() > 1
    metric = ours.metric_corrupt if direction == "denoise" else ours.metric_clean
    assert metric == pytest.approx(loop.unpatched, abs=1e-4)


@DIRECTIONS
@pytest.mark.parametrize("site", UNITS)
def test_heads_queries_keys_values_and_pattern_rows(stories, bridge, site, direction):
    loop, n_units = Loop(bridge, SHORT, direction), 4 if site in "kv" else 8
    where = [1, 2, 4] if site == "head" else [1, 4]  # the name and the end
    ours = activation_patching(stories, pairs_of(stories, SHORT), site, direction=direction, positions=where)[0]
    assert ours.shape == (5, n_units, len(where))
    place = lambda unit, p: (0, unit, p) if site == "pattern" else (0, p, unit)  # noqa: E731
    theirs = [[[loop.effect(site, i, place(u, p)) for p in where] for u in range(n_units)] for i in range(5)]
    assert_same(ours.values, theirs, loop)


@DIRECTIONS
def test_all_positions_at_once(stories, bridge, direction):
    loop, pairs = Loop(bridge, MIDDLE, direction), pairs_of(stories, MIDDLE)
    ours = activation_patching(stories, pairs, [*STREAM, *UNITS], positions="all", direction=direction)
    for site in STREAM:
        theirs = [loop.effect(site, layer, (0,)) for layer in range(5)]
        assert_same(ours[site][0].values, theirs, loop)
    for site in UNITS:
        array = ours["head_out" if site == "head" else site][0]
        units = range(0, array.shape[1], 3)
        place = lambda unit: (0, unit) if site == "pattern" else (0, slice(None), unit)  # noqa: E731, B023
        theirs = [[loop.effect(site, layer, place(u)) for u in units] for layer in range(5)]
        assert_same(array[:, list(units)].values, theirs, loop)


@DIRECTIONS
def test_in_float64_every_site_agrees_to_1e_5_absolutely(shared_data, direction):
    """Float32 cannot hold 1e-5 of effects of ten; here what is left is the float32 inside the bridge's own norms."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(shared_data / "models" / "stories260k")
    with quiet():
        bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float64)
    model = load_model(folder, dtype=torch.float64)
    loop, pairs = Loop(bridge, SHORT, direction), pairs_of(model, SHORT)
    ours = activation_patching(model, pairs, [*STREAM, *UNITS], positions=[1], direction=direction)
    for site in STREAM:
        theirs = [[loop.effect(site, layer, (0, 1))] for layer in range(5)]
        np.testing.assert_allclose(ours[site][0].values, theirs, rtol=0, atol=1e-5)
    for site in UNITS:
        array = ours["head_out" if site == "head" else site][0]
        place = lambda unit: (0, unit, 1) if site == "pattern" else (0, 1, unit)  # noqa: E731, B023
        theirs = [[[loop.effect(site, layer, place(u))] for u in range(array.shape[1])] for layer in range(5)]
        np.testing.assert_allclose(array.values, theirs, rtol=0, atol=1e-5)


@DIRECTIONS
def test_neurons(stories, bridge, direction):
    loop, pairs = Loop(bridge, MIDDLE, direction), pairs_of(stories, MIDDLE)
    each, whole = (
        activation_patching(stories, pairs, "neuron", neurons=NEURONS, positions=p, direction=direction)[0]
        for p in ("each", "all")
    )
    for i, (layer, n) in enumerate(((0, 3), (2, 100), (4, 171))):
        theirs = [loop.effect("neuron", layer, (0, p, n)) for p in range(8)]
        assert_same(each[i].values, theirs, loop)
        assert_same(whole[i].item(), loop.effect("neuron", layer, (0, slice(None), n)), loop)


@DIRECTIONS
def test_single_pattern_cells(stories, bridge, direction):
    loop, pairs = Loop(bridge, SHORT, direction), pairs_of(stories, SHORT)
    base = "corrupt" if direction == "denoise" else "clean"
    runs, metric = PatchedRuns(stories, pairs, base=base, sites=["pattern"]), METRICS["logit_diff"]
    for layer, head, query, key in ((0, 1, 4, 1), (1, 7, 3, 3), (2, 0, 4, 0), (4, 2, 4, 4), (4, 5, 4, 1)):
        ours = metric(runs.patched((Patch("pattern", layer, head, query, key),)), pairs) - metric(
            runs.plain(base), pairs
        )
        assert_same(ours.item(), loop.effect("pattern", layer, (0, head, query, key)), loop)


@pytest.mark.parametrize("site", [*STREAM, *UNITS, "neuron"])
def test_a_bridge_in_place_of_the_model_gives_the_same_or_is_refused(stories, bridge, site):
    pairs, options = pairs_of(stories, SHORT), {"neurons": NEURONS, "positions": [1, -1]}
    try:
        theirs = activation_patching(bridge, pairs_of(bridge, SHORT), site, engine="hooks", **options)
    except PatchError as error:
        assert site == "resid_mid", error  # noqa: PT017
        return
    ours = activation_patching(stories, pairs, site, **options)
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-5, atol=3e-5)
    assert theirs.dims == ours.dims
    assert theirs.attrs["model"] == ours.attrs["model"] == "stories260k"


def test_discovery_on_a_bridge_is_the_same(stories, bridge):
    engines = {stories: "sweep", bridge: "hooks"}
    ours, theirs = (discover(m, pairs_of(m, SHORT), top_heads=1, engine=e) for m, e in engines.items())
    assert theirs.ranking.node[:5].tolist() == ours.ranking.node[:5].tolist()
    np.testing.assert_allclose(theirs.nodes.values, ours.nodes.values, rtol=1e-4, atol=1e-4)


def test_the_pronoun_lives_on_the_name_first_and_at_the_end_last(stories):
    """What differs is " girl" (three tokens), and " Lily"; nothing else can matter before attention has moved it."""
    effects = activation_patching(stories, pairs_of(stories, LONG), "resid_pre", normalize=True)[0]
    differs = pairs_of(stories, LONG).differs[0].nonzero().flatten().tolist()
    assert differs == [10, 11, 12, 14]
    agree = [p for p in range(16) if p not in differs]
    assert (effects.sel(layer=0, position=agree) == 0).all()
    assert effects.token.sel(position=14) == "14:␣Lily"
    for layer in (0, 1):
        assert np.argmax(effects.sel(layer=layer).values) == 14
        assert effects.sel(layer=layer, position=14) > 0.4
    assert effects.sel(layer=4, position=15) > 0.25
    last = activation_patching(stories, pairs_of(stories, LONG), "attn_out", normalize=True)[0].isel(layer=-1)
    assert np.argmax(last.values) == 15
    assert last[15] > 0.5
