"""What an operator is beside a subspace, and the diagonal of both parts together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.estimators.products import OperatorDiagonal, ProductEstimator
from curvkit.linalg.basis import Basis
from curvkit.linalg.complement import Complement
from curvkit.operators import CurvatureOperator
from curvkit.parameters import ParameterSpace
from curvkit.results.trace_estimate import TraceParts

VECTORS = 6
"""Of the length of the parameters, beside the rows: the known diagonal, temporaries, the two of a product with what is left."""


class Remaining(Complement):
    """P A P on the parameters of a model, P = I - Q'Q.

    Args:
        A: The operator.
        basis: The orthonormal rows Q; they must not change while the map is used.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> from curvkit.operators import Hessian
        >>> x = torch.eye(2)
        >>> H = Hessian(Objective(torch.nn.Linear(2, 1, bias=False), F.mse_loss, [(x, x[:, :1])]))   # I
        >>> basis = Basis(2, H.dtype, H.device, capacity=1)
        >>> basis.append(torch.tensor([1.0, 0.0]))
        >>> left = Remaining(H, basis)
        >>> left.space.unflatten(left.matvec(torch.ones(2)))["weight"].tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, A: CurvatureOperator, basis: Basis) -> None:
        super().__init__(A, basis)
        self.space: ParameterSpace = A.space


def completed(
    A: CurvatureOperator, basis: Basis, known: Tensor, inner: ProductEstimator, *, seed: int
) -> OperatorDiagonal:
    """Add to the diagonal of A - P A P, which is known, an estimate of that of P A P.

    Args:
        A: Symmetric.
        basis: The orthonormal rows Q, drawn independently of the inner estimator.
        known: [n], the diagonal of A - P A P.
        inner: Of the rest.
        seed: Of the inner estimator.

    Returns:
        The sum, with the errors of the inner estimate; products are those of the inner estimator.

    Raises:
        CurvkitError: If a product is not finite.
    """
    found = inner.of_operator(Remaining(A, basis), seed=seed)
    pieces = A.space.unflatten(known)
    values = {name: value + pieces[name].to(value.dtype) for name, value in found.values.items()}
    sums = found.sums
    if sums is not None:
        own = [piece.double().sum().item() for piece in pieces.values()]
        sums = TraceParts(sums.lengths, sums.known + sums.known.new_tensor(own), sums.samples)
    return replace(found, values=values, sums=sums)


def refuse_other_than_products(estimator: str, option: str, inner: Any) -> None:
    """Refuse an inner estimator that cannot work on what is left of a matrix.

    Args:
        estimator: For the message.
        option: Its name.
        inner: What was given.

    Raises:
        InvalidArgument: If it is no estimator by products.
    """
    if isinstance(inner, type):
        raise InvalidArgument(
            f"{estimator}: {option}={inner.__name__} is a class. Pass an instance: {inner.__name__}()."
        )
    if not isinstance(inner, ProductEstimator):
        instead = "Pass Hutchinson(), XDiag() or Deflated(...)"
        if hasattr(inner, "estimate_residual"):
            instead += f", or use Controlled(inner={inner!r}), which takes the exact diagonal of the GGN in place of a subspace"
        raise InvalidArgument(
            f"{estimator}: {option}={inner!r} does not work on products alone, and a matrix beside a subspace has only these. {instead}."
        )
