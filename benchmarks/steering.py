"""Do readings of a model hold when one acts on them? Two causal checks on a bundled model, without a judge.

    python benchmarks/steering.py --out benchmarks/results/steering.json

1. Neurons. For each of some tokens: the neurons whose down rows read as the token most (`decode_neurons`, `find_neurons`),
   clamped together, against 20 sets of random neurons of the same layers, on prompts that do not ask for the token. Paired
   over prompts and then over tokens (Wilcoxon, one-sided).
2. Features. Texts of seven kinds (the sentences of the seven tasks, answers written out) are seven planted concepts; a
   concept's tokens are those that no other kind has. An SNMF of all texts' MLP activations is fitted without labels; for
   each concept that feature of the ten highest detection scores (S_CD, on half of the texts) that writes the concept's
   tokens most steers, and so does DiffMeans of the same texts at the same hook. Both at equal KL of the next token, equal
   seeds, every position; scores are `steering_scores`' final. Paired over concepts.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats

from benchmarks.machine import describe_machine
from interp import (
    Corpus,
    clamp_test,
    compare_steering,
    concept_detection,
    decode_neurons,
    diff_means,
    find_neurons,
    fit_snmf,
    load_model,
    side_by_side,
    snmf_vector,
    steering_scores,
    steering_strength,
    text_activations,
    token_effects,
)  # fmt: skip
from interp.files import write_atomically
from interp.neurons.clamp import signs_of
from interp.statistics import bootstrap_mean
from interp.steering.generation import UNSTEERED
from interp.tasks.named import TASKS, get_task

PROMPTS = ("The", "We know that the", "Now the", "In the")
TOKENS = (" Mary", " John", " Paris", " Oslo", " school", " book", " he", " she", " are", " war", " keys", ":")
SPECIFIC = (
    0.5  # of a concept token's occurrences at least this share is in its own kind of text, and it is there four times
)


@dataclass
class Options:
    """What is checked."""

    model: str = "mini-llama"
    """Bundled model."""
    layer: int | None = None
    """Whose MLP is factorised (default: the one before the last)."""
    texts: int = 60
    """Of each kind."""
    k: int = 50
    """Features."""
    share: float = 0.05
    """Of the neurons, for each feature."""
    n: int = 8
    """Continuations of each prompt and strength."""
    neurons: int = 5
    """Clamped for each token."""
    seed: int = 0
    """Of everything."""
    out: Path | None = None
    """JSON to write."""


def planted_texts(n: int, seed: int) -> dict[str, list[str]]:
    """{kind: texts}: prompts of each task with their right answers."""
    found = {}
    for name in TASKS:
        rng, task = random.Random(seed), get_task(name)
        corruption = next(iter(task.corruptions))
        examples = [task.generate(rng, corruption=corruption) for _ in range(n)]
        found[name] = [example.clean + example.answers[0] + "." for example in examples]
    return found


def own_tokens(model, texts: dict[str, list[str]]) -> dict[str, list[int]]:
    """Tokens by the kind of text that they are specific to."""
    counts = {kind: np.bincount(np.concatenate([model.to_tokens(t)[0, 1:].numpy() for t in some]), minlength=model.cfg.d_vocab)
              for kind, some in texts.items()}  # fmt: skip
    total = sum(counts.values())
    return {kind: np.flatnonzero((own >= 4) & (own > SPECIFIC * total)).tolist() for kind, own in counts.items()}


def clamp_check(model, o: Options) -> list[dict]:
    """A row for each token."""
    table = decode_neurons(model, matrix="down", k=20)
    rows = []
    rng = random.Random(o.seed)
    texts = [text for some in planted_texts(6, o.seed + 1).values() for text in some]
    prompts = [" ".join(text.split()[: rng.randint(3, 8)]) for text in texts]
    vocabulary = {token for token in TOKENS if (table["token"] == token).any()}
    for token in (token for token in TOKENS if token in vocabulary):
        found = find_neurons(table, token, k=o.neurons)
        test = clamp_test(model, prompts, token, signs_of(found), seed=o.seed)
        rows.append({"token": token, "effect": test.effect, "control": test.control, "low": test.low, "high": test.high,
                     "p": test.p, "p_sets": test.p_sets, "n_prompts": len(prompts)})  # fmt: skip
        print(test)
    return rows


def chosen(model, snmf, detected: pd.DataFrame, tokens: list[int]) -> int:
    """The feature to steer with, read from both sides: of the ten that detect the concept best, the one that writes it most.

    Writing: the mean effect on the logits of the concept's tokens, in standard deviations over the vocabulary.
    """
    best = detected.sort_values("s_cd").index[-10:].to_list()
    effects = token_effects(model, snmf.hook, snmf.components_[best], range(model.cfg.d_vocab))
    return best[int((effects[:, tokens].mean(1) / effects.std(1)).argmax())]


def steering_check(model, o: Options) -> pd.DataFrame:
    """Final scores by concept, prompt, target, sample and method."""
    texts = planted_texts(o.texts, o.seed)
    layer = model.cfg.n_layers - 2 if o.layer is None else o.layer
    hook = f"blocks.{layer}.mlp.hook_post"
    everything = [text for some in texts.values() for text in some]
    snmf = fit_snmf(model, Corpus.from_texts(model, everything), hook, n_features=o.k, share=o.share, seed=o.seed)
    activations = {kind: text_activations(model, hook, some[::2]) for kind, some in texts.items()}
    tokens, parts = own_tokens(model, texts), []
    for kind, some in texts.items():
        others = [text for other, more in texts.items() if other != kind for text in more]
        neutral = [x for other, more in activations.items() if other != kind for x in more]
        detected = concept_detection(snmf.components_, activations[kind], neutral)
        feature = chosen(model, snmf, detected, tokens[kind])
        vectors = {"SNMF": snmf_vector(snmf, feature), "DiffMeans": diff_means(model, hook, some[::2], others[::2])}
        for prompt in PROMPTS:
            strength = steering_strength(model, prompt, list(vectors.values()))
            strength = strength[strength["sign"] == 1]
            for target, rows in strength.groupby("target"):
                if not rows["reached"].all():
                    continue
                changes = {name: [vector.change(float(alpha))] for (name, vector), alpha in
                           zip(vectors.items(), rows["alpha"], strict=True)}  # fmt: skip
                written = side_by_side(
                    model, prompt, changes, n=o.n, max_new_tokens=20, seed=o.seed, concept_tokens=tokens[kind]
                )
                scores = steering_scores(written).assign(
                    concept_name=kind, prompt=prompt, target=target, feature=feature
                )
                parts.append(scores)
        print(f"{kind}: feature {feature}, S_CD {detected.s_cd[feature]:.2f}, {len(tokens[kind])} tokens of its own")
    return pd.concat(parts, ignore_index=True)


def main(o: Options) -> None:
    model = load_model(o.model)
    print(f"{model}, {describe_machine()}\n")
    clamped = clamp_check(model, o)
    gains = np.array([row["effect"] - row["control"] for row in clamped])
    mean, low, high = bootstrap_mean(gains)
    p = float(stats.wilcoxon(gains, alternative="greater").pvalue)
    print(f"\nover {len(gains)} tokens: {mean:+.3f} nats more than controls [{low:+.3f}, {high:+.3f}], p {p:.2g}\n")
    scores = steering_check(model, o)
    by = ["concept_name", "target", "prompt", "sample"]
    pairs = compare_steering(scores, "SNMF", "DiffMeans", by=by)
    means = scores.groupby(["concept_name", "name"])[["concept", "fluency", "final"]].mean()
    print(f"\n{means.round(3)}")
    best = scores[scores["name"] != UNSTEERED].groupby(["concept_name", "name", "target"])["final"].mean()
    best = best.groupby(["concept_name", "name"]).max().unstack()
    unlabelled = (best["SNMF"] - best["DiffMeans"]).to_numpy()
    at_best, best_low, best_high = bootstrap_mean(unlabelled)
    print(
        f"\nSNMF - DiffMeans over {pairs.n_pairs} pairs: {pairs.difference:+.4f} [{pairs.low:+.4f}, {pairs.high:+.4f}];"
    )
    print(f"at each method's best KL, over {len(best)} concepts: {at_best:+.4f} [{best_low:+.4f}, {best_high:+.4f}]")
    if o.out is not None:
        result = {
            "machine": describe_machine(), "model": o.model, "clamped": clamped,
            "clamped_mean": {"difference": float(mean), "low": float(low), "high": float(high), "p": p},
            "steered": means.reset_index().to_dict("records"),
            "steered_difference": vars(pairs),
            "at_best_strength": {"mean": float(at_best), "low": float(best_low), "high": float(best_high)},
        }  # fmt: skip
        write_atomically(o.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
