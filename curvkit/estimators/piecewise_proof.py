"""Is the diagonal of the Hessian that of the GGN? Shown for piecewise linear networks, and checked by numbers."""

from __future__ import annotations

import torch

from curvkit import seeds
from curvkit.losses import KnownLoss
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.operators.affine import is_affine_in_each_entry
from curvkit.operators.independence import rows_are_independent

CHECKED = 8
"""Diagonal entries of each parameter tensor that are compared with true Hessian products."""
AGREES = 1e3
"""Two diagonal entries may differ by so many eps of the largest."""
FEW = 4
"""Examples on which they are compared."""
PASSES = 3.0
"""Gradients that the passes over the data cost."""


def diagonals_are_equal(objective: Objective, seed: int) -> bool:
    """Whether diag H = diag G was shown.

    Shown: the terms of the loss are known, `is_affine_in_each_entry` holds, the examples are independent, and 8 random diagonal entries
    of each parameter tensor, or all, agree in both matrices on a few examples. Where anything is in doubt it is not shown.

    Args:
        objective: As measured.
        seed: Of the choice of entries.

    Returns:
        False for anything that raises, too.

    Cost: a few forward passes, and on four examples 16 products per parameter tensor.
    Source: Martens (2020), section 8, for piecewise linear networks.

    Example:
        >>> import torch.nn.functional as F
        >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        >>> layers = [torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)]
        >>> diagonals_are_equal(Objective(torch.nn.Sequential(*layers), F.mse_loss, [(x, x)]), 0)
        True
        >>> layers[1] = torch.nn.Tanh()
        >>> diagonals_are_equal(Objective(torch.nn.Sequential(*layers), F.mse_loss, [(x, x)]), 0)
        False
    """
    if not isinstance(objective.loss, KnownLoss) or not objective.loss.divisible:
        return False
    try:
        if not is_affine_in_each_entry(objective) or not rows_are_independent(objective, objective.batches):
            return False
        few = objective.with_batches([map_tensors(lambda tensor: tensor[:FEW], objective.batches[0])])
        return _diagonals_agree(few, seed)
    except Exception:  # the user's model on rows it did not expect; where it cannot be shown it is not used
        return False


def proof_gradients(objective: Objective) -> float:
    """Count what `diagonals_are_equal` costs.

    Args:
        objective: Of known rows.

    Returns:
        Gradients of the data: of the passes over it, and of products with both matrices on a few examples.
    """
    share = FEW / max(sum(rows(batch) or 1 for batch in objective.batches), FEW)
    per = sum(operator.kind.gradients_per_product[0] for operator in (Hessian, GGN))
    return PASSES + share * sum(min(CHECKED, entry.numel) for entry in objective.parameters.entries) * per


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
