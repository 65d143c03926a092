"""Sums of squared gradients of single examples, for cotangents at the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.estimators.recordings.cotangents import pull
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.scrutiny import Scrutiny
from curvkit.estimators.recordings.uses import grouped
from curvkit.estimators.squares.mapped import mapped_squares
from curvkit.estimators.squares.pooled import PooledSquares
from curvkit.losses.batches import rows
from curvkit.objectives import Objective

Cotangents = Callable[[int, Tensor, Any], Iterable[Tensor]]
"""(number of the batch, outputs, targets) -> vectors of the shape of the outputs."""
PURPOSE = "cotangents that rules are looked at with"


@dataclass(frozen=True, eq=False)
class ExampleSquares:
    """Q = sum_b sum_n sum_c (J_n' s_nc)^2 over all examples n, entry by entry, s_c given for each batch.

    Gradients of single examples are never written out for layers whose examples have one position; others are, in chunks. Parameters
    without a rule are treated by vmap. What `Scrutiny` looks at it looks at the first time that a batch is run, so that the rules are
    held against numbers on batches of the very shapes that they are used on: with another number of rows a tensor inside of the model
    may be taken to hold the examples elsewhere.

    Args:
        objective: The function; `replace` gives the same for a part of its data, and keeps what was seen of batches of a shape.
        scrutiny: What looks at batches.
        estimator: For messages.
    """

    objective: Objective
    scrutiny: Scrutiny
    estimator: str
    _looked: dict[int, dict[str, str]] = field(default_factory=dict, init=False)
    """What has no rule in batches that were looked at."""

    @classmethod
    def of(cls, objective: Objective, estimator: str) -> ExampleSquares:
        """Check what can be told without a run.

        Args:
            objective: The function, in the precision that is computed in.
            estimator: For messages.

        Returns:
            What adds up squares.

        Raises:
            UnsupportedModel: If the loss is not known to be a sum over rows, or tensors of a batch differ in dimension 0.
        """
        return cls(objective, Scrutiny(objective, estimator), estimator)

    def batches(self, cotangents: Cotangents) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Go through the data.

        Args:
            cotangents: s_c of each batch.

        Yields:
            Q and the weight of one batch after the other.

        Raises:
            UnsupportedModel: If the rows are no examples, a batch takes another path than the first of its shape, or vmap cannot treat
                the model.
            CurvkitError: If a gradient is not finite.

        Cost: per cotangent about one gradient; the first time what `Scrutiny` costs.
        """
        for index in range(len(self.objective.batches)):
            with self.objective.measuring():
                found, weight = self._batch(index, cotangents)
            refuse_not_finite(self.estimator, found)
            yield found, weight

    def _batch(self, index: int, cotangents: Cotangents) -> tuple[dict[str, Tensor], float]:
        objective, batch = self.objective, self.objective.batches[index]
        own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
        with Recording(own, rows(batch) or 0) as recording:
            outputs, targets = objective.outputs(index)
        refused = self._refused(index, recording, outputs)
        recording.uses[:] = [use for use in recording.uses if any(form.name not in refused for form in use.forms)]
        weight = objective.terms_of(outputs.detach(), targets).weight
        pooled, others = PooledSquares(), dict[str, Tensor]()
        for s in cotangents(index, outputs, targets):
            for name, uses in grouped(recording.uses, pull(outputs, recording, s)).items():
                if name not in refused:
                    pooled.add(name, uses)
            mapped = mapped_squares(objective, batch, s, refused, refuse_as=self.estimator)
            for name, value in mapped.items():
                others[name] = others[name].add_(value) if name in others else value
        found = {**others, **pooled.totals()}
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in own.items()}, weight

    def _refused(self, index: int, recording: Recording, outputs: Tensor) -> dict[str, str]:
        """Parameters without a rule that holds in a batch, with the reason."""
        if index not in self._looked:
            draw = seeds.generator(0, PURPOSE, index)
            s = torch.randn(outputs.shape, generator=draw, dtype=torch.float64).to(outputs)
            self._looked[index] = self.scrutiny.look(self.objective.batches[index], recording, outputs, s)
        return self._looked[index]
