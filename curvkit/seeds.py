"""Every random number starts here.

A draw is addressed by (seed, purpose, index). There is no stream that advances, so any part of a computation can be
redone, resumed or handed to another process, and the global random state is never touched. Draws are made on the
CPU and then moved, so that they do not depend on the device.
"""

from __future__ import annotations

import hashlib
import secrets

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument

SEED_LIMIT = 2**63
"""Seeds lie in [0, SEED_LIMIT)."""


def draw_seed() -> int:
    """Draw a seed from the operating system, for `seed=None`; 32 bits, so that it is easy to retype.

    Returns:
        A seed.

    Example:
        >>> 0 <= draw_seed() < 2**32
        True
    """
    return secrets.randbits(32)


def settle(seed: int | None) -> int:
    """Return `seed`, or a drawn one for None.

    Args:
        seed: An integer in [0, 2**63), or None.

    Raises:
        InvalidArgument: If `seed` is not such an integer.

    Example:
        >>> settle(7)
        7
    """
    if seed is None:
        return draw_seed()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise InvalidArgument(
            f"seed={seed!r} must be an integer in [0, 2**63), or None for one drawn from the system. Pass for example seed=0."
        )
    return seed


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """Make the CPU generator of the draw (seed, purpose, index).

    The three are hashed (BLAKE2b, 64 bits), so that neighbouring seeds and indices give unrelated generators.

    Args:
        seed: The run's seed.
        purpose: What the draw is for, for example "lanczos start".
        index: Which of the purpose's draws.

    Returns:
        A fresh generator on the CPU.

    Example:
        >>> a = torch.rand(2, generator=generator(0, "example"))
        >>> bool((a == torch.rand(2, generator=generator(0, "example"))).all())
        True
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    made = torch.Generator(device="cpu")
    made.manual_seed(int.from_bytes(digest, "little") % SEED_LIMIT)
    return made


def normal(
    n: int,
    seed: int,
    purpose: str,
    index: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw n independent standard normal numbers for (seed, purpose, index).

    Args:
        n: How many.
        seed: The run's seed.
        purpose: What the draw is for.
        index: Which of the purpose's draws.
        dtype: Of the result; the draw itself is made in it.
        device: Where the result goes; the draw is made on the CPU.

    Returns:
        [n]; divided by its norm it is uniform on the sphere.

    Example:
        >>> normal(3, 0, "example").shape
        torch.Size([3])
    """
    return torch.randn(n, dtype=dtype, generator=generator(seed, purpose, index)).to(device)


def signs(
    n: int,
    seed: int,
    purpose: str,
    index: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw n independent random signs (Rademacher variables) for (seed, purpose, index).

    Args:
        n: How many.
        seed: The run's seed.
        purpose: What the draw is for.
        index: Which of the purpose's draws.
        dtype: Of the result; the signs are the same in every one.
        device: Where the result goes; the draw is made on the CPU.

    Returns:
        [n], each -1 or 1 with probability 1/2.

    Example:
        >>> set(signs(100, 0, "example").tolist()) == {-1.0, 1.0}
        True
    """
    bits = torch.randint(2, (n,), dtype=torch.int8, generator=generator(seed, purpose, index))
    return bits.to(device, dtype).mul_(2).sub_(1)
