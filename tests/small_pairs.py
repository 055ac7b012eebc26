"""Prompt pairs of random token ids for the tiny models, the sites those models have, and how they refuse."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from interp import PromptPairs
from interp.sites import SITES

NEURONS = ["m0.n3", "m1.n7"]


def small_pairs(
    n: int = 2, length: int = 6, *, differ: Sequence[int] = (2, 3), lengths: Sequence[int] | None = None, seed: int = 0,
    **about,
) -> PromptPairs:  # fmt: skip
    """Pairs whose tokens differ at `differ` in every prompt; ids are above the special tokens'."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(4, 60, (2, n, length), generator=generator)
    corrupt = torch.where(corrupt == clean, clean + 1, corrupt)
    changed = torch.zeros(length, dtype=torch.bool)
    changed[list(differ)] = True
    corrupt = torch.where(changed, corrupt, clean)
    answers = torch.randint(4, 60, (n,), generator=generator)[:, None]
    if lengths is not None:
        padding = torch.arange(length) >= torch.tensor(lengths)[:, None]
        clean, corrupt = clean.masked_fill(padding, 0), corrupt.masked_fill(padding, 0)
        about["lengths"] = torch.tensor(lengths)
    strings = tuple(tuple(f" w{i}" for i in row) for row in clean.tolist())
    if lengths is not None:
        strings = tuple(row[:k] for row, k in zip(strings, lengths, strict=True))
    options = {"wrong_answers": answers + 1, "token_strings": strings, "name": "random", **about}
    return PromptPairs(clean, corrupt, answers, **options)


def with_other_padding(pairs: PromptPairs) -> PromptPairs:
    """The same prompts with other tokens behind their ends."""
    fill = lambda ids, token: torch.where(pairs.is_token, ids, token)  # noqa: E731
    return replace(pairs, clean=fill(pairs.clean, 33), corrupt=fill(pairs.corrupt, 44))


def sites_of(model) -> list[str]:
    """Every site this model has."""
    return [name for name in SITES if not (name == "resid_mid" and model.cfg.parallel)]


@contextlib.contextmanager
def refused(error: type[Exception], says: str) -> Iterator[None]:
    """The block raises `error` saying so; with `--jaxtyping-packages` the type checker may be quicker to refuse."""
    with pytest.raises((error, TypeCheckError)) as caught:
        yield
    assert isinstance(caught.value, TypeCheckError) or re.search(says, str(caught.value)), caught.value
