"""The diagonal of a few eigenpairs, alone or completed to that of the whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from curvkit.results.diagonal_estimate import DiagonalEstimate
from curvkit.results.eigenpairs import Eigenpairs


@dataclass(frozen=True, eq=False)
class EigenDiagonal(DiagonalEstimate):
    """A diagonal that rests on eigenpairs, which it carries; `save` keeps the diagonal alone.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit import Objective
        >>> from curvkit.estimators import Hutchinson, Lanczos
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> found = Lanczos(rank=1, remainder=Hutchinson(num_probes=4)).estimate(objective, seed=0)
        >>> found.eigenpairs.all_converged, round(found.explained, 3), round(found.explained_stderr, 3)   # 9 / 14
        (True, 0.643, 0.0)
    """

    eigenpairs: Eigenpairs | None = field(default=None, repr=False)
    """With recomputed residuals and converged flags; None in what `load` has read."""

    @property
    def explained(self) -> float | None:
        """Share of the eigenvalues in the trace, sum_i lambda_i / tr H; it can exceed 1 where there are negative ones.

        None where the diagonal is that of the eigenpairs alone, so that the trace of the matrix is not known.
        """
        if self.eigenpairs is None or self.matrix != "hessian":
            return None
        return math.fsum(self.eigenpairs.values.tolist()) / self.trace if self.trace else math.nan

    @property
    def explained_stderr(self) -> float | None:
        """Standard error of `explained` from that of the trace, s_tr |explained / tr H|; NaN: unknown, None: as `explained`.

        To first order, so that it means little where the trace is not known to a few standard errors.
        """
        share = self.explained
        if share is None:
            return None
        if self.sums is None or not self.trace:
            return math.nan
        whole = self.sums.merged([len(self.sums.lengths)])
        return abs(share / self.trace) * whole.stderr.item()
