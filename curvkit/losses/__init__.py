"""What a loss is: its terms and weights on a batch."""

from curvkit.losses.batches import Batch
from curvkit.losses.chunks import chunked_token_cross_entropy
from curvkit.losses.closed_forms import hessian_in_outputs
from curvkit.losses.kinds import as_loss
from curvkit.losses.known_loss import KnownLoss
from curvkit.losses.other_loss import BatchLoss, OtherLoss
from curvkit.losses.output_hessian import OutputHessian
from curvkit.losses.protocol import Loss
from curvkit.losses.terms import LossTerms
from curvkit.losses.tokens import token_cross_entropy

__all__ = [
    "Batch",
    "BatchLoss",
    "KnownLoss",
    "Loss",
    "LossTerms",
    "OtherLoss",
    "OutputHessian",
    "as_loss",
    "chunked_token_cross_entropy",
    "hessian_in_outputs",
    "token_cross_entropy",
]
