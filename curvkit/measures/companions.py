"""What is measured beside the eigenvalues of a checkpoint: scale invariance, adaptive sharpness, and the limit of its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned
from curvkit.measures.adaptive import adaptive_sharpness_steps
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.invariances import scale_invariance
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.stabilities import stability_steps
from curvkit.objectives import Objective
from curvkit.results.journal import NOTHING_KEPT, Journal


@dataclass(frozen=True, eq=False)
class Companions:
    """Which numbers are wanted beside the eigenvalues, and from which state of an optimizer.

    Args:
        state: Of the optimizer, or why there is none that could be used; None: no limit is wanted.
        lr: What if: all learning rates multiplied so that the largest is this; None takes those of the state.
        adaptive: Whether adaptive sharpness is measured; None: where a tensor is scale-invariant, or stands before BatchNorm, so that the
            eigenvalues are a matter of its length.
    """

    state: OptimizerState | Unassigned | None = None
    lr: float | None = None
    adaptive: bool | None = None

    def steps(
        self,
        objective: Objective,
        result: Sharpness,
        settings: SharpnessSettings | None = None,
        *,
        journal: Journal = NOTHING_KEPT,
    ) -> Iterator[Sharpness]:
        """Measure them step by step, after the eigenvalues.

        Args:
            objective: The function.
            result: A complete sharpness of it.
            settings: As it was measured with.
            journal: Where products are kept, and recalled from if the run is gone on with.

        Yields:
            The result with more beside it after each product, and last the complete one.

        Raises:
            InvalidArgument: If `lr` is not positive.
            UnsupportedModel: If the objective has no curvature that could be measured.
            UnknownObjective: If loss and data do not fit.
            CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.

        Cost: a few forward passes per scale-invariant tensor; a search each for adaptive sharpness and, with Adam and its like, the limit.
        """
        before, began = result, journal.clock()
        settings = replace(settings or SharpnessSettings(), preflight=False)  # the eigenvalues had it
        result = replace(before, scale=scale_invariance(objective, seed=before.seed), stage="adaptive")
        if self._adaptive(result):
            left = _in_time(settings, before.seconds + journal.clock() - began)
            for found in adaptive_sharpness_steps(objective, left, seed=before.seed, journal=journal):
                result = replace(result, adaptive=found)
                yield _counted(result, before, journal.clock() - began)
        if self.state is not None:
            left = _in_time(settings, before.seconds + journal.clock() - began)
            steps = stability_steps(
                objective, self.state, left, seed=before.seed, lr=self.lr, known=before, journal=journal
            )
            for found in steps:
                result = replace(result, stability=found, stage="stability")
                yield _counted(result, before, journal.clock() - began)
        yield replace(_counted(result, before, journal.clock() - began), stage="complete")

    def _adaptive(self, result: Sharpness) -> bool:
        scale = result.scale
        return (
            self.adaptive if self.adaptive is not None else scale is not None and bool(scale.invariant or scale.notes)
        )


def _in_time(settings: SharpnessSettings, spent: float) -> SharpnessSettings:
    """With what is left of the time; where nothing is, a search makes one step and says that it has not converged."""
    most = settings.search.max_seconds
    return (
        settings
        if most is None
        else replace(settings, search=replace(settings.search, max_seconds=max(most - spent, 1e-9)))
    )


def _counted(result: Sharpness, before: Sharpness, seconds: float) -> Sharpness:
    """With the products and the time of all that was measured so far."""
    more = sum(found.products for found in (result.adaptive, result.stability) if found is not None)
    return replace(result, products=before.products + more, seconds=before.seconds + seconds)
