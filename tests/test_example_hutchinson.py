"""Signs per example: inside training, for the residual H - G, and against dense Hessians."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import bits, classes, dense, normal, seeded, surroundings
from test_estimators import CASES, check_unbiased, flat, hessian_diagonal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit import Objective
from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.estimators import ExampleHutchinson, interval
from curvkit.operators import Residual

N = 6


def network(*, dropout: float = 0.0) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, 3)).double()


X, Y = normal(N, 4), classes(N, num=3, seed=2)


# ---- the residual ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutions", "tied", "functional"])
def test_the_residual_is_unbiased(name: str):
    """Rung 5, against products with the residual, which are tested against dense matrices on their own."""
    objective = CASES[name].objective((2, 4))
    R = Residual(objective)
    truth = R.matmat(torch.eye(R.n, dtype=R.dtype)).diagonal()
    found = ExampleHutchinson(num_probes=100).estimate_residual(objective, seed=6)
    check_unbiased(found, truth)
    assert found.matrix == "hessian - ggn"


def test_signs_at_outputs_are_exact_where_curvature_is_by_entries():
    """Rung 1: with one hidden layer of tanh, H - G in the inputs of tanh is diagonal, so that signs there leave no noise."""
    objective = CASES["mlp"].objective((2, 4))
    R = Residual(objective)
    truth = R.matmat(torch.eye(R.n, dtype=R.dtype)).diagonal()
    found = flat(ExampleHutchinson().estimate_residual(objective, seed=6).values)
    assert truth.abs().max() > 0.1
    assert (found - truth).abs().max() < 1e-14


def test_a_linear_model_has_no_residual():
    """Rung 1: H = G for softmax regression."""
    objective = Objective(nn.Linear(4, 3).double(), F.cross_entropy, [(X, Y)])
    found = ExampleHutchinson(num_probes=3).estimate_residual(objective, seed=0)
    assert flat(found.values).abs().max() == 0.0


# ---- in training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "convolutions", "language", "tied", "time first", "flattened"])
def test_a_recording_gives_what_an_estimate_gives(name: str):
    case, estimator = CASES[name], ExampleHutchinson(num_probes=2)
    objective = case.objective()
    before = surroundings(objective.model)
    with estimator.recording(objective.model) as recording:
        outputs = objective.model(case.x)
    found = estimator.from_recording(recording, outputs, case.y, loss=case.loss, seed=3)
    assert surroundings(objective.model) == before
    truth = estimator.estimate(objective, seed=3)
    assert bits(flat(found.values)) == bits(flat(truth.values))
    assert (found.matrix, found.samples, found.seed, list(found.values)) == ("hessian", 2, 3, list(truth.values))


def test_a_recorded_step_is_the_step():
    """Dropout in training mode: outputs and gradients bit for bit, and nothing else is moved."""
    model, other = network(dropout=0.5), network(dropout=0.5)
    estimator, found = ExampleHutchinson(), []
    for it, recorded in ((model, True), (other, False)):
        with seeded(7):
            if recorded:
                with estimator.recording(it) as recording:
                    outputs = it(X)
                found.append(estimator.from_recording(recording, outputs, Y, seed=1))
            else:
                outputs = it(X)
            loss = F.cross_entropy(outputs, Y)
        assert all(p.grad is None for p in it.parameters())
        loss.backward()
    assert all(bits(a.grad) == bits(b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))  # type: ignore[arg-type]
    assert flat(found[0].values).isfinite().all()


def test_dropout_is_taken_as_it_fell():
    """Rung 2: the Hessian of the loss with the very mask of the pass."""
    model, estimator = network(dropout=0.5), ExampleHutchinson(num_probes=150)
    with seeded(7):
        mask = F.dropout(torch.ones(N, 5, dtype=X.dtype), 0.5)
    with seeded(7), estimator.recording(model) as recording:
        outputs = model(X)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, x: Tensor) -> Tensor:
            return self.m[3](torch.tanh(self.m[0](x) * mask))

    assert (Masked()(X) - outputs).abs().max() < 1e-14
    truth = dense(Masked(), lambda call: F.cross_entropy(call(X), Y)).hessian.diagonal()
    check_unbiased(estimator.from_recording(recording, outputs, Y, seed=1), truth)


def test_the_loss_is_counted_as_elsewhere():
    model, estimator = network(), ExampleHutchinson()
    target = Y.masked_fill(Y == 1, -100)

    def found(loss: Any) -> Tensor:
        with estimator.recording(model, parameters="0.*") as recording:
            outputs = model(X)
        return flat(estimator.from_recording(recording, outputs, target, loss=loss, seed=1).values)

    whole = found(nn.CrossEntropyLoss(reduction="sum"))
    assert (found(None) * (target >= 0).sum() - whole).abs().max() < 1e-12
    assert whole.numel() == 25


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        return 2.0 * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2.0 * g


class Odd(nn.Module):
    """Ways in which a pass is no sum of examples, or is not seen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.bn = kind, nn.Linear(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(5)
        self.slope = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "written":
            x = x.clone()
        h = self.a(x)
        if self.kind == "mean":
            h = h - h.mean(0)
        elif self.kind == "norm":
            h = self.bn(h)
        elif self.kind == "power":
            h = h.exp() ** self.slope
        elif self.kind == "hidden":
            h = h * Doubled.apply(self.slope)
        elif self.kind == "written":
            x.zero_()
        elif self.kind == "squared":
            h = h + self.slope * self.slope
        return self.b(torch.tanh(h))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mean", "the outputs of some examples depend on the rows of others where a.weight is used"),
        ("norm", "batch_norm in training mode couples the examples"),
        ("power", "slope .Odd. has no rule .it is used in .*pow.*which has no rule for it"),
        ("hidden", "slope is used in a way that the recording did not see"),
        ("written", "what went into a call of a.weight was overwritten afterwards"),
        ("squared", "slope .Odd. has no rule .it is multiplied with a parameter"),
    ],
)
def test_what_has_no_examples_is_refused_in_training(kind: str, message: str):
    with seeded(0):
        model = Odd(kind).double()
    estimator = ExampleHutchinson()
    with estimator.recording(model) as recording:
        outputs = model(X)
    with pytest.raises(UnsupportedModel, match=f"ExampleHutchinson.from_recording: {message}"):
        estimator.from_recording(recording, outputs, Y, seed=0)


def test_a_recurrent_layer_is_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"rnn": nn.LSTM(4, 3, batch_first=True)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["rnn"](x)[0].mean(1)

    model, estimator = Recurrent().double(), ExampleHutchinson()
    with estimator.recording(model) as recording:
        outputs = model(normal(N, 5, 4))
    with pytest.raises(UnsupportedModel, match="inner.rnn.[a-z_0-9]* .LSTM. has no rule .it is used in lstm"):
        estimator.from_recording(recording, outputs, Y, seed=0)


def test_half_precision_is_refused_in_training():
    model, estimator = network().float(), ExampleHutchinson()
    with estimator.recording(model) as recording, torch.autocast("cpu"):
        outputs = model(X.float())
    with pytest.raises(UnsupportedModel, match="a call of 0.weight was computed in torch.bfloat16"):
        estimator.from_recording(recording, outputs, Y, seed=0)


def test_positions_first_of_as_many_examples():
    """T = N: dimension 0 counts positions, and the shape does not say so."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x.transpose(0, 1)))[2])

    model, estimator = First().double(), ExampleHutchinson()
    with estimator.recording(model) as recording:
        outputs = model(normal(N, N, 4))
    with pytest.raises(UnsupportedModel, match="where a.weight is used: the model couples its examples, or keeps them"):
        estimator.from_recording(recording, outputs, Y, seed=0)


def test_a_recording_is_one_pass():
    model, estimator = network(), ExampleHutchinson()
    with estimator.recording(model) as recording:
        pass
    with pytest.raises(InvalidArgument, match="the model was called 0 times in the recording; it holds one"):
        estimator.from_recording(recording, model(X), Y)
    with estimator.recording(model) as recording:
        outputs = model(X) + model(X)
    with pytest.raises(InvalidArgument, match="the model was called 2 times"):
        estimator.from_recording(recording, outputs, Y)
    with estimator.recording(model) as recording:
        outputs = model(X[0])
    with pytest.raises(InvalidArgument, match="outputs has shape .3,., and the batch 4 examples"):
        estimator.from_recording(recording, outputs, Y[0], loss=F.cross_entropy)
    with estimator.recording(model) as recording, torch.no_grad():
        outputs = model(X)
    with pytest.raises(InvalidArgument, match="the outputs have no graph"):
        estimator.from_recording(recording, outputs, Y)

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self) -> Tensor:
            return X.float() @ self.w

    without = Nothing()
    with estimator.recording(without) as recording:
        outputs = without()
    with pytest.raises(InvalidArgument, match="the number of examples is not known"):
        estimator.from_recording(recording, outputs, Y)


def test_a_hook_is_gone_also_when_the_model_raises():
    model, estimator = network(), ExampleHutchinson()
    before = surroundings(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), estimator.recording(model):
        model(normal(N, 3))
    assert surroundings(model) == before


def test_what_a_step_must_say():
    model, estimator = network(), ExampleHutchinson()
    with estimator.recording(model) as recording:
        outputs = model(X)
    with pytest.raises(InvalidArgument, match="targets=None, and the Hessian belongs to the loss"):
        estimator.from_recording(recording, outputs)
    with pytest.raises(InvalidArgument, match="outputs are of shape .6, 3, 1., torch.float64, and loss=None stands"):
        estimator.from_recording(recording, outputs[..., None], Y)
    with pytest.raises(InvalidArgument, match="outputs are a tuple, and loss=None"):
        estimator.from_recording(recording, (outputs,), Y)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="the loss <lambda> is not known to be a sum over examples"):
        estimator.from_recording(recording, outputs, Y, loss=lambda outputs, targets: outputs.sum())
    with pytest.raises(UnknownObjective, match="the batch has no loss term"):
        estimator.from_recording(recording, outputs, torch.full_like(Y, -100))


def test_attention_must_have_second_derivatives():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.a(x)[:, None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v).mean((1, 2))

    model, estimator, x = Attending(), ExampleHutchinson(), normal(N, 7, 4, dtype=torch.float32)
    with estimator.recording(model) as recording, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = model(x)
    with pytest.raises(UnsupportedModel, match="a layer has no second derivative .*SDPBackend.MATH"):
        estimator.from_recording(recording, outputs, Y)


def test_expected_work_grows_with_the_probes():
    objective = CASES["mlp"].objective()
    few, many = (ExampleHutchinson(num_probes=m).expected(objective) for m in (1, 4))
    assert many.gradients > 2 * few.gradients
    found = ExampleHutchinson().estimate(objective, seed=0)
    assert found.cost.peak_bytes == few.peak_bytes(objective)


def test_a_copy_of_a_model_is_as_good():
    """Deep copies of a recorded model have no hook of the recording."""
    model = network()
    with ExampleHutchinson().recording(model):
        model(X)
    assert vars(copy.deepcopy(model))["_forward_pre_hooks"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_signs_per_example_have_true_errors(name: str):
    """Rung 5, more of it: 300 probes, one batch."""
    check_unbiased(
        ExampleHutchinson(num_probes=300).estimate(CASES[name].objective(), seed=16), hessian_diagonal(CASES[name])
    )


PEAK = """
import torch, torch.nn.functional as F
from curvkit import Objective
from curvkit.estimators import ExampleHutchinson, interval
from curvkit.models import MLP, ResNet

def memory(kind):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))

def objective(model, *shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return Objective(model.eval(), F.cross_entropy, [(x, torch.arange(len(x)) % 3)])

torch.set_num_threads(1)
ExampleHutchinson().estimate(objective(MLP([4, 4, 3]), 4, 4), seed=0)   # libraries are loaded
before, it = memory("VmRSS"), objective(ResNet(), 32, 3, 32, 32)
found = ExampleHutchinson().estimate(it, seed=0)
print(memory("VmHWM") - before, found.cost.peak_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux")
def test_the_peak_is_as_stated():
    """In a fresh process; what the allocator keeps may add a tenth."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    measured, stated = map(int, run.stdout.split())
    assert measured <= 1.1 * stated
    assert measured >= 0.3 * stated


class TwoKinds(nn.Module):
    """One matrix as a layer and as an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(N, N)), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.w)[:, None] + self.w)).mean(1)


def test_a_matrix_that_is_an_offset_too_has_shared_signs():
    """Rung 2, dense: no sign is product of two vectors and free at once."""
    with seeded(1):
        model = TwoKinds().double()
    x, y = normal(N, N), classes(N, num=3, seed=2)
    objective = Objective(model, F.cross_entropy, [(x, y)])
    found = ExampleHutchinson(num_probes=200).estimate(objective, seed=0)
    assert any(note.startswith("w has no rule (it enters both as a matrix and entry by entry)") for note in found.notes)
    truth = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian.diagonal()
    z = (flat(found.values) - truth) / flat(found.stderr)
    assert z.abs().max() < 5.0
    with ExampleHutchinson().recording(model) as recording:
        outputs = model(x)
    with pytest.raises(UnsupportedModel, match="ExampleHutchinson: w cannot have signs of its own: it enters both"):
        ExampleHutchinson().from_recording(recording, outputs, y, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_two_hundred_repeats_have_the_truth_as_their_mean(name: str):
    """Rung 5: z-scores of the mean of 200 independent estimates; their errors from 30 probes cover 92 to 97 %."""
    objective, truth = CASES[name].objective((2, 4)), hessian_diagonal(CASES[name])
    draws = torch.stack([flat(ExampleHutchinson().estimate(objective, seed=seed).values) for seed in range(200)])
    known = draws.std(0) > 1e-12 * truth.abs().max()
    z = ((draws.mean(0) - truth) / (draws.std(0) / 200**0.5))[known]
    assert z.abs().max() < 5.0
    assert 0.3 < z.square().mean() < 2.0  # entries are correlated
    covered = []
    for seed in range(40):
        low, high = interval(ExampleHutchinson(num_probes=30).estimate(objective, seed=1000 + seed))
        covered.append(((flat(low) <= truth) & (truth <= flat(high)))[known].double().mean())
    assert 0.92 <= torch.stack(covered).mean() <= 0.97
