"""A subspace rich in large eigenvalues whose part of the trace is exact, so that probes sample what is left of the matrix."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.linalg.basis import Basis
from curvkit.linalg.hutchinson import Draws, Samples, part_sums, probe, refuse_not_finite, sampled
from curvkit.linalg.krylov import RandomVectors, append_block, extend, start_block
from curvkit.linalg.maps import LinearMap

BREAKDOWN = 10.0
"""What is left of a product below BREAKDOWN eps ||T|| is rounding, as in Lanczos."""


@dataclass(frozen=True, eq=False)
class KrylovSubspace:
    """Rows Q of r Lanczos steps, with T = QAQ' and the remainder f of A Q' = Q'T + f e_r'."""

    basis: Basis
    T: Tensor
    """[r, r] float64 on the CPU."""
    remainder: Tensor
    """[n], f, orthogonal to the rows of Q."""
    known: Tensor
    """[p] float64: sums of the diagonal of A - P A P by parts, P = I - Q'Q; their sum is tr T."""
    asymmetry: float = 0.0
    """Largest |q_i'A q_j| with j > i + 1, zero for a symmetric matrix up to rounding."""

    @property
    def scale(self) -> float:
        """Largest |Ritz value|: the estimate of ||A||."""
        return torch.linalg.matrix_norm(self.T, 2).item()

    def diagonal(self) -> Tensor:
        """The diagonal of A - P A P, of which `known` has the sums.

            diag(Q'TQ) + 2 q_r * f

        Returns:
            [n].

        Cost: r^2 n multiplications; three vectors of memory.
        """
        last = torch.zeros(self.basis.size, 1, dtype=torch.float64)
        last[-1] = 2.0
        total = self.basis.combine(last)[0].mul_(self.remainder)
        theta, S = torch.linalg.eigh(self.T)
        for value, weights in zip(theta.tolist(), S.T, strict=True):
            y = self.basis.combine(weights[:, None])[0]
            total.addcmul_(y, y, value=value)
        return total

    def sample(self, x: Tensor, sums: Tensor, lengths: Sequence[int]) -> Tensor:
        """Turn a sample of A into one of P A P, without a product.

            x * (P A P x) = x * (Ax) - x * (Q'd) - (e_r'c) x * f,    c = Q x,   d = Q A x = T c + (f'x) e_r

        Args:
            x: [n], the probe, drawn independently of Q.
            sums: [p], the part sums of x * (Ax).
            lengths: Coordinates of each part.

        Returns:
            [p] float64, the part sums of x * (P A P x).

        Cost: r n multiplications.
        """
        c = self.basis.coefficients(x).double().cpu()
        against = part_sums(x, self.remainder, lengths)
        d = self.T @ c
        d[-1] += against.sum()
        return sums - part_sums(x, self.basis.combine(d[:, None])[0], lengths) - c[-1] * against


def krylov(
    A: LinearMap, rank: int, *, lengths: Sequence[int], seed: int, start: Tensor | None, measure: str = "trace"
) -> Generator[int, None, KrylovSubspace]:
    """Run `rank` steps of Lanczos with full reorthogonalization.

    Args:
        A: Symmetric, of order n >= rank.
        rank: r.
        lengths: Coordinates of each part.
        seed: Of the random half of the start vector; independent of the probes.
        start: [n], a direction rich in the eigenvectors of large eigenvalues, for example the gradient; None: a random one.
        measure: What is measured, for messages.

    Yields:
        How many products were made, after each.

    Returns:
        The subspace.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.
    """
    random, eps = RandomVectors(A, seed), torch.finfo(A.dtype).eps
    left, _ = start_block(start, 1, random)
    basis, T, scale = Basis(A.n, A.dtype, A.device, capacity=rank), torch.zeros(0, 0, dtype=torch.float64), 0.0
    row, asymmetry = left[0], 0.0
    for count in range(1, rank + 1):
        (row,), _ = append_block(left, basis, BREAKDOWN * eps * scale, random)
        left = [A.matvec(row).clone()]
        column = basis.orthogonalize(left[0]).double().cpu()
        refuse_not_finite(column, f"of deflation step {count}", measure=measure)
        asymmetry = max([asymmetry, *column[: max(count - 2, 0)].abs().tolist()])
        T = extend(T, column[None])
        scale = torch.linalg.matrix_norm(T, 2).item()
        yield count
    known = part_traces(basis, T, lengths) + 2.0 * part_sums(row, left[0], lengths)
    return KrylovSubspace(basis, T, left[0], known, asymmetry)


def part_traces(basis: Basis, T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of the diagonal of Q'TQ by parts, one Ritz vector at a time.

    Args:
        basis: The r rows Q.
        T: [r, r] float64, symmetric.
        lengths: Coordinates of each part.

    Returns:
        [p] float64.

    Cost: r^2 n multiplications; O(n) memory.
    """
    theta, S = torch.linalg.eigh(T)
    total = torch.zeros(len(lengths), dtype=torch.float64)
    for value, weights in zip(theta.tolist(), S.T, strict=True):
        y = basis.combine(weights[:, None])[0]
        total += value * part_sums(y, y, lengths)
    return total


def deflated_steps(
    A: LinearMap, *, rank: int, lengths: Sequence[int], seed: int, start: Tensor | None = None
) -> Iterator[Draws]:
    """Take the trace on a Krylov subspace exactly, and sample the rest.

        tr A = tr T + E x'P A P x,    T = QAQ',   P = I - Q'Q,   x in {-1, +1}^n independent of Q

    Args:
        A: Symmetric, of order n.
        rank: Dimensions of the subspace, r < n.
        lengths: Coordinates of each part.
        seed: Of the start vector and of the probes, under different purposes.
        start: [n], a direction rich in eigenvectors of large eigenvalues; it must not depend on the probes.

    Yields:
        The state after each product; without a value until there are probes.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.

    Cost: r products, then one per probe, with r n multiplications beside it; O(r n) memory.
    Accuracy: Var = 2 (||PAP||_F^2 - sum of its squared diagonal): after r steps the large eigenvalues are not in it.
    Source: Girard (1989) for the idea; Lin (2017) for low rank plus Hutchinson. Differs: the subspace is Krylov's, whose r products
        give T as well, and P A P is sampled by products with A alone, so that probes drawn before the subspace are of use after it.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> A = DenseMap(torch.diag(torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0])) + 0.1 * torch.ones(5, 5))
        >>> first = next(state for state in deflated_steps(A, rank=2, lengths=[5], seed=0) if state.probes)
        >>> first.products, first.rank
        (3, 2)
    """
    yield from resumed(A, Samples(lengths), rank=rank, seed=seed, start=start)


def resumed(A: LinearMap, drawn: Samples, *, rank: int, seed: int, start: Tensor | None) -> Iterator[Draws]:
    """Go on as `deflated_steps` from samples of A itself, which become samples of what is left of it.

    Args:
        A: Symmetric, of order n.
        drawn: Of probes 0 ... m-1 of this seed, from `hutchinson.steps`.
        rank: Dimensions of the subspace.
        seed: The same.
        start: As for `deflated_steps`.

    Yields:
        The state after each product; while the subspace grows, that of the samples as they were.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.
    """
    lengths, before = drawn.lengths, drawn.size
    building = krylov(A, rank, lengths=lengths, seed=seed, start=start)
    while True:
        try:
            count = next(building)
        except StopIteration as done:
            subspace: KrylovSubspace = done.value
            break
        yield drawn.draws(products=before + count, step=1)
    samples = Samples(lengths)
    for index, sums in enumerate(drawn.rows):
        samples.append(subspace.sample(probe(A, seed, index), sums, lengths))
    while True:
        if samples.size:
            yield samples.draws(products=rank + samples.size, step=1, known=subspace.known, rank=rank)
        [sums] = sampled(A, samples.size, lengths=lengths, seed=seed, block_size=1)
        samples.append(subspace.sample(probe(A, seed, samples.size), sums, lengths))
