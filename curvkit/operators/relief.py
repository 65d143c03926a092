"""When memory runs out: everything is let go, and the same work is done again with less at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn, TypeVar

from curvkit.errors import CurvkitError, ran_out_of_memory
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph
from curvkit.operators.independence import rows_are_independent
from curvkit.operators.memory import free_memory, megabytes
from curvkit.operators.plan import Plan

Result = TypeVar("Result")


def persisting(work: Callable[[], Result], relieve: Callable[[str], None]) -> Result:
    """Do some work, again and again after relief as long as memory runs out.

    Args:
        work: What is wanted; it must begin anew when it is called again.
        relieve: Frees memory and arranges for less at a time; gets the first line of what was said. It ends the loop by raising.

    Returns:
        What `work` returns.

    Raises:
        RuntimeError: Torch's, where it is no matter of memory.
        MemoryError: Never: it is one.

    Example:
        >>> size = [8]
        >>> def work():
        ...     if size[0] > 2:
        ...         raise MemoryError
        ...     return size[0]
        >>> def halve(said):
        ...     size[0] //= 2
        >>> persisting(work, halve)
        2
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        relieve(said)  # outside of the handler: the exception, its frames and the graphs in them are gone


def relieved(plan: Plan, objective: Objective, said: str, *, kind: type[BatchGraph]) -> Plan:
    """The plan that needs less memory at a time: streamed in place of retained, then batches in twice as many parts.

    Args:
        plan: That memory did not suffice for.
        objective: What is differentiated.
        said: What ran out of memory, for the message.
        kind: Of the graphs.

    Returns:
        A plan whose reason says so.

    Raises:
        CurvkitError: If nothing is left: the parts are single rows, or batches must not be cut.
    """
    if plan.residency == "retained":
        less = replace(plan, residency="streamed")
    else:
        less = replace(plan, micro_batches=finer(plan.micro_batches, objective, kind=kind))
        if less == plan:
            _refuse(plan, objective, said, kind)
    return replace(less, reason=f"out of memory {_at_once(plan)}: went on {_at_once(less)}")


def finer(parts: int, objective: Objective, *, kind: type[BatchGraph]) -> int:
    """Twice as many parts per batch, where batches may be cut so.

    Args:
        parts: Per batch.
        objective: Model, loss and data.
        kind: Of the graphs.

    Returns:
        The number of parts; the same if they are single rows, or if rows are not independent.

    Cost: one forward pass over the data, if batches were whole so far.
    """
    if len(objective.cut(2 * parts)[1]) == len(objective.cut(parts)[1]):
        return parts
    return 2 * parts if parts > 1 or rows_are_independent(objective, objective.batches, kind=kind) else parts


def _at_once(plan: Plan) -> str:
    if plan.residency == "retained":
        return "with the graphs of all batches"
    return f"with {plan.micro_batches} parts per batch" if plan.micro_batches > 1 else "with one whole batch at a time"


def _refuse(plan: Plan, objective: Objective, said: str, kind: type[BatchGraph]) -> NoReturn:
    single = max(rows(batch) or 0 for batch in objective.cut(plan.micro_batches)[0].batches) == 1
    why = (
        "a part is one row already"
        if single
        else "batches cannot be cut: the loss is not known to be a sum over independent rows"
    )
    shorter = "shorten the rows" if single else "give the data in smaller batches"
    raise CurvkitError(
        f"{kind.matrix}: out of memory {_at_once(plan)}, and {why} ({said}). The graph of a part needs about "
        f"{megabytes(plan.batch_bytes / plan.micro_batches)}, {megabytes(free_memory(objective.device))} are free on {objective.device}. "
        f"To go on, {shorter}, leave parameters out by patterns, use float32, or a device with more memory."
    )
