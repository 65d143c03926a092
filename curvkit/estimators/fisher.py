"""The diagonals of the Fisher matrix, of the empirical Fisher matrix, and IRE's squared mini-batch gradient: three things."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.coverage import refuse_not_finite
from curvkit.estimators.examples import ExampleSquares
from curvkit.estimators.likelihoods import draw_cotangent, refuse_without_likelihood
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

PER_SAMPLE, CHECKS = 1.2, 0.2
"""Gradients of the data that one sample and the checks beforehand are counted as; no clock is behind it."""


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher matrix, by targets that are drawn from the model.

        F_jj = (1 / W) sum_n E_(y' ~ p(. | x_n)) (d/dtheta_j -log p(y' | x_n))^2

    with W the number of terms, as in the loss. n runs over examples, rows of dimension 0; the terms of an example (the tokens of a
    sequence) are drawn independently, so that their products vanish in the mean. Unbiased for every number of samples. For logits with
    cross-entropy, binary cross-entropy or squared error F is the GGN of the loss (without label smoothing).

    Args:
        num_samples: Draws of all targets; the standard error is known from two on.

    Source: Martens (2020), "New insights and perspectives on the natural gradient method", for the Fisher and the GGN.
    Cost: per sample a forward pass, and a backward pass with squares in place of the parameters' gradients; some passes for the checks
        before. By count, not by a clock; where layers have several positions, gradients of examples are written out, 64 MiB at a time.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> objective = Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))])
        >>> found = Fisher(num_samples=400).estimate(objective, seed=0)   # 2 x x'
        >>> bool(((found.values["weight"] - torch.tensor([[2.0, 8.0]])).abs() < 5 * found.stderr["weight"]).all())
        True
    """

    num_samples: int = 1

    def __post_init__(self) -> None:
        """Check the option."""
        _check_count("Fisher", "num_samples", self.num_samples)

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function; its loss is a negative log-likelihood.
            seed: Of the targets; None draws one.

        Returns:
            The diagonal, with standard errors from two samples on.

        Raises:
            UnsupportedModel: If the loss is no likelihood, examples are coupled, or a parameter cannot be treated.
            CurvkitError: If a gradient is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        notes = refuse_without_likelihood(objective, "Fisher")
        squares, count = ExampleSquares.of(objective, "Fisher"), len(objective.batches)
        drawn = DiagonalSamples(objective.parameters.names)
        for sample in range(self.num_samples):

            def cotangents(index: int, outputs: Tensor, targets: Any, first: int = sample * count) -> Iterator[Tensor]:
                yield draw_cotangent(objective, outputs, targets, seed=seed, index=first + index)

            drawn.add(_joined(objective, squares.batches(cotangents)))
        return _estimated(drawn, "fisher", repr(self), objective, (seed, began, (*notes, *_left(squares))))


@dataclass(frozen=True)
class EmpiricalFisher:
    """The diagonal of the empirical Fisher matrix: squared gradients of single examples with the true targets.

        E_jj = (1 / W) sum_n (d loss_n / d theta_j)^2

    It is not the Fisher matrix and no estimate of it: at a minimum that fits the data it vanishes, and where the model is wrong it is
    larger.
    The gradients of the terms of one example (the tokens of a sequence) are added before they are squared.

    Source: Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation", for the difference.
    Cost: as one sample of `Fisher`; nothing is sampled.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, 2.0]]).double()
        >>> found = EmpiricalFisher().estimate(Objective(model, F.mse_loss, [(x, model(x).detach() - 1.0)]))   # (2 x)^2
        >>> found.values["weight"].round(decimals=6).tolist(), found.stderr
        ([[4.0, 16.0]], None)
    """

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute the diagonal; see the class.

        Args:
            objective: The function; its loss is a sum over examples.
            seed: Not used; nothing is drawn.

        Returns:
            The diagonal.

        Raises:
            UnsupportedModel: If examples are coupled, or a parameter cannot be treated.
            CurvkitError: If a gradient is not finite.
        """
        began, objective = time.perf_counter(), objective.raised()
        squares = ExampleSquares.of(objective, "EmpiricalFisher")

        def cotangents(index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
            z = outputs.detach().requires_grad_()
            yield torch.autograd.grad(objective.terms_of(z, targets).total, z)[0]

        found = _joined(objective, squares.batches(cotangents))
        cost = Cost(PER_SAMPLE + CHECKS, time.perf_counter() - began)
        return DiagonalEstimate(found, None, "empirical_fisher", repr(self), cost, notes=_left(squares))


@dataclass(frozen=True)
class SquaredGradient:
    """IRE's Eq. 6: the squared gradient of a mini-batch with targets drawn from the model, times its number of terms.

        h = (1 / m) sum_b B_b g_b * g_b,    g_b = d/dtheta (1 / B_b) sum_n -log p(y'_n | x_n)

    B_b is the number of terms of batch b that are not ignored. Its mean over the draw of the targets is the diagonal of the Fisher matrix
    of those batches, but one batch is one draw of rank one: the relative error of an entry is about sqrt(2), whatever the size.
    `Fisher` has the same mean and squares examples apart.

    Args:
        num_batches: m, taken from the first of the data.

    Source: Liu et al. (2023), Sophia's Gauss-Newton-Bartlett estimator; Wang et al. (2024), arXiv 2405.20763, Eq. 6.
    Cost: one gradient of each batch.

    Example:
        >>> import torch.nn.functional as F
        >>> data = [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> SquaredGradient().estimate(Objective(torch.nn.Linear(2, 1), F.mse_loss, data), seed=0).matrix
        'squared_gradient'
    """

    num_batches: int = 1

    def __post_init__(self) -> None:
        """Check the option."""
        _check_count("SquaredGradient", "num_batches", self.num_batches)

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute h; see the class.

        Args:
            objective: The function; its loss is a negative log-likelihood. Its batches are the mini-batches.
            seed: Of the targets; None draws one.

        Returns:
            h, with standard errors over batches from two on.

        Raises:
            InvalidArgument: If there are fewer batches than asked for.
            UnsupportedModel: If the loss is no likelihood.
            CurvkitError: If a gradient is not finite.
        """
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        notes = refuse_without_likelihood(objective, "SquaredGradient")
        if len(objective.batches) < self.num_batches:
            raise InvalidArgument(
                f"SquaredGradient: num_batches={self.num_batches}, but the data has {len(objective.batches)}. Ask for fewer, or give more."
            )
        drawn, space = DiagonalSamples(objective.parameters.names), objective.parameters
        for index in range(self.num_batches):
            with objective.measuring():
                outputs, targets = objective.outputs(index)
                weight = objective.terms_of(outputs.detach(), targets).weight
                s = draw_cotangent(objective, outputs, targets, seed=seed, index=index)
                found = torch.autograd.grad(outputs, objective.tensors, s, allow_unused=True)
            scale = objective.denominator([weight])
            pieces: dict[str, Tensor | None] = dict(zip(space.names, found, strict=True))
            squares = {
                name: torch.zeros_like(p) if (g := pieces[name]) is None else g.square() / scale
                for name, p in zip(space.names, objective.tensors, strict=True)
            }
            refuse_not_finite("SquaredGradient", squares)
            drawn.add(squares)
        return _estimated(drawn, "squared_gradient", repr(self), objective, (seed, began, notes))


def _check_count(estimator: str, option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{estimator}: {option}={value!r} must be an integer >= 1. The default is 1.")


def _joined(objective: Objective, batches: Iterator[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """(1 / W) sum_b Q_b."""
    total: dict[str, Tensor] = {}
    weights: list[float] = []
    for found, weight in batches:
        weights.append(weight)
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    scale = objective.denominator(weights)
    return {name: value / scale for name, value in total.items()}


def _left(squares: ExampleSquares) -> tuple[str, ...]:
    return tuple(
        f"{name} has no rule ({reason}): it was treated by vmap" for name, reason in squares.coverage.refused.items()
    )


def _estimated(
    drawn: DiagonalSamples, matrix: str, name: str, objective: Objective, facts: tuple[int, float, tuple[str, ...]]
) -> DiagonalEstimate:
    seed, began, notes = facts
    share = drawn.size / len(objective.batches) if matrix == "squared_gradient" else drawn.size * PER_SAMPLE + CHECKS
    cost = Cost(share, time.perf_counter() - began)
    return DiagonalEstimate(drawn.mean, drawn.stderr, matrix, name, cost, drawn.size, seed, drawn.sums, notes)
