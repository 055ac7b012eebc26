"""What scores of edges add up to.

Held against: node attribution, which the edges out of a node add up to; the metric's difference, which secants and paths
add up to; exact patching of whole sublayers, and of single edges in a model that is linear, where every method is exact.
Single edges of other models: tests/circuits/test_edge_scores.py.
"""

import itertools
import random

import numpy as np
import pytest
import torch
import xarray as xr

from interp import ModelConfig, Transformer, activation_patching, edge_patching
from interp.circuits.edges import METHODS, edge_scores
from interp.circuits.graph import readers
from interp.model.config import Rotary
from interp.rules import RULES
from tests.circuits.masked_oracle import POST_NORM
from tests.circuits.test_edge_scores import (
    DIRECTIONS,
    DOUBLE,
    PATHS,
    added_as_they_are,
    assert_close,
    from_input,
    gap,
    nodes_of,
)
from tests.circuits.test_exact import DIFFERENT, OTHERS, prompts

EVERY = (*DIFFERENT, *OTHERS)
PLAIN = [family for family in EVERY if family not in POST_NORM]


# ------------------------------------------------------------------------------------------------------- sums: nodes, cuts


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia", "qwen3"])
def test_the_edges_out_of_a_node_add_up_to_its_attribution(tiny, family, rules):
    """E14."""
    model, pairs, direction = (
        tiny(family, DOUBLE),
        prompts(),
        random.Random(family + rules).choice(["denoise", "noise"]),
    )
    expected = nodes_of(model, pairs, rules=rules, direction=direction)
    level = lambda name: edge_scores(model, pairs, rules=rules, direction=direction, level=name)  # noqa: E731
    edges, nodes, channels = map(level, ("edge", "node", "channel"))
    assert_close(edges.sum("target"), expected)
    assert_close(nodes, expected)
    assert_close(channels.sum("channel"), expected)
    assert [x.dims for x in (nodes, channels)] == [("prompt", "source"), ("prompt", "source", "channel")]
    assert [x.attrs["site"] for x in (edges, nodes, channels)] == ["edges", "nodes", "channels"]
    assert channels.channel.values.tolist() == list(range(model.cfg.d_model))
    assert channels.notnull().all()
    assert abs(expected).max() > 0.01


@pytest.mark.parametrize("family", EVERY)
def test_they_do_in_every_family(tiny, family):
    """Under a post-norm those of the input and of MLPs do: a head's change of the normed sum is no slope."""
    model, pairs = tiny(family, DOUBLE), prompts()
    added = added_as_they_are(model.cfg)
    for options in ({}, {"direction": "noise", "rules": "relp"}):
        scores, nodes = edge_scores(model, pairs, **options), edge_scores(model, pairs, level="node", **options)
        assert_close(scores.sum("target")[:, added], nodes_of(model, pairs, **options)[:, added])
        assert_close(nodes, scores.sum("target"))


@pytest.mark.parametrize("method", [*PATHS, "clean-corrupted"])
@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2"])
def test_a_node_is_the_sum_of_its_edges_along_paths_too(tiny, family, method):
    model, pairs = tiny(family, DOUBLE), prompts()
    edges, nodes, channels = (edge_scores(model, pairs, method=method, level=x) for x in ("edge", "node", "channel"))
    assert_close(nodes, edges.sum("target"))
    assert_close(channels.sum("channel"), nodes)
    assert abs(nodes).max() > 0.01


@pytest.mark.parametrize(
    ("family", "metric"),
    [*((family, "logit_diff") for family in PLAIN), ("gpt2", "probability"), ("pythia", "kl_divergence")],
)
@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_secants_of_the_edges_across_any_boundary_add_up_to_the_gap(tiny, family, metric):
    """E16: before a layer, and between its attention and its MLP."""
    model, pairs, direction = tiny(family, DOUBLE), prompts(), random.Random(family).choice(["denoise", "noise"])
    scores = edge_scores(model, pairs, rules="secant", direction=direction, metric=metric).fillna(0)
    heads = model.cfg.n_heads
    for layer in range(model.cfg.n_layers + 1):
        before, behind = 1 + layer * (heads + 1), layer * (3 * heads + 1)
        np.testing.assert_allclose(scores[:, :before, behind:].sum(("source", "target")), gap(scores), rtol=1e-9)
        if layer < model.cfg.n_layers and not model.cfg.parallel:
            middle = scores[:, : before + heads, behind + 3 * heads :]
            np.testing.assert_allclose(middle.sum(("source", "target")), gap(scores), rtol=1e-9)
    assert abs(gap(scores)).max() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "pythia", "opt", "llama-relu2"])
def test_more_steps_bring_the_edges_out_of_the_input_to_the_gap(tiny, family):
    """E15, for both kinds of paths; fast, unless the way leads over kinks."""
    model, pairs = tiny(family, DOUBLE), prompts()
    errors = []
    for steps in (4, 16, 64, 256):
        scores = edge_scores(model, pairs, method="eap-ig", steps=steps)
        errors.append(abs(from_input(scores) / gap(scores) - 1).max())
        if steps == 4:
            own = edge_scores(model, pairs, method="eap-ig-activations", steps=steps)
            assert_close(from_input(own), from_input(scores))
    enough = {"opt": 1e-2, "llama-relu2": 1e-4}.get(family, 1e-9)  # relu, and its square
    assert all(b < a or b < enough for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < enough < 0.1 < errors[0], errors


@pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia", "gptj", "gemma2"])
def test_the_edges_out_of_a_moved_sublayer_add_up_to_the_effect_of_patching_it(tiny, family):
    """Under a post-norm this is so for MLPs: heads' own changes of the normed sum do not add up to its change."""
    model, pairs, direction = tiny(family, DOUBLE), prompts(), "noise" if family == "gpt2" else "denoise"
    scores = edge_scores(model, pairs, method="eap-ig-activations", steps=96, direction=direction).sum("target")
    exact = activation_patching(model, pairs, ["attn_out", "mlp_out"], positions="all", direction=direction)
    for layer in range(model.cfg.n_layers):
        heads = [f"a{layer}.h{h}" for h in range(model.cfg.n_heads)]
        assert_close(scores.sel(source=f"m{layer}"), exact.mlp_out.sel(layer=layer), 1e-6)
        if not model.cfg.post_norm:
            assert_close(scores.sel(source=heads).sum("source"), exact.attn_out.sel(layer=layer), 1e-6)
    assert_close(scores.sel(source="input"), gap(scores), 1e-6)


# ------------------------------------------------------------------------------------------------------- a linear model


def linear_model(seed: int = 0) -> Transformer:
    """Patterns that depend on positions only, neurons far up the straight part of their ReLU, no norms."""
    layers, heads, kv, d_head, width, neurons, vocab = 3, 4, 2, 6, 16, 10, 64
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(shape, generator=generator, dtype=DOUBLE) * shape[-2] ** -0.5  # noqa: E731
    weights = {"embed.W_E": noise(vocab, width) * 4, "unembed.W_U": noise(width, vocab)}
    weights["ln_final.w"] = torch.full((width,), 1e12, dtype=DOUBLE)
    for layer in range(layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        for x, n in zip("QKV", (heads, kv, kv), strict=True):
            weights[f"{attn}.W_{x}"] = noise(n, width, d_head) * (x == "V")
            weights[f"{attn}.b_{x}"] = noise(n, d_head) * 3
        weights[f"{attn}.W_O"] = noise(heads, d_head, width)
        weights |= {f"{mlp}.W_in": noise(width, neurons), f"{mlp}.W_out": noise(neurons, width)}
        weights[f"{mlp}.b_in"] = torch.full((neurons,), 50.0, dtype=DOUBLE)
        weights[f"{mlp}.b_out"] = -50 * weights[f"{mlp}.W_out"].sum(0)
    cfg = ModelConfig(
        name="linear", family="linear", n_layers=layers, d_model=width, n_heads=heads, n_kv_heads=kv, d_head=d_head,
        d_mlp=neurons, d_vocab=vocab, n_ctx=16, norm="rms", eps=1e24, pre_norm=False, activation="relu",
        attn_scale=(1.0,) * layers, windows=(None, 3, None), rotary=(Rotary((1.0, 0.3, 0.1)),) * layers,
    )  # fmt: skip
    return Transformer(cfg, weights)


@DIRECTIONS
def test_in_a_linear_model_every_method_is_exact(direction):
    """E13: and so are rules that leave a straight neuron alone."""
    model, pairs = linear_model(), prompts()
    exact = edge_patching(model, pairs, direction=direction)
    assert abs(exact.sel(target=[v for v in readers(model.cfg) if v[-2] in "qk"])).max() < 1e-10
    assert float(abs(exact).max()) > 0.1
    for options in (*({"method": method} for method in METHODS), {"rules": "ln-only"}, {"rules": "secant"}):
        found = edge_scores(model, pairs, direction=direction, **options)
        xr.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-10)
