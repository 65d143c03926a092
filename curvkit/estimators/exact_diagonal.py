"""The diagonal of the Hessian or of the generalised Gauss-Newton matrix, exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.estimators import unit_products
from curvkit.estimators.exact_ways import (
    OPERATORS,
    Chosen,
    Matrix,
    Way,
    choose_way,
    refuse_costly,
    rows_of_a_piece,
)
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.ggn_structure import GGNStructure
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate

INSTEAD = "Use Fisher, leave parameters out by patterns, or give the data in smaller batches"


@dataclass(frozen=True, eq=False)
class ExactState:
    """How far it is."""

    share: float
    """Of the work, in (0, 1]."""
    detail: str
    """In words."""
    estimate: DiagonalEstimate | None = None
    """With the last state alone."""


@dataclass(frozen=True)
class Exact:
    """The diagonal of the Hessian or of the GGN, without sampling.

        H_jj = e_j' H e_j    by products with the n unit vectors, or
        G_jj = (1 / W) sum_n sum_c (J_n' s_nc)_j^2,    H_out,n = sum_c s_nc s_nc'    by structure

    Products serve every model that has them, at two gradients for each parameter. The structure serves the GGN of the losses whose
    output Hessian has a closed form, at one backward pass for each output of an example, and the Hessian of networks that are shown to be
    piecewise linear, where both diagonals are equal. Of the two ways the one that is predicted to be cheaper is gone.

    Args:
        matrix: "hessian" or "ggn".
        max_gradients: What would cost more, in gradients of the data, is refused before it begins.
        way: "auto", or "products" or "structure" alone.

    Accuracy: rounding.
    Source: Dangel, Kunstner & Hennig (2020), BackPACK, for the GGN by backpropagated columns; Martens (2020), section 8, for piecewise
        linear networks. Differs: squares of several columns are added up before the product with those of the inputs.
    Cost: `expected` says it. By products 2 n gradients, streamed 3.3 n; by structure for C outputs 3 + 0.3 C gradients where an example
        has one position in every layer, more where gradients of examples are written out; with sequences C counts the outputs of all
        positions.

    Example:
        >>> import torch.nn.functional as F
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), F.mse_loss, [(x, torch.zeros(1, 1))])
        >>> Exact("ggn").estimate(objective).values["weight"].tolist()   # 2 x x'
        [[2.0, 8.0]]
    """

    matrix: Matrix = "hessian"
    max_gradients: float = 20_000.0
    way: Way = "auto"

    def __post_init__(self) -> None:
        """Check the options."""
        for name, allowed in (("matrix", get_args(Matrix)), ("way", get_args(Way))):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    f"Exact: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}. The default is {allowed[0]!r}."
                )
        if (
            isinstance(self.max_gradients, bool)
            or not isinstance(self.max_gradients, int | float)
            or not self.max_gradients > 0
        ):
            raise InvalidArgument(
                f"Exact: max_gradients={self.max_gradients!r} must be a number > 0. It is the most that the diagonal may cost, in "
                "gradients of the data; the default is 20000."
            )

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute the diagonal; see the class.

        Args:
            objective: The function.
            seed: Not used; nothing is drawn.

        Returns:
            The diagonal, without standard errors; the notes say which way was gone.

        Raises:
            UnsupportedModel: If it costs more than `max_gradients`, naming the cost; if memory does not suffice, the model has no products
                that could be trusted, or no structure where that was asked for.
            CurvkitError: If an entry is not finite.
        """
        *_, last = self.steps(objective)
        return cast(DiagonalEstimate, last.estimate)

    def steps(self, objective: Objective) -> Iterator[ExactState]:
        """Compute the diagonal, saying how far it is.

        Args:
            objective: The function.

        Yields:
            A state after each product, or piece of the data; the last one has the result.

        Raises:
            UnsupportedModel: As for `estimate`.
            CurvkitError: If an entry is not finite.
        """
        began, objective = time.perf_counter(), objective.raised()
        chosen = choose_way(objective, self.matrix, self.way)
        if chosen.way == "structure":
            refuse_costly(objective, self.matrix, chosen, self.max_gradients)
            refuse_too_large(
                "Exact", objective, replace(chosen.expected, held_bytes=0), instead=INSTEAD
            )  # pieces are halved
            try:
                yield from self._by_structure(objective, chosen.expected, began)
                return
            except UnsupportedModel as error:
                if self.way == "structure":
                    raise
                why = str(error)
            chosen = replace(choose_way(objective, self.matrix, "products"), why=why)
        refuse_costly(objective, self.matrix, chosen, self.max_gradients)
        vectors = replace(
            chosen.expected, held_bytes=0
        )  # graphs are the operator's, which streams them where memory runs out
        refuse_too_large("Exact", objective, vectors, instead=INSTEAD)
        yield from self._by_products(objective, chosen, began)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be computed.

        Returns:
            Both, of the way that would be gone.

        Raises:
            UnsupportedModel: If the structure was asked for and there is none.
            CurvkitError: If memory does not suffice for one product.

        Cost: about two gradients of the first batch; for the Hessian of a network that may be piecewise linear, that of the proof.
        """
        return choose_way(objective.raised(), self.matrix, self.way).expected

    def _by_structure(self, objective: Objective, expected: Expected, began: float) -> Iterator[ExactState]:
        structure = GGNStructure.of(objective, "Exact")
        examples, pieces = (
            [rows(batch) or 1 for batch in objective.batches],
            structure.pieces(rows_of_a_piece(objective)),
        )
        total = {
            name: torch.zeros_like(p) for name, p in zip(objective.parameters.names, objective.tensors, strict=True)
        }
        weights, done = list[float](), 0
        for piece in pieces:
            found, weight = structure.sums(piece)
            for name, value in found.items():
                total[name] += value
            weights.append(weight)
            done += rows(piece.batches[0]) or 1
            yield ExactState(done / sum(examples), f"{done:,} of {sum(examples):,} examples")
        scale = objective.denominator(weights)
        values = {name: value.detach().div_(scale) for name, value in total.items()}
        note = "by structure: squares over examples and the columns of a factor of the output Hessian"
        if self.matrix == "hessian":
            note += "; the network is piecewise linear, so that the diagonal of the Hessian is that of the GGN"
        yield self._last(objective, values, expected, Cost(expected.gradients, time.perf_counter() - began), (note,))

    def _by_products(self, objective: Objective, chosen: Chosen, began: float) -> Iterator[ExactState]:
        A = OPERATORS[self.matrix](objective, plan=chosen.plan)
        diagonal = torch.zeros(A.n, dtype=A.dtype, device=A.device)
        for state in unit_products.steps(A):
            diagonal = state.diagonal
            yield ExactState(state.done / A.n, f"{state.done:,} of {A.n:,} products")
        notes = (f"by products with the {A.n:,} unit vectors", *_without_structure(chosen.why), *A.notes)
        cost = Cost(chosen.expected.gradients, time.perf_counter() - began, A.n)
        yield self._last(objective, A.space.unflatten(diagonal), chosen.expected, cost, notes)

    def _last(
        self, objective: Objective, values: dict[str, Tensor], expected: Expected, cost: Cost, notes: tuple[str, ...]
    ) -> ExactState:
        refuse_not_finite("Exact", values)
        said = tuple(dict.fromkeys((*notes, *objective.silenced_notes)))
        cost = replace(cost, peak_bytes=expected.peak_bytes(objective))
        return ExactState(1.0, "done", DiagonalEstimate(values, None, self.matrix, repr(self), cost, notes=said))


def _without_structure(why: str | None) -> tuple[str, ...]:
    """Why the structure did not serve, without the advice for those who asked for it."""
    reason = (why or "").removeprefix("Exact: ").partition(" Use ")[0].rstrip(".")
    return (f"not by structure: {reason}",) if reason else ()
