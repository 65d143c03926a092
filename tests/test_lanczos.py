"""Eigenvalues: hard spectra in closed form, dense eigh, honest flags, budgets, and what is refused."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import DenseMap, FunctionMap, lanczos
from curvkit.linalg.basis import Basis, dot, norm
from curvkit.linalg.krylov import Capacity
from curvkit.linalg.lanczos import Settings, allowed, search, steps, wanted

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def diagonal(values: Tensor) -> FunctionMap:
    return FunctionMap(len(values), lambda v: values * v, dtype=values.dtype)


def wilkinson(half: int) -> Tensor:
    """W(2 half + 1)+: |i| on the diagonal, ones beside it; its largest eigenvalues come in pairs that agree to many digits."""
    diagonal = torch.arange(-half, half + 1, dtype=torch.float64).abs()
    ones = torch.ones(2 * half, dtype=torch.float64)
    return torch.diag(diagonal) + torch.diag(ones, 1) + torch.diag(ones, -1)


def strakos(n: int, rho: float) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return 0.1 + i / (n - 1) * (100 - 0.1) * rho ** (n - 1 - i)


def largest(values: Tensor, k: int) -> list[float]:
    return values.double().sort(descending=True).values[:k].tolist()


def in_intervals(pairs: lanczos.Eigenpairs, truth: Tensor) -> bool:
    return all(bool(((truth >= low) & (truth <= high)).any()) for low, high in pairs.intervals.tolist())


# ---- spectra that make other methods fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_outlier_in_a_million_is_found_for_every_seed(dtype: torch.dtype):
    """Closed form. The start vector has a component of about 1e-3 on the outlier: agreement of successive values stops at 1."""
    d = torch.ones(1_000_000, dtype=dtype)
    d[0] = 10.0
    A = diagonal(d)
    for seed in range(8):
        pairs = lanczos.eigenpairs(A, seed=seed)
        assert pairs.all_converged
        # one product rounds by eps relative to 10; the Rayleigh quotient errs by the square of the residual
        assert abs(pairs.values.item() - 10.0) <= 10 * lanczos.ROUNDING * torch.finfo(dtype).eps
        assert pairs.upper_bound is not None
        assert pairs.upper_bound >= 10.0


@pytest.mark.slow
def test_one_outlier_in_a_million_for_a_hundred_seeds():
    """Closed form, as above, over many draws of the start vector."""
    d = torch.ones(1_000_000)
    d[0] = 10.0
    for seed in range(100):
        assert abs(lanczos.eigenpairs(diagonal(d), seed=seed).values.item() - 10.0) <= 1e-4


@pytest.mark.parametrize("n", [2, 400])
def test_plus_and_minus_one(n: int):
    """Closed form. A constant Rayleigh quotient, or the largest magnitude with either sign, is not the largest eigenvalue."""
    d = torch.ones(n, dtype=torch.float64)
    d[n // 2 :] = -1.0
    for seed in range(10):
        assert abs(lanczos.eigenpairs(diagonal(d), seed=seed).values.item() - 1.0) < 1e-12
        assert abs(lanczos.eigenpairs(diagonal(d), which="smallest", seed=seed).values.item() + 1.0) < 1e-12
        both = lanczos.eigenpairs(diagonal(d), 2, which="both", seed=seed).values
        assert (both - torch.tensor([1.0, -1.0], dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "rho"), [(24, 0.8), (60, 0.85), (100, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strakos_matrices_have_no_ghosts(n: int, rho: float, dtype: torch.dtype):
    """Closed form: without reorthogonalization the large eigenvalues appear several times."""
    d = strakos(n, rho).to(dtype)
    pairs = lanczos.eigenpairs(diagonal(d), 8, tolerance=1e-5, max_products=3 * n, seed=0)
    truth = torch.tensor(largest(d, 8), dtype=torch.float64)
    assert pairs.all_converged
    # each value within its own interval of the value of the same rank: a ghost would shift all that follow
    assert ((pairs.values - truth).abs() <= pairs.residuals + pairs.rounding).all()


def test_wilkinson_pairs_whole_space():
    """Dense eigh: n = 21 is spanned, so both copies of each pair are there, and the multiplicities are claimed."""
    truth = torch.linalg.eigvalsh(wilkinson(10))
    pairs = lanczos.eigenpairs(DenseMap(wilkinson(10)), 4, seed=0)
    assert (pairs.values - truth.flip(0)[:4]).abs().max() < 100 * EPS64 * 11
    assert pairs.multiplicities_below == 22
    assert pairs.confidence == 1.0


def test_wilkinson_pairs_with_blocks():
    """Dense eigh: with a block of 2 both copies are found at n = 201, where the space is not spanned."""
    truth = torch.linalg.eigvalsh(wilkinson(100)).flip(0)
    pairs = lanczos.eigenpairs(DenseMap(wilkinson(100)), 4, block_size=2, tolerance=1e-6, seed=0)
    assert pairs.all_converged
    assert (
        pairs.values - truth[:4]
    ).abs().max() <= 1e-4  # residual 1e-4 at most; the error of the values is far smaller
    assert pairs.multiplicities_below == 2
    single = lanczos.eigenpairs(DenseMap(wilkinson(100)), 4, tolerance=1e-6, seed=0)
    assert single.multiplicities_below == 1
    assert in_intervals(single, truth)


@pytest.mark.parametrize("block_size", [5, 6])
def test_five_fold_eigenvalue_with_blocks(block_size: int):
    """Closed form: five copies of 7 above a bulk in [0, 0.5]."""
    d = 0.5 * torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d[:5] = 7.0
    pairs = lanczos.eigenpairs(diagonal(d), 6, block_size=block_size, seed=0)
    assert (pairs.values[:5] - 7.0).abs().max() < 1e-12
    assert pairs.values[5] < 0.51
    assert pairs.multiplicities_below == block_size


@pytest.mark.parametrize("n", [1, 2, 40, 1000])
@pytest.mark.parametrize("block_size", [1, 2])
def test_zero_matrix(n: int, block_size: int):
    """Closed form: the zero matrix has eigenvalue zero; nothing is divided by a vanishing remainder."""
    k, block_size = min(3, n), min(block_size, n)
    pairs = lanczos.eigenpairs(diagonal(torch.zeros(n)), k, block_size=block_size, seed=0)
    assert pairs.values.tolist() == [0.0] * k
    assert pairs.residuals.tolist() == [0.0] * k
    assert pairs.all_converged


def test_identity_gives_as_many_as_are_asked_for():
    """Closed form: the Krylov space ends after one step; new directions take over."""
    pairs = lanczos.eigenpairs(diagonal(torch.ones(300, dtype=torch.float64)), 4, seed=0)
    assert (pairs.values - 1.0).abs().max() < 1e-14
    assert pairs.vectors is not None
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-14


def test_rank_one():
    """Closed form: u u' has the eigenvalue u'u and zeros."""
    u = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = lanczos.eigenpairs(FunctionMap(400, lambda v: u * (u @ v), dtype=torch.float64), 3, seed=0)
    size = (u @ u).item()
    assert abs(pairs.values[0].item() - size) < 1e-12 * size
    assert pairs.values[1:].abs().max() < 1e-12 * size


def test_order_one():
    """Closed form: a 1x1 matrix."""
    pairs = lanczos.eigenpairs(diagonal(torch.tensor([-4.0], dtype=torch.float64)), seed=0)
    assert pairs.values.tolist() == [-4.0]
    assert pairs.multiplicities_below == 2


@pytest.mark.parametrize("n", [30, 300])
def test_many_copies_below_one(n: int):
    """Closed form: diag(3, 1, ..., 1), whose Krylov spaces have dimension two; the copies of 1 come from new directions."""
    d = torch.ones(n)
    d[0] = 3.0
    pairs = lanczos.eigenpairs(diagonal(d), 5, seed=0)
    assert (pairs.values - torch.tensor([3.0, 1, 1, 1, 1], dtype=torch.float64)).abs().max() < 10 * EPS32 * 3
    assert pairs.all_converged


def test_outliers_above_a_bulk_each_once():
    """Closed form: 100, 50, 25 and then the edge of the bulk, each once, with its rank."""
    d = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    d[:3] = torch.tensor([100.0, 50.0, 25.0])
    pairs = lanczos.eigenpairs(diagonal(d), 6, seed=0)
    truth = torch.tensor(largest(d, 6), dtype=torch.float64)
    assert pairs.all_converged
    # the edge of a bulk of 997 uniform numbers: gaps of 1e-3, so that a rank may slip by a few of them
    assert ((pairs.values - truth).abs() <= torch.tensor([1e-3, 1e-3, 1e-3, 5e-3, 5e-3, 5e-3])).all()
    assert in_intervals(pairs, d.double())


def test_uniform_spectrum_is_not_called_converged_too_early():
    """Closed form: linspace(0, 100) of order 5000, where power iteration is 2 % low when it stops."""
    d = torch.linspace(0, 100, 5000, dtype=torch.float64)
    pairs = lanczos.eigenpairs(diagonal(d), seed=0)
    assert pairs.all_converged
    assert abs(pairs.values.item() - 100.0) <= 0.1  # tolerance 1e-3
    assert in_intervals(pairs, d)


# ---- which end, order, start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("largest", [9.0, 8.0, 7.0]),
        ("smallest", [-8.0, -9.0, -10.0]),
        ("both", [9.0, 8.0, -10.0]),
        ("magnitude", [9.0, -9.0, -10.0]),
    ],
)
def test_which(which: lanczos.Which, expected: list[float]):
    """Closed form: algebraic ends, both ends, magnitude; always in descending order."""
    d = torch.arange(-10, 10, dtype=torch.float64).repeat(1)
    assert lanczos.eigenpairs(diagonal(d), 3, which=which, seed=0).values.tolist() == pytest.approx(expected, abs=1e-12)
    assert d[wanted(d, 3, which)].tolist() == expected


def test_diag_one_minus_three():
    """Closed form: LA 1, SA -3, LM -3."""
    A = diagonal(torch.tensor([1.0, -3.0], dtype=torch.float64))
    assert lanczos.eigenpairs(A, seed=0).values.item() == pytest.approx(1.0)
    assert lanczos.eigenpairs(A, which="smallest", seed=0).values.item() == pytest.approx(-3.0)
    assert lanczos.eigenpairs(A, which="magnitude", seed=0).values.item() == pytest.approx(-3.0)


@pytest.mark.parametrize("kind", ["eigenvector of another", "zero", "nan"])
def test_start_vectors_that_could_mislead(kind: str):
    """Closed form: the start always has a random part, so that no eigenvector is out of reach."""
    d = torch.linspace(0, 1, 500, dtype=torch.float64)
    d[3] = 5.0
    start = torch.zeros(500, dtype=torch.float64)
    start[100] = {"eigenvector of another": 1.0, "zero": 0.0, "nan": float("nan")}[kind]
    pairs = lanczos.eigenpairs(diagonal(d), start=start, seed=0)
    # the residual is at most 5e-3 and the gap to the bulk 4, so the error of the value at most residual^2 / gap
    assert pairs.values.item() == pytest.approx(5.0, abs=(5e-3) ** 2 / 4)


def test_a_rich_start_saves_products():
    """Law: with the eigenvector itself as start fewer products are needed than without."""
    d = torch.linspace(0, 1, 600, dtype=torch.float64) ** 0.3
    start = torch.zeros(600, dtype=torch.float64)
    start[-1] = 1.0
    informed, blind = (lanczos.eigenpairs(diagonal(d), start=s, seed=0, tolerance=1e-4) for s in (start, None))
    assert informed.all_converged
    assert informed.products < blind.products


def test_same_seed_same_bits_other_seed_other_bits():
    """Law: randomness belongs to the seed, and the global generator is not touched."""
    d = torch.rand(200, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again, other = (lanczos.eigenpairs(diagonal(d), 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), before)


# ---- certificates ---------------------------------------------------------------------------------------------------


@st.composite
def symmetric(draw: st.DrawFn) -> Tensor:
    n = draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["uniform", "clustered", "low rank", "graded", "indefinite"]))
    values = torch.rand(n, dtype=torch.float64, generator=generator)
    if kind == "clustered":
        values = values.mul(3).floor() + 1e-9 * values
    elif kind == "low rank":
        values[n // 3 :] = 0.0
    elif kind == "graded":
        values = 10 ** (-12 * values)
    elif kind == "indefinite":
        values = values - 0.5
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = Q @ torch.diag(values) @ Q.T
    A = (A + A.T) / 2
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return ((A + A.T) / 2).to(dtype)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    symmetric(),
    st.integers(1, 3),
    st.sampled_from(["largest", "smallest", "both", "magnitude"]),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_every_interval_holds_an_eigenvalue(A: Tensor, k: int, which: lanczos.Which, block_size: int, seed: int):
    """Dense eigh, float64, of a thousand random matrices: also for results that did not converge."""
    n = len(A)
    k, block_size = min(k, n), min(block_size, n)
    pairs = lanczos.eigenpairs(
        DenseMap(A), k, which=which, block_size=block_size, max_products=k + block_size + 6, seed=seed
    )
    truth = torch.linalg.eigvalsh(A.double())
    assert in_intervals(pairs, truth)
    assert (pairs.values[:-1] >= pairs.values[1:]).all()
    if pairs.confidence == 1.0:
        assert pairs.upper_bound >= truth[-1]
        assert pairs.lower_bound <= truth[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lapacks_two_ratios(dtype: torch.dtype):
    """Law: ||A Z - Z L|| / (||A|| n eps) and ||I - Z'Z|| / (n eps), LAPACK's own test, below its threshold of 30."""
    n = 120
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = ((A + A.T) / 2).to(dtype)
    pairs = lanczos.eigenpairs(
        DenseMap(A), 5, tolerance=2 * lanczos.ROUNDING * torch.finfo(dtype).eps, max_products=400, seed=0
    )
    Z, eps = pairs.vectors.double(), torch.finfo(dtype).eps
    size = torch.linalg.matrix_norm(A.double(), 2)
    assert torch.linalg.matrix_norm(A.double() @ Z - Z * pairs.values, 2) / (size * n * eps) < 30
    assert torch.linalg.matrix_norm(torch.eye(5, dtype=torch.float64) - Z.T @ Z, 2) / (n * eps) < 30


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_noise_in_the_products_shows_in_the_residual(noise: float):
    """Law: with relative noise in each product the recurrence says 0, the recomputed residual does not; no false claim."""
    d = torch.linspace(0, 1, 300, dtype=torch.float64)
    d[-1] = 5.0
    draws = torch.Generator().manual_seed(0)

    def noisy(v: Tensor) -> Tensor:
        w = d * v
        e = torch.randn(300, dtype=torch.float64, generator=draws)
        return w + noise * w.norm() * e / e.norm()

    pairs = lanczos.eigenpairs(FunctionMap(300, noisy, dtype=torch.float64), tolerance=1e-6, max_products=120, seed=0)
    assert not pairs.all_converged
    assert in_intervals(pairs, d)


def test_partial_results_are_estimates_and_the_last_is_recomputed():
    """Law: vectors and recomputed residuals come with the last result only; counts grow."""
    *partial, last = search(diagonal(torch.linspace(0, 1, 400, dtype=torch.float64) ** 4), Settings(num=2), seed=0)
    assert all(not p.recomputed and p.vectors is None and not p.all_converged for p in partial)
    assert last.recomputed
    assert last.vectors.shape == (400, 2)
    assert last.products == partial[-1].products + 2
    assert [p.products for p in partial] == list(range(1, len(partial) + 1))


def test_residuals_are_those_of_the_vectors():
    """Dense algebra: the certificate is what it says."""
    A = torch.diag(torch.linspace(0, 3, 200, dtype=torch.float64))
    pairs = lanczos.eigenpairs(DenseMap(A), 3, tolerance=1e-2, seed=0)
    residuals = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert (residuals - pairs.residuals).abs().max() < 1e-12


def test_allowed_is_relative_with_a_floor():
    """Closed form: tolerance times the eigenvalue, at least tolerance times a hundredth of the largest."""
    values = torch.tensor([100.0, 5.0, 0.0], dtype=torch.float64)
    assert allowed(values, 100.0, 1e-3).tolist() == pytest.approx([0.1, 5e-3, 1e-3])


# ---- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [16, 20, 40])
def test_restarts_within_a_budget_give_the_same_eigenvalues(max_rows: int):
    """Law: thick restarts change the number of products, not the result; and the basis never outgrows its capacity."""
    d = torch.linspace(0, 1, 2000, dtype=torch.float64) ** 3
    d[:2] = torch.tensor([4.0, 3.0])
    A, options = diagonal(d), Settings(num=2, tolerance=1e-8, max_rows=max_rows, max_products=400)
    capacity = Capacity.within(max_rows, n=2000, num=2, block_size=1)
    states = []
    for state in steps(A, options, seed=0):
        assert state.basis.size <= capacity.rows
        states.append(state)
        if state.settled(2, 1e-8) or len(states) > 300:
            break
    pairs = lanczos.eigenpairs(A, 2, tolerance=1e-8, max_rows=max_rows, max_products=400, seed=0)
    assert pairs.all_converged
    assert pairs.values.tolist() == pytest.approx([4.0, 3.0], abs=1e-12)
    if max_rows < 20:
        assert states[-1].restarts >= 1


@pytest.mark.parametrize("block_size", [1, 3])
def test_basis_stays_orthonormal(block_size: int):
    """Law: max |Q'Q - I| <= 10 eps sqrt(m), also with restarts."""
    d = strakos(300, 0.97).float()
    *_, state = (
        s
        for s, _ in zip(
            steps(diagonal(d), Settings(block_size=block_size, max_rows=60), seed=0), range(60), strict=False
        )
    )
    Q = state.basis.combine(torch.eye(state.basis.size, dtype=torch.float64)).double()
    m = len(Q)
    assert (Q @ Q.T - torch.eye(m, dtype=torch.float64)).abs().max() <= 10 * EPS32 * m**0.5


def test_products_are_counted_and_limited():
    """Law: no more products than allowed, the certificate included; the count is the operator's."""
    count = 0
    d = torch.linspace(0, 1, 5000, dtype=torch.float64)

    def multiply(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return d * v

    pairs = lanczos.eigenpairs(
        FunctionMap(5000, multiply, dtype=torch.float64), 3, tolerance=1e-9, max_products=20, seed=0
    )
    assert pairs.products == count <= 20
    assert not pairs.all_converged
    assert pairs.recomputed
    assert in_intervals(pairs, d)


def test_time_limit_ends_with_a_certificate():
    """Law: after max_seconds the certificate is made from what is there."""

    def slow(v: Tensor) -> Tensor:
        time.sleep(0.05)
        return torch.linspace(0, 1, 500, dtype=torch.float64) * v

    pairs = lanczos.eigenpairs(FunctionMap(500, slow, dtype=torch.float64), tolerance=1e-12, max_seconds=0.2, seed=0)
    assert pairs.recomputed
    assert pairs.products < 20


def test_float64_accumulation_in_float32_vectors():
    """Closed form: a million ones; float32 summation one by one would stop at 2**24 / ... digits, float64 is exact."""
    ones = torch.full((3_000_001,), 1.0)
    assert dot(ones, ones) == 3_000_001.0
    assert norm(ones) == pytest.approx(3_000_001**0.5, rel=1e-15)


def test_basis_rows_and_combinations():
    """Law: coefficients, projection and combination over several chunks agree with one matrix."""
    Q = torch.linalg.qr(torch.randn(50, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q.T
    basis = Basis(50, torch.float64, torch.device("cpu"), capacity=19)
    for row in Q:
        basis.append(row)
    w = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(basis.coefficients(w), Q @ w, atol=1e-14)
    weights = torch.randn(19, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(basis.combine(weights), weights.T @ Q, atol=1e-13)
    left = w.clone()
    assert torch.allclose(basis.orthogonalize(left), Q @ w, atol=1e-13)
    assert (Q @ left).abs().max() < 1e-15


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num=0 and block_size=1 must be at least 1"),
        ({"block_size": 0}, "num=1 and block_size=0 must be at least 1"),
        ({"num": 11}, "num=11 and block_size=1 must not exceed the order of the matrix, 10"),
        ({"block_size": 11, "max_products": 40}, "must not exceed the order of the matrix, 10"),
        ({"which": "top"}, "which='top' is not one of largest, smallest, both, magnitude"),
        ({"tolerance": 0.0}, r"tolerance=0.0 must lie in \(0, 1\)"),
        ({"tolerance": 1.5}, r"tolerance=1.5 must lie in \(0, 1\)"),
        ({"tolerance": 1e-8}, "tolerance=1e-08 is below 9.5e-07, the rounding of products in torch.float32"),
        ({"max_products": 1}, "max_products=1 is too few: one step takes 1 and the residuals 1"),
        ({"max_seconds": 0.0}, "max_seconds=0.0 must be positive"),
        ({"start": torch.ones(9)}, r"start has shape \(9,\), the matrix has order 10"),
        ({"seed": -1}, r"seed=-1 must be an integer in \[0, 2\*\*63\)"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str):
    with pytest.raises(InvalidArgument, match=message):
        lanczos.eigenpairs(diagonal(torch.rand(10)), **{"num": 1, **options})  # type: ignore[arg-type]


def test_too_small_a_budget_is_refused_before_any_product():
    def multiply(v: Tensor) -> Tensor:
        raise AssertionError("multiplied")

    with pytest.raises(InvalidArgument, match="5 vectors of length 1000 fit the memory budget; .* need at least 12"):
        lanczos.eigenpairs(FunctionMap(1000, multiply), max_rows=5)


@pytest.mark.parametrize("num", [1, 3, 7])
@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_the_budget_that_a_refusal_names_is_enough(num: int, block_size: int):
    """Law: the number in the message is the smallest that is accepted."""
    with pytest.raises(InvalidArgument) as refused:
        Capacity.within(1, n=10_000, num=num, block_size=block_size)
    needed = int(str(refused.value).split("need at least ")[1].split(".")[0])
    accepted = Capacity.within(needed, n=10_000, num=num, block_size=block_size)
    assert num < accepted.kept <= accepted.rows - block_size
    with pytest.raises(InvalidArgument, match="need at least"):
        Capacity.within(needed - 1, n=10_000, num=num, block_size=block_size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite(bad: float):
    def multiply(v: Tensor) -> Tensor:
        w = v.clone()
        w[7] = bad
        return w

    with pytest.raises(CurvkitError, match="product 1 with the matrix has NaN or infinite entries"):
        lanczos.eigenpairs(FunctionMap(100, multiply))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\) is not square"),
        (torch.ones(2, 2, dtype=torch.int64), "has dtype torch.int64"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "has NaN or infinite entries"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), r"entries \(i, j\) and \(j, i\) differ by up to 2"),
    ],
)
def test_dense_maps_that_are_refused(matrix: Tensor, message: str):
    with pytest.raises(InvalidArgument, match=message):
        DenseMap(matrix)


def test_function_map_of_no_order():
    with pytest.raises(InvalidArgument, match="n=0 must be at least 1"):
        FunctionMap(0, lambda v: v)
