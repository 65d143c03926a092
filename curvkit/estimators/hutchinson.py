"""The diagonal of the Hessian from products with random signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvkit import seeds
from curvkit.estimators.counts import check_count
from curvkit.estimators.from_products import FromProducts
from curvkit.estimators.products import OperatorDiagonal
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.operators import CurvatureOperator
from curvkit.results.diagonal_estimate import DiagonalSamples

PURPOSE = "hutchinson diagonal"
VECTORS = 5
"""Of the length of the parameters, beside what a product holds: mean, sum of squares, signs, and two temporaries."""


@dataclass(frozen=True)
class Hutchinson(FromProducts):
    """The diagonal of the Hessian by Hutchinson's probes.

        d = (1 / m) sum_i v_i * (H v_i),    v_i in {-1, +1}^n,    E d = diag H

    Needs nothing of the model but second derivatives, and is noisy: one probe is mostly off-diagonal. `ExampleHutchinson` has the same mean
    with the noise of one probe divided by the number of examples.

    Args:
        num_probes: m; the standard error is known from two on.

    Accuracy: Var d_j = sum_(k != j) H_jk^2 / m; exact for a diagonal matrix.
    Source: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix". Differs: signs only.
    Cost: m products of about two gradients.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit import Objective
        >>> x = torch.eye(3)
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])
        >>> Hutchinson(num_probes=2).estimate(objective, seed=0).values["weight"]   # H = 2/3 I: no two probes differ
        tensor([[0.6667, 0.6667, 0.6667]])
    """

    num_probes: int = 10
    instead: ClassVar[str] = "Use Fisher, which needs no second derivatives, or give the data in smaller batches"

    def __post_init__(self) -> None:
        """Check the option."""
        check_count("Hutchinson", "num_probes", self.num_probes, default=10)

    @property
    def num_products(self) -> int:
        """One per probe."""
        return self.num_probes

    @property
    def num_vectors(self) -> int:
        """The mean, the sum of squares, the signs, and temporaries."""
        return VECTORS

    def of_operator(self, A: CurvatureOperator, *, seed: int) -> OperatorDiagonal:
        """Estimate the diagonal of any operator.

            d = (1 / m) sum_i v_i * (A v_i)

        Args:
            A: Symmetric; multiplied `num_probes` times.
            seed: Probe i depends on (seed, i) alone.

        Returns:
            The diagonal, with standard errors from two probes on.

        Raises:
            CurvkitError: If a product is not finite.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> from curvkit import Objective
            >>> from curvkit.operators import GGN
            >>> x = torch.eye(2)
            >>> G = GGN(Objective(torch.nn.Linear(2, 1, bias=False), F.mse_loss, [(x, x[:, :1])]))   # I
            >>> Hutchinson(num_probes=2).of_operator(G, seed=0).values["weight"].tolist()
            [[1.0, 1.0]]
        """
        drawn = DiagonalSamples(A.space.names)
        for probe in range(self.num_probes):
            v = seeds.signs(A.n, seed, PURPOSE, probe, dtype=A.dtype, device=A.device)
            sample = A.space.unflatten(v.mul_(A.matvec(v)))
            refuse_not_finite("Hutchinson", sample)
            drawn.add(sample)
        return OperatorDiagonal(drawn.mean, drawn.stderr, drawn.size, self.num_probes, drawn.sums)
