"""The main job: where in this network does the behaviour live?

    discovery = discover(model, load_task("ioi", model))
    discovery.ranking            # every head and MLP: effect, interval, whether it stands out
    discovery.report("report.html")

One call patches the residual stream, attention and MLP outputs at every position and every head as a whole, exactly; or,
with `rules=`, scores them from one backward pass and patches a sample to say how far off that is. It ranks heads and MLPs
with bootstrap intervals over prompts; marks those that stand out by two standard deviations; and checks the ranking by
intervention: keep only the top n, ablate the rest, see how much of the metric comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from interp.baseline import describe, first_pair
from interp.checking import SpotCheck, spot_check
from interp.circuits.discovery import CircuitDiscovery, discover_circuit
from interp.circuits.node_faithfulness import ABLATIONS, node_faithfulness
from interp.directions import BASES, Direction
from interp.errors import OptionError, name_some, one_of
from interp.exact import Announce
from interp.metrics import Metric, get_metric
from interp.model.transformer import Transformer
from interp.node_attribution import attribution
from interp.patching import activation_patching, patch_nodes
from interp.rules import Rules
from interp.sites import parse_node
from interp.statistics import bootstrap_mean, detected
from interp.tasks.pairs import PromptPairs


@dataclass
class Discovery:
    """What `discover` found. `effects` are per prompt; `ranking` has one row per head and MLP, strongest first."""

    pairs: PromptPairs
    effects: xr.Dataset  # by position: resid_pre, attn_out, mlp_out and the strongest heads
    nodes: xr.DataArray  # [prompt, node]: each head and MLP patched at all positions
    ranking: pd.DataFrame
    faithfulness: xr.Dataset
    random_faithfulness: xr.Dataset  # the same curve for nodes in random order
    summary: dict[str, float]
    notes: list[str] = field(default_factory=list)
    agreement: SpotCheck | None = None  # of an approximate map with exact patching
    corrupt_strings: tuple[str, ...] | None = None  # tokens of the first corrupt prompt
    answer_strings: tuple[str, ...] = ()  # answers to the first clean prompt
    wrong_strings: tuple[str, ...] = ()

    @property
    def attrs(self) -> dict:
        """How the numbers were made: model, task, metric, unit, sign, direction, corruption, versions."""
        return self.nodes.attrs

    def __repr__(self) -> str:
        a, top = self.attrs, ", ".join(self.ranking.node[:4])
        n_found = int(self.ranking.detected.sum())
        return f"Discovery({a['model']} on {a['task']}, {a['direction']}: {n_found} components stand out, first {top})"

    def text(self, n: int = 12) -> str:
        """Baselines, the n strongest components and notes, for a terminal."""
        a, s = self.attrs, self.summary
        table = self.ranking.head(n)[["node", "effect", "low", "high", "share", "detected"]]
        curve = self.faithfulness
        reached = [int(k) for k, r in zip(curve.n.values, curve.recovered.values, strict=True) if r >= 0.9]
        lines = [
            f"{a['model']} on {a['task']} ({a['corruption']}), {a['direction']}, {a['n_prompts']} pairs: {a['metric']} "
            f"{s['metric_clean']:.3f} clean, {s['metric_corrupt']:.3f} corrupt; first choice right on "
            f"{s['accuracy_clean']:.0%} of the clean prompts",
            "",
            table.to_string(index=False, float_format=lambda v: f"{v:+.3f}"),
            "",
            f"effect in {a['unit'] or 'the metric'}, {a['sign']}; low, high: 95 % bootstrap over prompts; "
            "share of clean - corrupt",
            f"{reached[0]} of {curve.attrs['n_nodes']} components recover at least 90 % "
            f"({curve.attrs['ablation']} ablation of the rest)",
        ]  # fmt: skip
        if self.agreement is not None:
            lines += ["", f"approximate effects, rules {a['rules']} ({a['gradient_at']}): {self.agreement}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        return self.ranking.head(12).round(3).to_html(index=False)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page and return its path."""
        from interp.report import write_report

        return write_report(self, path)


def discover(
    model, pairs: PromptPairs, *, level: Literal["node", "edge"] = "node", rules: str | Rules | None = None,
    metric: str | Callable | Metric | None = None,
    direction: Direction | None = None, ablation: str = "corrupt",
    engine: Literal["sweep", "hooks"] = "sweep", top_heads: int = 4, max_memory: int | None = None,
    batch_size: int | None = None, seed: int = 0, announce: Announce = None, progress: bool = False, **of_edges,
) -> Discovery | CircuitDiscovery:  # fmt: skip
    """Node scores, ranking, detection and faithfulness in one call; with level="edge" a circuit of edges, tested.

    level: "edge" hands over to `interp.circuits.discovery.discover_circuit` and takes its options as well: method, n_edges,
        target, by, search, n_resamples.
    rules: None patches every place exactly. A rule set (`interp.rules`) scores them from one backward pass instead; then a
    sample of places is patched exactly as well (all of them where that is cheap) and `agreement` says how far the map is off.
    metric: default is the one the pairs are usually scored with. ablation: what replaces components outside the circuit
    in the faithfulness check. top_heads: how many of the strongest heads are also patched position by position. engine,
    max_memory, announce: see `activation_patching`. direction: default "denoise" for nodes, "noise" for edges.
    """
    one_of(level, ("node", "edge"), "level")
    if level == "edge":
        if engine != "sweep":
            raise OptionError('edges are patched by engine "sweep" only')
        options = {"rules": rules, "metric": metric, "ablation": ablation, "max_memory": max_memory, "seed": seed,
                   "batch_size": batch_size, "announce": announce, "progress": progress}  # fmt: skip
        if rules is not None:
            of_edges.setdefault("method", "eap")
        return discover_circuit(model, pairs, direction=direction or "noise", **options, **of_edges)
    if strange := set(of_edges) - {"method", "n_edges", "target", "by", "search", "n_resamples"}:
        raise TypeError(f"discover has no option {', '.join(sorted(strange))}")
    if of_edges:
        raise OptionError(f'{name_some(list(of_edges))}: for level="edge" only')
    direction = one_of(direction or "denoise", BASES, "direction")
    one_of(ablation, ABLATIONS, "ablation")
    metric = get_metric(pairs.metric if metric is None else metric)
    runs = {
        "engine": engine,
        "max_memory": max_memory,
        "batch_size": batch_size,
        "progress": progress,
        "announce": announce,
    }
    options = {"metric": metric, "direction": direction}
    sites, agreement = _residual_sites(model), None
    if rules is None:
        effects = activation_patching(model, pairs, sites, **options, **runs)
        whole = activation_patching(model, pairs, ["head", "mlp_out"], positions="all", **options, **runs)
    else:
        score = partial(attribution, model, pairs, rules=rules, batch_size=batch_size, **options)
        effects, whole = score(sites), score(["head", "mlp_out"], positions="all")
        checked = {name: value for name, value in runs.items() if name != "engine"}
        agreement = spot_check(model, pairs, score([*sites, "head"]), metric=metric, seed=seed, **checked)
    nodes = _as_nodes(whole)
    ranking = rank(nodes, seed=seed)
    heads = [n for n in ranking.node if n.startswith("a")][:top_heads]
    if heads and rules is None:
        effects["top_heads"] = patch_nodes(model, pairs, heads, **options, **runs)
    elif heads:
        effects["top_heads"] = _of_heads(score("head"), heads)
    curve = {"metric": metric, "ablation": ablation, "seed": seed, **runs}
    faithfulness = node_faithfulness(model, pairs, list(ranking.node), **curve)
    shuffled = list(np.random.default_rng(seed).permutation(ranking.node.to_numpy()))
    random_faithfulness = node_faithfulness(
        model, pairs, shuffled, sizes=faithfulness.n.values[:: max(1, len(faithfulness.n) // 12)].tolist(), **curve
    )
    summary, notes = describe(model, pairs, nodes, metric)
    return Discovery(
        pairs, effects, nodes, ranking, faithfulness, random_faithfulness, summary, notes, agreement,
        **first_pair(model, pairs),
    )  # fmt: skip


def _residual_sites(model) -> list[str]:
    sites = ["resid_pre", "attn_out", "mlp_out"]
    # a TransformerBridge's resid_mid is what its MLP reads, not the stream itself
    has_mid = isinstance(model, Transformer) and not model.cfg.parallel
    return [sites[0], "resid_mid", *sites[1:]] if has_mid else sites


def _of_heads(scores: xr.DataArray, heads: list[str]) -> xr.DataArray:
    """[prompt, node, position]: some heads of site "head"."""
    parsed = [parse_node(head) for head in heads]
    chosen = scores.sel(
        layer=xr.DataArray([n.layer for n in parsed], dims="node"),
        head=xr.DataArray([n.index for n in parsed], dims="node"),
    )
    chosen = chosen.drop_vars(["layer", "head", "node"]).transpose("prompt", "node", "position")
    return chosen.assign_coords(node=heads).assign_attrs(site="nodes")


def _as_nodes(whole: xr.Dataset) -> xr.DataArray:
    """[prompt, node] with heads and MLPs side by side in forward order."""
    heads, mlps = whole["head_out"], whole["mlp_out"]
    values, ids = [], []
    for layer in heads["layer"].values:
        for head in heads["head"].values:
            values.append(heads.sel(layer=layer, head=head).values)
            ids.append(f"a{layer}.h{head}")
        values.append(mlps.sel(layer=layer).values)
        ids.append(f"m{layer}")
    keep = {name: mlps[name] for name in ("metric_clean", "metric_corrupt")}
    array = xr.DataArray(
        np.stack(values, 1), dims=("prompt", "node"), coords={"prompt": mlps.prompt, "node": ids, **keep}
    )
    return array.assign_attrs({**whole.attrs, "site": "head, mlp_out"})


def rank(nodes: xr.DataArray, *, seed: int = 0) -> pd.DataFrame:
    """Components by size of their mean effect: node, layer, kind, effect, low, high (95 % BCa), detected, share of gap."""
    mean, low, high = bootstrap_mean(nodes.values, seed=seed)
    gap = float((nodes.metric_clean - nodes.metric_corrupt).mean())
    parsed = [parse_node(n) for n in nodes.node.values]
    table = pd.DataFrame(
        {
            "node": nodes.node.values.astype(str),
            "layer": [n.layer for n in parsed],
            "kind": [n.kind for n in parsed],
            "effect": mean,
            "low": low,
            "high": high,
            "share": mean / gap if gap else np.nan,
            "detected": detected(mean),
        }
    )
    return table.sort_values("effect", key=lambda column: -column.abs(), kind="stable").reset_index(drop=True)
