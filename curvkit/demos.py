"""A real checkpoint to try things on: a small character model, trained on text that comes with Python."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.checkpoints import Recipe, save
from curvkit.errors import InvalidArgument
from curvkit.losses import token_cross_entropy
from curvkit.models import CharacterVocabulary, Decoder, random_windows, spaced_windows, topics_text
from curvkit.objectives.surroundings import random_state


@dataclass(frozen=True)
class CharacterDemo:
    """Train a Llama-like decoder on the characters of Python's help texts with AdamW, and save it on the way.

    With the defaults, 107,392 parameters, about half a minute on two cores, to about 1.2 nats per character. The calibration batch in the
    checkpoints are windows of the training text, so that what is measured is the training loss.
    """

    steps: int = 1200
    saves: int = 4
    """Checkpoints, evenly spaced, the last one called final.pt."""
    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 64
    rows: int = 32
    """Windows per training step."""
    calibration_rows: int = 96
    calibration_batch_size: int = 12
    peak_lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the counts."""
        if not 1 <= self.saves <= self.steps:
            raise InvalidArgument(
                f"CharacterDemo: saves={self.saves!r} must lie between 1 and steps={self.steps!r}. Save fewer checkpoints."
            )

    def lr(self, step: int) -> float:
        """Learning rate: linear over the first twelfth, then a cosine down to a tenth.

        Args:
            step: 0-based.

        Returns:
            The rate.

        Example:
            >>> round(CharacterDemo().lr(1199), 5)
            0.0003
        """
        warm_up = max(1, self.steps // 12)
        if step < warm_up:
            return self.peak_lr * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, self.steps - warm_up)
        return self.peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def paths(self, directory: Path) -> dict[int, Path]:
        """Where the checkpoints go.

        Args:
            directory: The folder.

        Returns:
            Step -> file, in order.
        """
        steps = [round(self.steps * (i + 1) / self.saves) for i in range(self.saves)]
        return {step: directory / ("final.pt" if step == self.steps else f"step-{step:06d}.pt") for step in steps}

    def train(self, directory: Path) -> Iterator[DemoState]:
        """Train and save.

        Args:
            directory: Made if absent; it must have no checkpoint of a demo, whatever its step.

        Yields:
            A state after each step.

        Raises:
            InvalidArgument: If one is already there.
        """
        paths = self.paths(directory)
        present = next(iter(sorted((*directory.glob("step-*.pt"), *directory.glob("final.pt")))), None)
        if present is not None:
            raise InvalidArgument(
                f"demo: {present} is already there and is not overwritten. Choose another folder, or remove it."
            )
        directory.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the training
        vocabulary = CharacterVocabulary.from_text(topics_text() + string.printable[:95])
        tokens = vocabulary.encode(topics_text())
        model, kwargs = self._model(len(vocabulary))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.peak_lr, betas=(0.9, 0.95), weight_decay=0.1)
        recipe = self._recipe(tokens, kwargs)
        draws = seeds.generator(self.seed, "demo windows")
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr(step)
            x, y = random_windows(tokens, self.context, self.rows, generator=draws)
            loss = token_cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            saved = paths.get(step + 1)
            if saved is not None:
                save(saved, model=model, optimizer=optimizer, step=step + 1, recipe=recipe)
            yield DemoState(step + 1, self.steps, loss.item(), saved)

    def _model(self, vocabulary: int) -> tuple[Decoder, dict[str, Any]]:
        kwargs: dict[str, Any] = {
            "vocabulary": vocabulary,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "context": self.context,
        }
        with random_state():
            torch.manual_seed(self.seed)
            return Decoder(**kwargs), kwargs

    def _recipe(self, tokens: Tensor, kwargs: dict[str, Any]) -> Recipe:
        x, y = spaced_windows(tokens, self.context, self.calibration_rows)
        return Recipe(
            "decoder", kwargs, "token_cross_entropy", {"x": x, "y": y}, batch_size=self.calibration_batch_size
        )


@dataclass(frozen=True)
class DemoState:
    """Where the training is."""

    step: int
    steps: int
    loss: float
    """Of the step's windows, nats per character."""
    saved: Path | None
    """The checkpoint just written, if any."""
