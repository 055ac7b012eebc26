"""What a job is: one analysis of one model on one set of prompt pairs, as a frozen value that a file and a process can hold.

    job = Job("patch", "mini-gpt2", task="ioi", n=64, options={"sites": "head", "direction": "noise"})
    job.id                                   # "5f0c...": the same for the same question, so that it is answered once

The id is the start of the SHA-256 of the job's canonical JSON and of the format's version. Anything that changes the result's
bits is in it; where the job runs and where its files lie is not.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from interp.circuits.exact import edge_patching
from interp.directions import BASES
from interp.errors import OptionError, TaskError, one_of
from interp.files import write_atomically
from interp.metrics import METRICS
from interp.node_attribution import attribution
from interp.patching import activation_patching
from interp.rules import get_rules
from interp.sites import SITES
from interp.tasks.named import TASKS, load_task
from interp.tasks.pairs import PromptPairs

FORMAT = "interp-job-1"
ANALYSES: dict[str, Callable] = {"patch": activation_patching, "attribute": attribution, "edges": edge_patching}
_RUNNING = ("max_memory", "batch_size", "announce", "progress")  # the runner's to choose
_TEXTS = ("clean", "corrupt", "answers", "wrong_answers")
_BITS = 64  # of the hash in an id: two of a million jobs share one with probability 3e-8


def options_of(kind: str) -> tuple[str, ...]:
    """Names of the options that a kind of job takes: its analysis' own, less those that say how it runs."""
    analysis = ANALYSES[one_of(kind, ANALYSES, "kind of job")]
    found = [name for name in inspect.signature(analysis).parameters if name not in ("model", "pairs", *_RUNNING)]
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """One analysis to run. Everything is checked that can be without the model; the model's own limits come up when it runs.

    kind: "patch" (`activation_patching`), "attribute" (`attribution`) or "edges" (`edge_patching`).
    model: a bundled model, a folder in Hugging Face's layout, or a hub name.
    task: a named task, of which n pairs are drawn by a seed; or None with prompts of one's own as texts, one answer each.
    options: the analysis' keyword options as plain values (sites, metric, direction, rules, ...).
    block: prompts per shard, which is what an interruption loses at most.

    Raises `OptionError` or `TaskError` naming what is wrong and the nearest right name.
    """

    kind: str
    model: str
    task: str | None = None
    n: int = 8
    seed: int = 0
    clean: Sequence[str] = ()
    corrupt: Sequence[str] = ()
    answers: Sequence[str] = ()
    wrong_answers: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    block: int = 8

    def __post_init__(self) -> None:
        known = options_of(self.kind)
        for name in _TEXTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        self._check_prompts()
        for name, least in (("n", 1), ("seed", 0), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name} of a job is a whole number, at least {least}, not {value!r}")
        if not isinstance(self.model, str) or not self.model:
            raise OptionError(f"a job's model is a name or a folder, not {self.model!r}")
        if not isinstance(self.options, Mapping):
            raise OptionError(f"a job's options are names with values, not {self.options!r}")
        for name in self.options:
            one_of(name, known, f"option of a {self.kind} job")
        object.__setattr__(self, "options", {name: _plain(name, value) for name, value in self.options.items()})
        self._check_options()

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
        # n and seed draw nothing here, and must not make two jobs of one question
        object.__setattr__(self, "n", len(self.clean))
        object.__setattr__(self, "seed", 0)

    def _check_options(self) -> None:
        options = self.options
        if "sites" in options_of(self.kind):
            if not options.get("sites"):
                raise OptionError(f"a {self.kind} job needs sites")
            for site in _listed(options["sites"]):
                one_of(site, SITES, "site")
        for metric in _listed(options.get("metric", [])):
            one_of(metric, METRICS, "metric")
        one_of(options.get("direction", "denoise"), BASES, "direction")
        if "rules" in options:
            get_rules(options["rules"])

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the hash of what is asked."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[: _BITS // 4]

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str | Path = "the job") -> "Job":
        """The job of a JSON object. source: where it came from, for messages. Unknown keys are an `OptionError`."""
        if not isinstance(values, Mapping):
            raise OptionError(f"{source} holds no JSON object")
        if values.get("format") != FORMAT:
            raise OptionError(f"{source} is of format {values.get('format')!r}, and this reads {FORMAT}")
        names = [f.name for f in fields(cls)]
        for name in values:
            one_of(name, ["format", *names], f"key of a job ({source})")
        if missing := [name for name in ("kind", "model") if name not in values]:
            raise OptionError(f"{source} lacks {', '.join(missing)}")
        return cls(**{name: values[name] for name in names if name in values})

    def to_file(self, path: str | Path) -> Path:
        """Write it as JSON."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> "Job":
        """Read it back. Raises `OptionError` naming the file, and in it what is missing or unknown."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise OptionError(f"{path} is not JSON: {error}") from None
        return cls.from_dict(values, source=path)

    def pairs(self, model) -> PromptPairs:
        """All its prompt pairs, in the model's tokens."""
        if self.task is not None:
            return load_task(self.task, model, n=self.n, seed=self.seed)
        return PromptPairs.from_text(
            model, clean=self.clean, corrupt=self.corrupt, answers=self.answers, wrong_answers=self.wrong_answers or None
        )  # fmt: skip

    def run(self, model, pairs: PromptPairs, **running: Any):
        """Its analysis of these pairs. running: batch_size, max_memory, announce or progress."""
        return ANALYSES[self.kind](model, pairs, **self.options, **running)

    def __str__(self) -> str:
        about = ", ".join(f"{_said(v)}" if k == "sites" else f"{k} {_said(v)}" for k, v in self.options.items())
        return f"{self.kind} {self.model} on {self.task or 'own prompts'}{f' ({about})' if about else ''}, n {self.n}"


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
