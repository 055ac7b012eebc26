"""Known circuits in which an MLP combines two bits that two heads bring to the last position.

A prompt says somewhere whether x is 0 or 1 ("x0" or "x1"), elsewhere the same of y, and ends with "=". Two heads find
these words by their kind and write the bit into the blocks "x" and "y" at the end; the MLP after them computes

    or   min(1, x + y)     = relu(x + y) - relu(x + y - 1)
    and  max(0, x + y - 1) = relu(x + y - 1)
    xor                      relu(x + y) - 2 relu(x + y - 1)

and writes the result g to the logit of "1", and 1 - g to that of "0".

What patching single edges finds of a gate depends on the direction (Heimersheim & Nanda 2404.15255). Where both bits
differ between clean (1, 1) and corrupt (0, 0), restoring one of them turns an OR on and does nothing to an AND; spoiling
one of them turns an AND off and does nothing to an OR. The edge from the MLP to the logits is found in either.
"""

import random
from functools import cache

import torch

from interp import Transformer
from tests.known_circuits.building import LOGIT, Head, KnownCircuit, Neurons, Vocabulary, build, if_then

Bits = tuple[int, int]  # x, y

FILLERS = "p q r s t"
WORDS = Vocabulary(("<bos>", "x0", "x1", "y0", "y1", *FILLERS.split(), "=", "0", "1"))
N_FILLERS = 3
GATES = {"or": (1.0, -1.0), "and": (0.0, 1.0), "xor": (1.0, -2.0)}  # weights of relu(x + y) and relu(x + y - 1)


def _bit_head(bit: str) -> Head:
    """Finds "x0" or "x1", whichever there is, and writes 1 if it is "x1"."""
    return Head(
        score=[("token", if_then(WORDS.among("="), WORDS.among(f"{bit}0 {bit}1")), "token")],
        moves=[("token", WORDS.among(f"{bit}1")[:, None], bit)],
    )


def _gate(kind: str) -> Neurons:
    """relu(x + y), relu(x + y - 1), and a neuron that is always 1."""
    total = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    gate = torch.tensor([*GATES[kind], 0.0], dtype=torch.float64)
    always = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    to_one, to_zero = torch.outer(gate, WORDS.among("1")), torch.outer(always - gate, WORDS.among("0"))
    return Neurons(reads={"x": total, "y": total}, bias=(0.0, -1.0, 1.0), writes={"answer": LOGIT * (to_one + to_zero)})


def _model(name: str, kind: str, heads: dict[str, str], seed: int) -> Transformer:
    """A model of two layers whose `heads` bring the bits and whose last MLP is the gate."""
    return build(
        name, WORDS, n_ctx=N_FILLERS + 4, n_layers=2, n_heads=3, blocks={"x": 1, "y": 1},
        heads={node: _bit_head(bit) for bit, node in heads.items()}, mlps={"m1": _gate(kind)}, seed=seed,
    )  # fmt: skip


def _edges(heads: dict[str, str]) -> frozenset[str]:
    paths = {edge for node in heads.values() for edge in (f"input->{node}<v>", f"{node}->m1")}
    return frozenset(paths | {"m1->logits"})


def prompts_of(changes: list[tuple[Bits, Bits]], seed: int) -> tuple[list[str], list[str]]:
    """Clean and corrupt prompts with these bits (x, y): both words among fillers, in any order."""
    rng, clean, corrupt = random.Random(seed), [], []
    for bits in changes:
        places = rng.sample(range(N_FILLERS + 2), 2)
        fillers = rng.sample(FILLERS.split(), N_FILLERS + 2)
        for (x, y), prompts in zip(bits, (clean, corrupt), strict=True):
            said = {places[0]: f"x{x}", places[1]: f"y{y}"}
            prompts.append(" ".join([*(said.get(i, word) for i, word in enumerate(fillers)), "="]))
    return clean, corrupt


@cache
def mlp_gate() -> KnownCircuit:
    """The exclusive or of two bits, one of which is flipped: a head in either layer, then the second layer's MLP."""
    heads = {"x": "a0.h1", "y": "a1.h0"}
    changes = [((x, y), flipped) for x in (0, 1) for y in (0, 1) for flipped in ((1 - x, y), (x, 1 - y))]
    answers = [str(x ^ y) for (x, y), _ in changes]
    wrong = [str(x ^ y) for _, (x, y) in changes]
    return KnownCircuit(
        name="mlp_gate",
        model=_model("mlp_gate", "xor", heads, seed=6),
        pairs=WORDS.pairs(*prompts_of(changes, seed=6), answers, wrong, name="mlp_gate", corruption="one bit flipped"),
        edges=_edges(heads),
        direction="both",
        story="Head a0.h1 brings bit x to the end and a1.h0 bit y; m1 puts out whether they differ. Each pair flips one "
        "bit, x in half of them and y in the others, so that in each pair one path has the whole effect and the other "
        "none. Where the words are is the same in both runs: queries and keys carry nothing.",
    )


def _both_bits_differ(name: str, kind: str, direction: str, story: str, seed: int) -> KnownCircuit:
    heads, n = {"x": "a0.h0", "y": "a0.h2"}, 6
    clean, corrupt = prompts_of([((1, 1), (0, 0))] * n, seed)
    return KnownCircuit(
        name=name,
        model=_model(name, kind, heads, seed),
        pairs=WORDS.pairs(clean, corrupt, ["1"] * n, ["0"] * n, name=name, corruption="both bits 0"),
        edges=_edges(heads),
        direction=direction,
        story=story,
    )


@cache
def or_of_two() -> KnownCircuit:
    """One of two bits is enough, and both differ: denoising finds either path, noising only the edge after the gate."""
    return _both_bits_differ(
        "or_of_two", "or", "denoise",
        "Heads a0.h0 and a0.h2 bring bits x and y to the end, and m1 puts out min(1, x + y). Both bits are 1 in clean "
        "prompts and 0 in corrupt ones. In the corrupt run one restored bit is enough for the whole effect; in the clean "
        "run one spoiled bit changes nothing, since the other is still there.",
        seed=7,
    )  # fmt: skip


@cache
def and_of_two() -> KnownCircuit:
    """Both of two bits are needed, and both differ: noising finds either path, denoising only the edge after the gate."""
    return _both_bits_differ(
        "and_of_two", "and", "noise",
        "Heads a0.h0 and a0.h2 bring bits x and y to the end, and m1 puts out max(0, x + y - 1). Both bits are 1 in clean "
        "prompts and 0 in corrupt ones. In the clean run one spoiled bit takes the whole effect away; in the corrupt run "
        "one restored bit changes nothing, since the other is still missing.",
        seed=8,
    )  # fmt: skip
