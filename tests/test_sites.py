"""Addresses: ids of nodes, and sites that are where they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import SiteError
from interp.sites import SITES, Node, component_nodes, get_site, parse_node

indices = st.integers(0, 300)
nodes = st.one_of(
    st.just(Node("input")),
    st.just(Node("logits")),
    st.builds(Node, st.just("head"), indices, indices),
    st.builds(Node, st.just("mlp"), indices),
    st.builds(Node, st.just("neuron"), indices, indices),
)


@given(nodes)
def test_a_node_survives_its_id(node):
    assert parse_node(str(node)) == node


@given(st.text("amhn.0123456789inputlogits", max_size=9))
def test_a_text_is_a_node_or_an_error(text):
    try:
        node = parse_node(text)
    except SiteError as error:
        assert repr(text) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert parse_node(str(node)) == node


def test_ids_are_those_of_eap_ig():
    assert str(Node("head", 3, 2)) == "a3.h2"
    assert str(Node("mlp", 5)) == "m5"
    assert str(Node("neuron", 5, 17)) == "m5.n17"
    assert str(Node("input")) == "input"
    assert str(Node("logits")) == "logits"


@pytest.mark.parametrize(
    "text", ["", "a3", "a3.h", "a3.m2", "h2", "m", "m5.h1", "A3.h2", "a-1.h0", " a3.h2", "a3.h2\n", "a3.h2x"]
)
def test_a_bad_id_is_named_with_examples(text):
    with pytest.raises(SiteError, match="is not a node: write a3") as caught:
        parse_node(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["a3.h0", "a0.h4", "m3", "m3.n0", "m0.n80"])
def test_a_node_outside_the_model_is_named(text, tiny):
    with pytest.raises(SiteError, match=rf"gpt2 has no node {text} \(3 layers, 4 heads, 80 neurons\)"):
        parse_node(text, tiny("gpt2").cfg)


@pytest.mark.parametrize("text", ["a2.h3", "a0.h0", "m2", "m2.n79", "input", "logits"])
def test_a_node_inside_the_model_is_found(text, tiny):
    assert str(parse_node(text, tiny("gpt2").cfg)) == text


def test_components_come_in_the_order_of_the_forward_pass(tiny):
    cfg = tiny("gpt2").cfg
    found = component_nodes(cfg)
    assert [str(n) for n in found[:6]] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0"]
    assert len(found) == len(set(found)) == cfg.n_layers * (cfg.n_heads + 1)


def test_a_nodes_site_is_its_output():
    assert Node("head", 1, 2).site is SITES["head"]
    assert Node("mlp", 1).site is SITES["mlp_out"]
    assert Node("neuron", 1, 2).site is SITES["neuron"]
    for kind in ("input", "logits"):
        with pytest.raises(SiteError, match=f"node {kind} has no site"):
            _ = Node(kind).site


@pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia", "gemma2"])
@pytest.mark.parametrize("name", SITES)
def test_a_site_is_a_hook_point_with_those_axes(name, family, tiny):
    model, tokens = tiny(family), torch.full((2, 7), 5)
    if name == "resid_mid" and model.cfg.parallel:
        return  # see the next test
    site = get_site(name, model.cfg)
    _, cache = model.run_with_cache(tokens, names_filter=site.hook(1))
    value = cache[site.hook(1)]
    assert value.shape[site.position_axis if site.source_axis is None else 2] == 7
    if site.unit is None:
        assert site.n_units(model.cfg) is site.unit_axis is None
        assert value.shape == (2, 7, model.cfg.d_model)
    else:
        assert value.shape[site.unit_axis] == site.n_units(model.cfg)
    if site.source_axis is not None:
        assert value.shape[site.source_axis] == 7


def test_a_variable_is_not_called_like_its_axis():
    for site in SITES.values():
        assert site.variable not in ("head", "kv_head", "neuron", "layer", "position", "source", "prompt")


def test_an_unknown_site_is_named_with_its_neighbour(tiny):
    with pytest.raises(SiteError, match=r"'resid_prr' is not a site .*did you mean 'resid_pre'"):
        get_site("resid_prr", tiny("gpt2").cfg)


def test_a_parallel_model_has_no_resid_mid(tiny):
    assert get_site("resid_mid", tiny("gpt2").cfg) is SITES["resid_mid"]
    for family in ("pythia", "gptj", "phi"):
        with pytest.raises(SiteError, match="no resid_mid: its attention and MLP run in parallel"):
            get_site("resid_mid", tiny(family).cfg)
    assert get_site("resid_mid", replace(tiny("pythia").cfg, parallel=False)) is SITES["resid_mid"]
