"""Rows of a directory that `datasets.save_to_disk` wrote; the only file that imports datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.confined import confined
from curvkit.checkpoints.documents import document
from curvkit.errors import InvalidArgument, MissingExtra, RefusedCheckpoint, UnknownObjective
from curvkit.resolving.transformers_library import reason_of

MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files of which such a directory has one."""
STATE = "state.json"
COLUMNS = ("input_ids", "text")
"""Columns that are read; the first that is there."""
ROWS = 256
"""Rows read at a time."""


@dataclass(frozen=True)
class Rows:
    """The column of one split that is measured on."""

    column: str
    """"text" or "input_ids"."""
    split: str | None
    """Its name, if the directory has several."""
    dataset: Any
    path: Path
    """Of the directory, for messages."""

    def __iter__(self) -> Iterator[Any]:
        """Texts, or lists of ids without the padding.

        Yields:
            One row after the other.

        Raises:
            UnknownObjective: If a mask is not as long as its ids.
        """
        for start in range(0, len(self.dataset), ROWS):
            rows = self.dataset[start : start + ROWS]
            masks = rows.get("attention_mask")
            for index, value in enumerate(rows[self.column]):
                mask = masks[index] if masks is not None else None
                if isinstance(value, list) and isinstance(mask, list) and len(mask) == len(value):
                    value = [token for token, kept in zip(value, mask, strict=True) if kept]
                elif masks is not None and isinstance(value, list):
                    raise UnknownObjective(
                        f"--data {self.path}: row {start + index} has {len(value)} input_ids and another attention_mask "
                        f"({'null' if mask is None else f'{mask!r:.40}'}). Write one 0 or 1 per id, and save it again."
                    )
                yield value


def is_dataset(path: Path) -> bool:
    """Whether a directory looks like one of `datasets.save_to_disk`.

    Args:
        path: A directory.

    Returns:
        True if a file that marks it is there; nothing is read.
    """
    return any((path / mark).is_file() for mark in MARKS)


def open_rows(path: Path, split: str | None) -> Rows:
    """Open a directory and choose split and column.

    Args:
        path: The directory.
        split: Its name; needed if there are several.

    Returns:
        The rows, read as they are iterated.

    Raises:
        MissingExtra: If datasets is not installed.
        InvalidArgument: If the split is not there, or must be named.
        UnknownObjective: If the directory cannot be opened, or has neither of the columns, or it holds pictures or the like.
        RefusedCheckpoint: If one of its files names another outside of it.

    Cost: the tables are mapped, not read.
    """
    try:
        import datasets  # an optional package
    except Exception as error:  # also what a broken package below it raises
        absent = isinstance(error, ModuleNotFoundError) and error.name == "datasets"
        state = "not installed" if absent else f"installed but cannot be imported ({reason_of(error)})"
        raise MissingExtra(
            f"--data {path}: a directory of datasets is read by the package datasets, which is {state}. "
            "Type: pip install --upgrade 'curvkit[hf]'"
        ) from error
    _check_files(path)
    try:
        opened: Any = datasets.load_from_disk(str(path.resolve()))
    except Exception as error:  # whatever pyarrow and datasets raise for damaged files
        raise UnknownObjective(
            f"--data {path}: datasets cannot open it ({reason_of(error)}). Write it again with dataset.save_to_disk({path.name!r})."
        ) from error
    chosen = None
    if isinstance(opened, datasets.DatasetDict):
        chosen = _chosen(path, [str(name) for name in opened], split)
        opened = opened[chosen]
    elif split is not None:
        raise InvalidArgument(f"--split {split}: {path} has one table and no splits. Leave --split out.")
    column = next((name for name in COLUMNS if name in opened.column_names), None)
    if column is None:
        found = ", ".join(opened.column_names) or "none"
        raise UnknownObjective(
            f"--data {path}: no column 'text' or 'input_ids'; its columns are: {found}. Rename one, for example "
            f"dataset.rename_column({(opened.column_names or ['content'])[0]!r}, 'text'), and save it again."
        )
    if not _is_text_or_ids(opened.features[column]):
        kind = type(opened.features[column]).__name__
        raise UnknownObjective(
            f"--data {path}: the column {column!r} is of the type {kind}, neither text nor ids; reading it could open other files. "
            "Write a column of texts or of lists of ids, and save it again."
        )
    wanted = [
        column,
        *(["attention_mask"] if column == "input_ids" and "attention_mask" in opened.column_names else []),
    ]
    return Rows(column, chosen, opened.select_columns(wanted).with_format(None), path)


def _chosen(path: Path, names: list[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    told = "which of its splits" if split is None else f"no split {split!r}; it has"
    advice = "validation" if "validation" in names else (names or ["train"])[-1]
    raise InvalidArgument(f"--data {path}: {told}: {', '.join(names) or 'none'}. Pass for example --split {advice}.")


def _check_files(path: Path) -> None:
    """No file that its descriptions name lies outside of the directory; datasets itself would follow any name."""
    try:
        if (path / STATE).is_file() and (path / "dataset_info.json").is_file():
            folders: list[Any] = [""]
        else:
            folders = _listed(_described(path, "dataset_dict.json").get("splits"))
        for prefix in (f"{folder}/" if folder else "" for folder in folders):
            _described(path, f"{prefix}dataset_info.json")
            for file in _listed(_described(path, f"{prefix}{STATE}").get("_data_files")):
                confined(path, f"{prefix}{file.get('filename')}", source=f"--data {path}: {prefix}{STATE}")
    except (TypeError, AttributeError) as error:
        raise UnknownObjective(
            f"--data {path}: datasets cannot open it (its {STATE} or dataset_dict.json lists no files). Write it again with "
            f"dataset.save_to_disk({path.name!r})."
        ) from error


def _described(path: Path, name: str) -> dict[str, Any]:
    file = confined(path, name, source=f"--data {path}")
    try:
        return document(file)
    except RefusedCheckpoint as error:
        raise UnknownObjective(
            f"--data {path}: datasets cannot open it ({reason_of(error)}). Write it again with dataset.save_to_disk({path.name!r})."
        ) from error


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _is_text_or_ids(feature: Any) -> bool:
    """Whether rows are plain values, or lists of them; a picture or a sound would be opened by its path or address."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list):
        inner = feature[0] if feature else None
    return type(feature).__name__ == "Value" if inner is None else _is_text_or_ids(inner)
