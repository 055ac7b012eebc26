"""Does an MLP amplify or erase what heads bring? MLP outputs regressed on head outputs, with an intercept per task.

In factual recall (Lv et al. 2403.19521) heads move the topic to the last token, and MLPs scale what heads wrote and add a part
that belongs to the task ("say the capital of it"). At the last token of prompt p, for each layer by itself,

    mlp_out[p, i] = sum_h c_h head_h[p, i] + c_r resid[p, i] + b_task(p)[i] + e[p, i]

The scalars c are shared by all channels i and all prompts, b is a vector of d_model for each task. c_h > 0: the MLP writes more
of what head h wrote (amplifies); c_h < 0: it takes it back (erases). Which regressors the paper took is not said; here heads
are of the same layer, z W_O as they enter the stream (behind a post-norm: at its scale in the run), and resid is resid_pre,
before attention, so that regressors do not contain one another. The MLP reads all of it through its norm, whose scale is left
in c.

Ridge in closed form. The intercepts are not penalised, so they drop out when each task's mean is taken off:

    (G + lambda I) c = g,   G_rs = sum over p, i of x_r x_s,   g_r = sum over p, i of x_r y,   lambda = ridge * mean diagonal of G

and b_task = mean y - sum c mean x. A regression is no proof of cause: heads that go together share a coefficient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, TaskError
from interp.model.run import canonical
from interp.model.tokens import ids_of, pad, pad_id
from interp.model.transformer import Transformer
from interp.plots import GREY, SCALE, finish

Written = Float[Tensor, "prompt layer head d_model"]
Stream = Float[Tensor, "prompt layer d_model"]


@dataclass
class _Sums:
    """Everything that a fit and its R^2 need, summed over prompts and channels, in float64."""

    xx: Float[Tensor, "source source"]
    xy: Float[Tensor, " source"]
    yy: float
    x: Float[Tensor, "task source d_model"]
    y: Float[Tensor, "task d_model"]
    n: Float[Tensor, " task"]

    @classmethod
    def empty(cls, n_tasks: int, n_sources: int, d_model: int, device: torch.device) -> "_Sums":
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(zeros(n_sources, n_sources), zeros(n_sources), 0.0, zeros(n_tasks, n_sources, d_model),
                   zeros(n_tasks, d_model), zeros(n_tasks))  # fmt: skip

    def add(
        self, x: Float[Tensor, "prompt source d_model"], y: Float[Tensor, "prompt d_model"], task: Int[Tensor, " prompt"]
    ) -> None:  # fmt: skip
        self.xx += torch.einsum("pri,psi->rs", x, x)
        self.xy += torch.einsum("pri,pi->r", x, y)
        self.yy += float(y.square().sum())
        self.x.index_add_(0, task, x)
        self.y.index_add_(0, task, y)
        self.n.index_add_(0, task, torch.ones_like(task, dtype=torch.float64))

    def fit(self, ridge: float) -> tuple[Float[Tensor, " source"], Float[Tensor, "task d_model"]]:
        """(c, b) of the module's docstring."""
        n = self.n[:, None]
        mean = self.x / n[..., None]
        gram = self.xx - torch.einsum("tri,tsi->rs", self.x, mean)
        right = self.xy - torch.einsum("tri,ti->r", mean, self.y)
        size = float(gram.diagonal().mean())
        penalty = ridge * size if size > 0 else 1.0
        c = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right)
        return c, self.y / n - torch.einsum("r,tri->ti", c, mean)

    def error(self, c: Float[Tensor, " source"], b: Float[Tensor, "task d_model"]) -> float:
        """sum |y - sum c x - b|^2 of these prompts."""
        rest = self.y - torch.einsum("r,tri->ti", c, self.x)
        own = self.yy - 2 * c @ self.xy + c @ self.xx @ c
        return float(own - 2 * (b * rest).sum() + (self.n[:, None] * b.square()).sum())


@torch.no_grad()
def mlp_recall(
    model: Transformer, prompts: Mapping[str, Sequence[str]], *, earlier: bool = False, ridge: float = 1e-3,
    held_out: float = 0.25, seed: int = 0, batch_size: int = 32,
) -> xr.Dataset:  # fmt: skip
    """What each layer's MLP makes of head outputs at the last token, from prompts by task; R^2 on prompts kept apart.

    earlier: heads of all layers up to the MLP's own, and the embedding in the place of resid_pre. ridge: share of the mean
    diagonal of G. held_out: share of each task's prompts, at random by seed. Values:

    coefficient [layer, source_layer, head] (source_layer only with `earlier`; NaN for later layers), resid [layer] (c_r),
    intercept [layer, task, channel] in the stream's unit, r2 [layer] (of held-out prompts, against the mean over all tasks),
    r2_within [layer] (against each task's own mean: what heads and resid tell beyond the task). attrs["mlp_reads_heads"] is
    False where attention and MLP run side by side: heads of the MLP's own layer then did not cause it.

    All layers come from one forward pass per batch. Raises `TaskError` where a task has fewer than three prompts, `OptionError`
    for a ridge that is not positive or a share outside (0, 1).
    """
    canonical(model, "mlp_recall")
    if ridge <= 0 or not 0 < held_out < 1:
        raise OptionError(f"ridge must be positive and held_out a share between 0 and 1, not {ridge} and {held_out}")
    if not prompts:
        raise TaskError("there is no task to look at")
    if short := [name for name, texts in prompts.items() if len(texts) < 3]:
        raise TaskError(f"task {short[0]!r} has {len(prompts[short[0]])} prompts, and a fit and its test need three")
    cfg, device, rng = model.cfg, model.device, np.random.default_rng(seed)
    n_heads, n_layers = cfg.n_heads, cfg.n_layers
    rows = [ids_of(model.tokenizer, text, prepend_bos=cfg.prepend_bos) for texts in prompts.values() for text in texts]
    task = torch.tensor([i for i, texts in enumerate(prompts.values()) for _ in texts], device=device)
    apart = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for i, texts in enumerate(prompts.values()):
        members = (task == i).nonzero()[:, 0].cpu()
        n = min(max(1, round(held_out * len(texts))), len(texts) - 2)
        apart[members[torch.from_numpy(rng.permutation(len(texts))[:n])]] = True
    n_sources = [n_heads * (layer + 1 if earlier else 1) + 1 for layer in range(n_layers)]
    sums = [
        [_Sums.empty(len(prompts), n, cfg.d_model, device) for n in n_sources] for _ in range(2)
    ]  # [held out or not][layer]
    for chunk in torch.arange(len(rows)).split(batch_size):
        heads, resid, mlp = _read(model, [rows[i] for i in chunk.tolist()])
        for layer in range(n_layers):
            of_heads = heads[:, : layer + 1].flatten(1, 2) if earlier else heads[:, layer]
            x = torch.cat([of_heads, resid[:, [0 if earlier else layer]]], 1)
            for kept in (False, True):
                where = apart[chunk] == kept
                sums[kept][layer].add(x[where], mlp[where, layer], task[chunk][where])
    shape = (n_layers, n_layers, n_heads) if earlier else (n_layers, n_heads)
    coefficient = np.full(shape, np.nan)
    resids, intercepts, r2, within = [], [], [], []
    for layer, (train, test) in enumerate(zip(*sums, strict=True)):
        c, b = train.fit(ridge)
        if earlier:
            coefficient[layer, : layer + 1] = c[:-1].unflatten(0, (-1, n_heads)).cpu().numpy()
        else:
            coefficient[layer] = c[:-1].cpu().numpy()
        resids.append(float(c[-1]))
        intercepts.append(b.cpu().numpy())
        none, mean = torch.zeros_like(c), train.y / train.n[:, None]
        overall = (train.y.sum(0) / train.n.sum()).expand_as(mean)
        error = test.error(c, b)
        for scores, base in ((r2, test.error(none, overall)), (within, test.error(none, mean))):
            scores.append(1 - error / base if base > 0 else np.nan)
    dims = ("layer", "source_layer", "head") if earlier else ("layer", "head")
    coords = {"layer": range(n_layers), "head": range(n_heads), "task": list(prompts), "channel": range(cfg.d_model)}
    return xr.Dataset(
        {
            "coefficient": (dims, coefficient), "resid": ("layer", resids), "r2": ("layer", r2), "r2_within": ("layer", within),
            "intercept": (("layer", "task", "channel"), np.stack(intercepts)),
        },
        coords | ({"source_layer": range(n_layers)} if earlier else {}),
        {"model": cfg.name, "ridge": ridge, "n_prompts": len(rows), "n_held_out": int(apart.sum()),
         "mlp_reads_heads": not cfg.parallel},
    )  # fmt: skip


def _read(model: Transformer, rows: list[list[int]]) -> tuple[Written, Stream, Stream]:
    """What heads write at the last token, the stream before each layer and what MLPs write, in float64."""
    cfg = model.cfg
    tokens = pad(rows, pad_id(model.tokenizer)).to(model.device)
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    at = torch.arange(len(rows), device=model.device), last
    values: dict[str, Tensor] = {}
    names = ["hook_resid_pre", "attn.hook_z", "hook_mlp_out", *(["ln1_post.hook_scale"] if cfg.post_norm else [])]
    hooks = [
        (f"blocks.{layer}.{name}", lambda value, hook: values.update({hook.name: value[at].double()}))
        for layer in range(cfg.n_layers)
        for name in names
    ]
    model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    heads = []
    for layer, block in enumerate(model.blocks):
        written = torch.einsum("phe,hed->phd", values[f"blocks.{layer}.attn.hook_z"], block.attn.W_O.double())
        if cfg.post_norm:
            norm = block.ln1_post
            if norm.centred:
                written = written - written.mean(-1, keepdim=True)
            if norm.w is not None:
                written = written * (1 + norm.w if norm.offset else norm.w).double()
            written = written / values[f"blocks.{layer}.ln1_post.hook_scale"][:, None]
        heads.append(written)
    stacked = lambda name: torch.stack([values[f"blocks.{layer}.{name}"] for layer in range(cfg.n_layers)], 1)  # noqa: E731
    return torch.stack(heads, 1), stacked("hook_resid_pre"), stacked("hook_mlp_out")


def recall_plot(recall: xr.Dataset, *, layer: int | None = None, title: str | None = None) -> go.Figure:
    """Coefficients, layer by head: blue amplified by the MLP, red erased. recall: of `mlp_recall`.

    layer: the MLP whose coefficients are drawn, where heads of earlier layers were regressors too (default: the last).
    """
    values = recall["coefficient"]
    if "source_layer" in values.dims:
        layer = recall.sizes["layer"] - 1 if layer is None else layer
        if layer not in recall["layer"]:
            raise OptionError(f"there are layers 0 to {recall.sizes['layer'] - 1}, not {layer}")
        values = values.sel(layer=layer)
    elif layer is not None:
        raise OptionError("heads of the MLP's own layer are in one picture: a layer is for a fit on earlier heads")
    rows, z = values.dims[0], values.values
    limit = float(np.nanmax(np.abs(z))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z, x=values["head"].values, y=values[rows].values, zmin=-limit, zmax=limit, colorscale=SCALE, xgap=1, ygap=1,
            hoverongaps=False, hovertemplate="layer %{y}, head %{x}: %{z:+.3f}<extra></extra>",
            colorbar={"title": {"text": "coefficient<br>blue = amplified", "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(title="head", dtick=1, showgrid=False)
    which = "" if layer is None else f" (for the MLP of layer {layer}, held-out R² {float(recall['r2'][layer]):.2f})"
    figure.update_yaxes(title=f"layer{which}", dtick=1, showgrid=False)
    return finish(figure, title, height=max(310, 170 + 26 * len(z)), plot_bgcolor=GREY)
