"""Names of weights without what wrappers put into them: DistributedDataParallel, torch.compile, FSDP, activation checkpointing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that only wrappers write; they also stand in the middle, where a submodule was wrapped."""
AT_THE_START = "module"
"""Of DistributedDataParallel, DataParallel and AveragedModel; a model may have a child of that name, so every name must begin with it."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Fitted:
    """Names of a file as a model has them.

    Args:
        names: Name in the file -> name in the model; names that are missing here are left out.
        prefix: What was taken from the beginning; empty if nothing.
        left_out: Names of the file that have no place in the model.
    """

    names: Mapping[str, str]
    prefix: str = ""
    left_out: tuple[str, ...] = ()


def clean(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Take the prefixes of wrappers from names, until none is left.

    Args:
        names: Of all weights of one model.

    Returns:
        Name -> clean name, and the prefixes that were taken away, outermost first. Where two names would become one, the step
        that joins them is not done.

    Cost: linear in the length of the names, times the depth of the wrappers.

    Example:
        >>> clean(["module._orig_mod.0._orig_mod.weight"])
        ({'module._orig_mod.0._orig_mod.weight': '0.weight'}, ('module.', '_orig_mod.'))
        >>> clean(["module.weight", "head.bias"])[1]
        ()
    """
    found = {name: name for name in names}
    removed: list[str] = []
    while True:
        prefix, shorter = _step(found)
        if not prefix or len(set(shorter.values())) < len(shorter) or not all(shorter.values()):
            return found, tuple(removed)
        found = shorter
        if prefix not in removed:
            removed.append(prefix)


def fitted(weights: Iterable[str], own: Collection[str], tied: Mapping[str, Collection[str]] | None = None) -> Fitted:
    """Match names of a file with those of a model.

    The names themselves are tried first, then without wrappers on either side, then without a prefix such as "model." or "net.",
    which is taken away only if every weight of the model is then found.

    Args:
        weights: Names in the file.
        own: Names in the model.
        tied: Own name -> other own names of the same tensor; one of them suffices.

    Returns:
        The match; if there is none, the names as they are.

    Cost: linear in the number of names.

    Example:
        >>> found = fitted(["model.weight", "model.bias", "loss.weight"], ["weight", "bias"])
        >>> found.names["model.bias"], found.prefix, found.left_out
        ('bias', 'model.', ('loss.weight',))
    """
    theirs = list(weights)
    as_they_are = Fitted({name: name for name in theirs})
    if not _missing(as_they_are.names.values(), own, tied):
        return as_they_are
    mine, _ = clean(own)
    back = {short: name for name, short in mine.items()}
    shorter, removed = clean(theirs)
    names = {name: back.get(short, short) for name, short in shorter.items()}
    if not _missing(names.values(), own, tied):
        return Fitted(names, "".join(removed))
    candidates = []
    for prefix in _prefixes(shorter.values(), mine.values()):
        inside = {
            name: back.get(short.removeprefix(prefix), short.removeprefix(prefix))
            for name, short in shorter.items()
            if short.startswith(prefix)
        }
        if not _missing(inside.values(), own, tied):
            candidates.append(Fitted(inside, prefix, tuple(name for name in theirs if name not in inside)))
    return candidates[0] if len(candidates) == 1 else as_they_are


def renamed(weights: Mapping[str, Value], fit: Fitted) -> dict[str, Value]:
    """Weights under the names of the model.

    Args:
        weights: By name in the file.
        fit: As of `fitted`.

    Returns:
        Those that have a place in the model.
    """
    return {fit.names[name]: value for name, value in weights.items() if name in fit.names}


def _step(names: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """One wrapper less: its prefix, and the shorter names; "" if there is none."""
    start = f"{AT_THE_START}."
    if names and all(short.startswith(start) for short in names.values()):
        return start, {name: short.removeprefix(start) for name, short in names.items()}
    for part in ANYWHERE:
        if any(part in short.split(".")[:-1] for short in names.values()):
            return f"{part}.", {name: _without(short, part) for name, short in names.items()}
    return "", {}


def _without(name: str, part: str) -> str:
    *path, last = name.split(".")
    return ".".join([*(word for word in path if word != part), last])


def _missing(found: Iterable[str], own: Collection[str], tied: Mapping[str, Collection[str]] | None) -> list[str]:
    there = set(found)
    return [
        name for name in own if name not in there and not any(other in there for other in (tied or {}).get(name, ()))
    ]


def _prefixes(theirs: Iterable[str], own: Iterable[str]) -> list[str]:
    """Beginnings, up to a dot, after which one of the names is one of the model's: the prefixes that could fit."""
    wanted = set(own)
    found: dict[str, None] = {}
    for name in theirs:
        position = name.find(".")
        while position >= 0:
            if name[position + 1 :] in wanted:
                found[name[: position + 1]] = None
            position = name.find(".", position + 1)
    return list(found)
