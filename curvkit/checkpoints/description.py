"""What a checkpoint in a directory holds, as its headers say; no number of a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.safetensors_file import Stored


@dataclass(frozen=True)
class Description:
    """Names, shapes and dtypes of a directory's tensors.

    Args:
        path: The directory that would be read; of a run with several checkpoints, the last one.
        kind: In words, as `Checkpoint.kind`.
        bytes: Of all files that would be read.
        checksum: What protects the numbers against damage, in words.
        groups: Tensors by name, under the part that they belong to: "model", "optimizer".
        torch_files: Files of torch.save that hold weights; their tensors are not in `groups`, since a header that lists them is a pickle.
        optimizer_file: The file of torch.save with the optimizer's state.
        step: Of training.
        config: What the directory says of the model.
        notes: What a reader should know.
        refusal: Why it is not read when it is measured, and what to do; None if it is.
        optimizer: Its state without tensors, where the metadata of the directory has it.
    """

    path: Path
    kind: str
    bytes: int
    checksum: str
    groups: Mapping[str, Mapping[str, Stored]]
    torch_files: tuple[Path, ...] = ()
    optimizer_file: Path | None = None
    step: int | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    refusal: str | None = None
    optimizer: Mapping[str, Any] | None = None
