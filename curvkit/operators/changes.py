"""Has the point moved? A fingerprint of all that a function depends on besides its data, cheap beside a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COLUMNS = 1021
"""A prime: exchanged rows of a matrix fall into different columns."""
WEIGHTS = torch.arange(1, COLUMNS + 1, device="cpu") * 0x9E3779B97F4A7C1


def fingerprint(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Address and version of each parameter and buffer, frozen ones included, and a checksum of each parameter.

    Writes through `.data` move no version, which is what the checksum is for; nobody needs `.data` to write to a buffer.

    Args:
        model: Any module.

    Returns:
        By "parameter 'name'" or "buffer 'name'".

    Cost: one pass over the numbers, about a millisecond for a million.
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
    """Add up the bits of a tensor as integers, each place with its own weight.

        c = sum_i w_(i mod 1021) x_i  mod 2^64,    x_i the i-th eight bytes

    Integers, so that neither the number of threads nor NaN matters.

    Args:
        tensor: Of any dtype and layout in memory.

    Returns:
        A 64-bit integer.

    Example:
        >>> a = torch.tensor([1.0, -2.0, 3.0])
        >>> len({checksum(a), checksum(-a), checksum(a.flip(0)), checksum(a[:2])})
        4
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 8)])
    words = raw.view(torch.int64)
    weights = WEIGHTS.to(words.device)
    rows = words.numel() // COLUMNS
    rest = words[rows * COLUMNS :]
    total = (rest * weights[: rest.numel()]).sum()
    if rows:
        total += (words[: rows * COLUMNS].view(rows, COLUMNS).sum(0) * weights).sum()
    return int(total)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
