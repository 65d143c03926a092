"""The k-th smallest absolute value of many tensors, exactly, in passes of counting and without joining them.

The bits of |h|, read as an integer, are in the order of |h|. So an integer is searched: each pass counts the next bits of those values
whose bits so far are the right ones, and the running sum of the counts says which bits follow.
Counts of parts are added, so neither the order of the parts nor where they lie matters: other devices, other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg.bracket import kth_in_bracket
from curvkit.linalg.patterns import ALLOWED, PATTERNS, common_dtype, infinity, magnitudes, refuse_nan

STEP = 11
"""Bits per pass: 2048 counts of 8 bytes stay in the nearest cache. The 15 bits of a half take one pass of 32768."""


@dataclass(frozen=True)
class Selection:
    """What is known of the k-th smallest |h|: its bit pattern lies in [low, low + 2^bits), and `below` values lie before `low`.

        h_(k) in [low, low + 2^bits),   #{i: |h_i| < low} = below < k

    Each pass replaces it by a narrower one, until `bits` is 0 and `low` is the pattern of h_(k). The sign is dropped, so -0.0 is 0.0;
    infinity is the largest value; NaN has no place in the order and is refused.

    Example:
        Two processes, with the counts added as an all-reduce does:

        >>> first, second = torch.tensor([3.0, -1.0]), torch.tensor([[2.0], [-2.0]])
        >>> found = Selection.start(2, torch.float32)
        >>> while not found.done:
        ...     found = found.narrowed(found.counts([first]) + found.counts([second]))
        >>> found.value.item(), found.below, found.ties, found.take
        (2.0, 1, 2, 1)
    """

    k: int
    dtype: torch.dtype
    low: int
    bits: int
    """Not yet known."""
    below: int = 0
    """Values that are smaller than `low`."""
    ties: int = 0
    """Values in the interval; when `done`, those equal to the k-th."""

    @classmethod
    def start(cls, k: int, dtype: torch.dtype) -> Selection:
        """Know nothing yet.

        Args:
            k: From 1 to the number of values.
            dtype: Of all tensors, or one that holds the values of all exactly: see `common_dtype`.

        Returns:
            The whole range of the type.

        Raises:
            InvalidArgument: If k is no positive integer, or the type is no floating one of 16, 32 or 64 bits.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidArgument(
                f"Selection: k={k!r} must be an integer of at least 1. It is a place in ascending order: pass 1 for the smallest value."
            )
        if dtype not in PATTERNS:
            raise InvalidArgument(
                f"Selection: values of type {dtype} were given; the order is defined for {ALLOWED}. Convert them, as with .float()."
            )
        return cls(k, dtype, 0, PATTERNS[dtype][1])

    @property
    def done(self) -> bool:
        """Whether the value is known."""
        return self.bits == 0

    @property
    def value(self) -> Tensor:
        """The k-th smallest |h|, bit for bit; of shape [], on the CPU; before `done` a lower bound."""
        return torch.tensor([self.low], dtype=PATTERNS[self.dtype][0]).view(self.dtype)[0]

    @property
    def take(self) -> int:
        """How many of the `ties` belong to the k smallest."""
        return self.k - self.below

    @property
    def step(self) -> int:
        """Bits that the next pass finds."""
        return self.bits if self.bits <= 15 else STEP

    def counts(self, tensors: Iterable[Tensor]) -> Tensor:
        """Make one pass over some of the tensors.

        Args:
            tensors: Of any shape, stride and device.

        Returns:
            int64 [2^step + 1] on the CPU, to be added over all parts: how many values continue with each of the 2^step bit strings, then
            the number of NaN, which only the first pass looks for.

        Cost: One reading of the values; a few chunks of memory, whatever their number.
        """
        total = torch.zeros((1 << self.step) + 1, dtype=torch.int64)
        for tensor in tensors:
            for patterns in magnitudes(tensor, self.dtype):
                total += self._counted(patterns).to("cpu")
        return total

    def narrowed(self, counts: Tensor) -> Selection:
        """Draw the conclusion of a pass.

        Args:
            counts: Of `counts`, added over all parts.

        Returns:
            The narrower interval.

        Raises:
            InvalidArgument: If there are NaN, or fewer than k values.
        """
        *inside, nan = counts.tolist()
        if nan:
            raise InvalidArgument(
                f"Selection: {nan} of the values are NaN, which have no place in the order. Values must be numbers or infinite; find "
                "out where they come from, for example with `refuse_nan` on each part."
            )
        if self.take > sum(inside):
            raise InvalidArgument(
                f"Selection: k={self.k} of {self.below + sum(inside)} values. k must lie between 1 and their number; add the counts of "
                "all parts, or pass a smaller k."
            )
        running = counts[:-1].cumsum(0)
        j = int(torch.searchsorted(running, self.take))
        before, bits = int(running[j]) - inside[j], self.bits - self.step
        return replace(self, low=self.low + (j << bits), bits=bits, below=self.below + before, ties=inside[j])

    def _counted(self, patterns: Tensor) -> Tensor:
        """Counts of one chunk, on its device."""
        shift, size = self.bits - self.step, 1 << self.step
        if self.bits < PATTERNS[self.dtype][1]:
            patterns = _between(patterns, self.low, self.low + (1 << self.bits) - 1).sub_(self.low)
        elif patterns.amax() > infinity(self.dtype):
            nan = (patterns > infinity(self.dtype)).sum().view(1)
            return torch.cat([nan.new_zeros(size), nan])
        return torch.bincount(patterns.bitwise_right_shift_(shift), minlength=size + 1)


def kth_smallest(named: Mapping[str, Tensor], k: int) -> Selection:
    """Find the k-th smallest |h| of all tensors together, as `torch.kthvalue` on their concatenation would.

    Args:
        named: Tensors of any shape, stride and device; several floating types are compared in the one that holds them all.
        k: From 1 to the number of values.

    Returns:
        The value, with the number of values below and of ties.

    Raises:
        InvalidArgument: If a tensor has NaN (by its name), or k or a type is not allowed.

    Cost: one reading on the CPU, where 1 to 2 % of the values are kept, at least 1 MiB. Elsewhere, for few values, and where a sample
        misled, 3 readings of float32, 1 of halves, 6 of float64, in about 2 MiB. No vector of the total length is made.
    Source: a bracket from a sample (`kth_in_bracket`), else radix selection as in Alabi et al. (2012), "Fast k-selection algorithms for
        graphics processing units", on chunks. The result is the same.

    Example:
        >>> found = kth_smallest({"a": torch.tensor([0.5, -3.0]), "b": torch.tensor([[-0.5, 0.0]])}, 3)
        >>> found.value.item(), found.below, found.ties
        (0.5, 1, 2)
    """
    n = sum(tensor.numel() for tensor in named.values())
    found = Selection.start(k, common_dtype(named))
    if k > n:
        raise InvalidArgument(
            f"kth_smallest: k={k} must lie between 1 and the number of values, {n}. Pass a smaller k."
        )
    at_once = kth_in_bracket(list(named.values()), k, found.dtype)
    if at_once is not None:
        low, below, ties = at_once
        return replace(found, low=low, bits=0, below=below, ties=ties)
    while not found.done:
        counts = found.counts(named.values())
        if counts[-1]:
            refuse_nan(named)
        found = found.narrowed(counts)
    return found


def smallest(named: Mapping[str, Tensor], found: Selection, *, take: int | None = None) -> dict[str, Tensor]:
    """Mark the k values of least |h|; of those equal to the k-th the first ones, in the order of the names, then of the index.

        m_i = 1  if |h_i| < h_(k),   or |h_i| = h_(k) and fewer than `take` such come before i

    Args:
        named: The tensors, or one process's share of them.
        found: A selection that is `done`.
        take: Number of ties to mark here; None takes `found.take`. A process passes what those before it left over.

    Returns:
        uint8 of the tensors' shapes, on their devices: 1 for the marked, else 0.

    Raises:
        InvalidArgument: If the selection is not done.

    Cost: One reading, and one byte per value for the result.

    Example:
        >>> named = {"a": torch.tensor([0.5, -3.0]), "b": torch.tensor([[-0.5, 0.0]])}
        >>> {name: mask.tolist() for name, mask in smallest(named, kth_smallest(named, 2)).items()}
        {'a': [1, 0], 'b': [[0, 1]]}
    """
    if not found.done:
        raise InvalidArgument(
            f"smallest: the selection has {found.bits} unknown bits; its value must be known. Narrow it until `done`, or use kth_smallest."
        )
    left = found.take if take is None else take
    every, masks = left >= found.ties, dict[str, Tensor]()
    for name, tensor in named.items():
        masks[name] = torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device)
        flat, begin = masks[name].view(-1).view(torch.bool), 0
        for patterns in magnitudes(tensor, found.dtype):
            place = flat[begin : begin + len(patterns)]
            begin += len(patterns)
            _up_to(patterns, found.low if every else found.low - 1, place)
            if left > 0 and not every:
                equal = (patterns == found.low).nonzero()[:left, 0]
                place[equal] = True
                left -= len(equal)
    return masks


def _up_to(patterns: Tensor, high: int, place: Tensor) -> None:
    """Write which are at most `high`; on the CPU by numpy, which takes a third of the time."""
    if patterns.device.type == "cpu":
        np.less_equal(patterns.numpy(), high, out=place.numpy())
    else:
        torch.le(patterns, high, out=place)


def _between(patterns: Tensor, low: int, high: int) -> Tensor:
    """Those in [low, high]; on the CPU by numpy, which takes a third of the time."""
    if patterns.device.type != "cpu":
        return patterns[(patterns >= low) & (patterns <= high)]
    array = patterns.numpy()
    return torch.from_numpy(array[(array >= low) & (array <= high)])
