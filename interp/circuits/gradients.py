"""The backward pass at every edge's end: gradients at each reader's own input, one layer at a time, last layer first.

A plain backward pass gives one gradient per residual stream, the sum over all that read it. Edges want the parts. So the
streams of a run are kept, and each layer is run once more with its readers' inputs apart (`interp.circuits.split`), under
any backward rule: what is in memory is one layer's graph, never the whole model's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.split import attn_written, head_outputs, mlp_written, normed
from interp.model.transformer import Block, Places, Transformer
from interp.rules import GRADIENT, Rules

Resid = Float[Tensor, "row position d_model"]


@dataclass
class Trace:
    """The residual streams of a run from some layer on: before each layer, before each MLP, and after the last layer."""

    first: int
    before: list[Resid]
    middle: list[Resid]
    final: Resid


@dataclass(frozen=True)
class Arrived:
    """Gradients at the inputs of some readers of one layer, and where those write.

    kind: "logits" (which write nothing), "mlp", "heads" (all queries, all keys, all values); and at last "stream": where the
    trace begins, with no readers.
    """

    layer: int
    kind: str
    inputs: Float[Tensor, "reader row position d_model"] | None
    written: Resid | None


@torch.no_grad()
def trace(model: Transformer, resid: Resid, *, first: int = 0, middle: bool = False) -> Trace:
    """Run the layers from `first` on. middle: the stream given is the one before that layer's MLP.

    In a parallel layer, where attention and MLP read the same, there is no such stream.
    """
    places, found = model.places(resid.shape[1]), Trace(first, [], [], resid)
    for layer in range(first, model.cfg.n_layers):
        block = model.blocks[layer]
        if middle and layer == first:
            between = resid
            found.before.append(resid.new_zeros(0))  # nobody asks for it
        else:
            found.before.append(resid)
            attn_out = block.attn(normed(block, "ln1", resid), places, GRADIENT)
            between = resid + (block.ln1_post.plain(attn_out) if model.cfg.post_norm else attn_out)
        read = resid if model.cfg.parallel else between
        found.middle.append(read)
        resid = between + mlp_written(block, read)
    found.final = resid
    return found


def walk_back(
    model: Transformer, run: Trace, gradient: Resid, *, rules: Rules = GRADIENT, other: Trace | None = None,
    down_to_mlp: bool = False,
) -> Iterator[Arrived]:  # fmt: skip
    """From the gradient at the final stream, before the last norm, down to where the trace begins.

    other: the run that two-run rules compare with. down_to_mlp: the trace begins before its first layer's MLP.
    """
    places = model.places(gradient.shape[1])
    for layer in range(model.cfg.n_layers - 1, run.first - 1, -1):
        block, i = model.blocks[layer], layer - run.first
        into_mlp = _mlp_input(block, run.middle[i], None if other is None else other.middle[i], gradient, rules)
        yield Arrived(layer, "mlp", into_mlp[None], gradient)
        behind = gradient if model.cfg.parallel else gradient + into_mlp
        if layer == run.first and down_to_mlp:
            yield Arrived(layer, "stream", None, behind)
            return
        heads = _head_inputs(block, run.before[i], None if other is None else other.before[i], behind, places, rules)
        yield Arrived(layer, "heads", heads, behind)
        gradient = gradient + into_mlp + heads.sum(0)
    yield Arrived(run.first, "stream", None, gradient)


def final_gradient(
    model: Transformer, final: Resid, read_at: Tensor, seed: Float[Tensor, "row d_vocab"], *, rules: Rules = GRADIENT,
    other: Resid | None = None,
) -> Resid:  # fmt: skip
    """What reaches the final stream from multipliers at the logits; zero where nothing is read."""
    rows = torch.arange(len(final), device=final.device), read_at
    bound = _against(rules, other, lambda stream, r: model.unembed_resid(stream[rows], r))
    with torch.enable_grad():
        leaf = final[rows].detach().requires_grad_()
        (found,) = torch.autograd.grad(model.unembed_resid(leaf, bound), leaf, seed.to(final.dtype))
    gradient = torch.zeros_like(final)
    gradient[rows] = found
    return gradient


def _mlp_input(block: Block, stream: Resid, other: Resid | None, gradient: Resid, rules: Rules) -> Resid:
    bound = _against(rules, other, lambda x, r: mlp_written(block, x, r))
    with torch.enable_grad():
        leaf = stream.detach().requires_grad_()
        (found,) = torch.autograd.grad(mlp_written(block, leaf, bound), leaf, gradient)
    return found


def _head_inputs(
    block: Block, stream: Resid, other: Resid | None, gradient: Resid, places: Places, rules: Rules
) -> Float[Tensor, "reader row position d_model"]:
    """All queries, all keys, all values."""

    def write(apart: Tensor, r: Rules) -> Tensor:
        z = head_outputs(block, dict(zip("qkv", apart[None].chunk(3, 1), strict=True)), places, r)
        return attn_written(block, z[0], r)

    n = 3 * block.cfg.n_heads
    bound = _against(rules, other, lambda x, r: write(x.expand(n, *x.shape), r))
    with torch.enable_grad():
        leaf = stream.detach().expand(n, *stream.shape).requires_grad_()
        (found,) = torch.autograd.grad(write(leaf, bound), leaf, gradient, allow_unused=True, materialize_grads=True)
    return found


def _against(rules: Rules, other: Tensor | None, run) -> Rules:
    """The rules for a piece of the model; two-run rules see the other run through that piece first."""
    if not rules.needs_source:
        return rules
    recording = rules.recording()
    with torch.no_grad():
        run(other, recording)
    return recording.against()
