"""BatchNorm on running statistics is an affine map: fold it into the convolution or linear layer before it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  the common base of all BatchNorm layers
from torch.overrides import TorchFunctionMode

LINEAR_MAPS: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""Maps whose output channels are the first dimension of the weight."""


@dataclass(frozen=True)
class _Call:
    """A linear layer's call and its output, as long as somebody holds that output."""

    output: weakref.ReferenceType[Tensor]
    version: int
    function: Callable[..., Tensor]
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: tuple[Any, ...]
    named: dict[str, Any]


def folded_batch_norm(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Fold where there is something to fold.

    Args:
        model: Looked through for BatchNorm layers.

    Returns:
        `FoldBatchNorm()`, or a context that does nothing.
    """
    return FoldBatchNorm() if any(isinstance(m, _BatchNorm) for m in model.modules()) else contextlib.nullcontext()


class FoldBatchNorm(TorchFunctionMode):
    """While active, batch_norm in evaluation mode after a linear map is computed as one linear map with scaled weights.

        a = gamma / sqrt(var + eps),    BN(W x + b) = (a W) x + a b + beta - a mean

    The same function of all its parameters, hence with the same derivatives up to rounding, but what depends on a is as small as the
    weights instead of as large as the activations: the second derivative of batch_norm takes a third of a product with ResNet-20. The
    linear layer is computed a second time in the forward pass. Where the input of batch_norm is not the untouched output of a linear map,
    nothing is changed.

    Cost: one more forward pass through the folded layers, once per graph.

    Example:
        >>> conv, norm, x = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval(), torch.randn(2, 3, 8, 8)
        >>> with FoldBatchNorm() as folding:
        ...     y = norm(conv(x))
        >>> folding.folded, torch.allclose(y, norm(conv(x)), atol=1e-6)
        (1, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.folded = 0
        """How many normalisations were folded."""
        self._calls: dict[int, _Call] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Remember linear maps; replace batch_norm where it follows one."""
        named = kwargs or {}
        if func in LINEAR_MAPS:
            output = func(*args, **named)
            self._remember(func, args, named, output)
            return output
        if func is F.batch_norm:
            folded = self._fold(*args, **named)
            if folded is not None:
                self.folded += 1
                return folded
        return func(*args, **named)

    def _remember(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        values = dict(zip(("input", "weight", "bias"), args[:3], strict=False))
        values.update({key: named[key] for key in ("input", "weight", "bias") if key in named})
        rest = {key: value for key, value in named.items() if key not in values}
        if "input" in values and "weight" in values:
            self._calls[id(output)] = _Call(
                weakref.ref(output),
                output._version,
                function,
                values["input"],
                values["weight"],
                values.get("bias"),
                args[3:],
                rest,
            )

    def _fold(
        self,
        input: Tensor,  # the names are those of torch.nn.functional.batch_norm
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        call = self._calls.pop(id(input), None)
        if training or running_mean is None or running_var is None or call is None:
            return None
        touched = input._version != call.version or bool(input._backward_hooks) or input.retains_grad
        channels_last = call.function is F.linear and input.ndim != 2  # batch_norm normalises dimension 1
        if call.output() is not input or touched or channels_last:
            return None
        a = torch.rsqrt(running_var + eps)
        a = a if weight is None else a * weight
        offset = -running_mean if call.bias is None else call.bias - running_mean
        offset = a * offset if bias is None else bias + a * offset
        scaled = call.weight * a.reshape(-1, *([1] * (call.weight.ndim - 1)))
        return call.function(call.inputs, scaled, offset, *call.rest, **call.named)
