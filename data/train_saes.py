"""Text like the bundled models' training text, and sparse autoencoders and transcoders of them.

    python data/train_saes.py text                 data/text/mini.jsonl
    python data/train_saes.py mini-gpt2            data/saes/mini-gpt2/: a few minutes on two cores
    python data/train_saes.py mini-llama

The text is of the corpus that the models saw (`corpus.py`: what is held out of their training does not occur), from a seed of its
own. Autoencoders are trained on more of it than is bundled, and judged on texts of yet another seed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import corpus as mini

from interp.features.config import SAEConfig
from interp.features.evaluate import evaluate_sae
from interp.features.sources import Corpus, ModelSource
from interp.features.train import train_saes
from interp.model.load import load_model

DATA = Path(__file__).resolve().parent
N_BUNDLED, N_TRAINING, N_HELD_OUT = 2_000, 16_000, 400
STEPS, BATCH = 6_000, 1_024


def documents(n: int, seed: str) -> list[str]:
    """Texts of a few sentences each, without the runs of random tokens."""
    found = []
    for i in range(n):
        rng = random.Random(f"interp-mini text {seed} {i}")
        pieces, size = [], rng.randrange(150, 600)
        for kind, parts in mini.texts(rng):
            if kind != "random_tokens":
                pieces.append("".join(text for text, _ in parts))
            if sum(map(len, pieces)) >= size:
                break
        found.append("".join(pieces).strip())
    return found


def write_text() -> None:
    """The bundled text."""
    (DATA / "text").mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in documents(N_BUNDLED, "bundled")]
    (DATA / "text" / "mini.jsonl").write_text("".join(lines), encoding="utf-8")


def configs(d_model: int) -> dict[str, SAEConfig]:
    """What is trained of each model, by folder name."""
    common = {
        "d_in": d_model,
        "d_sae": 8 * d_model,
        "k": 16,
        "dead_after": 200_000,
        "normalize": "expected_average_only_in",
    }
    return {
        "resid_post2": SAEConfig(architecture="batchtopk", hook="blocks.2.hook_resid_post", **common),
        "transcoder1": SAEConfig(hook="blocks.1.ln2.hook_normalized", target_hook="blocks.1.hook_mlp_out", skip=True,
                                 apply_b_dec_to_input=False, **common),
    }  # fmt: skip


def train(name: str) -> None:
    """Train and judge the autoencoders of one bundled model."""
    model = load_model(name)
    training = Corpus.from_texts(model, documents(N_TRAINING, "training"), name="mini")
    apart = Corpus.from_texts(model, documents(N_HELD_OUT, "held out"), name="mini, held out")
    asked = configs(model.cfg.d_model)
    hooks = list(dict.fromkeys(hook for c in asked.values() for hook in (c.hook, c.target_hook) if hook))
    source = ModelSource(model, training, hooks)
    with tempfile.TemporaryDirectory() as folder:
        saes = train_saes(
            source, asked, folder=Path(folder) / name, steps=STEPS, batch_size=BATCH, lr=1e-3, progress=True
        )
    for title, sae in saes.items():
        found = evaluate_sae(model, sae, apart, ablation="both")
        sae.metadata.update(fvu=found.fvu, l0=found.l0, ce_recovered=found.ce_recovered)
        target = DATA / "saes" / name / title
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sae.save(target)
        print(f"{name}/{title}\n{found}\n")


if __name__ == "__main__":
    what = sys.argv[1:] or ["text", "mini-gpt2", "mini-llama"]
    for item in what:
        write_text() if item == "text" else train(item)
