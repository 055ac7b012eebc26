"""The base run from some layer on, in many rows, with another part of one site moved towards the other run in each.

What methods share that take a few passes instead of one (`interp.paths`): which parts of a site move together, the moved
values, and running the layers after them.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.directions import Side, other_side
from interp.model.config import ModelConfig
from interp.model.run import logits_at, record
from interp.model.transformer import Transformer
from interp.rules import Rules
from interp.sheet import ScoreSheet, contract
from interp.sites import Site
from interp.tasks.pairs import PromptPairs


class SiteRows:
    """One way: the base run `side` of some pairs, and each site of a sheet in parts that move towards the other run.

    groups: a position moves with every `groups`-th neighbour. each_unit: heads (neurons, ...) move one by one.
    """

    def __init__(
        self, model: Transformer, pairs: PromptPairs, sheet: ScoreSheet, side: Side, *, groups: int, each_unit: bool
    ):
        self.model, self.pairs, self.sheet, self.groups, self.each_unit = model, pairs, sheet, groups, each_unit
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
        other, self.hooks = other_side(side), sheet.hooks
        self.base = record(model, pairs.tokens(side), [*self.hooks, *streams], pairs.hooks(side), copy=False)
        source = record(model, pairs.tokens(other), self.hooks, pairs.hooks(other), copy=False)
        self.change = {name: source[name] - self.base[name] for name in self.hooks}
        self.base_logits = logits_at(model, pairs.tokens(side), pairs.read_at, pairs.hooks(side))
        self.clean_logits = logits_at(model, pairs.clean, pairs.read_at)

    def names(self, layer: int) -> list[str]:
        """The layer's sites by hook name."""
        return [grid.site.hook(layer) for grid in self.sheet.grids]

    def parts(self, name: str) -> Bool[Tensor, "part prompt ..."]:
        """What of a site moves in each part; broadcasts to [part, *its value]. Every place of a token is in one part."""
        site, value = self.hooks[name], self.change[name]
        shape = [1] * value.ndim
        shape[0], shape[site.position_axis] = value.shape[0], value.shape[site.position_axis]
        by_position = position_groups(self.pairs, self.groups).reshape(self.groups, *shape)
        if site.unit is None or not self.each_unit:
            return by_position
        n_units = value.shape[site.unit_axis]
        shape = [1] * value.ndim
        shape[site.unit_axis] = n_units
        one_unit = torch.eye(n_units, dtype=torch.bool, device=value.device).reshape(n_units, 1, *shape)
        return (one_unit & by_position).flatten(0, 1)

    def moved(self, name: str, share: float) -> Float[Tensor, "row ..."]:
        """The site in rows [part, prompt], `share` of the way moved."""
        return (self.base[name] + share * self.change[name] * self.parts(name)).flatten(0, 1)

    def run(
        self, layer: int, values: Mapping[str, Float[Tensor, "_ ..."]], rules: Rules
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits of the base run from this layer on, in the rows of all sites one after the other.

        values: what each site is in its own rows, a multiple of [prompt]; without any, one row per prompt.
        """
        hooks, end = [], 0
        for name, value in values.items():
            start, end = end, end + len(value)
            hooks.append((name, lambda own, hook, v=value, a=start, b=end: torch.cat([own[:a], v, own[b:]])))
        prompts = torch.arange(end or len(self.pairs), device=self.pairs.clean.device) % len(self.pairs)
        model, resid = self.model, self.base[f"blocks.{layer}.hook_resid_pre"][prompts]
        places = model.places(resid.shape[1])
        with model.hooks(fwd_hooks=hooks):
            for block in model.blocks[layer:]:
                resid = block(resid, places, rules)
        rows = torch.arange(len(resid), device=resid.device)
        return model.unembed_resid(resid[rows, self.pairs.read_at[prompts]], rules)

    def repeated(self, n_rows: int) -> tuple[PromptPairs, Tensor]:
        """The pairs and the clean run's logits of that many rows, which go through the prompts again and again."""
        prompts = torch.arange(n_rows, device=self.pairs.clean.device) % len(self.pairs)
        return self.pairs.take(prompts), self.clean_logits[prompts]

    def scores(self, name: str, gradient: Float[Tensor, "row ..."]) -> Float[Tensor, "prompt ..."]:
        """Gradient [part, prompt] times change, every place from the part in which it moves."""
        gradient = gradient.unflatten(0, (-1, len(self.pairs)))
        return contract(self.hooks[name], (gradient * self.parts(name)).sum(0), self.change[name])


def position_groups(pairs: PromptPairs, groups: int) -> Bool[Tensor, "group prompt position"]:
    """Every token in one group: counted from each prompt's end, as that is where the metric is read."""
    from_end = pairs.read_at[:, None] - torch.arange(pairs.clean.shape[1], device=pairs.clean.device)
    number = torch.arange(groups, device=pairs.clean.device)
    return (from_end % groups == number[:, None, None]) & pairs.is_token


def n_parts(site: Site, cfg: ModelConfig, groups: int, each_unit: bool) -> int:
    """How many parts of a site move one by one."""
    return groups * (site.n_units(cfg) or 1 if each_unit else 1)


def graph_numbers_per_token(cfg: ModelConfig, n_positions: int) -> int:
    """Numbers that a graph keeps per token, roughly: streams, queries to mixes, scores and patterns, neurons."""
    heads = (3 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head + 4 * cfg.n_heads * n_positions
    return cfg.n_layers * (8 * cfg.d_model + heads + 5 * cfg.d_mlp)
