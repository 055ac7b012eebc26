"""Sparse autoencoders inside the model: what they leave out kept as an error term, latents changed at will.

At its hook an SAE splits an activation in two, a = xhat + e. With the error kept, the model computes what it did, bit
for bit, until a latent is changed; then the activation moves by the change of the code alone:

    a' = a + sum_i (f'_i - f_i) w_i

Without it, the model sees xhat: what the dictionary is worth to it. A transcoder reads one hook and writes another (MLP in, MLP
out), and everything is said of the place that it writes.

    with spliced(model, {"blocks.2.hook_resid_post": sae}, edits=[Edit(17, 0.0)]):
        logits = model(prompt)                                   # latent 17 ablated wherever it fires
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError, one_of
from interp.features.sae import SAE
from interp.model.run import Hooks, config_of

MODES = ("set", "add", "scale")


@dataclass(frozen=True)
class Edit:
    """What becomes of a latent's code: mode "set" to a value (0 ablates it), "add" a value, "scale" it by one.

    hook: the SAE's, where several are spliced. only_active: leave tokens alone where it does not fire.
    """

    latent: int
    value: float
    mode: Literal["set", "add", "scale"] = "set"
    hook: str | None = None
    only_active: bool = False

    def __post_init__(self) -> None:
        one_of(self.mode, MODES, "way to edit a latent")

    def __call__(self, f: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """The latent's new codes."""
        new = {"set": torch.full_like(f, self.value), "add": f + self.value, "scale": f * self.value}[self.mode]
        return torch.where(f != 0, new, f) if self.only_active else new


def splice_hooks(
    model, saes: Mapping[str, SAE] | SAE, *, edits: Sequence[Edit] = (), error: Literal["keep", "drop"] = "keep",
    where: Bool[Tensor, "batch position"] | None = None,
) -> Hooks:  # fmt: skip
    """Forward hooks that put SAEs into a run; see `spliced`."""
    one_of(error, ("keep", "drop"), "treatment of the error term")
    saes = place_saes(model, saes)
    assigned: dict[str, list[Edit]] = {hook: [] for hook in saes}
    for edit in edits:
        hook = edit.hook or (next(iter(saes)) if len(saes) == 1 else None)
        if hook not in saes:
            named = "names no hook" if hook is None else f"is for {hook!r}"
            raise SiteError(f"the edit of latent {edit.latent} {named}, and SAEs are at {', '.join(saes)}")
        if not 0 <= edit.latent < saes[hook].config.d_sae:
            raise SiteError(f"the SAE at {hook} has latents 0 to {saes[hook].config.d_sae - 1}, not {edit.latent}")
        assigned[hook].append(edit)
    hooks: list[tuple[str, Any]] = []
    for hook, sae in saes.items():
        hooks += _hooks(hook, sae, assigned[hook], error == "keep", where)
    return hooks


@contextmanager
def spliced(
    model, saes: Mapping[str, SAE] | SAE, *, edits: Sequence[Edit] = (), error: Literal["keep", "drop"] = "keep",
    where: Bool[Tensor, "batch position"] | None = None,
) -> Iterator:  # fmt: skip
    """The model with SAEs at their hooks, for the runs inside the `with`.

    saes: by hook name, or one with its own `config.hook`. edits: what happens to latents. error: "keep" a - xhat, or "drop" it.
    where: tokens that SAEs act on (default: all); others pass as they are.
    Raises `SiteError` where a hook, a width or a latent does not exist.
    """
    with model.hooks(fwd_hooks=list(splice_hooks(model, saes, edits=edits, error=error, where=where))):
        yield model


def place_saes(model, saes: Mapping[str, SAE] | SAE) -> dict[str, SAE]:
    """SAEs by the hook that they read. Raises `SiteError` where the model has no such hook."""
    if isinstance(saes, SAE):
        if saes.config.hook is None:
            raise SiteError("this SAE does not say which hook it belongs to: give {hook: sae}")
        saes = {saes.config.hook: saes}
    if not saes:
        raise OptionError("there is no SAE to put into the model")
    for hook, sae in saes.items():
        for place in (hook, sae.config.target_hook):
            if place is not None and place not in model.hook_dict:
                raise SiteError(f"{config_of(model).name} has no hook point {place!r}")
    return dict(saes)


def change_of(
    sae: SAE, f: Float[Tensor, "token latent"], x: Float[Tensor, "token d_in"], latents: Int[Tensor, " edited"],
    new: Float[Tensor, "token edited"],
) -> Float[Tensor, "token d_out"]:  # fmt: skip
    """sum_i (f'_i - f_i) w_i over some latents, in the scale of the data."""
    factor = sae.normalize(x)[1][0]
    return (new - f[:, latents]) @ sae.W_dec[latents] * factor


def _hooks(hook: str, sae: SAE, edits: list[Edit], keep: bool, where: Tensor | None) -> list[tuple[str, Any]]:
    seen: dict[str, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen["x"] = value

    def write(value: Tensor, hook: Any) -> Tensor:
        if sae.config.target_hook is not None and "x" not in seen:
            raise SiteError(f"the model reaches {hook.name}, which a transcoder writes, before what it reads")
        x = seen.pop("x", value)
        tokens = value.shape[:2]
        x = x.flatten(2).flatten(0, 1).to(sae.dtype)
        if x.shape[1] != sae.config.d_in:
            raise SiteError(f"the SAE reads {sae.config.d_in} channels, and {hook.name} has {x.shape[1]}")
        old = value.flatten(2).flatten(0, 1)
        if old.shape[1] != sae.config.out:
            raise SiteError(f"the SAE writes {sae.config.out} channels, and {hook.name} has {old.shape[1]}")
        if where is not None and where.shape != tokens:
            raise OptionError(f"where is {list(where.shape)} [batch, position], and the prompts are {list(tokens)}")
        codes = sae.codes(x)
        if keep and not edits:
            return value
        new = old if keep else sae.reconstruct(x, codes).to(old.dtype)
        if edits:
            f = codes.dense()
            latents = torch.tensor(list(dict.fromkeys(edit.latent for edit in edits)), device=f.device)
            column = {int(latent): i for i, latent in enumerate(latents.tolist())}
            changed = f[:, latents].clone()
            for edit in edits:
                changed[:, column[edit.latent]] = edit(changed[:, column[edit.latent]])
            new = new + change_of(sae, f, x, latents, changed).to(old.dtype)
        if where is not None:
            new = torch.where(where.to(new.device).flatten()[:, None], new, old)
        return new.unflatten(0, tokens).reshape(value.shape)

    if sae.config.target_hook is None:
        return [(hook, write)]
    return [(hook, read), (sae.config.target_hook, write)]
