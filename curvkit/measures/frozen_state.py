"""The frozen state of an optimizer, laid out along the parameters of a space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.checkpoints.optimizer_state import OptimizerState, ParameterState
from curvkit.errors import InvalidArgument
from curvkit.measures.frozen_steps import FrozenStep, frozen_step, refusal
from curvkit.parameters import Entry, ParameterSpace

Diagonal = Tensor | float
"""[n], or one number for all coordinates."""
SAME = 1e-9
"""Numbers of two parameters that differ by less than this, relatively, are the same."""


@dataclass(frozen=True)
class NoLimit:
    """Why there is no limit of stability to compare with."""

    reason: str
    """A clause."""


@dataclass(frozen=True, eq=False)
class FrozenState:
    """The frozen steps of the parameters of a space, in order, with their learning rates."""

    space: ParameterSpace
    steps: tuple[FrozenStep | None, ...]
    """None for a parameter that the optimizer does not move: it is held fixed."""
    lrs: tuple[float, ...]
    """0 for such a parameter."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: OptimizerState, space: ParameterSpace, rates: Sequence[float]) -> FrozenState | NoLimit:
        """Find each parameter's step.

        Args:
            state: Options of the groups, and what is kept of each parameter.
            space: Order of the parameters.
            rates: Learning rate of each group.

        Returns:
            The steps, or why there is no limit.

        Raises:
            InvalidArgument: If there are not as many rates as groups.
        """
        if len(rates) != len(state.groups):
            raise InvalidArgument(
                f"Update: {len(rates)} learning rates were given for {len(state.groups)} groups of parameters. Pass one for each group."
            )
        reason = refusal(state) or _unusable(rates)
        if reason is not None:
            return NoLimit(reason)
        found = [_found(state, entry) for entry in space.entries]
        try:
            steps = [None if it is None else frozen_step(state.name, state.groups[it.group], it) for it in found]
        except KeyError as missing:
            return NoLimit(f"the optimizer's state has no {missing}, which {state.name} always keeps")
        if not any(found):
            return NoLimit("none of these parameters is the optimizer's")
        if not any(steps):
            return NoLimit("the optimizer has not made a step")
        bad = _first_not_positive(space, steps)
        if bad is not None:
            return NoLimit(
                f"what the optimizer divides the steps of {bad!r} by has entries that are zero, NaN or infinite"
            )
        moved = [None if step is None else it for it, step in zip(found, steps, strict=True)]
        lrs = [0.0 if it is None else float(rates[it.group]) for it in moved]
        return cls(space, tuple(steps), tuple(lrs), (*_unmoved(space, moved), *_doubtful(state)))

    @property
    def moved(self) -> list[tuple[FrozenStep, float]]:
        """The steps that there are, with their learning rates."""
        return [(step, lr) for step, lr in zip(self.steps, self.lrs, strict=True) if step is not None]

    @property
    def adaptive(self) -> bool:
        """Whether there is a preconditioner."""
        return any(isinstance(step.multiplier, Tensor) for step, _ in self.moved)

    @property
    def gain(self) -> float | None:
        """What gets through the momentum, if it is the same for all parameters."""
        return common([step.gain for step, _ in self.moved])

    @property
    def one_rate(self) -> bool:
        """Whether all parameters that are moved have the same learning rate."""
        return common([lr for _, lr in self.moved]) is not None

    def joined(
        self,
        part: Callable[[FrozenStep, float], Diagonal],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        fixed: float | None = None,
    ) -> Diagonal:
        """Join a part of each step.

        Args:
            part: Of a step and its learning rate.
            dtype: Of the diagonal.
            device: Of the diagonal.
            fixed: What it is for parameters that are not moved; None where that does not matter.

        Returns:
            One number if it is the same everywhere, a diagonal [n] otherwise.
        """
        values = [fixed if s is None else part(s, lr) for s, lr in zip(self.steps, self.lrs, strict=True)]
        numbers = [value for value in values if isinstance(value, float)]
        if len(numbers) + values.count(None) == len(values):
            same = common(numbers)
            if same is not None:
                return same
        whole = torch.zeros(self.space.n, dtype=dtype, device=device)
        for target, value in zip(self.space.split(whole), values, strict=True):
            if isinstance(value, Tensor):
                target.copy_(value)
            elif value is not None:
                target.fill_(value)
        return whole

    def idle(self, *, device: torch.device | str) -> Tensor | None:
        """Mark the coordinates whose second moment is next to nothing.

        Args:
            device: Of the result.

        Returns:
            [n] bool; None if there are none.
        """
        if not any(step.idle is not None and bool(step.idle.any()) for step, _ in self.moved):
            return None
        whole = torch.zeros(self.space.n, dtype=torch.bool, device=device)
        for target, step in zip(self.space.split(whole), self.steps, strict=True):
            if step is not None and step.idle is not None:
                target.copy_(step.idle)
        return whole


def common(values: Sequence[float]) -> float | None:
    """The value that all are, up to rounding.

    Args:
        values: At least one.

    Returns:
        The first of them; None if they differ.

    Example:
        >>> common([0.1, 0.1]), common([0.1, 0.2])
        (0.1, None)
    """
    least, most = min(values), max(values)
    return values[0] if most - least <= SAME * max(abs(least), abs(most)) else None


def _found(state: OptimizerState, entry: Entry) -> ParameterState | None:
    """What the optimizer keeps of a parameter, under any of its names."""
    return next((state.parameters[name] for name in (entry.name, *entry.aliases) if name in state.parameters), None)


def _unusable(rates: Sequence[float]) -> str | None:
    bad = next((rate for rate in rates if not (math.isfinite(rate) and rate >= 0.0)), None)
    if bad is not None:
        return f"a learning rate of the optimizer is {bad:g}"
    return None if any(rates) else "the optimizer's learning rate is 0"


def _first_not_positive(space: ParameterSpace, steps: Sequence[FrozenStep | None]) -> str | None:
    """The first parameter whose multiplier is no positive number everywhere."""
    for entry, step in zip(space.entries, steps, strict=True):
        if step is not None:
            m = torch.as_tensor(step.multiplier)
            if not bool((torch.isfinite(m) & (m > 0.0)).all()):
                return entry.name
    return None


def _unmoved(space: ParameterSpace, moved: Sequence[ParameterState | None]) -> tuple[str, ...]:
    """Say which parameters are held fixed."""
    names = [entry.name for entry, it in zip(space.entries, moved, strict=True) if it is None]
    if not names:
        return ()
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (f"held fixed, because the optimizer has no state of them: {names[0]}{more}",)


def _doubtful(state: OptimizerState) -> tuple[str, ...]:
    if state.certain:
        return ()
    return (f"the moments were assigned to parameters by their order alone ({state.source})",)
