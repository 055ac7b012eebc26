"""The metric of every intervention, exactly: the one function that patching, faithfulness and discovery stand on.

It splits the prompts into batches, makes the unpatched runs, checks that patches do what patches must, and hands the
interventions to an engine. The only engine so far is plain hooks (`interp.interventions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import one_of
from interp.interventions import Intervention, PatchedRuns, mean_values
from interp.metrics import Metric
from interp.tasks.pairs import PromptPairs

ENGINES = ("hooks",)


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


def exact_scores(
    model, pairs: PromptPairs, interventions: Sequence[Intervention], *, metrics: Sequence[Metric],
    base: Literal["clean", "corrupt"], source: Literal["other", "zero", "mean"] = "other",
    engine: Literal["hooks"] = "hooks", batch_size: int | None = None, progress: bool = False, title: str = "patching",
) -> Scores:  # fmt: skip
    """Run every intervention on the base run of every prompt and read all metrics from the same runs.

    source: where replaced values come from: the "other" run, "zero", or the "mean" of the other run over all prompts at
    each position. Raises `PatchError` if a hook does not fire or a self-patch changes anything.
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
            runs = PatchedRuns(model, chunk, base=base, sites=sites, layers=layers, source=source)
            runs.check()
            clean_logits = runs.plain("clean")

            def read(logits: Tensor, chunk: PromptPairs = chunk, clean_logits: Tensor = clean_logits) -> Tensor:
                return torch.stack([metric(logits, chunk, clean_logits) for metric in metrics]).cpu()

            clean.append(read(clean_logits))
            corrupt.append(read(runs.plain("corrupt")))
            columns = []
            for logits in runs.run(interventions):
                columns.append(read(logits))
                bar.update()
            patched.append(torch.stack(columns, -1))
    return Scores(torch.cat(patched, 1), torch.cat(clean, 1), torch.cat(corrupt, 1), base)
