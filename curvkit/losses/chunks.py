"""The cross-entropy of a large vocabulary without its logits: loss, gradient and curvature, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.losses.labels import misnumbered

CHUNK_BYTES = 32 << 20
"""Of the logits of a chunk, by default."""


def chunked_token_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of next tokens, in nats, from what goes into the last layer.

        z_t = W h_t + b,    total = - sum over t with targets[t] != ignore_index of log softmax(z_t)[targets[t]]

    The logits z of all tokens are never there at once, neither for the loss nor for its first and second derivatives: each is
    computed chunk by chunk, with the logits anew. Checkpointing the chunks would not do that: the graph of the gradient, which second
    derivatives need, would keep all of their softmaxes. Nothing is done to the model before h, and sequences are not cut.

    Args:
        hidden: h, [..., d], for example [N, T, d].
        head_weight: W, [V, d].
        targets: [...] int64, already shifted: h_t predicts targets[t].
        bias: b, [V], or None.
        chunk: Tokens at a time; None takes as many as have 32 MiB of logits.
        ignore_index: Targets of this value are not counted.

    Returns:
        The sum, 0-dimensional, and how many terms it has: what a `BatchLoss` returns.

    Raises:
        InvalidArgument: If the shapes do not fit, a target is no class, or `chunk` is not positive; an `UnsupportedModel` comes later, if
            a third derivative is asked for.

    Cost: d V per token for the loss, three times that for the gradient, and seven times for a product with the Hessian, where a plain
        loss takes one, two and six. Memory: about six times chunk * V numbers, and h, W and their gradients once or twice.
    Accuracy: that of `torch.nn.functional.cross_entropy`.
    Source: the chunks are those of fused linear cross-entropies, such as Hsu et al. (2024), Liger Kernel, which stop at the gradient; the
        second derivative is ours.

    Example:
        >>> h, W, y = torch.zeros(1, 3, 2), torch.ones(4, 2), torch.tensor([[3, 0, -100]])
        >>> total, count = chunked_token_cross_entropy(h, W, y, chunk=2)   # 2 log 4
        >>> round(total.item(), 4), count
        (2.7726, 2)
    """
    if head_weight.ndim != 2 or hidden.shape[-1:] != head_weight.shape[1:] or targets.shape != hidden.shape[:-1]:
        raise InvalidArgument(
            f"chunked_token_cross_entropy: hidden of shape {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit. Pass hidden [..., d], head_weight [V, d] and targets [...]."
        )
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise InvalidArgument(
            f"chunked_token_cross_entropy: bias of shape {tuple(bias.shape)} does not fit head_weight {tuple(head_weight.shape)}. "
            f"Pass [{head_weight.shape[0]}], or None."
        )
    if chunk is not None and chunk < 1:
        raise InvalidArgument(
            f"chunked_token_cross_entropy: chunk={chunk} must be at least 1, or None for the default."
        )
    if targets.dtype != torch.int64:
        raise InvalidArgument(
            f"chunked_token_cross_entropy: targets of {targets.dtype} are no indices of classes. Pass int64, for example targets.long()."
        )
    said = misnumbered(targets, len(head_weight), ignore_index)
    if said is not None:
        raise InvalidArgument(f"chunked_token_cross_entropy: {said}")
    kept = targets.flatten() != ignore_index
    h, y = hidden.flatten(0, -2)[kept], targets.flatten()[kept]
    if bias is not None:  # one more coordinate of h, which is 1
        h, head_weight = torch.cat([h, h.new_ones(len(h), 1)], 1), torch.cat([head_weight, bias[:, None]], 1)
    size = chunk or max(1, CHUNK_BYTES // (head_weight.shape[0] * h.itemsize))
    return _Total.apply(h, head_weight, y, size), len(y)  # type: ignore[return-value]


class _Total(torch.autograd.Function):
    """L(h, W) = sum_t logsumexp(W h_t) - (W h_t)[y_t]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, y: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(h, W, y)
        ctx.size = size
        total = h.new_zeros(())
        for part, targets in zip(h.split(size), y.split(size), strict=True):
            total += F.cross_entropy(part @ W.T, targets, reduction="sum")
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        h, W, y = ctx.saved_tensors
        in_h, in_W = _Gradient.apply(h, W, y, ctx.size)  # type: ignore[misc]
        return outer[0] * in_h, outer[0] * in_W, None, None


class _Gradient(torch.autograd.Function):
    """dL/dh_t = W'(p_t - e_t),   dL/dW = sum_t (p_t - e_t) h_t',   p_t = softmax(W h_t),   e_t = one at y_t."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, W, y)
        ctx.size = size
        in_h, in_W = torch.empty_like(h), torch.zeros_like(W)
        parts = zip(h.split(size), y.split(size), in_h.split(size), strict=True)
        for part, targets, target in parts:
            r = _minus_one(torch.softmax(part @ W.T, 1), targets)  # [c, V]
            torch.mm(r, W, out=target)
            in_W.addmm_(r.T, part)
        return in_h, in_W

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> Any:
        h, W, y = ctx.saved_tensors
        in_h, in_W = _Product.apply(h, W, y, *directions, ctx.size)  # type: ignore[misc]
        return in_h, in_W, None, None


class _Product(torch.autograd.Function):
    """The Hessian of L, which is symmetric, times the direction (u, U).

    With z' = W u_t + U h_t and p' = p * (z' - p.z') it is in h: W'p' + U'(p - e),   in W: sum_t p' h_t' + (p - e) u_t'.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, y: Tensor, u: Tensor, U: Tensor, size: int) -> tuple[Tensor, Tensor]:
        in_h, in_W = torch.empty_like(h), torch.zeros_like(W)
        parts = zip(h.split(size), y.split(size), u.split(size), in_h.split(size), strict=True)
        for part, targets, along, target in parts:
            p = torch.softmax(part @ W.T, 1)  # [c, V]
            change = (along @ W.T).addmm_(part, U.T)
            change -= (p * change).sum(1, keepdim=True)
            change *= p
            r = _minus_one(p, targets)
            torch.mm(change, W, out=target)
            target.addmm_(r, U)
            in_W.addmm_(change.T, part).addmm_(r.T, along)
        return in_h, in_W

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        raise UnsupportedModel(
            "chunked_token_cross_entropy: a third derivative was asked for; the loss in chunks has two. Use token_cross_entropy."
        )


def _minus_one(p: Tensor, targets: Tensor) -> Tensor:
    """Subtract e in place: p - e."""
    return p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
