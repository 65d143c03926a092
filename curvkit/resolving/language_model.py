"""A language model with the checkpoint's weights, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from curvkit.losses import token_cross_entropy
from curvkit.losses.kinds import KnownLoss

Kind = Literal["causal", "masked"]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model that gives logits [N, T, V] for tokens [N, T].

    Example:
        >>> from curvkit.models import GPT
        >>> language = LanguageModel(GPT(1, 1, 2, 4, 3), "GPT of nanoGPT", "causal", vocabulary=3, context=4)
        >>> language.loss.name
        'token_cross_entropy'
    """

    model: nn.Module
    name: str
    """For people, for example "GPT2LMHeadModel"."""
    kind: Kind
    """Causal: predicts the next token; masked: the tokens at masked positions."""
    vocabulary: int
    context: int | None
    """Greatest number of tokens in one sequence; None if there is none."""
    tokenizer_places: tuple[Path, ...] = ()
    """Directories that may have its tokenizer, in order."""
    returns_object: bool = False
    """Whether the model takes `input_ids` and returns an object with `logits`, as those of Hugging Face."""
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> KnownLoss:
        """The mean cross-entropy of the predicted tokens, in nats."""
        return KnownLoss(token_cross_entropy, {}, "logits" if self.returns_object else None)

    def batch(self, inputs: Tensor, targets: Tensor) -> Any:
        """Put inputs and targets together as the model takes them.

        Args:
            inputs: [N, T].
            targets: [N, T].

        Returns:
            A batch of an `Objective`.
        """
        return {"input_ids": inputs, "labels": targets} if self.returns_object else (inputs, targets)
