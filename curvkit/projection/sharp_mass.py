"""How much of an eigenspace lies in the sharp set of a mask, beside what chance gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.projection.chance import AgainstChance
from curvkit.projection.matching import as_masks, refuse_different
from curvkit.projection.spanning import refuse_oblique, runs, vectors_of
from curvkit.results.eigenpairs import Eigenpairs


@dataclass(frozen=True)
class SharpMass:
    """One parameter's part in a subspace."""

    name: str
    numel: int
    sharp_fraction: float | None
    mass: float
    """||V_l||^2 / k: the share of the space that lies in this parameter."""
    sharp_mass: float
    """What of it lies in the sharp set."""


@dataclass(frozen=True)
class MaskSubspaceOverlap:
    """A mask and a subspace of the same coordinates."""

    n: int
    dimension: int
    sharp_fraction: float
    vectors: tuple[AgainstChance, ...]
    """Of each eigenvector, in the order of the eigenvalues: sum over the sharp set of v_j^2."""
    overlap: AgainstChance
    """Their mean, ||V_sharp||_F^2 / k."""
    converged: bool
    """Whether all eigenpairs have."""
    layers: tuple[SharpMass, ...]


def mask_subspace_overlap(mask: Mapping[str, Tensor], pairs: Eigenpairs) -> MaskSubspaceOverlap:
    """How much of each eigenvector lies in the sharp set of a mask.

        mass_i = sum over sharp j of v_ji^2,    by chance |sharp| / n,    within layers sum_l (|sharp_l| / n_l) ||v_il||^2

    A random set of |sharp| coordinates holds each of them with probability |sharp| / n, so that this is the expectation for any unit
    vector; `within_layers` is that of a set that is random within layers, with its size there.

    Args:
        mask: By name, True or 1 for flat; a `FlatMask` or a mapping of bool or uint8.
        pairs: With vectors, over the same parameters.

    Returns:
        The mass of each eigenvector, their mean, and where it lies.

    Raises:
        InvalidArgument: If vectors are missing or not orthonormal, their parameters are not known or not those of the mask.

    Cost: n k^2 multiplications, for the check; 32 MiB.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit import Objective
        >>> from curvkit.estimators import Lanczos
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])
        >>> pairs = Lanczos(rank=1).estimate(objective, seed=0).eigenpairs   # along the first coordinate
        >>> found = mask_subspace_overlap({"weight": torch.tensor([[False, True, True]])}, pairs)
        >>> round(found.overlap.value, 6), round(found.overlap.chance, 4)
        (1.0, 0.3333)
    """
    mask, V, space = as_masks("mask_subspace_overlap", mask), vectors_of("mask_subspace_overlap", pairs), pairs.space
    if space is None:
        raise InvalidArgument(
            f"mask_subspace_overlap: {pairs!r} does not know which parameters its vectors belong to. Use the `eigenpairs` of "
            "Lanczos(rank=...).estimate(objective)."
        )
    meant = {it.name: torch.empty(it.shape, device="meta") for it in space.entries}
    refuse_different("mask_subspace_overlap", mask, meant)
    n, k = V.shape
    gram, sharp, within = torch.zeros(k, k, dtype=torch.float64), *torch.zeros(2, k, dtype=torch.float64)
    layers, count = list[SharpMass](), 0
    for it in space.entries:
        flat, mass, inside = mask[it.name].reshape(-1), torch.zeros_like(sharp), torch.zeros_like(sharp)
        left = it.numel - int(flat.count_nonzero())
        at = it.offset
        for (v,) in runs(it.offset, it.offset + it.numel, V):
            keep = flat[at - it.offset : at - it.offset + len(v)].to(v.device) == 0
            gram, mass = gram + (v.T @ v).cpu(), mass + v.square().sum(0).cpu()
            inside, at = inside + (keep.double() @ v.square()).cpu(), at + len(v)
        share = left / it.numel if it.numel else None
        layers.append(SharpMass(it.name, it.numel, share, mass.mean().item(), inside.mean().item()))
        sharp, within, count = sharp + inside, within + (share or 0.0) * mass, count + left
    refuse_oblique("mask_subspace_overlap", gram)
    told = [
        AgainstChance(value, count / n, chance) for value, chance in zip(sharp.tolist(), within.tolist(), strict=True)
    ]
    mean = AgainstChance(math.fsum(sharp.tolist()) / k, count / n, math.fsum(within.tolist()) / k)
    converged = pairs.recomputed and pairs.all_converged
    return MaskSubspaceOverlap(n, k, count / n, tuple(told), mean, converged, tuple(layers))
