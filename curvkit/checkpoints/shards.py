"""The weights of a directory: one file, or shards that an index lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkit.checkpoints.confined import confined, unreadable
from curvkit.checkpoints.documents import brief, document
from curvkit.checkpoints.places import check_places
from curvkit.checkpoints.safetensors_file import NO_CHECKSUM, Stored, header, read_tensors
from curvkit.errors import RefusedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[Path], Any]
"""Reads a file of torch.save as plain data; `curvkit.checkpoints.reading` has it."""
CANDIDATES = (
    ("model.safetensors", True),
    ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", False),
)
"""Names of Hugging Face in its own order of preference, and whether they are of safetensors."""
SHOWN = 3


@dataclass(frozen=True)
class Shards:
    """Files that together hold one model.

    Args:
        directory: Where they lie.
        files: Name -> resolved path.
        safetensors: Whether they are of that format; else of torch.save.
        places: Name of a tensor -> name of its file, as the index says; None for a single file.
        total: Bytes of all tensors, as the index says.
        notes: What a reader should know.
    """

    directory: Path
    files: Mapping[str, Path]
    safetensors: bool
    places: Mapping[str, str] | None = None
    total: Any = None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def find(directory: Path) -> Shards | None:
    """Look for weights under the names that Hugging Face gives them.

    Args:
        directory: Of one model.

    Returns:
        Where they are; None if no such file is there.

    Raises:
        RefusedCheckpoint: If an index is damaged, names a file that is not there, or one outside the directory.

    Cost: the index is read; the weights are not.
    """
    there = [(name, safetensors) for name, safetensors in CANDIDATES if _lies(directory / name)]
    if not there:
        return None
    name, safetensors = there[0]
    notes = tuple(f"{other} lies beside {name} and was not read" for other, _ in there[1:])
    path = confined(directory, name, source=str(directory))
    if not name.endswith(".json"):
        return _checked(Shards(directory, {name: path}, safetensors, notes=notes))
    source = str(directory / name)
    index = document(path)
    places, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise RefusedCheckpoint(
            f"{source}: has no weight_map from tensors to files. Take the index as its library wrote it."
        )
    files = {file: confined(directory, file, source=source) for file in dict.fromkeys(places.values())}
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _checked(Shards(directory, files, safetensors, places, total, notes))


def described(shards: Shards) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Headers of all shards, checked against the index.

    Args:
        shards: Of safetensors.

    Returns:
        Tensors by name, and notes.

    Raises:
        RefusedCheckpoint: If a header is damaged, or index and shards disagree.

    Cost: the headers are read.
    """
    found: dict[str, Stored] = {}
    parts = {file: header(path).tensors for file, path in shards.files.items()}
    _agree(shards, parts)
    for tensors in parts.values():
        found.update(tensors)
    size = sum(stored.stop - stored.start for stored in found.values())
    return found, (*shards.notes, NO_CHECKSUM, *_size_note(shards, size, size))


def read(shards: Shards, load: Load) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the tensors of all shards.

    Args:
        shards: From `find`.
        load: For files of torch.save.

    Returns:
        Tensors by name, and notes.

    Raises:
        RefusedCheckpoint: If a file is damaged or unsafe, or index and shards disagree.

    Cost: one pass over the files, two over those of torch.save, whose checksums come first.
    """
    if shards.safetensors:
        _, notes = described(shards)  # before any shard fills the memory
        parts = {file: read_tensors(path) for file, path in shards.files.items()}
    else:
        parts = {file: _state_dict(shards.directory / file, load(path)) for file, path in shards.files.items()}
        once = {t.untyped_storage().data_ptr(): t.nbytes for tensors in parts.values() for t in tensors.values()}
        every = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        notes = (*shards.notes, *_size_note(shards, every, sum(once.values())))
    _agree(shards, parts)
    return {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}, notes


def _lies(path: Path) -> bool:
    """Also a link to nothing: such a download was not finished, which is not the same as no weights."""
    return path.is_symlink() or path.exists()


def _checked(shards: Shards) -> Shards:
    for file, path in shards.files.items():
        try:
            with path.open("rb") as opened:
                start = opened.read(8)
        except OSError as error:
            raise RefusedCheckpoint(unreadable(shards.directory / file, error)) from error
        if start == b"version ":
            raise RefusedCheckpoint(
                f"{shards.directory / file}: a pointer of Git LFS, not the weights. Fetch them with: git lfs pull"
            )
    return shards


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    from torch import Tensor  # `find` and `described` are used where torch is not wanted

    if not isinstance(content, Mapping) or not content:
        raise RefusedCheckpoint(f"{path}: holds a {type(content).__name__}, not a state dict. Take another copy.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RefusedCheckpoint(
                f"{path}: the entry {brief(str(name))} is a {type(value).__name__}; weights of Hugging Face are tensors by name. "
                "Pass the file itself if it is a training dict."
            )
    check_places(path, content, None, Tensor)
    return dict(content)


def _agree(shards: Shards, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that every tensor lies where the index says, and nowhere else."""
    if shards.places is None:
        return
    owner: dict[str, str] = {}
    for file, tensors in parts.items():
        for name in tensors:
            if name in owner:
                raise _disagree(shards, f"the tensor {brief(name)} lies in two shards, {owner[name]} and {file}")
            owner[name] = file
    absent = [name for name in shards.places if name not in owner]
    if absent:
        what = _names(absent)
        raise _disagree(shards, f"{what} should lie in {shards.places[absent[0]]}, where it is not")
    unknown = [name for name in owner if name not in shards.places]
    if unknown:
        raise _disagree(shards, f"{owner[unknown[0]]} holds {_names(unknown)}, which the index does not name")
    moved = [name for name, file in owner.items() if shards.places[name] != file]
    if moved:
        name = moved[0]
        raise _disagree(shards, f"{_names(moved)} lies in {owner[name]}, and not in {shards.places[name]}")


def _disagree(shards: Shards, why: str) -> RefusedCheckpoint:
    return RefusedCheckpoint(
        f"{shards.directory}: index and shards disagree: {why}. They come from different saves or are incomplete; "
        "take the whole directory from one save."
    )


def _names(names: list[str]) -> str:
    shown = ", ".join(brief(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _size_note(shards: Shards, *sizes: int) -> tuple[str, ...]:
    """The index's sum is of no use to a reader: writers count tied tensors once or twice, and conversions leave it as it was."""
    if shards.places is None or shards.total is None or shards.total in sizes:
        return ()
    return (f"the index counts {brief(shards.total)} bytes (total_size), the shards hold {sizes[0]:,}",)
