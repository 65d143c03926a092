"""Whether two losses are one function: by what they are made of, since functions themselves cannot be compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvkit.losses.known_loss import KnownLoss
from curvkit.losses.other_loss import OtherLoss
from curvkit.losses.protocol import Loss

DEEPEST = 10
"""So many steps from a function to what it is made of; one that encloses itself has no end."""


def difference(loss: Loss, reference: Loss) -> str | None:
    """Say what tells two losses apart.

    Args:
        loss: One.
        reference: The other.

    Returns:
        What differs, as part of a sentence; None if nothing is known to differ.

    Example:
        >>> weights = torch.tensor([1.0, 20.0])
        >>> one, other = (KnownLoss(nn.functional.cross_entropy, {"weight": w}) for w in (weights, weights / 2))
        >>> difference(one, other), difference(one, one)
        ('its weight has other values', None)
    """
    here, there = (f"{it.name} ({it.reduction})" for it in (loss, reference))
    if here != there:
        return f"{here}, there {there}"
    if isinstance(loss, KnownLoss) and isinstance(reference, KnownLoss):
        options = [
            key for key in sorted(loss.options) if _tensors_differ(loss.options[key], reference.options.get(key))
        ]
        return f"its {' and '.join(options)} {'has' if len(options) == 1 else 'have'} other values" if options else None
    if isinstance(loss, OtherLoss) and isinstance(reference, OtherLoss):
        ours, theirs = (_tensors(it.module) if it.module is not None else {} for it in (loss, reference))
        tensors = [key for key in ours if _tensors_differ(ours[key], theirs.get(key))]
        return f"the {' and '.join(tensors)} of its {loss.name} has other values" if tensors else None
    return None


def doubt(loss: Loss, reference: Loss) -> str | None:
    """Say where two losses of the user's own may be different functions under one name.

    Args:
        loss: One.
        reference: The other.

    Returns:
        A sentence; None where they are known to be the same: of torch with the same options, or of the same code, arguments and variables.
    """
    if not isinstance(loss, OtherLoss) or not isinstance(reference, OtherLoss):
        return None
    if alike(loss.function, reference.function):
        return None
    return f"the loss {loss.name} is a function of its own at each point: whether it is the reference's cannot be seen from here"


def alike(one: Any, other: Any, deepest: int = DEEPEST) -> bool:
    """Whether two things are one, or made of the same parts: code, defaults, arguments, variables that are enclosed, tensors.

    Args:
        one: A function, a module, or what one of them is made of.
        other: Likewise.
        deepest: So many steps down to parts of parts.

    Returns:
        False also where that cannot be seen. Names that the code looks up in its module are taken to be the same.

    Example:
        >>> def power(p):
        ...     return lambda outputs, targets: (outputs - targets).abs().pow(p).mean()
        >>> alike(power(2), power(2)), alike(power(2), power(3))
        (True, False)
    """
    if one is other:
        return True
    if deepest == 0:
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not _tensors_differ(one, other)
    if isinstance(one, (str, bytes, int, float, complex)):
        return type(one) is type(other) and one == other
    if isinstance(one, FunctionType) and isinstance(other, FunctionType) and one.__code__ != other.__code__:
        return False
    ours, theirs = _parts(one), _parts(other)
    if ours is None or theirs is None or list(ours) != list(theirs):
        return False
    return all(alike(ours[key], theirs[key], deepest - 1) for key in ours)


def _parts(it: Any) -> dict[Any, Any] | None:
    """What something is made of, by name, its kind included; None if that cannot be seen."""
    if isinstance(it, FunctionType):
        return {"kind": "function", "defaults": it.__defaults__, "named": it.__kwdefaults__, "enclosed": _enclosed(it)}
    if isinstance(it, MethodType):
        return {"kind": "method", "function": it.__func__, "self": it.__self__}
    if isinstance(it, functools.partial):
        bound = cast("functools.partial[Any]", it)
        return {"kind": "partial", "function": bound.func, "arguments": bound.args, "named": bound.keywords}
    if isinstance(it, nn.Module):  # of one class, or of a class of the same code, as of a file that ran twice
        plain = {key: value for key, value in vars(it).items() if key not in vars(nn.Module())}
        children = dict(it.named_children())
        return {"kind": "module", "forward": type(it).forward, "plain": plain, "tensors": _tensors(it), **children}
    if isinstance(it, (list, tuple)):
        return {"kind": type(it).__name__, **dict(enumerate(cast(Sequence[Any], it)))}
    if isinstance(it, dict):
        return {"kind": "dict", **{("key", key): value for key, value in cast(Mapping[Any, Any], it).items()}}
    return None


def _enclosed(function: FunctionType) -> tuple[Any, ...]:
    try:
        return tuple(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:  # a variable that has no value yet
        return (object(),)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _tensors_differ(one: Any, other: Any) -> bool:
    """Whether two tensors differ by more than the narrower of their precisions, in which one may have been kept."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape:
        return True
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return not torch.equal(one.detach().cpu().to(narrow), other.detach().cpu().to(narrow))
