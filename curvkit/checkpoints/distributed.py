"""Directories of torch.distributed.checkpoint, read without its own reader, which unpickles whatever the files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from curvkit.checkpoints.confined import confined, unreadable
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.distributed_metadata import Metadata, metadata
from curvkit.checkpoints.distributed_optimizer import optimizer_groups
from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.nesting import nested
from curvkit.checkpoints.pieces import Piece, Place, Split
from curvkit.checkpoints.safetensors_file import Stored
from curvkit.checkpoints.torch_item import item, number, plain
from curvkit.checkpoints.training_entries import STEP_KEYS
from curvkit.errors import RefusedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
OF_ONE_PROCESS = re.compile(r"__(\d{1,9})\.metadata")
MODEL_OF_ACCELERATE = "pytorch_model_fsdp"
OF_ACCELERATE = re.compile(rf"({MODEL_OF_ACCELERATE}|optimizer)_(\d{{1,3}})")
LARGEST_METADATA = 1 << 30
SMALL = 1 << 16
"""Bytes of an item that a description reads."""
KIND = "distributed checkpoint"
CHECKSUM = "CRC-32 of every record; none for the names in .metadata"


def read_distributed(path: Path) -> dict[str, Any]:
    """Read a checkpoint that one or many processes wrote, into whole tensors.

    Every piece of a tensor is read, checked against the metadata and put into its place. Containers are nested as they were
    saved; keys that were integers come back as strings, since that is how they are stored, but for those of an optimizer's state.

    Args:
        path: The directory with `.metadata`, or the one of accelerate with `pytorch_model_fsdp_0`.

    Returns:
        As torch.load would return a training dict.

    Raises:
        RefusedCheckpoint: If the metadata refers to code, a file lies outside the directory, a piece is missing or damaged, the
            checkpoint is still being written, or there are several models.

    Cost: one pass over the files, and the memory of all tensors with one piece more.
    """
    content: dict[str, Any] = {}
    for directory in _found(path):
        index = metadata(_contents(directory))
        with _Files(directory) as files:
            found = nested({index.paths[name]: item for name, item in _items(index, files)}, str(directory))
        for key, value in found.items():
            content[key if key not in content else f"{key}_{directory.name.rpartition('_')[2]}"] = value
    return content


def describe(path: Path) -> Description:
    """Say which tensors a checkpoint holds, from its metadata.

    Args:
        path: As for `read_distributed`.

    Returns:
        Names, shapes and dtypes.

    Raises:
        RefusedCheckpoint: As `read_distributed`, but for what only the files with the numbers can show.

    Cost: the metadata is read; torch is not imported.
    """
    groups: dict[str, dict[str, Stored]] = {}
    files: set[Path] = set()
    processes, step, optimizers = 0, None, []
    for directory in _found(path):
        index = metadata(_contents(directory))
        with _Files(directory) as opened:
            optimizers.append(optimizer_groups(index, lambda place: opened.content(place, plain), str(directory)))
            step = next((found for key in STEP_KEYS if (found := _number(index, opened, key)) is not None), step)
        alone = "model" if all(len(keys) == 1 for keys in index.paths.values()) else "others"
        for name, split in index.tensors.items():
            first, *rest = map(str, index.paths[name])
            group, inner = (first, ".".join(rest)) if rest else (alone, first)
            groups.setdefault(group, {})[inner] = Stored(split.dtype, split.shape)
            processes = max(processes, len(split.pieces))
            files |= {confined(directory, p.place.file, source=str(directory)) for p in split.pieces if p.place}
    notes = (f"tensors in up to {processes} pieces",) if processes > 1 else ()
    states, size = [found for found in optimizers if found is not None], sum(file.stat().st_size for file in files)
    optimizer = states[0] if len(states) == 1 else None
    return Description(path, KIND, size, CHECKSUM, groups, step=step, notes=notes, optimizer=optimizer)


def _parts(path: Path) -> list[Path]:
    """Directories with metadata: the one given, or those that accelerate makes for the model and its optimizer."""
    if _complete(path) or _begun(path):
        return [path]
    try:
        found = [(m[1], int(m[2]), child) for child in path.iterdir() if (m := OF_ACCELERATE.fullmatch(child.name))]
    except OSError:
        return []
    return [child for _, _, child in sorted(found) if child.is_dir()]


def _complete(path: Path) -> bool:
    return (path / METADATA).exists() or any(
        OF_ONE_PROCESS.fullmatch(child.name) for child in path.glob("__*.metadata")
    )


def _begun(path: Path) -> bool:
    return (path / f"{METADATA}.tmp").exists() or any(path.glob("__*.distcp"))


def _found(path: Path) -> list[Path]:
    parts = _parts(path)
    if not parts:
        raise RefusedCheckpoint(
            f"{path}: no checkpoint of torch.distributed.checkpoint: there is no .metadata. Pass the directory that it wrote."
        )
    models = [part for part in parts if part.name.startswith(MODEL_OF_ACCELERATE)]
    if len(models) > 1 and path not in models:
        raise RefusedCheckpoint(
            f"{path}: holds {len(models)} models, in {', '.join(model.name for model in models[:8])}"
            f"{' ...' if len(models) > 8 else ''}. Pass the directory of the one that is meant, for example {models[0]}"
        )
    for part in parts:
        if not part.resolve().is_relative_to(path.resolve()):
            raise RefusedCheckpoint(
                f"{part}: a link to {part.resolve()}, outside {path}. Pass that directory itself if it is yours."
            )
        if not _complete(part):
            raise RefusedCheckpoint(
                f"{part}: there is no .metadata, which is written last: the checkpoint is still being written, or saving was interrupted. "
                "Wait until it is complete, or take an earlier checkpoint."
            )
    return parts


def _contents(directory: Path) -> dict[str, bytes]:
    """The metadata: one file, or one of every process where they did not speak to each other."""
    names = [METADATA]
    if not (directory / METADATA).exists():
        numbers = (OF_ONE_PROCESS.fullmatch(child.name) for child in directory.glob("__*.metadata"))
        names = [f"__{number}.metadata" for number in sorted(int(m[1]) for m in numbers if m)]
    contents: dict[str, bytes] = {}
    for name in names:
        file = confined(directory, name, source=str(directory))
        try:
            size = file.stat().st_size
            if size > LARGEST_METADATA:
                raise RefusedCheckpoint(
                    f"{directory / name}: {size:,} bytes, where metadata has at most {LARGEST_METADATA:,}. Take another copy."
                )
            contents[str(directory / name)] = file.read_bytes()
        except OSError as error:
            raise RefusedCheckpoint(unreadable(directory / name, error)) from error
    return contents


class _Files:
    """The files of a directory, each opened once, and no byte of them read twice."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken: dict[str, int] = {}
        self.open: dict[str, tuple[IO[bytes], int]] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _ in self.open.values():
            file.close()

    def content(self, place: Place, read: Callable[[Path, bytes], Any] = item) -> Any:
        path = self.directory / place.file
        try:
            if place.file not in self.open:
                file = confined(self.directory, place.file, source=f"{self.directory / METADATA}").open("rb")
                self.open[place.file] = file, file.seek(0, 2)
            file, size = self.open[place.file]
            if place.offset + place.length > size:
                raise RefusedCheckpoint(
                    f"{path}: is cut short: {size:,} bytes, but the metadata places {place.length:,} bytes at {place.offset:,}. "
                    "Wait until it is written, or take another copy."
                )
            self.taken[place.file] = self.taken.get(place.file, 0) + place.length
            if self.taken[place.file] > size:
                raise RefusedCheckpoint(
                    f"{path}: the metadata places more in it than its {size:,} bytes, by naming parts of it twice, "
                    "which would fill the memory. Take the checkpoint from where it was written."
                )
            file.seek(place.offset)
            raw = file.read(place.length)
        except OSError as error:
            raise RefusedCheckpoint(unreadable(path, error)) from error
        return read(path, raw)


def _number(index: Metadata, files: _Files, key: str) -> int | None:
    """A whole number at the top of the checkpoint."""
    place = index.values.get(key)
    return files.content(place, number) if place is not None and place.length <= SMALL else None


def _items(index: Metadata, files: _Files) -> Iterator[tuple[str, Any]]:
    """Every entry, in the order of the metadata."""
    for name in index.paths:
        if name in index.tensors:
            yield name, _tensor(name, index.tensors[name], files)
        else:
            yield name, files.content(index.values[name])


def _tensor(name: str, split: Split, files: _Files) -> Tensor:
    import torch  # `describe` is used where torch is not wanted

    try:
        whole = torch.empty(split.shape, dtype=getattr(torch, split.dtype))
    except RuntimeError as error:  # more numbers than memory, or a shape that torch cannot hold
        raise RefusedCheckpoint(
            f"{files.directory}: {brief(name)} of shape {split.shape} cannot be held ({str(error).splitlines()[0][:200]})."
        ) from error
    for piece in split.pieces:
        if piece.place is None:
            continue
        part = _fitting(name, split, piece, files.content(piece.place), files.directory)
        if piece.sizes == split.shape:
            return part
        block = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))
        whole[block] = part
    return whole


def _fitting(name: str, split: Split, piece: Piece, part: Any, directory: Path) -> Tensor:
    """A piece that is what the metadata says of it."""
    import torch  # as above

    fits = isinstance(part, torch.Tensor) and tuple(part.shape) == piece.sizes
    if not fits or part.dtype is not getattr(torch, split.dtype) or part.layout is not torch.strided:
        found = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
        raise RefusedCheckpoint(
            f"{directory}: a piece of {brief(name)} should be {split.dtype} {piece.sizes}, but {found} lies there: files and metadata "
            "come from different saves. Take the whole directory from one save."
        )
    return part
