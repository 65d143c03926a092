"""Floating-point numbers as the integers that their bits are: without the sign, these are in the order of the absolute values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument

PATTERNS = {
    torch.float16: (torch.int16, 15),
    torch.bfloat16: (torch.int16, 15),
    torch.float32: (torch.int32, 31),
    torch.float64: (torch.int64, 63),
}
"""The integers that a type's bits are read as, and how many bits beside the sign."""
ALLOWED = ", ".join(str(dtype).removeprefix("torch.") for dtype in PATTERNS)
CHUNK = 1 << 17
"""Values at a time on the CPU: 512 KiB of float32, so that a chunk stays in the cache until it is counted."""
DEVICE_CHUNK = 1 << 22
"""Values at a time elsewhere."""


@functools.cache
def infinity(dtype: torch.dtype) -> int:
    """Give the pattern of infinity; those above are NaN.

    Args:
        dtype: One of `PATTERNS`.

    Returns:
        The integer.

    Example:
        >>> hex(infinity(torch.float32))
        '0x7f800000'
    """
    return int(torch.tensor([math.inf], dtype=dtype).view(PATTERNS[dtype][0])[0])


def magnitudes(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Read the bits of |h| as integers, chunk by chunk, in the order of the index.

    Args:
        tensor: Of any shape, stride and device.
        dtype: One of `PATTERNS`, which holds its values exactly.

    Yields:
        [at most `CHUNK`], or `DEVICE_CHUNK` elsewhere than on the CPU; all in the same memory, which may be written to.

    Example:
        >>> [part.tolist() for part in magnitudes(torch.tensor([-0.0, 1.0, -1.0]), torch.float16)]
        [[0, 15360, 15360]]
    """
    integers, bits = PATTERNS[dtype]
    size = min(tensor.numel(), CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK)
    room = torch.empty(size, dtype=integers, device=tensor.device)
    for piece in _pieces(tensor.detach(), size):
        yield torch.bitwise_and(piece.to(dtype).view(integers), (1 << bits) - 1, out=room[: len(piece)])


def _pieces(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """[at most `size`] each, in the order of the index; no copy of a tensor that is larger, whatever its strides."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size)
    elif tensor.numel() <= size:
        yield tensor.reshape(-1)
    else:
        for block in tensor.split(max(1, size // (tensor.numel() // len(tensor)))):
            yield from _pieces(block if len(block) > 1 else block[0], size)


def count_zeros(named: Mapping[str, Tensor]) -> int:
    """Count the values that are exactly 0.0 or -0.0.

    Args:
        named: The tensors.

    Returns:
        Their number.

    Cost: One reading; a chunk of memory.
    """
    return sum(
        patterns.numel() - int(patterns.count_nonzero())
        for tensor in named.values()
        for patterns in magnitudes(tensor, tensor.dtype)
    )


def unmark_zeros(named: Mapping[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the values that are exactly 0.0 or -0.0 out of masks.

    Args:
        named: The tensors.
        masks: uint8 of 0 and 1, contiguous, changed in place.

    Returns:
        The masks.

    Cost: One reading; a chunk of memory.
    """
    for name, tensor in named.items():
        flat, begin = masks[name].view(-1), 0
        for patterns in magnitudes(tensor, tensor.dtype):
            flat[begin : begin + len(patterns)] *= patterns != 0
            begin += len(patterns)
    return masks


def refuse_nan(named: Mapping[str, Tensor]) -> None:
    """Refuse NaN.

    Args:
        named: The tensors.

    Raises:
        InvalidArgument: If one has NaN; it names the first, and the index.

    Cost: One reading; a chunk of memory.
    """
    for name, tensor in named.items():
        begin = 0
        for patterns in magnitudes(tensor, tensor.dtype):
            bad = patterns > infinity(tensor.dtype)
            if bad.any():
                index, rest = list[int](), begin + int(bad.nonzero()[0, 0])
                for size in reversed(tensor.shape):
                    rest, place = divmod(rest, size)
                    index.insert(0, place)
                raise InvalidArgument(
                    f"{name!r} is NaN at index {index}. Values must be numbers or infinite, as NaN has no place in their order. Keep the "
                    "earlier mask or threshold, and find out where the NaN comes from."
                )
            begin += len(patterns)


def common_dtype(named: Mapping[str, Tensor]) -> torch.dtype:
    """Find the type that holds the values of all tensors exactly.

    Args:
        named: The tensors.

    Returns:
        Their own, or the wider one that torch promotes them to.

    Raises:
        InvalidArgument: If there is no tensor, or one is sparse or not of 16, 32 or 64 bits floating (by its name).
    """
    if not named:
        raise InvalidArgument("No tensor was given, and an order needs values. Pass at least one tensor with its name.")
    for name, tensor in named.items():
        if tensor.dtype not in PATTERNS or tensor.layout is not torch.strided:
            raise InvalidArgument(
                f"{name!r} is of {tensor.dtype} and layout {tensor.layout}; an order is defined for dense tensors of {ALLOWED}. Convert it "
                "with .to_dense() or .float()."
            )
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in named.values()))
