"""Windows of tokens in batches: what a language model is measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.models import spaced_windows
from curvkit.resolving.language_model import LanguageModel
from curvkit.resolving.texts import Tokens

DEFAULT_LENGTH = 128
DEFAULT_WINDOWS = 8
MASKED_FRACTION = 0.15
MASK_SEED = 0
"""The masked positions are the same in every run."""
IGNORED = -100
"""The label of a position that is not predicted; `token_cross_entropy` leaves it out."""
LOGITS_PER_BATCH = 1 << 24
"""Numbers of the logits of one batch, 64 MiB in float32."""


@dataclass(frozen=True)
class Shape:
    """How many windows of which length are wanted.

    Args:
        length: T, tokens in one window.
        count: N, how many windows at most.

    Example:
        >>> Shape.of(None, None, context=64)
        Shape(length=64, count=8)
    """

    length: int
    count: int

    @classmethod
    def of(cls, seq_len: int | None, tokens: int | None, *, context: int | None) -> Shape:
        """Fill in what the user left open.

        Args:
            seq_len: As of `TextData`.
            tokens: Likewise.
            context: Greatest length that the model takes; None if there is none.

        Returns:
            The shape.

        Raises:
            InvalidArgument: If the windows are longer than the context, or than the tokens that are wanted.
        """
        if seq_len is not None and context is not None and seq_len > context:
            raise InvalidArgument(f"--seq-len {seq_len}: the model's context is {context} tokens. Pass at most that.")
        if seq_len is not None and tokens is not None and tokens < seq_len:
            raise InvalidArgument(
                f"--tokens {tokens}: fewer than one window of --seq-len {seq_len}. Pass --tokens {seq_len} or more, or a shorter --seq-len."
            )
        length = seq_len or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH, tokens or DEFAULT_LENGTH)
        return cls(length, tokens // length if tokens is not None else DEFAULT_WINDOWS)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The batches, and what a record says of them."""

    batches: list[Any]
    words: str
    """For people: "8 windows of 128 tokens"."""
    digest: str
    """SHA-256 of the ids."""
    notes: tuple[str, ...]


def calibrate(tokens: Tokens, shape: Shape, language: LanguageModel, *, mask: int | None, source: str) -> Calibration:
    """Cut ids into windows with their targets.

    Causal: windows are evenly spaced and do not overlap, and the target of a token is the token after it. Masked: in every window 15 % of
    the positions, at least one, drawn by a fixed seed, are replaced by the mask, and they alone are predicted.

    Args:
        tokens: In order.
        shape: Fewer windows are taken where the text is shorter.
        language: Its kind decides what is predicted; every id must be below its vocabulary.
        mask: The id that stands for a masked position; None if it is not known.
        source: Where the ids come from, for messages.

    Returns:
        Batches of as many windows as have 2^24 logits.

    Raises:
        UnknownObjective: If the text is too short for one window, an id is out of range, or a masked model has no mask.
    """
    n, length, vocabulary = len(tokens.ids), shape.length, language.vocabulary
    possible = (n - 1) // length
    if possible < 1:
        shorter = f"Pass --seq-len {n - 1} or less, or a longer text." if n >= 2 else "Pass a longer text."
        raise UnknownObjective(
            f"{source}: too short: it has {n:,} {'token' if n == 1 else 'tokens'}, and one window of {length} needs {length + 1}. "
            f"{shorter}"
        )
    outside = tokens.ids[(tokens.ids < 0) | (tokens.ids >= vocabulary)]
    if len(outside):
        raise UnknownObjective(
            f"{source}: it has the token {int(outside[0])}, but the model's vocabulary is 0 to {vocabulary - 1}. "
            "The ids belong to another tokenizer; pass data made for this model."
        )
    count = min(shape.count, possible)
    x, y = spaced_windows(tokens.ids, length, count)  # [N, T]
    ids, notes = torch.cat([x, y[:, -1:]], 1), list(tokens.notes)
    if language.kind == "masked":
        ids, (x, y) = x, _masked(x, mask, source)
        notes.append(f"{MASKED_FRACTION:.0%} of the positions masked, drawn with seed {MASK_SEED}")
    if count < shape.count:
        notes.append(f"the text has {n:,} tokens: {count} of {shape.count} windows")
    rows = max(1, LOGITS_PER_BATCH // (length * vocabulary))
    batches = [language.batch(inputs, targets) for inputs, targets in zip(x.split(rows), y.split(rows), strict=True)]
    words = f"{count} {'window' if count == 1 else 'windows'} of {length} tokens"
    return Calibration(batches, words, _digest(ids), tuple(notes))


def _masked(x: Tensor, mask: int | None, source: str) -> tuple[Tensor, Tensor]:
    if mask is None:
        raise UnknownObjective(
            f"{source}: a masked language model needs the id of its mask token, which its tokenizer knows, and there is none beside the "
            "checkpoint. Copy tokenizer.json and tokenizer_config.json of the model into its directory."
        )
    inputs, targets = x.clone(), torch.full_like(x, IGNORED)
    for row in range(len(x)):
        draw = torch.rand(x.shape[1], generator=seeds.generator(MASK_SEED, "masked positions", row))
        chosen = draw.topk(max(1, round(MASKED_FRACTION * x.shape[1]))).indices
        targets[row, chosen] = x[row, chosen]
        inputs[row, chosen] = mask
    return inputs, targets


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(numpy.ascontiguousarray(ids.numpy(), dtype="<i8").tobytes()).hexdigest()
