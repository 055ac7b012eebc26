"""Prompt pairs: the behaviour a researcher brings, as token ids.

A pair is a clean prompt, a corrupt prompt of the same length in tokens, the answers that are right after the clean one
and, usually, wrong answers to compare with. Prompts of different lengths live in one tensor, padded on the right; a
causal model never looks there, and every prompt is read at its own last token.

    pairs = PromptPairs.from_text(
        model,
        clean=["When Mary and John went to the store, John gave a drink to"],
        corrupt=["When Mary and John went to the store, Mary gave a drink to"],
        answers=[" Mary"], wrong_answers=[" John"],
    )

Answers are written as typed after the prompt, leading space included. Several right answers to one prompt are a list.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError, TaskError, name_some
from interp.model import tokens as tok
from interp.tasks.files import read_columns

Answer = str | int | Sequence[str | int]


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean and corrupt prompts with their answers. `answers` may be given as [prompt] or [prompt, answer].

    lengths: tokens in each prompt before the padding (default: all of them).
    embedding_noise, noise_mask: if set, the corrupt run is the clean prompt with these embeddings at the masked
        positions instead of the tokens' own (see `interp.tasks.corrupt`).
    """

    clean: Int[Tensor, "prompt position"]
    corrupt: Int[Tensor, "prompt position"]
    answers: Int[Tensor, "prompt answer"] | Int[Tensor, " prompt"]  # -1 where a prompt has fewer answers than others
    wrong_answers: Int[Tensor, "prompt wrong"] | Int[Tensor, " prompt"] | None = None
    lengths: Int[Tensor, " prompt"] | None = None
    embedding_noise: Float[Tensor, "prompt position d_model"] | None = None
    noise_mask: Bool[Tensor, "prompt position"] | None = None
    name: str = "pairs"
    corruption: str = "given"
    metric: str = "logit_diff"  # what the task is usually scored with
    seed: int | None = None
    token_strings: tuple[tuple[str, ...], ...] | None = field(default=None, repr=False)  # of the clean prompts

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.clean.ndim != 2 or self.clean.numel() == 0:
            raise TaskError("no prompts: a set of pairs needs at least one prompt of at least one token")
        if self.clean.shape != self.corrupt.shape:
            raise TaskError(
                f"clean prompts are {list(self.clean.shape)} [prompt, position] and corrupt ones "
                f"{list(self.corrupt.shape)}: every pair must have the same number of tokens"
            )
        if self.lengths is None:
            set_("lengths", torch.full((len(self.clean),), self.clean.shape[1], device=self.clean.device))
        for name in ("answers", "wrong_answers"):
            value = getattr(self, name)
            if value is None:
                continue
            set_(name, value[:, None] if value.ndim == 1 else value)
            if len(value) != len(self):
                raise TaskError(f"{len(value)} {name.replace('_', ' ')} for {len(self)} prompts")
            if bad := (getattr(self, name) < 0).all(1).nonzero().flatten().tolist():
                raise TaskError(f"no {name.replace('_', ' ')} for prompts {name_some(bad)}")

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        shape = f"{len(self)} prompts x {self.clean.shape[1]} tokens"
        return f"PromptPairs({self.name}: {shape}, corruption {self.corruption}, metric {self.metric})"

    @property
    def read_at(self) -> Int[Tensor, " prompt"]:
        """The position whose logits answer: each prompt's last token."""
        return self.lengths - 1

    @property
    def is_token(self) -> Bool[Tensor, "prompt position"]:
        """False at the padding."""
        return torch.arange(self.clean.shape[1], device=self.clean.device) < self.lengths[:, None]

    @property
    def differs(self) -> Bool[Tensor, "prompt position"]:
        """Where the corrupt run's input is another than the clean run's."""
        if self.noise_mask is not None:
            return self.noise_mask
        return (self.clean != self.corrupt) & self.is_token

    def take(self, rows: slice | Sequence[int] | Tensor) -> "PromptPairs":
        """Some of the pairs."""
        pick = lambda value: None if value is None else value[rows]  # noqa: E731
        strings = self.token_strings
        if strings is not None:
            index = torch.arange(len(self))[rows].tolist()
            strings = tuple(strings[i] for i in index)
        tensors = ("clean", "corrupt", "answers", "wrong_answers", "lengths", "embedding_noise", "noise_mask")
        return replace(self, **{name: pick(getattr(self, name)) for name in tensors}, token_strings=strings)

    def chunks(self, size: int | None) -> list["PromptPairs"]:
        """The pairs in pieces of at most `size` prompts (None: one piece)."""
        if size is None:
            return [self]
        if size < 1:
            raise OptionError(f"a batch needs at least 1 prompt, not {size}")
        return [self.take(slice(i, i + size)) for i in range(0, len(self), size)]

    def hooks(self, side: str) -> list[tuple[str, Any]]:
        """Forward hooks that make a run on `tokens(side)` the clean or the corrupt run."""
        if side == "clean" or self.noise_mask is None:
            return []

        def replace_embedding(value: Tensor, hook: Any) -> Tensor:
            return torch.where(self.noise_mask[..., None], self.embedding_noise.to(value.dtype), value)

        return [("hook_embed", replace_embedding)]

    def tokens(self, side: str) -> Int[Tensor, "prompt position"]:
        """Token ids of the "clean" or "corrupt" prompts."""
        return self.clean if side == "clean" else self.corrupt

    @classmethod
    def from_text(
        cls, model, *, clean: Sequence[str], corrupt: Sequence[str], answers: Sequence[Answer],
        wrong_answers: Sequence[Answer] | None = None, prepend_bos: bool | None = None, **about: Any,
    ) -> "PromptPairs":  # fmt: skip
        """Pairs from text. Answers are typed as they follow the prompt (" Mary"), or given as token ids.

        Raises `TaskError`, naming the prompts, if a pair's prompts differ in length, a word is not in the vocabulary,
        or an answer is not exactly one token after its prompt.
        """
        clean, corrupt = _listed(clean), _listed(corrupt)
        answers = _listed(answers)
        wrong = None if wrong_answers is None else _listed(wrong_answers)
        for what, given in (("corrupt prompts", corrupt), ("answers", answers), ("wrong answers", wrong)):
            if given is not None and len(given) != len(clean):
                raise TaskError(f"{len(given)} {what} for {len(clean)} clean prompts")
        if not clean:
            raise TaskError("no prompts: a set of pairs needs at least one prompt")
        encode = Encoder.of(model, prepend_bos)
        rows = {"clean": [encode(t) for t in clean], "corrupt": [encode(t) for t in corrupt]}
        ragged = [i for i, (a, b) in enumerate(zip(*rows.values(), strict=True)) if len(a) != len(b)]
        if ragged:
            i = ragged[0]
            raise TaskError(
                f"clean and corrupt differ in length on prompts {name_some(ragged)}: prompt {i} is "
                f"{len(rows['clean'][i])} tokens clean and {len(rows['corrupt'][i])} corrupt ({clean[i]!r} / {corrupt[i]!r})"
            )
        fill, device = tok.pad_id(model.tokenizer), model.W_E.device
        ids = lambda given: tok.pad(  # noqa: E731
            [
                [encode.answer(c, r, a) for a in _listed(one)]
                for c, r, one in zip(clean, rows["clean"], given, strict=True)
            ],
            -1,
        ).to(device)
        return cls(
            clean=tok.pad(rows["clean"], fill).to(device),
            corrupt=tok.pad(rows["corrupt"], fill).to(device),
            answers=ids(answers),
            wrong_answers=None if wrong is None else ids(wrong),
            lengths=torch.tensor([len(r) for r in rows["clean"]], device=device),
            token_strings=tuple(tuple(tok.token_strings(model.tokenizer, r)) for r in rows["clean"]),
            **about,
        )

    @classmethod
    def from_file(
        cls, path, model, *, kind: Literal["csv", "json"] | None = None, corrupt_column: str | None = None,
        n: int | None = None, skip_unusable: bool = False, **about: Any,
    ) -> "PromptPairs":  # fmt: skip
        """Pairs from a CSV or JSON(L) file; `interp.tasks.files` says which columns are understood.

        kind: by the file's ending if not given. corrupt_column: use another column as the corrupt prompt (EAP-IG's
        "corrupted_hard"). n: only the first n rows. skip_unusable: leave out the pairs that this model's tokenizer
        cannot align or answer in one token, with a warning that counts them; otherwise they are a `TaskError`, which
        names the file and the prompts.
        """
        columns = read_columns(path, kind=kind, corrupt_column=corrupt_column, n=n, d_vocab=model.cfg.d_vocab)
        if skip_unusable:
            columns = _usable(columns, Encoder.of(model, about.get("prepend_bos")), path)
        metric = "logit_diff" if "wrong_answers" in columns else "log_probability"
        try:
            return cls.from_text(model, **columns, **{"name": Path(path).stem, "metric": metric, **about})
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from error

    @classmethod
    def from_csv(cls, path, model, **options: Any) -> "PromptPairs":
        """`from_file` for a CSV file with a header."""
        return cls.from_file(path, model, kind="csv", **options)

    @classmethod
    def from_jsonl(cls, path, model, **options: Any) -> "PromptPairs":
        """`from_file` for JSON lines, or for one JSON array."""
        return cls.from_file(path, model, kind="json", **options)


def _usable(columns: dict[str, list], encode: "Encoder", path) -> dict[str, list]:
    """The rows that this tokenizer can say; warns how many it cannot, and why the first."""
    n_rows, reasons = len(columns["clean"]), {}
    for i in range(n_rows):
        row = {name: values[i] for name, values in columns.items()}
        answers = [a for name in ("answers", "wrong_answers") if name in row for a in _listed(row[name])]
        if reason := encode.refusal(row["clean"], row["corrupt"], answers):
            reasons[i] = reason
    if len(reasons) == n_rows:
        raise TaskError(f"{path}: none of its {n_rows} pairs can be used; the first: {reasons[0]}")
    if reasons:
        first = next(iter(reasons.values()))
        warnings.warn(f"{path}: left out {len(reasons)} of {n_rows} pairs; the first: {first}", stacklevel=3)
    return {name: [v for i, v in enumerate(values) if i not in reasons] for name, values in columns.items()}


def _listed(value: Any) -> list:
    return [value] if isinstance(value, str | int) else list(value)


class Encoder:
    """Text to ids for one tokenizer, refusing what a pair must not contain."""

    def __init__(self, tokenizer, prepend_bos: bool, d_vocab: int):
        self.d_vocab, self.tokenizer, self.prepend_bos = d_vocab, tokenizer, prepend_bos
        self.unknown = getattr(tokenizer, "unk_token_id", None)
        if self.unknown == getattr(tokenizer, "eos_token_id", None):  # GPT-2 names its end token so, and never uses it
            self.unknown = None

    @classmethod
    def of(cls, model, prepend_bos: bool | None = None) -> "Encoder":
        """A model's encoder; `prepend_bos=None` does what the model was trained with."""
        default = getattr(model.cfg, "prepend_bos", getattr(model.cfg, "default_prepend_bos", True))
        return cls(model.tokenizer, default if prepend_bos is None else prepend_bos, model.cfg.d_vocab)

    def __call__(self, text: str) -> list[int]:
        ids = tok.ids_of(self.tokenizer, text, prepend_bos=self.prepend_bos)
        if self.unknown is not None and self.unknown in ids:
            words = [w for w in text.replace(",", " ").split() if self.unknown in self.tokenizer.encode(f" {w}")]
            raise TaskError(f"{name_some(words) or text!r}: not in the model's vocabulary (prompt {text!r})")
        return ids

    def answer(self, prompt: str, prompt_ids: list[int], answer: str | int) -> int:
        """The one token that `answer` adds to the prompt."""
        if isinstance(answer, int):
            if not 0 <= answer < self.d_vocab:
                raise TaskError(f"answer {answer} is not a token of a vocabulary of {self.d_vocab} (prompt {prompt!r})")
            return answer
        ids = self(prompt + answer)
        added = ids[len(prompt_ids) :]
        if ids[: len(prompt_ids)] != prompt_ids:
            if answer.isdigit():  # "12" and "80" would be written as one token, but "80" can follow "12" all the same
                return tok.single_token(self.tokenizer, answer)
            raise TaskError(f"answer {answer!r} changes how its prompt {prompt!r} is tokenized: begin it with a space?")
        if len(added) != 1:
            pieces = tok.token_strings(self.tokenizer, added)
            raise TaskError(f"answer {answer!r} is {len(added)} tokens {pieces}, not one (prompt {prompt!r})")
        return added[0]

    def refusal(self, clean: str, corrupt: str, answers: Sequence[str | int]) -> str | None:
        """Why this tokenizer cannot say a pair; None if it can."""
        try:
            ids, corrupt_ids = self(clean), self(corrupt)
            if len(ids) != len(corrupt_ids):
                return f"{clean!r} and {corrupt!r} differ in length in its tokens"
            for answer in answers:
                self.answer(clean, ids, answer)
        except (TaskError, ValueError) as error:
            return str(error)
        return None
