"""The rule for convolutions: (names, output, *arguments of the call) -> the forms of the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.estimators.rules.convolution import Convolution, Window
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.layouts import Layout
from curvkit.estimators.rules.rule_parts import Names, Rule, by_channel


def _convolution(
    names: Names,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Form]:
    """torch.conv1d and torch.conv2d."""
    name, offset = names.name(weight), names.name(bias)
    if name is None and offset is None:
        return
    Layout.of(output, names.num_examples, positions=False)
    channels, pixels = output.shape[1], tuple(output.shape[2:])

    def outgoing(z: Tensor) -> Tensor:  # [N, C o, ...] -> [N, P, C, o]
        return z.reshape(len(z), groups, channels // groups, -1).permute(0, 3, 1, 2)

    def incoming(z: Tensor) -> Tensor:
        return z.permute(0, 2, 3, 1).reshape(len(z), channels, *pixels)

    if name is not None:
        patches = _Patches(tuple(weight.shape[2:]), stride, padding, dilation, groups)
        shape, window = tuple(weight.shape), patches.window
        yield Convolution(name, outgoing, incoming, x, patches, shape, groups=groups, window=window)
    if offset is not None:
        yield from by_channel(names, output, None, None, bias)


class _Patches:
    """x [N, C i, ...] -> [N, P, C, i times the size of the kernel]: what each pixel of the output is made of."""

    def __init__(self, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> None:
        d = len(kernel)
        self._kernel, self._groups = kernel, groups
        self._stride, self._dilation = _each(stride, d), _each(dilation, d)
        if padding == "same":
            whole = [step * (size - 1) for step, size in zip(self._dilation, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in whole]
        else:
            sides = [(size, size) for size in _each(0 if padding == "valid" else padding, d)]
        self._pads = [size for side in reversed(sides) for size in side]

    @property
    def window(self) -> Window:
        """The same for images; a row of pixels is one of height 1."""
        kernel, stride, dilation = ((1, *each)[-2:] for each in (self._kernel, self._stride, self._dilation))
        return Window(kernel, stride, dilation, tuple(self._pads))

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, self._pads) if any(self._pads) else x
        lead = (1,) if x.ndim == 3 else ()
        x = x.unsqueeze(2) if lead else x  # a row of pixels is an image of height 1
        found = F.unfold(x, (*lead, *self._kernel), dilation=(*lead, *self._dilation), stride=(*lead, *self._stride))
        return found.view(len(found), self._groups, -1, found.shape[-1]).permute(0, 3, 1, 2)


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


CONVOLUTION_RULES: dict[Any, Rule] = dict.fromkeys((torch.conv1d, torch.conv2d), _convolution)
"""By the function that is called."""
