"""Products in mixed precision: how far off they are is bounded, and what is claimed of them is recomputed in full precision."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli.main import run
from oracles import classes, cut, dense, normal, seeded, surroundings
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvkit import Recipe, save
from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.linalg.basis import norm
from curvkit.losses import token_cross_entropy
from curvkit.measures import Sharpness, SharpnessSettings, sharpness
from curvkit.models import MLP, Decoder
from curvkit.objectives import Objective
from curvkit.operators import Hessian, MixedHessian

BFLOAT = SharpnessSettings(arithmetic="bfloat16")


def mlp() -> Objective:
    with seeded():
        model = MLP([6, 24, 3], "tanh")
    return Objective(model, F.cross_entropy, cut([40, 24], normal(64, 6, dtype=torch.float32), classes(64, num=3)))


def batch_norm() -> Objective:
    with seeded():
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).eval()
    return Objective(model, F.cross_entropy, [(normal(32, 1, 4, 4, dtype=torch.float32), classes(32, num=3))])


def language() -> Objective:
    with seeded():
        model = Decoder(vocabulary=7, width=16, depth=2, heads=2, context=6).eval()
    return Objective(model, token_cross_entropy, [(classes(8, 6, num=7), classes(8, 6, num=7, seed=1))])


OBJECTIVES: dict[str, Callable[[], Objective]] = {"mlp": mlp, "batch norm": batch_norm, "language": language}


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_products_err_by_no_more_than_is_said(name: str, residency: str):
    """Oracle: the same product in float32. An error below 1e-5 would mean that nothing was lowered."""
    objective = OBJECTIVES[name]()
    exact, mixed = Hessian(objective), MixedHessian(objective, residency=residency)  # pyright: ignore[reportArgumentType]
    v = exact.gradient
    for _ in range(10):  # towards the leading eigenvector, along which the error is largest
        v = exact.matvec(v / norm(v))
    scale = norm(v)
    error = norm(mixed.matvec(v / scale) - exact.matvec(v / scale)) / scale
    assert 1e-5 < error < MixedHessian.product_error
    assert mixed.matvec(v).dtype == mixed.dtype == torch.float32
    assert mixed.loss == pytest.approx(exact.loss, rel=0.01)  # eps of bfloat16 is 0.008


@pytest.mark.parametrize("name", ["mlp", "batch norm", pytest.param("language", marks=pytest.mark.slow)])
def test_sharpness_holds_though_its_search_is_in_bfloat16(name: str):
    """Oracle: dense autograd in float64; the interval follows from residuals in float32, whose rounding is far below its width."""
    objective = OBJECTIVES[name]()
    double = objective.converted(dtype=torch.float64)
    x, y = (torch.cat(parts) for parts in zip(*double.batches, strict=True))
    loss = token_cross_entropy if name == "language" else F.cross_entropy
    truth = torch.linalg.eigvalsh(dense(double.model, lambda call: loss(call(x), y)).hessian)
    found = sharpness(objective, tolerance=0.05, seed=0, settings=BFLOAT)
    low, high = found.eigenpairs.intervals[0].tolist()
    assert low <= truth[-1] <= high
    assert found.eigenpairs.all_converged
    assert found.eigenpairs.upper_bound is None or found.eigenpairs.upper_bound >= truth[-1]
    said = found.to_dict()
    assert (said["search_dtype"], said["residuals_dtype"], said["definition"]["dtype"]) == (
        "bfloat16",
        "float32",
        "float32",
    )
    assert said["product_error"] >= MixedHessian.product_error
    assert said["rounding_measured"]
    assert "bfloat16" in str(found.plan)


def test_loss_and_gradient_are_those_of_float32():
    objective = mlp()
    found, exact = sharpness(objective, tolerance=0.05, seed=0, settings=BFLOAT), Hessian(objective)
    assert found.loss == pytest.approx(exact.loss, rel=1e-6)
    assert found.gradient_norm == pytest.approx(norm(exact.gradient), rel=1e-5)


def test_a_result_says_its_arithmetic_without_being_asked():
    found: Sharpness = sharpness(mlp().converted(dtype=torch.float64), seed=0)
    assert found.arithmetic == "float64"


def test_a_tolerance_below_the_error_is_refused():
    with pytest.raises(InvalidArgument, match="tolerance=0.001 is below 0.016, the rounding of products in bfloat16"):
        sharpness(mlp(), settings=BFLOAT)


def test_a_model_in_float64_is_refused():
    with pytest.raises(UnsupportedModel, match="the model is in torch.float64, of which autocast lowers nothing"):
        MixedHessian(mlp().converted(dtype=torch.float64))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InvalidArgument, match="arithmetic='half' is not one of exact, bfloat16"):
        SharpnessSettings(arithmetic="half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgument, match="arithmetic='bfloat16' does not go with rule='difference'"):
        SharpnessSettings(arithmetic="bfloat16", rule="difference")


def test_regions_that_the_model_opens_keep_their_effect():
    """Law: autocast inside autocast is autocast; activation checkpointing repeats it in the same precision."""

    class Again(MLP):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return checkpoint(super().forward, input, use_reentrant=False).float()  # type: ignore[union-attr]

    plain = mlp()
    with seeded():
        model = Again([6, 24, 3], "tanh")
    again = Objective(model, F.cross_entropy, plain.batches)
    for residency in ("retained", "streamed"):
        lowered = MixedHessian(again, residency=residency)
        v = torch.ones(lowered.n)
        assert norm(lowered.matvec(v) - MixedHessian(plain, residency=residency).matvec(v)) <= 1e-2 * norm(v)
        exact = Hessian(again, residency=residency).matvec(v)
        assert norm(exact - Hessian(plain).matvec(v)) <= 1e-5 * norm(exact)
        assert norm(lowered.matvec(v) - exact) >= 1e-5 * norm(exact)


def test_everything_is_left_as_it_was():
    objective = mlp()
    before = surroundings(objective.model)
    sharpness(objective, tolerance=0.05, seed=0, settings=BFLOAT)
    assert surroundings(objective.model) == before
    assert not torch.is_autocast_enabled("cpu")


def test_the_command_says_what_was_multiplied_in_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    it = mlp()
    batch = {"x": it.batches[0][0], "y": it.batches[0][1]}
    save(
        "ckpt.pt",
        model=it.model,
        recipe=Recipe("mlp", {"sizes": [6, 24, 3], "activation": "tanh"}, "cross_entropy", batch),
    )
    asked = ["sharpness", "ckpt.pt", "--arithmetic", "bfloat16", "--seed", "0", "--no-data-doubt"]
    assert run([*asked, "--tolerance", "0.05", "--plain"]) == 0
    out = capsys.readouterr().out
    assert "recomputed by products in float32; those of the search, in bfloat16, err by about 0.02 of ||H||" in out
    assert run(asked) == 2
    said = "Error: --tolerance 0.001 is below 0.016, the rounding of products in bfloat16."
    assert said in capsys.readouterr().err
    assert run([*asked, "--rule", "difference"]) == 2
    assert "Error: --arithmetic bfloat16 does not go with --rule difference" in capsys.readouterr().err
