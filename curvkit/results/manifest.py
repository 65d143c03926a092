"""The one file of a state that says what belongs to it: of which run it is, what was decided, and which segments there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from curvkit.errors import RefusedCheckpoint
from curvkit.results.files import replaced
from curvkit.results.record import plain

SCHEMA = "curvkit.state/1"
NAME = "manifest.json"


@dataclass(frozen=True)
class Segment:
    """A file with results."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    entries: int


@dataclass(frozen=True)
class Manifest:
    """What belongs to a state."""

    run: Mapping[str, Any]
    """What was measured, and how: plain values that must be the same when it is resumed."""
    surroundings: Mapping[str, Any]
    """Machine and versions: rounding depends on them, what is measured does not."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What was decided in the run: its seed, its plans."""
    segments: tuple[Segment, ...] = ()

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder.

        Args:
            folder: Of the state.

        Raises:
            OSError: If the disk does not take it.
        """
        content = {"schema": SCHEMA, **plain(asdict(self))}
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False)
        replaced(folder / NAME, lambda part: part.write_text(text, encoding="utf-8"))


def read(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Args:
        folder: Of the state.

    Returns:
        What belongs to it.

    Raises:
        RefusedCheckpoint: If it is damaged, or of another version of curvkit's states.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("sha256")
        schema = content.pop("schema")
        if schema == SCHEMA and stated == _digest({"schema": schema, **content}):
            segments = tuple(Segment(**segment) for segment in content.pop("segments"))
            return Manifest(**content, segments=segments)
        reason = "its contents do not give its checksum" if schema == SCHEMA else f"its schema is {schema!r}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise RefusedCheckpoint(
        f"{path} is not a state that can be gone on from ({reason}); it must be one of schema {SCHEMA}, as it was written. "
        "Begin anew with --fresh, which removes it, or choose another folder."
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say in which values two mappings differ, entry by entry.

    Args:
        before: Plain values, nested.
        now: Plain values, nested.

    Yields:
        A sentence for each.

    Example:
        >>> list(differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}))
        ['b.c was 2 and is 3']
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for name in (*old, *(name for name in new if name not in old)):
        if old.get(name) != new.get(name):
            yield f"{name} was {_shown(old, name)} and is {_shown(new, name)}"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not there"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
