"""What an intervention is, and the plain way to run one: a forward pass with hooks.

A `Patch` names a place (site, layer, perhaps a head and a position) whose value is replaced by its value in another run.
An intervention is a tuple of patches made together. `PatchedRuns` runs interventions one forward pass each: slow, and
obviously right. It is the oracle that faster engines are held against.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import PatchError, one_of
from interp.model.run import config_of, logits_at, record
from interp.model.transformer import Transformer
from interp.sites import Node, Site, get_site
from interp.tasks.pairs import PromptPairs

Values = dict[str, Tensor]  # by hook name, each [prompt, ...] or [1, ...] for all prompts alike


@dataclass(frozen=True)
class Patch:
    """One place. `unit` is a head, key/value head or neuron (None: all); `position` None means all positions, and a
    negative one counts from each prompt's end; `source_position` is a pattern's column (None: the whole row)."""

    site: str
    layer: int
    unit: int | None = None
    position: int | None = None
    source_position: int | None = None

    @classmethod
    def of_node(cls, node: Node, position: int | None = None) -> "Patch":
        """The patch of a node's output."""
        return cls(node.site.name, node.layer, node.index, position)


Intervention = tuple[Patch, ...]


class PatchedRuns:
    """Interventions on one set of pairs.

    base: the run that is changed ("clean" or "corrupt"). source: where replaced values come from: the "other" run,
    "zero", or values by hook name (see `mean_values`).
    sites: the sites that interventions will touch; their source values are recorded here, once.
    """

    def __init__(
        self,
        model,
        pairs: PromptPairs,
        *,
        base: Literal["clean", "corrupt"],
        sites: Iterable[str],
        layers: Iterable[int] | None = None,
        source: Literal["other", "zero"] | Values = "other",
    ):
        self.model, self.pairs, self.base = model, pairs, base
        self.cfg = config_of(model)
        self.other = "corrupt" if base == "clean" else "clean"
        layers = list(range(self.cfg.n_layers)) if layers is None else list(layers)
        self.sites = {name: get_site(name, self.cfg) for name in sites}
        names = [site.hook(layer) for site in self.sites.values() for layer in layers]
        if isinstance(source, dict):
            self.source_values = {name: source[name].expand(len(pairs), *source[name].shape[1:]) for name in names}
            return
        one_of(source, ("other", "zero"), "source of patched values")
        self.source_values = record(model, pairs.tokens(self.other), names, pairs.hooks(self.other))
        if source == "zero":
            self.source_values = {name: torch.zeros_like(value) for name, value in self.source_values.items()}

    def plain(self, side: str) -> Float[Tensor, "prompt d_vocab"]:
        """Logits of the unpatched "clean" or "corrupt" run."""
        return logits_at(self.model, self.pairs.tokens(side), self.pairs.read_at, self.pairs.hooks(side))

    def patched(self, intervention: Intervention, values: Values | None = None) -> Float[Tensor, "prompt d_vocab"]:
        """Logits [prompt, d_vocab] of the base run with these places replaced, all at once."""
        values = self.source_values if values is None else values
        by_hook: dict[str, list[Patch]] = {}
        for patch in intervention:
            by_hook.setdefault(self.sites[patch.site].hook(patch.layer), []).append(patch)
        fired: dict[str, int] = dict.fromkeys(by_hook, 0)

        def replacing(name: str, patches: Sequence[Patch]):
            def hook_function(value: Tensor, hook: Any) -> Tensor:
                fired[name] += 1
                value = value.clone()
                for patch in patches:
                    place = self._index(patch, value.ndim)
                    value[place] = values[name][place]
                return value

            return hook_function

        hooks = self.pairs.hooks(self.base) + [(name, replacing(name, p)) for name, p in by_hook.items()]
        logits = logits_at(self.model, self.pairs.tokens(self.base), self.pairs.read_at, hooks)
        if wrong := [name for name, count in fired.items() if count != 1]:
            raise PatchError(f"the hook at {wrong[0]} fired {fired[wrong[0]]} times in a patched run, not once")
        return logits

    def run(self, interventions: Iterable[Intervention]) -> Iterator[Float[Tensor, "prompt d_vocab"]]:
        """Logits of each intervention in turn."""
        for intervention in interventions:
            yield self.patched(intervention)

    def check(self) -> None:
        """Raise `PatchError` unless patches do what patches must.

        Replacing every value by itself, at all layers of a site, must change nothing at all. A TransformerBridge has hook
        points that show values which nothing reads, or which only part of the layer reads; there, replacing all values
        must change something, and replacing a whole residual stream by another run's must give that run.
        """
        names = list(self.source_values)
        own = record(self.model, self.pairs.tokens(self.base), names, self.pairs.hooks(self.base))
        plain = self.plain(self.base)
        for site in self.sites.values():
            layers = [layer for layer in range(self.cfg.n_layers) if site.hook(layer) in own]
            again = self.patched(tuple(Patch(site.name, layer) for layer in layers), own)
            if not torch.equal(again, plain):
                worst = (again - plain).abs().max().item()
                raise PatchError(f"patching {site.name} with its own values moves the logits by {worst:.3g}")
            if not isinstance(self.model, Transformer):
                self._check_bridge(site, layers, own, plain)

    def _check_bridge(self, site: Site, layers: list[int], own: Values, plain: Tensor) -> None:
        mend = "in this TransformerBridge; load the model with load_model instead"
        zeros = {name: torch.zeros_like(value) for name, value in own.items()}
        gone = self.patched(tuple(Patch(site.name, layer) for layer in layers), zeros)
        if torch.equal(gone, plain) and own[site.hook(layers[0])].any():
            raise PatchError(f"editing {site.name} has no effect {mend}")
        if site.name.startswith("resid"):
            name = site.hook(layers[0])
            other = record(self.model, self.pairs.tokens(self.other), [name], self.pairs.hooks(self.other))
            got, wanted = self.patched((Patch(site.name, layers[0]),), other), self.plain(self.other)
            if (got - wanted).norm() > 0.01 * (wanted - plain).norm() + 1e-3 * wanted.norm():
                raise PatchError(f"editing {site.name} does not replace the whole residual stream {mend}")

    def _index(self, patch: Patch, n_axes: int) -> tuple:
        """Where a patch acts in its hook's value."""
        site = self.sites[patch.site]
        index: list[Any] = [slice(None)] * n_axes
        if patch.unit is not None:
            index[site.unit_axis] = patch.unit
        for axis, position in ((site.position_axis, patch.position), (site.source_axis, patch.source_position)):
            if position is None:
                continue
            index[axis] = position
            if position < 0:
                index[0] = torch.arange(len(self.pairs), device=self.pairs.clean.device)
                index[axis] = self.pairs.lengths + position
        return tuple(index)


def mean_values(
    model, chunks: Sequence[PromptPairs], side: Literal["clean", "corrupt"], sites: Iterable[str]
) -> Values:
    """Mean activation over prompts at each position, padding left out: {hook name: [1, ...]}, for `PatchedRuns(source=)`.

    chunks: the pairs, in one piece or several; the mean is over all of them. A position that is padding in every
    prompt has mean 0.
    """
    cfg = config_of(model)
    hooks = {get_site(name, cfg).hook(layer): get_site(name, cfg) for name in sites for layer in range(cfg.n_layers)}
    totals: Values = {}
    counts = sum(chunk.is_token.sum(0) for chunk in chunks).clamp_min(1)
    for chunk in chunks:
        for name, value in record(model, chunk.tokens(side), hooks, chunk.hooks(side)).items():
            shape = [1] * value.ndim
            shape[0], shape[hooks[name].position_axis] = chunk.is_token.shape
            total = (value * chunk.is_token.reshape(shape)).sum(0, keepdim=True)
            totals[name] = totals.get(name, 0) + total
    for name, total in totals.items():
        shape = [1] * total.ndim
        shape[hooks[name].position_axis] = len(counts)
        totals[name] = total / counts.reshape(shape)
    return totals
