"""What a loss says of the distribution of targets, so that they can be drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.losses import KnownLoss, Loss, token_cross_entropy

PURPOSE = "labels of the model"
WEIGHTS = ("weight", "pos_weight")


@dataclass(frozen=True)
class Draw:
    """Random numbers for the targets of a batch, or of a run of its rows: the rows get the same ones in either case."""

    seed: int
    index: int
    """Different for each batch and sample."""
    begin: int = 0
    """First row of the run."""
    size: int | None = None
    """Rows of the whole batch; None: the run is all of it."""

    def numbers(self, kind: Callable[..., Tensor], like: Tensor) -> Tensor:
        """Draw them.

        Args:
            kind: torch.rand or torch.randn.
            like: Of their shape, rows in dimension 0, and on their device.

        Returns:
            In float64, drawn on the CPU.
        """
        shape, draw = tuple(like.shape), seeds.generator(self.seed, PURPOSE, self.index)
        if not shape or self.size is None:
            return kind(shape, generator=draw, dtype=torch.float64).to(like.device)
        whole = kind((self.size, *shape[1:]), generator=draw, dtype=torch.float64)
        return whole[self.begin : self.begin + shape[0]].to(like.device)


def refuse_without_likelihood(loss: Loss, estimator: str) -> tuple[str, ...]:
    """Refuse losses that are no negative log-likelihood of the targets.

    Cross-entropy is that of a categorical distribution, binary cross-entropy of independent coins, the squared error (z - y)^2 of a
    normal distribution of variance 1/2. Label smoothing changes the targets of training and not the distribution that the model
    states: the likelihood is taken without it.

    Args:
        loss: Of the function.
        estimator: For the message.

    Returns:
        Notes.

    Raises:
        UnsupportedModel: If there is no likelihood, or terms have weights.
    """
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


def draw_cotangent(loss: KnownLoss, outputs: Tensor, targets: Tensor | None, draw: Draw) -> Tensor:
    """Draw targets from the model, and differentiate their negative log-likelihood in the outputs.

    Args:
        loss: A likelihood; see `refuse_without_likelihood`.
        outputs: z of a batch.
        targets: The true ones; they say which terms are ignored. None: all count.
        draw: Of the random numbers.

    Returns:
        d(-log p(y' | z)) / dz, of the shape of z, with y' ~ p(. | z); zero where the target is ignored.

    Cost: some passes over z.
    """
    return DRAWS[loss.function](outputs.detach(), targets, loss.options, draw)


def weight_of(loss: KnownLoss, outputs: Tensor, targets: Tensor | None) -> float:
    """What the loss of a batch divides by: its terms that count.

    Args:
        loss: Of the batch; a likelihood if there are no targets.
        outputs: z of a batch.
        targets: Of the batch; None: all count.

    Returns:
        As `LossTerms.weight`.

    Example:
        >>> weight_of(KnownLoss(F.cross_entropy, {}), torch.zeros(4, 3), None)
        4.0
    """
    z = outputs.detach()
    return loss.terms_of(z, _all_counting(loss, z) if targets is None else targets).weight


def _all_counting(loss: KnownLoss, outputs: Tensor) -> Tensor:
    if loss.function not in (F.cross_entropy, token_cross_entropy):
        return torch.zeros_like(outputs)
    shape = list(outputs.shape)
    del shape[-1 if loss.function is token_cross_entropy else min(1, outputs.ndim - 1)]
    label = 1 if loss.options.get("ignore_index", -100) == 0 else 0
    return torch.full(shape, label, device=outputs.device)


def _classes(z: Tensor, targets: Tensor | None, options: Mapping[str, Any], draw: Draw) -> Tensor:
    """softmax(z) - e_y', classes in dimension 1, or 0 of a single example."""
    dim = 0 if z.ndim == 1 else 1
    return _categorical(z, dim, _counted(targets, z, options), draw)


def _tokens(z: Tensor, targets: Tensor | None, options: Mapping[str, Any], draw: Draw) -> Tensor:
    """softmax(z) - e_y', classes in the last dimension."""
    return _categorical(z, z.ndim - 1, _counted(targets, z, options), draw)


def _counted(targets: Tensor | None, z: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """[...] 1 where a target counts; None where all do, as targets that are probabilities."""
    if targets is None or targets.is_floating_point():
        return None
    return targets.long().ne(options.get("ignore_index", -100)).to(z)


def _categorical(z: Tensor, dim: int, counted: Tensor | None, draw: Draw) -> Tensor:
    table = z.softmax(dim).movedim(dim, -1)
    steps = table.double().cumsum(-1)
    u = draw.numbers(torch.rand, table[..., 0])[..., None] * steps[..., -1:]
    labels = torch.searchsorted(steps, u, right=True).clamp(max=table.shape[-1] - 1)
    found = table.scatter_add(-1, labels, torch.full_like(u, -1.0, dtype=table.dtype)).movedim(-1, dim)
    return found if counted is None else found * counted.unsqueeze(dim)


def _coins(z: Tensor, targets: Tensor | None, options: Mapping[str, Any], draw: Draw) -> Tensor:
    """sigmoid(z) - y'."""
    p = torch.sigmoid(z)
    return p - (draw.numbers(torch.rand, z) < p).to(p)


def _normal(z: Tensor, targets: Tensor | None, options: Mapping[str, Any], draw: Draw) -> Tensor:
    """2 (z - y') with y' - z of variance 1/2."""
    return draw.numbers(torch.randn, z).to(z) * 2**0.5


DRAWS = {
    F.cross_entropy: _classes,
    token_cross_entropy: _tokens,
    F.binary_cross_entropy_with_logits: _coins,
    F.mse_loss: _normal,
}
"""By the function of the loss."""
