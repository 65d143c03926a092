"""The contract of estimators: every one of ours is a line of the table. What the contract finds is in test_check_estimator.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, normal, seeded

from curvkit.checkpoints import read, save
from curvkit.checkpoints.optimizer_state import OptimizerState as StoredState
from curvkit.checkpoints.optimizer_state import optimizer_state
from curvkit.estimators import (
    BackPACK,
    Controlled,
    Deflated,
    DiagonalEstimator,
    EmpiricalFisher,
    Exact,
    ExampleHutchinson,
    Fisher,
    Hutchinson,
    Lanczos,
    OptimizerState,
    SquaredGradient,
    XDiag,
)
from curvkit.estimators.registry import BUILT_IN, estimator_class
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.testing import check_estimator

QUICK: dict[str, DiagonalEstimator] = {
    "the GGN, exactly": Exact("ggn"),
    "the empirical Fisher matrix": EmpiricalFisher(),
    "one squared gradient": SquaredGradient(),
}
SLOW: dict[str, DiagonalEstimator] = {
    "the Hessian, exactly": Exact("hessian"),
    "the Fisher matrix": Fisher(),
    "the Fisher matrix, three samples": Fisher(num_samples=3),
    "one probe": Hutchinson(num_probes=1),
    "four probes": Hutchinson(num_probes=4),
    "one probe per example": ExampleHutchinson(),
    "three probes per example": ExampleHutchinson(num_probes=3),
    "XDiag": XDiag(num_products=10),
    "deflated": Deflated(Hutchinson(num_probes=4), rank=4),
    "controlled": Controlled(Hutchinson(num_probes=3)),
    "controlled, per example": Controlled(ExampleHutchinson(num_probes=3)),
    "the top eigenspace": Lanczos(rank=3),
    "the top eigenspace and the rest": Lanczos(rank=3, remainder=Hutchinson(num_probes=4)),
}
"""On the small classifier that the check brings along."""
EXTRA: dict[str, DiagonalEstimator] = {
    "BackPACK, the Hessian": BackPACK("DiagHessian"),
    "BackPACK, the GGN": BackPACK("DiagGGNExact"),
    "BackPACK, the GGN by samples": BackPACK("DiagGGNMC", num_samples=3),
}


@pytest.mark.parametrize("name", QUICK)
def test_an_estimator_keeps_the_contract(name: str):
    check_estimator(QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_sampled_estimator_keeps_the_contract(name: str):
    check_estimator(SLOW[name])


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("name", EXTRA)
def test_an_estimator_of_a_library_keeps_the_contract(name: str):
    pytest.importorskip("backpack")
    check_estimator(EXTRA[name])


def adamw(path: Path) -> tuple[OptimizerState, Objective]:
    """From a checkpoint; batches of two sizes, in float32."""
    with seeded():
        model = MLP([4, 6, 3], "tanh")
    objective = Objective(model, F.cross_entropy, cut([4, 3, 1], normal(8, 4, dtype=torch.float32), classes(8, num=3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for x, y in objective.batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    saved = read(save(path / "ckpt.pt", model=model, optimizer=optimizer))
    state = optimizer_state(saved, {name: p.shape for name, p in model.named_parameters()})
    assert isinstance(state, StoredState)
    return OptimizerState(source=state), objective


def test_an_optimizer_state_keeps_the_contract(tmp_path: Path):
    check_estimator(*adamw(tmp_path))


def test_every_estimator_of_ours_is_in_the_table():
    there = {type(estimator) for estimator in (*QUICK.values(), *SLOW.values(), *EXTRA.values())} | {OptimizerState}
    assert {estimator_class(name) for name in BUILT_IN} == there
