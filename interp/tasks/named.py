"""`load_task`: the named tasks, as prompt pairs in a model's own tokens."""

import importlib
import random

from interp.errors import OptionError, TaskError, one_of
from interp.tasks.corrupt import KINDS, corrupt
from interp.tasks.examples import Task
from interp.tasks.pairs import Encoder, PromptPairs

TASKS = ("ioi", "greater_than", "capitals", "gendered_pronoun", "subject_verb", "induction", "docstring")


def get_task(name: str) -> Task:
    """The generator of a named task; `TaskError` with the nearest name if there is none."""
    return importlib.import_module(f"interp.tasks.{one_of(name, TASKS, 'task', TaskError)}").TASK


def load_task(
    name: str, model, *, n: int = 64, seed: int = 0, corruption: str | None = None, template: int | None = 0
) -> PromptPairs:
    """`n` different prompt pairs of a named task.

    corruption: one of the task's own (default: its first), or "gaussian", "zero", "mean", "resample", which act on
        the tokens that the task's first corruption would replace.
    template: the wording, by number; None mixes all of them, which gives prompts of different lengths.
    The pairs are the same for the same model vocabulary, n and seed. Raises `TaskError` if the task does not exist or
    the model's tokenizer cannot say it (its words are not single tokens, or not in its vocabulary).
    """
    task = get_task(name)
    if n < 1:
        raise OptionError(f"n must be at least 1, not {n}")
    if template is not None and not 0 <= template < task.n_templates:
        raise OptionError(f"task {name} has templates 0 to {task.n_templates - 1}, not {template}")
    if corruption is not None:
        one_of(corruption, [*task.corruptions, *KINDS], f"corruption of {name}", TaskError)
    text_corruption = corruption if corruption in task.corruptions else task.default_corruption
    encode = Encoder.of(model)
    rng, chosen, seen, refused = random.Random(seed), [], set(), {}
    for _ in range(50 * n + 200):
        if len(chosen) == n:
            break
        example = task.generate(rng, corruption=text_corruption, template=template)
        if (example.clean, example.corrupt) in seen:
            continue
        seen.add((example.clean, example.corrupt))
        if reason := encode.refusal(example.clean, example.corrupt, (*example.answers, *example.wrong_answers)):
            refused.setdefault(reason, example)
            continue
        chosen.append(example)
    if len(chosen) < n:
        why = f"; for instance {next(iter(refused))}" if refused else ""
        raise TaskError(f"{model.cfg.name}: only {len(chosen)} of {n} different {name} pairs can be made{why}")
    pairs = PromptPairs.from_text(
        model,
        clean=[e.clean for e in chosen],
        corrupt=[e.corrupt for e in chosen],
        answers=[e.answers for e in chosen],
        wrong_answers=[e.wrong_answers for e in chosen],
        name=name,
        corruption=text_corruption,
        metric=task.metric,
        seed=seed,
    )
    return corrupt(model, pairs, corruption, seed=seed) if corruption in KINDS else pairs
