"""The diagonal of the Hessian from random signs that are independent for each example."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators.counts import check_count
from curvkit.estimators.expected import Expected, held_bytes, refuse_too_large
from curvkit.estimators.recordings.coverage import coverage, refuse_not_finite, refuse_uncovered
from curvkit.estimators.recordings.in_training import InTraining
from curvkit.estimators.recordings.probing import Probing, moved_bytes
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.scrutiny import refuse_without_examples
from curvkit.estimators.recordings.training import (
    denominator_of,
    loss_of,
    refuse_half_precision,
    refuse_unfit,
    twice_differentiable,
)
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators.output_graph import refuse_other_ways
from curvkit.operators.plan import relative_size
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

CHECKS, SETUP, PER_PROBE = 0.5, 1.0, 2.5
"""Gradients of the data that the checks, the pass with its graph, and the signs are counted as; no clock is behind it."""
SHARE = 16
"""What a probe holds is counted on one row in so many of the first batch."""
VECTORS = 9
"""Of the length of the parameters: mean, sum of squares, one sample, temporaries, and what the allocator keeps of them."""
INSTEAD = "Use Fisher, which needs no second derivatives, or give the data in smaller batches"


@dataclass(frozen=True)
class ExampleHutchinson(InTraining):
    """The diagonal of the exact Hessian, from one product with signs that are independent for each example.

        d = (1 / W) sum_n V_n * (H_n V)_n,    H = (1 / W) sum_n H_n,    V_n = a_n b_n' for a matrix, random signs else

    Hutchinson's probe takes the same signs for all examples. With signs of its own each example is a sample, so that one product averages
    N of them: the entries of V_n are uncorrelated in pairs, which is all that E d = diag H needs. Parameters without a rule (`coverage`)
    share one sign vector over all examples, as in Hutchinson's probe, and are named in the notes. The gain is in the number of examples:
    with a few long sequences it is at most about their number.

    Parameters that are used once, each entry with one entry of the output z of its layer per example (dense layers on vectors), need
    no signs of their own: signs u_n at z, with x^2 exact, leave less noise.

        d_W = (1 / W) sum_n (u_n * (H_zz,n u_n)) (x_n^2)',    u_n in {-1, +1}

    Args:
        num_probes: m; the standard error is known from two on.

    Accuracy: Var d_j = sum_n sum_(k != j) (H_n)_jk^2 / (m W^2), about. Where examples have much in common, as in trained networks, this is
        1 / N of Hutchinson's; where their H_n are unrelated, so that they cancel in H anyway, nothing is gained.
    Source: ours; signs per example at the outputs of layers are in Martens, Sutskever & Swersky (2012), "Estimating the Hessian by
        back-propagating curvature". Differs: signs at the parameters where they are shared over positions or tied, so that it is exact.
    Cost: a forward pass and a backward pass with their graph, for one batch once, counted as 1 gradient; per probe a pass back through
        both and two gradients of the parameters, counted as 2.5. Memory of a Hessian product with its graph.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        >>> objective = Objective(torch.nn.Linear(3, 1), F.mse_loss, [(x, x[:, :1])])
        >>> found = ExampleHutchinson().estimate(objective, seed=0)
        >>> truth = 2 * x.square().mean(0)   # linear regression: H = 2 X'X / N, and one output leaves no noise
        >>> bool(torch.allclose(found.values["weight"][0], truth))
        True
    """

    num_probes: int = 1
    matrix: ClassVar[str] = "hessian"

    def __post_init__(self) -> None:
        """Check the option."""
        check_count("ExampleHutchinson", "num_probes", self.num_probes, default=1)

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal; see the class.

        Args:
            objective: The function; its loss is a sum over examples.
            seed: Of the signs; None draws one.

        Returns:
            The diagonal, with standard errors from two probes on.

        Raises:
            UnsupportedModel: If the examples of a batch are coupled, or not to be told apart, or memory does not suffice.
            CurvkitError: If a product is not finite.
        """
        return self._estimated(objective, seed, _total)

    def estimate_residual(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal of H - G, of the Hessian without the generalised Gauss-Newton matrix.

            H - G = (1 / W) sum_n sum_k u_nk d^2 z_nk / dtheta^2,    u_n = d loss_n / dz_n held fixed

        Args:
            objective: The function; its loss takes outputs and targets.
            seed: Of the signs; None draws one.

        Returns:
            The diagonal, with standard errors from two probes on; the signs are those of `estimate`.

        Raises:
            UnsupportedModel: As for `estimate`.
            UnknownObjective: If the loss does not take outputs and targets.
            CurvkitError: If a product is not finite.
        """
        return replace(self._estimated(objective, seed, _linearised), matrix="hessian - ggn")

    def from_recording(
        self, recording: Recording, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        """Estimate the diagonal from a forward pass of training, before its backward pass; `.grad` is not touched.

        Args:
            recording: Of `recording`, whose block was left.
            outputs: Of the model, with their graph.
            targets: Of the batch.
            loss: One of torch's; None takes cross-entropy for outputs [N, C].
            seed: Of the signs; None draws one.

        Returns:
            The diagonal of the Hessian of this batch's loss, dropout as it fell.

        Raises:
            InvalidArgument: If targets or loss are missing, or the recording is not of one forward pass.
            UnsupportedModel: If a parameter has no rule, examples are coupled, a layer has no second derivative, or the pass was in half
                precision.
            CurvkitError: If a product is not finite.

        Cost: that of `estimate` without its forward pass and its checks.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
            >>> estimator = ExampleHutchinson(num_probes=2)
            >>> with estimator.recording(model) as recording:
            ...     outputs = model(x)
            >>> found = estimator.from_recording(recording, outputs, y, seed=0)
            >>> found.matrix, model.weight.grad is None
            ('hessian', True)
        """
        began, seed = time.perf_counter(), seeds.settle(seed)
        if targets is None:
            raise InvalidArgument(
                "ExampleHutchinson.from_recording: targets=None, and the Hessian belongs to the loss with its targets. Pass those of the "
                "batch."
            )
        known = loss_of("ExampleHutchinson", outputs, loss)
        refuse_unfit("ExampleHutchinson", recording, outputs)
        refuse_half_precision("ExampleHutchinson", recording)
        terms = known.terms_of(outputs, targets)
        scale, drawn = denominator_of(known, terms.weight), DiagonalSamples(list(recording.parameters))
        with twice_differentiable("ExampleHutchinson"):
            probing = Probing(recording, terms.total)
            for probe in range(self.num_probes):
                drawn.add(_filled(recording.parameters, probing.sample(seed=seed, index=probe), scale))
        spent = SETUP + PER_PROBE * self.num_probes, time.perf_counter() - began
        return self._made(drawn, seed, Cost(*spent, self.num_probes), ())

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both: the pass whose graph is kept, and signs and gradients beside it.

        Raises:
            CurvkitError: If memory runs out with one row, or with a batch that cannot be cut.

        Cost: about a gradient of a sixteenth of the first batch.
        """
        it = objective.raised()
        setups = 1 if len(it.batches) == 1 else self.num_probes
        gradients = CHECKS + SETUP * setups + PER_PROBE * self.num_probes
        return Expected(gradients, VECTORS, held_bytes(it, second=True) + _moved_bytes(it))

    def _estimated(
        self, objective: Objective, seed: int | None, total: Callable[[Objective, Tensor, Any], tuple[Tensor, float]]
    ) -> DiagonalEstimate:
        began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
        refuse_without_examples(objective, "per-example estimators")
        expected = self.expected(objective)
        refuse_too_large("ExampleHutchinson", objective, expected, instead=INSTEAD)
        covered, drawn = coverage(objective), DiagonalSamples(objective.parameters.names)
        count = len(objective.batches)
        parameters = dict(zip(objective.parameters.names, objective.tensors, strict=True))
        kept: tuple[Probing, float] | None = None
        for probe in range(self.num_probes):
            sums, weights = dict[str, Tensor](), list[float]()
            for index in range(count):
                last = count > 1 or probe == self.num_probes - 1
                with objective.measuring():
                    probing, weight = kept or _probing(objective, covered.ruled, index, total)
                    kept = None if last else (probing, weight)
                    found = probing.sample(seed=seed, index=probe * count + index, last=last)
                weights.append(weight)
                sums |= {name: sums[name] + part if name in sums else part for name, part in found.items()}
            drawn.add(_filled(parameters, sums, objective.denominator(weights)))
        spent = expected.gradients, time.perf_counter() - began
        return self._made(
            drawn,
            seed,
            Cost(*spent, self.num_probes, expected.peak_bytes(objective)),
            _shared(covered.refused) + objective.silenced_notes,
        )

    def _made(self, drawn: DiagonalSamples, seed: int, cost: Cost, notes: tuple[str, ...]) -> DiagonalEstimate:
        return DiagonalEstimate(
            drawn.mean, drawn.stderr, self.matrix, repr(self), cost, drawn.size, seed, drawn.sums, notes
        )


def _shared(refused: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{n} has no rule ({reason}): its signs are shared by all examples" for n, reason in refused.items())


def _probing(
    objective: Objective,
    ruled: tuple[str, ...],
    index: int,
    total: Callable[[Objective, Tensor, Any], tuple[Tensor, float]],
) -> tuple[Probing, float]:
    """A batch run and recorded, and its weight."""
    own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    with Recording({name: own[name] for name in ruled}, rows(objective.batches[index]) or 0) as recording:
        outputs, targets = objective.outputs(index)
    refuse_uncovered("ExampleHutchinson", recording.refused, ruled)
    value, weight = total(objective, outputs, targets)
    return Probing(recording, value, {name: p for name, p in own.items() if name not in ruled}), weight


def _moved_bytes(objective: Objective) -> int:
    """What a probe holds beside the graph of the largest batch, counted on a few rows of the first."""
    own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    first = objective.batches[0]
    if not objective.divisible:
        return 0  # `coverage` refuses it
    few = max(1, (rows(first) or 0) // SHARE)
    for part in (map_tensors(lambda tensor: tensor[:few], first), first):
        try:
            with objective.measuring(), Recording(own, rows(part) or 1) as recording:
                objective.with_batches([part]).outputs(0)
            return math.ceil(moved_bytes(recording) * max(relative_size(b, part) for b in objective.batches))
        except Exception:
            if part is first:
                raise
    return 0


def _total(objective: Objective, outputs: Tensor, targets: Any) -> tuple[Tensor, float]:
    """The loss as a sum, and its weight."""
    terms = objective.terms_of(outputs, targets)
    return terms.total, terms.weight


def _linearised(objective: Objective, outputs: Tensor, targets: Any) -> tuple[Tensor, float]:
    """<dL/dz held fixed, z>, whose Hessian is H - G, and the weight."""
    z = outputs.detach().requires_grad_()
    terms = objective.terms_of(z, targets)
    refuse_other_ways(objective, terms)
    if not terms.total.requires_grad:
        return terms.total, terms.weight
    (u,) = torch.autograd.grad(terms.total, z, materialize_grads=True)
    return (u * outputs).sum(), terms.weight


def _filled(parameters: Mapping[str, Tensor], found: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """One sample, for all parameters; zero for those that are not used."""
    sample = {
        name: (found[name] / scale).detach() if name in found else torch.zeros_like(p) for name, p in parameters.items()
    }
    refuse_not_finite("ExampleHutchinson", sample)
    return sample
