"""Class labels: the indices that a batch has as targets, against the classes that there are."""

from __future__ import annotations

import torch
from torch import Tensor

INDICES = (torch.int64, torch.uint8)
"""What torch's losses take for indices of classes."""


def misnumbered(targets: Tensor, classes: int, ignore_index: int) -> str | None:
    """Say which targets are no class; on a GPU torch would stop the process over one, on the CPU it says "out of bounds".

    Args:
        targets: Indices of classes, integers of any shape.
        classes: C: they must lie in 0 ... C - 1.
        ignore_index: Targets of this value may be anything.

    Returns:
        A sentence and what to do about it; None if all is well.

    Cost: a few passes over the targets, and one answer awaited from the device.

    Example:
        >>> print(misnumbered(torch.tensor([0, 3, -100]), 3, -100))
        1 of 3 targets is no class: 3, where the classes are 0 to 2. Number the classes from 0, or give the model an output for each.
        >>> misnumbered(torch.tensor([0, 2, -100]), 3, -100) is None
        True
    """
    whole = targets.long()  # of an unsigned dtype no value would be -100
    outside = whole[(whole != ignore_index) & ((whole < 0) | (whole >= classes))]
    if len(outside) == 0:
        return None
    values = sorted(set(outside.unique()[:4].tolist()))
    shown = ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
    count = f"{len(outside):,} of {whole.numel():,} targets {'is' if len(outside) == 1 else 'are'} no class"
    if bool((outside < 0).all()):
        advice = f"Targets that are not to count have the value of ignore_index, here {ignore_index}: set them to it, or it to them."
    else:
        advice = "Number the classes from 0, or give the model an output for each."
    return f"{count}: {shown}, where the classes are 0 to {classes - 1}. {advice}"
