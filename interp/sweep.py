"""Exact patching as one growing batch: every intervention is a row, and only what can change is computed.

An intervention that first touches layer l at position t leaves layers below l and positions before t as they are in the
base run. So the sweep walks the layers once (`interp.walk`), and rows join where their patches begin (`interp.rows`).
Positions before the first difference of clean and corrupt cannot change anything: their effect is exactly 0 and costs
nothing. In the last layer only the position that the metric reads is completed.

With c the FLOPs per token and layer, N = T - p0 positions that can change and S = N(N+1)/2, a resid_pre sweep costs
about c S L(L-1)/2 instead of the naive L T (L T c).
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, PatchError, one_of
from interp.interventions import Intervention, Values
from interp.model.run import record
from interp.model.transformer import Transformer
from interp.rows import Plan, plan
from interp.sites import SITES, get_site
from interp.tasks.pairs import PromptPairs
from interp.walk import Walk


class SweepRuns:
    """Interventions on one set of pairs, many at a time: the fast counterpart of `interp.interventions.PatchedRuns`.

    base, sites, source: as there. max_memory: bytes that one chunk of interventions may take (default: half of what is
    free, and on a CPU no more than 256 MiB, since larger chunks only leave the caches).
    """

    def __init__(
        self, model: Transformer, pairs: PromptPairs, *, base: Literal["clean", "corrupt"], sites: Sequence[str],
        source: Literal["other", "zero"] | Values = "other", max_memory: int | None = None,
    ):  # fmt: skip
        if not isinstance(model, Transformer):
            raise OptionError('engine "sweep" needs a model from load_model; a TransformerBridge takes engine "hooks"')
        if attached := [name for name, point in model.hook_dict.items() if point.has_hooks()]:
            raise PatchError(f"the model has a hook of its own at {attached[0]}: reset_hooks(), or use engine 'hooks'")
        self.model, self.pairs = model, pairs
        self.max_memory = _default_memory(model.device) if max_memory is None else max_memory
        layers = range(model.cfg.n_layers)
        patched = [get_site(name, model.cfg).hook(layer) for name in sites for layer in layers]
        # rows may begin anywhere, so all values of the base run are kept; patterns only if they are patched
        kept = [s for s in SITES if s != "pattern" and not (s == "resid_mid" and model.cfg.parallel)]
        names = {*patched, *(SITES[name].hook(layer) for name in kept for layer in layers)}
        self.base_values = record(model, pairs.tokens(base), sorted(names), pairs.hooks(base))
        if isinstance(source, dict):
            self.source_values = {name: source[name].expand(len(pairs), *source[name].shape[1:]) for name in patched}
        elif one_of(source, ("other", "zero"), "source of patched values") == "zero":
            self.source_values = {name: torch.zeros_like(self.base_values[name]) for name in patched}
        else:
            other = "corrupt" if base == "clean" else "clean"
            self.source_values = record(model, pairs.tokens(other), patched, pairs.hooks(other))
        if source == "other":
            differs = pairs.differs
            first = torch.where(differs.any(1), differs.int().argmax(1), pairs.lengths)
        else:
            first = torch.zeros_like(pairs.lengths)
        self.first_change = first.cpu().numpy()

    @torch.no_grad()
    def run(
        self, interventions: Sequence[Intervention]
    ) -> Iterator[tuple[int, np.ndarray, Tensor, Float[Tensor, "row d_model"]]]:
        """Chunk by chunk: (interventions done, each row's intervention, its prompt, its final residual stream where it
        is read). Pairs of intervention and prompt without a row leave the base run as it is."""
        whole = plan(interventions, self.pairs, self.model.cfg.n_layers, first_change=self.first_change)
        for first, last in self.chunks(whole, len(interventions)):
            part = whole.take(first, last) if last - first < len(interventions) else whole
            rows, resid = np.zeros(0, dtype=np.int64), self.model.W_E.new_empty(0, self.model.cfg.d_model)
            if len(part):
                rows, resid = Walk(self.model, self.pairs, part, self.base_values, self.source_values).final_resid()
            yield last, part.cell[rows] + first, torch.from_numpy(part.prompt[rows]).to(self.pairs.clean.device), resid

    def chunks(self, rows: Plan, n_interventions: int) -> list[tuple[int, int]]:
        """Ranges of interventions that fit into `max_memory`; one too large by itself is a range of its own."""
        cost = np.bincount(rows.cell, self._row_bytes(rows), minlength=n_interventions)
        ranges, first, used = [], 0, 0.0
        for i, n_bytes in enumerate(cost):
            if used + n_bytes > self.max_memory and i > first:
                ranges.append((first, i))
                first, used = i, 0.0
            used += n_bytes
        return [*ranges, (first, n_interventions)]

    def _row_bytes(self, rows: Plan) -> np.ndarray:
        """Estimated peak bytes of each row: its tokens' vectors, its keys and values in full, its scores, its logits."""
        cfg, n_tokens = self.model.cfg, rows.end - rows.start
        q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        per_token = 5 * cfg.d_model + 4 * q + 2 * kv + 3 * cfg.d_mlp
        n_queries = np.minimum(2 * n_tokens, rows.end)  # padded to a power of two
        attention = 2 * rows.end * kv + 3 * cfg.n_heads * n_queries * rows.end + 2 * n_queries * q
        reading = 3 * cfg.d_vocab  # logits, their logarithms and a metric's copy
        return self.model.W_E.element_size() * (n_tokens * per_token + attention + reading)


def _default_memory(device: torch.device) -> int:
    if device.type == "cpu":
        return min(psutil.virtual_memory().available // 2, 1 << 28)
    return torch.get_device_module(device).mem_get_info(device)[0] // 2
