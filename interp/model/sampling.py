"""Drawing tokens from a model: temperature, the k likeliest tokens, the nucleus, and how likely what was drawn was.

With z the logits at the last position and T the temperature, a token is drawn from

    p(t) ~ exp(z_t / T)    for t among the k largest, and among the fewest tokens, likeliest first, that hold top_p of the rest

(first k, then the nucleus of what is left, Holtzman et al., 1904.09751; of equally likely tokens those of lowest id stay). How
likely a token was is told under the model itself, log softmax(z): at temperature 1, with no token left out.

Prompts of a batch have equal lengths, and every step is a whole forward pass over the text so far, so that hooks act on all of
it. The random numbers of a step depend on the seed and the batch's shape alone: two runs with one seed differ only by what their
models say.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError
from interp.precision import at_least_float32


@torch.no_grad()
def steps(
    model, ids: Int[Tensor, "batch position"], max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, seed: int = 0, stop_at_eos: bool = True,
) -> Iterator[tuple[Int[Tensor, " batch"], Float[Tensor, "batch d_vocab"], Bool[Tensor, " batch"]]]:  # fmt: skip
    """One position at a time: (tokens drawn, log probabilities of all tokens there, in nats, rows that had not ended before).

    What `sample` puts together; see there.
    """
    if not 0 <= temperature < math.inf:
        raise OptionError(f"a temperature is 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top_k keeps at least 1 token, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top_p is a share of the probability, above 0 and at most 1, not {top_p}")
    ids = ids.to(model.device)
    eos = getattr(model.tokenizer, "eos_token_id", None) if stop_at_eos else None
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(min(max_new_tokens, model.cfg.n_ctx - ids.shape[1])):
        logits = model(ids, read_at=torch.full((len(ids),), ids.shape[1] - 1, device=ids.device))
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            allowed = keep((logits.float() / temperature).softmax(-1), top_k=top_k, top_p=top_p)
            chosen = torch.multinomial(allowed, 1, generator=generator)[:, 0]
        if eos is not None:
            chosen = torch.where(running, chosen, eos)
        yield chosen, at_least_float32(logits).log_softmax(-1), running
        ids = torch.cat([ids, chosen[:, None]], 1)
        if eos is not None:
            running = running & (chosen != eos)
            if not running.any():
                return


def keep(
    probabilities: Float[Tensor, "batch d_vocab"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "batch d_vocab"]:
    """The same with 0 for tokens that may not be drawn; what is left does not sum to 1. Equal ones: the lowest id stays."""
    if top_k is None and (top_p is None or top_p == 1):
        return probabilities
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(sorted_, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None and top_p < 1:
        mass = torch.where(kept, sorted_, 0).double()
        # a token stays while those before it hold less than top_p: the first always does
        kept &= mass.cumsum(-1) - mass < top_p * mass.sum(-1, keepdim=True)
    return torch.where(torch.zeros_like(kept).scatter(-1, order, kept), probabilities, 0)


@torch.no_grad()
def sample(
    model, ids: Int[Tensor, "batch position"], max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, seed: int = 0, stop_at_eos: bool = True,
) -> tuple[Int[Tensor, "batch longer"], Float[Tensor, "batch new"]]:  # fmt: skip
    """(prompts with what was drawn after them, log probability of every drawn token in nats, under the model itself).

    model: a canonical transformer. temperature: 0 takes the likeliest token, whatever top_k and top_p. stop_at_eos: after a row's
    end token it is filled with that token, whose log probability is NaN there, and all ends when every row has ended.
    Fewer tokens than asked for come back where the context ends. Raises `OptionError` for options that are out of range.
    """
    logprobs, tokens = [], [ids.to(model.device)]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_at_eos": stop_at_eos}
    for chosen, logp, running in steps(model, ids, max_new_tokens, **options):
        tokens.append(chosen[:, None])
        logprobs.append(torch.where(running, logp.gather(1, chosen[:, None])[:, 0], math.nan))
    if not logprobs:
        return tokens[0], at_least_float32(torch.empty(len(ids), 0, dtype=model.dtype, device=model.device))
    return torch.cat(tokens, 1), torch.stack(logprobs, 1)
