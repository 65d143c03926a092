"""nanoGPT's model, rebuilt from the `model_args` of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from curvkit.checkpoints import Checkpoint, fit
from curvkit.checkpoints.fitting import precision
from curvkit.checkpoints.needs import language_model
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.models import GPT
from curvkit.resolving.depth import refuse_too_deep
from curvkit.resolving.language_model import LanguageModel

ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
TRIANGLE = re.compile(r"(^|\.)attn\.bias$")
"""nanoGPT keeps the causal mask as a buffer where torch has no fused attention; `c_attn.bias` is another thing."""


def is_nanogpt(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says how nanoGPT's model is built.

    Args:
        checkpoint: As read.

    Returns:
        True if it has the layout of nanoGPT, with the sizes in `model_args`; sizes of another origin name no architecture.
    """
    return checkpoint.kind == "nanoGPT checkpoint" and language_model(checkpoint.kind, checkpoint.config) is not None


def build_nanogpt(checkpoint: Checkpoint) -> LanguageModel:
    """Build the model with the checkpoint's weights.

    Args:
        checkpoint: With `model_args` as `config`.

    Returns:
        The model in evaluation mode.

    Raises:
        UnknownObjective: If the sizes make no model, or the weights do not fit it.
    """
    path, described = checkpoint.path, dict(checkpoint.config or {})
    unknown = sorted(str(key) for key in described if key not in ARGUMENTS)
    if unknown:
        raise UnknownObjective(
            f"{path}: model_args has {', '.join(unknown)}, which nanoGPT's GPT does not take, so the model is another one. "
            "Name an objective with --objective FILE.py:FUNCTION."
        )
    refuse_too_deep(f"{path}: model_args", described, len(checkpoint.weights))
    try:
        with torch.device("meta"):
            model = GPT(**described)
    except InvalidArgument as error:
        raise UnknownObjective(f"{path}: its model_args make no model. {error}") from error
    weights, notes = _without_masks(checkpoint.weights, model.block_size)
    notes += fit(model.to(precision(weights)), weights, str(path))
    model.restore_derived()
    vocabulary = model.lm_head.out_features
    return LanguageModel(
        model.eval(), "GPT of nanoGPT", "causal", vocabulary, model.block_size, (_directory(path),), notes=notes
    )


def _without_masks(weights: Mapping[str, Tensor], size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Leave the causal masks out, if that is what they are."""
    kept = {name: tensor for name, tensor in weights.items() if not (TRIANGLE.search(name) and _is_mask(tensor, size))}
    left = len(weights) - len(kept)
    return kept, (f"left out: {left} causal masks, which are not weights",) if left else ()


def _is_mask(tensor: Tensor, size: int) -> bool:
    return tensor.shape == (1, 1, size, size) and torch.equal(tensor, torch.ones_like(tensor).tril())


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent
