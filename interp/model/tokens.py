"""Text to token ids and back, for any Hugging Face tokenizer, without its surprises.

Three of them: some tokenizers add a beginning-of-sequence token by themselves, decoding a single token drops its
leading space in sentencepiece vocabularies, and the token of " Mary" depends on what stands before it.
"""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor


def ids_of(tokenizer, text: str, *, prepend_bos: bool) -> list[int]:
    """Token ids of one text, with exactly one beginning-of-sequence token if `prepend_bos`, else none."""
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: pass token ids instead of text")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return [bos, *ids] if prepend_bos and bos is not None else ids


def encode(tokenizer, text: str | list[str], *, prepend_bos: bool) -> Int[Tensor, "batch position"]:
    """Token ids of one or several texts, padded on the right (a causal model never looks there)."""
    rows = [ids_of(tokenizer, t, prepend_bos=prepend_bos) for t in ([text] if isinstance(text, str) else text)]
    return pad(rows, pad_id(tokenizer))


def pad_id(tokenizer) -> int:
    """An id to fill with: the tokenizer's own pad or end token, else 0."""
    for candidate in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if candidate is not None:
            return candidate
    return 0


def pad(rows: list[list[int]], fill: int) -> Int[Tensor, "batch position"]:
    """Rows of unequal length as one tensor, filled on the right."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)


@lru_cache(maxsize=64)
def _anchor(tokenizer) -> tuple[int, str]:
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    return anchor, tokenizer.decode([anchor], clean_up_tokenization_spaces=False)


def token_strings(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, leading space kept: decoded behind an anchor token, whose text is then cut off."""
    if tokenizer is None:
        return [str(i) for i in ids]
    anchor, start = _anchor(tokenizer)
    texts = [tokenizer.decode([anchor, i], clean_up_tokenization_spaces=False) for i in ids]
    return [t[len(start) :] if t.startswith(start) else t for t in texts]


def single_token(tokenizer, text: str) -> int:
    """The id of a text that is one token in running text (" Mary"); ValueError naming the pieces otherwise."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a" + text, add_special_tokens=False)
    ids = ids[len(anchor) :] if ids[: len(anchor)] == anchor else tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens {token_strings(tokenizer, ids)}, not one")
    return ids[0]
