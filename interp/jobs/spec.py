"""What a job is: one analysis of one model on one set of prompt pairs, as a frozen value that a file and a process can hold.

    job = Job("patch", "mini-gpt2", task="ioi", n=64, options={"sites": "head", "direction": "noise"})
    job.id                                   # "5f0c...": the same for the same question, so that it is answered once

The id is the start of the SHA-256 of the job's canonical JSON and of the format's version. Anything that changes the result's
bits is in it; where the job runs and where its files lie is not.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

from interp.directions import BASES
from interp.errors import OptionError, TaskError, one_of
from interp.jobs.kinds import KINDS, options_of
from interp.metrics import METRICS
from interp.rules import get_rules
from interp.sites import SITES
from interp.tasks.named import TASKS, load_task
from interp.tasks.pairs import PromptPairs

FORMAT = "interp-job-2"
_TEXTS = ("clean", "corrupt", "answers", "wrong_answers")
_BITS = 64  # of the hash in an id: two of a million jobs share one with probability 3e-8
_HELD_OUT = 1_000_003  # how far the seed of pairs to judge by is from that of the pairs that are looked at


@dataclass(frozen=True)
class Job:
    """One analysis to run. Everything is checked that can be without the model; the model's own limits come up when it runs.

    kind: of `interp.jobs.kinds.KINDS`.
    model: a bundled model, a folder in Hugging Face's layout, or a hub name. dtype: default the checkpoint's.
    task: a named task, of which n pairs are drawn by a seed, with its corruption and template as in `load_task`; or None with
        prompts of one's own as texts, one answer each. Kinds of text have neither, and a seed.
    options: the analysis' keyword options as plain values (sites, metric, direction, rules, ...).
    block: prompts per shard, which is what an interruption loses at most; kinds that need all prompts at once have one shard.

    Raises `OptionError` or `TaskError` naming what is wrong and the nearest right name.
    """

    kind: str
    model: str
    task: str | None = None
    n: int = 8
    seed: int = 0
    corruption: str | None = None
    template: int | None = 0
    clean: Sequence[str] = ()
    corrupt: Sequence[str] = ()
    answers: Sequence[str] = ()
    wrong_answers: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtype: str | None = None
    block: int = 8

    def __post_init__(self) -> None:
        kind = KINDS[one_of(self.kind, KINDS, "kind of job")]
        for name in _TEXTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name, least in (("n", 1), ("seed", 0), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name} of a job is a whole number, at least {least}, not {value!r}")
        for name in ("model", "task", "corruption", "dtype"):
            value = getattr(self, name)
            if not ((isinstance(value, str) and value) or (value is None and name != "model")):
                raise OptionError(f"a job's {name} is a name{' or a folder' if name == 'model' else ''}, not {value!r}")
        if self.template is not None and (not isinstance(self.template, int) or isinstance(self.template, bool)):
            raise OptionError(f"a job's template is a number or none, not {self.template!r}")
        if not isinstance(self.options, Mapping):
            raise OptionError(f"a job's options are names with values, not {self.options!r}")
        object.__setattr__(self, "options", {name: _plain(name, value) for name, value in self.options.items()})
        _check_options(self.kind, json.dumps(self.options))
        if kind.of == "text":
            self._check_text()
        else:
            self._check_prompts()
        if not kind.splits:
            object.__setattr__(self, "block", self.n)

    def _check_text(self) -> None:
        if self.task is not None or self.clean:
            raise TaskError(f"a job of kind {self.kind} is about a text, and takes no task and no prompts")
        self._ask_nothing(n=1, corruption=None, template=0)

    def _check_prompts(self) -> None:
        if self.task is None and not self.clean:
            raise TaskError("a job has either a named task or prompts of its own")
        if self.task is not None:
            one_of(self.task, TASKS, "task", TaskError)
            if given := [name for name in _TEXTS if getattr(self, name)]:
                raise TaskError(f"a job with task {self.task!r} takes no {given[0].replace('_', ' ')} of its own")
            return
        for name in ("corrupt", "answers", *(["wrong_answers"] if self.wrong_answers else [])):
            if len(getattr(self, name)) != len(self.clean):
                raise TaskError(
                    f"{len(getattr(self, name))} {name.replace('_', ' ')} for {len(self.clean)} clean prompts"
                )
        self._ask_nothing(n=len(self.clean), seed=0, corruption=None, template=0)

    def _ask_nothing(self, **values: Any) -> None:
        """Set what changes nothing here to one value: two jobs of one question are one job."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the hash of what is asked."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[: _BITS // 4]

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @classmethod
    def from_dict(cls, values: Any, *, source: str = "the job") -> "Job":
        """The job of a JSON object. source: where it came from, for messages. Unknown keys are an `OptionError`."""
        if not isinstance(values, Mapping):
            raise OptionError(f"{source} holds no JSON object")
        if values.get("format", FORMAT) != FORMAT:
            raise OptionError(f"{source} is of format {values['format']!r}, and this reads {FORMAT}")
        names = [f.name for f in fields(cls)]
        for name in values:
            one_of(name, ["format", *names], f"key of a job ({source})")
        if missing := [name for name in ("kind", "model") if name not in values]:
            raise OptionError(f"{source} lacks {', '.join(missing)}")
        return cls(**{name: values[name] for name in names if name in values})

    def pairs(self, model) -> PromptPairs | None:
        """All its prompt pairs, in the model's tokens; None for a kind that is about a text."""
        return self._pairs(model, self.seed)

    def held_out(self, model) -> PromptPairs | None:
        """As many pairs of its task by another seed, to judge by; None where the prompts are its own."""
        return None if self.task is None else self._pairs(model, self.seed + _HELD_OUT)

    def _pairs(self, model, seed: int) -> PromptPairs | None:
        if self.task is not None:
            return load_task(self.task, model, n=self.n, seed=seed, corruption=self.corruption, template=self.template)
        if not self.clean:
            return None
        return PromptPairs.from_text(
            model, clean=self.clean, corrupt=self.corrupt, answers=self.answers, wrong_answers=self.wrong_answers or None
        )  # fmt: skip

    def __str__(self) -> str:
        about = ", ".join(f"{_said(v)}" if k == "sites" else f"{k} {_said(v)}" for k, v in self.options.items())
        asked = f"{self.kind} {self.model}{f' ({about})' if about else ''}"
        if KINDS[self.kind].of == "text":
            return f"{asked}, seed {self.seed}"
        return f"{asked} on {self.task or 'own prompts'}, n {self.n}{f', seed {self.seed}' if self.task else ''}"


@lru_cache(maxsize=4096)
def _check_options(kind: str, text: str) -> None:
    """Check the options of a kind, given as JSON: a grid asks of many jobs what it asks of one."""
    options, known = json.loads(text), options_of(kind)
    for name in options:
        one_of(name, known, f"option of a {kind} job")
    if "sites" in known:
        if not options.get("sites"):
            raise OptionError(f"a {kind} job needs sites")
        for site in _listed(options["sites"]):
            one_of(site, SITES, "site")
    if KINDS[kind].of == "text" and not options.get("hook"):
        raise OptionError(f"a {kind} job needs a hook, as blocks.2.mlp.hook_post")
    for metric in _listed(options.get("metric") or []):
        one_of(metric, METRICS, "metric")
    one_of(options.get("direction", "denoise"), BASES, "direction")
    if "rules" in options:
        get_rules(options["rules"])


def _said(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(value: Any) -> list:
    return [value] if isinstance(value, str) else list(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TaskError(f"{name.replace('_', ' ')} of a job are a list of texts, not {value!r}")
    return tuple(value)


def _plain(name: str, value: Any) -> Any:
    """The value as JSON gives it back; a callable, a tensor or a NaN has no place in a file."""
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise OptionError(f"option {name} of a job is text, a number, true or false, or a list of them, not {value!r}")
