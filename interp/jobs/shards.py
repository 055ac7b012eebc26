"""The unit of a batch: some prompts of one job, by one model's weights.

A shard's id is a hash of the job, the prompts and what else decides its numbers: the model's weights, the text of what learns
from one, the versions of interp and torch, the kind of device. So a result is taken for what it is, and what was computed with
other weights is not found at all.
"""

import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

import interp
from interp.bundled import bundled_models, bundled_text
from interp.errors import LoadError
from interp.jobs.kinds import KINDS
from interp.jobs.spec import Job


@dataclass(frozen=True, slots=True)
class Shard:
    """The prompts `first` to `beyond` - 1 of a job; id: 16 hexadecimal digits."""

    job: Job
    first: int
    beyond: int
    id: str

    def __str__(self) -> str:
        return f"{self.id} ({self.job}, prompts {self.first} to {self.beyond - 1})"


def shards_of(jobs: Sequence[Job], identities: Mapping[str, str], environment: str) -> Iterator[Shard]:
    """Every shard of some jobs, in order. identities: `identities_of` them, at the time; environment: see `environment_of`."""
    for job in jobs:
        read = "".join(f" {identities[name]}" for name in sources_of(job))
        stem = f"{job.id}{read} {environment}"
        for first in range(0, job.n, job.block):
            beyond = min(first + job.block, job.n)
            yield Shard(job, first, beyond, hashlib.sha256(f"{stem} {first} {beyond}".encode()).hexdigest()[:16])


def environment_of(device: str) -> str:
    """What may change the last bits of a number here: versions, and the type of device, as "cpu"."""
    return f"interp {interp.__version__}, torch {torch.__version__}, {device}"


def sources_of(job: Job) -> tuple[str, ...]:
    """What a job reads: its model by name, and a text, as `text:NAME`, if its kind is about one."""
    return (job.model, f"text:{job.options.get('text') or ''}") if KINDS[job.kind].of == "text" else (job.model,)


def identities_of(jobs: Sequence[Job]) -> dict[str, str]:
    """What each source of some jobs is now. Raises `LoadError` for a model that is not there; a text that is not is "missing"."""
    found = {}
    for name in dict.fromkeys(name for job in jobs for name in sources_of(job)):
        found[name] = _of_text(name.removeprefix("text:")) if name.startswith("text:") else identity(name)
    return found


def _of_text(name: str) -> str:
    path = Path(name) if name else bundled_text()
    if path is None or not path.is_file():
        return "missing"  # the jobs say so, one by one
    with path.open("rb") as file:
        return f"file:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"


def identity(model: str) -> str:
    """What a model's numbers come from: the digest of a folder's weights and settings, or the commit of a hub's model.

    Reads all of the files, at the disk's speed. Raises `LoadError` for a model that is not there.
    """
    folder = bundled_models().get(model, Path(model))
    return f"files:{_digest(folder)}" if folder.is_dir() else f"hub:{_commit(model)}"


def _digest(folder: Path) -> str:
    """Of every file that loading reads, by name."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja") and path.is_file():
            with path.open("rb") as file:
                found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:32]


@lru_cache(maxsize=64)
def _commit(name: str) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        path = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"{name!r} is neither a bundled model, nor a folder, nor at hand from the hub ({reason})"
        ) from None
    return extract_commit_hash(path, None) or "unknown"


def code_version() -> dict[str, str | bool]:
    """interp's version and, in a clone, its commit and whether files differ from it (and a digest of how)."""
    about: dict[str, str | bool] = {"interp": interp.__version__}
    root = Path(interp.__file__).resolve().parent.parent
    if (root / ".git").exists():
        git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout  # noqa: E731
        try:
            changes = git("diff", "HEAD")
            about |= {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(changes)}
        except OSError:
            return about  # no git here
        if changes:
            about["changes"] = hashlib.sha256(changes.encode()).hexdigest()[:16]
    return about
