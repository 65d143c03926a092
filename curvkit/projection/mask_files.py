"""Masks as bits: one per coordinate in a file, with a digest that shows damage and tells two masks apart."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.projection.flat_rule import FlatRule
from curvkit.results.files import replaced
from curvkit.results.record import plain

FORMAT = "curvkit.masks/1"


class StoredMask(NamedTuple):
    """A mask and what is known of it."""

    masks: Mapping[str, Tensor]
    """uint8."""
    rule: FlatRule | None
    threshold: float | None
    origin: str


class _Storable(Protocol):
    """What has these four, as a FlatMask."""

    @property
    def masks(self) -> Mapping[str, Tensor]: ...
    @property
    def rule(self) -> FlatRule | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def origin(self) -> str: ...


def packed(mask: Tensor) -> Tensor:
    """Pack a mask, the first coordinate into the lowest bit of the first byte.

    Args:
        mask: uint8 of 0 and 1.

    Returns:
        uint8 [ceil(n / 8)] on the CPU; bits past the last coordinate are 0.

    Example:
        >>> packed(torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.uint8)).tolist()
        [19]
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `packed`.

    Args:
        bits: uint8 [ceil(n / 8)].
        shape: Of the mask.

    Returns:
        uint8 of 0 and 1.

    Raises:
        ValueError: If the number of bytes is not that of the shape.
    """
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-n // 8),):
        raise ValueError(f"{tuple(bits.shape)} {bits.dtype} are not the bits of shape {shape}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n, bitorder="little")).view(shape)


def digest(masks: Mapping[str, Tensor]) -> str:
    """Hash names, shapes and coordinates of a mask.

    Args:
        masks: uint8 of 0 and 1, in the order of the parameters.

    Returns:
        32 hexadecimal digits (BLAKE2b); the same on all devices.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for name, mask in masks.items():
        hashed.update(json.dumps([name, list(mask.shape)]).encode())
        hashed.update(packed(mask).numpy().tobytes())
    return hashed.hexdigest()


def write(path: str | Path, stored: Mapping[str, _Storable], record: Mapping[str, Any] | None) -> Path:
    """Write masks as safetensors.

    Args:
        path: An existing file is replaced.
        stored: By a name for each mask.
        record: How they were made, as plain values.

    Returns:
        The path.
    """
    path, told, tensors = Path(path), list[dict[str, Any]](), dict[str, Tensor]()
    for index, (name, mask) in enumerate(stored.items()):
        tensors |= {f"{index}:{key}": packed(tensor) for key, tensor in mask.masks.items()}
        told.append(
            {
                "name": name,
                "origin": mask.origin,
                "rule": None if mask.rule is None else asdict(mask.rule),
                "threshold": None if mask.threshold is None else repr(mask.threshold),  # infinity is not in JSON
                "shapes": {key: list(tensor.shape) for key, tensor in mask.masks.items()},
                "digest": digest(mask.masks),
            }
        )
    beside = {"format": FORMAT, "masks": json.dumps(told), "record": json.dumps(plain(record or {}))}
    replaced(path, lambda part: save_file(tensors, part, metadata=beside))
    return path


def read(path: str | Path) -> dict[str, StoredMask]:
    """Read what `write` wrote.

    Args:
        path: Of the file.

    Returns:
        By name.

    Raises:
        InvalidArgument: If it is not there, another file, or damaged.
    """
    try:
        return _content(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"{path}: cannot be read as masks ({error}). Write them anew with `FlatMask.save`."
        ) from error


def _content(path: str | Path) -> dict[str, StoredMask]:
    found = dict[str, StoredMask]()
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is no {FORMAT} file, as `FlatMask.save` writes")
        for index, said in enumerate(json.loads(metadata["masks"])):
            shapes = {key: tuple(shape) for key, shape in said["shapes"].items()}
            masks = {key: unpacked(file.get_tensor(f"{index}:{key}"), shape) for key, shape in shapes.items()}
            if digest(masks) != said["digest"]:
                raise ValueError(f"it is damaged: the mask {said['name']!r} is not the one that was written")
            rule = None if said["rule"] is None else FlatRule(**said["rule"])
            threshold = None if said["threshold"] is None else float(said["threshold"])
            found[said["name"]] = StoredMask(masks, rule, threshold, said["origin"])
    return found
