"""Capital recall: a fact that the model has to have stored.

The capital of France is   ->   " Paris"  (corrupt: another country, wrong answer: that country's capital)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_other, pick_template

# No wording begins with the country: a word at the start of a text is written without the leading space, and then
# not every country is a single token.
TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "In {country}, the capital is",
    "The government of {country} sits in",
    "People who visit the capital of {country} go to",
    "Of all the cities in {country}, the capital is",
)

CORRUPTIONS = {"other_country": "the country becomes another country, whose capital is the wrong answer"}


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    countries: Sequence[str] = words.COUNTRIES,
) -> Example:
    """One capital pair; the wrong answer is right for the corrupt prompt."""
    check_corruption(corruption, CORRUPTIONS, "capitals")
    text = pick_template(rng, TEMPLATES, template, "capitals")
    country = rng.choice(countries)
    other = pick_other(rng, countries, country)
    return Example(
        text.format(country=country),
        text.format(country=other),
        (f" {words.CAPITALS[country]}",),
        (f" {words.CAPITALS[other]}",),
    )


TASK = Task(
    name="capitals",
    summary="capital recall: The capital of France is -> Paris",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
