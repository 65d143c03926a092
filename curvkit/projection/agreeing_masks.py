"""How far two masks of flat directions agree, beside what chance gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvkit.projection.chance import AgainstChance, Cell, jaccard_by_chance
from curvkit.projection.matching import as_masks, pieces, refuse_different


@dataclass(frozen=True)
class Agreement:
    """Two masks over the same coordinates; sharp is what is not flat."""

    name: str
    """Of the parameter; "all" for all of them together."""
    numel: int
    flat_a: int
    flat_b: int
    both_flat: int
    flat: AgainstChance
    """Jaccard index of the flat sets, |A and B| / |A or B|."""
    sharp: AgainstChance
    """Jaccard index of the sharp sets."""
    recall: AgainstChance
    """Share of b's sharp set that is in a's; by chance a's share of sharp coordinates."""
    precision: AgainstChance
    """Share of a's sharp set that is in b's; by chance b's share of sharp coordinates."""


@dataclass(frozen=True)
class MaskAgreement(Agreement):
    """The same over all parameters, with a row for each of them."""

    layers: tuple[Agreement, ...]

    def __repr__(self) -> str:
        """The sharp sets; not the rows."""
        J, recall = self.sharp, self.recall
        if J.value is None or J.chance is None:
            return f"MaskAgreement({self.numel:,} coordinates, none of them sharp)"
        told = "" if recall.value is None else f", recall {recall.value:.3g} (chance {recall.chance:.3g})"
        return f"MaskAgreement(sharp: Jaccard {J.value:.3g} (chance {J.chance:.3g}){told}, {self.numel:,} coordinates)"


def mask_agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> MaskAgreement:
    """Compare which coordinates two masks call flat, and which sharp.

        J = |A and B| / |A or B|,    recall = |A and B| / |B|,    precision = |A and B| / |A|

    Each stands beside its expectation for independent random sets of the same sizes: `chance`. Masks may agree in nothing but how much of
    each layer is flat, which is an agreement about layers and not about coordinates: `within_layers` is the expectation for sets that
    are random within each layer, with the sizes that they have there. Only what lies above it is about coordinates.

    Args:
        a: By name, True or 1 for flat; a `FlatMask` or a mapping of bool or uint8.
        b: The reference of recall and precision.

    Returns:
        All coordinates together, and a row for each parameter.

    Raises:
        InvalidArgument: If the masks belong to different models (naming the first difference), or one of them is no mask.

    Cost: one pass over both; 4 MiB.
    Accuracy: counts are exact; of the chance of J see `jaccard_by_chance`; of recall and precision it is exact.

    Example:
        >>> import torch
        >>> a, b = ({"w": torch.tensor(flat)} for flat in ([True, True, False, False], [True, False, False, True]))
        >>> found = mask_agreement(a, b)
        >>> found.sharp.value, round(found.sharp.chance, 4), found.recall.value, found.recall.chance
        (0.3333333333333333, 0.3889, 0.5, 0.5)
    """
    a, b = as_masks("mask_agreement", a), as_masks("mask_agreement", b)
    refuse_different("mask_agreement", a, b)
    counts = {name: _counted(mask, b[name]) for name, mask in a.items()}
    rows = tuple(_row(name, [count]) for name, count in counts.items())
    return MaskAgreement(**vars(_row("all", list(counts.values()))), layers=rows)


@dataclass(frozen=True)
class _Counts:
    """Of coordinates: all, flat in a, flat in b, flat in both."""

    numel: int
    a: int
    b: int
    both: int

    @property
    def flat(self) -> Cell:
        """For the chance of the flat sets."""
        return Cell(self.numel, self.a, self.b)

    @property
    def sharp(self) -> Cell:
        """For the chance of the sharp sets."""
        return Cell(self.numel, self.numel - self.a, self.numel - self.b)


def _counted(a: Tensor, b: Tensor) -> _Counts:
    flat_a = flat_b = both = 0
    for x, y in pieces(a, b):
        x, y = x.bool(), y.bool()
        flat_a, flat_b = flat_a + int(x.count_nonzero()), flat_b + int(y.count_nonzero())
        both += int((x & y).count_nonzero())
    return _Counts(a.numel(), flat_a, flat_b, both)


def _row(name: str, counts: Sequence[_Counts]) -> Agreement:
    """Over one parameter, or all of them."""
    n, a, b, both = (sum(getattr(count, field) for count in counts) for field in ("numel", "a", "b", "both"))
    flats, sharps, sharp = [count.flat for count in counts], [count.sharp for count in counts], Cell(n, n - a, n - b)
    both_sharp = n - a - b + both
    return Agreement(
        name,
        n,
        a,
        b,
        both,
        _jaccard(both, Cell(n, a, b), flats),
        _jaccard(both_sharp, sharp, sharps),
        _part(both_sharp, sharp.b, sharp, sharps),
        _part(both_sharp, sharp.a, sharp, sharps),
    )


def _part(both: int, whole: int, cell: Cell, cells: Sequence[Cell]) -> AgainstChance:
    """Share of a set that is in the other one."""
    if not whole:
        return AgainstChance(None, None)
    within = None if len(cells) == 1 else math.fsum(cell.mean for cell in cells) / whole
    return AgainstChance(both / whole, cell.mean / whole, within, math.sqrt(cell.variance) / whole)


def _jaccard(both: int, whole: Cell, cells: Sequence[Cell]) -> AgainstChance:
    chance, spread = jaccard_by_chance([whole])
    within = None if len(cells) == 1 else jaccard_by_chance(cells)[0]
    either = whole.a + whole.b - both
    return AgainstChance(both / either if either else None, chance, within, spread)
