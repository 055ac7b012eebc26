"""Known circuits that attend, copy and count: induction, a small IOI, a backup head, reversal, a fraction.

Those in which an MLP combines two bits are in `gates.py`; `CIRCUITS` has them all. Each function writes its model down and
returns it with prompts on which exactly the named edges carry the difference between clean and corrupt.
"""

import random
from collections.abc import Callable
from functools import cache

import torch

from tests.known_circuits.building import LOGIT, Head, KnownCircuit, Neurons, Vocabulary, build, if_then
from tests.known_circuits.gates import and_of_two, mlp_gate, or_of_two


def _eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@cache
def induction() -> KnownCircuit:
    """... A B ... A -> B: a previous-token head makes the keys with which an induction head finds B."""
    letters = "a b c d e f g h i j"
    words, n_ctx = Vocabulary(("<bos>", *letters.split())), 8
    letter = words.only(letters)
    previous_token = Head(
        score=[("position", torch.diag(torch.ones(n_ctx - 1, dtype=torch.float64), -1), "position")],
        moves=[("token", letter, "previous")],
    )
    induction_head = Head(score=[("token", letter, "previous")], moves=[("token", LOGIT * letter, "answer")])
    model = build(
        "induction", words, n_ctx=n_ctx, n_layers=2, n_heads=3, blocks={"previous": len(words)},
        heads={"a0.h1": previous_token, "a1.h2": induction_head}, seed=1,
    )  # fmt: skip
    rng, rows = random.Random(1), []
    for changed in ("key", "query", "value") * 2:
        a, b, c, d, e, f, g = rng.sample(letters.split(), 7)
        segments = [f"{a} {b}", f"{c} {d}", e, f]
        rng.shuffle(segments)
        clean = " ".join([*segments, a])
        swap = {"key": {a: c, c: a}, "query": {}, "value": {b: g}}[changed]
        corrupt = [swap.get(word, word) for word in " ".join(segments).split()] + [c if changed == "query" else a]
        rows.append((clean, " ".join(corrupt), b, g if changed == "value" else d))
    return KnownCircuit(
        name="induction",
        model=model,
        pairs=words.pairs(*zip(*rows, strict=True), name="induction", corruption="key, query or value"),
        edges=frozenset({"input->a0.h1<v>", "a0.h1->a1.h2<k>", "input->a1.h2<q>", "input->a1.h2<v>", "a1.h2->logits"}),
        direction="both",
        story="The prompt has A B and C D somewhere and ends with A. Head a0.h1 attends to the token before, by position "
        "alone, and writes it down; a1.h2 at the end looks for the position where the token written down is its own, and "
        "copies the token there. A corruption breaks one of three things. It swaps the earlier A and C, so that D "
        "follows A: the difference goes through the values of a0.h1 and the keys of a1.h2. Or it ends the prompt with "
        "C: through the query of a1.h2. Or it puts another token for B: through the values of a1.h2.",
    )


@cache
def duplicate_mover() -> KnownCircuit:
    """Ann and Bob ... Bob gave to -> Ann: duplicate-token head, S-inhibition head, name mover."""
    names = "ann bob cy dee eve fay"
    words, n_ctx = Vocabulary(("<bos>", *names.split(), "and", "when", "then", "gave", "to")), 8
    n, name, everything = len(words), words.only(names), torch.ones(len(words), dtype=torch.float64)
    duplicate_token = Head(  # the same name at another position than this one
        score=[("token", name, "token"), ("position", -2 * _eye(n_ctx), "position")],
        moves=[("token", name, "repeated")],
    )
    s_inhibition = Head(
        score=[("token", if_then(words.among("to"), everything), "repeated")],
        moves=[("repeated", _eye(n), "inhibited")],
    )
    name_mover = Head(  # a name, but not the inhibited one, and not where a name is said for the second time
        score=[
            ("token", if_then(words.among("to"), words.among(names)), "token"),
            ("inhibited", -_eye(n), "token"),
            ("token", -if_then(words.among("to"), everything), "repeated"),
        ],
        moves=[("token", LOGIT * name, "answer")],
    )
    model = build(
        "duplicate_mover", words, n_ctx=n_ctx, n_layers=3, n_heads=3, blocks={"repeated": n, "inhibited": n},
        heads={"a0.h2": duplicate_token, "a1.h0": s_inhibition, "a2.h1": name_mover}, seed=2,
    )  # fmt: skip
    rng, rows = random.Random(2), []
    for i in range(6):
        first, second = rng.sample(names.split(), 2)
        subject, other = (first, second) if i % 2 else (second, first)
        opening = f"{first} and {second} {rng.choice(['when', 'then'])}"
        rows.append((f"{opening} {subject} gave to", f"{opening} {other} gave to", other, subject))
    return KnownCircuit(
        name="duplicate_mover",
        model=model,
        pairs=words.pairs(*zip(*rows, strict=True), name="duplicate_mover", corruption="the other name is repeated"),
        edges=frozenset({"input->a0.h2<q>", "a0.h2->a1.h0<v>", "a1.h0->a2.h1<q>", "a2.h1->logits"}),
        direction="both",
        story="Head a0.h2 attends from a name to its earlier mention and writes down the name that is repeated; a1.h0 "
        "moves it to the end; there a2.h1 attends to names, but not to that one, and copies the one that is left. The "
        "corrupt prompt repeats the other name. The earlier mentions are the same in both, so that a0.h2 differs by its "
        "query only; that some name is repeated is the same, so that a1.h0 differs by its values only; the first "
        "mentions are where a2.h1 looks for a name to copy, so that it differs by its query only.",
    )


@cache
def backup() -> KnownCircuit:
    """A head writes the answer; a weaker one in the next layer writes it only where the first one is silent."""
    names, fillers = "ann bob cy dee eve", "p q r s t"
    words, n_ctx = Vocabulary(("<bos>", *names.split(), *fillers.split(), "to", "for")), 7
    name, is_name = words.only(names), words.among(names)
    main = Head(  # knows "to" but not "for"
        score=[("token", if_then(words.among("to"), is_name), "token")],
        moves=[("token", LOGIT * name, "answer"), ("token", is_name[:, None], "done")],
    )
    backup_head = Head(
        score=[
            ("token", if_then(words.among("to for"), is_name), "token"),
            ("done", -is_name[None, :], "token"),
        ],
        moves=[("token", LOGIT / 2 * name, "answer")],
    )
    model = build(
        "backup", words, n_ctx=n_ctx, n_layers=2, n_heads=3, blocks={"done": 1},
        heads={"a0.h0": main, "a1.h1": backup_head}, seed=3,
    )  # fmt: skip
    rng, rows = random.Random(3), []
    for _ in range(5):
        answer, wrong = rng.sample(names.split(), 2)
        before = rng.sample([answer, *rng.sample(fillers.split(), 4)], 5)
        rows.append((" ".join([*before, "to"]), " ".join([*before, "for"]), answer, wrong))
    return KnownCircuit(
        name="backup",
        model=model,
        pairs=words.pairs(
            *zip(*rows, strict=True), name="backup", corruption="a last word the main head does not know"
        ),
        edges=frozenset({"input->a0.h0<q>", "a0.h0->logits", "a0.h0->a1.h1<q>", "a1.h1->logits"}),
        direction="both",
        story="After 'to' head a0.h0 copies the name and writes down that it is done; a1.h1 would copy the name too, half "
        "as strongly, but its query is switched off by what a0.h0 wrote. After 'for' a0.h0 is silent and a1.h1 takes over. "
        "So the gap is half of what a0.h0 writes, and the edge a0.h0->logits is worth twice the gap. Its other edge, which "
        "silences the backup, takes the gap away once, and so does the backup's own a1.h1->logits: two edges of the "
        "opposite sign. Through input->a0.h0<q> all of this happens together, which makes the gap, no more and no less.",
    )


@cache
def reverse() -> KnownCircuit:
    """t1 t2 t3 t4 sep -> t4 t3 t2 t1, one token at a time: attention to the mirrored position."""
    n_tokens, letters = 4, "a b c d e f g h"
    words, n_ctx = Vocabulary(("<bos>", *letters.split(), "sep")), 2 * n_tokens + 2
    mirror = torch.zeros(n_ctx, n_ctx, dtype=torch.float64)
    for position in range(n_tokens + 1, 2 * n_tokens + 1):  # that of sep reads the last token, the next the one before
        mirror[position, 2 * n_tokens + 1 - position] = 1.0
    mover = Head(score=[("position", mirror, "position")], moves=[("token", LOGIT * words.only(letters), "answer")])
    model = build(
        "reverse", words, n_ctx=n_ctx, n_layers=2, n_heads=2, blocks={}, heads={"a1.h0": mover}, seed=4
    )  # fmt: skip
    rng, rows = random.Random(4), []
    for _ in range(6):
        *tokens, other = rng.sample(letters.split(), n_tokens + 1)
        corrupt = [tokens[0], other, *tokens[2:]]
        after = f"sep {tokens[3]} {tokens[2]}"
        rows.append((f"{' '.join(tokens)} {after}", f"{' '.join(corrupt)} {after}", tokens[1], other))
    return KnownCircuit(
        name="reverse",
        model=model,
        pairs=words.pairs(
            *zip(*rows, strict=True), name="reverse", corruption="another token at the mirrored position"
        ),
        edges=frozenset({"input->a1.h0<v>", "a1.h0->logits"}),
        direction="both",
        story="Where the i-th token of the reversed sequence is due, a1.h0 attends to the i-th token from the end, by "
        "position alone, and copies it. The prompts are read at the third step; the corrupt one has another second "
        "token. Queries and keys are the same in both, so that only the values carry the difference.",
    )


@cache
def frac_prevs() -> KnownCircuit:
    """Are more or fewer than half of the tokens so far an x? An MLP marks each x, a head takes the mean of the marks."""
    others, n_tokens = "p q r s", 7
    words = Vocabulary(("<bos>", "x", *others.split(), "more", "fewer"))
    marker = Neurons(  # is it an x; is it not
        reads={"token": torch.stack([words.among("x"), -words.among("x")], 1)},
        bias=(0.0, 1.0),
        writes={"is_x": _eye(2)[:, :1], "is_other": _eye(2)[:, 1:]},
    )
    scale = n_tokens * LOGIT  # a fraction counts in steps of one seventh
    mean_head = Head(  # all positions alike, but for BOS, which is no token of the sequence
        score=[],
        moves=[
            ("is_x", scale * words.among("more")[None], "answer"),
            ("is_other", scale * words.among("fewer")[None], "answer"),
        ],
        rest=-1.0,
    )
    model = build(
        "frac_prevs", words, n_ctx=n_tokens + 1, n_layers=2, n_heads=3, blocks={"is_x": 1, "is_other": 1},
        heads={"a1.h1": mean_head}, mlps={"m0": marker}, seed=5,
    )  # fmt: skip
    rng, rows = random.Random(5), []
    for i in range(6):
        tokens = ["x"] * 4 + rng.choices(others.split(), k=3)
        rng.shuffle(tokens)
        fewer = tokens.copy()
        fewer[rng.choice([at for at, token in enumerate(tokens) if token == "x"])] = rng.choice(others.split())
        row = " ".join(tokens), " ".join(fewer), "more", "fewer"
        rows.append(row if i % 2 else (row[1], row[0], row[3], row[2]))
    return KnownCircuit(
        name="frac_prevs",
        model=model,
        pairs=words.pairs(*zip(*rows, strict=True), name="frac_prevs", corruption="one x more or one fewer"),
        edges=frozenset({"input->m0", "m0->a1.h1<v>", "a1.h1->logits"}),
        direction="both",
        story="The MLP m0 marks each token as an x or not; a1.h1 attends to all positions alike, so that it puts out the "
        "fraction of x, which it writes to the logit of 'more', and the rest to that of 'fewer'. Clean prompts have four "
        "or three x among seven tokens, corrupt ones three or four. Attention is the same in both: values carry it all.",
    )


CIRCUITS: dict[str, Callable[[], KnownCircuit]] = {
    circuit.__name__: circuit
    for circuit in (induction, duplicate_mover, mlp_gate, backup, or_of_two, and_of_two, reverse, frac_prevs)
}
