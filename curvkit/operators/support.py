"""What torch can differentiate twice, and what curvkit does where it cannot: one table, read by the engine, the docs and the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvkit.objectives import Objective

Outcome = Literal["right", "handled", "refused", "raises", "wrong", "random", "smooth only"]
"""right: it is right as it stands; handled: curvkit makes it right; refused: curvkit refuses it and says why; raises: torch raises;
wrong: a wrong number without an error; random: differs from run to run; smooth only: right unless a step crosses a kink, then refused."""


@dataclass(frozen=True)
class Construct:
    """Something that models are made of, and what becomes of its second derivatives."""

    name: str
    torch: Outcome
    """Reverse over reverse by torch alone, with the user's flags as they are."""
    curvkit: Outcome
    """By `curvkit.operators.Hessian` with its preflight."""
    difference: Outcome
    """By differences of gradients, where the model is smooth."""
    remedy: str
    """What curvkit does, or what the user can do, as the end of a sentence."""
    nodes: tuple[str, ...] = ()
    """Names of autograd nodes that give it away; a prefix."""


LOW_PRECISION = "cast to bfloat16 or float16 inside the model"
SUPPORT: Mapping[str, Construct] = {
    row.name: row
    for row in (
        Construct("layers of torch.nn", "right", "right", "right", "nothing to do"),
        Construct(
            "ReLU and max-pool",
            "right",
            "right",
            "smooth only",
            "kinks have measure zero; differences of gradients may step over them",
        ),
        Construct(
            "tied, frozen and unused parameters", "right", "right", "right", "each counts once; unused ones are named"
        ),
        Construct("mse_loss", "right", "right", "right", "right in reverse mode; forward mode raises on its mean"),
        Construct(
            "attention with fused kernels",
            "raises",
            "handled",
            "right",
            "the MATH kernels are used while measuring",
            nodes=("ScaledDotProduct",),
        ),
        Construct("MultiheadAttention", "raises", "handled", "right", "the MATH kernels are used while measuring"),
        Construct(
            "TransformerEncoderLayer, eval",
            "raises",
            "handled",
            "right",
            "the fused path of evaluation mode is off while measuring",
        ),
        Construct(
            "LSTM, GRU, RNN",
            "right",
            "right",
            "right",
            "reverse over reverse is right on CPU; cuDNN is off while measuring",
        ),
        Construct(
            "weight_norm",
            "wrong",
            "handled",
            "right",
            "g v / norm(v) is written out while measuring, because torch's own second derivative of it is wrong",
        ),
        Construct(
            "torch._weight_norm, called by hand",
            "wrong",
            "refused",
            "right",
            "torch's own second derivative of it is wrong: use torch.nn.utils.parametrizations.weight_norm, or write g v / norm(v)",
            nodes=("WeightNormInterfaceBackward",),
        ),
        Construct(
            "spectral_norm, train mode",
            "random",
            "refused",
            "refused",
            "its power iteration moves with every pass: call model.eval()",
        ),
        Construct("spectral_norm, eval mode", "right", "right", "right", "nothing to do"),
        Construct("dropout, train mode", "random", "refused", "refused", "call model.eval()"),
        Construct(
            "BatchNorm, train mode",
            "right",
            "refused",
            "refused",
            "it couples the examples of a batch: call model.eval()",
        ),
        Construct(
            "once_differentiable function",
            "wrong",
            "refused",
            "right",
            "its backward pass has no derivative: write it with differentiable operations, or measure by differences (rule='difference')",
        ),
        Construct(
            "function that saves detached tensors",
            "wrong",
            "refused",
            "right",
            "save the inputs themselves in forward (ctx.save_for_backward), or measure by differences (rule='difference')",
        ),
        Construct(
            "differentiable custom function",
            "right",
            "right",
            "right",
            "its backward pass is differentiated like any code",
        ),
        Construct(
            LOW_PRECISION,
            "wrong",
            "refused",
            "refused",
            "what is rounded has steps in place of a slope: remove the cast while measuring, or leave the parameters before it out by "
            "patterns; regions of autocast need no change, they are switched off",
        ),
        Construct("checkpoint, non-reentrant", "right", "right", "right", "nothing to do"),
        Construct(
            "checkpoint, reentrant",
            "raises",
            "refused",
            "raises",
            "call checkpoint(..., use_reentrant=False)",
            nodes=("CheckpointFunctionBackward",),
        ),
        Construct("torch.compile", "raises", "handled", "right", "compiled modules run eagerly while measuring"),
        Construct("TorchScript", "right", "right", "right", "nothing to do"),
        Construct(
            "Embedding(sparse=True)",
            "raises",
            "handled",
            "right",
            "its gradient is dense while measuring",
        ),
        Construct(
            "ctc_loss",
            "raises",
            "raises",
            "right",
            "torch has no second derivative of it: measure by differences (rule='difference')",
        ),
        Construct(
            "multi_margin_loss",
            "raises",
            "raises",
            "smooth only",
            "torch has no second derivative of it; measure by differences (rule='difference')",
        ),
        Construct(
            "quantised weights",
            "raises",
            "refused",
            "refused",
            "they have no derivatives: measure the model before quantising",
        ),
        Construct(
            "flex_attention", "raises", "raises", "raises", "no second derivative: use scaled_dot_product_attention"
        ),
    )
}


@dataclass(frozen=True)
class Suspect:
    """A construct that is known to go wrong, and where it is."""

    construct: Construct
    where: str
    """The module, "module 'encoder.0' (Linear)", or "the loss"; for a custom function its class."""


HEAD = """# What can be differentiated twice

What torch does by itself, by reverse over reverse with the flags as they are, what curvkit does, and whether differences of
gradients (`rule="difference"`, `--rule difference`) are an alternative. Every line is a test that fails when torch changes.

- *right*: as it stands. *handled*: torch raises or is wrong, curvkit makes it right. *refused*: an error that says why.
- *wrong*: a wrong number without an error, which is what the [preflight](preflight.md) is for.
- *raises*: torch's own error. *random*: another number each time. *smooth only*: right unless a step crosses a kink, then refused.

| construct | torch alone | curvkit | differences | what happens, or what to do |
|---|---|---|---|---|
"""


def page() -> str:
    """Write the table as a page of the documentation.

    Returns:
        Markdown.

    Example:
        >>> page().startswith("# What can be differentiated twice")
        True
    """
    return HEAD + "".join(
        f"| {row.name} | {row.torch} | {row.curvkit} | {row.difference} | {row.remedy} |\n" for row in SUPPORT.values()
    )


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
