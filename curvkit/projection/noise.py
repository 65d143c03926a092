"""How far an estimator agrees with itself: under another seed, and on other data of the same kind."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvkit import seeds
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.estimators import DiagonalEstimator
from curvkit.measures.data_doubt import parts_of
from curvkit.objectives import Objective
from curvkit.projection.agreeing_diagonals import DiagonalAgreement, diagonal_agreement
from curvkit.projection.agreeing_masks import MaskAgreement, mask_agreement
from curvkit.projection.flat_mask import FlatMask
from curvkit.projection.flat_rule import FlatRule
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate


@dataclass(frozen=True)
class Repeat:
    """Two estimates by one estimator."""

    seeds: tuple[int | None, int | None]
    """None: nothing was drawn."""
    masks: MaskAgreement
    diagonals: DiagonalAgreement


@dataclass(frozen=True)
class SelfAgreement:
    """Means over pairs of estimates."""

    sharp: float | None
    """Jaccard index of the sharp sets."""
    recall: float | None
    chance: float | None
    """Of `sharp`, for random sets of these sizes."""
    spearman: float | None
    spread: float | None
    """Standard deviation of `sharp` over the pairs; None for one pair."""
    pairs: tuple[Repeat, ...]


@dataclass(frozen=True)
class LayerFloor:
    """Jaccard indices of the sharp sets in one parameter, means over the pairs."""

    name: str
    numel: int
    over_seeds: float | None
    over_data: float | None
    chance: float | None
    """For random sets of the sizes that it has over the seeds."""


@dataclass(frozen=True)
class NoiseFloor:
    """What an estimator's own noise leaves of agreement: two estimators that agree so far cannot be told apart by it."""

    estimator: str
    matrix: str
    rule: FlatRule
    drawn: bool
    """False: the estimator draws nothing, so that seeds change nothing."""
    seed: int
    """The estimates have this and the following ones."""
    over_seeds: SelfAgreement
    over_data: SelfAgreement | None
    """Between two halves of the data, under two seeds; None: not known, with the reason in `notes`."""
    cost: Cost
    notes: tuple[str, ...]
    layers: tuple[LayerFloor, ...]

    def __repr__(self) -> str:
        """The sharp sets."""
        told = [("seeds", self.over_seeds), ("halves of the data", self.over_data)]
        shown = [f"{it.sharp:.3g} over {what}" for what, it in told if it is not None and it.sharp is not None]
        return f"NoiseFloor({self.estimator}, sharp sets at gamma {self.rule.gamma:g}: {', '.join(shown) or 'none'})"


def noise_floor(
    estimator: DiagonalEstimator,
    objective: Objective,
    rule: FlatRule,
    *,
    num_pairs: int = 1,
    groups: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> NoiseFloor:
    """Hold an estimator against itself.

    Noisy estimates of one diagonal disagree. With independent errors the correlation of two of them is the geometric mean of what each
    has with itself,

        corr(a, b) = sqrt(corr(a, a') corr(b, b')),

    and for masks, where there is no formula, it lies between the two as well. So a Jaccard index of 0.7 says that two estimators see
    different things if each has 0.95 with itself, and nothing of the kind if each has 0.7.

    Over seeds: pairs of estimates on the same data. Over data: an estimate on each of two halves, under two seeds. It has the noise of
    half the data, more than an estimate on all of it: entries that are means over examples vary twice as much in square.

    Args:
        estimator: Of a diagonal.
        objective: The function.
        rule: Which coordinates are flat.
        num_pairs: Over seeds; one for an estimator that draws nothing, whose second run shows that it does.
        groups: Of parameters, for a rule with scope="group".
        seed: Of the first estimate; the others have the following ones. None draws one.

    Returns:
        Agreement over seeds and over data, in all and by layer.

    Raises:
        InvalidArgument: If an argument is none of those above, or a diagonal is not finite.

    Cost: 2 num_pairs estimates, and two on half the data; a few gradients more where a single batch is cut. Memory of two estimates.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.estimators import Exact, Hutchinson
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> objective = Objective(torch.nn.Linear(5, 1), F.mse_loss, [(x, x[:, :1])])
        >>> exact = noise_floor(Exact(), objective, FlatRule(0.5), seed=0)
        >>> exact.drawn, exact.over_seeds.sharp
        (False, 1.0)
        >>> noise_floor(Hutchinson(num_probes=1), objective, FlatRule(0.5), num_pairs=4, seed=0).over_seeds.sharp < 1
        True
    """
    _check(estimator, num_pairs)
    began, seed = time.perf_counter(), seeds.settle(seed)
    runs = _Runs(estimator, rule, groups, seed)
    pairs = [runs.pair(objective, objective, 0)]
    drawn = any(of is not None for of in pairs[0].seeds)
    for index in range(1, num_pairs if drawn else 1):
        pairs.append(runs.pair(objective, objective, 2 * index))
    notes, of_data = list[str](), list[Repeat]()
    if not drawn and pairs[0].masks.both_flat != max(pairs[0].masks.flat_a, pairs[0].masks.flat_b):
        notes.append("two runs differ, though the estimator says that it draws nothing")
    halves = parts_of(objective, 2) if runs.gradients else ()
    if len(halves) < 2:
        notes.append("the data cannot be divided" if runs.gradients else "the estimator does not look at the data")
    else:
        try:
            of_data.append(runs.pair(halves[0], halves[1], 2 * num_pairs))
        except UnknownObjective as error:  # a half without a loss term: all its targets are ignored
            notes.append(f"the diagonal of a half of the data is not known: {error}")
    cost = Cost(runs.gradients, time.perf_counter() - began, runs.products)
    over_data = _mean(of_data) if of_data else None
    told = drawn, seed, _mean(pairs), over_data, cost, tuple(notes), _layers(pairs, of_data)
    return NoiseFloor(repr(estimator), pairs[0].diagonals.matrices[0], rule, *told)


class _Runs:
    """Makes pairs of estimates, and adds up what they cost."""

    def __init__(
        self, estimator: DiagonalEstimator, rule: FlatRule, groups: Mapping[str, str] | None, seed: int
    ) -> None:
        self._estimator, self._rule, self._groups, self._seed = estimator, rule, groups, seed
        self.gradients, self.products = 0.0, 0

    def pair(self, one: Objective, other: Objective, index: int) -> Repeat:
        a, b = self._estimate(one, index), self._estimate(other, index + 1)
        masks = (FlatMask.from_diagonal(found, self._rule, groups=self._groups) for found in (a, b))
        return Repeat((a.seed, b.seed), mask_agreement(*masks), diagonal_agreement(a, b, gammas=()))

    def _estimate(self, objective: Objective, index: int) -> DiagonalEstimate:
        found = self._estimator.estimate(objective, seed=(self._seed + index) % seeds.SEED_LIMIT)
        self.gradients, self.products = self.gradients + found.cost.gradients, self.products + found.cost.products
        return found


def _mean(pairs: Sequence[Repeat]) -> SelfAgreement:
    sharp = [pair.masks.sharp.value for pair in pairs]
    known = [value for value in sharp if value is not None]
    return SelfAgreement(
        _average(sharp),
        _average([pair.masks.recall.value for pair in pairs]),
        _average([pair.masks.sharp.chance for pair in pairs]),
        _average([pair.diagonals.spearman for pair in pairs]),
        statistics.stdev(known) if len(known) > 1 else None,
        tuple(pairs),
    )


def _layers(pairs: Sequence[Repeat], of_data: Sequence[Repeat]) -> tuple[LayerFloor, ...]:
    rows = list[LayerFloor]()
    for index, row in enumerate(pairs[0].masks.layers):
        own, other = ([pair.masks.layers[index].sharp for pair in of] for of in (pairs, of_data))
        means = _average([it.value for it in own]), _average([it.value for it in other])
        rows.append(LayerFloor(row.name, row.numel, *means, _average([it.chance for it in own])))
    return tuple(rows)


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _check(estimator: Any, num_pairs: Any) -> None:
    if isinstance(estimator, type) or not isinstance(estimator, DiagonalEstimator):
        raise InvalidArgument(
            f"noise_floor: estimator={estimator!r} is no estimator of a diagonal. Pass an instance of one of curvkit.estimators, for "
            "example Fisher()."
        )
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int) or num_pairs < 1:
        raise InvalidArgument(f"noise_floor: num_pairs={num_pairs!r} must be an integer >= 1. The default is 1.")
