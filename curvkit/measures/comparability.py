"""Whether several objectives are the same function at different points: same parameters, loss, mode and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.losses.batches import cast
from curvkit.losses.sameness import difference
from curvkit.objectives import Objective
from curvkit.objectives.data import fingerprint
from curvkit.parameters import ParameterSpace

SHOWN = 3
"""So many names of each kind are listed in a message."""


def comparable(objectives: Mapping[str, Objective] | Sequence[Objective]) -> dict[str, Objective]:
    """Check that objectives differ in their weights alone, and bring them to one precision and the same batches.

    Args:
        objectives: By name, or in order; the first is the reference.

    Returns:
        By name, in order; objectives of a sequence are called 1, 2, and so on.

    Raises:
        InvalidArgument: If there are fewer than two, or they lie on different devices.
        UnknownObjective: If parameters, loss, mode or data differ.

    Example:
        >>> import torch.nn.functional as F
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))]
        >>> list(comparable([Objective(torch.nn.Linear(2, 1), F.mse_loss, data) for _ in range(2)]))
        ['1', '2']
    """
    named = (
        dict(objectives)
        if isinstance(objectives, Mapping)
        else {str(number): it for number, it in enumerate(objectives, start=1)}
    )
    if len(named) < 2:
        raise InvalidArgument(
            f"compare: {len(named)} objective{'' if len(named) == 1 else 's'} given, at least two are compared. For one alone use "
            "curvkit.measures.sharpness and trace."
        )
    first, *others = named
    for name in others:
        _refuse_other_parameters((first, named[first].parameters), (name, named[name].parameters))
    devices = {name: str(it.device) for name, it in named.items()}
    if len(set(devices.values())) > 1:
        shown = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InvalidArgument(
            f"compare: the objectives lie on different devices ({shown}). Move them to one with objective.converted(device=...)."
        )
    raised = {name: it.raised() for name, it in named.items()}
    widest = reduce(torch.promote_types, (it.dtype for it in raised.values()))
    for name in others:
        _refuse_other_function((first, raised[first]), (name, raised[name]))
    same = {name: it.converted(dtype=widest) for name, it in raised.items()}
    batches = same[first].batches
    return {name: it if name == first else it.with_batches(batches) for name, it in same.items()}


def other_model(objective: Objective, reference: Objective) -> str | None:
    """Say where two models with the same parameters are printed differently, as with another activation.

    Args:
        objective: One.
        reference: The other.

    Returns:
        A sentence with the first line that differs; None if there is none.
    """
    here, there = (str(it.model).splitlines() for it in (objective, reference))
    pair = next(((a, b) for a, b in zip(here, there, strict=False) if a != b), None)
    if pair is None and len(here) == len(there):
        return None
    shown = f"{pair[0].strip()}, there {pair[1].strip()}" if pair else f"{len(here)} lines, there {len(there)}"
    return f"the model is printed otherwise than the reference's: {shown}. The parameters are the same, the function may be another one"


def _refuse_other_parameters(reference: tuple[str, ParameterSpace], other: tuple[str, ParameterSpace]) -> None:
    (first, space), (name, its) = reference, other
    here, there = ({entry.name: entry.shape for entry in it.entries} for it in (its, space))
    if list(here.items()) == list(there.items()):
        return
    facts = []
    for owner, only in ((first, [n for n in there if n not in here]), (name, [n for n in here if n not in there])):
        if only:
            facts.append(f"only in {owner}: {_listed(only)}")
    shapes = [f"{n} {list(there[n])} and {list(here[n])}" for n in there if n in here and here[n] != there[n]]
    if shapes:
        facts.append(f"other shapes: {_listed(shapes)}")
    raise UnknownObjective(
        f"compare: {name} has other parameters than {first}: {'; '.join(facts) or 'in another order'}. Checkpoints of one model with the "
        "same trainable parameters can be compared; leave out what is of another one, or choose what they share with patterns."
    )


def _refuse_other_function(reference: tuple[str, Objective], other: tuple[str, Objective]) -> None:
    (first, it), (name, its) = reference, other
    unlike = difference(its.loss, it.loss)
    if unlike is not None:
        raise UnknownObjective(
            f"compare: {name} is measured by another loss than {first}: {unlike}. Numbers of different losses do not compare; measure "
            "all by one objective."
        )
    if it.mode != its.mode:
        raise UnknownObjective(
            f"compare: the model of {name} is in {its.mode} mode, that of {first} in {it.mode} mode. Call eval() on all, or train()."
        )
    narrowest = min(
        it.dtype, its.dtype, key=lambda dtype: dtype.itemsize
    )  # data that a model of another precision was given
    prints = {fingerprint(cast(batch, dtype=narrowest) for batch in one.batches) for one in (it, its)}
    if len(prints) > 1:
        raise UnknownObjective(
            f"compare: {name} is measured on other data than {first}: {_data(its)}, there {_data(it)}, and their bytes differ. Curvature "
            "depends on the data, so that a difference would be that of the data; give all of them the same, for example with one function."
        )


def _data(objective: Objective) -> str:
    count = len(objective.batches)
    examples = "" if objective.examples is None else f"{objective.examples:,} examples in "
    return f"{examples}{count} batch{'es' if count != 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
