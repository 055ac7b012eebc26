"""Gendered pronoun (after Mathwin et al. 2023).

So Mary is a really great friend, isn't   ->   " she"  (not " he")
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_template

# No wording begins with the name, for the reason given in capitals.py.
TEMPLATES = (
    "So {name} is a really great friend, isn't",
    "So {name} was at the {place} yesterday, wasn't",
    "Then {name} went home because",
    "In the evening {name} left the {place} because",
    "When {name} came to the {place},",
    "My friend {name} said that",
)

CORRUPTIONS = {"other_gender": "the name becomes a name of the other gender, so that the pronoun flips"}
PRONOUNS = {"female": " she", "male": " he"}


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    female_names: Sequence[str] = words.FEMALE_NAMES,
    male_names: Sequence[str] = words.MALE_NAMES,
    places: Sequence[str] = words.PLACES,
) -> Example:
    """One pronoun pair; the clean name is female or male with equal odds."""
    check_corruption(corruption, CORRUPTIONS, "gendered_pronoun")
    text = pick_template(rng, TEMPLATES, template, "gendered_pronoun")
    female, male, place = rng.choice(female_names), rng.choice(male_names), rng.choice(places)
    names, pronouns = (female, male), (PRONOUNS["female"], PRONOUNS["male"])
    if rng.random() < 0.5:
        names, pronouns = names[::-1], pronouns[::-1]
    clean, corrupt = (text.format(name=name, place=place) for name in names)
    return Example(clean, corrupt, pronouns[:1], pronouns[1:])


TASK = Task(
    name="gendered_pronoun",
    summary="pronoun of a name: So Mary is a really great friend, isn't -> she",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
