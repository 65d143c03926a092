"""What a recording of a forward pass in training must be before single examples can be taken from it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.estimators.recordings.recorded_graph import refuse_checkpoints, unseen
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.rule_check import compared, refuse_unlike
from curvkit.losses import KnownLoss, as_loss

PURPOSE = "examples apart"


def loss_of(estimator: str, outputs: Any, loss: Any = None) -> KnownLoss:
    """The loss of a training step: the one that is named, or cross-entropy for outputs [N, C].

    Args:
        estimator: For messages.
        outputs: Of the model.
        loss: One of torch's losses, as a function or a module; None takes cross-entropy.

    Returns:
        The loss, whose terms are known.

    Raises:
        InvalidArgument: If it is not named, and the outputs are not [N, C].
        UnsupportedModel: If it is not known to be a sum over examples.

    Example:
        >>> loss_of("Fisher", torch.zeros(4, 3)).name
        'cross_entropy'
    """
    if loss is None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
            got = (
                f"of shape {tuple(outputs.shape)}, {outputs.dtype}"
                if isinstance(outputs, Tensor)
                else f"a {type(outputs).__name__}"
            )
            raise InvalidArgument(
                f"{estimator}.from_recording: the outputs are {got}, and loss=None stands for cross-entropy with outputs [N, C]. "
                "Name the loss, for example loss=torch.nn.functional.mse_loss, and pass the outputs as one tensor."
            )
        return KnownLoss(F.cross_entropy, {})
    known = as_loss(loss)
    if not isinstance(known, KnownLoss) or not known.divisible:
        raise UnsupportedModel(
            f"{estimator}.from_recording: the loss {known.name} is not known to be a sum over examples. Use one of torch's own losses, for "
            "example F.cross_entropy."
        )
    return known


def denominator_of(loss: KnownLoss, weight: float) -> float:
    """What the total of one batch is divided by, as `Objective.denominator` says for all.

    Args:
        loss: Of the step.
        weight: `LossTerms.weight` of the batch.

    Returns:
        The weight, or 1 for a loss that is a sum.

    Raises:
        UnknownObjective: If the batch has no term.
    """
    if loss.reduction == "sum":
        return 1.0
    if not weight > 0.0:
        raise UnknownObjective(
            "from_recording: the batch has no loss term: every target is ignored, or has class weight 0. Skip such batches."
        )
    return weight


def refuse_half_precision(estimator: str, recording: Recording) -> None:
    """Refuse second derivatives of what was computed in half precision.

    Args:
        estimator: For messages.
        recording: Of the forward pass.

    Raises:
        UnsupportedModel: Naming the parameter.
    """
    for use in recording.uses:
        if use.kind.dtype.itemsize < 4:
            raise UnsupportedModel(
                f"{estimator}.from_recording: a call of {use.forms[0].name} was computed in {use.kind.dtype}, whose rounding second "
                "derivatives do not survive. Record the pass without torch.autocast and with parameters in float32, use estimate(), which "
                "raises the precision, or use Fisher."
            )


@contextlib.contextmanager
def twice_differentiable(estimator: str) -> Generator[None]:
    """Say what to do where a layer of a model in training has no second derivative.

    Args:
        estimator: For the message.

    Raises:
        UnsupportedModel: In place of torch's error, whose text it has.
        RuntimeError: Torch's, where it is something else.
    """
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error) and "not implemented" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise UnsupportedModel(
            f"{estimator}.from_recording: a layer has no second derivative ({reason}). Run the forward pass with attention by "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use Fisher."
        ) from error


def refuse_unfit(estimator: str, recording: Recording, outputs: Any) -> None:
    """Refuse a recording whose examples cannot be told apart, or that has not seen all.

    In training the rules cannot be held against examples run alone. Instead gradients of the outputs of one half of the examples are
    looked at: they must vanish at the rows of the other half, wherever a parameter is used. The gradients of parameters that the rules
    give are held against those of the same backward pass, see `refuse_unlike`, the first time that a model is run with calls of such
    shapes; parameters with hooks are left out of that. And the graph is walked through for uses of parameters that were not seen.

    Args:
        estimator: For messages.
        recording: Of one forward pass; its block is left.
        outputs: Of the model, [N, ...].

    Raises:
        InvalidArgument: If it is not one forward pass, or the outputs are not of it.
        UnsupportedModel: Naming what couples the examples, or the parameter that has no rule.

    Cost: a backward pass without gradients of parameters, two where positions lie before examples; the first time about
        one gradient more.
    """
    name = f"{estimator}.from_recording"
    refuse_other_passes(name, recording, outputs)
    if recording.coupled:
        raise UnsupportedModel(
            f"{name}: {recording.coupled} couples the examples, so that they have no gradients of their own. Put such layers into "
            "evaluation mode, or normalise by groups or layers."
        )
    for parameter, reason in recording.refused.items():
        layer = (
            type(recording.model.get_submodule(parameter.rpartition(".")[0])).__name__ if recording.model else "model"
        )
        raise UnsupportedModel(
            f"{name}: {parameter} ({layer}) has no rule ({reason}). Leave it out, recording(model, parameters=[...]), or use "
            "estimate(), which treats it in another way."
        )
    for use in recording.uses:
        if use.overwritten:
            raise UnsupportedModel(
                f"{name}: what went into a call of {use.forms[0].name} was overwritten afterwards. Use the out-of-place form there, "
                "or leave the parameter out."
            )
    hidden = unseen(recording, outputs)
    if hidden is not None:
        raise UnsupportedModel(
            f"{name}: {hidden} is used in a way that the recording did not see, as inside compiled or scripted code, or a "
            "torch.autograd.Function. Leave it out, recording(model, parameters=[...]), or record the model that is not compiled."
        )
    _refuse_by_gradients(name, recording, outputs)


def refuse_other_passes(name: str, recording: Recording, outputs: Any) -> None:
    """Refuse what is not one forward pass, or outputs that are not of it.

    Args:
        name: Of estimator and method, for messages.
        recording: Its block is left.
        outputs: Of the model, [N, ...].

    Raises:
        InvalidArgument: Saying which.
        UnsupportedModel: If part of it is in a reentrant checkpoint, whose parameters are not in the graph.
    """
    if recording.calls != 1:
        raise InvalidArgument(
            f"{name}: the model was called {recording.calls} times in the recording; it holds one forward pass. Make a recording for each."
        )
    if not recording.num_examples:
        raise InvalidArgument(
            f"{name}: the number of examples is not known: the model's call has no tensor with rows first. Give the batch as the first "
            "tensor of the call, examples in dimension 0."
        )
    if not isinstance(outputs, Tensor) or not outputs.ndim or outputs.shape[0] != recording.num_examples:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise InvalidArgument(
            f"{name}: outputs has {got}, and the batch {recording.num_examples} examples. Pass the outputs of the recorded call as one "
            "tensor with examples in dimension 0."
        )
    if not outputs.requires_grad:
        raise InvalidArgument(
            f"{name}: the outputs have no graph. Record with gradients on, and call from_recording before loss.backward(), or with "
            "loss.backward(retain_graph=True)."
        )
    refuse_checkpoints(name, outputs)


def _refuse_by_gradients(name: str, recording: Recording, outputs: Tensor) -> None:
    N, calls = recording.num_examples, [use.output for use in recording.uses]
    if not calls:
        return
    draw, parameters = seeds.generator(0, PURPOSE), compared(recording)
    half = torch.randperm(N, generator=draw)[: (N + 1) // 2]
    chosen = torch.zeros(N, dtype=torch.bool).index_fill_(0, half, True).to(outputs.device)
    s = torch.randn(outputs.shape, generator=draw, dtype=torch.float64).to(outputs)
    elsewhere = any(use.shape[0] != N or (len(use.shape) > 2 and use.shape[1] == N) for use in recording.uses)
    for own in (chosen, ~chosen) if elsewhere else (chosen,):
        masked = s * own.to(s).view(-1, *(1,) * (s.ndim - 1))
        wanted: list[Any] = [*calls, *(parameters.values() if own is chosen else ())]
        found: Any = torch.autograd.grad(outputs, wanted, masked, retain_graph=True, allow_unused=True)
        for use, g in zip(recording.uses, found, strict=False):
            if g is None:
                continue
            for form in use.forms:
                others = form.outgoing(g)[~own]
                if bool(others.isfinite().all()) and bool(others.any()):
                    raise UnsupportedModel(
                        f"{name}: the outputs of some examples depend on the rows of others where {form.name} is used: the model couples "
                        "its examples, or keeps them in another dimension than their number suggests. Put examples into dimension 0."
                    )
        if own is chosen:
            gradients = dict(zip(parameters, found[len(calls) :], strict=True))
            refuse_unlike(name, recording, found[: len(calls)], gradients)
