"""Which constructs of the support matrix a model has, and where: read off the graph of its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.objectives import Objective
from curvkit.operators.support import LOW_PRECISION, SUPPORT, Construct


@dataclass(frozen=True)
class Suspect:
    """A construct that is known to go wrong, and where it is."""

    construct: Construct
    where: str
    """The module, "module 'encoder.0' (Linear)", or "the loss"; for a custom function its class."""


def suspects(objective: Objective) -> tuple[Suspect, ...]:
    """Look through the graph of one batch for constructs whose derivatives are not simply right.

    Args:
        objective: Evaluated on its first batch.

    Returns:
        Known constructs and custom autograd functions, each with the innermost module that made it.
    """
    by_prefix = {prefix: row for row in SUPPORT.values() for prefix in row.nodes}
    found: dict[tuple[str, str], Suspect] = {}
    for where, node in _nodes(objective):
        kind, known = (
            type(node),
            next((row for prefix, row in by_prefix.items() if node.name().startswith(prefix)), None),
        )
        if known is None and issubclass(kind, torch.autograd.function.BackwardCFunction):
            name, where = (
                kind.__name__.removesuffix("Backward"),
                f"{where}, the function {kind.__name__.removesuffix('Backward')}",
            )
            known = _custom(kind, name)
        if known is None and _low_precision(node):
            known = SUPPORT[LOW_PRECISION]
        if known is not None:
            found.setdefault((known.name, where), Suspect(known, where))
    return tuple(found.values())


def padding_rows(objective: Objective) -> tuple[tuple[str, int], ...]:
    """Find the rows of embeddings whose gradient torch sets to zero (padding_idx), so that they count as fixed.

    Args:
        objective: Evaluated on its first batch.

    Returns:
        Names of parameters of the space, each with the index of its row.
    """
    names = {id(tensor): name for name, tensor in zip(objective.parameters.names, objective.tensors, strict=True)}
    found: dict[tuple[str, int], None] = {}
    for _, node in _nodes(objective):
        row = getattr(node, "_saved_padding_idx", None)
        if row is None or not node.next_functions:
            continue
        weight: Any = getattr(node.next_functions[0][0], "variable", None)
        if id(weight) in names and 0 <= row < weight.shape[0]:
            found[(names[id(weight)], row)] = None
    return tuple(found)


def _custom(kind: Any, name: str) -> Construct:
    """Which row a custom function belongs to, as far as can be told from its backward pass."""
    backward = getattr(getattr(kind, "_forward_cls", None), "backward", None)
    once = hasattr(backward, "__wrapped__") or "once_differentiable" in getattr(backward, "__qualname__", "")
    return SUPPORT["once_differentiable function" if once else "function that saves detached tensors"]


def _low_precision(node: Any) -> bool:
    """Whether what a node made in the forward pass has less than 32 bits."""
    made = next(iter(getattr(node, "_input_metadata", ())), None)
    return made is not None and made.dtype.is_floating_point and made.dtype.itemsize < 4


def _nodes(objective: Objective) -> Iterator[tuple[str, Any]]:
    """Each autograd node of the loss once, with the innermost module whose forward pass made it."""
    seen: dict[Any, str] = {}
    names = {module: name for name, module in objective.model.named_modules()}
    inside: list[str] = []
    """The modules whose forward pass is running, the innermost last."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in _tensors((args, kwargs)):  # what the caller computed for it is the caller's
            _walk(tensor.grad_fn, inside[-1] if inside else "the loss", seen)
        name = names[module]
        inside.append(f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})")

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        where = inside.pop()
        for tensor in _tensors(output):
            _walk(tensor.grad_fn, where, seen)

    with contextlib.ExitStack() as stack:
        for module in names:
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with objective.measuring():
            total = objective.terms(0).total
            _walk(total.grad_fn, "the loss", seen)
    yield from ((where, node) for node, where in seen.items())


def _walk(node: Any, where: str, seen: dict[Any, str]) -> None:
    """Go back from a node to those that are already known: what lies between belongs to `where`."""
    stack = [node]
    while stack:
        here = stack.pop()
        if here is not None and here not in seen:
            seen[here] = where
            stack += [before for before, _ in here.next_functions]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
