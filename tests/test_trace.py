"""Traces of known matrices: what each method computes, what its interval claims, and when the rule says that it is enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import dense, normal, rotated, seeded
from scipy import stats
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import DenseMap, FunctionMap, deflation, hutchinson, student, trace, xtrace

METHODS = ("auto", "exact", "hutchinson", "deflated", "hutch++", "xtrace")
SAMPLED = METHODS[2:]


def rank_one(n: int, ones: int) -> Tensor:
    a = torch.zeros(n, dtype=torch.float64)
    a[:ones] = 1.0
    return torch.outer(a, a)


def with_outliers(n: int = 150) -> Tensor:
    values = torch.full((n,), 0.05, dtype=torch.float64)
    values[:5] = torch.tensor([20.0, 10.0, 8.0, 5.0, 3.0])
    return rotated(values)


def flat(n: int = 150) -> Tensor:
    return rotated(torch.linspace(0.5, 1.5, n, dtype=torch.float64))


# ---- Student's quantile and the rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 29, 30, 199, 200, 201, 202, 1000, 10**6])
def test_quantile(dof: int):
    """Rung 3: scipy; beyond the finite series the first term left out is below 1e-9 at nu = 201."""
    assert student.quantile(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-9)


def test_half_width():
    m = 47
    plain = stats.t.ppf(0.975, m - 1) * 0.3
    assert student.half_width(0.3, m) == pytest.approx(plain * (1 + student.WIDENING / m), rel=1e-9)
    assert student.half_width(float("nan"), 1) == math.inf
    assert student.half_width(0.0, 2) == 0.0


def test_looks_are_on_a_geometric_grid():
    looks = [m for m in range(1, 2000) if student.is_due(m, m - 1)]
    assert looks[:5] == [30, 38, 48, 60, 75]
    assert all(1.24 < b / a < 1.28 for a, b in itertools.pairwise(looks))
    assert student.is_due(40, 29)
    assert not student.is_due(47, 38)


@pytest.mark.parametrize(("deviation", "allowed"), [(1.0, 0.3), (1.0, 0.1), (5.0, 0.1)])
def test_probes_needed_is_the_least(deviation: float, allowed: float):
    m = student.probes_needed(deviation, allowed)
    assert student.half_width(deviation / m**0.5, m) <= allowed
    assert m == 30 or student.half_width(deviation / (m - 1) ** 0.5, m - 1) > allowed


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_lies_in_its_interval(method: Any, seed: int):
    """Rung 2: the sum of the diagonal of a dense matrix; at 95 % one in twenty would miss, so 5 standard errors are allowed."""
    A = with_outliers()
    found = trace.estimate(DenseMap(A), seed=seed, method=method, max_products=1000)
    truth = A.trace().item()
    assert abs(found.value - truth) <= 5 * found.stderr + 1e-9
    assert found.low <= found.value <= found.high
    assert found.converged
    assert found.method == ("deflated" if method == "auto" else method)


def test_exact_reads_every_entry():
    A = with_outliers(37)
    found = trace.estimate(DenseMap(A), method="exact", seed=0)
    assert found.value == pytest.approx(A.trace().item(), rel=1e-14)
    assert (found.exact, found.converged, found.stderr, found.products) == (True, True, 0.0, 37)
    assert (found.low, found.high, found.confidence) == (found.value, found.value, 1.0)


def test_partial_states_of_the_exact_method_claim_nothing():
    *states, last = trace.search(DenseMap(flat()), trace.Settings(method="exact"))
    assert len(states) > 5
    assert all(math.isnan(state.value) and not state.converged for state in states)
    assert all((state.low, state.high) == (-math.inf, math.inf) for state in states)
    assert last.exact


def test_a_diagonal_matrix_has_no_variance():
    """Var x'Ax = 2 sum_(i != j) a_ij^2 = 0: every probe gives the trace."""
    d = normal(100, seed=4)
    found = trace.estimate(FunctionMap(100, lambda v: d * v, dtype=d.dtype), method="hutchinson", seed=0)
    assert found.probes == student.LEAST
    assert found.value == pytest.approx(d.sum().item(), rel=1e-13)
    assert found.stderr < 1e-13


def test_identity_through_a_subspace():
    """A Krylov space of the identity breaks down after one step; random directions take over.

    What is left is a projection P of rank n - r: a probe has the variance 2 sum_(i != j) p_ij^2 = 2 (n - r - sum p_jj^2) <= 2 r.
    """
    found = trace.estimate(DenseMap(torch.eye(80, dtype=torch.float64)), method="deflated", rank=5, seed=0)
    assert found.rank == 5
    assert found.stderr < 1.5 * (2 * 5 / 30) ** 0.5
    assert abs(found.value - 80.0) < 5 * found.stderr


@pytest.mark.parametrize(("method", "rank", "first"), [("hutch++", 10, 21), ("xtrace", None, 8)])
def test_low_rank_is_exact(method: Any, rank: int | None, first: int):
    """Hutch++ is exact for rank <= r, XTrace for rank below k: the rank is 3."""
    V = normal(90, 3, seed=5)
    A = V @ torch.diag(torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)) @ V.T
    states = list(trace.search(DenseMap(A), trace.Settings(method=method, rank=rank, tolerance=1e-6), seed=0))
    reached = next(state for state in states if state.probes and state.products >= first)
    # cancellation of terms of size ||A|| n
    assert reached.value == pytest.approx(A.trace().item(), rel=1e-10)
    assert states[-1].converged
    assert states[-1].probes == student.LEAST


def test_deflation_removes_the_outliers():
    A = with_outliers()
    plain = trace.estimate(DenseMap(A), method="hutchinson", seed=0, max_products=40)
    deflated = trace.estimate(DenseMap(A), method="deflated", seed=0, rank=10, max_products=40)
    assert deflated.stderr < plain.stderr / 20
    assert (deflated.rank, deflated.probes, deflated.products) == (10, 30, 40)


def test_probes_drawn_before_the_subspace_are_those_after_it():
    """The same 6 probes through `resumed` and through `deflated_steps`: the product of a probe serves before and after."""
    A, lengths = DenseMap(with_outliers()), [100, 50]
    drawn = hutchinson.Samples(lengths)
    for row in hutchinson.sampled(A, 0, lengths=lengths, seed=3, block_size=6):
        drawn.append(row)
    first = next(s for s in deflation.resumed(A, drawn, rank=4, seed=3, start=None) if s.rank)
    fresh = deflation.deflated_steps(A, rank=4, lengths=lengths, seed=3)
    later = next(s for s in fresh if s.probes == 6)
    assert (first.probes, first.products, later.products) == (6, 10, 10)
    assert first.value == pytest.approx(later.value, rel=1e-12)


def test_sample_of_a_subspace_against_the_dense_projection():
    """Rung 2: x * (PAPx) and the diagonal of A - PAP, with P made from the dense basis."""
    A = with_outliers(40)
    building = deflation.krylov(DenseMap(A), 6, lengths=[15, 0, 25], seed=0, start=None)
    while True:
        try:
            next(building)
        except StopIteration as done:
            space = done.value
            break
    Q = space.basis.combine(torch.eye(6, dtype=torch.float64))
    P = torch.eye(40, dtype=torch.float64) - Q.T @ Q
    x = seeds.signs(40, 0, "test", dtype=torch.float64)
    sums = hutchinson.part_sums(x, A @ x, [15, 0, 25])
    expected = x * (P @ A @ P @ x)
    got = space.sample(x, sums, [15, 0, 25])
    assert got.tolist() == pytest.approx([expected[:15].sum().item(), 0.0, expected[15:].sum().item()], abs=1e-11)
    known = (A - P @ A @ P).diagonal()
    assert space.known.tolist() == pytest.approx([known[:15].sum().item(), 0.0, known[15:].sum().item()], abs=1e-11)


def test_left_out_estimates_against_their_definition():
    """Rung 2: XTrace by its definition, one dense QR for each vector left out."""
    A, k, n = with_outliers(40), 7, 40
    omegas = []
    for index in range(k):
        drawn = seeds.normal(n, 2, xtrace.PURPOSE, index, dtype=torch.float64)
        omegas.append(drawn * n**0.5 / drawn.norm())
    W = torch.stack(omegas, 1)
    values = []
    for i in range(k):
        Q = torch.linalg.qr(A @ W[:, [j for j in range(k) if j != i]])[0]
        u = W[:, i] - Q @ (Q.T @ W[:, i])
        values.append((Q.T @ A @ Q).trace() + (n - k + 1) * (u @ A @ u) / (u @ u))
    expected = torch.stack(values)
    state = next(s for s in xtrace.steps(DenseMap(A), seed=2) if s.probes == k)
    assert state.value == pytest.approx(expected.mean().item(), rel=1e-10)
    assert state.stderr == pytest.approx((expected.std() / k**0.5).item() * n / (n - k), rel=1e-8)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [flat, with_outliers, lambda: rank_one(60, 3)])
def test_variance_of_a_probe(matrix: Callable[[], Tensor]):
    """Rung 5: Var x'Ax = 2 (||A||_F^2 - sum a_jj^2), which m samples show to sqrt((kappa + 2) / m), excess kurtosis kappa <= 12."""
    A, m = matrix(), 4000
    X = torch.stack([seeds.signs(len(A), 0, hutchinson.PURPOSE, i, dtype=torch.float64) for i in range(m)], 1)
    samples = (X * (A @ X)).sum(0)
    theory = 2 * (A.square().sum() - A.diagonal().square().sum())
    assert (samples.var() / theory).item() == pytest.approx(1.0, abs=5 * (14 / m) ** 0.5)
    found = next(s for s in hutchinson.steps(DenseMap(A), lengths=[len(A)], seed=0) if s.probes == 50)
    assert found.value == pytest.approx(samples[:50].mean().item(), rel=1e-12)
    assert found.stderr == pytest.approx((samples[:50].std() / 50**0.5).item(), rel=1e-12)


@pytest.mark.parametrize("method", SAMPLED)
def test_unbiased(method: Any):
    """Rung 5: the mean of 200 estimates of fixed cost lies within 5 of its standard errors of the truth."""
    A, runs = with_outliers(60), 200
    options = {"method": method, "rank": 4 if method in ("deflated", "hutch++") else None, "tolerance": 1e-9}
    found = [trace.estimate(DenseMap(A), seed=seed, max_products=20, **options).value for seed in range(runs)]
    errors = torch.tensor(found, dtype=torch.float64) - A.trace()
    assert abs(errors.mean()) < 5 * errors.std() / runs**0.5


@pytest.mark.slow
def test_parts_are_unbiased_and_have_their_errors():
    """Rung 5: z-scores of the shares over 200 runs; their mean square is 1 up to the error of a variance with m = 40."""
    A, lengths, runs = with_outliers(60), [10, 20, 30], 200
    truth = torch.stack([piece.sum() for piece in A.diagonal().split(lengths)])
    for method, rank in (("hutchinson", None), ("deflated", 4), ("hutch++", 4)):
        settings = trace.Settings(method=method, rank=rank, max_products=40, tolerance=1e-9)  # pyright: ignore
        z = []
        for seed in range(runs):
            *_, last = trace.search(DenseMap(A), settings, lengths=lengths, seed=seed)
            assert last.parts is not None
            assert last.parts.values.sum().item() == pytest.approx(last.value, rel=1e-12)
            z.append((last.parts.values - truth) / last.parts.stderr)
        scores = torch.stack(z)
        assert bool((scores.mean(0).abs() < 5 * scores.std(0) / runs**0.5).all())
        assert bool(((scores.square().mean(0) > 0.6) & (scores.square().mean(0) < 1.8)).all())


def stopped(samples: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rule on many rows of samples [runs, most] at once: mean, half-width and number of probes where each row stops."""
    looks = [m for m in range(1, most + 1) if student.is_due(m, m - 1)]
    looks += [] if looks[-1] == most else [most]
    runs = len(samples)
    mean, half, count = (torch.full((runs,), torch.nan, dtype=torch.float64) for _ in range(3))
    open_ = torch.ones(runs, dtype=torch.bool)
    for m in looks:
        now = samples[:, :m]
        center, stderr = now.mean(1), now.std(1) / m**0.5
        width = stderr * student.half_width(1.0, m)
        done = open_ & ((width <= tolerance * center.abs()) | torch.tensor(m == most))
        mean[done], half[done], count[done] = center[done], width[done], float(m)
        open_ &= ~done
    return mean, half, count


def test_the_simulated_rule_is_the_rule():
    """`stopped` on the samples of a seed stops where `search` stops, with the same interval."""
    A = rank_one(70, 3)
    for seed, tolerance in itertools.product(range(4), (0.5, 0.25)):
        X = torch.stack([seeds.signs(70, seed, hutchinson.PURPOSE, i, dtype=torch.float64) for i in range(300)], 1)
        mean, half, count = stopped((X * (A @ X)).sum(0)[None], tolerance, 300)
        found = trace.estimate(DenseMap(A), method="hutchinson", tolerance=tolerance, max_products=300, seed=seed)
        assert found.probes == int(count.item())
        assert found.value == pytest.approx(mean.item(), rel=1e-12)
        assert found.half_width == pytest.approx(half.item(), rel=1e-12)


def network(hidden: int, activation: type[nn.Module], seed: int) -> Tensor:
    """The dense Hessian of a small classifier."""
    with seeded(seed):
        model = nn.Sequential(nn.Linear(4, hidden), activation(), nn.Linear(hidden, 3)).double()
    x, y = normal(24, 4, seed=seed + 1), torch.arange(24) % 3
    return dense(model, lambda call: nn.functional.cross_entropy(call(x), y)).hessian


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: flat(60),
    "outliers": lambda: with_outliers(60),
    "rank one on three coordinates": lambda: rank_one(60, 3),
    "rank one on all coordinates": lambda: torch.outer(normal(60, seed=3), normal(60, seed=3)),
    "negative rank one beside a large trace": lambda: 3.0 / 60 * torch.eye(60).double() - rank_one(60, 60) / 60,
    "network, tanh": lambda: network(6, nn.Tanh, 0),
    "network, ReLU": lambda: network(8, nn.ReLU, 1),
    "network, SiLU": lambda: network(5, nn.SiLU, 2),
}
TOLERANCES = (0.5, 0.3, 0.2, 0.15, 0.1)


def coverage(A: Tensor, tolerances: tuple[float, ...], runs: int, most: int) -> dict[float, float]:
    """Share of the stopped intervals that hold the trace, for each tolerance on the same samples."""
    truth, draw, chunk = A.trace().item(), torch.Generator().manual_seed(0), 250
    hits = dict.fromkeys(tolerances, 0)
    for _ in range(runs // chunk):
        bits = torch.randint(2, (len(A), chunk * most), generator=draw, dtype=torch.int8)
        X = bits.double().mul_(2).sub_(1)
        samples = (X * (A @ X)).sum(0).view(chunk, most)
        for tolerance in tolerances:
            mean, half, _ = stopped(samples, tolerance, most)
            hits[tolerance] += int(((mean - truth).abs() <= half + 1e-9 * abs(truth)).sum())
    return {tolerance: count / runs for tolerance, count in hits.items()}


@pytest.mark.parametrize("name", SPECTRA)
def test_stopped_intervals_hold_the_truth_quick(name: str):
    """2000 repeats: 0.94 less 4 standard errors of 0.0049 each."""
    measured = coverage(SPECTRA[name](), (0.3, 0.15), 2000, most=200)
    assert min(measured.values()) >= 0.94 - 4 * 0.0049, measured


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_stopped_intervals_hold_the_truth(name: str):
    """20 000 repeats, with a standard error of 0.0016; the numbers are in docs/concepts/trace.md."""
    measured = coverage(SPECTRA[name](), TOLERANCES, 20_000, most=500)
    assert min(measured.values()) >= 0.94, measured


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "deflated", "hutch++", "xtrace"])
@pytest.mark.parametrize(
    "name", ["flat", "outliers", "rank one on three coordinates", "negative rank one", "network, tanh"]
)
def test_stopped_intervals_of_every_method(method: Any, name: str):
    """600 runs of the real loop, n just above the order that is always done exactly; 0.94 less 4 standard errors of 0.0097."""
    A = {
        "flat": flat,
        "outliers": with_outliers,
        "rank one on three coordinates": lambda: rank_one(150, 3),
        "negative rank one": lambda: (3.0 * torch.eye(150).double() - rank_one(150, 150)) / 150,
        "network, tanh": lambda: network(16, nn.Tanh, 0),
    }[name]()
    truth, hits = A.trace().item(), 0
    for seed in range(600):
        found = trace.estimate(DenseMap(A), method=method, tolerance=0.03, max_products=120, seed=seed)
        hits += found.low - 1e-9 <= truth <= found.high + 1e-9
    assert hits / 600 >= 0.94 - 4 * 0.0097


# ---- the rule as a rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *SAMPLED])
def test_nothing_converges_before_thirty_probes(method: Any):
    d = torch.ones(200, dtype=torch.float64)
    A = FunctionMap(200, lambda v: d * v, dtype=d.dtype)
    states = list(trace.search(A, trace.Settings(method=method, tolerance=0.5), seed=0))
    assert all(not state.converged for state in states if state.probes < 30)
    assert states[-1].converged
    assert states[-1].probes == 30


@pytest.mark.parametrize("method", ["auto", *SAMPLED])
@pytest.mark.parametrize("most", [7, 29, 40, 77])
def test_budget_is_kept_and_says_not_converged(method: Any, most: int):
    found = trace.estimate(
        DenseMap(rank_one(300, 300) + flat(300)), method=method, tolerance=1e-6, max_products=most, rank=2, seed=0
    )
    assert found.products <= most
    assert found.products >= most - 2
    assert not found.converged
    assert found.low < found.high


def test_blocks_stay_in_the_budget_and_draw_the_same_probes():
    A = DenseMap(with_outliers())
    one = trace.estimate(A, method="hutchinson", tolerance=1e-3, max_products=48, seed=1)
    five = trace.estimate(A, method="hutchinson", tolerance=1e-3, max_products=48, block_size=5, seed=1)
    assert five.products == 48
    assert five.value == pytest.approx(one.value, rel=1e-12)


def test_time_ends_the_search():
    found = trace.estimate(DenseMap(with_outliers()), method="hutchinson", tolerance=1e-6, max_seconds=1e-9, seed=0)
    assert found.products == 1
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert math.isnan(found.stderr)


def test_memory_bounds_the_subspace():
    A = DenseMap(with_outliers())
    assert trace.estimate(A, method="deflated", max_rows=12, seed=0).rank == 8
    assert trace.estimate(A, method="xtrace", tolerance=1e-6, max_rows=24, seed=0).probes == 10
    found = trace.estimate(A, max_rows=5, tolerance=0.02, seed=0, max_products=120)
    assert found.rank <= 1


def test_absolute_tolerance_serves_a_trace_of_zero():
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)
    A = DenseMap(rotated(values))
    relative = trace.estimate(A, method="hutchinson", max_products=100, seed=0)
    assert not relative.converged
    absolute = trace.estimate(A, method="hutchinson", max_products=400, absolute_tolerance=6.0, seed=0)
    assert absolute.converged
    assert absolute.allowed == 6.0
    assert absolute.half_width <= 6.0


@pytest.mark.parametrize("method", ["auto", *SAMPLED])
def test_same_seed_same_bits(method: Any):
    A = DenseMap(with_outliers())
    a, b, c = (trace.estimate(A, method=method, seed=seed) for seed in (5, 5, 6))
    assert (a.value, a.stderr, a.products) == (b.value, b.stderr, b.products)
    assert a.value != c.value


def test_auto_names_its_reason():
    small = trace.estimate(DenseMap(flat(51)), seed=0)
    assert (small.method, small.products, small.reason) == ("exact", 51, "51 products give every diagonal entry")
    easy = trace.estimate(DenseMap(flat()), seed=0)
    assert (easy.method, easy.products) == ("hutchinson", 30)
    hard = trace.estimate(DenseMap(with_outliers()), seed=0)
    assert hard.method == "deflated"
    assert "probes were predicted without a subspace" in hard.reason
    indefinite = trace.estimate(DenseMap(rotated(torch.linspace(-1, 1, 130).double())), seed=0)
    assert indefinite.exact
    assert "more probes were predicted, 130 products give every diagonal entry" in indefinite.reason


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "magic"}, "method='magic' is not one of auto, exact, hutchinson, deflated, hutch++, xtrace"),
        ({"tolerance": 0.0}, "tolerance=0.0 must lie in (0, 1)"),
        ({"tolerance": 1.0}, "tolerance=1.0 must lie in (0, 1)"),
        ({"absolute_tolerance": 0.0}, "absolute_tolerance=0.0 must be positive and finite, or None"),
        ({"absolute_tolerance": math.inf}, "absolute_tolerance=inf must be positive"),
        ({"rank": 0}, "rank=0 must be at least 1, or None for 30"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_products": 0}, "max_products=0 must be at least 1"),
        ({"max_seconds": 0.0}, "max_seconds=0.0 must be positive, or None for no limit"),
        ({"method": "exact", "max_products": 9}, "method='exact' takes 10 products, max_products=9 allows fewer"),
        ({"method": "deflated", "rank": 10}, "method='deflated' with rank=10 does not fit: order 10"),
        ({"method": "hutch++", "rank": 5, "max_products": 10}, "of rank r takes 2 r products and one for a probe"),
        (
            {"method": "deflated", "max_rows": 4},
            "with a subspace does not fit: order 10, max_products=500, 4 vectors in memory",
        ),
        ({"method": "deflated", "rank": 1000}, "r must be below the order. Ask for 9 at most, or use 'hutchinson'."),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], text: str):
    with pytest.raises(InvalidArgument) as caught:
        trace.estimate(DenseMap(flat(10)), seed=0, **options)
    assert text in str(caught.value)


def test_parts_and_start_must_fit():
    A = DenseMap(flat(10))
    with pytest.raises(InvalidArgument, match="the parts have 9 coordinates, the matrix has order 10"):
        next(trace.search(A, lengths=[4, 5]))
    with pytest.raises(InvalidArgument, match="start has shape \\(3,\\), the matrix has order 10"):
        next(trace.search(A, start=torch.zeros(3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 3, 45])
def test_products_that_are_not_finite_are_refused(bad: float, method: Any, after: int):
    count, A = 0, with_outliers(170)

    def multiply(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        y = A @ v
        if count > after:
            y[7] = bad
        return y

    with pytest.raises(CurvkitError, match="has NaN or infinite entries. The function or its derivatives overflow"):
        trace.estimate(FunctionMap(170, multiply, dtype=torch.float64), method=method, tolerance=1e-6, seed=0)


@pytest.mark.parametrize("method", ["auto", "hutchinson"])
@pytest.mark.parametrize("most", [3, 29, 30, 31, 33, 41])
def test_blocks_keep_the_budget(method: Any, most: int):
    """The last block is smaller; probe i is the same in whatever block it is."""
    A = DenseMap(with_outliers())
    options: dict[str, Any] = {"seed": 0, "max_products": most, "method": method, "tolerance": 1e-6, "rank": 100}
    found = trace.estimate(A, block_size=4, **options)
    one = trace.estimate(A, block_size=1, **options)
    assert found.products == found.probes == most
    assert (found.products, found.value) == (one.products, pytest.approx(one.value, rel=1e-12))
