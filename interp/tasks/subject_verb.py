"""Subject-verb agreement across an attractor (Linzen et al. 2016; Marks et al. 2403.19647 "nounPP").

    The keys to the cabinet   ->   " are"  (not " is")

The verb agrees with the subject (keys), not with the noun beside it, the attractor (cabinet), which has the opposite
number half of the time. The opening words tell which verb is due: is/are, was/were or has/have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_other, pick_template

IS, WAS, HAS = (" is", " are"), (" was", " were"), (" has", " have")

# (wording, (singular verb, plural verb))
TEMPLATES = (
    ("The {subject} {preposition} the {attractor}", IS),
    ("We know that the {subject} {preposition} the {attractor}", IS),
    ("Today the {subject} {preposition} the {attractor}", IS),
    ("Yesterday the {subject} {preposition} the {attractor}", WAS),
    ("Last year the {subject} {preposition} the {attractor}", WAS),
    ("For years the {subject} {preposition} the {attractor}", HAS),
)

PREPOSITIONS = ("near", "behind", "beside", "to", "with", "from", "by")
CORRUPTIONS = {"subject_number": "the subject changes between singular and plural, so that the verb flips"}


def inflect(noun: str, is_plural: bool) -> str:
    return words.plural(noun) if is_plural else noun


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    nouns: Sequence[str] = words.NOUNS,
    prepositions: Sequence[str] = PREPOSITIONS,
    attractor_number: str | None = None,
) -> Example:
    """One agreement pair.

    `attractor_number` relates the attractor to the clean subject: `"opposite"`, `"same"`, or None for either.
    """
    check_corruption(corruption, CORRUPTIONS, "subject_verb")
    if attractor_number not in (None, "opposite", "same"):
        raise ValueError(f"attractor_number is 'opposite', 'same' or None, not {attractor_number!r}")
    text, verbs = pick_template(rng, TEMPLATES, template, "subject_verb")
    subject = rng.choice(nouns)
    attractor = pick_other(rng, nouns, subject)
    preposition = rng.choice(prepositions)
    is_plural, differs = rng.random() < 0.5, rng.random() < 0.5
    if attractor_number is not None:
        differs = attractor_number == "opposite"

    def fill(subject_is_plural: bool) -> str:
        return text.format(
            subject=inflect(subject, subject_is_plural),
            preposition=preposition,
            attractor=inflect(attractor, is_plural != differs),
        )

    return Example(fill(is_plural), fill(not is_plural), (verbs[is_plural],), (verbs[not is_plural],))


TASK = Task(
    name="subject_verb",
    summary="agreement past an attractor: The keys to the cabinet -> are",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
