"""Has the point moved? A fingerprint of all that a function depends on besides its data, cheap beside a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

END_WORDS = 1 << 14
"""Words of eight bytes that are read at either end of a tensor."""


def fingerprint(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Read address and version of each parameter and buffer, frozen ones included, and a checksum of each parameter.

    Writes through `.data` move no version, which is what the checksum is for; nobody needs `.data` to write to a buffer.

    Args:
        model: Any module.

    Returns:
        By "parameter 'name'" or "buffer 'name'".

    Cost: at most 256 KiB read per tensor.
    """
    found = {f"parameter {name!r}": (*_place(p), checksum(p)) for name, p in model.named_parameters()}
    return found | {f"buffer {name!r}": (*_place(b), 0) for name, b in model.named_buffers()}


def changed(before: dict[str, tuple[int, int, int]], now: dict[str, tuple[int, int, int]]) -> str | None:
    """Name the first difference.

    Args:
        before: A fingerprint.
        now: A later one.

    Returns:
        "parameter 'name'" or "buffer 'name'"; None if there is none.
    """
    return next((name for name in (*before, *now) if before.get(name) != now.get(name)), None)


def checksum(tensor: Tensor) -> int:
    """Add up the bits of a tensor as integers, the first words with another weight than the last.

        c = sum_(i < h) 2 x_i + sum_(i >= m - h) x_i  mod 2^64,    x_i the i-th of m words of eight bytes, h = min(m / 2, 16384)

    Integers, so that neither the number of threads nor NaN matters. Of a large tensor only both ends are read, so that the check costs
    next to nothing beside a product: whoever writes to weights writes to all of them.

    Args:
        tensor: Of any dtype and layout in memory.

    Returns:
        A 64-bit integer.

    Cost: at most 256 KiB are read.

    Example:
        >>> a = torch.tensor([1.0, -2.0, 3.0])
        >>> len({checksum(a), checksum(-a), checksum(a.flip(0)), checksum(a[:2])})
        4
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 8)])
    words = raw.view(torch.int64)
    h = min(words.numel() // 2, END_WORDS)
    if words.numel() <= 2 * END_WORDS:
        return int(2 * words[:h].sum() + words[h:].sum())
    return int(2 * words[:h].sum() + words[-h:].sum())


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
