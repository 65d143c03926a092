"""How the products of a measurement are computed: rule of differentiation, residency, memory; the same for all that is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from curvkit.errors import InvalidArgument
from curvkit.measures.remembering import in_plan
from curvkit.measures.vectors import refuse_small_memory
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian
from curvkit.operators.plan import Plan, Residency, choose
from curvkit.operators.preflight import Preflight, preflight, refuse_wrong
from curvkit.results.journal import NOTHING_KEPT, Journal

Rule = Literal["reverse", "difference"]
OPERATORS: dict[str, type[Hessian | DifferenceHessian]] = {"reverse": Hessian, "difference": DifferenceHessian}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the settings of all measurements share."""

    measure: ClassVar[str]
    """What is measured, for messages."""

    residency: Residency | Literal["auto"] = "auto"
    memory_bytes: int | None = None
    """For graphs and vectors, half each; None: half and a quarter of the memory that is free."""
    rule: Rule = "reverse"
    """"reverse" over reverse, or "difference" of gradients in float64, for smooth models that have no (right) second derivative."""
    preflight: bool = True
    """Check second derivatives against differences of gradients on a few rows, before anything long; not under rule "difference"."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rule not in get_args(Rule):
            raise InvalidArgument(
                f"{self.measure}: rule={self.rule!r} is not one of reverse, difference. Use 'reverse' if in doubt."
            )
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InvalidArgument(
                f"{self.measure}: memory_bytes={self.memory_bytes!r} must be positive. Pass bytes, for example 4 * 2**30."
            )

    @property
    def graph_bytes(self) -> int | None:
        """The share of graphs; None by what is free."""
        return None if self.memory_bytes is None else self.memory_bytes // 2

    def checked(self, objective: Objective) -> Preflight | None:
        """Refuse too little memory and wrong second derivatives, before any graph is built.

        Args:
            objective: The function.

        Returns:
            What the preflight says; None if there was none.

        Raises:
            InvalidArgument: If the memory does not hold the vectors of one product.
            UnsupportedModel: If second derivatives are wrong, or the objective is random.
        """
        refuse_small_memory(self.measure, objective, self.memory_bytes)
        if not self.preflight or self.rule != "reverse":
            return None
        found = preflight(objective)
        refuse_wrong(found)
        return found

    def operator(self, objective: Objective, journal: Journal = NOTHING_KEPT) -> Hessian | DifferenceHessian:
        """The Hessian, by the rule and in the memory that were asked for, or by the plan of the run that is gone on with.

        Args:
            objective: The function.
            journal: Of the measurement.

        Returns:
            The operator.

        Raises:
            UnsupportedModel: If the objective has no curvature that could be measured.
            UnknownObjective: If the loss depends on no parameter.
            CurvkitError: If the loss is not finite.
        """
        make = OPERATORS[self.rule]
        return in_plan(make, objective, journal, "hessian", residency=self.residency, budget_bytes=self.graph_bytes)

    def planned(self, objective: Objective) -> tuple[Objective, Plan]:
        """What `operator` would do, without building a graph of all the data.

        Args:
            objective: The function.

        Returns:
            The objective in the precision that is computed in, and the plan.

        Raises:
            InvalidArgument: If the memory does not hold the vectors of one product.
            CurvkitError: If memory does not suffice for one product.
        """
        refuse_small_memory(self.measure, objective, self.memory_bytes)
        difference = self.rule == "difference"
        objective = objective.converted(dtype=torch.float64) if difference else objective.raised()
        plan = choose(
            objective,
            residency="streamed" if difference else self.residency,
            budget_bytes=self.graph_bytes,
            kind=OPERATORS[self.rule].kind,
        )
        return objective, plan
