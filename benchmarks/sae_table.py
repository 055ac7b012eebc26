"""TopK, BatchTopK, JumpReLU and both modes of top-AFA on a real model's activations, in one table.

    python benchmarks/sae_table.py --out benchmarks/results/sae_table.json
    python benchmarks/sae_table.py --model ../shared/data/models/stories260k --text ../shared/data/text/tinystories_1000.json \
        --hook blocks.2.hook_resid_post

All are trained on one stream of activations, from one forward pass of the model, and judged on sequences that none has
seen. FVU is over the whole held-out set; CE recovered compares with zero ablation of the hook.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from interp.bundled import bundled_text
from interp.features.config import SAEConfig
from interp.features.evaluate import evaluate_sae, random_baseline
from interp.features.sources import Corpus, ModelSource
from interp.features.train import train_saes
from interp.model.load import load_model


@dataclass
class Options:
    """What is trained on what."""

    model: str = "mini-llama"
    """Bundled model or folder."""
    hook: str = "blocks.2.hook_resid_post"
    """Where activations come from."""
    text: Path | None = None
    """Texts (default: the bundled ones)."""
    expansion: int = 8
    """Latents for each channel."""
    k: int = 16
    """Latents per token, where one says so; JumpReLU's target."""
    steps: int = 2000
    """Steps of 1,024 tokens."""
    lr: float = 1e-3
    """Adam's."""
    seed: int = 0
    """Of weights and order."""
    out: Path | None = None
    """JSON to write."""


def configs(d: int, o: Options) -> dict[str, SAEConfig]:
    common = {"d_in": d, "d_sae": o.expansion * d, "dead_after": 200_000}
    scaled = {**common, "normalize": "expected_average_only_in"}
    afa = {"architecture": "top-afa", **scaled}
    return {
        "TopK": SAEConfig(k=o.k, **scaled),
        "BatchTopK": SAEConfig(architecture="batchtopk", k=o.k, **scaled),
        "Matryoshka": SAEConfig(architecture="matryoshka", k=o.k, **scaled),
        "JumpReLU": SAEConfig(architecture="jumprelu", sparsity=1.0, target_l0=o.k, **scaled),
        "top-AFA faithful": SAEConfig(architecture="top-afa", afa="faithful", normalize="layer_norm", **common),
        "top-AFA corrected": SAEConfig(**afa),
        "top-AFA corrected, L1 1": SAEConfig(**afa, sparsity=1.0),
        "top-AFA corrected, L1 3": SAEConfig(**afa, sparsity=3.0),
        "top-AFA corrected, k_max": SAEConfig(**afa, k_max=2 * o.k),
    }


def main(o: Options) -> None:
    model = load_model(o.model)
    path = o.text or bundled_text()
    train, held_out = Corpus.from_file(model, path).split(0.1, seed=o.seed)
    source = ModelSource(model, train, [o.hook])
    d = source.widths[o.hook]
    saes = train_saes(source, configs(d, o), steps=o.steps, lr=o.lr, seed=o.seed, progress=True)
    rows = {name: evaluate_sae(model, sae, held_out, ablation="both") for name, sae in saes.items()}
    rows["TopK, chosen by AFA"] = evaluate_sae(model, saes["TopK"], held_out, ablation="both", select="afa")
    rows_held_out = ModelSource(model, held_out, [o.hook]).read(range(len(held_out.tokens))).values[o.hook]
    baseline = random_baseline(saes["TopK"], rows_held_out, seed=o.seed)
    print(f"\n{model.cfg.name} {o.hook}, {d} -> {o.expansion * d}, {o.steps} steps, {path.name}")
    print(f"{'':28} {'L0':>8} {'FVU':>8} {'CE recovered':>13} {'KL':>8} {'dead':>7} {'|xhat|/|x|':>11}")
    table = {}
    for name, found in rows.items():
        table[name] = found.to_dict()
        print(f"{name:28} {found.l0:8.1f} {found.fvu:8.4f} {found.ce_recovered['zero']:13.4f} {found.kl:8.4f} {found.dead:7.1%} "
              f"{found.norm_ratio:11.3f}")  # fmt: skip
    print(f"{'random dictionary':28} {o.k:8.1f} {baseline:8.4f}")
    if o.out is not None:
        about = {
            "model": model.cfg.name,
            "hook": o.hook,
            "steps": o.steps,
            "lr": o.lr,
            "text": path.name,
            "random_fvu": baseline,
        }
        o.out.write_text(json.dumps({**about, "rows": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
