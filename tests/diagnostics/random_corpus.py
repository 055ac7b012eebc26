"""Sequences of random words for the tiny models, of unequal lengths, with something else behind their ends."""

import torch

from interp.features.sources import Corpus

LENGTHS = (9, 5, 2, 7)


def random_corpus(lengths: tuple[int, ...] = LENGTHS, *, fill: int = 33, seed: int = 0) -> Corpus:
    tokens = torch.randint(4, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Corpus(torch.where(there, tokens, fill), torch.tensor(lengths), "random words")
