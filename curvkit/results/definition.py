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
    attention: str | None
    """Kernels of attention; None where none is known to be used."""

    def __str__(self) -> str:
        """One sentence for people."""
        terms = f" over {_counted(self.terms, 'term')}" if self.terms is not None else ""
        examples = f"{_counted(self.examples, 'example')} in " if self.examples is not None else ""
        attention = f" · {self.attention} attention" if self.attention else ""
        return (
            f"{self.matrix.capitalize()} of {self.loss}, {self.reduction}{terms} · "
            f"{examples}{_counted(self.batches, 'batch', 'batches')} · "
            f"{_counted(self.parameters, 'parameter')} · {self.mode} mode · {self.dtype}{attention}"
        )


def _counted(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
