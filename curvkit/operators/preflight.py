"""Are the second derivatives right? Three probes on a few rows, before anything long is run."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Generator

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError, UnsupportedModel
from curvkit.linalg.basis import dot, norm
from curvkit.losses.batches import rows, take_rows
from curvkit.objectives import Objective
from curvkit.operators.graph import GradientGraph, refuse_reentrant
from curvkit.operators.moving import Moving
from curvkit.operators.slopes import estimated
from curvkit.operators.support import LOW_PRECISION
from curvkit.operators.suspects import Suspect, padding_rows, suspects
from curvkit.operators.verdict import IN_DOUBLE, IN_SINGLE, Limits, Preflight, Verdict

TINY = torch.finfo(torch.float64).tiny

ROWS = 2
"""Examples that are looked at: few, so that few kinks lie near the point."""
PLATEAU = 0.25
"""Mismatches at three neighbouring steps that vary by at most this share of the largest are the same number: H v is something else."""
FLOOR = 1e-3
"""Parameters whose part of H v is smaller than this share of it are judged relative to that share."""


def preflight(objective: Objective) -> Preflight:
    """Compare Hessian products with themselves, with their transposes and with differences of gradients, on two rows.

        repeat      ||H v - H v||
        symmetry    |u'(H v) - v'(H u)|
        difference  || (g(theta + h v) - g(theta - h v)) / 2h - H v ||,   h = 1e-3 ... 1e-9 times 1 + ||theta||, the best one counting

    In float64 on a copy of the model, where it runs in it. A right product agrees at some step: at large ones the difference feels third
    derivatives and kinks, at small ones rounding. A mismatch that is the same at three steps is that of a wrong derivative, whatever its
    size. One that has neither is "not checked".

    Args:
        objective: The function; two rows of its first batch are taken, or the whole batch if the model does not run on two.

    Returns:
        The verdict with its evidence. Nothing is raised for wrong derivatives: see `refuse_wrong`.

    Raises:
        CurvkitError: If the loss cannot be evaluated at all.

    Cost: three products and up to 14 gradients of two rows, two forward passes, and a copy of the parameters in float64.
    Accuracy: silent errors of torch 2.13 (once_differentiable, detached saves) are off by 1e-2 to 1 at every step; right derivatives of all
        modules of torch.nn by at most 1e-5 at one. In float32 only 1e-2 is asked for. See docs/preflight.md.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> preflight(Objective(torch.nn.Linear(3, 2), cross_entropy, data)).verdict
        'right'
    """
    few = _few_rows(objective.raised())
    probe = _in_float64(few)
    n, dtype, device = probe.parameters.n, probe.dtype, probe.device
    u, v = (seeds.normal(n, 0, "preflight", index, dtype=dtype, device=device) for index in range(2))
    with _explained():
        fixed, lowered = padding_rows(probe), _lowered(few, probe)
    for w in (u, v):
        _hold(probe, w, fixed)
        w /= norm(w)
    Hu, Hv, again = _products(probe, (u, v, v))
    size = max(norm(Hu), norm(Hv))
    moving, mismatches, disagreeing, reason = None, dict[float, float](), (), ""
    try:
        moving = Moving(probe)
        mismatches, disagreeing = _mismatches(moving, v, Hv)
    except CurvkitError as error:  # of the copy whose parameters are moved; the model itself has just been run
        reason = str(error)
    if size == 0.0:  # a loss that is linear in the parameters, unless the differences say otherwise
        repeatability = asymmetry = 0.0
    else:
        repeatability, asymmetry = norm(Hv - again) / size, abs(dot(u, Hv) - dot(v, Hu)) / size
    limits = _limits(probe)
    agrees = min(mismatches.values(), default=math.inf) <= limits.agrees
    consistent = repeatability <= limits.repeated and asymmetry <= limits.asymmetric
    wrong = bool(lowered) or not consistent or (not agrees and _plateau([*mismatches.values()], limits.agrees))
    verdict: Verdict = "wrong" if wrong else "right" if agrees else "not checked"
    return Preflight(
        verdict,
        repeatability,
        asymmetry,
        mismatches,
        str(dtype).removeprefix("torch."),
        suspects=lowered or (() if verdict == "right" else suspects(probe)),
        disagreeing=() if verdict == "right" else disagreeing,
        estimated=estimated(moving, v) if verdict == "wrong" and moving is not None else (),
        reason=reason,
        fixed=fixed,
        lowered=bool(lowered),
    )


def refuse_wrong(found: Preflight) -> None:
    """Refuse derivatives that are wrong.

    Args:
        found: Result of `preflight`.

    Raises:
        UnsupportedModel: If the verdict is "wrong", naming module and remedy.
    """
    if found.verdict == "wrong":
        raise UnsupportedModel(
            f"preflight: {found}. Nothing was measured. If you know better, leave the preflight out (preflight=False, --no-preflight)."
        )


def _few_rows(objective: Objective) -> Objective:
    """The objective on two rows of its first batch, or on that batch if its loss has no curvature or no value there."""
    whole = objective.with_batches(objective.batches[:1])
    size = rows(whole.batches[0])
    if size is None or size <= ROWS:
        return whole
    few = objective.with_batches([take_rows(whole.batches[0], torch.arange(ROWS, device=objective.device))])
    try:
        with few.measuring():
            terms = few.terms(0)
        return few if terms.weight > 0.0 and terms.total.requires_grad and bool(torch.isfinite(terms.total)) else whole
    except Exception:
        return whole  # the model's own message, if it is no matter of rows, comes when the whole batch is run


def _hold(probe: Objective, v: Tensor, fixed: tuple[tuple[str, int], ...]) -> None:
    """Set the direction of rows that count as fixed to zero: the loss would feel them, the gradient does not show them."""
    pieces = dict(zip(probe.parameters.names, probe.parameters.split(v), strict=True))
    for name, row in fixed:
        pieces[name][row] = 0.0


def _in_float64(objective: Objective) -> Objective:
    """A copy in float64, or the objective itself if it does not run in that."""
    try:
        double = objective.converted(dtype=torch.float64)
        with double.measuring():
            double.terms(0)
    except (CurvkitError, RuntimeError, TypeError):
        return objective
    return double


def _lowered(few: Objective, probe: Objective) -> tuple[Suspect, ...]:
    """What is in half precision where the model is in float32, but not in the probes: autocast leaves float64 as it is."""
    if probe is few:
        return ()
    found = [suspect for suspect in suspects(few) if suspect.construct.name == LOW_PRECISION]
    if not found or any(suspect.construct.name == LOW_PRECISION for suspect in suspects(probe)):
        return ()
    return tuple(found)


def _products(probe: Objective, vectors: tuple[Tensor, ...]) -> list[Tensor]:
    """H v for each vector, all from one graph."""
    made = []
    with probe.measuring(), _explained():
        graph = GradientGraph.build(probe, 0)
        for v in vectors:
            pieces = GradientGraph.product([graph], list(probe.parameters.split(v)), keep=True)
            made.append(probe.parameters.join(_filled(pieces, probe)))
    return made


@contextlib.contextmanager
def _explained() -> Generator[None]:
    """Say what can be done about an operation without a derivative; errors of the user's own lines stay as they are."""
    try:
        yield
    except CurvkitError:
        raise
    except RuntimeError as error:
        modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not isinstance(error, NotImplementedError) and "torch.autograd.graph" not in modules:
            raise  # not in a backward pass
        refuse_reentrant("preflight", error)
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"preflight: the model or its loss cannot be differentiated twice ({reason}). Replace that operation, or measure by "
            "differences of gradients (rule='difference', --rule difference) if the model is smooth."
        ) from error


def _filled(pieces: list[Tensor | None], probe: Objective) -> list[Tensor]:
    return [torch.zeros_like(p) if piece is None else piece for piece, p in zip(pieces, probe.tensors, strict=True)]


def _mismatches(moving: Moving, v: Tensor, Hv: Tensor) -> tuple[dict[float, float], tuple[str, ...]]:
    """The difference quotient at each step against H v, until one agrees; and the parameters that disagree at the best one."""
    probe, found = moving.objective, dict[float, float]()
    limits, disagreeing = _limits(probe), ()
    for step in limits.steps:
        shares = _shares(probe, moving.quotient(probe.batches[0], v, step * moving.scale), Hv)
        best = min(found.values(), default=math.inf)
        found[step] = max(shares.values(), default=0.0)
        if found[step] < best:
            off = {name: share for name, share in shares.items() if share > limits.agrees}
            disagreeing = tuple(sorted(off, key=off.__getitem__, reverse=True))
        if found[step] <= limits.agrees:
            break
    return found, disagreeing


def _limits(probe: Objective) -> Limits:
    return IN_DOUBLE if probe.dtype == torch.float64 else IN_SINGLE


def _shares(probe: Objective, quotient: Tensor, Hv: Tensor) -> dict[str, float]:
    """The difference of each parameter relative to H v, so that one wrong layer shows in a large model."""
    # not relative to the quotient: where that is large because of kinks, the ratio would come out as 1 at every step
    size = norm(Hv) or norm(quotient)
    pairs = zip(probe.parameters.names, probe.parameters.split(quotient), probe.parameters.split(Hv), strict=True)
    return {name: norm((q - h).flatten()) / max(norm(h.flatten()), FLOOR * size, TINY) for name, q, h in pairs}


def _plateau(mismatches: list[float], agrees: float) -> bool:
    """Whether three neighbouring steps give the same mismatch, above what counts as agreement."""
    triples = zip(mismatches, mismatches[1:], mismatches[2:], strict=False)
    return any(min(three) > agrees and max(three) - min(three) <= PLATEAU * max(three) for three in triples)
