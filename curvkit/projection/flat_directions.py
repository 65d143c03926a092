"""The two ways from a function to its flat directions: a mask over coordinates, and the complement of an eigenspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvkit.errors import InvalidArgument
from curvkit.estimators import DiagonalEstimator, Lanczos
from curvkit.objectives import Objective
from curvkit.projection.flat_mask import FlatMask
from curvkit.projection.flat_rule import FlatRule
from curvkit.projection.protocol import FlatDirections, Projection
from curvkit.projection.sharp_complement import SharpComplement


@dataclass(frozen=True)
class MaskOf:
    """Flat are the coordinates whose entry in the diagonal of a curvature matrix is least in absolute value.

    Args:
        estimator: Of the diagonal; any `DiagonalEstimator`.

    Raises:
        InvalidArgument: If it is none.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.estimators import Exact
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> flat = MaskOf(Exact()).directions(objective, FlatRule(gamma=0.4), seed=0)
        >>> flat({"weight": torch.ones(1, 3)})["weight"].tolist()
        [[0.0, 0.0, 1.0]]
    """

    estimator: DiagonalEstimator

    def __post_init__(self) -> None:
        """Check the estimator."""
        if isinstance(self.estimator, type) or not isinstance(self.estimator, DiagonalEstimator):
            raise InvalidArgument(
                f"MaskOf: estimator={_shown(self.estimator)} is no estimator of a diagonal: it needs estimate(objective, *, seed=None). "
                "Pass an instance, for example Fisher() or ExampleHutchinson()."
            )

    def directions(
        self, objective: Objective, rule: FlatRule, *, seed: int | None = None, groups: Mapping[str, str] | None = None
    ) -> FlatMask:
        """Estimate the diagonal, and take the mask.

        Args:
            objective: The function.
            rule: Which coordinates are flat.
            seed: Of every draw; None draws one.
            groups: The group of each parameter, for `rule.scope="group"` and no other.

        Returns:
            The mask.

        Raises:
            InvalidArgument: If an entry of the diagonal is NaN, or the groups do not fit.

        Cost: one estimate, and the choice.
        """
        return FlatMask.from_diagonal(self.estimator.estimate(objective, seed=seed), rule, groups=groups)


@dataclass(frozen=True)
class ComplementOf:
    """Flat is what is orthogonal to the top eigenspace of the Hessian.

    How many directions are sharp is the rank's to say: all but k of n are flat, which is far more than a mask with gamma = 0.9 keeps.

    Args:
        search: Of the eigenpairs.

    Raises:
        InvalidArgument: If it is no `Lanczos`.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])   # H = 2/3 diag(9, 4, 1)
        >>> flat = ComplementOf(Lanczos(rank=1)).directions(objective, FlatRule(gamma=0.6), seed=0)
        >>> [abs(round(entry, 4)) for entry in flat({"weight": torch.ones(1, 3)})["weight"][0].tolist()]
        [0.0, 1.0, 1.0]
    """

    search: Lanczos

    def __post_init__(self) -> None:
        """Check the search."""
        if not isinstance(self.search, Lanczos):
            raise InvalidArgument(
                f"ComplementOf: search={_shown(self.search)} is no Lanczos: only that finds an eigenspace. Pass Lanczos(rank=10), or use "
                "the estimator itself, which gives a mask."
            )

    def directions(
        self, objective: Objective, rule: FlatRule, *, seed: int | None = None, groups: Mapping[str, str] | None = None
    ) -> SharpComplement:
        """Search for the eigenpairs, and take the complement.

        Args:
            objective: The function.
            rule: Its gamma and zero_curvature say nothing here, the rank does; its scope must be "global".
            seed: Of the start vector; None draws one.
            groups: None.

        Returns:
            The complement; its `notes` tell of pairs that have not converged.

        Raises:
            InvalidArgument: If the rule asks for flat directions within each group or tensor, or groups are given.

        Cost: typically 3 k + 10 products of about two gradients.
        """
        if rule.scope != "global" or groups is not None:
            asked = f"scope={rule.scope!r}" + ("" if groups is None else " with groups")
            raise InvalidArgument(
                f"ComplementOf: {asked} asks for flat directions within parts of the parameters; an eigenspace is of all at once. "
                "Use FlatRule(gamma, scope='global') without groups, or an estimator of the diagonal."
            )
        return SharpComplement(self.search.eigenpairs(objective, seed=seed))


def directions(
    source: DiagonalEstimator | FlatDirections,
    objective: Objective,
    rule: FlatRule,
    *,
    seed: int | None = None,
    groups: Mapping[str, str] | None = None,
) -> Projection:
    """Find the flat directions of a function, whatever they are found by.

    Args:
        source: A `DiagonalEstimator`, which gives a mask, `Lanczos` too: its diagonal is that of the top eigenspace; or anything with
            `directions`, as `ComplementOf(Lanczos(rank))` has.
        objective: The function.
        rule: Which directions are flat.
        seed: Of every draw; None draws one.
        groups: The group of each parameter, for `rule.scope="group"` and no other.

    Returns:
        The projection that keeps them.

    Raises:
        InvalidArgument: If the source is neither, or the rule or the groups do not fit it.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.estimators import Exact
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> objective = Objective(torch.nn.Linear(3, 1, bias=False), F.mse_loss, [(x, x[:, :1])])
        >>> for source in (Exact(), ComplementOf(Lanczos(rank=1))):
        ...     type(directions(source, objective, FlatRule(gamma=0.6), seed=0)).__name__
        'FlatMask'
        'SharpComplement'
    """
    if isinstance(source, type) or not isinstance(source, FlatDirections | DiagonalEstimator):
        raise InvalidArgument(
            f"directions: source={_shown(source)} has neither estimate(objective, *, seed=None) nor directions(objective, rule, *, "
            "seed=None). Pass an estimator of a diagonal, or ComplementOf(Lanczos(rank=10))."
        )
    if not isinstance(source, FlatDirections):
        source = MaskOf(source)
    return source.directions(objective, rule, seed=seed, groups=groups)


def _shown(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
