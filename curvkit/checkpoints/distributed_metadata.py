"""The metadata of torch.distributed.checkpoint: which tensors there are, and where their pieces lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from curvkit.checkpoints.allowed import WIDTHS
from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.pickle_machine import Machine, Maker
from curvkit.checkpoints.pickles import Global, Made, NotPlain, Pickle
from curvkit.checkpoints.pieces import Budget, Piece, Place, Split, check_cover, damaged
from curvkit.errors import RefusedCheckpoint

CHECKPOINT = "torch.distributed.checkpoint.metadata"
SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
"""Where torch before 2.3 had the properties of tensors."""
CLASSES = {
    f"{CHECKPOINT}.Metadata",
    f"{CHECKPOINT}.MetadataIndex",
    f"{CHECKPOINT}.StorageMeta",
    f"{CHECKPOINT}.ChunkStorageMetadata",
    f"{CHECKPOINT}.TensorStorageMetadata",
    f"{CHECKPOINT}.BytesStorageMetadata",
    f"{CHECKPOINT}.TensorProperties",
    f"{CHECKPOINT}._MEM_FORMAT_ENCODING",
    f"{SHARDED}.TensorProperties",
    f"{SHARDED}.MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "pathlib._local.WindowsPath",
    "collections.OrderedDict",
}
"""All that a metadata file has need of, besides dtypes; not one of them is imported or called."""
LARGEST = 1 << 62


@dataclass(frozen=True)
class Metadata:
    """Contents of a checkpoint by name.

    Args:
        tensors: By their flattened names, "model.0.weight".
        values: All else, each a small file of torch.save.
        paths: Flattened name -> the keys on the way to it; integers count the items of lists.
    """

    tensors: Mapping[str, Split]
    values: Mapping[str, Place]
    paths: Mapping[str, tuple[str | int, ...]]


def metadata(contents: Mapping[str, bytes]) -> Metadata:
    """Interpret the metadata of one checkpoint.

    Args:
        contents: Path for messages -> the file; several, where each process wrote one of its own.

    Returns:
        What the checkpoint holds; every tensor is covered by its pieces.

    Raises:
        RefusedCheckpoint: If a file is damaged or names anything but the classes of such a file, or pieces are missing.

    Cost: linear in the length, about ten microseconds per tensor and process; torch is not imported.
    """
    known: dict[str, tuple[str, tuple[int, ...], dict[tuple[int, ...], Piece]]] = {}
    values: dict[str, Place] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for source, content in contents.items():
        _File(source, content).merge(known, values, paths)
    source = next(iter(contents))
    tensors, budget = {}, Budget(source)
    for name, (dtype, shape, pieces) in known.items():
        if name in values:
            raise RefusedCheckpoint(damaged(source, f"{brief(name)} is a tensor and something else"))
        check_cover(name, shape, list(pieces.values()), budget)
        tensors[name] = Split(dtype, shape, tuple(pieces.values()))
    return Metadata(tensors, values, paths)


class _File:
    """One metadata file, its records checked one by one."""

    def __init__(self, source: str, content: bytes) -> None:
        self.source = source
        pickle = Pickle(content, makers=_MAKERS)
        try:
            loaded = pickle.load()
        except NotPlain as error:
            raise RefusedCheckpoint(damaged(source, str(error))) from error
        foreign = sorted(
            name
            for name in pickle.globals
            if name not in CLASSES and not (name.startswith("torch.") and name[6:] in WIDTHS)
        )
        if foreign:
            raise RefusedCheckpoint(
                f"{source}: refers to {', '.join(brief(name) for name in foreign[:5])}, which the metadata of a checkpoint has no need of; "
                "a reader that believes it would run code. Nothing was executed. Take the checkpoint from where it was written."
            )
        self.root = self.state(loaded, "Metadata")

    def merge(
        self,
        known: dict[str, tuple[str, tuple[int, ...], dict[tuple[int, ...], Piece]]],
        values: dict[str, Place],
        paths: dict[str, tuple[str | int, ...]],
    ) -> None:
        """Add what this file describes; what another process has described already must agree with it."""
        described, stored = self.root.get("state_dict_metadata"), self.root.get("storage_data")
        if not isinstance(described, dict) or not isinstance(stored, dict):
            self.fail("it lists no tensors or no places")
        places = self.places(stored)
        for name, record in described.items():
            if not isinstance(name, str):
                self.fail("a name in it is not text")
            if _class(record) == "BytesStorageMetadata":
                place = places.get((name, None)) or places.get((name, ()))
                if place is None:
                    self.fail(f"it has no place for {brief(name)}")
                values.setdefault(name, place)
                continue
            dtype, shape, pieces = self.tensor(name, record, places)
            if name in known and known[name][:2] != (dtype, shape):
                self.fail(f"{brief(name)} has another shape or dtype than in the metadata of another process")
            for offsets, piece in pieces.items():
                known.setdefault(name, (dtype, shape, {}))[2].setdefault(offsets, piece)
            known.setdefault(name, (dtype, shape, {}))
        paths.update(self.paths(described))

    def tensor(
        self, name: str, record: Any, places: Mapping[Any, Place]
    ) -> tuple[str, tuple[int, ...], dict[tuple[int, ...], Piece]]:
        state = self.state(record, "TensorStorageMetadata")
        dtype, shape, chunks = self.dtype(name, state), self.sizes(state.get("size")), state.get("chunks")
        if not isinstance(chunks, list):
            self.fail(f"{brief(name)} has no pieces")
        pieces: dict[tuple[int, ...], Piece] = {}
        for chunk in chunks:
            part = self.state(chunk, "ChunkStorageMetadata")
            offsets, sizes = self.sizes(part.get("offsets")), self.sizes(part.get("sizes"))
            if not len(offsets) == len(sizes) == len(shape):
                self.fail(f"a piece of {brief(name)} has another number of dimensions")
            if not math.prod(sizes):
                continue
            if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                self.fail(f"a piece of {brief(name)} lies outside its shape {shape}")
            place = places.get((name, offsets))
            if place is None:
                self.fail(f"it has no place for a piece of {brief(name)}")
            if offsets in pieces:
                self.fail(f"two pieces of {brief(name)} overlap")
            if place.length < math.prod(sizes) * WIDTHS[dtype]:
                self.fail(
                    f"a piece of {brief(name)} claims {math.prod(sizes):,} numbers of {dtype}, but has {place.length:,} bytes"
                )
            pieces[offsets] = Piece(offsets, sizes, place)
        return dtype, shape, pieces

    def dtype(self, name: str, state: Mapping[str, Any]) -> str:
        properties = state.get("properties")
        if not isinstance(properties, Made) or _class(properties) != "TensorProperties":
            self.fail(f"{brief(name)} has no properties")
        held = properties.state
        found = held[0] if isinstance(held, tuple) and held else None
        if not isinstance(found, Global) or found.module != "torch" or found.name not in WIDTHS:
            self.fail(f"{brief(name)} has no dtype")
        return found.name

    def places(self, stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Place]:
        found: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        for key, value in stored.items():
            index, info = self.state(key, "MetadataIndex"), self.state(value, "_StorageInfo")
            name, offset = index.get("fqn"), index.get("offset")
            file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
            if not isinstance(name, str) or not isinstance(file, str) or not _size(start) or not _size(length):
                self.fail("a place in it is none")
            if info.get("transform_descriptors"):
                raise RefusedCheckpoint(
                    f"{self.source}: {brief(name)} was written through an extension (compressed, for example), which is not read. "
                    "Write the checkpoint again with a plain FileSystemWriter."
                )
            found[name, None if offset is None else self.sizes(offset)] = Place(file, start, length)
        return found

    def paths(self, described: Mapping[str, Any]) -> dict[str, tuple[str | int, ...]]:
        held = self.root.get("planner_data")
        if held is None:
            return {name: (name,) for name in described}
        if not isinstance(held, dict):
            self.fail("it does not say how its names are nested")
        found: dict[str, tuple[str | int, ...]] = {}
        for name in described:
            path = held.get(name)
            parts = path if isinstance(path, tuple) and all(type(part) in (str, int) for part in path) else ()
            if not parts or ".".join(map(str, parts)) != name:
                self.fail(f"it does not say where {brief(name)} belongs")
            found[name] = parts
        return found

    def state(self, record: Any, kind: str) -> dict[str, Any]:
        if _class(record) != kind or not isinstance(record.state, dict):
            self.fail(f"a {kind} is expected where {_class(record) or 'something else'} stands")
        return record.state

    def sizes(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, tuple | list) or len(value) > 64 or not all(_size(n) for n in value):
            self.fail("a size in it is none")
        return tuple(value)

    def fail(self, why: str) -> NoReturn:
        raise RefusedCheckpoint(damaged(self.source, why))


def _size_of(_: Machine, arguments: Any) -> Any:
    (sizes,) = arguments
    return tuple(sizes) if isinstance(sizes, list) else sizes


def _empty(_: Machine, arguments: Any) -> Any:
    if arguments:
        raise NotPlain("a dict in it is made of something")
    return {}


_MAKERS: dict[str, Maker] = {"torch.Size": _size_of, "collections.OrderedDict": _empty}


def _class(record: Any) -> str:
    return record.full.rpartition(".")[2] if isinstance(record, Made) else ""


def _size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LARGEST
