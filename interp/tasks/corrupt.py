"""Other ways to corrupt a prompt than swapping its words.

The default, symmetric token replacement, is what the task generators and files bring: a corrupt prompt that is as
natural as the clean one. Where that is impossible these change the *embeddings* of chosen tokens, or borrow tokens from
other prompts. Which tokens: by default those in which clean and corrupt differ; or every occurrence of a text; or a
mask. Zhang & Nanda (2309.16042) show how the choice changes what patching finds; noise takes a model off its
distribution, so prefer replacement.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import TaskError, one_of
from interp.model.tokens import token_strings
from interp.tasks.pairs import PromptPairs

KINDS = {
    "gaussian": "adds normal noise of k x the standard deviation of the prompts' token embeddings",
    "zero": "replaces the embeddings by zero",
    "mean": "replaces the embeddings by the mean embedding of the chosen tokens over all prompts",
    "resample": "replaces the tokens by those of another prompt at the same positions",
}


@torch.no_grad()
def corrupt(
    model, pairs: PromptPairs, kind: Literal["gaussian", "zero", "mean", "resample"], *,
    tokens: str | Bool[Tensor, "prompt position"] | None = None, k: float = 3.0, seed: int = 0,
) -> PromptPairs:  # fmt: skip
    """The same clean prompts and answers with another corruption.

    tokens: which tokens to corrupt; a text names every token that reads so (spaces around it ignored), None means
        those in which the pairs differ now.
    k: noise in standard deviations of the token embeddings, taken over all entries of all prompts' tokens (ROME's
        convention; k = 3 there).
    Raises `TaskError` if a prompt has none of the named tokens, or "resample" finds no other prompt of its length.
    """
    one_of(kind, KINDS, "corruption", TaskError)
    mask = _mask(model, pairs, tokens)
    if bad := (~mask.any(1)).nonzero().flatten().tolist():
        raise TaskError(f"nothing to corrupt in prompts {bad[:5]}: {tokens!r} is not in them" if tokens is not None
                        else f"nothing to corrupt in prompts {bad[:5]}: their clean and corrupt prompts are equal")  # fmt: skip
    about = {"corruption": f"{kind}(k={k:g})" if kind == "gaussian" else kind, "seed": seed}
    generator = torch.Generator().manual_seed(seed)
    if kind == "resample":
        return replace(pairs, corrupt=_borrowed(pairs, mask, generator), embedding_noise=None, noise_mask=None, **about)
    embeddings = _embeddings(model, pairs)
    if kind == "gaussian":
        deviation = embeddings[pairs.is_token].std()
        # drawn on the CPU, so that a seed means the same noise on every device
        noise = torch.randn(embeddings.shape, generator=generator, dtype=torch.float32).to(embeddings)
        embeddings = embeddings + k * deviation * noise
    elif kind == "zero":
        embeddings = torch.zeros_like(embeddings)
    else:
        embeddings = embeddings[mask].mean(0).expand_as(embeddings)
    return replace(pairs, corrupt=pairs.clean, embedding_noise=embeddings, noise_mask=mask, **about)


def _embeddings(model, pairs: PromptPairs) -> Tensor:
    """What `hook_embed` holds on the clean prompts: [prompt, position, d_model]."""
    _, cache = model.run_with_cache(pairs.clean, names_filter=lambda name: name == "hook_embed")
    return cache["hook_embed"]


def _mask(model, pairs: PromptPairs, tokens: str | Tensor | None) -> Tensor:
    if tokens is None:
        return pairs.differs
    if isinstance(tokens, Tensor):
        if tokens.shape != pairs.clean.shape:
            raise TaskError(
                f"the mask is {list(tokens.shape)}, the prompts {list(pairs.clean.shape)} [prompt, position]"
            )
        return tokens.to(pairs.clean.device).bool() & pairs.is_token
    ids = pairs.clean.unique().tolist()
    named = [
        i for i, text in zip(ids, token_strings(model.tokenizer, ids), strict=True) if text.strip() == tokens.strip()
    ]
    return torch.isin(pairs.clean, torch.tensor(named, device=pairs.clean.device, dtype=torch.long)) & pairs.is_token


def _borrowed(pairs: PromptPairs, mask: Tensor, generator: torch.Generator) -> Tensor:
    tokens = pairs.clean.clone()
    for row in range(len(pairs)):
        others = [r for r in range(len(pairs)) if r != row and pairs.lengths[r] == pairs.lengths[row]
                  and not torch.equal(pairs.clean[r][mask[row]], pairs.clean[row][mask[row]])]  # fmt: skip
        if not others:
            raise TaskError(f"no other prompt to borrow tokens from for prompt {row} (same length, other tokens there)")
        donor = others[torch.randint(len(others), (), generator=generator)]
        tokens[row, mask[row]] = pairs.clean[donor, mask[row]]
    return tokens
