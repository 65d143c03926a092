"""The parts of a checkpoint that have tensors, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvkit.checkpoints.pickle_values import Made
from curvkit.checkpoints.printable import printable_key
from curvkit.checkpoints.stored import StoredTensor


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that belong together.

    Args:
        name: Key in the training dict; "weights" for a state dict.
        tensors: How many; those that share their numbers count once.
        numbers: In them.
        bytes: Of those numbers.
        dtypes: Which types they have, in alphabetical order.
    """

    name: str
    tensors: int
    numbers: int
    bytes: int
    dtypes: tuple[str, ...]

    def plus(self, other: TensorGroup) -> TensorGroup:
        """Both together.

        Args:
            other: Of the same name.

        Returns:
            The sum.
        """
        return TensorGroup(
            self.name,
            self.tensors + other.tensors,
            self.numbers + other.numbers,
            self.bytes + other.bytes,
            tuple(sorted({*self.dtypes, *other.dtypes})),
        )


def group_of(name: str, value: Any) -> TensorGroup:
    """Count the tensors within containers.

    Args:
        name: Of the group.
        value: Of an outline.

    Returns:
        The sums; each container is visited once, and a tensor counts once however often it is there.

    Cost: linear in the content.

    Example:
        >>> w = StoredTensor((2, 3), "float32", "0", 0, (3, 1), 6)
        >>> group_of("model", {"head": w, "embedding": w})
        TensorGroup(name='model', tensors=1, numbers=6, bytes=24, dtypes=('float32',))
    """
    found: dict[Any, StoredTensor] = {}
    todo, seen = [value], {id(value)}
    while todo:
        item = todo.pop()
        if isinstance(item, StoredTensor):
            found[item.storage_key, item.offset, item.shape, item.stride, item.dtype] = item
            continue
        inner: Any = ()
        if isinstance(item, Mapping):
            inner = item.values()
        elif isinstance(item, list | tuple):
            inner = item
        elif isinstance(item, Made):
            inner = (item.arguments, item.state)
        for part in inner:
            if isinstance(part, Mapping | list | tuple | Made | StoredTensor) and id(part) not in seen:
                seen.add(id(part))
                todo.append(part)
    return TensorGroup(
        name,
        len(found),
        sum(tensor.numel for tensor in found.values()),
        sum(tensor.bytes for tensor in found.values()),
        tuple(sorted({tensor.dtype for tensor in found.values()})),
    )


def groups_of(content: Any) -> tuple[TensorGroup, ...]:
    """Count the tensors under every top-level key.

    Args:
        content: Of an outline.

    Returns:
        Groups that have tensors; a state dict is one group, "weights", as are the tensors at the top of any other content.
    """
    if not isinstance(content, Mapping):
        groups = [group_of("weights", content)]
    else:
        top = {key: value for key, value in content.items() if isinstance(value, StoredTensor)}
        groups = [group_of("weights", top)]
        groups += [group_of(printable_key(key), value) for key, value in content.items() if key not in top]
    return tuple(group for group in groups if group.tensors)
