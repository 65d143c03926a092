"""The trace of a symmetric matrix from its products, with an interval that holds where sampling stops.

`search` runs one of the methods and adds the stopping rule; `estimate` is its last word. Each method is an iterator without an end
in a file of its own: `hutchinson`, `deflation`, `hutchpp`, `xtrace`; the rule is in `stopping` and `student`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg import deflation, hutchinson, hutchpp, student, xtrace
from curvkit.linalg.certificate import AS_COMPUTED, OtherArithmetic
from curvkit.linalg.hutchinson import Draws, Samples, probe, refuse_not_finite
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.recorded import clock_of, derived
from curvkit.linalg.stopping import Told, stated, stopped
from curvkit.linalg.trace_check import PROBES, Witness
from curvkit.linalg.trace_settings import ELSEWHERE, LEFT_OUT, RANK, Method, Settings
from curvkit.results.trace_estimate import TraceEstimate, TraceParts

__all__ = ["Method", "Settings", "estimate", "refuse_unfit", "search"]

SMALL = 2 * student.LEAST
"""Up to this order n products are never many more than probes would take."""
CHUNK = 16
"""Basis vectors that are multiplied together."""
WORTH = 90
"""From so many predicted probes on a subspace is worth its products; the first 30 probes count after it, too."""
FEW = 120
"""Up to this order all basis vectors are preferred to a subspace."""
MOST = 10**9
"""More probes than this are not told apart."""


def search(
    A: LinearMap,
    settings: Settings | None = None,
    *,
    lengths: Sequence[int] | None = None,
    seed: int | None = None,
    start: Tensor | None = None,
    other: OtherArithmetic = AS_COMPUTED,
) -> Iterator[TraceEstimate]:
    """Estimate tr A until its interval is narrow enough.

    The interval and the rule by which sampling ends are those of `stopping.stopped`.

    The products of three probes are held against one another and against `other`: `check` says how far they are from those of a symmetric
    matrix, and what their rounding does to the trace. The methods "exact", "hutch++" and "xtrace" make these products for that alone,
    beside their budget.

    Args:
        A: Symmetric, of order n.
        settings: What is wanted; None takes the defaults.
        lengths: Coordinates of consecutive parts whose shares are wanted, n in all; None: one part.
        seed: Of every draw; None draws one.
        start: [n], a direction rich in eigenvectors of large eigenvalues, for the subspace of "deflated"; it must not depend on the probes.
        other: The same matrix by other arithmetic, to see rounding.

    Yields:
        Partial results, and last the one at which the rule or the budget stopped.

    Raises:
        InvalidArgument: If settings, lengths or start do not fit the matrix.
        CurvkitError: If a product has NaN or infinite entries.
    """
    clock = clock_of(A)
    settings, began = settings or Settings(), clock()
    lengths = (A.n,) if lengths is None else tuple(lengths)
    _check_parts(A, lengths, start)
    refuse_unfit(settings, A.n)
    watched, seed = Witness(A), seeds.settle(seed)
    apart = settings.method in ("exact", "hutch++", "xtrace") or _all_at_once(settings, A.n)
    for index in range(PROBES if apart else 0):
        refuse_not_finite(watched.matvec(probe(A, seed, index)).double().sum(), f"with probe {index + 1}")
    if apart:  # now, before products with basis vectors, whose errors may be large relative to them
        watched.look(other, beside=PROBES)
    if settings.max_seconds is not None:
        settings = replace(settings, max_seconds=max(settings.max_seconds - (clock() - began), 1e-9))
    yield from stopped(_told(watched, settings, lengths, seed, start), settings, watched, other, clock)


def estimate(A: LinearMap, *, seed: int | None = None, **options: Any) -> TraceEstimate:
    """Estimate tr A: the last result of `search`.

    Args:
        A: Symmetric, of order n.
        seed: Of every draw; None draws one.
        **options: Fields of `Settings`.

    Returns:
        The estimate; `converged` says whether its interval is as narrow as was asked for.

    Raises:
        InvalidArgument: If an option is out of range.
        CurvkitError: If a product has NaN or infinite entries.

    Cost: the products that it says.
    Accuracy: [low, high] holds the trace with probability 0.95, about; measured in docs/concepts/trace.md.

    Example:
        >>> from curvkit.linalg import FunctionMap
        >>> d = torch.arange(1.0, 101.0)
        >>> found = estimate(FunctionMap(100, lambda v: d * v), seed=0, method="hutchinson")
        >>> found.value, found.converged, found.probes   # a diagonal matrix: no two probes differ
        (5050.0, True, 30)
    """
    *_, last = search(A, Settings(**options), seed=seed)
    return last


def _told(A: Witness, settings: Settings, lengths: tuple[int, ...], seed: int, start: Tensor | None) -> Iterator[Told]:
    """Run the method that was asked for, or choose."""
    method = settings.method
    if method == "auto":
        yield from _auto(A, settings, lengths, seed, start)
        return
    if method == "exact":
        steps = _exact(A, lengths)
    elif method == "hutchinson":
        most, size = settings.max_products, settings.block_size
        steps = hutchinson.steps(A, lengths=lengths, seed=seed, block_size=size, most=most)
    elif method == "deflated":
        rank = settings.affordable_rank(A.n, per_dimension=1)
        samples, first = Samples(lengths), min(PROBES, settings.max_products - rank)  # before the subspace takes memory
        for draws in hutchinson.steps(A, lengths=lengths, seed=seed, drawn=samples, most=first):
            yield draws, method, "as asked"
        steps = deflation.resumed(A, samples, rank=rank, seed=seed, start=start)
    elif method == "hutch++":
        steps = hutchpp.steps(A, rank=settings.affordable_rank(A.n, per_dimension=2), lengths=lengths, seed=seed)
    else:
        steps = xtrace.steps(A, seed=seed)
    for draws in steps:
        yield draws, method, "as asked"


def _auto(A: Witness, settings: Settings, lengths: tuple[int, ...], seed: int, start: Tensor | None) -> Iterator[Told]:
    """Choose by cost: all basis vectors, probes alone, or probes after a subspace that makes use of the first probes."""
    if _all_at_once(settings, A.n):
        for draws in _exact(A, lengths):
            yield draws, "exact", f"{A.n} products give every diagonal entry"
        return
    samples, pilot = Samples(lengths), min(student.LEAST, settings.max_products)
    draws = samples.draws(products=0, step=1)
    while samples.size < pilot:
        size = min(settings.block_size, pilot - samples.size)
        for row in hutchinson.sampled(A, samples.size, lengths=lengths, seed=seed, block_size=size):
            samples.append(row)
        draws = samples.draws(products=samples.size, step=1)
        yield draws, "hutchinson", f"the first {pilot} probes, which show what is needed"
    needed = _needed(draws, settings, A)
    rank = settings.affordable_rank(A.n, per_dimension=1, asked=max(RANK // 2, min(2 * RANK, needed // 5)))
    deflated = needed >= WORTH and A.n > FEW and 0 < rank < settings.max_products - pilot
    predicted = f"{needed:,} probes were predicted" if needed < MOST else "no number of probes was predicted to suffice"
    if deflated:
        steps, method = deflation.resumed(A, samples, rank=rank, seed=seed, start=start), "deflated"
        predicted += " without a subspace"
    else:
        steps, method = (
            hutchinson.steps(
                A,
                lengths=lengths,
                seed=seed,
                block_size=settings.block_size,
                drawn=samples,
                most=settings.max_products,
            ),
            "hutchinson",
        )
        predicted += "" if needed >= WORTH else ", too few for a subspace to pay"
    before, looking = 0, not deflated
    while True:
        if looking and student.is_due(draws.probes, before):  # every diagonal entry, if that has become the cheaper way
            more = _needed(draws, settings, A) - draws.probes
            if A.n <= min(more, settings.max_products - draws.products):
                break
        before = draws.probes if looking else 0
        draws = next(steps)
        looking = looking or draws.rank > 0
        yield draws, method if draws.rank or not deflated else "hutchinson", predicted
    ahead = (
        f"{more:,} more probes were predicted"
        if draws.probes + more < MOST
        else "no number of probes was predicted to suffice"
    )
    reason = f"{ahead}, {A.n:,} products give every diagonal entry"
    for found in _exact(A, lengths):
        kept = found if found.exact else draws
        products = draws.products + found.products
        yield replace(kept, products=products, step=found.step), "exact" if found.exact else method, reason


def _needed(draws: Draws, settings: Settings, A: Witness) -> int:
    """Predict the probes that the tolerance takes, or the rounding where that is more; `MOST` where nothing is known of it."""
    if draws.probes < 2:
        return MOST
    found = stated(draws, settings, "", "", A)
    rounding = found.rounding or 0.0
    room = found.allowed - rounding
    return student.probes_needed(draws.stderr * draws.probes**0.5, room if room > 0.0 else rounding)


def _all_at_once(settings: Settings, n: int) -> bool:
    """Whether "auto" takes all basis vectors from the start."""
    return settings.method == "auto" and n <= min(SMALL, settings.max_products)


def _exact(A: LinearMap, lengths: Sequence[int]) -> Iterator[Draws]:
    """Read every diagonal entry, from products with all basis vectors; the last state alone has a value."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    known = torch.zeros(len(lengths), dtype=torch.float64)
    for begin in range(0, A.n, CHUNK):
        size = min(CHUNK, A.n - begin)
        entries = derived(A, "diagonal", [torch.tensor([begin, size])], partial(_diagonal, A, begin, size), (size,))
        known.index_add_(0, owner[begin : begin + size], entries)
        done, step = begin + size, min(CHUNK, A.n - begin - size)
        if step:
            yield Draws(float("nan"), float("nan"), 0, done, step)
    none = torch.zeros(0, len(lengths), dtype=torch.float64)
    yield Draws(known.sum().item(), 0.0, 0, A.n, 0, A.n, parts=TraceParts(tuple(lengths), known, none), exact=True)


def _diagonal(A: LinearMap, begin: int, size: int) -> Tensor:
    """Some consecutive diagonal entries, [size] float64."""
    E = torch.zeros(A.n, size, dtype=A.dtype, device=A.device)
    E[begin : begin + size].fill_diagonal_(1.0)
    Y = A.matmat(E)
    refuse_not_finite(Y.double().sum(), f"with one of basis vectors {begin + 1} to {begin + size}")
    return Y[begin : begin + size].diagonal().double().cpu()


def _check_parts(A: LinearMap, lengths: tuple[int, ...], start: Tensor | None) -> None:
    if sum(lengths) != A.n or min(lengths, default=-1) < 0:
        raise InvalidArgument(
            f"trace: the parts have {sum(lengths)} coordinates, the matrix has order {A.n}. Pass lengths that add up to {A.n}."
        )
    if start is not None and start.shape != (A.n,):
        raise InvalidArgument(
            f"trace: start has shape {tuple(start.shape)}, the matrix has order {A.n}. Pass a vector [{A.n}]."
        )


def refuse_unfit(settings: Settings, n: int) -> None:
    """Refuse a method that budget or memory do not suffice for.

    Args:
        settings: What is wanted.
        n: Order of the matrix.

    Raises:
        InvalidArgument: With what would fit.
    """
    if settings.method in ELSEWHERE:
        raise InvalidArgument(
            f"trace: method={settings.method!r} samples the examples of a loss, and a matrix has none. Use curvkit.measures.trace, or one "
            "of the other methods here: 'auto' if in doubt."
        )
    if settings.method == "exact" and settings.max_products < n:
        raise InvalidArgument(
            f"trace: method='exact' takes {n} products, max_products={settings.max_products} allows fewer. Allow {n}, or use 'auto'."
        )
    per_dimension = {"deflated": 1, "hutch++": 2}.get(settings.method, 0)
    if not per_dimension or settings.affordable_rank(n, per_dimension=per_dimension):
        return
    most = settings.largest_rank(n, per_dimension=per_dimension)
    asked = "a subspace" if settings.rank is None else f"rank={settings.rank}"
    each = "r" if per_dimension == 1 else f"{per_dimension} r"
    few = settings.max_rows is not None and settings.max_rows - LEFT_OUT < n - 1
    held = f", {settings.max_rows} vectors in memory" if few else ""
    advice = f"Ask for {most} at most" if most else "Allow more"
    raise InvalidArgument(
        f"trace: method={settings.method!r} with {asked} does not fit: order {n}, max_products={settings.max_products}{held}. A subspace "
        f"of rank r takes {each} products and one for a probe, r + {LEFT_OUT} vectors, and r must be below the order. {advice}, or use "
        "'hutchinson'."
    )
