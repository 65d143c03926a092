"""One process at a time in a folder: a lock that ends with its process."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from curvkit.errors import CurvkitError, InvalidArgument

LOCK = "lock"
"""Name of the file."""


def locked(path: Path) -> int | None:
    """Hold the lock of a folder; the system lets go of it when the process ends, in whatever way.

    Args:
        path: The folder.

    Returns:
        What `let_go` takes; None where the system has no such locks.

    Raises:
        CurvkitError: If another process holds it.
        InvalidArgument: If its file is a link: what it points to is not touched.
        OSError: If nothing can be written there.
    """
    try:
        import fcntl  # POSIX only
    except ImportError:
        return None
    try:
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InvalidArgument(
            f"{path / LOCK} is a link, and must be a file of its own in the folder of the state. Remove it, or choose another folder."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        other = os.read(handle, 32).decode(errors="replace").strip()
        os.close(handle)
        raise CurvkitError(
            f"{path} is in use by another process{f' ({other})' if other else ''}; one at a time may write a state. Wait until it ends, or "
            "choose another folder."
        ) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()}\n".encode())
    return handle


def let_go(handle: int | None) -> None:
    """Let another process have it.

    Args:
        handle: From `locked`.
    """
    if handle is not None:
        with contextlib.suppress(OSError):
            os.close(handle)
