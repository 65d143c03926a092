"""The diagonal of the empirical Fisher matrix."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.fisher import CHECKS, INSTEAD, PER_SAMPLE
from curvkit.estimators.likelihoods import weight_of
from curvkit.estimators.recordings.in_training import InTraining
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.training import denominator_of, loss_of, refuse_unfit
from curvkit.estimators.squares.expectation import expected_squares
from curvkit.estimators.squares.watched import Run, WatchedSquares, recorded_mean
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate


@dataclass(frozen=True)
class EmpiricalFisher(InTraining):
    """The diagonal of the empirical Fisher matrix: squared gradients of single examples with the true targets.

        E_jj = (1 / W) sum_n (d loss_n / d theta_j)^2

    It is not the Fisher matrix and no estimate of it: at a minimum that fits the data it vanishes, and where the model is wrong it is
    larger.
    The gradients of the terms of one example (the tokens of a sequence) are added before they are squared. The loss is that of the
    objective, with its class weights and label smoothing; W is the sum of the class weights then.

    Source: Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation", for the difference.
    Cost: as one sample of `Fisher`; nothing is sampled.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, 2.0]]).double()
        >>> found = EmpiricalFisher().estimate(Objective(model, F.mse_loss, [(x, model(x).detach() - 1.0)]))   # (2 x)^2
        >>> found.values["weight"].round(decimals=6).tolist(), found.stderr
        ([[4.0, 16.0]], None)
    """

    matrix: ClassVar[str] = "empirical_fisher"

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute the diagonal; see the class.

        Args:
            objective: The function; its loss is a sum over examples.
            seed: Not used; nothing is drawn.

        Returns:
            The diagonal.

        Raises:
            UnsupportedModel: If examples are coupled, a parameter cannot be treated, or memory does not suffice.
            CurvkitError: If a gradient is not finite.
        """
        began, objective = time.perf_counter(), objective.raised()
        squares, expected = WatchedSquares(objective, "EmpiricalFisher"), self.expected(objective)
        refuse_too_large("EmpiricalFisher", objective, expected, instead=INSTEAD)

        def cotangent(run: Run, outputs: Tensor, targets: Any) -> Tensor:
            z = outputs.detach().requires_grad_()
            return torch.autograd.grad(objective.terms_of(z, targets).total, z)[0]

        found = squares.mean(cotangent)
        cost = Cost(PER_SAMPLE + CHECKS, time.perf_counter() - began, peak_bytes=expected.peak_bytes(objective))
        return DiagonalEstimate(
            found, None, self.matrix, repr(self), cost, notes=(*squares.notes, *objective.silenced_notes)
        )

    def from_recording(
        self, recording: Recording, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        """Compute the diagonal from a forward pass of training, before its backward pass; `.grad` is not touched.

        Args:
            recording: Of `recording`, whose block was left.
            outputs: Of the model, with their graph.
            targets: Of the batch.
            loss: One of torch's; None takes cross-entropy for outputs [N, C].
            seed: Not used; nothing is drawn.

        Returns:
            The diagonal for this batch, dropout as it fell.

        Raises:
            InvalidArgument: If targets or loss are missing, or the recording is not of one forward pass.
            UnsupportedModel: If a parameter has no rule, or examples are coupled.
            CurvkitError: If a gradient is not finite.

        Cost: a backward pass with squares, and one without for the checks.
        """
        began = time.perf_counter()
        if targets is None:
            raise InvalidArgument(
                "EmpiricalFisher.from_recording: targets=None, and the empirical Fisher matrix belongs to the true targets. Pass those of "
                "the batch, or use Fisher, which draws them from the model."
            )
        known = loss_of("EmpiricalFisher", outputs, loss)
        refuse_unfit("EmpiricalFisher", recording, outputs)
        z = outputs.detach().requires_grad_()
        (s,) = torch.autograd.grad(known.terms_of(z, targets).total, z)
        scale = denominator_of(known, weight_of(known, outputs, targets))
        found = recorded_mean("EmpiricalFisher", recording, outputs, s, scale)
        cost = Cost(PER_SAMPLE + CHECKS, time.perf_counter() - began)
        return DiagonalEstimate(found, None, self.matrix, repr(self), cost)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Cost: a forward pass over a few rows.
        """
        return expected_squares(objective, gradients=CHECKS + PER_SAMPLE, samples=0)
