"""Lanczos seen from outside: what it holds in memory, what it spends, what it claims, and its parts one by one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bits, normal, rotated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import DenseMap, FunctionMap, lanczos
from curvkit.linalg.basis import Basis
from curvkit.linalg.krylov import (
    Capacity,
    RandomVectors,
    append_block,
    extend,
    gram,
    residual_estimates,
    start_block,
    wanted,
)
from curvkit.linalg.lanczos import Settings, search, steps


def diagonal(d: Tensor) -> FunctionMap:
    return FunctionMap(len(d), lambda v: d * v, dtype=d.dtype)


class Counted:
    """A diagonal matrix that counts its products and can spoil them."""

    def __init__(self, d: Tensor, spoil: Callable[[Tensor, int], Tensor] = lambda w, count: w) -> None:
        self.d, self.spoil, self.count = d, spoil, 0

    def map(self) -> FunctionMap:
        return FunctionMap(len(self.d), self.multiply, dtype=self.d.dtype)

    def multiply(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.spoil(self.d * v, self.count)


# ---- memory ---------------------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Counts the storages of at least n numbers that tensors made inside refer to, in vectors of length n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.now, self.peak = n, 0.0, 0.0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.n * tensor.itemsize:
                self._hold(tensor, tensor.untyped_storage().nbytes() / (self.n * tensor.itemsize))
        return out

    def _hold(self, tensor: Tensor, size: float) -> None:
        key = tensor.untyped_storage().data_ptr()
        if not self._holders.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: float) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size


@pytest.mark.parametrize(
    ("num", "block_size", "max_rows"), [(1, 1, 20), (2, 1, 30), (5, 1, 60), (3, 3, 40), (4, 2, 100)]
)
def test_no_more_vectors_are_held_than_allowed(num: int, block_size: int, max_rows: int):
    """Law: every tensor of length n that is alive at once, those of the map included but for its own two."""
    n = 4000
    d = torch.linspace(0, 1, n, dtype=torch.float64) ** 4
    A = FunctionMap(n, lambda v: d * v, dtype=torch.float64)
    with Held(n) as held:
        pairs = lanczos.eigenpairs(
            A, num, block_size=block_size, max_rows=max_rows, max_products=4 * max_rows, tolerance=1e-9, seed=0
        )
    assert pairs.products > max_rows  # so that it has restarted
    assert held.peak <= max_rows + 2 * block_size  # the map's own: d * v for each column, and their stack
    assert held.peak >= 0.5 * max_rows  # and the budget is used


def test_without_a_budget_chunks_are_taken_as_needed():
    """Law: a search of a dozen products holds two dozen vectors, not n of them."""
    d = torch.ones(5000, dtype=torch.float64)
    d[0] = 10.0
    with Held(5000) as held:
        lanczos.eigenpairs(diagonal(d), seed=0)
    assert held.peak <= 24


def test_capacity_in_closed_form():
    """Law: kept < rows <= max_rows, and a budget just below the least is refused with the least that would do."""
    for num in (1, 2, 5):
        for block_size in (1, 3):
            least = None
            for max_rows in range(1, 120):
                try:
                    capacity = Capacity.within(max_rows, n=10_000, num=num, block_size=block_size)
                except InvalidArgument as refused:
                    assert least is None
                    needed = int(str(refused).split("need at least ")[1].split(".")[0])
                    continue
                least = least or max_rows
                assert num + block_size < capacity.rows < max_rows
                assert num <= capacity.kept <= capacity.rows - block_size
            assert least == needed
    assert Capacity.within(None, n=50, num=1, block_size=2).rows == 52


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "block_size"), [(1, 1), (2, 3), (1, 4), (5, 2)])
def test_the_budget_of_products_is_kept_when_certificates_fail(num: int, block_size: int):
    """Law: noise makes certificates fail, which costs products; their number is the map's own count, and never above the budget."""
    d = torch.linspace(0, 1, 300, dtype=torch.float64) ** 8
    draws = torch.Generator().manual_seed(0)

    def noise(w: Tensor, count: int) -> Tensor:
        return w + 0.02 * w.norm() * torch.randn(300, dtype=torch.float64, generator=draws) / math.sqrt(300)

    for max_products in range(num + block_size, 64):
        A = Counted(d, noise)
        pairs = lanczos.eigenpairs(A.map(), num, block_size=block_size, max_products=max_products, seed=0)
        assert pairs.products == A.count <= max_products


def test_fewer_values_than_asked_for_are_not_called_converged():
    """Law: the identity has exact Ritz vectors after every step, but two are not five."""
    pairs = lanczos.eigenpairs(diagonal(torch.ones(100, dtype=torch.float64)), 5, max_products=7, seed=0)
    assert len(pairs.values) == 2
    assert pairs.converged.all()
    assert pairs.asked == 5
    assert not pairs.all_converged


def test_a_certificate_that_is_not_finite_is_refused():
    """Law: also where every product before it was finite."""
    d = torch.linspace(0, 1, 100, dtype=torch.float64)
    whole = Counted(d)
    lanczos.eigenpairs(whole.map(), max_products=12, tolerance=1e-9, seed=0)
    spoilt = Counted(d, lambda w, count: w * float("nan") if count == whole.count else w)
    with pytest.raises(CurvkitError, match=f"product {whole.count} with the matrix has NaN or infinite entries"):
        lanczos.eigenpairs(spoilt.map(), max_products=12, tolerance=1e-9, seed=0)


def test_an_error_of_the_map_is_passed_on():
    def spoil(w: Tensor, count: int) -> Tensor:
        if count == 3:
            raise KeyboardInterrupt
        return w

    states: list[lanczos.Eigenpairs] = []
    with pytest.raises(KeyboardInterrupt):
        states.extend(search(Counted(torch.rand(50), spoil).map(), seed=0))
    assert len(states) == 2  # what was known before is in the hands of the caller
    assert not states[-1].recomputed


# ---- claims ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_claimed_multiplicities_are_true(data: st.DataObject):
    """Closed form: eigenvalues -5, ..., 5 with random multiplicities. What is listed fewer times than `multiplicities_below`, with
    another eigenvalue listed beyond it, has that multiplicity."""
    times = data.draw(st.lists(st.integers(0, 5), min_size=11, max_size=11).filter(lambda t: sum(t) >= 2))
    filler = data.draw(st.sampled_from([0, 60]))
    d = torch.cat([torch.full((count,), float(value)) for value, count in zip(range(-5, 6), times, strict=True)])
    d = torch.cat([d, 0.2 * torch.rand(filler, generator=torch.Generator().manual_seed(1)) - 0.1]).double()
    num = data.draw(st.integers(1, min(8, len(d))))
    block_size = data.draw(st.integers(1, min(6, len(d))))
    pairs = lanczos.eigenpairs(
        diagonal(d), num, block_size=block_size, tolerance=1e-6, seed=data.draw(st.integers(0, 9))
    )
    if not pairs.all_converged:
        return
    listed = pairs.values.round().tolist()
    for value in set(listed[: listed.index(listed[-1])]):  # all but the last one listed
        if listed.count(value) < pairs.multiplicities_below:
            assert int((d - value).abs().lt(0.5).sum()) == listed.count(value)


@pytest.mark.parametrize("block_size", [2, 3])
def test_laplacian_of_a_square_grid(block_size: int):
    """Closed form: 4 sin^2 + 4 sin^2, whose values for (i, j) and (j, i) agree exactly: with blocks every pair is a pair."""
    m = 15
    one = 4 * torch.sin(math.pi * torch.arange(1, m + 1, dtype=torch.float64) / (2 * (m + 1))) ** 2
    truth = (one[:, None] + one[None, :]).reshape(-1).sort(descending=True).values
    line = 2 * torch.eye(m, dtype=torch.float64) - torch.diag(torch.ones(m - 1, dtype=torch.float64), 1)
    line = line - torch.diag(torch.ones(m - 1, dtype=torch.float64), -1)
    eye = torch.eye(m, dtype=torch.float64)
    A = DenseMap(torch.kron(line, eye) + torch.kron(eye, line))
    pairs = lanczos.eigenpairs(A, 6, block_size=block_size, tolerance=1e-9, seed=0)
    assert pairs.all_converged
    # A residual r at a gap g (here > 0.03) errs by r^2 / g = 2e-15, which is below the rounding allowed here.
    assert (pairs.values - truth[:6]).abs().max() <= 100 * torch.finfo(torch.float64).eps * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 17, 32])
def test_all_eigenvalues_of_a_small_matrix(n: int, dtype: torch.dtype):
    """Dense `eigvalsh`: up to n = 32 the whole space is spanned, and k = n gives every eigenvalue; n eps ||A|| of rounding."""
    A = rotated(normal(n, seed=n).to(dtype))
    pairs = lanczos.eigenpairs(DenseMap(A), n, seed=0)
    truth = torch.linalg.eigvalsh(A.double()).flip(0)
    assert (pairs.values - truth).abs().max() <= n * torch.finfo(dtype).eps * truth.abs().max()
    assert pairs.all_converged
    assert (pairs.confidence, pairs.multiplicities_below) == (1.0, n + 1)


def test_more_eigenvalues_than_the_rank():
    """Closed form: three eigenvalues and zeros, of order 200; 100 eps ||A|| of rounding after a dozen new directions."""
    d = torch.zeros(200, dtype=torch.float64)
    d[:3] = torch.tensor([5.0, 3.0, 1.0])
    pairs = lanczos.eigenpairs(DenseMap(rotated(d)), 8, seed=0)
    assert pairs.all_converged
    expected = torch.tensor([5.0, 3.0, 1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    assert (pairs.values - expected).abs().max() <= 100 * torch.finfo(torch.float64).eps * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-60, 60])
def test_scaling_by_a_power_of_two(dtype: torch.dtype, exponent: int):
    """Law: nothing compares with an absolute number, so that 2^e A has 2^e times the result, bit for bit."""
    d = torch.cat([torch.zeros(40), torch.linspace(-1, 1, 60), torch.tensor([2.0, 2.0, 3.0])]).to(dtype)
    one, scaled = (lanczos.eigenpairs(diagonal(factor * d), 3, seed=0) for factor in (1.0, 2.0**exponent))
    assert bits(scaled.vectors) == bits(one.vectors)  # type: ignore[arg-type]
    assert scaled.products == one.products
    assert torch.equal(scaled.values, one.values * 2.0**exponent)
    assert torch.equal(scaled.residuals, one.residuals * 2.0**exponent)
    # the bound takes logarithms, which do not scale exactly: a few eps of numbers up to 100
    assert scaled.upper_bound == pytest.approx(one.upper_bound * 2.0**exponent, rel=1e-9)  # type: ignore[operator]


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_negating_the_matrix(which: Any):
    """Law: the largest of -A are the smallest of A; the other two only change sign."""
    d = normal(200, seed=3)
    mirror = {"largest": "smallest", "smallest": "largest"}.get(which, which)
    one = lanczos.eigenpairs(diagonal(d), 4, which=which, tolerance=1e-10, seed=0)
    other = lanczos.eigenpairs(diagonal(-d), 4, which=mirror, tolerance=1e-10, seed=0)
    assert one.all_converged
    assert torch.allclose(
        one.values, -other.values.flip(0), rtol=1e-12, atol=1e-12
    )  # residuals of 1e-10, squared over gaps of 1e-3


@pytest.mark.parametrize("index", [0, 250, 499])
@pytest.mark.parametrize("block_size", [1, 2])
def test_a_start_that_is_exactly_an_eigenvector(index: int, block_size: int):
    """Closed form: wherever the start lies, the largest eigenvalue is found, by its random part."""
    d = torch.linspace(-1, 1, 500, dtype=torch.float64)
    start = torch.zeros(500, dtype=torch.float64)
    start[index] = 7.0
    pairs = lanczos.eigenpairs(diagonal(d), start=start, block_size=block_size, seed=0)
    assert pairs.all_converged
    assert pairs.values[0] == pytest.approx(1.0, abs=1e-3)


def test_without_a_seed_every_call_differs():
    """Law: two random starts agree with probability 2^-32."""
    A = diagonal(torch.rand(100, generator=torch.Generator().manual_seed(0)))
    assert bits(lanczos.eigenpairs(A).vectors) != bits(lanczos.eigenpairs(A).vectors)  # type: ignore[arg-type]


# ---- the parts ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.integers(1, 14))
def test_wanted_is_sorting(values: list[int], num: int):
    """Another formula."""
    theta = torch.tensor(sorted(values), dtype=torch.float64)
    num_there = min(num, len(values))
    pick = {which: theta[wanted(theta, num, which)].tolist() for which in ("largest", "smallest", "both", "magnitude")}
    down = sorted(values, reverse=True)
    assert pick["largest"] == down[:num_there]
    assert pick["smallest"] == down[len(down) - num_there :]
    high = num_there - num_there // 2
    assert pick["both"] == down[:high] + down[len(down) - num_there // 2 :]
    assert sorted(map(abs, pick["magnitude"]), reverse=True) == sorted(map(abs, values), reverse=True)[:num_there]
    assert pick["magnitude"] == sorted(pick["magnitude"], reverse=True)


@pytest.mark.parametrize("block_size", [1, 3])
def test_estimates_are_the_residuals_in_exact_arithmetic(block_size: int):
    """Dense algebra: ||A y - theta y|| of the Ritz vectors, to the rounding of float64 times the order."""
    d = normal(60, seed=2)
    A = DenseMap(rotated(d))
    for state, _ in zip(steps(A, Settings(num=3, block_size=block_size), seed=0), range(6), strict=False):
        Y = state.vectors()
        true = torch.linalg.vector_norm(A.matmat(Y.T) - Y.T * state.values, dim=0)
        assert (true - state.residuals).abs().max() <= 1e-13  # 60 * 2 eps * ||A||, ||A|| < 4


def test_extending_the_projected_matrix():
    """Law: symmetric, with the old one in the corner; the block of new rows is symmetrised."""
    T = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
    grown = extend(T, torch.tensor([[1.0, 2.0, 5.0, 7.0], [3.0, 4.0, 8.0, 6.0]], dtype=torch.float64))
    expected = [[3.0, 0.0, 1.0, 3.0], [0.0, 2.0, 2.0, 4.0], [1.0, 2.0, 5.0, 7.5], [3.0, 4.0, 7.5, 6.0]]
    assert grown.tolist() == expected


def test_gram_and_residual_estimates():
    """Closed form."""
    left = [torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0])]
    assert gram(left).tolist() == [[9.0, 12.0], [12.0, 17.0]]
    assert gram(left[:1]).tolist() == [[9.0]]
    weights = torch.tensor([[9.0], [1.0], [-1.0]], dtype=torch.float64)
    assert residual_estimates(gram(left), weights).tolist() == pytest.approx([math.sqrt(2.0)])  # |(3,0) - (4,1)|


def test_a_block_that_vanishes_is_replaced_by_random_directions():
    """Law: the basis stays orthonormal and grows, until it spans the space."""
    A = diagonal(torch.ones(6, dtype=torch.float64))
    basis, random = Basis(6, torch.float64, torch.device("cpu"), capacity=6), RandomVectors(A, 0)
    for _ in range(3):
        added, replaced = append_block([torch.zeros(6, dtype=torch.float64) for _ in range(2)], basis, 0.0, random)
        assert (len(added), replaced) == (2, True)
    Q = basis.combine(torch.eye(6, dtype=torch.float64))
    assert (Q @ Q.T - torch.eye(6, dtype=torch.float64)).abs().max() <= 10 * torch.finfo(torch.float64).eps
    assert append_block([torch.ones(6, dtype=torch.float64)], basis, 0.0, random) == ([], False)


def test_equal_vectors_in_a_block_are_not_taken_twice():
    """Law: the second copy has nothing left after the first."""
    A = diagonal(torch.ones(50, dtype=torch.float64))
    basis, random = Basis(50, torch.float64, torch.device("cpu"), capacity=50), RandomVectors(A, 0)
    w = normal(50)
    added, replaced = append_block([w.clone(), w.clone()], basis, 1e-13, random)
    assert (len(added), replaced) == (2, True)
    assert abs(added[0] @ added[1]) <= 10 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    "start", [None, torch.zeros(40), torch.full((40,), float("nan")), torch.full((40,), float("inf"))]
)
def test_a_start_without_direction_counts_as_none(start: Tensor | None):
    rows, share = start_block(start, 2, RandomVectors(diagonal(torch.ones(40)), 0))
    assert share == 1.0
    assert [bits(row) for row in rows] == [
        bits(row) for row in start_block(None, 2, RandomVectors(diagonal(torch.ones(40)), 0))[0]
    ]


def test_a_start_has_a_random_half():
    """Closed form: (s / ||s|| + u) / 2, also for a start that is tiny, huge, or of another dtype."""
    s = normal(40, seed=1)
    u = start_block(None, 1, RandomVectors(diagonal(torch.ones(40, dtype=torch.float64)), 0))[0][0]
    for scale in (1e-150, 1.0, 1e150):
        rows, share = start_block(scale * s, 1, RandomVectors(diagonal(torch.ones(40, dtype=torch.float64)), 0))
        assert share == 0.5
        assert torch.allclose(2 * rows[0] - u, s / torch.linalg.vector_norm(s), atol=1e-15)
    rows, _ = start_block(s, 1, RandomVectors(diagonal(torch.ones(40)), 0))
    assert rows[0].dtype is torch.float32


def test_inner_products_of_long_vectors_keep_their_digits():
    """float64: a float32 matrix-vector product over 4 million numbers of one sign is off by hundreds of eps, which cost orthogonality."""
    n = 4_000_000
    rows = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    basis = Basis(n, torch.float32, torch.device("cpu"), capacity=4)
    for row in rows:
        basis.append(row)
    w = rows[0] + 0.1 * rows[1]
    truth = rows.double() @ w.double()
    eps = torch.finfo(torch.float32).eps
    assert (basis.coefficients(w) - truth).abs().max() <= 4 * eps
    left = torch.rand(n, generator=torch.Generator().manual_seed(1))
    alone = Basis(n, torch.float32, torch.device("cpu"), capacity=2)
    alone.append(rows[0])
    alone.orthogonalize(left)
    assert abs(torch.dot(left.double(), rows[0].double()).item()) <= 4 * eps * torch.linalg.vector_norm(left).item()
