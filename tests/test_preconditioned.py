"""Preconditioned operators against dense matrices, and what they refuse."""

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
from curvkit.operators import GGN, CurvatureOperator, Hessian, Preconditioned
from curvkit.testing import check_operator

# float64 rounding, 2.2e-16, over sums of some tens of terms and the scaling by 1 / sqrt(d), d over a factor of 100.
EXACT = 1e-12


def positive(n: int) -> Tensor:
    return 0.1 + 10.0 * normal(n, seed=3).square()


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_are_those_of_the_scaled_dense_matrix(kind: Callable[..., Any]):
    """Dense: D^-1/2 A D^-1/2 entry by entry, a_ij / sqrt(d_i d_j)."""
    A = kind(CASES["mlp"]().objective())
    dense, d = A.matmat(torch.eye(A.n, dtype=torch.float64)), positive(A.n)
    B = Preconditioned(A, d)
    V = normal(A.n, 3)
    truth = dense / torch.outer(d, d).sqrt()
    assert isinstance(B, CurvatureOperator)
    assert B.space is A.space
    assert relative(B.matmat(V), truth @ V) <= EXACT
    assert relative(B.matvec(V[:, 0]), truth @ V[:, 0]) <= EXACT
    check_operator(B, objective=A.objective)


def test_eigenvalues_are_those_of_the_matrix_that_the_optimizer_sees():
    """Dense `eigvals` of D^-1 A, which is not symmetric; its right eigenvectors are D^-1/2 w."""
    A = Hessian(CASES["mlp"]().objective())
    d = positive(A.n)
    seen = A.matmat(torch.eye(A.n, dtype=torch.float64)) / d[:, None]
    truth = torch.linalg.eigvals(seen)
    assert truth.imag.abs().max() <= 1e-10 * truth.abs().max()
    top = truth.real.sort(descending=True).values[:3]
    pairs = lanczos.eigenpairs(Preconditioned(A, d), 3, tolerance=1e-8, seed=0)
    assert torch.allclose(pairs.values, top, rtol=1e-8, atol=0.0)
    u = d.rsqrt()[:, None] * pairs.vectors
    assert relative(seen @ u, u * pairs.values) <= 1e-7  # the residual, 1e-8, grown by the condition of D^1/2


def test_the_identity_and_a_multiple_of_it():
    """Law: D = c I divides by c; exact for a power of 4."""
    A = Hessian(CASES["mlp"]().objective())
    v, ones = normal(A.n), torch.ones(A.n, dtype=torch.float64)
    assert torch.equal(Preconditioned(A, ones).matvec(v), A.matvec(v))
    assert torch.equal(Preconditioned(A, 4.0 * ones).matvec(v), A.matvec(v) / 4.0)


def test_the_diagonal_is_copied():
    A = Hessian(CASES["mlp"]().objective())
    d, v = positive(A.n).requires_grad_(), normal(A.n)
    B = Preconditioned(A, d)
    before = B.matvec(v)
    with torch.no_grad():
        d.mul_(2.0)
    assert torch.equal(B.matvec(v), before)
    assert not before.requires_grad


def test_no_column_gives_no_column():
    A = Hessian(CASES["mlp"]().objective())
    assert Preconditioned(A, positive(A.n)).matmat(torch.zeros(A.n, 0, dtype=torch.float64)).shape == (A.n, 0)


# ---- refusals -------------------------------------------------------------------------------------------------------


def entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(d: Tensor) -> Tensor:
        d[2] = value
        return d

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[:-1], r"a diagonal of shape \(\d+,\), torch.float64 on cpu was given; it must be \[\d+\]"),
        (lambda d: torch.diag(d), r"a diagonal of shape \(\d+, \d+\)"),
        (lambda d: d.float(), "torch.float32 on cpu was given; .* torch.float64 on cpu. Join parameter-shaped pieces"),
        (lambda d: d.to("meta"), "torch.float64 on meta was given"),
        (entry(float("nan")), "the diagonal has NaN or infinite entries. Check the optimizer state"),
        (entry(float("inf")), "the diagonal has NaN or infinite entries"),
        (entry(0.0), r"the smallest entry of the diagonal is 0; all must be positive. Add the optimizer's eps"),
        (entry(-0.25), "the smallest entry of the diagonal is -0.25; all must be positive"),
    ],
)
def test_a_bad_diagonal_is_refused(change: Callable[[Tensor], Tensor], said: str):
    A = Hessian(CASES["mlp"]().objective())
    with pytest.raises(InvalidArgument, match=f"Preconditioned: .*{said}"):
        Preconditioned(A, change(positive(A.n)))


def test_a_diagonal_whose_root_cannot_be_inverted_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Where the hardware flushes denormal numbers to zero, 1 / sqrt of one is infinite."""
    A = Hessian(CASES["mlp"]().objective())
    monkeypatch.setattr(Tensor, "rsqrt", lambda self: torch.full_like(self, float("inf")))
    with pytest.raises(InvalidArgument, match=r"is too small for 1 / sqrt of it in torch.float64. Add the optimizer's"):
        Preconditioned(A, positive(A.n))


def test_what_is_no_curvature_operator_is_refused():
    with pytest.raises(InvalidArgument, match="operator=DenseMap is not a curvature operator: it needs space.*Hessian"):
        Preconditioned(DenseMap(torch.eye(3)), torch.ones(3))  # type: ignore[arg-type]


def test_a_wrong_vector_is_refused():
    A = Hessian(CASES["mlp"]().objective())
    B = Preconditioned(A, positive(A.n))
    said = (
        rf"Preconditioned: a tensor of shape .* was given; matvec takes \[{A.n}\], matmat \[{A.n}, k\], torch.float64"
    )
    for use, wrong in (
        (B.matvec, torch.zeros(A.n + 1).double()),
        (B.matvec, torch.zeros(A.n)),
        (B.matvec, torch.zeros(A.n, 1).double()),
        (B.matmat, torch.zeros(A.n).double()),
        (B.matmat, torch.zeros(1, 2).double()),
    ):
        with pytest.raises(InvalidArgument, match=said):
            use(wrong)


def test_changed_parameters_are_noticed():
    A = Hessian(CASES["mlp"]().objective())
    B = Preconditioned(A, positive(A.n))
    with torch.no_grad():
        A.objective.model.linear0.weight.add_(1.0)
    with pytest.raises(InvalidArgument, match="Hessian: the parameter 'linear0.weight' has changed since"):
        B.matvec(normal(A.n))
