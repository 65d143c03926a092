"""The cache of Hugging Face's downloads on this disk; the network is never asked."""

from __future__ import annotations

import os
import re
from pathlib import Path

from curvkit.errors import RefusedCheckpoint

IDENTIFIER = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
"""The name of a model, with or without its organisation."""
REVISION = re.compile(r"\w[\w./-]{0,127}", re.ASCII)


def cached(name: str, revision: str | None = None) -> Path | None:
    """Find a downloaded model.

    Args:
        name: "organisation/model".
        revision: Branch, tag or commit; None stands for "main".

    Returns:
        The directory of its snapshot; None if it was not downloaded, or if `name` is no such name.

    Raises:
        RefusedCheckpoint: If it was downloaded and its snapshot is not complete.

    Cost: look-ups in the file system.
    """
    if not IDENTIFIER.fullmatch(name) or ".." in name:
        return None
    model = _root() / f"models--{name.replace('/', '--')}"
    return snapshot(model, revision) if model.is_dir() else None


def snapshot(model: Path, revision: str | None = None) -> Path:
    """Choose the snapshot of one model of the cache.

    Args:
        model: The directory `models--organisation--name`.
        revision: Branch, tag or commit; None stands for "main", or for the only snapshot that is there.

    Returns:
        The directory `snapshots/<commit>`.

    Raises:
        RefusedCheckpoint: If there is no such snapshot.

    Cost: look-ups in the file system.
    """
    wanted = revision or "main"
    try:
        present = sorted(path.name for path in (model / "snapshots").iterdir() if path.is_dir())
        commit = _commit(model, wanted)
    except (OSError, ValueError) as error:
        raise RefusedCheckpoint(
            f"{model}: a model of the Hugging Face cache without readable snapshots ({error}). Download it again."
        ) from error
    if commit not in present and revision is None and len(present) == 1:
        commit = present[0]
    if commit not in present:
        shown = ", ".join(present[:5]) or "none"
        raise RefusedCheckpoint(
            f"{model}: the revision {wanted!r} is not among the snapshots that were downloaded ({shown}). "
            "Pass the directory of a snapshot, or download the revision."
        )
    return model / "snapshots" / commit


def _commit(model: Path, revision: str) -> str:
    if not REVISION.fullmatch(revision) or ".." in revision:
        return ""
    reference = model / "refs" / revision
    return reference.read_text(encoding="ascii").strip()[:128] if reference.is_file() else revision


def _root() -> Path:
    """Where huggingface_hub keeps downloads, by the variables that it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "huggingface" / "hub"
