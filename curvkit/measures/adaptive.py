"""Adaptive sharpness: curvature per relative change of the weights, which no rescaling of the function's own symmetry changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from curvkit import seeds
from curvkit.linalg.basis import norm
from curvkit.measures.definitions import definition, doubts
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.scaled_search import largest_between
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator, Scaled
from curvkit.results import Definition, Eigenpairs, plain


@dataclass(frozen=True, eq=False)
class AdaptiveSharpness:
    """The largest eigenvalue of diag|w| H diag|w|; a partial result while `stage` is not "complete"."""

    eigenpairs: Eigenpairs
    """Unit: that of the loss."""
    definition: Definition
    """Of H."""
    loss: float
    """L at the point."""
    gradient_norm: float
    """||diag|w| grad L||, in the unit of the loss."""
    stage: Literal["searching", "complete"]
    seed: int
    seconds: float
    products: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The value with its interval, and what it belongs to."""
        low, high = self.eigenpairs.intervals[0].tolist()
        return f"AdaptiveSharpness({self.value:.6g} in [{low:.6g}, {high:.6g}], {self.stage}; {self.definition})"

    @property
    def value(self) -> float:
        """lambda_max(diag|w| H diag|w|)."""
        return self.eigenpairs.values[0].item()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without vectors.

        Returns:
            Mappings, lists, numbers and strings.
        """
        pairs = self.eigenpairs
        return plain(
            {
                "quantity": "largest eigenvalue of diag|w| H diag|w|",
                "definition": {**plain(self.definition), "text": str(self.definition)},
                "value": self.value,
                "interval": pairs.intervals[0],
                "residual": pairs.residuals[0],
                "residuals_recomputed": pairs.recomputed,
                "residuals_dtype": pairs.residual_dtype,
                "converged": pairs.all_converged,
                "tolerance": pairs.tolerance,
                "upper_bound": pairs.upper_bound,
                "bounds_confidence": pairs.confidence,
                "loss": self.loss,
                "gradient_norm": self.gradient_norm,
                "products": self.products,
                "seconds": self.seconds,
                "seed": self.seed,
                "stage": self.stage,
                "notes": self.notes,
            }
        )


def adaptive_sharpness_steps(
    objective: Objective, settings: SharpnessSettings | None = None, *, seed: int | None = None
) -> Iterator[AdaptiveSharpness]:
    """Measure adaptive sharpness step by step: one partial result after each product.

    Args:
        objective: The function.
        settings: As for sharpness; searched is one eigenvalue, in the precision of the model.
        seed: Of the random part of the start vector; None draws one and records it.

    Yields:
        Partial results, and last the complete one.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began, seed = settings or SharpnessSettings(), time.perf_counter(), seeds.settle(seed)
    preflight = settings.checked(objective)
    operator = settings.operator(objective)
    w = operator.space.join(tensor.detach() for tensor in operator.objective.tensors).to(operator.dtype).abs_()  # [n]
    start: Tensor = operator.gradient * w

    def between(A: CurvatureOperator) -> Scaled:
        return Scaled(A, w.to(A.device, A.dtype))

    result: AdaptiveSharpness | None = None
    for pairs in largest_between(operator, between, settings, measure="adaptive sharpness", start=start, seed=seed):
        result = AdaptiveSharpness(
            eigenpairs=pairs,
            definition=definition(operator),
            loss=operator.loss,
            gradient_norm=norm(start),
            stage="searching",
            seed=seed,
            seconds=time.perf_counter() - began,
            products=pairs.products,
            notes=(*objective.notes, *doubts(preflight), *operator.notes),
        )
        yield result
    if result is not None:
        yield replace(result, stage="complete", seconds=time.perf_counter() - began)


def adaptive_sharpness(
    objective: Objective, *, seed: int | None = None, settings: SharpnessSettings | None = None
) -> AdaptiveSharpness:
    """Measure the curvature of an objective per relative change of its weights.

        adaptive sharpness = lambda_max(diag|w| H diag|w|),   the largest d^2 L for weights w_i (1 + e_i), ||e|| = 1

    A diagonal rescaling of the weights under which the function stays the same, as of the weights before a normalisation layer, or up in
    one ReLU layer and down in the next, changes H and leaves this as it is. Its unit is that of the loss. It says nothing of the
    step size at which training would be unstable; that is `stability`.

    Args:
        objective: The function.
        seed: Of the random part of the start vector; None draws one and records it.
        settings: As for sharpness; searched is one eigenvalue, in the precision of the model.

    Returns:
        The eigenvalue with its recomputed residual.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.

    Cost: as `sharpness`, without its doubt from the data.
    Source: Kwon et al. (2021), ASAM, arXiv 2102.11600, for the elementwise scaling |w|. Differs: the second-order term at the point, not
        the largest loss in a ball; no constant is added to |w|, so that weights of exactly zero stay out.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)    # H = I
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 2.0]]))
        >>> round(adaptive_sharpness(Objective(model, F.mse_loss, [(x, torch.zeros(2, 1))]), seed=0).value, 4)
        9.0
    """
    *_, last = adaptive_sharpness_steps(objective, settings, seed=seed)
    return last
