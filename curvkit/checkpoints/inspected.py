"""What inspecting a checkpoint finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.optimizer_summary import OptimizerSummary
from curvkit.checkpoints.tensor_groups import TensorGroup


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Args:
        path: Where it lies.
        kind: In words.
        bytes: Of the file, or of all files that would be read.
        checksum: What protects its numbers against damage, in words. Inspecting does not verify it; reading does.
        groups: Parts with tensors in them.
        refused_globals: Names that the file refers to and that would have to be imported; empty if it is safe to load.
        refusal: Why it is not read when it is measured, and what to do; None if it is.
        optimizer: What its state says.
        step: Of training.
        removed_prefixes: Of wrappers, taken from the names of the weights.
        recipe: How its objective is rebuilt, in words; None if it has no recipe.
        tied: Names of weights that are the same numbers.
        keys: Top-level keys of a training dict.
        weight_keys: Those that hold weights, the one that is taken first.
        variants: Other sets of weights that could be taken, such as "ema".
        notes: What a reader should know.
        next: What to type next; None if it is refused for good.
    """

    path: Path
    kind: str
    bytes: int
    checksum: str
    groups: tuple[TensorGroup, ...] = ()
    refused_globals: tuple[str, ...] = ()
    refusal: str | None = None
    optimizer: OptimizerSummary | None = None
    step: int | None = None
    removed_prefixes: tuple[str, ...] = ()
    recipe: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    keys: tuple[str, ...] = ()
    weight_keys: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plain form, for JSON.

        Returns:
            Names and plain values, in the order of the fields.
        """
        return {**asdict(self), "path": str(self.path)}
