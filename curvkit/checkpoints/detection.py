"""Say what a path is without unpickling anything and without importing torch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curvkit.checkpoints.archive import UNREADABLE
from curvkit.checkpoints.confined import unreadable
from curvkit.checkpoints.directories import DirectoryKind, directory_kind
from curvkit.errors import RefusedCheckpoint

FileKind = Literal["torch zip", "torch legacy", "torchscript", "exported program", "safetensors"]
Kind = FileKind | DirectoryKind

CODE = {"torchscript": "a TorchScript file", "exported program": "a program of torch.export"}
"""Kinds that are code."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9c"
"""How files begin that torch wrote before version 1.6."""
OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself. Fetch it with: git lfs pull"),
    (b"<!DOCTYPE", "a web page, not a checkpoint: the download led to an error page. Download the file again."),
    (b"<html", "a web page, not a checkpoint: the download led to an error page. Download the file again."),
    (b"\x1f\x8b", "compressed with gzip. Unpack it first: gunzip FILE (and tar xf FILE, if it is an archive)."),
    (b"BZh", "compressed with bzip2. Unpack it first: bunzip2 FILE"),
    (b"(\xb5/\xfd", "compressed with zstd. Unpack it first: unzstd FILE"),
    (b"\xfd7zXZ", "compressed with xz. Unpack it first: unxz FILE"),
    (
        b"GGUF",
        "a GGUF file: quantised weights for llama.cpp, which have no curvature. Pass the checkpoint before conversion.",
    ),
    (
        b"\x89HDF",
        "an HDF5 file, of Keras or h5py. Save the weights from PyTorch: torch.save(model.state_dict(), path).",
    ),
    (b"\x93NUMPY", "an array of numpy. Save the weights from PyTorch: torch.save(model.state_dict(), path)."),
)
"""How files begin that people pass by mistake."""


@dataclass(frozen=True)
class Detected:
    """What lies at a path.

    Args:
        path: Where the checkpoint is; of some directories, a directory within.
        kind: How it is read.
        bytes: Of the file; 0 for a directory, whose files are counted when it is read.
        note: What the user may want to know of the choice; empty if nothing.
    """

    path: Path
    kind: Kind
    bytes: int
    note: str = ""


def detect(path: Path) -> Detected:
    """Recognise a checkpoint by its first bytes and the names in its archive or directory.

    Args:
        path: A file or directory that exists.

    Returns:
        Its kind.

    Raises:
        RefusedCheckpoint: If it cannot be opened, is empty, cut short, or nothing that is known to hold weights.

    Cost: under a millisecond; the data is not read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = path.write_bytes((2).to_bytes(8, "little") + b"{}")
        >>> detect(path).kind
        'safetensors'
    """
    try:
        if path.is_dir():
            kind, where, note = directory_kind(path)
            return Detected(where, kind, 0, note)
        if not path.is_file():
            what = "is not an ordinary file" if path.exists() else "is not there"
            raise RefusedCheckpoint(f"{path}: {what}. Pass the checkpoint itself.")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise RefusedCheckpoint(unreadable(path, error)) from error
    if size == 0:
        raise RefusedCheckpoint(f"{path}: the file is empty. Saving was interrupted; take an earlier checkpoint.")
    if path.name.startswith(DEEPSPEED) and path.name.endswith("_states.pt"):
        raise RefusedCheckpoint(
            f"{path}: a shard of DeepSpeed, which holds a part of the weights. "
            "Run the zero_to_fp32.py that DeepSpeed put beside it, and pass the file that it writes."
        )
    if head.startswith(b"PK"):
        return Detected(path, _zip_kind(path), size)
    if head.startswith(LEGACY_MAGIC):
        return Detected(path, "torch legacy", size)
    if len(head) > 8 and head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        return Detected(path, "safetensors", size)
    raise RefusedCheckpoint(f"{path}: {_other(path, head)}")


DEEPSPEED = ("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_")


def _other(path: Path, head: bytes) -> str:
    """What to say of a file that is none of the kinds that are read."""
    known = next((text for start, text in OTHERS if head.startswith(start)), None)
    if known is not None:
        return known
    if path.suffix == ".safetensors":
        return (
            "a safetensors file that is cut short or still being written. "
            "Wait until it is complete, or take an earlier checkpoint."
        )
    if path.suffix == ".onnx":
        return (
            "a model of ONNX, which is a program. Save the weights from PyTorch: torch.save(model.state_dict(), path)."
        )
    if head[:1] == b"{":
        return "a JSON document, not weights. If it belongs to a model's directory, pass the directory."
    if head[257:262] == b"ustar":
        return (
            "a tar archive. Unpack it with: tar xf FILE, and pass what is in it; or it is of torch before 0.1.10, which is not read: "
            "load it there, and torch.save the weights again."
        )
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # the protocols that there are
        return (
            "a bare pickle, not a file that torch.save wrote. Unpickling runs code, so it is not opened, with --trust neither. "
            "Load it where it was made, and save the weights there: torch.save(model.state_dict(), path)."
        )
    return (
        f"not a checkpoint: it begins with {head[:8]!r}, but torch.save writes a zip archive. "
        "Pass the file that torch.save or curvkit.save wrote."
    )


def _zip_kind(path: Path) -> FileKind:
    try:
        if not zipfile.is_zipfile(path):
            raise RefusedCheckpoint(
                f"{path}: the archive is cut short or still being written. "
                "Wait until it is complete, or take an earlier checkpoint."
            )
        with zipfile.ZipFile(path) as archive:
            full = archive.namelist()
    except UNREADABLE as error:
        raise RefusedCheckpoint(
            f"{path}: the archive is damaged ({error}). Take another copy or an earlier checkpoint."
        ) from error
    names = {name.split("/", 1)[-1] for name in full}
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "exported program"
    if ".data/extern_modules" in names:
        raise RefusedCheckpoint(
            f"{path}: an archive of torch.package, which is code. Save the weights instead: torch.save(model.state_dict(), path)."
        )
    if "data.pkl" not in names:
        raise RefusedCheckpoint(f"{path}: {_other_zip(full)}")
    return "torch zip"


def _other_zip(names: list[str]) -> str:
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of numpy (.npz). Save the weights from PyTorch: torch.save(model.state_dict(), path)."
    inside = next((name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors"))), None)
    if inside is not None and inside.isprintable():
        return f"a zip archive with {inside[:200]!r} in it. Unpack it, and pass what is in it."
    return "a zip archive, but not one that torch.save wrote. Pass the checkpoint itself."
