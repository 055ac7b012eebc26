"""What a latent does to the logits by itself: its decoder row, read through the unembedding (logit lens, "direct effect").

With d the direction that latent i writes into the residual stream per unit of its code, C the subtraction of a vector's mean
over its own entries, and g the weight of the final norm:

    effect_i = C( W_U^T (g * C d_i) )                the inner C only where the final norm centres (LayerNorm, not RMSNorm)

That is what a unit of the code adds to the logits at the end of the stream, up to three things. Not in it: the final norm's
scale, which differs between tokens and divides all effects on one token alike. Taken out: each latent's mean effect over the
vocabulary (the outer C: a centred W_U), which no probability depends on. Not followed: everything later layers make of d, and a
soft-cap of the logits. A model's constant logit scale is in it.

An SAE that does not write in the residual stream is followed to it by the model's own weights: d = w W_O for heads' outputs
side by side (`attn.hook_z`), d = w W_out for neurons (`mlp.hook_post`), and through the weight of a norm behind them where
there is one. Nothing in this is special to SAEs: `direction_effects` reads any directions at such a hook.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, SiteError
from interp.features.sae import SAE
from interp.model.folding import behind
from interp.model.run import canonical
from interp.model.tokens import token_strings
from interp.model.transformer import Transformer
from interp.precision import at_least_float32

_STREAM = r"(blocks\.\d+\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)|hook_(pos_)?embed)"
_ENTRIES = 2**24  # of latents x tokens that are looked at once


@torch.no_grad()
def logit_effects(model: Transformer, sae: SAE, latents: Sequence[int] | None = None, *, k: int = 10) -> pd.DataFrame:
    """The k tokens that each latent promotes most and the k that it suppresses most, by its direct effect on their logits.

    latents: default all. Columns: latent, side ("top" or "bottom"), rank (0: the strongest of its side), token (text), token_id,
    value (logits per unit of the code, times the final norm's scale; see the module for what that is).
    A transcoder is read where it writes. Under a normalisation by token, effects are also up to that token's scale.
    Raises `SiteError` where the SAE writes at a hook whose way to the stream is not known, or has no such latent.
    """
    _check(model, "logit_effects", k)
    chosen = list(range(sae.config.d_sae)) if latents is None else [int(latent) for latent in latents]
    if wrong := [latent for latent in chosen if not 0 <= latent < sae.config.d_sae]:
        raise SiteError(f"the SAE has latents 0 to {sae.config.d_sae - 1}, not {wrong[0]}")
    hook = sae.config.target_hook or sae.config.hook
    if hook is None:
        raise SiteError("this SAE does not say which hook it belongs to, so what it writes is not known")
    follow, width = _way(model, hook)
    if sae.config.out != width:
        raise SiteError(f"the SAE writes {sae.config.out} channels, and {hook} has {width}")

    def written(part: Tensor) -> Tensor:
        rows = at_least_float32(sae.W_dec[part.to(sae.device)]).to(model.device)
        return follow(rows / sae.scale_out.to(rows))  # weights see scaled data; effects are those of the data

    return _table(model, "latent", chosen, written, k)


@torch.no_grad()
def direction_effects(
    model: Transformer, hook: str | None, directions: Float[Tensor, "direction d"], *, k: int = 10
) -> pd.DataFrame:
    """The k tokens that each direction at a hook promotes most and the k that it suppresses most: `logit_effects` without an SAE.

    directions: rows added at the hook, of any length, heads side by side at `attn.hook_z`; a row of zeros has no effect on any
    token. Those of an SNMF are read by `direction_effects(model, snmf.hook, snmf.components_)`, and -components by the other
    side. Columns: direction (row), side ("top" or "bottom"), rank (0: the strongest of its side), token (text), token_id, value
    (logits per unit of the direction as given, times the final norm's scale).
    Raises `SiteError` where the hook's way to the stream is not known, or directions are not as wide as the hook.
    """
    _check(model, "direction_effects", k)
    written = _follow(model, hook, directions)
    return _table(model, "direction", list(range(len(directions))), written, k)


@torch.no_grad()
def token_effects(
    model: Transformer, hook: str | None, directions: Float[Tensor, "direction d"], tokens: Sequence[int]
) -> Float[Tensor, "direction token"]:
    """The direct effect of each direction on the logits of these tokens, in units of `direction_effects`' values.

    Raises `SiteError` as `direction_effects` does, `OptionError` for a token that there is not.
    """
    _check(model, "token_effects", 1)
    if wrong := [token for token in tokens if not 0 <= token < model.W_U.shape[1]]:
        raise OptionError(f"{model.cfg.name} has tokens 0 to {model.W_U.shape[1] - 1}, not {wrong[0]}")
    follow = _follow(model, hook, directions)
    chosen = torch.tensor(list(tokens), dtype=torch.int64, device=model.device)
    parts = torch.arange(len(directions)).split(max(1, _ENTRIES // model.W_U.shape[1]))
    return torch.cat([_effects(model, follow(part))[:, chosen] for part in parts])


def _follow(
    model: Transformer, hook: str | None, directions: Float[Tensor, "direction d"]
) -> Callable[[Tensor], Tensor]:
    """What some of the directions write into the stream."""
    if hook is None:
        raise SiteError("these directions belong to no hook, so what they write is not known")
    way, width = _way(model, hook)
    if directions.shape[1] != width:
        raise SiteError(f"the directions have {directions.shape[1]} channels, and {hook} has {width}")
    return lambda part: way(at_least_float32(directions[part.to(directions.device)]).to(model.device))


def _check(model: Transformer, what: str, k: int) -> None:
    canonical(model, what)
    vocabulary = model.W_U.shape[1]
    if not 1 <= k <= vocabulary:
        raise OptionError(f"cannot show {k} of {vocabulary} tokens")


def _table(
    model: Transformer, name: str, chosen: list[int], written: Callable[[Int[Tensor, " part"]], Float[Tensor, "part d_model"]],
    k: int,
) -> pd.DataFrame:  # fmt: skip
    """Both sides of each of the chosen rows, some at a time: rows x vocabulary may not fit."""
    values, ids = [], []
    for part in torch.tensor(chosen, dtype=torch.int64).split(max(1, _ENTRIES // model.W_U.shape[1])):
        effects = _effects(model, written(part))
        found = [effects.topk(k, largest=largest) for largest in (True, False)]
        values.append(torch.cat([side.values for side in found], 1).cpu())
        ids.append(torch.cat([side.indices for side in found], 1).cpu())
    token_id = torch.cat(ids).flatten()
    present, place = token_id.unique(return_inverse=True)
    texts = token_strings(model.tokenizer, present.tolist())
    return pd.DataFrame(
        {
            name: np.repeat(np.array(chosen, dtype=np.int64), 2 * k),
            "side": np.tile(np.repeat(np.array(["top", "bottom"], dtype=object), k), len(chosen)),
            "rank": np.tile(np.arange(k), 2 * len(chosen)),
            "token": np.array(texts, dtype=object)[place.numpy()],
            "token_id": token_id.numpy(),
            "value": torch.cat(values).flatten().numpy(),
        }
    )


def _effects(model: Transformer, written: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent d_vocab"]:
    effects = behind(model.ln_final, written) @ at_least_float32(model.W_U) * model.cfg.logit_scale
    return effects - effects.mean(1, keepdim=True)


def _way(model: Transformer, hook: str) -> tuple[Callable[[Float[Tensor, "row d"]], Float[Tensor, "row d_model"]], int]:
    """(a function from what is written at a hook to what reaches the residual stream, the hook's width)."""
    cfg = model.cfg
    if hook not in model.hook_dict:
        raise SiteError(f"{cfg.name} has no hook point {hook!r}")
    norm = None
    if re.fullmatch(_STREAM, hook):
        weight, width = None, cfg.d_model
    elif match := re.fullmatch(r"blocks\.(\d+)\.(attn\.hook_z|mlp\.hook_post)", hook):
        block = model.blocks[int(match[1])]
        heads = match[2] == "attn.hook_z"
        weight = at_least_float32(block.attn.W_O.flatten(0, 1) if heads else block.mlp.W_out)
        width = len(weight)
        if cfg.post_norm:
            norm = block.ln1_post if heads else block.ln2_post
    else:
        raise SiteError(
            f"what is written at {hook} reaches the residual stream in no fixed way: direct effects are known for the stream "
            "itself, attn_out, mlp_out, attn.hook_z and mlp.hook_post"
        )

    def follow(rows: Tensor) -> Tensor:
        if weight is not None:
            rows = rows.to(weight.dtype) @ weight
        rows = behind(norm, rows)
        return rows.to(at_least_float32(model.W_U).dtype)

    return follow, width
