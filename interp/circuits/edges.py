"""Scores of every edge from a few passes: edge attribution patching, with any backward rule, and its integrated variants.

    score(u -> v) = sum over positions of (out_u of the source run - out_u of the base run) . m_v

m_v is what the backward pass delivers at v's own input, before its norm. With the plain gradient at the base run this is EAP
(Syed et al. 2310.10348), the first-order estimate of `edge_patching`; with the gradient averaged over a path it is EAP-IG
(Hanna et al. 2403.17806); with rules="relp" or "secant" the edges of those. Scores are per prompt and in the metric's unit.

What a component u writes to all its readers adds up to its node score: sum over v of score(u -> v) = `attribution`'s (where no
post-norm stands between). Under a post-norm, out_u is the difference that u alone makes to the normed sum.

Memory: readers are treated layer by layer, and so are writers against them, so that the widest tensors are one layer's readers
and one layer's writers. With L layers of H heads, d channels and float32, one prompt's token needs at most 4 d (4L + 29H)
bytes: both runs' streams, the readers' inputs with their graph, a layer's writers (`benchmarks/edges.py` measures
0.56 and 0.69 of that). Llama-3-8B's shape (L = H = 32, d = 4096): 17 MB, that is 260 MB for a prompt of 15 tokens beside the
model, where a [node, d_model] tensor of all 1,057 writers and 3,105 readers would take 68 MB a token. Prompts are chunked to
`max_memory`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits.ablations import Outputs
from interp.circuits.exact import edge_patching
from interp.circuits.gradients import Arrived, Trace, final_gradient, trace, walk_back
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.circuits.split import attn_written, heads_written
from interp.directions import BASES, SIDES, Direction, Side, metric_attrs, other_side, warn_small_gap
from interp.errors import OptionError, RulesError, one_of
from interp.exact import Announce
from interp.grids import position_labels
from interp.metrics import Metric, get_metric
from interp.model.config import ModelConfig
from interp.model.run import canonical, record
from interp.model.transformer import Transformer
from interp.paths import quadrature_points
from interp.precision import at_least_float32
from interp.provenance import provenance
from interp.rules import Rules, get_rules
from interp.sites import SITES
from interp.sweep import check_sweepable, chunk_ranges, memory_limit
from interp.tasks.pairs import PromptPairs

METHODS = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact")
LEVELS = ("edge", "node", "channel")


def edge_scores(
    model: Transformer, pairs: PromptPairs, *,
    method: Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact"] = "eap",
    rules: str | Rules = "gradient", steps: int | None = None, level: Literal["edge", "node", "channel"] = "edge",
    positions: Literal["all", "each"] = "all",
    metric: str | Callable | Metric = "logit_diff", direction: Direction = "denoise", normalize: bool = False,
    max_memory: int | None = None, batch_size: int | None = None, announce: Announce = None, progress: bool = False,
) -> xr.DataArray:  # fmt: skip
    """Estimated effect of patching every edge: [prompt, source, target], NaN where the model has no edge.

    method: "eap": multipliers of the base run, or between the runs if the rules compare two. "clean-corrupted": the mean of
        both runs' gradients. "eap-ig": the mean gradient while the token embeddings move from base to source; complete over
        the edges that leave the input. "eap-ig-activations": edges that leave a sublayer are scored while that sublayer's
        output moves and all else stays; complete over those edges, at 2 n_layers + 1 paths. (EAP-IG's code gives every edge
        the mean over all those paths.) "exact": `edge_patching`.
    rules: backward rules, see `interp.rules`; paths take rules of one run.
    steps: Gauss-Legendre points of a path (default 5).
    level: "node": what a component's score is, summed over what it writes to: [prompt, source]. "channel": the same by
        channel of its output: [prompt, source, channel], which EAP-IG calls neurons.
    positions: "each" keeps the position at which u writes and v reads, as a last axis: as many numbers as there are tokens.
    announce: is told the plan of exact patching before it begins.
    Signs, units, direction and the other options: see `activation_patching`. Needs a model from `load_model` without hooks.
    """
    one_of(method, METHODS, "method")
    one_of(level, LEVELS, "level")
    one_of(direction, BASES, "direction")
    one_of(positions, ("all", "each"), "choice of positions")
    canonical(model, "scoring edges")
    check_sweepable(model)
    rules, metric = get_rules(rules), get_metric(metric)
    rules.check(model)
    if steps is not None and "ig" not in method.split("-"):
        raise OptionError(f"method {method!r} takes no steps")
    if method not in ("eap", "exact") and rules.needs_source:
        raise RulesError(f"rules {rules.name!r} lie between the two runs, so a path between them adds nothing: use eap")
    if method == "exact":
        if level != "edge" or positions != "all" or rules.settings():
            raise OptionError(
                "exact scores are of edges, of all positions at once, and follow no rules; for nodes see activation_patching"
            )
        options = {"normalize": normalize, "max_memory": max_memory, "batch_size": batch_size, "progress": progress,
                   "announce": announce}  # fmt: skip
        return edge_patching(model, pairs, metric=metric, direction=direction, **options)
    line = quadrature_points(5 if steps is None else steps, "gauss")
    chunks = [part for chunk in pairs.chunks(batch_size) for part in _in_memory(model, chunk, len(line[0]), max_memory)]
    found, unpatched = [], []
    sides = BASES[direction]
    with tqdm(total=len(chunks) * len(sides), desc=method, unit="batch", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            both = Runs(model, chunk, metric, rules)
            unpatched.append(both.metrics())
            parts = []
            for side in sides:
                parts.append(both.scores(side, method, line, _Sheet(both, side, level, positions)))
                bar.update()
            found.append(parts[0] if len(parts) == 1 else (parts[0] - parts[1]) / 2)
    clean, corrupt = (torch.cat([u[side] for u in unpatched]) for side in SIDES)
    warn_small_gap(clean - corrupt, metric.name)
    values = torch.cat(found)
    if normalize:
        gap = (clean - corrupt).reshape(-1, *(1,) * (values.ndim - 1))
        values = values / torch.where(gap == 0, torch.nan, gap)
    axes = {"edge": ("source", "target"), "node": ("source",), "channel": ("source", "channel")}[level]
    names = {"source": writers(model.cfg), "target": readers(model.cfg), "channel": range(model.cfg.d_model)}
    coords = {axis: names[axis] for axis in axes}
    if positions == "each":
        axes = (*axes, "position")
        numbers = range(pairs.clean.shape[1])
        coords |= {"position": numbers, "token": ("position", position_labels(pairs, numbers))}
    coords = {"prompt": range(len(pairs)), **coords,
              "metric_clean": ("prompt", clean.numpy()), "metric_corrupt": ("prompt", corrupt.numpy())}  # fmt: skip
    attrs = {
        "method": method, "rules": rules.name, "switches": str(rules.settings()), "site": f"{level}s", "positions": positions,
        "steps": len(line[0]) if "ig" in method.split("-") else 0, "direction": direction, "normalized": int(normalize),
        **metric_attrs([metric], direction, normalize), **Graph.of(model.cfg).attrs(), **provenance(model, pairs),
    }  # fmt: skip
    values = values.numpy()
    if level == "edge":
        values[:, ~edge_mask(model.cfg)] = np.nan
    if positions == "each":
        np.moveaxis(values, -1, 1)[~pairs.is_token.cpu().numpy()] = np.nan
    return xr.DataArray(values, coords, ("prompt", *axes), attrs=attrs)


def how_scored(attrs: dict) -> str:
    """The method and, where they are not autograd's, the rules."""
    if attrs["method"] == "edge_patching":
        return "exact patching"
    return attrs["method"] if attrs["rules"] == "gradient" else f"{attrs['method']} with rules {attrs['rules']}"


@dataclass(frozen=True)
class Group:
    """Writers that write at the same place: the input ("stream"), a layer's heads, a layer's MLP."""

    cfg: ModelConfig
    kind: Literal["stream", "heads", "mlp"]
    layer: int = 0

    @staticmethod
    def all(cfg: ModelConfig) -> list["Group"]:
        """In forward order."""
        return [
            Group(cfg, "stream"),
            *(Group(cfg, kind, la) for la in range(cfg.n_layers) for kind in ("heads", "mlp")),
        ]

    @property
    def first(self) -> int:
        """The first of them in the order of `writers`."""
        if self.kind == "stream":
            return 0
        return 1 + self.layer * (self.cfg.n_heads + 1) + (self.cfg.n_heads if self.kind == "mlp" else 0)

    @property
    def rows(self) -> slice:
        """All of them."""
        return slice(self.first, self.first + (self.cfg.n_heads if self.kind == "heads" else 1))


class Runs:
    """Both runs of some pairs, and the scores of every edge between them."""

    def __init__(self, model: Transformer, pairs: PromptPairs, metric: Metric, rules: Rules):
        self.model, self.pairs, self.cfg, self.metric, self.rules = model, pairs, model.cfg, metric, rules
        start, n_layers = SITES["resid_pre"].hook(0), model.cfg.n_layers
        self.start, self.outputs, self.traces = {}, {}, {}
        for side in SIDES:
            values = record(model, pairs.tokens(side), [*Outputs.hooks(n_layers), start], pairs.hooks(side), copy=False)
            self.start[side], self.outputs[side] = values[start], Outputs.of(values, n_layers)
            self.traces[side] = trace(model, values[start])
        self.logits = {side: self._logits(self.traces[side], pairs.read_at) for side in SIDES}

    def metrics(self) -> dict[Side, Float[Tensor, " prompt"]]:
        """The metric of both runs, on the CPU."""
        return {side: self.metric(self.logits[side], self.pairs, self.logits["clean"]).cpu() for side in SIDES}

    def scores(self, base: Side, method: str, line: tuple[list[float], list[float]], sheet: "_Sheet") -> Tensor:
        """[prompt, ...] as `edge_scores` lays them out, on the CPU; what has no edge is 0."""
        if method == "eap-ig-activations":
            self._along_outputs(sheet, line)
        elif method == "eap-ig":
            first, last = self.start[base], self.start[other_side(base)]
            rows = torch.cat([first + p * (last - first) for p in line[0]])
            sheet.contract(self._backwards(trace(self.model, rows), base), line[1])
        elif method == "clean-corrupted":
            for side in SIDES:
                sheet.contract(self._backwards(self.traces[side], side), [0.5])
        else:
            other = self.traces[other_side(base)] if self.rules.needs_source else None
            sheet.contract(self._backwards(self.traces[base], base, other), [1.0])
        return sheet.values.cpu()

    def _along_outputs(self, sheet: "_Sheet", line: tuple[list[float], list[float]]) -> None:
        """One path per sublayer: its output moves, and what comes after it is run again."""
        base, points = sheet.base, line[0]
        middle, after = self.traces[base].middle, [*self.traces[base].before[1:], self.traces[base].final]
        move = lambda stream, change: torch.cat([stream + p * change for p in points])  # noqa: E731
        change = self.start[other_side(base)] - self.start[base]
        sheet.contract(
            self._backwards(trace(self.model, move(self.start[base], change)), base),
            line[1],
            only=Group(self.cfg, "stream"),
        )
        for layer, block in enumerate(self.model.blocks):
            mine, theirs = (self.outputs[side] for side in (base, other_side(base)))
            heads, mlp = Group(self.cfg, "heads", layer), Group(self.cfg, "mlp", layer)
            change = attn_written(block, theirs.z[layer]) - attn_written(block, mine.z[layer])
            if self.cfg.parallel:
                moved, begin = trace(self.model, move(after[layer], change), first=layer + 1), False
            else:
                moved, begin = trace(self.model, move(middle[layer], change), first=layer, middle=True), True
            sheet.contract(self._backwards(moved, base, down_to_mlp=begin), line[1], only=heads)
            moved = trace(self.model, move(after[layer], theirs.mlp[layer] - mine.mlp[layer]), first=layer + 1)
            sheet.contract(self._backwards(moved, base), line[1], only=mlp)

    def _backwards(self, run: Trace, side: Side, other: Trace | None = None, **options) -> Iterator[Arrived]:
        """Gradients at all readers of a run that may be several copies of the prompts."""
        copies = len(run.final) // len(self.pairs)
        rows = self.pairs if copies == 1 else self.pairs.take(
            torch.arange(len(self.pairs), device=run.final.device).repeat(copies)
        )  # fmt: skip
        seed = self.metric.multipliers(
            self._logits(run, rows.read_at), rows, self.logits["clean"].repeat(copies, 1),
            None if other is None else self.logits[other_side(side)],
        )  # fmt: skip
        gradient = final_gradient(
            self.model, run.final, rows.read_at, seed, rules=self.rules, other=None if other is None else other.final
        )
        yield Arrived(self.cfg.n_layers, "logits", gradient[None], None)
        yield from walk_back(self.model, run, gradient, rules=self.rules, other=other, **options)

    @torch.no_grad()
    def _logits(self, run: Trace, read_at: Tensor) -> Float[Tensor, "row d_vocab"]:
        return self.model.unembed_resid(run.final[torch.arange(len(read_at), device=read_at.device), read_at])


class _Sheet:
    """Contracts gradients with what each writer changes, a layer's heads or its MLP at a time."""

    def __init__(self, runs: Runs, base: Side, level: str, positions: str):
        self.runs, self.base, self.cfg, self.level, self.each = runs, base, runs.cfg, level, positions == "each"
        n_writers, n_readers = edge_mask(self.cfg).shape
        shape = {"edge": (n_writers, n_readers), "node": (n_writers,), "channel": (n_writers, self.cfg.d_model)}[level]
        shape = (*shape, runs.pairs.clean.shape[1]) if self.each else shape
        wide = torch.promote_types(runs.model.dtype, torch.float32)
        self.values = torch.zeros(len(runs.pairs), *shape, dtype=wide, device=runs.pairs.clean.device)

    @torch.no_grad()
    def contract(self, gradients: Iterator[Arrived], weights: list[float], *, only: Group | None = None) -> None:
        """Add the scores of these gradients, a weighted sum over copies of the prompts.

        only: of these writers, at which the run begins.
        """
        for arrived in gradients:
            if self.level == "edge" and arrived.inputs is not None:
                self._edges(arrived, _weighted(arrived.inputs, weights), only)
            elif self.level != "edge" and arrived.written is not None:
                at_start = arrived.kind == "stream"
                group = only if at_start and only is not None else Group(self.cfg, arrived.kind, arrived.layer)
                if only is None or at_start:
                    self._nodes(group, _weighted(arrived.written, weights))

    def _edges(
        self, arrived: Arrived, inputs: Float[Tensor, "reader prompt position d_model"], only: Group | None
    ) -> None:
        heads = self.cfg.n_heads
        first = arrived.layer * (3 * heads + 1) + (3 * heads if arrived.kind == "mlp" else 0)
        columns = slice(first, first + len(inputs))
        before = Group(self.cfg, arrived.kind, arrived.layer).first if arrived.kind != "logits" else len(self.values[0])
        if arrived.kind == "mlp" and self.cfg.parallel:
            before -= heads
        inputs = at_least_float32(inputs).movedim(1, 0)
        for group in [only] if only is not None else Group.all(self.cfg):
            if group.first >= before:
                continue
            change = self._change(group)
            if self.each:
                found = (change.transpose(1, 2) @ inputs.permute(0, 2, 3, 1)).permute(0, 2, 3, 1)
            else:
                found = change.flatten(2) @ inputs.flatten(2).transpose(1, 2)
            self.values[:, group.rows, columns] += found

    def _nodes(self, group: Group, gradient: Float[Tensor, "prompt position d_model"]) -> None:
        product = self._change(group) * at_least_float32(gradient)[:, None]
        product = product.transpose(2, 3) if self.level == "channel" else product.sum(-1)
        self.values[:, group.rows] += product if self.each else product.sum(-1)

    def _change(self, group: Group) -> Float[Tensor, "prompt writer position d_model"]:
        """What these components write in the source run, less what they write in the base run."""
        runs, layer = self.runs, group.layer
        mine, theirs = runs.outputs[self.base], runs.outputs[other_side(self.base)]
        if group.kind == "stream":
            change = (runs.start[other_side(self.base)] - runs.start[self.base])[:, None]
        elif group.kind == "mlp":
            change = (theirs.mlp[layer] - mine.mlp[layer])[:, None]
        else:
            block = runs.model.blocks[layer]
            change = heads_written(block, (theirs.z[layer] - mine.z[layer])[None])[0].movedim(1, 0)
            if self.cfg.post_norm:
                together = block.attn.output(mine.z[layer])[:, None]
                change = block.ln1_post.plain(together + change) - block.ln1_post.plain(together)
        return at_least_float32(change)


def _weighted(gradient: Float[Tensor, "*_ row position d_model"], weights: list[float]) -> Tensor:
    """The weighted sum over copies of the prompts."""
    copies = gradient.unflatten(-3, (len(weights), -1)).unbind(-4)
    return sum(weight * part for weight, part in zip(weights, copies, strict=True))


def bytes_per_prompt(cfg: ModelConfig, n_tokens: int, copies: int, element_size: int) -> int:
    """Estimated peak of scoring edges, beside the model and the scores themselves; see the module."""
    streams = 4 * cfg.n_layers + 28 * cfg.n_heads * copies + cfg.n_heads
    return n_tokens * cfg.d_model * streams * element_size


def _in_memory(model: Transformer, pairs: PromptPairs, copies: int, max_memory: int | None) -> list[PromptPairs]:
    """The prompts in pieces that fit."""
    one = bytes_per_prompt(model.cfg, pairs.clean.shape[1], copies, model.W_E.element_size())
    ranges = chunk_ranges(np.full(len(pairs), one), memory_limit(model.device, max_memory))
    device = pairs.clean.device
    return [pairs.take(torch.arange(first, last, device=device)) for first, last in ranges]
