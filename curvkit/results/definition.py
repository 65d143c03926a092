"""What exactly was measured: no number without its matrix, its loss, its mean, its data and its precision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """The matrix that a number belongs to."""

    matrix: str
    """"hessian": the name of the matrix, not of the method."""
    loss: str
    reduction: str
    """"mean" over all terms of all data, "sum" of them, or "as returned" by the loss for a single batch."""
    terms: int | None
    """Loss terms that are not masked; None if the loss does not say."""
    examples: int | None
    """Rows of the batches; None if they have no common first dimension."""
    batches: int
    parameters: int
    """Number of coordinates, n; tied parameters count once."""
    mode: str
    dtype: str
    attention: str

    def __str__(self) -> str:
        """One sentence for people."""
        terms = f" over {self.terms:,} terms" if self.terms is not None else ""
        examples = f"{self.examples:,} examples in " if self.examples is not None else ""
        return (
            f"{self.matrix.capitalize()} of {self.loss}, {self.reduction}{terms} · "
            f"{examples}{self.batches} batch{'es' if self.batches != 1 else ''} · "
            f"{self.parameters:,} parameters · {self.mode} mode · {self.dtype} · {self.attention} attention"
        )
