"""Exact edge patching: the direct effect of every edge of the model's graph.

Patching the edge u -> v changes what v reads, and only what v reads, by the difference of u's output between the two
runs; everything downstream of v then reacts.

    scores = edge_patching(model, pairs)                              # [prompt, source, target], NaN where there is no edge
    scores.sel(source="a2.h1", target="a3.h0<q>")

Edges are grouped by the layer of their target: one batch recomputes the queries, keys, values and MLP outputs of a layer
for many sources, each at once for all heads, and a sweep takes the results through the layers after it. An edge into the
logits needs no more than a norm. Head outputs under a post-norm are differences of normed sums, as in EAP-IG.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits.graph import Graph, edge_mask, readers, select_edges, writers
from interp.directions import BASES, Direction, metric_attrs, warn_small_gap
from interp.errors import OptionError, one_of
from interp.exact import SIDES, Announce, Reader
from interp.interventions import Values
from interp.metrics import Metric, get_metric
from interp.model import ops
from interp.model.transformer import Transformer
from interp.provenance import provenance
from interp.rows import ALL, N_STAGES, STAGE, Entries, Plan
from interp.rules import GRADIENT
from interp.sites import SITES, Node, parse_node
from interp.sweep import (
    SweepPlan,
    both_runs,
    check_sweepable,
    chunk_ranges,
    differing,
    flops_per_token,
    in_halves,
    memory_limit,
    row_bytes,
    row_flops,
)
from interp.tasks.pairs import PromptPairs
from interp.walk import Walk


def edge_patching(
    model: Transformer, pairs: PromptPairs, *, edges: str | Sequence[str] | None = None,
    metric: str | Callable | Metric = "logit_diff", direction: Direction = "denoise",
    normalize: bool = False, max_memory: int | None = None, batch_size: int | None = None, announce: Announce = None,
    progress: bool = False,
) -> xr.DataArray:  # fmt: skip
    """Exact direct effect of patching single edges: [prompt, source, target], NaN where none was asked for.

        score(u -> v) = metric(run in which v alone reads out_u of the other run) - metric(base run)

    edges: ids such as "a0.h1->m2", "m0->a1.h2<q>", "m3->logits" (default: every edge of the model, `interp.circuits.graph`). Keys
        and values are edges of each query head, also where heads share them.
    Other options, units and signs: see `interp.activation_patching`. Needs a model from `load_model` without hooks.
    """
    one_of(direction, BASES, "direction")
    check_sweepable(model)
    if len(BASES[direction]) > 1:
        options = {"edges": edges, "metric": metric, "normalize": normalize, "max_memory": max_memory,
                   "batch_size": batch_size, "announce": announce, "progress": progress}  # fmt: skip
        there, back = (edge_patching(model, pairs, direction=one, **options) for one in ("denoise", "noise"))
        attrs = {"direction": direction, **metric_attrs([get_metric(metric)], direction, normalize)}
        return ((there - back) / 2).assign_attrs({**there.attrs, **attrs})
    metric, cfg = get_metric(metric), model.cfg
    chosen = edge_mask(cfg) if edges is None else select_edges(cfg, [edges] if isinstance(edges, str) else edges)
    if not chosen.any():
        raise OptionError("no edges to patch")
    batches = pairs.chunks(batch_size)
    if announce is not None:
        announce(plan_edges(model, batches, chosen, max_memory=max_memory))
    values = np.full((len(pairs), *chosen.shape), np.nan, dtype=np.float32)
    (base,), first, unpatched = BASES[direction], 0, []
    with tqdm(
        total=len(batches) * int(chosen.sum()), desc="edges", unit="edge", disable=not progress, leave=False
    ) as bar:
        for batch in batches:
            runs, read = (
                EdgeRuns(model, batch, base=base, max_memory=max_memory),
                Reader(batch, [metric], model, first=first),
            )
            unpatched.append(read.unpatched(runs.final_resid))
            before = unpatched[-1][base][0]
            values = values.astype(np.promote_types(values.dtype, before.numpy().dtype), copy=False)
            part = values[first : first + len(batch)]
            part[:, chosen] = 0.0  # what has no row changes nothing
            for source, target, prompts, resid in runs.run(chosen, bar.update):
                part[prompts.cpu(), source, target] = (read.rows(resid, prompts)[0] - before[prompts.cpu()]).numpy()
            first += len(batch)
    clean, corrupt = (torch.cat([u[side][0] for u in unpatched]) for side in SIDES)
    warn_small_gap(clean - corrupt, metric.name)
    if normalize:
        gap = (clean - corrupt).numpy()[:, None, None]
        values = values / np.where(gap == 0, np.nan, gap)
    kept = np.flatnonzero(chosen.any(1)), np.flatnonzero(chosen.any(0))
    coords = {
        "prompt": range(len(pairs)), "source": np.array(writers(cfg))[kept[0]], "target": np.array(readers(cfg))[kept[1]],
        "metric_clean": ("prompt", clean.numpy()), "metric_corrupt": ("prompt", corrupt.numpy()),
    }  # fmt: skip
    attrs = {"method": "edge_patching", "site": "edges", "direction": direction, "normalized": int(normalize),
             **metric_attrs([metric], direction, normalize), **Graph.of(cfg).attrs(), **provenance(model, pairs)}  # fmt: skip
    return xr.DataArray(values[:, kept[0]][:, :, kept[1]], coords, ("prompt", "source", "target"), attrs=attrs)


class EdgeRuns:
    """All edges into one layer at a time, on one set of pairs."""

    def __init__(
        self,
        model: Transformer,
        pairs: PromptPairs,
        *,
        base: Literal["clean", "corrupt"],
        max_memory: int | None = None,
    ):
        self.model, self.pairs, self.cfg = model, pairs, model.cfg
        self.max_memory = memory_limit(model.device, max_memory)
        n_layers, stream = model.cfg.n_layers, ["attn_out"] if model.cfg.parallel else ["attn_out", "resid_mid"]
        sites = ["resid_pre", "q", "k", "v", "head", *stream, "mlp_out"]
        names = [SITES[site].hook(layer) for site in sites for layer in range(n_layers)]
        runs = both_runs(model, pairs, [*names, SITES["resid_post"].hook(n_layers - 1)])
        self.base, self.other = runs[base], runs["corrupt" if base == "clean" else "clean"]
        at_end = torch.arange(len(pairs), device=pairs.clean.device), pairs.read_at
        self.final_resid = {side: run[SITES["resid_post"].hook(n_layers - 1)][at_end] for side, run in runs.items()}
        self.base_end = self.base[SITES["resid_post"].hook(n_layers - 1)][at_end]
        self.places = model.places(pairs.clean.shape[1])
        self.first_change = _first_change(pairs)
        self.nodes = [parse_node(name) for name in writers(model.cfg)]

    @torch.no_grad()
    def run(
        self, chosen: np.ndarray, update: Callable[[int], object] = lambda n: None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor, Tensor]]:
        """Chunk by chunk: each row's source, target and prompt, and its final residual stream where it is read.

        chosen: [source, target], the edges wanted.
        """
        alive = self.first_change < self.pairs.lengths.cpu().numpy()
        for layer in range(self.cfg.n_layers):
            mine, sources = _of_layer(chosen, layer, self.cfg)
            rows = edge_rows(mine, sources, layer, self.cfg, self.pairs, self.first_change)
            ranges = chunk_ranges(source_bytes(self.model, self.pairs, rows, sources, mine.shape[1]), self.max_memory)

            def work(first: int, last: int, layer=layer, mine=mine, sources=sources):
                return self._into_layer(layer, mine, sources[first:last])

            for found in in_halves(ranges, work, f"the edges of one source on {len(self.pairs)} prompts"):
                if found is not None:
                    yield found
            update(int(mine.sum()))
        sources = np.flatnonzero(chosen[:, -1])
        for source in sources if alive.any() else ():
            prompts = torch.from_numpy(np.flatnonzero(alive)).to(self.pairs.clean.device)
            change = self._contribution(self.nodes[source])[prompts, self.pairs.read_at[prompts]]
            where = np.full(len(prompts), chosen.shape[1] - 1)
            yield np.full(len(prompts), source), where, prompts, self.base_end[prompts] + change
        update(len(sources))

    def _into_layer(self, layer: int, mine: np.ndarray, sources: np.ndarray):
        rows = edge_rows(mine, sources, layer, self.cfg, self.pairs, self.first_change)
        if not len(rows):
            return None
        change = torch.stack([self._contribution(self.nodes[source]) for source in sources])
        given = self._rereading(layer, change, heads=bool((layer, "head") in rows.entries))
        order, resid = Walk(self.model, self.pairs, rows, self.base, given).final_resid()
        source, target = np.divmod(rows.cell[order], mine.shape[1])
        prompts = torch.from_numpy(rows.prompt[order]).to(self.pairs.clean.device)
        return source, target, prompts, resid

    def _value(self, site: str, layer: int) -> Tensor:
        return self.base[SITES[site].hook(layer)]

    def _contribution(self, node: Node) -> Float[Tensor, "prompt position d_model"]:
        """What a writer adds to the residual stream in the other run, less what it adds in the base run."""
        if node.kind == "input":
            hook = SITES["resid_pre"].hook(0)
            return self.other[hook] - self.base[hook]
        if node.kind == "mlp":
            hook = SITES["mlp_out"].hook(node.layer)
            return self.other[hook] - self.base[hook]
        block, hook = self.model.blocks[node.layer], SITES["head"].hook(node.layer)
        if not self.cfg.post_norm:
            return (self.other[hook] - self.base[hook])[:, :, node.index] @ block.attn.W_O[node.index]
        z = self.base[hook].clone()
        z[:, :, node.index] = self.other[hook][:, :, node.index]
        return block.ln1_post.plain(block.attn.output(z)) - self._value("attn_out", node.layer)

    def _rereading(self, layer: int, change: Float[Tensor, "source prompt position d_model"], *, heads: bool) -> Values:
        """What a layer's components put out when they read a changed stream, as values [(reading, source, prompt), ...].

        Heads: z with a changed query, then with a changed key, then with a changed value. MLP: its output.
        """
        block, cfg, n_sources = self.model.blocks[layer], self.cfg, len(change)
        given: Values = {}
        if heads:
            stream = self._value("resid_pre", layer) + change
            normed = block.ln1.plain(stream) if cfg.pre_norm else stream
            attn = block.attn
            rotation = None if attn.rotary is None else self.places.rotations[attn.rotary]
            base = {x: self._value(x, layer).repeat(n_sources, 1, 1, 1) for x in "qkv"}
            z = []
            for changed in "qkv":
                q, k, v = (attn.project(x, normed).flatten(0, 1) if x == changed else base[x] for x in "qkv")
                q, k = attn.place("q", q, rotation, GRADIENT), attn.place("k", k, rotation, GRADIENT)
                scores = ops.attention_scores(q, k, scale=attn.scale, softcap=cfg.attn_softcap, rules=GRADIENT)
                scores = scores.masked_fill(self.places.masks[attn.window], -torch.inf)
                z.append(ops.attention_mix(ops.attention_pattern(scores, GRADIENT), v, GRADIENT))
            given[SITES["head"].hook(layer)] = torch.cat(z)
        stream = self._value("resid_pre" if cfg.parallel else "resid_mid", layer) + change
        normed = (block.ln1 if cfg.shared_norm else block.ln2).plain(stream) if cfg.pre_norm else stream
        mlp_out = block.mlp.output(block.mlp.neurons(normed, GRADIENT))
        mlp_out = block.ln2_post.plain(mlp_out) if cfg.post_norm else mlp_out
        return given | {SITES["mlp_out"].hook(layer): mlp_out.flatten(0, 1)}


def _first_change(pairs: PromptPairs) -> np.ndarray:
    """[prompt]: the first position at which the two runs differ; the prompt's length where they do not."""
    differs = differing(pairs, "other")
    return np.where(differs.any(1), differs.argmax(1), pairs.lengths.cpu().numpy())


def _of_layer(chosen: np.ndarray, layer: int, cfg) -> tuple[np.ndarray, np.ndarray]:
    """The wanted edges into one layer's heads and MLP [source, target], and their sources."""
    per_layer = 3 * cfg.n_heads + 1
    mine = np.zeros_like(chosen)
    columns = slice(layer * per_layer, (layer + 1) * per_layer)
    mine[:, columns] = chosen[:, columns]
    return mine, np.flatnonzero(mine.any(1))


def edge_rows(mine: np.ndarray, sources: np.ndarray, layer: int, cfg, pairs: PromptPairs, first: np.ndarray) -> Plan:
    """As a plan whose entries' "prompt" is a row of the values that `EdgeRuns` computes for these sources."""
    n_heads, n_prompts = cfg.n_heads, len(pairs)
    lengths = pairs.lengths.cpu().numpy()
    which, target = mine[sources].nonzero()
    edge, prompt = np.meshgrid(np.arange(len(which)), np.flatnonzero(first < lengths), indexing="ij")
    edge, prompt = edge.ravel(), prompt.ravel()
    column = target[edge] - layer * (3 * n_heads + 1)
    cell = sources[which[edge]] * mine.shape[1] + target[edge]
    order = np.lexsort((cell, prompt, lengths[prompt], first[prompt]))
    edge, prompt, column, cell = edge[order], prompt[order], column[order], cell[order]
    into_head = column < 3 * n_heads
    value = which[edge] * n_prompts + prompt
    entries = {}
    for site, here in (("head", into_head), ("mlp_out", ~into_head)):
        if here.any():
            reading, head = np.divmod(column[here], n_heads)
            place = reading * len(sources) * n_prompts if site == "head" else 0
            nowhere = np.full(int(here.sum()), ALL)
            unit = head if site == "head" else np.full(len(nowhere), -1)
            entries[layer, site] = Entries(np.flatnonzero(here), value[here] + place, nowhere, unit, nowhere)
    n = len(cell)
    begin = layer * N_STAGES + np.where(into_head, STAGE["head"], STAGE["mlp_out"])
    return Plan(
        cell,
        prompt,
        first[prompt],
        lengths[prompt],
        begin,
        np.full(n, layer + 1),
        np.full(n, -1),
        cfg.n_layers,
        entries,
    )


def source_bytes(model: Transformer, pairs: PromptPairs, rows: Plan, sources: np.ndarray, n_targets: int) -> np.ndarray:
    """Estimated peak bytes of each source: of its rows, and of the layer that rereads the stream for it."""
    cfg, (n_prompts, width) = model.cfg, pairs.clean.shape
    of_rows = np.bincount(np.searchsorted(sources, rows.cell // n_targets), row_bytes(model, rows), len(sources))
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    reread = 3 * cfg.d_model + 6 * q + 4 * kv + 2 * cfg.n_heads * width + 2 * cfg.d_mlp
    return of_rows + model.W_E.element_size() * n_prompts * width * reread


def plan_edges(
    model: Transformer, batches: Sequence[PromptPairs], chosen: np.ndarray, *, max_memory: int | None = None
) -> SweepPlan:
    """What patching the chosen edges [source, target] on every batch of prompts will do."""
    cfg, per_token, limit = model.cfg, sum(flops_per_token(model.cfg)), memory_limit(model.device, max_memory)
    rows, chunks, flops, naive, peak = 0, 0, 0.0, 0.0, 0.0
    for pairs in batches:
        first = _first_change(pairs)
        plain = pairs.clean.numel() * cfg.n_layers * per_token
        flops, naive = flops + 2 * plain, naive + (2 + int(chosen.sum())) * plain
        rows += int(chosen[:, -1].sum()) * int((first < pairs.lengths.cpu().numpy()).sum())
        for layer in range(cfg.n_layers):
            mine, sources = _of_layer(chosen, layer, cfg)
            part = edge_rows(mine, sources, layer, cfg, pairs, first)
            cost = source_bytes(model, pairs, part, sources, chosen.shape[1])
            ranges = chunk_ranges(cost, limit)
            rows, chunks = rows + len(part), chunks + len(ranges)
            # the targets read the stream anew for each source
            flops += row_flops(cfg, part) + len(sources) * pairs.clean.numel() * per_token
            peak = max([peak, *(cost[a:b].sum() for a, b in ranges)])
    return SweepPlan(int(chosen.sum()), sum(map(len, batches)), rows, chunks, flops, naive, int(peak))
