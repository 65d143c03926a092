"""The loss of language models: one term per token."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.losses.labels import INDICES, misnumbered


def token_cross_entropy(
    outputs: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Cross-entropy of next tokens, in nats.

        L = - mean over (n, t) with targets[n, t] != ignore_index of log softmax(outputs[n, t])[targets[n, t]]

    The targets are already shifted: outputs[n, t] predicts targets[n, t].

    Args:
        outputs: [N, T, V] logits.
        targets: [N, T] int64.
        ignore_index: Targets of this value are not counted.
        reduction: "mean" over the counted tokens, or "sum".

    Returns:
        0-dimensional.

    Raises:
        InvalidArgument: If the shapes do not fit, or a target is no class.

    Cost: N T V, as `torch.nn.functional.cross_entropy`, which takes the classes in dimension 1 instead.

    Example:
        >>> import torch
        >>> round(token_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item(), 4)
        1.3863
    """
    if outputs.ndim != 3 or targets.shape != outputs.shape[:2]:
        raise InvalidArgument(
            f"token_cross_entropy: outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} do not fit. "
            "Pass logits [N, T, V] and targets [N, T]."
        )
    if targets.dtype not in INDICES:
        raise InvalidArgument(
            f"token_cross_entropy: targets of {targets.dtype} are no indices of classes. Pass int64, for example targets.long()."
        )
    try:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    except IndexError as error:
        said = misnumbered(targets, outputs.shape[2], ignore_index) or str(error)
        raise InvalidArgument(f"token_cross_entropy: {said}") from error
