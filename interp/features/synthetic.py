"""Activations whose dictionary is known, to hold a sparse autoencoder against.

    truth = toy_dictionary(d=32, n_features=64, l0=3, seed=0)
    activations, codes = truth.sample(100_000, seed=1)             # activations = codes @ truth.atoms

The superposition hypothesis says that a model writes more features than it has dimensions, each along a direction of its
own, few at a time: x = sum_i f_i a_i + bias + noise, with unit atoms a_i and f_i >= 0 mostly 0. On a language model nobody
knows the a_i, so an autoencoder can only be judged by what it reconstructs, which is no proof that it found them: one that
explains .97 of the variance may have found none (`interp.features.recovery` counts). Here the a_i are chosen, and with
them what makes them hard to find:

    overlap       |cos| between atoms; with more atoms than dimensions it cannot be 0 (Welch's bound)
    frequency     real features are rare to very different degrees, about as Zipf's law has it
    correlation   features that fire together may be taken for one (Gaussian copula, so that frequencies stay as given)
    hierarchy     a child fires only where its parent does: "poodle" implies "dog" (feature absorption, 2409.14507)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError
from interp.precision import at_least_float32

_ATOMS, _LAYOUT, _SAMPLE = range(3)  # what random numbers are for: see _generator
_BLOCK = 2**24  # entries of a matrix of cosines that are held at once


@dataclass(frozen=True, eq=False)
class TrueDictionary:
    """Atoms and how they fire: activation = sum_i f_i atom_i + bias + noise.

    atoms: unit rows.
    frequency: how often a feature fires; of a child, how often where its parent fires. `marginal` has it of all tokens.
    magnitude: mean of f_i where the feature fires, in the unit of the activations. spread: standard deviation of f_i over its
        mean. Where it fires f_i is log-normal, so always positive: near a normal at spread .15.
    correlation: factors L of a Gaussian copula. Feature i's coin shows heads where z_i, of z ~ N(0, L L^T + diagonal) with unit
        variances, exceeds its (1 - frequency) quantile: z_i and z_j correlate by <L_i, L_j>, and each frequency stays exactly
        as given. A child's row must be orthogonal to those of its ancestors, so that their coins are independent, or its
        frequency where its parent fires would be another; features may otherwise correlate at will.
    parent: the feature without which this one does not fire; -1 has none.
    noise: standard deviation of white noise per coordinate.

    Raises `OptionError` naming the first field that is not so.
    """

    atoms: Float[Tensor, "feature d"]
    frequency: Float[Tensor, " feature"]
    magnitude: Float[Tensor, " feature"] | float = 1.0
    spread: float = 0.15
    correlation: Float[Tensor, "feature rank"] | None = None
    parent: Int[Tensor, " feature"] | None = None
    bias: Float[Tensor, " d"] | None = None
    noise: float = 0.0

    def __post_init__(self):
        if self.atoms.ndim != 2 or 0 in self.atoms.shape:
            raise OptionError(f"atoms are a matrix [feature, d], not of shape {list(self.atoms.shape)}")
        n, d = self.atoms.shape
        per_feature = {"frequency": self.frequency, "magnitude": self.magnitude, "parent": self.parent}
        shapes = {name: (x, (n,)) for name, x in per_feature.items() if isinstance(x, Tensor)}
        shapes |= {} if self.bias is None else {"bias": (self.bias, (d,))}
        for name, (value, shape) in shapes.items():
            if tuple(value.shape) != shape:
                raise OptionError(f"{name} has shape {list(value.shape)}; atoms {[n, d]} need {list(shape)}")
        norms = at_least_float32(self.atoms).norm(dim=1)
        if not bool(((norms - 1).abs() < 1e-2).all()):
            worst = int((norms - 1).abs().nan_to_num(math.inf).argmax())
            raise OptionError(f"atoms are unit rows; row {worst} has norm {float(norms[worst]):.4g}")
        if not bool(((self.frequency >= 0) & (self.frequency <= 1)).all()):
            raise OptionError("a frequency is a probability, from 0 to 1")
        if not bool((torch.as_tensor(self.magnitude) > 0).all()) or not self.spread >= 0 or not self.noise >= 0:
            raise OptionError("magnitudes are positive, and their spread and the noise at least 0")
        if self.parent is not None:
            self._check_parents(self.parent)
        if self.correlation is not None:
            self._check_factors(self.correlation)

    def _check_parents(self, parent: Int[Tensor, " feature"]) -> None:
        n = len(parent)
        if not bool(((parent >= -1) & (parent < n)).all()):
            raise OptionError(
                f"a parent is one of {n} features or -1; parent has {int(parent.min())} to {int(parent.max())}"
            )
        up = parent
        for _ in range(n):
            if not bool((up >= 0).any()):
                return
            up = _lookup(parent, up, -1)
        raise OptionError(f"feature {int((up >= 0).nonzero()[0])} has no root: the parents above it go in a circle")

    def _check_factors(self, factors: Float[Tensor, "feature rank"]) -> None:
        if factors.ndim != 2 or len(factors) != len(self.atoms):
            raise OptionError(f"correlation is [feature, rank] with {len(self.atoms)} rows, not {list(factors.shape)}")
        shared = factors.double().square().sum(1)
        if not bool((shared <= 1 + 1e-6).all()):
            raise OptionError(f"a row of correlation has a norm of at most 1; row {int(shared.argmax())} has more")
        for up in self._ancestors():
            both = (factors.double() * factors.double()[up.clamp_min(0)]).sum(1) * (up >= 0)
            if not bool((both.abs() < 1e-5).all()):
                worst = int(both.abs().argmax())
                raise OptionError(
                    f"correlation ties feature {worst} to its ancestor {int(up[worst])}: their rows must be orthogonal, or "
                    "the child's frequency where its parent fires would not be as given"
                )

    def _ancestors(self) -> list[Int[Tensor, " feature"]]:
        """Of each feature its parent, its grandparent, ...; -1 where there is none."""
        found, up = [], self.parent
        while up is not None and bool((up >= 0).any()):
            found.append(up)
            up = _lookup(self.parent, up, -1)
        return found

    def marginal(self) -> Float[Tensor, " feature"]:
        """Share of all tokens on which each feature fires: its frequency times those of its ancestors."""
        share = self.frequency
        for up in self._ancestors():
            share = share * _lookup(self.frequency, up, 1.0)
        return share

    @property
    def l0(self) -> float:
        """Features that fire on a token, on average."""
        return float(self.marginal().double().sum())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TrueDictionary":
        """The same dictionary on another device. dtype: of atoms and bias, and so of what is sampled."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        if dtype is not None:
            tensors |= {name: tensors[name].to(dtype) for name in ("atoms", "bias") if name in tensors}
        return replace(self, **tensors)

    def sample(self, n: int, *, seed: int) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token feature"]]:
        """(activations, codes) of n independent tokens, where the atoms are and in their dtype.

        Blocks of a stream are samples of different seeds. A feature fires where its code is not 0.
        """
        if n < 0:
            raise OptionError(f"a sample has at least 0 tokens, not {n}")
        generator = _generator(seed, _SAMPLE, self.atoms.device)
        coins = self._coins(n, generator)
        fired = coins.clone()
        for up in self._ancestors():
            below = (up >= 0).nonzero().flatten()
            fired[:, below] &= coins[:, up[below]]
        token, feature = fired.nonzero(as_tuple=True)
        mean = at_least_float32(torch.as_tensor(self.magnitude, dtype=self.frequency.dtype, device=self.atoms.device))
        # a log-normal of mean 1 and standard deviation `spread`
        variance = math.log1p(self.spread**2)
        drawn = torch.randn(len(token), generator=generator, device=self.atoms.device, dtype=mean.dtype)
        drawn = drawn.mul_(math.sqrt(variance)).sub_(variance / 2).exp_() * mean.expand(len(self.atoms))[feature]
        codes = self.atoms.new_zeros(fired.shape)
        codes[token, feature] = drawn.to(codes.dtype)
        activations = codes @ self.atoms
        if self.bias is not None:
            activations += self.bias
        if self.noise:
            white = torch.randn(activations.shape, generator=generator, device=codes.device, dtype=mean.dtype)
            activations += (self.noise * white).to(codes.dtype)
        return activations, codes

    def _coins(self, n: int, generator: torch.Generator) -> Bool[Tensor, "token feature"]:
        """Which features would fire if parents had no say."""
        frequency = at_least_float32(self.frequency)
        options = {"generator": generator, "device": frequency.device, "dtype": frequency.dtype}
        if self.correlation is None:
            return torch.rand(n, len(frequency), **options) < frequency
        factors = self.correlation.to(frequency.dtype)
        own = (1 - factors.square().sum(1)).clamp_min(0).sqrt()
        z = torch.randn(n, len(frequency), **options).mul_(own)
        z.addmm_(torch.randn(n, factors.shape[1], **options), factors.T)
        return z > -torch.special.ndtri(frequency)


def coherence(atoms: Float[Tensor, "feature d"]) -> float:
    """max over pairs i != j of |<a_i, a_j>| for unit rows; 0 for a single atom.

    Welch (1974): of F atoms in d < F dimensions it is at least sqrt((F - d) / (d (F - 1))).
    """
    return max(float(cosines.abs().max()) for _, cosines in _overlaps(atoms))


def near_orthogonal(
    d: int, n_features: int, *, seed: int, steps: int = 300, stop_at: float = 0.0
) -> Float[Tensor, "feature d"]:
    """Unit rows that overlap little: gradient descent on sum over pairs of |<a_i, a_j>|^p, p growing from 4 to 128.

    A growing p turns the sum, at first about all pairs, into one about the worst, `coherence`. steps=0 leaves random rows,
    whose largest overlaps are about sqrt(2 ln(n_features) / d). stop_at: the coherence to end at if it is reached, for a
    dictionary no easier than another. Orthogonal rows, whatever the steps, if n_features <= d.
    A step costs 6 n_features^2 d flops: milliseconds at 64 x 512, tens of seconds at 768 x 16384. float32, on the CPU.
    """
    if d < 1 or n_features < 1 or steps < 0:
        raise OptionError(f"atoms need at least 1 dimension, 1 feature and 0 steps, not {d}, {n_features} and {steps}")
    atoms = torch.randn(n_features, d, generator=_generator(seed, _ATOMS))
    if n_features <= d:
        return torch.linalg.qr(atoms.T)[0].T.contiguous()
    atoms = torch.nn.functional.normalize(atoms)
    worst = coherence(atoms) if steps else 0.0
    for step in range(steps):
        if worst <= stop_at:
            break
        done = step / steps
        slope = _slope(atoms, worst, 4 * 2 ** (5 * done))
        slope -= (slope * atoms).sum(1, keepdim=True) * atoms  # what would change a row's norm
        change = slope * (-0.1 * (1 - done) / slope.norm(dim=1).max().clamp_min(1e-30))
        before, atoms = atoms, torch.nn.functional.normalize(atoms + change)
        worst = coherence(atoms)
        if worst < stop_at:
            return _part_of_the_way(before, change, stop_at)
    return atoms


def toy_dictionary(
    d: int = 32, n_features: int = 64, l0: int | float = 3, *, seed: int, spread: float = 0.15, stop_at: float = 0.437,
) -> TrueDictionary:  # fmt: skip
    """Near-orthogonal atoms that fire independently, each with probability l0 / n_features, at magnitude 1 +- spread.

    stop_at: the atoms' coherence, if it can be reached (see `near_orthogonal`); 0 makes them as easy to tell apart as can be.
    """
    if not 0 < l0 <= n_features:
        raise OptionError(f"of {n_features} features more than 0 and at most all fire on a token, not {l0}")
    atoms = near_orthogonal(d, n_features, seed=seed, stop_at=stop_at)
    return TrueDictionary(atoms, torch.full((n_features,), l0 / n_features), spread=spread)


def zipf_dictionary(
    d: int, n_features: int, l0: int | float, *, seed: int, exponent: float = 0.5,
    hierarchy: tuple[int, int, int] | None = None, correlation_rank: int = 0, shared: float = 0.5,
    limits: tuple[float, float] = (5e-4, 0.4), magnitude: tuple[float, float] = (5.0, 4.0), spread: float = 0.15,
    steps: int = 0,
) -> TrueDictionary:  # fmt: skip
    """Features whose marginal frequencies follow Zipf's law, c / rank^exponent within limits, as in SynthSAEBench.

    Feature 0 fires most often. c is such that l0 features fire on an average token, also after clipping to the limits.
    hierarchy: (roots, branching, depth): trees with `depth` levels of children below their roots; level by level they become
        rarer, and features outside them are mixed in. `frequency` is then that which gives these marginals.
    correlation_rank: rank of random factors for the copula, 0 for independent coins; shared: the share of a coin's variance
        that they make up. A child's factors are made orthogonal to those of its ancestors, and 0 where the rank is too small.
    magnitude: of the most and of the least frequent feature; linear in rank between. steps: see `near_orthogonal`; with 0,
        random atoms, 16384 of them in 768 dimensions overlap by .15 with their nearest.
    Raises `OptionError` where the limits leave no such l0, a tree does not fit, or clipping makes a child as frequent as its
    parent, so that nothing could tell them apart.
    """
    if correlation_rank < 0 or not 0 <= shared <= 1:
        raise OptionError(f"a rank is at least 0 and a share from 0 to 1, not {correlation_rank} and {shared}")
    generator = _generator(seed, _LAYOUT)
    marginal, parent = _zipf(n_features, l0, exponent, limits), None
    frequency = marginal
    if hierarchy is not None:
        parent = _trees(n_features, *hierarchy, generator)
        frequency = marginal / _lookup(marginal, parent, 1.0)
        if bool((always := (parent >= 0) & (frequency > 1 - 1e-9)).any()):
            child = int(always.nonzero()[0])
            raise OptionError(
                f"feature {child} would fire wherever its parent {int(parent[child])} does: give a larger exponent than "
                f"{exponent}, another l0 than {l0} or wider limits"
            )
    means = torch.linspace(*magnitude, n_features)
    atoms = near_orthogonal(d, n_features, seed=seed, steps=steps)
    found = TrueDictionary(atoms, frequency.float(), magnitude=means, spread=spread, parent=parent)
    if correlation_rank:
        factors = torch.randn(n_features, correlation_rank, generator=generator, dtype=torch.float64)
        found = replace(found, correlation=(math.sqrt(shared) * _apart(factors, found._ancestors())).float())
    return found


def _generator(seed: int, purpose: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that belong to a seed and a purpose.

    People give everything the same seed. With plain generators an autoencoder that starts from n x d normals would then start
    at the very atoms it is to find.
    """
    state = np.random.SeedSequence([seed, purpose]).generate_state(1)
    return torch.Generator(device=device).manual_seed(int(state[0]))


def _lookup(values: Tensor, index: Int[Tensor, " feature"], otherwise: int | float) -> Tensor:
    """values[index], or `otherwise` where the index is -1."""
    return torch.where(index >= 0, values[index.clamp_min(0)], otherwise)


def _overlaps(atoms: Float[Tensor, "feature d"]) -> Iterator[tuple[Int[Tensor, " _"], Float[Tensor, "_ feature"]]]:
    """(rows, their cosines with all atoms) in blocks of rows; 0 for an atom and itself."""
    for rows in torch.arange(len(atoms), device=atoms.device).split(max(1, _BLOCK // len(atoms))):
        cosines = atoms[rows] @ atoms.T
        cosines[torch.arange(len(rows), device=rows.device), rows] = 0
        yield rows, cosines


def _slope(atoms: Float[Tensor, "feature d"], worst: float, power: float) -> Float[Tensor, "feature d"]:
    """sum over j of |c_ij / worst|^(power - 1) sign(c_ij) a_j, c_ij = <a_i, a_j>: the gradient up to a factor."""
    pulls = [(c / worst).abs_().pow_(power - 1).copysign_(c) @ atoms for _, c in _overlaps(atoms)]
    return torch.cat(pulls)


def _part_of_the_way(
    atoms: Float[Tensor, "feature d"], change: Float[Tensor, "feature d"], goal: float
) -> Float[Tensor, "feature d"]:
    """Rows between atoms and atoms + change with that coherence, by bisection: above the goal at one end, below at the other."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        over = coherence(torch.nn.functional.normalize(atoms + middle * change)) > goal
        low, high = (middle, high) if over else (low, middle)
    return torch.nn.functional.normalize(atoms + high * change)


def _zipf(n: int, l0: int | float, exponent: float, limits: tuple[float, float]) -> Float[Tensor, " feature"]:
    """c / rank^exponent, clipped, with the c that makes the sum l0; the sum grows with c, so by bisection, on log c."""
    least, most = limits
    if n < 1 or not 0 < least <= most <= 1 or not n * least <= l0 <= n * most or not exponent >= 0:
        raise OptionError(
            f"{n} features with frequencies from {least} to {most} and an exponent of at least 0 cannot have an l0 of {l0} "
            f"and an exponent of {exponent}"
        )
    shape = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    low, high = math.log(least), math.log(most) + exponent * math.log(n)  # all clipped below, all clipped above
    for _ in range(80):
        middle = (low + high) / 2
        enough = float((math.exp(middle) * shape).clamp(least, most).sum()) >= l0
        low, high = (low, middle) if enough else (middle, high)
    return (math.exp(high) * shape).clamp(least, most)


def _trees(n: int, roots: int, branching: int, depth: int, generator: torch.Generator) -> Int[Tensor, " feature"]:
    """The parent of each feature, or -1, where trees numbered level by level take random places among n in that order."""
    if roots < 1 or branching < 1 or depth < 0:
        raise OptionError(f"a hierarchy is (roots, branching, depth) >= (1, 1, 0), not {(roots, branching, depth)}")
    size = roots * sum(branching**level for level in range(depth + 1))
    if size > n:
        raise OptionError(f"a hierarchy of {(roots, branching, depth)} has {size} features, and there are {n}")
    places = torch.randperm(n, generator=generator)[:size].sort().values
    parent = torch.full((n,), -1)
    # numbered so, all children come after the roots, and in the order of their parents
    parent[places[roots:]] = places[torch.arange(size - roots) // branching]
    return parent


def _apart(
    factors: Float[Tensor, "feature rank"], ancestors: list[Int[Tensor, " feature"]]
) -> Float[Tensor, "feature rank"]:
    """Unit rows, each orthogonal to those of its ancestors (Gram-Schmidt down the trees); 0 where nothing is left."""
    depth = sum((up >= 0).long() for up in ancestors)
    factors = torch.nn.functional.normalize(factors)
    for level in range(1, len(ancestors) + 1):
        at = (depth == level).nonzero().flatten()
        rest = factors[at]
        for up in ancestors[:level]:
            unit = factors[up[at]]
            rest = rest - (rest * unit).sum(1, keepdim=True) * unit
        left = rest.norm(dim=1, keepdim=True)
        factors[at] = torch.where(left > 1e-6, rest / left.clamp_min(1e-6), 0.0)
    return factors
