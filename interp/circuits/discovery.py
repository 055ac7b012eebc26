"""From a model and a behaviour to a circuit one can defend: scored, cut, tested by intervention, resampled.

    found = discover_circuit(model, load_task("ioi", model))        # or interp.discover(..., level="edge")
    found.circuit                 # the smallest circuit of the ranking that is 90 % faithful
    found.report("circuit.html")

Every edge is scored; the ranking is cut where the circuit becomes faithful, or at a given size; then come the tests that an
argument for a circuit needs: how faithful it is by size, what works without it, how far scores are from exact patching, and
whether other prompts would have given the same edges.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import xarray as xr

from interp.baseline import describe, first_pair
from interp.checking import SpotCheck
from interp.circuits.checking import check_edges
from interp.circuits.circuit import Circuit
from interp.circuits.edges import METHODS, edge_scores, how_scored
from interp.circuits.evaluate import completeness, faithfulness, faithfulness_curve, smallest_circuit
from interp.circuits.similarity import stability, stability_text
from interp.directions import Direction
from interp.errors import OptionError, one_of
from interp.exact import Announce
from interp.metrics import Metric, get_metric
from interp.model.transformer import Transformer
from interp.rules import Rules, get_rules
from interp.tasks.pairs import PromptPairs


@dataclass
class CircuitDiscovery:
    """What `discover_circuit` found. `scores` are per prompt; `curve` is over sizes; `faithfulness` is the circuit's own."""

    pairs: PromptPairs
    scores: xr.DataArray
    circuit: Circuit
    faithfulness: xr.Dataset
    curve: xr.Dataset
    completeness: xr.Dataset
    stability: xr.Dataset
    by_position: xr.DataArray  # [source, target, position]: where the edges act, estimated
    summary: dict[str, float]
    notes: list[str] = field(default_factory=list)
    agreement: SpotCheck | None = None  # of approximate scores with exact edge patching
    corrupt_strings: tuple[str, ...] | None = None
    answer_strings: tuple[str, ...] = ()
    wrong_strings: tuple[str, ...] = ()

    @property
    def attrs(self) -> dict:
        """How the scores were made: model, task, metric, unit, sign, direction, corruption, versions."""
        return self.scores.attrs

    def __repr__(self) -> str:
        a, f = self.attrs, self.faithfulness
        return (
            f"CircuitDiscovery({a['model']} on {a['task']}: {self.circuit.n_edges} edges, faithfulness "
            f"{float(f.faithfulness[0]):.2f})"
        )

    def table(self) -> pd.DataFrame:
        """One row per edge of the circuit, largest score first, with the share of resamples that have it."""
        table, share = self.circuit.table(), self.stability.frequency
        return table.assign(
            found_again=[float(share.sel(source=u, target=v)) for u, v in zip(table.source, table.target, strict=True)]
        )

    def text(self, n: int = 15) -> str:
        """The circuit, its n strongest edges and its tests, for a terminal."""
        a, s, f = self.attrs, self.summary, self.faithfulness
        lines = [
            f"{a['model']} on {a['task']} ({a['corruption']}), {a['n_prompts']} pairs: {a['metric']} "
            f"{s['metric_clean']:.3f} clean, {s['metric_corrupt']:.3f} corrupt; first choice right on "
            f"{s['accuracy_clean']:.0%} of the clean prompts",
            "",
            f"{self.circuit}, cut from scores by {how_scored(a)}, {a['direction']}",
            "",
            self.table().head(n)[["edge", "score", "found_again"]].to_string(
                index=False, formatters={"score": "{:+.4f}".format, "found_again": "{:.0%}".format}
            ),
            "",
            f"score in {a['unit'] or 'the metric'}, {a['sign']}",
            f"faithfulness {float(f.faithfulness[0]):.3f} (95 % interval {float(f.low[0]):.3f} to {float(f.high[0]):.3f}), "
            f"{f.attrs['ablation']} ablation of the rest; without the circuit's edges {float(self.completeness.complement):z.3f}",
            f"over all sizes: CPR {float(self.curve.cpr):.3f}, CMD {float(self.curve.cmd):.4f}",
            stability_text(self.stability),
        ]  # fmt: skip
        if self.agreement is not None:
            lines += ["", str(self.agreement)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        return self.table().head(15).round(4).to_html(index=False)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page and return its path."""
        from interp.circuits.report import write_report

        return write_report(self, path)


def discover_circuit(
    model: Transformer, pairs: PromptPairs, *, method: str = "eap-ig", rules: str | Rules | None = None,
    n_edges: int | None = None, target: float = 0.9, metric: str | Callable | Metric | None = None,
    direction: Direction = "noise", ablation: str = "corrupt", by: Literal["size", "value"] = "size",
    search: Literal["top", "greedy"] = "top", n_resamples: int = 100, max_memory: int | None = None,
    batch_size: int | None = None, seed: int = 0, announce: Announce = None, progress: bool = False,
) -> CircuitDiscovery:  # fmt: skip
    """Score every edge, cut a circuit, and test it.

    method, rules: how edges are scored, see `edge_scores`; rules alone mean method "eap".
    n_edges: the size of the circuit before dead ends are pruned; None takes the smallest whose faithfulness reaches `target`.
    metric: default is the one the pairs are usually scored with. ablation: what stands in for everything outside the circuit.
    by, search: how edges are ranked and taken, see `Circuit.from_scores`. n_resamples: bootstrap resamples for the stability.
    """
    one_of(method, METHODS, "method")
    rules = get_rules("gradient" if rules is None else rules)
    if n_edges is None and not 0 < target <= 1:
        raise OptionError(f"the faithfulness to reach lies above 0 and is at most 1, not {target:g}")
    if n_resamples < 2:
        raise OptionError(f"stability takes at least 2 resamples, not {n_resamples}")
    metric = get_metric(pairs.metric if metric is None else metric)
    running = {"max_memory": max_memory, "batch_size": batch_size, "progress": progress}
    scored = {"metric": metric, "direction": direction, **running}
    scores = edge_scores(model, pairs, method=method, rules=rules, announce=announce, **scored)
    tested = {"metric": metric, "ablation": ablation, "seed": seed, **running}
    cut = {"by": by, "search": search}
    if n_edges is None:
        circuit, _ = smallest_circuit(model, pairs, scores, target=target, **cut, **tested)
    else:
        circuit = Circuit.from_scores(scores, n_edges=n_edges, **cut)
    asked = int(circuit.attrs["n_edges"])
    summary, notes = describe(model, pairs, scores, metric)
    if not circuit.n_edges:
        notes.append(
            "No edge of this ranking lies on a path from the input to the logits at this size: ask for more edges."
        )
    path = "eap-ig" if method == "exact" or rules.needs_source else method
    return CircuitDiscovery(
        pairs,
        scores,
        circuit,
        faithfulness(model, pairs, circuit, **tested),
        faithfulness_curve(model, pairs, scores, search=search, **tested),
        completeness(model, pairs, circuit, **tested),
        stability(scores, n_edges=asked, n_resamples=n_resamples, seed=seed, **cut),
        edge_scores(model, pairs, method=path, positions="each", **scored).mean("prompt", keep_attrs=True),
        summary,
        notes,
        None
        if method == "exact"
        else check_edges(model, pairs, scores, metric=metric, seed=seed, announce=announce, **running),
        **first_pair(model, pairs),
    )
