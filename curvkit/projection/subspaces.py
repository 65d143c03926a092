"""How far two eigenspaces agree, beside what chance gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvkit.errors import InvalidArgument
from curvkit.projection.chance import AgainstChance
from curvkit.projection.spanning import refuse_oblique, runs, vectors_of
from curvkit.results.eigenpairs import Eigenpairs


@dataclass(frozen=True)
class SpaceShare:
    """Where two subspaces lie: the share of their vectors' squares in one parameter."""

    name: str
    numel: int
    a: float
    """||V_l||^2 / k."""
    b: float
    chance: float
    """n_l / n: of a random subspace, on average."""


@dataclass(frozen=True)
class SubspaceOverlap:
    """Two subspaces of R^n, of dimensions k_a and k_b."""

    n: int
    dimensions: tuple[int, int]
    overlap: AgainstChance
    """||V'W||_F^2 / min(k_a, k_b), the mean squared cosine: 1 where one contains the other."""
    cosines: tuple[float, ...]
    """Of the principal angles, descending; min(k_a, k_b) of them."""
    angles: tuple[float, ...]
    """The angles, in degrees, ascending."""
    converged: tuple[bool, bool]
    """Whether all eigenpairs of a, and of b, have: only then these are the eigenspaces, and not what a search had found of them."""
    layers: tuple[SpaceShare, ...]
    """Empty where neither of them knows its parameters."""


def subspace_overlap(a: Eigenpairs, b: Eigenpairs) -> SubspaceOverlap:
    """Principal angles between the spaces that two sets of eigenvectors span.

        V'W = P cos(Theta) Q',    overlap = ||V'W||_F^2 / min(k_a, k_b) = mean cos^2 theta_i

    For a fixed V and a W drawn uniformly, each unit vector w has E ||V'w||^2 = k_a / n, so that by chance the overlap is
    k_a k_b / (n min(k_a, k_b)) = max(k_a, k_b) / n. A single eigenvector with a close neighbour may turn within their plane without any
    change of the matrix to speak of: compare spaces that end at a gap of the spectrum.

    Args:
        a: With vectors, [n, k_a].
        b: With vectors of the same parameters, [n, k_b].

    Returns:
        The overlap with its chance level, cosines, angles, and where the spaces lie.

    Raises:
        InvalidArgument: If vectors are missing, belong to other parameters (naming the first difference), or are not orthonormal.

    Cost: n (k_a + k_b)^2 multiplications; memory for 2^18 coordinates at a time.
    Accuracy: angles to about 1e-6 degrees for vectors that are orthonormal to float64; else to what they lack of that. Small angles come
        from sines.
    Source: Bjorck & Golub (1973). Differs: sines from W'W - V'W of the Gram matrix, in pieces.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit import Objective
        >>> from curvkit.estimators import Lanczos
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])
        >>> one, two = (Lanczos(rank=rank).estimate(objective, seed=0).eigenpairs for rank in (1, 2))
        >>> found = subspace_overlap(one, two)   # the first lies in the second
        >>> round(found.overlap.value, 6), round(found.overlap.chance, 4)
        (1.0, 0.6667)
    """
    V, W = vectors_of("subspace_overlap", a), vectors_of("subspace_overlap", b)
    _refuse_different(a, b)
    (n, k_a), k_b = V.shape, W.shape[1]
    gram_a, gram_b, inner = (torch.zeros(*shape, dtype=torch.float64) for shape in ((k_a, k_a), (k_b, k_b), (k_a, k_b)))
    space, layers = a.space or b.space, list[SpaceShare]()
    for name, numel, start in [(it.name, it.numel, it.offset) for it in space.entries] if space else [("all", n, 0)]:
        of_a, of_b = torch.zeros_like(gram_a), torch.zeros_like(gram_b)
        for v, w in runs(start, start + numel, V, W):
            of_a, of_b, inner = of_a + (v.T @ v).cpu(), of_b + (w.T @ w).cpu(), inner + (v.T @ w).cpu()
        layers.append(SpaceShare(name, numel, of_a.trace().item() / k_a, of_b.trace().item() / k_b, numel / n))
        gram_a, gram_b = gram_a + of_a, gram_b + of_b
    refuse_oblique("subspace_overlap", gram_a)
    refuse_oblique("subspace_overlap", gram_b)
    smaller, larger = (V, W) if k_a < k_b else (W, V)
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)  # descending
    across = inner.T if k_a < k_b else inner  # [larger, smaller]
    left = torch.zeros(across.shape[1], across.shape[1], dtype=torch.float64)
    for v, w in runs(0, n, larger, smaller):
        rest = w - v @ across.to(v.device)
        left += (rest.T @ rest).cpu()
    sines = torch.linalg.eigvalsh(left).clamp(0.0, 1.0).sqrt()  # ascending
    angles = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()).rad2deg()
    k = min(k_a, k_b)
    overlap = AgainstChance(min(1.0, inner.square().sum().item() / k), k_a * k_b / (n * k))
    converged = a.recomputed and a.all_converged, b.recomputed and b.all_converged
    told = tuple(cosines.tolist()), tuple(angles.tolist()), converged
    return SubspaceOverlap(n, (k_a, k_b), overlap, *told, tuple(layers) if space is not None else ())


def _refuse_different(a: Eigenpairs, b: Eigenpairs) -> None:
    """By names and shapes, where both are known; by the length of the vectors elsewhere."""
    if a.space is not None and b.space is not None:
        here, there = (
            [(it.name, it.shape) for it in pairs.space.entries] for pairs in (a, b) if pairs.space is not None
        )
        for (name, shape), (other, size) in zip(here, there, strict=False):
            if (name, shape) != (other, size):
                raise _different(
                    f"{name!r} of shape {shape} in the first stands where {other!r} of shape {size} does in the second"
                )
        for longer, which, lacking in (
            (here[len(there) :], "first", "second"),
            (there[len(here) :], "second", "first"),
        ):
            if longer:
                raise _different(f"{longer[0][0]!r} is in the {which} and not in the {lacking}")
    lengths = [len(pairs.vectors) for pairs in (a, b) if pairs.vectors is not None]
    if lengths[0] != lengths[1]:
        raise _different(f"the vectors have {lengths[0]} entries in the first and {lengths[1]} in the second")


def _different(found: str) -> InvalidArgument:
    return InvalidArgument(f"subspace_overlap: {found}. Compare eigenpairs over the same parameters of one model.")
