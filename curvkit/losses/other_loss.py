"""A loss that only its author knows: it gives a scalar, or (sum, count)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.losses.batches import Batch, inputs_and_targets
from curvkit.losses.protocol import Reduction
from curvkit.losses.signatures import arguments_unless
from curvkit.losses.terms import LossTerms, scalar_or_pair


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """A loss that takes the model and the whole batch: `fn(model, batch)`.

    For models that are not called as model(inputs), or whose batches are dicts. The function returns a scalar, or (sum, count): the sum
    of its terms and how many there are. With several batches it must return the pair, because only then is the mean over
    all data known.

    Args:
        fn: (model, batch) -> scalar, or (scalar, number).

    Example:
        >>> def squared_norm(model, batch):
        ...     return model(batch).square().sum(), len(batch)
        >>> BatchLoss(squared_norm).fn(nn.Linear(1, 1), torch.ones(3, 1))[1]
        3
    """

    fn: Callable[[nn.Module, Batch], Any]

    def __post_init__(self) -> None:
        """Check that it can be called so."""
        if not callable(self.fn):
            raise InvalidArgument(f"BatchLoss: {self.fn!r} is not callable. Pass a function fn(model, batch).")
        taken = arguments_unless(self.fn, 2)
        if taken is not None:
            name = getattr(self.fn, "__name__", type(self.fn).__name__)
            raise InvalidArgument(
                f"BatchLoss: {name} takes {taken}, but it is called with (model, batch). Give it these two arguments; what else it needs "
                "belongs into the batch, or into functools.partial."
            )


@dataclass(frozen=True, eq=False)
class OtherLoss:
    """A loss that is not in the table: it gives a scalar, then one batch is all, or (sum, count)."""

    function: Callable[..., Any]
    """(outputs, targets), or (model, batch) if it is `whole`."""
    name: str
    whole: bool = False
    module: nn.Module | None = None
    """The loss itself if it is a module with tensors of its own."""
    reduction: Reduction = "as returned"

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Evaluate on one batch.

        Args:
            model: The model.
            batch: One batch.

        Returns:
            The terms; `count` is None if the loss gave a scalar only.
        """
        if self.whole:
            return scalar_or_pair(self.function(model, batch), self.name)
        inputs, named, targets = inputs_and_targets(batch)
        return self.terms_of(model(*inputs, **named), targets)

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Call the model, and divide the batch.

        Args:
            model: The model.
            batch: One batch.

        Returns:
            Outputs and targets.

        Raises:
            UnknownObjective: If the loss calls the model itself, or the outputs are not a tensor of floating-point numbers.
        """
        if self.whole:
            raise UnknownObjective(
                f"Objective: the GGN needs the model's outputs apart from the loss, but {self.name} is a BatchLoss, which calls the model "
                "itself. Pass a loss (outputs, targets), with batches (inputs, targets); if the model has to be called in another way, "
                "wrap it in a module that returns the outputs."
            )
        inputs, named, targets = inputs_and_targets(batch)
        outputs = model(*inputs, **named)
        if not isinstance(outputs, Tensor) or not outputs.dtype.is_floating_point:
            got = f"tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UnknownObjective(
                f"Objective: the GGN needs outputs that are one tensor of floating-point numbers; the model gave a {got}. "
                "Wrap the model in a module that returns that tensor, for example output.logits."
            )
        return outputs, targets

    def terms_of(self, outputs: Any, targets: Any) -> LossTerms:
        """Evaluate on outputs that are already there.

        Args:
            outputs: Of the model.
            targets: Of the batch.

        Returns:
            The terms.
        """
        return scalar_or_pair(self.function(outputs, targets), self.name)

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> OtherLoss:
        """Move the loss if it is a module; a function is taken to follow its arguments.

        Args:
            device: Target, or None.
            dtype: For floating-point tensors, or None.

        Returns:
            A new loss.
        """
        if self.module is None:
            return self
        module = copy.deepcopy(self.module).to(device=device, dtype=dtype)
        return replace(self, function=module, module=module)
