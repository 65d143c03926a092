"""A loss of torch whose terms can be counted: its sum, and what its mean divides by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import UnknownObjective
from curvkit.losses.batches import Batch, inputs_and_targets
from curvkit.losses.known import BY_CLASS, DIVISORS
from curvkit.losses.protocol import Reduction
from curvkit.losses.targets import explained, refuse_misfit
from curvkit.losses.terms import LossTerms

DEFAULTS = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "beta": 1.0,
    "delta": 1.0,
    "margin": 1.0,
    "log_input": True,
    "full": False,
    "eps": 1e-8,
    "log_target": False,
}
"""Options of torch's losses that are not worth printing."""


@dataclass(frozen=True, eq=False)
class KnownLoss:
    """A loss of the table in `known`: its terms and their weights follow from outputs and targets."""

    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    attribute: str | None = None
    """Of what the model returns, for models that return an object: "logits" of a Hugging Face model."""

    @property
    def name(self) -> str:
        """The function's name with the options that change the value."""
        shown = {key: value for key, value in self.options.items() if key != "reduction" and not _default(key, value)}
        words = [f"{key}={'...' if isinstance(value, Tensor) else value}" for key, value in sorted(shown.items())]
        return getattr(self.function, "__name__", "loss") + (f"({', '.join(words)})" if words else "")

    @property
    def reduction(self) -> Reduction:
        """The word "sum" if the user said so, else "mean"."""
        return "sum" if self.options.get("reduction") == "sum" else "mean"

    @property
    def divisible(self) -> bool:
        """Whether the terms of a batch are those of its rows: not if an option has a weight for each element."""
        weight = self.options.get("weight")
        return self.function in BY_CLASS or not isinstance(weight, Tensor) or weight.numel() == 1

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Evaluate with reduction="sum", and count.

        Args:
            model: Called with the batch's inputs.
            batch: (inputs ..., targets) or a mapping.

        Returns:
            The terms; for reduction="sum" the weight is counted, too, but nothing is divided by it.

        Raises:
            UnknownObjective: If the model's output is not a tensor.
        """
        return self.terms_of(*self.outputs(model, batch))

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Call the model, and divide the batch.

        Args:
            model: Called with the batch's inputs.
            batch: (inputs ..., targets) or a mapping.

        Returns:
            Outputs and targets.

        Raises:
            UnknownObjective: If one of them is not a tensor.
        """
        inputs, named, targets = inputs_and_targets(batch)
        outputs = model(*inputs, **named)
        if self.attribute is not None:
            outputs = self._picked(outputs)
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            what, got = ("model", outputs) if not isinstance(outputs, Tensor) else ("targets", targets)
            raise UnknownObjective(
                f"Objective: {self.name} takes two tensors; the {what} gave a {type(got).__name__}. "
                "Write curvkit.BatchLoss(fn) with fn(model, batch), which picks the tensors itself."
            )
        return outputs, targets

    def _picked(self, outputs: Any) -> Any:
        picked = getattr(outputs, str(self.attribute), None)
        if picked is None:
            raise UnknownObjective(
                f"Objective: {self.name} takes the attribute {self.attribute!r} of what the model returns, and a "
                f"{type(outputs).__name__} has none. Write curvkit.BatchLoss(fn) with fn(model, batch), which picks the tensors itself."
            )
        return picked

    def terms_of(self, outputs: Tensor, targets: Tensor) -> LossTerms:
        """The same on outputs that are already there.

        Args:
            outputs: Of the model.
            targets: Of the batch.

        Returns:
            The terms.

        Raises:
            UnknownObjective: If the loss does not take these outputs with these targets: see `refuse_misfit`.
        """
        refuse_misfit(self.name, self.function, outputs, targets, self.options)
        with explained(self.name, outputs, targets):
            total = self.function(outputs, targets, **{**self.options, "reduction": "sum"})
        divisor, count = DIVISORS[self.function](outputs.detach(), targets, self.options)
        return LossTerms(total, divisor, count)

    def own_value(self, model: nn.Module, batch: Batch) -> float:
        """The value of the user's own call, its reduction included: what `terms` must agree with.

        Args:
            model: Called with the batch's inputs.
            batch: One batch.

        Returns:
            The loss of this batch; NaN for the mean of no terms.
        """
        return self.function(*self.outputs(model, batch), **self.options).item()

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> KnownLoss:
        """Move class weights and the like.

        Args:
            device: Target, or None.
            dtype: For floating-point tensors, or None.

        Returns:
            A new loss.
        """
        moved = {
            key: value.to(device=device, dtype=dtype if value.dtype.is_floating_point else None)
            if isinstance(value, Tensor)
            else value
            for key, value in self.options.items()
        }
        return replace(self, options=moved)


def _default(key: str, value: Any) -> bool:
    return value is None or (key in DEFAULTS and value == DEFAULTS[key])
