"""The outline of a torch file: its plain content, and of every tensor the shape and place. Nothing is imported, torch neither."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from curvkit.checkpoints.archive import NO_CHECKSUM, Archive
from curvkit.checkpoints.confined import unreadable
from curvkit.checkpoints.detection import detect
from curvkit.checkpoints.legacy import NO_CHECKSUM as NO_CHECKSUM_LEGACY
from curvkit.checkpoints.legacy import LegacyFile
from curvkit.checkpoints.outline import Outline, outline
from curvkit.checkpoints.pickle_values import NotPlain
from curvkit.checkpoints.printable import printable
from curvkit.checkpoints.stored import StoredTensor, number_in
from curvkit.errors import RefusedCheckpoint

LARGEST_SCALAR = 4096
"""Bytes of a storage that is read for one number."""

__all__ = ["Skeleton", "StoredTensor", "opened", "read_skeleton"]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What a torch file holds, without its numbers.

    Args:
        content: Dicts, lists, tuples and plain values, with a `StoredTensor` for every tensor.
        globals: Every name that the file refers to; none was imported.
        sizes: Bytes of every storage that is in the file, by key.
        file: Open while the context of `opened` lasts.
        notes: What a reader should know.
    """

    content: Any
    globals: set[str]
    sizes: dict[str, int]
    file: Archive | LegacyFile
    notes: tuple[str, ...] = ()

    def scalar(self, value: Any) -> float | int | None:
        """Read a number, also one that was saved as a tensor: a learning rate, a step.

        Args:
            value: Of the content.

        Returns:
            The number; None if it is none, or of a type that Python has not.

        Raises:
            RefusedCheckpoint: If it does not match its checksum.

        Cost: one small storage is read; torch is not imported.
        """
        if isinstance(value, int | float):
            return value
        if not isinstance(value, StoredTensor) or value.numel != 1 or self.sizes[value.storage_key] > LARGEST_SCALAR:
            return None
        content = bytearray(self.sizes[value.storage_key])
        self.file.read_into(value.storage_key, memoryview(content))
        return number_in(bytes(content), value, swapped=self.file.swapped)


def read_skeleton(path: Path) -> Skeleton:
    """Read the outline of a torch file.

    Args:
        path: A file that torch.save wrote, now or before torch 1.6.

    Returns:
        Its content without the numbers.

    Raises:
        RefusedCheckpoint: If it is damaged, or claims tensors that are not in it.

    Cost: linear in the size of its pickle; the numbers are not read. Torch is not imported.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> torch.save({"w": torch.ones(2, 3)}, path)
        >>> read_skeleton(path).content["w"].shape
        (2, 3)
    """
    with opened(path) as skeleton:
        return skeleton


@contextlib.contextmanager
def opened(path: Path) -> Generator[Skeleton]:
    """Read the outline of a torch file and keep the file open.

    Args:
        path: As of `read_skeleton`.

    Yields:
        The skeleton, from whose file storages can be read.

    Raises:
        RefusedCheckpoint: As `read_skeleton`; also if the file was written to meanwhile.
    """
    legacy = detect(path).kind == "torch legacy"
    try:
        file = path.open("rb")
    except OSError as error:
        raise RefusedCheckpoint(unreadable(path, error)) from error
    with file:
        before = _state(file)
        if legacy:
            old = LegacyFile(path, file)
            skeleton = Skeleton(old.content.content, old.content.globals, old.sizes, old, (NO_CHECKSUM_LEGACY,))
        else:
            archive = Archive(path, file)
            found = _outline(path, archive)
            _check_sizes(path, found, archive.sizes)
            notes = () if archive.has_checksums else (NO_CHECKSUM,)
            skeleton = Skeleton(found.content, found.globals, archive.sizes, archive, notes)
        yield skeleton
        if _state(file) != before:
            raise RefusedCheckpoint(
                f"{path}: the file was written to while it was read. Wait until it is complete, then try again."
            )


def _outline(path: Path, archive: Archive) -> Outline:
    try:
        return outline(archive.outline())
    except NotPlain as error:
        raise RefusedCheckpoint(
            f"{path}: its data.pkl is not what torch.save writes: {error}. "
            "Save the weights again: torch.save(model.state_dict(), path)."
        ) from error


def _check_sizes(path: Path, found: Outline, sizes: dict[str, int]) -> None:
    """What is claimed must be what is there; a storage of untyped bytes may end within a number."""
    for key, storage in found.storages.items():
        if key not in sizes:
            raise RefusedCheckpoint(
                f"{path}: a tensor refers to the record 'data/{printable(key, 40)}', which is not in the archive. "
                "Take another copy or an earlier checkpoint."
            )
        if storage.bytes > sizes[key] or sizes[key] - storage.bytes >= 16:
            raise RefusedCheckpoint(
                f"{path}: the storage {key[:40]!r} claims {storage.bytes:,} bytes, but {sizes[key]:,} bytes are stored. "
                "Take another copy or an earlier checkpoint."
            )


def _state(file: IO[bytes]) -> tuple[int, int]:
    """Of the open file, which stays the same if another is renamed over its name."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
