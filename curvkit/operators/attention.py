"""Does a model use attention of torch's, whose kernel a measurement chooses?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

KERNELS = (
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
"""Functions of torch that choose a kernel for attention."""


class AttentionSeen(TorchFunctionMode):
    """While active, notes whether one of `KERNELS` is called; what it returns is left as it is. TorchScript is not seen.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> with AttentionSeen() as seen:
        ...     _ = torch.ones(2) + 1
        >>> seen.found
        False
        >>> with seen:
        ...     _ = F.scaled_dot_product_attention(*torch.ones(3, 1, 2, 4))
        >>> seen.found
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the name, and call."""
        self.found |= getattr(func, "__name__", "") in KERNELS
        return func(*args, **(kwargs or {}))
