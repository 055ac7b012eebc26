"""Does a sparse autoencoder find the true dictionary? Activations of 64 known features in 32 dimensions, 3 at a time.

    python benchmarks/sae_synthetic.py --out benchmarks/results/sae_synthetic.json

The protocol: near-orthogonal atoms (coherence .437), each firing with probability 3/64 at magnitude 1 +- .15; Adam 3e-3,
falling over the last 30 %; 4,000 steps of 1,024 tokens; unit decoder; AuxK with d/2 latents, dead after 20,000 tokens.
Three seeds of data, weights and order. Never judge by explained variance alone: the best at that has found nothing.
"""

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from interp.features.config import SAEConfig
from interp.features.recovery import random_baseline, recovery
from interp.features.sources import ArraySource
from interp.features.synthetic import toy_dictionary
from interp.features.train import train_saes

D, N_FEATURES, L0 = 32, 64, 3
COMMON = {"d_in": D, "d_sae": N_FEATURES, "dead_after": 20_000}
AFA = {"architecture": "top-afa", **COMMON}
CONFIGS = {
    "TopK k=3": SAEConfig(k=3, **COMMON),
    "BatchTopK k=3": SAEConfig(architecture="batchtopk", k=3, **COMMON),
    "Matryoshka k=3": SAEConfig(architecture="matryoshka", k=3, **COMMON),
    "TopK k=1 (negative control)": SAEConfig(k=1, **COMMON),
    "TopK k=6": SAEConfig(k=6, **COMMON),
    "L1 .3": SAEConfig(architecture="standard", sparsity=0.3, **COMMON),
    "Gated .3": SAEConfig(architecture="gated", sparsity=0.3, **COMMON),
    "JumpReLU .1": SAEConfig(architecture="jumprelu", sparsity=0.1, **COMMON),
    "KronSAE k=3": SAEConfig(k=3, kron=(4, 4, 4), **COMMON),
    "top-AFA faithful": SAEConfig(
        **AFA | {"dead_after": 20_480}, afa="faithful", normalize="layer_norm", afa_weight=1 / 32
    ),
    "top-AFA corrected": SAEConfig(**AFA),
    "top-AFA corrected, L1 .1": SAEConfig(**AFA, sparsity=0.1),
    "top-AFA corrected, L1 .3": SAEConfig(**AFA, sparsity=0.3),
    "top-AFA corrected, L1 .5": SAEConfig(**AFA, sparsity=0.5),
    "top-AFA corrected, L1 .3, lambda 1/32": SAEConfig(**AFA, sparsity=0.3, afa_weight=1 / 32),
    "top-AFA corrected, tied": SAEConfig(**AFA, tied=True),
    "top-AFA corrected, k_max 4": SAEConfig(**AFA, k_max=4),
}


@dataclass
class Options:
    """What is trained."""

    seeds: int = 3
    """Seeds of data, weights and order."""
    steps: int = 4000
    """Steps of 1,024 tokens."""
    only: str = ""
    """Only rows whose name contains this."""
    out: Path | None = None
    """JSON to write."""


def one(job: tuple[str, int, int]) -> tuple[str, int, dict]:
    """Train one SAE on one seed and measure it."""
    name, seed, steps = job
    torch.set_num_threads(1)
    truth = toy_dictionary(D, N_FEATURES, L0, seed=seed)
    x, _ = truth.sample(500_000, seed=100 + seed)
    test, true_codes = truth.sample(20_000, seed=200 + seed)
    sae = train_saes(
        ArraySource({"x": x}), {name: CONFIGS[name]}, steps=steps, batch_size=1024, lr=3e-3, decay=0.3, seed=seed, buffer=500_000
    )[name]  # fmt: skip
    with torch.no_grad():
        codes = sae.codes(test).dense()
        ev = 1 - float((test - sae(test)).square().sum() / (test - test.mean(0)).square().sum())
    found = recovery(sae.W_dec, truth.atoms, codes=codes, true_codes=true_codes)
    row = {"l0": found.l0, "ev": ev, "mmcs": found.mmcs, "mcc": found.mcc, "recovered_90": found.recovered_90,
           "recovered_95": found.recovered_95, "f1": found.mean_f1, "dead": found.dead}  # fmt: skip
    return name, seed, row


def main(o: Options) -> None:
    jobs = [(name, seed, o.steps) for name in CONFIGS if o.only.lower() in name.lower() for seed in range(o.seeds)]
    rows: dict[str, list[dict]] = {}
    keys = ("l0", "ev", "mmcs", "mcc", "recovered_90", "recovered_95", "f1", "dead")
    print(f"{'median of ' + str(o.seeds) + ' seeds':40} " + " ".join(f"{key:>12}" for key in keys), flush=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, _, row in pool.imap(one, jobs):
            rows.setdefault(name, []).append(row)
            if len(rows[name]) == o.seeds:
                print(
                    f"{name:40} " + " ".join(f"{median(r[key] for r in rows[name]):12.4f}" for key in keys), flush=True
                )
    chance = [
        random_baseline(N_FEATURES, toy_dictionary(D, N_FEATURES, L0, seed=s).atoms, seed=s) for s in range(o.seeds)
    ]
    print(f"{'random dictionary':40} {'':>12} {'':>12} {median(chance):12.4f}")
    if o.out is not None:
        o.out.write_text(
            json.dumps({"steps": o.steps, "rows": rows, "random_mmcs": chance}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
