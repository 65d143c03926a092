"""Which coordinates a rule calls flat, given the diagonal or at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg.patterns import common_dtype, count_zeros, refuse_nan, unmark_zeros
from curvkit.linalg.selection import kth_smallest, smallest
from curvkit.projection.flat_rule import FlatRule


def chosen(
    values: Mapping[str, Tensor], rule: FlatRule, groups: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], FlatRule, float | None]:
    """Choose by the diagonal.

    Args:
        values: Of the diagonal, by name.
        rule: Share, scope, and what zeros count as.
        groups: For `scope="group"`.

    Returns:
        uint8 masks by name, the rule, and the largest |h| that is flat; None unless one set is not empty.

    Raises:
        InvalidArgument: If the rule is none, a value is NaN, a type has no order, or the groups do not fit.
    """
    if not isinstance(rule, FlatRule):
        raise InvalidArgument(
            f"FlatMask: rule={rule!r} is no FlatRule, which says what flat means. Pass for example FlatRule(0.6)."
        )
    common_dtype(values)
    masks, thresholds = dict[str, Tensor](), list[float | None]()
    for names in rule.sets(tuple(values), groups):
        part, threshold = _least({name: values[name] for name in names}, rule)
        masks |= part
        thresholds.append(threshold)
    return {name: masks[name] for name in values}, rule, thresholds[0] if len(thresholds) == 1 else None


def random_scores(like: Mapping[str, Tensor], rule: FlatRule, seed: int) -> dict[str, Tensor]:
    """Draw a diagonal whose order is random.

    Args:
        like: Names, shapes and devices; the diagonal where `rule.zero_curvature` is "sharp".
        rule: Where zeros are sharp, those of the diagonal stay zeros.
        seed: Of the draw; that of one name does not depend on the others.

    Returns:
        float32 in [1, 2), or 0. Of equal ones, one pair in 2^23, the first comes first.

    Raises:
        InvalidArgument: If the diagonal is needed and not given.
    """
    scores: dict[str, Tensor] = {}
    for name, tensor in like.items():
        draw = torch.rand(tensor.shape, dtype=torch.float32, generator=seeds.generator(seed, f"random mask/{name}"))
        scores[name] = draw.add_(1.0).to(tensor.device)
        if rule.zero_curvature == "sharp":
            if not tensor.is_floating_point():
                raise InvalidArgument(
                    f"FlatMask.random: {name!r} is of {tensor.dtype}, and zero_curvature='sharp' needs the diagonal, whose zeros stay "
                    "sharp. Pass the diagonal as `like`, or a rule with zero_curvature='flat'."
                )
            ones = torch.ones(tensor.shape, dtype=torch.uint8, device=tensor.device)
            scores[name] *= unmark_zeros({name: tensor}, {name: ones})[name]
    return scores


def _least(named: Mapping[str, Tensor], rule: FlatRule) -> tuple[dict[str, Tensor], float | None]:
    """Masks of the floor(gamma n) least of one set, and the largest of them."""
    n, sharp_zeros = sum(value.numel() for value in named.values()), rule.zero_curvature == "sharp"
    zeros = count_zeros(named) if sharp_zeros else 0
    size = rule.size(n - zeros)
    if size == 0:
        refuse_nan(named)
        return {
            name: torch.zeros(value.shape, dtype=torch.uint8, device=value.device) for name, value in named.items()
        }, None
    found = kth_smallest(named, zeros + size)
    masks = smallest(named, found)
    return (unmark_zeros(named, masks) if zeros else masks), found.value.item()
