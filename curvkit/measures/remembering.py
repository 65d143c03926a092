"""What a measurement decides once and for all of its runs: seed, plans, sizes; and the operators that follow from that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch

from curvkit import seeds
from curvkit.errors import InvalidArgument, RefusedCheckpoint
from curvkit.linalg.certificate import OtherArithmetic
from curvkit.linalg.recorded import recorded
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.plan import Plan
from curvkit.results import plain
from curvkit.results.journal import Journal

Operator = TypeVar("Operator", bound=BatchwiseOperator)
Around = Callable[[CurvatureOperator], CurvatureOperator]
"""Puts diagonals around a matrix."""


def settled_seed(journal: Journal, seed: int | None) -> int:
    """The seed of the run that is gone on with, or a new one.

    Args:
        journal: Of the measurement.
        seed: As it was asked for; None for any.

    Returns:
        The seed.

    Raises:
        InvalidArgument: If another one was asked for than the run has, or it is out of range.
        RefusedCheckpoint: If what the run has is no seed.
    """
    earlier = journal.fact("seed")
    if earlier is not None and not (type(earlier) is int and 0 <= earlier < seeds.SEED_LIMIT):
        raise RefusedCheckpoint(_damaged("seed", earlier))
    if earlier is not None and seed not in (None, earlier):
        raise InvalidArgument(
            f"seed={seed} is not that of the run that is resumed, {earlier}. Leave it out, or begin anew in another folder."
        )
    return decided(journal, "seed", lambda: seeds.settle(seed))


def decided(journal: Journal, name: str, decide: Callable[[], Any], names: Sequence[str] = ()) -> Any:
    """What an earlier run decided, or else what is decided now.

    Args:
        journal: Of the measurement.
        name: Of the decision.
        decide: Decides; by the memory that is free, for example.
        names: Of the numbers, where it is several.

    Returns:
        A whole number or None, or one for each of the names.

    Raises:
        RefusedCheckpoint: If what the run decided is something else.
    """
    earlier = journal.fact(name)
    if earlier is not None:
        numbers: Any = earlier if names else {"": earlier}
        right = isinstance(numbers, dict) and set(cast(dict[str, Any], numbers)) == set(names or ("",))
        if not right or not all(n is None or (type(n) is int and n >= 0) for n in numbers.values()):
            raise RefusedCheckpoint(_damaged(name, earlier))
        return earlier
    made = decide()
    journal.decide(name, made)
    return made


def in_plan(
    make: Callable[..., Operator], objective: Objective, journal: Journal, name: str, **options: Any
) -> Operator:
    """Make an operator by the plan of an earlier run, so that its products have the same bits, or by a new plan.

    Args:
        make: Its class.
        objective: The function.
        journal: Of the measurement.
        name: Of the operator.
        **options: Of `make`, by which a new plan is chosen.

    Returns:
        The operator. With another number of threads than then its products round in another way.

    Raises:
        RefusedCheckpoint: If what is kept is no plan.
    """
    earlier = journal.fact(f"plan of {name}")
    if earlier is not None:
        return make(objective, plan=replace(_plan(name, earlier), threads=torch.get_num_threads()))
    made = make(objective, **options)
    journal.decide(f"plan of {name}", plain(made.plan))
    return made


def _plan(name: str, said: Any) -> Plan:
    """A plan from plain values, if each is of its type."""
    types = get_type_hints(Plan)
    if not isinstance(said, dict) or set(cast(dict[str, Any], said)) != set(types):
        raise RefusedCheckpoint(_damaged(f"plan of {name}", said))
    plan = Plan(**cast(dict[str, Any], said))
    for field, kind in types.items():
        value, choices = getattr(plan, field), get_args(kind) or (kind,)
        if value not in choices and type(value) not in choices and not (value is None and NoneType in choices):
            raise RefusedCheckpoint(_damaged(f"plan of {name}", said))
    return plan


def _damaged(name: str, said: Any) -> str:
    return (
        f"the state of the run that is resumed is damaged: its {name} is {str(said)[:80]!r}; it must be as curvkit wrote it. Begin anew "
        "with --fresh, or choose another folder."
    )


def kept_around(between: Around, journal: Journal, name: str) -> Around:
    """The same diagonals around a matrix, whose products are kept.

    Args:
        between: Puts them around it.
        journal: Of the measurement.
        name: Of what is made; each matrix gets a number, in the order in which they are made.

    Returns:
        A function like `between`.
    """
    numbers = itertools.count()
    return lambda A: cast(CurvatureOperator, recorded(between(A), journal, f"{name} {next(numbers)}"))


def recorded_arithmetic(other: OtherArithmetic, journal: Journal) -> OtherArithmetic:
    """The same matrix by other arithmetic, with a memory.

    Args:
        other: The maps.
        journal: Of the measurement.

    Returns:
        The maps, whose products are kept.
    """
    reference = None if other.reference is None else recorded(other.reference, journal, "reference")
    perturbed = tuple(recorded(P, journal, f"perturbed {i}") for i, P in enumerate(other.perturbed))
    return OtherArithmetic(reference, perturbed)
