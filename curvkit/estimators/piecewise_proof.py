"""Is the diagonal of the Hessian that of the GGN? Shown for piecewise linear networks, and checked by numbers."""

from __future__ import annotations

import torch

from curvkit import seeds
from curvkit.losses import KnownLoss
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators import Hessian, Residual
from curvkit.operators.affine import is_affine_in_each_entry
from curvkit.operators.independence import rows_are_independent

AGREES = 1e3
"""Products with H - G may differ from zero by so many eps of the largest entry of those with H."""
FEW = 4
"""Examples on which they are taken."""
PASSES = 6.0
"""Gradients that the passes over the data and the checks of both operators cost, measured on one CPU thread for a perceptron."""


def diagonals_are_equal(objective: Objective, seed: int) -> bool:
    """Whether diag H = diag G was shown.

    Shown: the terms of the loss are known, `is_affine_in_each_entry` holds, the examples are independent, and on a few examples the whole
    block of H - G of each parameter tensor is zero, as products with random signs on that tensor show. Where anything is in doubt it is
    not shown.

    Args:
        objective: As measured.
        seed: Of the signs.

    Returns:
        False for anything that raises, too.

    Cost: a few forward passes, and on four examples two products per parameter tensor.
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
        return _blocks_are_zero(few, seed)
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
    per = sum(operator.kind.gradients_per_product[0] for operator in (Hessian, Residual))
    return PASSES + share * len(objective.parameters.entries) * per


def _blocks_are_zero(few: Objective, seed: int) -> bool:
    """Whether (H - G) v is zero on each parameter tensor for random signs v on that tensor."""
    H = Hessian(few, residency="retained")
    R = Residual(few, plan=H.plan)
    whole, left = list[float](), list[float]()
    for index, entry in enumerate(few.parameters.entries):
        if entry.numel:
            block = slice(entry.offset, entry.offset + entry.numel)
            v = torch.zeros(H.n, dtype=H.dtype, device=H.device)
            v[block] = seeds.signs(entry.numel, seed, "piecewise linear blocks", index, dtype=H.dtype, device=H.device)
            whole.append(H.matvec(v)[block].abs().max().item())
            left.append(R.matvec(v)[block].abs().max().item())
    limit = AGREES * torch.finfo(H.dtype).eps * max(whole)
    return limit > 0.0 and all(each <= limit for each in left)
