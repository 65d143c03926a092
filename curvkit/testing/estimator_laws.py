"""What the mean of an estimator of a diagonal must keep: laws that tie objectives to each other, and the truth where it can be computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import UnknownObjective, UnsupportedModel
from curvkit.losses.batches import rows, take_rows
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.parameters import ParameterSpace
from curvkit.results.diagonal_estimate import DiagonalEstimate
from curvkit.testing.contract import CHECK_ESTIMATOR as CONTRACT

Estimate = Callable[[Objective, int], DiagonalEstimate]
LINEAR = ("hessian", "ggn")
"""Matrices that are linear in the loss."""
KNOWN = (*LINEAR, "fisher", "empirical_fisher")
"""Matrices that are means over all examples, however they are cut into batches."""
ENTRYWISE = (*KNOWN, "squared_gradient", "second_moment")
"""Matrices of which an entry does not depend on which other parameters are looked at."""
STAGES = (16, 64)
"""Estimates that means rest on; the second number where the first finds a difference."""
ERRORS = (4.0, 5.0)
"""Means may differ by so many standard errors, in each stage."""
BIAS, MOST = 0.1, 100
"""A wrong factor that should show, and estimates that it is looked for with, at most: noisy ones show larger factors alone."""
FACTOR = 2.0
"""Standard errors may differ by this factor from the spread over seeds."""
ROUNDING = 1e4
"""Numbers that are no means of draws may differ by so many eps of the largest."""
LARGEST = 500
"""Parameters of a function that is looked at densely."""
SCALE = 3.0
"""c of the law for c times the loss."""


class Draws:
    """Estimates of one function with different seeds, made as they are needed."""

    def __init__(self, estimate: Estimate, objective: Objective, seed: int, *, factor: float = 1.0) -> None:
        self.objective, self.factor = objective, factor
        self._estimate, self._seed = estimate, seed
        self._found: list[tuple[Tensor, Tensor | None]] = []

    def one(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The estimate of a number, values and their sum [n + 1], and standard errors [n]."""
        while len(self._found) <= index:
            drawn = torch.randint(2**32, (), generator=seeds.generator(self._seed, "check estimator", len(self._found)))
            found, space = self._estimate(self.objective, int(drawn)), self.objective.parameters
            flat = space.flatten(found.values).double()
            errors = None if found.stderr is None else space.flatten(found.stderr).double()
            self._found.append((torch.cat([flat, flat.sum()[None]]) * self.factor, errors))
        return self._found[index]

    @property
    def sampled(self) -> bool:
        """Whether two seeds give different numbers."""
        return not torch.equal(self.one(0)[0], self.one(1)[0])

    def mean(self, stage: int) -> tuple[Tensor, Tensor]:
        """Mean and standard error over the seeds of a stage, [n + 1]."""
        if not self.sampled:
            return self.one(0)[0], torch.zeros_like(self.one(0)[0])
        values = torch.stack([self.one(index)[0] for index in _indices(stage)])
        return values.mean(0), values.std(0) / math.sqrt(len(values))


def check_laws(estimate: Estimate, draws: Draws, first: DiagonalEstimate, *, standard: bool, seed: int) -> None:
    """Check the laws that hold for a matrix.

    Args:
        estimate: Of a function, with a seed; it has the form that is asked for.
        draws: Of the objective.
        first: An estimate of it.
        standard: Whether it is the function that is checked on by default.
        seed: Of all draws.

    Raises:
        InvalidArgument: Naming the law that fails.
    """
    objective = draws.objective
    _check_restricted(draws, estimate, seed, entrywise=first.matrix in ENTRYWISE)
    if first.stderr is not None and not is_exact(first, objective):
        _check_errors(draws)
    if first.matrix not in KNOWN or objective.parameters.n > LARGEST:
        return
    cut, _ = objective.cut(3)
    if len(cut.batches) > len(objective.batches):
        compare("uneven batches give the same", "cut into parts", draws, Draws(estimate, cut, seed))
    if first.matrix in LINEAR:
        _check_scaled(draws, estimate, seed)
    if standard:
        summed = replace(objective, loss=nn.CrossEntropyLoss(reduction="sum"))
        others = Draws(estimate, summed, seed, factor=1.0 / (objective.examples or 1))
        compare("a sum over W terms is W times the mean", "as a sum, divided by W,", draws, others)
    truth = _truth(objective, first.matrix, standard=standard)
    if truth is not None:
        compare("the mean is the truth", "computed densely", draws, truth)
        _check_bias(draws, truth[:-1])


def is_exact(found: DiagonalEstimate, objective: Objective) -> bool:
    """Whether nothing of what was drawn shows in an estimate, as where a matrix is diagonal: its errors are 0 up to rounding.

    Args:
        found: With standard errors.
        objective: The function.

    Returns:
        For errors that are not known (one sample) True where the truth is computed, which then decides.
    """
    largest = max((value.abs().max().item() for value in found.values.values() if value.numel()), default=0.0)
    errors = torch.cat([error.flatten() for error in (found.stderr or {}).values()])
    if bool(errors.isnan().any()):
        return found.matrix in LINEAR and objective.parameters.n <= LARGEST
    return bool((errors <= ROUNDING * torch.finfo(errors.dtype).eps * largest).all())


def _check_restricted(draws: Draws, estimate: Estimate, seed: int, *, entrywise: bool) -> None:
    """Leave out the first parameter by a pattern and freeze the last; the form of each estimate is checked anyway."""
    objective = draws.objective
    names = objective.parameters.names
    if len(names) < 2:
        return
    model = objective.copied().model
    chosen = names[1:]
    if len(names) > 2:
        dict(model.named_parameters())[names[-1]].requires_grad_(False)
        chosen = names[1:-1]
    patterns = [name.replace("[", "[[]") for name in chosen]
    restricted = replace(objective, model=model, data=objective.batches, parameters=ParameterSpace.of(model, patterns))
    others = Draws(estimate, restricted, seed)
    others.one(0)
    if not entrywise:
        return
    keep = torch.cat([torch.full((e.numel,), e.name in chosen) for e in objective.parameters.entries])
    compare("the others keep theirs", "with parameters left out or frozen", draws, others, keep=keep)


def _check_scaled(draws: Draws, estimate: Estimate, seed: int) -> None:
    """Multiply the loss by c; an estimator may refuse a loss that it does not know."""
    objective = draws.objective
    if objective.loss.reduction == "sum":
        return

    def scaled(outputs: Tensor, targets: object) -> tuple[Tensor, float]:
        terms = objective.terms_of(outputs, targets)
        return SCALE * terms.total, terms.weight

    others = Draws(estimate, replace(objective, loss=scaled), seed, factor=1.0 / SCALE)
    try:
        others.one(0)
    except (UnsupportedModel, UnknownObjective):
        return
    compare(
        "c times the loss gives c times the diagonal",
        f"of {SCALE:g} times the loss, divided by {SCALE:g},",
        draws,
        others,
    )


def _check_bias(draws: Draws, t: Tensor) -> None:
    """A wrong factor, which may be small beside the errors of entries: s = <d, t> / <t, t> has the mean 1 if E d = t."""
    size = t.dot(t).item()
    if not draws.sampled or not size:
        return
    s = torch.stack([draws.one(index)[0][:-1].dot(t) / size for index in range(STAGES[0])])
    most = math.ceil(min(MOST, (s.std().item() * ERRORS[-1] / BIAS) ** 2))
    s = torch.stack([draws.one(index)[0][:-1].dot(t) / size for index in range(max(STAGES[0], most))])
    mean, error = s.mean().item(), s.std().item() / math.sqrt(len(s))
    if abs(mean - 1.0) > ERRORS[-1] * error + ROUNDING * torch.finfo(draws.objective.raised().dtype).eps:
        CONTRACT.refuse(
            "the mean is the truth",
            f"in the direction of the dense truth it is {mean:.3g} +- {error:.2g} times that",
            f"1 within {ERRORS[-1]:g} standard errors",
        )


def _check_errors(draws: Draws) -> None:
    """Mean square of the standard errors, over coordinates and seeds, against the variance over seeds."""
    for stage in range(len(STAGES)):
        pairs = [draws.one(index) for index in _indices(stage)]
        spread = torch.stack([values[:-1] for values, _ in pairs]).var(0).sum().sqrt().item()
        said = torch.stack([errors.square() for _, errors in pairs if errors is not None]).mean(0).sum().sqrt().item()
        if math.isnan(said) or spread / FACTOR <= said <= spread * FACTOR:
            return
    CONTRACT.refuse(
        "standard errors are the spread over seeds",
        f"the root of their summed squares is {said:.3g}, that of the variances over seeds {spread:.3g}",  # pyright: ignore[reportPossiblyUnboundVariable]
        f"a factor of {FACTOR:g}",
    )


def compare(law: str, what: str, draws: Draws, others: Draws | Tensor, *, keep: Tensor | None = None) -> None:
    """Compare two means, or a mean with the truth, stage by stage.

    Args:
        law: The property.
        what: The others are, for the message.
        draws: Of the objective.
        others: Of another function with the same diagonal, or the diagonal and its sum.
        keep: The coordinates that are compared, [n] bool; None: all, and their sum. The others have these alone.
    """
    objective, position, said = draws.objective, 0, ""
    for stage in range(len(STAGES)):
        mean, error = draws.mean(stage)
        if isinstance(others, Tensor):
            other, doubt = others, torch.zeros_like(others)
        else:
            other, doubt = others.mean(stage)
        scale = mean[:-1].abs().max().item()
        if keep is not None:
            mean, error = (part[:-1][keep.to(part.device)] for part in (mean, error))
            other, doubt = other[:-1], doubt[:-1]
        rounding = ROUNDING * torch.finfo(objective.raised().dtype).eps * scale
        excess = (mean - other).abs() / (ERRORS[stage] * (error.square() + doubt.square()).sqrt() + rounding)
        if not bool((excess > 1.0).any()):
            return
        position = int(excess.argmax())
        said = f"{mean[position]:.4g} +- {error[position]:.2g}, {what} {other[position]:.4g} +- {doubt[position]:.2g}"
    index = position if keep is None else int(keep.nonzero()[position])
    CONTRACT.refuse(law, f"{_place(objective, index)} is {said}", f"{ERRORS[-1]:g} standard errors")


def _truth(objective: Objective, matrix: str, *, standard: bool) -> Tensor | None:
    """The diagonal and its sum, computed densely; None where that is another quantity, or not known to be the same."""
    it = objective.raised()
    if matrix in LINEAR or (
        standard and matrix == "fisher"
    ):  # the GGN is the Fisher matrix for logits and cross-entropy
        A = Hessian(it) if matrix == "hessian" else GGN(it)
        diagonal = A.matmat(torch.eye(A.n, dtype=A.dtype, device=A.device)).diagonal()
    elif standard:
        diagonal, count = torch.zeros(it.parameters.n, dtype=it.dtype, device=it.device), it.examples or 1
        for batch in it.batches:
            for row in range(rows(batch) or 0):
                diagonal += it.with_batches([take_rows(batch, torch.tensor([row]))]).gradient().square() / count
    else:
        return None
    return torch.cat([diagonal, diagonal.sum()[None]]).double()


def _indices(stage: int) -> range:
    first = sum(STAGES[:stage])
    return range(first, first + STAGES[stage])


def _place(objective: Objective, index: int) -> str:
    """Which parameter a flat index belongs to."""
    for entry in objective.parameters.entries:
        if index < entry.offset + entry.numel:
            return f"entry {index - entry.offset} of {entry.name!r}"
    return "the sum of all entries"
