"""Optimal ablation: the constants that components outside a circuit should put out so that it does best without them.

    minimise over constants a:   mean over prompts and circuits of KL(model(clean) || circuit with everything else set to a)

(Li & Janson 2409.09951.) A constant per head, MLP and token embedding, alike at all positions; found by Adam from the mean.
Zero, mean and corrupt values can throw a model off its course and so make a circuit look worse than the loss of information
does; these cannot, being the best that constants can do.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits.ablations import Outputs, ablated_outputs
from interp.circuits.graph import edge_mask
from interp.circuits.masked import MaskedRuns
from interp.errors import OptionError
from interp.model.transformer import Transformer
from interp.precision import at_least_float32
from interp.tasks.pairs import PromptPairs


def kl_to_clean(
    model: Transformer, final: Float[Tensor, "circuit prompt d_model"], clean_final: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, " circuit"]:
    """KL(clean || circuit) in nats, mean over prompts, from final residual streams."""
    log_p = at_least_float32(model.unembed_resid(clean_final)).log_softmax(-1)
    log_q = at_least_float32(model.unembed_resid(final)).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def optimal_outputs(
    model: Transformer, pairs: PromptPairs, masks: Bool[np.ndarray, "circuit source target"], *, steps: int = 200,
    learning_rate: float = 0.02, n_prompts: int = 16, n_circuits: int = 4, seed: int = 0, progress: bool = False,
) -> Outputs:  # fmt: skip
    """The constants for these circuits together, from `steps` steps on random prompts and circuits.

    learning_rate: in units of each constant's root mean square at the start.
    """
    if steps < 1 or not learning_rate > 0:
        raise OptionError(f"optimal ablation takes at least 1 step at a positive rate, not {steps} at {learning_rate}")
    constants = ablated_outputs(model, pairs, "mean").map(lambda x: x.clone().requires_grad_())
    leaves = [constants.embed, *constants.z, *constants.mlp]
    groups = [{"params": [x], "lr": learning_rate * (float(x.detach().square().mean().sqrt()) + 1e-6)} for x in leaves]
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    masks = masks[(edge_mask(model.cfg) & ~masks).any((1, 2))]  # in the whole model nothing is ablated
    if not len(masks):
        return constants.map(Tensor.detach)
    draw, device = np.random.default_rng(seed), pairs.clean.device
    runs: dict[bytes, MaskedRuns] = {}
    best, kept = torch.inf, constants.map(lambda x: x.detach().clone())
    average: float | None = None
    for _ in tqdm(range(steps), desc="optimal ablation", unit="step", disable=not progress, leave=False):
        rows = np.sort(draw.permutation(len(pairs))[:n_prompts])
        if rows.tobytes() not in runs:  # where there are no more pairs than a step takes, every step has the same
            runs = {rows.tobytes(): MaskedRuns(model, pairs.take(torch.from_numpy(rows).to(device)), constants)}
        run = runs[rows.tobytes()]
        chosen = masks[draw.integers(len(masks), size=min(n_circuits, len(masks)))]
        with torch.enable_grad():
            final = run.final(torch.from_numpy(chosen).to(device))
            loss = kl_to_clean(model, final, run.clean_final).mean()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        if average <= best:
            best, kept = average, constants.map(lambda x: x.detach().clone())
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        decay.step()
    return kept
