"""How far two diagonals agree, in order, in size and in sign, and what their noise leaves to agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from curvkit.errors import InvalidArgument
from curvkit.projection.agreeing_masks import MaskAgreement, mask_agreement
from curvkit.projection.chance import AgainstChance
from curvkit.projection.flat_mask import FlatMask
from curvkit.projection.flat_rule import FlatRule
from curvkit.projection.matching import pieces, refuse_different
from curvkit.projection.moments import Moments, moments, together
from curvkit.projection.ranks import SORTED, RankCorrelation, spearman
from curvkit.results.diagonal_estimate import DiagonalEstimate

GAMMAS = (0.6, 0.8, 0.9, 0.99)
"""Flat shares that IRE was run with."""
UNKNOWN = {"second_moment"}
"""Matrices whose diagonal has an error that nobody knows, though nothing was drawn."""


@dataclass(frozen=True)
class DiagonalRow:
    """Two diagonals over the same entries."""

    name: str
    """Of the parameter; "all" for all of them together."""
    numel: int
    spearman: float | None
    """Of |a_j| and |b_j|, what masks are made of; ties share their mean rank. None: all are equal."""
    spearman_error: float
    """It is off by this at most; 0 where ranks come from sorting."""
    pearson: float | None
    """Of the values with their signs."""
    pearson_ceiling: float | None
    """What noise leaves of it if both estimate the same diagonal by independent draws; NaN: unknown, 1: nothing was sampled."""
    same_sign: AgainstChance
    """Share of the entries with the same sign; zero is a sign of its own."""
    relative_error: float | None
    """||a - b|| / ||b||."""
    noise: float | None
    """What standard errors alone account for in it, sqrt(sum s_a^2 + sum s_b^2) / ||b||; NaN: unknown."""


@dataclass(frozen=True)
class AtGamma:
    """The masks at one flat share."""

    gamma: float
    masks: MaskAgreement


@dataclass(frozen=True)
class DiagonalAgreement(DiagonalRow):
    """The same over all parameters, with masks made of both, and a row for each parameter."""

    matrices: tuple[str, str]
    estimators: tuple[str, str]
    masks: tuple[AtGamma, ...]
    layers: tuple[DiagonalRow, ...]

    def __repr__(self) -> str:
        """Order, size, and the sharp sets."""
        at = "".join(
            f", recall {it.masks.recall.value:.3g} at {it.gamma:g}" for it in self.masks if it.masks.recall.value
        )
        rho = "none" if self.spearman is None else f"{self.spearman:.3g}"
        return f"DiagonalAgreement({self.matrices[0]} and {self.matrices[1]}: Spearman {rho}{at})"


def diagonal_agreement(
    a: DiagonalEstimate,
    b: DiagonalEstimate,
    *,
    gammas: Sequence[float] = GAMMAS,
    sort_up_to: int = SORTED,
) -> DiagonalAgreement:
    """Compare two diagonals of the same parameters, of the same matrix or of two.

    The order of |h| decides over masks: Spearman's correlation, and the sharp sets at each gamma. Values and signs say more, where both
    estimate one matrix. Standard errors say how much agreement there could be. If a_j = alpha_j + e_j and b_j = beta_j + f_j with
    independent errors of known sizes,

        E ||a - b||^2 = ||alpha - beta||^2 + sum_j s_aj^2 + sum_j s_bj^2,
        corr(a, b) -> corr(alpha, beta) sqrt((1 - sum s_a^2 / sum (a - mean)^2) (1 - sum s_b^2 / sum (b - mean)^2)),

    so that two estimates of one diagonal have a relative error of `noise` and a correlation of `pearson_ceiling`, not 0 and 1. For masks
    there is no such formula; `noise_floor` measures it.

    Args:
        a: An estimate.
        b: The reference.
        gammas: Flat shares in [0, 1] at which masks are compared; global, ties by position.
        sort_up_to: Entries up to which ranks come from sorting, in all or in one parameter.

    Returns:
        All entries together, and a row for each parameter.

    Raises:
        InvalidArgument: If the diagonals belong to different models (naming the first difference), an entry is not finite, or a gamma lies
            outside of [0, 1].

    Cost: some ten passes over both, and sorting up to `sort_up_to` entries; 100 MiB, and two bytes per parameter for masks.

    Example:
        >>> from curvkit.results import Cost
        >>> of = lambda *h: DiagonalEstimate({"w": torch.tensor(h)}, None, "hessian", "by hand", Cost(0.0, 0.0))
        >>> found = diagonal_agreement(of(1.0, -2.0, 3.0, 9.0), of(2.0, 1.0, 3.0, 4.0), gammas=[0.5])
        >>> round(found.spearman, 4), found.same_sign.value, found.masks[0].masks.recall.value
        (0.8, 0.75, 1.0)
    """
    refuse_different("diagonal_agreement", a.values, b.values)
    for which, found in (("first", a), ("second", b)):
        _refuse_not_finite(which, found)
    parts = {name: _moments(name, a, b) for name in a.values}
    layers = tuple(
        _row(name, part, spearman([a.values[name]], [b.values[name]], sort_up_to=sort_up_to))
        for name, part in parts.items()
    )
    order = spearman(list(a.values.values()), [b.values[name] for name in a.values], sort_up_to=sort_up_to)
    masks = tuple(AtGamma(gamma, _at(a, b, gamma)) for gamma in gammas)
    whole = _row("all", together(list(parts.values())), order)
    return DiagonalAgreement(
        **vars(whole), matrices=(a.matrix, b.matrix), estimators=(a.estimator, b.estimator), masks=masks, layers=layers
    )


def _at(a: DiagonalEstimate, b: DiagonalEstimate, gamma: float) -> MaskAgreement:
    rule = FlatRule(gamma)
    return mask_agreement(FlatMask.from_diagonal(a, rule), FlatMask.from_diagonal(b, rule))


def _moments(name: str, a: DiagonalEstimate, b: DiagonalEstimate) -> Moments:
    stderrs = [
        (math.nan if found.matrix in UNKNOWN else 0.0) if found.stderr is None else found.stderr[name]
        for found in (a, b)
    ]
    return moments(a.values[name], b.values[name], *stderrs)


def _row(name: str, of: Moments, order: RankCorrelation) -> DiagonalRow:
    told = of.pearson, of.ceiling, of.sign, of.relative_error, of.noise
    return DiagonalRow(name, of.n, order.value, order.error, *told)


def _refuse_not_finite(which: str, found: DiagonalEstimate) -> None:
    for name, value in found.values.items():
        for (piece,) in pieces(value):
            if not bool(torch.isfinite(piece).all()):
                raise InvalidArgument(
                    f"diagonal_agreement: {name!r} of the {which} diagonal ({found.estimator}) has entries that are NaN or infinite, which "
                    "have no place in an order. Estimate it again, in float32 or on data with a finite loss."
                )
