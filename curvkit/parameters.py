"""Which parameters span the space, in which order, and the only conversion between names and one flat vector."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnsupportedModel


@dataclass(frozen=True)
class Entry:
    """One parameter of a space: its first name, its shape and where it starts in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    aliases: tuple[str, ...] = ()
    """Further names of the same tensor (tied weights); it is counted once."""

    @property
    def numel(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """An ordered set of parameters of a model, seen as R^n.

    The order is that of `model.named_parameters()`; a tensor with several names (tied weights) is one entry under its
    first name. Only floating-point leaves that require a gradient belong to it by default.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 3))
        >>> space.n, space.names
        (9, ('weight', 'bias'))
        >>> space.flatten(space.unflatten(torch.arange(9.0))).tolist()[:3]
        [0.0, 1.0, 2.0]
    """

    entries: tuple[Entry, ...]
    frozen: tuple[str, ...] = ()
    """Names left out because they do not require a gradient."""
    excluded: tuple[str, ...] = ()
    """Names left out by the patterns."""

    @classmethod
    def of(cls, model: nn.Module, patterns: Sequence[str] | str | None = None) -> ParameterSpace:
        """Take the trainable parameters of a model, all of them or those whose name matches.

        Args:
            model: The module whose `named_parameters()` are read; nothing of it is kept.
            patterns: Shell patterns as of `fnmatch`, matched against any of a parameter's names; None takes all.

        Returns:
            The space.

        Raises:
            InvalidArgument: If nothing is left, or a pattern matches no name.
            UnsupportedModel: If a trainable parameter is complex, sparse, or not yet materialised.
        """
        chosen, frozen, excluded, offset = [], [], [], 0
        wanted = _patterns(patterns)
        for names, parameter in _distinct(model):
            if not parameter.requires_grad:
                frozen.append(names[0])
                continue
            _check_kind(names[0], parameter)
            if wanted is not None and not any(fnmatch.fnmatchcase(n, p) for n in names for p in wanted):
                excluded.append(names[0])
                continue
            entry = Entry(names[0], tuple(parameter.shape), offset, tuple(names[1:]))
            chosen.append(entry)
            offset += entry.numel
        _check_choice(chosen, frozen, excluded, wanted)
        return cls(tuple(chosen), tuple(frozen), tuple(excluded))

    @cached_property
    def n(self) -> int:
        """Number of coordinates."""
        return sum(entry.numel for entry in self.entries)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """First names, in order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Each further name of a tied parameter, with the name under which it is counted."""
        return {alias: entry.name for entry in self.entries for alias in entry.aliases}

    def tensors(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The model's own tensors, in order.

        Args:
            model: A module with these parameters.

        Returns:
            One tensor per entry; the parameters themselves, not copies.

        Raises:
            InvalidArgument: If a parameter is missing or has another shape.
        """
        found = dict(model.named_parameters(remove_duplicate=False))
        for entry in self.entries:
            if entry.name not in found or tuple(found[entry.name].shape) != entry.shape:
                got = tuple(found[entry.name].shape) if entry.name in found else "no such parameter"
                raise InvalidArgument(
                    f"ParameterSpace: parameter {entry.name!r} of shape {entry.shape} was expected, the model has {got}. "
                    "Make the space from this model: ParameterSpace.of(model)."
                )
        return tuple(found[entry.name] for entry in self.entries)

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Join parameter-shaped tensors to one vector.

        Args:
            named: One tensor for each name of the space, of its shape.

        Returns:
            [n]; a copy.

        Raises:
            InvalidArgument: If the names or a shape differ from the space's.
        """
        if set(named) != set(self.names):
            missing, unexpected = sorted(set(self.names) - set(named)), sorted(set(named) - set(self.names))
            raise InvalidArgument(
                f"ParameterSpace.flatten: missing {missing[:5]}, unexpected {unexpected[:5]}. "
                "Pass one tensor for each of `space.names`."
            )
        for entry in self.entries:
            if tuple(named[entry.name].shape) != entry.shape:
                raise InvalidArgument(
                    f"ParameterSpace.flatten: {entry.name!r} has shape {tuple(named[entry.name].shape)}, "
                    f"its parameter {entry.shape}. Pass parameter-shaped tensors."
                )
        return self.join([named[name] for name in self.names])

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Join tensors that are already in order to one vector [n]; no checks, one copy.

        Args:
            tensors: One per entry, in order; sparse gradients are made dense.

        Returns:
            [n].
        """
        return torch.cat([(tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1) for tensor in tensors])

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """Cut a vector into parameter-shaped views, in order.

        Args:
            flat: [n].

        Yields:
            One view per entry.

        Raises:
            InvalidArgument: If `flat` is not of shape [n].
        """
        if flat.shape != (self.n,):
            raise InvalidArgument(
                f"ParameterSpace: a vector of shape {tuple(flat.shape)} was given, this space has n = {self.n}. "
                f"Pass a tensor of shape [{self.n}]."
            )
        for entry in self.entries:
            yield flat[entry.offset : entry.offset + entry.numel].view(entry.shape)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Name the pieces of a vector.

        Args:
            flat: [n].

        Returns:
            One view per name, parameter-shaped.
        """
        return dict(zip(self.names, self.split(flat), strict=True))


def _distinct(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Each parameter tensor once, with all its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    for key, parameter in tensors.items():
        yield names[key], parameter


def _patterns(patterns: Sequence[str] | str | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check_kind(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, nn.UninitializedParameter):
        raise UnsupportedModel(
            f"ParameterSpace: parameter {name!r} has no shape yet (a lazy module). "
            "Run the model once on a batch, then build the space."
        )
    if not parameter.dtype.is_floating_point:
        raise UnsupportedModel(
            f"ParameterSpace: parameter {name!r} has dtype {parameter.dtype}; curvature is defined here for real floating-point "
            "parameters. Freeze it with requires_grad_(False), or select others with patterns."
        )
    if parameter.layout is not torch.strided:
        raise UnsupportedModel(
            f"ParameterSpace: parameter {name!r} has layout {parameter.layout}; only dense parameters are supported. "
            "Convert it with to_dense(), or freeze it with requires_grad_(False)."
        )


def _check_choice(chosen: list[Entry], frozen: list[str], excluded: list[str], wanted: tuple[str, ...] | None) -> None:
    if wanted is not None:
        names = [name for entry in chosen for name in (entry.name, *entry.aliases)]
        for pattern in wanted:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                shown = ", ".join((*[entry.name for entry in chosen], *excluded)[:8])
                raise InvalidArgument(
                    f"ParameterSpace: the pattern {pattern!r} matches no trainable parameter. The model has: {shown or 'none'}"
                    f"{' ...' if len(chosen) + len(excluded) > 8 else ''}. Patterns are shell patterns, for example '*.weight'."
                )
    if not chosen or sum(entry.numel for entry in chosen) == 0:
        if wanted is not None and not wanted:
            raise InvalidArgument(
                "ParameterSpace: the list of patterns is empty, so that no parameter is chosen. Pass None for all, or patterns such "
                "as '*.weight'."
            )
        state, advice = "it has no floating-point parameters", "Pass a model that has some."
        if frozen:
            state, advice = (
                f"all {len(frozen)} of its parameters are frozen",
                "Call requires_grad_(True) on those to measure.",
            )
        raise InvalidArgument(f"ParameterSpace: the model has no trainable parameter: {state}. {advice}")
