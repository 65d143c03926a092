"""The checkpoints of a training run, as the Trainer of Hugging Face numbers them."""

from __future__ import annotations

import re
from pathlib import Path

from curvkit.checkpoints.confined import unreadable
from curvkit.errors import RefusedCheckpoint

NUMBERED = re.compile(r"checkpoint-(\d{1,18})")


def number_of(name: str) -> int | None:
    """The step in the name of a directory.

    Args:
        name: Of the directory.

    Returns:
        The number; None if it is not one of a run.

    Example:
        >>> number_of("checkpoint-500"), number_of("final")
        (500, None)
    """
    found = NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def numbered(directory: Path) -> list[Path]:
    """The checkpoints of a run, by number.

    Args:
        directory: Of the run.

    Returns:
        Its children `checkpoint-N`, the last one last.

    Raises:
        RefusedCheckpoint: If the directory cannot be listed.

    Cost: one listing.
    """
    try:
        found = [(n, p) for p in directory.iterdir() if (n := number_of(p.name)) is not None and p.is_dir()]
    except OSError as error:
        raise RefusedCheckpoint(unreadable(directory, error)) from error
    return [path for _, path in sorted(found)]
