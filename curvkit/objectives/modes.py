"""Modules that make a function random or couple its examples, found by type and refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  the common base of all BatchNorm layers
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]  likewise
from torch.nn.utils.spectral_norm import SpectralNorm

from curvkit.errors import UnsupportedModel


def mode(model: nn.Module) -> str:
    """Say in which mode a model is.

    Args:
        model: Any module.

    Returns:
        "eval", "train", or "mixed" if its modules differ.

    Example:
        >>> mode(nn.Linear(2, 2).eval())
        'eval'
    """
    modes = {module.training for module in model.modules()}
    return "mixed" if len(modes) > 1 else ("train" if modes.pop() else "eval")


def refuse_random_modules(model: nn.Module, num_batches: int) -> None:
    """Refuse active dropout, BatchNorm on batch statistics and spectral_norm that still iterates.

    Args:
        model: In the mode in which it will be measured.
        num_batches: With one batch, BatchNorm without running statistics in eval mode is a fixed function.

    Raises:
        UnsupportedModel: Naming the modules and what to do.
    """
    random = [name for name, module in model.named_modules() if module.training and _drops(module)]
    if random:
        raise UnsupportedModel(
            f"Objective: {_listed(random, model)} is active, so that the loss is random and has no Hessian. "
            "Call model.eval(), or set the probability to 0."
        )
    coupled = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
    if coupled:
        raise UnsupportedModel(
            f"Objective: {_listed(coupled, model)} is in training mode: it normalises by the batch at hand and moves its running "
            "statistics, so that the result would depend on how the data is cut into batches. Call model.eval()."
        )
    moving = [name for name, m in model.named_modules() if m.training and _iterates(m)]
    if moving:
        raise UnsupportedModel(
            f"Objective: {_listed(moving, model)} is spectral_norm in training mode: its power iteration moves with every pass, so that "
            "there is no fixed function. Call model.eval()."
        )
    without = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if without and num_batches > 1:
        raise UnsupportedModel(
            f"Objective: {_listed(without, model)} keeps no running statistics and normalises by the batch at hand, so that the result "
            f"would depend on how the data is cut into {num_batches} batches. Pass the data as one batch."
        )


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Refuse backward hooks: torch applies them to every derivative, so that a clipped gradient gives a wrong Hessian.

    Args:
        model: Any module.

    Raises:
        UnsupportedModel: Naming the first parameter or module that has one.
    """
    for name, module in model.named_modules():
        if vars(module).get("_backward_hooks") or vars(module).get("_backward_pre_hooks"):
            raise UnsupportedModel(
                f"Objective: the module {name or 'itself'!r} ({type(module).__name__}) has a backward hook, which would change the "
                "derivatives. Remove it with the handle's remove()."
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter._backward_hooks:
            raise UnsupportedModel(
                f"Objective: the parameter {name!r} has a gradient hook (Tensor.register_hook), which would change the derivatives. "
                "Remove it with the handle's remove(); to freeze a parameter use requires_grad_(False)."
            )


def refuse_scripted_autocast(model: nn.Module) -> None:
    """Refuse regions of autocast inside TorchScript, which cannot be switched off from outside, as they are in other modules.

    Args:
        model: Any module.

    Raises:
        UnsupportedModel: Naming the first module that has one.

    Cost: the graph of TorchScript is looked through, if there is any.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or name.startswith(inside or (" ",)):
            continue
        inside += (f"{name}.",) if name else ("",)
        if _opens_autocast(module):
            raise UnsupportedModel(
                f"Objective: {name or 'the model'} is TorchScript with torch.autocast inside, which computes in lower precision than its "
                "parameters have and cannot be switched off from outside. Measure the model before it was scripted, or script it without "
                "the region."
            )


def _opens_autocast(module: Any) -> bool:
    """Whether the graph of a scripted module, with all that it calls, makes a region of autocast that is not switched off."""
    try:
        graph = module.inlined_graph
    except (AttributeError, RuntimeError):  # it has no forward pass
        return False
    for node in graph.findAllNodes("prim::SetAttr"):
        region, value = node.inputs()
        if node.s("name") == "_enabled" and "autocast" in str(region.type()) and value.toIValue() is not False:
            return True
    return False


def _iterates(module: nn.Module) -> bool:
    hooks = vars(module)["_forward_pre_hooks"].values()
    return type(module).__name__ == "_SpectralNorm" or any(isinstance(hook, SpectralNorm) for hook in hooks)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower != module.upper
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1  # it acts between layers
    return False


def _listed(names: list[str], model: nn.Module) -> str:
    kinds = dict(model.named_modules())
    shown = ", ".join(f"{name or 'the model'} ({type(kinds[name]).__name__})" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
