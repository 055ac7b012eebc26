"""Sparse codes: which latents fire on which token, and how strongly; and the four products a dictionary needs of them.

A row of codes holds `offsets[t]:offsets[t + 1]` of `latents` and `values` (CSR), so that every architecture's code has the
same form whether or not each token has equally many. With n entries for B tokens, h latents and d channels, a sparse product
costs 2 n d instead of 2 B h d FLOPs; but gathers rows where a dense one multiplies blocks, so that it pays only below a
certain density (`SPARSE_BELOW`, measured by benchmarks/sae.py --dispatch).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_kernels import by_latent, sparse_decode, sparse_dots, weight_gradients

SPARSE_BELOW = 1 / 12  # of all latents firing; on two CPU cores at d = 768, h = 12,288 both take as long at about 1/10


@dataclass(frozen=True)
class Codes:
    """The latents that fire on each token, ascending within a token, with their values."""

    offsets: Int[Tensor, " token_plus_1"]
    latents: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    n_latents: int

    @classmethod
    def of_rows(cls, values: Float[Tensor, "token k"], latents: Int[Tensor, "token k"], n_latents: int) -> "Codes":
        """Equally many for every token."""
        n, k = latents.shape
        return cls(torch.arange(n + 1, device=latents.device) * k, latents.reshape(-1), values.reshape(-1), n_latents)

    @classmethod
    def where(cls, mask: Tensor, dense: Float[Tensor, "token latent"]) -> "Codes":
        """The values of a dense matrix where a mask of its shape is true."""
        rows, latents = mask.nonzero(as_tuple=True)
        offsets = torch.zeros(len(dense) + 1, dtype=torch.int64, device=dense.device)
        torch.cumsum(mask.sum(1), 0, out=offsets[1:])
        return cls(offsets, latents, dense[rows, latents], dense.shape[1])

    def __len__(self) -> int:
        """Tokens."""
        return len(self.offsets) - 1

    def with_values(self, values: Float[Tensor, " entry"]) -> "Codes":
        """The same places with other values."""
        return Codes(self.offsets, self.latents, values, self.n_latents)

    @cached_property
    def rows(self) -> Int[Tensor, " entry"]:
        """The token of each entry."""
        n = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(n), device=n.device), n, output_size=len(self.latents))

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        return by_latent(self.latents, self.n_latents)

    @property
    def sparse(self) -> bool:
        """Whether sparse products are expected to be the faster ones."""
        return len(self.latents) <= SPARSE_BELOW * len(self) * self.n_latents

    def dense(self, values: Tensor | None = None) -> Float[Tensor, "token latent"]:
        """As a matrix, with other values if given."""
        values = self.values if values is None else values
        result = torch.zeros(len(self), self.n_latents, dtype=values.dtype, device=values.device)
        result[self.rows, self.latents] = values
        return result

    def l0(self) -> float:
        """Latents that fire, per token."""
        return float((self.values != 0).sum()) / max(len(self), 1)

    def fired(self) -> Tensor:
        """Which latents fire on any token: [latent], bool."""
        count = torch.zeros(self.n_latents, dtype=torch.int32, device=self.latents.device)
        count.index_add_(0, self.latents, (self.values != 0).to(torch.int32))
        return count > 0

    def row_sums(self, per_entry: Float[Tensor, " entry"]) -> Float[Tensor, " token"]:
        """The sum over each token's entries; differentiable."""
        zeros = torch.zeros(len(self), dtype=per_entry.dtype, device=per_entry.device)
        return zeros.index_add(0, self.rows, per_entry)

    def decode(
        self, weight: Float[Tensor, "latent d"], *, bias: Float[Tensor, " d"] | None = None,
        target: Float[Tensor, "token d"] | None = None,
    ) -> Float[Tensor, "token d"]:  # fmt: skip
        """sum_i f_i w_i (+ bias); with a target, what is left of it: target - that."""
        if self.sparse:
            return sparse_decode(self.values, self.latents, self.offsets, weight, bias=bias, target=target)
        decoded = self.dense() @ weight if bias is None else torch.addmm(bias, self.dense(), weight)
        return decoded if target is None else target - decoded

    def dots(self, weight: Float[Tensor, "latent d"], rows: Float[Tensor, "token d"]) -> Float[Tensor, " entry"]:
        """<row_t, w_i> of each entry (t, i): the gradient of its value."""
        if self.sparse:
            return sparse_dots(self.latents, self.offsets, weight, rows)
        return (rows @ weight.T)[self.rows, self.latents]

    def outer(
        self, coefficients: list[Float[Tensor, " entry"]], rows: list[Float[Tensor, "token _"]]
    ) -> tuple[Float[Tensor, "latent _"], ...]:
        """sum over the entries (t, i) of each latent i of coefficient * row_t: gradients of weights, in one pass."""
        if self.sparse:
            return weight_gradients(*self._by_latent, self.rows, coefficients, rows)
        return tuple(self.dense(c).T @ r for c, r in zip(coefficients, rows, strict=True))

    def split(self, widths: tuple[int, ...]) -> "Codes":
        """Rows (level, token): each nested block of latents by itself, so that levels add up by a cumulative sum."""
        edges = torch.tensor([*widths], device=self.latents.device)
        level = torch.bucketize(self.latents, edges, right=True)
        row = level * len(self) + self.rows
        order = torch.argsort(row, stable=True)
        offsets = torch.zeros(len(widths) * len(self) + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(row, minlength=len(widths) * len(self)), 0, out=offsets[1:])
        return Codes(offsets, self.latents[order], self.values[order], self.n_latents)


@runtime_checkable
class Dictionary(Protocol):
    """What gives tokens sparse codes: an `SAE`, an `SNMF`.

    hook: the hook point that it reads, or None where it does not say; n_features: latents of its codes.
    """

    @property
    def hook(self) -> str | None: ...

    @property
    def n_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def codes(self, x: Float[Tensor, "token d"]) -> Codes:
        """What fires on each token."""
        ...
