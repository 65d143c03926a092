"""Which parameter tensors can be rescaled without changing the loss, so that curvature along them depends on their length alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.linalg.basis import dot, norm
from curvkit.objectives import Objective
from curvkit.operators.moving import Moving
from curvkit.parameters import Entry
from curvkit.results import plain

FACTORS = (0.5, 2.0)
"""By which a tensor is multiplied."""
RADIAL = 1e-3
"""A tensor counts as scale-invariant if rescaling changes the loss by at most this share of what a random change of the same size does, and
if its gradient has at most this cosine with it. The eps of normalisation layers, 1e-5 beside a variance, stays below that."""
ROUNDING = 100.0
"""Changes of the loss below ROUNDING eps |L| are none."""
CLEAR = 100.0
"""By how much a random change must exceed that before an unchanged loss under rescaling says something."""
BATCH_NORM = (
    "BatchNorm in eval mode: weights before it could be rescaled in training, but not with these running statistics"
)


@dataclass(frozen=True)
class ScaleInvariance:
    """Parameter tensors w with L(c w) = L(w), as far as some factors c show on the first batch."""

    invariant: tuple[str, ...]
    """Names, in the order of the space."""
    without_effect: tuple[str, ...]
    """Tensors that can be changed in any way without changing the loss, such as a bias before a normalisation layer."""
    zero: tuple[str, ...]
    """Tensors of zeros, which cannot be rescaled."""
    tensors: int
    """All tensors of the space."""
    parameters: int
    """Coordinates of the invariant tensors."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence for people."""
        if not self.invariant:
            return f"none of {self.tensors} parameter tensors is scale-invariant"
        more = f" and {len(self.invariant) - 3} more" if len(self.invariant) > 3 else ""
        return (
            f"{len(self.invariant)} of {self.tensors} parameter tensors "
            f"{'is' if len(self.invariant) == 1 else 'are'} scale-invariant: {', '.join(self.invariant[:3])}{more}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values.

        Returns:
            Mappings, lists, numbers and strings.
        """
        return {**plain(self), "text": str(self)}


def scale_invariance(objective: Objective, *, seed: int | None = None) -> ScaleInvariance:
    """Find the parameter tensors whose length does not matter to the function.

        L(theta with w scaled by c) = L(theta) for c = 1/2 and 2,    w . grad = 0

    For such a tensor the Hessian at c w is that at w divided by c^2, so that raw sharpness is a matter of its length. Tensors are rescaled
    one at a time: that two together can be (up in one ReLU layer, down in the next) is not seen.

    Args:
        objective: The function; its first batch is used.
        seed: Of the random changes that rescaling is compared with; None draws one.

    Returns:
        The names.

    Raises:
        UnknownObjective: If loss and data do not fit.
        UnsupportedModel: If the objective is random.

    Cost: one gradient of a batch, four forward passes for each tensor that is orthogonal to its gradient, and a copy of the model.
    Source: the criterion w . grad = 0 is Euler's theorem for functions that are homogeneous of degree 0.

    Example:
        >>> import torch.nn.functional as F
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 2)).double()
        >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> str(scale_invariance(Objective(model, F.mse_loss, [(x, x[:, :2])]), seed=0))
        '1 of 4 parameter tensors is scale-invariant: 0.weight'
    """
    objective, seed = objective.raised(), seeds.settle(seed)
    probe = _Probe(objective, seed)
    kinds: dict[str, list[Entry]] = {"invariant": [], "without effect": [], "zero": [], "other": []}
    for index, entry in enumerate(objective.parameters.entries):
        kinds[probe.kind(entry, index)].append(entry)
    names = {kind: tuple(entry.name for entry in entries) for kind, entries in kinds.items()}
    return ScaleInvariance(
        invariant=names["invariant"],
        without_effect=names["without effect"],
        zero=names["zero"],
        tensors=len(objective.parameters.entries),
        parameters=sum(entry.numel for entry in kinds["invariant"]),
        notes=(BATCH_NORM,) if has_fixed_statistics(objective.model) else (),
    )


class _Probe:
    """The loss of the first batch, with one tensor changed."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self.moving, self.batch, self.seed = Moving(objective), objective.batches[0], seed
        self.theta = self.moving.theta
        self.gradient = self.moving.gradient(self.batch, self.theta)
        self.loss = self.moving.value(self.batch, self.theta)
        self.floor = ROUNDING * torch.finfo(self.theta.dtype).eps * abs(self.loss)

    def kind(self, entry: Entry, index: int) -> str:
        """What a tensor is."""
        part = slice(entry.offset, entry.offset + entry.numel)
        w, g = self.theta[part], self.gradient[part]
        if norm(w) == 0.0:
            return "zero"
        if abs(dot(w, g)) > max(RADIAL * norm(w) * norm(g), self.floor):
            return "other"
        rescaled = max(self.change(part, c * w) for c in FACTORS)
        r = seeds.normal(entry.numel, self.seed, "scale invariance", index, dtype=w.dtype, device=w.device)
        r = r * (norm(w) / norm(r))
        changed = max(self.change(part, w + r), self.change(part, w - r))
        if max(rescaled, changed) <= self.floor:
            return "without effect"
        if not math.isfinite(rescaled):
            return "other"
        clear = rescaled <= self.floor and changed >= CLEAR * self.floor
        return "invariant" if clear or rescaled <= RADIAL * changed else "other"

    def change(self, part: slice, w: Tensor) -> float:
        """By how much the loss changes when a tensor becomes w; infinite where it is no number then."""
        theta = self.theta.clone()
        theta[part] = w
        difference = abs(self.moving.value(self.batch, theta) - self.loss)
        return difference if math.isfinite(difference) else math.inf


def has_fixed_statistics(model: nn.Module) -> bool:
    """Whether BatchNorm is measured by its running statistics, where training uses those of the batch.

    Args:
        model: Any module.

    Returns:
        True if it has BatchNorm in evaluation mode.

    Example:
        >>> has_fixed_statistics(nn.BatchNorm1d(2)), has_fixed_statistics(nn.BatchNorm1d(2).eval())
        (False, True)
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(module, kinds) and not module.training for module in model.modules())
