"""The steps of sparse semi-non-negative matrix factorisation, on plain matrices. `interp.factorize.snmf` is the estimator.

    minimise |A - F G^T|^2   with G >= 0 and at most m non-zeros in each column of F        A [neuron, token]

F [neuron, feature] is kept as `Support`s with values, a few neurons for each feature; G by its transpose, [feature, token], so
that a feature's weights lie side by side. Both of our steps solve their half of the problem, so that neither can raise the loss:

- `refit`: with G and the support fixed, each neuron i is a least squares problem in the few features s that have it in their
  support, (G^T G)[s, s] f_i = (A G)[i, s]: small systems, solved in batches of equal size.
- `hals`: with F fixed, each feature's weights in turn have a closed form (hierarchical alternating least squares),
  g_j <- max(0, g_j + (p_j - G q_j) / q_jj) with P = A^T F, Q = F^T F. An entry that is 0 can become positive again.

Choosing a support (`unrestricted` least squares, then the m largest of each column, `strongest`) is a heuristic and can raise it.

The published updates (2506.10920) take the same heuristic in every iteration, do not refit, and multiply:

    g <- g * sqrt((P+ + G Q-) / (P- + G Q+ + eps))                Ding, Li and Jordan 2010; X+- = (|X| +- X) / 2

which is monotone without the heuristic (T1), and cannot leave 0.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError
from interp_kernels import sparse_decode, sparse_dots

SPARSE_BELOW = 1 / 8  # of all neurons in a feature: then products with F gather rows instead of multiplying by zeros
_BLOCK = 16  # features that `hals` goes through between two matrix products
_NNLS_SWEEPS, _PIVOTS, _NNLS_ROUNDS = 10, 5, 40  # sweeps, then changes of what is active; rounds of both at most
_NUMBERS = 2**22  # of tokens' systems of equations that are held at once
_TINY = 1e-30  # of unit columns: below it is 0, before arithmetic on subnormal numbers makes every step slower


@dataclass(frozen=True, eq=False)
class Support:
    """Which neurons each feature may use: equally many for all, ascending."""

    neurons: Int[Tensor, "feature m"]
    n_neurons: int

    @cached_property
    def offsets(self) -> Int[Tensor, " feature_plus_1"]:
        """Where the entries of each feature begin, features one behind the other."""
        k, m = self.neurons.shape
        return torch.arange(k + 1, device=self.neurons.device) * m

    @property
    def sparse(self) -> bool:
        """Whether gathering rows is less work than a dense product."""
        return self.neurons.shape[1] < SPARSE_BELOW * self.n_neurons

    @cached_property
    def systems(self) -> list[tuple[Int[Tensor, "neuron size"], Bool[Tensor, "neuron size"]]]:
        """Neurons by how many features share them, each with its entries (flat, padded with 0) and which of them are there.

        Sizes are rounded up to powers of two, so that there are few batches.
        """
        flat = self.neurons.flatten()
        entry = flat.argsort(stable=True)
        count = flat.bincount(minlength=self.n_neurons)
        first = count.cumsum(0) - count
        found = []
        size, below = 1, 0
        while below < len(self.neurons):
            rows = ((count > below) & (count <= size)).nonzero()[:, 0]
            if len(rows):
                slot = torch.arange(size, device=flat.device)
                there = slot < count[rows, None]
                found.append((entry[(first[rows, None] + slot).clamp_max(len(entry) - 1)] * there, there))
            below, size = size, min(2 * size, len(self.neurons))
        return found

    def dense(self, values: Float[Tensor, "feature m"]) -> Float[Tensor, "feature neuron"]:
        """F^T with its zeros."""
        full = values.new_zeros(len(values), self.n_neurons)
        return full.scatter_(1, self.neurons, values)


@dataclass(eq=False)
class Factors:
    """A state of the factorisation: F by support and values, G by its transpose."""

    support: Support
    values: Float[Tensor, "feature m"]
    G: Float[Tensor, "feature token"]


# ------------------------------------------------------------------------------------------------------------ products


def project(
    A: Float[Tensor, "neuron token"], support: Support, values: Float[Tensor, "feature m"]
) -> Float[Tensor, "feature token"]:
    """F^T A, which is P^T."""
    if support.sparse:
        return sparse_decode(values.flatten(), support.neurons.flatten(), support.offsets, A)
    return support.dense(values) @ A


def correlate(
    A: Float[Tensor, "neuron token"], G: Float[Tensor, "feature token"], support: Support
) -> Float[Tensor, "feature m"]:
    """The entries of A G on the support."""
    if support.sparse:
        return sparse_dots(support.neurons.flatten(), support.offsets, A, G).unflatten(0, support.neurons.shape)
    return (G @ A.T).gather(1, support.neurons)


def gram(F: Float[Tensor, "feature _"]) -> Float[Tensor, "feature feature"]:
    """F F^T."""
    return F @ F.T


def loss(
    norm2: float, P: Float[Tensor, "feature token"], Q: Float[Tensor, "feature feature"], G: Float[Tensor, "feature token"],
    GG: Float[Tensor, "feature feature"],
) -> float:  # fmt: skip
    """|A - F G^T|^2 = |A|^2 - 2 <P, G> + <Q, G^T G>, summed in float64; norm2 = |A|^2. Rounding may not make it negative."""
    found = norm2 - 2 * float((P * G).sum(dtype=torch.float64)) + float((Q * GG).sum(dtype=torch.float64))
    return max(found, 0.0)


# ----------------------------------------------------------------------------------------------------------- F, given G


def ridge(dtype: torch.dtype) -> float:
    """What is added to the diagonal of G^T G, whose columns have length 1."""
    return 1e-10 if dtype == torch.float64 else 1e-6


def solve(M: Float[Tensor, "*batch size size"], b: Float[Tensor, "*batch size n"]) -> Float[Tensor, "*batch size n"]:
    """M^-1 b by Cholesky for a symmetric M >= 0 with a diagonal of 1 (or 0), with as much of a ridge as it takes."""
    eye, extra = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device), ridge(M.dtype)
    while True:
        factor, info = torch.linalg.cholesky_ex(M + extra * eye)
        if not info.any():
            return torch.cholesky_solve(b, factor)
        if extra > 1:  # of a diagonal of 1: no finite matrix takes that much
            raise OptionError("a least squares problem of semi-NMF holds numbers that are not finite")
        extra *= 10


def unrestricted(
    A: Float[Tensor, "neuron token"], G: Float[Tensor, "feature token"], GG: Float[Tensor, "feature feature"]
) -> Float[Tensor, "feature neuron"]:
    """F^T by least squares, every neuron in every feature: (G^T G)^-1 G^T A^T."""
    return solve(GG, G @ A.T)


def strongest(F: Float[Tensor, "feature neuron"], m: int) -> Support:
    """The m neurons of largest |F| in each feature; ties go to the lowest."""
    size = F.abs()
    if m == F.shape[1]:
        return Support(torch.arange(m, device=F.device).expand(len(F), -1).contiguous(), m)
    least = size.topk(m, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = size > least, size == least
    kept = above | (level & (level.cumsum(1) <= m - above.sum(1, keepdim=True)))
    return Support(kept.nonzero()[:, 1].reshape(len(F), m), F.shape[1])


def refit(
    AG: Float[Tensor, "feature m"], GG: Float[Tensor, "feature feature"], support: Support
) -> Float[Tensor, "feature m"]:
    """Least squares on the support, neuron by neuron. AG: the entries of A G on the support."""
    m = support.neurons.shape[1]
    right, values = AG.flatten(), torch.empty_like(AG).flatten()
    eye = torch.eye(len(GG), dtype=GG.dtype, device=GG.device)
    if m == support.n_neurons:
        return solve(GG, AG)
    for entry, there in support.systems:
        feature = entry // m
        pairs = there[:, :, None] & there[:, None, :]
        size = entry.shape[1]
        M = torch.where(pairs, GG[feature[:, :, None], feature[:, None, :]], eye[:size, :size])
        found = solve(M, torch.where(there, right[entry], 0)[:, :, None])[:, :, 0]
        values[entry[there]] = found[there]
    return values.unflatten(0, AG.shape)


# ----------------------------------------------------------------------------------------------------------- G, given F


def hals(
    P: Float[Tensor, "feature token"], Q: Float[Tensor, "feature feature"], G: Float[Tensor, "feature token"], sweeps: int
) -> Float[Tensor, "feature token"]:  # fmt: skip
    """G after so many sweeps of coordinate descent over features, changed in place. Features with Q_jj = 0 stay as they are.

    P - Q G is computed by matrix products for some features at a time and kept up to date among them.
    """
    diagonal = Q.diagonal()[:, None]
    # in units of q_jj a step is p_j - G q_j itself; where that is 0 there is none
    scale = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 0)
    P, Q = P * scale, Q * scale
    for _ in range(sweeps):
        for start in range(0, len(G), _BLOCK):
            own = slice(start, start + _BLOCK)
            left, couplings = torch.addmm(P[own], Q[own], G, alpha=-1), Q[own, own]
            for i, g in enumerate(G[own]):
                new = (left[i] + g).clamp_(min=0)
                if i + 1 < len(left):  # what comes later in the block sees this step
                    left[i + 1 :].addr_(couplings[i + 1 :, i], new - g, alpha=-1)
                g.copy_(new)
    return G


def nnls(P: Float[Tensor, "feature token"], Q: Float[Tensor, "feature feature"]) -> Float[Tensor, "feature token"]:
    """Non-negative least squares min |A - F G^T|^2 over G >= 0 for a fixed F, token by token, to rounding.

    A few sweeps of `hals` guess which features are active on a token. Least squares on those is the optimum if it is not negative
    and no other feature's gradient p - q g is positive; else those that offend change sides, some times (block principal
    pivoting), and then tokens that are still not there are swept further.
    """
    diagonal = Q.diagonal()[:, None]
    size = torch.where(diagonal > 0, diagonal, 1).sqrt()
    P, Q = P / size, Q / (size * size.T)  # features of length 1
    G = torch.where(diagonal > 0, P, 0).clamp_min(0)
    left = torch.arange(G.shape[1], device=G.device)
    for _ in range(_NNLS_ROUNDS):
        G[:, left] = hals(P[:, left], Q, G[:, left], _NNLS_SWEEPS)
        active = G > 0
        for _ in range(_PIVOTS):
            if not len(left):
                return G / size
            exact, done, active[:, left] = _on_active(P[:, left], Q, active[:, left])
            G[:, left[done]] = exact[:, done]
            left = left[~done]
    return G / size


def _on_active(
    P: Float[Tensor, "feature token"], Q: Float[Tensor, "feature feature"], active: Bool[Tensor, "feature token"]
) -> tuple[Float[Tensor, "feature token"], Bool[Tensor, " token"], Bool[Tensor, "feature token"]]:
    """Least squares on each token's active features, whether that is the optimum of all, and what to try next if not."""
    found, done = torch.zeros_like(P), torch.zeros(P.shape[1], dtype=torch.bool, device=P.device)
    width = max(int(active.sum(0).max()), 1)
    eye = torch.eye(width, dtype=Q.dtype, device=Q.device)
    following = torch.empty_like(active)
    for part in torch.arange(P.shape[1], device=P.device).split(max(1, _NUMBERS // width**2)):
        on, p = active[:, part], P[:, part]
        # the active features of each token first, in their order, and as many others as fill up
        feature = on.T.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        there = on.T.gather(1, feature)
        M = torch.where(there[:, :, None] & there[:, None, :], Q[feature[:, :, None], feature[:, None, :]], eye)
        right = torch.where(there, p.T.gather(1, feature), 0)[:, :, None]
        x = solve(M, right)
        x = x + solve(M, right - M @ x)  # what the ridge took
        g = torch.zeros_like(p).scatter_(0, feature.T, torch.where(there, x[:, :, 0], 0).T)
        slack, slope = 64 * torch.finfo(p.dtype).eps * p.abs().amax(0), p - Q @ g
        done[part] = (g >= -slack).all(0) & ((slope <= slack) | on).all(0)
        found[:, part], following[:, part] = g.clamp_min(0), (g > 0) | (~on & (slope > slack))
    return found, done, following


def multiply(
    P: Float[Tensor, "feature token"], Q: Float[Tensor, "feature feature"], G: Float[Tensor, "feature token"], eps: float
) -> Float[Tensor, "feature token"]:  # fmt: skip
    """Ding's multiplicative step: g sqrt((P+ + Q- G) / (P- + Q+ G + eps)). The page's factors, transposed."""
    up, down = P.clamp_min(0) + (-Q).clamp_min(0) @ G, (-P).clamp_min(0) + Q.clamp_min(0) @ G
    return G * (up / (down + eps)).sqrt()


def unit_rows(G: Float[Tensor, "feature token"]) -> Float[Tensor, "feature 1"]:
    """Scale each feature's weights to length 1, in place; their lengths. What is subnormal after it is 0."""
    lengths = G.norm(dim=1, keepdim=True)
    G /= torch.where(lengths > 0, lengths, 1)
    G[G < _TINY] = 0
    return lengths
