"""The exact trace for piecewise linear networks: that of the Hessian is that of the GGN, whose diagonal is a sum of squares."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from curvkit import seeds
from curvkit.losses import KnownLoss, hessian_in_outputs
from curvkit.losses.batches import inputs_and_targets, map_tensors
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.operators.affine import is_affine_in_each_entry
from curvkit.operators.independence import rows_are_independent
from curvkit.results.journal import NOTHING_KEPT, Journal, Kept

REASON = "a piecewise linear network: the trace is that of the GGN, a sum of squares over examples and outputs"
PROBES, AT = 100, 0.05
"""Probes that sampling typically takes, at this tolerance; their number goes as one over its square, and is 30 at least."""
ARITHMETIC, TRAFFIC = 1.5, 50.0
"""Of the cost of a column, in Hessian products: three gradients against two; and per parameter and operation of the forward pass, for the
gradients of single examples are written out, where those of a batch are one matrix product. Measured on one CPU thread: 4 to 75."""
CHUNK_BYTES = 64 << 20
"""For the gradients of the examples that are taken together."""
FIRST = 64
"""Examples of the first piece, small so that a limit of time is seen early to be too short."""
CHECKED = 8
"""Diagonal entries of each parameter tensor that are compared with true Hessian products."""
AGREES = 1e3
"""Two diagonal entries may differ by so many eps of the largest."""
FEW = 4
"""Examples on which they are compared."""


def applies(objective: Objective, seed: int, *, most: float = math.inf) -> bool:
    """Whether trace H = trace GGN was shown, and its cost is within `most`.

    Shown: the loss is one with a known factor of its output Hessian, `is_affine_in_each_entry` holds, the examples are independent, and 8
    random diagonal entries of each parameter tensor, or all, agree in both matrices on a few examples. Where anything is in doubt it is not
    used.

    Args:
        objective: As measured.
        seed: Of the choice of entries.
        most: Hessian products that it may cost, by `predicted_products`.

    Returns:
        False for anything that raises, too.

    Cost: a few forward passes, and on four examples 16 products per parameter tensor.
    """
    if not isinstance(objective.loss, KnownLoss) or not objective.loss.divisible:
        return False
    try:
        for batch in objective.batches:
            inputs, named, _ = inputs_and_targets(batch)
            if named or not all(isinstance(tensor, Tensor) for tensor in inputs):
                return False
        if not predicted_products(objective) <= most:
            return False
        if not is_affine_in_each_entry(objective) or not rows_are_independent(objective, objective.batches):
            return False
        return _diagonals_agree(_few(objective), seed)
    except Exception:  # the user's model on rows it did not expect; where it cannot be shown it is not used
        return False


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

        C (1.5 + 50 n / F)

    with C columns per example, n parameters, and F floating point operations of the forward pass per example.

    Args:
        objective: As measured.

    Returns:
        Products.

    Raises:
        UnsupportedModel: If the loss has no known factor.

    Cost: a forward pass on four examples.
    Accuracy: calibrated on one CPU thread, where the true cost was 0.1 to 1.5 times this for perceptrons of one to ten outputs and a small
        convolutional network.
    """
    few = _few(objective)
    counter = FlopCounterMode(display=False)
    with few.measuring(), torch.no_grad(), counter:
        outputs, targets = few.outputs(0)
    columns = list(hessian_in_outputs(few.loss, outputs, targets).factor_columns())
    operations = counter.get_total_flops() / max(len(outputs), 1)
    return len(columns) * (ARITHMETIC + TRAFFIC * objective.parameters.n / operations) if operations else math.inf


def ggn_diagonal_sums(objective: Objective, journal: Journal = NOTHING_KEPT) -> Iterator[tuple[float, Tensor]]:
    """Add up the diagonal of the GGN by parameter tensors.

        sum_(j in P) G_jj = (1 / W) sum_n sum_c || (J_n' s_nc)_P ||^2,    H_out,n = sum_c s_nc s_nc'

    Args:
        objective: Whose model treats examples one by one.
        journal: Of the measurement; the sums over each piece of the data are kept.

    Yields:
        The share of the data that is done, in (0, 1], and the p sums over what is done, float64.

    Raises:
        UnsupportedModel: If the loss has no known factor.

    Cost: `predicted_products`; memory of 64 MiB beside one batch's.
    """
    space, model = objective.parameters, objective.model
    theta = {name: p.detach() for name, p in model.named_parameters()}
    kept = {name: theta[name] for name in space.names}
    total, weights, done = torch.zeros(len(kept), dtype=torch.float64), list[float](), 0
    count = sum(len(inputs_and_targets(batch)[2]) for batch in objective.batches)
    chunk = max(1, CHUNK_BYTES // (space.n * objective.dtype.itemsize))

    def squares(inputs: tuple[Tensor, ...], columns: Tensor) -> Tensor:
        """[p] sums of squares of J_n's over the columns [C, ...] of one example."""

        def outputs(chosen: dict[str, Tensor]) -> Tensor:
            return functional_call(model, {**theta, **chosen}, tuple(x[None] for x in inputs))[0]

        made: Any = vjp(outputs, kept)
        pull = made[1]
        sums = [torch.stack([_square(g) for g in pull(s)[0].values()]) for s in columns]
        return torch.stack(sums).sum(0)

    for index, batch in enumerate(objective.batches):
        inputs, _, targets = inputs_and_targets(batch)
        with objective.measuring():  # with gradients on, as in products: a model may ask
            z = objective.outputs(index)[0].detach()
            weights.append(objective.terms_of(z, targets).weight)
            S = torch.stack(list(hessian_in_outputs(objective.loss, z, targets).factor_columns()), dim=1)  # [N, C, ...]
        begin = 0
        while begin < len(S):
            piece = slice(begin, begin + (chunk if done else min(chunk, FIRST)))
            begin = piece.stop
            key = f"structure/{index}/{piece.start}/{chunk}"
            found = journal.recalled(key)
            if found is None:
                start = time.perf_counter()
                with objective.measuring():
                    sums = vmap(squares)(tuple(x[piece] for x in inputs), S[piece]).sum(0).cpu()
                found = Kept(sums, time.perf_counter() - start)
                journal.keep(key, found)
            total = total + found.tensor.clone()
            done += len(S[piece])
            yield done / count, total
    yield 1.0, total / objective.denominator(weights)


def _square(g: Tensor) -> Tensor:
    """Sum of squares: norms of rows in g's own precision, which are short, and their squares in float64."""
    rows = g.flatten(1) if g.ndim > 1 else g[None]
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()


def _few(objective: Objective) -> Objective:
    return objective.with_batches([map_tensors(lambda tensor: tensor[:FEW], objective.batches[0])])


def _diagonals_agree(few: Objective, seed: int) -> bool:
    """Whether 8 entries of each parameter tensor, or all, are the same in both matrices."""
    H, G = Hessian(few, residency="retained"), GGN(few, residency="retained")
    found: list[tuple[float, float]] = []
    for index, entry in enumerate(few.parameters.entries):
        order = torch.randperm(entry.numel, generator=seeds.generator(seed, "piecewise linear entries", index))
        for j in (entry.offset + order[:CHECKED]).tolist():
            e = torch.zeros(H.n, dtype=H.dtype, device=H.device)
            e[j] = 1.0
            found.append((H.matvec(e)[j].item(), G.matvec(e)[j].item()))
    size = max(max(abs(h), abs(g)) for h, g in found)
    return all(abs(h - g) <= AGREES * torch.finfo(H.dtype).eps * size for h, g in found) and size > 0.0
