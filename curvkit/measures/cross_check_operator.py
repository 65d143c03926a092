"""PyHessian's object on a copy of an objective, with products that are counted, and guarded so that nothing is disturbed."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import CurvkitError
from curvkit.losses import Batch, KnownLoss
from curvkit.measures.cross_check_weighting import Weighting
from curvkit.objectives import Objective


class _Batches:
    """A loader that knows which batch is being used."""

    def __init__(self, batches: tuple[Batch, ...]) -> None:
        self._batches, self.current = [tuple(x.detach() for x in batch) for batch in batches], 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index, batch in enumerate(self._batches):
            self.current = index
            yield batch


class Theirs:
    """PyHessian's object with products that are counted; PyHessian's own code otherwise.

    Args:
        package: PyHessian's module.
        objective: A copy, inside its `measuring()`.
        shares: Of its batches.
        on_product: Called after each product of its search with their number.
    """

    def __init__(
        self, package: Any, objective: Objective, shares: Weighting, on_product: Callable[[int], None] | None
    ) -> None:
        self.objective, self.shares, self.products, self.as_here = objective, shares, 0, False
        self._told, self._data = on_product, _Batches(objective.batches)
        began, single = time.perf_counter(), len(objective.batches) == 1
        data = {"data": next(iter(self._data))} if single else {"dataloader": self._data}
        cuda = objective.device.type == "cuda"
        self.operator: Any = package.hessian(objective.model, self._criterion, cuda=cuda, **data)
        gradients, params = self.operator.gradsH, self.operator.params

        def retained(v: list[Tensor]) -> tuple[float, list[Tensor]]:
            Hv = package.hessian_vector_product(gradients, params, v)
            return package.group_product(Hv, v).cpu().item(), Hv

        self._product: Callable[[list[Tensor]], Any] = retained if single else self.operator.dataloader_hv_product
        self.operator.full_dataset = (
            True  # its search then asks for products in one place, also those of the retained graph
        )
        self.operator.dataloader_hv_product = self._counted
        self.seconds_to_build = time.perf_counter() - began

    def product(self, v: Tensor) -> Tensor:
        """Multiply by PyHessian's product, with batches weighted over loss terms; not counted.

        Args:
            v: [n], in the order of the objective's parameters.

        Returns:
            H v, [n].
        """
        self.as_here = True
        _, pieces = self._product(list(self.objective.parameters.split(v)))
        return self.objective.parameters.join(pieces)

    def _counted(self, v: list[Tensor]) -> Any:
        found = self._product(v)
        self.products += 1
        if self._told is not None:
            self._told(self.products)
        return found

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's own loss of a batch; as the objective weights it if `as_here`."""
        loss = self.objective.loss
        if isinstance(loss, KnownLoss):
            mean = loss.function(outputs, targets, **loss.options)
        else:
            terms = self.objective.terms_of(outputs, targets)
            mean = terms.total / terms.weight
        return mean * self.shares.factors[self._data.current] if self.as_here else mean


@contextlib.contextmanager
def on_a_copy(
    package: Any, objective: Objective, shares: Weighting, on_product: Callable[[int], None] | None
) -> Generator[Theirs]:
    """PyHessian on a copy, in exact arithmetic; what it raises is said to be its own.

    Args:
        package: PyHessian's module.
        objective: The user's; its model is guarded, too, as the loss may know it.
        shares: Of its batches.
        on_product: Called after each product with their number.

    Yields:
        The object.

    Raises:
        CurvkitError: If PyHessian fails.
    """
    copied = objective.copied()
    device = torch.cuda.device(copied.device) if copied.device.type == "cuda" else contextlib.nullcontext()
    with objective.measuring(), copied.measuring(), device, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backward(create_graph=True); the cycle ends with the gradients of the copy
        try:
            yield Theirs(package, copied, shares, on_product)
        except CurvkitError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise CurvkitError(
                f"cross-check: PyHessian failed with {type(error).__name__}: {reason} The result itself does not depend on it; leave out "
                "the cross-check."
            ) from error
