'''Docstring completion (Heimersheim & Janiak 2023).

    def send(self, files, size, owner, mode):
        """stone lamp wolf

        :param files: snow fish
        :param size: gold rain
        :param                             ->   " owner"  (not " mode")

The answer is the argument that follows, in the definition, the one documented last: an induction-like step between
two lists of different layout.
'''

from __future__ import annotations

import random
from collections.abc import Sequence

from interp.tasks import words
from interp.tasks.examples import Example, Task, check_corruption, pick_template

FUNCTIONS = ("run", "send", "load", "save", "make", "read", "write", "open")

# (arguments after self, arguments documented before the prompt ends)
TEMPLATES = ((4, 2), (5, 3), (4, 1))

CORRUPTIONS = {
    "random_args": "the argument names in the definition become others, so that it no longer tells the order",
    "random_doc": "the argument names documented so far become others, so that no place in the definition is found",
}


def write(function: str, arguments: Sequence[str], summary: str, documented: Sequence[tuple[str, str]]) -> str:
    """The source text up to and including the `:param` that is to be completed."""
    lines = [f"def {function}(self, {', '.join(arguments)}):", f'    """{summary}', ""]
    lines += [f"    :param {name}: {description}" for name, description in documented]
    return "\n".join([*lines, "    :param"])


def generate(
    rng: random.Random,
    *,
    corruption: str,
    template: int | None = None,
    variables: Sequence[str] = words.VARIABLES,
) -> Example:
    """One docstring pair: answer the next argument, wrong answer the one after it."""
    check_corruption(corruption, CORRUPTIONS, "docstring")
    n_arguments, n_documented = pick_template(rng, TEMPLATES, template, "docstring")
    drawn = rng.sample(variables, 2 * n_arguments)
    arguments, fresh = drawn[:n_arguments], drawn[n_arguments:]
    function = rng.choice(FUNCTIONS)
    # The summary starts right after the quotes, without a space: "make", like the rest of the text, never changes.
    summary = "make " + " ".join(rng.sample(words.COMMON_WORDS, 2))
    descriptions = [" ".join(rng.sample(words.COMMON_WORDS, 2)) for _ in range(n_documented)]

    def fill(defined: Sequence[str], documented: Sequence[str]) -> str:
        return write(function, defined, summary, list(zip(documented[:n_documented], descriptions, strict=True)))

    corrupt = fill(fresh, arguments) if corruption == "random_args" else fill(arguments, fresh)
    return Example(
        fill(arguments, arguments), corrupt, (f" {arguments[n_documented]}",), (f" {arguments[n_documented + 1]}",)
    )


TASK = Task(
    name="docstring",
    summary="next argument: def send(self, files, size): ... :param files: ... :param -> size",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    n_templates=len(TEMPLATES),
    generate=generate,
)
