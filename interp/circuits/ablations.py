"""What stands in for everything outside a circuit: a value for each component's output.

corrupt          what it is in the paired corrupt prompt (MIB's counterfactual)
zero             nothing
mean             its mean over the corrupt prompts of a reference set, and over their positions
positional-mean  the same at each position by itself
optimal          the constant, alike at all positions, that keeps the circuit closest to the whole model (Li & Janson
                 2409.09951): found by gradient descent, see `interp.circuits.optimal`

Learned position embeddings and biases belong to no component and stay as they are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, one_of
from interp.interventions import mean_values
from interp.model.run import record
from interp.model.transformer import Transformer
from interp.sites import SITES
from interp.tasks.pairs import PromptPairs

ABLATIONS = ("corrupt", "zero", "mean", "positional-mean", "optimal")


@dataclass(frozen=True)
class Outputs:
    """What every component puts out: token embeddings, heads (z) and MLPs (as added to the stream) of each layer.

    "prompt" and "position" are 1 where a value serves them all.
    """

    embed: Float[Tensor, "prompt position d_model"]
    z: tuple[Float[Tensor, "_ _ head d_head"], ...]
    mlp: tuple[Float[Tensor, "_ _ d_model"], ...]
    a_run: bool = False  # all of them come from one run of the model, so that equal beginnings have equal values

    @staticmethod
    def hooks(n_layers: int) -> list[str]:
        """Where they are found in a run."""
        return ["hook_embed", *(SITES[site].hook(la) for site in ("head", "mlp_out") for la in range(n_layers))]

    @classmethod
    def of(cls, values: dict[str, Tensor], n_layers: int, *, a_run: bool = False) -> "Outputs":
        """From a run's values at these hooks."""
        of = lambda site: tuple(values[SITES[site].hook(la)] for la in range(n_layers))  # noqa: E731
        return cls(values["hook_embed"], of("head"), of("mlp_out"), a_run)

    def map(self, change) -> "Outputs":
        """Every value changed in the same way."""
        return Outputs(change(self.embed), tuple(map(change, self.z)), tuple(map(change, self.mlp)))


def outputs(model: Transformer, pairs: PromptPairs, side: str) -> Outputs:
    """Every component's output in one run of every prompt."""
    n = model.cfg.n_layers
    return Outputs.of(record(model, pairs.tokens(side), Outputs.hooks(n), pairs.hooks(side), copy=False), n, a_run=True)


def ablated_outputs(
    model: Transformer, pairs: PromptPairs, ablation: str, *, reference: PromptPairs | None = None
) -> Outputs:
    """What replaces each component's output; means are over `reference`'s corrupt prompts (default: these pairs')."""
    one_of(ablation, [a for a in ABLATIONS if a != "optimal"], "ablation")
    if ablation == "corrupt":
        return outputs(model, pairs, "corrupt")
    reference = pairs if reference is None else reference
    if ablation == "zero":
        return outputs(model, pairs.take(torch.arange(1, device=pairs.clean.device)), "corrupt").map(torch.zeros_like)
    if ablation == "positional-mean":
        if reference.clean.shape[1] != pairs.clean.shape[1]:
            raise OptionError(
                f"a mean at each position needs prompts of one length: the reference's have {reference.clean.shape[1]} "
                f"tokens, these {pairs.clean.shape[1]}; use ablation='mean'"
            )
        return _positional_mean(model, reference)
    there = reference.is_token
    return outputs(model, reference, "corrupt").map(lambda value: value[there].mean(0)[None, None])


def _positional_mean(model: Transformer, reference: PromptPairs) -> Outputs:
    n_layers, there = model.cfg.n_layers, reference.is_token
    values = dict(mean_values(model, [reference], "corrupt", ("head", "mlp_out")))
    embed = outputs(model, reference, "corrupt").embed * there[..., None]
    values["hook_embed"] = embed.sum(0, keepdim=True) / there.sum(0).clamp_min(1)[:, None]
    return Outputs.of(values, n_layers)
