"""Leave everything as it was found: random states, gradients, modes and buffers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from curvkit.errors import UnsupportedModel


@contextlib.contextmanager
def random_state() -> Generator[None]:
    """Restore the random states of torch (CPU and, once used, CUDA), numpy and Python on leaving."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numpy_state: Any = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, copies: bool = True) -> Generator[None]:
    """Restore a model's modes, `.grad`, `requires_grad` flags, buffers and parameters, also when something raises.

    Inside, every `.grad` is None. A forward pass that writes to a parameter is refused afterwards, because the function that was
    differentiated is then not the one that was asked for.

    Args:
        model: Any module.
        copies: Whether parameters are copied, so that one that was written to can be restored; without, it is refused, and the write
            stays.

    Raises:
        UnsupportedModel: If a parameter was written to.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(name, p, p.grad, p.requires_grad, p._version) for name, p in model.named_parameters()]
    values = [p.detach().clone() for _, p, *_ in parameters] if copies else []
    holders = (vars(module).get("_buffers", {}) for module in model.modules())
    registered = [(held, dict(held)) for held in holders if isinstance(held, dict)]  # TorchScript keeps them elsewhere
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    for _, p, *_ in parameters:
        p.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for _, p, grad, requires_grad, _ in parameters:
            p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for held, before in registered:
            if held.keys() != before.keys() or any(held[name] is not before[name] for name in before):
                held.clear()
                held.update(before)
        for buffer, version, copy in buffers:
            if buffer._version != version or not torch.equal(buffer, copy):  # batch_norm writes without a new version
                with torch.no_grad():
                    buffer.copy_(copy)
        written = [index for index, (_, p, _, _, version) in enumerate(parameters) if p._version != version]
        if values:
            with torch.no_grad():
                for index in written:
                    parameters[index][1].copy_(values[index])
    if written:
        name = parameters[written[0]][0]
        raise UnsupportedModel(
            f"Objective: the forward pass writes to the parameter {name!r}, so that the function changes while it is measured. "
            "Put the module that does so in evaluation mode, or compute the new value without writing it back."
        )
