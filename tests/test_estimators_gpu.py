"""Every estimator on a CUDA device: the numbers of the CPU, and nothing anywhere else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, normal, seeded
from torch import Tensor, nn

import curvkit.estimators
from curvkit import Objective
from curvkit.estimators import BackPACK, Controlled, Deflated, Exact, ExampleHutchinson, Fisher, Hutchinson
from curvkit.losses import token_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OWN: dict[str, Any] = {
    "BackPACK": lambda: BackPACK("DiagGGNExact"),
    "Controlled": lambda: Controlled(inner=Hutchinson(num_probes=3), by=Exact("ggn")),
    "Deflated": lambda: Deflated(inner=Hutchinson(num_probes=3), rank=3),
    "Exact": lambda: Exact("hessian"),
    "ExampleHutchinson": lambda: ExampleHutchinson(num_probes=3),
    "Fisher": lambda: Fisher(num_samples=3),
    "Hutchinson": lambda: Hutchinson(num_probes=3),
}
"""Options that are worth a look; the others are taken as they are."""
WITHOUT_DATA = {"OptimizerState"}
"""Needs the state of an optimizer, whose tests are with it."""
NAMES = [
    name
    for name in curvkit.estimators.__all__
    if dataclasses.is_dataclass(getattr(curvkit.estimators, name)) and name not in WITHOUT_DATA
]


class Language(nn.Module):
    """A tied head, positions, a norm, and a layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.LayerNorm(6)
        self.inner, self.slope = nn.Linear(6, 6), nn.PReLU()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(h + self.slope(self.inner(self.norm(h))), self.words.weight)


def small() -> tuple[nn.Module, Any, Tensor, Tensor]:
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), normal(12, 5).float(), classes(12, num=3)


def images() -> tuple[nn.Module, Any, Tensor, Tensor]:
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 3)
        )
    return model, nn.CrossEntropyLoss(), normal(12, 2, 8, 8).float(), classes(12, num=3)


def language() -> tuple[nn.Module, Any, Tensor, Tensor]:
    with seeded(0):
        model = Language()
    return model, token_cross_entropy, classes(8, 5, num=11), classes(8, 5, num=11, seed=1)


def estimates(name: str, make: Any, device: str) -> Any:
    model, loss, x, y = make()
    parts = zip(x.to(device).split(8), y.to(device).split(8), strict=True)
    objective = Objective(model.to(device).eval(), loss, list(parts))
    estimator = OWN.get(name, getattr(curvkit.estimators, name))()
    return estimator.estimate(objective, seed=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [small, images, language])
def test_the_numbers_of_the_cpu(name: str, make: Any):
    """Float32 without TF32: kernels round in another way, by some 1e-6 of the largest entry."""
    if name == "BackPACK":
        pytest.importorskip("backpack")
        if make is language:
            pytest.skip("BackPACK treats no embeddings; its own tests say so")
    here, there = estimates(name, make, "cpu"), estimates(name, make, "cuda")
    largest = max(value.abs().max() for value in here.values.values())
    for key, value in here.values.items():
        assert there.values[key].device.type == "cuda"
        assert (there.values[key].cpu() - value).abs().max() <= 1e-4 * largest
    for key, value in (here.stderr or {}).items():
        assert there.stderr[key].device.type == "cuda"
        assert torch.equal(there.stderr[key].cpu().isnan(), value.isnan())
        assert (there.stderr[key].cpu() - value).nan_to_num().abs().max() <= 1e-4 * largest
    assert (there.matrix, there.samples, there.notes) == (here.matrix, here.samples, here.notes)


@pytest.mark.parametrize("name", ["Fisher", "EmpiricalFisher", "SquaredGradient", "ExampleHutchinson"])
def test_recordings_on_the_device(name: str):
    found = {}
    for device in ("cpu", "cuda"):
        model, loss, x, y = small()
        model, estimator = model.to(device), getattr(curvkit.estimators, name)()
        with estimator.recording(model) as recording:
            outputs = model(x.to(device))
        found[device] = estimator.from_recording(recording, outputs, y.to(device), loss=loss, seed=1).values
    for key, value in found["cpu"].items():
        assert found["cuda"][key].device.type == "cuda"
        assert (found["cuda"][key].cpu() - value).abs().max() <= 1e-4 * value.abs().max()
