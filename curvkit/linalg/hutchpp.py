"""Hutch++: the trace on the range of a random sketch, and probes for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.linalg.basis import Basis, norm
from curvkit.linalg.deflation import BREAKDOWN, part_traces
from curvkit.linalg.hutchinson import Draws, Samples, part_sums, probe, refuse_not_finite
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.recorded import derived

SKETCH = "trace sketch"


def steps(A: LinearMap, *, rank: int, lengths: Sequence[int], seed: int) -> Iterator[Draws]:
    """Sketch the range, take the trace on it exactly, and sample the rest.

        Q' = orth(A S),    tr A = tr QAQ' + E x'P A P x,    P = I - Q'Q

    with S normal, [n, r], and x in {-1, +1}^n independent of it.

    Args:
        A: Symmetric, of order n.
        rank: Columns of the sketch, r <= n.
        lengths: Coordinates of each part.
        seed: Of sketch and probes, under different purposes.

    Yields:
        The state after each product; without a value until there are probes.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.

    Cost: 2 r products, then one per probe, with 4 r n multiplications beside it; O(r n) memory.
    Accuracy: exact where the rank of A is at most r.
    Source: Meyer, Musco, Musco & Woodruff (2021), algorithm 1. Differs: r is chosen, not a third of the budget, so that the number of
        probes can follow from the interval; S is normal, because signs can be dependent on few coordinates.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> states = steps(DenseMap(torch.ones(6, 6)), rank=2, lengths=[6], seed=0)
        >>> round(next(state.value for state in states if state.probes), 4)
        6.0
    """
    nothing, basis, products = Samples(lengths), Basis(A.n, A.dtype, A.device, capacity=rank), 0
    for index in range(rank):
        y = A.matvec(seeds.normal(A.n, seed, SKETCH, index, dtype=A.dtype, device=A.device)).clone()
        length, products = norm(y), products + 1
        refuse_not_finite(torch.tensor(length), f"with sketch vector {index + 1}")
        for _ in range(2):  # normalised before the second pass, which then sees only rounding
            basis.orthogonalize(y)
            left = norm(y)
            if not left > BREAKDOWN * torch.finfo(A.dtype).eps * length:
                break  # the range of A is spanned, up to rounding
            y, length = y.div_(left), 1.0
        else:
            basis.append(y)
        yield nothing.draws(products=products, step=1)
    T = torch.zeros(basis.size, basis.size, dtype=torch.float64)
    known = torch.zeros(len(nothing.lengths), dtype=torch.float64)
    for index in range(basis.size):
        unit = torch.zeros(basis.size, 1, dtype=torch.float64)
        unit[index] = 1.0
        q = basis.combine(unit)[0]
        y, products = A.matvec(q), products + 1
        column = basis.coefficients(y).double().cpu()
        refuse_not_finite(column, f"with basis vector {index + 1}")
        T[:, index] = column
        known += 2.0 * part_sums(q, y, lengths)
        yield nothing.draws(products=products, step=1)
    known -= part_traces(basis, (T + T.T) / 2, lengths)
    samples = Samples(lengths)
    while True:
        row = sampled(A, basis, probe(A, seed, samples.size), lengths)
        refuse_not_finite(row, f"with probe {samples.size + 1}")
        samples.append(row)
        yield samples.draws(products=products + samples.size, step=1, known=known, rank=basis.size)


def sampled(A: LinearMap, basis: Basis, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sample what is left of A beside the rows Q of a basis.

    Args:
        A: Symmetric, of order n.
        basis: The rows Q.
        x: [n], the probe, drawn independently of Q.
        lengths: Coordinates of each part.

    Returns:
        [p] float64, the part sums of x * (P A P x), P = I - Q'Q.

    Cost: one product and 4 r n multiplications.
    """
    w = x.clone()
    basis.orthogonalize(w)

    def made() -> Tensor:
        y = A.matvec(w).clone()
        basis.orthogonalize(y)
        return part_sums(x, y, lengths)

    return derived(A, "remaining part sums", [w], made, (len(lengths),))
