"""What a model writes with and without steering, side by side.

Every variant continues one prompt with one seed: at each step all draw with the same random numbers, so that texts differ by what
the changes did and not by luck. How likely a text is, is told twice, as mean log probabilities per token:

    (1 / T) sum_t log P(x_t | x_<t)           P of the steered model (where it was drawn), and P of the model left alone

T counts tokens up to the first end token, with it. Both are of the whole distribution, at temperature 1, whatever was drawn with.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, TaskError
from interp.model.run import canonical
from interp.model.sampling import steps
from interp.model.tokens import token_strings
from interp.model.transformer import Transformer
from interp.precision import at_least_float32
from interp.steering.changes import Change, steer

UNSTEERED = "unsteered"


@torch.no_grad()
def side_by_side(
    model: Transformer, prompt: str | Int[Tensor, " position"], changes: Mapping[str, Sequence[Change]], *, n: int = 8,
    max_new_tokens: int = 50, temperature: float = 1.0, top_k: int | None = 30, top_p: float | None = 0.3, seed: int = 0,
    concept_tokens: Sequence[int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """n continuations of a prompt by each variant: first "unsteered", then those of `changes`, by name.

    Drawing options: see `interp.model.sampling.sample`; the defaults are the paper's (2506.10920). concept_tokens: ids whose
    probability is kept for `steering_scores`.
    Columns: name, sample, text (the continuation), ids (its tokens, up to an end token), logprob_steered and logprob_unsteered
    (mean nats per token), and with concept_tokens concept: their summed probability under the steered model, at temperature 1,
    as a mean over the positions of the continuation.
    Raises `OptionError` for options out of range, `TaskError` if the prompt leaves no room.
    """
    canonical(model, "side_by_side")
    if UNSTEERED in changes:
        raise OptionError(f"{UNSTEERED!r} is the model left alone, which is always there: call these changes otherwise")
    if n < 1 or max_new_tokens < 1:
        raise OptionError(f"there is nothing to write: {n} continuations of {max_new_tokens} tokens")
    start = model.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt.to(model.device)
    if not 0 < len(start) < model.cfg.n_ctx:
        raise TaskError(
            f"a prompt of {len(start)} tokens leaves nothing to write: {model.cfg.name} has room for {model.cfg.n_ctx}"
        )
    concept = None if concept_tokens is None else _concept(model, concept_tokens)
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    rows = []
    for name, made in {UNSTEERED: (), **changes}.items():
        with steer(model, made):
            new, logprobs, masses, there = _write(model, start.expand(n, -1), max_new_tokens, drawing, concept)
        alone = _logprobs(model, torch.cat([start.expand(n, -1), new], 1), len(start))
        lengths = there.sum(1)
        for sample, length in enumerate(lengths.tolist()):
            ids = new[sample, :length].tolist()
            row = {
                "name": name, "sample": sample, "text": continuation(model.tokenizer, start.tolist(), ids), "ids": ids,
                "logprob_steered": float(logprobs[sample, :length].double().mean()),
                "logprob_unsteered": float(alone[sample, :length].double().mean()),
            }  # fmt: skip
            if concept is not None:
                row["concept"] = float(masses[sample, :length].double().mean())
            rows.append(row)
    return pd.DataFrame(rows)


def continuation(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text that tokens add to a prompt's: spaces and characters of several tokens as they are in running text."""
    if tokenizer is None:
        return "".join(f" {token}" for token in token_strings(None, ids))
    before, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt, prompt + ids))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


def _concept(model: Transformer, tokens: Sequence[int]) -> Int[Tensor, " concept"]:
    ids = list(dict.fromkeys(int(token) for token in tokens))
    if not ids:
        raise OptionError("there is no concept token")
    vocabulary = model.W_U.shape[1]
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise OptionError(f"{model.cfg.name} has tokens 0 to {vocabulary - 1}, not {wrong[0]}")
    return torch.tensor(ids, device=model.device)


def _write(
    model: Transformer, ids: Int[Tensor, "batch position"], max_new_tokens: int, drawing: dict, concept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, their log probabilities, the concept's probability, whether the row was still running), all [batch, new]."""
    found = []
    for chosen, logp, running in steps(model, ids, max_new_tokens, **drawing):
        # in the steered run itself: a change at the last position is gone from a position once another follows it
        mass = logp.new_zeros(len(ids)) if concept is None else logp[:, concept].exp().sum(1)
        found.append((chosen, logp.gather(1, chosen[:, None])[:, 0], mass, running))
    tokens, logprobs, masses, there = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return tokens, logprobs, masses, there


def _logprobs(model: Transformer, ids: Int[Tensor, "batch position"], start: int) -> Float[Tensor, "batch new"]:
    """Log probability of each token from `start` on."""
    found = []  # row by row: the logits of every position are the largest thing here
    for row in ids:
        logits = at_least_float32(model(row[None, :-1])[0, start - 1 :])
        found.append(logits.log_softmax(-1).gather(1, row[start:, None])[:, 0])
    return torch.stack(found)
