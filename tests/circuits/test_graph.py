"""The graph of a model: which edges there are, under which names, in which order.

Held against a rule written down here once more (who computes when), against a model that is disturbed and watched, and
against published counts and a published file.
"""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import ModelConfig
from interp.circuits.graph import edge_mask, readers, select_edges, writers
from interp.errors import SiteError
from interp.model.run import record
from interp.sites import parse_node
from tests.small_pairs import refused

# Models that others have counted: layers, heads, parallel or not, edges.
PUBLISHED = {
    "gpt2-small": (12, 12, False, 32_491),
    "pythia-70m": (6, 8, True, 3_580),
    "qwen2.5-0.5b": (24, 14, False, 179_749),
    "gemma-2-2b": (26, 8, False, 74_218),
    "gpt2-xl": (48, 25, False, 2_235_025),
    "llama-3-8b": (32, 32, False, 1_592_881),
}
SHAPES = {"n_layers": st.integers(1, 5), "n_heads": st.integers(1, 4), "parallel": st.booleans()}


def config(n_layers: int, n_heads: int, parallel: bool = False, **more) -> ModelConfig:
    """The shape of a model that is never built."""
    sizes = {"n_kv_heads": n_heads, "d_model": 8, "d_head": 4, "d_mlp": 8, "d_vocab": 8, "n_ctx": 8, **more}
    about = {"name": "shape", "family": "none", "norm": "rms", "eps": 1e-5}
    return ModelConfig(n_layers=n_layers, n_heads=n_heads, parallel=parallel, **about, **sizes)


def layer_and_kind(component: str) -> tuple[int, str]:
    """(layer, "a" or "m") of "a3.h2", "a3.h2<q>" or "m5"."""
    match = re.fullmatch(r"a(\d+)\.h\d+(?:<[qkv]>)?|m(\d+)", component)
    return (int(match[1]), "a") if match[1] else (int(match[2]), "m")


def written(component: str, cfg: ModelConfig) -> int:
    """The moment from which a component's output is in the residual stream; a layer takes two moments."""
    if component == "input":
        return 0
    layer, kind = layer_and_kind(component)
    return 2 * layer + (1 if kind == "a" else 2)


def read(component: str, cfg: ModelConfig) -> int:
    """The moment at which a component looks at the residual stream."""
    if component == "logits":
        return 2 * cfg.n_layers
    layer, kind = layer_and_kind(component)
    return 2 * layer + (1 if kind == "m" and not cfg.parallel else 0)


def exists(source: str, target: str, cfg: ModelConfig) -> bool:
    return written(source, cfg) <= read(target, cfg)


def all_edges(cfg: ModelConfig) -> list[str]:
    there = edge_mask(cfg)
    return [f"{u}->{v}" for i, u in enumerate(writers(cfg)) for j, v in enumerate(readers(cfg)) if there[i, j]]


def named(cfg: ModelConfig, mask: np.ndarray) -> set[str]:
    return {f"{writers(cfg)[i]}->{readers(cfg)[j]}" for i, j in np.argwhere(mask)}


# --------------------------------------------------------------------------------------------------------- ids and order


def test_names_stand_in_the_order_of_the_forward_pass():
    cfg = config(2, 2)
    assert writers(cfg) == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert readers(cfg) == [
        "a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0",
        "a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>", "m1",
        "logits",
    ]  # fmt: skip


@given(**SHAPES)
@settings(deadline=None)
def test_every_name_occurs_once_and_is_a_node(n_layers, n_heads, parallel):
    cfg = config(n_layers, n_heads, parallel)
    sources, targets = writers(cfg), readers(cfg)
    assert len(set(sources)) == len(sources) == 1 + n_layers * (n_heads + 1)
    assert len(set(targets)) == len(targets) == n_layers * (3 * n_heads + 1) + 1
    for name in (*sources, *(re.sub(r"<[qkv]>$", "", target) for target in targets)):
        assert str(parse_node(name, cfg)) == name
    assert edge_mask(cfg).shape == (len(sources), len(targets))


def test_shared_keys_and_values_have_a_reader_for_every_query_head():
    cfg = config(2, 4, n_kv_heads=1)
    assert readers(cfg) == readers(config(2, 4))
    assert (edge_mask(cfg) == edge_mask(config(2, 4))).all()


# ----------------------------------------------------------------------------------------------------- which there are


@given(**SHAPES)
@settings(deadline=None)
def test_an_edge_exists_where_the_source_comes_before_the_target(n_layers, n_heads, parallel):
    cfg = config(n_layers, n_heads, parallel)
    expected = [[exists(source, target, cfg) for target in readers(cfg)] for source in writers(cfg)]
    there = edge_mask(cfg)
    assert there.dtype == bool
    np.testing.assert_array_equal(there, expected)


@given(**SHAPES)
@settings(deadline=None)
def test_the_number_of_edges_is_the_closed_form(n_layers, n_heads, parallel):
    per_layer = [
        3 * n_heads * (1 + layer * (n_heads + 1)) + (1 + layer * (n_heads + 1)) + (0 if parallel else n_heads)
        for layer in range(n_layers)
    ]
    assert edge_mask(config(n_layers, n_heads, parallel)).sum() == sum(per_layer) + 1 + n_layers * (n_heads + 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    n_layers, n_heads, parallel, n_edges = PUBLISHED[name]
    cfg = config(n_layers, n_heads, parallel)
    assert edge_mask(cfg).sum() == n_edges
    # in parallel models no head reaches the MLP of its own layer: counting it anyway gives Pythia's 3,628
    assert edge_mask(config(n_layers, n_heads, not parallel)).sum() - n_edges == n_layers * n_heads * (2 * parallel - 1)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gptj", "llama3", "olmo2"])
def test_a_disturbed_output_reaches_exactly_the_targets_of_its_edges(tiny, family):
    """Whatever can be reached at all can be reached by one edge, since every writer writes to the stream that all read."""
    model = tiny(family, torch.float64)
    cfg, tokens = model.cfg, torch.arange(5, 10)[None]
    last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    inputs = {f"blocks.{i}.attn.hook_{x}" for i in range(cfg.n_layers) for x in "qkv"}
    inputs |= {f"blocks.{i}.mlp.hook_pre" for i in range(cfg.n_layers)} | {last}
    plain = record(model, tokens, inputs)

    def moved(source: str) -> set[str]:
        if source == "input":
            hook, place = "hook_embed", ...
        else:
            layer, kind = layer_and_kind(source)
            hook = f"blocks.{layer}.{'attn.hook_z' if kind == 'a' else 'hook_mlp_out'}"
            place = (..., int(source.split("h")[1]), slice(None)) if kind == "a" else ...

        def disturb(value, hook):
            value = value.clone()
            value[place] += torch.linspace(1, 2, value[place].shape[-1], dtype=value.dtype)
            return value

        found = record(model, tokens, inputs, [(hook, disturb)])
        return {name for name in inputs if not torch.equal(found[name], plain[name])}

    def input_of(target: str) -> str:
        if target == "logits":
            return last
        layer, kind = layer_and_kind(target)
        return f"blocks.{layer}.attn.hook_{target[-2]}" if kind == "a" else f"blocks.{layer}.mlp.hook_pre"

    there = edge_mask(cfg)
    for i, source in enumerate(writers(cfg)):
        assert moved(source) == {input_of(target) for j, target in enumerate(readers(cfg)) if there[i, j]}, source


def test_mibs_graph_of_gpt2_has_our_edges_and_nodes(shared_data):
    path = shared_data / "reference" / "mib_ioi_graph" / "circuits" / "ioi-eap-ig.json"
    if not path.exists():
        pytest.skip(f"{path} is not there (a file of another project, beside a clone and not part of it)")
    graph = json.loads(path.read_text(encoding="utf-8"))
    cfg = config(graph["cfg"]["n_layers"], graph["cfg"]["n_heads"], graph["cfg"]["parallel_attn_mlp"])
    assert (cfg.n_layers, cfg.n_heads, cfg.parallel) == PUBLISHED["gpt2-small"][:3]
    assert set(all_edges(cfg)) == set(graph["edges"])
    assert {*writers(cfg), "logits"} == set(graph["nodes"])
    into = [re.sub(r".*->(a|m|logits).*", r"\1", edge) for edge in all_edges(cfg)]
    assert {kind: into.count(kind) for kind in ("a", "m", "logits")} == {"a": 31_320, "m": 1_014, "logits": 157}
    kept = [name for name, edge in graph["edges"].items() if edge["in_graph"]]
    assert select_edges(cfg, kept).sum() == len(kept) == 756


# ---------------------------------------------------------------------------------------------------------- named edges


@given(data=st.data(), **SHAPES)
@settings(deadline=None)
def test_named_edges_come_back_as_they_were_named(data, n_layers, n_heads, parallel):
    cfg = config(n_layers, n_heads, parallel)
    edges = data.draw(st.lists(st.sampled_from(all_edges(cfg)), max_size=20))
    mask = select_edges(cfg, edges)
    assert named(cfg, mask) == set(edges)
    assert not (mask & ~edge_mask(cfg)).any()


def test_all_names_are_all_edges_and_no_name_is_none():
    cfg = config(3, 2, parallel=True)
    np.testing.assert_array_equal(select_edges(cfg, all_edges(cfg)), edge_mask(cfg))
    assert not select_edges(cfg, []).any()


NOT_EDGES = {
    "a9.h0->m2": "unknown layer",
    "a0.h7->m2": "unknown head",
    "a0.h0->m2<q>": "an MLP has one input",
    "a0.h0->a1.h0": "which input of the head?",
    "a0.h0->a1.h0<z>": "no such input",
    "a0.h0 -> m2": "spaces",
    "a0.h0": "no target",
    "->m0": "no source",
    "": "nothing",
    "m0->m1->m2": "two edges",
    "logits->m0": "the logits write nothing",
    "m0->input": "the input reads nothing",
    "m2->a0.h1<q>": "backward",
    "m1->m1": "to itself",
    "a1.h0->a1.h1<v>": "within one layer's attention",
    "m0->a0.h0<k>": "from a layer's MLP to its attention",
}


@pytest.mark.parametrize("edge", NOT_EDGES, ids=NOT_EDGES.values())
def test_what_is_not_an_edge_is_refused_by_name(edge):
    with refused(SiteError, re.escape(f"shape has no edge {edge}:") + ".*from an earlier component to a later one"):
        select_edges(config(3, 2), ["a0.h0->m2", edge, "m0->logits"])


def test_a_heads_own_mlp_is_a_target_unless_they_run_in_parallel():
    assert select_edges(config(2, 2), ["a1.h0->m1"]).sum() == 1
    with refused(SiteError, "shape has no edge a1.h0->m1:"):
        select_edges(config(2, 2, parallel=True), ["a1.h0->m1"])


def test_the_refusal_names_the_first_few_and_counts_the_others():
    wrong = [f"m{i}->m0" for i in range(7)]
    with refused(SiteError, "m0->m0, m1->m0, m2->m0, m3->m0, m4->m0 and 2 more: write a0.h1->m2, m0->a1.h2<q>"):
        select_edges(config(2, 2), ["input->m0", *wrong])
