"""Whether the rules give the gradients of parameters in a recorded pass: along one direction, against torch.autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import grouped
from curvkit.estimators.rules.forms import Form, Signs
from curvkit.estimators.squares.watched import raised

PURPOSE = "direction of a gradient"
TOLERANCES = {8: 1e-6, 4: 0.03, 2: 0.1}
"""By the bytes of a number: TF32 and half precision round, and a rule that fails is off by about the gradient."""
HELD: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""Models, as long as they live, with hashes of the kinds of passes whose rules held."""


def compared(recording: Recording) -> dict[str, Tensor]:
    """Parameters whose gradients are to be compared, and may be asked for.

    Args:
        recording: Of the forward pass.

    Returns:
        Those without hooks, which would be called, and may change gradients; none if a pass of the same calls was compared before.
    """
    if recording.model is not None and _kind(recording) in HELD.get(recording.model, ()):
        return {}
    return {name: p for name, p in recording.parameters.items() if p.requires_grad and not p._backward_hooks}


def _kind(recording: Recording) -> int:
    """Of a pass: its calls, their shapes and parameters."""
    calls = tuple((use.shape, use.kind.dtype, type(form), form.name) for use in recording.uses for form in use.forms)
    return hash((recording.num_examples, tuple(recording.parameters), calls))


def refuse_unlike(
    name: str, recording: Recording, pulled: tuple[Tensor | None, ...], gradients: Mapping[str, Tensor | None]
) -> None:
    """Refuse parameters for which the rules give another gradient, summed over examples, than torch.autograd.

        sum_uses <dL/dz, V x>  against  <dL/dW, V>,    V = a b' with random signs

    A rule that fails passes by chance about once in forty in float32, and once in a million in float64.

    Args:
        name: Of estimator and method, for messages.
        recording: Of the forward pass.
        pulled: dL/dz of its calls, for any cotangent of the outputs.
        gradients: Of torch.autograd for the same cotangent; None is zero.

    Passes of the same calls and shapes are not compared again.

    Raises:
        UnsupportedModel: Naming the parameter.

    Cost: a few passes over the inputs and outputs of the calls, and over the gradients.
    """
    uses = grouped(recording.uses, pulled)
    draw = seeds.generator(0, PURPOSE)
    device = next((use.kind.device.type for use in recording.uses), "cpu")
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for parameter, truth in gradients.items():
            shape, own = tuple(recording.parameters[parameter].shape), uses.get(parameter, [])
            like = recording.parameters[parameter].new_empty(0)
            like = like if like.dtype.itemsize >= 4 else like.float()
            rows = shape[0] if shape else 1
            a, b = (
                (2.0 * torch.randint(2, (size,), generator=draw) - 1.0).to(like)
                for size in (rows, math.prod(shape[1:]))
            )
            total, size = like.new_zeros(()), like.new_zeros(())
            for form, g in own:
                part = _along(*raised(form, g), shape, recording.num_examples, a, b)
                total, size = total + part.sum(), size + part.square().sum()
            size = size.sqrt()
            if truth is not None:
                truth = (truth.to_dense() if truth.is_sparse else truth).to(like).reshape(rows, -1)
                total, size = total - a @ (truth @ b), size + truth.norm()
            tolerance = max((TOLERANCES[g.dtype.itemsize] for _, g in own), default=0.0)
            if bool(total.abs() > tolerance * size):
                raise UnsupportedModel(
                    f"{name}: the rules give another gradient of {parameter} than torch.autograd (by {float(total.abs() / size):.1e} of "
                    "it). Leave it out, recording(model, parameters=[...]), or use estimate(), which treats it in another way."
                )
    if gradients and recording.model is not None:
        HELD.setdefault(recording.model, set()).add(_kind(recording))


def _along(form: Form, g: Tensor, shape: tuple[int, ...], num_examples: int, a: Tensor, b: Tensor) -> Tensor:
    """The product of dL/dz and the change of z along V, the same for all examples."""
    signs = (a, b) if form.factored else ((a[:, None] * b).view(shape),)
    return g * form.probe(Signs(*(sign.expand(num_examples, *sign.shape) for sign in signs)))
