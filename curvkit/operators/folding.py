"""BatchNorm on running statistics is an affine map: fold it into the convolution or linear layer before it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LINEAR_MAPS: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
"""Layers whose output channels are the first dimension of the weight, with the dimensions of an input that has them in dimension 1."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class _Call:
    """A linear layer's call and its output, as long as somebody holds that output."""

    output: weakref.ReferenceType[Tensor]
    version: int
    layer: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None


class FoldBatchNorm(contextlib.AbstractContextManager["FoldBatchNorm"]):
    """While active, BatchNorm in evaluation mode after a linear map is computed as one linear map with scaled weights.

        a = gamma / sqrt(var + eps),    BN(W x + b) = (a W) x + a b + beta - a mean

    The same function of all its parameters, hence with the same derivatives up to rounding, but what depends on a is as small as the
    weights instead of as large as the activations: the second derivative of batch_norm takes a third of a product with ResNet-20. The
    linear layer is computed a second time in the forward pass. Where the input of BatchNorm is not the untouched output of a linear map,
    or a layer is of a class of its own or patched, nothing is changed.

    The layers' `forward` is replaced while this is active; it must be active for every forward pass that belongs to one graph, those
    that activation checkpointing repeats during the backward pass included. A mode that intercepts torch's functions would be
    shorter, but under such a mode `torch.nn.functional.l1_loss` forgets its weight (torch 2.13).

    Args:
        model: Its layers are looked through once, here; it may be entered again after it was left.

    Cost: one more forward pass through the folded layers, once per graph.

    Example:
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 8, 8)
        >>> with FoldBatchNorm(model) as folding:
        ...     y = model(x)
        >>> folding.folded, torch.allclose(y, model(x), atol=1e-6)
        (1, True)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.folded = 0
        """How many normalisations were folded."""
        self._calls: dict[int, _Call] = {}
        modules: list[Any] = list(model.modules())
        self._norms = [module for module in modules if type(module) in NORMS and module.running_mean is not None]
        self._maps = [module for module in modules if type(module) in LINEAR_MAPS] if self._norms else []
        self._replaced: list[Any] = []

    def __enter__(self) -> FoldBatchNorm:
        """Replace the layers' forward methods, but for one that has been patched."""
        for modules, method in ((self._maps, self._remember), (self._norms, self._normalise)):
            for module in modules:
                if "forward" not in vars(module):
                    module.forward = partial(method, module, module.forward)
                    self._replaced.append(module)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the layers their own forward methods back."""
        while self._replaced:
            del self._replaced.pop().forward
        self._calls.clear()

    def _remember(self, layer: Any, forward: Callable[..., Tensor], input: Tensor) -> Tensor:
        output = forward(input)
        if input.ndim == LINEAR_MAPS[type(layer)]:
            kept = _Call(weakref.ref(output), output._version, layer, input, layer.weight, layer.bias)
            self._calls[id(output)] = kept
        return output

    def _normalise(self, norm: Any, forward: Callable[..., Tensor], input: Tensor) -> Tensor:
        call = self._calls.pop(id(input), None)
        if call is None or call.output() is not input or norm.training or norm.num_features != input.shape[1]:
            return forward(input)
        if input._version != call.version or input._backward_hooks or input.retains_grad:
            return forward(input)
        self.folded += 1
        a = torch.rsqrt(norm.running_var + norm.eps)
        a = a if norm.weight is None else a * norm.weight
        offset = -norm.running_mean if call.bias is None else call.bias - norm.running_mean
        offset = a * offset if norm.bias is None else norm.bias + a * offset
        scaled = call.weight * a.reshape(-1, *([1] * (call.weight.ndim - 1)))
        if isinstance(call.layer, nn.Linear):
            return F.linear(call.input, scaled, offset)
        return call.layer._conv_forward(call.input, scaled, offset)
