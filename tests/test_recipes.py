"""Recipes: what is refused when they are made, saved or read, and that a checkpoint with one gives the live model's sharpness."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, dense, normal, seeded
from torch import Tensor, nn

from curvkit import Objective, Recipe, save
from curvkit.checkpoints import fit, read
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.losses import token_cross_entropy
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.models import build
from curvkit.resolving import resolve

X, Y = normal(12, 4, seed=1).float(), classes(12, num=3, seed=2)
BATCH = {"x": X, "y": Y}


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"builder": "mlp", "kwargs": {"sizes": [4, 3]}, "loss": "cross_entropy", "batch": BATCH} | changes)


def mlp(sizes: tuple[int, ...] = (4, 3)) -> nn.Module:
    with seeded():
        return build("mlp", {"sizes": list(sizes)})


# ---- refused when made ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss": "cross_entropi"}, "Recipe: no loss is called 'cross_entropi', nearest: cross_entropy or"),
        ({"loss": "accuracy"}, "Recipe: no loss is called 'accuracy'. The names are binary_cross_entropy, "),
        ({"loss": ["mse_loss"]}, "Recipe: no loss is called ['mse_loss'], nearest: mse_loss"),
        (
            {"loss_options": {"smoothing": 0.1}},
            "Recipe: the loss cross_entropy has no option 'smoothing'. It takes ignore",
        ),
        ({"loss_options": {"target": Y}}, "Recipe: the loss cross_entropy has no option 'target'."),
        ({"loss_options": {"reduce": True}}, "Recipe: the loss cross_entropy has no option 'reduce'."),
        ({"loss_options": {"reduction": "none"}}, "reduction='none'; curvature needs a scalar: use 'mean' or 'sum'."),
        ({"batch": {"x": X}}, "Recipe: batch has ['x']; it must be {'x': inputs, 'y': targets}, both tensors."),
        ({"batch": {"x": X, "y": Y, "z": Y}}, "Recipe: batch has ['x', 'y', 'z'];"),
        ({"batch": {"x": X, "y": [0] * 12}}, "both tensors"),
        ({"batch": {"x": X, "y": Y[:5]}}, "x and y must have the same number of rows, at least one; their shapes are"),
        ({"batch": {"x": X, "y": Y[:0]}}, "{'x': (12, 4), 'y': (0,)}"),
        ({"batch": {"x": X[:0], "y": Y[:0]}}, "must have the same number of rows, at least one"),
        ({"batch": {"x": X, "y": Y[0]}}, "{'x': (12, 4), 'y': ()}"),
        ({"batch_size": 0}, "Recipe: batch_size=0 must be at least 1, or None for all rows at once."),
        ({"batch_size": 2.0}, "Recipe: batch_size=2.0 must be at least 1"),
    ],
)
def test_a_recipe_that_cannot_be_meant(changes: dict[str, Any], text: str):
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        recipe(**changes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format=2), "Recipe: format 2 is not known to this version, which reads 1. Update curvkit."),
        (lambda d: d.pop("loss"), "Recipe: missing ['loss'], unknown []. Its keys are batch, batch_size, builder,"),
        (lambda d: d.update(code="x"), "Recipe: missing [], unknown ['code']."),
        (
            lambda d: d.update(kwargs=[4, 3]),
            "Recipe: kwargs is a list; it must be a dict, for example kwargs={'sizes':",
        ),
        (lambda d: d.update(batch=X), "Recipe: batch is a Tensor; it must be a dict"),
        (lambda d: d.update(loss_options=5), "Recipe: loss_options is a int; it must be a dict"),
    ],
)
def test_a_plain_form_that_is_none(change: Callable[[dict[str, Any]], Any], text: str):
    plain = recipe().to_dict()
    change(plain)
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        Recipe.from_dict(plain)


def test_the_plain_form_and_back():
    made = recipe(loss_options={"label_smoothing": 0.1}, batch_size=5)
    again = Recipe.from_dict(made.to_dict())
    assert again.to_dict() == made.to_dict()
    assert [len(x) for x, _ in again.batches()] == [5, 5, 2]
    assert [len(x) for x, _ in recipe().batches()] == [12]
    minimal = {key: made.to_dict()[key] for key in ("builder", "kwargs", "loss", "batch")}
    assert Recipe.from_dict(minimal).loss_options == {}


# ---- refused when saved: nothing is written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        (mlp(), {"builder": "mlpp"}, "curvkit.save: the recipe cannot be built. build: no model is called 'mlpp'."),
        (mlp(), {"kwargs": {"width": 4}}, "curvkit.save: the recipe cannot be built. build: 'mlp' has no keyword"),
        (mlp(), {"kwargs": {"sizes": "4,3"}}, "curvkit.save: the recipe cannot be built. MLP: sizes="),
        (
            mlp((4, 5, 3)),
            {},
            "curvkit.save: the recipe builds another model than the one given: 'linear0.weight' is (3, 4) by the recipe and "
            "(5, 4) in the model. Give the builder's kwargs that made this model.",
        ),
        (mlp((4, 3)), {"kwargs": {"sizes": [4, 3, 3]}}, "'linear1.weight' is (3, 3) by the recipe and absent in the"),
        (nn.Linear(4, 3), {}, "'linear0.weight' is (3, 4) by the recipe and absent in the model."),
        (
            nn.Linear(4, 3),
            {},
            "The builder 'mlp' means curvkit.models.MLP, and the model is a Linear: save a model of your own without a recipe, and "
            "measure it with --objective FILE.py:FUNCTION.",
        ),
        (
            mlp(),
            {"batch": {"x": X[:, :3], "y": Y}},
            "the recipe's model 'mlp' and loss cross_entropy do not take its batch, x (12, 3) torch.float32, y (12,) "
            "torch.int64: MLP: inputs of shape",
        ),
        (
            mlp(),
            {"batch": {"x": X, "y": Y.double()}},
            "do not take its batch, x (12, 4) torch.float32, y (12,) torch.flo",
        ),
        (
            mlp(),
            {"loss": "token_cross_entropy"},
            "token_cross_entropy: outputs of shape (2, 3) and targets of shape (2,)",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_model(tmp_path: Path, model: nn.Module, changes: dict[str, Any], text: str):
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        save(tmp_path / "ckpt.pt", model=model, recipe=recipe(**changes))
    assert list(tmp_path.iterdir()) == []


def test_checking_a_recipe_disturbs_nothing(tmp_path: Path):
    model, state = mlp().train(), torch.get_rng_state()
    save(tmp_path / "ckpt.pt", model=model, recipe=recipe().to_dict())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_named_recipe_of_a_dict(tmp_path: Path):
    with pytest.raises(InvalidArgument, match="Recipe: missing"):
        save(tmp_path / "ckpt.pt", model=mlp(), recipe={"objective": "train:objective"})


# ---- refused when read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format=9), "its recipe cannot be used. Recipe: format 9 is not known"),
        (lambda d: d.update(builder="os.system"), "its recipe cannot be used. build: no model is called 'os.system'"),
        (lambda d: d.update(loss=["x"]), "its recipe cannot be used. Recipe: no loss is called ['x']"),
        (lambda d: d["kwargs"].update(sizes=[4, -3]), "its recipe cannot be used. MLP: sizes[1]=-3"),
        (
            lambda d: d["kwargs"].update(code="x"),
            "its recipe cannot be used. build: 'mlp' has no keyword argument 'code'",
        ),
        (lambda d: d["batch"].update(x=[1.0]), "its recipe cannot be used. Recipe: batch has"),
        (lambda d: d.clear(), "its recipe cannot be used. Recipe: missing ['batch', 'builder', 'kwargs', 'loss']"),
    ],
)
def test_a_tampered_recipe(tmp_path: Path, change: Callable[[dict[str, Any]], Any], text: str):
    path = save(tmp_path / "ckpt.pt", model=mlp(), recipe=recipe())
    content = torch.load(path, weights_only=True)
    change(content["curvkit"]["recipe"])
    torch.save(content, path)
    with pytest.raises(UnknownObjective, match=re.escape(text)) as caught:
        resolve(read(path))
    assert str(caught.value).endswith("Or name an objective with --objective FILE.py:FUNCTION.")


def test_a_recipe_that_is_no_dict_counts_as_none(tmp_path: Path):
    path = save(tmp_path / "ckpt.pt", model=mlp())
    content = torch.load(path, weights_only=True)
    content["curvkit"]["recipe"] = "train:objective"
    torch.save(content, path)
    with pytest.raises(UnknownObjective, match="does not say which model, loss or data to use"):
        resolve(read(path))


# ---- the same number as the live model's, and as the dense Hessian's ------------------------------------------------

TOKENS, NEXT = classes(6, 7, num=5, seed=3), classes(6, 7, num=5, seed=4)
NEXT[0, 2:], NEXT[3] = -100, -100
IMAGES, KINDS = normal(6, 3, 8, 8, seed=5).float(), classes(6, num=10, seed=6)
DECODER = {"vocabulary": 5, "width": 4, "depth": 1, "heads": 2, "context": 7}

CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], Tensor, Tensor]] = {
    "mlp": ("mlp", {"sizes": [4, 5, 3], "activation": "tanh"}, "cross_entropy", {}, X, Y),
    "mlp, class weights": (
        "mlp",
        {"sizes": [4, 3]},
        "cross_entropy",
        {"weight": torch.tensor([0.2, 1.0, 3.0]), "label_smoothing": 0.1},
        X,
        Y,
    ),
    "mlp, sum of squares": ("mlp", {"sizes": [4, 3]}, "mse_loss", {"reduction": "sum"}, X, X[:, :3].clone()),
    "resnet": ("resnet", {"depth": 8, "width": 1}, "cross_entropy", {}, IMAGES, KINDS),
    "decoder, tied": ("decoder", {**DECODER, "tied": True}, "token_cross_entropy", {}, TOKENS, NEXT),
    "decoder, untied": ("decoder", {**DECODER, "tied": False}, "token_cross_entropy", {}, TOKENS, NEXT),
}
FUNCTIONS = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss, "token_cross_entropy": token_cross_entropy}


def trained(builder: str, kwargs: dict[str, Any]) -> nn.Module:
    """Weights, and running statistics, that no initialisation gives."""
    with seeded(7):
        model = build(builder, kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.add_(0.1 * torch.rand_like(buffer))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_the_live_model_and_the_dense_hessian_agree(tmp_path: Path, name: str):
    builder, kwargs, loss, options, x, y = CASES[name]
    model = trained(builder, kwargs)
    made = Recipe(builder, kwargs, loss, {"x": x, "y": y}, options, batch_size=4)
    path = save(tmp_path / "ckpt.pt", model=model, recipe=made)

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        own = {k: v.to(outputs.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        return FUNCTIONS[loss](outputs, targets, **own)

    resolved = resolve(read(path))
    assert resolved.source == f"recipe in the checkpoint ({builder}, {loss})"
    resolved.objective.model.eval()
    settings = SharpnessSettings(data_doubt=False)
    stored = sharpness(resolved.objective, seed=0, settings=settings)
    # a partial of the same loss: its table is asked again, so the weighting of the uneven batches is the same
    live = Objective(model, functools.partial(FUNCTIONS[loss], **options), made.batches())
    assert stored.value == sharpness(live, seed=0, settings=settings).value  # same seed, same plan: same bits

    wide = [t.double() if t.is_floating_point() else t for t in (x, y)]
    truth = torch.linalg.eigvalsh(
        dense(trained(builder, kwargs).double(), lambda f: loss_of(f(wide[0]), wide[1])).hessian
    )
    (low, high), eps = stored.eigenpairs.intervals[0].tolist(), torch.finfo(torch.float32).eps
    # the interval is of the float32 matrix, whose entries differ from the float64 one's by rounding in forward and backward
    # passes: a few dozen operations deep, 100 eps of the largest eigenvalue
    slack = 100 * eps * truth.abs().max().item()
    assert low - slack <= truth[-1].item() <= high + slack
    assert stored.eigenpairs.all_converged


@pytest.mark.parametrize("name", ["mlp", "mlp, class weights", "mlp, sum of squares", "decoder, tied"])
def test_the_batch_size_of_a_recipe_does_not_matter(tmp_path: Path, name: str):
    builder, kwargs, loss, options, x, y = CASES[name]
    model, values = trained(builder, kwargs), []
    for size in (None, 1, 4, 5):
        made = Recipe(builder, kwargs, loss, {"x": x, "y": y}, options, batch_size=size)
        objective = resolve(read(save(tmp_path / "ckpt.pt", model=model, recipe=made))).objective
        objective.model.eval()
        result = sharpness(objective, tolerance=1e-6, seed=0, settings=SharpnessSettings(data_doubt=False))
        values.append(result.value)
    # residuals of 1e-6 give eigenvalues to 1e-12; what is left is float32 rounding of sums over a dozen batches
    assert max(values) - min(values) <= 1e-6 * abs(values[0])


def test_a_recipe_needs_no_code_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / "ckpt.pt", model=mlp(), recipe=recipe())

    def refuse(*arguments: Any) -> None:
        raise AssertionError("something was imported by name")

    monkeypatch.setattr(importlib.util, "spec_from_file_location", refuse)
    monkeypatch.setattr(importlib, "import_module", refuse)
    state = torch.get_rng_state()
    resolve(read(path))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_expanded_calibration_batch_is_saved_in_full(tmp_path: Path):
    """One stored number with stride 0 would be refused when the file is read, as a claim of more than is there."""
    model, y = build("mlp", {"sizes": [2, 3]}), torch.tensor([0, 1, 2, 0])
    save(
        tmp_path / "a.pt",
        model=model,
        recipe=Recipe("mlp", {"sizes": [2, 3]}, "cross_entropy", {"x": torch.ones(1, 2).expand(4, 2), "y": y}),
    )
    recipe = read(tmp_path / "a.pt").recipe
    assert recipe is not None
    assert torch.equal(recipe["batch"]["x"], torch.ones(4, 2))


def test_a_model_in_float64_is_measured_in_float64(tmp_path: Path):
    """Oracle: the live model. Rounded to float32, the value would differ by 1e-7 of itself, and x would not fit the weights."""
    with seeded():
        model = build("mlp", {"sizes": [3, 5, 2], "activation": "tanh"}).double()
    batch = {"x": normal(8, 3), "y": classes(8, num=2)}
    save(
        tmp_path / "a.pt",
        model=model,
        recipe=Recipe("mlp", {"sizes": [3, 5, 2], "activation": "tanh"}, "cross_entropy", batch),
    )
    found = resolve(read(tmp_path / "a.pt")).objective
    live = Objective(model, F.cross_entropy, [(batch["x"], batch["y"])])
    assert found.dtype == torch.float64
    assert found.value() == live.value()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", [torch.bfloat16, torch.float16, torch.float64])
def test_data_of_another_precision_is_computed_in_that_of_the_model(
    tmp_path: Path, weights: torch.dtype, data: torch.dtype
):
    """Oracle: the value of the live model in float32 on the same numbers."""
    model, x = mlp().to(weights), X.to(data)
    path = save(tmp_path / "ckpt.pt", model=model, recipe=recipe(batch={"x": x, "y": Y}))
    found = resolve(read(path))
    assert f"data in {str(data).removeprefix('torch.')}, computed in float32" in found.notes
    assert found.objective.value() == pytest.approx(F.cross_entropy(model.float()(x.float()), Y).item(), rel=1e-6)
    path = save(tmp_path / "same.pt", model=mlp(), recipe=recipe())
    assert not any("computed in" in note for note in resolve(read(path)).notes)


def test_what_a_model_cannot_hold_is_said(tmp_path: Path):
    model = nn.Linear(2, 2)
    notes = fit(model, {name: tensor.double() + 1e-12 for name, tensor in model.state_dict().items()}, "a.pt")
    assert notes == ("weights in float64 were rounded to the model's float32",)
    assert fit(model, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, "a.pt") == ()  # exact


def test_a_recipe_deeper_than_its_weights_is_refused_before_it_is_built(tmp_path: Path):
    torch.save(
        {
            "model": {"w": torch.ones(1)},
            "curvkit": {
                "format": 1,
                "recipe": {
                    "builder": "decoder",
                    "loss": "token_cross_entropy",
                    "kwargs": {"vocabulary": 5, "width": 4, "depth": 10**9, "heads": 1, "context": 4},
                    "batch": {"x": torch.ones(1, 4, dtype=torch.int64), "y": torch.ones(1, 4, dtype=torch.int64)},
                },
            },
        },
        tmp_path / "a.pt",
    )
    with pytest.raises(UnknownObjective, match="the recipe has depth = 1,000,000,000, but 1 weights are there"):
        resolve(read(tmp_path / "a.pt"))
