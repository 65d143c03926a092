"""The one file of a state that says what belongs to it: of which run it is, what was decided, and which segments there are."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from curvkit.errors import RefusedCheckpoint
from curvkit.results.files import replaced
from curvkit.results.record import plain

SCHEMA = "curvkit.state/1"
NAME = "manifest.json"
SEGMENT = re.compile(r"segment-(\d{6,})\.safetensors")
"""Names of segments, with their number."""
ROUNDING = 1e-4
"""Relative difference that floats may have where they were computed on another machine, in float32."""


@dataclass(frozen=True)
class Segment:
    """A file with results."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    entries: int

    @property
    def number(self) -> int:
        """Its place in the order in which segments were written."""
        found = SEGMENT.fullmatch(self.name)
        return int(found[1]) if found else 0


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
        content = json.loads(_text(path))
        stated = content.pop("sha256")
        schema = content.pop("schema")
        if schema == SCHEMA and stated == _digest({"schema": schema, **content}):
            segments = tuple(Segment(**segment) for segment in content.pop("segments"))
            return _checked(Manifest(**content, segments=segments))
        reason = "its contents do not give its checksum" if schema == SCHEMA else f"its schema is {schema!r}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise RefusedCheckpoint(
        f"{path} is not a state that can be gone on from ({reason}); it must be one of schema {SCHEMA}, as it was written. "
        "Begin anew with --fresh, which removes it, or choose another folder."
    )


def described(folder: Path) -> bool:
    """Whether a folder has a manifest that says it is one, of any version, damaged or not.

    Args:
        folder: Of the state.

    Returns:
        False for what cannot be read as JSON.
    """
    path = folder / NAME
    try:
        content = json.loads(_text(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith("curvkit.state/")  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, rounding: float = 0.0) -> Iterator[str]:
    """Say in which values two mappings differ, entry by entry.

    Args:
        before: Plain values, nested.
        now: Plain values, nested.
        rounding: Relative difference that floats may have.

    Yields:
        A sentence for each.

    Example:
        >>> list(differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}))
        ['b.c was 2 and is 3']
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for name in (*old, *(name for name in new if name not in old)):
        if old.get(name) != new.get(name) and not _close(old.get(name), new.get(name), rounding):
            yield f"{name} was {_shown(old, name)} and is {_shown(new, name)}"


def rounding(before: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """How far floats may differ between two surroundings.

    Args:
        before: Of the earlier run.
        now: Of this one.

    Returns:
        0 where they are the same.
    """
    return 0.0 if before == now else ROUNDING


def _text(path: Path) -> str:
    if path.is_symlink():
        raise ValueError("it is a link")
    return path.read_text(encoding="utf-8")


def _close(before: Any, now: Any, rounding: float) -> bool:
    return isinstance(before, float) and isinstance(now, float) and math.isclose(before, now, rel_tol=rounding)


def _checked(made: Manifest) -> Manifest:
    """A manifest whose entries are of the right types, and whose segments are names in its own folder."""
    for name in ("run", "surroundings", "facts"):
        if not isinstance(getattr(made, name), dict):
            raise ValueError(f"its {name} are no mapping of names to values")
    for segment in made.segments:
        if not (isinstance(segment.name, str) and SEGMENT.fullmatch(segment.name)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{segment.name!r} is no name of a segment")
        if not (type(segment.size) is type(segment.entries) is int and isinstance(segment.sha256, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"size, entries or sha256 of {segment.name} are of another type")
    if len({segment.name for segment in made.segments}) < len(made.segments):
        raise ValueError("it lists a segment twice")
    return made


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
