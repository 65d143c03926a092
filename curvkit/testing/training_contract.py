"""The contract of estimators that work on a forward pass of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.errors import CurvkitError
from curvkit.estimators import TrainingEstimator
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import DiagonalEstimate
from curvkit.testing.contract import CHECK_ESTIMATOR as CONTRACT
from curvkit.testing.contract import undisturbed
from curvkit.testing.estimator_laws import ENTRYWISE, ROUNDING, Draws, compare

Form = Callable[[DiagonalEstimate, Objective], None]


def check_training(estimator: TrainingEstimator, objective: Objective, draws: Draws, form: Form, seed: int) -> None:
    """Check the pair `recording` and `from_recording` on one step of training.

    Args:
        estimator: That has both.
        objective: A classifier with one batch and cross-entropy.
        draws: Of `estimate`, for the same function.
        form: Checks an estimate.
        seed: Of all draws.

    Raises:
        InvalidArgument: Naming the first property that fails.
    """
    with undisturbed(CONTRACT, objective, "a recorded step of training"):
        try:
            found, outputs = _step(estimator, objective, seed)
        except CurvkitError:  # this one, with its options, works on whole objectives alone
            return
        form(found, objective)
        _check_graph(objective, outputs)
        again, _ = _step(estimator, objective, seed)
        if any(not torch.equal(value, again.values[name]) for name, value in found.values.items()):
            CONTRACT.refuse("same seed, same bits", f"two recorded steps with seed={seed} differ", "the same bits")
    with undisturbed(CONTRACT, objective, "a recorded step whose forward pass raised"):
        _interrupted(estimator, objective)
    if found.matrix in ENTRYWISE:
        others = Draws(lambda of, seed: _step(estimator, of, seed)[0], objective, seed)
        compare("training gives the same", "from a recorded step", draws, others)


def _step(estimator: TrainingEstimator, objective: Objective, seed: int | None) -> tuple[DiagonalEstimate, Tensor]:
    """A forward pass as a user writes it, and the estimate from it."""
    [(x, y)] = objective.batches
    recording = estimator.recording(objective.model)
    with recording:
        outputs = objective.model(x)
    return estimator.from_recording(recording, outputs, y, seed=seed), outputs


def _check_graph(objective: Objective, outputs: Tensor) -> None:
    """The outputs and their graph are those of a plain forward pass, for the user's loss and backward pass."""
    [(x, y)] = objective.batches
    plain = objective.model(x)
    limit = ROUNDING * torch.finfo(plain.dtype).eps
    if not torch.allclose(outputs, plain, rtol=limit, atol=limit):
        CONTRACT.refuse("training goes on", "the outputs of the recorded forward pass are others", "those of the model")
    try:
        got, truth = (torch.autograd.grad(F.cross_entropy(z, y), objective.tensors) for z in (outputs, plain))
    except RuntimeError as error:
        CONTRACT.refuse("training goes on", f"the backward pass after the estimate raised {error!r}", "gradients")
    for name, mine, own in zip(objective.parameters.names, got, truth, strict=True):
        if not torch.allclose(mine, own, rtol=limit, atol=limit):
            CONTRACT.refuse(
                "training goes on", f"the gradient of {name!r} after the estimate is another", "the model's"
            )


def _interrupted(estimator: TrainingEstimator, objective: Objective) -> None:
    """Let the last layer of the model raise."""

    class Interruption(Exception):
        pass

    def interrupt(module: nn.Module, inputs: object) -> None:
        raise Interruption

    *_, last = objective.model.modules()
    handle = last.register_forward_pre_hook(interrupt)
    try:
        with contextlib.suppress(Interruption):
            _step(estimator, objective, 0)
    finally:
        handle.remove()
