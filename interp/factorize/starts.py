"""Where a semi-NMF begins: non-negative weights G [feature, token] for A [neuron, token].

- random   uniform on [0, 1)
- kmeans   Lloyd's clusters of tokens, one-hot
- svd      the right singular vectors, each with the sign whose positive part is longer, negative parts cut off

A singular vector and its negative are equally good, and cutting the wrong one off throws away most of it. Starts with zeros lock
multiplicative updates, which cannot leave 0; those get a floor. Least squares and HALS do not need one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import one_of

STARTS = ("svd", "random", "kmeans")
LLOYD_STEPS = 5


def start(
    kind: str, A: Float[Tensor, "neuron token"], n_features: int, generator: torch.Generator
) -> Float[Tensor, "feature token"]:
    """Weights to begin with. generator: on the CPU, so that a seed means the same on every device."""
    one_of(kind, STARTS, "kind of start")
    return {"random": _random, "kmeans": _clusters, "svd": _singular}[kind](A, n_features, generator)


def _random(A: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return torch.rand(k, A.shape[1], generator=generator, dtype=A.dtype).to(A.device)


def _clusters(A: Tensor, k: int, generator: torch.Generator) -> Tensor:
    n = A.shape[1]
    first = torch.randperm(n, generator=generator)[:k].to(A.device)
    centres = A[:, first].T
    if len(centres) < k:  # fewer tokens than clusters
        centres = torch.cat([centres, torch.randn(k - len(centres), len(A), generator=generator, dtype=A.dtype).to(A)])
    for step in range(LLOYD_STEPS):
        distance = torch.addmm(centres.square().sum(1, keepdim=True), centres, A, alpha=-2)
        G = torch.zeros_like(distance).scatter_(0, distance.argmin(0, keepdim=True), 1)
        if step < LLOYD_STEPS - 1:
            size = G.sum(1, keepdim=True)
            centres = torch.where(size > 0, (G @ A.T) / size.clamp_min(1), centres)
    return G


def _singular(A: Tensor, k: int, generator: torch.Generator) -> Tensor:
    rank = min(k, *A.shape)
    # a randomised range finder with two power steps: the leading subspace, to far better than a start needs
    probe = torch.randn(A.shape[1], min(rank + 8, *A.shape), generator=generator, dtype=A.dtype).to(A.device)
    basis = torch.linalg.qr(A @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(A @ torch.linalg.qr(A.T @ basis).Q).Q
    _, sizes, V = torch.linalg.svd(basis.T @ A, full_matrices=False)
    V = V[:rank] * sizes[:rank, None].sqrt()
    up = V.clamp_min(0).square().sum(1) >= V.clamp_max(0).square().sum(1)
    G = (V * torch.where(up, 1, -1)[:, None]).clamp_min(0)
    return G if rank == k else torch.cat([G, _random(A, k - rank, generator) * G.mean()])
