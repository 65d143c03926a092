"""Files that torch wrote before version 1.6: five pickles, then the numbers of every storage; without any checksum."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from curvkit.checkpoints.outline import Outline, outline
from curvkit.checkpoints.pickle_values import NotPlain
from curvkit.errors import RefusedCheckpoint

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
FIRST_LOOK = 1 << 20
"""Bytes that are read at first; more of them where the pickles are longer."""
LARGEST_OUTLINE = 1 << 30
NO_CHECKSUM = "files of torch before 1.6 have no checksum: a flipped bit in it would not be noticed"


class LegacyFile:
    """A file of torch before 1.6, open for reading; it has the reading methods of `Archive`.

    Args:
        path: For messages.
        file: Open in binary mode; it is closed by whoever opened it.

    Raises:
        RefusedCheckpoint: If it is cut short, malformed, or its storages have other sizes than it claims.

    Cost: its pickles are read, and eight bytes of every storage.
    """

    checksum = None

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        try:
            self.size = file.seek(0, 2)
            self.content, self.swapped, keys, end = self._pickles()
            self.starts = self._storages(keys, end)
        except OSError as error:
            raise RefusedCheckpoint(_damaged(path, str(error))) from error

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every storage."""
        return {key: storage.bytes for key, storage in self.content.storages.items()}

    def read_into(self, key: str, target: memoryview) -> None:
        """Read the numbers of a storage.

        Args:
            key: Its name.
            target: Of its size.

        Raises:
            RefusedCheckpoint: If the file became shorter.

        Cost: one pass over them.
        """
        self.file.seek(self.starts[key])
        position = 0
        while position < len(target):
            chunk = self.file.read(min(1 << 20, len(target) - position))
            if not chunk:
                raise RefusedCheckpoint(_damaged(self.path, "it became shorter while it was read"))
            target[position : position + len(chunk)] = chunk
            position += len(chunk)

    def verify(self) -> None:
        """Nothing: the format has no checksum."""

    def _pickles(self) -> tuple[Outline, bool, Any, int]:
        """The content, the order of bytes, the keys of the storages, and where their numbers begin."""
        look = FIRST_LOOK
        while True:
            self.file.seek(0)
            data = self.file.read(look)
            try:
                return self._parsed(data)
            except NotPlain as error:
                if len(data) >= min(self.size, LARGEST_OUTLINE):
                    raise RefusedCheckpoint(_damaged(self.path, str(error))) from error
            look *= 4

    def _parsed(self, data: bytes) -> tuple[Outline, bool, Any, int]:
        magic = outline(data)
        protocol = outline(data, magic.end)
        system = outline(data, protocol.end)
        if magic.content != MAGIC_NUMBER or protocol.content != PROTOCOL or not isinstance(system.content, dict):
            raise NotPlain("it does not begin as torch begins its files")
        content = outline(data, system.end)
        keys = outline(data, content.end)
        return content, system.content.get("little_endian") is False, keys.content, keys.end

    def _storages(self, keys: Any, position: int) -> dict[str, int]:
        claimed = self.content.storages
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(claimed):
            raise RefusedCheckpoint(_damaged(self.path, "it does not list the storages that its tensors refer to"))
        starts: dict[str, int] = {}
        for key in keys:
            self.file.seek(position)
            head = self.file.read(8)
            width = claimed[key].width
            numel = int.from_bytes(head, "big" if self.swapped else "little")
            if key in starts or len(head) < 8 or numel * width != claimed[key].bytes:
                raise RefusedCheckpoint(
                    _damaged(self.path, f"its storage {key[:40]!r} is not of the size that its tensors need")
                )
            starts[key] = position + 8
            position += 8 + numel * width
        if position != self.size:
            how = "is cut short" if position > self.size else "goes on after its last storage"
            raise RefusedCheckpoint(_damaged(self.path, f"it {how}: {self.size:,} bytes, where {position:,} belong"))
        return starts


def _damaged(path: Path, why: str) -> str:
    return f"{path}: the file is damaged ({why}). Take another copy or an earlier checkpoint."
