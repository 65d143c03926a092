"""The base model of an adapter, found on this disk by what the adapter calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.hub_cache import IDENTIFIER, cached
from curvkit.errors import RefusedCheckpoint

FIELD = "base_model_name_or_path"


def base_model(path: Path, config: Mapping[str, Any], *, source: str) -> tuple[Path, str]:
    """Find the directory of the base model.

    PEFT writes what was typed when the training began. An absolute path is taken as it is. A relative one is looked for in this order: from
    the current directory, where PEFT itself looks; from the adapter's own directory, and from each one above it up to the root of the
    repository around it, or without one up to the home directory; last, as a name in the cache of downloads. It is read as data wherever
    it lies; what it needs code for is refused as everywhere.

    Args:
        path: The directory of the adapter.
        config: Its configuration.
        source: For messages: the file of the configuration.

    Returns:
        The directory, and which one was taken, for people.

    Raises:
        RefusedCheckpoint: If none is named, or it is not on this disk; the text says where it was looked for.

    Cost: look-ups in the file system; nothing is downloaded.
    """
    named, revision = config.get(FIELD), config.get("revision")
    if not isinstance(named, str) or not named.strip():
        raise RefusedCheckpoint(
            f"{source}: does not say which model the adapter belongs to ({FIELD}). Write the directory of that model into the file."
        )
    if not named.isprintable() or len(named) > 1000 or "://" in named:
        raise RefusedCheckpoint(
            f"{source}: {FIELD} is {brief(named)}, which is neither a directory nor the name of a model; nothing is downloaded. "
            "Write the directory of the base model into the file."
        )
    if revision is not None and not isinstance(revision, str):
        raise RefusedCheckpoint(f"{source}: revision is {brief(revision)}, not a name. Write null into the file.")
    try:
        found, note = _directory(path, named) or (cached(named, revision), "")
    except (OSError, RuntimeError, ValueError) as error:  # a home that does not exist; a name that is too long
        raise RefusedCheckpoint(
            f"{source}: the base model {brief(named)} cannot be looked up ({error}). Write its directory into the file."
        ) from error
    if found is None:
        raise RefusedCheckpoint(f"{source}: the base model {named!r} is not on this disk, {_absent(path, named)}")
    if found.resolve() == path.resolve() or not (found / "config.json").is_file():
        raise RefusedCheckpoint(
            f"{source}: the base model {named!r} is {found}, where no config.json of a model lies. "
            "Write the directory that holds the base model into the file."
        )
    return found, f"base model: {found}{note}"


def _directory(path: Path, named: str) -> tuple[Path, str] | None:
    """The first place where a model lies, or else the first directory, and how it was found."""
    typed = Path(named).expanduser()
    if typed.is_absolute():
        return (typed, "") if typed.is_dir() else None
    places = [(typed, f" (from the current directory, {Path.cwd()})")]
    places += [(start / typed, f" (from {start}; there is none in the current directory)") for start in _starts(path)]
    there = [place for place in places if place[0].is_dir()]
    models = (place for place in there if (place[0] / "config.json").is_file() and not place[0].samefile(path))
    return next(models, next(iter(there), None))


def _starts(path: Path) -> Iterator[Path]:
    """The adapter's directory, and those above it that belong to the same project."""
    yield path
    try:
        home = Path.home().resolve()
    except RuntimeError:  # a process of a user without an entry
        home = None
    if (path / ".git").exists():
        return
    for parent in path.resolve().parents:
        if parent in (home, Path(parent.anchor)):
            return
        yield parent
        if (parent / ".git").exists():
            return


def _absent(path: Path, named: str) -> str:
    """Where it was looked for, and what to do."""
    write = f"Write its directory into the file ({FIELD})"
    if Path(named).is_absolute() or named.startswith("~"):
        return f"and nothing is downloaded. {write}."
    *_, last = _starts(path)
    where = f"{path}" if last == path else f"{path} and the directories above it up to {last}"
    looked = f"and nothing is downloaded; it was looked for from the current directory, {Path.cwd()}, and from {where}"
    if not IDENTIFIER.fullmatch(named) or ".." in named:
        return f"{looked}. {write}, or start in the directory from which it was trained."
    return (
        f"{looked}, and in the cache of downloads. {write}. If it is a model of the Hub, put it into the cache of Hugging Face where the "
        f"network may be used: hf download {named}"
    )
