"""Matching pursuit: a vector as a short sum of given directions, chosen greedily (Mallat & Zhang 1993).

The atoms w_i are unit vectors, many more than there are dimensions. Every step takes the atom that explains most of what is
left of x, with the coefficient that explains most of it, and subtracts:

    r_0 = x;    i_s = argmax_i |<r_s, w_i>|;    v_s = <r_s, w_{i_s}>;    r_{s+1} = r_s - v_s w_{i_s}

so |r_{s+1}|^2 = |r_s|^2 - v_s^2: the error never grows with the number of steps, and x = sum_s v_s w_{i_s} + r_k. It may grow
with the number of *atoms*: a new one can lure a row away from a better sum. Nothing is trained; the code of a vector depends on
the atoms alone.

    >>> x, atoms = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    >>> matching_pursuit(x, atoms, 2)
    (tensor([[4., 3.]]), tensor([[1, 0]]))

All rows take a step together: one matrix product of residuals and atoms. Instead of the residuals one can keep the correlations
c = W r and update them by c -= v G[i] with G = W W^T, which no longer depends on the width; that is done where it pays.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, name_some
from interp.precision import at_least_float32

GRAM_NUMBERS = 1 << 24  # a Gram matrix made here has no more numbers than this: 4096 atoms, 64 MiB in float32
UPDATE = 48  # one correlation updated costs about as many multiply-adds of a matrix product (measured on a CPU): memory is slow
CORRELATIONS = {"cpu": 1 << 20}  # so many at once, rows x atoms, to stay in the caches; elsewhere to fill the device
MANY = 1 << 26


def matching_pursuit(
    x: Float[Tensor, "token d"], atoms: Float[Tensor, "atom d"], k: int, *, positive: bool = False, tolerance: float = 0.0,
    stop_on_repeat: bool = False, gram: Float[Tensor, "atom atom"] | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:  # fmt: skip
    """(coefficients, which atoms) of k steps of matching pursuit: x is about sum_s values[:, s] * atoms[chosen[:, s]].

    Slot s is step s, so an atom that is taken twice has two slots, whose values add up. A row that stops leaves the rest of its
    slots unused, with value 0 and atom 0; it stops when |r| <= tolerance (in the unit of x; also before the first step), and
    when no atom has a correlation left with what remains, or one below 16 rounding errors of |x|.

    atoms: unit vectors; `OptionError` names those that are not. k: may exceed the number of atoms, as atoms can repeat.
    positive: only positive coefficients, i = argmax ReLU(<r, w_i>). stop_on_repeat: a row stops after the step that takes an
    atom it has already. gram: atoms @ atoms.T, if it is at hand. Of equal correlations the first atom's counts. Computed in
    float32 at least, and so are the values. Gradients reach x and the atoms through the coefficients; the choice is constant.
    """
    if k < 1:
        raise OptionError(f"matching pursuit takes at least one step, not k={k}")
    if not tolerance >= 0:
        raise OptionError(f"the tolerance of matching pursuit is a norm, not {tolerance}")
    dtype = torch.promote_types(at_least_float32(x).dtype, atoms.dtype)
    x, atoms = x.to(dtype), atoms.to(dtype)
    if x.shape[1] != atoms.shape[1]:
        raise OptionError(f"rows of width {x.shape[1]} are no sums of atoms of width {atoms.shape[1]}")
    squares = atoms.detach().square().sum(1) if gram is None else gram.diagonal()
    if off := ((squares - 1).abs() > 0.02).nonzero().flatten().tolist():
        raise OptionError(f"matching pursuit needs unit atoms, and these are not: {name_some(off)}")
    if not len(x) or not len(atoms):
        return x.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    if gram is None and _gram_pays(len(x), *atoms.shape, k):
        gram = (atoms @ atoms.T).detach()
    rows = max(1, CORRELATIONS.get(x.device.type, MANY) // len(atoms))
    found = [_pursue(some, atoms, k, positive, tolerance, stop_on_repeat, gram) for some in x.split(rows)]
    values, chosen = zip(*found, strict=True)
    return torch.cat(values), torch.cat(chosen)


def _gram_pays(n_rows: int, n_atoms: int, d: int, k: int) -> bool:
    """Whether making the Gram matrix first is less work than a matrix product with all atoms in every step."""
    with_gram = n_atoms * d + n_rows * d + (k - 1) * n_rows * UPDATE
    return n_atoms * n_atoms <= GRAM_NUMBERS and with_gram < k * n_rows * d  # each side times the number of atoms


def _pursue(
    r: Float[Tensor, "token d"], atoms: Float[Tensor, "atom d"], k: int, positive: bool, tolerance: float,
    stop_on_repeat: bool, gram: Float[Tensor, "atom atom"] | None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:  # fmt: skip
    values, chosen = [r.new_zeros(len(r))] * k, torch.zeros(len(r), k, dtype=torch.long, device=r.device)
    running, correlations = torch.ones(len(r), dtype=torch.bool, device=r.device), None
    noise = 16 * torch.finfo(r.dtype).eps * r.detach().norm(dim=1)
    for step in range(k):
        if tolerance > 0:
            running = running & (r.detach().norm(dim=1) > tolerance)
        if gram is None or correlations is None:
            correlations = r.detach() @ atoms.detach().T
        pick = (correlations if positive else correlations.abs()).argmax(1)
        # From the residual also where correlations are updated: what they lose to rounding decides between near ties only.
        atom = atoms[pick]
        value = (r * atom).sum(1)
        size = value.detach() if positive else value.detach().abs()
        running = running & ~(size <= noise)  # so that not-a-number goes on and is seen
        if not running.any():
            break
        value = torch.where(running, value, 0)
        repeated = (chosen[:, :step] == pick[:, None]).any(1)
        values[step] = value
        chosen[:, step] = torch.where(running, pick, 0)
        if step + 1 < k:
            r = torch.addcmul(r, value[:, None], atom, value=-1)
            if gram is not None:
                correlations.addcmul_(value.detach()[:, None], gram[pick], value=-1)
            if stop_on_repeat:
                running = running & ~repeated
    return torch.stack(values, 1), chosen
