"""The same number at two points, on the same data and with the same probes: its difference, and the standard error of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvkit.errors import CurvkitError
from curvkit.linalg import student
from curvkit.losses import Batch
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.operators.independence import rows_are_independent

PARTS = 32
"""Data whose rows are examples of their own are divided into so many parts at least, or into its batches if these are more."""


@dataclass(frozen=True)
class Gap:
    """A number at one point less the same number at the reference, with what is known of the error."""

    value: float
    low: float | None = None
    """Ends of the interval of the difference; None: unknown."""
    high: float | None = None
    stderr: float | None = None
    """Standard error of `value` from pairs, one for each probe or part of the data; 0 if exact, None if there are none."""
    unpaired: float | None = None
    """What the standard error would be for independent draws at the two points."""
    pairs: int = 0

    @property
    def sign(self) -> int:
        """-1 where the whole interval lies below zero, 1 where it lies above, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0.0) - int(self.high < 0.0)

    @property
    def half_width(self) -> float | None:
        """The larger distance from `value` to an end of the interval."""
        if self.low is None or self.high is None:
            return None
        return max(self.value - self.low, self.high - self.value)


@dataclass(frozen=True)
class Contributions:
    """What each part b of the data adds to a number.

        T = sum_b t_b / D,    D = sum_b w_b, or 1 for a loss that is a sum

    Example:
        >>> Contributions((1.0, 4.0), (1.0, 2.0), 3.0).value
        1.6666666666666667
    """

    totals: tuple[float, ...]
    """t_b."""
    weights: tuple[float, ...]
    """w_b: loss terms or their class weights; of a loss that is a sum, examples."""
    divisor: float
    """D."""

    @property
    def value(self) -> float:
        """T."""
        return math.fsum(self.totals) / self.divisor

    @property
    def parts(self) -> int:
        """Parts of the data that have a term."""
        return sum(weight > 0.0 for weight in self.weights)

    @property
    def influences(self) -> tuple[float, ...]:
        """How far T moves when a part is drawn anew, (t_b - w_b sum t / sum w) / D; they add up to zero."""
        mean = math.fsum(self.totals) / math.fsum(self.weights)
        return tuple((t - w * mean) / self.divisor for t, w in zip(self.totals, self.weights, strict=True))

    @property
    def stderr(self) -> float | None:
        """Standard error of T for data of the same kind, parts taken as independent; None for a single part."""
        return _stderr(self.influences, self.parts)

    def gap(self, reference: Contributions) -> Gap:
        """Subtract the number at the reference, part by part.

            s = sqrt(c / (c - 1) sum_b (e_b - e_b')^2),    e_b the influences here and e_b' there, c parts

        Args:
            reference: The same quantity at the other point, on the same parts.

        Returns:
            T - T', with Student's 95 % interval; without one for a single part.

        Accuracy: exact for means of equal weights; a linearisation where the weights differ.

        Example:
            >>> a, b = Contributions((1.0, 5.0), (1.0, 1.0), 2.0), Contributions((2.0, 6.0), (1.0, 1.0), 2.0)
            >>> gap = b.gap(a)   # both move together
            >>> gap.value, gap.stderr, gap.unpaired
            (1.0, 0.0, 2.8284271247461903)
        """
        value = self.value - reference.value
        if len(self.totals) != len(reference.totals):
            return Gap(value)
        moved = [here - there for here, there in zip(self.influences, reference.influences, strict=True)]
        stderr, own, other = _stderr(moved, self.parts), self.stderr, reference.stderr
        if stderr is None or own is None or other is None:
            return Gap(value)
        half = student.quantile(self.parts - 1) * stderr
        return Gap(value, value - half, value + half, stderr, math.hypot(own, other), self.parts)


def divided(objectives: Sequence[Objective]) -> tuple[Batch, ...]:
    """Divide data that several objectives share, finely enough for a standard error.

    Args:
        objectives: On the same batches.

    Returns:
        The batches, cut into at least 32 parts in all where no model couples rows and there are as many.

    Cost: two forward passes for each objective, and a few products with four rows; nothing where there are batches enough.
    """
    first = objectives[0]
    cuts = math.ceil(PARTS / len(first.batches))
    if cuts == 1 or not all(rows_are_independent(it, it.batches) for it in objectives):
        return first.batches
    return first.cut(cuts)[0].batches


def losses(objective: Objective) -> Contributions:
    """Evaluate the loss batch by batch.

    Args:
        objective: In the precision that is computed in.

    Returns:
        What each batch contributes.

    Raises:
        CurvkitError: If the loss is not finite.
        UnknownObjective: If no batch has a term.

    Cost: one forward pass over the data.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_(True)
        >>> data = [(torch.zeros(2, 1), torch.ones(2, 1)), (torch.zeros(3, 1), torch.zeros(3, 1))]
        >>> losses(Objective(model, F.mse_loss, data)).totals
        (2.0, 0.0)
    """
    with objective.measuring():
        numbers = [objective.numbers(index) for index in range(len(objective.batches))]
    totals, weights = [total for total, _ in numbers], [weight for _, weight in numbers]
    for index, total in enumerate(totals):
        if not math.isfinite(total):
            raise CurvkitError(
                f"compare: the loss is {total} on part {index} of the data. Curvature is that of a finite loss: check weights and data for "
                "NaN, or compute in float64."
            )
    divisor = objective.denominator(weights)
    if objective.loss.reduction == "sum":
        weights = [float(rows(batch) or 1) for batch in objective.batches]
    return Contributions(tuple(totals), tuple(weights), divisor)


def joined(quotients: Sequence[float], kept: Sequence[float], like: Contributions) -> Contributions:
    """Turn quotients v'H_b v of the parts into what they contribute to v'Hv.

    Args:
        quotients: Of the parts that have a term, as of `batch_quotients`.
        kept: With which they are weighted.
        like: Contributions of the loss of the same parts.

    Returns:
        The contributions; nothing for a part without a term.
    """
    left = iter([quotient * weight for quotient, weight in zip(quotients, kept, strict=True)])
    all_kept = len(quotients) == len(like.weights)
    totals = tuple(next(left) if all_kept or weight > 0.0 else 0.0 for weight in like.weights)
    return Contributions(totals, like.weights, like.divisor)


def _stderr(influences: Sequence[float], parts: int) -> float | None:
    if parts < 2:
        return None
    return math.sqrt(parts / (parts - 1) * math.fsum(e * e for e in influences))
