"""The diagonal of the Hessian with the generalised Gauss-Newton matrix as control variate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.estimators.exact_diagonal import Exact
from curvkit.estimators.example_hutchinson import ExampleHutchinson
from curvkit.estimators.expected import Expected, Foreseeing
from curvkit.estimators.likelihoods import refuse_without_likelihood
from curvkit.estimators.protocol import DiagonalEstimator
from curvkit.losses.batches import inputs_and_targets
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.results.trace_estimate import TraceParts

CONTROLS = ("ggn", "fisher")
"""Matrices that may be the control; the Fisher is the GGN for the losses that are likelihoods."""
BESIDE = 3
"""Copies of the parameters beside what both estimators hold: G, the sum, and a temporary."""
ADDS_UP = 1e-4
"""Sums of the probabilities of all classes may differ from one by so much; rounding in float32 makes 1e-7."""


@runtime_checkable
class ResidualEstimator(Protocol):
    """An estimator that can estimate the diagonal of H - G, too."""

    def estimate_residual(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal of the Hessian without the generalised Gauss-Newton matrix.

        Args:
            objective: The function; its loss takes outputs and targets.
            seed: Of every draw; None draws one.

        Returns:
            The diagonal, with its doubt and its cost.
        """
        ...


@dataclass(frozen=True)
class Controlled:
    """The diagonal of the Hessian, as that of the GGN and an estimate of what is left.

        d = diag G + estimate of diag(H - G),    H - G = (1 / W) sum_n sum_k u_nk d^2 z_nk / dtheta^2

    with u = dL/dz held fixed. G is computed without sampling, so that only the second derivative of the model is sampled: on a ReLU
    network its blocks on the diagonal, one for each parameter tensor, are zero, and near a fit u is small. Standard errors are those of
    the residual alone; where `by` samples, too, both are added in squares, as their draws are independent.

    Args:
        inner: Estimates the residual: `ExampleHutchinson`, or another one that has `estimate_residual`, as `Hutchinson`, which needs no
            examples.
        by: Gives diag G: `Exact("ggn")`, by default at no more than 1000 gradients, or `Fisher`, which is unbiased for it.

    Accuracy: unbiased; the variance is that of `inner` on H - G.
    Source: ours; control variates in general are in Owen (2013), chapter 8.
    Cost: that of both.

    Example:
        >>> import torch.nn.functional as F
        >>> x = torch.eye(2)
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # linear: H = G
        >>> found = Controlled().estimate(objective, seed=0)
        >>> found.values["weight"].tolist(), found.stderr["weight"].tolist()
        ([[1.0, 1.0]], [[0.0, 0.0]])
    """

    inner: ResidualEstimator = field(default_factory=lambda: ExampleHutchinson(num_probes=10))
    by: DiagonalEstimator = field(default_factory=lambda: Exact("ggn", max_gradients=1_000.0))
    matrix: ClassVar[str] = "hessian"

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.inner, ResidualEstimator):
            raise InvalidArgument(
                f"Controlled: inner={self.inner!r} cannot estimate what the GGN leaves of the Hessian: it has no estimate_residual. Use "
                "Hutchinson(num_probes=...), ExampleHutchinson(num_probes=...), XDiag or Deflated."
            )
        matrix = getattr(self.by, "matrix", None)
        if not isinstance(self.by, DiagonalEstimator) or matrix not in CONTROLS:
            raise InvalidArgument(
                f"Controlled: by={self.by!r} estimates {matrix or 'no diagonal'}; the control must be the diagonal of the GGN. Use "
                "Exact('ggn'), or Fisher(num_samples=...) where the loss is a likelihood."
            )

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function; its loss takes outputs and targets.
            seed: Of the draws of both; None draws one.

        Returns:
            The diagonal, with the errors of what was sampled.

        Raises:
            UnsupportedModel: If one of both does not serve the objective.
            UnknownObjective: If the loss does not take outputs and targets.
            CurvkitError: If a product is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        self._refuse_another_matrix(objective)
        try:
            G = self.by.estimate(objective, seed=seed)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"Controlled: no control. {error} Here that is an option of `by`, by.max_gradients; by=Fisher(num_samples=10) is a control "
                "that costs little."
            ) from error
        R = self.inner.estimate_residual(objective, seed=seed)
        values = {name: G.values[name] + value for name, value in R.values.items()}
        peaks = [cost.peak_bytes for cost in (G.cost, R.cost) if cost.peak_bytes is not None]
        cost = Cost(
            G.cost.gradients + R.cost.gradients,
            time.perf_counter() - began,
            G.cost.products + R.cost.products,
            max(peaks) + BESIDE * _size(G.values) if len(peaks) == 2 else None,
        )
        notes = (*(f"GGN: {note}" for note in G.notes), *(f"H - G: {note}" for note in R.notes))
        samples = min((part.samples for part in (R, G) if part.stderr is not None), default=0)
        return DiagonalEstimate(
            values, _joined(R.stderr, G.stderr), "hessian", repr(self), cost, samples, seed, _sums(R, G), notes
        )

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both.

        Raises:
            InvalidArgument: If one of both estimators does not say its cost.
            UnsupportedModel: If one of both does not serve the objective.
        """
        parts = list[Expected]()
        for part in (self.by, self.inner):
            if not isinstance(part, Foreseeing):
                raise InvalidArgument(
                    f"Controlled: {part!r} does not say its cost: it has no expected(objective). Use one of curvkit's own, or write it."
                )
            parts.append(part.expected(objective))
        G, R = parts
        return Expected(G.gradients + R.gradients, max(G.copies, R.copies) + BESIDE, max(G.held_bytes, R.held_bytes))

    def _refuse_another_matrix(self, objective: Objective) -> None:
        """The Fisher is the GGN only for a likelihood, with probabilities of classes that add up to one."""
        if getattr(self.by, "matrix", None) != "fisher":
            return
        refuse_without_likelihood(objective.loss, "Controlled")
        if getattr(objective.loss, "function", None) is not F.cross_entropy:
            return
        for batch in objective.batches:
            targets = inputs_and_targets(batch)[2]
            if targets.is_floating_point():
                worst = (targets.sum(min(targets.ndim - 1, 1)) - 1.0).abs().max().item()
                if not worst <= ADDS_UP:
                    raise UnsupportedModel(
                        f"Controlled: the targets are probabilities whose sums differ from 1 by up to {worst:.2g}, so that the Fisher "
                        "is not the GGN. Normalise them, or use by=Exact('ggn')."
                    )


def _joined(R: Mapping[str, Tensor] | None, G: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Errors in squares; those of one where the other has none."""
    if R is None or G is None:
        known = G if R is None else R
        return None if known is None else dict(known)
    return {name: torch.hypot(value, G[name]) for name, value in R.items()}


def _sums(R: DiagonalEstimate, G: DiagonalEstimate) -> TraceParts | None:
    """Sums over each parameter; None where both are sampled, and not equally often."""
    if R.sums is None:
        return None
    if G.stderr is None:
        known = torch.stack([value.double().sum().cpu() for value in G.values.values()])
        return replace(R.sums, known=R.sums.known + known)
    if G.sums is None or len(G.sums.samples) != len(R.sums.samples):
        return None
    return TraceParts(R.sums.lengths, R.sums.known + G.sums.known, R.sums.samples + G.sums.samples)


def _size(values: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values.values())
