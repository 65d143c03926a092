"""The outputs of an objective at other parameters than the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from curvkit.objectives.function import Objective


class _Outputs(nn.Module):
    """The outputs of an objective as a module, so that its parameters can be replaced for a call."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self._objective = objective

    def forward(self, index: int) -> Any:
        """Outputs and targets of one batch."""
        return self._objective.outputs(index)


def outputs_at(objective: Objective, index: int, theta: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Run the model on one batch with some of its parameters replaced; call it inside `objective.measuring()`.

    Args:
        objective: The function.
        index: Number of the batch.
        theta: By the names of the model; the others stay. A tensor that has several names is replaced under all of them.

    Returns:
        The model's outputs and the batch's targets.

    Raises:
        UnknownObjective: If the loss does not take outputs and targets.

    Cost: one forward pass.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, nn.functional.mse_loss, [(torch.ones(1, 1), torch.ones(1, 1))])
        >>> outputs_at(objective, 0, {"weight": torch.full((1, 1), 3.0)})[0].item()
        3.0
    """
    return functional_call(_Outputs(objective), {f"model.{name}": value for name, value in theta.items()}, (index,))
