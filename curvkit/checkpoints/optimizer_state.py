"""The state of an optimizer, parameter by parameter: moments under the names of the model, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.learning_rates import Rate, rates
from curvkit.checkpoints.optimizer_entries import Held, plain_number
from curvkit.checkpoints.optimizer_kinds import Kind, Unusable, class_name, kind_of
from curvkit.checkpoints.optimizer_numbers import check_entry, check_hyperparameters, untouched
from curvkit.checkpoints.optimizer_order import Order, Shapes, by_position, refuse_foreign
from curvkit.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class ParameterState:
    """What an optimizer keeps of one parameter.

    Args:
        group: Index of its group.
        tensors: "exp_avg", "exp_avg_sq", "momentum_buffer", ...: on the CPU, of the parameter's shape.
        numbers: "step", ...
    """

    group: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """The state of an optimizer of torch.

    Args:
        name: Its class: "SGD", "AdamW", ...; "Adam or AdamW" where the checkpoint does not tell them apart.
        groups: Hyperparameters as plain numbers, tuples and truth values, without the parameters.
        parameters: By name, as in `model.named_parameters()`: those that were trained. A parameter of the model that is missing here
            was frozen, or never had a gradient. SGD has entries without tensors where nothing has to be known of single parameters.
        source: How the names are known, in words.
        certain: False if by their order alone: then another parameter of the same shape could stand at the same place, which
            `curvkit.measures.state_evidence` tests on data.
        rates: Learning rates that the checkpoint tells of, the present one first.
    """

    name: str
    groups: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, ParameterState]
    source: str
    certain: bool
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Unassigned:
    """There is no state that could be used.

    Args:
        reason: One plain sentence without a full stop, which fits after "no stability limit: ".
    """

    reason: str


def optimizer_state(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> OptimizerState | Unassigned:
    """Find the state of every trained parameter.

    Names come first: those that `curvkit.save` or torch.distributed.checkpoint stored, or `param_names` of an optimizer made
    from `model.named_parameters()`. A state without them is a list, and its order is recognised by lengths, shapes and
    weight decay: the groups of Hugging Face's Trainer, of nanoGPT, of timm, or the order of the module. Tensors of one shape could
    stand in each other's place there; `certain` is then False.

    Args:
        checkpoint: As it was read.
        shapes: Of `model.named_parameters()`, in that order; a tied parameter once.

    Returns:
        The state, or why there is none that could be used: never an error for what a file holds, whose weights are fine.

    Raises:
        InvalidArgument: If `shapes` is empty.

    Cost: one pass over the moments.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from curvkit.checkpoints import read, save
        >>> model, path = torch.nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> state = optimizer_state(read(save(path, model=model, optimizer=optimizer)), {n: p.shape for n, p in model.named_parameters()})
        >>> state.name, state.source, state.certain, state.parameters["bias"].numbers
        ('AdamW', 'names stored by curvkit.save', True, {'step': 1.0})
    """
    if not shapes:
        raise InvalidArgument(
            "optimizer_state: shapes is empty, but the model's parameters are needed. "
            "Pass {name: p.shape for name, p in model.named_parameters()}."
        )
    try:
        return _found(checkpoint, {name: tuple(shape) for name, shape in shapes.items()})
    except Unusable as reason:
        return Unassigned(str(reason))


def _found(checkpoint: Checkpoint, own: Shapes) -> OptimizerState:
    raw = checkpoint.optimizer
    if raw is None:
        said = next(
            (note for note in checkpoint.notes if "optimizer" in note), None
        )  # why one that is there was not taken
        raise Unusable(said or "the checkpoint has no state of an optimizer")
    held = Held(raw)
    said = checkpoint.optimizer_said
    kind = kind_of(held.groups, list(held.entries.values()), said)
    check_hyperparameters(kind, held.groups)
    name = class_name(kind, held.groups, said)
    if not held.entries and kind.name != "SGD":
        raise Unusable(f"the optimizer's state is empty: {name} had taken no step")
    order = held.named(checkpoint, own) or _ordered(held, kind, own, checkpoint)
    parameters = dict(_parameters(held, kind, order, own))
    if not parameters and kind.name != "SGD":
        raise Unusable(f"the optimizer's state is empty: {name} had taken no step")
    return OptimizerState(
        name,
        held.groups,
        parameters,
        order.source,
        order.certain or (kind.name == "SGD" and order.grouped),  # which needs to know the groups alone
        rates(held.groups, checkpoint.schedule),
    )


def _ordered(held: Held, kind: Kind, own: Shapes, checkpoint: Checkpoint) -> Order:
    """The order by position, as far as this class of optimizers needs one."""
    shapes = held.shapes()
    _refuse_flat(shapes, own)
    decays = [float(group.get("weight_decay", 0.0)) for group in held.groups]
    if kind.name != "SGD":
        return by_position(shapes, decays, own, checkpoint.kind)
    alike = _alike(held, kind, checkpoint)
    if alike and _complete(held, own):
        refuse_foreign([shape for group in shapes for shape in group], own)
        rest = iter(own)
        names = tuple(tuple(next(rest) for _ in group) for group in shapes)
        return Order(names, "one rule for all parameters", certain=False, grouped=True)
    order = by_position(shapes, decays, own, checkpoint.kind)
    if not alike and not order.certain and not order.grouped:
        raise Unusable(
            f"how the optimizer's {len(held.groups)} groups divide the parameters is not known: it has no names"
        )
    return order


def _complete(held: Held, own: Shapes) -> bool:
    """Whether all parameters of a model are trained: then plain rules need no names."""
    trained = sum(map(len, held.keys))
    return trained == len(own) and len(held.entries) in (0, trained)


def _parameters(held: Held, kind: Kind, order: Order, own: Shapes) -> Iterator[tuple[str, ParameterState]]:
    """The checked state of each trained parameter, in the order of the model."""
    found: dict[str, ParameterState] = {}
    for index, (keys, names) in enumerate(zip(held.keys, order.names, strict=True)):
        for key, name in zip(keys, names, strict=True):
            entry = held.entries.get(key)
            if entry is None:
                if kind.name == "SGD" and (not held.entries or not held.groups[index]["momentum"]):
                    found[name] = ParameterState(index, {}, {})
                continue
            entry = {k: plain_number(v) if k in kind.numbers else v for k, v in entry.items()}
            if untouched(kind, entry, held.groups[index]):
                continue
            check_entry(kind, name, entry, held.groups[index])
            tensors = {k: v.detach().cpu() for k, v in entry.items() if k not in kind.numbers}
            if kind.name == "SGD" and not order.certain:
                tensors = {}
            other = next((k for k, v in tensors.items() if tuple(v.shape) != own[name]), None)
            if other is not None:
                raise Unusable(
                    f"the optimizer's state is of another model: {other} of {brief(name)} has the shape {tuple(tensors[other].shape)}, "
                    f"the parameter {own[name]}"
                )
            found[name] = ParameterState(index, tensors, {k: float(entry[k]) for k in sorted(kind.numbers)})
    for name in own:
        if name in found:
            yield name, found[name]


def _refuse_flat(shapes: Sequence[Sequence[tuple[int, ...] | None]], own: Shapes) -> None:
    """Vectors in place of a model's matrices are parts of what several processes hold."""
    known = [shape for group in shapes for shape in group if shape is not None]
    if known and all(len(shape) == 1 for shape in known) and any(len(shape) > 1 for shape in own.values()):
        largest = max(shape[0] for shape in known)
        if all(shape != (largest,) for shape in own.values()):
            raise Unusable(
                "the optimizer's state is flat, as of parameters that are spread over processes (FSDP, DeepSpeed)"
            )


def _alike(held: Held, kind: Kind, checkpoint: Checkpoint) -> bool:
    """Whether all groups have one rule: hyperparameters, and what they are at every learning rate that is known."""
    if any(len(set(rate.values)) > 1 for rate in rates(held.groups, checkpoint.schedule)):
        return False
    return len({_essence(group, kind) for group in held.groups}) == 1


def _essence(group: Mapping[str, Any], kind: Kind) -> tuple[Any, ...]:
    cycled = (group.get("max_momentum"), group.get("base_momentum"))
    return *(group[name] for name in sorted(kind.hyperparameters)), *map(repr, cycled)
