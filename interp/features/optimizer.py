"""Adam for dictionaries: one pass over each weight that also keeps decoder rows at norm 1.

For rows kept at norm 1, the gradient loses its component along the row before the step, and the row is renormalised after it.
Normalising before the step instead (as the published top-AFA code does) leaves rows off the sphere in the forward pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from interp_kernels import adam_rows


class Adam:
    """Adam over named parameters; `unit` names those whose rows keep norm 1, `late` those renormalised before the step."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, betas: tuple[float, float], eps: float,
        unit: frozenset[str] = frozenset(), late: frozenset[str] = frozenset(),
    ):  # fmt: skip
        self.parameters, self.betas, self.eps, self.unit, self.late = dict(parameters), betas, eps, unit, late
        self.n_steps = 0
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float, *, copies: Mapping[str, Tensor] | None = None) -> None:
        """One step from the parameters' `.grad`, which it may overwrite. copies: tensors that receive the new weights."""
        self.n_steps += 1
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            if name in self.late:
                p /= p.norm(dim=1, keepdim=True).clamp_min(1e-12)
                p.grad -= (p.grad * p).sum(1, keepdim=True) * p
            as_rows = (t if t.ndim == 2 else t[None] for t in (p.data, p.grad, self.first[name], self.second[name]))
            adam_rows(
                *as_rows, step=self.n_steps, lr=lr, betas=self.betas, eps=self.eps, unit_rows=name in self.unit,
                copy=None if copies is None else copies.get(name),
            )  # fmt: skip
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments, by name."""
        return {f"{kind}.{name}": value for kind in ("first", "second") for name, value in getattr(self, kind).items()}

    def load(self, state: Mapping[str, Tensor], n_steps: int) -> None:
        """Moments as `state()` gave them, and the steps taken."""
        self.n_steps = n_steps
        for kind in ("first", "second"):
            for name, value in getattr(self, kind).items():
                value.copy_(state[f"{kind}.{name}"])
