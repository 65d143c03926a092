"""Optimizers of torch with a state, on a quadratic, and what they keep as curvkit reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracles import normal
from torch import Tensor, nn

from curvkit.checkpoints.learning_rates import Rate
from curvkit.checkpoints.optimizer_state import OptimizerState, ParameterState

SIZES = (7, 8, 5)


class Vector(nn.Module):
    """Coordinates in three parameters; the loss ||A x - targets||^2 / 2, whose Hessian is A'A."""

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        super().__init__()
        self.pieces = nn.ParameterList(normal(size, seed=index) for index, size in enumerate(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat(list(self.pieces))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> OptimizerState:
    """What an optimizer holds now, in the form that a checkpoint is read to."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters: dict[str, ParameterState] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            entry = {k: v for k, v in optimizer.state[p].items() if v is not None}
            numbers = {k: float(v) for k, v in entry.items() if k in ("step", "mu_product", "mu", "eta")}
            tensors = {k: v.detach().clone() for k, v in entry.items() if k not in numbers}
            parameters[names[id(p)]] = ParameterState(index, tensors, numbers)
    rates = (Rate("current", tuple(float(group["lr"]) for group in groups), "lr of the groups"),)
    kept: dict[str, Any] = {"source": "the optimizer itself", "certain": True, "rates": rates} | changes
    return OptimizerState(type(optimizer).__name__, tuple(groups), parameters, **kept)


def warmed(
    make: Callable[..., torch.optim.Optimizer], model: nn.Module, steps: int, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer after some steps with random gradients of about 1, one group per parameter in the reverse order."""
    groups: list[dict[str, Any]] = [{"params": [p]} for p in reversed(list(model.parameters()))]
    for name, values in options.items():
        for group, value in zip(groups, values if isinstance(values, list) else [values] * len(groups), strict=True):
            group[name] = value
    optimizer = make(groups, foreach=False)
    for step in range(steps):
        for index, p in enumerate(model.parameters()):
            p.grad = normal(*p.shape, seed=100 * step + index, dtype=p.dtype)
        optimizer.step()
    return optimizer
