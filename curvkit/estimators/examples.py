"""Sums of squared gradients of single examples, for cotangents at the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from curvkit.errors import UnsupportedModel
from curvkit.estimators.coverage import Coverage, coverage, refuse_not_finite, refuse_uncovered
from curvkit.estimators.forms import CHUNK_BYTES
from curvkit.estimators.recording import Recording, grouped, summed_squares
from curvkit.losses.batches import inputs_and_targets, rows
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
            UnsupportedModel: If a parameter has no rule and vmap cannot treat the model.
            CurvkitError: If a gradient is not finite.

        Cost: per cotangent about one gradient.
        """
        for index in range(len(self.objective.batches)):
            with self.objective.measuring():
                found, weight = self._batch(index, cotangents)
            refuse_not_finite(self.estimator, found)
            yield found, weight

    def _batch(self, index: int, cotangents: Cotangents) -> tuple[dict[str, Tensor], float]:
        objective, space = self.objective, self.objective.parameters
        parameters: Any = {
            n: p for n, p in zip(space.names, objective.tensors, strict=True) if n in self.coverage.ruled
        }
        with Recording(parameters, rows(objective.batches[index]) or 0) as recording:
            outputs, targets = objective.outputs(index)
        refuse_uncovered(self.estimator, recording.refused, self.coverage.ruled)
        weight = objective.terms_of(outputs.detach(), targets).weight
        total = {name: torch.zeros_like(p) for name, p in zip(space.names, objective.tensors, strict=True)}
        calls = [use.output for use in recording.uses]
        for s in cotangents(index, outputs, targets):
            pulled = torch.autograd.grad(outputs, calls, s, retain_graph=True, allow_unused=True) if calls else ()
            for name, uses in grouped(recording.uses, pulled).items():
                total[name] += summed_squares(uses)
            for name, value in self._others(index, s).items():
                total[name] += value
        return total, weight

    def _others(self, index: int, s: Tensor) -> dict[str, Tensor]:
        """The parameters without a rule, example by example under vmap."""
        names = [name for name in self.coverage.refused if name in self.objective.parameters.names]
        if not names:
            return {}
        model = self.objective.model
        theta = {name: p.detach() for name, p in model.named_parameters()}
        kept = {name: theta[name] for name in names}
        inputs, named, _ = inputs_and_targets(self.objective.batches[index])

        def squares(inputs: tuple[Tensor, ...], named: dict[str, Tensor], s: Tensor) -> dict[str, Tensor]:
            def outputs(chosen: dict[str, Tensor]) -> Tensor:
                given = {key: value[None] for key, value in named.items()}
                return functional_call(model, {**theta, **chosen}, tuple(x[None] for x in inputs), given)[0]

            made: Any = vjp(outputs, kept)
            return {name: g.square() for name, g in made[1](s)[0].items()}

        size = sum(value.numel() * value.element_size() for value in kept.values())
        step, total = max(1, CHUNK_BYTES // max(size, 1)), {name: torch.zeros_like(kept[name]) for name in names}
        for begin in range(0, len(s), step):
            piece = slice(begin, begin + step)
            try:
                part = vmap(squares)(tuple(x[piece] for x in inputs), {k: v[piece] for k, v in named.items()}, s[piece])
            except Exception as error:  # whatever the model does under vmap
                raise UnsupportedModel(self._without_a_way(names[0], error)) from error
            for name, value in part.items():
                total[name] += value.sum(0)
        return total

    def _without_a_way(self, name: str, error: Exception) -> str:
        reason = str(error).strip().partition("\n")[0][:200]
        return (
            f"{self.estimator}: the parameter {name} has no rule ({self.coverage.refused[name]}), and torch.func.vmap cannot treat the "
            f"model one example at a time ({type(error).__name__}: {reason}). Leave the parameter out by patterns, or use Hutchinson."
        )
