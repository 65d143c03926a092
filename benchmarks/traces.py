"""The trace of the Hessian at equal true error: products and time, beside PyHessian and curvlinops.

    python benchmarks/traces.py [mlp resnet decoder] [--errors 0.1 0.03] [--runs 8] [--truth 0.003]

The truth is our own estimate with an interval of `--truth`; its half-width is printed, and must be small beside the errors asked for. Each
contender is run with several seeds at each of a growing series of budgets; its error is the root mean square over the seeds, and the
smallest budget whose error is small enough is shown. Ours is also run as a user would, with the tolerance alone: then the share of runs
whose interval holds the truth is shown. Times are in gradients (forward and backward of the batch), setting up included.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cases import CASES, Case
from curvlinops import HessianLinearOperator, hutchinson_trace, hutchpp_trace, xtrace
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.trace import Method
from curvkit.measures import TraceSettings, trace

warnings.filterwarnings("ignore")
BUDGETS = (12, 30, 60, 120, 240, 480)
pyhessian = importlib.import_module("pyhessian.hessian")  # the package hides its module behind a class of the same name


@dataclass(frozen=True)
class Run:
    """What a contender found, and what it took."""

    value: float
    products: int
    seconds: float
    holds: bool | None = None


def ours(case: Case, seed: int, budget: int, *, method: Method) -> Run:
    """A fixed budget: a tolerance that is never reached."""
    rank = budget // 2 if method == "deflated" else budget // 3 if method == "hutch++" else None
    search = linalg_trace.Settings(method=method, tolerance=1e-9, max_products=budget, rank=rank)
    began = time.perf_counter()
    found = trace(case.objective(), seed=seed, settings=TraceSettings(search, preflight=False))
    return Run(found.value, found.products, time.perf_counter() - began)


def as_used(case: Case, seed: int, tolerance: float, truth: float) -> Run:
    began = time.perf_counter()
    found = trace(case.objective(), tolerance=tolerance, max_products=2000, seed=seed)
    holds = found.estimate.low <= truth <= found.estimate.high
    return Run(found.value, found.products, time.perf_counter() - began, holds)


def curvlinops_run(case: Case, seed: int, budget: int, *, estimator: Callable[..., torch.Tensor]) -> Run:
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    usable = budget - budget % 3 if estimator is hutchpp_trace else budget - budget % 2
    with sdpa_kernel(SDPBackend.MATH):
        began = time.perf_counter()
        H = HessianLinearOperator(case.model, Wrapped(case), parameters, [(case.x, case.y)], check_deterministic=False)
        value = float(estimator(H, usable))
        return Run(value, usable, time.perf_counter() - began)


class Wrapped(nn.Module):
    """The loss as a module with a `reduction`, which curvlinops asks for; our batch is one, so that the mean is the right one."""

    reduction = "mean"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._loss = case.loss

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._loss(outputs, targets)


def pyhessian_run(case: Case, seed: int, budget: int) -> Run:
    training = case.model.training
    torch.manual_seed(seed)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            began = time.perf_counter()
            operator = pyhessian.hessian(case.model, case.loss, data=(case.x, case.y), cuda=False)
            samples = operator.trace(maxIter=budget, tol=0.0)
            seconds = time.perf_counter() - began
    finally:
        case.model.train(training)
        case.model.zero_grad()
    return Run(statistics.fmean(map(float, samples)), len(samples), seconds)


CONTENDERS: dict[str, Callable[[Case, int, int], Run]] = {
    "curvkit deflated": partial(ours, method="deflated"),
    "curvkit hutchinson": partial(ours, method="hutchinson"),
    "curvkit hutch++": partial(ours, method="hutch++"),
    "curvkit xtrace": partial(ours, method="xtrace"),
    "curvlinops hutchinson_trace": partial(curvlinops_run, estimator=hutchinson_trace),
    "curvlinops hutchpp_trace": partial(curvlinops_run, estimator=hutchpp_trace),
    "curvlinops xtrace": partial(curvlinops_run, estimator=xtrace),
    "PyHessian trace": pyhessian_run,
}


def root_mean_square(runs: list[Run], truth: float) -> float:
    return statistics.fmean((run.value / truth - 1) ** 2 for run in runs) ** 0.5


def gradient_seconds(case: Case) -> float:
    parameters, times = list(case.model.parameters()), []
    for _ in range(11):
        began = time.perf_counter()
        torch.autograd.grad(case.value(), parameters)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["mlp", "resnet", "decoder"])
    parser.add_argument("--errors", type=float, nargs="*", default=[0.1, 0.03])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--truth", type=float, default=0.003)
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS)
    arguments = parser.parse_args()
    row("model", "wanted error", "contender", "products", "time / gradient", "measured error", "intervals that hold")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.cases:
        case = CASES[name]()
        g = gradient_seconds(case)
        truth = trace(case.objective(), tolerance=arguments.truth, max_products=20_000, seed=10**6)
        half = truth.estimate.half_width / abs(truth.value)
        row(
            case.name,
            "",
            "truth",
            truth.products,
            f"{truth.seconds / g:.0f}",
            f"within {half:.1e}",
            f"{truth.value:.6g}",
        )
        for contender, run in CONTENDERS.items():
            missing = sorted(arguments.errors, reverse=True)
            for budget in arguments.budgets:
                if not missing:
                    break
                try:
                    runs = [run(case, seed, budget) for seed in range(arguments.runs)]
                except Exception as failure:  # of a contender, as curvlinops on silu
                    row(case.name, "", contender, "fails", "", str(failure).partition("\n")[0], "")
                    missing = []
                    break
                error = root_mean_square(runs, truth.value)
                spent = statistics.median(r.seconds for r in runs) / g
                while missing and error <= missing[0]:
                    row(case.name, missing.pop(0), contender, runs[0].products, f"{spent:.0f}", f"{error:.1e}", "")
            for wanted in missing:
                row(case.name, wanted, contender, f"> {max(arguments.budgets)}", "", "not reached", "")
        for wanted in arguments.errors:
            runs = [as_used(case, seed, wanted, truth.value) for seed in range(arguments.runs)]
            products, spent = (statistics.median(getattr(r, key) for r in runs) for key in ("products", "seconds"))
            holds = f"{sum(bool(r.holds) for r in runs)} of {len(runs)}"
            error = f"{root_mean_square(runs, truth.value):.1e}"
            row(
                case.name,
                f"± {wanted}",
                "curvkit, by its tolerance",
                f"{products:.0f}",
                f"{spent / g:.0f}",
                error,
                holds,
            )


if __name__ == "__main__":
    main()
