"""`interp run` and `interp runs`: batches from a file, and what came of them.

interp run grid.toml --dry-run                 what it would take
interp run grid.toml --workers 2               the same again goes on where it ended
interp run grid.toml --executor ray --address auto
interp runs list / show ID / cancel ID / verify / query "SQL" / report ID --out summary.html
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class RunGrid:
    """Run a grid of jobs from a file; the same command again computes only what is missing or damaged."""

    spec: Annotated[Path, tyro.conf.Positional]
    """The jobs: .toml, .yaml or .json (see `interp.jobs.grid`)."""
    runs: Path = Path("interp-runs")
    """Folder of runs; this one gets a folder of its own there."""
    dry_run: bool = False
    """Print shards, and estimated work, time and memory; run nothing but a small pilot."""
    workers: int = 1
    """Processes that compute, each with its model; 1 is this process."""
    executor: Literal["local", "ray"] = "local"
    """ray: workers on the machines of a Ray cluster (extra: cluster)."""
    address: str | None = None
    """The Ray cluster, as auto or host:port (default: RAY_ADDRESS, else one of its own on this machine)."""
    device: str | None = None
    """Default: torch's default device. A GPU's kind, without a number, deals workers out to all of them."""
    threads: int | None = None
    """Threads of each worker (default: this machine's cores over the workers)."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from interp.jobs.grid import Grid
        from interp.jobs.runner import STATUS, crew_of, run
        from interp.jobs.store import Runs

        grid, runs = Grid.from_file(self.spec), Runs(self.runs)
        if self.dry_run:
            from interp.jobs.estimate import estimate

            crew_of(self.workers, self.executor, self.device, self.threads, self.address)  # wrong options are said now
            tell = lambda line: None if self.quiet else print(f"interp: {line}", file=sys.stderr)  # noqa: E731
            print(f"run {grid.id}: {grid}\n")
            print(estimate(grid, runs, workers=self.workers, device=self.device, tell=tell))
            return
        done = run(
            grid, runs, workers=self.workers, executor=self.executor, address=self.address, device=self.device,
            threads=self.threads, progress=not self.quiet,
        )  # fmt: skip
        print(
            f"run {done.id}: {done.status} after {done.seconds:.1f} s, {done.shards:,} shards in {runs.path(done.id)}"
        )
        for text, n in Counter(text for texts in done.warned.values() for text in texts).items():
            print(f"interp: warning: {text}{f' ({n} jobs)' if n > 1 else ''}", file=sys.stderr)
        for job in grid.everything:
            if job.id in done.failed:
                print(f"interp: failed: {job}: {done.failed[job.id]}", file=sys.stderr)
        if done.status in ("cancelled", "interrupted"):
            print("interp: the same command goes on where it ended", file=sys.stderr)
        if STATUS[done.status]:
            sys.stdout.flush()
            raise SystemExit(STATUS[done.status])


@dataclass(frozen=True, kw_only=True)
class _OfRuns:
    """A folder of runs."""

    runs: Path = Path("interp-runs")
    """Folder of runs."""

    def _ids(self, asked: tuple[str, ...]) -> list[str]:
        """The runs that are meant; without any, all. Raises `OptionError` if there is none."""
        from interp.errors import OptionError
        from interp.jobs.store import Runs

        runs = Runs(self.runs)
        found = [runs.find(text) for text in asked] or runs.ids()
        if not found:
            raise OptionError(f"there are no runs in {self.runs}")
        return found


@dataclass(frozen=True, kw_only=True)
class ListRuns(_OfRuns):
    """List runs, the latest first: id, status, shards, time, and what was asked."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.jobs.store import Runs

        runs = Runs(self.runs)
        for id in self._ids(()):
            try:
                run = runs.get(id)
            except OptionError as error:
                print(f"{id}  unreadable: {error}")
                continue
            progress = runs.progress(id)
            share = f"{progress.done / progress.total:.0%}" if progress.total and run.status != "done" else ""
            print(f"{id}  {run.status:11} {share:>4} {run.shards:7,} shards {run.seconds:9.1f} s  {run.name}")


@dataclass(frozen=True, kw_only=True)
class ShowRun(_OfRuns):
    """Show a run's manifest and jobs, as JSON with --json."""

    id: Annotated[str, tyro.conf.Positional]
    """A run's id, the beginning of it, or its name."""
    json: bool = False
    """Print the manifest as it is."""

    def run(self) -> None:
        from dataclasses import asdict

        from interp.jobs.store import Runs

        runs = Runs(self.runs)
        id = runs.find(self.id)
        run = runs.get(id)
        if self.json:
            print(json.dumps(asdict(run), indent=1))
            return
        for name, value in asdict(run).items():
            if value not in ("", {}, []) and name not in ("failed", "datasets", "took", "warned"):
                print(f"{name:12} {value}")
        print("jobs")
        for job in runs.grid(id).everything:
            print(f"    {job.id}  {job}{f'  FAILED: {run.failed[job.id]}' if job.id in run.failed else ''}")


@dataclass(frozen=True, kw_only=True)
class VerifyRuns(_OfRuns):
    """Read every shard of runs and name those that are damaged or missing; exit status 1 if there are any."""

    ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Runs by id, beginning of an id, or name (default: all)."""

    def run(self) -> None:
        from interp.jobs.store import Runs

        runs, wrong = Runs(self.runs), 0
        for id in self._ids(self.ids):
            found = runs.verify(id)
            planned = len(found.whole) + len(found.missing)
            print(f"{id}  {len(found.whole):,} of {planned:,} shards whole  {runs.name_of(id)}")
            for path, why in found.damaged.items():
                print(f"    damaged: {path}: {why}")
            hurt = {path.name[:16] for path in found.damaged}
            for shard in (shard for shard in found.missing if shard.id not in hurt):
                print(f"    missing: {shard}")
            wrong += len(found.missing) + (not planned)
        if wrong:
            print("interp: interp run with the same spec computes what is missing", file=sys.stderr)
            sys.stdout.flush()
            raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class QueryRuns(_OfRuns):
    """Ask any number of runs at once, in SQL: views runs, jobs and scores (see `interp.jobs.query`)."""

    sql: Annotated[str, tyro.conf.Positional]
    """As "select method, avg(value) from scores where variable = 'cmd' group by method"."""
    ids: tuple[str, ...] = ()
    """Runs by id, beginning of an id, or name (default: all)."""
    out: Path | None = None
    """Write the answer: .csv or .parquet."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.files import check_writable, write_atomically
        from interp.jobs.query import query
        from interp.jobs.store import Runs

        if self.out is not None and check_writable(self.out).suffix not in (".csv", ".parquet"):
            raise OptionError(f"cannot write {self.out.suffix or 'a file without an ending'}: use .csv or .parquet")
        found = query(self.sql, Runs(self.runs), self._ids(self.ids))
        for note in found.attrs.pop("notes", ()):
            print(f"interp: {note}", file=sys.stderr)
        if self.out is not None:
            csv = self.out.suffix == ".csv"
            write_atomically(self.out, found.to_csv(index=False) if csv else found.to_parquet(index=False))
        print(found.to_string(index=False))


@dataclass(frozen=True, kw_only=True)
class ReportRun(_OfRuns):
    """Summarise a run: methods side by side, compared in pairs; as text, and as one HTML page."""

    id: Annotated[str, tyro.conf.Positional]
    """A run's id, the beginning of it, or its name."""
    out: Path = Path("interp-summary.html")
    """Page to write."""

    def run(self) -> None:
        from interp.files import check_writable
        from interp.jobs.store import Runs
        from interp.jobs.summary import summary

        check_writable(self.out)
        runs = Runs(self.runs)
        found = summary(runs, runs.find(self.id))
        found.report(self.out)
        print(f"{found}\n\nreport: {self.out.resolve()}")


@dataclass(frozen=True, kw_only=True)
class CancelRun(_OfRuns):
    """Ask the process that works on a run, wherever it was started, to end after the shards in hand."""

    id: Annotated[str, tyro.conf.Positional]
    """A run's id, the beginning of it, or its name."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.jobs.store import Runs

        runs = Runs(self.runs)
        id = runs.find(self.id)
        if not (run := runs.get(id)).active:
            raise OptionError(f"nobody works on run {id}: it is {run.status}")
        runs.cancel(id)
        print(f"run {id} ends after the shards in hand; interp run with the same spec goes on from there")


Command = (
    Annotated[ListRuns, tyro.conf.subcommand("list")]
    | Annotated[ShowRun, tyro.conf.subcommand("show")]
    | Annotated[CancelRun, tyro.conf.subcommand("cancel")]
    | Annotated[VerifyRuns, tyro.conf.subcommand("verify")]
    | Annotated[QueryRuns, tyro.conf.subcommand("query")]
    | Annotated[ReportRun, tyro.conf.subcommand("report")]
)


@dataclass(frozen=True)
class RunsCommands:
    """List, show, cancel, verify, query and summarise runs."""

    what: tyro.conf.OmitSubcommandPrefixes[Command]

    def run(self) -> None:
        self.what.run()
