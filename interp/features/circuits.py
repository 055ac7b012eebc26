"""Sparse feature circuits: the few latents and error terms that carry a behaviour, tested by intervention.

    circuit = feature_circuit(model, load_task("ioi", model), saes, n_nodes=30, check=10)
    print(circuit)                       # nodes with estimated and exact effects, agreement, faithfulness
    circuit.edges                        # which latent acts through which, between neighbouring SAEs

Nodes are ranked by `feature_attribution` with any rule set, or integrated gradients (Marks et al. 2403.19647); the top ones are
patched exactly. The circuit is faithful if the clean prompts are answered as before with every latent and error term that is not
in it at its corrupt value:

    faithfulness = (M(circuit) - M(corrupt)) / (M(clean) - M(corrupt))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.directions import SIDES, Direction
from interp.errors import OptionError, RulesError, one_of
from interp.features.attribution import (
    ERROR,
    feature_attribution,
    feature_patching,
    node_name,
    parse_feature,
    place_of,
    splits,
)  # fmt: skip
from interp.features.sae import SAE
from interp.features.splice import place_saes
from interp.metrics import Metric, get_metric
from interp.model.run import canonical, logits_at, record, run_at
from interp.node_attribution import backward_scores
from interp.rules import Rules, get_rules
from interp.sites import Site
from interp.tasks.pairs import PromptPairs


@dataclass(frozen=True)
class FeatureCircuit:
    """Latents and error terms that carry a behaviour.

    nodes: table of node, estimate and, where it was checked, exact effect (means over prompts). edges: source, target, weight;
    empty if not asked for. scores: every node's, per prompt. faithfulness: of this circuit, 1 being the whole model.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    scores: xr.DataArray
    faithfulness: float

    @property
    def agreement(self) -> float:
        """Correlation of estimated and exact effects over the nodes that were checked; NaN for fewer than three."""
        both = self.nodes.dropna()
        return float(both["estimate"].corr(both["exact"])) if len(both) > 2 else float("nan")

    @property
    def relative_error(self) -> float:
        """|estimate - exact| / |exact| over the nodes that were checked, Euclidean norms; NaN for none."""
        both = self.nodes.dropna()
        size = float(np.linalg.norm(both["exact"]))
        return float(np.linalg.norm(both["estimate"] - both["exact"])) / size if size else float("nan")

    def __str__(self) -> str:
        checked = int(self.nodes["exact"].notna().sum())
        lines = [
            f"{len(self.nodes)} of {self.scores.sizes['node']:,} nodes, faithfulness {self.faithfulness:.3f}",
            f"{checked} nodes patched exactly: the estimates' relative error is {self.relative_error:.3f}, "
            f"their correlation {self.agreement:.3f}",
            self.nodes.to_string(index=False, float_format=lambda v: f"{v:+.4f}", max_rows=30),
        ]
        if len(self.edges):
            lines += [
                "",
                f"edges, slopes of the corrupt run by rules {self.edges.attrs['rules']}: positive helps the clean answer",
                self.edges.head(20).to_string(index=False, float_format=lambda v: f"{v:+.4f}"),
            ]
        return "\n".join(lines)

    def to_networkx(self) -> nx.DiGraph:
        """Nodes with `estimate` and `exact`, edges with `weight`."""
        graph = nx.DiGraph()
        for row in self.nodes.itertuples():
            graph.add_node(row.node, estimate=row.estimate, exact=row.exact)
        graph.add_weighted_edges_from(self.edges[["source", "target", "weight"]].itertuples(index=False, name=None))
        return graph


def feature_circuit(
    model, pairs: PromptPairs, saes: Mapping[str, SAE] | SAE, *, n_nodes: int = 30, check: int = 10, edges: bool = True,
    rules: str | Rules = "gradient", steps: int | None = None, metric: str | Metric = "logit_diff",
    direction: Direction = "noise", at: Literal["base", "source", "both"] = "base",
) -> FeatureCircuit:  # fmt: skip
    """The n_nodes latents and error terms with the largest mean effects, the first `check` of them patched exactly.

    Other options as `feature_attribution`'s. edges: also score edges between nodes of neighbouring SAEs (`feature_edges`), by the
    same rules; by the plain gradient, and the table says so, where those lie between two runs.
    """
    if n_nodes < 1 or check < 0:
        raise OptionError(f"a circuit has at least 1 node and checks 0 or more, not {n_nodes} and {check}")
    saes = place_saes(model, saes)
    scores = feature_attribution(
        model, pairs, saes, rules=rules, steps=steps, metric=metric, direction=direction, at=at
    )  # fmt: skip
    mean = scores.mean("prompt").values
    order = np.argsort(-np.abs(mean), kind="stable")[:n_nodes]
    order = order[mean[order] != 0]
    names = scores["node"].values[order].tolist()
    exact = np.full(len(names), np.nan)
    if check and names:
        tested = feature_patching(model, pairs, saes, names[:check], metric=metric, direction=direction)
        exact[:check] = tested.mean("prompt").values
    nodes = pd.DataFrame({"node": names, "estimate": mean[order], "exact": exact})
    one_run = "gradient" if get_rules(rules).needs_source else rules
    found = feature_edges(model, pairs, saes, names, rules=one_run, metric=metric) if edges else _no_edges()
    return FeatureCircuit(nodes, found, scores, feature_faithfulness(model, pairs, saes, names, metric=metric))


@torch.no_grad()
def feature_faithfulness(
    model, pairs: PromptPairs, saes: Mapping[str, SAE] | SAE, nodes: Sequence[str], *, metric: str | Metric = "logit_diff",
    errors: Literal["nodes", "keep"] = "nodes",
) -> float:  # fmt: skip
    """How much of the behaviour is left when every latent and error term but these is at its corrupt value.

    Kept latents are what the SAE says of the activations of this very run, so that what is ablated below them shows.
    errors: "nodes" ablates the error terms that are not in `nodes`; "keep" keeps them all.
    """
    one_of(errors, ("nodes", "keep"), "treatment of error terms")
    saes, metric = place_saes(model, saes), get_metric(metric)
    parsed = [parse_feature(name, saes) for name in nodes]
    corrupt = splits(model, pairs, saes, "corrupt")
    logits = {s: logits_at(model, pairs.tokens(s), pairs.read_at, pairs.hooks(s)) for s in SIDES}
    hooks: list[tuple[str, Any]] = []
    for hook, sae in saes.items():
        mine = {i for at, i in parsed if at == hook} - {ERROR}  # a set: a latent that is named twice counts once
        kept = torch.tensor(sorted(mine), dtype=torch.int64, device=model.device)
        keep_error = errors == "keep" or (hook, ERROR) in parsed
        hooks += _ablating(hook, sae, corrupt[hook], kept, keep_error)
    end = run_at(model, pairs.clean, pairs.read_at, [*pairs.hooks("clean"), *hooks])
    values = {"circuit": end, **logits}
    means = {name: float(metric(value, pairs, logits["clean"]).double().mean()) for name, value in values.items()}
    gap = means["clean"] - means["corrupt"]
    return (means["circuit"] - means["corrupt"]) / gap if gap else float("nan")


def _ablating(hook: str, sae: SAE, corrupt, kept: Tensor, keep_error: bool) -> list[tuple[str, Any]]:
    seen: dict[str, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen["x"] = value

    def write(value: Tensor, hook: Any) -> Tensor:
        x = seen.pop("x", value).flatten(2).flatten(0, 1).to(sae.dtype)
        codes = sae.codes(x).dense() * sae.normalize(x)[1][0]
        codes = codes.unflatten(0, value.shape[:2])
        here = value.flatten(2).to(sae.dtype)
        out = corrupt.value + (codes - corrupt.codes)[..., kept] @ sae.W_dec[kept]
        if keep_error:  # all that is not latents, as it is in this run
            out = out + (here - corrupt.value) - (codes - corrupt.codes) @ sae.W_dec
        return out.to(value.dtype).reshape(value.shape)

    place = place_of(hook, sae)
    return [(hook, write)] if place == hook else [(hook, read), (place, write)]


def _no_edges() -> pd.DataFrame:
    return pd.DataFrame({"source": [], "target": [], "weight": []})


def feature_edges(
    model, pairs: PromptPairs, saes: Mapping[str, SAE] | SAE, nodes: Sequence[str], *, rules: str | Rules = "gradient",
    metric: str | Metric = "logit_diff",
) -> pd.DataFrame:  # fmt: skip
    """How much of each node's effect comes through each node of the SAE before it, strongest first: source, target, weight.

        weight(u -> v) = sum over positions of (c_u,clean - c_u,corrupt) <dS_v/da, w_u>,   S_v = sum of c_v * dM/dc_v,
        dM/dc_v held

    in the corrupt run, mean over prompts; one backward pass per target. SAEs are neighbours in the order in which the model
    reaches them; what goes from one to the other on any way counts, and only latents that fire in the corrupt run have a slope.
    A positive weight helps the clean answer, whatever the direction that nodes were scored in. Raises `RulesError` for rules that
    lie between two runs: an SAE inside was not run on both.
    """
    canonical(model, "Edges between latents")
    rules, metric, saes = get_rules(rules), get_metric(metric), place_saes(model, saes)
    if rules.needs_source:
        raise RulesError(f"rules {rules.name!r} lie between two runs, and edges between latents are slopes of one")
    places = {hook: place_of(hook, sae) for hook, sae in saes.items()}  # two may share one
    reached = list(record(model, pairs.corrupt[:1], places.values(), copy=False))  # in the order of the pass
    order = sorted(saes, key=lambda hook: reached.index(places[hook]))
    chosen: dict[str, list[int]] = {hook: [] for hook in saes}
    for name in nodes:
        hook, latent = parse_feature(name, saes)
        chosen[hook].append(latent)
    clean, corrupt = (splits(model, pairs, saes, side) for side in SIDES)
    rows = []
    for first, second in pairwise(order):
        if not chosen[first] or not chosen[second]:
            continue
        slopes = _slopes(model, pairs, saes, first, second, chosen[second], rules, metric)
        sae, change = saes[first], clean[first].codes - corrupt[first].codes
        moved = clean[first].value - corrupt[first].value
        for target, g in zip(chosen[second], slopes, strict=True):
            by_latent = (change * (g @ sae.W_dec.T)).sum((0, 1)) / len(pairs)
            rest = (g * moved).sum() / len(pairs) - by_latent.sum()
            for source in chosen[first]:
                weight = float(rest if source == ERROR else by_latent[source])
                rows.append((node_name(first, source), node_name(second, target), weight))
    table = pd.DataFrame(rows, columns=["source", "target", "weight"]) if rows else _no_edges()
    table.attrs["rules"] = rules.name
    return table.reindex(table["weight"].abs().sort_values(ascending=False, kind="stable").index).reset_index(drop=True)


def _slopes(
    model, pairs: PromptPairs, saes: Mapping[str, SAE], first: str, second: str, targets: Sequence[int], rules: Rules,
    metric: Metric,
) -> list[Float[Tensor, "prompt position d"]]:  # fmt: skip
    """dS_v / da at the first SAE's place, for each target v of the second."""
    sae, there = saes[second], {}
    place = place_of(second, sae)
    found = backward_scores(
        model, pairs, {place: Site("hook", place)}, [metric], rules=rules, side="corrupt", reduce=lambda s, g, c: g
    )  # fmt: skip
    m = found.scores[place][0].flatten(2).to(model.device)

    def cut(value: Tensor, hook: Any) -> Tensor:
        there["leaf"] = value.detach().requires_grad_()
        return there["leaf"]

    hooks = [*pairs.hooks("corrupt"), (place_of(first, saes[first]), cut)]
    hooks += [(name, lambda value, hook: there.update({hook.name: value})) for name in {second, place}]
    with torch.enable_grad():
        run_at(model, pairs.corrupt, pairs.read_at, hooks, rules=rules)
        x = there[second].flatten(2).flatten(0, 1).to(sae.dtype)
        seen, (factor, _) = sae.normalize(x)
        z = sae.magnitudes(sae.pre_activations(seen))
        fires = sae.codes(x.detach()).dense() != 0
        codes = (z if sae.config.architecture == "abstopk" else z.relu()) * fires * factor
        held = m.flatten(0, 1).to(sae.dtype)
        effects = held @ sae.W_dec.T  # dM/dc of every latent
        whole = (there[place].flatten(2).flatten(0, 1).to(sae.dtype) * held).sum()
        totals = [
            whole - (codes * effects).sum() if v == ERROR else (codes[:, v] * effects[:, v]).sum() for v in targets
        ]
    result = []
    leaf = there["leaf"]
    for total in totals:
        g = None
        if total.requires_grad:  # else no way leads from the one place to the other, as within a parallel layer
            (g,) = torch.autograd.grad(total, [leaf], retain_graph=True, allow_unused=True)
        result.append((torch.zeros_like(leaf) if g is None else g).flatten(2).to(sae.dtype))
    return result
