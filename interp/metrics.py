"""How well a model does a task: one number per prompt, from the logits at the position where the answer is due.

Every metric maps logits [prompt, d_vocab] to values [prompt]. Names, units and what they need:

    logit_diff        logits  mean logit of the answers minus mean logit of the wrong answers
    answer_logit      logits  mean logit of the answers
    log_probability   nats    log of the total probability of the answers
    probability       1       total probability of the answers (for greater-than: the mass on later years)
    probability_diff  1       that minus the total probability of the wrong answers (EAP-IG's greater-than metric)
    kl_divergence     nats    KL(P_clean || P), summed over the vocabulary; 0 on the clean run
    accuracy          1       1 if the most likely token is an answer

A plain callable is a metric too: `f(logits)` or `f(logits, pairs)`, returning [prompt].
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import secants
from interp.errors import MetricError, name_some, one_of
from interp.precision import at_least_float32

if TYPE_CHECKING:
    from interp.tasks.pairs import PromptPairs

Logits = Float[Tensor, "prompt d_vocab"]
Values = Float[Tensor, " prompt"]


@dataclass(frozen=True)
class Metric:
    """A named metric: `compute(logits, pairs, clean_logits)`; `needs` lists "wrong_answers" and/or "clean_logits".

    slope: of a metric that is not linear, its multipliers [prompt, d_vocab] between two runs' logits, which carry the
        metric's difference exactly: sum of slope(a, b) * (a - b) = metric(a) - metric(b).
    linear: it is a weighted sum of the logits of the answers' and wrong answers' tokens. It may then be handed those
    columns only, with the pairs' answers counted among them, or be read along one direction of the residual stream.
    """

    name: str
    unit: str
    compute: Callable[[Logits, "PromptPairs", Logits | None], Values]
    describe: str = ""
    needs: tuple[str, ...] = ()
    linear: bool = False
    slope: Callable[[Logits, Logits, "PromptPairs", Logits | None], Logits] | None = None

    def __call__(
        self, logits: Logits, pairs: "PromptPairs", clean_logits: Logits | None = None,
        *, numbers: Int[Tensor, " prompt"] | None = None,
    ) -> Values:  # fmt: skip
        """Values [prompt], in float32 at least; `MetricError` if one of them is not finite, naming the prompts.

        numbers: what the prompts are called in that sentence (default: 0, 1, ...).
        """
        self._check_answers(pairs)
        if "clean_logits" in self.needs and clean_logits is None:
            raise MetricError(f"metric {self.name} needs the logits of the clean run")
        wide = at_least_float32(logits)
        values = self.compute(wide, pairs, clean_logits)
        if values.shape != (len(pairs),):
            raise MetricError(f"metric {self.name} returned shape {tuple(values.shape)}, not one value per prompt")
        return self.check(values, numbers)

    def _check_answers(self, pairs: "PromptPairs") -> None:
        if "wrong_answers" in self.needs and pairs.wrong_answers is None:
            raise MetricError(f"metric {self.name} needs wrong answers, and these pairs have none")

    def check(self, values: Values, numbers: Int[Tensor, " prompt"] | None = None) -> Values:
        """The values, if all are finite; `MetricError` naming the prompts otherwise."""
        if not torch.isfinite(values).all():
            bad = (~torch.isfinite(values)).nonzero().flatten()
            bad = (bad if numbers is None else numbers[bad]).unique().tolist()
            raise MetricError(f"metric {self.name} is not finite on prompts {name_some(bad)}")
        return values

    def weights(self, pairs: "PromptPairs", n_columns: int) -> Float[Tensor, "prompt column"]:
        """Of a linear metric: what each logit counts for, by its gradient."""
        self._check_answers(pairs)
        with torch.enable_grad():
            logits = torch.zeros(
                len(pairs), n_columns, dtype=torch.float64, device=pairs.clean.device, requires_grad=True
            )
            return torch.autograd.grad(self.compute(logits, pairs, None).sum(), logits)[0]

    def multipliers(
        self, logits: Logits, pairs: "PromptPairs", clean_logits: Logits | None = None, other: Logits | None = None
    ) -> Logits:
        """What a backward pass starts with at the logits: the metric's gradient, or its slope towards another run's logits.

        `MetricError` if the metric has no gradient there, or no slope between runs.
        """
        self._check_answers(pairs)
        logits, clean_logits = (
            at_least_float32(logits),
            None if clean_logits is None else at_least_float32(clean_logits),
        )
        if other is not None and not self.linear:
            if self.slope is None:
                raise MetricError(
                    f"metric {self.name} has no secant between two runs; use logit_diff, or patch exactly"
                )
            return self.slope(logits, at_least_float32(other), pairs, clean_logits)
        if "clean_logits" in self.needs and other is None and torch.equal(logits, clean_logits):
            raise MetricError(
                f"the gradient of {self.name} is zero in the clean run: take it at the corrupt run, or use secant rules"
            )
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            values = self(logits, pairs, clean_logits)
            if not values.requires_grad:
                raise MetricError(f"metric {self.name} has no gradient; use logit_diff or patch exactly")
            return torch.autograd.grad(values.sum(), logits)[0]


def _mean_logit(logits: Logits, tokens: Int[Tensor, "prompt answer"]) -> Values:
    present = tokens >= 0
    return logits.gather(1, tokens.clamp_min(0)).masked_fill(~present, 0).sum(1) / present.sum(1)


def _log_mass(logits: Logits, tokens: Int[Tensor, "prompt answer"]) -> Values:
    log_probs = logits.log_softmax(-1).gather(1, tokens.clamp_min(0))
    return log_probs.masked_fill(tokens < 0, -torch.inf).logsumexp(1)


def _logit_diff(logits, pairs, clean):
    return _mean_logit(logits, pairs.answers) - _mean_logit(logits, pairs.wrong_answers)


def _probability_diff(logits, pairs, clean):
    return _log_mass(logits, pairs.answers).exp() - _log_mass(logits, pairs.wrong_answers).exp()


def _kl_divergence(logits, pairs, clean):
    log_p, log_q = clean.to(logits.dtype).log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _among(logits: Logits, tokens: Int[Tensor, "prompt answer"]) -> Logits:
    """1 at the tokens, 0 elsewhere; -1 is no token."""
    chosen = torch.zeros(len(logits), logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
    return chosen.scatter(1, tokens.masked_fill(tokens < 0, logits.shape[1]), 1)[:, :-1]


def _log_sum_slope(a: Logits, b: Logits, among: Logits | None = None) -> Logits:
    """Of the log of the sum of exp, over all tokens or among some of them: L / sum(L) (`secants.probability_mean`)."""
    if among is not None:
        a, b = (x.masked_fill(among == 0, -torch.inf) for x in (a, b))
    mean = secants.probability_mean(a, b)
    return mean / mean.sum(-1, keepdim=True)


def _mass_slope(a: Logits, b: Logits, tokens: Int[Tensor, "prompt answer"]) -> Logits:
    """Of the tokens' probability: dp = L (dx - sum(L dx) / sum(L)), summed over the tokens."""
    mean, among = secants.probability_mean(a, b), _among(a, tokens)
    return mean * (among - (mean * among).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True))


def _log_probability_slope(a, b, pairs, clean):
    return _log_sum_slope(a, b, _among(a, pairs.answers)) - _log_sum_slope(a, b)


def _kl_slope(a, b, pairs, clean):
    return _log_sum_slope(a, b) - clean.to(a.dtype).softmax(-1)


def _accuracy(logits, pairs, clean):
    right = (logits.argmax(-1, keepdim=True) == pairs.answers).any(1).to(logits.dtype)
    return right.masked_fill(logits.isnan().any(-1), torch.nan)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("logit_diff", "logits", _logit_diff, "answer minus wrong answer", ("wrong_answers",), linear=True),
        Metric("answer_logit", "logits", lambda x, p, _: _mean_logit(x, p.answers), "logit of the answer", linear=True),
        Metric(
            "log_probability",
            "nats",
            lambda x, p, _: _log_mass(x, p.answers),
            "log-probability of the answer",
            slope=_log_probability_slope,
        ),
        Metric(
            "probability",
            "probability",
            lambda x, p, _: _log_mass(x, p.answers).exp(),
            "probability of the answer",
            slope=lambda a, b, p, _: _mass_slope(a, b, p.answers),
        ),
        Metric(
            "probability_diff",
            "probability",
            _probability_diff,
            "answers minus wrong answers",
            ("wrong_answers",),
            slope=lambda a, b, p, _: _mass_slope(a, b, p.answers) - _mass_slope(a, b, p.wrong_answers),
        ),
        Metric("kl_divergence", "nats", _kl_divergence, "KL(clean || this run)", ("clean_logits",), slope=_kl_slope),
        Metric("accuracy", "share", _accuracy, "most likely token is an answer"),
    )
}


def get_metric(metric: str | Callable | Metric) -> Metric:
    """A metric by name, or a callable `f(logits)` / `f(logits, pairs)` as one."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        return METRICS[one_of(metric, METRICS, "metric", MetricError)]
    if not callable(metric):
        raise MetricError(f"{metric!r} is neither the name of a metric nor a callable")
    takes_pairs = len(inspect.signature(metric).parameters) > 1
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, "", lambda x, p, _: metric(x, p) if takes_pairs else metric(x), (metric.__doc__ or "").strip())


def get_metrics(metric: str | Callable | Metric | Sequence[str | Callable | Metric]) -> tuple[list[Metric], bool]:
    """One metric or several as a list, and whether several were asked for (even if it is a list of one)."""
    several = not isinstance(metric, str | Metric) and isinstance(metric, Sequence)
    metrics = [get_metric(m) for m in (metric if several else [metric])]
    if not metrics:
        raise MetricError("no metric to read")
    return metrics, several
