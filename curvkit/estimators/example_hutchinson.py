"""The diagonal of the Hessian from random signs that are independent for each example."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.coverage import coverage, refuse_not_finite, refuse_uncovered
from curvkit.estimators.probing import Probing
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.objectives.moving import outputs_at
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

PER_PROBE = 3.5
"""Gradients of the data that a probe is counted as; no clock is behind it."""
SHARED = "signs of parameters without a rule"


@dataclass(frozen=True)
class ExampleHutchinson:
    """The diagonal of the exact Hessian, from one product with signs that are independent for each example.

        d = (1 / W) sum_n V_n * (H_n V)_n,    H = (1 / W) sum_n H_n,    V_n = a_n b_n' for a matrix, random signs else

    Hutchinson's probe takes the same signs for all examples. With signs of its own each example is a sample, so that one product averages
    N of them: the entries of V_n are uncorrelated in pairs, which is all that E d = diag H needs. Parameters without a rule (`coverage`)
    share one sign vector over all examples, as in Hutchinson's probe, and are named in the notes. The gain is in the number of examples:
    with a few long sequences it is at most about their number.

    Args:
        num_probes: m; the standard error is known from two on.

    Accuracy: Var d_j = sum_n sum_(k != j) (H_n)_jk^2 / (m W^2), about. Where examples have much in common, as in trained networks, this is
        1 / N of Hutchinson's; where their H_n are unrelated, so that they cancel in H anyway, nothing is gained.
    Source: ours; signs per example at the outputs of layers are in Martens, Sutskever & Swersky (2012), "Estimating the Hessian by
        back-propagating curvature". Differs: signs at the parameters, so that sharing over positions and tied weights are exact.
    Cost: per probe a forward pass and two backward passes through the probed model, counted as 3.5 gradients; memory of a Hessian product
        with its graph.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        >>> objective = Objective(torch.nn.Linear(3, 1), F.mse_loss, [(x, x[:, :1])])
        >>> found = ExampleHutchinson(num_probes=50).estimate(objective, seed=0)
        >>> truth = 2 * x.square().mean(0)   # linear regression: H = 2 X'X / N
        >>> bool(((found.values["weight"][0] - truth).abs() < 5 * found.stderr["weight"][0]).all())
        True
    """

    num_probes: int = 1

    def __post_init__(self) -> None:
        """Check the option."""
        if isinstance(self.num_probes, bool) or not isinstance(self.num_probes, int) or self.num_probes < 1:
            raise InvalidArgument(
                f"ExampleHutchinson: num_probes={self.num_probes!r} must be an integer >= 1. The default is 1."
            )

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function; its loss is a sum over examples.
            seed: Of the signs; None draws one.

        Returns:
            The diagonal, with standard errors from two probes on.

        Raises:
            UnsupportedModel: If the examples of a batch are coupled, or not to be told apart.
            CurvkitError: If a product is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        covered, drawn = coverage(objective), DiagonalSamples(objective.parameters.names)
        for probe in range(self.num_probes):
            total: dict[str, Tensor] = {}
            weights: list[float] = []
            for index in range(len(objective.batches)):
                with objective.measuring():
                    found, weight = _sample(objective, covered.ruled, index, seed, probe)
                weights.append(weight)
                total = {name: total[name] + value if name in total else value for name, value in found.items()}
            scale = objective.denominator(weights)
            sample = {name: value / scale for name, value in total.items()}
            refuse_not_finite("ExampleHutchinson", sample)
            drawn.add(sample)
        notes = [
            f"{name} has no rule ({reason}): its signs are shared by all examples"
            for name, reason in covered.refused.items()
        ]
        cost = Cost(PER_PROBE * self.num_probes, time.perf_counter() - began, self.num_probes)
        return DiagonalEstimate(
            drawn.mean, drawn.stderr, "hessian", repr(self), cost, drawn.size, seed, drawn.sums, tuple(notes)
        )


def _sample(
    objective: Objective, ruled: tuple[str, ...], index: int, seed: int, probe: int
) -> tuple[dict[str, Tensor], float]:
    """V * (H V) of one batch, and its weight."""
    space = objective.parameters
    own: Any = dict(zip(space.names, objective.tensors, strict=True))
    draw = probe * len(objective.batches) + index
    probing = Probing({name: own[name] for name in ruled}, rows(objective.batches[index]) or 0, seed=seed, index=draw)
    shared = [name for name in space.names if name not in ruled]
    signs: dict[str, Tensor] = {}
    if shared:
        n = sum(own[name].numel() for name in shared)
        flat = seeds.signs(n, seed, SHARED, draw, dtype=probing.eps.dtype, device=probing.eps.device)
        pieces = flat.split([own[name].numel() for name in shared])
        signs = {name: piece.view(own[name].shape) for name, piece in zip(shared, pieces, strict=True)}
    with probing:
        outputs, targets = outputs_at(objective, index, {n: own[n] + probing.eps * signs[n] for n in shared})
    refuse_uncovered("ExampleHutchinson", probing.refused, ruled)
    terms = objective.terms_of(outputs, targets)
    found = probing.diagonal(terms.total, {name: own[name] for name in shared})
    for name in shared:
        found[name] = signs[name] * found[name]
    return {name: found.get(name, torch.zeros_like(own[name])) for name in space.names}, terms.weight
