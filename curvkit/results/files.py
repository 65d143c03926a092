"""Files that are there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

PIECE = 1 << 22
"""Bytes that are read at a time."""


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, have the disk take it, then rename; a reader sees the earlier file or all of the new one.

    Args:
        path: Of the file.
        write: Writes to the path that it is given.

    Raises:
        OSError: If the disk does not take it. The earlier file is as it was, and nothing is left of the new one.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> replaced(target, lambda part: part.write_text("all of it"))
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('all of it', 1)
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(part)
        _taken(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _taken(path.parent)


def sha256(path: Path) -> str:
    """Hash a file.

    Args:
        path: Of the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha.update(piece)
    return sha.hexdigest()


def _taken(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
