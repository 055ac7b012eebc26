"""Greater-than (Hanna et al. 2305.00586).

    The war lasted from the year 1732 to the year 17   ->   any of "33" ... "99"  (not "00" ... "32")

The score is the probability on years after the start minus the probability on the others. The start year must be two
tokens, " 17" and "32", in GPT-2's tokenizer; the years it merges into one token (" 1700", " 1830", ...) are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_template

TEMPLATES = (
    "The {event} lasted from the year {century}{yy} to the year {century}",
    "The {event} went on from the year {century}{yy} until the year {century}",
    "The {event} began in the year {century}{yy} and ended in the year {century}",
    "The {event} that started in {century}{yy} was over in {century}",
    "People remember the {event} from {century}{yy} to {century}",
    "The long {event} of the years {century}{yy} to {century}",
)

CORRUPTIONS = {"start_01": "the start year's last two digits become 01, so that every later year is as good"}

# For each century, the last two digits that GPT-2 does not keep as a token of their own (from its merge table).
MERGED_YEARS = {
    12: {0, 80},
    13: {0, 2, 3, 4, 5, 6, 7, 8, 9},
    14: {0, 40},
    15: {0, 2, 3, 4, 5, 6, 7, 8, 9},
    16: {0},
    17: {0},
    18: {0, 30, 40, 50, 60, 61, 62, 63, 65, 70, 80, 86, 88, 89, 90, 93, 95, 96, 97, 98, 99},
}
CENTURIES = tuple(MERGED_YEARS)
TWO_DIGITS = tuple(f"{year:02d}" for year in range(100))


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    events: Sequence[str] = words.EVENTS,
    centuries: Sequence[int] = CENTURIES,
    years: Sequence[int] = tuple(range(2, 99)),
) -> Example:
    """One greater-than pair; answers and wrong answers are two-digit tokens without a leading space."""
    check_corruption(corruption, CORRUPTIONS, "greater_than")
    text = pick_template(rng, TEMPLATES, template, "greater_than")
    event, century = rng.choice(events), rng.choice(centuries)
    allowed = [year for year in years if 1 < year < 99 and year not in MERGED_YEARS[century]]
    if not allowed:
        raise ValueError(f"none of the years {list(years)} is in 02..98 and two tokens in the {century}00s")
    year = rng.choice(allowed)

    def fill(yy: int) -> str:
        return text.format(event=event, century=century, yy=TWO_DIGITS[yy])

    return Example(fill(year), fill(1), TWO_DIGITS[year + 1 :], TWO_DIGITS[: year + 1])


TASK = Task(
    name="greater_than",
    summary="later year: The war lasted from the year 1732 to the year 17 -> 33 to 99",
    metric="probability_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
