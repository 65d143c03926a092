"""Eigenvectors in runs of coordinates and in float64, checked before anything rests on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.results.eigenpairs import Eigenpairs

NUMBERS = 1 << 21
"""That are looked at at a time, of all vectors together."""
ORTHONORMAL = 1e-4
"""Entries of V'V may differ by so much from those of the identity; searches in float32 leave 1e-6 and less."""


def vectors_of(owner: str, pairs: Eigenpairs) -> Tensor:
    """The eigenvectors.

    Args:
        owner: For the message.
        pairs: With vectors.

    Returns:
        [n, k], themselves.

    Raises:
        InvalidArgument: If there are none.
    """
    if pairs.vectors is None or not pairs.vectors.numel():
        raise InvalidArgument(
            f"{owner}: {pairs!r} has no vectors; partial results, and those read from a record, have none. Use the `eigenpairs` of "
            "Lanczos(rank=...).estimate(objective), or the last ones of a search."
        )
    return pairs.vectors.detach()


def runs(start: int, stop: int, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut vectors into runs of coordinates.

    Args:
        start: First coordinate.
        stop: Behind the last one.
        vectors: [n, k] each.

    Yields:
        Their rows in float64, on the device of the first.
    """
    step = max(1, NUMBERS // sum(V.shape[1] for V in vectors))
    for at in range(start, stop, step):
        yield tuple(V[at : min(at + step, stop)].to(vectors[0].device, torch.float64) for V in vectors)


def refuse_oblique(owner: str, gram: Tensor) -> None:
    """Refuse vectors that are not orthonormal, from which no angle follows.

    Args:
        owner: For the message.
        gram: V'V.

    Raises:
        InvalidArgument: If it is not the identity.
    """
    off = (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()
    if not off <= ORTHONORMAL:
        raise InvalidArgument(
            f"{owner}: V'V of the eigenvectors differs from the identity by {off:.1e}, and may by {ORTHONORMAL:g}. "
            "Make them orthonormal, as torch.linalg.qr does."
        )
