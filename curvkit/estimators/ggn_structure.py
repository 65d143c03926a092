"""The diagonal of the generalised Gauss-Newton matrix by structure: one backward pass for each column of a factor of the output Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.squares.example_squares import Cotangents, ExampleSquares
from curvkit.estimators.squares.pooled import has_one_position
from curvkit.losses import hessian_in_outputs
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators import GGN
from curvkit.operators.independence import rows_are_independent
from curvkit.operators.memory import release

FIXED = 3.0
"""Gradients that the checks and a forward pass cost."""
COLUMN, POSITIONS, TRAFFIC = 0.3, 1.3, 60.0
"""Gradients that a column costs; what is added where an example has several positions in some layer, or a parameter has no rule; and per
parameter of these, whose gradients of single examples are written out, and operation of the forward pass. Measured on one CPU thread."""
FEW = 4
"""Examples on which the cost is predicted."""


@dataclass(frozen=True, eq=False)
class GGNStructure:
    """diag G as a sum of squares over examples n and columns c.

        G_jj = (1 / W) sum_n sum_c (J_n' s_nc)_j^2,    H_out,n = sum_c s_nc s_nc'

    H_out,n is the second derivative of the loss of example n in its outputs, of which cross-entropies, binary cross-entropy and squared
    error have a factor in closed form, with as many columns as an example has outputs.

    Args:
        objective: In the precision that is computed in.
        squares: Of its examples.
    """

    objective: Objective
    squares: ExampleSquares

    @classmethod
    def of(cls, objective: Objective, estimator: str) -> GGNStructure:
        """Check what can be treated.

        Args:
            objective: In the precision that is computed in.
            estimator: For messages.

        Returns:
            What adds up squares.

        Raises:
            UnsupportedModel: If the output Hessian has no known factor, or the examples are not to be told apart.

        Cost: a forward pass on four examples; the rest is looked at as pieces are run.
        """
        count_columns(objective)
        return cls(objective, ExampleSquares.of(objective, estimator))

    def pieces(self, size: int) -> list[Objective]:
        """Cut the data.

        Args:
            size: Examples of a piece, at most.

        Returns:
            Objectives of one batch each.

        Raises:
            UnsupportedModel: If a batch is cut whose rows are not shown to be examples of their own.

        Cost: nothing, or two passes over the data and two products on a few examples.
        """
        largest = max(rows(batch) or 1 for batch in self.objective.batches)
        parts = self.objective.cut(math.ceil(largest / size))[0]
        if len(parts.batches) > len(self.objective.batches):
            self._refuse_coupled(self.objective)
        return [self.objective.with_batches([batch]) for batch in parts.batches]

    def sums(self, piece: Objective) -> tuple[dict[str, Tensor], float]:
        """Go through one piece; in halves, and halves of these, where memory runs out.

        Args:
            piece: Of `pieces`.

        Returns:
            sum_n sum_c (J_n' s_nc)^2, parameter-shaped, and the weight of the piece.

        Raises:
            UnsupportedModel: If the examples are coupled, a parameter cannot be treated, or halves are needed that are not shown to be
                independent.
            CurvkitError: If a gradient is not finite, or memory does not suffice for one example.
            RuntimeError: What the model raises.
            MemoryError: Never: it is one.

        Cost: about `predicted_gradients` of the piece, with the checks of a piece of a new shape.
        """
        try:
            return next(replace(self.squares, objective=piece).batches(_columns(piece)))
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        release(piece.device)  # outside of the handler, whose frames hold the graph
        halves = [piece.with_batches([batch]) for batch in piece.cut(2)[0].batches]
        if len(halves) < 2:
            raise CurvkitError(
                f"{self.squares.estimator}: out of memory with the graph of one example ({said}). Give shorter rows, leave parameters out "
                "by patterns, use float32, or a device with more memory."
            )
        self._refuse_coupled(piece, f" ({said})")
        (total, weight), (other, more) = (self.sums(half) for half in halves)
        for name, value in other.items():
            total[name] += value
        return total, weight + more

    def _refuse_coupled(self, objective: Objective, said: str = "") -> None:
        """Refuse to cut what was not shown to be cut rightly: pieces of one row would not show it, nor rows coupled across pieces."""
        if not rows_are_independent(objective, objective.batches, kind=GGN.kind):
            raise UnsupportedModel(
                f"{self.squares.estimator}: a batch of {max(rows(batch) or 1 for batch in objective.batches):,} rows is to be cut into "
                f"pieces for lack of memory{said}, and its rows are not shown to be examples of their own: something couples them, or "
                "memory does not suffice for two. Use products, give the data in smaller batches, or a device with more memory."
            )


def _columns(objective: Objective) -> Cotangents:
    """Of the factor of the output Hessian."""
    return lambda index, outputs, targets: hessian_in_outputs(
        objective.loss, outputs.detach(), targets
    ).factor_columns()


def count_columns(objective: Objective) -> int:
    """Count the columns of an example: its outputs.

    Args:
        objective: The function.

    Returns:
        Their largest number over the batches whose examples differ in shape; the first batch alone is run.

    Raises:
        UnsupportedModel: If the output Hessian has no known factor, or examples are not to be told apart.
        UnknownObjective: If the loss does not take outputs and targets.

    Cost: a forward pass on four examples.
    """
    few = _few(objective)
    with few.measuring(), torch.no_grad():
        outputs, targets = _outputs(few)
        next(iter(hessian_in_outputs(few.loss, outputs, targets).factor_columns()), None)
    return outputs.numel() // max(len(outputs), 1) if outputs.ndim else 1


def predicted_gradients(objective: Objective) -> float:
    """Predict the cost of the diagonal, without a clock, so that a choice by it repeats.

        3 + C (0.3 + [1.3 + 60 n' / F])

    with C columns per example, n' parameters whose gradients of single examples are written out, since an example has several positions
    or there is no rule, and F floating point operations of the forward pass per example; [...] only if there are such parameters.

    Args:
        objective: The function.

    Returns:
        Gradients of the same data.

    Raises:
        UnsupportedModel: If the output Hessian has no known factor, or examples are not to be told apart.
        UnknownObjective: If the loss does not take outputs and targets.

    Cost: three forward passes on four examples.
    Accuracy: within a factor of two on perceptrons of 10 to 100 outputs, convolutional and residual networks and sequences of 4 to 16
        positions, 0.2 to 0.7 million parameters; where a gradient takes less than some milliseconds what is counted is not what costs.
    """
    few, counter = _few(objective), FlopCounterMode(display=False)
    columns, count = count_columns(objective), rows(few.batches[0]) or 1
    own: Any = dict(zip(few.parameters.names, few.tensors, strict=True))
    with few.measuring():
        with torch.no_grad(), counter:
            _outputs(few)
        with Recording(own, count) as recording:
            _outputs(few)
    light: dict[str, list[bool]] = {}
    for use in recording.uses:
        for form in use.forms:
            light.setdefault(form.name, []).append(has_one_position(form, use.kind.new_zeros(use.shape)))
    written = sum(own[name].numel() for name in own if name in recording.refused or light.get(name, [True]) != [True])
    operations = counter.get_total_flops() / count
    heavy = POSITIONS + (TRAFFIC * written / operations if operations else 0.0) if written else 0.0
    return FIXED + columns * (COLUMN + heavy)


def _few(objective: Objective) -> Objective:
    if not objective.divisible or rows(objective.batches[0]) is None:
        what = (
            "the tensors of a batch differ in dimension 0, so that its examples are not known"
            if objective.divisible
            else f"the loss {objective.loss.name} is not known to be a sum over the rows of a batch"
        )
        raise UnsupportedModel(f"GGN by structure: {what}. Use products, or one of torch's own losses.")
    return objective.with_batches([map_tensors(lambda tensor: tensor[:FEW], objective.batches[0])])


def _outputs(few: Objective) -> tuple[Tensor, Any]:
    """Outputs and targets of a few examples; rows of another kind may not be cut."""
    try:
        return few.outputs(0)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise UnsupportedModel(
            f"GGN by structure: the model does not run on the first {FEW} rows of a batch alone ({said}), so that they are no examples. "
            "Use products, or put examples into dimension 0 of each tensor."
        ) from error
