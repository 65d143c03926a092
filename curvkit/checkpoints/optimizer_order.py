"""Which parameters the positions in an optimizer's state are: by names where there are some, else by an order that fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from curvkit.checkpoints.decay_groupings import SORTED, Shape, Shapes, groupings
from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.names import clean
from curvkit.checkpoints.optimizer_kinds import Unusable

MODULE = "order of the module"


@dataclass(frozen=True)
class Order:
    """Names of parameters in the order of an optimizer's state.

    Args:
        names: Per group.
        source: In words, how they are known.
        certain: Whether no other parameter could stand at any of the positions.
        grouped: Whether it is certain at least which group each of them belongs to: all parameters of one shape are in the same one.
    """

    names: tuple[tuple[str, ...], ...]
    source: str
    certain: bool
    grouped: bool


def by_names(names: Sequence[Sequence[str]], own: Shapes, tied: Mapping[str, str], source: str) -> Order:
    """Match names that were stored with those of a model.

    Args:
        names: Per group, with or without what wrappers put into them.
        own: Of the model.
        tied: Further names of the model's tensors -> those in `own`.
        source: In words.

    Returns:
        The order, which is certain.

    Raises:
        Unusable: If a name is not the model's, or stands twice.

    Cost: linear in the number of names, times that of prefixes that could fit.

    Example:
        >>> by_names([["module.w"], ["module.b"]], {"w": (2, 2), "b": (2,)}, {}, "stored").names
        (('w',), ('b',))
    """
    flat = [name for group in names for name in group]
    wanted = {**{name: name for name in own}, **tied}
    for renamed in _renamings(flat, wanted):
        found = [wanted[short] for short in renamed if short in wanted]
        if len(found) < len(flat):
            continue
        if len(set(found)) < len(found):
            twice = next(name for name, count in Counter(found).items() if count > 1)
            raise Unusable(f"{brief(twice)} stands twice in the optimizer's groups")
        rest = iter(found)
        return Order(tuple(tuple(next(rest) for _ in group) for group in names), source, True, True)
    foreign = next((name for name in flat if name not in wanted), "")
    raise Unusable(f"the optimizer trains {brief(foreign)}, which the model does not have")


def by_position(groups: Sequence[Sequence[Shape | None]], decays: Sequence[float], own: Shapes, kind: str) -> Order:
    """Find the one order of a model's parameters that fits.

    Tried are the two groups that trainers make, parameters whose weights decay and others, each in the order of the module; and all
    groups one after the other in that order. Where the state has fewer parameters than the model, some may have been frozen: then
    there must be a single way to leave parameters out.

    Args:
        groups: Shapes of the states, per group; None where the state does not show it.
        decays: `weight_decay` of the groups.
        own: Names and shapes of the model's parameters, in its order.
        kind: What wrote the checkpoint, which says what a grouping is called.

    Returns:
        The order.

    Raises:
        Unusable: If none fits, or several do.

    Cost: the number of positions times that of the model's parameters where some are left out, else linear.

    Example:
        >>> own = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.bias": (2,)}
        >>> by_position([[(4, 3), (2, 4)], [(4,), (2,)]], [0.1, 0.0], own, "training dict").names
        (('a.weight', 'b.weight'), ('a.bias', 'b.bias'))
    """
    trained = sum(map(len, groups))
    if trained > len(own):
        raise Unusable(
            f"the optimizer's state is of another model: it trains {trained} parameters, the model has {len(own)}"
        )
    refuse_foreign([shape for group in groups for shape in group], own)
    wanted = [shape for group in groups for shape in group]
    sure, grouped = _sure(wanted, own), _apart(groups, own)
    found: dict[tuple[tuple[str, ...], ...], Order] = {}
    for source, pools in groupings(groups, decays, own, kind):
        if source == SORTED and found:
            continue
        placed = [_placed(pool, group, own) for pool, group in zip(pools, groups, strict=True)]
        if all(place is not None for place in placed):
            names = tuple(place for place in placed if place is not None)
            found.setdefault(names, Order(names, source, sure, grouped))
    flat = _placed(tuple(own), wanted, own)
    if flat is not None and not (found and all(shape is None for shape in wanted)):  # without shapes any division fits
        rest = iter(flat)
        names = tuple(tuple(next(rest) for _ in group) for group in groups)
        found.setdefault(names, Order(names, MODULE, sure, grouped))
    if len(found) == 1:
        return next(iter(found.values()))
    raise Unusable(_unclear(groups, own, [order.source for order in found.values()]))


def refuse_foreign(wanted: Iterable[Shape | None], own: Shapes) -> None:
    """Refuse shapes that a model has not, or not so often.

    Args:
        wanted: Of the states of parameters; None where a state does not show it.
        own: Of the model's parameters.

    Raises:
        Unusable: Naming the first such shape.

    Example:
        >>> refuse_foreign([(2, 2)], {"w": (2, 2)})
    """
    there = Counter(own.values())
    for shape, count in Counter(shape for shape in wanted if shape is not None).items():
        if count > there[shape]:
            raise Unusable(
                f"the optimizer's state is of another model: of the shape {shape} it has {count}, the model {there[shape] or 'none'}"
            )


def _renamings(names: Sequence[str], wanted: Mapping[str, str]) -> Iterable[Sequence[str]]:
    """The names as they are, then without wrappers on either side, then without one prefix."""
    yield names
    shorter, _ = clean(names)
    mine, _ = clean(wanted)
    back = {short: name for name, short in mine.items()}
    yield [back.get(shorter[name], shorter[name]) for name in names]
    first = shorter[names[0]] if names else ""
    inside = [p for p in _prefixes(first) if all(shorter[name].removeprefix(p) in back for name in names)]
    inside = [p for p in inside if all(shorter[name].startswith(p) for name in names)]
    if len(inside) == 1:
        yield [back[shorter[name].removeprefix(inside[0])] for name in names]


def _prefixes(name: str) -> list[str]:
    return [name[: index + 1] for index, letter in enumerate(name) if letter == "."]


def _placed(pool: Sequence[str], wanted: Sequence[Shape | None], own: Shapes) -> tuple[str, ...] | None:
    """The names of a pool at which the shapes stand, in order; None if they fit nowhere, or in several ways."""
    if len(wanted) == len(pool):
        fits = all(shape is None or shape == own[name] for name, shape in zip(pool, wanted, strict=True))
        return tuple(pool) if fits else None
    if not wanted:
        return ()
    if len(wanted) > len(pool) or None in wanted:
        return None
    first = _embedded(pool, wanted, own)
    last = _embedded(pool[::-1], wanted[::-1], own)
    return first if first is not None and last is not None and first == last[::-1] else None


def _embedded(pool: Sequence[str], wanted: Sequence[Shape | None], own: Shapes) -> tuple[str, ...] | None:
    """The earliest names at which the shapes stand in order; the latest ones are another choice unless the choice is the only one."""
    found: list[str] = []
    for name in pool:
        if len(found) < len(wanted) and own[name] == wanted[len(found)]:
            found.append(name)
    return tuple(found) if len(found) == len(wanted) else None


def _sure(wanted: Sequence[Shape | None], own: Shapes) -> bool:
    """Whether the model has every shape once, so that no other parameter could stand at its place, whatever the order and the groups."""
    there = Counter(own.values())
    return all(shape is not None and there[shape] == 1 for shape in wanted)


def _apart(groups: Sequence[Sequence[Shape | None]], own: Shapes) -> bool:
    """Whether every shape is in one group only, as often as the model has it, so that no parameter could be in another group."""
    there = Counter(own.values())
    held = [(shape, count) for group in groups for shape, count in Counter(group).items()]
    return all(shape is not None and count == there[shape] for shape, count in held)


def _unclear(groups: Sequence[Sequence[Shape | None]], own: Shapes, fitting: Sequence[str]) -> str:
    trained = sum(map(len, groups))
    if len(fitting) > 1:
        return (
            f"more than one order of parameters fits the optimizer's state ({'; '.join(fitting)}), and it has no names"
        )
    if trained < len(own):
        return f"the optimizer trains {trained} of the model's {len(own)} parameters, and which ones is not known: it has no names"
    if len(groups) > 1:
        return f"how the optimizer's {len(groups)} groups divide the parameters is not known: it has no names"
    return "the shapes in the optimizer's state are those of the model in another order, and it has no names"
