"""The losses of torch.nn.functional whose mean is over terms that can be counted, and how to count them.

For each the sum of the terms is the same function with reduction="sum"; the table says what its reduction="mean" divides by.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.losses.tokens import token_cross_entropy

Options = Mapping[str, Any]
Divisor = Callable[[Tensor, Tensor, Options], tuple[float, int]]
"""(outputs, targets, options) -> what the mean divides by, and the number of terms."""


def of_classes(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """Cross-entropy and negative log-likelihood: class weights of the targets that are not ignored.

        divisor = sum over t != ignore_index of weight[t];  for soft targets the number of distributions

    Args:
        outputs: [N, C, ...] or [C].
        targets: Class indices [N, ...], or probabilities of the shape of `outputs`.
        options: weight, ignore_index.

    Returns:
        Divisor and number of terms.
    """
    classes = outputs.shape[1] if outputs.ndim > 1 else outputs.shape[0]
    if targets.dtype.is_floating_point:
        count = outputs.numel() // classes
        return float(count), count
    whole = targets.long()  # of an unsigned dtype no value would be -100
    kept = whole[whole != options.get("ignore_index", -100)]
    weight = options.get("weight")
    return (float(kept.numel()) if weight is None else weight.double()[kept].sum().item()), kept.numel()


def of_tokens(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """Cross-entropy of [N, T, V] against [N, T]: tokens that are not ignored.

    Args:
        outputs: [N, T, V].
        targets: [N, T].
        options: ignore_index.

    Returns:
        Divisor and number of terms, equal.
    """
    count = int((targets.long() != options.get("ignore_index", -100)).sum())
    return float(count), count


def of_elements(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """Elementwise losses: the elements.

    Args:
        outputs: Any shape.
        targets: Of the same shape.
        options: None is read.

    Returns:
        Divisor and number of terms, equal.
    """
    return float(outputs.numel()), outputs.numel()


def of_weighted_elements(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """As `of_elements`, but a given weight is divided out again (mse_loss, l1_loss; not huber_loss).

    Args:
        outputs: Any shape.
        targets: Of the same shape.
        options: weight.

    Returns:
        Divisor and number of terms.
    """
    divisor, count = of_elements(outputs, targets, options)
    weight = options.get("weight")
    return (divisor if weight is None else weight.double().sum().item()), count


def of_rows(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """Losses that sum over the last dimension first: multilabel_soft_margin_loss.

    Args:
        outputs: [N, C] or [C].
        targets: Of the same shape.
        options: None is read.

    Returns:
        Divisor and number of terms.
    """
    count = outputs.numel() // outputs.shape[-1]
    return float(count), count


def of_divergence(outputs: Tensor, targets: Tensor, options: Options) -> tuple[float, int]:
    """kl_div: elements, or rows under reduction="batchmean".

    Args:
        outputs: [N, ...].
        targets: Broadcastable to it.
        options: reduction.

    Returns:
        Divisor and number of terms.
    """
    if options.get("reduction") == "batchmean":
        return float(outputs.shape[0]), outputs.shape[0]
    return of_elements(outputs, targets, options)


DIVISORS: dict[Callable[..., Tensor], Divisor] = {
    F.cross_entropy: of_classes,
    F.nll_loss: of_classes,
    F.mse_loss: of_weighted_elements,
    F.l1_loss: of_weighted_elements,
    F.huber_loss: of_elements,
    F.smooth_l1_loss: of_elements,
    F.binary_cross_entropy: of_elements,
    F.binary_cross_entropy_with_logits: of_elements,
    F.poisson_nll_loss: of_elements,
    F.soft_margin_loss: of_elements,
    F.hinge_embedding_loss: of_elements,
    F.multilabel_soft_margin_loss: of_rows,
    F.kl_div: of_divergence,
    token_cross_entropy: of_tokens,
}

ELEMENTWISE = tuple(
    function for function, divisor in DIVISORS.items() if divisor in (of_elements, of_weighted_elements)
)
"""Losses that would broadcast outputs against targets of another shape: [N, 1] against [N] to [N, N], which nobody means."""

BY_CLASS = (F.cross_entropy, F.nll_loss, token_cross_entropy)
"""Losses whose `weight` belongs to classes, not to elements."""

MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
    nn.KLDivLoss: F.kl_div,
}


def recognise(loss: Any) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """Find the table's function behind a function, a module or a partial.

    Args:
        loss: Anything callable.

    Returns:
        The function and its options, or None if it is not in the table. A subclass of a torch loss is not: it may compute
        something else.
    """
    if type(loss) in MODULES:
        function = MODULES[type(loss)]
        names = set(inspect.signature(function).parameters) - {"input", "target", "size_average", "reduce"}
        return function, {name: getattr(loss, name) for name in names if getattr(loss, name, None) is not None}
    if isinstance(loss, functools.partial):
        if loss.args or loss.func not in DIVISORS:
            return None
        return loss.func, dict(loss.keywords)
    try:
        return (loss, {}) if loss in DIVISORS else None
    except TypeError:  # unhashable
        return None
