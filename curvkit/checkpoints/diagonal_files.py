"""Files that hold a diagonal and no weights, as `DiagonalEstimate.save` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from curvkit.checkpoints.documents import brief

FORMAT = "curvkit.diagonal/"
"""How the format of such a file begins."""
VALUE = "value:"
"""How the names of the values begin; others are errors and sums."""


def diagonal_in(metadata: Mapping[str, str]) -> str | None:
    """What a safetensors file says that is no checkpoint.

    Args:
        metadata: Of its header; it may be anybody's.

    Returns:
        What it holds, and what reads it; None for other files.

    Example:
        >>> diagonal_in({"format": "pt"}) is None
        True
        >>> diagonal_in({"format": "curvkit.diagonal/1", "estimate": '{"matrix": "fisher", "estimator": "Fisher(num_samples=8)"}'})
        'a diagonal (fisher, by Fisher(num_samples=8)) and no weights. Read it in Python: DiagonalEstimate.load(path)'
    """
    if not metadata.get("format", "").startswith(FORMAT):
        return None
    try:
        said = json.loads(metadata["estimate"])
        matrix, estimator = (brief(said[name]).strip("'") for name in ("matrix", "estimator"))
        whose = f" ({matrix}, by {estimator})"
    except (KeyError, ValueError, TypeError, RecursionError):
        whose = ""
    return f"a diagonal{whose} and no weights. Read it in Python: DiagonalEstimate.load(path)"
