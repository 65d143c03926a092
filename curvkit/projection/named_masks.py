"""Several masks in one file, such as those of several estimators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvkit.errors import InvalidArgument
from curvkit.projection import mask_files
from curvkit.projection.flat_mask import FlatMask


def save_masks(path: str | Path, masks: Mapping[str, FlatMask], *, record: Mapping[str, Any] | None = None) -> Path:
    """Write several masks, one bit per coordinate, as safetensors.

    Args:
        path: An existing file is replaced.
        masks: By a name for each.
        record: How they were made, as plain values; kept in the file.

    Returns:
        The path.

    Raises:
        InvalidArgument: If there is none.

    Cost: n / 8 bytes each.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from curvkit.projection.flat_rule import FlatRule
        >>> mask = FlatMask.from_diagonal({"w": torch.tensor([1.0, 2.0])}, FlatRule(0.5))
        >>> path = save_masks(Path(tempfile.mkdtemp()) / "masks.safetensors", {"flat": mask, "sharp": mask.sharp})
        >>> {name: found["w"].tolist() for name, found in load_masks(path).items()}
        {'flat': [1, 0], 'sharp': [0, 1]}
    """
    if not masks:
        raise InvalidArgument(f"save_masks: no mask was given for {path}; a file has one or more. Pass {{name: mask}}.")
    return mask_files.write(path, masks, record)


def load_masks(path: str | Path) -> dict[str, FlatMask]:
    """Read what `save_masks` or `FlatMask.save` wrote.

    Args:
        path: Of the file.

    Returns:
        By name, on the CPU.

    Raises:
        InvalidArgument: If it is another file, or damaged.
    """
    return {name: FlatMask(*stored) for name, stored in mask_files.read(path).items()}
