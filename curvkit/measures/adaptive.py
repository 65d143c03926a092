"""Adaptive sharpness: curvature per relative change of the weights, which no rescaling of the function's own symmetry changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from curvkit.linalg.basis import norm
from curvkit.measures.adaptive_result import AdaptiveSharpness
from curvkit.measures.definitions import definition, doubts
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.remembering import kept_around, settled_seed
from curvkit.measures.scaled_search import largest_between
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator, Scaled
from curvkit.results.journal import NOTHING_KEPT, Journal


def adaptive_sharpness_steps(
    objective: Objective,
    settings: SharpnessSettings | None = None,
    *,
    seed: int | None = None,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[AdaptiveSharpness]:
    """Measure adaptive sharpness step by step: one partial result after each product.

    Args:
        objective: The function.
        settings: As for sharpness; searched is one eigenvalue, in the precision of the model.
        seed: Of the random part of the start vector; None draws one and records it.
        journal: Where products are kept, and recalled from if the run is gone on with.

    Yields:
        Partial results, and last the complete one.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began, seed = settings or SharpnessSettings(), journal.clock(), settled_seed(journal, seed)
    preflight = settings.checked(objective)
    operator = settings.operator(objective, journal)
    w = operator.space.join(tensor.detach() for tensor in operator.objective.tensors).to(operator.dtype).abs_()  # [n]
    start: Tensor = operator.gradient * w

    def between(A: CurvatureOperator) -> Scaled:
        return Scaled(A, w.to(A.device, A.dtype))

    result: AdaptiveSharpness | None = None
    kept = kept_around(between, journal, "adaptive")
    for pairs in largest_between(operator, kept, settings, measure="adaptive sharpness", start=start, seed=seed):
        result = AdaptiveSharpness(
            eigenpairs=pairs,
            definition=definition(operator),
            loss=operator.loss,
            gradient_norm=norm(start),
            stage="searching",
            seed=seed,
            seconds=journal.clock() - began,
            products=pairs.products,
            notes=(*objective.notes, *doubts(preflight), *operator.notes),
        )
        yield result
    if result is not None:
        yield replace(result, stage="complete", seconds=journal.clock() - began)


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
