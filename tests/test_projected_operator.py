"""Curvature within projections against dense matrices: products, spectra and traces, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES
from oracles import normal, relative
from projections import HandMask, orthonormal, pairs_of, space_of
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.estimators import Exact
from curvkit.linalg import LinearMap, lanczos, trace
from curvkit.operators import GGN, CurvatureOperator, DifferenceHessian, Hessian
from curvkit.projection.intersection import Intersection
from curvkit.projection.projected_operator import Projected
from curvkit.projection.protocol import Projection
from curvkit.projection.sharp_complement import SharpComplement
from curvkit.testing import check_operator

EXACT = 1e-12
"""float64 rounding, 2.2e-16, over sums of some tens of terms."""


def whole(A: LinearMap) -> Tensor:
    return A.matmat(torch.eye(A.n, dtype=A.dtype))


def kept_by(A: CurvatureOperator) -> Tensor:
    return normal(A.n, seed=9) < 0.2


def mask(A: CurvatureOperator) -> tuple[Projection, Projection, Tensor]:
    """P, I - P, and P dense."""
    keep = kept_by(A)
    return HandMask(A.space, keep), HandMask(A.space, ~keep), torch.diag(keep.double())


def complement(A: CurvatureOperator) -> tuple[Projection, Projection, Tensor]:
    V = orthonormal(A.n, 4)
    flat = SharpComplement(pairs_of(V, A.space))
    return flat, flat.sharp, torch.eye(A.n, dtype=torch.float64) - V @ V.T


BOTH = pytest.mark.parametrize("made", [mask, complement])


@BOTH
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_are_those_of_the_dense_matrix(kind: Callable[..., Any], made: Callable[..., Any]):
    A = kind(CASES["mlp"]().objective())
    flat, _, P = made(A)
    B, V, truth = Projected(A, flat), normal(A.n, 3), P @ whole(A) @ P
    assert isinstance(B, CurvatureOperator)
    assert B.space is A.space
    assert B.projection is flat
    assert relative(B.matmat(V), truth @ V) <= EXACT
    assert relative(B.matvec(V[:, 0]), truth @ V[:, 0]) <= EXACT
    assert not B.matvec(V[:, 0]).requires_grad
    check_operator(B, objective=A.objective)


@BOTH
def test_shares_add_up_to_the_whole_trace(made: Callable[..., Any]):
    """Law, and dense: tr(P A P) = tr(A P) from the entries of A."""
    A = Hessian(CASES["mlp"]().objective())
    flat, sharp, P = made(A)
    dense = whole(A)
    parts = [trace.estimate(Projected(A, it), method="exact", seed=0).value for it in (flat, sharp)]
    size = dense.diagonal().abs().sum().item()
    assert parts[0] == pytest.approx((dense @ P).trace().item(), abs=EXACT * size)
    assert sum(parts) == pytest.approx(dense.trace().item(), abs=EXACT * size)
    assert abs(parts[0] - parts[1]) > 1e-2 * size  # they are two numbers, not twice the same


def test_the_trace_within_a_mask_is_the_sum_of_the_diagonal_over_it():
    """Another way to the diagonal: that of the `Exact` estimator; off the mask rows and columns are zero, exactly."""
    objective = CASES["mlp"]().objective()
    A, keep = Hessian(objective), kept_by(Hessian(objective))
    B = whole(Projected(A, HandMask(A.space, keep)))
    diagonal = A.space.flatten(Exact().estimate(objective).values)
    assert B.trace().item() == pytest.approx(diagonal[keep].sum().item(), rel=1e-10)
    assert not B[~keep].any()
    assert not B[:, ~keep].any()
    assert torch.equal(B[keep][:, keep], whole(A)[keep][:, keep])


@pytest.mark.slow
def test_sampled_shares_cover_the_exact_ones():
    """Statistics: the interval of 95 % around the trace within the mask covers that of the dense matrix for nearly all of 10 seeds."""
    A = GGN(CASES["mlp"]().objective())
    flat, _, P = mask(A)
    truth, covered = (whole(A) @ P).trace().item(), 0
    for seed in range(10):
        found = trace.estimate(Projected(A, flat), method="hutchinson", tolerance=0.2, seed=seed)
        covered += abs(found.value - truth) <= found.half_width
    assert covered >= 7  # fewer of 10 at 95 % each: probability 1e-3


@BOTH
def test_lanczos_finds_the_spectrum_of_the_dense_block(made: Callable[..., Any]):
    A = Hessian(CASES["mlp"]().objective())
    flat, _, P = made(A)
    top = torch.linalg.eigvalsh(P @ whole(A) @ P)
    top = top[top.abs().argsort(descending=True)[:3]].sort(descending=True).values
    pairs = lanczos.eigenpairs(Projected(A, flat), 3, which="magnitude", tolerance=1e-8, seed=0)
    assert torch.allclose(pairs.values, top, rtol=1e-8, atol=0.0)
    assert pairs.vectors is not None
    assert (
        relative(P @ pairs.vectors, pairs.vectors) <= 1e-6
    )  # within what P keeps, to the residual over the eigenvalue


def test_the_complement_of_the_eigenspace_within_a_mask_commutes_with_it():
    """And takes the top eigenvalue out of the block: what is left at the top is its second."""
    A = GGN(CASES["mlp"]().objective())
    flat, _, P = mask(A)
    pairs = lanczos.eigenpairs(Projected(A, flat), 1, tolerance=1e-12, seed=0)
    assert pairs.vectors is not None
    rest = SharpComplement(pairs_of(pairs.vectors, A.space))
    both = Intersection(flat, rest, like=A.space.unflatten(torch.zeros(A.n).double()))
    second = torch.linalg.eigvalsh(P @ whole(A) @ P)[-2].item()
    assert torch.linalg.eigvalsh(whole(Projected(A, both)))[-1].item() == pytest.approx(second, rel=1e-8)


# ---- the error of products ------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_whole_matrix():
    """In float32, beside an eigenvalue of 1e3 the others of 1e-2: what products are off by is held against the closed form, 1e-2 P v."""
    V = orthonormal(40, 40)
    spectrum = torch.cat([torch.tensor([1e3]), torch.full((39,), 1e-2)]).double()
    A = Dense((V @ torch.diag(spectrum) @ V.T).float())
    pairs = pairs_of(V[:, :1], A.space)
    known, v = Projected(A, SharpComplement(replace(pairs, scale=1e3))), normal(40, seed=2).float()
    truth = 1e-2 * (v.double() - V[:, :1] @ (V[:, :1].T @ v.double()))
    error = relative(known.matvec(v).double(), truth)
    assert 1e-4 < error <= known.product_error < 1.0
    check_operator(known)
    given = Projected(A, SharpComplement(replace(pairs, scale=0.0)), scale=1e3)
    given.matvec(v)
    assert given.product_error == pytest.approx(8 * 2**-23 * 1e3 / (given.matvec(v).norm() / v.norm()).item())
    keep = HandMask(A.space, torch.ones(40).bool())
    joined = Intersection(keep, known.projection, like=A.space.unflatten(v))
    both = Projected(A, joined)
    both.matvec(v)
    assert both.product_error == pytest.approx(known.product_error, rel=0.01)
    unknown = Projected(A, SharpComplement(replace(pairs, scale=0.0)))
    assert unknown.product_error == 8 * 2**-23  # nothing was seen yet
    with pytest.raises(
        InvalidArgument, match="check_operator"
    ):  # the rounding of 1e3 is not that of a matrix of size 1e-2
        check_operator(unknown)


class Dense:
    """A matrix with names."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.space = matrix, space_of(a=(4, len(matrix) // 4))
        self.n, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V


def test_the_error_of_products_by_differences_is_passed_on():
    A = DifferenceHessian(CASES["mlp"]().objective())
    flat, _, _ = mask(A)
    B = Projected(A, flat)
    v = normal(A.n)
    B.matvec(v)
    keep = kept_by(A)
    product = A.matvec(torch.where(keep, v, 0.0))
    ratio = (product.norm() / product[keep].norm()).item()
    assert A.product_error > 8 * 2**-52
    assert B.product_error == pytest.approx(A.product_error * ratio)
    assert ratio > 1.0


def test_nothing_kept_is_zero_exactly():
    A = Hessian(CASES["mlp"]().objective())
    B = Projected(A, HandMask(A.space, torch.zeros(A.n).bool()))
    assert not B.matvec(normal(A.n)).any()
    assert B.product_error == 8 * 2**-52
    check_operator(B, objective=A.objective)


def test_no_column_gives_no_column():
    A = Hessian(CASES["mlp"]().objective())
    assert Projected(A, mask(A)[0]).matmat(torch.zeros(A.n, 0, dtype=torch.float64)).shape == (A.n, 0)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_no_operator_or_no_projection_is_refused():
    A = Hessian(CASES["mlp"]().objective())
    with pytest.raises(InvalidArgument, match="Projected: operator=Tensor is not a curvature operator"):
        Projected(torch.eye(2), mask(A)[0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgument, match="Projected: projection=Tensor cannot be called; it must map an update"):
        Projected(A, torch.ones(2))  # pyright: ignore[reportArgumentType]
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidArgument, match=f"Projected: scale={scale} must be finite and not negative"):
            Projected(A, mask(A)[0], scale=scale)


first = next(iter(CASES["mlp"]().objective().parameters.names))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda u: {**u, first: 0.5 * u[first]}, "projecting twice is not projecting once: they differ by"),
        (
            lambda u: {**u, first: u[first][:1].expand_as(u[first])},
            "the projection is not symmetric: u'Pu and ||Pu||^2 differ by",
        ),
        (lambda u: {name: p for name, p in u.items() if name != first}, f"{first!r} is missing. Pass one"),
        (lambda u: {**u, "new": u[first]}, "'new' was not in the update. Pass one"),
        (lambda u: {**u, first: u[first].float()}, f"{first!r} is of shape (6, 4), torch.float32 on cpu and was of"),
        (
            lambda u: {**u, first: u[first].reshape(-1)},
            f"{first!r} is of shape (24,), torch.float64 on cpu and was of (6, 4)",
        ),
    ],
)
def test_what_projects_not_is_refused(wrong: Any, said: str):
    A = Hessian(CASES["mlp"]().objective())
    with pytest.raises(InvalidArgument, match="^Projected: .*" + re.escape(said)):
        Projected(A, wrong)


def test_vectors_that_do_not_fit_are_refused():
    A = Hessian(CASES["mlp"]().objective())
    B = Projected(A, mask(A)[0])
    said = re.escape(f"matvec takes [{A.n}], matmat [{A.n}, k], torch.float64 on cpu. Convert it")
    for wrong in (torch.zeros(A.n), torch.zeros(A.n + 1).double(), torch.zeros(A.n, 1).double()):
        with pytest.raises(InvalidArgument, match=said):
            B.matvec(wrong)
    with pytest.raises(InvalidArgument, match=said):
        B.matmat(torch.zeros(A.n).double())
