"""Secant rules that were tried and not kept, beside the one that was, on the same behaviours as `fidelity.py`.

    python benchmarks/secant_variants.py --stories ../shared/data/models/stories260k

split: softmax as exp times 1/Z and norms as x times 1/scale, each factor by the midpoint of the other. Complete to rounding as
    well, but where the runs differ much its terms are huge and cancel: in total, not place by place.
reach r: every slope between the base run and a point a share r of the way to the source run. r = 1 is the secant, r -> 0 the
    gradient; complete for r = 1 only.
mean: the mean of gradient and secant.

Means over all tasks of Pearson / relative error with exact patching, denoising and the mean of both directions.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.fidelity import cases
from interp import activation_patching, attribution, backward, compare, secants
from interp.rules import Against

SITES = ["resid_pre", "attn_out", "mlp_out"]


class SplitSoftmax(Function):
    """exp(x - c) / Z with one shift c for both runs."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(x, other)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, other = ctx.saved_tensors
        shift = torch.maximum(x, other).amax(-1, keepdim=True)
        a, b = (value - shift for value in (x, other))
        z_a, z_b = a.exp().sum(-1, keepdim=True), b.exp().sum(-1, keepdim=True)
        slope = torch.maximum(a, b).exp() * secants.decay((a - b).abs().nan_to_num(0.0))
        through_z = (g * (a.exp() + b.exp())).sum(-1, keepdim=True) / (2 * z_a * z_b)
        return slope * (g * (1 / z_a + 1 / z_b) / 2 - through_z), None


class SplitNorm(Function):
    """x times 1 / scale."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, other: Tensor, other_scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, other, other_scale)
        return x / scale

    @staticmethod
    def backward(ctx, g: Tensor):
        x, s, other, t = ctx.saved_tensors
        middle = (x + other) / 2
        along = (g * middle).sum(-1, keepdim=True) * (-2 / x.shape[-1]) / (s * t * (s + t))
        return g * (1 / s + 1 / t) / 2 + middle * along, None, None, None


def split(*, norm: bool = True, softmax: bool = True):
    """The split rules in place of ours."""
    with_norm = patch.object(backward, "secant_norm", lambda x, s, o, t: SplitNorm.apply(x, s.detach(), o, t))
    with_softmax = patch.object(backward, "secant_softmax", SplitSoftmax.apply)
    return [*([with_norm] if norm else []), *([with_softmax] if softmax else [])]


def reach(share: float):
    """Slopes to a point part of the way."""
    whole = Against._other_run

    def part(self, *values: Tensor) -> tuple[Tensor, ...]:
        there = whole(self, *values)
        moved = [
            torch.where(v == t, t, v.detach() + share * (t - v.detach())) for v, t in zip(values, there, strict=True)
        ]
        if len(values) == 2 and values[1].shape == (*values[0].shape[:-1], 1):  # a norm: its scale follows from x
            x, scale = (v.detach() for v in values)
            eps = scale**2 - x.square().mean(-1, keepdim=True)
            moved[1] = (moved[0].square().mean(-1, keepdim=True) + eps).sqrt()
        return tuple(moved)

    return [patch.object(Against, "_other_run", part)]


VARIANTS = {
    "secant": [],
    "split norm and softmax": split(),
    "split norm": split(softmax=False),
    "split softmax": split(norm=False),
    **{f"reach {share}": reach(share) for share in (0.25, 0.5, 0.75)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="prompt pairs per task")
    parser.add_argument("--stories", type=Path, help="folder of stories260k")
    options = parser.parse_args()
    rows = []
    for model, pairs in cases(options.n, stories=options.stories):
        metric = "answer_logit" if pairs.wrong_answers is None else "logit_diff"
        scores = {"gradient": attribution(model, pairs, SITES, metric=metric)}
        for name, changes in VARIANTS.items():
            with ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change)
                scores[name] = attribution(model, pairs, SITES, rules="secant", metric=metric)
        scores["mean of gradient and secant"] = ((scores["gradient"] + scores["secant"]) / 2).assign_attrs({})
        for direction in ("denoise", "both"):
            exact = activation_patching(model, pairs, SITES, metric=metric, direction=direction)
            for name, found in scores.items():
                table = compare(found.assign_attrs(direction=direction), exact, n_resamples=2)
                rows += [
                    {
                        "direction": direction,
                        "rules": name,
                        "site": site,
                        "pearson": row.pearson,
                        "error": row.relative_error,
                    }
                    for site, row in table.iterrows()
                ]
    means = (
        pd.DataFrame(rows)
        .groupby(["direction", "rules", "site"], sort=False)[["pearson", "error"]]
        .agg(["mean", "max"])
    )
    shown = means.apply(
        lambda r: f"{r['pearson', 'mean']:.3f} / {r['error', 'mean']:.2f} (worst {r['error', 'max']:.2f})", axis=1
    )
    print(shown.unstack("site", sort=False).to_string())


if __name__ == "__main__":
    main()
