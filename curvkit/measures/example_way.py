"""Whether a trace is sampled example by example, and whether beside an exact part: decided by counting."""

from __future__ import annotations

from dataclasses import dataclass

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.estimators.ggn_structure import predicted_gradients
from curvkit.estimators.recordings.coverage import Coverage, coverage
from curvkit.linalg import student
from curvkit.linalg import trace as linalg_trace
from curvkit.losses.batches import rows
from curvkit.measures.example_probes import PER_PROBE, without_rank_one
from curvkit.objectives import Objective
from curvkit.operators.plan import Plan

METHODS = ("example-hutchinson", "controlled")
EXAMPLES = 32
"""From so many on "auto" gives each its own signs: the gain is about their number, where they have much in common."""
COVERED = 0.9
"""Share of the parameters that must have rules for that, and none of rank-one signs: on a small untrained decoder with 40 sequences these
gave the trace 25 times the variance of signs that all examples share."""
PLAIN, CONTROLLED = 1.8, 0.6
"""Deviation of a probe relative to the trace, times the root of the number of examples, as it was on networks of dense layers."""
CONTROL = 60.0
"""Gradients that the control may cost, as much as the probes that are drawn in any case, about."""
ON_SINGLE_ROWS = (CurvkitError, RuntimeError, ValueError, IndexError, AssertionError, MemoryError)
"""What comes of a model that cannot be run on single rows, or not within the memory; anything else is a fault, and shows."""


@dataclass(frozen=True)
class Way:
    """How the examples are sampled."""

    method: str
    coverage: Coverage
    """Of the data in parts."""
    parts: int
    """Of each batch, for which that was looked at."""
    examples: int
    control: float
    """Gradients of the exact part; 0 without."""

    @property
    def reason(self) -> str:
        """Why "auto" takes this one."""
        exact = f", and the GGN part is exact for {self.control:.3g} gradients" if self.control else ""
        return f"{self.examples:,} examples with signs of their own, so that a probe averages over them{exact}"

    def gradients(self, probes: int, plan: Plan) -> float:
        """Count the work.

        Args:
            probes: Drawn.
            plan: Of the products.

        Returns:
            Gradients of the same data.
        """
        return self.control + probes * PER_PROBE[0 if keeps(plan) else 1]


def chosen(objective: Objective, search: linalg_trace.Settings, plan: Plan) -> Way | None:
    """Choose between signs per example, these with a control, and products.

    "auto" takes signs per example where the loss is a sum over examples, there are 32 or more, and 90 % of the parameters have rules and
    are vectors, or matrices that an example uses once at one position; and the control where its predicted cost is 60 gradients at most.
    Nothing is timed, so that the choice repeats.

    Args:
        objective: In the precision that is computed in.
        search: What is wanted.
        plan: Of the products; the data is looked at in its parts.

    Returns:
        None for products.

    Raises:
        UnsupportedModel: If one of the two was asked for, and examples are coupled, cannot be told apart, or have no control.
        CurvkitError: If a gradient is not finite.

    Cost: some forward passes over the data, and gradients of a few rows.
    """
    n, number = objective.parameters.n, sum(rows(batch) or 0 for batch in objective.batches)
    parts, cut = plan.micro_batches, objective.cut(plan.micro_batches)[0]
    if search.method in METHODS:
        covered = coverage(cut)
        cost = predicted_gradients(objective) if search.method == "controlled" else 0.0
        return Way(search.method, covered, parts, number, cost)
    if search.method != "auto" or n <= linalg_trace.SMALL or not objective.divisible or number < EXAMPLES:
        return None
    try:
        covered = coverage(cut)
    except ON_SINGLE_ROWS:  # products do not need them
        return None
    sizes = {entry.name: entry.numel for entry in objective.parameters.entries}
    if sum(sizes[name] for name in without_rank_one(cut, covered)) < COVERED * n:
        return None
    try:
        cost = predicted_gradients(objective)
    except CurvkitError:  # no known factor, or a model that cannot be counted
        cost = 2 * CONTROL
    if cost <= CONTROL:
        return Way("controlled", covered, parts, number, cost)
    return Way("example-hutchinson", covered, parts, number, 0.0)


def keeps(plan: Plan) -> bool:
    """Whether the graphs of all batches are kept between probes, beside those of the products.

    Args:
        plan: Of the products.

    Returns:
        By the plan alone, so that it is the same in each run.
    """
    return plan.residency == "retained" and 2 * plan.graph_bytes + plan.batch_bytes <= plan.budget_bytes


def probes_expected(tolerance: float, way: Way) -> int:
    """Predict the probes, before there are any.

    Args:
        tolerance: Half-width of the interval relative to the trace.
        way: How.

    Returns:
        30 at least, for a deviation of a probe of 1.8 / sqrt(N) of the trace with N examples, or a third of that with the control, about.

    Example:
        >>> probes_expected(0.01, Way("controlled", Coverage((), {}), 1, 100, 7.0))
        181
    """
    return student.probes_needed((CONTROLLED if way.control else PLAIN) / max(way.examples, 1) ** 0.5, tolerance)


def refuse_unfit(search: linalg_trace.Settings, rule: str) -> None:
    """Refuse what has no second derivative of single examples.

    Args:
        search: What is wanted.
        rule: Of differentiation.

    Raises:
        InvalidArgument: If one of `METHODS` was asked for by differences of gradients.
    """
    if search.method in METHODS and rule != "reverse":
        raise InvalidArgument(
            f"trace: method={search.method!r} differentiates twice, example by example, and rule={rule!r} takes differences of gradients. "
            "Use rule='reverse', or method='hutchinson'."
        )
