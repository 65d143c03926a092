"""The k-th smallest value in one reading, if a sample says rightly between which two values it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvkit.linalg.patterns import infinity, magnitudes

LEAST = 1 << 17
"""Fewer values are not worth a sample."""
SAMPLE, PART = 1 << 18, 61
"""At most so many values are drawn, and one of so many."""
KEPT = 32
"""At most one of so many values is kept, or `LEAST`."""
DEVIATIONS = 4.5
"""Half-width of the bracket, in standard deviations of a share in independent draws. Beyond it lie 7 samples in a million."""
TURN = (math.sqrt(5) - 1) / 2
"""The golden section, for where the sample of each tensor starts."""


def kth_in_bracket(tensors: Sequence[Tensor], k: int, dtype: torch.dtype) -> tuple[int, int, int] | None:
    """Find the k-th smallest |h| by keeping those between two quantiles of a sample, and counting those below.

        q = k / n,   bracket = quantiles q -+ 4.5 sqrt(q (1 - q) / m) of m sampled values

    The result is exact: where k does not lie in the bracket, or too many values do, there is none.

    Args:
        tensors: On the CPU, without checks.
        k: From 1 to their number of values.
        dtype: That holds them all.

    Returns:
        Bit pattern, number of values below it, number of values equal to it. None where the bracket missed, or with NaN, or where
        there are too few values to be worth it: count all bits then.

    Cost: One reading, and the memory of 1 to 2 % of the values, at most of 1/32 of them; at least 1 MiB.
    Source: sampling to select, as Floyd & Rivest (1975), with one reading and in chunks.
    """
    n = sum(tensor.numel() for tensor in tensors)
    if n < LEAST or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    drawn = list(_sampled(tensors, dtype, n))
    if sum(map(len, drawn)) < LEAST // 256:  # short tensors, none of whose starts is met
        return None
    sample = np.concatenate(drawn)
    sample.sort()
    m, q = len(sample), k / n
    middle, width = q * m, DEVIATIONS * math.sqrt(q * (1 - q) * m) + 2
    begin, end = math.floor(middle - width), math.ceil(middle + width)
    low = int(sample[begin]) if begin >= 0 else 0
    high = int(sample[end]) if end < m else infinity(dtype)
    room = np.empty(max(LEAST, n // KEPT), dtype=sample.dtype)
    kept = below = 0
    for part in _parts(tensors, dtype):
        if int(part.max()) > infinity(dtype):
            return None
        under, inside = part < low, part <= high
        below += int(np.count_nonzero(under))
        if low == high:
            kept += int(np.count_nonzero(inside)) - int(np.count_nonzero(under))
            continue
        found = part[np.logical_xor(inside, under, out=inside)]
        if kept + len(found) > len(room):
            return None
        room[kept : kept + len(found)] = found
        kept += len(found)
    if not below < k <= below + kept:
        return None
    if low == high:
        return low, below, kept
    room = room[:kept]
    room.partition(k - below - 1)
    value = room[k - below - 1]
    return int(value), below + int(np.count_nonzero(room < value)), int(np.count_nonzero(room == value))


def _parts(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[NDArray[np.signedinteger]]:
    for tensor in tensors:
        for patterns in magnitudes(tensor, dtype):
            yield patterns.numpy()


def _sampled(tensors: Iterable[Tensor], dtype: torch.dtype, n: int) -> Iterator[NDArray[np.signedinteger]]:
    """Every so many-th value; the distance is a prime number, so that it is no multiple of the length of rows."""
    distance = max(PART, n // SAMPLE)
    while any(distance % factor == 0 for factor in range(2, math.isqrt(distance) + 1)):
        distance += 1
    for index, tensor in enumerate(tensors):
        start = int(index * TURN % 1 * distance)
        if tensor.is_contiguous():
            drawn = tensor.view(-1)[start::distance]
        else:
            drawn = tensor[torch.unravel_index(torch.arange(start, max(start, tensor.numel()), distance), tensor.shape)]
        for patterns in magnitudes(drawn, dtype):
            yield patterns.numpy().copy()
