"""What estimators that need products alone have in common."""

from __future__ import annotations

from typing import ClassVar, cast

from curvkit.estimators.expected import Expected
from curvkit.estimators.products import ProductEstimator, estimated_by_products, expected_of_products
from curvkit.objectives import Objective
from curvkit.operators import Hessian, Residual
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.plan import choose
from curvkit.results.diagonal_estimate import DiagonalEstimate


class FromProducts:
    """A `ProductEstimator` as an estimator of the diagonals of H and of H - G; a subclass says how an operator's is estimated."""

    matrix: ClassVar[str] = "hessian"
    instead: ClassVar[str]
    """What to do where memory does not suffice, as a sentence without its full stop."""

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal of the Hessian; see the class.

        Args:
            objective: The function.
            seed: Of every draw; None draws one.

        Returns:
            The diagonal, with its standard errors.

        Raises:
            InvalidArgument: If an option does not fit the number of parameters.
            UnsupportedModel: If the objective has no second derivatives that could be trusted, or memory does not suffice.
            CurvkitError: If a product is not finite, or the products are seen not to be those of a symmetric matrix.
        """
        return self._estimated(Hessian, objective, seed)

    def estimate_residual(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal of H - G, of the Hessian without the generalised Gauss-Newton matrix.

        Args:
            objective: The function; its loss takes outputs and targets.
            seed: Of every draw; None draws one.

        Returns:
            The diagonal, with its standard errors.

        Raises:
            InvalidArgument: If an option does not fit the number of parameters.
            UnsupportedModel: If the objective has no second derivatives that could be trusted, or memory does not suffice.
            UnknownObjective: If the loss does not take outputs and targets.
            CurvkitError: If a product is not finite, or the products are seen not to be those of a symmetric matrix.
        """
        return self._estimated(Residual, objective, seed)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Raises:
            CurvkitError: If memory does not suffice for one product.

        Cost: about one gradient of the first batch.
        """
        it, own = objective.raised(), cast(ProductEstimator, self)
        return expected_of_products(it, choose(it), Hessian, products=own.num_products, vectors=own.num_vectors)

    def refuse_unfit(self, objective: Objective) -> None:
        """Refuse options that do not fit the objective; by itself nothing.

        Args:
            objective: What will be estimated.
        """

    def _estimated(self, kind: type[BatchwiseOperator], objective: Objective, seed: int | None) -> DiagonalEstimate:
        self.refuse_unfit(objective)
        return estimated_by_products(cast(ProductEstimator, self), kind, objective, seed=seed, instead=self.instead)
