"""Say what a path is without unpickling anything and without importing torch."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curvkit.errors import RefusedCheckpoint

Kind = Literal["torch zip", "torch legacy", "torchscript", "exported program", "safetensors", "directory"]

UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, struct.error, RuntimeError)
"""What zipfile raises on a damaged archive."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9c"
"""How files begin that torch wrote before version 1.6."""


@dataclass(frozen=True)
class Detected:
    """What lies at a path."""

    path: Path
    kind: Kind
    bytes: int


def detect(path: Path) -> Detected:
    """Recognise a checkpoint by its first bytes and the names in its archive.

    Args:
        path: A file or directory that exists.

    Returns:
        Its kind.

    Raises:
        RefusedCheckpoint: If it is empty, cut short, or nothing that torch writes.

    Cost: under a millisecond; the data is not read.
    """
    if path.is_dir():
        return Detected(path, "directory", 0)
    size = path.stat().st_size
    if size == 0:
        raise RefusedCheckpoint(f"{path}: the file is empty. Saving was interrupted; take an earlier checkpoint.")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK"):
        return Detected(path, _zip_kind(path), size)
    if head.startswith(LEGACY_MAGIC):
        return Detected(path, "torch legacy", size)
    if len(head) > 8 and head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        return Detected(path, "safetensors", size)
    if head[:1] == b"\x80":
        raise RefusedCheckpoint(
            f"{path}: a bare pickle, not a file that torch.save wrote. Unpickling runs code, so it is not opened. "
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    raise RefusedCheckpoint(
        f"{path}: not a checkpoint: it begins with {head[:8]!r}, but torch.save writes a zip archive. "
        "Pass the file that torch.save or curvkit.save wrote."
    )


def _zip_kind(path: Path) -> Kind:
    try:
        if not zipfile.is_zipfile(path):
            raise RefusedCheckpoint(
                f"{path}: the archive is cut short or still being written. "
                "Wait until it is complete, or take an earlier checkpoint."
            )
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
    except UNREADABLE as error:
        raise RefusedCheckpoint(
            f"{path}: the archive is damaged ({error}). Take another copy or an earlier checkpoint."
        ) from error
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "exported program"
    if "data.pkl" not in names:
        raise RefusedCheckpoint(
            f"{path}: a zip archive, but not one that torch.save wrote. Pass the checkpoint itself."
        )
    return "torch zip"
