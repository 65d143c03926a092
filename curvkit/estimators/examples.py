"""Sums of squared gradients of single examples, for cotangents at the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit.estimators.cotangents import pull
from curvkit.estimators.coverage import Coverage, coverage, refuse_not_finite, refuse_uncovered
from curvkit.estimators.mapped_examples import mapped_squares
from curvkit.estimators.pooled_squares import PooledSquares
from curvkit.estimators.recording import Recording
from curvkit.estimators.uses import grouped
from curvkit.losses.batches import rows
from curvkit.objectives import Objective

Cotangents = Callable[[int, Tensor, Any], Iterable[Tensor]]
"""(number of the batch, outputs, targets) -> vectors of the shape of the outputs."""


@dataclass(frozen=True, eq=False)
class ExampleSquares:
    """Q = sum_b sum_n sum_c (J_n' s_nc)^2 over all examples n, entry by entry, s_c given for each batch.

    Gradients of single examples are never written out for layers whose examples have one position; others are, in chunks. Parameters
    without a rule are treated by vmap.

    Args:
        objective: The function.
        estimator: For messages.
    """

    objective: Objective
    coverage: Coverage
    estimator: str

    @classmethod
    def of(cls, objective: Objective, estimator: str) -> ExampleSquares:
        """Check which parameters have rules.

        Args:
            objective: The function, in the precision that is computed in.
            estimator: For messages.

        Returns:
            What adds up squares.

        Raises:
            UnsupportedModel: If the examples cannot be told apart.
        """
        return cls(objective, coverage(objective), estimator)

    def batches(self, cotangents: Cotangents) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Go through the data.

        Args:
            cotangents: s_c of each batch.

        Yields:
            Q and the weight of one batch after the other.

        Raises:
            UnsupportedModel: If a batch takes another path than the first of its shape, or vmap cannot treat the model.
            CurvkitError: If a gradient is not finite.

        Cost: per cotangent about one gradient.
        """
        for index in range(len(self.objective.batches)):
            with self.objective.measuring():
                found, weight = self._batch(index, cotangents)
            refuse_not_finite(self.estimator, found)
            yield found, weight

    def _batch(self, index: int, cotangents: Cotangents) -> tuple[dict[str, Tensor], float]:
        objective, batch = self.objective, self.objective.batches[index]
        own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
        with Recording({n: p for n, p in own.items() if n in self.coverage.ruled}, rows(batch) or 0) as recording:
            outputs, targets = objective.outputs(index)
        refuse_uncovered(self.estimator, recording.refused, self.coverage.ruled)
        weight = objective.terms_of(outputs.detach(), targets).weight
        pooled, others = PooledSquares(), dict[str, Tensor]()
        for s in cotangents(index, outputs, targets):
            for name, uses in grouped(recording.uses, pull(outputs, recording, s)).items():
                pooled.add(name, uses)
            mapped = mapped_squares(objective, batch, s, self.coverage.refused, refuse_as=self.estimator)
            for name, value in mapped.items():
                others[name] = others[name].add_(value) if name in others else value
        found = {**others, **pooled.totals()}
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in own.items()}, weight
