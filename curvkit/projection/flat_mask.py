"""Flat directions as a set of coordinates: those of least curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.projection import mask_files
from curvkit.projection.flat_choice import chosen, random_scores
from curvkit.projection.flat_rule import FlatRule
from curvkit.projection.matching import as_masks, pieces, refuse_different
from curvkit.results.diagonal_estimate import DiagonalEstimate


@dataclass(frozen=True)
class FlatShare:
    """How much of one parameter tensor is flat."""

    name: str
    numel: int
    flat: int

    @property
    def flat_fraction(self) -> float:
        """Flat over all coordinates; NaN where there are none."""
        return self.flat / self.numel if self.numel else float("nan")


@dataclass(frozen=True, eq=False, repr=False)
class FlatMask(Mapping[str, Tensor]):
    """The projection on flat coordinates: u -> n * u with n_i = 1 where |h_i| is among the smallest, and 0 where it is not.

    It is a mapping of its masks by name, too. The tensors must not be changed.

    Args:
        masks: Parameter-shaped, bool or uint8 of 0 and 1, by name, in the order of the parameters; 1 for flat. bool is kept as the
            uint8 that lies in the same memory.
        rule: That they follow; None for others.
        threshold: Largest |h| that is flat; None where there is no single one: several sets, an empty set, or no rule.
        origin: Where they come from, for tables and files.

    Raises:
        InvalidArgument: If there is no coordinate, or a tensor that is no mask; at a call, if the update has other parameters.

    Cost: one byte per coordinate. Of a call, one reading, and the memory of the result.
    Source: IRE (arXiv 2405.20763), Eq. 5.

    Example:
        >>> mask = FlatMask.from_diagonal({"a": torch.tensor([3.0, -0.1]), "b": torch.tensor([1.0])}, FlatRule(0.7))
        >>> mask, mask.threshold
        (FlatMask(2 of 3 coordinates flat), 1.0)
        >>> {name: kept.tolist() for name, kept in mask({"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([7.0])}).items()}
        {'a': [0.0, 6.0], 'b': [7.0]}
    """

    masks: Mapping[str, Tensor]
    rule: FlatRule | None = None
    threshold: float | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        as_masks("FlatMask", self.masks)
        refuse_different("FlatMask", self.masks, self.masks)  # no coordinate at all
        object.__setattr__(self, "masks", {name: mask.detach().view(torch.uint8) for name, mask in self.masks.items()})

    __eq__ = object.__eq__  # that of mappings compares tensors
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        """How many are flat."""
        flat, numel = sum(row.flat for row in self.layers), sum(row.numel for row in self.layers)
        return f"FlatMask({flat:,} of {numel:,} coordinates flat{f', {self.origin}' if self.origin else ''})"

    @classmethod
    def from_diagonal(
        cls,
        estimate: DiagonalEstimate | Mapping[str, Tensor],
        rule: FlatRule,
        *,
        groups: Mapping[str, str] | None = None,
    ) -> FlatMask:
        """Take the floor(gamma n) coordinates of least |h|, exactly; of equal ones the first, in the order of the names, then of the index.

        Args:
            estimate: The diagonal h, or its values by name. Types and devices may differ from tensor to tensor.
            rule: Share, scope, and what zeros count as.
            groups: The group of each parameter, for `scope="group"` and no other.

        Returns:
            The mask, on the devices of the values. The same for any order in which the values are read, and on any device.

        Raises:
            InvalidArgument: If a value is NaN (by its name), its type has no order, or the groups do not fit.

        Cost: on the CPU two readings and 1 to 2 % of the values' memory, beside the mask's n bytes; see `kth_smallest`.
        Source: Eq. 5 of IRE. Differs: ties do not add to the number, and the official code's off-by-one is not repeated.

        Example:
            >>> found = FlatMask.from_diagonal({"w": torch.tensor([[0.0, 2.0], [0.0, 1.0]])}, FlatRule(0.5, zero_curvature="sharp"))
            >>> found.view()["w"].tolist()
            [[False, False], [False, True]]
        """
        origin = f"{estimate.matrix} by {estimate.estimator}" if isinstance(estimate, DiagonalEstimate) else ""
        return cls(*chosen(_values(estimate), rule, groups), origin)

    @classmethod
    def random(
        cls,
        like: DiagonalEstimate | Mapping[str, Tensor],
        rule: FlatRule,
        seed: int | None = None,
        *,
        groups: Mapping[str, str] | None = None,
    ) -> FlatMask:
        """Draw a mask as a control: as many coordinates as `from_diagonal` takes, each set of them equally likely.

        Args:
            like: Names, shapes and devices; a diagonal, a mask, or parameters. Its values are looked at for `zero_curvature="sharp"` alone,
                where they must be the diagonal: its zeros stay sharp.
            rule: Share and scope.
            seed: Of the draw; None draws one. It is in `origin`.
            groups: As of `from_diagonal`.

        Returns:
            The mask; no threshold.

        Raises:
            InvalidArgument: If the diagonal is needed and not given, or the groups do not fit.

        Cost: beside that of `from_diagonal`, 4 n bytes.

        Example:
            >>> FlatMask.random({"w": torch.zeros(1000)}, FlatRule(0.3), seed=7)
            FlatMask(300 of 1,000 coordinates flat, random, seed 7)
        """
        seed = seeds.settle(seed)
        masks, rule, _ = chosen(random_scores(_values(like), rule, seed), rule, groups)
        return cls(masks, rule, origin=f"random, seed {seed}")

    @torch.no_grad()
    def __call__(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the flat coordinates of an update, and set the sharp ones to 0, whatever they were.

        Args:
            update: One tensor for each parameter, of its shape, in any order; of any floating type, on any device.

        Returns:
            New tensors of the same types and devices.

        Raises:
            InvalidArgument: If names or shapes are not those of the mask.
        """
        if len(update) != len(self.masks) or any(name not in update for name in self.masks):
            missing, beside = [n for n in self if n not in update], [n for n in update if n not in self.masks]
            raise InvalidArgument(
                f"FlatMask: the update lacks {missing[:3]} and has {beside[:3]} beside; it must have the {len(self)} names of the mask. "
                "Project an update of the same parameters, or make the mask for these."
            )
        found: dict[str, Tensor] = {}
        for name, u in update.items():
            mask = self.masks[name]
            if u.shape != mask.shape or not u.is_floating_point() or u.layout is not torch.strided:
                raise InvalidArgument(
                    f"FlatMask: {name!r} is a {u.dtype} tensor of shape {tuple(u.shape)} and layout {u.layout} in the update; it must be a "
                    f"dense floating-point one of shape {tuple(mask.shape)}. Pass parameter-shaped tensors, sparse ones with .to_dense()."
                )
            found[name] = torch.where(mask.view(torch.bool).to(u.device), u, 0.0)
        return found

    def view(self) -> dict[str, Tensor]:
        """Look at the masks as bool, in the same memory; True for flat.

        Returns:
            By name.
        """
        return {name: mask.view(torch.bool) for name, mask in self.masks.items()}

    def bytes(self) -> dict[str, Tensor]:
        """Look at the masks as uint8, which compiled kernels read faster than bool; 1 for flat.

        Returns:
            By name; the tensors of the mask itself.
        """
        return dict(self.masks)

    @cached_property
    def layers(self) -> tuple[FlatShare, ...]:
        """How much of each tensor is flat."""
        return tuple(FlatShare(name, mask.numel(), int(mask.count_nonzero())) for name, mask in self.masks.items())

    @property
    def flat_fraction(self) -> float:
        """Share of all coordinates that is flat."""
        return sum(row.flat for row in self.layers) / sum(row.numel for row in self.layers)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that tell masks apart, as processes need that must agree."""
        return mask_files.digest(self.masks)

    def inverted(self) -> FlatMask:
        """Exchange flat and sharp, as a control, or for the curvature within the sharp coordinates.

        Returns:
            The projection I - P; it follows no rule.
        """
        before, mark = self.origin, "inverted: "
        origin = before.removeprefix(mark) if before.startswith(mark) else mark + (before or "a mask")
        return FlatMask({name: 1 - mask for name, mask in self.masks.items()}, origin=origin)

    @property
    def sharp(self) -> FlatMask:
        """The projection on what this one takes out, as that of a `SharpComplement`."""
        return self.inverted()

    def turnover(self, other: Mapping[str, Tensor]) -> float:
        """Tell how much two masks of one model differ, such as those before and after a refresh.

        Args:
            other: The other mask.

        Returns:
            Share of all coordinates that are flat in one and sharp in the other.

        Raises:
            InvalidArgument: If the masks are of different models; it names the first parameter that differs.
        """
        refuse_different("FlatMask.turnover", self.masks, as_masks("FlatMask.turnover", other))
        changed = sum(
            int((a != b.view(torch.uint8)).count_nonzero())
            for name, mask in self.masks.items()
            for a, b in pieces(mask, other[name])
        )
        return changed / sum(mask.numel() for mask in self.masks.values())

    def save(self, path: str | Path, *, record: Mapping[str, Any] | None = None) -> Path:
        """Write the mask, one bit per coordinate, as safetensors.

        Args:
            path: An existing file is replaced.
            record: How it was made, as plain values; kept in the file.

        Returns:
            The path.
        """
        return mask_files.write(path, {"mask": self}, record)

    @classmethod
    def load(cls, path: str | Path) -> FlatMask:
        """Read the one mask of a file.

        Args:
            path: Of the file.

        Returns:
            The mask, on the CPU.

        Raises:
            InvalidArgument: If it is another file, damaged, or has several masks.
        """
        found = mask_files.read(path)
        if len(found) != 1:
            raise InvalidArgument(
                f"{path}: has {len(found)} masks ({', '.join(found)}), and one is wanted. Take it from `load_masks(path)` by its name."
            )
        return cls(*next(iter(found.values())))


def _values(estimate: Any) -> Mapping[str, Tensor]:
    values = estimate.values if isinstance(estimate, DiagonalEstimate) else estimate
    if not isinstance(values, Mapping):
        raise InvalidArgument(
            f"FlatMask: {type(values).__name__} is no DiagonalEstimate and no mapping of tensors by name. Pass what estimators return."
        )
    return values
