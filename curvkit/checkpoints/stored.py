"""A tensor in a file as its header describes it: where its numbers lie, and whether they can lie there."""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass
from typing import Any

from curvkit.checkpoints.allowed import QUANTISED, STORAGES, WIDTHS
from curvkit.checkpoints.pickle_values import Global, NotPlain

LARGEST = 1 << 62
CODES = {"float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "uint8": "B"}
"""dtype -> how struct calls it."""


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes in a file that tensors refer to.

    Args:
        key: Its name in the file.
        dtype: What its numbers are; "untyped" where the tensor says so.
        numel: How many, as the pickle claims.
    """

    key: str
    dtype: str
    numel: int

    @property
    def bytes(self) -> int:
        """As claimed."""
        return self.numel * self.width

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return {**WIDTHS, **dict(QUANTISED.values())}.get(self.dtype, 1)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose numbers have not been read.

    Args:
        shape: Sizes.
        dtype: torch's name, for example "float32".
        storage_key: Name of its storage in the file; tensors with one key share memory.
        offset: Of its first number in the storage, in numbers.
        stride: In numbers.
        storage_numel: Numbers in the storage.
    """

    shape: tuple[int, ...]
    dtype: str
    storage_key: str
    offset: int
    stride: tuple[int, ...]
    storage_numel: int

    @property
    def numel(self) -> int:
        """Numbers in it, as its shape says."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of those numbers."""
        return self.numel * WIDTHS[self.dtype]

    @property
    def storage_bytes(self) -> int:
        """Of the storage."""
        return self.storage_numel * WIDTHS[self.dtype]


def storage_of(identity: Any) -> Any:
    """Read a persistent id, by which torch refers to a storage.

    Args:
        identity: ("storage", class, key, device, numel), and a sixth part in files before torch 1.6.

    Returns:
        The storage; for the id of a class in an old pickled module, that class's name.

    Raises:
        NotPlain: If it is of another form.
    """
    parts: list[Any] = list(identity) if isinstance(identity, tuple) else []
    if len(parts) == 4 and parts[0] == "module":
        return parts[1]
    if len(parts) not in (5, 6) or parts[0] != "storage":
        raise NotPlain("it refers to something that is no storage")
    _, kind, key, _, numel, *view = parts
    if view not in ([], [None]):
        raise NotPlain("it has a view of a storage, as only very old versions of torch wrote")
    if not isinstance(kind, Global) or not kind.module.startswith("torch"):
        raise NotPlain("one of its storages is of no class of torch")
    if not isinstance(key, str) or not _size(numel):
        raise NotPlain("one of its storages has no name or no size")
    if kind.name in ("UntypedStorage", "TypedStorage"):
        return Storage(key, "untyped", numel)
    known = STORAGES.get(kind.name) or QUANTISED.get(kind.name)
    if known is None:
        raise NotPlain(f"its storages are of the class {kind.full[:80]!r}, which is none of torch's")
    return Storage(key, known[0], numel)


def tensor_of(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> StoredTensor:
    """Check that a tensor lies within its storage.

    Args:
        storage: As of `storage_of`.
        offset: In numbers.
        shape: Sizes.
        stride: In numbers.
        dtype: Where the storage has none; a `Global` such as torch.uint16.

    Returns:
        The tensor.

    Raises:
        NotPlain: If it would read outside its storage, or anything is not a size.
    """
    if not isinstance(storage, Storage):
        raise NotPlain("a tensor in it has no storage")
    name = storage.dtype
    if dtype is not None:
        name = dtype.name if isinstance(dtype, Global) and dtype.module == "torch" else ""
    if name not in WIDTHS:
        raise NotPlain(f"a tensor in it is of the type {name[:40]!r}, which is not read")
    sized = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 64
    if not sized or not all(_size(n) for n in (*shape, *stride, offset)) or math.prod(shape) > LARGEST:
        raise NotPlain("a tensor in it has a shape, stride or offset that is no size")
    available = storage.bytes // WIDTHS[name]
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    if last >= max(available, 1) or (math.prod(shape) and not available):
        raise NotPlain(
            f"a tensor of shape {shape} reads outside its storage {storage.key[:40]!r}, which has {available:,} numbers"
        )
    return StoredTensor(shape, name, storage.key, offset, stride, available)


def dense(name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    """A tensor with a storage of its own, as formats without shared storages have.

    Args:
        name: Of the tensor, and of its storage.
        shape: Sizes.
        dtype: torch's name.

    Returns:
        The tensor, its last dimension in one piece.

    Example:
        >>> dense("w", (2, 3), "float32").stride
        (3, 1)
    """
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return StoredTensor(shape, dtype, name, 0, tuple(reversed(stride)), math.prod(shape))


def number_in(content: bytes, stored: StoredTensor, *, swapped: bool) -> float | int | None:
    """The number of a tensor that has one, without torch.

    Args:
        content: Of its storage.
        stored: Its place.
        swapped: Whether the bytes have the other order than this machine's.

    Returns:
        The number; None for a type that Python has not.

    Example:
        >>> number_in(bytes([0, 0, 128, 63]), StoredTensor((), "float32", "0", 0, (), 1), swapped=False)
        1.0
    """
    code = CODES.get(stored.dtype)
    if code is None:
        return None
    little = (sys.byteorder == "little") != swapped
    start = stored.offset * WIDTHS[stored.dtype]
    return struct.unpack_from(("<" if little else ">") + code, content, start)[0]


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST
