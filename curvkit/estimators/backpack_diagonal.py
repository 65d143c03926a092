"""The diagonals that the library BackPACK computes, held against curvkit's own numbers before they are given out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from curvkit import seeds
from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.estimators.counts import check_count
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.estimators.likelihoods import Draw, draw_cotangent
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.estimators.through_backpack.agreement import (
    few_rows,
    refuse_other_gradient,
    refuse_other_hessian,
    refuse_other_squares,
)
from curvkit.estimators.through_backpack.library import Extension, Library
from curvkit.estimators.through_backpack.losses import INSTEAD, loss_module
from curvkit.estimators.through_backpack.passes import Passes
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples

CHECKS = 2.0
"""Gradients of the data that the comparison beforehand is counted as: one of all the data, and what few examples take."""
COPIES = 6.0
"""The copy, its gradients, BackPACK's numbers for a batch, their sum, and the gradient twice."""
SAMPLED = 2.0
"""Mean and spread of the samples."""
NOTED = 100.0
"""Gradients of the data from which on a note says what is cheaper."""
FEW, CHOICE = -1, 0
"""Number of the draw for the few examples that are compared, and seed of the entries that are."""


@dataclass(frozen=True)
class BackPACK:
    """A diagonal by the library BackPACK, which takes a factor of the loss's second derivative back through the modules of a network.

        DiagHessian     diag H, exact                               matrix "hessian"
        DiagGGNExact    diag G, exact                               matrix "ggn"
        DiagGGNMC       diag G, by targets drawn from the model     matrix "ggn" (the Fisher matrix, which is G for the losses it takes)

    BackPACK works on a copy, with curvkit's weights of batches and curvkit's draws; the user's model and BackPACK's global state stay as
    they are. It keeps its numbers per module, and is wrong without a word where the function is more than its modules: so its gradient is
    held against that of the model on all the data, and its diagonal, example by example, on the first and last row of the first and
    last batch (the GGN's in every entry, the Hessian's in 8 entries of each parameter tensor). Refused by name, with the estimator to use
    instead: ignored targets, class weights, probabilities as targets, tied weights, layers used twice, options that BackPACK's rules do not
    look at (padding_mode, divisor_override), modules without a rule, operations outside of modules that its converter does not know,
    several inputs.

    Args:
        extension: Of BackPACK, as above.
        num_samples: Of DiagGGNMC; its standard error is known from two on. The exact ones take 1 alone.
        max_gradients: What is counted as more work than this, in gradients of the data, is refused.

    Source: Dangel, Kunstner & Hennig (2020), "BackPACK: Packing more into backprop". Differs: its draws are curvkit's; batches are
        joined by their numbers of terms, and cut where the columns would take more than 256 MiB.
    Cost: by counting, 3 gradients of the data and one more for each column: an output of an example for DiagGGNExact; for DiagHessian two
        more for each entry of an activation that is not piecewise linear (2 061 in all on a network 784-512-512-10 with tanh, 13 with
        ReLU); 2 and 2 for each sample of DiagGGNMC. `Exact("ggn")` and `Fisher` take less for the numbers of the latter two.

    Example:
        >>> BackPACK("DiagHessian").matrix, BackPACK("DiagGGNExact").matrix, BackPACK("DiagGGNMC", num_samples=8).matrix
        ('hessian', 'ggn', 'ggn')
    """

    extension: Extension = "DiagHessian"
    num_samples: int = 1
    max_gradients: float = 1000.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.extension not in get_args(Extension):
            raise InvalidArgument(
                f"BackPACK: extension={self.extension!r} is not one of {', '.join(get_args(Extension))}. The default is DiagHessian."
            )
        check_count("BackPACK", "num_samples", self.num_samples, default=1)
        if self.num_samples > 1 and self.extension != "DiagGGNMC":
            raise InvalidArgument(
                f"BackPACK: num_samples={self.num_samples}, but {self.extension} draws nothing. Leave it out, or use DiagGGNMC."
            )
        number = isinstance(self.max_gradients, int | float) and not isinstance(self.max_gradients, bool)
        if not number or not self.max_gradients > 0:
            raise InvalidArgument(
                f"BackPACK: max_gradients={self.max_gradients!r} must be a number > 0. It is the most that the diagonal may cost, in "
                "gradients of the data; the default is 1000."
            )

    @property
    def matrix(self) -> Literal["hessian", "ggn"]:
        """What is estimated: "hessian" or "ggn"."""
        return "hessian" if self.extension == "DiagHessian" else "ggn"

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both; the model is copied and run on one example.

        Raises:
            MissingExtra: If BackPACK is not installed.
            UnsupportedModel: If BackPACK cannot treat the objective.
        """
        objective = objective.raised()
        return self._expected(Passes.of(objective, self.extension, Library()))

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Compute the diagonal; see the class.

        Args:
            objective: The function.
            seed: Of the targets of DiagGGNMC; None draws one. The exact ones do not use it.

        Returns:
            The diagonal; of DiagGGNMC with standard errors from two samples on.

        Raises:
            MissingExtra: If BackPACK is not installed.
            UnsupportedModel: If BackPACK cannot treat the objective, would be wrong on it, or costs more than `max_gradients`.
            CurvkitError: If an entry is not finite.
        """
        began, library, objective = time.perf_counter(), Library(), objective.raised()
        loss_module(objective, self.extension)  # refused before the model is run
        gradient = objective.gradient()  # what the model itself raises, it raises here
        refuse_not_finite(f"BackPACK({self.extension!r})", objective.parameters.unflatten(gradient))
        passes = Passes.of(objective, self.extension, library)
        expected = self._expected(passes)
        self._refuse_expensive(objective, passes, expected)
        sampled = self.extension == "DiagGGNMC"
        seed = seeds.settle(seed) if sampled else CHOICE
        for few in few_rows(objective):
            self._compare(objective, passes, few, seed)
        drawn = DiagonalSamples(objective.parameters.names)
        for sample in range(self.num_samples):
            found, own = passes.complete((seed, sample * len(objective.batches)) if sampled else None)
            if not sample:
                refuse_other_gradient(self.extension, objective, own, gradient)
            refuse_not_finite(f"BackPACK({self.extension!r})", found)
            drawn.add(found)
        cost = Cost(expected.gradients, time.perf_counter() - began, peak_bytes=expected.peak_bytes(objective))
        facts = (drawn.stderr, drawn.size, seed, drawn.sums) if sampled else (None, 0, None, None)
        return DiagonalEstimate(
            drawn.mean,
            facts[0],
            self.matrix,
            repr(self),
            cost,
            *facts[1:],
            notes=self._notes(objective, expected),
        )

    def _expected(self, passes: Passes) -> Expected:
        samples = self.num_samples if self.extension == "DiagGGNMC" else 1
        return Expected(CHECKS + samples * (1 + passes.columns), COPIES + SAMPLED, passes.held_bytes)

    def _refuse_expensive(self, objective: Objective, passes: Passes, expected: Expected) -> None:
        name, instead = f"BackPACK({self.extension!r})", INSTEAD[self.extension]
        if expected.gradients > self.max_gradients:
            bent = f" (2 for each of {passes.network.bent} entries of activations that are not piecewise linear)"
            raise UnsupportedModel(
                f"{name}: it would take the work of about {expected.gradients:,.0f} gradients of the data, one for each of "
                f"{passes.columns:,} columns per example{bent if self.extension == 'DiagHessian' and passes.network.bent else ''}, and "
                f"max_gradients={self.max_gradients:g}. Use {instead}, or set max_gradients higher."
            )
        refuse_too_large(name, objective, expected, instead=f"Use {instead}")

    def _compare(self, objective: Objective, passes: Passes, few: Objective, seed: int) -> None:
        """Hold BackPACK's diagonal on a few examples against ours."""
        copy = passes.network.objective.with_batches(few.batches)
        if self.extension == "DiagHessian":
            refuse_other_hessian(self.extension, few, passes.over(copy)[0], seed=CHOICE)
        elif self.extension == "DiagGGNExact":
            refuse_other_squares(self.extension, few, passes.over(copy)[0])
        else:
            with few.measuring(), torch.no_grad():
                outputs, targets = few.outputs(0)
                s = draw_cotangent(objective.loss, outputs, targets, Draw(seed, FEW))
            refuse_other_squares(self.extension, few, passes.over(copy, [Draw(seed, FEW)])[0], drawn=s)

    def _notes(self, objective: Objective, expected: Expected) -> tuple[str, ...]:
        notes: list[str] = []
        smoothing = getattr(objective.loss, "options", {}).get("label_smoothing", 0.0)
        if smoothing and self.extension == "DiagGGNMC":
            notes.append(f"label smoothing {smoothing:g} is left out: targets are drawn from the model as it is")
        if expected.gradients > NOTED:
            notes.append(
                f"counted as the work of {expected.gradients:,.0f} gradients; cheaper: {INSTEAD[self.extension]}"
            )
        return tuple(notes)
