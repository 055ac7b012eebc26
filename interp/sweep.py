"""Exact patching as one growing batch: every intervention is a row, and only what can change is computed.

An intervention that first touches layer l at position t leaves layers below l and positions before t as they are in the
base run. So the sweep walks the layers once (`interp.walk`), and rows join where their patches begin (`interp.rows`).
Positions before the first difference of clean and corrupt cannot change anything: their effect is exactly 0 and costs
nothing. In the last layer only the position that the metric reads is completed.

With c the FLOPs per token and layer, N = T - p0 positions that can change and S = N(N+1)/2, a resid_pre sweep costs
about c S L(L-1)/2 instead of the naive L T (L T c).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from interp.errors import OptionError, PatchError, one_of
from interp.interventions import Intervention, Values
from interp.model.config import ModelConfig
from interp.model.run import record
from interp.model.transformer import Transformer
from interp.rows import N_STAGES, STAGE, Plan, plan
from interp.sites import SITES, get_site
from interp.tasks.pairs import PromptPairs
from interp.walk import Walk

T = TypeVar("T")
_AFTER_MID = ("resid_mid", "neuron", "mlp_out")  # rows that begin with these start from the stream after attention


def check_sweepable(model) -> None:
    """`OptionError` unless the sweep can compute this model; `PatchError` if it has hooks, which the sweep would pass by."""
    if not isinstance(model, Transformer):
        raise OptionError('engine "sweep" needs a model from load_model; a TransformerBridge takes engine "hooks"')
    if attached := [name for name, point in model.hook_dict.items() if point.has_hooks()]:
        raise PatchError(f'the model has a hook of its own at {attached[0]}: reset_hooks(), or use engine "hooks"')


def differing(pairs: PromptPairs, source: object) -> np.ndarray:
    """[prompt, position]: where the run that patched values come from has another input than the base run."""
    return (pairs.differs if source == "other" else pairs.is_token).cpu().numpy()


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do, known before it runs."""

    cells: int  # interventions
    prompts: int
    rows: int  # pairs of intervention and prompt that can change anything
    chunks: int
    flops: float  # additions and multiplications of the rows and of the two unpatched runs
    naive_flops: float  # one whole forward pass per cell and prompt, and the two unpatched runs
    peak_bytes: int  # estimate, beside the model

    @classmethod
    def of(
        cls, model: Transformer, batches: Sequence[PromptPairs], interventions: Sequence[Intervention], *,
        source: object = "other", max_memory: int | None = None,
    ) -> "SweepPlan":  # fmt: skip
        """The plan for interventions on every batch of prompts."""
        cfg, limit = model.cfg, memory_limit(model.device, max_memory)
        rows, chunks, flops, naive, peak = 0, 0, 0.0, 0.0, 0.0
        for pairs in batches:
            whole = plan(interventions, pairs, cfg.n_layers, differs=differing(pairs, source))
            cost = np.bincount(whole.cell, row_bytes(model, whole), minlength=len(interventions))
            ranges = chunk_ranges(cost, limit)
            rows, chunks = rows + len(whole), chunks + len(ranges)
            plain = pairs.clean.numel() * cfg.n_layers * sum(flops_per_token(cfg))
            flops += 2 * plain + row_flops(cfg, whole)
            naive += (2 + len(interventions)) * plain
            peak = max([peak, *(cost[a:b].sum() for a, b in ranges)])
        return cls(len(interventions), sum(map(len, batches)), rows, chunks, flops, naive, int(peak))

    def __str__(self) -> str:
        return (
            f"{self.cells:,} cells x {self.prompts:,} prompts: {self.rows:,} rows in {self.chunks:,} "
            f"{'chunk' if self.chunks == 1 else 'chunks'}, {self.flops / 1e9:,.3g} GFLOP "
            f"({self.naive_flops / self.flops:.3g}x less than a forward pass each), about {self.peak_bytes / 2**20:,.0f} MiB"
        )


class SweepRuns:
    """Interventions on one set of pairs, many at a time: the fast counterpart of `interp.interventions.PatchedRuns`.

    base, sites, source: as there. max_memory: bytes that one chunk of interventions may take (default: three quarters of
    what is free). Running out of an accelerator's memory halves the chunk and goes on.
    """

    def __init__(
        self, model: Transformer, pairs: PromptPairs, *, base: Literal["clean", "corrupt"], sites: Sequence[str],
        source: Literal["other", "zero"] | Values = "other", max_memory: int | None = None,
    ):  # fmt: skip
        check_sweepable(model)
        self.model, self.pairs = model, pairs
        self.max_memory = memory_limit(model.device, max_memory)
        n_layers = model.cfg.n_layers
        of = lambda names: {get_site(name, model.cfg).hook(layer) for name in names for layer in range(n_layers)}  # noqa: E731
        patched = of(sites)
        wanted = of(("resid_pre", "q", "k", "v")) | patched | {SITES["resid_post"].hook(n_layers - 1)}
        if not {*_AFTER_MID}.isdisjoint(sites):
            wanted |= of(("attn_out",) if model.cfg.parallel else ("resid_mid",))
        runs = both_runs(model, pairs, sorted(wanted))
        at_end = torch.arange(len(pairs), device=pairs.clean.device), pairs.read_at
        last = SITES["resid_post"].hook(n_layers - 1)
        self.final_resid = {side: values[last][at_end] for side, values in runs.items()}
        self.base_values = runs[base]
        if isinstance(source, dict):
            self.source_values = {name: source[name].expand(len(pairs), *source[name].shape[1:]) for name in patched}
        elif one_of(source, ("other", "zero"), "source of patched values") == "zero":
            self.source_values = {name: torch.zeros_like(self.base_values[name]) for name in patched}
        else:
            self.source_values = runs["corrupt" if base == "clean" else "clean"]
        self.differs = differing(pairs, source if isinstance(source, str) else "given")

    @torch.no_grad()
    def run(
        self, interventions: Sequence[Intervention], read: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[int, np.ndarray, Tensor, Tensor]]:
        """Chunk by chunk: (interventions done, each row's intervention, its prompt, and what `read` makes of them).

        read: called with the rows' final residual streams where they are read [row, d_model] and their prompts [row].
        Pairs of intervention and prompt without a row leave the base run as it is.
        """
        whole = plan(interventions, self.pairs, self.model.cfg.n_layers, differs=self.differs)
        cost = np.bincount(whole.cell, row_bytes(self.model, whole), minlength=len(interventions))

        def work(first: int, last: int):
            part = whole.take(first, last) if last - first < len(interventions) else whole
            if not len(part):
                return None
            rows, resid = Walk(self.model, self.pairs, part, self.base_values, self.source_values).final_resid()
            prompts = torch.from_numpy(part.prompt[rows]).to(self.pairs.clean.device)
            return last, part.cell[rows] + first, prompts, read(resid, prompts)

        ranges = chunk_ranges(cost, self.max_memory)
        yield from filter(None, in_halves(ranges, work, f"one intervention on {len(self.pairs)} prompts"))


def in_halves(ranges: Sequence[tuple[int, int]], work: Callable[[int, int], T], smallest: str) -> Iterator[T]:
    """work(first, last) of every range in turn; a range that runs out of memory is tried again in two halves.

    Results that have been handed out are kept. `OptionError` if a range of one, which `smallest` describes, does not fit.
    """
    todo = list(reversed(ranges))
    while todo:
        first, last = todo.pop()
        try:
            done = work(first, last)
        except torch.OutOfMemoryError as error:
            if last - first == 1:
                raise OptionError(f"no room in memory for {smallest}: use a smaller batch_size") from error
        else:
            yield done
            continue
        middle = (first + last) // 2  # outside of the except clause, which would keep the tensors of `work` alive
        todo += [(middle, last), (first, middle)]


def both_runs(model: Transformer, pairs: PromptPairs, names: Sequence[str]) -> dict[str, Values]:
    """Values at hook points in the clean and in the corrupt run, from one forward pass where both are plain prompts."""
    if pairs.hooks("corrupt"):
        return {
            side: record(model, pairs.tokens(side), names, pairs.hooks(side), copy=False)
            for side in ("clean", "corrupt")
        }
    both = record(model, torch.cat([pairs.clean, pairs.corrupt]), names, copy=False)
    n = len(pairs)
    return {
        "clean": {name: v[:n] for name, v in both.items()},
        "corrupt": {name: v[n:] for name, v in both.items()},
    }


def chunk_ranges(cost: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Ranges of items whose costs sum to at most `limit`; one too large by itself is a range of its own."""
    ranges, first, used = [], 0, 0.0
    for i, n in enumerate(cost.tolist()):
        if used + n > limit and i > first:
            ranges.append((first, i))
            first, used = i, 0.0
        used += n
    return [*ranges, (first, len(cost))] if len(cost) else []


def row_bytes(model: Transformer, rows: Plan) -> np.ndarray:
    """Estimated peak bytes of each row: its tokens' streams, queries, keys, values and mixes, and its new scores."""
    cfg = model.cfg
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    n_tokens = rows.end - rows.start
    per_token = 3 * cfg.d_model + 5 * q + 2 * kv
    return model.W_E.element_size() * (n_tokens * per_token + 3 * cfg.n_heads * rows.end)


def flops_per_token(cfg: ModelConfig) -> tuple[int, int, int, int, int]:
    """FLOPs of one token in one layer's matrices: queries; keys and values; W_O; into the neurons; out of them."""
    q, kv, mlp = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.d_mlp
    return (2 * cfg.d_model * q, 4 * cfg.d_model * kv, 2 * cfg.d_model * q,
            2 * cfg.d_model * mlp * (2 if cfg.gated else 1), 2 * cfg.d_model * mlp)  # fmt: skip


def row_flops(cfg: ModelConfig, rows: Plan) -> float:
    """FLOPs of a plan's rows in the layers' matrices; attention's own products, a few percent of them, are left out."""
    per_q, per_kv, per_o, per_in, per_out = flops_per_token(cfg)
    total = 0.0
    for layer in range(cfg.n_layers):
        before, after, n = rows.before_attention(layer), rows.after_attention(layer), rows.on_board(layer)
        lone = rows.spread[before.rows] >= layer
        n_queries = np.where(lone, 1, np.minimum(before.lengths, after.lengths[: len(before)])).sum()
        total += before.n_tokens * per_kv + n_queries * per_q
        stage, length = rows.begin[after.rows] % N_STAGES, after.lengths
        stage[:n] = 0
        for cost, upto in ((per_o, "head"), (per_in, "resid_mid"), (per_out, "neuron")):
            total += cost * length[stage <= STAGE[upto]].sum()
    return float(total)


def memory_limit(device: torch.device, max_memory: int | None) -> int:
    """Bytes that a chunk may take."""
    if max_memory is not None:
        if max_memory < 1:
            raise OptionError(f"max_memory is a number of bytes, at least 1, not {max_memory}")
        return max_memory
    if device.type == "cpu":
        return psutil.virtual_memory().available * 3 // 4
    return torch.get_device_module(device).mem_get_info(device)[0] * 3 // 4
