"""Any set of edges in one forward pass: what the model does when only a circuit's edges carry the clean run.

Every reader gets a residual stream of its own:

    stream(v) = ablated stream at v + sum over writers u of mask[u, v] (out_u - ablated out_u)

where out_u is what u puts out *in this run*, from the streams it reads itself. With all edges this is the clean run, with
none the ablated one; under corrupt ablation with one edge left out it is edge patching (noising). Several circuits go
through in one batch, masks may be fractions, and gradients with respect to masks and ablated values are exact.

Where a post-norm stands between heads and stream (Gemma 2, OLMo 2), a reader gets the norm of the heads' mixed sum, so
that all edges together are the clean run there too.
"""

from copy import copy

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.ablations import Outputs
from interp.circuits.graph import edge_mask
from interp.circuits.split import Streams, attn_written, head_outputs, heads_written, mlp_written
from interp.model.run import record
from interp.model.transformer import Transformer
from interp.sites import SITES
from interp.sweep import check_sweepable, chunk_ranges, in_halves, memory_limit
from interp.tasks.pairs import PromptPairs

Masks = Float[Tensor, "circuit source target"] | Bool[Tensor, "circuit source target"]
_CPU_BATCH = 48 << 20  # bytes
Changes = Float[Tensor, "_ writer prompt position d_model"]  # _: a circuit each, or 1 for all


class MaskedRuns:
    """Circuits on one set of pairs. `ablated` values stand in for what no kept edge carries."""

    def __init__(self, model: Transformer, pairs: PromptPairs, ablated: Outputs, *, max_memory: int | None = None):
        check_sweepable(model)
        self.model, self.pairs, self.cfg, self.ablated = model, pairs, model.cfg, ablated
        self.max_memory = max_memory
        self.places = model.places(pairs.clean.shape[1])
        n_layers = self.cfg.n_layers
        start, last = SITES["resid_pre"].hook(0), SITES["resid_post"].hook(n_layers - 1)
        values = record(model, pairs.clean, [*Outputs.hooks(n_layers), start, last], copy=False)
        self.clean = Outputs.of(values, n_layers)
        self.at_end = torch.arange(len(pairs), device=pairs.clean.device), pairs.read_at
        self.clean_final = values[last][self.at_end]
        self.positions_only = values[start] - self.clean.embed
        self.there = torch.from_numpy(edge_mask(self.cfg)).to(pairs.clean.device)
        self.n_writers, self.n_readers = self.there.shape
        self.first = self._first_change()

    def with_ablated(self, ablated: Outputs) -> "MaskedRuns":
        """The same pairs with other values for what is outside."""
        other = copy(self)
        other.ablated = ablated
        other.first = other._first_change()
        return other

    def _first_change(self) -> int:
        """The first position at which some component's input can differ from its ablated one."""
        differs = (self.clean.embed != self.ablated.embed).any(-1).any(0)
        if not self.ablated.a_run or not differs.any():
            return 0
        return min(int(differs.int().argmax()), int(self.pairs.read_at.min()))

    @torch.no_grad()
    def run(self, masks: Masks) -> Float[Tensor, "circuit prompt d_model"]:
        """The residual stream where it is read at the end, of every circuit, as many at a time as memory takes."""
        cost, limit = np.full(len(masks), self.bytes_per_circuit()), memory_limit(self.model.device, self.max_memory)
        # on a CPU, batches that do not leave the caches are twice as fast
        ranges = chunk_ranges(cost, min(limit, _CPU_BATCH) if self.model.device.type == "cpu" else limit)
        found = in_halves(ranges, lambda a, b: self.final(masks[a:b]), f"one circuit on {len(self.pairs)} prompts")
        return torch.cat([self.clean_final.new_zeros(0, *self.clean_final.shape), *found])

    def bytes_per_circuit(self) -> int:
        """Estimated peak: every component's change, and the streams of one layer's readers on their way through it."""
        cells = len(self.pairs) * (self.pairs.clean.shape[1] - self.first) * self.cfg.d_model
        return self.model.W_E.element_size() * cells * (self.n_writers + 6 * 3 * self.cfg.n_heads)

    def final(self, masks: Masks) -> Float[Tensor, "circuit prompt d_model"]:
        """The same in one batch; with a graph if the masks or the ablated values ask for one and have a say in it."""
        cfg, untouched, t0 = self.cfg, self._untouched(masks), self.first
        if untouched > cfg.n_layers:
            return self.clean_final.expand(len(masks), -1, -1)
        masks = masks * self.there  # a parallel layer's heads have written when its MLP reads, which reads none of them
        needed = self._needed(masks)
        clean, ablated = self.clean.map(lambda x: x[:, t0:]), self.ablated.map(lambda x: x[:, t0:] if t0 else x)
        arriving = _Arriving(masks.to(clean.embed.dtype), keep_graph=torch.is_grad_enabled())
        arriving.add([0], (clean.embed - ablated.embed)[None, None])
        stream = self.positions_only + self.ablated.embed
        for layer, block in enumerate(self.model.blocks):
            reader, writer = layer * (3 * cfg.n_heads + 1), 1 + layer * (cfg.n_heads + 1)
            attn_alone = attn_written(block, self.ablated.z[layer])
            middle = stream + attn_alone
            heads = [h for h in range(cfg.n_heads) if needed[writer + h]]
            if heads:
                if layer < untouched:
                    z = clean.z[layer][None][..., heads, :]
                else:
                    columns = [reader + i * cfg.n_heads + h for i in range(3) for h in heads]
                    inputs = arriving.at(stream[:, t0:], columns).chunk(3, 1)
                    earlier = stream[:, :t0] if t0 else None
                    z = head_outputs(
                        block, dict(zip("qkv", inputs, strict=True)), self.places, heads=heads, before=earlier
                    )
                change = heads_written(block, z - ablated.z[layer][..., heads, :], heads)
                names = [writer + h for h in heads]
                if cfg.post_norm:
                    together = block.attn.output(ablated.z[layer])
                    arriving.add_post_normed(names, change, together, block.ln1_post.plain)
                else:
                    arriving.add(names, change)
            if needed[writer + cfg.n_heads]:
                if layer < untouched:
                    mlp = clean.mlp[layer][None, None]
                else:
                    read = stream if cfg.parallel else middle
                    mlp = mlp_written(block, arriving.at(read[:, t0:], [reader + 3 * cfg.n_heads]))
                arriving.add([writer + cfg.n_heads], mlp - ablated.mlp[layer])
            stream = middle + self.ablated.mlp[layer]
        prompts, read_at = self.at_end
        end = arriving.at(stream[prompts, read_at][:, None], [self.n_readers - 1], (prompts, read_at - t0))
        return end[:, 0, :, 0].expand(len(masks), -1, -1)

    def _needed(self, masks: Masks) -> list[bool]:
        """[writer]: whether any circuit keeps an edge from it; masks that are learned may need them all."""
        return (masks != 0).any(2).any(0).tolist() if masks.dtype == torch.bool else [True] * self.n_writers

    def _untouched(self, masks: Masks) -> int:
        """How many layers, from the first, keep all their edges in every circuit; one more if the logits do as well."""
        if masks.dtype != torch.bool:
            return 0
        whole = (masks | ~self.there).all(0).all(0).cpu().numpy()
        per_layer = 3 * self.cfg.n_heads + 1
        layers = np.append(whole[:-1].reshape(-1, per_layer).all(1), whole[-1])
        return len(layers) if layers.all() else int(layers.argmin())


class _Arriving:
    """What has been written so far, and what of it arrives at a reader.

    Changes that all circuits have in common are kept once: then so are the streams, where the masks agree too.
    """

    def __init__(self, masks: Float[Tensor, "circuit source target"], *, keep_graph: bool):
        self.masks, self.keep_graph = masks, keep_graph
        self.changes: dict[bool, list[Changes]] = {True: [], False: []}  # by: in common
        self.writers: dict[bool, list[int]] = {True: [], False: []}
        self.post_normed: list[tuple] = []

    def add(self, writers: list[int], change: Changes) -> None:
        """Components that have written something else than when they are ablated."""
        common = len(change) == 1
        self.changes[common].append(change)
        self.writers[common] += writers

    def add_post_normed(self, writers: list[int], change: Changes, together: Tensor, norm) -> None:
        """Heads whose sum is normed before it joins the stream; together: that sum without change."""
        self.post_normed.append((writers, change, together, norm))

    def at(self, ablated: Float[Tensor, "_ _ d_model"], readers: list[int], where: tuple | None = None) -> Streams:
        """The streams of these readers; where: only at one position of each prompt."""
        masks = self.masks[:, :, readers].transpose(1, 2)
        common = not self.changes[False] and all(len(change) == 1 for _, change, *_ in self.post_normed)
        if common and not self.keep_graph and (masks == masks[:1]).all():
            masks = masks[:1]
        stream = ablated
        for in_common, changes in self.changes.items():
            if changes:
                everything = changes[0] if len(changes) == 1 else torch.cat(changes, 1)
                if not self.keep_graph:
                    self.changes[in_common] = [everything]
                stream = stream + _mix(masks, self.writers[in_common], _at(everything, where))
        for writers, change, together, norm in self.post_normed:
            before = _at(together.expand(change.shape[2:]), where)
            stream = stream + norm(before + _mix(masks, writers, _at(change, where))) - norm(before)
        return stream


def _at(value: Float[Tensor, "... prompt position d_model"], where: tuple | None) -> Tensor:
    return value if where is None else value[..., *where, :][..., None, :]


def _mix(masks: Float[Tensor, "circuit reader source"], writers: list[int], change: Changes) -> Streams:
    """Sum over writers of mask times change; a matrix product with all tokens' channels side by side."""
    chosen, flat = masks[:, :, writers], change.flatten(2)
    if len(flat) == 1:
        mixed = (chosen.flatten(0, 1) @ flat[0]).unflatten(0, chosen.shape[:2])
    else:
        mixed = torch.bmm(chosen, flat)
    return mixed.unflatten(2, change.shape[2:])
