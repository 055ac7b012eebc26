"""Which way of scoring edges finds the most faithful circuits: CPR and CMD, the smallest circuits, and known circuits.

    python benchmarks/circuits.py                                           print the tables
    python benchmarks/circuits.py --out benchmarks/results/circuits.json    and write every number
    python benchmarks/circuits.py --known                                   hand-built circuits only

mini-gpt2 and mini-llama on IOI and greater-than. Edges are scored on 32 prompt pairs (noising, the task's own metric), circuits
judged on 32 others, corrupt ablation, at MIB's ten sizes. CMD is the area between the faithfulness of edges ranked by |score| and
1; CPR the area under that of edges ranked by help. Seconds are one run's, scoring only. The smallest circuit is the first of a
ranking with a faithfulness of 0.9 on the prompts it was scored on; its stability the mean pairwise Jaccard of 100 bootstrap
resamples. Known circuits (`tests/known_circuits`): area under the ROC curve of |score|, in the direction that identifies each.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from interp import load_model, load_task
from interp.circuits.circuit import Circuit
from interp.circuits.edges import edge_scores
from interp.circuits.evaluate import faithfulness, faithfulness_curve, smallest_circuit
from interp.circuits.graph import Graph
from interp.circuits.learned import learn_mask
from interp.circuits.search import acdc, eliminate
from interp.circuits.similarity import auroc, stability
from interp.files import write_atomically
from interp.provenance import versions

MODELS, TASKS = ("mini-gpt2", "mini-llama"), ("ioi", "greater_than")
SCORES: dict[str, dict] = {
    "exact": {"method": "exact"},
    "EAP": {},
    "EAP, RelP rules": {"rules": "relp"},
    "EAP, secant rules": {"rules": "secant"},
    "EAP, GIM rules": {"rules": "gim"},
    "clean-corrupted": {"method": "clean-corrupted"},
    "EAP-IG": {"method": "eap-ig"},
    "EAP-IG activations": {"method": "eap-ig-activations"},
}


def random_scores(model, pairs, *, metric, direction) -> xr.DataArray:
    """What a ranking is worth that knows nothing."""
    scores = edge_scores(model, pairs.take(torch.arange(1)), metric=metric, direction=direction).mean(
        "prompt", keep_attrs=True
    )
    return scores.copy(data=np.where(scores.notnull(), np.random.default_rng(0).normal(size=scores.shape), np.nan))


def methods(n: int) -> dict[str, Callable[..., xr.DataArray]]:
    """Everything that ranks edges."""
    found = {
        name: (lambda m, p, options=options, **k: edge_scores(m, p, **options, **k)) for name, options in SCORES.items()
    }
    searched = {
        "elimination (ours)": lambda m, p, metric, direction: eliminate(m, p, metric=metric),
        "learned, UGS": lambda m, p, metric, direction: learn_mask(
            m, p, metric=metric, penalty=1e-3 if n > 8 else 1e-2
        ),
    }
    return {"random": random_scores, **found, **searched}


def rows_of(model_name: str, task: str, n: int) -> list[dict]:
    """One row per method."""
    model = load_model(model_name)
    pairs, held_out = (load_task(task, model, n=n, seed=seed) for seed in (0, 1))
    rows = []
    for name, score in methods(n).items():
        start = time.perf_counter()
        scores = score(model, pairs, metric=pairs.metric, direction="noise")
        seconds = time.perf_counter() - start
        curve = faithfulness_curve(model, held_out, scores, metric=pairs.metric)
        circuit, f = smallest_circuit(model, pairs, scores, metric=pairs.metric)
        size = int(circuit.attrs["n_edges"])
        again = float(stability(scores, n_edges=size).jaccard) if "prompt" in scores.dims else np.nan
        rows.append({
            "model": model_name, "task": task, "method": name, "cmd": float(curve.cmd), "cpr": float(curve.cpr),
            "cmd_log": float(curve.cmd_log), "seconds": seconds, "smallest": circuit.n_edges, "asked": size, "faithfulness": f,
            "held_out": float(faithfulness(model, held_out, circuit, metric=pairs.metric).faithfulness[0]), "stability": again,
            "curve": [round(v, 4) for v in curve.faithfulness.sel(by="size").values.tolist()],
        })  # fmt: skip
        print(pd.DataFrame(rows[-1:]).drop(columns="curve").to_string(index=False, header=name == "random"), flush=True)
    return rows


def known_rows() -> list[dict]:
    """AUROC of every method on every circuit that is known because it was written down."""
    from tests.known_circuits.circuits import CIRCUITS

    rows = []
    for name, build in CIRCUITS.items():
        known = build()
        truth = Circuit.from_edges(Graph.of(known.model.cfg), known.edges)
        row = {"circuit": name, "direction": known.direction, "edges": truth.n_edges}
        for method, options in SCORES.items():
            scores = edge_scores(known.model, known.pairs, direction=known.direction, **options)
            # effects that cancel over prompts are effects: the sizes of single prompts are ranked
            row[method] = auroc(np.abs(scores).assign_attrs(scores.attrs), truth)
        ranking = eliminate(known.model, known.pairs)
        row["elimination (ours)"] = auroc(ranking, truth)
        row["ACDC, threshold 0.01"] = len(set(acdc(known.model, known.pairs, threshold=0.01).edges) ^ known.edges)
        rows.append(row)
    return rows


def main() -> None:
    """Print the tables; with --out, write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--known", action="store_true", help="hand-built circuits only")
    parser.add_argument("--n", type=int, default=32, help="prompt pairs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    known = known_rows()
    print("AUROC on known circuits (ACDC: edges it gets wrong)")
    print(pd.DataFrame(known).set_index("circuit").round(3).T.to_string(), "\n")
    rows = [] if args.known else [row for model in MODELS for task in TASKS for row in rows_of(model, task, args.n)]
    if rows:
        table = pd.DataFrame(rows)
        for value in ("cmd", "cpr", "smallest", "held_out", "stability", "seconds"):
            print(f"\n{value}")
            print(
                table.pivot_table(index="method", columns=["model", "task"], values=value, sort=False)
                .round(4)
                .to_string()
            )
    if args.out:
        about = {"versions": versions(), "threads": torch.get_num_threads(), "n_prompts": args.n}
        write_atomically(args.out, json.dumps({"about": about, "known": known, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
