"""Induction: continue a random sequence that is being repeated (Olsson et al. 2209.11895).

    Words: stone fish lamp snow wolf stone fish lamp   ->   " snow"

The words are unrelated, so only the earlier occurrence tells what comes next: find the last word's (A's) earlier
place, copy the word after it (B).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_template

# The bare sequence starts with a space, so that its first word is the same token as in the repeat.
TEMPLATES = ("", "Words:", "List:", "Now say:")

CORRUPTIONS = {
    "first_occurrence": "in the first round B becomes another word C, so that A is followed by C (the wrong answer)",
    "no_repeat": "the whole first round becomes other words, so that there is nothing to copy",
}


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    vocabulary: Sequence[str] = words.COMMON_WORDS,
    length: int = 8,
    repeated: int = 4,
) -> Example:
    """One induction pair: `length` different words, then the first `repeated` of them again; the answer comes next."""
    check_corruption(corruption, CORRUPTIONS, "induction")
    if not 1 <= repeated < length:
        raise ValueError(f"repeated must be between 1 and length - 1 = {length - 1}, not {repeated}")
    if len(vocabulary) < 2 * length:
        raise ValueError(f"{2 * length} different words are needed, the vocabulary has {len(vocabulary)}")
    prefix = pick_template(rng, TEMPLATES, template, "induction")
    drawn = rng.sample(vocabulary, 2 * length)
    first, fresh = drawn[:length], drawn[length:]
    if corruption == "first_occurrence":
        changed = first[:repeated] + [fresh[repeated]] + first[repeated + 1 :]
    else:
        changed = fresh

    def fill(first_round: list[str]) -> str:
        return prefix + "".join(f" {word}" for word in first_round + first[:repeated])

    return Example(fill(first), fill(changed), (f" {first[repeated]}",), (f" {fresh[repeated]}",))


TASK = Task(
    name="induction",
    summary="repeat a random sequence: stone fish lamp snow stone fish lamp -> snow",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
