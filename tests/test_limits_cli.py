"""`curvkit sharpness` beside the eigenvalues: the limit of the checkpoint's optimizer, adaptive sharpness, and where there is none."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli.main import run
from curvkit_cli.render_stability import remarks
from optimizer_samples import state_of
from oracles import dense
from samples import TRAIN, examples, net
from torch import Tensor, nn

import curvkit
from curvkit.measures import Stability
from curvkit.measures.stabilities import stability

SHARPNESS = ("sharpness", "ckpt.pt", "--objective", "train.py:objective", "--seed", "0", "--no-data-doubt")
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("train.py").write_text(TRAIN)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run([*SHARPNESS, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def told(typed: Typed) -> Callable[..., dict[str, Any]]:
    def call(*arguments: str) -> dict[str, Any]:
        code, out, err = typed("--json", "--tol", "1e-4", *arguments)
        assert code == 0, err
        return json.loads(out)["result"]

    return call


def trained(
    make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 5
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer, (x, y) = make(model), examples()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def hessian(model: nn.Module) -> Tensor:
    """Rung 2: dense, in float64."""
    x, y = examples(torch.float64)
    return dense(copy.deepcopy(model).double(), lambda call: F.cross_entropy(call(x), y)).hessian


def test_gradient_descent_takes_no_further_search(told: Callable[..., dict[str, Any]]):
    """Heavy ball: 2 (1 + b) / lr beside lambda_max(H)."""
    model, optimizer = trained(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "ckpt.pt")
    result = told()
    found, truth = result["stability"], torch.linalg.eigvalsh(hessian(model))[-1].item()
    assert found["optimizer"] == "SGD"
    assert found["quantity"] == "lambda_max(H)"
    assert found["value"] == pytest.approx(truth, rel=1e-5)
    assert found["limit"] == pytest.approx(38.0)
    assert found["ratio"] == pytest.approx(truth / 38.0, rel=1e-5)
    assert found["largest_stable_lr"] == pytest.approx(0.1 * 38.0 / truth, rel=1e-5)
    assert found["verdict"] == "below the full-batch limit"
    assert found["products"] == 0
    assert result["products"] == result["search_products"]


def folded(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """lambda_max(P^-1 H + 19 wd) of AdamW, from its live state and a dense eigensolver; P has the correction of both moments."""
    group = optimizer.param_groups[0]
    b1, b2 = group["betas"]
    held = [optimizer.state[p] for p in model.parameters()]
    second = torch.cat([s["exp_avg_sq"].double().flatten() / (1 - b2 ** s["step"].item()) for s in held])
    divisor = (second.sqrt() + group["eps"]) * (1 - b1 ** held[0]["step"].item())
    matrix = torch.diag(divisor**-0.5) @ hessian(model) @ torch.diag(divisor**-0.5)
    decay = (1 + b1) / (1 - b1) * group["weight_decay"] * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.eigvalsh(matrix + decay)[-1].item()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)


def test_adamw_is_compared_in_its_own_metric(told: Callable[..., dict[str, Any]]):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer, step=5)
    result = told()
    found, truth = result["stability"], folded(model, optimizer)
    assert (found["optimizer"], found["quantity"]) == ("AdamW", "lambda_max(P^-1 H + W)")
    assert found["value"] == pytest.approx(truth, rel=1e-5)
    assert found["interval"][0] <= truth * (1 + 1e-6)
    assert found["interval"][1] >= truth * (1 - 1e-6)
    assert found["limit_times_lr"] == pytest.approx(38.0)
    assert found["largest_stable_lr"] == pytest.approx(38.0 / truth, rel=1e-5)
    assert found["products"] > 0
    assert result["products"] == result["search_products"] + found["products"]
    given = told("--lr", repr(found["largest_stable_lr"] * 2))["stability"]
    assert given["ratio"] == pytest.approx(2.0, rel=1e-6)
    assert (given["lr_label"], given["verdict"]) == ("given", "above the full-batch limit")
    assert next(rate for rate in given["rates"] if rate["label"] == "current")["ratio"] == pytest.approx(
        found["ratio"], rel=1e-6
    )


@pytest.mark.slow
def test_the_plan_counts_the_search_for_the_limit(told: Callable[..., dict[str, Any]]):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    products = [told("--plan", *more)["products"] for more in (["--no-limit"], [], ["--adaptive"])]
    assert products == [15, 30, 45]


def test_the_time_is_that_of_all_searches(typed: Typed):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    code, out, err = typed("--json", "--max-time", "0.000001", "--adaptive", "--tol", "1e-5")
    assert code == 0, err
    result = json.loads(out)["result"]
    assert (result["stability"]["converged"], result["adaptive_sharpness"]["converged"]) == (False, False)
    assert max(result["stability"]["products"], result["adaptive_sharpness"]["products"]) <= 4


def test_what_is_printed(typed: Typed):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    code, out, err = typed("--format", "table", "--lr", "0.5")
    assert code == 0, err
    text = " ".join(out.split())
    assert "limit lambda_max(P^-1 H + W) = " in text
    assert "AdamW's limit at lr 0.5 is 38 / lr = 76:" in text
    assert "is the largest that is stable on the quadratic model at these weights" in text
    assert "the lr of the checkpoint 0.01: " in text
    assert "a limit of full-batch training on a quadratic with frozen state: a heuristic for mini-batches" in text
    assert "for the limit" in text
    assert "safe" not in text


def test_a_decayed_rate_has_no_verdict(told: Callable[..., dict[str, Any]], typed: Typed):
    """The last checkpoint of a linear schedule has lr 0: the figures are of initial_lr."""
    model, optimizer = trained(adamw)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    found = told()["stability"]
    assert (found["lr"], found["lr_label"], found["verdict"]) == (1e-2, "initial_lr", None)
    assert found["reason"].startswith(
        "the learning rate is 0, far below its highest; the figures are of its initial value"
    )
    assert found["value"] > 0.0
    assert "the lr of the checkpoint 0: no step at all" in typed("--plain")[1]


@pytest.fixture(scope="module")
def concave() -> Stability:
    """H = -X'X / 2, with the eigenvalues -1/2 and -2."""
    model = nn.Linear(2, 1, bias=False).double()
    data = [(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)), torch.zeros(2, 1, dtype=torch.float64))]
    objective = curvkit.Objective(model, lambda outputs, targets: -F.mse_loss(outputs, targets) / 2, data)
    return stability(objective, state_of(model, torch.optim.SGD(model.parameters(), lr=0.1)), seed=0)


def moved(found: Stability, to: float, *, converged: bool = True) -> str:
    pairs = found.eigenpairs
    assert pairs is not None
    pairs = replace(
        pairs,
        values=torch.full_like(pairs.values, to),
        residuals=torch.full_like(pairs.residuals, 0.01),
        converged=torch.tensor([converged]),
    )
    return dict(remarks(replace(found, eigenpairs=pairs)))["largest lr"]


def test_that_no_curvature_is_positive_is_said_only_where_it_is_known(concave: Stability):
    assert concave.value == pytest.approx(-0.5)
    said = "no curvature is positive: every learning rate is below the limit of the quadratic model"
    assert dict(remarks(concave))["largest lr"] == said
    assert moved(concave, -0.05) == said
    assert moved(concave, -0.05, converged=False) == ("not known: the eigenvalue has not converged and may be larger")
    assert moved(concave, -0.001).startswith("not known: the interval of the eigenvalue reaches above 0, up to 0.09")
    assert " is the largest that is stable on the quadratic model" in moved(concave, 0.05)
    assert moved(concave, 0.05, converged=False) == (
        "not known, but at most 5: the eigenvalue has not converged and may be larger"
    )


def test_a_rate_that_cannot_be_compared_is_printed_with_its_reason(typed: Typed):
    model, optimizer = trained(adamw)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=10)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    code, out, err = typed("--plain")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("other lr\t"))
    assert "initial_lr 0.002: " in line
    assert line.endswith(
        "the peak lr 0.05: not comparable (max_lr of OneCycleLR; the momentum is another one there, 0.85)"
    )


def test_nothing_is_compared_where_it_was_not_wanted(told: Callable[..., dict[str, Any]]):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    assert told("--no-limit")["stability"] is None
    found = told("--params", "inner.*")["stability"]
    assert found["reason"] == "--params leaves parameters out, and the optimizer moves them all"


def test_a_learning_rate_that_is_none_or_idle(typed: Typed):
    torch.save(net().state_dict(), "ckpt.pt")
    code, _, err = typed("--lr", "nan")
    assert (code, "nan is no learning rate. Write a finite number above 0" in err) == (2, True)
    code, _, err = typed("--lr", "0.1", "--no-limit")
    assert (code, "--lr asks what the limit would be, and --no-limit leaves it out" in err) == (2, True)


def test_batch_norm_with_fixed_statistics_has_no_verdict(told: Callable[..., dict[str, Any]]):
    """A bias before BatchNorm has next to no gradient in training, and curvature with fixed statistics."""
    Path("train.py").write_text(
        TRAIN
        + """

class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.outer(torch.tanh(self.norm(self.inner(x))))

def normed():
    return curvkit.Objective(Normed().eval(), F.cross_entropy, [(x, y)])
"""
    )
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(Path("train.py").read_text(), namespace)
        model = namespace["Normed"]()
    optimizer, (x, y) = torch.optim.NAdam(model.named_parameters(), lr=3e-3, eps=1e-14), examples()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    found = told("--objective", "train.py:normed")["stability"]
    assert found["ratio"] > 0.0
    assert found["verdict"] is None
    assert found["reason"].startswith(
        "BatchNorm is measured with fixed statistics and was trained with those of the batch"
    )


def without_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return model.state_dict()


def of_another_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    other, foreign = trained(lambda model: torch.optim.AdamW(model.parameters(), lr=0.1))
    state = foreign.state_dict()
    for held in state["state"].values():
        held["exp_avg_sq"] = torch.ones(7)
    return {"model": other.state_dict(), "optimizer": state}


def permuted(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    model, optimizer = trained(lambda model: torch.optim.AdamW(list(model.parameters())[::-1], lr=0.1))
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def eight_bit(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    state = optimizer.state_dict()
    for held in state["state"].values():
        held["state1"], held["qmap1"] = held.pop("exp_avg").to(torch.uint8), torch.zeros(256)
    return {"model": model.state_dict(), "optimizer": state}


@pytest.mark.parametrize("content", [without_state, of_another_model, permuted, eight_bit])
def test_without_a_state_that_fits_the_reason_is_said(content: Any, typed: Typed):
    torch.save(content(*trained(lambda model: torch.optim.AdamW(model.parameters(), lr=0.1))), "ckpt.pt")
    code, out, err = typed("--plain")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("limit\t"))
    assert line.startswith("limit\tno stability limit: ")
    assert ("no names" in line) == ("if the optimizer is made from model.named_parameters()" in line)
    assert len(line) > len("limit\tno stability limit: ") + 20


@pytest.mark.slow
def test_a_finished_run_is_shown_again_with_its_limit(typed: Typed):
    model, optimizer = trained(adamw)
    curvkit.save("ckpt.pt", model=model, optimizer=optimizer)
    first = typed("--plain", "-o", "out", "--adaptive")
    again = typed("--plain", "-o", "out", "--adaptive", "--resume")
    assert first[0] == again[0] == 0

    def lines(out: str) -> list[str]:
        return [
            line
            for line in out.splitlines()
            if line.startswith(("limit", "largest lr", "letters", "adaptive", "caution"))
        ]

    assert len(lines(first[1])) == 5
    assert lines(again[1]) == lines(first[1])
    other = typed("--plain", "-o", "out", "--adaptive", "--resume", "--lr", "0.3")
    assert other[0] == 2
    assert "is the result of another run" in other[2]


def test_weights_before_a_norm_bring_the_adaptive_measure(told: Callable[..., dict[str, Any]]):
    Path("train.py").write_text(
        TRAIN
        + """

class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(6, eps=1e-12)

    def forward(self, x):
        return self.outer(torch.tanh(self.norm(self.inner(x))))

def normed():
    torch.manual_seed(0)
    return curvkit.Objective(Normed().double(), F.cross_entropy, [(x.double(), y)])
"""
    )
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(Path("train.py").read_text(), namespace)
        model = namespace["normed"]().model
    with torch.no_grad():
        model.inner.bias.zero_()
    torch.save(model.state_dict(), "ckpt.pt")
    one = told("--objective", "train.py:normed", "--no-limit")
    with torch.no_grad():
        model.inner.weight *= 10.0
    torch.save(model.state_dict(), "ckpt.pt")
    ten = told("--objective", "train.py:normed", "--no-limit")
    assert one["scale_invariance"]["invariant"] == ["inner.weight"]
    assert ten["adaptive_sharpness"]["value"] == pytest.approx(one["adaptive_sharpness"]["value"], rel=1e-6)
    raw = [result["eigenvalues"][0]["value"] for result in (one, ten)]
    assert abs(raw[0] - raw[1]) > 1e-3 * raw[0]
