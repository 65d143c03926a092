"""Calls of torch that are linear in a parameter, and the forms in which it enters them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.estimators.convolution import Convolution, Window
from curvkit.estimators.forms import Form, Lookup, Matrix, Scale
from curvkit.estimators.layouts import Layout


class Names(Protocol):
    """Which tensors are parameters, and how many examples there are."""

    num_examples: int
    time_first: bool
    """Whether positions are known to come before examples."""

    def name(self, tensor: Any) -> str | None:
        """Name of a parameter that is looked for; None for anything else."""
        ...


Rule = Callable[..., Iterator[Form]]
"""(names, output, *arguments of the call) -> the forms of the parameters in it."""


def _layout(names: Names, output: Tensor) -> Layout:
    return Layout.of(output, names.num_examples, positions=True, time_first=names.time_first)


def _dense(names: Names, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Form]:
    """F.linear: z = x W' + b."""
    yield from _product(names, output, x, weight, transposed=False)
    yield from _offset(names, output, bias)


def _addmm(names: Names, output: Tensor, bias: Tensor, x: Tensor, weight: Tensor, **factors: Any) -> Iterator[Form]:
    """torch.addmm, as in Hugging Face's Conv1D: z = b + x W."""
    if factors:
        raise UnsupportedModel(f"addmm with {', '.join(factors)}")
    yield from _product(names, output, x, weight, transposed=True)
    yield from _offset(names, output, bias)


def _matmul(names: Names, output: Tensor, x: Tensor, weight: Any) -> Iterator[Form]:
    """X @ W."""
    if isinstance(weight, Tensor) and weight.ndim == 2:
        yield from _product(names, output, x, weight, transposed=True)


def _product(names: Names, output: Tensor, x: Tensor, weight: Tensor, *, transposed: bool) -> Iterator[Form]:
    name = names.name(weight)
    if name is None:
        return
    layout = _layout(names, output)
    inner = Layout(layout.num_examples, layout.place, tuple(x.shape))
    yield Matrix(
        name,
        lambda z: layout.positions(z)[:, :, None],
        lambda z: layout.from_positions(z[:, :, 0]),
        x,
        lambda t: inner.positions(t)[:, :, None],
        tuple(weight.shape),
        transposed=transposed,
    )


def _offset(names: Names, output: Tensor, bias: Any) -> Iterator[Form]:
    name = names.name(bias)
    if name is not None:
        yield _elementwise(name, _layout(names, output), None, tuple(bias.shape))


def _elementwise(name: str, layout: Layout, x: Tensor | None, shape: tuple[int, ...]) -> Scale:
    """A parameter that is broadcast over examples and positions, and over dimensions in which it has size 1."""
    free = {"first": 1, "second": 2, "flattened": 1, "interleaved": 1}[
        layout.place
    ]  # leading dimensions of z that must not be the parameter's
    size = layout.examples_first(torch.empty(layout.shape, device="meta")).shape
    whole = (1,) * (len(size) - len(shape)) + shape
    if len(shape) > len(layout.shape) or any(n != 1 for n in shape[: max(0, len(shape) - len(layout.shape) + free)]):
        raise UnsupportedModel(f"{name} of shape {shape} is not the same for all examples")

    def gathered(y: Tensor) -> Tensor:
        dims = [d for d in range(1, y.ndim) if whole[d] == 1 and y.shape[d] != 1]
        return (y.sum(dims, keepdim=True) if dims else y).reshape(len(y), *shape)

    def spread(v: Tensor) -> Tensor:
        return v.reshape(len(v), *whole[1:]).expand(len(v), *size[1:])

    return Scale(
        name, layout.examples_first, layout.back, None if x is None else layout.examples_first(x), gathered, spread
    )


def _multiplied(names: Names, output: Tensor, left: Any, right: Any) -> Iterator[Form]:
    """W * x."""
    for weight, x in ((left, right), (right, left)):
        name = names.name(weight)
        if name is not None and isinstance(x, Tensor):
            layout = _layout(names, output)
            yield _elementwise(name, layout, x.expand_as(output), tuple(weight.shape))


def _added(names: Names, output: Tensor, left: Any, right: Any, **factors: Any) -> Iterator[Form]:
    """X + b."""
    if factors and (names.name(left) or names.name(right)):
        raise UnsupportedModel(f"a sum with {', '.join(factors)}")
    for bias in (left, right):
        yield from _offset(names, output, bias)


def _layer_norm(
    names: Names,
    output: Tensor,
    x: Tensor,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[Form]:
    layout = _layout(names, output)
    name = names.name(weight)
    if name is not None:
        yield _elementwise(name, layout, F.layer_norm(x, list(shape), None, None, eps), tuple(shape))
    yield from _offset(names, output, bias)


def _rms_norm(
    names: Names, output: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Iterator[Form]:
    name = names.name(weight)
    if name is not None:
        layout = _layout(names, output)
        yield _elementwise(name, layout, F.rms_norm(x, list(shape), None, eps), tuple(shape))


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
    if training:
        raise UnsupportedModel("BatchNorm in training mode couples the examples")
    tail = (-1, *(1,) * (output.ndim - 2))

    def normal(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, None, None, False, momentum, eps)

    def linear(x: Tensor) -> Tensor:
        return x * (variance + eps).rsqrt().view(tail)

    yield from _by_channel(names, output, x, weight, bias, normal, linear)


def _group_norm(
    names: Names, output: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Iterator[Form]:
    normalised = None if names.name(weight) is None else F.group_norm(x, groups, None, None, eps)
    yield from _by_channel(names, output, normalised, weight, bias)


def _by_channel(
    names: Names, output: Tensor, x: Tensor | None, weight: Any, bias: Any, *maps: Callable[[Tensor], Tensor]
) -> Iterator[Form]:
    """One factor and one offset for each index of dimension 1; of `Scale` the maps from x to what the factor multiplies."""
    tail = (1,) * (output.ndim - 2)

    def gathered(y: Tensor) -> Tensor:
        return y.flatten(2).sum(2) if y.ndim > 2 else y

    def spread(v: Tensor) -> Tensor:
        return v.view(*v.shape, *tail).expand_as(output)

    for parameter in (weight, bias):
        name = names.name(parameter)
        if name is not None:
            Layout.of(output, names.num_examples, positions=False)
            if parameter is weight:
                yield Scale(name, _same, _same, x, gathered, spread, *maps)
            else:
                yield Scale(name, _same, _same, None, gathered, spread)


def _embedding(
    names: Names, output: Tensor, index: Tensor, weight: Tensor, padding: int | None = None, *rest: Any, **options: Any
) -> Iterator[Form]:
    name = names.name(weight)
    if name is None:
        return
    options |= dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), rest, strict=False))
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        raise UnsupportedModel("an embedding with max_norm or scale_grad_by_freq")
    layout = _layout(names, output)
    places = Layout(layout.num_examples, layout.place, (*index.shape, 1)).positions(index[..., None])[..., 0]
    padding = options.get("padding_idx", padding)
    padding = padding + len(weight) if padding is not None and padding < 0 else padding
    yield Lookup(name, layout.positions, layout.from_positions, places, (weight.shape[0], weight.shape[1]), padding)


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
        yield from _by_channel(names, output, None, None, bias)


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


def _same(tensor: Tensor) -> Tensor:
    return tensor


ADDS: tuple[Any, ...] = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
RESHAPES: tuple[Any, ...] = (torch.unsqueeze, Tensor.unsqueeze, Tensor.__getitem__, Tensor.view, Tensor.reshape)
RULES: dict[Any, Rule] = {
    F.linear: _dense,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.conv1d, torch.conv2d), _convolution),
    F.embedding: _embedding,
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiplied),
    **dict.fromkeys(ADDS, _added),
}
"""By the function that is called."""


SPLITS: tuple[Any, ...] = (torch.chunk, Tensor.chunk, torch.split, Tensor.split)
"""Functions that cut a parameter into runs of rows."""
COUPLING: dict[Any, Callable[..., bool]] = {
    F.batch_norm: lambda x, mean=None, variance=None, weight=None, bias=None, training=False, *_, **__: bool(training),
}
"""Calls that couple the examples of a batch, and whether their arguments do."""
