"""Has the point moved? A fingerprint of all that a function depends on besides its data, cheap beside a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

END_WORDS = 1 << 14
"""Words of eight bytes that are read at either end of a tensor."""
LANES = 251
"""A prime, so that exchanged rows of a matrix meet other weights."""
WEIGHTS = torch.arange(1, LANES + 1, device="cpu") * 0x9E3779B97F4A7C1


def fingerprint(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Read address and checksum of each parameter and buffer, frozen ones included, and the version of each parameter.

    Writes through `.data` move no version, which is what the checksum is for. The version of a buffer moves where a forward pass
    writes to it and the old value is restored.

    Args:
        model: Any module.

    Returns:
        By "parameter 'name'" or "buffer 'name'".

    Cost: at most 256 KiB read per tensor.
    """
    found = {f"parameter {name!r}": (p.data_ptr(), _version(p), checksum(p)) for name, p in model.named_parameters()}
    return found | {f"buffer {name!r}": (b.data_ptr(), 0, checksum(b)) for name, b in model.named_buffers()}


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
    """Add up the bits of a tensor as integers, with a weight for each place in a row of 251.

        c = sum_i w_(i mod 251) x_i  mod 2^64,    x_i the i-th word of eight bytes

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
    if words.numel() > 2 * END_WORDS:
        words = torch.cat([words[:END_WORDS], words[-END_WORDS:]])
    weights, whole = WEIGHTS.to(words.device), words.numel() // LANES * LANES
    rest = words[whole:]
    total = (rest * weights[: rest.numel()]).sum()
    return int(total + (words[:whole].view(-1, LANES).sum(0) * weights).sum() if whole else total)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
