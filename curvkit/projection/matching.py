"""Tensors of one model, side by side in pieces, so that nothing of the length of all parameters is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument

PIECE = 1 << 20
"""Numbers that are looked at at a time."""


def refuse_different(owner: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Refuse tensors of two different models.

    Args:
        owner: For the message.
        a: By name.
        b: By name, in any order.

    Raises:
        InvalidArgument: Naming the first parameter, in the order of a, that b lacks or has in another shape, or one that a lacks.
    """
    advice = "Compare what belongs to the same parameters of one model."
    for name, tensor in a.items():
        if name not in b:
            raise InvalidArgument(f"{owner}: {name!r} is in the first and not in the second. {advice}")
        here, there = tuple(tensor.shape), tuple(b[name].shape)
        if here != there:
            raise InvalidArgument(
                f"{owner}: {name!r} has shape {here} in the first and {there} in the second. {advice}"
            )
    for name in b:
        if name not in a:
            raise InvalidArgument(f"{owner}: {name!r} is in the second and not in the first. {advice}")
    if not any(tensor.numel() for tensor in a.values()):
        raise InvalidArgument(f"{owner}: there is no coordinate in {list(a)[:5]}. Give one non-empty tensor at least.")


def as_masks(owner: str, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Check that tensors are masks.

    Args:
        owner: For the message.
        masks: bool, or uint8 of 0 and 1.

    Returns:
        The mapping.

    Raises:
        InvalidArgument: If one of them is something else, naming it.

    Cost: one pass over tensors of uint8.
    """
    for name, mask in masks.items():
        if mask.dtype not in (torch.bool, torch.uint8):
            found = f"dtype {mask.dtype}"
        elif mask.dtype is torch.uint8 and mask.numel() and mask.max().item() > 1:
            found = f"an entry {mask.max().item()}"
        else:
            continue
        raise InvalidArgument(
            f"{owner}: the mask {name!r} has {found}; masks are bool, or uint8 of 0 and 1, with 1 for flat. "
            "Make one with FlatMask.from_diagonal(estimate, rule)."
        )
    return masks


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into flat pieces, all on the device of the first.

    Args:
        tensors: At least one.

    Yields:
        One piece of each, views where the memory layout allows.
    """
    device, flat = tensors[0].device, [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(part[start : start + PIECE].to(device) for part in flat)
