"""What is measured: a model, a loss, data and the parameters that span the space; and other such problems made from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.losses import Batch, KnownLoss, Loss, as_loss
from curvkit.losses.batches import cast, map_tensors, rows, take_rows
from curvkit.objectives import data as drawing
from curvkit.objectives.copying import deep_copy
from curvkit.objectives.modes import mode
from curvkit.objectives.surroundings import random_state
from curvkit.parameters import ParameterSpace

SCRIPTS = "_scripts_seen"
"""Where an objective keeps that the TorchScript in its model was looked through."""


class Origin:
    """The models that a copy was made of, one after the other, so that a loss which holds on to one of them is found."""

    def __init__(self, model: nn.Module, before: Origin | None = None) -> None:
        self.parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        if before is not None:
            self.parameters |= before.parameters
        self.checked = False

    def refuse_outer(self, total: Tensor, model: nn.Module, loss: str) -> None:
        """Look once through the graph of the copy's loss for parameters of the original.

        Args:
            total: Of a batch, computed with the copy; without a graph nothing is looked at.
            model: The copy. TorchScript's copies share the graph's leaves with the original, though not its numbers.
            loss: Its name.

        Raises:
            UnknownObjective: If there is one: a copy would then measure another function.
        """
        if self.checked or not total.requires_grad:
            return
        own = [p for p in model.parameters() if p.requires_grad]
        seen: set[Any] = {torch.autograd.graph.get_gradient_edge(p).node for p in own}
        stack: list[Any] = [total.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            found = self.parameters.get(id(getattr(node, "variable", None)))
            if found is not None:
                raise UnknownObjective(
                    f"Objective: the loss {loss} uses the parameter {found[0]!r} of the model from an outer scope, or by a tensor that the "
                    "model computed earlier and holds, so that a copy of the model (in float64, on another device) would be another "
                    "function. Take the model from the argument, curvkit.BatchLoss(fn) with fn(model, batch); compute tensors in forward."
                )
            stack += [before for before, _ in node.next_functions]
        self.checked = True


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """The parts of an `Objective`, which adds the evaluation; see there."""

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
        tensors = self.parameters.tensors(self.model)  # they must be this model's
        if any(tensor.is_inference() for tensor in tensors):
            raise UnsupportedModel(
                "Objective: the model was built inside torch.inference_mode(), so that its parameters cannot be differentiated. Build or "
                "load it outside; torch.no_grad() does no harm."
            )

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

    def raised(self) -> Self:
        """The precision that is computed in: half precision raised to float32, mixed parameters to the widest of them.

        Returns:
            A copy's objective, or this one if its model has one dtype of at least float32.
        """
        half = any(tensor.dtype.itemsize < 4 for tensor in self.floating_tensors)
        if half or len({tensor.dtype for tensor in self.tensors}) > 1:
            return self.converted(dtype=torch.promote_types(self.dtype, torch.float32))
        return self

    def converted(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
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
            model = deep_copy(self.model, device=target, dtype=dtype)
        batches = [cast(batch, device=target, dtype=dtype) for batch in self.batches]
        moved = self._with(model=model, loss=self._loss.moved(target, dtype), data=batches)
        vars(moved)["_drawn"] = (tuple(batches), self._drawn[1])  # what is to be known of the data stays with it
        vars(moved)["_origin"] = Origin(self.model, vars(self).get("_origin"))
        return moved

    def copied(self) -> Self:
        """The same function of a copy of the model, whose parameters may be moved.

        Returns:
            A new objective on the same data.
        """
        with random_state():
            moved = self._with(model=deep_copy(self.model))
        vars(moved)["_drawn"] = self._drawn
        vars(moved)["_origin"] = Origin(self.model, vars(self).get("_origin"))
        return moved

    def with_batches(self, batches: Sequence[Batch]) -> Self:
        """The same model and loss on other data.

        Args:
            batches: A list of batches.

        Returns:
            A new objective.
        """
        return self._with(data=list(batches))

    def in_parts(self, num: int) -> tuple[Self, ...]:
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

    def cut(self, num: int) -> tuple[Self, tuple[int, ...]]:
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

    def _with(self, **changes: Any) -> Self:
        made = replace(self, **{"num_batches": None, **changes})
        for name in ("_origin", SCRIPTS):  # what is known of the model
            if name in vars(self):
                vars(made)[name] = vars(self)[name]
        return made

    @property
    def _loss(self) -> Loss:
        return self.loss


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _run(start: int, length: int, tensor: Tensor) -> Tensor:
    return tensor[start : start + length]
