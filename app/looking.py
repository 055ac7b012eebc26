"""What the pages Prompt and Patch compute, cached by plain values under the model's lock (see `app.compute`)."""

import numpy as np
import pandas as pd
import torch
import xarray as xr

from app.behaviour import Behaviour
from app.compute import cached
from app.locked import locked_model
from app.selection import Cell, parse_cell
from interp import activation_patching, attribution, logit_lens, token_relevance
from interp.directions import BASES, SIDES
from interp.errors import SiteError, TaskError, one_of
from interp.grids import make_grid
from interp.interventions import Patch, PatchedRuns
from interp.metrics import METRICS
from interp.model.run import logits_at, record
from interp.sites import get_site
from interp.sweep import SweepPlan

SMALL = 1e11  # operations that a page waits for: some seconds on one core
UNITS = ("head", "kv_head")
MAX_K = 50


def pair_of(behaviour: Behaviour, model, prompt: int):
    """The pairs with this one alone; `TaskError` if there is no such pair."""
    pairs = behaviour.pairs(model)
    if not 0 <= prompt < len(pairs):
        raise TaskError(f"there is no pair {prompt}: this behaviour has {len(pairs)}")
    return pairs.take([prompt])


@cached
def pair(behaviour: Behaviour, prompt: int) -> dict[str, list[str]]:
    """Token texts of one pair: {"clean": [text], "corrupt": [text], "answers": [text], "wrong": [text]}."""
    with locked_model(behaviour.model).use() as model:
        one = pair_of(behaviour, model, prompt)
        n = int(one.lengths[0])
        ids = {side: one.tokens(side)[0, :n] for side in SIDES} | {"answers": one.answers, "wrong": one.wrong_answers}
        return {k: [] if v is None else model.to_str_tokens(v[v >= 0]) for k, v in ids.items()}


@cached
def next_tokens(behaviour: Behaviour, prompt: int, k: int = 10) -> pd.DataFrame:
    """The k likeliest next tokens of a pair and its answers: probability after either prompt, and clean - corrupt."""
    with locked_model(behaviour.model).use() as model:
        one = pair_of(behaviour, model, prompt)
        runs = {side: logits_at(model, one.tokens(side), one.read_at, one.hooks(side))[0] for side in SIDES}
        return _table(model, one, runs, k, added="clean − corrupt")


@cached
def lens(behaviour: Behaviour, run: str, metric: str) -> xr.DataArray:
    """The logit lens of the pairs: metric of the stream after so many layers, [prompt, layer, position]."""
    with locked_model(behaviour.model).use() as model:
        return logit_lens(model, behaviour.pairs(model), run=run, metric=metric).assign_attrs(site="resid_pre")


@cached
def lens_tokens(behaviour: Behaviour, prompt: int, run: str) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token of the stream after so many layers and its probability: texts and shares [layer, position]."""
    with locked_model(behaviour.model).use() as model:
        one = pair_of(behaviour, model, prompt)
        texts, shares = [], []
        for stream in _streams(model, one, run):
            best = model.unembed_resid(stream).float().softmax(-1).max(-1)
            texts.append(model.to_str_tokens(best.indices))
            shares.append(best.values.cpu().numpy())
        return np.array(texts, dtype=object), np.stack(shares)


@cached
def decoded(behaviour: Behaviour, prompt: int, run: str, layer: int, position: int, k: int = 10) -> pd.DataFrame:
    """The k likeliest tokens of the stream after `layer` layers at a position, and the answers: probability, rank, role."""
    with locked_model(behaviour.model).use() as model:
        one = pair_of(behaviour, model, prompt)
        if not 0 <= layer <= model.cfg.n_layers:
            raise SiteError(f"the stream can be read after 0 to {model.cfg.n_layers} layers, not after {layer}")
        if not 0 <= position < int(one.lengths[0]):
            raise SiteError(f"position {position} is outside prompt {prompt} ({int(one.lengths[0])} tokens)")
        stream = _streams(model, one, run, layer)[0][position]
        table = _table(model, one, {"probability": model.unembed_resid(stream)}, k)
        return table


@torch.no_grad()
def _streams(model, one, run: str, layer: int | None = None) -> list[torch.Tensor]:
    """Residual stream [position, d_model] of one pair's run after each number of layers, or after this many."""
    one_of(run, SIDES, "run")
    last = model.cfg.n_layers
    wanted = range(last + 1) if layer is None else [layer]
    names = [f"blocks.{i}.hook_resid_pre" if i < last else f"blocks.{i - 1}.hook_resid_post" for i in wanted]
    n = int(one.lengths[0])
    values = record(model, one.tokens(run)[:, :n], names)
    return [values[name][0] for name in names]


@cached
def relevance(behaviour: Behaviour, run: str, metric: str) -> xr.DataArray:
    """What each token adds to the metric of the run, by one backward pass: [prompt, position]."""
    with locked_model(behaviour.model).use() as model:
        return token_relevance(model, behaviour.pairs(model), run=run, metric=metric)


@cached
def patterns(behaviour: Behaviour, prompt: int, run: str, layer: int) -> np.ndarray:
    """Attention patterns of a layer on one prompt: [head, query, key]."""
    with locked_model(behaviour.model).use() as model:
        one_of(run, SIDES, "run")
        if not 0 <= layer < model.cfg.n_layers:
            raise SiteError(f"{model.cfg.name} has no layer {layer}: it has {model.cfg.n_layers}")
        one = pair_of(behaviour, model, prompt)
        hook = get_site("pattern", model.cfg).hook(layer)
        return record(model, one.tokens(run)[:, : int(one.lengths[0])], [hook])[hook][0].float().cpu().numpy()


# --------------------------------------------------------------------------------------------------- patching


def positions_of(site: str, cfg) -> str:
    """Heads are patched at all positions at once: one number for each, and what is inspected is what the map shows."""
    return "all" if get_site(site, cfg).unit in UNITS else "each"


@cached
def flops(behaviour: Behaviour, site: str) -> float:
    """Operations that `exact_map` of this site takes, as the sweep plans them; nothing is run."""
    with locked_model(behaviour.model).use() as model:
        pairs = behaviour.pairs(model)
        places = make_grid(site, pairs, model.cfg, positions=positions_of(site, model.cfg)).interventions()
        return SweepPlan.of(model, [pairs], list(places)).flops


@cached
def exact_map(behaviour: Behaviour, site: str, metric: str, direction: str) -> xr.DataArray:
    """Exact effects [prompt, layer, position], or [prompt, layer, head] with all positions patched."""
    with locked_model(behaviour.model).use() as model:
        return activation_patching(model, behaviour.pairs(model), site, metric=metric, direction=direction,
                                   positions=positions_of(site, model.cfg))  # fmt: skip


@cached
def rough_map(behaviour: Behaviour, site: str, metric: str, direction: str, rules: str) -> xr.DataArray:
    """The same from one backward pass by these rules."""
    with locked_model(behaviour.model).use() as model:
        return attribution(model, behaviour.pairs(model), site, metric=metric, direction=direction, rules=rules,
                           positions=positions_of(site, model.cfg))  # fmt: skip


@cached
def patched_tokens(
    behaviour: Behaviour, places: tuple[str, ...], direction: str, prompt: int, k: int = 8
) -> pd.DataFrame:
    """The k likeliest next tokens of a pair with one place patched, beside those of the clean and the corrupt run.

    places: one or two cells of a map, as `app.selection.Cell` writes them, each patched by itself: columns "patched" and
    "pinned". Raises `SiteError` for one that this model or prompt lacks.
    """
    one_of(direction, ("denoise", "noise"), "direction")
    with locked_model(behaviour.model).use() as model:
        one = pair_of(behaviour, model, prompt)
        patches = [patch_of(place, model.cfg, int(one.lengths[0])) for place in places]
        runs = PatchedRuns(
            model, one, base=BASES[direction][0], sites={p.site for p in patches}, layers={p.layer for p in patches}
        )
        logits = {side: runs.plain(side)[0] for side in SIDES}
        logits |= {name: runs.patched((patch,))[0] for name, patch in zip(("patched", "pinned"), patches, strict=False)}
        return _table(model, one, logits, k)


def patch_of(place: str, cfg, length: int) -> Patch:
    """The patch that a cell's name stands for, checked against the model's sizes and the prompt's length."""
    cell = parse_cell(place)
    if cell is None:
        raise SiteError(f"{place!r} is not a cell of a map")
    units = get_site(cell.site, cfg).n_units(cfg)
    if cell.layer >= cfg.n_layers:
        raise SiteError(f"{cfg.name} has no layer {cell.layer}: it has {cfg.n_layers}")
    if cell.unit is not None and (units is None or cell.unit >= units):
        raise SiteError(f"{cell.site} of {cfg.name} has no unit {cell.unit}")
    if cell.position is not None and cell.position >= length:
        raise SiteError(f"position {cell.position} is outside this prompt ({length} tokens): choose another pair")
    return Patch(cell.site, cell.layer, cell.unit, cell.position)


def effect_at(effects: xr.DataArray, place: str | None) -> np.ndarray | None:
    """Each prompt's effect [prompt] at a cell; None if these effects have no such cell."""
    cell, unit = parse_cell(place), next((d for d in effects.dims if d in UNITS), None)
    if cell is None or cell.site != effects.attrs.get("site"):
        return None
    axis, at = ("position", cell.position) if unit is None else (unit, cell.unit)
    if at is None or axis not in effects.dims or cell.layer >= effects.sizes["layer"] or at >= effects.sizes[axis]:
        return None
    return effects.isel(layer=cell.layer, **{axis: at}).values


def marks(array: xr.DataArray, **places: str | None) -> dict[tuple[int, int], str]:
    """(row, column) of the cells of a map [layer, position or head] that these places name.

    marks(mean, selected="mlp_out@2@7", pinned=None) is {(2, 7): "selected"}.
    """
    found = {}
    for kind, place in places.items():
        if effect_at(array.expand_dims("prompt"), place) is not None:
            cell = parse_cell(place)
            found[cell.layer, cell.position if cell.unit is None else cell.unit] = kind
    return found


def lens_place(place: str | None, n_layers: int) -> str | None:
    """A cell of the lens map under the name that it has on other pages: after the last layer, the stream is resid_post."""
    cell = parse_cell(place)
    if cell is None or cell.layer < n_layers:
        return place
    return str(Cell("resid_post", n_layers - 1, position=cell.position))


def lens_cell(place: str | None, n_layers: int, n_positions: int) -> tuple[int, int] | None:
    """(layers read, position) of a place in the residual stream; None for any other place, or one out of reach."""
    cell = parse_cell(place)
    if cell is None or cell.position is None or cell.site not in ("resid_pre", "resid_post"):
        return None
    layer = cell.layer + (cell.site == "resid_post")
    return (layer, cell.position) if layer <= n_layers and cell.position < n_positions else None


def _table(model, one, logits: dict[str, torch.Tensor], k: int, added: str | None = None) -> pd.DataFrame:
    """A row for each of the k likeliest tokens of these runs together, and each answer: text, role, probabilities, rank."""
    k = min(max(int(k), 1), MAX_K)
    shares = {name: row.float().softmax(-1) for name, row in logits.items()}
    right = one.answers[one.answers >= 0].tolist()
    wrong = [] if one.wrong_answers is None else one.wrong_answers[one.wrong_answers >= 0].tolist()
    best = torch.stack(list(shares.values())).amax(0).topk(min(k, len(next(iter(shares.values()))))).indices.tolist()
    ids = list(dict.fromkeys([*best, *right[:k], *wrong[:k]]))
    role = [("answer" if i in right else "wrong answer" if i in wrong else "") for i in ids]
    table = pd.DataFrame({"token": model.to_str_tokens(torch.tensor(ids)), "role": role})
    for name, row in shares.items():
        table[name] = row[ids].cpu().numpy().astype(np.float64)
    if added:
        table[added] = table["clean"] - table["corrupt"]
    first = next(iter(shares))
    if len(shares) == 1:
        table["rank"] = [int((shares[first] > shares[first][i]).sum()) + 1 for i in ids]
    return table.sort_values(first, ascending=False, ignore_index=True)


def metric_names(has_wrong: bool) -> list[str]:
    """Metrics that these pairs can be scored by, logit_diff first where there are wrong answers."""
    names = [name for name, metric in METRICS.items() if has_wrong or "wrong_answers" not in metric.needs]
    return sorted(names, key=lambda name: name != "logit_diff")
