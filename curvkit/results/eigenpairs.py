"""Eigenvalues with what is known of their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs A v = lambda v of a symmetric matrix, in descending order of lambda.

    Each value is the Rayleigh quotient v'Av. For every i at least one eigenvalue of A lies in
    [values[i] - residuals[i] - rounding, values[i] + residuals[i] + rounding]; of its multiplicity
    see `multiplicities_below`.
    """

    values: Tensor
    """[k] float64 on the CPU, descending; unit: loss / parameter^2 where A is a Hessian."""
    residuals: Tensor
    """[k] float64, ||A v - lambda v|| for unit v, in the unit of `values`."""
    converged: Tensor
    """[k] bool: the residual is at most tolerance * max(|value|, scale / 100), and so is `rounding`, as far as it was seen."""
    vectors: Tensor | None
    """[n, k] orthonormal, in the order of `space`; None in a partial result."""
    recomputed: bool
    """True: the residuals come from true products with these vectors; False: they are the recurrence's estimates."""
    which: str
    """Which end of the spectrum was asked for: largest, smallest, both, magnitude."""
    tolerance: float
    scale: float
    """Largest |eigenvalue| seen: the estimate of ||A||."""
    asymmetry: float
    """How far products were seen to be from those of a symmetric matrix, in the unit of `values`; 0 with blocks, where it is not seen."""
    rounding: float
    """Allowance for the rounding of a product in `residual_dtype`, in the unit of `values`."""
    products: int
    """Products with A in all, those for the residuals included."""
    upper_bound: float | None = None
    """With probability `confidence` over the random start no eigenvalue lies above this; None: no such claim."""
    lower_bound: float | None = None
    """With probability `confidence` over the random start no eigenvalue lies below this; None: no such claim."""
    confidence: float | None = None
    """Of the two bounds; 1 where the whole space was spanned."""
    multiplicities_below: int = 1
    """An eigenvalue that is listed fewer times than this, and beyond which another one is listed, has that multiplicity; 1 claims
    nothing."""
    residual_dtype: str = "float32"
    """Precision of the products that the residuals were recomputed with."""
    product_error: float = 0.0
    """Error of the search's products relative to ||A|| that the bounds allow for."""
    rounding_measured: bool = False
    """True: `product_error` was seen, against a higher precision or by perturbation; False: 8 eps, an assumption."""
    asked: int = 1
    """How many eigenvalues were wanted; fewer are listed if the budget ended before so many were seen."""
    space: ParameterSpace | None = None

    def __repr__(self) -> str:
        """The values, and whether they have converged; not the vectors."""
        values = ", ".join(f"{value:.6g}" for value in self.values.tolist())
        return f"Eigenpairs({self.which}: {values}; {'' if self.all_converged else 'not '}converged, {self.products} products)"

    @property
    def intervals(self) -> Tensor:
        """[k, 2]: the lower and upper end of each eigenvalue's interval."""
        half = self.residuals + self.rounding
        return torch.stack([self.values - half, self.values + half], dim=1)

    @property
    def all_converged(self) -> bool:
        """Whether as many as asked for are there, and every residual was recomputed and is within the tolerance."""
        return self.recomputed and len(self.values) >= self.asked and bool(self.converged.all())
