"""The projections on an eigenspace and on its complement, on tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg.basis import LONG_RUN, RUN
from curvkit.parameters import Entry
from curvkit.results.eigenpairs import Eigenpairs

ORTHONORMAL = 1e-3
"""V'V may differ from the identity by so much, in the spectral norm. Searches in float32 left 1e-5 and less, up to 8 million coordinates;
the inverse of V'V takes that out."""


class _Spanned:
    """What both projections have: the vectors, checked, and u -> own u + sign V (V'V)^-1 V'u."""

    def __init__(self, eigenpairs: Eigenpairs) -> None:
        V, self.space = _fitting(type(self).__name__, eigenpairs)
        self.eigenpairs = eigenpairs
        self._rows = V.T  # [k, n], contiguous as searches leave it
        self._inverse = _inverse_gram(type(self).__name__, self._rows)

    def __repr__(self) -> str:
        """Dimension, size and convergence; not the vectors."""
        k, good = self.rank, int(self.eigenpairs.converged.sum())
        return f"{type(self).__name__}({k} eigenvectors, {good} converged, of {self.space.n:,} coordinates)"

    @property
    def rank(self) -> int:
        """Number of eigenvectors, k."""
        return self._rows.shape[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the space: pairs that have not converged span another one than that of the eigenvalues."""
        pairs, said = self.eigenpairs, list[str]()
        if len(pairs.values) < pairs.asked:
            said.append(f"{len(pairs.values)} of {pairs.asked} eigenvectors were found")
        left = len(pairs.values) - int(pairs.converged.sum())
        if left:
            said.append(f"{left} of {len(pairs.values)} eigenvectors have not converged to {pairs.tolerance:g}")
        return tuple(said)

    def _applied(self, update: Mapping[str, Tensor], own: float, sign: float) -> dict[str, Tensor]:
        """Own u + sign V (V'V)^-1 V'u."""
        self._check(update)
        flat = {entry.name: update[entry.name].detach().reshape(-1) for entry in self.space.entries}
        c = torch.zeros(self.rank, dtype=torch.float64, device=self._rows.device)
        for entry in self.space.entries:
            for _, part, rows in self._runs(entry, flat[entry.name]):
                c += (rows @ part).to(c)
        c = sign * (self._inverse @ c)
        found = {name: torch.empty_like(u, memory_format=torch.contiguous_format) for name, u in flat.items()}
        for entry in self.space.entries:
            for at, part, rows in self._runs(entry, flat[entry.name]):
                along = c.to(rows) @ rows
                found[entry.name][at] = along if own == 0.0 else own * part + along
        return {name: found[name].view(update[name].shape) for name in update}

    def _runs(self, entry: Entry, u: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A tensor in runs, with its part of V', both in the dtype of the arithmetic and on the device of the update."""
        dtype = torch.promote_types(torch.promote_types(u.dtype, self._rows.dtype), torch.float32)
        run = RUN.get(u.device.type, LONG_RUN)
        for start in range(0, entry.numel, run):
            at = slice(start, min(start + run, entry.numel))
            rows = self._rows[:, entry.offset + at.start : entry.offset + at.stop]
            yield at, u[at].to(dtype), rows.to(u.device, dtype)

    def _check(self, update: Mapping[str, Tensor]) -> None:
        """Refuse what is no update of this space."""
        of, names = type(self).__name__, self.space.names
        if set(update) != set(names):
            missing, unexpected = [n for n in names if n not in update], [n for n in update if n not in set(names)]
            raise InvalidArgument(
                f"{of}: the update lacks {missing[:3]} and has {unexpected[:3]} beside; it must have the {len(names)} names of the "
                "eigenvectors' space. Project an update of the same parameters, or compute the eigenpairs for these."
            )
        for entry in self.space.entries:
            u = update[entry.name]
            if tuple(u.shape) != entry.shape:
                raise InvalidArgument(
                    f"{of}: {entry.name!r} has shape {tuple(u.shape)} in the update, its parameter {entry.shape}. "
                    "Pass parameter-shaped tensors."
                )
            if not u.dtype.is_floating_point or u.layout is not torch.strided:
                raise InvalidArgument(
                    f"{of}: {entry.name!r} is of {u.dtype} and layout {u.layout} in the update; it must be a dense tensor of real "
                    "floating-point numbers. Convert it with .to_dense() or .to(parameter.dtype)."
                )


class Eigenspace(_Spanned):
    """u -> V (V'V)^-1 V'u, the part of an update that lies in the space of some eigenvectors.

    It is V V'u for orthonormal V. The vectors of a search are orthonormal up to the rounding of its dtype; the inverse of the small matrix
    takes that out, so that projecting twice is projecting once up to the rounding of the update, also where that is in float64. The result
    has names, shapes, dtypes and devices of the update, and tensors of its own.

    Args:
        eigenpairs: With vectors and the space that names their coordinates. The vectors are not copied: they must not change afterwards.

    Raises:
        InvalidArgument: If there are no vectors or no names, or the vectors do not fit the space, are not finite or not orthonormal; at a
            call, if the update has other names or shapes than the space, or is not of dense real floating-point tensors.

    Cost: of a call, 4 k n multiplications in float32, or float64 where update or vectors are in it, and the memory of the result; at
        construction 2 k^2 n in float64. V stays on its device: for tensors on another one, their part of V is copied at each call.
    Accuracy: sums run in float64 over runs of 65,536 products (2^24 on other devices than the CPU). One NaN in the update makes all NaN.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.estimators import Lanczos
        >>> from curvkit.objectives import Objective
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> sharp = Eigenspace(Lanczos(rank=2).eigenpairs(objective, seed=0))
        >>> [round(entry, 4) + 0.0 for entry in sharp({"weight": torch.ones(1, 3)})["weight"][0].tolist()]
        [1.0, 1.0, 0.0]
    """

    @torch.no_grad()
    def __call__(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Project.

        Args:
            update: One tensor for each name of the space, of its shape, in any order.

        Returns:
            The part within the eigenspace.
        """
        return self._applied(update, 0.0, 1.0)


class SharpComplement(_Spanned):
    """u -> u - V (V'V)^-1 V'u, an update without its part in the space of the sharpest directions.

    It is u - V V'u for orthonormal V; see `Eigenspace`. With the k eigenpairs of largest |lambda| this is the projection on flat
    directions of the theory of IRE, where a mask takes coordinates. `sharp` is what is taken out, and the two add up to the update.

    Args:
        eigenpairs: With vectors and the space that names their coordinates. The vectors are not copied: they must not change afterwards.

    Raises:
        InvalidArgument: If there are no vectors or no names, or the vectors do not fit the space, are not finite or not orthonormal; at a
            call, if the update has other names or shapes than the space, or is not of dense real floating-point tensors.

    Cost: that of `Eigenspace`.
    Accuracy: of the directions, that of the eigenpairs, which `notes` tells; whatever they are, the result is orthogonal to them.
    Source: Wang et al. (2024), "Improving generalization and convergence by enhancing implicit regularization", the projection of its
        theory; its algorithm has the mask.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.estimators import Lanczos
        >>> from curvkit.objectives import Objective
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> flat = SharpComplement(Lanczos(rank=2).eigenpairs(objective, seed=0))
        >>> [abs(round(entry, 4)) for entry in flat({"weight": torch.ones(1, 3)})["weight"][0].tolist()]
        [0.0, 0.0, 1.0]
        >>> flat
        SharpComplement(2 eigenvectors, 2 converged, of 3 coordinates)
    """

    @cached_property
    def sharp(self) -> Eigenspace:
        """The projection on what this one takes out."""
        return Eigenspace(self.eigenpairs)

    @property
    def flat_fraction(self) -> float:
        """Share of the dimensions that are kept, 1 - k / n."""
        return 1.0 - self.rank / self.space.n

    @torch.no_grad()
    def __call__(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Project.

        Args:
            update: One tensor for each name of the space, of its shape, in any order.

        Returns:
            The update without its part in the eigenspace.
        """
        return self._applied(update, 1.0, -1.0)


def _fitting(of: str, pairs: Any) -> tuple[Tensor, Any]:
    """The vectors and their space, if there are both, and they fit."""
    if not isinstance(pairs, Eigenpairs):
        raise InvalidArgument(
            f"{of}: eigenpairs={type(pairs).__name__} are no Eigenpairs. Pass those of Lanczos(rank).eigenpairs(objective)."
        )
    V, space = pairs.vectors, pairs.space
    if V is None or space is None:
        what = "vectors" if V is None else "space"
        raise InvalidArgument(
            f"{of}: the eigenpairs have no {what}; both vectors and the space that names their coordinates are needed. Take the last "
            "result of a search, as Lanczos(rank).eigenpairs(objective) does, and add space=operator.space with dataclasses.replace."
        )
    if V.ndim != 2 or V.shape[0] != space.n or not 1 <= V.shape[1] <= space.n or not V.dtype.is_floating_point:
        raise InvalidArgument(
            f"{of}: the eigenvectors are a {V.dtype} tensor of shape {tuple(V.shape)}; they must be real floating-point numbers of shape "
            f"[{space.n}, k] with 1 <= k <= {space.n}. Pass eigenpairs and space of one search."
        )
    return V.detach(), space


@torch.no_grad()
def _inverse_gram(of: str, rows: Tensor) -> Tensor:
    """(V'V)^-1 in float64, if V'V is the identity up to rounding."""
    identity = torch.eye(rows.shape[0], dtype=torch.float64, device=rows.device)
    gram = torch.zeros_like(identity)
    for part in rows.split(RUN["cpu"], 1):
        part = part.double()
        gram += part @ part.T
    off = torch.linalg.matrix_norm(gram - identity, 2).item() if bool(torch.isfinite(gram).all()) else float("nan")
    if not off <= ORTHONORMAL:
        raise InvalidArgument(
            f"{of}: the eigenvectors are not orthonormal: V'V differs from the identity by {off:.3g} (nan: they are not finite); at most "
            f"{ORTHONORMAL:g} is allowed. Pass the vectors as a search returns them, or the first factor of torch.linalg.qr(V.double())."
        )
    return torch.linalg.inv(gram)
