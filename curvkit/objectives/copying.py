"""Copies of models, also of those that hold what cannot be copied: locks, compiled functions, tensors that were computed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import UnsupportedModel

STATE = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that make up the function; they are never shared with a copy."""


def deep_copy(model: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module, and convert the copy.

    A view of a parameter that the module holds, as `self.wt = self.b.weight.t()` makes one, becomes a view of the copied parameter. Another
    tensor that was computed from parameters stays connected with them, so that a loss which uses it is found (`Origin`); most are
    caches, or are computed anew. What Python cannot copy, such as a lock, is shared.

    Args:
        model: Any module; left as it was.
        device: Of the copy, or None to stay.
        dtype: Of its floating-point tensors, or None to keep them.

    Returns:
        The copy.

    Raises:
        UnsupportedModel: If something that belongs to the function cannot be copied, naming the attribute.
    """
    held = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    modules: dict[str, Any] = dict(model.named_modules())
    for name, key, value in held:
        setattr(modules[name], key, value.detach())
    try:
        made = _copied(model).to(device=device, dtype=dtype)
    finally:
        for name, key, value in held:
            setattr(modules[name], key, value)
    owners = {id(p): name for name, p in model.named_parameters()}
    parameters, copies = dict(made.named_parameters()), dict(made.named_modules())
    with torch.inference_mode(False), torch.enable_grad():
        for name, key, value in held:
            base, own = value._base, parameters.get(owners.get(id(value._base), ""))
            if base is None or own is None or own.stride() != base.stride():  # a parameter with gaps is copied without
                setattr(copies[name], key, value.to(device=device, dtype=dtype))
            else:  # the storage of a copy begins with it; that of the original may hold others before it
                offset = value.storage_offset() - base.storage_offset() + own.storage_offset()
                setattr(copies[name], key, own.as_strided(value.size(), value.stride(), offset))
    return made


def _copied(model: nn.Module) -> nn.Module:
    """By `copy.deepcopy`; attributes that it cannot copy by themselves are shared."""
    try:
        return copy.deepcopy(model)
    except Exception:
        memo: dict[int, Any] = {}
    reasons: list[str] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in STATE:
                continue
            try:
                copy.deepcopy(value, {id(inner): inner for inner in model.modules()})
            except Exception as error:
                memo[id(value)] = value
                where = f"{name}.{key}" if name else key
                reasons.append(f"{where!r} ({type(value).__name__}): {str(error).partition(chr(10))[0]}")
                if _holds_state(value):
                    break
        else:
            continue
        break
    else:
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            reasons.append(str(error).partition("\n")[0])
    raise UnsupportedModel(
        f"Objective: a copy of the model is needed (for float64, differences of gradients or another device), and {type(model).__name__} "
        f"cannot be copied: {reasons[-1]}. Make that attribute a parameter, a buffer or a submodule, compute it in forward, or remove it "
        "while measuring."
    )


def _holds_state(value: Any) -> bool:
    """Whether an attribute that cannot be copied holds tensors or modules in a container: sharing it would share parameters."""
    if isinstance(value, Tensor | nn.Module):
        return not isinstance(value, torch.jit.ScriptModule)
    if isinstance(value, dict):
        return any(_holds_state(item) for item in value.values())
    return isinstance(value, list | tuple | set) and any(_holds_state(item) for item in value)
