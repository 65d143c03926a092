"""The second moment of an optimizer: free, and no curvature."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.optimizer_state import OptimizerState as StoredState
from curvkit.checkpoints.optimizer_state import Unassigned
from curvkit.errors import InvalidArgument
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.optimizer_state_moments import INSTEAD, Kept, moment_of, notes, second_moment
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate

COPIES = 3.0
"""Of the parameters: the result, and two temporaries of its largest tensor, which may be all of it."""


@dataclass(frozen=True)
class OptimizerState:
    """The second moment that Adam and its relatives keep: a running mean of squared gradients of mini-batches.

        v_t = beta v_(t-1) + (1 - beta) g_t * g_t,    d = v_t / (1 - beta^t)
        E g_B * g_B = g * g + Var_1 / B,    Var_1: the variance of the gradient of one example, diag E_(true labels) - g * g

    It costs nothing, and is no curvature. With true targets, mini-batches of B examples and a small mean gradient, B d is about the
    diagonal of the empirical Fisher matrix; where the mean gradient dominates it is g * g. The mean is over weights of about the last
    1 / (1 - beta) steps, not at these weights alone, and over gradients as the optimizer got them: clipped, and averaged over processes,
    where that was done. B is not in the state.

    Known are Adam, AdamW, NAdam, RAdam (exp_avg_sq, beta = betas[1]), RMSprop (square_avg, alpha), Adadelta (square_avg, rho) and Adagrad
    (a sum over all steps: d = (s_t - s_0) / t). Others have no mean of squares for each parameter, and are refused by name.

    Three doors. Live: `from_optimizer(optimizer, objective)` finds each parameter by identity. From a checkpoint:
    `from_state(state, objective)` with what `curvkit.checkpoints.optimizer_state.optimizer_state` reads. And, where an estimator is asked
    for, `OptimizerState(source=optimizer or state).estimate(objective)`.

    Args:
        bias_correction: Whether the zeros at the beginning are taken out. False: as the optimizer keeps it, refused for a sum.
        source: The optimizer, or a state with names, that `estimate` reads; it is data and no option: repr does not show it.

    Source: Kingma & Ba (2015), "Adam", for v and its correction.
    Cost: none in gradients; one pass over the parameters.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(x).sum().backward()     # the gradient is x
        >>> optimizer.step()
        >>> found = OptimizerState().from_optimizer(optimizer, Objective(model, F.mse_loss, [(x, x[:, :1])]))
        >>> found.matrix, [round(value, 3) for value in found.values["weight"][0].tolist()]
        ('second_moment', [1.0, 4.0])
    """

    bias_correction: bool = True
    source: torch.optim.Optimizer | StoredState | None = field(default=None, repr=False, compare=False)
    matrix: ClassVar[str] = "second_moment"

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.bias_correction, bool):
            raise InvalidArgument(
                f"OptimizerState: bias_correction={self.bias_correction!r} must be True or False. The default is True."
            )
        if not isinstance(self.source, torch.optim.Optimizer | StoredState | None):
            raise InvalidArgument(
                f"OptimizerState: source is a {type(self.source).__name__}; it must be an optimizer of torch, a state that "
                "curvkit.checkpoints.optimizer_state.optimizer_state has read, or None. Of a wrapper pass the optimizer inside."
            )

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Read the second moment out of `source`; see the class.

        Args:
            objective: Its parameters are read; the model is not run.
            seed: Not used; nothing is drawn.

        Returns:
            The second moment, without standard errors.

        Raises:
            InvalidArgument: If there is no source, or it is of another model.
            UnsupportedModel: If the optimizer keeps no such mean, or not for each parameter.
            CurvkitError: If the state has entries that no run leaves.
        """
        if isinstance(self.source, torch.optim.Optimizer):
            return self.from_optimizer(self.source, objective)
        if self.source is None:
            raise InvalidArgument(
                "OptimizerState: estimate has no state to read. Call from_optimizer(optimizer, objective), from_state(state, objective) "
                "with the state of a checkpoint, or make it with OptimizerState(source=optimizer)."
            )
        return self.from_state(self.source, objective)

    def from_optimizer(self, optimizer: torch.optim.Optimizer, objective: Objective) -> DiagonalEstimate:
        """Read the second moment of a live optimizer.

        Args:
            optimizer: Of torch.optim; it is left as it is.
            objective: With the model that it trains, not a copy: parameters are told by identity.

        Returns:
            The second moment of the objective's parameters.

        Raises:
            InvalidArgument: If the optimizer is of another model, or does not train a parameter.
            UnsupportedModel: If it keeps no such mean, or took no step with a parameter.
            CurvkitError: If the state has entries that no run leaves.
        """
        kind = type(optimizer)
        name = kind.__name__ if kind.__module__.startswith("torch.optim") else f"{kind.__module__}.{kind.__name__}"
        moment_of(name)
        return self._estimated(name, objective, _live(optimizer, objective))

    def from_state(
        self, state: StoredState | Unassigned, objective: Objective, *, confirmed: bool = False
    ) -> DiagonalEstimate:
        """Read the second moment of a checkpoint.

        Args:
            state: As `curvkit.checkpoints.optimizer_state.optimizer_state` finds it.
            objective: The model at these weights.
            confirmed: That the names of a state whose `certain` is False were tested, so that no two tensors of one shape stand in each
                other's place: `curvkit.measures.state_evidence.confirm(state, objective)` returned None.

        Returns:
            The second moment of the objective's parameters.

        Raises:
            InvalidArgument: If there is no state, its names are not certain, or a parameter is not in it.
            UnsupportedModel: If the optimizer keeps no such mean.
            CurvkitError: If the state has entries that no run leaves.
        """
        if isinstance(state, Unassigned):
            raise InvalidArgument(f"OptimizerState: no second moment can be read: {state.reason}. {INSTEAD}.")
        moment_of(state.name)
        if not state.certain and not confirmed:
            raise InvalidArgument(
                f"OptimizerState: the names of the optimizer's state rest on the order of the parameters alone ({state.source}), and "
                "tensors of one shape could stand in each other's place. Test it: if curvkit.measures.state_evidence.confirm(state, "
                "objective) returns None, pass confirmed=True. Files of curvkit.save have the names."
            )
        return self._estimated(state.name, objective, _stored(state, objective))

    def bound(self, source: torch.optim.Optimizer | StoredState) -> OptimizerState:
        """The same estimator with something to read.

        Args:
            source: An optimizer, or the state of a checkpoint.

        Returns:
            One whose `estimate` needs no more than an objective.
        """
        return replace(self, source=source)

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            No gradient, and copies of the parameters.
        """
        return Expected(0.0, COPIES)

    def _estimated(self, optimizer: str, objective: Objective, kept: Iterator[tuple[int, Kept]]) -> DiagonalEstimate:
        began, expected, moment = time.perf_counter(), self.expected(objective), moment_of(optimizer)
        if moment.decay is None and not self.bias_correction:
            raise InvalidArgument(
                f"OptimizerState: bias_correction=False, but {optimizer} keeps a sum over all steps, which is no mean. Pass True: the "
                "sum is divided by the number of steps."
            )
        refuse_too_large("OptimizerState", objective, expected, instead="Leave parameters out by patterns")
        dtype, device = torch.promote_types(objective.dtype, torch.float32), objective.device
        values: dict[str, Tensor] = {}
        groups: dict[int, Any] = {}
        for index, entry in kept:
            groups[index] = entry.group
            values[entry.name] = second_moment(
                entry, moment, corrected=self.bias_correction, dtype=dtype, device=device
            )
        said = notes(optimizer, groups, moment)
        cost = Cost(expected.gradients, time.perf_counter() - began, peak_bytes=expected.peak_bytes(objective))
        return DiagonalEstimate(values, None, self.matrix, repr(self), cost, notes=tuple(said))


def _live(optimizer: torch.optim.Optimizer, objective: Objective) -> Iterator[tuple[int, Kept]]:
    """What a live optimizer keeps of each parameter of the objective, with the number of its group."""
    owners = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    entries = list(zip(objective.parameters.entries, objective.tensors, strict=True))
    missing = [entry.name for entry, p in entries if id(p) not in owners]
    if len(missing) == len(entries):
        raise InvalidArgument(
            "OptimizerState: the optimizer has none of the objective's parameters: it is of another model, or of another copy of this one. "
            "Give the objective of the model that it trains."
        )
    _refuse_untrained(missing)
    for entry, p in entries:
        state, index = optimizer.state.get(p, {}), owners[id(p)]
        step = state.get("step")
        yield (
            index,
            Kept(entry.name, entry.shape, state, None if step is None else float(step), optimizer.param_groups[index]),
        )


def _stored(state: StoredState, objective: Objective) -> Iterator[tuple[int, Kept]]:
    """What a checkpoint has of each parameter of the objective, with the number of its group."""
    _refuse_untrained([name for name in objective.parameters.names if name not in state.parameters])
    for entry in objective.parameters.entries:
        held = state.parameters[entry.name]
        group, step = state.groups[held.group], held.numbers.get("step")
        yield held.group, Kept(entry.name, entry.shape, held.tensors, step, group)


def _refuse_untrained(missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidArgument(
            f"OptimizerState: the optimizer has nothing of {brief(missing[0])}{more}, which the objective measures: it was frozen, or "
            "never had a gradient. Leave it out by patterns, or freeze it with requires_grad_(False)."
        )
