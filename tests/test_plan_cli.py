"""`--plan`: what is printed, that nothing is measured, and what the forecasts are made of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli import planning
from curvkit_cli.main import run
from samples import TRAIN, net

from curvkit.errors import InvalidArgument
from curvkit.linalg import lanczos
from curvkit.linalg import trace as linalg_trace
from curvkit.measures import (
    SharpnessSettings,
    TraceSettings,
    forecast_sharpness,
    forecast_trace,
    piecewise_linear,
    sharpness,
    trace,
)
from curvkit.objectives import Objective
from curvkit.operators import Forecast, Hessian
from curvkit.operators.batchwise import BatchwiseOperator

OBJECTIVE = ("ckpt.pt", "--objective", "train.py:objective")
N = 51
"""Parameters of the network."""
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("train.py").write_text(TRAIN)
    torch.save(net().state_dict(), "ckpt.pt")
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):  # the user's file seeds the global generator
            code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def objective() -> Objective:
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(Path("train.py").read_text(), namespace)
        return namespace["sized"](6)


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an operator was made")

    monkeypatch.setattr(BatchwiseOperator, "__init__", refuse)


@pytest.mark.usefixtures("unmade")
@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_plan_is_printed_and_nothing_is_measured(typed: Typed, command: str):
    code, out, err = typed(command, *OBJECTIVE, "--plan")
    assert code == 0, err
    told = dict(line.split("\t") for line in out.splitlines())
    names = ["plan", "engine", "residency", "parts", "graphs", "basis", "copies", "peak", "budget", "free", "time"]
    assert list(told) == names
    assert told["plan"] == f"plan of {command} for ckpt.pt"
    assert told["engine"] == "reverse over reverse"
    assert told["residency"].startswith("retained: 0.")
    assert told["parts"] == "1 part per batch"
    assert told["copies"].startswith("612 bytes")  # 3 * 51 * 4
    assert "an estimate" in told["time"]
    assert "an estimate" in told["peak"]
    assert told["free"].endswith("on cpu")
    assert "objective: train.py:objective" in err


@pytest.mark.usefixtures("unmade")
@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_json_is_one_document(typed: Typed, command: str):
    code, out, _ = typed(command, *OBJECTIVE, "--plan", "--json", "-q", "--residency", "streamed", "-o", "out")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "curvkit.plan/1")
    assert json.loads(Path("out/plan.json").read_text()) == document
    result = document["result"]
    assert (result["plan"]["residency"], result["plan"]["reason"], result["estimated"]) == (
        "streamed",
        "as asked",
        True,
    )
    assert result["vector_bytes"] == 3 * N * 4
    assert result["seconds"] > 0.0
    assert document["record"]["options"]["plan"]["source"] == "commandline"
    assert typed(command, *OBJECTIVE, "--plan", "-o", "out")[0] == 2  # it is there already


def test_table_on_a_terminal(typed: Typed):
    code, out, _ = typed("sharpness", *OBJECTIVE, "--plan", "--format", "table", "-q")
    assert code == 0
    assert "plan of sharpness for ckpt.pt" in out
    assert "31 products of 2 gradients" in " ".join(out.split())


@pytest.mark.parametrize("command", ["sharpness", "trace"])
@pytest.mark.parametrize("planned", [True, False])
def test_too_little_memory_is_refused_with_the_bytes_needed(typed: Typed, command: str, planned: bool):
    code, out, err = typed(command, *OBJECTIVE, "--memory", "1000", "-q", *(["--plan"] if planned else []))
    assert (code, out) == (2, "")
    assert (
        "--memory 1000 is too little: half of it is for vectors, and one product alone holds 3 of 51 parameters" in err
    )
    assert (
        "so that 1,224 bytes are the least, graphs apart. Raise --memory, or leave parameters out by --params." in err
    )


def test_a_plan_of_a_random_model_is_refused(typed: Typed):
    code, _, err = typed("sharpness", "ckpt.pt", "--objective", "train.py:dropout", "--mode", "train", "--plan", "-q")
    assert code == 1
    assert "Use --mode eval" in err


def test_ctrl_c(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning.measuring, "followed", lambda *_, **__: (None, True))
    code, out, err = typed("sharpness", *OBJECTIVE, "--plan", "-q")
    assert (code, out) == (130, "")
    assert "Interrupted before the plan was made." in err


def test_forecast_of_sharpness(objective: Objective):
    """Law: the plan is that of the measurement, and the bytes add up."""
    found = forecast_sharpness(objective)
    assert isinstance(found, Forecast)
    measured = sharpness(objective, seed=0)
    for name in ("residency", "micro_batches", "graph_bytes", "batch_bytes", "rule", "dtype", "device", "threads"):
        assert getattr(found.plan, name) == getattr(measured.plan, name), name
    assert (found.products, found.basis_rows, found.basis_bytes) == (31, 15, 15 * N * 4)
    assert found.graph_bytes == found.plan.graph_bytes > 0
    assert found.peak_bytes == found.plan.graph_bytes + found.plan.batch_bytes + 18 * N * 4
    assert found.seconds == pytest.approx((1.5 + 31 * 2.0) * found.gradient_seconds)
    settings = SharpnessSettings(lanczos.Settings(num=3, max_rows=20), residency="streamed", data_doubt=False)
    found = forecast_sharpness(objective, settings)
    assert (found.products, found.basis_rows, found.gradients_per_product) == (35, 20, 3.3)
    assert found.graph_bytes == found.plan.batch_bytes // found.plan.micro_batches
    assert found.peak_bytes == found.graph_bytes + 23 * N * 4
    difference = forecast_sharpness(objective, SharpnessSettings(rule="difference"))
    assert (difference.plan.rule, difference.plan.dtype) == ("differences of gradients", "float64")
    assert (difference.gradients_per_product, difference.vector_bytes) == (4.0, 3 * N * 8)


def test_forecast_of_a_trace(objective: Objective):
    found = forecast_trace(objective)
    assert found.products == trace(objective, seed=0).estimate.products == N  # done exactly
    sampled = forecast_trace(objective, TraceSettings(linalg_trace.Settings(method="hutchinson", max_products=60)))
    assert (sampled.products, sampled.basis_rows) == (60, 60)
    half = TraceSettings(memory_bytes=20 * N * 4, residency="streamed")
    assert (forecast_trace(objective, half).plan.basis_rows, forecast_trace(objective, half).basis_rows) == (10, 10)
    with pytest.raises(InvalidArgument, match="trace: memory_bytes=100 is too little"):
        forecast_trace(objective, TraceSettings(memory_bytes=100))


def test_a_forecast_of_a_trace_is_that_of_its_run():
    """What the run refuses the plan refuses with the same words; a structure that serves costs what is predicted of it."""
    x, y = torch.rand(40, 6), torch.arange(40) % 3
    for activation, options in (
        (torch.nn.Tanh, {"method": "exact"}),
        (torch.nn.Tanh, {"method": "deflated", "rank": 1000}),
    ):
        layers = (torch.nn.Linear(6, 58), activation(), torch.nn.Linear(58, 3))  # n = 583
        it = Objective(torch.nn.Sequential(*layers), torch.nn.functional.cross_entropy, [(x, y)])
        settings = TraceSettings(linalg_trace.Settings(**options))  # pyright: ignore
        with pytest.raises(InvalidArgument) as run_says:
            trace(it, settings=settings, seed=0)
        with pytest.raises(InvalidArgument) as plan_says:
            forecast_trace(it, settings)
        assert str(plan_says.value) == str(run_says.value)
    layers = (torch.nn.Linear(6, 58), torch.nn.ReLU(), torch.nn.Linear(58, 3))
    it = Objective(torch.nn.Sequential(*layers), torch.nn.functional.cross_entropy, [(x, y)])
    found = forecast_trace(it, TraceSettings(linalg_trace.Settings(method="exact")))
    assert found.products == math.ceil(piecewise_linear.predicted_products(it)) < 583
    assert trace(it, method="exact", seed=0).estimate.exact


def test_seconds_are_of_the_right_order(objective: Objective):
    """A network whose rows fill the processor: within a factor of 10 of what a gradient takes on this machine, busy or not."""
    import time

    big = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Tanh(), torch.nn.Linear(512, 10))
    x, y = torch.zeros(4096, 64), torch.zeros(4096, dtype=torch.int64)
    it = Objective(big, objective.loss, [(x, y)])
    found = forecast_sharpness(it)
    it.gradient()
    began = time.perf_counter()
    it.gradient()
    seconds = time.perf_counter() - began
    assert seconds / 10 < found.gradient_seconds < 10 * seconds
    assert Hessian(it).plan.graph_bytes == found.plan.graph_bytes


def test_sizes_are_for_people():
    assert [planning._size(n) for n in (10, 2048, 5 << 20, 3 << 29)] == ["10 bytes", "2 KiB", "5 MiB", "1.5 GiB"]
