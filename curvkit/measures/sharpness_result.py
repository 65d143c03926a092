"""What a measurement of sharpness says: eigenvalues, their doubt, and what they are eigenvalues of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from curvkit.measures.adaptive_result import AdaptiveSharpness
from curvkit.measures.cross_check_result import CrossCheck
from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.invariances import ScaleInvariance
from curvkit.measures.stability_result import Stability
from curvkit.operators import Plan
from curvkit.operators.preflight import Preflight
from curvkit.results import Definition, Eigenpairs, plain

Stage = Literal["searching", "spread", "halves", "adaptive", "stability", "complete"]


@dataclass(frozen=True, eq=False)
class Sharpness:
    """The extreme eigenvalues of the Hessian of an objective; a partial result while `stage` is not "complete"."""

    eigenpairs: Eigenpairs
    definition: Definition
    loss: float
    """L at the point."""
    gradient_norm: float
    """||grad L||; curvature at a point where it is not small is not that of a minimum."""
    spread: Spread | None
    """v'H_b v over the batches, v the eigenvector of `value`; None if not (yet) measured."""
    halves: Halves | None
    """Bracket of the population's largest eigenvalue; None if not (yet) measured."""
    stage: Stage
    plan: Plan
    seed: int
    seconds: float
    products: int
    """Products with Hessians of all the data, those of halves counted as half."""
    unused: tuple[str, ...] = ()
    preflight: Preflight | None = None
    """Whether second derivatives are right, as far as a few rows show; None if it was not asked."""
    arithmetic: str = "float32"
    """In which the search multiplied; "bfloat16" where that was asked for, while values and residuals are of products in float32."""
    notes: tuple[str, ...] = ()
    cross_check: CrossCheck | None = None
    """The same by another library; None if that was not asked."""
    scale: ScaleInvariance | None = None
    """Tensors whose length does not matter, so that the eigenvalues are a matter of it; None if that was not asked, or not yet."""
    adaptive: AdaptiveSharpness | None = None
    """The largest eigenvalue per relative change of the weights; None if that was not asked, or not yet."""
    stability: Stability | None = None
    """How far the optimizer of the checkpoint is from its limit; None if that was not asked, or not yet."""

    def __repr__(self) -> str:
        """The value with its interval, and what it belongs to."""
        low, high = self.eigenpairs.intervals[self.leading].tolist()
        return f"Sharpness({self.value:.6g} in [{low:.6g}, {high:.6g}], {self.stage}; {self.definition})"

    @property
    def leading(self) -> int:
        """Row of the outermost eigenvalue: the first; the last for which="smallest"; the largest in absolute value for "magnitude"."""
        values = self.eigenpairs.values
        if self.eigenpairs.which == "magnitude":
            return int(values.abs().argmax())
        return len(values) - 1 if self.eigenpairs.which == "smallest" else 0

    @property
    def value(self) -> float:
        """The outermost eigenvalue: lambda_max for which="largest", lambda_min for "smallest"."""
        return self.eigenpairs.values[self.leading].item()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without the vectors: what `--json` prints under "result".

        Returns:
            Mappings, lists, numbers and strings.
        """
        pairs = self.eigenpairs
        rows = zip(pairs.values, pairs.intervals, pairs.residuals, pairs.converged, strict=True)
        return plain(
            {
                "quantity": f"{pairs.which} eigenvalues of the Hessian",
                "definition": {**plain(self.definition), "text": str(self.definition)},
                "eigenvalues": [
                    {
                        "value": value,
                        "low": interval[0],
                        "high": interval[1],
                        "residual": residual,
                        "converged": pairs.recomputed and bool(converged),
                    }
                    for value, interval, residual, converged in rows
                ],
                "residuals_recomputed": pairs.recomputed,
                "residuals_dtype": pairs.residual_dtype,
                "search_dtype": self.arithmetic,
                "rounding": pairs.rounding,
                "scale": pairs.scale,
                "product_error": pairs.product_error,
                "rounding_measured": pairs.rounding_measured,
                "tolerance": pairs.tolerance,
                "upper_bound": pairs.upper_bound,
                "lower_bound": pairs.lower_bound,
                "bounds_confidence": pairs.confidence,
                "multiplicities_below": pairs.multiplicities_below,
                "loss": self.loss,
                "gradient_norm": self.gradient_norm,
                "batch_spread": self.spread,
                "halves": None if self.halves is None else {**plain(self.halves), "lower": self.halves.lower},
                "products": self.products,
                "search_products": pairs.products,
                "seconds": self.seconds,
                "stage": self.stage,
                "unused_parameters": self.unused,
                "preflight": None if self.preflight is None else self.preflight.to_dict(),
                "cross_check": None if self.cross_check is None else self.cross_check.to_dict(),
                "scale_invariance": None if self.scale is None else self.scale.to_dict(),
                "adaptive_sharpness": None if self.adaptive is None else self.adaptive.to_dict(),
                "stability": None if self.stability is None else self.stability.to_dict(),
                "notes": self.notes,
            }
        )
