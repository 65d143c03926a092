"""What a recorded call was: the parameters in it, what went in, and where its gradient arrives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit.estimators.rules.forms import Form, summed_in_chunks
from curvkit.estimators.rules.row_runs import Rows
from curvkit.estimators.rules.rule_parts import Rule


@dataclass(frozen=True, eq=False)
class Use:
    """A call, the parameters in it, and what came out."""

    forms: tuple[Form, ...]
    output: Any
    """The edge of the graph where dL/dz arrives, whatever is written over z later: an input of torch.autograd.grad."""
    shape: tuple[int, ...]
    """Of z."""
    kind: Tensor
    """A tensor of the dtype and on the device of z."""
    inputs: tuple[Tensor, ...] = ()
    """Tensors that went in beside the parameters."""
    versions: tuple[int, ...] = ()
    """Of `inputs`, as they went in."""

    @property
    def overwritten(self) -> bool:
        """Whether something was written over an input since, so that it is no longer what went in."""
        return any(x._version != before for x, before in zip(self.inputs, self.versions, strict=True))


@dataclass(frozen=True, eq=False)
class Call:
    """What a function was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]
    """Tensors among both."""

    @property
    def plain(self) -> bool:
        """Whether there are two arguments and no option."""
        return len(self.args) == 2 and not self.kwargs


@dataclass(frozen=True, eq=False)
class Common:
    """The output of a call that is the same for all examples, as positions are that are looked up once."""

    output: Tensor
    rule: Rule
    call: Call
    names: set[str]
    reason: str

    @property
    def without_ones(self) -> tuple[int, ...]:
        """Its shape for one example."""
        shape = tuple(self.output.shape)
        return shape[1:] if shape and shape[0] == 1 else shape


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walk over the tensors in what a function is given, or returns.

    Args:
        value: Anything; tuples, lists and dictionaries are looked into.

    Yields:
        Each tensor.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:  # type: ignore[assignment]
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():  # type: ignore[assignment]
            yield from tensors_in(part)


def grouped(uses: Iterable[Use], gradients: Iterable[Tensor | None]) -> dict[str, list[tuple[Form, Tensor]]]:
    """Sort the uses by parameters.

    Args:
        uses: Of a recording.
        gradients: dL/dz of each; None where L does not depend on it.

    Returns:
        For each parameter its forms, with dL/dz.
    """
    found: dict[str, list[tuple[Form, Tensor]]] = {}
    for use, g in zip(uses, gradients, strict=True):
        if g is not None:
            for form in use.forms:
                found.setdefault(form.name, []).append((form, g))
    return found


def summed_squares(uses: list[tuple[Form, Tensor]]) -> Tensor:
    """Add up the squares of the gradients of single examples for one parameter, over all its uses.

    Args:
        uses: Its forms with dL/dz.

    Returns:
        sum_n (sum of dL/dW of example n over the uses)^2.
    """
    if len(uses) == 1:
        form, g = uses[0]
        return form.squares(g)
    rows = sorted((form.rows.start, form.rows.stop) for form, _ in uses if isinstance(form, Rows))
    if len(rows) == len(uses) and all(one[1] <= two[0] for one, two in itertools.pairwise(rows)):
        return sum((form.squares(g) for form, g in uses), start=torch.zeros(()))
    size = uses[0][0].written * uses[0][1].element_size()

    def part(piece: slice) -> Tensor:
        written = [form.gradients(g, piece) for form, g in uses]
        return sum(written[1:], start=written[0]).square().sum(0)

    first, g = uses[0]
    return summed_in_chunks(len(first.outgoing(g)), size, g.device, part)
