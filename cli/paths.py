"""Paths that are typed: what is not there, or may not be read, comes with what to look at."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import click


class Existing(click.Path):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """A file or directory that is there and may be read."""

    def __init__(self) -> None:
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check it, and say what may help."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            raise click.BadParameter(f"{error.message}{_advice(Path(os.fsdecode(value)))}", ctx, param) from error


def _advice(path: Path) -> str:
    from curvkit.checkpoints.command_lines import quoted

    closed = next((p for p in reversed(path.absolute().parents) if p.is_dir() and not os.access(p, os.X_OK)), None)
    if closed is not None:
        return f" The directory {closed} may not be entered: look at its permissions, ls -ld {quoted(closed)}"
    if path.is_symlink() and not path.exists():
        return f" It is a link to {path.readlink()}, which is not there."
    if path.exists():
        return f" Look at its permissions: ls -ld {quoted(path)}"
    try:
        there = sorted(entry.name for entry in path.absolute().parent.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, 1, 0.7)
    return f" There is {quoted(path.parent / near[0])}." if near else ""
