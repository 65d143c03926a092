"""Which files of a folder are a state's: nothing else there is ever removed."""

from __future__ import annotations

import re
from pathlib import Path

from curvkit.errors import InvalidArgument
from curvkit.results import manifest
from curvkit.results.lock import LOCK
from curvkit.results.manifest import SEGMENT

OURS = re.compile(
    rf"{LOCK}|{SEGMENT.pattern}|{re.escape(manifest.NAME)}|\.({SEGMENT.pattern}|{re.escape(manifest.NAME)})\.\d+\.tmp"
)
"""Names of what a state writes."""


def inside(path: Path) -> list[Path]:
    """What a state wrote in a folder.

    Args:
        path: Of the folder, which need not be there.

    Returns:
        Paths, in no order.
    """
    return [inner for inner in path.iterdir() if OURS.fullmatch(inner.name)] if path.is_dir() else []


def refuse_strangers(path: Path) -> None:
    """Refuse a folder that is somewhere else, or that is not a state's; nothing is written.

    Args:
        path: Of the folder, which need not be there.

    Raises:
        InvalidArgument: If it is a link, or has other files and no manifest of a state.
    """
    if path.is_symlink():
        raise InvalidArgument(
            f"{path} is a link, and the state of a run must be a folder of its own, whose files are removed with it. Remove the link, or "
            "choose another folder."
        )
    strangers = (
        sorted(inner.name for inner in path.iterdir() if not OURS.fullmatch(inner.name)) if path.is_dir() else []
    )
    if strangers and not manifest.described(path):
        raise InvalidArgument(
            f"{path} is not the state of a run: it has {strangers[0]!r}{' and more' if len(strangers) > 1 else ''}, and no {manifest.NAME} "
            "of curvkit. A state must have a folder of its own. Move what is there, or choose another folder."
        )
