"""IRE's squared gradient of a mini-batch with targets drawn from the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.counts import check_count
from curvkit.estimators.expected import Expected, held_bytes, refuse_too_large
from curvkit.estimators.likelihoods import Draw, draw_cotangent, refuse_without_likelihood, weight_of
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.estimators.recordings.in_training import InTraining
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.training import denominator_of, loss_of, refuse_other_passes
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

GRADIENTS = 3
"""Copies of the parameters: what `Objective.measuring` keeps, the gradient, and a temporary."""
INSTEAD = "Give the data in smaller batches, or leave parameters out by patterns"


@dataclass(frozen=True)
class SquaredGradient(InTraining):
    """IRE's Eq. 6: the squared gradient of a mini-batch with targets drawn from the model, times its number of terms.

        h = sum_b (B_b / B) B_b g_b * g_b,    g_b = d/dtheta (1 / B_b) sum_n -log p(y'_n | x_n),    B = sum_b B_b

    B_b is the number of terms of batch b that are not ignored. Its mean over the draw of the targets is the diagonal of the Fisher matrix
    of those batches (B times that for a loss that is a sum), but one batch is one draw of rank one: the relative error of an entry is about
    sqrt(2), whatever the size. `Fisher` has the same mean and squares examples apart.

    Args:
        num_batches: How many, taken from the first of the data.

    Source: Liu et al. (2023), Sophia's Gauss-Newton-Bartlett estimator; Wang et al. (2024), arXiv 2405.20763, Eq. 6.
    Cost: one gradient of each batch.

    Example:
        >>> import torch.nn.functional as F
        >>> data = [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> SquaredGradient().estimate(Objective(torch.nn.Linear(2, 1), F.mse_loss, data), seed=0).matrix
        'squared_gradient'
    """

    num_batches: int = 1
    matrix: ClassVar[str] = "squared_gradient"

    def __post_init__(self) -> None:
        """Check the option."""
        check_count("SquaredGradient", "num_batches", self.num_batches, default=1)

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute h; see the class.

        Args:
            objective: The function; its loss is a negative log-likelihood. Its batches are the mini-batches.
            seed: Of the targets; None draws one.

        Returns:
            h, with standard errors over batches from two on.

        Raises:
            InvalidArgument: If there are fewer batches than asked for.
            UnsupportedModel: If the loss is no likelihood.
            CurvkitError: If a gradient is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        notes = refuse_without_likelihood(objective.loss, "SquaredGradient")
        if len(objective.batches) < self.num_batches:
            raise InvalidArgument(
                f"SquaredGradient: num_batches={self.num_batches}, but the data has {len(objective.batches)}. Ask for fewer, or give more."
            )
        expected = self.expected(objective)
        refuse_too_large("SquaredGradient", objective, expected, instead=INSTEAD)
        drawn = DiagonalSamples(objective.parameters.names)
        parameters = dict(zip(objective.parameters.names, objective.tensors, strict=True))
        weights = list[float]()
        for index in range(self.num_batches):
            with objective.measuring():
                outputs, targets = objective.outputs(index)
                weights.append(objective.terms_of(outputs.detach(), targets).weight)
                s = draw_cotangent(objective.loss, outputs, targets, Draw(seed, index))
                drawn.add(_squared(outputs, parameters, s, keep=False))
        drawn.scale(self.num_batches / objective.denominator(weights))
        notes += objective.silenced_notes
        cost = Cost(expected.gradients, time.perf_counter() - began, peak_bytes=expected.peak_bytes(objective))
        return DiagonalEstimate(
            drawn.mean, drawn.stderr, self.matrix, repr(self), cost, drawn.size, seed, drawn.sums, notes
        )

    def from_recording(
        self, recording: Recording, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        """Compute h of one batch from a forward pass of training, before its backward pass; `.grad` is not touched.

        Examples need not be told apart: parameters without a rule and layers that couple examples are as good as any.

        Args:
            recording: Of `recording`, whose block was left.
            outputs: Of the model, with their graph.
            targets: Of the batch; they say which terms are ignored. None: all count.
            loss: One of torch's, a negative log-likelihood; None takes cross-entropy for outputs [N, C].
            seed: Of the targets that are drawn; None draws one.

        Returns:
            h, of one draw: its error is not known.

        Raises:
            InvalidArgument: If the loss is missing, the recording is not of one forward pass, or `num_batches` is not 1.
            UnsupportedModel: If there is no likelihood.
            CurvkitError: If a gradient is not finite.

        Cost: a backward pass.
        """
        began, seed = time.perf_counter(), seeds.settle(seed)
        if self.num_batches != 1:
            raise InvalidArgument(
                f"SquaredGradient.from_recording: num_batches={self.num_batches}, and a recording holds one batch. Use "
                "SquaredGradient(num_batches=1), and average over recordings."
            )
        known = loss_of("SquaredGradient", outputs, loss)
        notes = refuse_without_likelihood(known, "SquaredGradient")
        refuse_other_passes("SquaredGradient.from_recording", recording, outputs)
        scale = denominator_of(known, weight_of(known, outputs, targets))
        s = draw_cotangent(known, outputs, targets, Draw(seed, 0))
        drawn = DiagonalSamples(list(recording.parameters))
        drawn.add(_squared(outputs, recording.parameters, s, keep=True))
        drawn.scale(1.0 / scale)
        cost = Cost(1.0, time.perf_counter() - began)
        return DiagonalEstimate(
            drawn.mean, drawn.stderr, self.matrix, repr(self), cost, drawn.size, seed, drawn.sums, notes
        )

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Cost: a forward pass over a few rows.
        """
        objective, share = objective.raised(), self.num_batches / len(objective.batches)
        return Expected(share, GRADIENTS + min(self.num_batches, 2), 2 * held_bytes(objective, second=False))


def _squared(outputs: Tensor, parameters: Mapping[str, Tensor], s: Tensor, *, keep: bool) -> dict[str, Tensor]:
    """Square the gradient of a batch, summed over its terms."""
    found: Any = torch.autograd.grad(
        outputs, list(parameters.values()), s.to(outputs), retain_graph=keep, allow_unused=True
    )
    squares = {  # not in place: two parameters may be given one and the same gradient
        name: torch.zeros_like(p) if g is None else g.square()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    refuse_not_finite("SquaredGradient", squares)
    return squares
