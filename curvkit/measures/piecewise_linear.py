"""The exact trace for piecewise linear networks: that of the Hessian is that of the GGN, whose diagonal is a sum of squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from curvkit import seeds
from curvkit.errors import CurvkitError
from curvkit.losses import KnownLoss, hessian_in_outputs
from curvkit.losses.batches import inputs_and_targets, map_tensors
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.operators.affine import is_affine_in_each_entry
from curvkit.operators.independence import rows_are_independent

REASON = "a piecewise linear network: the trace is that of the GGN, a sum of squares over examples and outputs"
MOST_COLUMNS = 20
"""Outputs per example up to which the exact way is cheaper than 30 probes: a column costs about three gradients, a probe about two."""
CHUNK_BYTES = 64 << 20
"""For the gradients of the examples that are taken together."""
CHECKED = 16
"""Diagonal entries that are compared with true Hessian products."""
AGREES = 1e3
"""Two diagonal entries may differ by so many eps of the largest."""
FEW = 4
"""Examples on which they are compared."""


def applies(objective: Objective, seed: int) -> bool:
    """Whether trace H = trace GGN was shown, and can be computed at a cost below that of sampling.

    Shown: the loss is one with a known factor of its output Hessian, `is_affine_in_each_entry` holds, and up to 16 diagonal entries of both
    matrices agree on a few examples. Where anything is in doubt it is not used.

    Args:
        objective: As measured.
        seed: Of the choice of entries.

    Returns:
        False for anything that raises, too.

    Cost: a few forward passes, and products on four examples.
    """
    if not isinstance(objective.loss, KnownLoss) or not objective.loss.divisible:
        return False
    try:
        for batch in objective.batches:
            inputs, named, _ = inputs_and_targets(batch)
            if named or not all(isinstance(tensor, Tensor) for tensor in inputs):
                return False
        if not is_affine_in_each_entry(objective) or not rows_are_independent(objective, objective.batches):
            return False
        few = objective.with_batches([map_tensors(lambda tensor: tensor[:FEW], objective.batches[0])])
        with few.measuring(), torch.no_grad():
            outputs, _ = few.outputs(0)
        if outputs.ndim < 1 or outputs[0].numel() > MOST_COLUMNS:
            return False
        return _diagonals_agree(few, seed)
    except (CurvkitError, RuntimeError):
        return False


def ggn_diagonal_sums(objective: Objective) -> Iterator[tuple[float, Tensor]]:
    """Add up the diagonal of the GGN by parameter tensors.

        sum_(j in P) G_jj = (1 / W) sum_n sum_c || (J_n' s_nc)_P ||^2,    H_out,n = sum_c s_nc s_nc'

    Args:
        objective: Whose model treats examples one by one.

    Yields:
        The share of the data that is done, in (0, 1], and the p sums over what is done, float64.

    Cost: per column about three gradients; memory of 64 MiB beside one batch's.
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
        sums = [torch.stack([g.double().square().sum() for g in pull(s)[0].values()]) for s in columns]
        return torch.stack(sums).sum(0)

    for index, batch in enumerate(objective.batches):
        inputs, _, targets = inputs_and_targets(batch)
        with objective.measuring(), torch.no_grad():
            z, _ = objective.outputs(index)
            weights.append(objective.terms_of(z, targets).weight)
            S = torch.stack(list(hessian_in_outputs(objective.loss, z, targets).factor_columns()), dim=1)  # [N, C, ...]
        for begin in range(0, len(S), chunk):
            piece = slice(begin, begin + chunk)
            with objective.measuring():
                found = vmap(squares)(tuple(x[piece] for x in inputs), S[piece])
            total = total + found.sum(0).cpu()
            done += len(S[piece])
            yield done / count, total
    yield 1.0, total / objective.denominator(weights)


def _diagonals_agree(few: Objective, seed: int) -> bool:
    """Whether one entry of each parameter tensor, up to 16 in all, is the same in both matrices."""
    H, G = Hessian(few, residency="retained"), GGN(few, residency="retained")
    entries = list(few.parameters.entries)
    order = torch.randperm(len(entries), generator=seeds.generator(seed, "piecewise linear tensors")).tolist()
    found: list[tuple[float, float]] = []
    for index in order[:CHECKED]:
        draw = seeds.generator(seed, "piecewise linear entry", index)
        j = entries[index].offset + int(torch.randint(max(entries[index].numel, 1), (1,), generator=draw))
        e = torch.zeros(H.n, dtype=H.dtype, device=H.device)
        e[min(j, H.n - 1)] = 1.0
        found.append(((e @ H.matvec(e)).item(), (e @ G.matvec(e)).item()))
    size = max(max(abs(h), abs(g)) for h, g in found)
    return all(abs(h - g) <= AGREES * torch.finfo(H.dtype).eps * size for h, g in found) and size > 0.0
