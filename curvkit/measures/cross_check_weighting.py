"""What PyHessian can take, and how it weights the batches of that; the rest is refused by name and reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.losses.kinds import OtherLoss
from curvkit.objectives import Objective

LEAVE_OUT = "or leave out the cross-check"


@dataclass(frozen=True)
class Weighting:
    """The share of each batch in a mean over batches: n_b / N by rows, as PyHessian, and w_b / W by loss terms, as curvkit."""

    rows: tuple[int, ...]
    """n_b."""
    weights: tuple[float, ...]
    """w_b."""

    @property
    def factors(self) -> tuple[float, ...]:
        """(N / n_b) (w_b / W): what the mean loss of a batch is multiplied by, so that PyHessian's mean is the one over loss terms."""
        shares = zip(self.rows, self.weights, strict=True)
        return tuple(sum(self.rows) / n * w / math.fsum(self.weights) for n, w in shares)

    @property
    def differs(self) -> bool:
        """Whether the two means are not the same."""
        return any(abs(factor - 1.0) > 1e-9 for factor in self.factors)

    def __str__(self) -> str:
        """The batch whose share differs most, as part of a sentence."""
        worst = max(range(len(self.rows)), key=lambda b: abs(math.log(self.factors[b])))
        theirs, ours = self.rows[worst] / sum(self.rows), self.weights[worst] / math.fsum(self.weights)
        return (
            f"it averages the means of the batches by rows, not over loss terms: batch {worst} counts for {theirs:.3g} there "
            f"and for {ours:.3g} here"
        )


def weighting(objective: Objective, which: str = "magnitude") -> Weighting:
    """Refuse what PyHessian cannot take or takes wrongly, and say how it weights the rest.

    Args:
        objective: What is measured.
        which: Which eigenvalues; of no account for a trace.

    Returns:
        The shares of the batches.

    Raises:
        InvalidArgument: If parameters are left out by patterns, or `which` is an end that PyHessian does not search.
        UnknownObjective: If loss or batches are not of the form that it takes.
        UnsupportedModel: If it would measure another function, or stop with an error.

    Cost: two gradients over the data.
    """
    _refuse_forms(objective, which)
    _refuse_other_functions(objective)
    _, weights = _gradient(objective)
    _refuse_outer_model(objective)
    return Weighting(tuple(batch[0].shape[0] for batch in objective.batches), weights)


def _refuse_outer_model(objective: Objective) -> None:
    """PyHessian runs on a copy of the model, which a loss that holds on to the original would not see."""
    try:
        _gradient(objective.copied())
    except UnknownObjective as error:
        raise UnknownObjective(f"cross-check: PyHessian runs on a copy of the model. {error}") from error


def _refuse_forms(objective: Objective, which: str) -> None:
    """Calls that PyHessian has no form for."""
    if which not in ("largest", "magnitude"):
        raise InvalidArgument(
            f"cross-check: which={which!r} cannot be compared: PyHessian searches for the eigenvalues of largest magnitude. "
            f"Use 'magnitude' or 'largest', {LEAVE_OUT}."
        )
    if objective.parameters.excluded:
        names = list(objective.parameters.excluded)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InvalidArgument(
            f"cross-check: PyHessian measures all parameters that require a gradient, but {names[0]}{more} were left out by patterns. "
            f"Freeze them with requires_grad_(False) instead, {LEAVE_OUT}."
        )
    if isinstance(objective.loss, OtherLoss) and objective.loss.whole:
        raise UnknownObjective(
            f"cross-check: PyHessian calls loss(model(inputs), targets), but {objective.loss.name} is a BatchLoss, which calls the model "
            f"itself. Write the loss as a function (outputs, targets), {LEAVE_OUT}."
        )
    for index, batch in enumerate(objective.batches):
        if not isinstance(batch, tuple | list) or [isinstance(part, Tensor) for part in batch] != [True, True]:
            got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            raise UnknownObjective(
                f"cross-check: PyHessian takes batches (inputs, targets) of two tensors, but batch {index} is a {got}. "
                f"Give such batches, {LEAVE_OUT}."
            )


def _refuse_other_functions(objective: Objective) -> None:
    """Objectives of which PyHessian would measure something else."""
    if objective.mode != "eval":
        raise UnsupportedModel(
            f"cross-check: PyHessian switches the model to eval mode, but this one is measured in {objective.mode} mode. "
            f"Call model.eval() to cross-check, {LEAVE_OUT}."
        )
    dtypes = {tensor.dtype for tensor in objective.tensors}
    if len(dtypes) > 1 or any(tensor.dtype.itemsize < 4 for tensor in objective.floating_tensors):
        names = sorted({str(t.dtype).removeprefix("torch.") for t in (*objective.tensors, *objective.floating_tensors)})
        raise UnsupportedModel(
            f"cross-check: PyHessian computes in the precision of the weights ({', '.join(names)}), curvkit raises it to one of at least "
            f"float32. Convert first: objective.converted(dtype=torch.float32), {LEAVE_OUT}."
        )
    if objective.device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(
            f"cross-check: PyHessian knows the devices cpu and cuda, the model is on {objective.device}. Move the objective with "
            f"objective.converted(device='cpu'), {LEAVE_OUT}."
        )
    if objective.loss.reduction == "sum" and len(objective.batches) > 1:
        raise UnsupportedModel(
            f"cross-check: the loss {objective.loss.name} is a sum over {len(objective.batches)} batches, of which PyHessian takes a mean. "
            f"Use reduction='mean', or pass all data as one batch, {LEAVE_OUT}."
        )


def _gradient(objective: Objective) -> tuple[Tensor, tuple[float, ...]]:
    """Gradient [n], and the weight of each batch; every batch must depend on every parameter."""
    weights: list[float] = []
    with objective.measuring():
        gradient = torch.zeros(objective.parameters.n, dtype=objective.dtype, device=objective.device)
        for index in range(len(objective.batches)):
            terms = objective.terms(index)
            if not terms.weight > 0.0:
                raise UnsupportedModel(
                    f"cross-check: batch {index} has no loss term (its targets are ignored, or have weight 0), and PyHessian would average "
                    f"its mean, which is NaN. Leave that batch out of the data, {LEAVE_OUT}."
                )
            pieces: tuple[Tensor | None, ...] = (None,) * len(objective.tensors)
            if terms.total.requires_grad:
                pieces = torch.autograd.grad(terms.total, objective.tensors, allow_unused=True)
            unused = [name for name, g in zip(objective.parameters.names, pieces, strict=True) if g is None]
            if unused:
                raise UnsupportedModel(
                    f"cross-check: the loss of batch {index} does not depend on {unused[0]}"
                    f"{f' and {len(unused) - 1} more' if len(unused) > 1 else ''}, and PyHessian stops with an error at a parameter "
                    f"without gradient. Freeze it with requires_grad_(False), {LEAVE_OUT}."
                )
            weights.append(terms.weight)
            gradient += objective.parameters.join([piece for piece in pieces if piece is not None])
    return gradient, tuple(weights)
