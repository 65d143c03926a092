"""Objective: the function theta -> loss whose curvature is measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.losses import Batch, KnownLoss, Loss, LossTerms, as_loss
from curvkit.losses.batches import cast, map_tensors, rows, take_rows, tensors
from curvkit.objectives import data as drawing
from curvkit.objectives.modes import mode, refuse_gradient_hooks, refuse_random_modules
from curvkit.objectives.rewriting import deep_copy
from curvkit.objectives.surroundings import exact_arithmetic, random_state, undisturbed
from curvkit.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class Objective:
    """The function whose curvature is measured.

        L(theta) = sum_b total_b(theta) / sum_b weight_b      over all batches b

    total_b is the sum of the loss terms of a batch and weight_b what its mean divides by (terms that are not ignored, or their class
    weights), so that L is the mean over all terms of all data, however they are cut into batches. A loss with
    reduction="sum" stays a sum.

    The data is drawn once, at first use, and kept. The model is used as it is, in its present mode, and left as it was found.

    Args:
        model: Any module. Dropout and BatchNorm in training mode are refused.
        loss: A callable (outputs, targets), or `BatchLoss(fn)` with fn(model, batch). The terms of torch's own losses are known;
            another one must return (sum, count) if there is more than one batch.
        data: An iterable of batches, for example a DataLoader or a list; each batch a tensor, a tuple or a dict.
        parameters: A `ParameterSpace`, or shell patterns for the names; None takes all that require a gradient.
        num_batches: Take only the first batches; None takes all.

    Raises:
        InvalidArgument: If an argument is of the wrong kind.
        UnsupportedModel: If a parameter is of a kind that cannot be measured.

    Example:
        >>> import torch.nn.functional as F
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> Objective(nn.Linear(2, 3), F.cross_entropy, [(x, y)]).parameters.n
        9
    """

    model: nn.Module
    loss: Any
    data: Iterable[Batch]
    parameters: ParameterSpace = field(default=None)  # type: ignore[assignment]
    num_batches: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments; nothing is run yet."""
        if not isinstance(self.model, nn.Module):
            raise InvalidArgument(
                f"Objective: model={type(self.model).__name__} is not a torch.nn.Module. Pass the module itself."
            )
        if self.num_batches is not None and self.num_batches < 1:
            raise InvalidArgument(f"Objective: num_batches={self.num_batches!r} must be at least 1, or None for all.")
        object.__setattr__(self, "loss", as_loss(self.loss))
        drawing.check_source(self.data)
        if not isinstance(self.parameters, ParameterSpace):
            object.__setattr__(self, "parameters", ParameterSpace.of(self.model, self.parameters))
        self.parameters.tensors(self.model)  # they must be this model's

    def __repr__(self) -> str:
        """Model, loss and number of parameters; not the data."""
        return f"Objective({type(self.model).__name__}, {self.loss.name}, {self.parameters.n:,} parameters)"

    @cached_property
    def _drawn(self) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
        return drawing.draw(self.data, self.num_batches)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The data, drawn once."""
        return self._drawn[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know about the data and the parameters."""
        space, notes = self.parameters, list(self._drawn[1])
        if space.tied:
            alias, name = next(iter(space.tied.items()))
            notes.append(
                f"tied: {alias} = {name}" + (f" and {len(space.tied) - 1} more" if len(space.tied) > 1 else "")
            )
        if space.frozen:
            notes.append(f"frozen and left out: {_listed(space.frozen)}")
        if space.excluded:
            notes.append(f"left out by the patterns: {_listed(space.excluded)}")
        return tuple(notes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The model's parameters that span the space, in order."""
        return self.parameters.tensors(self.model)

    @property
    def floating_tensors(self) -> tuple[Tensor, ...]:
        """All floating-point parameters and buffers of the model, frozen ones included: what a precision belongs to."""
        everything = (*self.model.parameters(), *self.model.buffers())
        return tuple(tensor for tensor in everything if tensor.dtype.is_floating_point)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the parameters."""
        found = self.tensors[0].dtype
        for tensor in self.tensors[1:]:
            found = torch.promote_types(found, tensor.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Of the parameters.

        Raises:
            UnsupportedModel: If they lie on several devices.
        """
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) > 1:
            raise UnsupportedModel(
                f"Objective: the parameters lie on several devices ({', '.join(sorted(map(str, devices)))}); one device is supported. "
                "Move the model with model.to(device)."
            )
        return devices.pop()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The model, and the loss where it is a module of the user's."""
        own = getattr(self.loss, "module", None)
        return (self.model,) if own is None else (self.model, own)

    @property
    def mode(self) -> str:
        """Mode of the model: "eval", "train" or "mixed"."""
        return mode(self.model)

    @property
    def examples(self) -> int | None:
        """Rows of all batches together; None if a batch has no common dimension 0."""
        sizes = [rows(batch) for batch in self.batches]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @contextlib.contextmanager
    def measuring(self) -> Generator[None]:
        """Everything is left as it was found, and kernels are exact; each public measurement runs inside this.

        Raises:
            UnsupportedModel: If the model is random, couples the examples of a batch, or has hooks that change gradients.
        """
        self.device  # noqa: B018  one device, or refused
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state())
            for module in self.modules:
                refuse_random_modules(module, len(self.batches))
                refuse_gradient_hooks(module)
                stack.enter_context(undisturbed(module))
            stack.enter_context(exact_arithmetic(self.model))
            yield

    def terms(self, index: int) -> LossTerms:
        """Evaluate the loss on one batch; call it inside `measuring()`.

        Args:
            index: Number of the batch.

        Returns:
            Sum and weight of its terms; the sum is differentiable.

        Raises:
            UnknownObjective: If the loss is no scalar, its terms are unknown and there are several batches, or the batch lies on
                another device than the model.
            UnsupportedModel: If the forward pass writes to its input.
        """
        with self._reading(index) as batch:
            terms = self._loss.terms(self.model, batch)
        return self._said(terms)

    def outputs(self, index: int) -> tuple[Tensor, Any]:
        """Run the model on one batch; call it inside `measuring()`.

        Args:
            index: Number of the batch.

        Returns:
            The model's outputs, differentiable, and the batch's targets.

        Raises:
            UnknownObjective: If the loss does not take outputs and targets, or the batch lies on another device than the model.
            UnsupportedModel: If the forward pass writes to its input.
        """
        with self._reading(index) as batch:
            return self._loss.outputs(self.model, batch)

    def terms_of(self, outputs: Tensor, targets: Any) -> LossTerms:
        """Evaluate the loss on outputs that are already there.

        Args:
            outputs: As of `outputs`.
            targets: Likewise.

        Returns:
            As of `terms`.

        Raises:
            UnknownObjective: If the loss is no scalar, or its terms are unknown and there are several batches.
        """
        return self._said(self._loss.terms_of(outputs, targets))

    def denominator(self, weights: Sequence[float]) -> float:
        """What the sum of the batches' totals is divided by.

        Args:
            weights: `LossTerms.weight` of every batch.

        Returns:
            Their sum, or 1 for a loss that is a sum.

        Raises:
            UnknownObjective: If no batch has a term.
        """
        if self._loss.reduction == "sum":
            return 1.0
        total = math.fsum(weights)
        if not total > 0.0:
            raise UnknownObjective(
                "Objective: the data has no loss term: every target is ignored, or has class weight 0. "
                "Check ignore_index and the class weights."
            )
        return total

    def value(self) -> float:
        """L, the loss itself, computed as `raised`.

        Returns:
            A Python float.

        Cost: one forward pass over the data.
        """
        it = self.raised()
        with it.measuring(), torch.no_grad():
            terms = [it.terms(index) for index in range(len(it.batches))]
        return math.fsum(t.total.item() for t in terms) / it.denominator([t.weight for t in terms])

    def gradient(self) -> Tensor:
        """The gradient of L, computed as `raised`.

        Returns:
            [n], in the order of `parameters`.

        Cost: one gradient over the data.
        """
        it, weights = self.raised(), []
        with it.measuring():
            total = torch.zeros(it.parameters.n, dtype=it.dtype, device=it.device)
            for index in range(len(it.batches)):
                terms = it.terms(index)
                weights.append(terms.weight)
                if terms.total.requires_grad:  # else the batch does not depend on the parameters
                    pieces = torch.autograd.grad(terms.total, it.tensors, materialize_grads=True)
                    total += it.parameters.join(pieces)
        return total / it.denominator(weights)

    def raised(self) -> Objective:
        """The precision that is computed in: half precision raised to float32, mixed parameters to the widest of them.

        Returns:
            A copy's objective, or this one if its model has one dtype of at least float32.
        """
        half = any(tensor.dtype.itemsize < 4 for tensor in self.floating_tensors)
        if half or len({tensor.dtype for tensor in self.tensors}) > 1:
            return self.converted(dtype=torch.promote_types(self.dtype, torch.float32))
        return self

    def converted(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Objective:
        """The same function of a copy of the model in another dtype or on another device; the user's module does not move.

        Args:
            dtype: Of the parameters and of floating-point data; None keeps it.
            device: None stays.

        Returns:
            A new objective, or this one if nothing changes.
        """
        target = None if device is None else torch.device(device)
        same = dtype is None or all(t.dtype == dtype for t in self.floating_tensors)
        if same and (target is None or target == self.device):
            return self
        with random_state():
            model = deep_copy(self.model).to(device=target, dtype=dtype)
        batches = [cast(batch, device=target, dtype=dtype) for batch in self.batches]
        moved = self._with(model=model, loss=self._loss.moved(target, dtype), data=batches)
        vars(moved)["_drawn"] = (tuple(batches), self._drawn[1])  # what is to be known of the data stays with it
        return moved

    def copied(self) -> Objective:
        """The same function of a copy of the model, whose parameters may be moved.

        Returns:
            A new objective on the same data.
        """
        with random_state():
            moved = self._with(model=deep_copy(self.model))
        vars(moved)["_drawn"] = self._drawn
        return moved

    def with_batches(self, batches: Sequence[Batch]) -> Objective:
        """The same model and loss on other data.

        Args:
            batches: A list of batches.

        Returns:
            A new objective.
        """
        return self._with(data=list(batches))

    def in_parts(self, num: int) -> tuple[Objective, ...]:
        """Divide the data into disjoint parts of about equal size: batches in turn, or the rows of a single batch.

        Args:
            num: How many parts at most.

        Returns:
            The parts; this objective alone if the data cannot be divided (one batch of a loss whose terms are unknown).
        """
        batches = list(self.batches)
        if len(batches) >= 2:
            return tuple(self.with_batches(batches[i::num]) for i in range(min(num, len(batches))))
        size = rows(batches[0])
        if size is None or size < 2 or not self.divisible:
            return (self,)
        num = min(num, size)
        return tuple(self.with_batches([take_rows(batches[0], torch.arange(i, size, num))]) for i in range(num))

    def cut(self, num: int) -> tuple[Objective, tuple[int, ...]]:
        """The same function with every batch cut into consecutive runs of rows, as views.

        Args:
            num: Runs per batch, at most.

        Returns:
            The objective with more batches, and for each of them the batch that it is a part of. Batches that cannot be cut stay whole.
        """
        parts: list[Batch] = []
        owners: list[int] = []
        for owner, batch in enumerate(self.batches):
            size = rows(batch)
            step = -(-size // num) if size and self.divisible else None
            starts = range(0, size, step) if size and step else (0,)
            parts += [batch if step is None else map_tensors(partial(_run, start, step), batch) for start in starts]
            owners += [owner] * len(starts)
        return self.with_batches(parts), tuple(owners)

    @property
    def divisible(self) -> bool:
        """Whether the loss of a batch is known to be a sum over its rows, if the model treats them one by one."""
        return isinstance(self._loss, KnownLoss) and self._loss.divisible

    @property
    def _loss(self) -> Loss:
        return self.loss

    def _with(self, **changes: Any) -> Objective:
        return replace(self, **{"num_batches": None, **changes})

    @contextlib.contextmanager
    def _reading(self, index: int) -> Generator[Batch]:
        """A batch on the model's device, that nothing writes to."""
        batch = self.batches[index]
        self._check_device(batch, index)
        versions = [tensor._version for tensor in tensors(batch)]
        yield batch
        if versions != [tensor._version for tensor in tensors(batch)]:
            raise UnsupportedModel(
                f"Objective: the forward pass writes to its input (batch {index}), so that the data changes from pass to pass. "
                "Use the out-of-place form, for example x = x / 255."
            )

    def _said(self, terms: LossTerms) -> LossTerms:
        """Terms that can be joined with those of other batches."""
        if not terms.said and len(self.batches) > 1:
            raise UnknownObjective(
                f"Objective: the loss {self._loss.name} returned a scalar, but there are {len(self.batches)} batches, and how to "
                "weight them is not known: batches with different numbers of terms would give a wrong mean. Return (sum, count) from the "
                "loss, use one of torch.nn.functional's losses, or pass all data as one batch."
            )
        return terms

    def _check_device(self, batch: Batch, index: int) -> None:
        for tensor in tensors(batch):
            if tensor.device != self.device:
                raise UnknownObjective(
                    f"Objective: batch {index} has a tensor on {tensor.device}, the model is on {self.device}. "
                    f"Move the data with batch.to(device), or the model."
                )


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _run(start: int, length: int, tensor: Tensor) -> Tensor:
    return tensor[start : start + length]
