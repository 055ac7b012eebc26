"""What a batch can ask: the kinds of job, each a function of a model whose result is labelled numbers.

    kind         of pairs, in blocks of prompts             kind      of all pairs, or of text, at once
    patch        `activation_patching`                      circuit   scores, curve and smallest circuit, judged on other pairs
    attribute    `attribution`                              sae       a sparse autoencoder of a hook point, trained and judged
    edges        `edge_patching`                            snmf      a semi-NMF of a hook point
    edge_scores  `edge_scores`

What a kind gives is a DataArray or a Dataset; `sae` and `snmf` give what they learned as files beside it.
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from interp.circuits.edges import edge_scores
from interp.circuits.evaluate import faithfulness, faithfulness_curve, smallest_circuit
from interp.circuits.exact import edge_patching
from interp.circuits.search import eliminate
from interp.circuits.similarity import stability
from interp.errors import OptionError, one_of
from interp.factorize.snmf import fit_snmf
from interp.features.config import SAEConfig
from interp.features.evaluate import evaluate_sae
from interp.features.sources import Corpus, ModelSource
from interp.features.train import train_saes
from interp.model.transformer import Transformer
from interp.node_attribution import attribution
from interp.patching import activation_patching
from interp.provenance import versions
from interp.tasks.pairs import PromptPairs


@dataclass(frozen=True)
class Output:
    """What a shard gives. files: what was learned, as the library's own loaders read it, by name."""

    scores: xr.DataArray | xr.Dataset
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """One kind of job. of: "pairs", or "text" for what needs no behaviour. splits: blocks of prompts may be done apart."""

    analysis: Callable[..., xr.DataArray | xr.Dataset | Output]
    of: str = "pairs"
    splits: bool = True


def circuit(
    model: Transformer, pairs: PromptPairs, held_out: PromptPairs | None, *, method: str = "eap-ig",
    rules: str = "gradient", steps: int | None = None, metric: str | None = None, direction: str = "noise",
    ablation: str = "corrupt", target: float = 0.9, n_resamples: int = 100, seed: int = 0, batch_size: int | None = None,
    max_memory: int | None = None,
) -> xr.Dataset:  # fmt: skip
    """Rank edges on some pairs and judge the ranking on others.

    method: of `edge_scores`, or "eliminate". Returns cmd, cpr, their logarithmic kin and the curve (`faithfulness_curve`) on the
    held-out pairs, or on the same where there are none; and of the smallest circuit whose faithfulness reaches the target: its
    edges, its faithfulness here and on the held-out pairs, and its stability over bootstrap resamples (NaN where the ranking is
    of all prompts together).
    """
    metric = pairs.metric if metric is None else metric
    running = {"batch_size": batch_size, "max_memory": max_memory}
    measured: dict[str, Any] = {"metric": metric, "ablation": ablation, **running}
    if method == "eliminate":
        if rules != "gradient" or steps is not None:
            raise OptionError("elimination follows no rules and takes no steps")
        scores = eliminate(model, pairs, **measured)
    else:
        scores = edge_scores(
            model, pairs, method=method, rules=rules, steps=steps, metric=metric, direction=direction, **running
        )  # fmt: skip
    judged = pairs if held_out is None else held_out
    found = faithfulness_curve(model, judged, scores, seed=seed, **measured)
    smallest, here = smallest_circuit(model, pairs, scores, target=target, **measured)
    there = float(faithfulness(model, judged, smallest, seed=seed, **measured).faithfulness[0])
    size, stable = int(smallest.attrs["n_edges"]), np.nan
    if "prompt" in scores.dims:
        stable = float(stability(scores, n_edges=size, n_resamples=n_resamples, seed=seed).jaccard)
    return found.assign(
        smallest=float(smallest.n_edges), smallest_faithfulness=here, smallest_held_out=there, smallest_stability=stable
    ).assign_attrs(held_out=int(held_out is not None))  # fmt: skip


def sae(
    model: Transformer, *, hook: str, architecture: str = "topk", d_sae: int | None = None, k: int | None = None,
    sparsity: float = 0.0, afa: str = "corrected", steps: int = 1000, train_batch: int = 1024, lr: float | None = None,
    dead_after: int = 200_000, text: str | None = None, n_texts: int | None = None, context: int = 128,
    held_out: float = 0.1, seed: int = 0,
) -> Output:  # fmt: skip
    """Train a sparse autoencoder on a hook point and judge it on text kept apart: fvu, l0, dead and the CE it recovers."""
    kept, apart = Corpus.from_file(model, text, n_texts=n_texts, context=context).split(held_out, seed=seed)
    source = ModelSource(model, kept, [hook])
    form = SAEConfig.usual(
        architecture, source.widths[hook], d_sae=d_sae, k=k, afa=afa, hook=hook, sparsity=sparsity, dead_after=dead_after
    )  # fmt: skip
    trained = train_saes(source, {"sae": form}, steps=steps, batch_size=train_batch, lr=lr, seed=seed)["sae"]
    found = evaluate_sae(model, trained, apart)
    figures = {"fvu": found.fvu, "l0": found.l0, "dead": found.dead, "ce_recovered": found.ce_recovered["zero"]}
    trained.metadata.update(figures)
    return Output(xr.Dataset(figures, attrs=_about(model, "sae", hook)), _saved(trained.save))


def snmf(
    model: Transformer, *, hook: str, n_features: int = 100, share: float = 0.01, solver: str = "hals",
    init: str = "kmeans", n_init: int = 1, max_iter: int = 200, text: str | None = None, n_texts: int | None = 200,
    context: int = 128, seed: int = 0,
) -> Output:  # fmt: skip
    """Semi-NMF of a hook point: the share of the squared norm that is left, sparsity, and how stable features are."""
    texts = Corpus.from_file(model, text, n_texts=n_texts, context=context)
    found = fit_snmf(
        model, texts, hook, n_features=n_features, share=share, solver=solver, init=init, n_init=n_init, max_iter=max_iter,
        seed=seed,
    )  # fmt: skip
    H = found.components_
    figures = {
        "error": float(found.relative_loss_), "n_iter": float(found.n_iter_),
        "neurons_per_feature": float((H != 0).sum(1).double().mean()), "stability": float(found.stability_.double().mean()),
    }  # fmt: skip
    return Output(xr.Dataset(figures, attrs=_about(model, "snmf", hook)), _saved(found.save))


KINDS: dict[str, Kind] = {
    "patch": Kind(activation_patching),
    "attribute": Kind(attribution),
    "edges": Kind(edge_patching),
    "edge_scores": Kind(edge_scores),
    "circuit": Kind(circuit, splits=False),
    "sae": Kind(sae, of="text", splits=False),
    "snmf": Kind(snmf, of="text", splits=False),
}
_RUNNING = ("model", "pairs", "held_out", "seed", "max_memory", "batch_size", "announce", "progress")  # not the asker's


@cache
def options_of(kind: str) -> tuple[str, ...]:
    """Names of the options that a kind of job takes: its analysis' own, less those that say how it runs."""
    asked = KINDS[one_of(kind, KINDS, "kind of job")]
    known = list(inspect.signature(asked.analysis).parameters)
    # a share of text that is kept apart is the asker's; prompts that are kept apart are drawn for him
    return tuple(name for name in known if name not in _RUNNING or (name == "held_out" and asked.of == "text"))


@cache
def plans_memory(kind: str) -> bool:
    """Whether a kind of job can be told how much memory it may take at a time."""
    return "max_memory" in inspect.signature(KINDS[kind].analysis).parameters


def _about(model: Transformer, method: str, hook: str) -> dict[str, Any]:
    return {"method": method, "model": model.cfg.name, "revision": model.cfg.revision or "local", "hook": hook,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "versions": versions()}  # fmt: skip


def _saved(save: Callable[[Path], Any]) -> dict[str, bytes]:
    """The files that a dictionary writes of itself."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "it")
        return {path.name: path.read_bytes() for path in sorted((Path(folder) / "it").iterdir())}
