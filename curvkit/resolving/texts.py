"""The texts on a user's disk as one sequence of tokens: plain text, JSON lines, nanoGPT's .bin, a directory of datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.models import topics_text
from curvkit.resolving.binary_ids import read_ids
from curvkit.resolving.dataset_folders import is_dataset, open_rows
from curvkit.resolving.request import TextData

MOST_CHARACTERS = 4_000_000
"""More of a text is not read: tokenizing that much takes seconds."""
MOST_TOKENS = 4_000_000
"""More of ready ids is not read."""
LONGEST_LINE = 64_000_000
"""Characters of one line of JSON."""
LINES = (".jsonl", ".ndjson")
NOT_TEXT = {
    ".json": 'Write one object per line, each with a field "text", as .jsonl.',
    ".parquet": "Load it with datasets and pass the directory of dataset.save_to_disk.",
    ".arrow": "Pass the directory of datasets.save_to_disk that it lies in.",
    ".csv": "Write its column of texts to a .txt or .jsonl file.",
    ".npy": "Write the ids as nanoGPT does: numpy.asarray(ids, dtype=numpy.uint16).tofile('val.bin').",
    ".pkl": "It is a pickle, which is not opened. Write the ids to a .bin file of uint16.",
    ".pt": "Write the ids to a .bin file of uint16: numpy.asarray(ids, dtype=numpy.uint16).tofile('val.bin').",
    ".gz": "Unpack it first, with gunzip.",
    ".zip": "Unpack it first.",
}
"""Endings that are not read, and what to do."""


class Tokenizer(Protocol):
    """What turns a text into ids."""

    @property
    def separator(self) -> int | None:
        """The id between documents, if there is one."""
        ...

    @property
    def mask(self) -> int | None:
        """The id of a masked position, if there is one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        ...


class NoTokenizer(Exception):
    """A text is to be read, and there is no tokenizer; the text says what was found."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ids in order, and what a reader should know of them."""

    ids: Tensor
    """[n] int64."""
    notes: tuple[str, ...] = ()


def read_tokens(
    data: TextData, tokenizer: Tokenizer | None, *, length: int, count: int, vocabulary: int | None = None
) -> Tokens:
    """Read a user's data as ids.

    Args:
        data: Where it lies.
        tokenizer: For texts; None if the checkpoint has none.
        length: T, of a window.
        count: N, windows that are wanted; of a .bin file no more is read than they need.
        vocabulary: Ids that the model has; a .bin file holds 16-bit ids, and cannot hold those of more. None if it is not known.

    Returns:
        The ids; of a long text those of its beginning.

    Raises:
        InvalidArgument: If the path is not there, or the split does not fit.
        UnknownObjective: If the data is of another kind or damaged.
        NoTokenizer: If a tokenizer is needed.
    """
    path = data.path
    if not path.exists():
        raise InvalidArgument(f"--data {path}: there is no such file or directory.")
    if path.is_dir():
        return _of_directory(data, tokenizer)
    if data.split is not None:
        raise InvalidArgument(
            f"--split {data.split}: only a directory of datasets has splits, and {path} is a file. Leave it out."
        )
    suffix = path.suffix.lower()
    if suffix == ".bin":
        return Tokens(read_ids(path, length=length, count=count, vocabulary=vocabulary))
    if suffix in NOT_TEXT:
        raise UnknownObjective(f"--data {path}: {suffix} files are not read. {NOT_TEXT[suffix]}")
    if tokenizer is None:
        raise NoTokenizer(f"{path} is text")
    return _tokenized(_documents(path), tokenizer, str(path))


def bundled_tokens(tokenizer: Tokenizer) -> Tokens:
    """The text that comes with Python, its language reference, as ids.

    Args:
        tokenizer: Of the checkpoint.

    Returns:
        The ids of the whole text.
    """
    return _tokenized(iter([topics_text()]), tokenizer, "the bundled text")


def _of_directory(data: TextData, tokenizer: Tokenizer | None) -> Tokens:
    if not is_dataset(data.path):
        inside = sorted(entry.name for entry in data.path.iterdir())[:6]
        raise UnknownObjective(
            f"--data {data.path}: a directory that datasets.save_to_disk did not write; in it: {', '.join(inside) or 'nothing'}. "
            "Pass one file: .txt, .jsonl, or a .bin of nanoGPT."
        )
    rows = open_rows(data.path, data.split)
    notes = () if rows.split is None else (f"split {rows.split} of {data.path.name}",)
    if rows.column == "text":
        if tokenizer is None:
            raise NoTokenizer(f"{data.path} has a column of texts")
        found = _tokenized((str(text) for text in rows if text), tokenizer, str(data.path))
        return Tokens(found.ids, notes + found.notes)
    ids: list[int] = []
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(token) is int and -1 << 63 <= token < 1 << 63 for token in row):
            raise UnknownObjective(
                f"--data {data.path}: row {number} of input_ids is {_shown(row)}, not a list of whole numbers. Write one list of ids per "
                "row, or a column of texts called 'text', and save it again."
            )
        ids += row
        if len(ids) >= MOST_TOKENS:
            notes += (f"the first {len(ids):,} tokens of {data.path.name}",)
            break
    return Tokens(torch.tensor(ids, dtype=torch.int64), notes)


def _shown(row: object) -> str:
    """A row that is no list of ids, or the first thing in it that is no id."""
    if isinstance(row, list):
        found = next(token for token in row if type(token) is not int or not -1 << 63 <= token < 1 << 63)
        return f"a list with {_kind(found)}"
    return _kind(row)


def _kind(found: object) -> str:
    name = type(found).__name__
    return "null" if found is None else f"{'an' if name[0] in 'aeio' else 'a'} {name} ({found!r:.40})"


def _documents(path: Path) -> Iterator[str]:
    """The texts of a file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() in LINES:
                for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
                    if line.strip():
                        yield _text_of(path, number, line)
                return
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UnknownObjective(
            f"--data {path}: not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}). "
            "Pass .txt or .jsonl in UTF-8, nanoGPT's .bin, or a directory of datasets."
        ) from error
    if "\0" in text:
        raise UnknownObjective(
            f"--data {path}: it has NUL bytes, so it is no text. Ids of tokens belong in a .bin file of uint16."
        )
    yield text


def _text_of(path: Path, number: int, line: str) -> str:
    example = '{"text": "..."}'
    if len(line) > LONGEST_LINE:
        raise UnknownObjective(
            f"--data {path}: line {number} has more than {LONGEST_LINE:,} characters. Write one text per line, or plain text as .txt."
        )
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnknownObjective(
            f"--data {path}: line {number} is no JSON. A .jsonl file has one object per line, such as {example}."
        ) from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and "text" in entry and not isinstance(text, str):
        raise UnknownObjective(
            f'--data {path}: line {number} has {_kind(text)} under "text", which is no text. Write it in quotes, so that lines are '
            f"{example}."
        )
    if not isinstance(text, str):
        found = (
            f"fields: {', '.join(map(str, list(entry)[:8])) or 'none'}"
            if isinstance(entry, dict)
            else f"a {type(entry).__name__}"
        )
        raise UnknownObjective(
            f'--data {path}: line {number} has no text under "text" ({found}). Rename the field, so that lines are {example}.'
        )
    return text


def _tokenized(documents: Iterator[str], tokenizer: Tokenizer, name: str) -> Tokens:
    ids: list[int] = []
    characters, notes = 0, ()
    for number, text in enumerate(documents):
        if characters + len(text) > MOST_CHARACTERS:
            text = text[: MOST_CHARACTERS - characters]
            notes = (f"the first {MOST_CHARACTERS:,} characters of {name}",)
        if number and tokenizer.separator is not None:
            ids.append(tokenizer.separator)
        ids += tokenizer.encode(text)
        characters += len(text)
        if notes:
            break
    return Tokens(torch.tensor(ids, dtype=torch.int64), notes)
