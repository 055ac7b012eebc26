"""Prompt pairs from files: our own columns, and those of two public projects as they are.

clean, corrupt, answer | answers, wrong_answer | wrong_answers      ours ("corrupted" is taken for "corrupt")
clean, corrupted, correct_idx, incorrect_idx                        EAP-IG; token ids, so for one tokenizer only
clean, corrupted, label                                             EAP-IG's greater-than; label is the start year
clean_prefix, patch_prefix, clean_answer, patch_answer              feature-circuits' subject-verb agreement
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from interp.errors import TaskError

_RENAMES = {
    "corrupted": "corrupt", "corrupt_prompt": "corrupt", "clean_prompt": "clean",
    "clean_prefix": "clean", "patch_prefix": "corrupt", "clean_answer": "answers", "patch_answer": "wrong_answers",
    "answer": "answers", "wrong_answer": "wrong_answers",
    "correct_idx": "answers", "incorrect_idx": "wrong_answers",
}  # fmt: skip
_TOKEN_IDS = ("correct_idx", "incorrect_idx")


def read_columns(
    path: str | Path, *, d_vocab: int, kind: Literal["csv", "json"] | None = None, corrupt_column: str | None = None,
    n: int | None = None,
) -> dict[str, list]:  # fmt: skip
    """clean, corrupt, answers and (if there are any) wrong_answers, one item per row, as `PromptPairs.from_text` takes them.

    Raises `TaskError` naming the file and the line for whatever cannot be used.
    """
    path = Path(path)
    kind = kind or ("csv" if path.suffix.lower() == ".csv" else "json")
    columns: dict[str, list] = {"clean": [], "corrupt": [], "answers": [], "wrong_answers": []}
    for line, record in _records(path, kind):
        if n is not None and len(columns["clean"]) == n:
            break
        row = _row(record, path, line, corrupt_column, d_vocab)
        for name, values in columns.items():
            values.append(row.get(name))
    if not columns["clean"]:
        raise TaskError(f"{path} has no pairs in it")
    if all(v is None for v in columns["wrong_answers"]):
        del columns["wrong_answers"]
    elif None in columns["wrong_answers"]:
        raise TaskError(f"{path} has wrong answers for some pairs only")
    return columns


def _records(path: Path, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of every row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    if kind == "csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for record in reader:
            if None in record or None in record.values():
                raise TaskError(f"{path} line {reader.line_num}: not as many fields as the header has (cut short?)")
            yield reader.line_num, record
    elif text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path} line {error.lineno}: not valid JSON ({error.msg}; cut short?)") from error
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path} line {number}: not valid JSON ({error.msg}; cut short?)") from error


def _row(record: Any, path: Path, line: int, corrupt_column: str | None, d_vocab: int) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise TaskError(f"{path} line {line}: expected an object with named fields, got {type(record).__name__}")
    if corrupt_column is not None and corrupt_column not in record:
        raise TaskError(f"{path} line {line}: no column {corrupt_column!r} (there are {', '.join(map(str, record))})")
    row: dict[str, Any] = {}
    for name, value in record.items():
        target = _RENAMES.get(name, name)
        if name in _TOKEN_IDS:
            value = _token_id(value, name, path, line, d_vocab)
        row.setdefault(target, value)
    if corrupt_column is not None:
        row["corrupt"] = record[corrupt_column]
    if "label" in row and "answers" not in row:
        row["answers"], row["wrong_answers"] = _years(row["label"], path, line)
    for name in ("clean", "corrupt", "answers"):
        if row.get(name) in (None, "", []):
            raise TaskError(f"{path} line {line}: no {name} (columns: {', '.join(map(str, record))})")
    for name in ("clean", "corrupt", "answers", "wrong_answers"):
        value = row.get(name)
        parts = value if name.endswith("answers") and isinstance(value, list) else [value]
        kinds = str | int if name.endswith("answers") else str
        if value is not None and not all(isinstance(v, kinds) for v in parts):
            raise TaskError(f"{path} line {line}: {name} is {value!r}, not text")
    return row


def _token_id(value: Any, name: str, path: Path, line: int, d_vocab: int) -> int:
    try:
        token = int(value)
    except (TypeError, ValueError):
        raise TaskError(f"{path} line {line}: {name} {value!r} is not a token id") from None
    if not 0 <= token < d_vocab:
        raise TaskError(
            f"{path} line {line}: {name} {token} is not in this model's vocabulary of {d_vocab}; "
            "the file was written for another tokenizer"
        )
    return token


def _years(label: Any, path: Path, line: int) -> tuple[list[str], list[str]]:
    """Two-digit years after the label, and the others."""
    try:
        start = int(label)
    except (TypeError, ValueError):
        raise TaskError(f"{path} line {line}: label {label!r} is not a two-digit year") from None
    if not 0 <= start < 99:
        raise TaskError(f"{path} line {line}: label {start} leaves no later two-digit year")
    years = [f"{y:02d}" for y in range(100)]
    return years[start + 1 :], years[: start + 1]
