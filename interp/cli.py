"""`interp`: the command line. It parses flags, calls the library's own functions and prints what they return.

    interp discover                                   the main job, on the bundled model
    interp discover --model gpt2 --task greater_than
    interp discover --level edge --faithfulness 0.9   the smallest circuit that is 90 % faithful
    interp patch --sites head --positions all --out heads.csv
    interp attribute --rules relp --task capitals     one backward pass, checked against exact patching
    interp edges --task capitals --n 8                every edge of the model's graph
    interp sae train / eval / show                    sparse autoencoders (interp.sae_cli)
    interp neurons decode / find / clamp              neurons' weights as tokens (interp.neurons_cli)
    interp run GRID.toml / interp runs list ...       batches of jobs, and what came of them (interp.runs_cli)
    interp app                                        the dashboard, in the browser (interp.app_cli)
    interp models / interp tasks / interp rules       what there is

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from interp.app_cli import App
from interp.neurons_cli import NeuronCommands
from interp.runs_cli import RunGrid, RunsCommands
from interp.sae_cli import SAECommands

if TYPE_CHECKING:
    from interp.tasks.pairs import PromptPairs


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The model and the behaviour to explain."""

    model: str = "mini-gpt2"
    """Bundled model, folder in Hugging Face's layout, or hub name."""
    task: str = "ioi"
    """Named task (see `interp tasks`)."""
    pairs: Path | None = None
    """Prompt pairs from a CSV or JSON(L) file instead of a named task."""
    skip_unusable: bool = False
    """Leave out pairs of a file that the model's tokenizer cannot align, instead of refusing the file."""
    n: int = 64
    """Prompt pairs."""
    seed: int = 0
    """Seed of the pairs and of the bootstrap."""
    corruption: str | None = None
    """How prompts are corrupted (default: the task's first way; also gaussian, zero, mean, resample)."""
    template: int | None = 0
    """Wording of the task by number; None mixes them."""
    metric: str | None = None
    """Default: the task's own."""
    direction: Literal["denoise", "noise", "both"] = "denoise"
    """denoise: corrupt run, clean values patched in. noise: the reverse. both: the mean of denoise and minus noise."""
    device: str | None = None
    """Default: torch's default device."""
    dtype: str | None = None
    """Default: the checkpoint's."""
    engine: Literal["sweep", "hooks"] = "sweep"
    """sweep: all places in one growing batch. hooks: a forward pass per place, slow and obviously right."""
    max_memory: str | None = None
    """Memory that the sweep may take at a time, as 800M or 4G (default: three quarters of what is free)."""
    batch_size: int | None = None
    """Prompts per forward pass (default: all)."""
    quiet: bool = False
    """No progress bars and no plans."""

    def running(self) -> dict:
        """The options of a run that do not change its result. Plans are told as they are made."""

        def announce(plan: object) -> None:
            if not self.quiet:
                print(f"interp: {plan}", file=sys.stderr)

        from interp.files import n_bytes

        memory = None if self.max_memory is None else n_bytes(self.max_memory)
        return {"engine": self.engine, "max_memory": memory, "batch_size": self.batch_size,
                "announce": announce, "progress": not self.quiet}  # fmt: skip

    def load(self) -> "tuple[object, PromptPairs]":
        """The model and its prompt pairs."""
        from interp.model.load import load_model
        from interp.tasks.corrupt import KINDS, corrupt
        from interp.tasks.named import get_task, load_task
        from interp.tasks.pairs import PromptPairs

        if self.pairs is None:
            get_task(self.task)  # before minutes are spent on loading a model
        model = load_model(self.model, device=self.device, dtype=self.dtype)
        if self.pairs is None:
            pairs = load_task(
                self.task, model, n=self.n, seed=self.seed, corruption=self.corruption, template=self.template
            )
        else:
            pairs = PromptPairs.from_file(self.pairs, model, n=self.n, skip_unusable=self.skip_unusable)
            if self.corruption is not None:
                from interp.errors import TaskError, one_of

                one_of(self.corruption, KINDS, "corruption of pairs from a file", TaskError)
                pairs = corrupt(model, pairs, self.corruption, seed=self.seed)
        return model, pairs


@dataclass(frozen=True, kw_only=True)
class Discover(Behaviour):
    """Find the components, or the circuit of edges, that carry a behaviour; check them by ablation; write a report."""

    level: Literal["node", "edge"] = "node"
    """node: heads and MLPs. edge: a circuit, what reads what from where."""
    direction: Literal["denoise", "noise", "both"] | None = None
    """denoise: corrupt run, clean values patched in. noise: the reverse. Default: denoise for nodes, noise for edges."""
    rules: str | None = None
    """Score places or edges from one backward pass by these rules, and check a sample exactly (see `interp rules`)."""
    method: Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact"] | None = None
    """How edges are scored (default: eap-ig; eap if rules are given)."""
    edges: int | None = None
    """The circuit's size before dead ends are pruned (default: the smallest that is faithful enough)."""
    faithfulness: float | None = None
    """How faithful the circuit has to be, 1 being the whole model (default: 0.9)."""
    ablation: Literal["corrupt", "zero", "mean", "positional-mean", "optimal"] = "corrupt"
    """What replaces everything outside the circuit in the faithfulness check (nodes: corrupt, zero or mean)."""
    save: Path | None = None
    """Write the circuit of edges as well: .json (EAP-IG's and MIB's format) or .graphml."""
    out: Path = Path("interp-report.html")
    """Report to write."""

    def run(self) -> None:
        from interp.files import check_writable

        check_writable(self.out)
        options = self._of_edges()
        running = self.running()
        if self.rules is not None:
            from interp.rules import get_rules

            get_rules(self.rules)  # before a model is loaded
        model, pairs = self.load()
        from interp.discovery import discover

        found = discover(
            model, pairs, level=self.level, rules=self.rules, metric=self.metric, direction=self.direction,
            ablation=self.ablation, seed=self.seed, **running, **options,
        )  # fmt: skip
        if self.save is not None:
            found.circuit.save(self.save)
        found.report(self.out)
        print(found.text())
        if self.save is not None:
            print(f"\ncircuit: {self.save.resolve()}")
        print(f"\nreport: {self.out.resolve()}")

    def _of_edges(self) -> dict:
        """The options that only edges have, checked before a model is loaded."""
        from interp.errors import OptionError

        given = {"method": self.method, "n_edges": self.edges, "target": self.faithfulness}
        given = {name: value for name, value in given.items() if value is not None}
        if self.level == "node":
            flags = {"method": "--method", "n_edges": "--edges", "target": "--faithfulness"}
            if given or self.save is not None:
                flag = flags[next(iter(given))] if given else "--save"
                raise OptionError(f"{flag} is for circuits of edges: add --level edge")
        elif self.edges is not None and self.faithfulness is not None:
            raise OptionError("--edges and --faithfulness both say how large the circuit is: give one of them")
        if self.save is not None:
            from interp.files import check_writable

            if check_writable(self.save).suffix not in (".json", ".graphml"):
                raise OptionError(
                    f"cannot write {self.save.suffix or 'a file without an ending'}: use .json or .graphml"
                )
        return given


@dataclass(frozen=True, kw_only=True)
class Patch(Behaviour):
    """Patch every place of one or several sites; print the strongest, optionally write all."""

    sites: tuple[str, ...] = ("resid_pre",)
    """resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, q, k, v, pattern, neuron."""
    positions: Literal["each", "all", "cells"] = "each"
    """each position by itself, all at once, or (pattern only) single query-key cells."""
    neurons: tuple[str, ...] = ()
    """Neurons of site neuron, as m3.n17."""
    window: int = 1
    """Patch this many adjacent layers together."""
    normalize: bool = False
    """Divide by metric(clean) - metric(corrupt)."""
    out: Path | None = None
    """Write all scores: .csv or .parquet (one row per prompt and place), or .html (heatmap of one site)."""

    def run(self) -> None:
        _check_out(self.out, one_site=len(self.sites) == 1 and self.window == 1)
        running = self.running()
        model, pairs = self.load()
        from interp.patching import activation_patching
        from interp.tables import save_effects, strongest

        effects = activation_patching(
            model, pairs, self.sites, metric=self.metric or pairs.metric, direction=self.direction,
            positions=self.positions, window=self.window, neurons=self.neurons or None, normalize=self.normalize,
            **running,
        )  # fmt: skip
        if self.out is not None:
            save_effects(effects, self.out)  # before anything is printed: a closed pipe must not cost the result
        print(strongest(effects))
        if self.out is not None:
            print(f"\nscores: {self.out.resolve()}")


@dataclass(frozen=True, kw_only=True)
class Attribute(Behaviour):
    """Score every place of one or several sites from one backward pass; patch a sample exactly and print the agreement."""

    sites: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out")
    """resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, q, k, v, pattern, neuron."""
    rules: str = "secant"
    """A rule set, perhaps with switches, as relp,pattern=frozen (see `interp rules`)."""
    at: Literal["base", "source", "both"] = "base"
    """The run in which the gradient is taken."""
    positions: Literal["each", "all"] = "each"
    """each position by itself, or their sum."""
    check: int | None = None
    """Places of each site that are also patched exactly (default: all if that is cheap, else 128; 0: none)."""
    out: Path | None = None
    """Write all scores: .csv or .parquet (one row per prompt and place), or .html (heatmap of one site)."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.rules import get_rules

        _check_out(self.out, one_site=len(self.sites) == 1)
        rules = get_rules(self.rules)
        if self.check is not None and self.check < 0:
            raise OptionError(f"cannot check {self.check} places")
        running = {name: value for name, value in self.running().items() if name != "engine"}
        model, pairs = self.load()
        from interp.checking import spot_check
        from interp.node_attribution import attribution
        from interp.tables import save_effects, strongest

        metric = self.metric or pairs.metric
        scores = attribution(
            model, pairs, self.sites, rules=rules, metric=metric, direction=self.direction, at=self.at,
            positions=self.positions, batch_size=self.batch_size,
        )  # fmt: skip
        if self.out is not None:
            save_effects(scores, self.out)
        print(strongest(scores))
        print(
            f"\nrules {scores.attrs['rules']}, gradient at {scores.attrs['gradient_at']}: estimates, not interventions"
        )
        if self.check != 0:
            print(spot_check(model, pairs, scores, metric=metric, n=self.check, seed=self.seed, **running))
        if self.out is not None:
            print(f"\nscores: {self.out.resolve()}")


@dataclass(frozen=True, kw_only=True)
class Edges(Behaviour):
    """Patch every edge of the model's graph, exactly; print the strongest, optionally write all."""

    edges: tuple[str, ...] = ()
    """Only these, as a0.h1->m2, m0->a1.h2<q> or m3->logits (default: every edge)."""
    normalize: bool = False
    """Divide by metric(clean) - metric(corrupt)."""
    out: Path | None = None
    """Write all scores: .csv or .parquet, one row per prompt and edge."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.files import check_writable

        if self.engine != "sweep":
            raise OptionError('edges are patched by engine "sweep" only')
        if self.out is not None and check_writable(self.out).suffix not in (".csv", ".parquet"):
            raise OptionError(f"cannot write {self.out.suffix or 'a file without an ending'}: use .csv or .parquet")
        running = {name: value for name, value in self.running().items() if name != "engine"}
        model, pairs = self.load()
        from interp.circuits.exact import edge_patching
        from interp.tables import save_effects, strongest

        effects = edge_patching(
            model, pairs, edges=self.edges or None, metric=self.metric or pairs.metric, direction=self.direction,
            normalize=self.normalize, **running,
        )  # fmt: skip
        if self.out is not None:
            save_effects(effects, self.out)
        print(strongest(effects))
        if self.out is not None:
            print(f"\nscores: {self.out.resolve()}")


@dataclass(frozen=True)
class Models:
    """List the bundled models."""

    def run(self) -> None:
        from interp.bundled import bundled_models

        for name, path in bundled_models().items():
            print(f"{name:12} {path}")


@dataclass(frozen=True)
class Tasks:
    """List the named tasks and their corruptions."""

    def run(self) -> None:
        from interp.tasks.named import TASKS, get_task

        for name in TASKS:
            task = get_task(name)
            print(f"{name}: {task.summary} (metric {task.metric}, {task.n_templates} wordings)")
            for corruption, describe in task.corruptions.items():
                print(f"    {corruption}: {describe}")


@dataclass(frozen=True, kw_only=True)
class RuleSets:
    """List the backward rule sets; with a model, what one of them does at each of its non-linearities."""

    model: str | None = None
    """Bundled model, folder in Hugging Face's layout, or hub name."""
    rules: str = "relp"
    """The rule set to show for that model, perhaps with switches."""

    def run(self) -> None:
        from interp.rules import RULES, get_rules

        if self.model is None:
            for name, rules in RULES.items():
                switches = ", ".join(f"{switch}={setting}" for switch, setting in rules.settings().items())
                print(f"{name:22} {switches or 'autograd everywhere'}")
            return
        rules = get_rules(self.rules)
        from interp.model.load import load_model

        print(rules.coverage(load_model(self.model)).to_string(index=False))


def _check_out(path: Path | None, *, one_site: bool) -> None:
    """Raise if scores cannot be written there, before anything is computed."""
    from interp.errors import OptionError
    from interp.files import check_writable

    if path is None:
        return
    if check_writable(path).suffix not in (".csv", ".parquet", ".html"):
        kind = repr(path.suffix) if path.suffix else "a file without an ending"
        raise OptionError(f"cannot write {kind}: use .csv, .parquet or .html")
    if path.suffix == ".html" and not one_site:
        raise OptionError("an .html heatmap shows one site and no windows; use .csv or .parquet")


Command = (
    Annotated[Discover, tyro.conf.subcommand("discover")]
    | Annotated[Patch, tyro.conf.subcommand("patch")]
    | Annotated[Attribute, tyro.conf.subcommand("attribute")]
    | Annotated[Edges, tyro.conf.subcommand("edges")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[RuleSets, tyro.conf.subcommand("rules")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[SAECommands, tyro.conf.subcommand("sae")]
    | Annotated[NeuronCommands, tyro.conf.subcommand("neurons")]
    | Annotated[RunGrid, tyro.conf.subcommand("run")]
    | Annotated[RunsCommands, tyro.conf.subcommand("runs")]
    | Annotated[App, tyro.conf.subcommand("app")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 2 something the user can mend (one sentence on stderr), 130 interrupted."""
    command = tyro.cli(
        Command, args=arguments, prog="interp", description="Find out how a language model does what it does."
    )
    from interp.errors import InterpError

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"interp: warning: {message}", file=sys.stderr)
        try:
            command.run()
            sys.stdout.flush()
        except InterpError as error:
            print(f"interp: error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader of our output has seen enough, as in `interp patch | head`
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # or Python complains when it flushes at exit
        except OSError as error:  # a full disk, a folder that went away
            print(f"interp: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interp: interrupted; nothing was written", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
