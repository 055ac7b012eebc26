"""Steering: an activation moved along a direction while the model runs.

With a the activation of a token at a hook point, u = d / |d| the direction as a unit vector, and v the change's value:

    add      a + v u                        v: activation units, so that |v| is how far it moves
    clamp    a - <a, u> u + v u             what a has along u becomes v
    scale    a + (v - 1) <a, u> u           what a has along u, times v (1 changes nothing)
    ablate   a - <a, u> u                   clamp to 0; no value

A direction's own length never counts: to add d itself, let v be its norm. Changes at one hook act one after another. Heads'
activations ([head, d_head]: hook_q, hook_k, hook_v, hook_z) are read with their heads side by side.

    with steer(model, [Change("blocks.2.mlp.hook_post", direction, "add", 4.0)]):
        logits = model(prompt)
    with steer(model, [Change.of_unit(model, "blocks.2.mlp.hook_post", 17, value=3.0)]):   # neuron 17 set to 3
        logits = model(prompt)
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, one_of
from interp.model.run import Hooks, config_of, record
from interp.precision import at_least_float32

MODES = ("add", "clamp", "scale", "ablate")
PLACES = ("all", "last", "not first")
Positions = Literal["all", "last", "not first"] | tuple[int, ...]
_PER_TOKEN = r"blocks\.\d+\.(?!.*hook_(pattern|attn_scores)$).+|hook_(pos_)?embed"


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of activations at a hook: mode "add", "clamp", "scale" or "ablate"; see the module for the formulas.

    direction: of any length but 0; one for all rows of a batch, or one for each. value: one, or one for each row, so that
    many strengths run in one forward pass; "ablate" has none. positions: "all", "last", "not first", or those of a tuple
    (negative: from the end). "last" and negative ones are the end of the text as it stands: while text is generated they move
    with it, and earlier tokens go back to what they were.
    Raises `OptionError` or `SiteError` where one of these cannot be meant.
    """

    hook: str
    direction: Float[Tensor, " d"] | Float[Tensor, "batch d"]
    mode: Literal["add", "clamp", "scale", "ablate"] = "add"
    value: float | Float[Tensor, " batch"] | None = None
    positions: Positions = "all"

    def __post_init__(self) -> None:
        one_of(self.mode, MODES, "way to change an activation")
        if not isinstance(self.positions, tuple):
            one_of(self.positions, PLACES, "choice of positions")
        if (self.value is None) != (self.mode == "ablate"):
            wants = "no value" if self.mode == "ablate" else "a value"
            raise OptionError(f"the change at {self.hook} is of mode {self.mode!r}, which has {wants}")
        norms = at_least_float32(self.direction).norm(dim=-1)
        if not (norms.isfinite() & (norms > 0)).all():
            raise OptionError(f"the direction at {self.hook} has a norm of 0, or one that is not finite")

    @classmethod
    def of_unit(
        cls, model, hook: str, index: int, *, mode: Literal["add", "clamp", "scale", "ablate"] = "clamp",
        value: float | Float[Tensor, " batch"] | None = None, positions: Positions = "all",
    ) -> "Change":  # fmt: skip
        """A change of one channel, such as a neuron (`mlp.hook_post`, a gated one's factor at `mlp.hook_pre_linear`).

        "clamp" sets it to the value. Raises `SiteError` if the hook has no such channel.
        """
        return cls(hook, one_hot(model, hook, index), mode, value, positions)

    def __call__(
        self, a: Float[Tensor, "batch position d"], where: Bool[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position d"]:
        """The changed activations; those that `where` leaves out as they are, bit for bit."""
        batch = a.shape[0]
        if a.shape[2] != self.direction.shape[-1]:
            raise SiteError(
                f"the direction at {self.hook} has {self.direction.shape[-1]} entries, and the hook {a.shape[2]}"
            )
        for what, given in (("directions", self.direction.shape[:-1]), ("values", getattr(self.value, "shape", ()))):
            if given not in ((), (batch,)):
                raise OptionError(f"the change at {self.hook} has {given[0]} {what}, and the batch {batch} rows")
        wide = at_least_float32(a)
        u = self.direction.to(wide)
        u = u / u.norm(dim=-1, keepdim=True)
        u = u[:, None] if u.ndim == 2 else u  # [batch, 1, d] or [d]
        value = self.value
        if isinstance(value, Tensor):
            value = value.to(wide).reshape(-1, 1, 1)  # one of them, or one for each row
        has = 0 if self.mode == "add" else (wide * u).sum(-1, keepdim=True) * u  # what a has along u
        if self.mode == "add":
            new = wide + value * u
        elif self.mode == "scale":
            new = wide + (value - 1) * has
        else:  # taken out first, so that a unit clamped to v is v and not v up to rounding
            new = wide - has
            if self.mode == "clamp":
                new = new + value * u
        return torch.where(where[:, :, None], new.to(a.dtype), a)


def steer_hooks(model, changes: Sequence[Change], *, lengths: Int[Tensor, " batch"] | None = None) -> Hooks:
    """Forward hooks that make the changes; see `steer`."""
    for change in changes:
        check_hook(model, change.hook)
    return [(change.hook, _hook(change, lengths)) for change in changes]


@contextmanager
def steer(model, changes: Sequence[Change], *, lengths: Int[Tensor, " batch"] | None = None) -> Iterator:
    """The model with these changes, for the runs inside the `with`.

    lengths: tokens of each row that are there, without which a padded row's "last" is its padding. Padding itself may be
    changed, which nothing sees in a causal model.
    Raises `SiteError` where a hook does not exist, has no activation per token or is of another width, or a position is out of
    range; `OptionError` where values are not one per row.
    """
    with model.hooks(fwd_hooks=list(steer_hooks(model, changes, lengths=lengths))):
        yield model


def check_hook(model, hook: str) -> None:
    """Raise `SiteError` unless the model has this hook point with an activation for every token, in a layer or embedding."""
    if hook not in model.hook_dict:
        raise SiteError(f"{config_of(model).name} has no hook point {hook!r}")
    if not re.fullmatch(_PER_TOKEN, hook):
        raise SiteError(
            f"{hook} cannot be steered: use a layer's or an embedding's hook point with activations per token"
        )


def one_hot(model, hook: str, index: int) -> Float[Tensor, " d"]:
    """The direction of one channel of a hook point. Raises `SiteError` if it has no such channel."""
    check_hook(model, hook)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.W_E.device)
    width = record(model, token, [hook])[hook][0, 0].numel()
    if not 0 <= index < width:
        raise SiteError(f"{hook} has channels 0 to {width - 1}, not {index}")
    direction = torch.zeros(width, dtype=model.W_E.dtype, device=model.W_E.device)
    direction[index] = 1
    return direction


def where_of(
    positions: Positions, lengths: Int[Tensor, " batch"], n_positions: int, hook: str = "the hook"
) -> Bool[Tensor, "batch position"]:
    """The positions that a change acts on, in rows of these lengths. Raises `SiteError` if one is outside a row."""
    index, last = torch.arange(n_positions, device=lengths.device), lengths[:, None] - 1
    if positions == "all":
        return (index >= 0).expand(len(lengths), -1)
    if positions == "not first":
        return (index > 0).expand(len(lengths), -1)
    where = torch.zeros(len(lengths), n_positions, dtype=torch.bool, device=lengths.device)
    for position in (-1,) if positions == "last" else positions:
        shortest = int(lengths.min())
        if not -shortest <= position < shortest:
            raise SiteError(f"the change at {hook} is for position {position}, and a prompt has {shortest} tokens")
        where |= index == (position if position >= 0 else last + 1 + position)
    return where


def _hook(change: Change, lengths: Tensor | None) -> Any:
    def run(value: Tensor, hook: Any) -> Tensor:
        batch, n_positions = value.shape[:2]
        if lengths is None:
            ends = torch.full((batch,), n_positions, device=value.device)
        elif lengths.shape == (batch,):
            ends = lengths.to(value.device)
        else:
            raise OptionError(f"there are lengths of {len(lengths)} rows, and the batch has {batch}")
        where = where_of(change.positions, ends, n_positions, change.hook)
        return change(value.flatten(2), where).reshape(value.shape)

    return run
