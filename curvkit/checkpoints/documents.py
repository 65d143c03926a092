"""JSON documents from a stranger's disk: configurations and indexes, read as data or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curvkit.checkpoints.confined import unreadable
from curvkit.errors import RefusedCheckpoint

LARGEST = 256 << 20
"""Bytes. The log of a long run in trainer_state.json has tens of megabytes; nothing that is read here has more."""


def document(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: An ordinary file.

    Returns:
        The object.

    Raises:
        RefusedCheckpoint: If it cannot be read, is no JSON object, or names a key twice.

    Cost: one pass over the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"model_type": "gpt2"}')
        >>> document(path)
        {'model_type': 'gpt2'}
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RefusedCheckpoint(
                f"{path}: {size:,} bytes, where a JSON document of a checkpoint has at most {LARGEST:,}. "
                "Pass the directory as its library wrote it."
            )
        with path.open("rb") as file:
            content = file.read(LARGEST)
    except OSError as error:
        raise RefusedCheckpoint(unreadable(path, error)) from error
    return parsed(content, str(path))


def parsed(content: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object whose keys are all different.

    Args:
        content: UTF-8.
        source: For messages: which file, and which part of it.

    Returns:
        The object.

    Raises:
        RefusedCheckpoint: If it is none.

    Cost: linear in the length.

    Example:
        >>> parsed(b'{"a": [1, null]}', "index")
        {'a': [1, None]}
    """
    try:
        value: Any = json.loads(content.decode(), object_pairs_hook=_different)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        found = "is empty" if not content.strip() else f"is not JSON ({_reason(error)})"
        raise RefusedCheckpoint(
            f"{source}: {found}: it was cut short, is still being written, or is damaged. "
            "Take another copy or an earlier checkpoint."
        ) from error
    if not isinstance(value, dict):
        raise RefusedCheckpoint(
            f"{source}: holds a JSON {_word(value)}, where an object {{...}} belongs. Take the file as its library wrote it."
        )
    return value


def brief(value: Any) -> str:
    """Show a value of a document in a message: numbers, strings and the like in full, if short; of all else the kind.

    Args:
        value: Whatever the document has.

    Returns:
        At most about a hundred characters, all printable.

    Cost: none, however deep the value is.

    Example:
        >>> brief("gpt2"), brief([1, 2]), brief({})
        ("'gpt2'", 'a list', 'an object')
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 100 else f"{value[:97]}...")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of many digits"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "truth value"}.get(type(value), "number")
