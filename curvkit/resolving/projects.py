"""The current project: the repository around the current directory, or that directory; what lies elsewhere is not the user's own."""

from __future__ import annotations

import os
from pathlib import Path


def is_own(directory: Path, here: Path) -> bool:
    """Whether what lies in a directory counts as the user's own: it is in the repository around `here`, or is `here`.

    Args:
        directory: Where a file was found; links are followed.
        here: The current directory.

    Returns:
        False below a directory that is no repository: a home directory, `/`, or a folder of downloads.

    Example:
        >>> is_own(Path("/models/download"), Path("/"))
        False
    """
    directory, root = directory.resolve(), repository_around(here)
    return directory == here.resolve() if root is None else directory.is_relative_to(root)


def project_root(here: Path) -> Path:
    """The directory that a file that a checkpoint names must lie in.

    Args:
        here: The current directory.

    Returns:
        The root of the repository around it; without one, the directory itself. Whether all that lies below it is the user's own is
        what `is_own` says.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp()).resolve()
        >>> (root / ".git").mkdir(), (root / "runs").mkdir()
        (None, None)
        >>> project_root(root / "runs") == root
        True
    """
    return repository_around(here) or here.resolve()


def repository_around(here: Path) -> Path | None:
    """The root of the repository that holds a directory.

    Args:
        here: The directory.

    Returns:
        None without one, or if it would be the home directory or `/`: a repository of settings makes no project of all that lies there.
    """
    here = here.resolve()
    for directory in (here, *here.parents):
        if directory in (home_directory(), Path(directory.anchor)):
            break
        if is_repository(directory):
            return directory
    return None


def is_repository(directory: Path) -> bool:
    """Whether a directory is the root of a repository.

    Args:
        directory: Of it.

    Returns:
        True if git's own entry is there; in a work tree that is a file.
    """
    return os.path.exists(directory / ".git")


def home_directory() -> Path | None:
    """The user's home, links followed.

    Returns:
        None for a user without one.
    """
    try:
        return Path.home().resolve()
    except RuntimeError:  # a process of a user without an entry
        return None
