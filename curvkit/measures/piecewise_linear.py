"""The exact trace for piecewise linear networks: that of the Hessian is that of the GGN, whose diagonal is a sum of squares."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from curvkit.estimators.expected import held_bytes
from curvkit.estimators.ggn_structure import GGNStructure, predicted_gradients
from curvkit.estimators.piecewise_proof import diagonals_are_equal
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.results.journal import NOTHING_KEPT, Journal, Kept

REASON = "a piecewise linear network: the trace is that of the GGN, a sum of squares over examples and outputs"
PROBES, AT = 100, 0.05
"""Probes that sampling typically takes, at this tolerance; their number goes as one over its square, and is 30 at least."""
CHUNK_BYTES = 64 << 20
"""For the graph of the examples that are taken together."""
FIRST = 64
"""Examples of the first piece, small so that a limit of time is seen early to be too short."""


def applies(objective: Objective, seed: int, *, most: float = math.inf) -> bool:
    """Whether trace H = trace GGN was shown, and its cost is within `most`.

    Args:
        objective: As measured.
        seed: Of the signs of the check, see `diagonals_are_equal`.
        most: Hessian products that it may cost, by `predicted_products`.

    Returns:
        False for anything that raises, too.

    Cost: a few forward passes, and on four examples two products per parameter tensor.
    """
    try:
        if not predicted_products(objective) <= most:
            return False
    except Exception:  # the user's model on rows it did not expect, or a loss without a known factor
        return False
    return diagonals_are_equal(objective, seed)


def probes_expected(tolerance: float) -> int:
    """Predict what sampling would take, before there are any probes.

    Args:
        tolerance: Half-width of the interval relative to the trace.

    Returns:
        100 at 5 %, at least 30.

    Example:
        >>> probes_expected(0.05), probes_expected(0.5), probes_expected(0.01)
        (100, 30, 2500)
    """
    return max(30, round(PROBES * (AT / tolerance) ** 2))


def predicted_products(objective: Objective) -> float:
    """Predict the cost of `ggn_diagonal_sums` in Hessian products on the same data, without a clock, so that a choice by it repeats.

    Args:
        objective: As measured.

    Returns:
        `curvkit.estimators.ggn_structure.predicted_gradients`, in products of two gradients.

    Raises:
        UnsupportedModel: If the loss has no known factor.

    Cost: three forward passes on four examples.
    """
    return predicted_gradients(objective) / Hessian.kind.gradients_per_product[0]


def ggn_diagonal_sums(objective: Objective, journal: Journal = NOTHING_KEPT) -> Iterator[tuple[float, Tensor]]:
    """Add up the diagonal of the GGN by parameter tensors.

        sum_(j in P) G_jj = (1 / W) sum_n sum_c || (J_n' s_nc)_P ||^2,    H_out,n = sum_c s_nc s_nc'

    Args:
        objective: Whose model treats examples one by one.
        journal: Of the measurement; the sums over each piece of the data are kept.

    Yields:
        The share of the data that is done, in (0, 1], and the p sums over what is done, float64.

    Raises:
        UnsupportedModel: If the loss has no known factor, or a parameter cannot be treated.
        CurvkitError: If a gradient is not finite.

    Cost: `predicted_products`; memory of three times the graph of 64 MiB of examples, and three copies of the parameters.
    """
    structure = GGNStructure.of(objective, "trace")
    counts = [rows(batch) or 1 for batch in objective.batches]
    chunk = max(1, CHUNK_BYTES * max(counts) // max(held_bytes(objective, second=False), 1))
    total, weights, done = torch.zeros(len(objective.parameters.names), dtype=torch.float64), list[float](), 0
    for index, batch in enumerate(objective.batches):
        begin = 0
        while begin < counts[index]:
            piece = slice(begin, begin + (chunk if done else min(chunk, FIRST)))
            key = f"squares/{index}/{piece.start}/{chunk}"
            found = journal.recalled(key)
            if found is None:
                start = time.perf_counter()
                part = objective.with_batches([map_tensors(lambda tensor, piece=piece: tensor[piece], batch)])
                found = Kept(_summed(*structure.sums(part)), time.perf_counter() - start)
                journal.keep(key, found)
            total = total + found.tensor[:-1]
            weights.append(found.tensor[-1].item())
            begin, done = piece.stop, done + min(piece.stop, counts[index]) - piece.start
            yield done / sum(counts), total
    yield 1.0, total / objective.denominator(weights)


def _summed(squares: dict[str, Tensor], weight: float) -> Tensor:
    """[p + 1] sums by parameter tensors, and the weight, float64."""
    sums = [value.double().sum().cpu() for value in squares.values()]
    return torch.stack([*sums, torch.tensor(weight, dtype=torch.float64)])
