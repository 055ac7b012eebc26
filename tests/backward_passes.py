"""One backward pass through a tiny model with everything on the way written down, and models that lack something."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch

from interp.rules import GRADIENT, Rules
from interp.sites import SITES

RIGHT, WRONG = 7, 11  # the logit difference that is sent back


class Pass(NamedTuple):
    """Metric per prompt, and by hook name what ran through and what came back."""

    metric: torch.Tensor
    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    def relevance(self, name: str) -> torch.Tensor:
        """Activation times gradient, summed over all but the prompts."""
        return (self.values[name] * self.gradients[name]).flatten(1).sum(1)


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    """Of the last position."""
    return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


def backward_pass(model, tokens: torch.Tensor, rules: Rules = GRADIENT, hooks: Sequence[tuple] = ()) -> Pass:
    """hooks: forward hooks that change the run, in place before anything is written down."""
    values, gradients = {}, {}

    def cut(value, hook):
        return value.detach().requires_grad_()

    def watch(value, hook):
        values[hook.name] = value.detach()
        if value.requires_grad:
            value.register_hook(lambda gradient: gradients.update({hook.name: gradient}))

    watched = [(name, watch) for name in model.hook_dict]
    logits = model.run_with_hooks(tokens, rules=rules, fwd_hooks=[("hook_embed", cut), *hooks, *watched])
    metric = logit_difference(logits)
    metric.sum().backward()
    return Pass(metric.detach(), values, gradients)


def without_biases(model):
    """A copy whose every bias is zero: of norms, projections, MLPs and the unembedding."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("b"):
            parameter.data.zero_()
    return model


def stream(model) -> list[str]:
    """Every cut of the residual stream, in order."""
    cuts = [SITES[site] for site in ("resid_pre", "resid_mid", "resid_post")]
    names = [cut.hook(layer) for layer in range(model.cfg.n_layers) for cut in cuts]
    return [name for name in names if name in model.hook_dict]
