"""The diagonal of the Fisher matrix."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from curvkit import seeds
from curvkit.estimators.counts import check_count
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.likelihoods import Draw, draw_cotangent, refuse_without_likelihood, weight_of
from curvkit.estimators.recordings.in_training import InTraining
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.training import denominator_of, loss_of, refuse_unfit
from curvkit.estimators.squares.expectation import expected_squares
from curvkit.estimators.squares.watched import Run, WatchedSquares, recorded_mean
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

PER_SAMPLE, CHECKS = 1.2, 0.4
"""Gradients of the data that one sample and the checks are counted as; no clock is behind it."""
INSTEAD = "Give the data in smaller batches, or use SquaredGradient, which holds no gradients of single examples"


@dataclass(frozen=True)
class Fisher(InTraining):
    """The diagonal of the Fisher matrix, by targets that are drawn from the model.

        F_jj = (1 / W) sum_n E_(y' ~ p(. | x_n)) (d/dtheta_j -log p(y' | x_n))^2

    with W the number of terms, as in the loss. n runs over examples, rows of dimension 0; the terms of an example (the tokens of a
    sequence) are drawn independently, so that their products vanish in the mean. Unbiased for every number of samples. For logits with
    cross-entropy, binary cross-entropy or squared error F is the GGN of the loss (without label smoothing).

    Args:
        num_samples: Draws of all targets; the standard error is known from two on.

    Source: Martens (2020), "New insights and perspectives on the natural gradient method", for the Fisher and the GGN.
    Cost: per sample a forward pass, and a backward pass with squares in place of the parameters' gradients; some passes for the checks
        before. By count, not by a clock; where layers have several positions, gradients of examples are written out, 64 MiB at a time.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> objective = Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))])
        >>> found = Fisher(num_samples=400).estimate(objective, seed=0)   # 2 x x'
        >>> bool(((found.values["weight"] - torch.tensor([[2.0, 8.0]])).abs() < 5 * found.stderr["weight"]).all())
        True
    """

    num_samples: int = 1
    matrix: ClassVar[str] = "fisher"

    def __post_init__(self) -> None:
        """Check the option."""
        check_count("Fisher", "num_samples", self.num_samples, default=1)

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function; its loss is a negative log-likelihood.
            seed: Of the targets; None draws one.

        Returns:
            The diagonal, with standard errors from two samples on.

        Raises:
            UnsupportedModel: If the loss is no likelihood, examples are coupled, a parameter cannot be treated, or memory does not suffice.
            CurvkitError: If a gradient is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        notes = refuse_without_likelihood(objective.loss, "Fisher")
        squares, count = WatchedSquares(objective, "Fisher"), len(objective.batches)
        expected = self.expected(objective)
        refuse_too_large("Fisher", objective, expected, instead=INSTEAD)
        drawn = DiagonalSamples(objective.parameters.names)
        for sample in range(self.num_samples):

            def cotangent(run: Run, outputs: Tensor, targets: Any, first: int = sample * count) -> Tensor:
                draw = Draw(seed, first + run.index, run.begin, run.size)
                return draw_cotangent(objective.loss, outputs, targets, draw)

            drawn.add(squares.mean(cotangent))
        return self._made(
            drawn, seed, began, (*notes, *squares.notes, *objective.silenced_notes), expected.peak_bytes(objective)
        )

    def from_recording(
        self, recording: Recording, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        """Estimate the diagonal from a forward pass of training, before its backward pass; `.grad` is not touched.

        Args:
            recording: Of `recording`, whose block was left.
            outputs: Of the model, with their graph.
            targets: Of the batch; they say which terms are ignored. None: all count.
            loss: One of torch's, a negative log-likelihood; None takes cross-entropy for outputs [N, C].
            seed: Of the targets that are drawn; None draws one.

        Returns:
            The diagonal for this batch, dropout as it fell.

        Raises:
            InvalidArgument: If the loss is missing, or the recording is not of one forward pass.
            UnsupportedModel: If there is no likelihood, a parameter has no rule, or examples are coupled.
            CurvkitError: If a gradient is not finite.

        Cost: per sample a backward pass with squares, and one without for the checks.

        Example:
            >>> import torch
            >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
            >>> with Fisher().recording(model) as recording:
            ...     outputs = model(x)
            >>> found = Fisher().from_recording(recording, outputs, seed=0)
            >>> found.matrix, model.weight.grad is None
            ('fisher', True)
        """
        began, seed = time.perf_counter(), seeds.settle(seed)
        known = loss_of("Fisher", outputs, loss)
        notes = refuse_without_likelihood(known, "Fisher")
        refuse_unfit("Fisher", recording, outputs)
        scale = denominator_of(known, weight_of(known, outputs, targets))
        drawn = DiagonalSamples(list(recording.parameters))
        for sample in range(self.num_samples):
            s = draw_cotangent(known, outputs, targets, Draw(seed, sample))
            drawn.add(recorded_mean("Fisher", recording, outputs, s, scale))
        return self._made(drawn, seed, began, notes)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Cost: a forward pass over a few rows.
        """
        return expected_squares(objective, gradients=CHECKS + PER_SAMPLE * self.num_samples, samples=self.num_samples)

    def _made(
        self, drawn: DiagonalSamples, seed: int, began: float, notes: tuple[str, ...], peak: int | None = None
    ) -> DiagonalEstimate:
        cost = Cost(CHECKS + PER_SAMPLE * self.num_samples, time.perf_counter() - began, peak_bytes=peak)
        return DiagonalEstimate(
            drawn.mean, drawn.stderr, self.matrix, repr(self), cost, drawn.size, seed, drawn.sums, notes
        )
