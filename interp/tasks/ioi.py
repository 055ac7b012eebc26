"""Indirect object identification (Wang et al. 2211.00593).

    When Mary and John went to the store, John gave a drink to   ->   " Mary"  (not " John")

The indirect object (IO, Mary) is named once, the subject (S, John) twice; the answer is the name that is not repeated.
The two names come in either order (ABBA and BABA), so position alone does not tell. A wording is an opener that puts
two people together and a clause in which one of them gives something.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_other, pick_template

OPENERS = (
    "When {a} and {b} went to the {place},",
    "While {a} and {b} were working at the {place},",
    "After {a} and {b} met at the {place},",
    "Then {a} and {b} had a long talk at the {place}, and",
    "Yesterday {a} and {b} came to the {place} together.",
    "The friends {a} and {b} walked to the {place}.",
)

GIVES = (
    "{s} gave a {object} to",
    "{s} handed a {object} to",
    "{s} decided to give a {object} to",
    "{s} passed a {object} to",
    "{s} brought a {object} to",
)

# (opener, give): every opener and every clause occurs, in a handful of the possible combinations.
TEMPLATES = ((0, 0), (1, 1), (2, 2), (3, 0), (4, 3), (5, 4), (0, 4), (2, 1))

CORRUPTIONS = {
    "s2_io_flip": "the second mention of the subject becomes the indirect object, so that the answer flips",
    "abc": "the second mention of the subject becomes a third name, so that both names are equally good answers",
    "random_names": "all names become other names in the same places, so that the answer is none of the clean names",
}


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    names: Sequence[str] = words.NAMES,
    places: Sequence[str] = words.PLACES,
    objects: Sequence[str] = words.OBJECTS,
) -> Example:
    """One IOI pair: answer the indirect object, wrong answer the subject."""
    check_corruption(corruption, CORRUPTIONS, "ioi")
    opener, give = pick_template(rng, TEMPLATES, template, "ioi")
    text = f"{OPENERS[opener]} {GIVES[give]}"
    io = rng.choice(names)
    subject = pick_other(rng, names, io)
    io_first = rng.random() < 0.5
    place, thing = rng.choice(places), rng.choice(objects)

    def fill(io: str, subject: str, giver: str) -> str:
        first, second = (io, subject) if io_first else (subject, io)
        return text.format(a=first, b=second, s=giver, place=place, object=thing)

    if corruption == "s2_io_flip":
        corrupt = fill(io, subject, io)
    elif corruption == "abc":
        corrupt = fill(io, subject, pick_other(rng, names, io, subject))
    else:
        new_io = pick_other(rng, names, io, subject)
        new_subject = pick_other(rng, names, io, subject, new_io)
        corrupt = fill(new_io, new_subject, new_subject)
    return Example(fill(io, subject, subject), corrupt, (f" {io}",), (f" {subject}",))


TASK = Task(
    name="ioi",
    summary="indirect object: When Mary and John went to the store, John gave a drink to -> Mary",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
