"""Files with weights: recognised without unpickling, read as data, written so that they say what they are."""

from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.detection import Detected, detect
from curvkit.checkpoints.fitting import fit
from curvkit.checkpoints.reading import digest, read
from curvkit.checkpoints.recipes import Recipe
from curvkit.checkpoints.writing import save

__all__ = ["Checkpoint", "Detected", "Recipe", "detect", "digest", "fit", "read", "save"]
