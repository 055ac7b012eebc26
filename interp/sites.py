"""Addresses of places in a model.

A *site* is a kind of activation ("resid_pre", "head", "mlp_out", ...) that exists once per layer, perhaps once per head
or neuron, and once per position. A *node* is one component of the model's graph under the ids that EAP-IG and MIB use:
`input`, `a3.h2` (head 2 of layer 3), `m5` (the MLP of layer 5), `logits`; `m5.n17` is one neuron of it.

    >>> SITES["head"].hook(3)
    'blocks.3.attn.hook_z'
    >>> parse_node("a3.h2")
    Node(kind='head', layer=3, index=2)
    >>> str(Node("mlp", 5))
    'm5'
"""

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from interp.errors import SiteError, one_of
from interp.model.config import ModelConfig


@dataclass(frozen=True)
class Site:
    """One kind of activation: where its hook is and which axis of the hook's value counts what."""

    name: str
    template: str
    unit: Literal["head", "kv_head", "neuron"] | None = None  # what the unit axis counts, if there is one
    unit_axis: int | None = None
    position_axis: int = 1
    source_axis: int | None = None  # attention patterns have a second position axis
    describe: str = ""

    def hook(self, layer: int) -> str:
        """Hook point of this site in one layer, under TransformerLens' name."""
        return self.template.format(layer=layer)

    @property
    def variable(self) -> str:
        """Its name in an `xarray.Dataset`, where a variable must not be called like one of its axes."""
        return f"{self.name}_out" if self.name == self.unit else self.name

    def n_units(self, cfg: ModelConfig) -> int | None:
        """How many units this site has in each layer; None if it is one vector."""
        return {"head": cfg.n_heads, "kv_head": cfg.n_kv_heads, "neuron": cfg.d_mlp, None: None}[self.unit]


_ALL = (
    Site("resid_pre", "blocks.{layer}.hook_resid_pre", describe="residual stream before the layer"),
    Site("resid_mid", "blocks.{layer}.hook_resid_mid", describe="residual stream between attention and MLP"),
    Site("resid_post", "blocks.{layer}.hook_resid_post", describe="residual stream after the layer"),
    Site("attn_out", "blocks.{layer}.hook_attn_out", describe="what attention adds to the residual stream"),
    Site("mlp_out", "blocks.{layer}.hook_mlp_out", describe="what the MLP adds to the residual stream"),
    Site("head", "blocks.{layer}.attn.hook_z", "head", 2, describe="output of each attention head (z)"),
    Site("q", "blocks.{layer}.attn.hook_q", "head", 2, describe="query of each head"),
    Site("k", "blocks.{layer}.attn.hook_k", "kv_head", 2, describe="key of each key/value head"),
    Site("v", "blocks.{layer}.attn.hook_v", "kv_head", 2, describe="value of each key/value head"),
    Site("pattern", "blocks.{layer}.attn.hook_pattern", "head", 1, 2, 3, "attention pattern: rows, or single cells"),
    Site("neuron", "blocks.{layer}.mlp.hook_post", "neuron", 2, describe="MLP neuron after its activation"),
)
SITES: dict[str, Site] = {site.name: site for site in _ALL}


def get_site(name: str, cfg: ModelConfig) -> Site:
    """The site of that name; `SiteError` if there is none or this model lacks it."""
    one_of(name, SITES, "site", SiteError)
    if name == "resid_mid" and cfg.parallel:
        raise SiteError(f"{cfg.name} has no resid_mid: its attention and MLP run in parallel")
    return SITES[name]


@dataclass(frozen=True)
class Node:
    """One component: `index` is the head of a "head" node and the neuron of a "neuron" node."""

    kind: Literal["input", "head", "mlp", "neuron", "logits"]
    layer: int = 0
    index: int | None = None

    def __str__(self) -> str:
        formats = {"head": "a{0}.h{1}", "mlp": "m{0}", "neuron": "m{0}.n{1}"}
        return formats.get(self.kind, self.kind).format(self.layer, self.index)

    @property
    def site(self) -> Site:
        """The site whose value is this node's output."""
        sites = {"head": "head", "mlp": "mlp_out", "neuron": "neuron"}
        if self.kind not in sites:
            raise SiteError(f"node {self} has no site of its own")
        return SITES[sites[self.kind]]


_NODE = re.compile(r"(?:(?P<kind>input|logits)|a(?P<a>\d+)\.h(?P<h>\d+)|m(?P<m>\d+)(?:\.n(?P<n>\d+))?)\Z")


def parse_node(text: str, cfg: ModelConfig | None = None) -> Node:
    """`a3.h2`, `m5`, `m5.n17`, `input` or `logits` as a `Node`; checked against a model's size if one is given."""
    match = _NODE.match(text)
    if match is None:
        raise SiteError(f"{text!r} is not a node: write a3.h2 (head), m5 (MLP), m5.n17 (neuron), input or logits")
    if match["kind"]:
        return Node(match["kind"])
    if match["a"]:
        node = Node("head", int(match["a"]), int(match["h"]))
    elif match["n"]:
        node = Node("neuron", int(match["m"]), int(match["n"]))
    else:
        node = Node("mlp", int(match["m"]))
    if cfg is not None:
        limit = {"head": cfg.n_heads, "neuron": cfg.d_mlp, "mlp": None}[node.kind]
        if node.layer >= cfg.n_layers or (limit is not None and node.index >= limit):
            raise SiteError(
                f"{cfg.name} has no node {text} ({cfg.n_layers} layers, {cfg.n_heads} heads, {cfg.d_mlp} neurons)"
            )
    return node


@runtime_checkable
class HasHeads(Protocol):
    """Anything with so many layers of so many heads."""

    n_layers: int
    n_heads: int


def component_nodes(cfg: HasHeads) -> list[Node]:
    """Every head and MLP, in the order of the forward pass."""
    return [
        node
        for layer in range(cfg.n_layers)
        for node in (*(Node("head", layer, h) for h in range(cfg.n_heads)), Node("mlp", layer))
    ]
