"""Where activations to train on come from: a model that runs, a cache on disk, a matrix in memory, a generator.

A source is a number of sequences, each giving some rows; it reads any set of sequences, all hooks aligned by row:

    source = ModelSource(model, corpus, ["blocks.2.hook_resid_post", "blocks.2.mlp.hook_post"])
    rows = source.read([4, 0, 7])          # {hook: [row, d]}, and which (sequence, position) each row is

`shuffle.Shuffled` draws batches from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.bundled import bundled_models, bundled_text
from interp.errors import OptionError, SiteError, TaskError
from interp.model.run import config_of, record


@dataclass(frozen=True)
class Rows:
    """Activations of some sequences: rows aligned over hooks, and the (sequence, position) of each."""

    values: dict[str, Float[Tensor, "row _"]]
    ids: Int[Tensor, "row 2"]


@runtime_checkable
class Source(Protocol):
    """What a trainer reads. widths: channels by hook; rows_per_sequence: at most so many; about: kept with what is trained."""

    widths: dict[str, int]
    n_sequences: int
    rows_per_sequence: int
    about: dict

    def read(self, sequences: Sequence[int]) -> Rows:
        """The rows of these sequences, in this order."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Token sequences, padded on the right to one length. lengths: tokens of each that are there."""

    tokens: Int[Tensor, "sequence position"]
    lengths: Int[Tensor, " sequence"]
    name: str = "tokens"

    @classmethod
    def from_texts(cls, model, texts: Sequence[str], *, context: int = 128, name: str = "texts") -> "Corpus":
        """Each text cut into windows of at most `context` tokens, every window with the model's own first token.

        Texts are never joined, so that no beginning-of-text token stands in the middle of a window. Windows of a single
        token, which predict nothing, are dropped.
        """
        texts = [text for text in texts if text]
        if not texts:
            raise TaskError(f"there is no text in {name}")
        context = min(context, model.cfg.n_ctx)
        bos = [model.tokenizer.bos_token_id] if model.cfg.prepend_bos else []
        width = context - len(bos)
        if width < 2:
            raise OptionError(f"a context of {context} tokens holds no two of a text")
        windows = []
        for text in texts:
            # verbose=False: a text longer than the context is fine here
            ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            windows += [bos + ids[at : at + width] for at in range(0, len(ids), width)]
        windows = [window for window in windows if len(window) > 1 + len(bos)]
        if not windows:
            raise TaskError(f"no text in {name} is two tokens long")
        lengths = torch.tensor([len(window) for window in windows])
        tokens = torch.zeros(len(windows), int(lengths.max()), dtype=torch.int64)
        for i, window in enumerate(windows):
            tokens[i, : len(window)] = torch.tensor(window)
        return cls(tokens, lengths, name)

    @classmethod
    def from_file(
        cls, model, path: str | Path | None = None, *, n_texts: int | None = None, context: int = 128
    ) -> "Corpus":
        """The first n_texts (None: all) of a file, see `read_texts`; without a file, of what bundled models were trained on.

        Raises `OptionError` for a model that is not bundled, if there is no file.
        """
        if n_texts is not None and n_texts < 1:
            raise OptionError(f"cannot read {n_texts} texts")
        if path is None and (model.cfg.name not in bundled_models() or bundled_text() is None):
            raise OptionError(f"there is no text for {model.cfg.name}: give a file with the option text")
        path = Path(bundled_text() if path is None else path)
        return cls.from_texts(model, read_texts(path)[:n_texts], context=context, name=path.name)

    def split(self, share: float, *, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """(the rest, about `share` of the sequences at random): what to train on and what to judge by."""
        order = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(seed))
        n = max(1, round(share * len(order)))
        if n >= len(order):
            raise TaskError(f"{self.name} has {len(order)} sequences, too few to keep a share of {share} apart")
        return self.take(order[n:].sort().values), self.take(order[:n].sort().values)

    def take(self, sequences: Int[Tensor, " chosen"]) -> "Corpus":
        """Some of the sequences."""
        return Corpus(self.tokens[sequences], self.lengths[sequences], self.name)

    def mask(self, *, skip_first: bool = True, exclude: Sequence[int] = ()) -> Tensor:
        """[sequence, position], True for tokens that count: there, not of `exclude`, and not first, where `skip_first`.

        First positions have activations of a size of their own in most models, whatever the token.
        """
        counts = torch.arange(self.tokens.shape[1]) < self.lengths[:, None]
        if skip_first:
            counts[:, 0] = False
        if exclude:
            counts &= ~torch.isin(self.tokens, torch.tensor(list(exclude)))
        return counts


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: .txt (paragraphs between empty lines), .json (a list), .jsonl (lines); texts or {"text": ...}.

    Raises `TaskError` naming the file and what is wrong with it.
    """
    import json

    path = Path(path)
    if not path.is_file():
        raise TaskError(f"there is no file {path}")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            texts = [block.strip() for block in content.split("\n\n")]
        elif path.suffix == ".json":
            texts = json.loads(content)
        elif path.suffix == ".jsonl":
            texts = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            raise TaskError(f"cannot read texts from {path}: use .txt, .json or .jsonl")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TaskError(f"{path} is not readable as {path.suffix[1:]}: {error}") from None
    texts = (
        [text.get("text") if isinstance(text, dict) else text for text in texts] if isinstance(texts, list) else None
    )
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise TaskError(f'{path} must hold a list of texts, or of objects with "text"')
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TaskError(f"there is no text in {path}")
    return texts


class ModelSource:
    """Activations of a model at hook points, from one forward pass for all of them.

    Heads' outputs (`hook_z` and other [position, head, d_head] values) come with their heads side by side.
    batch_size: sequences per forward pass. skip_first, exclude: see `Corpus.mask`. Values come in float32.
    """

    def __init__(
        self, model, corpus: Corpus, hooks: Sequence[str], *, batch_size: int = 32, skip_first: bool = True,
        exclude: Sequence[int] = (),
    ):  # fmt: skip
        self.model, self.corpus, self.batch_size = model, corpus, batch_size
        for hook in hooks:
            if hook not in model.hook_dict:
                raise SiteError(f"{config_of(model).name} has no hook point {hook!r}")
        self.mask = corpus.mask(skip_first=skip_first, exclude=exclude)
        if not self.mask.any():
            raise TaskError(f"no token of {corpus.name} is left to train on")
        self.n_sequences, self.rows_per_sequence = len(corpus.tokens), int(self.mask.sum(1).max())
        probe = record(model, corpus.tokens[:1, :1].to(model.device), hooks)
        for hook, value in probe.items():
            if value.shape[:2] != (1, 1):
                raise SiteError(f"{hook} has no activation per token: its shape for one token is {list(value.shape)}")
        self.widths = {hook: probe[hook][0, 0].numel() for hook in hooks}
        self.about = {"model_name": config_of(model).name, "dataset_path": corpus.name, "context_size": corpus.tokens.shape[1],
                      "prepend_bos": bool(model.cfg.prepend_bos), "skip_first": skip_first,
                      "exclude_special_tokens": list(exclude) or False}  # fmt: skip

    def read(self, sequences: Sequence[int]) -> Rows:
        """One forward pass per `batch_size` sequences."""
        sequences = torch.as_tensor(sequences)
        parts: dict[str, list[Tensor]] = {hook: [] for hook in self.widths}
        for chunk in sequences.split(self.batch_size):
            width = int(self.corpus.lengths[chunk].max())
            values = record(
                self.model, self.corpus.tokens[chunk, :width].to(self.model.device), self.widths, copy=False
            )
            counts = self.mask[chunk, :width].to(self.model.device)
            for hook, part in parts.items():
                part.append(values[hook].flatten(2)[counts].float())
        where = self.mask[sequences].nonzero()
        ids = torch.stack([sequences[where[:, 0]], where[:, 1]], 1)
        return Rows({hook: torch.cat(part) for hook, part in parts.items()}, ids)


class ArraySource:
    """Rows that are there already: {name: [row, d]}, one row a sequence."""

    def __init__(self, values: dict[str, Float[Tensor, "row _"]], about: dict | None = None):
        sizes = {name: len(value) for name, value in values.items()}
        if len(set(sizes.values())) != 1 or not next(iter(sizes.values())):
            raise OptionError(f"activations need equally many rows, at least one, and have {sizes}")
        self.values, self.about = values, about or {}
        self.widths = {name: value.shape[1] for name, value in values.items()}
        self.n_sequences, self.rows_per_sequence = next(iter(sizes.values())), 1

    def read(self, sequences: Sequence[int]) -> Rows:
        """A gather."""
        at = torch.as_tensor(sequences)
        return Rows({name: value[at.to(value.device)] for name, value in self.values.items()},
                    torch.stack([at, torch.zeros_like(at)], 1))  # fmt: skip
