"""Torch files written byte by byte: tensors with any claim, archives with any record."""

from __future__ import annotations

import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

START = b"\x80\x02"


def whole(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(key: str, numel: int, kind: str = "FloatStorage", view: bytes = b"") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + whole(numel) + view + b"tQ"


def tensor(
    key: str,
    numel: int,
    offset: int = 0,
    shape: Sequence[int] = (),
    stride: Sequence[int] = (),
    *,
    stored: bytes | None = None,
    metadata: bytes = b"",
) -> bytes:
    """A call of _rebuild_tensor_v2 with any numbers."""
    sizes = b"".join(b"(" + b"".join(map(whole, part)) + b"t" for part in (shape, stride))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    source = stored if stored is not None else storage(key, numel)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + source + whole(offset) + sizes + hooks + metadata + b"tR"


def state_dict(**tensors: bytes) -> bytes:
    return START + b"}(" + b"".join(text(name) + tensor for name, tensor in tensors.items()) + b"u."


def archive(path: Path, pickle: bytes, **records: bytes) -> Path:
    """A torch zip with this data.pkl, and storages by key (`_0` for the key 0)."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle)
        for key, content in records.items():
            file.writestr(f"a/data/{key.removeprefix('_')}", content)
    return path


def old(path: Path, pickle: bytes, keys: bytes, tail: bytes, *, little: bool = True) -> Path:
    """A file of torch before 1.6."""
    magic = START + b"\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19."
    system = START + b"}" + text("little_endian") + (b"\x88" if little else b"\x89") + b"s."
    path.write_bytes(magic + START + b"M\xe9\x03." + system + pickle + START + keys + b"." + tail)
    return path


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def exported(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)), path)
