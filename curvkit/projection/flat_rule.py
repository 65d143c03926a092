"""What "flat" means: which share of the coordinates, out of which set, and whether untouched ones count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from curvkit.errors import InvalidArgument

Scope = Literal["global", "group", "tensor"]
ZeroCurvature = Literal["flat", "sharp"]


@dataclass(frozen=True)
class FlatRule:
    """The floor(gamma n) coordinates of least |h| are flat.

        flat = {i : |h_i| is among the floor(gamma n) smallest},   ties in the order of the parameters' names, then of the index

    Args:
        gamma: Share that is flat, in [0, 1], taken as the decimal number that it is written as: 0.29 of 100 is 29, though the
            binary number behind 0.29 is smaller.
        scope: The set that n counts: all parameters together, each group of them, or each tensor.
        zero_curvature: Whether coordinates whose h is exactly 0, such as rows of an embedding that no token of the batch
            looked up, are flat like others, or sharp. When sharp, they are left out of n: floor(gamma n) of the others are flat.

    Raises:
        InvalidArgument: If gamma is no number in [0, 1], or a choice is none of those above.

    Source: IRE (arXiv 2405.20763), Eq. 5. The official code has `rank` = 1 - gamma, keeps all ties flat, and counts the first sharp
        value as flat; here their number is exact. The paper knows `scope="global"` and `zero_curvature="flat"` alone.

    Example:
        >>> FlatRule(0.29).size(100), FlatRule(0.6).size(7), FlatRule(1.0).size(7)
        (29, 4, 7)
    """

    gamma: float
    scope: Scope = "global"
    zero_curvature: ZeroCurvature = "flat"

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0 <= self.gamma <= 1:  # NaN is in no interval
            raise InvalidArgument(
                f"FlatRule: gamma={self.gamma!r} must be a number in [0, 1], the share of coordinates that are flat; for 60 % pass 0.6. "
                "The official code of IRE names the sharp share: gamma = 1 - rank."
            )
        _check("scope", self.scope, get_args(Scope))
        _check("zero_curvature", self.zero_curvature, get_args(ZeroCurvature))

    def size(self, n: int) -> int:
        """Count the flat among n coordinates.

        Args:
            n: How many there are, without those of zero curvature where these are sharp.

        Returns:
            floor(gamma n), without rounding error.
        """
        return math.floor(Fraction(str(self.gamma)) * n)

    def sets(self, names: tuple[str, ...], groups: Mapping[str, str] | None = None) -> Iterator[tuple[str, ...]]:
        """Divide the parameters into the sets that n counts.

        Args:
            names: Of the parameters, in order.
            groups: The group of each name, for `scope="group"` and no other.

        Yields:
            Names in their order; the sets in the order of their first name.

        Raises:
            InvalidArgument: If groups are missing, not asked for, or not those of the names.
        """
        if self.scope != "group":
            if groups is not None:
                raise InvalidArgument(
                    f"FlatRule: groups were given, and scope={self.scope!r} does not use them. Pass scope='group', or no groups."
                )
            yield from [names] if self.scope == "global" else ((name,) for name in names)
            return
        if groups is None:
            raise InvalidArgument(
                "FlatRule: scope='group' needs groups, and none were given. Pass groups={name: group} with a group for each parameter."
            )
        known = set(names)
        for name in (*names, *groups):
            if name not in groups or name not in known:
                state = "has no group" if name not in groups else "has a group and is no parameter of the diagonal"
                raise InvalidArgument(
                    f"FlatRule: {name!r} {state}. Each of the {len(names)} parameters needs one: pass groups={{name: group}}."
                )
        members: dict[str, list[str]] = {}
        for name in names:
            members.setdefault(groups[name], []).append(name)
        yield from map(tuple, members.values())


def _check(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgument(
            f"FlatRule: {option}={value!r} must be one of {', '.join(map(repr, allowed))}. Pass for example {option}={allowed[0]!r}."
        )
