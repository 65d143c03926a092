"""Memory of squared gradients of single examples, by counting."""

from __future__ import annotations

from curvkit.estimators.expected import Expected, held_bytes
from curvkit.estimators.rules.forms import CHUNK_BYTES
from curvkit.losses.batches import rows, tensors
from curvkit.objectives import Objective

WATCHED = 2.0
"""Copies of the parameters: what `Objective.measuring` keeps, and the gradients of one row or the squares of one batch."""
LARGEST = 3.0
"""Copies of the largest parameter in temporaries."""
PASSES = 4
"""Of what the graph of a batch saves, with the data: itself, the gradients of the calls, both arranged by
examples and squared, and what the allocator does not reuse."""


def expected_squares(objective: Objective, *, gradients: float, samples: int) -> Expected:
    """Count work and memory of sums of squared gradients of single examples.

    Args:
        objective: What is differentiated.
        gradients: The work.
        samples: How many are averaged; 0: one that is kept as it is.

    Returns:
        Both, the memory as an upper bound.

    Cost: a forward pass over a sixteenth of the first batch.
    """
    objective = objective.raised()
    sizes = {
        name: p.numel() * p.element_size()
        for name, p in zip(objective.parameters.names, objective.tensors, strict=True)
    }
    vectors = WATCHED + min(samples, 2) + (len(objective.batches) > 1)
    most = max(rows(batch) or 0 for batch in objective.batches)
    data = max(sum(t.numel() * t.element_size() for t in tensors(batch)) for batch in objective.batches)
    tied = set(objective.parameters.tied.values())
    written = max((_written_bytes(size, 2 if name in tied else 1, most) for name, size in sizes.items()), default=0)
    held = PASSES * (held_bytes(objective, second=False) + data) + written
    return Expected(gradients, vectors + LARGEST * max(sizes.values(), default=0) / max(sum(sizes.values()), 1), held)


def _written_bytes(size: int, uses: int, examples: int) -> int:
    """Gradients of examples that are written out together: for each use, and their sum."""
    return (uses + 1) * max(min(CHUNK_BYTES, examples * size), size if uses > 1 else 0)
