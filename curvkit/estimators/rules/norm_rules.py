"""Rules for layers that normalise; each takes (names, output, *arguments of the call) and gives the forms of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.rule_parts import Names, Rule, by_channel, elementwise, layout_of, offset


def _layer_norm(
    names: Names,
    output: Tensor,
    x: Tensor,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Iterator[Form]:
    """F.layer_norm."""
    layout = layout_of(names, output)
    name = names.name(weight)
    if name is not None:
        yield elementwise(name, layout, F.layer_norm(x, list(shape), None, None, eps), tuple(shape))
    yield from offset(names, output, bias)


def _rms_norm(
    names: Names, output: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Iterator[Form]:
    """F.rms_norm."""
    name = names.name(weight)
    if name is not None:
        layout = layout_of(names, output)
        yield elementwise(name, layout, F.rms_norm(x, list(shape), None, eps), tuple(shape))


def _batch_norm(
    names: Names,
    output: Tensor,
    x: Tensor,
    mean: Any,
    variance: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Form]:
    """F.batch_norm with fixed statistics, whose normalisation is linear."""
    if training:
        raise UnsupportedModel("BatchNorm in training mode couples the examples")
    tail = (-1, *(1,) * (output.ndim - 2))

    def normal(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, None, None, False, momentum, eps)

    def linear(x: Tensor) -> Tensor:
        return x * (variance + eps).rsqrt().view(tail)

    yield from by_channel(names, output, x, weight, bias, normal, linear)


def _group_norm(
    names: Names, output: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Iterator[Form]:
    """F.group_norm."""
    normalised = None if names.name(weight) is None else F.group_norm(x, groups, None, None, eps)
    yield from by_channel(names, output, normalised, weight, bias)


NORM_RULES: dict[Any, Rule] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
}
"""By the function that is called."""
NORM_KEYWORDS: dict[Rule, dict[str, str]] = {
    **{rule: {"input": "x", "normalized_shape": "shape"} for rule in (_layer_norm, _rms_norm)},
    _batch_norm: {"input": "x", "running_mean": "mean", "running_var": "variance"},
    _group_norm: {"input": "x", "num_groups": "groups"},
}
"""By the rule: what it calls the arguments that torch calls otherwise."""
