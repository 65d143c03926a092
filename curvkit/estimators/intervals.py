"""Intervals for the entries of a sampled diagonal."""

from __future__ import annotations

from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg.student import quantile
from curvkit.results.diagonal_estimate import DiagonalEstimate


def interval(found: DiagonalEstimate) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Bounds between which each entry of the diagonal lies with probability 95 %, each by itself.

        d_j -+ t_(m-1)(0.975) s_j / sqrt(m)

    Args:
        found: Of an estimator that samples, m times at least twice.

    Returns:
        The lower and the upper bounds, in the shape of the parameters; equal where nothing was sampled.

    Raises:
        InvalidArgument: If there is one sample, from which no error is known.

    Accuracy: Student's, for samples that are nearly normal; where an entry rests on few examples they are skewed, and 30 samples are a good
        beginning. Of n entries 5 % lie outside: it is no bound for all at once.
    Source: Student (1908).

    Example:
        >>> import torch
        >>> from curvkit.results import Cost
        >>> found = DiagonalEstimate({"w": torch.ones(1)}, {"w": torch.ones(1)}, "hessian", "", Cost(1.0, 0.0), samples=30)
        >>> low, high = interval(found)
        >>> round(low["w"].item(), 3), round(high["w"].item(), 3)
        (-1.045, 3.045)
    """
    if found.stderr is None:
        return dict(found.values), dict(found.values)
    if found.samples < 2:
        raise InvalidArgument(
            f"interval: {found.estimator} took {found.samples} sample, from which no error is known. Take at least 2, better 30: "
            "num_probes=30, or num_samples=30."
        )
    t = quantile(found.samples - 1)
    low = {name: value - t * found.stderr[name] for name, value in found.values.items()}
    return low, {name: value + t * found.stderr[name] for name, value in found.values.items()}
