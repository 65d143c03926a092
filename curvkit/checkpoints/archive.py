"""The zip archive of torch.save: its records checked against the file before anything is read, and against their checksums when it is."""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from curvkit.errors import RefusedCheckpoint

UNREADABLE = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    NotImplementedError,
    ValueError,
    OverflowError,
    struct.error,
    RuntimeError,
)
"""What zipfile raises on a damaged archive."""
CHUNK = 1 << 20
LARGEST_OUTLINE = 1 << 30
"""Bytes of data.pkl; real ones have kilobytes, or megabytes where a log is kept in it."""
CHECKSUM = "CRC-32 of every record"
NO_CHECKSUM = "this file was written without checksums: a flipped bit in it would not be noticed"


class Archive:
    """A file that torch.save wrote as a zip archive, open for reading.

    Args:
        path: For messages.
        file: Open in binary mode; it is closed by whoever opened it.

    Raises:
        RefusedCheckpoint: If records are compressed, overlap, lie outside the file, have the same name, or names of paths.

    Cost: the directory of the archive is read, the records are not.

    Example:
        >>> import io, torch
        >>> file = io.BytesIO()
        >>> torch.save({"w": torch.ones(3)}, file)
        >>> archive = Archive(Path("ckpt.pt"), file)
        >>> archive.sizes
        {'0': 12}
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.verified: set[str] = set()
        try:
            self.size = file.seek(0, 2)
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                self.directory = archive.start_dir
                _refuse_records(path, records)
                self.starts = {record.filename: self._start(record) for record in records}
        except UNREADABLE as error:
            raise _damaged(path, error) from error
        self.records = {record.filename: record for record in records}
        self._refuse_overlaps()
        outlines = [name for name in self.records if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
        if len(outlines) != 1:
            raise RefusedCheckpoint(
                f"{path}: the archive has {len(outlines)} records called data.pkl; torch.save writes one. Pass the checkpoint itself."
            )
        self.root = outlines[0].removesuffix("data.pkl")
        prefix = f"{self.root}data/"
        self.sizes = {
            name.removeprefix(prefix): record.file_size
            for name, record in self.records.items()
            if name.startswith(prefix)
        }
        filled = [record for record in records if record.file_size]
        self.has_checksums = not filled or any(record.CRC for record in filled)

    @property
    def checksum(self) -> str | None:
        """In words; None if the file has none."""
        return CHECKSUM if self.has_checksums else None

    @property
    def swapped(self) -> bool:
        """Whether its numbers have the other order of bytes than this machine's."""
        name = f"{self.root}byteorder"
        if name not in self.records:
            return sys.byteorder != "little"
        order = self.record(name, 16)
        if order not in (b"little", b"big"):
            raise RefusedCheckpoint(
                f"{self.path}: the record 'byteorder' says {order!r}, neither little nor big. Take another copy."
            )
        return order.decode() != sys.byteorder

    def outline(self) -> bytes:
        """The pickle of everything but the numbers.

        Returns:
            Its bytes, verified.
        """
        return self.record(f"{self.root}data.pkl", LARGEST_OUTLINE)

    def record(self, name: str, limit: int) -> bytes:
        """Read a small record.

        Args:
            name: In the archive.
            limit: Bytes that it may have.

        Returns:
            Its bytes, verified.

        Raises:
            RefusedCheckpoint: If it is larger, or does not match its checksum.
        """
        if self.records[name].file_size > limit:
            raise RefusedCheckpoint(
                f"{self.path}: the record {name!r} has {self.records[name].file_size:,} bytes, where at most {limit:,} belong. "
                "Write the checkpoint again with torch.save."
            )
        return b"".join(self._chunks(name))

    def read_into(self, key: str, target: memoryview) -> None:
        """Read the numbers of a storage.

        Args:
            key: Its name.
            target: Of the size of its record.

        Raises:
            RefusedCheckpoint: If they do not match their checksum.

        Cost: one pass over the record.
        """
        position = 0
        for chunk in self._chunks(f"{self.root}data/{key}"):
            target[position : position + len(chunk)] = chunk
            position += len(chunk)

    def verify(self) -> None:
        """Check the records that were not read.

        Raises:
            RefusedCheckpoint: If one does not match its checksum.

        Cost: one pass over them.
        """
        for name in self.records:
            if name not in self.verified:
                for _ in self._chunks(name):
                    pass

    def _chunks(self, name: str) -> Iterator[bytes]:
        record, checksum = self.records[name], 0
        position, left = self.starts[name], record.file_size
        while left:
            try:
                self.file.seek(position)
                chunk = self.file.read(min(left, CHUNK))
            except OSError as error:
                raise _damaged(self.path, error) from error
            if not chunk:
                raise RefusedCheckpoint(
                    f"{self.path}: the file became shorter while it was read. Wait until it is written, then try again."
                )
            checksum = zlib.crc32(chunk, checksum)
            position, left = position + len(chunk), left - len(chunk)
            yield chunk
        if self.has_checksums and checksum != record.CRC:
            raise RefusedCheckpoint(
                f"{self.path}: the record {name!r} does not match its checksum: the file was damaged after it was written. "
                "Take another copy or an earlier checkpoint."
            )
        self.verified.add(name)

    def _start(self, record: zipfile.ZipInfo) -> int:
        """Where its bytes begin, as its own header says, which must name the same record."""
        self.file.seek(record.header_offset)
        header = self.file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"the record {record.filename[:100]!r} has no header of its own")
        named, extra = struct.unpack("<HH", header[26:])
        name = self.file.read(named)
        if name != record.filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437"):
            raise zipfile.BadZipFile(f"the record {record.filename[:100]!r} has another name in its own header")
        return record.header_offset + 30 + named + extra

    def _refuse_overlaps(self) -> None:
        """Each record must have its own part of the file, before the directory."""
        end, before = 0, ""
        places = sorted((r.header_offset, self.starts[n], r.file_size, n) for n, r in self.records.items())
        for header, start, size, name in places:
            if header < end:
                raise RefusedCheckpoint(
                    f"{self.path}: the records {before!r} and {name!r} overlap in the file, which torch.save never writes. "
                    "Write the checkpoint again with torch.save."
                )
            end, before = start + size, name
        if end > self.directory:
            raise RefusedCheckpoint(
                f"{self.path}: the record {before!r} claims {end - self.directory:,} bytes more than the file has. "
                "Take another copy or an earlier checkpoint."
            )


def _refuse_records(path: Path, records: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for record in records:
        name, why = record.filename, ""
        if record.flag_bits & 1:
            why = "is encrypted"
        elif record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            why = "is compressed, which torch.save never does: it could expand to any size"
        elif name in seen:
            why = "is there twice"
        elif name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
            why = "has the name of a path outside the archive"
        if why:
            raise RefusedCheckpoint(
                f"{path}: the record {name[:200]!r} {why}. Write the checkpoint again with torch.save."
            )
        seen.add(name)


def _damaged(path: Path, error: Exception) -> RefusedCheckpoint:
    return RefusedCheckpoint(f"{path}: the archive is damaged ({error}). Take another copy or an earlier checkpoint.")
