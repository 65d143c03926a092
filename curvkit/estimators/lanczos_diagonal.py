"""The top eigenspace of the Hessian, its diagonal, and what is left of the Hessian's beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.deflated_diagonal import refuse_rank
from curvkit.estimators.deflated_operator import VECTORS as REMAINDER_VECTORS
from curvkit.estimators.deflated_operator import completed, refuse_other_than_products
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.products import ProductEstimator, expected_of_products
from curvkit.linalg import lanczos
from curvkit.linalg.basis import Basis
from curvkit.linalg.complement import known_diagonal, refuse_asymmetric
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.operators.memory import free_memory
from curvkit.operators.plan import Plan, choose
from curvkit.results.diagonal_estimate import Cost
from curvkit.results.eigen_diagonal import EigenDiagonal
from curvkit.results.eigenpairs import Eigenpairs

Top = Literal["magnitude", "largest"]

TYPICAL = 10
"""Products that a search takes beside three for each eigenvalue. On two small networks that were trained a little: 19 and 31 for 5, 32 and
46 for 10, 64 and 88 for 20."""
ROWS = 40
"""Vectors that a search holds beside six for each eigenvalue, three for its basis and three for the certificate."""
FRACTION = 0.5
"""Share of the free memory that the vectors of a search may take; with fewer rows it restarts earlier."""
INSTEAD = "Take a smaller rank, leave parameters out by patterns, or use ExampleHutchinson, which holds no eigenvectors"


@dataclass(frozen=True)
class Lanczos:
    """The top eigenspace of the Hessian and its diagonal; with `remainder` the diagonal of the whole Hessian.

        alone: d = sum_i lambda_i v_i * v_i,    with a remainder: d = diag(H - P H P) + its estimate of diag(P H P),    P = I - VV'

    Alone it is not the diagonal of the Hessian, but that of its part of rank k: the matrix is named "hessian_top", and there is no standard
    error, since nothing is sampled; what the eigenvalues leave out is not in it. With a remainder it is unbiased for the
    Hessian, also where the eigenpairs have not converged, and the standard error is the remainder's; on wide networks that noise can be
    larger than what the eigenpairs leave out.

    Args:
        rank: k eigenpairs.
        remainder: An estimator by products, for example Hutchinson(10); None for the eigenpairs alone.
        which: "magnitude" takes the largest |lambda|, whose part is the nearest of rank k; "largest" the algebraically largest, as
            `curvkit.measures.sharpness` does.
        tolerance: Relative residual at which an eigenpair counts as converged.
        max_products: Of the search; pairs that have not converged by then are said to be so.

    Accuracy: of an eigenpair its residual r, recomputed with a true product: an eigenvalue lies within r of lambda. Rounding of products is
        taken as 8 eps ||H||, and not measured as `curvkit.measures.sharpness` does.
    Source: Lanczos (1950) with full reorthogonalization, see `curvkit.linalg.lanczos`.
    Cost: typically 3 k + 10 products of about two gradients, as many as it needs; with a remainder k more, and its own. Memory: up to
        6 k + 40 copies of the parameters, less where the search converges early.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> found = Lanczos(rank=2).estimate(objective, seed=0)
        >>> [round(entry, 3) for entry in found.values["weight"][0].tolist()], found.matrix
        ([6.0, 2.667, 0.0], 'hessian_top')
        >>> [round(value, 3) for value in found.eigenpairs.values.tolist()]
        [6.0, 2.667]
    """

    rank: int = 10
    remainder: ProductEstimator | None = None
    which: Top = "magnitude"
    tolerance: float = 1e-3
    max_products: int = 500
    matrix: ClassVar[str] = "hessian_top"

    def __post_init__(self) -> None:
        """Check the options."""
        refuse_rank("Lanczos", self.rank)
        if self.which not in get_args(Top):
            raise InvalidArgument(
                f"Lanczos: which={self.which!r} is not one of {', '.join(get_args(Top))}. Use 'magnitude' if in doubt."
            )
        if (
            isinstance(self.tolerance, bool)
            or not isinstance(self.tolerance, (int, float))
            or not 0 < self.tolerance < 1
        ):
            raise InvalidArgument(
                f"Lanczos: tolerance={self.tolerance!r} must lie in (0, 1). It is relative to the eigenvalue; the default is 1e-3."
            )
        least = self.rank + 1
        if isinstance(self.max_products, bool) or not isinstance(self.max_products, int) or self.max_products < least:
            raise InvalidArgument(
                f"Lanczos: max_products={self.max_products!r} must be an integer >= {least}: the residuals of {self.rank} eigenpairs take "
                f"{self.rank}, and a step one. The default is 500."
            )
        if self.remainder is not None:
            refuse_other_than_products("Lanczos", "remainder", self.remainder)
            object.__setattr__(self, "matrix", "hessian")  # of the whole, where the rest is estimated, too

    def estimate(self, objective: Objective, *, seed: int | None = None) -> EigenDiagonal:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function.
            seed: Of the start vector and of the remainder, under different purposes; None draws one.

        Returns:
            The diagonal with the eigenpairs, and with a remainder the share of the trace that they explain.

        Raises:
            InvalidArgument: If the rank exceeds the number of parameters, or the tolerance is below the rounding of products.
            UnsupportedModel: If the objective has no second derivatives that could be trusted, or memory does not suffice.
            CurvkitError: If a product is not finite, or the products are not those of a symmetric matrix.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        H, rows, peak = self._operator(objective)
        *_, pairs = self._searched(H, rows, seed)
        V, n = cast(Tensor, pairs.vectors), H.n  # the last result of a search has them
        notes = [*H.notes, *_unconverged(pairs)]
        values, stderr, sums, samples, products = {}, None, None, 0, pairs.products
        if self.remainder is None:
            flat = sum((V[:, i].square() * value for i, value in enumerate(pairs.values.tolist())), V.new_zeros(n))
            values = H.space.unflatten(flat)
            notes.append(
                f"the top {len(pairs.values)} eigenpairs alone: the rest of the diagonal of the Hessian is not in it"
            )
        else:
            basis = Basis(n, H.dtype, H.device, capacity=V.shape[1])
            basis.restart(V.T)
            found = completed(H, basis, known_diagonal(H, basis), self.remainder, seed=seed)
            values, stderr, sums, samples = (
                found.values,
                found.stderr if found.samples else None,
                found.sums,
                found.samples,
            )
            products += V.shape[1] + found.products
            notes += found.notes
        spent = expected_of_products(objective, H.plan, Hessian, products=products, vectors=0)
        cost = Cost(spent.gradients, time.perf_counter() - began, products, peak)
        told = self.matrix, repr(self), cost, samples, seed, sums, tuple(notes)
        return EigenDiagonal(values, stderr, *told, eigenpairs=pairs)

    def eigenpairs(self, objective: Objective, *, seed: int | None = None) -> Eigenpairs:
        """Compute the eigenpairs alone.

        Args:
            objective: The function.
            seed: Of the start vector; None draws one.

        Returns:
            The pairs with recomputed residuals; `converged` says which of them met the tolerance, `space` names the coordinates.

        Raises:
            InvalidArgument: If the rank exceeds the number of parameters, or the tolerance is below the rounding of products.
            UnsupportedModel: If the objective has no second derivatives that could be trusted, or memory does not suffice.
            CurvkitError: If a product is not finite, or the products are not those of a symmetric matrix.

        Cost: typically 3 k + 10 products of about two gradients.
        """
        *_, last = self.search(objective, seed=seed)
        return last

    def search(self, objective: Objective, *, seed: int | None = None) -> Iterator[Eigenpairs]:
        """Search step by step, so that a caller can show progress and stop.

        Args:
            objective: The function.
            seed: Of the start vector; None draws one.

        Yields:
            Partial results after each product, with estimated residuals and without vectors, and last the complete one.

        Raises:
            InvalidArgument: If the rank exceeds the number of parameters, or the tolerance is below the rounding of products.
            UnsupportedModel: If the objective has no second derivatives that could be trusted, or memory does not suffice.
            CurvkitError: If a product is not finite, or the products are not those of a symmetric matrix.
        """
        seed, objective = seeds.settle(seed), objective.raised()
        H, rows, _ = self._operator(objective)
        yield from self._searched(H, rows, seed)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory: of a typical search, since nobody knows beforehand how many products it will take.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Raises:
            CurvkitError: If memory does not suffice for one product.

        Cost: about one gradient of the first batch.
        """
        it = objective.raised()
        return self._expected(it, choose(it), self._rows(it))

    def _expected(self, objective: Objective, plan: Plan, rows: int) -> Expected:
        """By what a search typically takes, and the rows that it may hold."""
        rest = self.remainder
        products = min(3 * self.rank + TYPICAL, objective.parameters.n + self.rank, self.max_products)
        if rest is not None:
            products += self.rank + rest.num_products
            rows = max(rows, self.rank + REMAINDER_VECTORS + rest.num_vectors)
        return expected_of_products(objective, plan, Hessian, products=products, vectors=rows)

    def _operator(self, objective: Objective) -> tuple[Hessian, int, int]:
        """The Hessian, the vectors that a search may hold, and the bytes that the estimate will take at most."""
        refuse_rank("Lanczos", self.rank, objective.parameters.n)
        plan, rows = choose(objective), self._rows(objective)
        expected = self._expected(objective, plan, rows)
        refuse_too_large("Lanczos", objective, expected, instead=INSTEAD)
        return Hessian(objective, plan=plan), rows, expected.peak_bytes(objective)

    def _searched(self, H: Hessian, rows: int, seed: int) -> Iterator[Eigenpairs]:
        settings = lanczos.Settings(
            self.rank, self.which, self.tolerance, max_products=self.max_products, max_rows=rows
        )
        for pairs in lanczos.search(H, settings, start=H.gradient, seed=seed):
            refuse_asymmetric(H, pairs.asymmetry, pairs.scale)
            yield replace(pairs, space=H.space)

    def _rows(self, objective: Objective) -> int:
        """Vectors that the search may hold, working vectors included: as many as are of use, fewer where memory is short."""
        k, n = self.rank, objective.parameters.n
        useful, least = min(6 * k + ROWS, n + 4 * k + 16), 5 * k + 16
        fit = int(FRACTION * free_memory(objective.device)) // (n * objective.dtype.itemsize)
        return max(min(useful, fit), min(least, useful))


def _unconverged(pairs: Eigenpairs) -> list[str]:
    """What is to be said of pairs that did not meet the tolerance, or are not there."""
    said, good = list[str](), int(pairs.converged.sum())
    if len(pairs.values) < pairs.asked:
        said.append(f"{len(pairs.values)} of {pairs.asked} eigenpairs were found within the budget of products")
    if good < len(pairs.values):
        worst = (pairs.residuals / lanczos.allowed(pairs.values, pairs.scale, 1.0)).max().item()
        said.append(
            f"{len(pairs.values) - good} of {len(pairs.values)} eigenpairs have not converged to {pairs.tolerance:g}: relative residuals "
            f"up to {worst:.2g} after {pairs.products} products"
        )
    return said
