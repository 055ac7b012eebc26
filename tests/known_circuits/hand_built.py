"""Transformers whose circuit is known because it was written down, weight by weight.

The residual stream is a row of blocks: the token (one-hot), the position (one-hot), and as many named blocks as are
needed, each as wide as the vocabulary. A head "moves": its query exists at one position only and its key at one other,
with a score so large that attention is exactly one-hot there; its value copies one block and its output writes another.
All remaining heads attend and have values, at random, but write nothing; MLPs are zero unless a gate is asked for.
There are no norms before the sublayers, and the final one has so large an eps, undone by its weight, that it is the
identity to thirteen digits: logits are what is in the block called "out", and a whole effect is exactly 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from interp import ModelConfig, PromptPairs, Transformer

N_VOCAB, N_POSITIONS = 8, 6
SOURCE, MIDDLE, END = 1, 3, 5  # positions
BLOCKS = ("token", "position", "middle", "left", "right", "out")
_START = {name: i * N_VOCAB for i, name in enumerate(BLOCKS)}
_HUGE = 1e12


@dataclass(frozen=True)
class Move:
    """What a head does: copy block `reads` at position `source` into block `writes` at position `target`."""

    layer: int
    head: int
    source: int
    target: int
    reads: str = "token"
    writes: str = "out"

    @property
    def node(self) -> str:
        return f"a{self.layer}.h{self.head}"


def hand_built(
    moves: list[Move], *, n_layers: int = 2, n_heads: int = 3, gate: Literal["and", "or"] | None = None, seed: int = 0
) -> Transformer:
    """A float64 transformer that makes these moves and does nothing else.

    gate: the MLP of the last layer writes to "out" whether blocks "left" and "right" both hold ("and"), or either of
    them holds ("or"), the same token: relu(l + r - 1), or relu(l + r) - relu(l + r - 1), for every token.
    """
    d_model, d_mlp = len(BLOCKS) * N_VOCAB, 2 * N_VOCAB
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
    one_hot = torch.eye(N_VOCAB, dtype=torch.float64)
    weights = {
        "embed.W_E": zeros(N_VOCAB, d_model), "pos_embed.W_pos": zeros(N_POSITIONS, d_model),
        "unembed.W_U": zeros(d_model, N_VOCAB), "ln_final.w": torch.full((d_model,), _HUGE**0.5, dtype=torch.float64),
    }  # fmt: skip
    weights["embed.W_E"][:, block("token")] = one_hot
    weights["pos_embed.W_pos"][:, block("position")] = one_hot[:N_POSITIONS]
    weights["unembed.W_U"][block("out")] = one_hot
    for layer in range(n_layers):
        at, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        weights |= {f"{at}.W_{x}": noise(n_heads, d_model, N_VOCAB) for x in "QKV"}
        weights |= {f"{at}.W_O": zeros(n_heads, N_VOCAB, d_model)}
        weights |= {f"{mlp}.W_in": noise(d_model, d_mlp), f"{mlp}.W_out": zeros(d_mlp, d_model)}
    for move in moves:
        q, k, v, o = (weights[f"blocks.{move.layer}.attn.W_{x}"][move.head] for x in "QKVO")
        for matrix in (q, k, v):
            matrix.zero_()
        q[_START["position"] + move.target, 0] = 1e4
        k[_START["position"] + move.source, 0] = 1.0
        v[block(move.reads)] = one_hot
        o[:, block(move.writes)] = one_hot
    if gate is not None:
        mlp = f"blocks.{n_layers - 1}.mlp"
        weights[f"{mlp}.W_in"].zero_()
        for i in range(2):
            for name in ("left", "right"):
                weights[f"{mlp}.W_in"][block(name), i * N_VOCAB : (i + 1) * N_VOCAB] = one_hot
        weights[f"{mlp}.b_in"] = torch.tensor([0.0] * N_VOCAB + [-1.0] * N_VOCAB, dtype=torch.float64)
        either, both = (1.0, -1.0) if gate == "or" else (0.0, 1.0)
        weights[f"{mlp}.W_out"][:N_VOCAB, block("out")] = either * one_hot
        weights[f"{mlp}.W_out"][N_VOCAB:, block("out")] = both * one_hot
    cfg = ModelConfig(
        name="hand-built", family="hand-built", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads,
        d_head=N_VOCAB, d_mlp=d_mlp, d_vocab=N_VOCAB, n_ctx=N_POSITIONS, norm="rms", eps=_HUGE, pre_norm=False,
        activation="relu", attn_scale=(1.0,) * n_layers, windows=(None,) * n_layers, rotary=(None,) * n_layers,
        position_offset=0, prepend_bos=False,
    )  # fmt: skip
    return Transformer(cfg, weights)


def block(name: str) -> slice:
    """Where a block is in the residual stream."""
    return slice(_START[name], _START[name] + N_VOCAB)


def swapped(n: int = 4, positions: tuple[int, ...] = (SOURCE,), seed: int = 0) -> PromptPairs:
    """Random prompts; the clean ones have one token at `positions`, which is the answer, the corrupt ones another."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(2, N_VOCAB, (n, N_POSITIONS), generator=generator)
    corrupt = clean.clone()
    answers = torch.arange(n) % (N_VOCAB - 2) + 2
    wrong = torch.where(answers < N_VOCAB - 1, answers + 1, 2)
    for position in positions:
        clean[:, position], corrupt[:, position] = answers, wrong
    return PromptPairs(clean, corrupt, answers[:, None], wrong[:, None], name="swapped", corruption="token")
