"""Learned circuits: a mask over all edges at once, by gradient descent on what the masked model does.

    minimise over keeping probabilities p:   E over masks drawn from p of loss(masked model) + penalty * expected number of edges

The loss is KL(model || masked model) in nats, or the distance |metric - metric of the model|. Two ways to draw masks through
which a gradient can pass:

hard-concrete  a stretched, clipped sigmoid of logistic noise (Louizos et al. 1712.01312), as Edge Pruning and subnetwork
               probing use it: most of its mass lies at exactly 0 and 1
ugs            uniform gradient sampling (Li & Janson 2409.09951): 0 or 1, except in a share p (1 - p) of the draws, where the
               mask is uniform between, and p on average; the gradient comes from the draws between, and on average it is what
               the edge's presence changes, without a temperature

What comes out are keeping probabilities, which are scores like any other: cut circuits from them by threshold or size.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits.ablations import ABLATIONS, ablated_outputs
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.circuits.masked import MaskedRuns
from interp.circuits.optimal import kl_to_clean
from interp.directions import metric_attrs
from interp.errors import OptionError, one_of
from interp.metrics import Metric, get_metric
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.provenance import provenance
from interp.tasks.pairs import PromptPairs

SAMPLERS = ("ugs", "hard-concrete")
_TEMPERATURE, _LEFT, _RIGHT = 2 / 3, -0.1, 1.1  # the hard-concrete distribution's usual constants
_SHIFT = -_TEMPERATURE * math.log(-_LEFT / _RIGHT)  # from its logits to those of a mask that is not 0


def learn_mask(
    model: Transformer, pairs: PromptPairs, *, method: Literal["ugs", "hard-concrete"] = "ugs", penalty: float = 1e-3,
    steps: int = 300, learning_rate: float = 0.1, n_samples: int = 4, n_prompts: int = 16, start: float = 0.9,
    metric: str | Callable | Metric = "kl_divergence", ablation: str = "corrupt", reference: PromptPairs | None = None,
    seed: int = 0, progress: bool = False,
) -> xr.DataArray:  # fmt: skip
    """Keeping probabilities of all edges [source, target], 1 where an edge earns its penalty.

    penalty: what one expected edge costs, in the loss's unit. steps of Adam on the logits of the probabilities, at
    learning_rate falling to a tenth, each on n_samples masks and n_prompts random prompts. start: every probability at first.
    ablation, reference: see `interp.circuits.ablations` (not "optimal").
    attrs["loss"] and attrs["expected_edges"]: at the end, means over the last tenth of the steps.
    """
    one_of(method, SAMPLERS, "method")
    one_of(ablation, [a for a in ABLATIONS if a != "optimal"], "ablation of a learned mask")
    canonical(model, "learning a mask")
    if steps < 1 or n_samples < 1 or n_prompts < 1 or not learning_rate > 0 or not penalty >= 0 or not 0 < start < 1:
        raise OptionError(
            "a mask is learned in at least 1 step on at least 1 sample and prompt, at a positive rate, with a penalty of at "
            f"least 0 and a start between 0 and 1; not {steps}, {n_samples}, {n_prompts}, {learning_rate}, {penalty}, {start}"
        )
    metric, graph = get_metric(metric), Graph.of(model.cfg)
    there = torch.from_numpy(edge_mask(graph)).to(pairs.clean.device)
    generator = torch.Generator(device=there.device).manual_seed(seed)
    sample, expected, shift = {
        "ugs": (_ugs, torch.sigmoid, 0.0), "hard-concrete": (_hard_concrete, _chance_of_some, _SHIFT)
    }[method]  # fmt: skip
    logits = torch.full(
        (int(there.sum()),), float(np.log(start / (1 - start))) - shift, device=there.device, requires_grad=True
    )
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    held, draw = (pairs if reference is None else reference), np.random.default_rng(seed)
    history = []
    with tqdm(range(steps), desc=method, unit="step", disable=not progress, leave=False) as bar:
        for _ in bar:
            rows = torch.from_numpy(np.sort(draw.permutation(len(pairs))[:n_prompts])).to(there.device)
            batch = pairs.take(rows)
            runs = MaskedRuns(model, batch, ablated_outputs(model, batch, ablation, reference=held))
            with torch.enable_grad():
                chances = expected(logits).sum()
                noise = torch.rand(n_samples, len(logits), generator=generator, device=there.device)
                masks = torch.zeros(n_samples, *there.shape, device=there.device)
                masks = masks.masked_scatter(there, sample(logits, noise))
                loss = _loss(model, runs, runs.final(masks), metric)
                (logits.grad,) = torch.autograd.grad(loss + penalty * chances, logits)
            optimizer.step()
            decay.step()
            history.append((loss.item(), chances.item()))
            bar.set_postfix(loss=f"{history[-1][0]:.3g}", edges=f"{history[-1][1]:.0f}")
    last = np.mean(history[-max(1, steps // 10) :], 0)
    values = np.full(there.shape, np.nan)
    values[edge_mask(graph)] = expected(logits).detach().double().cpu().numpy()
    attrs = {
        "method": f"learn_mask ({method})", "site": "edges", "helpful_sign": 1, "penalty": penalty, "steps": steps,
        "mask_seed": seed, "ablation": ablation, "loss": float(last[0]), "expected_edges": float(last[1]),
        **metric_attrs([metric], "noise"), "unit": "keeping probability",
        "sign": "larger means more worth its penalty", **graph.attrs(), **provenance(model, pairs),
    }  # fmt: skip
    return xr.DataArray(values, {"source": writers(graph), "target": readers(graph)}, ("source", "target"), attrs=attrs)


def _ugs(logits: Float[Tensor, " edge"], noise: Float[Tensor, "sample edge"]) -> Float[Tensor, "sample edge"]:
    """0 or 1, or, in a window of the noise as wide as w = p (1 - p), uniform between.

    The mask falls from 1 to 0 across the window, which is centred at noise = p: its slope there is d mask / d p = 1 / w. The
    window is hit with probability w, so that the mean gradient with respect to p is the mean slope of the loss between mask 0
    and mask 1: loss(1) - loss(0) of that edge, as for a mask that is 1 with probability p.
    """
    p = logits.sigmoid()
    window = (p * (1 - p)).detach().clamp_min(1e-6)
    return ((p - noise) / window + 0.5).clamp(0, 1)


def _hard_concrete(logits: Float[Tensor, " edge"], noise: Float[Tensor, "sample edge"]) -> Float[Tensor, "sample edge"]:
    gate = ((noise.clamp(1e-6, 1 - 1e-6).logit() + logits) / _TEMPERATURE).sigmoid()
    return (gate * (_RIGHT - _LEFT) + _LEFT).clamp(0, 1)


def _chance_of_some(logits: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The probability that a hard-concrete mask is not 0."""
    return (logits + _SHIFT).sigmoid()


def _loss(
    model: Transformer, runs: MaskedRuns, final: Float[Tensor, "circuit prompt d_model"], metric: Metric
) -> Tensor:
    if metric.name == "kl_divergence":
        return kl_to_clean(model, final, runs.clean_final).mean()
    clean_logits = model.unembed_resid(runs.clean_final)
    clean = metric(clean_logits, runs.pairs, clean_logits)
    found = torch.stack([metric(model.unembed_resid(one), runs.pairs, clean_logits) for one in final])
    if not found.requires_grad:
        raise OptionError(f"metric {metric.name} has no gradient, so no mask can be learned by it")
    return (found - clean).abs().mean()
