"""What a batch is: a grid of jobs, written as a TOML, YAML or JSON file or as a Python object.

    name = "which way of scoring edges"
    models = ["mini-gpt2", "mini-llama"]
    tasks = ["ioi", "capitals"]
    seeds = [0, 1, 2]
    n = 32                                   # prompt pairs of each task

    [[analyses]]
    kind = "circuit"                         # see interp.jobs.kinds
    options = { ablation = "corrupt" }       # the same for all
    grid = { method = ["eap", "eap-ig"] }    # every combination of these

That is 2 x 2 x 3 x 2 = 24 jobs. `[[jobs]]` lists single ones, with the fields of `Job`. A grid's id is a hash of its jobs' ids,
so the same question is the same run however it is written down.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from interp.errors import InterpError, OptionError, one_of
from interp.files import write_atomically
from interp.jobs.kinds import KINDS
from interp.jobs.spec import Job

FORMAT = "interp-grid-1"
_SHARED = ("n", "block", "corruption", "template", "dtype")  # fields of Job that a grid says once


@dataclass(frozen=True)
class Analysis:
    """One kind of job with the options that all its jobs share and, in `grid`, lists of those in which they differ."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        one_of(self.kind, KINDS, "kind of job")
        _check_tables(self.kind, self.options, self.grid)
        for name in self.grid:
            if name in self.options:
                raise OptionError(f"{name} of a {self.kind} analysis is given twice, in options and in grid")

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The options of each of its jobs; later names vary fastest."""
        return [{**self.options, **dict(zip(self.grid, c, strict=True))} for c in product(*self.grid.values())]


_LISTS: dict[str, type] = {"models": str, "tasks": str, "seeds": int, "analyses": Analysis, "jobs": Job}


@dataclass(frozen=True)
class Grid:
    """Many jobs: every analysis of every model on every task with every seed, and single jobs beside them.

    Raises `OptionError` or `TaskError` naming what is wrong, the nearest right name and the job in which it is.
    """

    name: str = ""
    models: Sequence[str] = ()
    tasks: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    n: int = 8
    block: int = 8
    corruption: str | None = None
    template: int | None = 0
    dtype: str | None = None
    analyses: Sequence[Analysis] = ()
    jobs: Sequence[Job] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise OptionError(f"a grid's name is a text, not {self.name!r}")
        for name in _LISTS:
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        if self.analyses and not self.models:
            raise OptionError("this grid has analyses and no models")
        if self.analyses and not self.seeds:
            raise OptionError("this grid has analyses and no seeds")
        if wanting := [a.kind for a in self.analyses if KINDS[a.kind].of == "pairs" and not self.tasks]:
            raise OptionError(f"an analysis of kind {wanting[0]} needs tasks, and this grid has none")
        if not self.everything:
            raise OptionError("this grid asks nothing: it has neither analyses nor jobs")

    @cached_property
    def everything(self) -> tuple[Job, ...]:
        """Every job once: model by model, so that models are loaded seldom."""
        shared, found = {name: getattr(self, name) for name in _SHARED}, list(self.jobs)
        choices = [(analysis.kind, options) for analysis in self.analyses for options in analysis.choices]
        for model, (kind, options) in product(self.models, choices):
            for task in self.tasks if KINDS[kind].of == "pairs" else (None,):
                for seed in self.seeds:
                    found.append(Job(kind, model, task=task, seed=seed, options=options, **shared))
        return tuple({job.id: job for job in found}.values())

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits: of a single job, its own; of several, of all their ids in any order."""
        ids = sorted(job.id for job in self.everything)
        return ids[0] if len(ids) == 1 else hashlib.sha256("\n".join(ids).encode()).hexdigest()[: len(ids[0])]

    def __str__(self) -> str:
        jobs = self.everything
        return self.name or (str(jobs[0]) if len(jobs) == 1 else f"{len(jobs):,} jobs")

    def to_dict(self) -> dict[str, Any]:
        """The grid as JSON holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["analyses"] = [{f.name: getattr(a, f.name) for f in fields(Analysis)} for a in self.analyses]
        values["jobs"] = [job.to_dict() for job in self.jobs]
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @classmethod
    def from_dict(cls, values: Any, *, source: str | Path = "the grid") -> "Grid":
        """The grid of a file's content. source: where it came from, for messages. Unknown keys are an `OptionError`."""
        names = [f.name for f in fields(cls)]
        found = _known(values, ["format", *names], "a grid", source)
        if found.pop("format", FORMAT) != FORMAT:
            raise OptionError(f"{source} is of format {values['format']!r}, and this reads {FORMAT}")
        for name, make in (("analyses", _analysis), ("jobs", _job)):
            if name in found:
                if not isinstance(found[name], Sequence) or isinstance(found[name], str):
                    raise OptionError(f"{name} of {source} are a list of tables, not {found[name]!r}")
                found[name] = [make(one, source) for one in found[name]]
        try:
            return cls(**{name: _listed(name, value) if name in _LISTS else value for name, value in found.items()})
        except InterpError as error:
            raise type(error)(f"{source}: {error}") from None

    def to_file(self, path: str | Path) -> Path:
        """Write it as JSON."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> "Grid":
        """Read a .toml, .yaml or .json file. Raises `OptionError` naming the file, and in it what is missing or unknown."""
        path = Path(path)
        one_of(path.suffix, (".toml", ".yaml", ".yml", ".json"), f"ending of a file of jobs ({path})")
        try:
            values = _parsed(path.suffix, path.read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise OptionError(f"{path} is no {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
        return cls.from_dict(values, source=path)


def _parsed(suffix: str, text: str) -> Any:
    """The content of a file; `ValueError` for what cannot be read."""
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    return tomllib.loads(text) if suffix == ".toml" else json.loads(text)


def _known(values: Any, names: Sequence[str], what: str, source: str | Path) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise OptionError(f"{source} holds no table of {what}")
    for name in values:
        one_of(name, names, f"key of {what} ({source})")
    return dict(values)


def _listed(name: str, values: Any) -> tuple:
    """A field of a grid that is a list. Raises `OptionError` if it is none, or of other things."""
    plain = isinstance(values, Sequence) and not isinstance(values, str)
    if not plain or not all(isinstance(v, _LISTS[name]) and not isinstance(v, bool) for v in values):
        raise OptionError(f"{name} of a grid are a list, not {values!r}")
    return tuple(values)


def _check_tables(kind: Any, options: Any, grid: Any) -> None:
    """Raise `OptionError` if these are no tables, or what is to vary is no list."""
    for name, table in (("options", options), ("grid", grid)):
        if not isinstance(table, Mapping):
            raise OptionError(f"{name} of an analysis are names with values, not {table!r}")
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise OptionError(f"grid.{name} of a {kind} analysis is a list of values, not {values!r}")


def _analysis(values: Any, source: str | Path) -> Analysis:
    found = _known(values, [f.name for f in fields(Analysis)], "an analysis", source)
    if "kind" not in found:
        raise OptionError(f"an analysis of {source} lacks its kind (choose from {', '.join(KINDS)})")
    try:
        _check_tables(found["kind"], found.get("options", {}), found.get("grid", {}))
        return Analysis(**found)
    except InterpError as error:
        raise type(error)(f"{source}: {error}") from None


def _job(values: Any, source: str | Path) -> Job:
    try:
        return Job.from_dict(values, source="this job")
    except InterpError as error:
        raise type(error)(f"{source}: {error}") from None
