"""Comparisons: every number against dense float64 derivatives, paired errors against repetition, verdicts within the evidence."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, dense, normal, rotated, seeded, strakos, surroundings
from samples import ROWS, Net, examples, net
from torch import Tensor, nn

from curvkit import BatchLoss, Objective, ParameterSpace, seeds
from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective
from curvkit.linalg import DenseMap, lanczos
from curvkit.linalg.certificate import OtherArithmetic
from curvkit.losses.sameness import alike
from curvkit.measures import Comparison, ComparisonSettings, Contributions, Gap, ProbedTrace, compare, compare_steps
from curvkit.measures.probed_trace import probed_trace_steps
from curvkit.measures.verdicts import relative

EXACTLY = ComparisonSettings(search=lanczos.Settings(tolerance=1e-9))


def objective(seed: int, dtype: torch.dtype = torch.float64, hidden: int = 6) -> Objective:
    return Objective(net(hidden, seed).to(dtype), F.cross_entropy, cut(ROWS, *examples(dtype)))


def truth(it: Objective) -> tuple[Any, Tensor]:
    """Loss, gradient and Hessian, dense; and theta."""
    x, y = (torch.cat([batch[i] for batch in it.batches]) for i in range(2))
    found = dense(it.model, lambda call: F.cross_entropy(call(x), y))
    return found, torch.cat([p.detach().reshape(-1) for p in it.model.parameters()])


# ---- every number ---------------------------------------------------------------------------------------------------


def test_every_number_against_dense_derivatives():
    """51 parameters in float64: the trace is exact at 60 probes, eigenpairs have residuals of 1e-9."""
    a, b = objective(0), objective(1)
    found = compare({"a": a, "b": b}, 2, seed=0, settings=EXACTLY)
    facts = [truth(it) for it in (a, b)]
    for point, (one, theta) in zip(found.points, facts, strict=True):
        spectrum = torch.linalg.eigvalsh(one.hessian)
        scaled = torch.linalg.eigvalsh(theta.abs()[:, None] * one.hessian * theta.abs())
        assert point.loss == pytest.approx(one.loss, rel=1e-13)
        assert point.gradient_norm == pytest.approx(one.gradient.norm().item(), rel=1e-12)
        assert point.norm == pytest.approx(theta.norm().item(), rel=1e-14)
        assert point.eigenpairs is not None
        assert point.adaptive is not None
        assert point.trace is not None
        assert point.eigenpairs.values.tolist() == pytest.approx(spectrum.flip(0)[:2].tolist(), rel=1e-9)
        assert point.adaptive.values.item() == pytest.approx(scaled[-1].item(), rel=1e-9)
        assert (point.trace.exact, point.trace.value) == (True, pytest.approx(spectrum.sum().item(), rel=1e-12))
        assert point.stage == "complete"
        assert point.converged
    (one, theta), (other, moved) = facts
    it = found.differences[0]
    assert it.distance == pytest.approx((moved - theta).norm().item(), rel=1e-13)
    assert it.loss.value == pytest.approx(other.loss - one.loss, rel=1e-10)
    (_, V), (_, W) = (torch.linalg.eigh(one.hessian) for one in (one, other))
    overlap = W[:, -2:].T @ V[:, -2:]
    assert it.overlap is not None
    # residuals of 1e-9 turn the space by that over the gap
    assert it.overlap.value == pytest.approx(overlap.square().sum().item() / 2, abs=1e-7)
    assert it.overlap.chance == 2 / 51
    assert list(it.overlap.angles) == pytest.approx(torch.linalg.svdvals(overlap).acos().rad2deg().tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_hold_the_truth(dtype: torch.dtype):
    a, b = objective(0, dtype), objective(1, dtype)
    it = compare([a, b], seed=3).differences[0]
    (one, theta), (other, moved) = (truth(objective(seed)) for seed in (0, 1))
    top = [torch.linalg.eigvalsh(matrix)[-1].item() for matrix in (one.hessian, other.hessian)]
    scaled = [
        torch.linalg.eigvalsh(w.abs()[:, None] * h.hessian * w.abs())[-1].item()
        for h, w in ((one, theta), (other, moved))
    ]
    traces = [matrix.trace().item() for matrix in (one.hessian, other.hessian)]
    for gap, (there, here) in ((it.lambda_max, top), (it.adaptive, scaled), (it.trace, traces)):
        assert gap is not None
        assert gap.low is not None
        assert gap.high is not None
        slack = 50 * torch.finfo(dtype).eps * abs(there)  # the truth is that of float64 weights and data
        assert gap.low - slack <= here - there <= gap.high + slack
        assert gap.high - gap.low < 0.01 * abs(there)
    assert it.trace is not None
    assert it.trace.stderr == 0.0


def test_contributions_of_the_parts_are_those_of_dense_derivatives():
    """24 rows in two batches are cut into 24 parts of one row, or nearly so, whose means are weighted by their terms."""
    found = compare([objective(0), objective(1)], seed=0, settings=EXACTLY)
    for seed, point in enumerate(found.points):
        it = objective(seed)
        assert point.along is not None
        assert point.eigenpairs is not None
        assert point.eigenpairs.vectors is not None
        v = point.eigenpairs.vectors[:, 0]
        x, y = (torch.cat([batch[i] for batch in it.batches]) for i in range(2))
        each = [
            dense(it.model, lambda call, x=x[i : i + 1], y=y[i : i + 1]: F.cross_entropy(call(x), y)) for i in range(24)
        ]
        assert point.along.parts == 24
        assert list(point.losses.totals) == pytest.approx([one.loss for one in each], rel=1e-12)
        assert list(point.along.totals) == pytest.approx([(v @ one.hessian @ v).item() for one in each], rel=1e-9)
        assert point.along.value == pytest.approx(point.eigenpairs.values[0].item(), rel=1e-12)
    differences = torch.tensor(found.points[1].losses.totals) - torch.tensor(found.points[0].losses.totals)
    gap = found.differences[0].loss
    assert gap.stderr == pytest.approx(differences.std().item() / 24**0.5, rel=1e-6)  # the textbook's paired error
    assert gap.pairs == 24


def test_probes_are_those_of_both_points():
    """The samples are x'Hx of the very signs that the seed says, so that differences are x'(H - H')x."""
    found = compare([objective(0), objective(1)], probes=40, seed=5)
    hessians = [truth(objective(seed))[0].hessian for seed in (0, 1)]
    signs = torch.stack([seeds.signs(51, 5, "trace probe", i, dtype=torch.float64) for i in range(40)])
    for point, matrix in zip(found.points, hessians, strict=True):
        assert point.trace is not None
        assert point.trace.samples.tolist() == pytest.approx(((signs @ matrix) * signs).sum(1).tolist(), rel=1e-10)
    d = ((signs @ (hessians[1] - hessians[0])) * signs).sum(1)
    gap = found.differences[0].trace
    assert gap is not None
    assert (gap.value, gap.stderr) == (
        pytest.approx(d.mean().item(), rel=1e-9),
        pytest.approx(d.std().item() / 40**0.5, rel=1e-9),
    )
    assert gap.pairs == 40


# ---- paired errors against repetition --------------------------------------------------------------------------------


def test_paired_error_of_a_trace_against_many_repetitions():
    """Two near matrices: the difference scatters as its standard error says, far less than the two separate ones would let it."""
    one = rotated(strakos(80))
    other = one + 0.05 * rotated(strakos(80), seed=1)
    gaps = []
    for seed in range(200):
        a, b = (list(probed_trace_steps(DenseMap(m), 30, seed=seed, other=OtherArithmetic()))[-1] for m in (one, other))
        gaps.append(b.gap(a))
    difference = (other - one).trace().item()
    values = torch.tensor([gap.value for gap in gaps], dtype=torch.float64)
    stderrs = torch.tensor([gap.stderr for gap in gaps], dtype=torch.float64)
    unpaired = torch.tensor([gap.unpaired for gap in gaps], dtype=torch.float64)
    # a standard deviation of 200 values has a relative error of 1 / sqrt(400) = 5 %, a mean of them of 7 % of one
    assert stderrs.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.2)
    assert abs(values.mean().item() - difference) < 4 * values.std().item() / 200**0.5
    assert stderrs.mean().item() < 0.1 * unpaired.mean().item()
    covered = sum(gap.low <= difference <= gap.high for gap in gaps if gap.low is not None and gap.high is not None)
    assert covered >= 0.95 * 200 - 4 * (0.95 * 0.05 * 200) ** 0.5


@pytest.mark.parametrize("weights", [(1.0,) * 12, tuple(range(1, 13))])
def test_paired_error_over_parts_against_many_repetitions(weights: tuple[float, ...]):
    """Parts with a noise that both points share: the weighted mean of the difference scatters as its standard error says."""
    draws = torch.Generator().manual_seed(0)
    w = torch.tensor(weights, dtype=torch.float64)
    gaps = []
    for _ in range(1000):
        shared, own = (torch.randn(12, generator=draws, dtype=torch.float64) for _ in range(2))
        a = w * (1.0 + shared / w.sqrt())
        b = a + w * (0.3 + 0.1 * own / w.sqrt())
        one, other = (Contributions(tuple(t.tolist()), weights, sum(weights)) for t in (a, b))
        gaps.append(other.gap(one))
    values = torch.tensor([gap.value for gap in gaps], dtype=torch.float64)
    mean_square = sum(gap.stderr**2 for gap in gaps if gap.stderr is not None) / 1000
    # exact for equal weights, where 1000 variances are known to 5 %; with weights the linearised error is biased low by a few hundredths
    assert math.sqrt(mean_square) == pytest.approx(values.std().item(), rel=0.1)
    covered = sum(gap.low <= 0.3 <= gap.high for gap in gaps if gap.low is not None and gap.high is not None)
    assert 920 <= covered <= 980  # 950 +- 4 deviations of 7
    unpaired = sum(gap.unpaired**2 for gap in gaps if gap.unpaired is not None) / 1000
    assert math.sqrt(unpaired) > 5 * math.sqrt(mean_square)  # in truth sqrt(2) / 0.1 times


def test_a_sum_has_the_error_of_a_sum():
    """T = sum t_b: its error is the count times that of the mean, for parts of equal size."""
    totals = (1.0, 4.0, 2.0, 7.0)
    mean, total = Contributions(totals, (1.0,) * 4, 4.0), Contributions(totals, (1.0,) * 4, 1.0)
    assert (mean.stderr, total.stderr) == (
        pytest.approx(torch.tensor(totals).std().item() / 2),
        pytest.approx(torch.tensor(totals).std().item() * 2),
    )


def test_one_part_and_other_parts_have_no_error():
    one, two = Contributions((1.0,), (2.0,), 2.0), Contributions((1.0, 2.0), (1.0, 1.0), 2.0)
    assert one.gap(one) == Gap(0.0)
    assert two.gap(one).stderr is None
    assert Contributions((1.0, 0.0), (1.0, 0.0), 1.0).stderr is None  # the second part has no term
    assert one.gap(one).sign == 0
    assert one.gap(one).half_width is None


def test_traces_that_were_cut_short_are_paired_over_what_both_have():
    samples = torch.arange(5.0, dtype=torch.float64)
    long, short = ProbedTrace(2.0, 0.7, samples), ProbedTrace(1.0, 0.5, samples[:3] * 2)
    assert long.gap(short) == short.gap(long).__class__(-1.0, *_ends(-1.0, samples[:3] - 2 * samples[:3], 3))
    assert ProbedTrace(1.0, math.nan, samples[:1]).gap(long).stderr is None
    assert ProbedTrace(1.0, math.nan, samples[:1]).half_width == math.inf


def _ends(value: float, d: Tensor, m: int) -> tuple[float, float, float, float, int]:
    from curvkit.linalg import student

    stderr = d.std().item() / m**0.5
    half = student.half_width(stderr, m)
    samples = torch.arange(float(m), dtype=torch.float64)
    unpaired = ((samples.var() + (2 * samples).var()) / m).item() ** 0.5
    return value - half, value + half, stderr, unpaired, m


# ---- what a rescaling does -------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """A layer before a normalisation, and one after it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 6), norm, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def rescaled(kind: str, factor: float) -> Objective:
    """The same function for every factor; for BatchNorm in eval mode its running statistics are rescaled, too."""
    with seeded():
        model = Normalised(nn.BatchNorm1d(6) if kind == "BatchNorm" else nn.RMSNorm(6, eps=0.0)).double()
        model.inner.weight.data = model.inner.weight.data * factor
        model.inner.bias.data = model.inner.bias.data * factor
    if isinstance(model.norm, nn.BatchNorm1d):
        with torch.no_grad():
            assert model.norm.running_mean is not None
            assert model.norm.running_var is not None
            model.norm.running_mean.copy_(0.1 * factor * torch.arange(6.0, dtype=torch.float64))
            model.norm.running_var.fill_(factor**2 * (1.0 + model.norm.eps) - model.norm.eps)
    return Objective(model.eval(), F.cross_entropy, cut(ROWS, *examples(torch.float64)))


@pytest.mark.parametrize("kind", ["BatchNorm", "RMSNorm"])
def test_a_rescaling_changes_raw_sharpness_alone_and_is_not_called_flatter(kind: str):
    found = compare([rescaled(kind, 0.1), rescaled(kind, 10.0)], seed=0, settings=EXACTLY)
    a, b = found.points
    assert a.eigenpairs is not None
    assert b.eigenpairs is not None
    assert a.adaptive is not None
    assert b.adaptive is not None
    assert b.loss == pytest.approx(a.loss, rel=1e-12)
    assert a.eigenpairs.values.item() > 20 * b.eigenpairs.values.item()
    assert b.adaptive.values.item() == pytest.approx(a.adaptive.values.item(), rel=1e-6)
    verdict = found.verdicts[0]
    assert verdict.kind == "rescaled"
    assert "lambda_max" in verdict.text
    assert "times smaller" in verdict.text
    assert "differs by at most 0.0001 of itself" in verdict.text
    assert "a rescaling of the weights can explain this, so neither flatter nor sharper" in str(verdict)


def test_a_rescaling_in_closed_form():
    """L = (a b - 1)^2 at a b = 1: lambda_max = 2 (a^2 + b^2), while diag|w| H diag|w| = 2 [[1, 1], [1, 1]] whatever a is."""

    class Product(nn.Module):
        def __init__(self, a: float) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (a, 1.0 / a))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * self.b * x

    x = torch.ones(4, 1, dtype=torch.float64)
    found = compare([Objective(Product(a), F.mse_loss, [(x, x)]) for a in (1.0, 8.0)], seed=0)
    for point, a in zip(found.points, (1.0, 8.0), strict=True):
        assert point.eigenpairs is not None
        assert point.adaptive is not None
        assert point.eigenpairs.values.item() == pytest.approx(2 * (a**2 + a**-2), rel=1e-12)
        assert point.adaptive.values.item() == pytest.approx(4.0, rel=1e-12)
    assert found.verdicts[0].kind == "rescaled"


# ---- verdicts --------------------------------------------------------------------------------------------------------


class Wells(nn.Module):
    """Two minima, at +1 and -1, with curvatures 12 and 4, and |theta| = 1 at both."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))


def wells(theta: float, *, base: float = 1.0, tilt: float = 0.0, noise: float = 0.0, narrow: float = 0.5) -> Objective:
    """Loss base - tilt theta + s (theta^2 - 1)^2 (1 + narrow theta), s around 1; `noise` moves the tilt from example to example."""
    s = 1.0 + 0.1 * normal(40, seed=3)
    u = normal(40, seed=4)
    u = u - u.mean()

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        s, u = batch
        theta = model.get_parameter("theta")
        value = s * (theta**2 - 1) ** 2 * (1 + narrow * theta)
        return (base - (tilt + noise * u) * theta + value).sum(), len(s)

    return Objective(Wells(theta), BatchLoss(loss), [(s[i : i + 4], u[i : i + 4]) for i in range(0, 40, 4)])


def verdict(**options: Any) -> Comparison:
    return compare({"sharp": wells(1.0, **options), "flat": wells(-1.0, **options)}, seed=0)


def test_flatter_and_sharper_where_all_measures_say_so():
    found = verdict()
    assert found.verdicts[0].kind == "flatter"
    assert found.verdicts[0].text == (
        "flatter on this data, at equal loss: lambda_max 3 times smaller, trace 3 times smaller, adaptive sharpness 3 times smaller"
    )
    back = compare({"flat": wells(-1.0), "sharp": wells(1.0)}, seed=0)
    assert back.verdicts[0].kind == "sharper"
    assert "lambda_max 3 times as large" in back.verdicts[0].text
    assert repr(back).startswith("Comparison(against flat; sharp: sharper on this data")


def test_lower_loss_is_not_compared():
    found = verdict(tilt=0.1)  # 1 - 0.1 at +1, 1 + 0.1 at -1
    assert found.verdicts[0].kind == "loss differs"
    assert found.verdicts[0].text.startswith("higher loss, by 0.2 ± ")
    assert found.verdicts[0].text.endswith(" (18%), so curvature is not compared")


def test_one_percent_of_the_loss_counts_as_equal():
    assert verdict(tilt=0.004).verdicts[0].kind == "flatter"  # 0.8 %
    assert verdict(tilt=0.006).verdicts[0].kind == "loss differs"  # 1.2 %, and sure


def test_losses_that_the_data_cannot_tell_apart_are_equal_up_to_five_percent():
    assert verdict(tilt=0.02, noise=0.3).verdicts[0].kind == "flatter"  # 4 %, the error is 9 %
    found = verdict(tilt=0.04, noise=1.0).verdicts[0]  # 8 %
    assert found.kind == "undecided"
    assert "which these data cannot tell from nothing" in found.text
    assert found.text.endswith("nor call equal; curvature is not compared")


def test_tiny_losses_are_not_equal_because_they_are_tiny():
    """1e-8 and 2e-8: the difference is nothing beside a loss of 1, and half of these."""
    found = verdict(base=1.5e-8, tilt=0.5e-8)
    assert (found.points[0].loss, found.points[1].loss) == (pytest.approx(1e-8), pytest.approx(2e-8))
    assert found.verdicts[0].kind == "loss differs"


def test_no_share_of_a_negative_loss():
    found = verdict(base=-1.0, tilt=0.004).verdicts[0]
    assert found.kind == "loss differs"
    assert "where a loss is negative a share of it means nothing" in found.text
    assert verdict(base=-1.0).verdicts[0].kind == "flatter"  # the very same loss


def test_curvature_that_differs_less_than_the_losses_do_is_not_told():
    """0.8 % of loss and 0.6 % of curvature: the one may come with the other."""
    found = verdict(tilt=0.004, narrow=0.003).verdicts[0]
    assert found.kind == "alike"
    assert found.text.startswith(
        "at equal loss no difference in curvature that is sure: lambda_max 0.6% lower (no more than the losses differ), "
    )
    assert verdict(tilt=0.0, narrow=0.003).verdicts[0].kind == "flatter"


def test_what_the_data_leave_in_doubt_is_not_called_flatter():
    """The curvature of the examples scatters so much that the difference of its mean could be nothing."""
    s = normal(40, seed=3)
    s = 1.0 + 30.0 * (s - s.mean())

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        theta = model.get_parameter("theta")
        return (1.0 + batch * (theta**2 - 1) ** 2 * (1 + 0.5 * theta)).sum(), len(batch)

    data = [s[i : i + 4] for i in range(0, 40, 4)]
    found = compare([Objective(Wells(theta), BatchLoss(loss), data) for theta in (1.0, -1.0)], seed=0)
    assert found.verdicts[0].kind == "undecided"
    assert "over the parts of the data, which is within its doubt: not called flatter" in found.verdicts[0].text
    one = [torch.cat(data)]
    alone = compare([Objective(Wells(theta), BatchLoss(loss), one) for theta in (1.0, -1.0)], seed=0)
    assert alone.verdicts[0].kind == "flatter"
    assert alone.verdicts[0].text.endswith("; how far that depends on the data is not known")


def test_measures_that_disagree():
    """Raw curvature is lower at -1, but |theta|^2 times it is not: L = (theta - 1)^2 at 1, (theta + 3)^2 / 2 at -3."""

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        theta = model.get_parameter("theta")
        value = torch.where(theta > 0, (theta - 1) ** 2, (theta + 3) ** 2 / 2)
        return (1.0 + batch * value).sum(), len(batch)

    data = [torch.ones(3, dtype=torch.float64)] * 3
    found = compare([Objective(Wells(theta), BatchLoss(loss), data) for theta in (1.0, -3.0)], seed=0).verdicts[0]
    assert found.kind == "undecided"
    assert found.text == (
        "the measures do not all say so: lambda_max 50% lower, trace 50% lower, adaptive sharpness 4.5 times as large; neither "
        "flatter nor sharper"
    )


def test_nothing_is_said_of_a_search_that_has_not_converged():
    few = ComparisonSettings(search=lanczos.Settings(max_products=4))
    found = compare([objective(0), objective(0)], settings=few, seed=0)
    assert not found.converged
    moved = objective(0)
    with torch.no_grad():
        moved.tensors[0].mul_(1 + 1e-9)
    found = compare([objective(0), moved], settings=few, seed=0)
    assert found.verdicts[0].text == "nothing is said: a search for eigenvalues has not converged"


def test_what_a_search_can_have_missed_is_not_told():
    """0.2 % between two values, and 0.5 % up to the bound above which no eigenvalue lies."""
    moved = objective(0)
    with torch.no_grad():
        moved.tensors[2].mul_(1.005)
    found = compare([objective(0), moved], probes=2, seed=0)
    assert found.differences[0].lambda_max is not None
    assert found.differences[0].lambda_max.sign == 1
    assert found.verdicts[0].kind == "alike"
    assert "lambda_max 0.18% higher (unless an eigenvalue was missed), trace undecided (+" in found.verdicts[0].text


def test_a_share_of_numbers_of_both_signs():
    assert relative(Gap(3.0), -1.0, 2.0) is None
    assert relative(Gap(-1.0), -4.0, -3.0) == 0.25


# ---- the same twice, steps, surroundings -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_weights_twice_differ_by_nothing(dtype: torch.dtype):
    found = compare([objective(0, dtype, 40), objective(0, dtype, 40)], 3, seed=1)
    it = found.differences[0]
    for gap in (it.loss, it.lambda_max, it.data, it.trace, it.adaptive):
        assert gap is not None
        assert gap.value == 0.0
    assert it.loss.stderr == 0.0
    assert it.trace is not None
    assert it.trace.stderr == 0.0
    assert it.distance == 0.0
    assert it.overlap is not None
    assert it.overlap.value == pytest.approx(1.0, abs=1e-6)
    assert found.verdicts[0].kind == "same"
    assert found.points[0].trace is not None
    assert found.points[0].trace.probes == 60


def test_steps_bring_losses_first_and_a_verdict_last():
    results = list(compare_steps([wells(1.0), wells(-1.0)], seed=0))
    assert [len(it.points) for it in results[:2]] == [1, 2]
    assert [point.stage for point in results[1].points] == ["loss", "loss"]
    assert results[1].differences[0].loss.value == 0.0
    assert results[1].verdicts[0].text == "nothing is said: lambda_max, trace, adaptive sharpness are not known"
    stages = [result.points[1].stage for result in results[1:]]
    order = ("loss", "eigenvalues", "data", "adaptive", "trace", "complete")
    assert [order.index(stage) for stage in stages] == sorted(order.index(stage) for stage in stages)
    assert set(stages) == set(order)
    assert [result.complete for result in results[-2:]] == [False, True]
    assert results[-1].products == sum(point.products for point in results[-1].points)
    for partial in results:
        assert partial.to_dict()["complete"] is partial.complete  # nothing that is missing is in the way


def test_a_result_is_plain_values():
    found = verdict()
    document = found.to_dict()
    assert document["reference"] == "sharp"
    assert [point["name"] for point in document["points"]] == ["sharp", "flat"]
    assert document["differences"][0]["verdict"]["kind"] == "flatter"
    assert document["differences"][0]["overlap"] == {"value": 1.0, "chance": 1.0, "angles": [0.0]}
    assert document["points"][0]["eigenvalues"][0]["converged"] is True
    assert document["points"][0]["trace"]["exact"] is True
    assert document["points"][0]["adaptive_sharpness"]["value"] == pytest.approx(
        12 * document["points"][0]["data"]["value"] / 12
    )


def test_models_are_left_as_they_were():
    its = [objective(0, torch.float32), objective(1, torch.float32)]
    before = [surroundings(it.model) for it in its]
    compare(its, probes=2, seed=0)
    assert [surroundings(it.model) for it in its] == before


def test_without_the_doubt_from_data():
    found = compare([wells(1.0), wells(-1.0)], settings=ComparisonSettings(data_doubt=False), seed=0)
    assert found.differences[0].data is None
    assert found.verdicts[0].text.endswith("; how far that depends on the data is not known")


def test_differences_of_gradients():
    """s (theta^2 - 1)^2 has the second derivative 8 s at its minima."""
    found = compare(
        [wells(1.0, narrow=0.0), wells(-1.0, narrow=0.0)], settings=ComparisonSettings(rule="difference"), seed=0
    )
    s = 1.0 + 0.1 * normal(40, seed=3)
    for point in found.points:
        assert point.eigenpairs is not None
        assert point.along is not None
        assert point.eigenpairs.values.item() == pytest.approx(8 * s.mean().item(), rel=1e-7)
        assert list(point.along.totals) == pytest.approx([8 * part.sum().item() for part in s.split(4)], rel=1e-7)
    assert found.verdicts[0].kind == "alike"


def test_a_time_limit_leaves_fewer_probes():
    quick = ComparisonSettings(search=lanczos.Settings(max_seconds=1e-9))
    found = compare([objective(0, hidden=40), objective(1, hidden=40)], settings=quick, seed=0)
    assert found.points[0].trace is not None
    assert found.points[0].trace.probes == 2
    assert found.verdicts[0].kind in ("loss differs", "undecided")


def test_points_of_other_precision_are_raised_to_the_widest():
    found = compare([objective(0, torch.float32), objective(0, torch.float64)], seed=0, settings=EXACTLY, probes=2)
    assert [point.definition.dtype for point in found.points if point.definition is not None] == ["float64"] * 2


# ---- refusals ----------------------------------------------------------------------------------------------------------


def test_one_objective_is_refused():
    with pytest.raises(InvalidArgument, match="compare: 1 objective given, at least two are compared"):
        compare([objective(0)])
    with pytest.raises(InvalidArgument, match="compare: 0 objectives given"):
        compare([])


def test_other_parameters_are_refused_by_name():
    x, y = examples(torch.float64)
    with pytest.raises(
        UnknownObjective,
        match=r"compare: 2 has other parameters than 1: other shapes: inner.weight \[6, 4\] and \[7, 4\]",
    ):
        compare([objective(0), objective(0, hidden=7)])
    other = Objective(nn.Sequential(nn.Linear(4, 3)).double(), F.cross_entropy, cut(ROWS, x, y))
    with pytest.raises(
        UnknownObjective,
        match=r"only in 1: inner.weight, inner.bias, outer.weight and 1 more; only in 2: 0.weight, 0.bias. ",
    ):
        compare([objective(0), other])
    some = replace(objective(0), parameters=ParameterSpace.of(objective(0).model, "inner.*"))
    with pytest.raises(UnknownObjective, match=r"only in 1: outer.weight, outer.bias"):
        compare([objective(0), some])


def test_parameters_in_another_order_are_refused():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = net().double()
            self.outer, self.inner = one.outer, one.inner

        forward = Net.forward

    its = [objective(0), Objective(Turned(), F.cross_entropy, cut(ROWS, *examples(torch.float64)))]
    with pytest.raises(UnknownObjective, match="has other parameters than 1: in another order"):
        compare(its)


def test_other_losses_modes_and_data_are_refused():
    x, y = examples(torch.float64)
    smooth = Objective(net().double(), nn.CrossEntropyLoss(label_smoothing=0.1), cut(ROWS, x, y))
    with pytest.raises(
        UnknownObjective,
        match=r"2 is measured by another loss than 1: cross_entropy\(label_smoothing=0.1\) \(mean\), there",
    ):
        compare([objective(0), smooth])
    trained = Objective(net().double().train(), F.cross_entropy, cut(ROWS, x, y))
    evaluated = Objective(net().double().eval(), F.cross_entropy, cut(ROWS, x, y))
    with pytest.raises(UnknownObjective, match="the model of b is in eval mode, that of a in train mode"):
        compare({"a": trained, "b": evaluated})
    moved = Objective(net().double(), F.cross_entropy, cut(ROWS, x + 1, y))
    with pytest.raises(
        UnknownObjective,
        match="b is measured on other data than a: 24 examples in 2 batches, there 24 examples in 2 batches",
    ):
        compare({"a": objective(0), "b": moved})


def weighted(seed: int, values: list[float], dtype: torch.dtype = torch.float64) -> Objective:
    weight = torch.tensor(values, dtype=dtype)
    return Objective(net(seed=seed).to(dtype), nn.CrossEntropyLoss(weight=weight), cut(ROWS, *examples(dtype)))


def test_losses_with_other_tensors_are_refused():
    """Class weights are printed as "...", so that names alone would take them for one."""
    with pytest.raises(
        UnknownObjective, match="2 is measured by another loss than 1: its weight has other values. Numb"
    ):
        compare([weighted(0, [1.0, 1.0, 1.0]), weighted(0, [1.0, 1.0, 20.0])])
    thirds = [1 / 3, 0.5, 1.0]  # those of float32 are no others
    found = compare([weighted(0, thirds, torch.float32), weighted(0, thirds)], probes=2, seed=0)
    assert found.points[1].notes == ()


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return self.get_buffer("factor") * F.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def times(factor: float) -> Any:
    def scaled(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return factor * F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    return scaled


def test_losses_of_the_users_own_are_told_apart_as_far_as_can_be_seen():
    data = cut(ROWS, *examples(torch.float64))

    def notes(*losses: Any) -> tuple[str, ...]:
        its = [Objective(net(seed=seed).double(), loss, data) for seed, loss in enumerate(losses)]
        *_, found = _first(compare_steps(its), 2)
        assert found.points[0].notes == ()
        return found.points[1].notes

    said = (
        "the loss scaled is a function of its own at each point: whether it is the reference's cannot be seen from here"
    )
    assert notes(times(2.0), times(2.0)) == ()
    assert notes(times(2.0), times(3.0)) == (said,)
    assert notes(Scale(2.0), Scale(2.0)) == ()
    with pytest.raises(
        UnknownObjective, match="another loss than 1: the factor of its Scale has other values. Numbers"
    ):
        notes(Scale(2.0), Scale(3.0))


def endless() -> Any:
    def again(count: int) -> Any:
        return again(count - 1) if count else 0.0

    return again


def unfilled() -> Any:
    def never() -> Any:
        return value

    if math.isnan(0.0):
        value = 1.0
    return never


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        ([1, "a"], [1, "a"], True),
        ([1], [1, 2], False),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, False),
        (torch.ones(2), torch.ones(3), False),
        (functools.partial(times, 2.0), functools.partial(times, 2.0), True),
        (functools.partial(times, 2.0), functools.partial(times, 3.0), False),
        (Scale(1.0).forward, Scale(1.0).forward, True),
        (Scale(1.0).forward, Scale(2.0).forward, False),
        (nn.Sequential(nn.ReLU(), Scale(1.0)), nn.Sequential(nn.ReLU(), Scale(1.0)), True),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()), False),
        (nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=2.0), False),
        (Scale(1.0), 1.0, False),
        (endless(), endless(), False),
        (unfilled(), unfilled(), False),
        (object(), object(), False),
    ],
)
def test_what_is_made_of_the_same_parts_is_alike(one: Any, other: Any, same: bool):
    assert alike(one, other) is same
    assert alike(other, one) is same


def test_settings_are_checked():
    with pytest.raises(InvalidArgument, match="probes=1 must be at least 2"):
        ComparisonSettings(probes=1)
    with pytest.raises(InvalidArgument, match="which='both' is not compared"):
        ComparisonSettings(search=lanczos.Settings(num=2, which="both"))


def test_what_is_not_finite_is_refused_before_anything_long():
    bad = objective(1)
    with torch.no_grad():
        bad.tensors[0][0, 0] = math.nan
    steps = compare_steps({"a": objective(0), "b": bad})
    next(steps)  # the loss of a
    with pytest.raises(CurvkitError, match=r"the parameter 'inner.weight' has NaN .* This was found at b\."):
        next(steps)

    def logarithm(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return (batch * model.get_parameter("theta").log()).sum(), len(batch)

    its = [Objective(Wells(theta), BatchLoss(logarithm), [torch.ones(2, dtype=torch.float64)]) for theta in (1.0, -1.0)]
    with pytest.raises(CurvkitError, match=r"compare: the loss is nan on part 0 of the data.* This was found at 2\."):
        compare(its, settings=ComparisonSettings(preflight=False))


def test_another_device_is_refused():
    there = Objective(net().double().to("meta"), F.cross_entropy, cut(ROWS, *examples(torch.float64)))
    with pytest.raises(InvalidArgument, match=r"lie on different devices \(1 on cpu, 2 on meta\)"):
        compare([objective(0), there])


def test_a_model_that_is_printed_otherwise_is_noted():
    class Other(Net):
        pass

    other = Objective(Other().double(), F.cross_entropy, cut(ROWS, *examples(torch.float64)))
    *_, found = _first(compare_steps([objective(0), other]), 2)
    assert found.points[0].notes == ()
    assert (
        found.points[1].notes[0].startswith("the model is printed otherwise than the reference's: Other(, there Net(.")
    )


def test_targets_that_are_ignored_leave_their_part_out():
    x, y = normal(12, 4), classes(12, num=3)
    y[4:8] = -100
    its = [Objective(net(seed=seed).double(), F.cross_entropy, cut((4, 4, 4), x, y)) for seed in (0, 1)]
    it = compare(its, seed=0).differences[0]
    assert it.loss.pairs == 8
    assert it.data is not None
    assert it.data.pairs == 8
    kept = [Objective(net(seed=seed).double(), F.cross_entropy, cut((4, 4), x[y >= 0], y[y >= 0])) for seed in (0, 1)]
    same = compare(kept, seed=0).differences[0]
    assert it.loss.stderr == pytest.approx(same.loss.stderr, rel=1e-9)
    assert same.data is not None
    assert it.data.stderr == pytest.approx(same.data.stderr, rel=1e-2)  # of eigenvectors within a tolerance of 1e-3


def test_a_loss_that_is_a_sum_has_the_same_share_of_doubt():
    x, y = examples(torch.float64)
    its = [
        [
            Objective(net(seed=seed).double(), nn.CrossEntropyLoss(reduction=reduction), cut(ROWS, x, y))
            for seed in (0, 1)
        ]
        for reduction in ("mean", "sum")
    ]
    mean, total = (compare(pair, seed=0, settings=EXACTLY).differences[0] for pair in its)
    assert total.loss.value == pytest.approx(24 * mean.loss.value, rel=1e-9)
    assert total.loss.stderr == pytest.approx(24 * (mean.loss.stderr or 0.0), rel=1e-9)
    assert total.data is not None
    assert mean.data is not None
    assert total.data.stderr == pytest.approx(24 * (mean.data.stderr or 0.0), rel=1e-6)


def _first(steps: Iterator[Comparison], count: int) -> list[Comparison]:
    return [next(steps) for _ in range(count)]
