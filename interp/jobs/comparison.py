"""Which of several methods is better, and how sure that is: comparisons in pairs, over the cells of a grid.

    table = query("SELECT model, task, seed, method, value FROM scores WHERE variable = 'cmd'", Runs())
    compare_methods(table, better="lower", cluster=("model", "task"))

A cell is a model, a task and a seed, and every method has a value in each. Cells differ far more than methods do, so methods are
compared within cells: what is resampled, and what the test flips, are the differences

    d_c = value of the first method in cell c - value of the second

The interval is the BCa bootstrap's (Efron 1987) of the mean of d; p is that of the sign-flip permutation test, whose null is that
d and -d are equally likely: of all 2^n ways to flip n differences, the share with a mean at least as far from 0. With n cells no
p is less than 2^(1 - n), so that fewer than 6 can never show a difference at 0.05.

Seeds of one model and task share what makes that cell easy. Where the question is how methods do on other models and tasks,
those are the units, not the seeds: with `cluster` their cells are averaged first, and clusters are resampled and flipped whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from scipy import stats

from interp.errors import OptionError, name_some, one_of
from interp.plots import GREY, drawn_text, finish
from interp.statistics import bootstrap_mean

CORRECTIONS = ("holm", "bh", "none")
COLUMNS = ("first", "second", "n", "units", "mean_first", "mean_second", "difference", "low", "high", "p", "p_adjusted",
           "won")  # fmt: skip
ENOUGH_SEEDS = 5  # for a bootstrap interval of a mean over seeds; with fewer, the range is told
_COLOURS = (
    "#2166ac",
    "#b2182b",
    "#1b7837",
    "#762a83",
    "#b35806",
    "#4d4d4d",
)  # told apart in print and by the colour-blind
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")
_AT_ONCE = 1_000_000  # flipped differences in memory


def compare_methods(
    table: pd.DataFrame, *, by: str = "method", value: str = "value", match: Sequence[str] = ("model", "task", "seed"),
    cluster: Sequence[str] | None = None, better: Literal["higher", "lower"] = "higher", reference: str | None = None,
    confidence: float = 0.95, n_resamples: int = 9999, correction: Literal["holm", "bh", "none"] = "holm", seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Every pair of methods, or each against one, over the cells that they share; one row per pair.

    table: one row per method and cell. by, value: the columns of methods and of values. match: the columns that make a cell.
    cluster: those of `match` whose cells belong together: each cluster counts once, with the mean of its cells, in both means,
        the interval and the test (default: every cell stands for itself). reference: the method to compare the others with.
    n_resamples: of the bootstrap, and of the test where there are more ways to flip than that; else the test is exact.
    correction: of p for the number of rows: "holm" bounds the chance of any false finding, "bh" the expected share of false
        findings (Benjamini & Hochberg 1995).

    Columns: first, second; n cells; units that are resampled (cells or clusters); mean_first, mean_second, difference (first
    minus second), low, high: in the value's unit; p, p_adjusted; won: the share of cells in which the first is better, ties
    counting half.

    The interval says how the mean difference varies over cells, or clusters, like these. It is not over prompts, nor over models
    and tasks that were never drawn at random, and it is not adjusted for the number of rows. BCa intervals of fewer than about
    ten units are too short; of one unit there is none (NaN).

    Raises `OptionError` for a column that is not there, a cell that one method has twice or another has not, and a value that is
    no number, naming the first: nothing is left out in silence.
    """
    one_of(better, ("higher", "lower"), "way to be better")
    one_of(correction, CORRECTIONS, "correction")
    if not 0 < confidence < 1:
        raise OptionError(f"confidence lies between 0 and 1, not at {confidence:g}")
    if n_resamples < 1:
        raise OptionError(f"n_resamples must be at least 1, not {n_resamples}")
    match, cluster = list(match), list(cluster or ())
    for column in cluster:
        one_of(column, match, "column of a cell to cluster by")
    cells = _cells(table, by, value, match)
    methods = sorted(cells.columns)
    if len(methods) < 2:
        raise OptionError(f"a comparison takes at least two values of {by}, and this table has {len(methods)}")
    pairs = list(combinations(methods, 2))
    if reference is not None:
        one_of(reference, methods, by)
        pairs = [(method, reference) for method in methods if method != reference]
    units = cells.groupby(level=cluster, sort=True).mean() if cluster else cells
    rows = []
    for first, second in pairs:
        difference = (units[first] - units[second]).to_numpy()
        mean, low, high = bootstrap_mean(difference, confidence=confidence, n_resamples=n_resamples, seed=seed)
        if len(difference) < 2:
            low = high = np.nan  # there is nothing to say how it varies
        ahead = np.sign((cells[first] - cells[second]).to_numpy()) * (1 if better == "higher" else -1)
        rows.append((
            first, second, len(cells), len(units), units[first].mean(), units[second].mean(), float(mean), float(low),
            float(high), sign_flip_p(difference, n_resamples=n_resamples, seed=seed), np.nan, float((ahead + 1).mean() / 2),
        ))  # fmt: skip
    found = pd.DataFrame(rows, columns=COLUMNS)
    found["p_adjusted"] = adjusted(found.p.to_numpy(), correction)
    about = {"by": by, "value": value, "better": better, "match": match, "cluster": cluster, "correction": correction,
             "confidence": confidence, "n_resamples": n_resamples, "seed": seed}  # fmt: skip
    found.attrs.update(about)
    return found


def sign_flip_p(differences: Float[np.ndarray, " unit"], *, n_resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the sign-flip permutation test that paired differences have mean 0.

    Exact, over all 2^n flips, where those are no more than n_resamples; else over that many drawn at random, itself counted in.
    """
    differences = np.asarray(differences, np.float64)
    if not differences.any() or len(differences) < 2:
        return 1.0  # either way of flipping gives the same
    return float(stats.permutation_test(
        (differences,), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=n_resamples, batch=max(1, _AT_ONCE // len(differences)), rng=np.random.default_rng(seed),
    ).pvalue)  # fmt: skip


def adjusted(
    p: Float[np.ndarray, " test"], correction: Literal["holm", "bh", "none"] = "holm"
) -> Float[np.ndarray, " test"]:
    """p of several tests, made larger for their number.

    "holm" (1979): of m sorted p, the running maximum of (m - i) p_i, i from 0, and at most 1. "bh": the running minimum from
    above of m p_i / (i + 1).
    """
    one_of(correction, CORRECTIONS, "correction")
    p = np.asarray(p, np.float64)
    if correction == "none" or not len(p):
        return p.copy()
    if correction == "bh":
        return stats.false_discovery_control(p, method="bh")
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty_like(p)
    found[order] = np.minimum(raised, 1.0)
    return found


def _cells(table: pd.DataFrame, by: str, value: str, match: Sequence[str]) -> pd.DataFrame:
    """[cell, method], sorted; every method has every cell once."""
    if not match:
        raise OptionError("a comparison needs columns to match by")
    for column in (by, value, *match):
        one_of(column, list(table.columns), "column of this table")
    if by in match:
        raise OptionError(f"{by} tells the methods apart, so cells cannot be matched by it")
    for column in (by, *match):
        if table[column].isna().any():
            raise OptionError(f"row {table.index[table[column].isna()][0]} of this table has no {column}")
    values = pd.to_numeric(table[value], errors="coerce").astype(np.float64)
    if not np.isfinite(values).all():
        row = table.loc[~np.isfinite(values)].iloc[0]
        raise OptionError(f"{_named(row, match)} has no {value} of {by} {row[by]}")
    if (twice := table.duplicated([by, *match])).any():
        row = table[twice].iloc[0]
        raise OptionError(
            f"{_named(row, match)} has more than one {value} of {by} {row[by]}: match by what tells them apart"
        )
    cells = table.assign(**{value: values}).pivot(index=list(match), columns=by, values=value).sort_index()
    if cells.isna().any(axis=None):
        at, method = next((at, name) for at, row in cells.iterrows() for name in cells.columns if np.isnan(row[name]))
        at = at if isinstance(at, tuple) else (at,)
        raise OptionError(
            f"{_named(dict(zip(match, at, strict=True)), match)} has no {value} of {by} {method}, and others have"
        )
    return cells


def _named(cell, match: Sequence[str]) -> str:
    return f"the cell {', '.join(f'{name} {cell[name]}' for name in match)}"


# ------------------------------------------------------------------------------------------- several measures at once


@dataclass(frozen=True)
class Measure:
    """A number that methods are judged by. better: "higher", "lower", "near 1", or "" for what is neither good nor bad."""

    name: str
    label: str
    better: Literal["higher", "lower", "near 1", ""] = ""

    @property
    def title(self) -> str:
        """The label, and which way is good."""
        return self.label + {"higher": " ↑", "lower": " ↓", "near 1": " → 1", "": ""}[self.better]


def compare_measures(table: pd.DataFrame, measures: Sequence[Measure]) -> tuple[pd.DataFrame | None, list[str]]:
    """(`compare_methods` by every measure, with the column `measure`; sentences on what could not be compared).

    table: a row per job, with columns model, task, question, label (the method) and seed. Models and tasks are clusters. p is
    adjusted by Holm over all pairs and measures together. Only cells that all methods have are compared; None if there are none.
    """
    cell, parts, notes = ["model", "task", "question", "seed"], [], []
    for measure in measures:
        of = (1 - table[measure.name]).abs() if measure.better == "near 1" else table[measure.name]
        values = table[[*cell, "label"]].assign(value=of)
        defined = values[np.isfinite(of)]
        if lacking := sorted({*values.label} - {*defined.label}):
            notes.append(f"{measure.label} is not defined for {name_some(lacking)}, so that is not compared by it.")
        if not measure.better or defined.label.nunique() < 2:
            continue
        whole = defined.groupby(cell).label.transform("nunique") == defined.label.nunique()
        if not whole.all():
            left, every = (len(part.drop_duplicates(cell)) for part in (defined[~whole], defined))
            notes.append(f"{measure.label}: {left} of {every} cells are not compared: some method lacks them.")
        if not whole.any():
            continue
        try:
            found = compare_methods(defined[whole], by="label", match=cell, cluster=("model", "task"), correction="none",
                                    better="higher" if measure.better == "higher" else "lower")  # fmt: skip
        except OptionError as error:
            notes.append(f"{measure.label}: methods are not compared: {error}.")
            continue
        parts.append(found.assign(measure=f"|1 − {measure.label}| ↓" if measure.better == "near 1" else measure.title))
    if not parts:
        return None, notes
    found = pd.concat(parts, ignore_index=True)
    if (units := int(found.units.min())) < 6:
        notes.append(
            f"With {units} {'cluster' if units == 1 else 'clusters'} (a model and a task each) no p can be below "
            f"{2.0 ** (1 - units):.3g}, whatever the methods do: this grid is too small to show a difference at 0.05."
        )
    return found.assign(p_adjusted=adjusted(found.p.to_numpy(), "holm")), notes


def pairs_text(compared: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(caption, table of texts) of what `compare_measures` gives."""
    number = lambda x: "" if np.isnan(x) else f"{x:.3g}"  # noqa: E731
    ends = zip(compared.low, compared.high, strict=True)
    caption = (
        "Methods in pairs. Difference: first minus second; BCa interval at 95 % over clusters (a model and a task each, seeds "
        f"averaged), not adjusted; p: sign-flip test; by Holm: over these {len(compared)} rows; won: share of cells in which the "
        "first is better, ties counting half."
    )  # fmt: skip
    return caption, pd.DataFrame({
        "measure": compared.measure, "first": compared["first"], "second": compared.second,
        "cells (clusters)": [f"{n} ({units})" for n, units in zip(compared.n, compared.units, strict=True)],
        "mean, first": compared.mean_first.map(number),
        "mean, second": compared.mean_second.map(number), "difference": compared.difference.map(number),
        "95 % interval": [f"{number(low)} to {number(high)}" if low <= high else "" for low, high in ends],
        "p": compared.p.map(number), "p by Holm": compared.p_adjusted.map(number), "won": compared.won.map("{:.0%}".format),
    })  # fmt: skip


def means_text(table: pd.DataFrame, measures: Sequence[Measure]) -> tuple[str, pd.DataFrame]:
    """(caption, table of texts): a row for each model, task, question and method with means over seeds.

    Beside a mean stands how far seeds are apart: the 95 % BCa interval from 5 seeds on, with fewer the least and the greatest.
    """
    rows, most = [], 0
    for (model, task, question), group in table.groupby(["model", "task", "question"], sort=False):
        methods = dict(list(group.groupby("label", sort=False)))
        bests = {m.name: min(_badness(m, part[m.name]) for part in methods.values()) for m in measures}
        for label, part in methods.items():
            most, row = (
                max(most, len(part)),
                {"model": model, "task": task, "question": question, "method": label, "seeds": len(part)},
            )
            for m in measures:
                best = len(methods) > 1 and _badness(m, part[m.name]) == bests[m.name] < np.inf
                row[m.title] = _spread(part[m.name].to_numpy(np.float64)) + (" *" if best else "")
            rows.append(row)
    found = pd.DataFrame(rows)
    apart = "the 95 % BCa interval over seeds" if most >= ENOUGH_SEEDS else "the least and the greatest of the seeds"
    if most >= ENOUGH_SEEDS > found.seeds.min():
        apart += f" (with fewer than {ENOUGH_SEEDS}: the least and the greatest)"
    said = [f"Means over seeds, and {apart}" if most > 1 else "One seed each", "↑ higher is better, ↓ lower is better"]
    said += (
        ["* the best of its model and task"] if any("*" in text for m in measures for text in found[m.title]) else []
    )
    return "; ".join(said) + ".", found if found.question.any() else found.drop(columns="question")


def means_figure(table: pd.DataFrame, measures: Sequence[Measure]) -> go.Figure:
    """A panel for each measure: models and tasks down, methods side by side; a dot for each seed, a bar for their mean."""
    groups = list(dict.fromkeys(zip(table.model, table.task, table.question, strict=True)))
    labels, columns = list(dict.fromkeys(table.label)), 3
    n_rows = -(-len(measures) // columns)
    figure = make_subplots(n_rows, columns, shared_yaxes=True, subplot_titles=[m.title for m in measures],
                           horizontal_spacing=0.03,
                           vertical_spacing=0.36 / n_rows)  # fmt: skip
    for j, label in enumerate(labels):
        colour, symbol = _COLOURS[j % len(_COLOURS)], _SYMBOLS[j // len(_COLOURS) % len(_SYMBOLS)]
        part = table[table.label == label]
        rows = [groups.index(key) for key in zip(part.model, part.task, part.question, strict=True)]
        y = np.array(rows, float) + 0.6 * ((j + 0.5) / len(labels) - 0.5)
        for i, m in enumerate(measures):
            place = {"row": i // columns + 1, "col": i % columns + 1}
            mean = part.assign(y=y).groupby("y")[m.name].mean()
            figure.add_scatter(x=part[m.name], y=y, mode="markers", name=drawn_text(label), legendgroup=label, showlegend=i == 0,
                               marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.55},
                               customdata=part.seed, hovertemplate="%{x:.4g}, seed %{customdata}", **place)  # fmt: skip
            figure.add_scatter(x=mean, y=mean.index, mode="markers", legendgroup=label, showlegend=False, hoverinfo="skip",
                               marker={"symbol": "line-ns", "size": 14, "line": {"color": colour, "width": 2.5}},
                               **place)  # fmt: skip
    for i, m in enumerate(measures):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        if m.better == "near 1":
            figure.add_vline(x=1, line={"color": GREY, "width": 1}, **place)
        figure.update_yaxes(tickmode="array", tickvals=list(range(len(groups))), range=[len(groups) - 0.5, -0.5], zeroline=False,
                            ticktext=[drawn_text(" · ".join(filter(None, key))) for key in groups], **place)  # fmt: skip
    figure = finish(figure, None, height=130 + n_rows * (80 + max(34, 12 * len(labels)) * len(groups)))
    return figure.update_layout(legend={"yref": "container", "y": 1.0, "yanchor": "top"}, margin={"t": 84, "l": 10})


def _badness(measure: Measure, values: pd.Series) -> float:
    """Less is better; infinite for what is not defined, or neither good nor bad."""
    worse = {"higher": -values, "lower": values, "near 1": (1 - values).abs()}.get(measure.better)
    return np.inf if worse is None or worse.isna().any() else float(worse.mean())


def _spread(values: Float[np.ndarray, " seed"]) -> str:
    if not np.isfinite(values).all():
        return "-"
    mean, low, high = values.mean(), values.min(), values.max()
    if len(values) >= ENOUGH_SEEDS:
        mean, low, high = bootstrap_mean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ({low:.3g} to {high:.3g})"
