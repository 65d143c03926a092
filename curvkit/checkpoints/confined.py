"""Paths that a file names: kept inside the directory of that file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from curvkit.errors import RefusedCheckpoint


def confined(directory: Path, name: str, *, source: str) -> Path:
    """Find the file that an index names, without leaving the directory.

    Hugging Face keeps downloads as `models--x--y/snapshots/<revision>/<name> -> ../../blobs/<hash>`; these links stay within
    the folder of one model and are followed. Every other link that leads outside is refused, as are absolute names and "..".

    Args:
        directory: Where the index lies.
        name: As the index has it.
        source: For messages: the index.

    Returns:
        The resolved path of an ordinary file.

    Raises:
        RefusedCheckpoint: If the name leads elsewhere, or there is no such file.

    Cost: a few look-ups in the file system; nothing is opened.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.bin").write_bytes(b"1")
        1
        >>> confined(folder, "a.bin", source="index").name
        'a.bin'
    """
    if not _plain(name):
        raise RefusedCheckpoint(
            f"{source}: names the file {name[:200]!r}, which does not lie in {directory}. A checkpoint names files of its own directory; "
            "this one was altered or damaged. Take another copy."
        )
    try:
        root, target = directory.resolve(), (directory / name).resolve()
        allowed = [root]
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            allowed.append(root.parent.parent / "blobs")
        if not any(target.is_relative_to(place) for place in allowed):
            raise RefusedCheckpoint(
                f"{source}: {name!r} is a link to {target}, outside {directory}. Links are followed within one model of the Hugging Face "
                "cache alone. If the file is yours, copy it in place of the link."
            )
        if target.is_file():
            return target
        found = "is not an ordinary file" if target.exists() else "is not there"
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a name that is too long
        raise RefusedCheckpoint(
            f"{source}: the file {name[:200]!r} cannot be found ({error}). Take another copy."
        ) from error
    link = " (a link to nothing: the download was not finished)" if (directory / name).is_symlink() else ""
    raise RefusedCheckpoint(
        f"{source}: the file {name!r} {found}{link}. The checkpoint is incomplete or still being written; "
        "copy or download the missing file, or take an earlier checkpoint."
    )


def shown(name: str) -> str:
    r"""A file's name for a message: as it is, or escaped if it would move the cursor or colour the terminal.

    Args:
        name: From a listing.

    Returns:
        The name.

    Cost: none.

    Example:
        >>> shown("a.pt"), shown("a\x1b[31m")
        ('a.pt', "'a\\x1b[31m'")
    """
    return name if name.isprintable() else repr(name)


def unreadable(path: Path, error: OSError) -> str:
    """What to say of a file or directory that the system does not let one read.

    Args:
        path: Of the file.
        error: As raised.

    Returns:
        A message.

    Cost: none.

    Example:
        >>> unreadable(Path("a.pt"), PermissionError(13, "Permission denied"))
        'a.pt: cannot be read (Permission denied). Look at its permissions and at the disk.'
    """
    return f"{path}: cannot be read ({error.strerror or error}). Look at its permissions and at the disk."


def _plain(name: str) -> bool:
    """Whether it is a relative path without steps upwards, on every system."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "\\" not in name
        and name.isprintable()
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).drive
        and ".." not in parts
    )
