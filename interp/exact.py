"""The metric of every intervention, exactly: the one function that patching, faithfulness and discovery stand on.

It splits the prompts into batches, makes the unpatched runs and hands the interventions to an engine: "hooks"
(`interp.interventions`), a forward pass each, which checks itself and is the oracle; or "sweep" (`interp.sweep`), all of
them in one growing batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.directions import BASES, SIDES, Direction
from interp.errors import one_of
from interp.interventions import Intervention, PatchedRuns, mean_values
from interp.metrics import Metric
from interp.model.run import logits_at
from interp.model.transformer import Transformer
from interp.sweep import SweepPlan, SweepRuns, check_sweepable
from interp.tasks.pairs import PromptPairs
from interp_kernels import answer_logits

ENGINES = ("sweep", "hooks")
_LOGITS = 1 << 24  # logits held at a time
Announce = Callable[[SweepPlan], None] | None


@dataclass(frozen=True)
class Effects:
    """What interventions change, and the metric of the two unpatched runs; on the CPU in the metric's dtype."""

    effects: Float[Tensor, "metric prompt intervention"]
    clean: Float[Tensor, "metric prompt"]
    corrupt: Float[Tensor, "metric prompt"]


@dataclass(frozen=True)
class Scores:
    """Metric values, on the CPU in the metric's dtype: of every intervention, and of the two unpatched runs."""

    patched: Float[Tensor, "metric prompt intervention"]
    clean: Float[Tensor, "metric prompt"]
    corrupt: Float[Tensor, "metric prompt"]
    base: Literal["clean", "corrupt"]  # the run that was changed

    @property
    def effects(self) -> Float[Tensor, "metric prompt intervention"]:
        """metric(patched) - metric(base)."""
        return self.patched - getattr(self, self.base)[..., None]


class Reader:
    """Reads all metrics from logits at the read position: [metric, prompt].

    With `model`, from residual streams after the last layer as well. Of linear metrics, only the answers' columns of the
    unembedding are then multiplied, and rows are read along one direction per prompt. first: the number of the first
    prompt, for messages.
    """

    def __init__(
        self, pairs: PromptPairs, metrics: Sequence[Metric], model: Transformer | None = None, *, first: int = 0
    ):
        self.numbers = torch.arange(first, first + len(pairs), device=pairs.clean.device)
        # a metric needs the tokens and answers; what else a pair carries would be copied for every row
        self.pairs = replace(pairs, token_strings=None, embedding_noise=None, noise_mask=None)
        self.metrics, self.model, self.columns, self.clean_logits = metrics, model, None, None
        if model is None or not all(metric.linear for metric in metrics):
            return
        sides = {name: getattr(pairs, name) for name in ("answers", "wrong_answers")}
        tokens = torch.cat([ids.flatten() for ids in sides.values() if ids is not None])
        self.columns = tokens[tokens >= 0].unique()
        places = {
            name: torch.searchsorted(self.columns, ids).masked_fill(ids < 0, -1)
            for name, ids in sides.items() if ids is not None
        }  # fmt: skip
        self.pairs = replace(self.pairs, **places)

    def __call__(self, logits: Float[Tensor, "prompt column"]) -> Float[Tensor, "metric prompt"]:
        values = [metric(logits, self.pairs, self.clean_logits, numbers=self.numbers) for metric in self.metrics]
        return torch.stack(values).cpu()

    def unpatched(self, final_resid: dict[str, Tensor]) -> dict[str, Float[Tensor, "metric prompt"]]:
        """Metrics of the clean and the corrupt run from their final residual streams; the clean one is kept to compare."""
        logits = {side: self.model.unembed_resid(final_resid[side], columns=self.columns) for side in SIDES}
        self.clean_logits = logits["clean"]
        return {side: self(logits[side]) for side in SIDES}

    def rows(self, resid: Float[Tensor, "row d_model"], prompts: Int[Tensor, " row"]) -> Float[Tensor, "metric row"]:
        """Metrics of rows from their residual streams after the last layer, given each row's prompt."""
        if self.columns is not None and self.model.cfg.logit_softcap is None:
            return torch.stack([self._along_direction(metric, resid, prompts) for metric in self.metrics]).cpu()
        block = max(1, _LOGITS // (self.model.cfg.d_vocab if self.columns is None else len(self.columns)))
        found = []
        for r, p in zip(resid.split(block), prompts.split(block), strict=True):
            pairs, clean = self.pairs.take(p), None if self.clean_logits is None else self.clean_logits[p]
            logits = self.model.unembed_resid(r, columns=self.columns)
            found.append(
                torch.stack([metric(logits, pairs, clean, numbers=self.numbers[p]) for metric in self.metrics])
            )
        return torch.cat(found, 1).cpu()

    def _along_direction(
        self, metric: Metric, resid: Float[Tensor, "row d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """A linear metric: the normed stream along the sum of the unembedding's columns, each by its weight."""
        norm, cfg, unembed = self.model.ln_final, self.model.cfg, self.model.unembed
        weights = metric.weights(self.pairs, len(self.columns)) * cfg.logit_scale
        to_wide = lambda x: x.to(torch.promote_types(resid.dtype, torch.float32))  # noqa: E731
        directions = to_wide(weights @ unembed.W_U[:, self.columns].T.double())
        offset = None if unembed.b_U is None else to_wide(weights @ unembed.b_U[self.columns].double())
        weight = norm.w if norm.w is None or not norm.offset else 1 + norm.w
        values = answer_logits(
            resid, directions, prompts, weight=weight, bias=norm.b, norm="layer" if norm.centred else "rms",
            eps=norm.eps, offset=offset,
        )  # fmt: skip
        return metric.check(values, self.numbers[prompts])


def exact_effects(
    model, pairs: PromptPairs, interventions: Sequence[Intervention], *, direction: Direction, **options
) -> Effects:
    """What every intervention changes in this direction (`interp.directions`); options are `exact_scores`'."""
    runs = [exact_scores(model, pairs, interventions, base=base, **options) for base in BASES[direction]]
    effects = runs[0].effects if len(runs) == 1 else (runs[0].effects - runs[1].effects) / 2
    return Effects(effects, runs[0].clean, runs[0].corrupt)


def exact_scores(
    model, pairs: PromptPairs, interventions: Sequence[Intervention], *, metrics: Sequence[Metric],
    base: Literal["clean", "corrupt"], source: Literal["other", "zero", "mean"] = "other",
    engine: Literal["sweep", "hooks"] = "sweep", max_memory: int | None = None, batch_size: int | None = None,
    announce: Announce = None, progress: bool = False, title: str = "patching",
) -> Scores:  # fmt: skip
    """Run every intervention on the base run of every prompt and read all metrics from the same runs.

    source: where replaced values come from: the "other" run, "zero", or the "mean" of the other run over all prompts at
    each position. Engine "hooks" raises `PatchError` if a hook does not fire or a self-patch changes anything; "sweep"
    takes a `Transformer` without hooks of its own, and gives what cannot change exactly the base run's value.
    max_memory, announce: see `interp.sweep.SweepRuns` and `interp.sweep.SweepPlan`.
    """
    one_of(engine, ENGINES, "engine")
    sites = list(dict.fromkeys(patch.site for intervention in interventions for patch in intervention))
    chunks = pairs.chunks(batch_size)
    if engine == "sweep":
        check_sweepable(model)
        if announce is not None:
            announce(SweepPlan.of(model, chunks, interventions, source=source, max_memory=max_memory))
    if source == "mean":
        source = mean_values(model, chunks, "corrupt" if base == "clean" else "clean", sites)
    parts: list[Scores] = []
    total = len(chunks) * len(interventions)
    with tqdm(total=total, desc=title, unit="run", disable=None if progress else True, leave=False) as bar:
        first = 0
        for chunk in chunks:
            options = {"base": base, "sites": sites, "source": source}
            read = Reader(chunk, metrics, model if engine == "sweep" else None, first=first)
            if engine == "sweep":
                runs = SweepRuns(model, chunk, **options, max_memory=max_memory)
                parts.append(_by_sweep(runs, read, interventions, base, bar.update))
            else:
                parts.append(_by_hooks(model, chunk, read, interventions, options, bar.update))
            first += len(chunk)
    return Scores(*(torch.cat([getattr(p, name) for p in parts], 1) for name in ("patched", *SIDES)), base)


def _by_hooks(
    model, pairs: PromptPairs, read: Reader, interventions: Sequence[Intervention], options: dict, update: Callable
) -> Scores:
    layers = sorted({patch.layer for intervention in interventions for patch in intervention})
    runs = PatchedRuns(model, pairs, layers=layers, **options)
    runs.check()
    logits = {side: logits_at(model, pairs.tokens(side), pairs.read_at, pairs.hooks(side)) for side in SIDES}
    read.clean_logits = logits["clean"]
    columns = []
    for found in runs.run(interventions):
        columns.append(read(found))
        update()
    return Scores(torch.stack(columns, -1), *(read(logits[side]) for side in SIDES), options["base"])


def _by_sweep(
    runs: SweepRuns, read: Reader, interventions: Sequence[Intervention], base: str, update: Callable
) -> Scores:
    unpatched = read.unpatched(runs.final_resid)
    # what has no row cannot differ from the base run
    values = unpatched[base][..., None].repeat(1, 1, len(interventions))
    reached = 0
    for done, cells, prompts, found in runs.run(interventions, read.rows):
        values[:, prompts.cpu(), torch.from_numpy(cells)] = found
        update(done - reached)
        reached = done
    update(len(interventions) - reached)
    return Scores(values, *unpatched.values(), base)
