"""Files of the safetensors format: a header of JSON, then the numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkit.checkpoints.confined import unreadable
from curvkit.checkpoints.documents import brief, parsed
from curvkit.errors import RefusedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Name in the header -> torch's name, and bytes of one number."""
NO_CHECKSUM = "safetensors has no checksum: a flipped bit in the file would not be noticed"


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it.

    Args:
        dtype: torch's name, for example "bfloat16".
        shape: Sizes.
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, without its numbers.

    Args:
        tensors: In the order of the bytes in the file.
        metadata: What the writer put beside them.
        bytes: Of the whole file.
    """

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    bytes: int


def header(path: Path) -> Header:
    """Read the header and check that it describes exactly the bytes that follow it.

    Args:
        path: An ordinary file.

    Returns:
        Names, shapes, dtypes and places.

    Raises:
        RefusedCheckpoint: If the file is cut short, longer than its header says, or the header is not one of the format.

    Cost: the header is read and nothing else; torch is not imported.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        >>> _ = path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        >>> header(path).tensors["w"].dtype
        'float32'
    """
    try:
        with path.open("rb") as file:
            return _header(path, file)
    except OSError as error:
        raise RefusedCheckpoint(unreadable(path, error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into memory of its own.

    The file is not mapped into memory, as the library does: a writer that cuts a mapped file short kills the process that reads it.

    Args:
        path: An ordinary file.

    Returns:
        Tensors by name, in the order of the file.

    Raises:
        RefusedCheckpoint: As `header`; also if the file is written to meanwhile.

    Cost: one pass over the file; the memory of its tensors.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> safetensors.torch.save_file({"w": torch.ones(2)}, path)
        >>> read_tensors(path)
        {'w': tensor([1., 1.])}
    """
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            found = _header(path, file)
            tensors = {name: _tensor(path, file, name, stored) for name, stored in found.tensors.items()}
            after = os.fstat(file.fileno())
    except OSError as error:
        raise RefusedCheckpoint(unreadable(path, error)) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RefusedCheckpoint(
            f"{path}: the file was written to while it was read. Wait until it is complete, then try again."
        )
    return tensors


def _header(path: Path, file: BufferedReader) -> Header:
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    if start == b"version ":
        raise RefusedCheckpoint(
            f"{path}: a pointer of Git LFS, not the file itself ({size:,} bytes of text). Fetch it with: git lfs pull"
        )
    length = int.from_bytes(start, "little") if size >= 8 else 0
    if size < 8 or length > size - 8:
        raise RefusedCheckpoint(
            f"{path}: a safetensors file that is cut short: {size:,} bytes, but its header alone needs {length + 8:,}. "
            "Wait until it is written, or take another copy."
        )
    if length > LONGEST_HEADER:
        raise RefusedCheckpoint(
            f"{path}: the safetensors header claims {length:,} bytes, where the format allows {LONGEST_HEADER:,}: the file is damaged. "
            "Take another copy."
        )
    content = file.read(length)
    entries = parsed(content, f"{path}: the safetensors header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RefusedCheckpoint(_damaged(path, "its __metadata__ is not a table of strings"))
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 8 + length
    for name, stored in tensors.items():
        if stored.start != end:
            how = "overlaps the tensor before it" if stored.start < end else "leaves a hole before it"
            raise RefusedCheckpoint(_damaged(path, f"the tensor {brief(name)} {how}"))
        end = stored.stop
    if end > size:
        raise RefusedCheckpoint(
            f"{path}: a safetensors file that is cut short: its header describes {end:,} bytes, and {size:,} are there. "
            "Wait until it is written, or take another copy."
        )
    if end < size:
        raise RefusedCheckpoint(_damaged(path, f"{size - end:,} bytes follow the last tensor"))
    return Header(tensors, metadata, size)


def _stored(path: Path, name: str, entry: Any, base: int) -> Stored:
    """The entry of one tensor, with shape, dtype and place in agreement."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        claim = f"the entry of {brief(name)} does not have exactly dtype, shape and data_offsets"
        raise RefusedCheckpoint(_damaged(path, claim))
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES if isinstance(dtype, str) else True:
        raise RefusedCheckpoint(
            f"{path}: the tensor {brief(name)} has the dtype {brief(dtype)}; {', '.join(DTYPES)} are read. Types of fewer than "
            "8 bits are quantised weights, which have no curvature of their own: pass the checkpoint before quantisation."
        )
    if not _sizes(shape) or not _sizes(place) or len(place) != 2 or place[1] < place[0]:
        raise RefusedCheckpoint(_damaged(path, f"shape or data_offsets of {brief(name)} are not sizes"))
    torch_name, width = DTYPES[dtype]
    if place[1] - place[0] != math.prod(shape) * width:
        claim = f"the tensor {brief(name)} claims the shape {_short(tuple(shape))} of {dtype}, but has {place[1] - place[0]:,} bytes"
        raise RefusedCheckpoint(_damaged(path, claim))
    return Stored(torch_name, tuple(shape), base + place[0], base + place[1])


def _sizes(value: Any) -> bool:
    """Whether it is a list of sizes that torch can hold."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _tensor(path: Path, file: BufferedReader, name: str, stored: Stored) -> Tensor:
    import torch  # `header` is used where torch is not wanted

    try:
        raw = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
        file.seek(stored.start)
        filled, view = 0, raw.numpy().data
        while filled < len(view):
            count = file.readinto(view[filled : filled + (1 << 30)])
            if not count:
                raise RefusedCheckpoint(
                    f"{path}: the file became shorter while it was read. Wait until it is written, then try again."
                )
            filled += count
        if stored.dtype == "bool" and bool((raw > 1).any()):
            raise RefusedCheckpoint(
                f"{path}: the tensor {brief(name)} is of truth values, but has bytes other than 0 and 1: the file is damaged. "
                "Take another copy."
            )
        return raw.view(getattr(torch, stored.dtype)).reshape(stored.shape)
    except RuntimeError as error:  # more numbers than memory, or a shape that torch cannot hold
        raise RefusedCheckpoint(
            f"{path}: the tensor {brief(name)} of shape {_short(stored.shape)} cannot be held ({str(error).splitlines()[0][:200]})."
        ) from error


def _damaged(path: Path, why: str) -> str:
    return f"{path}: the safetensors header is damaged: {why}. Take another copy or an earlier checkpoint."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
