"""Doubts of the products themselves, for every measurement by them: are they symmetric, and how is their rounding seen?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from curvkit.errors import UnsupportedModel
from curvkit.linalg.certificate import OtherArithmetic
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, DoubleHessian, Hessian, PerturbedHessian

Rounding = Literal["auto", "float64", "perturbation"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def refuse_asymmetry(measure: str, asymmetry: float, limit: float, *, rule: str) -> None:
    """A Hessian is symmetric; products that are not come from a derivative that is wrong, the second or the first.

    Args:
        measure: What is measured, for the message.
        asymmetry: |u'Hv - v'Hu|.
        limit: How much of that may be rounding.
        rule: Of differentiation.

    Raises:
        UnsupportedModel: If it is more than that.
    """
    if not asymmetry > limit:
        return
    if rule == "difference":
        why = (
            "Either the gradient of this model is not that of its loss, as with detach(), no_grad(), a straight-through function or "
            "scale_grad_by_freq in the forward pass, or products do not repeat. There is no Hessian of such a gradient: measure the model "
            "without it, or leave these parameters out by patterns."
        )
    else:
        why = (
            "Either a second derivative in this model is wrong, as that of a custom function marked once_differentiable, or products do "
            "not repeat. Measure by differences of gradients (rule='difference'), or leave these parameters out by patterns."
        )
    raise UnsupportedModel(
        f"{measure}: the products are not those of a symmetric matrix (u'Hv and v'Hu differ by {asymmetry:.2g}, {limit:.1g} is allowed for "
        f"rounding). {why}"
    )


def other_arithmetic(
    operator: Hessian | DifferenceHessian, rounding: Rounding = "auto"
) -> tuple[OtherArithmetic, tuple[str, ...]]:
    """Choose how the rounding of products is seen.

    Args:
        operator: Whose products.
        rounding: "float64", "perturbation", or "auto" for float64 where it runs and there are no convolutions.

    Returns:
        The same matrix by other arithmetic, nothing where products are in float64 already; and a note where it is not as asked.
    """
    if operator.dtype == torch.float64 or isinstance(operator, DifferenceHessian):
        return OtherArithmetic(), ()
    notes: tuple[str, ...] = ()
    if rounding == "float64" or (rounding == "auto" and not _convolves(operator.objective)):
        try:
            return OtherArithmetic(DoubleHessian(operator)), ()
        except UnsupportedModel as error:
            notes = (f"residuals are of {str(operator.dtype).removeprefix('torch.')} products: {error}",)
    return OtherArithmetic(perturbed=(PerturbedHessian(operator, 0), PerturbedHessian(operator, 1))), notes


def _convolves(objective: Objective) -> bool:
    """Whether float64 is dear: torch's CPU kernels for its convolutions took 37 gradients for a product with ResNet-20."""
    return any(isinstance(module, CONVOLUTIONS) for module in objective.model.modules())
