# %% [markdown]
# # Write an estimator
#
# An estimator of a diagonal is a frozen dataclass of options with one method. This one takes the diagonal of the GGN (the
# generalised Gauss-Newton matrix) from products with random signs, as Hutchinson did for the Hessian: d = mean v * (G v).

# %%
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from curvkit import Objective, seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators import Exact
from curvkit.models import MLP
from curvkit.operators import GGN
from curvkit.results import Cost, DiagonalEstimate, DiagonalSamples
from curvkit.testing import check_estimator


@dataclass(frozen=True)
class SignedGGN:
    """The diagonal of the GGN from products with random signs."""

    num_probes: int = 4
    matrix: ClassVar[str] = "ggn"

    def __post_init__(self):
        if self.num_probes < 1:
            raise InvalidArgument(f"SignedGGN: num_probes={self.num_probes} must be at least 1. The default is 4.")

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        began, seed = time.perf_counter(), seeds.settle(seed)
        G = GGN(objective.raised())
        drawn = DiagonalSamples(G.space.names)
        for probe in range(self.num_probes):
            v = seeds.signs(G.n, seed, "signed ggn", probe, dtype=G.dtype, device=G.device)
            drawn.add(G.space.unflatten(v * G.matvec(v)))
        cost = Cost(2.0 * self.num_probes, time.perf_counter() - began, products=self.num_probes)
        return DiagonalEstimate(drawn.mean, drawn.stderr, self.matrix, repr(self), cost, drawn.size, seed, drawn.sums)


# %% [markdown]
# The contract holds all that curvkit relies on: names, shapes and dtypes, the same bits for the same seed, nothing disturbed (also when the
# forward pass raises), the weighting of uneven batches, and the dense truth within the standard errors that are given.

# %%
torch.set_num_threads(1)
check_estimator(SignedGGN())

# %% [markdown]
# A package offers it to `curvkit diagonal --estimator signed-ggn --set num_probes=20` by two lines of its pyproject.toml:
#
# ```toml
# [project.entry-points."curvkit.estimators"]
# signed-ggn = "signed_ggn:SignedGGN"
# ```
#
# Its options are read by the annotations of the class. `curvkit estimators` lists it without importing it.

# %%
torch.manual_seed(0)
x, y = torch.randn(64, 10), torch.randint(3, (64,))
objective = Objective(MLP([10, 20, 3], "tanh"), F.cross_entropy, [(x, y)])
found, truth = SignedGGN(num_probes=50).estimate(objective, seed=0), Exact("ggn").estimate(objective)

print(f"{'parameter':16} {'sum':>9} {'+-':>9} {'truth':>9}")
for layer, exact in zip(found.layers, truth.layers, strict=True):
    print(f"{layer.name:16} {layer.sum:9.4f} {layer.stderr:9.4f} {exact.sum:9.4f}")
    assert abs(layer.sum - exact.sum) < 5 * layer.stderr
