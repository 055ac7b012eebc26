"""What a task is: a generator of clean and corrupt prompt pairs, as text.

A pair differs only by words swapped for words of the same token length (symmetric token replacement, Zhang & Nanda
2309.16042), so position i of the clean prompt and position i of the corrupt one play the same role. Tokenising
is left to `pairs.py`: nothing here knows about models, and nothing imports torch.

    >>> import random
    >>> from interp.tasks.ioi import TASK
    >>> example = TASK.example(random.Random(0))
    >>> example.answers, example.wrong_answers        # doctest: +SKIP
    ((' Mary',), (' John',))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One prompt pair. Answers are written as typed after the prompt, leading space included: `" Mary"`.

    `answers` are right for the clean prompt, `wrong_answers` are what a model falls for that misses the corrupted
    word; where the corruption flips the answer they are right for the corrupt prompt.
    """

    clean: str
    corrupt: str
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A behaviour to explain: how to make pairs for it and how to score an answer.

    `corruptions` maps each way of corrupting to a one-line description; the first is the default. `generate` takes a
    `random.Random`, `corruption=` and `template=` (None: a random wording), and task-specific keywords beside.
    """

    name: str
    summary: str
    metric: str
    corruptions: Mapping[str, str]
    n_templates: int
    generate: Callable[..., Example]

    @property
    def default_corruption(self) -> str:
        return next(iter(self.corruptions))

    def example(
        self, rng: random.Random, *, corruption: str | None = None, template: int | None = None, **options: object
    ) -> Example:
        """One pair with the default corruption, or the named one."""
        corruption = self.default_corruption if corruption is None else corruption
        return self.generate(rng, corruption=corruption, template=template, **options)


def check_corruption(corruption: str, known: Mapping[str, str], task: str) -> None:
    """Raise a ValueError that lists the choices if the task has no such corruption."""
    if corruption not in known:
        raise ValueError(f"task {task!r} has no corruption {corruption!r}; it has {', '.join(map(repr, known))}")


def pick_template(rng: random.Random, templates: Sequence[T], template: int | None, task: str) -> T:
    """The template of that number, or a random one for None.

    The random draw is made in either case, so that fixing the template leaves the words of the example as they were.
    """
    drawn = rng.randrange(len(templates))
    if template is None:
        return templates[drawn]
    if not 0 <= template < len(templates):
        raise ValueError(f"task {task!r} has templates 0 to {len(templates) - 1}, not {template}")
    return templates[template]


def pick_other(rng: random.Random, words: Sequence[str], *taken: str) -> str:
    """A word of the list that is none of `taken`."""
    free = [word for word in words if word not in taken]
    if not free:
        raise ValueError(f"no word is left: all of {', '.join(words)} are taken")
    return rng.choice(free)
