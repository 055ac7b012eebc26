"""Transformers that are written down rather than trained, so that their circuit is known.

The residual stream is a row of named blocks. "token" and "position" are one-hot and come from the embeddings; "answer" is
what the logits are read from; a circuit names the blocks in between after what they say. A head is written as it would
be told: which block of the query's position is compared with which block of the key's ("the token here with the previous
token there"), and which block is moved where. An MLP is a few ReLU neurons that read and write blocks.

There are no norms before heads and MLPs. The final norm cannot be left out, so it is made the identity: its eps is 1e12
and its weight 1e6, and x / sqrt(mean(x^2) + 1e12) * 1e6 is x up to a relative 1e-12 * mean(x^2) / 2.

Everything that a circuit does not name is random: heads with random queries, keys and values, neurons with random inputs.
They read all the blocks there are and react to every corruption, but they write only to the block "unread". So an edge
outside of the circuit is silent because nobody listens, and not because nothing is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import ModelConfig, PromptPairs, Transformer
from interp.sites import Node, parse_node

BOS = "<bos>"  # the first word of every vocabulary and of every prompt
LOGIT = 5.0  # what a circuit writes to the answer's logit: odds of 150 to 1 against another token
N_UNREAD = 8  # channels that nobody reads
N_RANDOM = 6  # neurons of each MLP that write only there
_HUGE = 1e12

Matrix = Float[Tensor, "row column"]
Term = tuple[str, Matrix, str]  # a block, a matrix from its channels to those of another block, that block


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """A model, prompts, and the edges that carry the difference between the clean and the corrupt ones.

    edges: ids as in `interp.circuits.graph`; all those whose exact effect on logit_diff is not zero.
    direction: the one in which exact edge patching finds these edges; "both" if it finds them in either.
    story: what the model computes, and why these edges and no others carry the difference.
    """

    name: str
    model: Transformer
    pairs: PromptPairs
    edges: frozenset[str]
    direction: Literal["denoise", "noise", "both"]
    story: str


@dataclass(frozen=True)
class Head:
    """An attention head: what it looks for, and what it moves.

    score: terms (block at the query, matrix, block at the key). A term's score is query @ matrix @ key, times
        `sharpness`; a head adds up its terms.
    moves: terms (block that is read, matrix, block that is written).
    rest: the score of the BOS token, times `sharpness`. A head that finds nothing better rests there.
    """

    score: Sequence[Term]
    moves: Sequence[Term]
    sharpness: float = 60.0  # half of it is a lead of 30, and exp(-30) of the attention goes astray
    rest: float = 0.5


@dataclass(frozen=True)
class Neurons:
    """ReLU neurons: `reads` maps a block to [channel, neuron], `writes` a block to [neuron, channel]."""

    reads: Mapping[str, Matrix]
    bias: Sequence[float]
    writes: Mapping[str, Matrix]


@dataclass(frozen=True)
class Vocabulary:
    """Words with their ids, and the vectors and matrices that speak of some of the words."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, text: str) -> list[int]:
        """The ids of words with spaces between them."""
        return [self.words.index(word) for word in text.split()]

    def among(self, text: str) -> Float[Tensor, " word"]:
        """1 for each of these words, 0 for all others: "is it one of them?"."""
        chosen = torch.zeros(len(self), dtype=torch.float64)
        chosen[self.ids(text)] = 1.0
        return chosen

    def only(self, text: str) -> Matrix:
        """The identity on these words, and zero on all others: "which of them is it?"."""
        return torch.diag(self.among(text))

    def pairs(
        self, clean: Sequence[str], corrupt: Sequence[str], answers: Sequence[str], wrong: Sequence[str], **about: str
    ) -> PromptPairs:
        """Prompts of words with spaces between them, as pairs; BOS is put before each."""
        tokens = lambda prompts: torch.tensor([self.ids(f"{BOS} {prompt}") for prompt in prompts])  # noqa: E731
        answer_ids, wrong_ids = (torch.tensor([self.ids(word) for word in words]) for words in (answers, wrong))
        strings = tuple(tuple(f"{BOS} {prompt}".split()) for prompt in clean)
        return PromptPairs(tokens(clean), tokens(corrupt), answer_ids, wrong_ids, token_strings=strings, **about)


@dataclass
class Stream:
    """Named blocks of channels, side by side."""

    widths: dict[str, int]
    start: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        names = list(self.widths)
        self.start = {name: sum(self.widths[before] for before in names[:i]) for i, name in enumerate(names)}

    def __getitem__(self, name: str) -> slice:
        return slice(self.start[name], self.start[name] + self.widths[name])

    @property
    def width(self) -> int:
        return sum(self.widths.values())


def if_then(at_query: Float[Tensor, " q"], at_key: Float[Tensor, " k"]) -> Matrix:
    """The matrix of a term: where the query's block has one of these, the head looks for one of those."""
    return torch.outer(at_query, at_key)


def build(
    name: str, vocabulary: Vocabulary, *, n_ctx: int, n_layers: int, n_heads: int, blocks: Mapping[str, int],
    heads: Mapping[str, Head], mlps: Mapping[str, Neurons] | None = None, seed: int = 0,
) -> Transformer:  # fmt: skip
    """A float64 transformer with these heads ("a1.h0") and neurons (of "m1"), and random ones in all other places.

    blocks: widths of the blocks between "token", "position" and "answer", which every model has.
    """
    n_words, mlps = len(vocabulary), mlps or {}
    stream = Stream({"token": n_words, "position": n_ctx, **blocks, "answer": n_words, "unread": N_UNREAD})
    d_head = max([N_UNREAD, *(_n_channels(head, stream) for head in heads.values())])
    d_mlp = N_RANDOM + max([0, *(len(mlp.bias) for mlp in mlps.values())])
    weights = _bystanders(stream, n_layers, n_heads, d_head, d_mlp, seed)
    for node, head in heads.items():
        _write_head(weights, parse_node(node), head, stream)
    for node, neurons in mlps.items():
        _write_neurons(weights, parse_node(node).layer, neurons, stream)
    cfg = ModelConfig(
        name=name, family="known", n_layers=n_layers, d_model=stream.width, n_heads=n_heads, n_kv_heads=n_heads,
        d_head=d_head, d_mlp=d_mlp, d_vocab=n_words, n_ctx=n_ctx, norm="rms", eps=_HUGE, pre_norm=False,
        activation="relu", attn_scale=(1.0,) * n_layers, windows=(None,) * n_layers, rotary=(None,) * n_layers,
        position_offset=0, prepend_bos=False,
    )  # fmt: skip
    return Transformer(cfg, weights)


def _bystanders(
    stream: Stream, n_layers: int, n_heads: int, d_head: int, d_mlp: int, seed: int
) -> dict[str, Float[Tensor, "..."]]:
    """Embeddings, unembedding, and layers of random components that write only to "unread"."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
    heard, unread = slice(0, stream.start["unread"]), stream["unread"]
    n_words, n_ctx = stream.widths["token"], stream.widths["position"]
    weights = {
        "embed.W_E": zeros(n_words, stream.width), "pos_embed.W_pos": zeros(n_ctx, stream.width),
        "unembed.W_U": zeros(stream.width, n_words),
        "ln_final.w": torch.full((stream.width,), _HUGE**0.5, dtype=torch.float64),
    }  # fmt: skip
    weights["embed.W_E"][:, stream["token"]] = torch.eye(n_words, dtype=torch.float64)
    weights["pos_embed.W_pos"][:, stream["position"]] = torch.eye(n_ctx, dtype=torch.float64)
    weights["unembed.W_U"][stream["answer"]] = torch.eye(n_words, dtype=torch.float64)
    for layer in range(n_layers):
        at, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        for x in "QKV":
            weights[f"{at}.W_{x}"] = zeros(n_heads, stream.width, d_head)
            # short queries: patterns that prefer some positions and attend to all
            weights[f"{at}.W_{x}"][:, heard] = noise(n_heads, heard.stop, d_head) * (d_head**-0.5 if x == "Q" else 1.0)
        weights[f"{at}.b_Q"] = zeros(n_heads, d_head)
        weights[f"{at}.W_O"] = zeros(n_heads, d_head, stream.width)
        weights[f"{at}.W_O"][:, :, unread] = noise(n_heads, d_head, N_UNREAD) * d_head**-0.5
        weights[f"{mlp}.W_in"], weights[f"{mlp}.W_out"] = zeros(stream.width, d_mlp), zeros(d_mlp, stream.width)
        weights[f"{mlp}.W_in"][heard], weights[f"{mlp}.b_in"] = noise(heard.stop, d_mlp), noise(d_mlp)
        weights[f"{mlp}.W_out"][:, unread] = noise(d_mlp, N_UNREAD) * d_mlp**-0.5
    return weights


def _n_channels(head: Head, stream: Stream) -> int:
    """How wide a head must be: each term of the score has the key's channels to itself, each block moved its own."""
    scored = 1 + sum(stream.widths[at_key] for _, _, at_key in head.score)
    return max(scored, sum(stream.widths[read] for read in {read for read, _, _ in head.moves}))


def _write_head(weights: dict[str, Float[Tensor, "..."]], node: Node, head: Head, stream: Stream) -> None:
    q, k, v, o = (weights[f"blocks.{node.layer}.attn.W_{x}"][node.index] for x in "QKVO")
    for matrix in (q, k, v, o):
        matrix.zero_()
    # channel 0 lets the head rest: all queries have it, and of the keys only BOS, which is word 0
    weights[f"blocks.{node.layer}.attn.b_Q"][node.index, 0] = head.sharpness * head.rest
    k[stream.start["token"], 0] = 1.0
    first = 1
    for at_query, matrix, at_key in head.score:
        channels = slice(first, first + stream.widths[at_key])
        q[stream[at_query], channels] = head.sharpness * matrix
        k[stream[at_key], channels] = torch.eye(stream.widths[at_key], dtype=torch.float64)
        first = channels.stop
    place, first = {}, 0
    for read, matrix, written in head.moves:
        if read not in place:
            place[read] = slice(first, first + stream.widths[read])
            v[stream[read], place[read]] = torch.eye(stream.widths[read], dtype=torch.float64)
            first = place[read].stop
        o[place[read], stream[written]] += matrix


def _write_neurons(weights: dict[str, Float[Tensor, "..."]], layer: int, neurons: Neurons, stream: Stream) -> None:
    n, at = len(neurons.bias), f"blocks.{layer}.mlp"
    weights[f"{at}.W_in"][:, :n], weights[f"{at}.W_out"][:n] = 0.0, 0.0
    weights[f"{at}.b_in"][:n] = torch.tensor(neurons.bias, dtype=torch.float64)
    for read, matrix in neurons.reads.items():
        weights[f"{at}.W_in"][stream[read], :n] = matrix
    for written, matrix in neurons.writes.items():
        weights[f"{at}.W_out"][:n, stream[written]] = matrix
