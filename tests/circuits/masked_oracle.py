"""The definition of a circuit's run, done slowly: reader after reader, each adds up a stream of its own.

Of every component a reader gets ablated + mask * (output in this run - ablated), and nothing else is known here: no sums are
shared, no readers are batched, and there is one circuit at a time. A layer's sublayers are the model's own, each head with
its query, key and value from three streams. Streams may be nudged, which makes gradients at every reader's own input.

Beside it: the circuits and the prompts that it is run on.
"""

import dataclasses
import random

import numpy as np
import torch
from torch import Tensor

from interp import PromptPairs, Transformer
from interp.circuits.ablations import Outputs
from interp.circuits.graph import edge_mask, readers, writers
from interp.model import ops
from interp.rules import GRADIENT, Rules
from tests.circuits.test_exact import ByHand, logit_diff, prompts

POST_NORM = ("gemma2", "gemma3", "olmo2")  # families whose heads do not write to the stream one by one


def whole(cfg) -> torch.Tensor:
    return torch.from_numpy(edge_mask(cfg))


def circuits(cfg, seed: str, densities=(0.05, 0.5, 0.9)) -> torch.Tensor:
    """[circuit, source, target]: random edges of the model, a circuit of each density."""
    generator = torch.Generator().manual_seed(random.Random(seed).randrange(2**31))
    chance = torch.rand(len(densities), *whole(cfg).shape, generator=generator)
    return (chance < torch.tensor(densities)[:, None, None]) & whole(cfg)


def fractions(cfg, n: int = 1, seed: int = 0) -> torch.Tensor:
    """Shares of edges, a few of them beyond 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, *whole(cfg).shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * whole(cfg)


def cut(pairs: PromptPairs, i: int) -> PromptPairs:
    """One prompt by itself, without padding."""
    n, one = int(pairs.lengths[i]), pairs.take([i])
    return dataclasses.replace(one, clean=one.clean[:, :n], corrupt=one.corrupt[:, :n])


def late(which: str) -> tuple[PromptPairs, int]:
    """Pairs that begin alike, and how many of their positions do: those before any of them differs or is read."""
    if which == "middle":
        return prompts().take([0, 2, 3]), 2
    if which == "last":
        return prompts().take([3]), 7
    clean = prompts().clean[:3]
    changed = clean.clone()
    changed[:2, 6] = torch.tensor([50, 51])
    short = dataclasses.replace(
        prompts().take([0, 1, 3]), clean=clean, corrupt=changed, lengths=torch.tensor([8, 7, 4])
    )
    return short, 3


def embeddings(model: Transformer, pairs: PromptPairs, side: str) -> Tensor:
    """[prompt, position, d_model]: token embeddings, without positions."""
    embed = model.W_E[pairs.clean if side == "clean" else pairs.corrupt] * model.cfg.embed_scale
    if side == "corrupt" and pairs.noise_mask is not None:
        embed = torch.where(pairs.noise_mask[..., None], pairs.embedding_noise.to(embed.dtype), embed)
    return embed


class SlowRun:
    """One circuit on some prompts. kept: [source, target], fractions; None keeps everything. nudges: by reader's name."""

    def __init__(
        self, model: Transformer, embed: Tensor, kept: Tensor | None = None, ablated: Outputs | None = None,
        *, nudges: dict[str, Tensor] | None = None, rules: Rules = GRADIENT,
    ):  # fmt: skip
        self.model, self.cfg, self.embed, self.kept, self.ablated = model, model.cfg, embed, kept, ablated
        self.nudges, self.rules = nudges or {}, rules
        self.source, self.target = ({name: i for i, name in enumerate(f(self.cfg))} for f in (writers, readers))
        self.places = model.places(embed.shape[1])
        self.z: list[Tensor] = []
        self.mlps: list[Tensor] = []
        for layer in range(self.cfg.n_layers):
            heads = torch.stack([self.head(layer, head) for head in range(self.cfg.n_heads)], 2)
            if self.cfg.parallel:  # the MLP of this layer does not see its heads
                self.mlps.append(self.mlp(layer))
                self.z.append(heads)
            else:
                self.z.append(heads)
                self.mlps.append(self.mlp(layer))
        self.final = self.stream("logits")

    def stream(self, reader: str) -> Tensor:
        """What this reader reads, of all that has been written so far, before its norm."""
        stream = self.arriving(["input"], reader, self.embed[:, :, None], lambda a: a.embed[:, :, None])[:, :, 0]
        if (offset := self.cfg.position_offset) is not None:
            stream = stream + self.model.pos_embed.W_pos[offset : offset + stream.shape[1]]
        for layer, z in enumerate(self.z):
            block, names = self.model.blocks[layer], [f"a{layer}.h{h}" for h in range(self.cfg.n_heads)]
            seen = self.arriving(names, reader, z, lambda a, layer=layer: a.z[layer])
            written = torch.einsum("pthe,hed->ptd", seen, block.attn.W_O)
            written = written if block.attn.b_O is None else written + block.attn.b_O
            stream = stream + (block.ln1_post(written, self.rules) if self.cfg.post_norm else written)
        for layer, out in enumerate(self.mlps):
            seen = self.arriving([f"m{layer}"], reader, out[:, :, None], lambda a, la=layer: a.mlp[la][:, :, None])
            stream = stream + seen[:, :, 0]
        return stream + self.nudges[reader] if reader in self.nudges else stream

    def arriving(self, sources: list[str], reader: str, values: Tensor, ablated) -> Tensor:
        """values [prompt, position, source, ...] as this reader gets them."""
        if self.kept is None:
            return values
        share = self.kept[[self.source[name] for name in sources], self.target[reader]].to(values.dtype)[:, None]
        return ablated(self.ablated) + share * (values - ablated(self.ablated))

    def read(self, layer: int, head: int, x: str) -> Tensor:
        """Query, key or value of one head: [prompt, position, 1, d_head]."""
        block, stream = self.model.blocks[layer], self.stream(f"a{layer}.h{head}<{x}>")
        every = block.attn.project(x, block.ln1(stream, self.rules) if self.cfg.pre_norm else stream)
        if x != "v":
            rotation = None if block.attn.rotary is None else self.places.rotations[block.attn.rotary]
            every = block.attn.place(x, every, rotation, self.rules)
        mine = head * every.shape[2] // self.cfg.n_heads
        return every[:, :, mine : mine + 1]

    def head(self, layer: int, head: int) -> Tensor:
        """[prompt, position, d_head]: z of one head."""
        attn, (q, k, v) = self.model.blocks[layer].attn, (self.read(layer, head, x) for x in "qkv")
        back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        hidden = (back < 0) | (back >= (attn.window or q.shape[1]))
        scores = ops.attention_scores(q, k, scale=attn.scale, softcap=self.cfg.attn_softcap, rules=self.rules)
        pattern = ops.attention_pattern(scores.masked_fill(hidden, -torch.inf), self.rules)
        return ops.attention_mix(pattern, v, self.rules)[:, :, 0]

    def mlp(self, layer: int) -> Tensor:
        """[prompt, position, d_model]: what an MLP adds to the stream."""
        block, read = self.model.blocks[layer], self.stream(f"m{layer}")
        norm = block.ln1 if self.cfg.shared_norm else block.ln2 if self.cfg.pre_norm else None
        out = block.mlp(read if norm is None else norm(read, self.rules), self.rules)
        return block.ln2_post(out, self.rules) if self.cfg.post_norm else out


def at_end(pairs: PromptPairs, stream: Tensor) -> Tensor:
    """[prompt, d_model]: where each prompt is read."""
    return torch.stack([row[length - 1] for row, length in zip(stream, pairs.lengths.tolist(), strict=True)])


def gradients(
    model: Transformer, pairs: PromptPairs, embed: Tensor, *, other: Tensor | None = None, rules: Rules = GRADIENT,
    moved: dict[str, Tensor] | None = None, metric=logit_diff,
) -> dict[str, Tensor]:  # fmt: skip
    """The metric's gradient at the input of every reader, in the run of these embeddings.

    other: the embeddings of the run that two-run rules compare with. moved: by reader, what is added to what it reads.
    """
    if rules.needs_source:
        rules = rules.recording()
        model.unembed_resid(at_end(pairs, SlowRun(model, other, rules=rules).final), rules)
        rules = rules.against()
    nudges = {name: torch.zeros_like(embed) for name in readers(model.cfg)} | (moved or {})
    nudges = {name: value.detach().requires_grad_() for name, value in nudges.items()}
    with torch.enable_grad():
        run = SlowRun(model, embed, nudges=nudges, rules=rules)
        total = metric(model.unembed_resid(at_end(pairs, run.final), rules), pairs).sum()
        found = torch.autograd.grad(total, list(nudges.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(nudges, found, strict=True))


def eap_by_hand(
    model: Transformer, pairs: PromptPairs, direction: str, found: dict[str, Tensor], *, positions: str = "all"
) -> np.ndarray:
    """[prompt, source, target]: what each source writes in the other run less what it writes in the base run (under a
    post-norm, what it alone changes of the normed sum), times these gradients. Also where there is no edge. "each" keeps
    positions, as a last axis."""
    by_hand = ByHand(model, pairs, direction)
    changes = torch.stack([by_hand.contribution(source) for source in writers(model.cfg)], 1)
    scores = torch.einsum("pstd,prtd->psrt", changes, torch.stack([found[v] for v in readers(model.cfg)], 1)).numpy()
    return scores if positions == "each" else scores.sum(-1)
