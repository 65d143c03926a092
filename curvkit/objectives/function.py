"""Objective: the function theta -> loss whose curvature is measured."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import UnknownObjective, UnsupportedModel
from curvkit.losses import Batch, LossTerms
from curvkit.losses.batches import tensors
from curvkit.objectives.arithmetic import ExactArithmetic
from curvkit.objectives.modes import refuse_gradient_hooks, refuse_random_modules, refuse_scripted_autocast
from curvkit.objectives.problem import SCRIPTS, Problem
from curvkit.objectives.surroundings import random_state, undisturbed

NEEDS_GRAPH = re.compile(r"requires?[ _]grad")
"""In what torch says of torch.autograd.grad, retain_grad and register_hook where gradients are off."""


@dataclass(frozen=True, eq=False, repr=False)
class Objective(Problem):
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
        >>> from torch import nn
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> Objective(nn.Linear(2, 3), F.cross_entropy, [(x, y)]).parameters.n
        9
    """

    @contextlib.contextmanager
    def measuring(self) -> Generator[None]:
        """Everything is left as it was found, and kernels are exact; each public measurement runs inside this.

        The first time, parameters are copied, too, so that a forward pass that writes to them does no harm; it is refused then.

        Raises:
            UnsupportedModel: If the model is random, couples the examples of a batch, has hooks that change gradients, or autocast inside
                TorchScript.
        """
        self.device  # noqa: B018  one device, or refused
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state())
            for module in self.modules:
                if SCRIPTS not in vars(self):
                    refuse_scripted_autocast(module)
                refuse_random_modules(module, len(self.batches))
                refuse_gradient_hooks(module)
                stack.enter_context(undisturbed(module, copies="_measured" not in vars(self)))
            vars(self)[SCRIPTS] = True
            arithmetic = stack.enter_context(ExactArithmetic(self.model))
            yield
        vars(self)["_measured"] = True
        vars(self)["_silenced"] = self.silenced_autocast or arithmetic.silenced

    @property
    def silenced_autocast(self) -> bool:
        """Whether a measurement so far ran into autocast inside the model, and switched it off."""
        return vars(self).get("_silenced", False)

    @property
    def silenced_notes(self) -> tuple[str, ...]:
        """What results say of that; empty where there is nothing to say."""
        said = "the model enters torch.autocast by itself, which was switched off: everything was computed in the dtype of the parameters"
        return (said,) if self.silenced_autocast else ()

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
        with self._reading(index) as batch, self._converted():
            terms = self._loss.terms(self.model, batch)
        return self._said(terms)

    def numbers(self, index: int) -> tuple[float, float]:
        """Sum and weight of the terms of one batch as numbers, without a graph where that is possible; call it inside `measuring()`.

        A loss or a model that differentiates in its own right (torch.autograd.grad, retain_grad, hooks on tensors) needs one.

        Args:
            index: Number of the batch.

        Returns:
            Total and weight.

        Raises:
            RuntimeError: What the model raises, also with gradients on.
        """
        if not self.needs_graph:
            try:
                with torch.no_grad():
                    terms = self.terms(index)
                return terms.total.item(), terms.weight
            except RuntimeError as error:
                if not NEEDS_GRAPH.search(str(error)):
                    raise
        terms = self.terms(index)
        vars(self)["_needs_graph"] = True
        return terms.total.item(), terms.weight

    @property
    def needs_graph(self) -> bool:
        """Whether the loss was seen to need gradients on for its mere value; see `numbers`."""
        return vars(self).get("_needs_graph", False)

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
        with self._reading(index) as batch, self._converted():
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
        with it.measuring():
            numbers = [it.numbers(index) for index in range(len(it.batches))]
        return math.fsum(total for total, _ in numbers) / it.denominator([weight for _, weight in numbers])

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

    @contextlib.contextmanager
    def _converted(self) -> Generator[None]:
        """Say why a copy in another precision does not run, where the original would."""
        try:
            yield
        except (RuntimeError, UnknownObjective) as error:
            if "_origin" not in vars(self) or "dtype" not in str(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedModel(
                f"Objective: the model does not run as a copy in {self.dtype} ({reason}), in which it is measured: it casts to a fixed "
                "dtype. Write such casts by a weight, x.to(self.weight.dtype), or give the model in one precision, model.float()."
            ) from error

    def _said(self, terms: LossTerms) -> LossTerms:
        """Terms that can be joined with those of other batches, of this model and no other."""
        origin = vars(self).get("_origin")
        if origin is not None:
            origin.refuse_outer(terms.total, self.model, self._loss.name)
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
