"""The trace from signs per example: unbiased, with the doubt that it states, chosen where it pays, kept, and verified."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli.main import run
from oracles import classes, cut, dense, normal, seeded, surroundings
from safetensors.torch import load_file, save_file
from samples import TRAIN
from test_ggn import dense_ggn
from test_journal import Memory
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import ExampleHutchinson
from curvkit.estimators.recordings.coverage import coverage
from curvkit.estimators.recordings.scrutiny import Scrutiny
from curvkit.linalg import DenseMap, stopping, student
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.certificate import AS_COMPUTED
from curvkit.linalg.hutchinson import Draws
from curvkit.linalg.trace_check import Witness
from curvkit.measures import TraceSettings, forecast_trace, trace, trace_steps
from curvkit.measures.example_probes import ExampleProbes
from curvkit.measures.example_trace import ExampleTrace
from curvkit.measures.example_way import chosen
from curvkit.measures.restored import trace_of
from curvkit.measures.verified_examples import sampled_again
from curvkit.measures.verified_trace import verify_trace
from curvkit.operators import Hessian
from curvkit.results.journal import NOTHING_KEPT

ROWS = (13, 27)
METHODS = ("example-hutchinson", "controlled")


class Tied(nn.Module):
    """A tied table, attention without rules, positions, and a parameter that enters a call without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.places, self.odd = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) + self.places
        h = torch.tanh(self.inner(h + self.attention(h, h, h, need_weights=False)[0]))
        h = h + 0.1 * torch.einsum("npd,de->npe", h, self.odd)
        return F.linear(h.mean(1), self.table.weight)


def layers(*, hidden: int = 8, smooth: bool = True) -> nn.Module:
    first = [nn.Linear(6, hidden), nn.Tanh() if smooth else nn.ReLU(), nn.LayerNorm(hidden)]
    return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def tokens(count: int) -> Tensor:
    return torch.randint(0, 7, (count, 4), generator=torch.Generator().manual_seed(5))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor, int]]] = {
    "one position": lambda: (layers(), normal(sum(ROWS), 6, seed=1), 3),
    "tied, shared and without rules": lambda: (Tied(), tokens(sum(ROWS)), 7),
    "convolution": lambda: (convolution(), normal(sum(ROWS), 6, seed=1), 3),
}


def made(name: str = "one position") -> tuple[Objective, Tensor, Tensor]:
    """An objective in float64, and its data."""
    with seeded(3):
        model, x, num = NETS[name]()
    y = classes(len(x), num=num, seed=2)
    return Objective(model.double(), F.cross_entropy, cut(ROWS, x, y)), x, y


def part_sums(objective: Objective, H: Tensor) -> Tensor:
    return torch.stack([piece.sum() for piece in H.diagonal().split([e.numel for e in objective.parameters.entries])])


def residual_of(objective: Objective, x: Tensor, y: Tensor) -> Tensor:
    """Rung 2: H - G is the Hessian of <dL/dz held fixed, z>."""
    z = objective.model(x).detach().requires_grad_()
    (u,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    return dense(objective.model, lambda call: (u * call(x)).sum()).hessian


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("residual", "parts"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", NETS)
def test_samples_are_unbiased(name: str, residual: bool, parts: int):
    """Rung 2 and 5: dense float64 in the mean over 100 samples; one in 10^5 lies beyond 4.5 standard errors, of at most 48 here."""
    objective, x, y = made(name)
    H = (
        residual_of(objective, x, y)
        if residual
        else dense(objective.model, lambda call: F.cross_entropy(call(x), y)).hessian
    )
    truth = part_sums(objective, H)
    source = ExampleProbes(objective.cut(parts)[0], coverage(objective), residual=residual, seed=0, keep=True)
    rows = torch.stack([source.row(i) for i in range(100)])
    off = (rows.mean(0) - truth).abs()
    assert (off <= 4.5 * rows.std(0) / 100**0.5 + 1e-12).all()
    assert rows.std(0)[0] > 0


@pytest.mark.parametrize("name", NETS)
def test_graphs_that_are_kept_give_the_same_bits(name: str):
    objective, _, _ = made(name)
    covered = coverage(objective)
    kept, anew = (ExampleProbes(objective, covered, residual=False, seed=7, keep=keep) for keep in (True, False))
    for index in (0, 3):
        assert torch.equal(kept.row(index), anew.row(index))


def test_a_piecewise_linear_net_leaves_nothing_to_sample():
    """Signs at the outputs of layers with one position: <u, z> is linear in each step of eps, so that s = 0."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    x = normal(40, 6, seed=1)
    objective = Objective(model, F.cross_entropy, [(x, classes(40, num=3, seed=2))])
    source = ExampleProbes(objective, coverage(objective), residual=True, seed=0, keep=False)
    assert source.row(0).abs().max().item() == 0.0


def test_a_layer_with_one_position_has_less_variance_than_signs_at_its_inputs_give():
    """Rung 1: linear regression on +-1 inputs, z = Wx: |x|^2 a'Ba with B = 2 / N I is the trace itself; (a b'x)^2 is not."""
    x = torch.where(normal(64, 6, seed=1) > 0, 1.0, -1.0).double()
    model = nn.Linear(6, 2, bias=False).double()
    objective = Objective(model, F.mse_loss, [(x, x[:, :2])])
    source = ExampleProbes(objective, coverage(objective), residual=False, seed=0, keep=True)
    rows = torch.stack([source.row(i) for i in range(5)])
    assert rows[:, 0] == pytest.approx(torch.full((5,), 12.0).double(), rel=1e-12)  # tr = 2 * 6 * 2 outputs / 2


class TimeFirst(nn.Module):
    """Layers on [T, N, C], whose rules cannot tell time from examples where N = T."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).sum(0)


def time_first() -> tuple[Objective, Tensor, Tensor]:
    with seeded(3):
        model = TimeFirst().double()
    x, y = normal(40 * 5, 3, seed=1).view(40, 5, 3), classes(40, num=3, seed=2)
    return Objective(model, F.cross_entropy, [(x, y)]), x, y


@pytest.mark.parametrize("parts", [pytest.param(7, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("method", METHODS)
def test_rules_are_checked_on_parts(method: Any, parts: int):
    """Rung 2 and 5: 40 rows in 8 parts of 5, which is T, or in 7 of 6 rows and, last, 4; as in `test_samples_are_unbiased`."""
    objective, x, y = time_first()
    H = dense(objective.model, lambda call: F.cross_entropy(call(x), y)).hessian
    plan = replace(Hessian(objective).plan, micro_batches=parts)
    way = chosen(objective, linalg_trace.Settings(method), Hessian(objective).plan)  # of the whole batch
    assert way is not None
    it = ExampleTrace(objective, plan, way, 0)
    G = dense_ggn(objective.model, F.cross_entropy, [(x, y)]) if method == "controlled" else torch.zeros_like(H)
    known = it.known(NOTHING_KEPT)
    assert (known - part_sums(objective, G)).abs().max().item() <= 1e-12 * G.abs().sum().item()
    source = it.probes(keep=True)
    rows = torch.stack([source.row(i) for i in range(100)])
    off = (rows.mean(0) - part_sums(objective, H - G)).abs()
    assert (off <= 4.5 * rows.std(0) / 100**0.5 + 1e-12).all()
    rounding = it.rounding(NOTHING_KEPT)
    assert rounding is not None
    assert rounding <= 1e-12  # float64 on both sides


def test_samples_in_parts_are_verified():
    """In 8 parts of T rows; of rows that are coupled, parts belong to another function."""
    objective, x, y = time_first()
    whole = trace(objective, method="controlled", tolerance=0.9, max_products=30, seed=5)
    plan = replace(whole.plan, micro_batches=8)
    way = chosen(objective, linalg_trace.Settings("controlled"), plan)
    assert way is not None
    assert way.parts == 8
    it, stated = ExampleTrace(objective, plan, way, 5), replace(whole, plan=plan)
    known = it.known(NOTHING_KEPT)
    source = it.probes(keep=True)
    tensors = torch.stack([source.row(i) for i in range(3)]), known
    checks = list(sampled_again(Hessian(objective), stated, tensors, 3))
    assert [(check.what, check.holds) for check in checks] == [
        ("exact part", True),
        *((f"probe {i}", True) for i in (1, 2, 3)),
    ]
    assert not all(check.holds for check in sampled_again(Hessian(objective), whole, tensors, 3))  # other signs, uncut
    coupled = nn.Sequential(nn.Flatten(), nn.Softmax(0), nn.Linear(15, 3)).double()
    with pytest.raises(
        UnsupportedModel,
        match="trace: the samples were taken with each batch in 8 parts, and the rows of a batch are not shown to be examples of their own",
    ):
        list(sampled_again(Hessian(Objective(coupled, F.cross_entropy, [(x, y)])), stated, tensors, 3))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_of_one_cut_is_not_taken_for_another(method: Any):
    """Memory may run out in one run and not when it is gone on with."""
    objective, *_ = time_first()
    journal, plan = Memory(), Hessian(objective).plan
    for parts in (8, 2):
        way = chosen(objective, linalg_trace.Settings(method), replace(plan, micro_batches=parts))
        assert way is not None
        it = ExampleTrace(objective, replace(plan, micro_batches=parts), way, 0)
        kept, anew = (itertools.islice(it.told(each, asked=True), 3) for each in (journal, NOTHING_KEPT))
        assert [each[0].value for each in kept] == pytest.approx([each[0].value for each in anew], rel=1e-12)
        journal = journal.again()


def test_a_fault_of_the_program_is_no_reason_for_products(monkeypatch: pytest.MonkeyPatch):
    objective, *_ = made()

    def faulty(*_: Any) -> Any:
        raise AttributeError("a fault")

    monkeypatch.setattr(Scrutiny, "look", faulty)
    with pytest.raises(AttributeError, match="a fault"):
        trace(objective, tolerance=0.9, max_products=31, seed=0)
    with seeded(0):
        rectified = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    piecewise = Objective(rectified, F.cross_entropy, objective.batches)
    with pytest.raises(AttributeError, match="a fault"):
        trace(piecewise, method="exact", seed=0)


# ---- the measurement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_trace_and_shares(name: str, method: Any):
    """Rung 2: dense float64; sampled values within 5 of their standard errors."""
    objective, x, y = made(name)
    truth = part_sums(objective, dense(objective.model, lambda call: F.cross_entropy(call(x), y)).hessian)
    before = surroundings(objective.model)
    found = trace(objective, method=method, tolerance=0.5, max_products=60, seed=1)
    assert surroundings(objective.model) == before
    assert found.estimate.method == method
    assert abs(found.value - truth.sum().item()) <= 5 * found.estimate.stderr
    for share, true in zip(found.parameters, truth.tolist(), strict=True):
        assert abs(share.value - true) <= 5 * share.stderr + 1e-12
    assert sum(share.value for share in found.layers) == pytest.approx(found.value, rel=1e-9)
    parts = found.estimate.parts
    assert parts is not None
    assert bool(parts.known.any()) is (method == "controlled")
    assert found.estimate.reason == "as asked"


def test_the_control_takes_the_variance_of_the_loss_out():
    objective, _, _ = made()
    plain, controlled = (trace(objective, method=m, tolerance=0.9, max_products=30, seed=1) for m in METHODS)
    assert controlled.estimate.stderr < plain.estimate.stderr
    assert plain.gradients is not None
    assert controlled.gradients is not None
    assert plain.gradients == pytest.approx(30 * 1.0 + 3 * 2.0)  # probes on a kept graph, and three products that check
    assert controlled.gradients > plain.gradients


def test_auto_takes_what_pays():
    objective, x, y = made()
    found = trace(objective, tolerance=0.3, seed=0)
    assert (found.estimate.method, found.estimate.converged) == ("controlled", True)
    assert found.estimate.reason.startswith(
        "40 examples with signs of their own, so that a probe averages over them, and the GGN part"
    )
    no_factor = Objective(objective.model, F.smooth_l1_loss, [(x, normal(40, 3, seed=4))])
    assert trace(no_factor, tolerance=0.5, max_products=40, seed=0).estimate.method == "example-hutchinson"
    few = Objective(objective.model, F.cross_entropy, [(x[:31], y[:31])])
    assert trace(few, tolerance=0.9, max_products=31, seed=0).estimate.method not in METHODS
    whole = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    unknown = Objective(objective.model, whole, [(x, y)])
    assert trace(unknown, tolerance=0.9, max_products=31, seed=0).estimate.method not in METHODS
    with seeded(0):
        wide = nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 60, 3), nn.Tanh(), nn.Flatten(), nn.Linear(240, 1)
        ).double()
    positions = Objective(wide, F.mse_loss, [(x, x[:, :1])])  # 240 of 481 parameters are those of a convolution
    assert trace(positions, tolerance=0.9, max_products=31, seed=0).estimate.method not in METHODS
    odd, *_ = made("tied, shared and without rules")  # 35 + 30 + 20 of 230 parameters have rules
    assert trace(odd, tolerance=0.9, max_products=31, seed=0).estimate.method not in METHODS


def test_auto_goes_back_to_products_with_a_note():
    """A class of negative weight that the first rows do not have: H_out has no real factor, which the exact part meets late."""
    x, y = normal(40, 6, seed=1), classes(40, num=2, seed=2)
    y[20] = 2
    weight = torch.tensor([1.0, 1.0, -0.1], dtype=torch.float64)
    with seeded(3):
        objective = Objective(layers().double(), nn.CrossEntropyLoss(weight), [(x, y)])
    found = trace(objective, tolerance=0.9, max_products=31, seed=0)
    assert found.estimate.method not in METHODS
    said = "signs per example could not be used, and products were: UnsupportedModel: OutputHessian: a weight of the loss is negative"
    assert any(said in note for note in found.notes)
    with pytest.raises(UnsupportedModel, match="a weight of the loss is negative"):
        trace(objective, method="controlled", seed=0)
    assert trace(objective, method="example-hutchinson", tolerance=0.9, max_products=60, seed=0).estimate.converged


def test_time_ends_it():
    objective, *_ = made()
    found = trace(
        objective, settings=TraceSettings(linalg_trace.Settings("controlled", 1e-6, max_seconds=1e-6)), seed=0
    )
    assert found.stage == "complete"
    assert not found.estimate.converged
    assert found.estimate.probes == 1


def test_rounding_is_measured_and_products_are_checked():
    objective, *_ = made()
    single = Objective(
        objective.model.float(), F.cross_entropy, [tuple(map(_single, batch)) for batch in objective.batches]
    )
    found = trace(single, method="controlled", tolerance=0.5, seed=0).estimate
    assert found.rounding is not None
    assert found.check is not None
    # eps is 1.2e-7, and sums of some hundred terms round by a few of it
    assert 0 < found.rounding < 1e-4 * abs(found.value)
    assert found.check.asymmetry <= found.check.asymmetry_limit
    assert found.half_width > found.rounding


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.is_floating_point else tensor


def test_forecast_is_that_of_the_run():
    objective, *_ = made()
    settings = TraceSettings(linalg_trace.Settings("example-hutchinson", tolerance=0.1))
    found = trace(objective, settings=settings, seed=0)
    assert found.gradients is not None
    predicted = forecast_trace(objective, settings)
    spent = predicted.products * predicted.gradients_per_product
    assert 0.3 * found.gradients < spent < 3 * found.gradients


def test_refusals():
    objective, x, y = made()
    with pytest.raises(
        InvalidArgument,
        match=r"method='controlled' differentiates twice, example by example, and rule='difference' takes",
    ):
        trace(objective, method="controlled", settings=TraceSettings(rule="difference"))
    with pytest.raises(InvalidArgument, match="method='controlled' differentiates twice"):
        forecast_trace(objective, TraceSettings(linalg_trace.Settings(method="controlled"), rule="difference"))
    with pytest.raises(
        InvalidArgument, match="samples the examples of a loss, and a matrix has none. Use curvkit.measures.trace"
    ):
        linalg_trace.estimate(DenseMap(torch.eye(70)), method="example-hutchinson")
    with pytest.raises(UnsupportedModel, match="the loss smooth_l1_loss|no factor S of the output Hessian"):
        trace(Objective(objective.model, F.smooth_l1_loss, [(x, normal(40, 3, seed=4))]), method="controlled", seed=0)
    coupled = nn.Sequential(nn.Linear(6, 8), nn.Softmax(0), nn.Linear(8, 3)).double()
    with pytest.raises(UnsupportedModel, match="something couples them"):
        trace(Objective(coupled, F.cross_entropy, [(x, y)]), method="example-hutchinson", seed=0)
    with torch.no_grad():
        next(objective.model.parameters()).fill_(math.inf)
    with pytest.raises(CurvkitError):
        trace(objective, method="example-hutchinson", seed=0)


# ---- kept, gone on with, verified ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_gone_on_with_has_the_same_bits(method: Any):
    def begun(journal: Any) -> Any:
        objective, *_ = made()
        single = Objective(
            objective.model.float(), F.cross_entropy, [tuple(map(_single, batch)) for batch in objective.batches]
        )
        settings = TraceSettings(linalg_trace.Settings(method, tolerance=1e-6, max_products=33), preflight=False)
        return trace_steps(single, settings, seed=5, journal=journal)

    *_, whole = begun(NOTHING_KEPT)
    journal = Memory()
    for _ in itertools.islice(begun(journal), 12):
        pass
    later = journal.again()
    *_, found = begun(later)
    assert repr(found.estimate) == repr(whole.estimate)
    assert torch.equal(found.estimate.parts.samples, whole.estimate.parts.samples)
    assert found.layers == whole.layers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a result of each method, as commands write them."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        Path("train.py").write_text(TRAIN)
        torch.save(_net().state_dict(), "ckpt.pt")
        for method in METHODS:
            how = ("--method", method, "--max-products", "34", "--seed", "0", "-o", method, "-q")
            assert run(["trace", "ckpt.pt", "--objective", "train.py:objective", "--set", "hidden=12", *how]) == 0
    return folder


def _net() -> nn.Module:
    from samples import net

    return net(12)


def verified(
    folder: Path, method: str, change: Callable[[dict[str, Any], dict[str, Tensor]], None] | None = None
) -> set[str]:
    """What differs."""
    from samples import examples

    document = json.loads((folder / method / "trace.json").read_text())
    tensors = load_file(folder / method / "trace.samples.safetensors")
    if change is not None:
        change(document, tensors)
    x, y = examples()
    objective = Objective(_net().eval(), F.cross_entropy, [(x[:10], y[:10]), (x[10:], y[10:])])
    return {
        check.what for check in verify_trace(objective, document, tensors, TraceSettings(), 3) if check.holds is False
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_true_result_holds_and_a_changed_one_does_not(written: Path, method: str):
    assert verified(written, method) == set()

    def shifted(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["samples"] *= 1.01

    differing = verified(written, method, shifted)
    assert "trace" in differing
    assert any(what.startswith("probe ") for what in differing)


def test_a_changed_exact_part_is_found(written: Path):
    def moved(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["known"][0] += 0.1

    assert "exact part" in verified(written, "controlled", moved)
    assert "exact part" in verified(written, "example-hutchinson", moved)


def test_a_cut_that_cannot_be_is_refused(written: Path):
    def cut_finely(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["record"]["plan"]["micro_batches"] = 10**9

    with pytest.raises(ValueError, match="micro_batches=1000000000 is no number of parts of 24 examples"):
        verified(written, "controlled", cut_finely)


def test_the_command(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`curvkit verify`, `--resume` of a complete result, and what is printed."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    target = ("ckpt.pt", "--objective", "train.py:objective", "--set", "hidden=12")
    with torch.random.fork_rng(devices=[]):
        assert run(["verify", "controlled/trace.json", *target, "-q"]) == 0
        how = ("--method", "controlled", "--max-products", "34", "-o", "controlled", "-q", "--plain", "--resume")
        assert run(["trace", *target, *how]) == 0
    out = capsys.readouterr().out
    assert "method\tcontrolled, 34 probes (as asked)" in out or "method\tcontrolled, 30 probes (as asked)" in out
    assert " gradients · " in out
    document = json.loads(Path("controlled/trace.json").read_text())
    assert trace_of(document).gradients == document["result"]["gradients"]
    held = load_file("controlled/trace.samples.safetensors")
    held["samples"][0] += 1.0
    save_file(held, "controlled/trace.samples.safetensors")
    with torch.random.fork_rng(devices=[]):
        assert run(["verify", "controlled/trace.json", *target, "-q"]) == 1


# ---- the rule --------------------------------------------------------------------------------------------------------


LOOKS = [m for m in range(1, 1500) if student.is_due(m, m - 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tolerance"), [("example-hutchinson", 0.04), ("controlled", 0.03)])
def test_stopped_intervals_hold_the_truth(method: str, tolerance: float):
    """Rung 5: the rule on samples drawn from 1500 true ones, whose mean is the truth; 2000 runs, standard error 0.005.

    Intervals are wider than Student's for few probes, so that more than 95 % may hold.
    """
    objective, *_ = made()
    source = ExampleProbes(objective, coverage(objective), residual=method == "controlled", seed=0, keep=True)
    pool = torch.stack([source.row(i).sum() for i in range(1500)])
    pool += 2.0 if method == "controlled" else 0.0  # as much as the exact part, about
    truth, draw = pool.mean().item(), torch.Generator().manual_seed(1)
    settings, held, probes = linalg_trace.Settings(tolerance=tolerance, max_products=LOOKS[-1]), 0, 0
    for _ in range(2000):
        drawn = pool[torch.randint(len(pool), (LOOKS[-1],), generator=draw)]

        def told(drawn: Tensor = drawn) -> Any:
            for m in LOOKS:
                value, stderr = drawn[:m].mean().item(), drawn[:m].std().item() / m**0.5
                yield Draws(value, stderr, m, m, 1), method, "as asked"

        *_, found = stopping.stopped(told(), settings, Witness(DenseMap(torch.eye(2))), AS_COMPUTED, lambda: 0.0)
        held += found.low <= truth <= found.high
        probes += found.probes
    assert 0.92 <= held / 2000 <= 0.985, (held / 2000, probes / 2000)


# ---- the variance of the diagonal ------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Each example has five positions, so that its signs are rank-one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x))).mean(1)


def test_variance_of_a_diagonal_entry():
    """Rung 2 and 5: Var d_j = sum_n sum_(k != j) (H_n)_jk^2 / (m W^2) with dense Hessians of single examples, also for rank-one signs.

    A relative standard deviation from m = 300 normal samples has the error 1 / sqrt(2 m) = 4 %, of heavier tails some times that; the root
    of the mean of all 26 squared ratios is nearer to 1.
    """
    with seeded(1):
        model = Shared().double()
    x, y = normal(12 * 5, 3, seed=1).view(12, 5, 3), classes(12, num=2, seed=2)
    found = ExampleHutchinson(num_probes=300).estimate(Objective(model, F.cross_entropy, [(x, y)]), seed=0)
    single = [
        dense(model, lambda call, n=n: F.cross_entropy(call(x[n : n + 1]), y[n : n + 1])).hessian for n in range(12)
    ]
    H = torch.stack(single)
    off = H.square().sum(2) - H.diagonal(dim1=1, dim2=2).square()
    predicted = (off.sum(0) / 300).sqrt() / 12
    assert found.stderr is not None
    measured = torch.cat([error.flatten() for error in found.stderr.values()])
    ratio = measured / predicted
    assert ratio.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.07)
    assert ((ratio - 1).abs() < 0.35).all()


def test_variance_of_a_sum_over_a_matrix_with_rank_one_signs():
    """Rung 1: formula (2) of docs/concepts/diagonals.md against all 2^5 signs of a 2 x 3 matrix."""
    A = normal(6, 6, seed=3)
    H = (A + A.T).view(2, 3, 2, 3)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    V = (every[:, :2, None] * every[:, None, 2:]).flatten(1)
    s = torch.einsum("sj,jk,sk->s", V, H.reshape(6, 6), V)
    rows, columns = [(0, 1)], [(0, 1), (0, 2), (1, 2)]
    corners = sum((H[o, i, p, k] + H[o, k, p, i]) ** 2 for o, p in rows for i, k in columns)
    along = sum(H[:, i, :, k].diagonal().sum() ** 2 for i, k in columns)
    across = sum(H[o, :, p, :].diagonal().sum() ** 2 for o, p in rows)
    predicted = 4 * (corners + along + across)
    assert s.var(unbiased=False).item() == pytest.approx(float(predicted), rel=1e-12)
    assert s.mean().item() == pytest.approx(H.reshape(6, 6).trace().item(), rel=1e-12)
