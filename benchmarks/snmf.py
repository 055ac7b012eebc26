"""Semi-NMF of MLP activations: our solver beside the published algorithm, on the same data.

    python benchmarks/snmf.py --out benchmarks/results/snmf.json            # 3072 x 7,300, k = 100, 1 %: about 15 minutes
    python benchmarks/snmf.py --model mini-gpt2 --out benchmarks/results/snmf-mini-gpt2.json

Published (2506.10920): G uniform, F by least squares with a ridge of 1e-6, the largest 1 % of each column kept by a
threshold, Ding's update, and the dense loss after each iteration, written as its description says. Beside it our
`solver="multiplicative"`, which is the same algorithm with the loss by the trace identity and sparse products, for a
fraction of its iterations. What counts: the loss that it reaches in 2,000 iterations, and how long ours takes to finish
(medians of three). The reference is timed on every iteration; nothing is extrapolated.

Without --model the data are GELU activations of a random MLP of GPT-2 small's width (3,072 neurons) on sparse non-negative
sums of 400 Zipf-distributed directions with noise; with it, of a bundled model on its own text.
"""

import json
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

from benchmarks.machine import describe_machine
from interp import SNMF, Corpus, ModelSource, load_model
from interp.bundled import bundled_text
from interp.features.sources import read_texts
from interp.files import write_atomically


@dataclass
class Options:
    """What is factorised."""

    model: str | None = None
    """A bundled model, whose middle MLP is factorised (default: synthetic activations of GPT-2 small's width)."""
    tokens: int = 7300
    """Columns of A."""
    k: int = 100
    """Features."""
    share: float = 0.01
    """Of the neurons, for each feature."""
    iterations: int = 2000
    """Of the published algorithm."""
    starts: int = 8
    """Of ours."""
    seed: int = 0
    """Of data and starts."""
    device: str = "cpu"
    """Where both run."""
    out: Path | None = None
    """JSON to write."""


def activations(o: Options) -> Tensor:
    """[token, neuron]."""
    if o.model is not None:
        model = load_model(o.model, device=o.device)
        hook = f"blocks.{model.cfg.n_layers // 2}.mlp.hook_post"
        corpus = Corpus.from_texts(model, read_texts(bundled_text())[:400], name="mini")
        source = ModelSource(model, corpus, [hook])
        return source.read(range(source.n_sequences)).values[hook][: o.tokens]
    d, width, concepts = 3072, 768, 400
    g = torch.Generator().manual_seed(o.seed)
    directions = torch.randn(concepts, width, generator=g) / width**0.5
    often = 1 / torch.arange(1, concepts + 1).float()
    stream = 0.3 * torch.randn(o.tokens, width, generator=g) / width**0.5
    for _ in range(6):
        drawn = torch.multinomial(often, o.tokens, replacement=True, generator=g)
        stream += directions[drawn] * 2 * torch.rand(o.tokens, 1, generator=g)
    W = torch.randn(d, width, generator=g) / width**0.5
    W += torch.randn(d, 1, generator=g).abs() * directions[torch.randint(concepts, (d,), generator=g)]
    return torch.nn.functional.gelu(2 * stream @ W.T - 0.4).to(o.device)


def published(A: Tensor, k: int, share: float, iterations: int, seed: int) -> tuple[list[float], list[float]]:
    """(loss after each iteration, seconds up to it) of the published loop. A: [neuron, token]."""
    d, n = A.shape
    keep, g = math.ceil(share * d), torch.Generator().manual_seed(seed)
    G, F = torch.rand(n, k, generator=g).to(A), torch.randn(d, k, generator=g).to(A)
    eye, losses, seconds, began = torch.eye(k).to(A), [], [], time.perf_counter()
    for i in range(iterations):
        F = A @ G @ torch.linalg.inv(G.T @ G + 1e-6 * eye)
        F = torch.where(F.abs() >= F.abs().topk(keep, dim=0).values[-1], F, 0)
        lengths = G.norm(dim=0)
        G, F = G / lengths, F * lengths
        P, Q = A.T @ F, F.T @ F
        (p_up, p_down), (q_up, q_down) = (((x.abs() + x) / 2, (x.abs() - x) / 2) for x in (P, Q))
        G = G * ((p_up + G @ q_down) / (p_down + G @ q_up + 1e-6)).sqrt()
        losses.append(float((A - F @ G.T).square().sum()))
        seconds.append(time.perf_counter() - began)
        if i % 100 == 99:
            print(f"  published: iteration {i + 1}, {seconds[-1]:.0f} s", flush=True)
    return losses, seconds


def timed(snmf: SNMF, X: Tensor) -> list[float]:
    """Seconds of three fits."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        snmf.fit(X)
        times.append(time.perf_counter() - began)
    return times


def main(o: Options) -> None:
    X = activations(o)
    A, norm2 = X.T.contiguous(), float(X.double().square().sum())
    print(f"{A.shape[0]} neurons x {A.shape[1]} tokens, k = {o.k}, share {o.share:.0%}, {describe_machine(o.device)}")
    fit, one = SNMF(o.k, share=o.share, n_init=o.starts, seed=o.seed), SNMF(o.k, share=o.share, n_init=1, seed=o.seed)
    times, times_one = timed(fit, X), timed(one, X)
    ours, single = median(times), median(times_one)
    losses, seconds = published(A, o.k, o.share, o.iterations, o.seed)
    best = min(losses) / norm2
    count = min(o.iterations, 200)
    began = time.perf_counter()
    same = SNMF(o.k, share=o.share, solver="multiplicative", init="random", max_iter=count, tol=0.0, seed=o.seed).fit(X)
    lean = (time.perf_counter() - began) / count
    print(f"\n{'':46} {'relative loss':>13} {'seconds':>9}")
    print(f"{f'published, best of {o.iterations} iterations':46} {best:13.4f} {seconds[-1]:9.1f}")
    at = losses.index(min(losses)) + 1
    print(f"{f'published, until that best (iteration {at})':46} {best:13.4f} {seconds[at - 1]:9.1f}")
    print(f"{f'the same updates, ours, {count} iterations':46} {same.relative_loss_:13.4f} {lean * count:9.1f}")
    print(f"{f'interp, {o.starts} starts':46} {fit.relative_loss_:13.4f} {ours:9.1f}")
    print(f"{'interp, one start (SVD)':46} {one.relative_loss_:13.4f} {single:9.1f}")
    print(
        f"\nours takes 1/{seconds[-1] / ours:.0f} of the time; stability over starts {float(fit.stability_.mean()):.2f}"
    )
    ups = sum(b > a for a, b in pairwise(losses))
    print(f"published: {1e3 * seconds[-1] / len(losses):.0f} ms an iteration, {ups} of them upwards; "
          f"ours (multiplicative) {1e3 * lean:.0f} ms")  # fmt: skip
    if o.out is not None:
        result = {
            "machine": describe_machine(o.device), "shape": list(A.shape), "k": o.k, "share": o.share, "model": o.model,
            "published": {"loss": best, "seconds": seconds[-1], "best_at": at, "upward_steps": ups,
                          "iterations": o.iterations},
            "multiplicative": {"loss": same.relative_loss_, "seconds": lean * count, "iterations": count},
            "interp": {"loss": fit.relative_loss_, "seconds": times, "losses": fit.losses_, "n_iter": fit.n_iter_,
                       "stability": float(fit.stability_.mean())},
            "interp, one start": {"loss": one.relative_loss_, "seconds": times_one},
        }  # fmt: skip
        write_atomically(o.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
