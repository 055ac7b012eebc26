"""Holding neurons at a value, and what that does to the next token: the test of what their weights seem to say.

A neuron's activation is replaced wherever the clamp reaches, the rest of the model follows by itself:

    post_n := v                      site "post": the neuron's output. The MLP's moves by (v - post_n) W_out[n] exactly
    up_n := v, or gate_n := v        sites "up" and "gate": before the product f(gate) * up of a gated neuron; "up" of a plain
                                     neuron is its pre-activation

    with clamp(model, {(2, 17): 5.0}):
        logits = model(prompt)

A decoded neuron may write " dog" and still do nothing for it: too weak, cancelled later, never where it would count. `clamp_test`
asks whether clamping the neurons decoded for a token raises its log-probability more than clamping as many others of the same
layers to the same values does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, TaskError, one_of
from interp.model.run import Hooks, canonical, logits_at, record
from interp.model.tokens import ids_of, pad, pad_id, token_strings
from interp.model.transformer import Transformer
from interp.precision import at_least_float32
from interp.statistics import bootstrap_mean

SITES = ("post", "up", "gate")
Neuron = tuple[int, int]  # layer, number


@contextmanager
def clamp(
    model: Transformer, values: Mapping[Neuron, float], *, site: Literal["post", "up", "gate"] = "post",
    positions: Literal["all"] | Sequence[int] = "all",
) -> Iterator[Transformer]:  # fmt: skip
    """The model with neurons {(layer, neuron): value} held at their values, for the runs inside the `with`.

    positions: "all", or places counted from the first token, in every row alike.
    Raises `SiteError` where there is no such neuron, site or position, `OptionError` where a value is not finite.
    """
    hooks = clamp_hooks(model, values, site=site, positions=positions)
    with model.hooks(fwd_hooks=list(hooks)):
        yield model


def clamp_hooks(
    model: Transformer, values: Mapping[Neuron, float], *, site: Literal["post", "up", "gate"] = "post",
    positions: Literal["all"] | Sequence[int] = "all",
) -> Hooks:  # fmt: skip
    """Forward hooks that clamp; see `clamp`."""
    canonical(model, "clamping neurons")
    if not values:
        raise OptionError("there is no neuron to clamp")
    if isinstance(positions, str):
        one_of(positions, ("all",), "choice of positions")
    elif not positions or min(positions) < 0:
        raise SiteError(
            f"positions are counted from the first token, 0, and {list(positions)} names none or one before it"
        )
    by_layer: dict[int, dict[int, float]] = {}
    for neuron, value in values.items():
        layer, number = check_neuron(model, neuron)
        if not math.isfinite(value):
            raise OptionError(f"neuron {number} of layer {layer} cannot be held at {value}")
        by_layer.setdefault(layer, {})[number] = float(value)
    return [(hook_name(model, layer, site), _hook(held, positions)) for layer, held in sorted(by_layer.items())]


def _hook(held: dict[int, float], positions: str | Sequence[int]) -> Any:
    def write(value: Float[Tensor, "batch position d_mlp"], hook: Any) -> Float[Tensor, "batch position d_mlp"]:
        numbers = torch.tensor(list(held), device=value.device)
        new = value.clone()  # a cache may hold the other
        if isinstance(positions, str):
            new[..., numbers] = value.new_tensor(list(held.values()))
            return new
        if wrong := [position for position in positions if position >= value.shape[1]]:
            raise SiteError(f"the run has positions 0 to {value.shape[1] - 1}, not {wrong[0]}")
        where = torch.tensor(list(positions), dtype=torch.int64, device=value.device)
        new[:, where[:, None], numbers] = value.new_tensor(list(held.values()))
        return new

    return write


def hook_name(model: Transformer, layer: int, site: str) -> str:
    """Where a site of neurons is. Raises `SiteError` for the gate of a plain MLP."""
    one_of(site, SITES, "place to clamp neurons", SiteError)
    gated = model.cfg.gated
    if site == "gate" and not gated:
        raise SiteError(f"{model.cfg.name} has no gates to clamp: its MLPs are plain (choose from post, up)")
    return f"blocks.{layer}.mlp.hook_{'post' if site == 'post' else 'pre_linear' if site == 'up' and gated else 'pre'}"


def check_neuron(model: Transformer, neuron: Neuron) -> Neuron:
    """The neuron as plain numbers. Raises `SiteError` where the model has none such."""
    layer, number = map(int, neuron)
    for one, n, what in ((layer, model.cfg.n_layers, "layers"), (number, model.cfg.d_mlp, "neurons in a layer")):
        if not 0 <= one < n:
            raise SiteError(f"{model.cfg.name} has {what} 0 to {n - 1}, not {one}")
    return layer, number


@torch.no_grad()
def clamp_effect(
    model: Transformer, prompts: str | Sequence[str], values: Mapping[Neuron, float], *,
    site: Literal["post", "up", "gate"] = "post", positions: Literal["all"] | Sequence[int] = "all", k: int = 10,
    batch_size: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """The k tokens of each prompt whose probability of coming next a clamp changes most, either way.

    values, site, positions: as `clamp`. batch_size: prompts per forward pass.
    Columns: prompt (number), rank, token_id, token, before, after (probabilities), difference. Ties: the lowest token id.
    Raises `TaskError` where there is no prompt or an empty one, and what `clamp` raises.
    """
    canonical(model, "clamp_effect")
    vocabulary = model.W_U.shape[1]
    if not 1 <= k <= vocabulary:
        raise OptionError(f"cannot show {k} of {vocabulary} tokens")
    hooks = clamp_hooks(model, values, site=site, positions=positions)
    batch = _Prompts.of(model, prompts)
    _check_reach(positions, batch)
    before, after = (log_probabilities(model, batch, way, batch_size).exp() for way in ((), hooks))
    difference = after - before
    ids = difference.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = {name: of.gather(1, ids).flatten().cpu().numpy() for name, of in
               (("before", before), ("after", after), ("difference", difference))}  # fmt: skip
    number = np.arange(len(ids))
    head = {
        "prompt": np.repeat(number, k),
        "rank": np.tile(np.arange(k), len(ids)),
        "token_id": ids.flatten().cpu().numpy(),
    }
    texts = token_strings(model.tokenizer, head["token_id"].tolist())
    return pd.DataFrame({**head, "token": np.array(texts, dtype=object), **columns})


@dataclass(frozen=True)
class ClampTest:
    """Whether clamping some neurons raises a token's log-probability more than clamping others of their layers.

    Changes are in nats, by clamp at all positions, read behind each prompt's last token.
    """

    token: str
    token_id: int
    neurons: dict[Neuron, float]  # what they were held at
    site: str
    changes: Float[np.ndarray, " prompt"]  # of the log-probability, by clamping the neurons
    control_changes: Float[np.ndarray, "control prompt"]  # by clamping sets of others
    low: float  # 95 % interval of the mean difference, bootstrap over prompts
    high: float
    p: float  # Wilcoxon's signed ranks over prompts, one-sided: the neurons raise it more than the mean of their controls
    p_sets: float  # share of sets, this one counted, whose mean change is at least this one's

    @property
    def effect(self) -> float:
        """Mean change by clamping the neurons."""
        return float(self.changes.mean())

    @property
    def control(self) -> float:
        """Mean change by clamping others."""
        return float(self.control_changes.mean())

    @property
    def difference(self) -> float:
        """effect - control."""
        return self.effect - self.control

    def __str__(self) -> str:
        n, sets = len(self.changes), len(self.control_changes)
        return (
            f"clamping {len(self.neurons)} neurons at {self.site} changes log p({self.token!r}) by {self.effect:+.3f} nats, "
            f"others of their layers by {self.control:+.3f}: difference {self.difference:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}], p {self.p:.2g} over {n} prompts, {self.p_sets:.2g} over {sets} sets"
        )


@torch.no_grad()
def clamp_test(
    model: Transformer, prompts: Sequence[str], token: str | int, neurons: Mapping[Neuron, float] | Sequence[Neuron], *,
    times: float = 1.0, site: Literal["post", "up", "gate"] = "post", controls: int = 20, seed: int = 0, batch_size: int = 64,
) -> ClampTest:  # fmt: skip
    """Clamp the neurons decoded for a token, and `controls` sets of others of the same layers; compare what it gains.

    neurons: those read as the token, with a sign each (`signs_of` a table of `find_neurons`; without: all positive). Each is held
    at sign * times * the largest |activation| that its layer shows at that site on these prompts, and so is the neuron that
    stands for it in a control set, drawn at random by `seed` from the layer's others.
    The first test is over prompts, with each prompt's controls averaged; the second asks how unusual the set is among sets.
    Raises `TaskError` where the token is none or prompts are empty, `OptionError` where a layer has too few other neurons.
    """
    from scipy import stats

    canonical(model, "clamp_test")
    token_id, text = _token(model, token)
    chosen = dict(neurons) if isinstance(neurons, Mapping) else dict.fromkeys(neurons, 1.0)
    signs = {check_neuron(model, neuron): float(sign) for neuron, sign in chosen.items()}
    if not signs or 0.0 in signs.values():
        raise OptionError("each neuron needs a sign to be clamped with" if signs else "there is no neuron to clamp")
    if controls < 1 or not (times > 0 and math.isfinite(times)):
        raise OptionError(f"cannot clamp {controls} control sets at {times} times the largest activation")
    batch = _Prompts.of(model, prompts)
    largest = _largest(model, batch, sorted({layer for layer, _ in signs}), site, batch_size)
    values = {neuron: math.copysign(times * largest[neuron[0]], sign) for neuron, sign in signs.items()}

    def change(held: Mapping[Neuron, float]) -> np.ndarray:
        hooks = clamp_hooks(model, held, site=site)
        return log_probabilities(model, batch, hooks, batch_size, token_id).double().cpu().numpy() - before

    before = log_probabilities(model, batch, (), batch_size, token_id).double().cpu().numpy()
    rng = np.random.default_rng(seed)
    changes = change(values)
    others = np.stack([change(_others(model, values, rng)) for _ in range(controls)])
    paired = changes - others.mean(0)
    _, low, high = bootstrap_mean(paired, seed=seed)
    # equal changes everywhere are no evidence, and nothing to rank
    p = float(stats.wilcoxon(paired, alternative="greater").pvalue) if paired.any() else 1.0
    p_sets = float((1 + (others.mean(1) >= changes.mean()).sum()) / (1 + controls))
    return ClampTest(text, token_id, values, site, changes, others, float(low), float(high), p, p_sets)


def signs_of(found: pd.DataFrame) -> dict[Neuron, float]:
    """Neurons of a table of `find_neurons`, with the sign of the pole that has the token: what `clamp_test` asks for.

    Raises `OptionError` where a neuron has the token at both poles.
    """
    signs: dict[Neuron, float] = {}
    for layer, number, pole in zip(found["layer"], found["neuron"], found["pole"], strict=True):
        sign = 1.0 if pole == "+" else -1.0
        if signs.setdefault((int(layer), int(number)), sign) != sign:
            raise OptionError(f"neuron {number} of layer {layer} is in the table with both poles: choose one")
    return signs


@dataclass(frozen=True)
class _Prompts:
    """Prompts padded on the right, and where each ends."""

    tokens: Int[Tensor, "prompt position"]
    last: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, model: Transformer, prompts: str | Sequence[str]) -> "_Prompts":
        rows = [
            ids_of(model.tokenizer, text, prepend_bos=model.cfg.prepend_bos)
            for text in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        if not rows:
            raise TaskError("there is no prompt")
        if not all(rows):
            raise TaskError("a prompt is empty")
        last = torch.tensor([len(row) - 1 for row in rows])
        return cls(pad(rows, pad_id(model.tokenizer)), last)


def _check_reach(positions: str | Sequence[int], batch: _Prompts) -> None:
    """A clamp behind a prompt's end would do nothing there, unseen."""
    if not isinstance(positions, str) and (wrong := [p for p in positions if p > int(batch.last.min())]):
        raise SiteError(f"the shortest prompt has positions 0 to {int(batch.last.min())}, not {wrong[0]}")


def log_probabilities(
    model: Transformer, batch: _Prompts, hooks: Hooks, batch_size: int, token_id: int | None = None
) -> Float[Tensor, "prompt d_vocab"] | Float[Tensor, " prompt"]:
    """Log-probabilities (nats) of what comes next, in float32 at least; of one token, only its."""
    found = []
    for tokens, last in zip(batch.tokens.split(batch_size), batch.last.split(batch_size), strict=True):
        logits = logits_at(model, tokens.to(model.device), last.to(model.device), hooks)
        log_p = at_least_float32(logits).log_softmax(-1)
        found.append(log_p if token_id is None else log_p[:, token_id])
    return torch.cat(found)


def _largest(model: Transformer, batch: _Prompts, layers: list[int], site: str, batch_size: int) -> dict[int, float]:
    """The largest |activation| of each layer at a site, over neurons and the tokens of all prompts."""
    names = {layer: hook_name(model, layer, site) for layer in layers}
    largest = dict.fromkeys(layers, 0.0)
    for tokens, last in zip(batch.tokens.split(batch_size), batch.last.split(batch_size), strict=True):
        found = record(model, tokens.to(model.device), names.values(), copy=False)
        there = (torch.arange(tokens.shape[1]) <= last[:, None]).to(model.device)
        for layer, name in names.items():
            largest[layer] = max(largest[layer], float(found[name][there].abs().max()))
    return largest


def _others(model: Transformer, values: Mapping[Neuron, float], rng: np.random.Generator) -> dict[Neuron, float]:
    """As many neurons of the same layers, none of them among these, held at the same values."""
    found: dict[Neuron, float] = {}
    for layer in sorted({layer for layer, _ in values}):
        held = {number: value for (at, number), value in values.items() if at == layer}
        free = np.setdiff1d(np.arange(model.cfg.d_mlp), list(held))
        if len(free) < len(held):
            raise OptionError(f"layer {layer} has {len(free)} other neurons, too few to stand for {len(held)}")
        picks = rng.choice(free, size=len(held), replace=False)
        found |= {(layer, int(number)): value for number, value in zip(picks, held.values(), strict=True)}
    return found


def _token(model: Transformer, token: str | int) -> tuple[int, str]:
    vocabulary = model.W_U.shape[1]
    if isinstance(token, str):
        try:
            return model.to_single_token(token), token
        except ValueError as error:
            raise TaskError(str(error)) from None
    if not 0 <= token < vocabulary:
        raise TaskError(f"{model.cfg.name} has tokens 0 to {vocabulary - 1}, not {token}")
    return int(token), token_strings(model.tokenizer, [int(token)])[0]
