"""The metric of every intervention, exactly: the one function that patching, faithfulness and discovery stand on.

It splits the prompts into batches, makes the unpatched runs and hands the interventions to an engine: "hooks"
(`interp.interventions`), a forward pass each, which checks itself and is the oracle; or "sweep" (`interp.sweep`), all of
them in one growing batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import one_of
from interp.interventions import Intervention, PatchedRuns, mean_values
from interp.metrics import Metric
from interp.model.run import logits_at
from interp.sweep import SweepRuns
from interp.tasks.pairs import PromptPairs

SIDES = ("clean", "corrupt")
ENGINES = ("hooks", "sweep")


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
    """Reads all metrics from logits at the read position: [metric, prompt], or [metric, row] given each row's prompt."""

    def __init__(self, pairs: PromptPairs, metrics: Sequence[Metric], clean_logits: Float[Tensor, "prompt d_vocab"]):
        # a metric needs the tokens and answers; what else a pair carries would be copied for every row
        self.pairs = replace(pairs, token_strings=None, embedding_noise=None, noise_mask=None)
        self.metrics, self.clean_logits = metrics, clean_logits

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompts: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "metric row"]:
        pairs, clean = self.pairs, self.clean_logits
        if prompts is not None:
            pairs, clean = pairs.take(prompts), clean[prompts]
        return torch.stack([metric(logits, pairs, clean) for metric in self.metrics]).cpu()


def exact_scores(
    model, pairs: PromptPairs, interventions: Sequence[Intervention], *, metrics: Sequence[Metric],
    base: Literal["clean", "corrupt"], source: Literal["other", "zero", "mean"] = "other",
    engine: Literal["hooks", "sweep"] = "hooks", batch_size: int | None = None, progress: bool = False, title: str = "patching",
) -> Scores:  # fmt: skip
    """Run every intervention on the base run of every prompt and read all metrics from the same runs.

    source: where replaced values come from: the "other" run, "zero", or the "mean" of the other run over all prompts at
    each position. Engine "hooks" raises `PatchError` if a hook does not fire or a self-patch changes anything; "sweep"
    takes a `Transformer` without hooks of its own, and gives what cannot change exactly the base run's value.
    """
    one_of(engine, ENGINES, "engine")
    sites = list(dict.fromkeys(patch.site for intervention in interventions for patch in intervention))
    layers = sorted({patch.layer for intervention in interventions for patch in intervention})
    chunks = pairs.chunks(batch_size)
    if source == "mean":
        source = mean_values(model, chunks, "corrupt" if base == "clean" else "clean", sites)
    patched, clean, corrupt = [], [], []
    total = len(chunks) * len(interventions)
    with tqdm(total=total, desc=title, unit="run", disable=None if progress else True, leave=False) as bar:
        for chunk in chunks:
            if engine == "hooks":
                runs = PatchedRuns(model, chunk, base=base, sites=sites, layers=layers, source=source)
                runs.check()
            else:
                runs = SweepRuns(model, chunk, base=base, sites=sites, source=source)
            logits = {side: logits_at(model, chunk.tokens(side), chunk.read_at, chunk.hooks(side)) for side in SIDES}
            read = Reader(chunk, metrics, logits["clean"])
            clean.append(read(logits["clean"]))
            corrupt.append(read(logits["corrupt"]))
            if engine == "hooks":
                columns = []
                for found in runs.run(interventions):
                    columns.append(read(found))
                    bar.update()
                patched.append(torch.stack(columns, -1))
            else:
                # what has no row cannot differ from the base run
                values = (clean if base == "clean" else corrupt)[-1][..., None].repeat(1, 1, len(interventions))
                reached = 0
                for done, cells, prompts, resid in runs.run(interventions):
                    if len(cells):
                        values[:, prompts.cpu(), torch.from_numpy(cells)] = read(model.unembed_resid(resid), prompts)
                    bar.update(done - reached)
                    reached = done
                patched.append(values)
    return Scores(torch.cat(patched, 1), torch.cat(clean, 1), torch.cat(corrupt, 1), base)
