"""The float64 reference of a float32 operator, and the certificates that rest on it."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracles import classes, cut, dense, normal, relative, seeded
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.losses import BatchLoss
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.measures import eigenvalues as measuring
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.operators import DoubleHessian, Hessian, PerturbedHessian
from curvkit.operators.memory import free_memory

NAMES = ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "encoder layer, eval", "lstm", "frozen"]


def single(name: str) -> Objective:
    return CASES[name]().objective().converted(dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [None, 200])
def test_products_of_float32_weights_are_exact_in_float64(name: str, budget: int | None):
    """Dense autograd in float64 at the float32 weights and data: rounding of float64 is all that is left, whole or in parts."""
    objective = single(name)
    H = Hessian(objective, residency="retained" if budget is None else "streamed", budget_bytes=budget)
    V = normal(H.n, 3)
    truth = Hessian(objective.converted(dtype=torch.float64))  # held against dense autograd in test_hessian
    D = DoubleHessian(H)
    assert (D.n, D.dtype, D.device, D.space) == (H.n, torch.float64, H.device, H.space)
    assert relative(D.matmat(V), truth.matmat(V)) <= 1e-12  # a few dozen roundings of 2.2e-16
    assert relative(D.matvec(V[:, 0]), truth.matvec(V[:, 0])) <= 1e-12
    assert relative(H.matmat(V.float()).double(), truth.matmat(V)) > 1e-9  # and that is not so of float32


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (10.0, 300.0), (1e4, 0.0)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_tight_intervals_hold_an_eigenvalue_of_the_exact_hessian(
    scale: float, shift: float, activation: type[nn.Module]
):
    """Dense float64: float32 products of such inputs err by up to a thousand eps, which a fixed allowance would miss."""
    with seeded():
        model = nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))
    x, y = scale * normal(200, 6).float() + shift, classes(200, num=3)
    result = sharpness(Objective(model, F.cross_entropy, [(x, y)]), 2, tolerance=1e-5, seed=0, settings=QUICK)
    doubled = model.double()
    truth = dense(doubled, lambda call: F.cross_entropy(call(x.double()), y)).hessian
    values = torch.linalg.eigvalsh(truth)
    assert result.eigenpairs.residual_dtype == "float64"
    for low, high in result.eigenpairs.intervals.tolist():
        # eigvalsh itself is right to about n eps ||H||
        slack = len(values) * 2.3e-16 * values.abs().max().item()
        assert bool(((values >= low - slack) & (values <= high + slack)).any())


QUICK = SharpnessSettings(data_doubt=False)
PERTURBED = SharpnessSettings(data_doubt=False, rounding="perturbation")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (10.0, 30.0), (10.0, 300.0), (1.0, 1000.0), (1e4, 0.0)])
def test_perturbation_covers_the_error_against_float64(activation: type[nn.Module], scale: float, shift: float):
    """Dense float64 products: four times the larger change under two perturbations is no less than the error of the float32 product, and
    on standardised data no more than twenty times it."""
    with seeded():
        model = nn.Sequential(nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 5))
    objective = Objective(model, F.cross_entropy, [(scale * normal(256, 20).float() + shift, classes(256, num=5))])
    H, exact = Hessian(objective), DoubleHessian(Hessian(objective))
    v = H.gradient / H.gradient.norm()
    error = (H.matvec(v).double() - exact.matvec(v.double())).norm().item()
    moved = 4 * max((PerturbedHessian(H, i).matvec(v) - H.matvec(v)).norm().item() for i in (0, 1))
    assert moved >= error
    if shift == 0.0 and scale == 1.0:
        assert moved <= 20 * error


def test_a_perturbation_moves_weights_and_floating_data_and_nothing_else():
    """Law: the user's model keeps its bits; two draws differ, the same draw has the same bits; tokens cannot be moved."""
    objective = single("decoder, tied, padded tokens")
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    H, v = Hessian(objective), normal(objective.parameters.n).float()
    first, again, other = (PerturbedHessian(H, index).matvec(v) for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < relative(first, H.matvec(v)) < 1e-4
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.model.state_dict().items())


def test_convolutions_take_the_perturbation_by_default():
    """float64 convolutions are slow on a CPU; the choice can be made by hand, and an unknown one is refused."""
    objective = single("cnn, batch norm")
    kinds = {
        rounding: sharpness(
            objective, seed=0, settings=SharpnessSettings(data_doubt=False, rounding=rounding)
        ).eigenpairs
        for rounding in ("auto", "float64", "perturbation")
    }
    assert [pairs.residual_dtype for pairs in kinds.values()] == ["float32", "float64", "float32"]
    assert all(pairs.rounding_measured for pairs in kinds.values())
    with pytest.raises(InvalidArgument, match="rounding='half' is not one of auto, float64, perturbation"):
        SharpnessSettings(rounding="half")  # type: ignore[arg-type]


def test_the_error_of_the_search_s_products_is_measured():
    """Closed form of the claim: ||(H32 - H64) v|| / ||H|| for the outermost vector, or the assumed 8 eps where that is less."""
    with seeded():
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))
    x, y = 1e4 * normal(256, 20).float(), classes(256, num=5)
    objective = Objective(model, F.cross_entropy, [(x, y)])
    pairs = sharpness(objective, seed=0, settings=QUICK).eigenpairs
    assert pairs.vectors is not None
    v, exact = pairs.vectors[:, 0], Hessian(objective.converted(dtype=torch.float64))
    error = (Hessian(objective).matvec(v).double() - exact.matvec(v.double())).norm().item() / pairs.scale
    assert error > 8 * torch.finfo(torch.float32).eps
    assert pairs.product_error == pytest.approx(error, rel=0.1)  # the two are measured at slightly different ||v||
    assert pairs.rounding == pytest.approx(8 * torch.finfo(torch.float64).eps * pairs.scale)
    repeated = sharpness(objective, seed=0, settings=PERTURBED).eigenpairs
    assert repeated.residual_dtype == "float32"
    assert repeated.product_error >= error / 2  # an estimate; these inputs are the worst that were found
    assert repeated.rounding == repeated.product_error * repeated.scale


def test_a_float64_model_needs_no_reference():
    result = sharpness(CASES["mlp"]().objective(), seed=0, settings=QUICK)
    assert result.eigenpairs.residual_dtype == "float64"
    assert not result.notes


class CastsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.float32))


def test_a_model_that_cannot_run_in_float64_says_so():
    with seeded():
        model = CastsInside()
    objective = Objective(model, F.cross_entropy, [(normal(20, 6).float(), classes(20, num=3))])
    with pytest.raises(UnsupportedModel, match="the model or the loss does not run in float64 .*dtype"):
        DoubleHessian(Hessian(objective))
    result = sharpness(objective, seed=0, settings=QUICK)
    assert result.eigenpairs.residual_dtype == "float32"
    assert result.eigenpairs.all_converged
    assert result.eigenpairs.rounding_measured
    text = "residuals are of float32 products: the model or the loss does not run in float64"
    assert any(text in note for note in result.notes)


def test_a_loss_that_gives_pairs_and_a_loss_that_is_a_sum():
    """The weighting is that of the float32 operator: batches of 7, 1 and 4 rows."""
    x, y = normal(12, 4).float(), normal(12, 2).float()
    with seeded():
        model = MLP([4, 5, 2])
    for loss in (
        BatchLoss(lambda model, batch: ((model(batch[0]) - batch[1]).square().sum(), 2 * len(batch[0]))),
        nn.MSELoss(reduction="sum"),
    ):
        objective = Objective(model, loss, cut([7, 1, 4], x, y))
        H, V = Hessian(objective), normal(objective.parameters.n, 2)
        assert (
            relative(DoubleHessian(H).matmat(V), Hessian(objective.converted(dtype=torch.float64)).matmat(V)) <= 1e-12
        )


def test_wrong_vectors_and_changed_parameters_are_refused():
    D = DoubleHessian(Hessian(single("mlp")))
    for wrong in (torch.zeros(D.n), torch.zeros(D.n + 1).double()):
        with pytest.raises(
            InvalidArgument, match=rf"DoubleHessian: .* they must be \[{D.n}, k\], torch.float64 on cpu"
        ):
            D.matvec(wrong)
    with torch.no_grad():
        next(iter(D._operator.objective.model.parameters())).add_(1.0)
    with pytest.raises(InvalidArgument, match="has changed since"):
        D.matvec(torch.zeros(D.n).double())


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"residency": "retained"}, {"residency": "streamed", "budget_bytes": 10_000}])
def test_the_same_plan_gives_the_same_bits(options: dict[str, Any]):
    """A plan can be handed on: what memory happens to be free no longer matters."""
    objective = single("decoder, tied, padded tokens")
    first = Hessian(objective, **options)
    again = Hessian(objective, plan=first.plan)
    v = normal(first.n).float()
    assert again.plan == first.plan
    assert free_memory(first.device) > 0
    assert torch.equal(again.matvec(v), first.matvec(v))


def test_a_plan_of_another_machine_is_refused():
    objective = single("mlp")
    plan = Hessian(objective).plan
    with pytest.raises(InvalidArgument, match="the plan is for dtype='float32', here it is 'float64'"):
        Hessian(objective.converted(dtype=torch.float64), plan=plan)


def test_the_record_has_the_rows_that_the_basis_may_hold():
    result = sharpness(single("mlp"), seed=0, settings=SharpnessSettings(data_doubt=False, memory_bytes=10**6))
    assert result.plan.basis_rows == 500_000 // (4 * result.definition.parameters)


# ---- whose fault ----------------------------------------------------------------------------------------------------


def test_a_fault_of_curvkit_in_the_doubt_from_data_is_not_a_note(monkeypatch: pytest.MonkeyPatch):
    """The user's model may fail on a part of the data; a fault of ours must be seen."""

    def wrong(*arguments: Any) -> None:
        raise ZeroDivisionError("a fault")

    ours = FunctionType((lambda *arguments: 1 // 0).__code__, {"__name__": "curvkit.measures.data_doubt"})
    monkeypatch.setattr(measuring, "spread", ours)
    with pytest.raises(ZeroDivisionError):
        sharpness(single("mlp"), seed=0)
    monkeypatch.setattr(measuring, "spread", wrong)
    assert "ZeroDivisionError: a fault" in sharpness(single("mlp"), seed=0).notes[-1]
