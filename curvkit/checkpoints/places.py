"""Where tensors lie in their storages: refuse those that claim more than is stored, before anything is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints.stored import StoredTensor
from curvkit.errors import RefusedCheckpoint

DEEPEST = 8


def check_places(path: Path, weights: Mapping[str, Any], optimizer: Any, tensor: type[Any] = StoredTensor) -> None:
    """Refuse tensors that would need more memory than the file has for them.

    A tensor of stride 0 can claim any number of elements of one number in the file, and many tensors can claim the same
    numbers; both grow when they are copied. Tensors that are the same view of a storage are tied, and fine.

    Args:
        path: For messages.
        weights: By name; live, or of an outline.
        optimizer: Its state; nested containers.
        tensor: What a tensor is.

    Raises:
        RefusedCheckpoint: If a tensor claims more than is stored, is not dense, or shares a part of its numbers with another.

    Cost: a sort of the tensors.
    """
    named = [(name, value) for name, value in weights.items()]
    for name, value in [*named, *_tensors(optimizer, "optimizer", tensor, DEEPEST, set())]:
        if not isinstance(value, StoredTensor):
            _refuse_unusual(path, name, value)
        claimed, stored = _claimed(value), _stored(value)
        if claimed > max(stored, 1):
            raise RefusedCheckpoint(
                f"{path}: the tensor {name[:200]!r} claims {_numel(value):,} elements, but {stored:,} bytes are "
                "stored. Such a file would fill the memory; write it again with .contiguous() tensors."
            )
    last: dict[Any, tuple[int, int, str]] = {}
    spans = sorted(
        ((_span(value), name) for name, value in named if _numel(value)),
        key=lambda item: (str(item[0][0]), *item[0][1:]),
    )
    for (storage, start, end), name in spans:
        before = last.get(storage)
        if before is not None and start < before[1] and (start, end) != before[:2]:
            raise RefusedCheckpoint(
                f"{path}: the tensors {before[2][:200]!r} and {name[:200]!r} share a part of their numbers, so that "
                "copies of them would need more memory than the file has bytes. Write it again with .clone() of each tensor."
            )
        if before is None or end > before[1]:
            last[storage] = (start, end, name)


def tied(weights: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names of the same numbers.

    Args:
        weights: By name; live, or of an outline.

    Returns:
        Groups of two or more names, in the order of the weights.

    Cost: linear in their number.

    Example:
        >>> w = StoredTensor((2,), "float32", "0", 0, (1,), 2)
        >>> tied({"head": w, "body": StoredTensor((2,), "float32", "1", 0, (1,), 2), "embedding": w})
        [('head', 'embedding')]
    """
    groups: dict[Any, list[str]] = {}
    for name, value in weights.items():
        if _numel(value):
            groups.setdefault((*_span(value), tuple(value.shape)), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _tensors(value: Any, name: str, tensor: type[Any], depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Tensors within containers, each container visited once."""
    if isinstance(value, tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple) and depth and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            shown = key if isinstance(key, str | int) else type(key).__name__
            yield from _tensors(item, f"{name}[{shown!r}]", tensor, depth - 1, seen)


def _refuse_unusual(path: Path, name: str, value: Any) -> None:
    """Live tensors may be of kinds that an outline never has."""
    what = ""
    if value.is_quantized:
        what = "quantised, and such weights have no curvature of their own. Pass the checkpoint before quantisation."
    elif str(value.layout) != "torch.strided" or value.is_nested:
        what = f"of the layout {value.layout}. Save it with .to_dense()."
    elif value.device.type == "meta":
        what = "of the meta device: its numbers were never saved. Take another checkpoint."
    if what:
        raise RefusedCheckpoint(f"{path}: the tensor {name[:200]!r} is {what}")


def _numel(value: Any) -> int:
    return value.numel if isinstance(value, StoredTensor) else value.numel()


def _width(value: Any) -> int:
    return value.bytes // value.numel if isinstance(value, StoredTensor) else value.element_size()


def _claimed(value: Any) -> int:
    return value.bytes if isinstance(value, StoredTensor) else value.numel() * value.element_size()


def _stored(value: Any) -> int:
    return value.storage_bytes if isinstance(value, StoredTensor) else value.untyped_storage().nbytes()


def _span(value: Any) -> tuple[Any, int, int]:
    """Storage, first byte, and the byte after the last."""
    width = _width(value)
    if isinstance(value, StoredTensor):
        storage, offset, stride = value.storage_key, value.offset, value.stride
    else:
        storage, offset, stride = value.untyped_storage().data_ptr(), value.storage_offset(), value.stride()
    last = sum((size - 1) * step for size, step in zip(value.shape, stride, strict=True))
    return storage, offset * width, (offset + last + 1) * width
