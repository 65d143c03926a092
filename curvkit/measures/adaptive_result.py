"""What a measurement of adaptive sharpness says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from curvkit.results import Definition, Eigenpairs, plain


@dataclass(frozen=True, eq=False)
class AdaptiveSharpness:
    """The largest eigenvalue of diag|w| H diag|w|; a partial result while `stage` is not "complete"."""

    eigenpairs: Eigenpairs
    """Unit: that of the loss."""
    definition: Definition
    """Of H."""
    loss: float
    """L at the point."""
    gradient_norm: float
    """||diag|w| grad L||, in the unit of the loss."""
    stage: Literal["searching", "complete"]
    seed: int
    seconds: float
    products: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The value with its interval, and what it belongs to."""
        low, high = self.eigenpairs.intervals[0].tolist()
        return f"AdaptiveSharpness({self.value:.6g} in [{low:.6g}, {high:.6g}], {self.stage}; {self.definition})"

    @property
    def value(self) -> float:
        """lambda_max(diag|w| H diag|w|)."""
        return self.eigenpairs.values[0].item()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without vectors.

        Returns:
            Mappings, lists, numbers and strings.
        """
        pairs = self.eigenpairs
        return plain(
            {
                "quantity": "largest eigenvalue of diag|w| H diag|w|",
                "definition": {**plain(self.definition), "text": str(self.definition)},
                "value": self.value,
                "interval": pairs.intervals[0],
                "residual": pairs.residuals[0],
                "residuals_recomputed": pairs.recomputed,
                "residuals_dtype": pairs.residual_dtype,
                "converged": pairs.all_converged,
                "tolerance": pairs.tolerance,
                "upper_bound": pairs.upper_bound,
                "bounds_confidence": pairs.confidence,
                "loss": self.loss,
                "gradient_norm": self.gradient_norm,
                "products": self.products,
                "seconds": self.seconds,
                "seed": self.seed,
                "stage": self.stage,
                "notes": self.notes,
            }
        )
