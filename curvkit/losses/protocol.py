"""What the rest of curvkit sees of a loss: (model, batch) -> LossTerms."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from curvkit.losses.batches import Batch
from curvkit.losses.terms import LossTerms

Reduction = Literal["mean", "sum", "as returned"]


class Loss(Protocol):
    """A loss whose terms are known, or which says that they are not."""

    @property
    def name(self) -> str:
        """As printed."""
        ...

    @property
    def reduction(self) -> Reduction:
        """How batches are joined: mean over all terms, sum of all terms, or one batch only."""
        ...

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Evaluate on one batch."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """What the model returns for a batch, and its targets."""
        ...

    def terms_of(self, outputs: Tensor, targets: Any) -> LossTerms:
        """Evaluate on outputs that are already there."""
        ...

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Loss:
        """The same loss with its own tensors elsewhere."""
        ...
