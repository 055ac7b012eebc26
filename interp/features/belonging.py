"""Does a sparse autoencoder belong to this model? What can be told before any of its numbers is believed.

An SAE at the wrong hook, or of another model, still gives codes and a reconstruction; both are noise. Three things give it away:
its widths do not fit, its inputs are not as long as those it was trained on, and it leaves out more than a constant would:

    FVU = sum_t |y_t - yhat_t|^2 / sum_t |y_t - mean y|^2 > 1        (y = x, or what a transcoder is to predict)
"""

import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import SiteError
from interp.features.sae import SAE
from interp.model.run import config_of, record

NORM_FACTOR = 2.0  # mean norms further apart than this are of other activations
_PROMPTS = 8  # run at once


def load_sae(folder: str | Path, model, *, tokens: Int[Tensor, "prompt position"] | None = None) -> SAE:
    """`SAE.load` onto the model's device, and `check_belongs`: raises or warns where the SAE is not this model's."""
    sae = SAE.load(folder, device=model.W_E.device)
    check_belongs(sae, model, tokens)
    return sae


def check_belongs(sae: SAE, model, tokens: Int[Tensor, "prompt position"] | None = None) -> None:
    """Raise where the SAE does not fit the model; warn, in one sentence, where it seems not to belong to it.

    Raises `SiteError` if the SAE names no hook point, or one that the model lacks or that is of another width. Warns if the
    metadata's `model_name` is another; with `tokens` (prompts of one length, without padding; first positions, which are of a
    size of their own, do not count) also if the mean norm of inputs differs from the metadata's `activation_mean_norm` by more
    than a factor of 2, and if FVU > 1, in float64 over all tokens.
    """
    name = config_of(model).name
    _check_places(sae, model, name)
    trained_on = sae.metadata.get("model_name")
    if trained_on is not None and _plain(trained_on) != _plain(name):
        warnings.warn(
            f"this SAE at {sae.config.hook} was trained on {trained_on}, and the model is {name}", stacklevel=2
        )
    if tokens is None or tokens.shape[1] < 2 or not len(tokens):
        return
    norm, fvu = _measured(sae, model, tokens)
    expected = sae.metadata.get("activation_mean_norm")
    if expected and not 1 / NORM_FACTOR <= norm / float(expected) <= NORM_FACTOR:
        warnings.warn(
            f"activations of {name} at {sae.config.hook} have a mean norm of {norm:.3g}, and those that this SAE was trained on "
            f"had {float(expected):.3g}: it belongs elsewhere, or its inputs were scaled",
            stacklevel=2,
        )
    if fvu is not None and not fvu <= 1:  # NaN is no better
        warnings.warn(
            f"this SAE leaves out more than a constant would at {sae.config.hook} of {name} (FVU {fvu:.3g}): "
            "it belongs elsewhere",
            stacklevel=2,
        )


def _plain(name: str) -> str:
    """Names as the hub, SAELens and TransformerLens write them, made comparable: owner and case dropped."""
    name = str(name).rstrip("/").split("/")[-1].lower()
    return "gpt2" if name == "gpt2-small" else name


def _check_places(sae: SAE, model, name: str) -> None:
    config = sae.config
    if config.hook is None:
        raise SiteError("this SAE does not say which hook point it reads: set its config's hook")
    for hook, width, does in ((config.hook, config.d_in, "reads"), (config.target_hook, config.out, "writes")):
        if hook is None:
            continue
        if hook not in model.hook_dict:
            raise SiteError(f"this SAE {does} {hook}, and {name} has no such hook point")
        try:
            value = record(model, torch.zeros(1, 2, dtype=torch.int64, device=model.W_E.device), [hook])[hook]
        except RuntimeError as error:
            raise SiteError(f"this SAE {does} {hook}, and a run of {name} does not pass there: {error}") from None
        there = _rows(value, sae.metadata.get("hook_head_index")).shape[-1]
        if there != width:
            raise SiteError(f"this SAE {does} {width} channels at {hook}, and {name} has {there} there")


def _rows(value: Tensor, head: int | None) -> Float[Tensor, "prompt position d"]:
    """Heads side by side, or the one that the SAE was trained on."""
    return value.flatten(2) if head is None or value.ndim < 4 else value[:, :, head]


@torch.no_grad()
def _measured(sae: SAE, model, tokens: Int[Tensor, "prompt position"]) -> tuple[float, float | None]:
    """(mean norm of inputs, FVU), first positions excluded; no FVU of a transcoder that does not say what it predicts."""
    config, head = sae.config, sae.metadata.get("hook_head_index")
    target = config.target_hook or config.hook
    judged = config.target_hook is not None or not config.transcoder
    n, norms, error, squares, total = 0, 0.0, 0.0, 0.0, torch.zeros(config.out, dtype=torch.float64)
    for chunk in tokens.to(model.W_E.device).split(_PROMPTS):
        values = record(model, chunk, [config.hook, target])
        x, y = (_rows(values[hook], head)[:, 1:].flatten(0, 1) for hook in (config.hook, target))
        n += len(x)
        norms += float(x.cpu().double().norm(dim=1).sum())
        if not judged:
            continue
        y, yhat = (value.cpu().double() for value in (y, sae(x.to(sae.device, sae.dtype))))
        error += float((y - yhat).square().sum())
        squares += float(y.square().sum())
        total += y.sum(0)
    if not judged:
        return norms / n, None
    variance = squares - float(total.square().sum()) / n
    return norms / n, error / variance if variance > 0 else float("inf")
