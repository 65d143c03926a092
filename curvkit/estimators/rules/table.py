"""Calls of torch that are linear in a parameter, and the forms in which it enters them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.estimators.rules.convolution_rule import CONVOLUTION_RULES
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.layouts import Layout
from curvkit.estimators.rules.lookups import Lookup
from curvkit.estimators.rules.matrices import Matrix
from curvkit.estimators.rules.norm_rules import NORM_KEYWORDS, NORM_RULES
from curvkit.estimators.rules.rule_parts import Names, Rule, elementwise, layout_of, offset


def _dense(names: Names, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Form]:
    """F.linear: z = x W' + b."""
    yield from _product(names, output, x, weight, transposed=False)
    yield from offset(names, output, bias)


def _addmm(names: Names, output: Tensor, bias: Tensor, x: Tensor, weight: Tensor, **factors: Any) -> Iterator[Form]:
    """torch.addmm, as in Hugging Face's Conv1D: z = b + x W."""
    if factors:
        raise UnsupportedModel(f"addmm with {', '.join(factors)}")
    yield from _product(names, output, x, weight, transposed=True)
    yield from offset(names, output, bias)


def _matmul(names: Names, output: Tensor, x: Tensor, weight: Any) -> Iterator[Form]:
    """X @ W."""
    if isinstance(weight, Tensor) and weight.ndim == 2:
        yield from _product(names, output, x, weight, transposed=True)


def _product(names: Names, output: Tensor, x: Tensor, weight: Tensor, *, transposed: bool) -> Iterator[Form]:
    name = names.name(weight)
    if name is None:
        return
    layout = layout_of(names, output)
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


def _multiplied(names: Names, output: Tensor, left: Any, right: Any) -> Iterator[Form]:
    """W * x; a product of two parameters is linear in each, and yet has second derivatives in both that no x carries."""
    if names.name(left) is not None and names.name(right) is not None:
        raise UnsupportedModel("it is multiplied with a parameter")
    for weight, x in ((left, right), (right, left)):
        name = names.name(weight)
        if name is not None and isinstance(x, Tensor):
            layout = layout_of(names, output)
            yield elementwise(name, layout, x.expand_as(output), tuple(weight.shape))


def _added(names: Names, output: Tensor, left: Any, right: Any, **factors: Any) -> Iterator[Form]:
    """X + b."""
    if factors and (names.name(left) or names.name(right)):
        raise UnsupportedModel(f"a sum with {', '.join(factors)}")
    for bias in (left, right):
        yield from offset(names, output, bias)


def _embedding(
    names: Names, output: Tensor, index: Tensor, weight: Tensor, padding: int | None = None, *rest: Any, **options: Any
) -> Iterator[Form]:
    name = names.name(weight)
    if name is None:
        return
    options |= dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), rest, strict=False))
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        raise UnsupportedModel("an embedding with max_norm or scale_grad_by_freq")
    layout = layout_of(names, output)
    places = Layout(layout.num_examples, layout.place, (*index.shape, 1)).positions(index[..., None])[..., 0]
    padding = options.get("padding_idx", padding)
    padding = padding + len(weight) if padding is not None and padding < 0 else padding
    yield Lookup(name, layout.positions, layout.from_positions, places, (weight.shape[0], weight.shape[1]), padding)


ADDS: tuple[Any, ...] = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
RESHAPES: tuple[Any, ...] = (torch.unsqueeze, Tensor.unsqueeze, Tensor.__getitem__, Tensor.view, Tensor.reshape)
RULES: dict[Any, Rule] = {
    F.linear: _dense,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **CONVOLUTION_RULES,
    F.embedding: _embedding,
    **NORM_RULES,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiplied),
    **dict.fromkeys(ADDS, _added),
}
"""By the function that is called."""
KEYWORDS: dict[Rule, dict[str, str]] = {
    _dense: {"input": "x"},
    _addmm: {"input": "bias", "mat1": "x", "mat2": "weight"},
    _matmul: {"input": "x", "other": "weight", "tensor2": "weight", "mat2": "weight"},
    _embedding: {"input": "index"},
    **{rule: {"input": "left", "other": "right"} for rule in (_multiplied, _added)},
    **{rule: {"input": "x"} for rule in CONVOLUTION_RULES.values()},
    **NORM_KEYWORDS,
}
"""By the rule: what it calls the arguments that torch calls otherwise."""


SPLITS: tuple[Any, ...] = (torch.chunk, Tensor.chunk, torch.split, Tensor.split)
"""Functions that cut a parameter into runs of rows."""
COUPLING: dict[Any, Callable[..., bool]] = {
    F.batch_norm: lambda *args, **kwargs: bool(args[5] if len(args) > 5 else kwargs.get("training", False)),
}
"""Calls that couple the examples of a batch, and whether their arguments do."""
