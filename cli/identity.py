"""What a number is of: the bytes of the weights and of the optimizer's state, the modules, and the loss at this point."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned
    from curvkit.objectives import Objective

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""In the text of a module that holds a function: another one in each process."""


def weights(objective: Objective) -> str:
    """Hash names, shapes and bytes of all parameters and buffers, in the precision of the objective, whose dtype is told elsewhere."""
    sha, model, dtype = hashlib.sha256(), objective.model, objective.dtype
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _add(sha, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return f"sha256:{sha.hexdigest()}"


def optimizer(state: OptimizerState | Unassigned | None) -> dict[str, str]:
    """Hash the state of an optimizer, if there is one: its groups, and numbers and tensors of every parameter."""
    from curvkit.checkpoints.optimizer_state import OptimizerState
    from curvkit.results import plain

    if not isinstance(state, OptimizerState):
        return {}
    sha = hashlib.sha256(json.dumps([state.name, plain(state.groups), plain(state.rates)]).encode())
    for name, held in state.parameters.items():
        sha.update(json.dumps([name, held.group, plain(held.numbers)]).encode())
        for kind, tensor in held.tensors.items():
            _add(sha, kind, tensor)
    return {"optimizer": f"sha256:{sha.hexdigest()}"}


def function(objective: Objective) -> dict[str, Any]:
    """The loss at these weights and a hash of the modules, which show code that was edited in between; the keys are words for people.

    On another device than the CPU sums can round in another way each time: four digits are kept.
    """
    from curvkit.errors import CurvkitError
    from curvkit.results import plain

    modules = hashlib.sha256(ADDRESS.sub("", str(objective.model)).encode()).hexdigest()
    loss = None
    with contextlib.suppress(CurvkitError):  # the measurement refuses it, too, and says so
        value = objective.value()
        loss = value if objective.device.type == "cpu" else float(f"{value:.4g}")
    return {"the loss at these weights": plain(loss), "the modules of the model": f"sha256:{modules}"}


def _add(sha: Any, name: str, tensor: Tensor) -> None:
    import torch

    sha.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
