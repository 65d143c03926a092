"""Which output Hessian a loss has: in closed form where there is one, by double backward elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.losses.known import BY_CLASS, Options
from curvkit.losses.known_loss import KnownLoss
from curvkit.losses.output_hessian import DiagonalHessian, DifferentiatedHessian, OutputHessian, SoftmaxHessian
from curvkit.losses.protocol import Loss
from curvkit.losses.targets import refuse_misfit
from curvkit.losses.tokens import token_cross_entropy

LINEAR = (F.nll_loss, F.kl_div, F.l1_loss, F.hinge_embedding_loss)
"""Losses that are linear, piece by piece, in what they are given: their second derivative is zero."""


def hessian_in_outputs(loss: Loss, outputs: Tensor, targets: Any) -> OutputHessian:
    """The second derivative of a loss in its outputs, at given outputs.

    In closed form for cross_entropy, token_cross_entropy, mse_loss and binary_cross_entropy_with_logits, with their class weights,
    smoothing, ignored and soft targets; else by double backward.

    Args:
        loss: Any that takes outputs and targets.
        outputs: z, as the model returned them.
        targets: Of the batch.

    Returns:
        H_out of the sum of the batch's terms.

    Raises:
        UnsupportedModel: If the loss is linear in the outputs, so that H_out is zero.
        UnknownObjective: If the targets are no classes of the outputs, where the loss takes classes.

    Cost: as one evaluation of the loss; a product likewise.

    Example:
        >>> from curvkit.losses import as_loss
        >>> H_out = hessian_in_outputs(as_loss(F.mse_loss), torch.zeros(1, 2), torch.ones(1, 2))
        >>> H_out.multiply(torch.ones(1, 2)).tolist()
        [[2.0, 2.0]]
    """
    if isinstance(loss, KnownLoss) and loss.function in BY_CLASS:
        refuse_misfit(loss.name, loss.function, outputs, targets, loss.options)
    if isinstance(loss, KnownLoss) and loss.function in CLOSED_FORMS:
        return CLOSED_FORMS[loss.function](outputs.detach(), targets, loss.options)
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():  # the caller may have switched gradients off
        total = loss.terms_of(z, targets).total
        linear = (isinstance(loss, KnownLoss) and loss.function in LINEAR) or not total.requires_grad
        if not linear:
            (gradient,) = torch.autograd.grad(total, z, create_graph=True, materialize_grads=True)
            if gradient.requires_grad:
                return DifferentiatedHessian(z, gradient, loss.name)
    raise UnsupportedModel(
        f"GGN: the loss {loss.name} is linear in the model's outputs, at least in pieces, so that this GGN would be zero: the second "
        "derivative of the model, which it leaves out, is all the curvature. Let the model return logits and use cross_entropy instead of "
        "log-probabilities with nll_loss or kl_div; for other losses use Hessian."
    )


def _cross_entropy(outputs: Tensor, targets: Tensor, options: Options) -> OutputHessian:
    """With m = (1 - e) w_t + e mean(w), or 0 if ignored; for soft targets q with m = sum_c w_c ((1 - e) q_c + e / C)."""
    dim = 1 if outputs.ndim > 1 else 0
    weight, smoothing, num = options.get("weight"), options.get("label_smoothing", 0.0), outputs.shape[dim]
    w = outputs.new_ones(num) if weight is None else weight.to(outputs.dtype)
    if targets.dtype.is_floating_point:
        smoothed = (1 - smoothing) * targets + smoothing / num
        across = w.view(-1, *[1] * (outputs.ndim - 1 - dim))
        return SoftmaxHessian.at(outputs, (across * smoothed).sum(dim, keepdim=True), dim=dim)
    kept = targets.long() != options.get("ignore_index", -100)
    own = w[torch.where(kept, targets, 0).long()]
    mass = torch.where(kept, (1 - smoothing) * own + smoothing * w.mean(), 0.0)
    return SoftmaxHessian.at(outputs, mass.unsqueeze(dim), dim=dim)


def _token_cross_entropy(outputs: Tensor, targets: Tensor, options: Options) -> OutputHessian:
    """With m = 1, or 0 if ignored."""
    kept = targets.long() != options.get("ignore_index", -100)
    return SoftmaxHessian.at(outputs, kept.to(outputs.dtype).unsqueeze(2), dim=2)


def _squared_error(outputs: Tensor, targets: Tensor, options: Options) -> OutputHessian:
    """With h = 2 w, added up where an output is compared with several targets."""
    weight = options.get("weight")
    shape = torch.broadcast_shapes(outputs.shape, targets.shape)
    h = outputs.new_tensor(2.0) if weight is None else 2.0 * weight.to(outputs.dtype)
    return DiagonalHessian(h.expand(shape).sum_to_size(outputs.shape))


def _binary_cross_entropy(outputs: Tensor, targets: Tensor, options: Options) -> OutputHessian:
    """With h = w (1 + (pos_weight - 1) t) s(z) s(-z), s the logistic function."""
    weight, positive = options.get("weight"), options.get("pos_weight")
    h = outputs.sigmoid() * (-outputs).sigmoid()
    h = h if positive is None else h * (1 + (positive - 1) * targets)
    return DiagonalHessian((h if weight is None else h * weight).to(outputs.dtype))


CLOSED_FORMS: dict[Callable[..., Tensor], Callable[[Tensor, Any, Options], OutputHessian]] = {
    F.cross_entropy: _cross_entropy,
    token_cross_entropy: _token_cross_entropy,
    F.mse_loss: _squared_error,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
