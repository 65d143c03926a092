"""A step of an optimizer whose state is frozen, folded to three diagonals, so that one eigenvalue says whether it is stable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvkit.checkpoints.optimizer_state import OptimizerState
from curvkit.errors import InvalidArgument
from curvkit.measures.frozen_state import Diagonal, FrozenState, NoLimit
from curvkit.operators import CurvatureOperator, Scaled
from curvkit.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class Update:
    """One step of an optimizer with frozen state on a quadratic, as far as its stability goes.

        K = F^1/2 (H + C) F^1/2 + W,    stable  <=>  lambda_max(K) < 2

    F, C and W are diagonal. F and W are proportional to the learning rates, so that lr * 2 / lambda_max(K) is the largest stable one, all
    groups scaled together. Directions of negative curvature are left at any learning rate; they are not what this is about.

    Source: Cohen et al. (2021, 2022) for gradient descent with momentum and for Adam. Differs: decay, groups and IRE are folded in.

    Example:
        >>> adam = Update("Adam", lr=1e-3, steps=1e-3 * 0.1 / 1.9, gain=0.1 / 1.9, matrix="H")
        >>> round(adam.number, 6)    # the limit is 38 / lr
        38.0
    """

    name: str
    """Of the optimizer."""
    lr: float
    """The largest learning rate of its groups, at which F and W are taken."""
    steps: Diagonal
    """F: the learning rate, over the preconditioner, times what gets through the momentum."""
    coupled: Diagonal = 0.0
    """C: weight decay that is added to the gradient."""
    decay: Diagonal = 0.0
    """W: the share of a weight that decoupled decay takes off per step, lr times weight decay."""
    gain: float = 1.0
    """What gets through the momentum, (1 - beta) / (1 + beta) for Adam, where it is the same for all coordinates; else 1, and part of F."""
    matrix: str = "F (H + C) + W"
    """What the eigenvalue is one of, once the learning rate and the gain are divided out."""
    idle: Tensor | None = None
    """[n] bool: coordinates whose second moment is next to nothing."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        state: OptimizerState,
        space: ParameterSpace,
        rates: Sequence[float],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Update | NoLimit:
        """Fold the state of an optimizer of torch.

        Args:
            state: Its options, and what it keeps of each parameter.
            space: Order of the coordinates. What the optimizer does not move is held fixed.
            rates: Learning rate of each group.
            dtype: Of the diagonals; they are computed in float64.
            device: Of the diagonals.

        Returns:
            The update, or why there is none.

        Raises:
            InvalidArgument: If there are not as many rates as groups.

        Cost: some passes over the second moment; memory of 12 bytes per parameter.
        """
        frozen = FrozenState.of(state, space, rates)
        if isinstance(frozen, NoLimit):
            return frozen
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        update = cls(
            name=state.name,
            lr=max(rates),
            steps=frozen.joined(lambda step, lr: lr * step.gain * step.multiplier, fixed=0.0, **kind),
            coupled=frozen.joined(lambda step, lr: step.coupled, **kind),
            decay=frozen.joined(lambda step, lr: lr * step.decoupled, **kind),
            gain=1.0 if frozen.gain is None else frozen.gain,
            idle=frozen.idle(device=device),
            notes=frozen.notes,
        )
        return replace(update, matrix=_matrix(update, frozen))

    def amplified(self, mask: Tensor, kappa: float, *, decay: bool = True) -> Update:
        """The same with the steps of flat coordinates made longer, as IRE does: x' = x + (1 + kappa n) (step of the base).

        Args:
            mask: [n], n: True where a coordinate is flat.
            kappa: Strength, at least 0.
            decay: Whether decoupled weight decay is part of what is made longer.

        Returns:
            Another update; its learning rate is that of the base.

        Raises:
            InvalidArgument: If kappa is negative.

        Example:
            >>> sgd = Update("SGD", lr=0.1, steps=0.1, matrix="H")
            >>> sgd.amplified(torch.tensor([True, False]), 4.0).steps.tolist()
            [0.5, 0.1]
        """
        if not kappa >= 0.0:
            raise InvalidArgument(
                f"Update: kappa={kappa!r} must not be negative. It is the extra speed along flat coordinates: pass 0 for none."
            )
        like = next((d for d in (self.steps, self.coupled, self.decay) if isinstance(d, Tensor)), None)
        dtype, device = (torch.float64, mask.device) if like is None else (like.dtype, like.device)
        factor = 1.0 + kappa * mask.to(dtype=dtype, device=device)
        longer = replace(
            self,
            name=f"{self.name} with IRE, kappa {kappa:g}",
            steps=factor * self.steps,
            decay=factor * self.decay if decay and not _is_zero(self.decay) else self.decay,
        )
        inner = self.matrix.removesuffix(" + W")
        inner = f"({inner})" if inner == "H + C" else inner
        return replace(longer, matrix=f"(1 + kappa n) {inner}{_outer(longer)}")

    def scaled(self, lr: float) -> Update:
        """The same with all learning rates multiplied so that the largest is another one.

        Args:
            lr: The largest learning rate.

        Returns:
            Another update.
        """
        factor = lr / self.lr
        return replace(self, lr=lr, steps=self.steps * factor, decay=self.decay * factor)

    @property
    def constant(self) -> bool:
        """Whether F, C and W are multiples of the identity, so that the eigenvalues of K are those of H, stretched and moved."""
        return not any(isinstance(d, Tensor) for d in (self.steps, self.coupled, self.decay))

    @property
    def number(self) -> float:
        """The limit times the learning rate: 2 for gradient descent, 2 (1 + beta1) / (1 - beta1) for Adam."""
        return 2.0 / self.gain

    def value(self, folded: float) -> float:
        """The eigenvalue of the matrix that is named, from that of K.

        Args:
            folded: An eigenvalue of K.

        Returns:
            What is compared with `number` / lr.
        """
        return folded / (self.lr * self.gain)

    def operator(self, A: CurvatureOperator) -> Scaled:
        """K, in the precision of a matrix.

        Args:
            A: H, by any arithmetic.

        Returns:
            Its products.
        """
        inner, outer = (None if _is_zero(d) else _whole(d, A) for d in (self.coupled, self.decay))
        return Scaled(A, _whole(self.steps, A).sqrt(), inner=inner, outer=outer)


def _matrix(update: Update, frozen: FrozenState) -> str:
    """What is left of F (H + C) + W once the largest learning rate and a common gain are divided out."""
    left = "F " if frozen.gain is None else ("" if frozen.one_rate else "R ") + ("P^-1 " if frozen.adaptive else "")
    inner = "H" if _is_zero(update.coupled) else "(H + C)" if left else "H + C"
    return f"{left}{inner}{_outer(update)}"


def _outer(update: Update) -> str:
    return "" if _is_zero(update.decay) else " + W"


def _whole(diagonal: Diagonal, A: CurvatureOperator) -> Tensor:
    """A diagonal [n] in the dtype and on the device of a matrix."""
    if isinstance(diagonal, Tensor):
        return diagonal.to(A.device, A.dtype)
    return torch.full((A.n,), diagonal, dtype=A.dtype, device=A.device)


def _is_zero(diagonal: Diagonal) -> bool:
    return not isinstance(diagonal, Tensor) and diagonal == 0.0
