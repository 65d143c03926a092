"""The two groups that trainers make of a model's parameters: those whose weights decay, and others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
TRAINER, DIMENSIONS = "decay grouping of Hugging Face's Trainer", "decay grouping by dimension, as in nanoGPT"
TIMM = "decay grouping of timm"
SORTED = "decay grouping with sorted names, as in minGPT"
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names whose parameters the Trainer does not decay: its own patterns, of version 5; layers are told by type there."""


def groupings(
    groups: Sequence[Sequence[Shape | None]], decays: Sequence[float], own: Shapes, kind: str
) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    """Two groups as trainers make them: parameters whose weights decay, and others.

    Args:
        groups: Shapes of the states, per group.
        decays: `weight_decay` of the groups.
        own: Names and shapes of the model's parameters, in its order.
        kind: What wrote the checkpoint, which says what a grouping is called.

    Returns:
        Per way: what it is called, and the parameters of each group in order; none where there are not two groups.

    Example:
        >>> own = {"a.weight": (4, 3), "a.bias": (4,)}
        >>> groupings([[None], [None]], [0.1, 0.0], own, "training dict")[0]
        ('decay grouping by dimension, as in nanoGPT', (('a.weight',), ('a.bias',)))
    """
    if len(groups) != 2:
        return []
    vectors = {name for name, shape in own.items() if len(shape) < 2}
    if decays[0] == 0 < decays[1]:
        without = {name for name in own if name in vectors or name.endswith(".bias")}
        return [(TIMM, (_only(own, without), _without(own, without)))]
    if decays[1] != 0:
        return []
    named = {name for name in own if NO_DECAY.search(name.lower())}
    norms = _norms(own)
    old = {name for name in own if "bias" in name} | norms
    rules: list[tuple[str, set[str]]] = [(TRAINER, named | norms), (TRAINER, named), (TRAINER, old)]
    rules.insert(len(rules) if kind.startswith(("Hugging Face", "PEFT")) else 0, (DIMENSIONS, vectors))
    made = [(source, (_without(own, less), _only(own, less))) for source, less in rules]
    ordered = dict(sorted(own.items()))
    return [*made, (SORTED, (_without(ordered, vectors), _only(ordered, vectors)))]


def _norms(own: Shapes) -> set[str]:
    """Weights of layers that have nothing but a vector to scale and perhaps one to shift: normalisation."""
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in own.items():
        prefix, _, last = name.rpartition(".")
        layers.setdefault(prefix, {})[last] = shape
    return {
        f"{prefix}.weight"
        for prefix, held in layers.items()
        if prefix
        and len(held.get("weight", ())) == 1
        and set(held) <= {"weight", "bias"}
        and len(set(held.values())) == 1
    }


def _only(own: Iterable[str], names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in own if name in names)


def _without(own: Iterable[str], names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in own if name not in names)
