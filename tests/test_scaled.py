"""Scaled operators against dense matrices, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES
from oracles import normal, relative
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg import DenseMap, lanczos
from curvkit.operators import GGN, CurvatureOperator, DifferenceHessian, DoubleHessian, Hessian, Preconditioned, Scaled
from curvkit.testing import check_operator

# float64 rounding, 2.2e-16, over sums of some tens of terms; entries of the diagonals lie within a factor of 100 or are zero.
EXACT = 1e-12


def diagonals(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scale with zeros, and two diagonals of both signs."""
    scale = normal(n, seed=3).abs() + 0.1
    scale[::3] = 0.0
    return scale, normal(n, seed=4), normal(n, seed=5)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_are_those_of_the_dense_matrix(kind: Callable[..., Any]):
    """Dense: s_i (a_ij + [i = j] inner_i) s_j + [i = j] outer_i, entry by entry."""
    A = kind(CASES["mlp"]().objective())
    dense, (s, inner, outer) = A.matmat(torch.eye(A.n, dtype=torch.float64)), diagonals(A.n)
    truth = torch.outer(s, s) * (dense + torch.diag(inner)) + torch.diag(outer)
    B = Scaled(A, s, inner=inner, outer=outer)
    assert isinstance(B, CurvatureOperator)
    assert B.space is A.space
    V = normal(A.n, 3)
    assert relative(B.matmat(V), truth @ V) <= EXACT
    assert relative(B.matvec(V[:, 0]), truth @ V[:, 0]) <= EXACT
    check_operator(B, objective=A.objective)


@pytest.mark.parametrize("given", [(), ("inner",), ("outer",)])
def test_a_diagonal_that_is_left_out_is_zero(given: tuple[str, ...]):
    A = Hessian(CASES["mlp"]().objective())
    s, inner, outer = diagonals(A.n)
    some = {name: diagonal for name, diagonal in (("inner", inner), ("outer", outer)) if name in given}
    all_of_them = {"inner": torch.zeros_like(s), "outer": torch.zeros_like(s), **some}
    V = normal(A.n, 2)
    assert relative(Scaled(A, s, **some).matmat(V), Scaled(A, s, **all_of_them).matmat(V)) <= EXACT


def test_a_zero_scale_takes_the_coordinate_out():
    """Law: rows and columns of S A S are zero there, exactly, and the rest is the submatrix of A."""
    A = Hessian(CASES["mlp"]().objective())
    keep = torch.ones(A.n, dtype=torch.float64)
    keep[1], keep[5] = 0.0, 0.0
    B = Scaled(A, keep).matmat(torch.eye(A.n, dtype=torch.float64))
    assert not B[[1, 5]].any()
    assert not B[:, [1, 5]].any()
    rest = keep.nonzero().flatten()
    assert torch.equal(B[rest][:, rest], A.matmat(torch.eye(A.n, dtype=torch.float64))[rest][:, rest])


def test_eigenvalues_are_those_of_the_matrix_that_the_optimizer_sees():
    """Dense `eigvals` of S^2 (A + I) + O, which is not symmetric: with commuting diagonals S^-1 B S is it."""
    A = Hessian(CASES["mlp"]().objective())
    s, inner, outer = diagonals(A.n)
    s = s + 0.2
    dense = A.matmat(torch.eye(A.n, dtype=torch.float64))
    seen = s[:, None] ** 2 * (dense + torch.diag(inner)) + torch.diag(outer)
    top = torch.linalg.eigvals(seen).real.sort(descending=True).values[:3]
    pairs = lanczos.eigenpairs(Scaled(A, s, inner=inner, outer=outer), 3, tolerance=1e-8, seed=0)
    assert torch.allclose(pairs.values, top, rtol=1e-8, atol=0.0)


def test_it_is_a_preconditioned_operator_where_that_is_all():
    A, v = Hessian(CASES["mlp"]().objective()), normal(CASES["mlp"]().objective().parameters.n)
    assert isinstance(Preconditioned(A, torch.full_like(v, 4.0)), Scaled)
    assert torch.equal(
        Preconditioned(A, torch.full_like(v, 4.0)).matvec(v), Scaled(A, torch.full_like(v, 0.5)).matvec(v)
    )


def test_the_diagonals_are_copied():
    A = Hessian(CASES["mlp"]().objective())
    given, v = [diagonal.requires_grad_() for diagonal in diagonals(A.n)], normal(A.n)
    B = Scaled(A, given[0], inner=given[1], outer=given[2])
    before = B.matvec(v)
    with torch.no_grad():
        for diagonal in given:
            diagonal.add_(2.0)
    assert torch.equal(B.matvec(v), before)
    assert not before.requires_grad


def test_the_error_of_products_is_passed_on_as_it_is_now():
    A = DifferenceHessian(CASES["mlp"]().objective())
    B = Scaled(A, torch.ones(A.n, dtype=torch.float64))
    B.matvec(normal(A.n))
    assert B.product_error == A.product_error > 0.0
    assert Scaled(Hessian(CASES["mlp"]().objective()), torch.ones(A.n).double()).product_error == 0.0


def test_the_same_in_float64_scales_the_same_matrix():
    """A float32 operator and its float64 copy, both scaled: they differ by float32's rounding, 1.2e-7 times some tens, and no more."""
    A = Hessian(CASES["mlp"]().objective().converted(dtype=torch.float32))
    s, inner, outer = diagonals(A.n)
    double = Scaled(DoubleHessian(A), s, inner=inner, outer=outer)
    single = Scaled(A, s.float(), inner=inner.float(), outer=outer.float())
    v = normal(A.n, dtype=torch.float32)
    assert 1e-9 < relative(single.matvec(v).double(), double.matvec(v.double())) <= 1e-5


def test_no_column_gives_no_column():
    A = Hessian(CASES["mlp"]().objective())
    s, inner, outer = diagonals(A.n)
    empty = torch.zeros(A.n, 0, dtype=torch.float64)
    assert Scaled(A, s, inner=inner, outer=outer).matmat(empty).shape == (A.n, 0)


# ---- refusals -------------------------------------------------------------------------------------------------------


def entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(d: Tensor) -> Tensor:
        d = d.clone()
        d[2] = value
        return d

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("scale", lambda d: d.tolist(), "scale=list is no tensor; it must be .* Convert it with torch.as_tensor"),
        ("scale", lambda d: d[:-1], r"a scale of shape \(\d+,\), torch.float64 on cpu was given; it must be \[\d+\]"),
        ("inner", lambda d: torch.diag(d), r"an inner diagonal of shape \(\d+, \d+\)"),
        ("outer", lambda d: d.float(), r"an outer diagonal .* torch.float32 on cpu .* Join parameter-shaped pieces"),
        ("scale", lambda d: d.to("meta"), "torch.float64 on meta was given"),
        ("inner", entry(float("nan")), "the inner diagonal has NaN or infinite entries. Check the optimizer state"),
        ("outer", entry(float("inf")), "the outer diagonal has NaN or infinite entries"),
        ("scale", entry(-0.25), r"the smallest entry of scale is -0.25; none may be negative. Pass the square root"),
    ],
)
def test_a_bad_diagonal_is_refused(name: str, change: Callable[[Tensor], Any], said: str):
    A = Hessian(CASES["mlp"]().objective())
    given = dict(zip(("scale", "inner", "outer"), diagonals(A.n), strict=True))
    given[name] = change(given[name])
    with pytest.raises(InvalidArgument, match=f"Scaled: .*{said}"):
        Scaled(A, given["scale"], inner=given["inner"], outer=given["outer"])


def test_what_is_no_curvature_operator_is_refused():
    with pytest.raises(
        InvalidArgument, match=r"Scaled: operator=DenseMap is not a curvature operator: it needs space.*"
    ):
        Scaled(DenseMap(torch.eye(3)), torch.ones(3))  # type: ignore[arg-type]


def test_a_wrong_vector_is_refused():
    A = Hessian(CASES["mlp"]().objective())
    B = Scaled(A, diagonals(A.n)[0])
    said = rf"Scaled: a tensor of shape .* was given; matvec takes \[{A.n}\], matmat \[{A.n}, k\], torch.float64"
    for use, wrong in (
        (B.matvec, torch.zeros(A.n + 1).double()),
        (B.matvec, torch.zeros(A.n)),
        (B.matmat, torch.zeros(A.n).double()),
        (B.matmat, torch.zeros(1, 2).double()),
    ):
        with pytest.raises(InvalidArgument, match=said):
            use(wrong)
