"""The contract of estimators of a diagonal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.estimators import DiagonalEstimator, TrainingEstimator
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import random_state
from curvkit.results.diagonal_estimate import DiagonalEstimate
from curvkit.testing.contract import CHECK_ESTIMATOR as CONTRACT
from curvkit.testing.contract import undisturbed
from curvkit.testing.estimator_form import check_form, estimated
from curvkit.testing.estimator_laws import Draws, check_laws, is_exact
from curvkit.testing.training_contract import check_training

OTHER_SEEDS = 8
"""One of them must give other numbers: a few labels that are drawn may be the same twice."""


def check_estimator(estimator: DiagonalEstimator, objective: Objective | None = None, *, seed: int = 0) -> None:
    """Check that an estimator of a diagonal keeps what curvkit relies on.

    - Options: a frozen dataclass; `eval(repr(estimator)) == estimator`.
    - Form: values, and standard errors where something is sampled, have the names of `objective.parameters` in order, the parameters'
      shapes, the dtype of `objective.raised()` (bfloat16 becomes float32) and its device; they need no gradient. Values are finite, errors
      not below zero, NaN where unknown. The matrix is a word, the same as the class says; the cost is positive.
    - Seed: the same seed gives the same bits, whatever the global random state is; where there are standard errors above 0 another seed
      gives others; where there are errors the seed is recorded, also one that was drawn.
    - Nothing is disturbed: model, buffers, `.grad`, hooks, modes, random states, global flags and data are bit for bit as before, also when
      the forward pass raises in the middle.
    - Laws, of the mean over seeds: what is left out by patterns or frozen has no entry, and the others keep theirs; data cut into uneven
      batches gives the same; c times the loss gives c times the diagonal, of a Hessian or GGN; a loss that is a sum over W terms gives W
      times that of the mean, of these and both Fishers. Standard errors are those of the spread over seeds within a factor of two.
    - Truth: the mean over seeds is the diagonal that is computed densely.
    - Training, where there are `recording` and `from_recording`: a recorded step gives an estimate of the same form and mean, disturbs
      nothing, also when the forward pass raises, and leaves outputs and graph for the user's backward pass.

    Laws and truth hold for the matrices "hessian", "ggn", "fisher" and "empirical_fisher", and are looked at where there are at most 500
    parameters; of another matrix the form, the seed, the errors and which parameters have an entry are checked, of "squared_gradient" and
    "second_moment" also that the others keep theirs. Means are compared coordinate by coordinate, and in sum: within 4 standard errors
    from 16 seeds; what is beyond is judged anew by 64 others, within 5.

    Args:
        estimator: Any object with `estimate(objective, *, seed=None)`.
        objective: To check it on; None: a small classifier in float64. Only on this one are the sum over terms, the truth of both Fishers
            and training checked.
        seed: Of all draws.

    Raises:
        InvalidArgument: Naming the first property that fails.

    Cost: about 60 estimates where something is sampled, else 20.
    Accuracy: a sound estimator fails with a probability below 1e-4 if its estimates are about normal; a bias of 1.5 standard deviations of
        one estimate is found, in a coordinate or in the sum. With `objective`, dtypes that its model does not run in are left out.

    Example:
        >>> from curvkit.estimators import EmpiricalFisher
        >>> check_estimator(EmpiricalFisher())
    """
    seeds.settle(seed)
    _check_options(estimator)
    standard, objective = objective is None, _classifier() if objective is None else objective
    with undisturbed(CONTRACT, objective, "an estimate"):
        first = estimated(estimator, objective, seed)
    _check_seed(estimator, objective, first, seed)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        converted = objective.converted(dtype=dtype)
        if standard or _runs(converted):
            estimated(estimator, converted, seed)
    with undisturbed(CONTRACT, objective, "an estimate whose forward pass raised"):
        _interrupted(estimator, objective, seed)
    draws = Draws(lambda of, seed: estimated(estimator, of, seed), objective, seed)
    check_laws(lambda of, seed: estimated(estimator, of, seed), draws, first, standard=standard, seed=seed)
    if standard and isinstance(estimator, TrainingEstimator):
        check_training(estimator, objective, draws, partial(check_form, estimator), seed)
    _check_options(estimator)


def _runs(objective: Objective) -> bool:
    """Whether a model of the user's runs in another dtype."""
    try:
        objective.gradient()
    except (CurvkitError, RuntimeError):
        return False
    return True


def _classifier() -> Objective:
    """A small one, with `.grad` and a buffer that could be disturbed."""
    with random_state():
        torch.manual_seed(0)
        model = MLP([4, 5, 3], "tanh").double()
        x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    model.register_buffer("count", torch.ones(1))
    return Objective(model, F.cross_entropy, [(x, y)])


def _check_options(estimator: Any) -> None:
    kind = type(estimator)
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        CONTRACT.refuse("options are frozen", f"{kind.__name__} is no frozen dataclass", "@dataclass(frozen=True)")
    if not callable(getattr(estimator, "estimate", None)):
        CONTRACT.refuse("an estimator", f"{kind.__name__} has no method estimate", "estimate(objective, *, seed=None)")
    written = repr(estimator)
    try:
        again = eval(written, {"__builtins__": {}, "inf": math.inf, "nan": math.nan, **_classes(estimator)})
    except Exception as error:  # whatever evaluating a stranger's repr raises
        raise InvalidArgument(
            CONTRACT.said("repr is Python", f"evaluating {written} raised {error!r}", "itself")
        ) from error
    if again != estimator:
        CONTRACT.refuse("repr is Python", f"evaluating {written} gives {again!r}", "an equal estimator")


def _classes(estimator: Any) -> dict[str, Any]:
    """The classes of an estimator and of those that are its options, by name."""
    found: dict[str, Any] = {type(estimator).__name__: type(estimator)}
    for field in [it for it in dataclasses.fields(estimator) if it.repr]:
        value = getattr(estimator, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= _classes(value)
    return found


def _check_seed(estimator: DiagonalEstimator, objective: Objective, first: DiagonalEstimate, seed: int) -> None:
    kept = {name: value.clone() for name, value in first.values.items()}
    with random_state():
        torch.rand(7)
        again = estimated(estimator, objective, seed)
    if not _same(kept, again.values) or not _same(first.stderr or {}, again.stderr or {}):
        CONTRACT.refuse("same seed, same bits", f"two estimates with seed={seed} differ", "the same bits")
    other = estimated(estimator, objective, (seed + 1) % seeds.SEED_LIMIT)
    if not _same(kept, first.values):
        CONTRACT.refuse(
            "results are kept", "a later estimate overwrote the tensors of an earlier one", "tensors of its own"
        )
    if first.seed not in (None, seed):
        CONTRACT.refuse("the seed is recorded", f"seed={seed} was given, the estimate says {first.seed}", f"{seed}")
    if first.stderr is None:
        return
    if first.seed is None:
        CONTRACT.refuse("the seed is recorded", "there are standard errors, and seed is None", f"{seed}")
    others = ((seed + k) % seeds.SEED_LIMIT for k in range(2, OTHER_SEEDS + 1))
    if (
        _same(kept, other.values)
        and not is_exact(first, objective)
        and all(_same(kept, estimated(estimator, objective, k).values) for k in others)
    ):
        CONTRACT.refuse(
            "new seed, new bits",
            f"standard errors are given, but {OTHER_SEEDS} other seeds give the same",
            "another estimate, or standard errors of 0",
        )
    drawn = estimated(estimator, objective, None)
    if drawn.seed is None or not _same(drawn.values, estimated(estimator, objective, drawn.seed).values):
        CONTRACT.refuse(
            "a drawn seed is recorded", f"seed=None gave seed {drawn.seed}, which does not repeat it", "it does"
        )


def _interrupted(estimator: DiagonalEstimator, objective: Objective, seed: int) -> None:
    """Let a forward pass in the middle of the estimate raise."""

    class Interruption(Exception):
        pass

    @dataclass
    class Calls:
        made: int = 0
        last: float = math.inf

    calls = Calls()

    def count(module: nn.Module, inputs: object) -> None:
        calls.made += 1
        if calls.made > calls.last:
            raise Interruption

    @contextlib.contextmanager
    def counted() -> Generator[None]:
        handle = objective.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()

    with counted():
        estimator.estimate(objective, seed=seed)
    whole = calls.made
    for calls.last in sorted({0, whole // 2, whole - 1} & set(range(whole))):
        calls.made = 0
        with counted(), contextlib.suppress(Exception):  # it may be wrapped
            estimator.estimate(objective, seed=seed)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return one.keys() == other.keys() and all(
        torch.equal(value.nan_to_num(nan=-1.0), other[name].nan_to_num(nan=-1.0)) for name, value in one.items()
    )
