"""How strongly to steer: the strength that moves the next token's distribution by a given divergence.

Methods are compared at equal effect on the model, not at equal length of what they add. For a direction u, a sign s and a target,
the strength alpha > 0 is wanted at which adding s alpha u at the hook gives, in nats,

    KL(P || P_alpha) = sum_t P(t) (log P(t) - log P_alpha(t)) = target            P: next-token distribution at the last position

KL is 0 at alpha = 0 and grows as alpha^2 at first, but it need not keep growing, and some targets are never reached. So alpha
doubles from `first` until KL passes the target: the first crossing on that grid (where `first` is past it already, alpha is
halved). The crossing is then closed in on by regula falsi on log KL over log alpha with the Illinois rule, every third step a
bisection. Each sign has a search of its own: KL is alike for both to second order in alpha only, in a linear model too.

All vectors, signs and targets take a step together, as the rows of one batch, which runs from the hook's layer on.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, TaskError
from interp.model.run import canonical, record
from interp.model.transformer import Transformer
from interp.rules import GRADIENT
from interp.steering.changes import Change, Positions, check_hook, steer, where_of
from interp.steering.vectors import Vector

TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
_STEPS = 80  # of closing in: bisection alone halves the bracket 26 times by then
_LEAST = 2.0**-40  # of `first`: where halving ends


@torch.no_grad()
def steering_strength(
    model: Transformer, prompt: str | Int[Tensor, " position"], vectors: Sequence[Vector],
    targets: Sequence[float] = TARGETS, *, tolerance: float = 0.01, first: float = 1e-3, largest: float = 1e3,
    positions: Positions = "all", batch_size: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """Strengths at which each vector, with either sign, moves the next token's distribution by each target KL, in nats.

    tolerance: |KL - target| is below this share of the target. first, largest: where the search starts and ends, in units of the
    mean norm of the prompt's activations at the hook (without the first token, if there are more). batch_size: rows of one pass.
    Columns: vector (its place in the list), label, sign (1 or -1), target, alpha (activation units: the value of a `Change` along
    sign times the vector), kl (at alpha), reached, monotone (no KL seen below alpha is above a later one by more than
    tolerance times target). A target that is not reached has a row with alpha NaN and the nearest KL that was seen.
    Raises `SiteError` where a hook or width does not fit the model, `OptionError` for options out of range.
    """
    canonical(model, "steering_strength")
    _check(vectors, targets, tolerance, first, largest, batch_size)
    ids = model.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt.to(model.device)
    if not len(ids):
        raise TaskError("the prompt has no token")
    searches: list[_Search] = []
    by_hook: dict[str, list[int]] = {}
    for i, vector in enumerate(vectors):
        by_hook.setdefault(vector.hook, []).append(i)
    for members in by_hook.values():
        tail = _Tail(model, ids, [vectors[i] for i in members], positions, batch_size)
        curves = [_Curve(row, sign, first * tail.norm) for row in range(len(members)) for sign in (1, -1)]
        while wanted := [(c, alpha) for c in curves if (alpha := c.next_on_grid(max(targets), largest * tail.norm))]:
            tail.measure(wanted)
        found = [_Search(members[c.row], c, target, tolerance) for c in curves for target in targets]
        while wanted := [(s.curve, alpha) for s in found if (alpha := s.next())]:
            tail.measure(list(dict.fromkeys(wanted)))
        searches += found
    searches.sort(key=lambda search: search.vector)  # stable: signs and targets keep their order
    return pd.DataFrame([search.row(vectors[search.vector].label) for search in searches])


def next_token_kl(base: Float[Tensor, " d_vocab"], changed: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(softmax base || softmax changed) of logits, in nats, in float64."""
    log_p, log_q = base.double().log_softmax(-1), changed.double().log_softmax(-1)
    # a token that the base never says counts 0, whatever the other says of it
    return torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_q)).sum(-1)


class _Tail:
    """A prompt's run from a hook's layer on, for many rows that differ in what is added at the hook."""

    def __init__(
        self, model: Transformer, ids: Int[Tensor, " position"], vectors: list[Vector], positions: Positions, batch_size: int
    ):  # fmt: skip
        self.model, self.ids, self.positions, self.batch_size = model, ids[None], positions, batch_size
        self.hook = hook = vectors[0].hook
        check_hook(model, hook)
        where_of(positions, torch.tensor([len(ids)]), len(ids), hook)  # raises before anything is run
        layer = re.match(r"blocks\.(\d+)\.", hook)
        self.layer = None if layer is None else int(layer[1])  # None: an embedding's, before every layer
        names = [hook] if self.layer is None else [hook, f"blocks.{self.layer}.hook_resid_pre"]
        values = record(model, self.ids, names)
        here, self.resid = values[hook].flatten(2)[0], values[names[-1]]
        for vector in vectors:
            if vector.direction.shape != here.shape[1:]:
                raise SiteError(
                    f"the vector {vector.label!r} has {len(vector.direction)} entries, and {hook} has {here.shape[1]}"
                )
            if not vector.direction.any():
                raise OptionError(f"the vector {vector.label!r} has a norm of 0, so it is no direction: leave it out")
        # float64, so that one batch may hold directions of several dtypes
        self.directions = torch.stack([v.direction.detach().to(model.device, torch.float64) for v in vectors])
        self.norm = float(here[min(1, len(here) - 1) :].double().norm(dim=1).mean())
        if not 0 < self.norm < math.inf:
            raise SiteError(
                f"activations at {hook} have a mean norm of {self.norm} in this prompt: there is no scale to search on"
            )
        self.base = self._logits(1, [])[0]

    def _logits(self, n: int, changes: list[Change]) -> Float[Tensor, "row d_vocab"]:
        with steer(self.model, changes):
            if self.layer is None:
                last = torch.full((n,), self.ids.shape[1] - 1, device=self.ids.device)
                return self.model(self.ids.expand(n, -1), read_at=last)
            resid, places = self.resid.expand(n, -1, -1), self.model.places(self.ids.shape[1])
            for block in self.model.blocks[self.layer :]:
                resid = block(resid, places, GRADIENT)
            return self.model.unembed_resid(resid[:, -1])

    def measure(self, wanted: list[tuple["_Curve", float]]) -> None:
        """KL at an alpha of each of these curves, written into them; one forward pass for `batch_size` of them."""
        for at in range(0, len(wanted), self.batch_size):
            part = wanted[at : at + self.batch_size]
            directions = self.directions[[curve.row for curve, _ in part]]
            alphas = torch.tensor([curve.sign * alpha for curve, alpha in part], dtype=torch.float64)
            logits = self._logits(len(part), [Change(self.hook, directions, "add", alphas, self.positions)])
            for (curve, alpha), kl in zip(part, next_token_kl(self.base, logits).tolist(), strict=True):
                curve.seen[alpha] = kl


@dataclass(eq=False)
class _Curve:
    """KL over alpha for one vector and sign, as far as it has been looked at. grid: alphas that double, from `first`."""

    row: int
    sign: int
    first: float
    seen: dict[float, float] = field(default_factory=lambda: {0.0: 0.0})
    grid: list[float] = field(default_factory=list)

    def next_on_grid(self, highest: float, largest: float) -> float | None:
        """The next alpha to look at until every target is passed or the end reached; None then, or where KL is not finite."""
        if self.grid:
            kl = self.seen[self.grid[-1]]
            if kl >= highest or not math.isfinite(kl) or self.grid[-1] >= largest:
                return None
        self.grid.append(min(self.grid[-1] * 2, largest) if self.grid else self.first)
        return self.grid[-1]

    def monotone(self, alpha: float, slack: float) -> bool:
        """No KL up to here is above a later one by more than `slack`."""
        highest = -math.inf
        for at in sorted(self.seen):
            if at > alpha:
                break
            if self.seen[at] < highest - slack:
                return False
            highest = max(highest, self.seen[at])
        return True


class _Search:
    """One target on one curve: a bracket that is closed in on."""

    def __init__(self, vector: int, curve: _Curve, target: float, tolerance: float):
        self.vector, self.curve, self.target, self.slack = vector, curve, target, tolerance * target
        self.steps, self.asked, self.stayed = 0, None, None
        self.low = self.high = None
        self.best = 0.0  # the alpha whose KL is nearest
        below = 0.0
        for alpha in curve.grid:
            self._nearer(alpha)
            if curve.seen[alpha] >= target:
                self.low, self.high = below, alpha
                break
            below = alpha
        if self.low is not None:
            self.at_low, self.at_high = self._height(self.low), self._height(self.high)

    @property
    def reached(self) -> bool:
        return abs(self.curve.seen[self.best] - self.target) < self.slack

    def _nearer(self, alpha: float) -> None:
        distance = abs(self.curve.seen[alpha] - self.target)
        if distance < abs(self.curve.seen[self.best] - self.target):
            self.best = alpha

    def _height(self, alpha: float) -> float:
        """log KL - log target: nearly straight over log alpha, where KL grows as a power."""
        kl = self.curve.seen[alpha]
        return math.log(kl / self.target) if kl > 0 else -math.inf

    def next(self) -> float | None:
        """Take in the step asked for last, and ask for another; None at the end."""
        if self.asked is not None:
            self._take_in(self.asked)
        self.asked = None
        if self.low is None or self.reached or self.steps >= _STEPS:
            return None
        self.steps += 1
        if self.low == 0:  # `first` is past the target already
            middle = self.high / 2
            if middle < self.curve.first * _LEAST:
                return None
        else:
            share = 0.5
            if (
                self.steps % 3
                and math.isfinite(self.at_low)
                and math.isfinite(self.at_high)
                and self.at_high > self.at_low
            ):
                share = -self.at_low / (self.at_high - self.at_low)
            middle = self.low * (self.high / self.low) ** share
            if not self.low < middle < self.high:
                middle = (self.low * self.high) ** 0.5
                if not self.low < middle < self.high:
                    return None  # no number is left between: KL jumps over the target here
        self.asked = middle
        return middle

    def _take_in(self, alpha: float) -> None:
        self._nearer(alpha)
        height = self._height(alpha)
        below = self.curve.seen[alpha] < self.target
        if below:
            self.low, self.at_low = alpha, height
        else:
            self.high, self.at_high = alpha, height
        # Illinois: an end that stays for a second time counts half, so that it moves soon
        if self.stayed == below:
            if below:
                self.at_high /= 2
            else:
                self.at_low /= 2
        self.stayed = below

    def row(self, label: str) -> dict[str, object]:
        """Its row of the table."""
        alpha = self.best if self.reached else math.nan
        upto = self.best if self.reached else math.inf
        return {
            "vector": self.vector, "label": label, "sign": self.curve.sign, "target": self.target, "alpha": alpha,
            "kl": self.curve.seen[self.best], "reached": self.reached, "monotone": self.curve.monotone(upto, self.slack),
        }  # fmt: skip


def _check(
    vectors: Sequence[Vector], targets: Sequence[float], tolerance: float, first: float, largest: float, batch_size: int
) -> None:
    if not vectors or not targets:
        raise OptionError("there is nothing to search: give at least one vector and one target")
    if wrong := [target for target in targets if not 0 < target < math.inf]:
        raise OptionError(f"a target is a divergence above 0, in nats, not {wrong[0]}")
    if not 0 < tolerance < 1:
        raise OptionError(f"a tolerance is a share of the target, between 0 and 1, not {tolerance}")
    if not 0 < first < largest < math.inf:
        raise OptionError(f"the search goes from first to a larger largest, not from {first} to {largest}")
    if batch_size < 1:
        raise OptionError(f"cannot run {batch_size} rows at a time")
