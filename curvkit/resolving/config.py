"""The user's configuration: the nearest curvkit.toml, or [tool.curvkit] of a pyproject.toml; read without importing torch."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvkit.errors import InvalidArgument, RefusedCheckpoint
from curvkit.resolving.projects import home_directory, is_own, is_repository, project_root

VARIABLE = "CURVKIT_OBJECTIVE"
"""Of the environment; it names a function behind the flag and before a configuration, and never what is trusted."""
NAME, SHARED = "curvkit.toml", "pyproject.toml"
"""A file of its own, and one that several tools share; the first wins where both lie in a directory."""
KEYS = ("objective", "set", "defaults")
ONLY_TYPED = ("trust", "allow")
"""Options that open a door for a file: typed by a person each time, never configured."""
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Config:
    """What a configuration file says.

    Args:
        path: The file.
        objective: "train.py:objective" or "module:function"; a file or module beside the configuration.
        settings: Keyword arguments of that function, as text, like those of `--set`.
        defaults: Values of options: of one command under its name, of every command directly. Keys have underscores.

    Example:
        >>> config = Config(Path("curvkit.toml"), defaults={"seed": 0, "trace": {"seed": 1}})
        >>> config.for_command("sharpness"), config.for_command("trace")
        ({'seed': 0}, {'seed': 1})
    """

    path: Path
    objective: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """What the paths in the file are relative to, and where its objective is imported from."""
        return self.path.parent

    def for_command(self, command: str) -> dict[str, Any]:
        """Values of options for one command.

        Args:
            command: Its name.

        Returns:
            Option name -> value; what stands under the command's name wins.
        """
        shared = {key: value for key, value in self.defaults.items() if not isinstance(value, Mapping)}
        return shared | dict(self.defaults.get(command, {}))


def find_config(checkpoint: Path, explicit: Path | None, here: Path, *, trusted: bool = False) -> Config | None:
    """Find and read the configuration that belongs to a checkpoint.

    It is the file that the user names; else the nearest one upward from the checkpoint, then upward from the current directory, each
    search ending at the root of a repository or at the home directory. A file that is only found, not named, counts if it lies in
    the current project: in the repository around `here`, or, without one, in `here` itself. It may choose which code is run, and one
    that lies beside a downloaded checkpoint was written by whoever made the download; below a directory that is no repository, such as
    the home directory, downloads lie, too.

    Args:
        checkpoint: File or directory; it need not be read for this.
        explicit: The file that the user names.
        here: The current directory.
        trusted: The user believes the checkpoint and what lies beside it.

    Returns:
        The configuration; None if there is none.

    Raises:
        InvalidArgument: If the file cannot be read or says something that is not known.
        RefusedCheckpoint: If the only one lies beside a checkpoint outside of the current project.

    Cost: a few file operations per directory; torch is not imported.
    """
    if explicit is not None:
        return read_config(explicit)
    start = Path(os.path.abspath(checkpoint))
    foreign = None
    for path in _candidates(start if start.is_dir() else start.parent, here):
        if trusted or is_own(path.parent, here):
            return read_config(path)
        foreign = foreign or path
    if foreign is None:
        return None
    project = project_root(here)
    where = f"lies outside of the current project ({project})"
    if foreign.parent.resolve().is_relative_to(project):
        where = (
            f"lies below the current directory, {project}, which is no repository, so that it may be part of a download"
        )
    raise RefusedCheckpoint(
        f"{foreign}: this configuration {where}. It may choose which code is run, so it is not "
        f"used unasked. If it is yours: -c {foreign}; to measure without it: --no-config."
    )


def read_config(path: Path) -> Config:
    """Read one configuration file.

    Args:
        path: A curvkit.toml, a pyproject.toml with [tool.curvkit], or a file of any name in the form of the first.

    Returns:
        What it says.

    Raises:
        InvalidArgument: If it cannot be read, is no TOML, has an unknown key, or sets what only the command line may.
    """
    table = _table(path)
    if path.name == SHARED:
        found = table.get("tool", {})
        found = found.get("curvkit") if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise InvalidArgument(f"{path}: it has no table [tool.curvkit]. Add one, or name another file with -c.")
        table = found
    for key in table:
        if key not in KEYS:
            raise InvalidArgument(f"{path}: unknown key {key!r}{_nearest(key)}. The keys are {', '.join(KEYS)}.")
    objective = table.get("objective")
    if objective is not None and (not isinstance(objective, str) or ":" not in objective):
        raise InvalidArgument(f'{path}: objective = {objective!r}; write a text like "train.py:objective".')
    settings, defaults = _tables(path, table, "set"), _tables(path, table, "defaults")
    return Config(
        path, objective, {key: _text(path, key, value) for key, value in settings.items()}, _options(path, defaults)
    )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, KEYS, 1)
    return f", nearest: {close[0]!r}" if close else ""


def _candidates(start: Path, here: Path) -> Iterator[Path]:
    """Configuration files upward from the checkpoint, then upward from the current directory, the nearest first."""
    for origin in (start, Path(os.path.abspath(here))):
        for directory in (origin, *origin.parents):
            if os.path.isfile(directory / NAME):
                yield directory / NAME
            elif os.path.isfile(directory / SHARED) and _speaks_of_curvkit(directory / SHARED):
                yield directory / SHARED
            if is_repository(directory) or directory.resolve() == home_directory():
                break


def _speaks_of_curvkit(path: Path) -> bool:
    """Whether a pyproject.toml has a table of ours; one that cannot be parsed is another tool's concern unless it names curvkit."""
    try:
        tool = _table(path).get("tool", {})
    except InvalidArgument:
        try:
            return "tool.curvkit" in path.read_text("utf-8", "replace")[:MOST_BYTES]
        except OSError:
            return False
    return isinstance(tool, dict) and isinstance(tool.get("curvkit"), dict)


def _table(path: Path) -> dict[str, Any]:
    """Parse TOML; whatever is wrong with the file becomes one sentence."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidArgument(
            f"{path}: the configuration cannot be read ({reason}). Name another one with -c."
        ) from error
    if len(content) > MOST_BYTES:
        raise InvalidArgument(f"{path}: larger than 1 MiB, which no configuration is. Name another file with -c.")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidArgument(f"{path}: not valid TOML: {reason}. Correct it, or name another file with -c.") from error


def _tables(path: Path, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise InvalidArgument(
            f"{path}: {key} = {found!r} must be a table: a line [{key}], below it one line per value."
        )
    return found


def _text(path: Path, key: str, value: Any) -> str:
    """A value as it would be typed behind --set KEY=."""
    if not isinstance(value, bool | int | float | str):
        raise InvalidArgument(
            f"{path}: [set] {key} is a {type(value).__name__}; only text, numbers, true and false can be given to the function."
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The options of [defaults] and of its tables, their names with underscores."""
    made: dict[str, Any] = {}
    for key, value in table.items():
        name = key.lstrip("-").replace("-", "_")
        if name.lower() in ONLY_TYPED:
            raise InvalidArgument(
                f"{path}: [defaults] sets {key!r}, which opens a door for whatever file is measured. Type --{name.lower()} on the command "
                "line, where it is meant for one file."
            )
        made[name] = _options(path, value) if isinstance(value, dict) else value
    return made
