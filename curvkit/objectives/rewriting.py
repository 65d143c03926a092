"""Modules whose own second derivative is wrong or missing, computed in a way that has a right one, for the time of a measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

SPARSE = {"embedding": 4, "embedding_bag": 5}
"""Functions of torch with an option `sparse`, and its place; modules and torch.nn.functional call them by these names."""


class TwiceDifferentiable(contextlib.AbstractContextManager["TwiceDifferentiable"]):
    """While active: weight_norm written out, dense gradients of embeddings, compiled modules run eagerly.

        w = g v / ||v||,    the norm over all dimensions but one

    The functions are the same up to rounding; torch's fused weight_norm has a wrong second derivative (off by 19 to 26 % in torch
    2.13), sparse gradients cannot be differentiated, and compiled modules cannot be differentiated twice.

    Args:
        model: Its modules are looked through once, here, and are left as they were on leaving.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> before = layer.weight.detach()
        >>> with TwiceDifferentiable(layer):
        ...     torch.allclose(layer.weight, before)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._patches: list[tuple[Any, str, Callable[..., Tensor]]] = []
        self._compiled = False
        self._undo = contextlib.ExitStack()
        module: Any
        for module in model.modules():
            kind = type(module)
            if kind.__name__ == "_WeightNorm" and kind.__module__ == "torch.nn.utils.parametrizations":
                self._patches.append((module, "forward", partial(_normalised, module.dim)))
            for hook in vars(module)["_forward_pre_hooks"].values():
                if isinstance(hook, WeightNorm):
                    self._patches.append((hook, "compute_weight", partial(_old_style, hook)))
            self._compiled |= (
                kind.__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
            )

    def __enter__(self) -> Self:
        """Put the other computations in place; a method that the user set on an instance stays."""
        for owner, name, function in self._patches:
            if name not in vars(owner):
                setattr(owner, name, function)
                self._undo.callback(delattr, owner, name)
        for name, place in SPARSE.items():
            present = getattr(torch, name)
            setattr(torch, name, partial(_dense, present, place))
            self._undo.callback(setattr, torch, name, present)
        if self._compiled:
            self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *exception: object) -> None:
        """Take them away."""
        self._undo.close()


def _dense(function: Callable[..., Any], place: int, *arguments: Any, **named: Any) -> Any:
    """A look-up without its option `sparse`, which stands at that place or is named."""
    if named.get("sparse"):
        named = {**named, "sparse": False}
    elif len(arguments) > place and arguments[place]:
        arguments = (*arguments[:place], False, *arguments[place + 1 :])
    return function(*arguments, **named)


def _normalised(dim: int, g: Tensor, v: Tensor) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _old_style(hook: WeightNorm, module: nn.Module) -> Tensor:
    return _normalised(hook.dim, getattr(module, hook.name + "_g"), getattr(module, hook.name + "_v"))
