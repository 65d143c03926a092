"""Values into the tensors of a model: copied where it has memory of its own, put in their place where it has none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def assign(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], ties: Mapping[str, tuple[str, ...]]
) -> None:
    """Give every tensor of a model its value.

    Args:
        model: On any device; what is on the meta device is replaced, and stays tied where it was tied.
        own: Its state dict.
        weights: By the same names, of the same shapes.
        ties: Every name of a tensor that has several -> the others.

    Cost: one pass over the weights; for the meta device no copy where the dtype is the same.
    """
    new: dict[str, Tensor] = {}
    used: set[int] = set()
    with torch.no_grad():
        for name, tensor in own.items():
            if not tensor.is_meta:
                tensor.copy_(weights[name])
                continue
            twin = next((other for other in ties.get(name, ()) if other in new), None)
            if twin is not None:
                new[name] = new[twin]
                continue
            value = weights[name].detach().to(tensor.dtype)
            memory = value.data_ptr()
            if value.numel() and memory in used:  # tied in the file, not in the model
                value = value.clone()
            used.add(memory)
            new[name] = value
        if new:
            _replace(model, new)


def _replace(model: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers; one parameter in several places stays one."""
    made: dict[int, nn.Parameter] = {}
    left = dict(new)
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            value = left.pop(start + name, None)
            if value is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                setattr(module, name, made[id(parameter)])
        for name, _ in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            value = left.pop(start + name, None)
            if value is not None:
                setattr(module, name, value)
    if left:  # names that the model's own hooks made: its own way of loading knows them
        model.load_state_dict({**{n: t for n, t in model.state_dict().items() if n not in new}, **new}, assign=True)
