"""The diagonal of the Hessian from products with random signs."""

from __future__ import annotations

import time
from dataclasses import dataclass

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.coverage import refuse_not_finite
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

PURPOSE = "hutchinson diagonal"


@dataclass(frozen=True)
class Hutchinson:
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
        >>> x = torch.eye(3)
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])
        >>> Hutchinson(num_probes=2).estimate(objective, seed=0).values["weight"]   # H = 2/3 I: no two probes differ
        tensor([[0.6667, 0.6667, 0.6667]])
    """

    num_probes: int = 10

    def __post_init__(self) -> None:
        """Check the option."""
        if isinstance(self.num_probes, bool) or not isinstance(self.num_probes, int) or self.num_probes < 1:
            raise InvalidArgument(
                f"Hutchinson: num_probes={self.num_probes!r} must be an integer >= 1. The default is 10."
            )

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function.
            seed: Of the signs; None draws one.

        Returns:
            The diagonal, with standard errors from two probes on.

        Raises:
            UnsupportedModel: If the objective has no second derivatives that could be trusted.
            CurvkitError: If a product is not finite.
        """
        began, seed = time.perf_counter(), seeds.settle(seed)
        H = Hessian(objective)
        drawn = DiagonalSamples(H.space.names)
        for probe in range(self.num_probes):
            v = seeds.signs(H.n, seed, PURPOSE, probe, dtype=H.dtype, device=H.device)
            sample = H.space.unflatten(v * H.matvec(v))
            refuse_not_finite("Hutchinson", sample)
            drawn.add(sample)
        per = H.kind.gradients_per_product[0 if H.plan.residency == "retained" else 1]
        cost = Cost(per * self.num_probes, time.perf_counter() - began, self.num_probes)
        return DiagonalEstimate(drawn.mean, drawn.stderr, "hessian", repr(self), cost, drawn.size, seed, drawn.sums)
