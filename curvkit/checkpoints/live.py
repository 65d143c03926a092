"""From an outline to live tensors: each storage is read once and shared by the tensors that share it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from curvkit.checkpoints.stored import StoredTensor
from curvkit.errors import RefusedCheckpoint

DEEPEST = 100
"""Containers within containers; checkpoints have about ten."""


class Storages(Protocol):
    """A file from which numbers can be read."""

    @property
    def swapped(self) -> bool:
        """Whether they have the other order of bytes than this machine's."""
        ...

    def read_into(self, key: str, target: memoryview) -> None:
        """Read the numbers of a storage.

        Args:
            key: Its name.
            target: Of its size.
        """
        ...


class Materialiser:
    """Makes live data of an outline.

    Args:
        source: The path, for messages.
        sizes: Bytes of every storage.
        storages: Where the numbers are.

    Raises:
        RefusedCheckpoint: If there is not enough memory.
    """

    def __init__(self, source: str, sizes: dict[str, int], storages: Storages) -> None:
        self.source, self.sizes, self.storages = source, sizes, storages
        self.swapped = storages.swapped
        self.read: dict[str, Tensor] = {}
        self.ordered: dict[tuple[str, torch.dtype], Tensor] = {}
        self.done: dict[int, Any] = {}

    def live(self, value: Any, depth: int = 0) -> Any:
        """The same content with tensors in place of their descriptions.

        Args:
            value: Of a skeleton.
            depth: Containers around it.

        Returns:
            Plain data; what was neither tensor nor plain stays as it is.

        Raises:
            RefusedCheckpoint: If it is nested too deeply, or a tensor cannot be held.

        Cost: linear in the content, however often its parts are shared.
        """
        if not isinstance(value, dict | list | tuple | StoredTensor):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        if depth > DEEPEST:
            raise RefusedCheckpoint(
                f"{self.source}: its content is nested more than {DEEPEST} levels deep, which no training script does. "
                "Save the weights alone: torch.save(model.state_dict(), path)."
            )
        made: Any
        if isinstance(value, StoredTensor):
            made = self._tensor(value)
        elif isinstance(value, dict):
            made = self.done[id(value)] = {}
            made.update((key, self.live(item, depth + 1)) for key, item in value.items())
        elif isinstance(value, list):
            made = self.done[id(value)] = []
            made.extend(self.live(item, depth + 1) for item in value)
        else:
            made = tuple(self.live(item, depth + 1) for item in value)
        self.done[id(value)] = made
        return made

    def _tensor(self, stored: StoredTensor) -> Tensor:
        dtype = getattr(torch, stored.dtype)
        flat = self._storage(stored.storage_key, dtype)
        try:
            return torch.as_strided(flat, stored.shape, stored.stride, stored.offset)
        except (RuntimeError, OverflowError) as error:
            raise RefusedCheckpoint(
                f"{self.source}: a tensor of shape {stored.shape} cannot be made ({str(error).splitlines()[0][:200]}). Take another copy."
            ) from error

    def _storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """All numbers of a storage; read once for all tensors that share it."""
        if key not in self.read:
            size = self.sizes[key]
            try:
                raw = torch.empty(size, dtype=torch.uint8)
            except RuntimeError as error:
                raise RefusedCheckpoint(
                    f"{self.source}: not enough memory for a tensor of {size:,} bytes. Use a machine with more memory."
                ) from error
            if size:
                array: Any = raw.numpy()
                self.storages.read_into(key, memoryview(array))
            self.read[key] = raw
        raw = self.read[key]
        raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
        if self.swapped:
            if (key, dtype) not in self.ordered:
                self.ordered[key, dtype] = _ordered(raw, dtype)
            raw = self.ordered[key, dtype]
        if dtype is torch.bool and bool((raw > 1).any()):
            raise RefusedCheckpoint(
                f"{self.source}: a tensor of truth values has bytes other than 0 and 1: the file is damaged. Take another copy."
            )
        return raw.view(dtype)


def _ordered(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes in the order of this machine; a complex number is two."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return raw.view(-1, width).flip(1).reshape(-1)
