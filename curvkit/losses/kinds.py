"""The three forms in which a loss can be given, seen through one call: (model, batch) -> LossTerms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.losses.batches import Batch, inputs_and_targets
from curvkit.losses.known import BY_CLASS, DIVISORS, ELEMENTWISE, recognise
from curvkit.losses.terms import LossTerms, scalar_or_pair

Reduction = Literal["mean", "sum", "as returned"]

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


class Loss(Protocol):
    """A loss whose terms are known, or which says that they are not."""

    @property
    def name(self) -> str:
        """As printed."""
        ...

    @property
    def reduction(self) -> Reduction:
        """How batches are joined: mean over all terms, sum of all terms, or one batch only."""
        ...

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Evaluate on one batch."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """What the model returns for a batch, and its targets."""
        ...

    def terms_of(self, outputs: Tensor, targets: Any) -> LossTerms:
        """Evaluate on outputs that are already there."""
        ...

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Loss:
        """The same loss with its own tensors elsewhere."""
        ...


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
        >>> as_loss(BatchLoss(squared_norm)).name
        'squared_norm'
    """

    fn: Callable[[nn.Module, Batch], Any]

    def __post_init__(self) -> None:
        """Check that it can be called."""
        if not callable(self.fn):
            raise InvalidArgument(f"BatchLoss: {self.fn!r} is not callable. Pass a function fn(model, batch).")


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
            UnknownObjective: If an elementwise loss would broadcast one against the other.
        """
        if self.function in ELEMENTWISE and outputs.shape != targets.shape:
            raise UnknownObjective(
                f"Objective: {self.name} compares element by element, but the model gave {tuple(outputs.shape)} and the targets are "
                f"{tuple(targets.shape)}; torch would compare each with each. Give both the same shape, for example targets[:, None] or "
                "outputs.squeeze(-1)."
            )
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


def as_loss(loss: Any) -> Loss:
    """See what the user gave through the one form that the rest of curvkit uses.

    Args:
        loss: A function or module (outputs, targets) -> scalar or (sum, count), or a `BatchLoss`.

    Returns:
        The loss.

    Raises:
        InvalidArgument: If it is not callable, is a class, or is one of torch's losses with a reduction that gives no scalar.
    """
    if isinstance(loss, KnownLoss | OtherLoss):
        return loss
    if isinstance(loss, BatchLoss):
        return OtherLoss(loss.fn, _name(loss.fn), whole=True)
    if isinstance(loss, type):
        raise InvalidArgument(
            f"Objective: loss={loss.__name__} is a class, not a loss. Make one of it: loss={loss.__name__}()."
        )
    known = recognise(loss)
    if known is not None:
        function, options = known
        legacy = [key for key in ("size_average", "reduce") if options.get(key) is not None]
        reduction = options.get("reduction", "mean")
        means = ("mean", "batchmean") if function is F.kl_div else ("mean",)
        if legacy or reduction not in (*means, "sum"):
            got = f"{legacy[0]}={options[legacy[0]]!r}" if legacy else f"reduction={reduction!r}"
            raise InvalidArgument(
                f"Objective: the loss {getattr(function, '__name__', function)} has {got}; curvature needs a scalar. "
                "Use reduction='mean' or reduction='sum'."
            )
        return KnownLoss(function, options)
    if not callable(loss):
        raise InvalidArgument(
            f"Objective: loss={loss!r} is not callable. Pass a function (outputs, targets), a loss module, or "
            "curvkit.BatchLoss(fn) with fn(model, batch)."
        )
    return OtherLoss(loss, _name(loss), module=loss if isinstance(loss, nn.Module) else None)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__


def _default(key: str, value: Any) -> bool:
    return value is None or (key in DEFAULTS and value == DEFAULTS[key])
