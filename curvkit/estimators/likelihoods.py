"""What a loss says of the distribution of targets, so that they can be drawn from the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.losses import KnownLoss, token_cross_entropy
from curvkit.objectives import Objective

PURPOSE = "labels of the model"
WEIGHTS = ("weight", "pos_weight")


def refuse_without_likelihood(objective: Objective, estimator: str) -> tuple[str, ...]:
    """Refuse losses that are no negative log-likelihood of the targets.

    Cross-entropy is that of a categorical distribution, binary cross-entropy of independent coins, the squared error (z - y)^2 of a
    normal distribution of variance 1/2. Label smoothing changes the targets of training and not the distribution that the model
    states: the likelihood is taken without it.

    Args:
        objective: The function.
        estimator: For the message.

    Returns:
        Notes.

    Raises:
        UnsupportedModel: If there is no likelihood, or terms have weights.
    """
    loss = objective.loss
    if not isinstance(loss, KnownLoss) or loss.function not in DRAWS:
        raise UnsupportedModel(
            f"{estimator}: the loss {loss.name} is not a likelihood that targets could be drawn from. Use cross_entropy, "
            "binary_cross_entropy_with_logits or mse_loss; or an estimator of the Hessian, for example ExampleHutchinson."
        )
    weighted = [key for key in WEIGHTS if loss.options.get(key) is not None]
    if weighted:
        raise UnsupportedModel(
            f"{estimator}: the loss {loss.name} has {weighted[0]}, so that it is no likelihood: its terms count differently. Take the "
            "weights out, or use ExampleHutchinson, which is defined with them."
        )
    smoothing = loss.options.get("label_smoothing", 0.0)
    return (
        (f"label smoothing {smoothing:g} is left out: targets are drawn from the model as it is",) if smoothing else ()
    )


def draw_cotangent(objective: Objective, outputs: Tensor, targets: Tensor, *, seed: int, index: int) -> Tensor:
    """Draw targets from the model, and differentiate their negative log-likelihood in the outputs.

    Args:
        objective: Whose loss is a likelihood.
        outputs: z of a batch.
        targets: The true ones; they say which terms are ignored.
        seed: Of the draw.
        index: Number of the draw, different for each batch and sample.

    Returns:
        d(-log p(y' | z)) / dz, of the shape of z, with y' ~ p(. | z); zero where the target is ignored.

    Cost: some passes over z.
    """
    z = outputs.detach()
    draw = seeds.generator(seed, PURPOSE, index)
    return DRAWS[objective.loss.function](z, targets, objective.loss.options, draw)


def _classes(z: Tensor, targets: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    """softmax(z) - e_y', classes in dimension 1, or 0 of a single example."""
    dim = 0 if z.ndim == 1 else 1
    return _categorical(z, dim, _counted(targets, z, dim, options), draw)


def _tokens(z: Tensor, targets: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    """softmax(z) - e_y', classes in the last dimension."""
    return _categorical(z, z.ndim - 1, _counted(targets, z, z.ndim - 1, options), draw)


def _counted(targets: Tensor, z: Tensor, dim: int, options: Mapping[str, Any]) -> Tensor | None:
    """[...] 1 where a target counts; None where all do, as targets that are probabilities."""
    if targets.is_floating_point():
        return None
    return targets.ne(options.get("ignore_index", -100)).to(z)


def _categorical(z: Tensor, dim: int, counted: Tensor | None, draw: torch.Generator) -> Tensor:
    p = z.softmax(dim)
    table = p.movedim(dim, -1)
    steps = table.reshape(-1, table.shape[-1]).double().cumsum(-1)
    u = torch.rand(len(steps), 1, generator=draw, dtype=torch.float64).to(z.device) * steps[:, -1:]
    labels = torch.searchsorted(steps, u, right=True).clamp(max=table.shape[-1] - 1).view(table.shape[:-1])
    found = (table - F.one_hot(labels, table.shape[-1]).to(p)).movedim(-1, dim)
    return found if counted is None else found * counted.unsqueeze(dim)


def _coins(z: Tensor, targets: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    """sigmoid(z) - y'."""
    p = torch.sigmoid(z)
    return p - (torch.rand(z.shape, generator=draw, dtype=torch.float64).to(z.device) < p).to(p)


def _normal(z: Tensor, targets: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    """2 (z - y') with y' - z of variance 1/2."""
    return torch.randn(z.shape, generator=draw, dtype=torch.float64).to(z) * 2**0.5


DRAWS = {
    F.cross_entropy: _classes,
    token_cross_entropy: _tokens,
    F.binary_cross_entropy_with_logits: _coins,
    F.mse_loss: _normal,
}
"""By the function of the loss."""
