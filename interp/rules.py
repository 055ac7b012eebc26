"""How a backward pass treats each non-linearity.

A transformer is linear except in a few places: norms divide by a scale that depends on the input, the MLP applies an
activation and, if gated, a product, attention multiplies queries with keys, applies a softmax and multiplies patterns
with values, and some models cap scores or logits. Each of those places calls one method of a `Rules` object. `GRADIENT`
lets autograd decide; every other rule set changes what flows *back* through a place and leaves the forward value as it
is, bit for bit.

    model(tokens, rules=get_rules("relp"))                 # the same logits, another backward pass
    get_rules("relp,pattern=frozen")                       # one switch turned
    Rules("mine", norm_scale="frozen", activation_slope="ratio")

A rule set is a value: nothing is patched and there is nothing to undo. The switches and their settings:

    switch            "exact" (autograd) or                                   who does so
    norm_scale        frozen: the scale is a constant                         RelP, AttnLRP, CP-LRP, GIM
    qk_norm_scale     the same, of norms on queries and keys                  AttnLRP, CP-LRP, GIM
    activation_slope  ratio: f(x)/x, LRP's identity rule                      RelP, AttnLRP, CP-LRP
    gate_product      half: each factor gets half; frozen-gate: up gets all   RelP, AttnLRP, GIM; CP-LRP
    rotation          half: the other half belongs to the position            PA-LRP
    query_key         half                                                    AttnLRP, GIM
    pattern           frozen: nothing reaches queries and keys                CP-LRP, RelP's AH rule
    pattern_value     half                                                    AttnLRP, GIM
    cap_slope         ratio: f(x)/x of a soft-cap                             no published set

Nearly everywhere "secant" is the slope between two runs; `temperature` warms the softmax on the way back (GIM).

Sources: RelP 2508.21258 (its experiments: no AH rule, norms on queries and keys untreated), AttnLRP 2402.05602 and CP-LRP as
the LXT package has them, PA-LRP 2506.02138, GIM 2505.17630. RelP and the LRP sets are not first-order approximations: for a
small difference between the runs only "gradient" and "secant" become exact. `secant` is ours: DeepLIFT's rescale rule
(1704.02685) carried through products, norms and softmax, so that attributions add up to the metric's difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import backward, secants
from interp.errors import RulesError, one_of

if TYPE_CHECKING:
    import pandas as pd

    from interp.model.activations import Activation

SETTINGS: dict[str, tuple[str, ...]] = {
    "norm_scale": ("exact", "frozen", "secant"),
    "qk_norm_scale": ("exact", "frozen", "secant"),
    "activation_slope": ("exact", "ratio", "secant"),
    "gate_product": ("exact", "half", "frozen-gate", "secant"),
    "rotation": ("exact", "half"),
    "query_key": ("exact", "half", "secant"),
    "pattern": ("exact", "frozen", "secant"),
    "pattern_value": ("exact", "half", "secant"),
    "cap_slope": ("exact", "ratio", "secant"),
}


@dataclass(frozen=True)
class Rules:
    """A rule set: one setting per kind of non-linearity, see `SETTINGS`. `Rules()` is the plain gradient."""

    name: str = "gradient"
    norm_scale: str = "exact"
    qk_norm_scale: str = "exact"
    activation_slope: str = "exact"
    gate_product: str = "exact"
    rotation: str = "exact"
    query_key: str = "exact"
    pattern: str = "exact"
    pattern_value: str = "exact"
    cap_slope: str = "exact"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for switch, allowed in SETTINGS.items():
            one_of(getattr(self, switch), allowed, f"setting of {switch}", RulesError)
        if not 0 < self.temperature < float("inf"):
            raise RulesError(f"the softmax's temperature must be a positive number, not {self.temperature}")
        if self.temperature != 1 and self.pattern != "exact":
            raise RulesError(f'a temperature goes with pattern="exact", not with pattern={self.pattern!r}')

    # ------------------------------------------------------------------- called by the forward pass, one place each

    def norm(self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d"]:
        """x / scale, with x already centred if the norm is a LayerNorm; scale was computed from x."""
        return self._norm(self.norm_scale, x, scale)

    def qk_norm(self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d"]:
        """The same, of a norm on queries or keys."""
        return self._norm(self.qk_norm_scale, x, scale)

    def activation(self, x: Float[Tensor, "..."], function: "Activation") -> Float[Tensor, "..."]:
        """The MLP's elementwise function."""
        if self.activation_slope == "ratio":
            return backward.elementwise(x, function, function.ratio)
        if self.activation_slope == "secant":
            return backward.elementwise(x, function, function.slope, *self._other_run(x))
        return function(x)

    def product(self, gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Gate times up, in gated MLPs."""
        if self.gate_product == "half":
            return backward.half(gate * up)
        if self.gate_product == "frozen-gate":
            return gate.detach() * up
        if self.gate_product == "secant":
            return backward.secant_product(gate, up, *self._other_run(gate, up))
        return gate * up

    def rotate(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Rotated channels of queries or keys. The rotation itself is linear."""
        return backward.half(x) if self.rotation == "half" else x

    def scores(
        self, q: Float[Tensor, "... query d_head"], k: Float[Tensor, "... key d_head"]
    ) -> Float[Tensor, "... query key"]:
        """Query-key products, unscaled."""
        return self._matmul(self.query_key, q, k.transpose(-1, -2))

    def softmax(self, scores: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
        """Attention pattern of masked scores."""
        if self.pattern == "frozen":
            return scores.detach().softmax(dim=-1)
        if self.pattern == "secant":
            return backward.secant_softmax(scores, *self._other_run(scores))
        if self.temperature != 1:
            return backward.warm_softmax(scores, self.temperature)
        return scores.softmax(dim=-1)

    def mix(
        self, pattern: Float[Tensor, "... query key"], v: Float[Tensor, "... key d_head"]
    ) -> Float[Tensor, "... query d_head"]:
        """Pattern times values."""
        return self._matmul(self.pattern_value, pattern, v)

    def soft_cap(self, x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
        """cap * tanh(x / cap), of attention scores or logits."""
        if self.cap_slope == "exact":
            return _capped(x, cap)
        if self.cap_slope == "ratio":
            slope = lambda a: secants.tanh_slope(a / cap, torch.zeros_like(a))  # noqa: E731
            return backward.elementwise(x, lambda a: _capped(a, cap), slope)
        slope = lambda a, b: secants.tanh_slope(a / cap, b / cap)  # noqa: E731
        return backward.elementwise(x, lambda a: _capped(a, cap), slope, *self._other_run(x))

    def _norm(self, setting: str, x: Tensor, scale: Tensor) -> Tensor:
        if setting == "secant":
            return backward.secant_norm(x, scale, *self._other_run(x, scale))
        return x / (scale.detach() if setting == "frozen" else scale)

    def _matmul(self, setting: str, a: Tensor, b: Tensor) -> Tensor:
        if setting == "secant":
            return backward.secant_matmul(a, b, *self._other_run(a, b))
        return backward.half(a @ b) if setting == "half" else a @ b

    # ----------------------------------------------------------------------------------------------- two runs

    @property
    def needs_source(self) -> bool:
        """True if a switch is set to "secant": such rules compare two runs, see `recording` and `against`."""
        return "secant" in (getattr(self, switch) for switch in SETTINGS)

    @property
    def symmetric(self) -> bool:
        """True if exchanging the two runs changes no multiplier: every non-linearity is a secant, none a local slope."""
        return all(getattr(self, switch) == "secant" for switch in SETTINGS if switch != "rotation")

    def recording(self) -> "Recording":
        """These rules for the first of two runs, whose values they keep. To be used without a graph, once."""
        return Recording(**_settings(self))

    def _other_run(self, *values: Tensor) -> tuple[Tensor, ...]:
        raise RulesError(
            f"rules {self.name!r} compare two runs, so a single forward pass cannot follow them: use "
            "interp.attribution, or rules.recording() for one run and .against() for the other"
        )

    # ------------------------------------------------------------------------------------------- what it does where

    def reaches(self, site: str) -> bool:
        """False for sites whose scores are 0 by construction: nothing passes a frozen attention pattern."""
        return self.pattern != "frozen" or site not in ("q", "k", "pattern")

    def settings(self) -> dict[str, str | float]:
        """Every switch that is not "exact"."""
        chosen = {switch: getattr(self, switch) for switch in SETTINGS}
        warm = {} if self.temperature == 1 else {"temperature": self.temperature}
        return {switch: setting for switch, setting in chosen.items() if setting != "exact"} | warm

    def coverage(self, model) -> "pd.DataFrame":
        """What these rules do at each of a model's non-linearities: path, switch, setting, status.

        status: "on"; "exact" where autograd decides; "not applicable" where the model has no such place; "unsupported"
        where it has one that cannot be treated so: then these rules refuse to run on it.
        """
        import pandas as pd

        chosen = self.settings()
        if not hasattr(model, "nonlinearities"):  # a TransformerBridge: other people's modules ask no rules
            rows = [(type(model).__name__, switch, setting, "unsupported") for switch, setting in chosen.items()]
            rows = rows or [(type(model).__name__, "all", "exact", "exact")]
            return pd.DataFrame(rows, columns=["path", "switch", "setting", "status"])
        rows = []
        for place in model.nonlinearities():
            setting = getattr(self, place.switch)
            if place.switch == "pattern" and self.temperature != 1:
                setting = f"temperature {self.temperature:g}"
            lacks = place.activation is not None and (
                (setting == "ratio" and place.activation.ratio is None)
                or (setting == "secant" and place.activation.slope is None)
            )
            status = "exact" if setting == "exact" else "unsupported" if lacks else "on"
            rows.append((place.path, place.switch, setting, status if place.present else "not applicable"))
        return pd.DataFrame(rows, columns=["path", "switch", "setting", "status"])

    def check(self, model) -> None:
        """Raise `RulesError`, naming the first place, if the model has one that these rules cannot treat."""
        table = self.coverage(model)
        for row in table[table.status == "unsupported"].itertuples():
            mend = "" if hasattr(model, "nonlinearities") else "; load the model with load_model instead"
            raise RulesError(f"rules {self.name!r} cannot set {row.switch}={row.setting!r} at {row.path}{mend}")
        if {"norm_scale", "qk_norm_scale"} & set(self.settings()):
            for name, point in getattr(model, "hook_dict", {}).items():
                if name.endswith(("hook_scale", "hook_normalized")) and point.fwd_hooks:
                    raise RulesError(
                        f"rules {self.name!r} treat norms, and {name} has a hook that may change its value"
                    )


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def _settings(rules: Rules) -> dict[str, Any]:
    return {f.name: getattr(rules, f.name) for f in fields(Rules)}


@dataclass(frozen=True)
class Recording(Rules):
    """Rules that keep the values of a run at every place where they are to compare it with another."""

    tape: list[tuple[Tensor, ...]] = field(default_factory=list, compare=False, repr=False)

    def _other_run(self, *values: Tensor) -> tuple[Tensor, ...]:
        self.tape.append(tuple(value.detach() for value in values))
        return values

    def against(self, copies: int = 1) -> "Against":
        """The same rules for the other run, which must pass the same places in the same order: for one forward pass.

        copies: how often the recorded batch is repeated in the other run's.
        """
        if copies == 1:
            return Against(**_settings(self), tape=iter(self.tape))
        repeated = (tuple(v.repeat(copies, *(1,) * (v.ndim - 1)) for v in values) for values in self.tape)
        return Against(**_settings(self), tape=repeated)


@dataclass(frozen=True)
class Against(Rules):
    """Rules that compare a run with a recorded one."""

    tape: Iterator[tuple[Tensor, ...]] = field(default_factory=lambda: iter(()), compare=False, repr=False)

    def _other_run(self, *values: Tensor) -> tuple[Tensor, ...]:
        other = next(self.tape, None)
        if other is None or [v.shape for v in other] != [v.shape for v in values]:
            raise RulesError(
                f"rules {self.name!r} compare runs of equal shape, one forward pass each; these two do not match"
            )
        return other


GRADIENT = Rules()
_LRP = {"norm_scale": "frozen", "activation_slope": "ratio", "gate_product": "half"}
_ATTNLRP = {**_LRP, "qk_norm_scale": "frozen", "query_key": "half", "pattern_value": "half"}

RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        GRADIENT,
        Rules("ln-only", norm_scale="frozen"),
        Rules("relp", **_LRP),
        Rules("relp-frozen-attention", **_LRP, pattern="frozen"),
        Rules("attnlrp", **_ATTNLRP),
        Rules("cp-lrp", **{**_LRP, "gate_product": "frozen-gate"}, qk_norm_scale="frozen", pattern="frozen"),
        Rules("pa-lrp", **_ATTNLRP, rotation="half"),
        Rules("gim", **{**_ATTNLRP, "activation_slope": "exact"}, temperature=2.0),
        Rules("secant", **{switch: "secant" for switch in SETTINGS if switch != "rotation"}),
    )
}


def get_rules(rules: str | Rules) -> Rules:
    """A rule set by name; switches may follow, as in "relp,pattern=frozen,qk_norm_scale=frozen"."""
    if isinstance(rules, Rules):
        return rules
    name, *switches = (part.strip() for part in rules.split(","))
    chosen = RULES[one_of(name, RULES, "rule set", RulesError)]
    changes: dict[str, str | float] = {}
    for switch in switches:
        key, equals, setting = (part.strip() for part in switch.partition("="))
        if not equals:
            raise RulesError(f"{switch!r} is not a switch of a rule set: write it as pattern=frozen")
        one_of(key, (*SETTINGS, "temperature"), "switch of a rule set", RulesError)
        try:
            changes[key] = float(setting) if key == "temperature" else setting
        except ValueError:
            raise RulesError(f"the softmax's temperature must be a number, not {setting!r}") from None
    return replace(chosen, name=rules, **changes) if changes else chosen
