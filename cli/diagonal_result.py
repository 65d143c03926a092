"""A diagonal with what must stand beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .diagonal_rows import Rows
from .failures import harmless

if TYPE_CHECKING:
    from curvkit.operators.preflight import Preflight
    from curvkit.results import Definition
    from curvkit.results.diagonal_estimate import DiagonalEstimate

MATRICES = {
    "hessian": ("Hessian", "second derivatives of the loss, d2L / d theta_j^2"),
    "hessian_top": (
        "Hessian's top eigenspace",
        "sum of lambda_i v_i * v_i over the eigenpairs found; what the other eigenvectors add is missing",
    ),
    "ggn": ("GGN", "the generalised Gauss-Newton matrix, the Hessian without the curvature of the model"),
    "fisher": ("Fisher matrix", "mean squares of the examples' gradients, with targets drawn from the model"),
    "empirical_fisher": (
        "empirical Fisher matrix",
        "mean squares of the examples' gradients, with the targets of the data; it is no estimate of the Fisher matrix",
    ),
    "squared_gradient": (
        "squared gradient",
        "of mini-batches, with targets drawn from the model: its mean is the Fisher's diagonal, one draw is far from it",
    ),
    "second_moment": (
        "second moment",
        "Adam's running mean of squared gradients of the training loss; its optimizer holds it, and it is no curvature of this loss",
    ),
}
"""Name in an estimate -> what people call it, and what its diagonal is."""


@dataclass(frozen=True)
class Diagonal:
    """What is shown."""

    estimate: DiagonalEstimate
    rows: Rows
    definition: Definition | None
    """None: neither loss nor data had a part in it."""
    unit: str | None
    loss: float | None
    preflight: Preflight | None
    checked: bool
    """Whether second derivatives were to be checked."""
    notes: tuple[str, ...]

    @property
    def matrix(self) -> str:
        """What people call the matrix."""
        return MATRICES.get(self.estimate.matrix, (harmless(self.estimate.matrix), ""))[0]

    @property
    def quantity(self) -> str:
        """What it is: a diagonal, or what is one by itself."""
        return self.matrix if self.definition is None else f"diagonal of the {self.matrix}"

    @property
    def text(self) -> str:
        """What exactly it is the diagonal of, in one sentence."""
        if self.definition is None:
            return f"{self.matrix} of {self.rows.total.parameters:,} parameters; the loss and the data given here have no part in it"
        return str(self.definition).replace(self.definition.matrix.capitalize(), self.matrix, 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        from curvkit.results import plain

        found, total = self.estimate, self.rows.total
        return plain(
            {
                "quantity": self.quantity,
                "matrix": found.matrix,
                "estimator": found.estimator,
                "definition": None if self.definition is None else {**plain(self.definition), "text": self.text},
                "unit": self.unit,
                "trace": {"value": found.trace, "stderr": total.stderr},
                "largest": total.largest,
                "negative": total.negative,
                **self.rows.to_dict(),
                "samples": found.samples,
                "sampled": found.stderr is not None,
                "loss": self.loss,
                "cost": found.cost,
                "preflight": None if self.preflight is None else self.preflight.to_dict(),
                "notes": self.notes,
            }
        )
