"""A map whose products are kept in a journal, and recalled from it: the algorithms do not know of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvkit.linalg.maps import LinearMap
from curvkit.results.journal import NOTHING_KEPT, Journal, Kept

Shape = Sequence[int | None]
"""Of a tensor; None: any length."""


class Recorded:
    """A linear map that remembers its products under a digest of the vectors.

    A product is recalled for exactly the bits that it was made from, and then it has the bits that it had. So an algorithm that is begun
    again goes the same way up to where it was, for the price of its own arithmetic; and where anything differs, another machine or another
    number of threads, the products that differ are made again.

    Args:
        A: The map.
        journal: Where its products are kept.
        name: Of the map, one in the journal.

    Cost: a digest of each vector and a copy of each product on the CPU.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> Recorded(DenseMap(torch.eye(2)), NOTHING_KEPT, "identity").matvec(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, A: LinearMap, journal: Journal, name: str) -> None:
        self.A, self._journal, self._name = A, journal, name
        self.n, self.dtype, self.device = A.n, A.dtype, A.device
        self._error, self._inside = 0.0, False

    def __getattr__(self, name: str) -> Any:
        """What the map says of itself beside its products; of an error that grows with them, the largest of all runs."""
        found = getattr(self.A, name)
        return max(found, self._error) if name == "product_error" else found

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, those of recalled products included."""
        return self._journal.clock

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        return self._known("product", [v], lambda: self.A.matvec(v), (self.n,), self.dtype).to(self.device)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors, [n, k] -> [n, k]."""
        made = self._known("products", V.unbind(1), lambda: self.A.matmat(V), (self.n, V.shape[1]), self.dtype)
        return made.to(self.device)

    def derived(self, label: str, vectors: Sequence[Tensor], make: Callable[[], Tensor], shape: Shape) -> Tensor:
        """Recall what was made from products with some vectors, or make it and keep it instead of the products.

        Args:
            label: What it is.
            vectors: Each [n].
            make: Multiplies with this map.
            shape: Of what it makes, float64 on the CPU; None: any length.

        Returns:
            What `make` returns or returned.
        """
        return self._known(label, vectors, make, shape, torch.float64)

    def _known(
        self, label: str, vectors: Sequence[Tensor], make: Callable[[], Tensor], shape: Shape, dtype: torch.dtype
    ) -> Tensor:
        """What was kept, on the CPU, if it can be what was made; else it is made."""
        if self._inside:
            return make()
        key = f"{self._name}/{label}/{digest(vectors)}"
        kept = self._journal.recalled(key)
        if kept is not None and _fits(kept, shape, dtype):
            self._error = max(self._error, kept.error)
            found = kept.tensor.clone()  # in torch's own memory: kernels may round by the alignment
            return found.T if kept.turned else found
        began, self._inside = time.perf_counter(), True
        try:
            made = make()
        finally:
            self._inside = False
        seconds, turned = time.perf_counter() - began, made.ndim == 2 and not made.is_contiguous()
        copied = (made.T if turned else made).detach().to("cpu", copy=True).contiguous()
        self._journal.keep(key, Kept(copied, seconds, getattr(self.A, "product_error", 0.0), turned))
        return made


def recorded(A: LinearMap, journal: Journal, name: str) -> LinearMap:
    """Give a map a memory, if there is a journal for it.

    Args:
        A: The map.
        journal: Where its products are kept.
        name: Of the map, one in the journal.

    Returns:
        The map itself where nothing is kept.
    """
    return A if journal is NOTHING_KEPT else Recorded(A, journal, name)


def derived(A: LinearMap, label: str, vectors: Sequence[Tensor], make: Callable[[], Tensor], shape: Shape) -> Tensor:
    """Make something small from products with A, which a map with a memory keeps in place of the products.

    Args:
        A: The map that `make` multiplies with.
        label: What it is; two things that are made from the same vectors have two labels.
        vectors: What it depends on, each [n].
        make: Makes it, in float64 on the CPU.
        shape: Of what it makes; what was kept in another one is made again.

    Returns:
        What `make` returns.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> A, x = DenseMap(torch.eye(2)), torch.ones(2)
        >>> derived(A, "form", [x], lambda: (x @ A.matvec(x)).double(), ()).item()
        2.0
    """
    known = getattr(A, "derived", None)
    return make() if known is None else known(label, vectors, make, shape)


def _fits(kept: Kept, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether it has this shape and dtype, and is finite."""
    found = kept.tensor.shape[::-1] if kept.turned else kept.tensor.shape
    same = len(found) == len(shape) and all(wanted in (None, size) for wanted, size in zip(shape, found, strict=True))
    return same and kept.tensor.dtype == dtype and bool(kept.tensor.isfinite().all())


def clock_of(A: LinearMap) -> Callable[[], float]:
    """The clock by which a search with A counts its time.

    Args:
        A: The map.

    Returns:
        Its own, on which recalled products count with the time that they took; else the monotonic clock.
    """
    return getattr(A, "clock", time.monotonic)


def digest(vectors: Sequence[Tensor]) -> str:
    """Hash the bits of some vectors, their lengths and their dtype.

    Args:
        vectors: Each [n].

    Returns:
        32 hexadecimal digits.

    Example:
        >>> digest([torch.zeros(1)]) == digest([-torch.zeros(1)])   # other bits
        False
    """
    hashed = hashlib.blake2b(digest_size=16)
    for v in vectors:
        hashed.update(f"{v.dtype} {tuple(v.shape)} ".encode())
        bits: Any = v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(bits)
    return hashed.hexdigest()
