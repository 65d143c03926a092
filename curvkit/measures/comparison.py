"""Several points of one function, compared on the same data and with the same probes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.losses import sameness
from curvkit.measures import paired
from curvkit.measures.comparability import comparable, other_model
from curvkit.measures.compared import Measured
from curvkit.measures.comparison_result import Comparison
from curvkit.measures.comparison_stages import ComparisonSettings, Setup, measured_steps
from curvkit.measures.definitions import doubts
from curvkit.objectives import Objective
from curvkit.operators.graph import refuse_not_finite


def compare_steps(
    objectives: Mapping[str, Objective] | Sequence[Objective],
    settings: ComparisonSettings | None = None,
    *,
    seed: int | None = None,
) -> Iterator[Comparison]:
    """Compare step by step: one partial result after each product, so that a caller can show progress and stop.

    The losses come first, for all points; then the curvature, one point after the other.

    Args:
        objectives: As for `compare`.
        settings: What is wanted; None takes the defaults.
        seed: Of every draw, the same for all points; None draws one and records it.

    Yields:
        Partial results, and last the complete one.

    Raises:
        InvalidArgument: If a setting does not fit, or there are fewer than two objectives.
        UnknownObjective: If parameters, loss, mode or data differ.
        UnsupportedModel: If one of them has no curvature that could be measured.
        CurvkitError: If weights, losses or products are not finite, or memory does not suffice.
    """
    settings, began, seed = settings or ComparisonSettings(), time.perf_counter(), seeds.settle(seed)
    named = comparable(objectives)
    points, parts = [], ()
    for name, objective in named.items():
        with naming(name):
            refuse_not_finite("compare", objective)
            checked = settings.checked(objective)
            parts = parts or paired.divided(tuple(named.values()))
            notes = (*objective.notes, *_unlike(objective, next(iter(named.values()))), *doubts(checked))
            losses = paired.losses(objective.with_batches(parts))
            theta = objective.parameters.join([tensor.detach() for tensor in objective.tensors])
            points.append(Measured(name, theta, losses, preflight=checked, notes=notes))
        yield Comparison(tuple(points), seed, time.perf_counter() - began)
    plan = None
    for index, (name, objective) in enumerate(named.items()):
        with naming(name):
            for point in measured_steps(points[index], objective, Setup(settings, parts, seed, plan)):
                points[index] = point
                yield Comparison(tuple(points), seed, time.perf_counter() - began)
        plan = plan or points[index].plan


def compare(
    objectives: Mapping[str, Objective] | Sequence[Objective],
    num_eigenvalues: int = 1,
    *,
    probes: int | None = None,
    tolerance: float | None = None,
    seed: int | None = None,
    settings: ComparisonSettings | None = None,
) -> Comparison:
    """Compare the curvature of one function at several points: loss, lambda_max, trace, adaptive sharpness, eigenspaces.

        adaptive sharpness = lambda_max(diag|theta| H diag|theta|)

    which, unlike lambda_max(H) and tr H, stays the same where weights before a normalisation, or of neighbouring ReLU layers, are
    rescaled without a change of the function. Every point is measured on the same batches, with the same probes and the same start
    of the searches; differences to the first point are paired over the probes and over the parts of the data.

    Args:
        objectives: By name, or in order; the first is the reference. They may differ in their weights and buffers alone.
        num_eigenvalues: k, also the dimension of the eigenspaces whose overlap is measured.
        probes: Of the trace; None takes that of `settings`, 60 by default.
        tolerance: Relative residual of the eigenvalues; None takes that of `settings`, 1e-3 by default.
        seed: Of every draw; None draws one and records it.
        settings: Everything else: memory, engine, time, doubt from data.

    Returns:
        The quantities at each point, their differences to the first with intervals, and a verdict for each.

    Raises:
        InvalidArgument: If an argument is out of range, or there are fewer than two objectives.
        UnknownObjective: If parameters, loss, mode or data differ.
        UnsupportedModel: If one of them has no curvature that could be measured.
        CurvkitError: If weights, losses or products are not finite, or memory does not suffice.

    Cost: for each point about 100 products of two gradients each, 60 of them for the trace.
    Source: adaptive sharpness: Kwon et al. (2021), ASAM, at second order, with |theta| for every parameter, biases included.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(5, 1)
        >>> found = compare([Objective(model, F.mse_loss, [(x, x[:, :1])])] * 2, seed=0)
        >>> found.differences[0].trace.value, found.verdicts[0].kind
        (0.0, 'same')
    """
    settings = settings or ComparisonSettings()
    search = replace(
        settings.search,
        num=num_eigenvalues,
        tolerance=settings.search.tolerance if tolerance is None else tolerance,
    )
    settings = replace(settings, search=search, probes=settings.probes if probes is None else probes)
    *_, last = compare_steps(objectives, settings, seed=seed)
    return last


def _unlike(objective: Objective, reference: Objective) -> tuple[str, ...]:
    """Where the function at this point may be another one than the reference's."""
    if objective is reference:
        return ()
    found = (other_model(objective, reference), sameness.doubt(objective.loss, reference.loss))
    return tuple(note for note in found if note is not None)


@contextlib.contextmanager
def naming(name: str) -> Generator[None]:
    """Say of which point a refusal speaks.

    Args:
        name: Of the point.

    Raises:
        CurvkitError: The refusal, of its own class.
    """
    try:
        yield
    except CurvkitError as error:
        if isinstance(error, InvalidArgument):  # of what was asked for, not of a point
            raise
        raise type(error)(f"{error} This was found at {name}.") from error
