"""Single files of weights that belong into a directory, which says more than they do."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
"""How the name of one of several files ends."""


def part_of(path: Path) -> str | None:
    """Why a file is not read alone.

    Args:
        path: Of the file.

    Returns:
        What to do, for one of several files of a model; else None.

    Example:
        >>> part_of(Path("model.safetensors")) is None
        True
    """
    if PART.search(path.name) is None:
        return None
    return f"one of several files that together hold a model. Pass the directory that they lie in: {path.parent}"


def described_by(path: Path) -> str | None:
    """Whether a configuration lies beside a file of weights.

    Args:
        path: Of the file.

    Returns:
        What to do then; else None.

    Cost: look-ups in the file system.
    """
    beside = next((name for name in ("adapter_config.json", "config.json") if (path.parent / name).is_file()), None)
    if beside is None:
        return None
    return f"{beside} lies beside it: pass the directory {path.parent} to have the model built from it"
